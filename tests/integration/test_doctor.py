"""Doctor names what would hurt, with the remedy, before it does."""

from typing import Any

import psycopg
import pytest

from sync_pipeline import doctor
from sync_pipeline.records import Finding
from tests.engine import config_of, installed
from tests.helpers import Pair, write_config

pytestmark = pytest.mark.core


def findings(pair: Pair, check: str | None = None) -> list[Finding]:
    found = doctor.examine(config_of(pair))
    return [finding for finding in found if check in {None, finding.check}]


def only(pair: Pair, check: str) -> Finding:
    found = findings(pair, check)
    assert len(found) == 1, doctor.examine(config_of(pair))
    return found[0]


def configure(pair: Pair, *tables: str | dict[str, Any]) -> None:
    write_config(pair.config_path, tables)


def on_both(pair: Pair, statement: str) -> None:
    for node in pair.nodes:
        node.execute(statement)


def test_a_healthy_pair_has_no_findings(pair: Pair) -> None:
    installed(pair)

    assert findings(pair) == []


def test_a_node_that_cannot_be_reached_is_an_error_and_the_other_one_is_still_examined(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pair)
    pair.billing.execute("alter table sync.sync_events set (autovacuum_enabled = false)")
    environment = pair.environment | {"CRM_DSN": "postgresql://a:secret@127.0.0.1:1/x"}
    monkeypatch.setattr(Pair, "environment", environment)

    found = findings(pair)

    assert [(f.level, f.check, f.node) for f in found] == [
        ("error", "connection", "crm"),
        ("warning", "autovacuum", "billing"),
    ]
    assert "secret" not in str(found)


def test_a_missing_table_a_missing_key_and_a_missing_column_are_all_named_at_once(
    pair: Pair,
) -> None:
    pair.billing.execute("drop table orders")
    on_both(pair, "create table tags (name text)")
    pair.crm.execute("alter table accounts add column region text")
    configure(pair, "accounts", "users", "orders", "tags")

    found = {(f.node, f.table): f for f in findings(pair, "catalog")}

    assert {f.level for f in found.values()} == {"error"}
    assert "does not exist" in found["billing", "orders"].message
    assert "no primary key" in found["crm", "tags"].message
    assert "region" in found["billing", "accounts"].message
    assert "exclude" in found["billing", "accounts"].remedy


def test_nothing_installed_is_a_warning_and_installed_on_one_node_only_is_an_error(
    pair: Pair,
) -> None:
    assert [(f.level, f.check) for f in findings(pair)] == [("warning", "schema")]
    installed(pair)
    pair.billing.execute("drop schema sync cascade")

    finding = only(pair, "schema")

    assert (finding.level, finding.node) == ("error", "billing")
    assert "install" in finding.remedy


def test_a_disabled_and_a_missing_trigger_are_errors_with_different_remedies(pair: Pair) -> None:
    installed(pair)
    pair.crm.execute("alter table users disable trigger sync_capture_update")
    pair.billing.execute("drop trigger sync_capture_truncate on orders")

    found = {f.node: f for f in findings(pair, "capture")}

    assert {f.level for f in found.values()} == {"error"}
    assert "sync_capture_update on public.users is disabled" in found["crm"].message
    assert "enable trigger" in found["crm"].remedy
    assert "sync_capture_truncate on public.orders is missing" in found["billing"].message
    assert "install" in found["billing"].remedy


def test_a_role_without_rights_is_told_which_it_lacks(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.crm.execute("drop role if exists doctor_guest")
    pair.crm.execute("create role doctor_guest login")
    pair.crm.execute("grant select on accounts to doctor_guest")
    dsn = psycopg.conninfo.make_conninfo(pair.crm.dsn, user="doctor_guest")
    monkeypatch.setattr(Pair, "environment", pair.environment | {"CRM_DSN": dsn})
    configure(pair, "accounts", "users")

    messages = [f.message for f in findings(pair, "rights") if f.level == "error"]

    pair.crm.execute("drop owned by doctor_guest")
    pair.crm.execute("drop role doctor_guest")
    assert any("may not create schema sync" in message for message in messages)
    assert any(
        "lacks the right to select, insert, update, delete on public.users" in m for m in messages
    )
    assert any(
        "lacks the right to insert, update, delete on public.accounts" in m for m in messages
    )
    assert any("does not own public.accounts" in message for message in messages)
