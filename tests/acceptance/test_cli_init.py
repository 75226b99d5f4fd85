"""`init`: from two connection strings to a file that works, and what each step says to do next."""

import json
import subprocess
from typing import Any

import pytest

from sync_pipeline.config import parse
from tests.engine import equal
from tests.helpers import Pair
from tests.program import answer, run, succeed

ARGUMENTS = ("init", "--first", "crm=CRM_DSN", "--second", "billing=BILLING_DSN")


@pytest.fixture
def bare(pair: Pair) -> Pair:
    """Two databases with tables and no configuration."""
    pair.config_path.unlink()
    return pair


def init(pair: Pair, *more: str) -> subprocess.CompletedProcess[str]:
    return run(pair, *ARGUMENTS, *more)


def proposed(pair: Pair) -> dict[str, Any]:
    document = answer(pair, *ARGUMENTS)
    assert document["file"] == str(pair.config_path)
    return document


def text(pair: Pair) -> str:
    return pair.config_path.read_text(encoding="utf-8")


def test_two_databases_become_an_equal_pair_by_what_each_step_says_next(bare: Pair) -> None:
    bare.crm.insert("accounts", id=1, name="one")
    bare.crm.insert("users", id=1, account_id=1, email="a@x.org")
    bare.billing.insert("accounts", id=2, name="two")
    assert "next: read" in succeed(bare, *ARGUMENTS)
    assert "next: `sync-pipeline install`" in succeed(bare, "doctor")
    assert "`sync-pipeline backfill --from crm`" in succeed(bare, "install")
    for node in ("crm", "billing"):
        assert "next: `sync-pipeline stream`" in succeed(bare, "backfill", "--from", node)
    assert "next: `sync-pipeline stream`" in succeed(bare, "doctor")
    succeed(bare, "sync")
    assert equal(bare)
    assert [row[0] for row in bare.crm.rows("accounts")] == [1, 2]


def test_the_file_holds_variables_and_no_secret_and_lists_parents_first(bare: Pair) -> None:
    assert list(proposed(bare)["tables"]) == ["accounts", "users", "orders"]
    assert 'crm: {dsn: "${CRM_DSN}"}' in text(bare)
    assert bare.crm.dsn not in text(bare)


def test_what_cannot_be_synced_is_left_out_with_the_reason(bare: Pair) -> None:
    bare.crm.execute("create table only_here (id int primary key)")
    for node in bare.nodes:
        node.execute("create table log (line text)")
    left_out = proposed(bare)["left_out"]
    assert "no primary key" in left_out["log"]
    assert left_out["public.only_here"] == "only crm has it"
    assert "# Left out:" in text(bare)
    assert "log: crm: the table has no primary key" in text(bare)


def test_a_table_that_joins_two_others_is_proposed_with_its_unique_columns_as_key(
    bare: Pair,
) -> None:
    for node in bare.nodes:
        node.execute(
            'create table "_Tags" ("A" int not null references accounts, "B" int not null)'
        )
        node.execute('create unique index on "_Tags" ("A", "B")')
    assert "_Tags" in proposed(bare)["tables"]
    succeed(bare, "install")
    bare.crm.insert("accounts", id=1, name="one")
    bare.crm.execute('insert into "_Tags" values (1, 7)')
    succeed(bare, "sync")
    assert bare.billing.rows('select * from "_Tags"') == [(1, 7)]


def test_what_a_node_notes_of_its_own_migrations_is_left_out(bare: Pair) -> None:
    for node in bare.nodes:
        node.execute("create table schema_migrations (version text primary key)")
        node.execute("create schema app create table django_migrations (id int primary key)")
    document = proposed(bare)
    assert list(document["tables"]) == ["accounts", "users", "orders"]
    assert "migrations it has run" in document["left_out"]["schema_migrations"]
    assert "migrations it has run" in document["left_out"]["app.django_migrations"]


def test_a_queue_from_which_the_workers_of_a_node_take_their_work_is_left_out(bare: Pair) -> None:
    for node in bare.nodes:
        node.execute("create table solid_queue_jobs (id int primary key)")
        node.execute("create schema pgboss create table job (id int primary key)")
        node.execute("create table jobs (id int primary key)")
    document = proposed(bare)
    assert set(document["tables"]) == {"accounts", "users", "orders", "jobs"}
    assert "would do the same work twice" in document["left_out"]["solid_queue_jobs"]
    assert "would do the same work twice" in document["left_out"]["pgboss.job"]


def test_a_table_that_refers_to_one_that_is_not_synced_says_so(bare: Pair) -> None:
    for node in bare.nodes:
        node.execute("create table regions (name text unique)")
        node.execute(
            "create table shops (id int primary key, region text references regions (name))"
        )
    assert proposed(bare)["tables"]["shops"] == ["refers to public.regions, which is not synced"]


def test_columns_that_differ_are_excluded_or_named(bare: Pair) -> None:
    bare.crm.execute("alter table users add column phone text")
    bare.billing.execute("alter table users add column fax text")
    bare.billing.execute("alter table orders alter column amount type numeric(6, 2)")
    tables = proposed(bare)["tables"]
    assert tables["orders"] == ["amount is numeric(12,2) on crm, numeric(6,2) on billing"]
    config = parse(text(bare), bare.environment)
    assert set(config.table("users").exclude) == {"phone", "fax"}
    succeed(bare, "install")


def test_other_schemas_and_odd_names_are_mapped(bare: Pair) -> None:
    for node, schema in ((bare.crm, "sales"), (bare.billing, "Big Schema")):
        node.execute(f'create schema "{schema}"')
        node.execute(f'create table "{schema}"."Odd: name.x" (id int primary key, "yes" text)')
        node.execute("create schema shared")
        node.execute("create table shared.users (id int primary key)")
        node.execute('create table "null" ("Key #1" int primary key)')
    assert {"Odd: name_x", "shared.users", "users", "null"} <= set(proposed(bare)["tables"])
    succeed(bare, "install")
    bare.crm.execute("""insert into sales."Odd: name.x" values (1, 'a')""")
    succeed(bare, "sync")
    assert bare.billing.rows("""select * from "Big Schema"."Odd: name.x" """) == [(1, "a")]


def test_partitions_and_the_pipelines_own_tables_are_no_candidates(bare: Pair) -> None:
    for node in bare.nodes:
        node.execute("create table days (at date primary key) partition by range (at)")
        node.execute(
            "create table days_2024 partition of days for values from ('2024-01-01') to ('2025-01-01')"
        )
    succeed(bare, *ARGUMENTS)
    succeed(bare, "install")
    document = json.loads(init(bare, "--force", "--json").stdout)
    assert list(document["tables"]) == ["accounts", "days", "users", "orders"]
    assert document["left_out"] == {}


def test_a_file_that_is_there_is_not_touched_without_force(pair: Pair) -> None:
    before = text(pair)
    refused = init(pair)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert text(pair) == before
    assert init(pair, "--force").returncode == 0
    assert text(pair) != before


def test_without_a_common_table_nothing_is_written(bare: Pair) -> None:
    bare.crm.execute("drop table orders, users, accounts")
    result = init(bare)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no table in common" in result.stderr
    assert not bare.config_path.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--first", "crm=NOWHERE", "--second", "billing=BILLING_DSN"), 1, "$NOWHERE is not set"),
        (("--first", "crm=CRM_DSN", "--second", "crm=BILLING_DSN"), 2, "the same node"),
        (("--first", "crm", "--second", "billing=BILLING_DSN"), 2, "NODE=VARIABLE"),
        (("--first", "Crm!=CRM_DSN", "--second", "b=BILLING_DSN"), 1, "is no node name"),
        (("--first", "crm=CRM_DSN", "--second", "billing=CRM_DSN"), 1, "the same database as crm"),
        (("--first", "crm=EMPTY", "--second", "billing=CRM_DSN"), 1, "crm: $EMPTY: is empty"),
        (("--first", "crm=postgresql://x:secret@y/z", "--second", "b=B"), 2, "not the DSN itself"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    bare: Pair, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run(bare, "init", *arguments, EMPTY="")
    assert result.returncode == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "secret" not in result.stderr
