"""Three roles, none with more rights than it needs: the owner installs, the application works, the consumer syncs."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from sync_pipeline.cli import app
from sync_pipeline.errors import SyncPipelineError
from tests.engine import equal
from tests.helpers import Node, Pair, write_config
from tests.roles import (
    APPLICATION,
    CONSUMER,
    OWNER,
    drop,
    pair_of,
    run_script,
    separated,
    session,
)


@pytest.fixture
def roles(pair: Pair) -> Iterator[Pair]:
    with separated(pair):
        assert command(pair, OWNER, "install")[0] == 0
        yield pair


def command(pair: Pair, role: str, *arguments: str) -> tuple[int, str]:
    """Run a command in this process, which is quicker; return its exit code and all that it said."""
    done = CliRunner().invoke(
        app, [*arguments, "--config", str(pair.config_path)], env=pair_of(pair, role).environment
    )
    if isinstance(done.exception, SyncPipelineError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


def works(pair: Pair, role: str, *arguments: str) -> str:
    code, said = command(pair, role, *arguments)
    assert code == 0, (arguments, said)
    return said


def findings(pair: Pair, role: str) -> list[dict[str, Any]]:
    said = command(pair, role, "doctor", "--json")[1]
    # One document, and after it perhaps what stands on stderr.
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(said)[0]["findings"]
    return found


def fill(node: Node) -> None:
    """What an application does, with the rights that it has."""
    with session(node, APPLICATION) as application:
        application.execute(
            "insert into accounts values (1, 'one', null, null), (2, 'two', null, null)"
        )
        application.execute(
            "insert into users values (1, 1, 'a@x.org', 'a', 30), (2, 2, 'b@x.org', 'b', 30)"
        )
        application.execute("update users set name = 'c' where id = 1")
        application.execute("insert into orders values (1, 1, 10, null), (2, 2, 10, null)")
        application.execute("delete from users where id = 2")


def test_the_consumer_runs_every_command_but_install(roles: Pair) -> None:
    fill(roles.crm)
    assert {finding["check"] for finding in findings(roles, CONSUMER)} == {"backlog"}
    works(roles, CONSUMER, "sync")
    assert equal(roles)
    roles.billing.execute("alter table users add constraint adult check (age >= 18)")
    for node in roles.nodes:
        with session(node, APPLICATION) as application:
            application.execute("update accounts set name = %s where id = 1", [node.name])
    with session(roles.crm, APPLICATION) as application:
        application.execute("update users set age = 3")
    for arguments in (
        *(("stream", "--seconds", "1"), ("status",), ("pending",), ("failures",)),
        *(("failures", "retry"), ("conflicts",), ("conflicts", "resolve", "2", "--winner", "crm")),
        *(
            ("replay", "users", "--node", "crm", "--where", "age < 18"),
            ("failures", "discard", "--all", "--yes"),
        ),
        *(("backfill", "--from", "crm", "accounts"), ("pause",), ("resume",), ("sync",)),
        *(
            ("verify", "accounts", "orders"),
            ("verify", "--repair-from", "billing"),
            ("sync",),
            ("doctor",),
        ),
    ):
        works(roles, CONSUMER, *arguments)
    assert roles.billing.value("select count(*) from users where age < 18") == 0


def test_the_application_has_no_right_on_the_pipelines_schema_and_all_it_does_is_captured(
    roles: Pair,
) -> None:
    fill(roles.crm)
    roles.crm.execute(f"grant truncate on all tables in schema public to {APPLICATION}")
    with session(roles.crm, APPLICATION) as application:
        application.execute("truncate orders")
        for forbidden in (
            "select from sync.sync_events",
            "insert into sync.sync_events (table_name, record_id) values ('users', '1')",
            "select sync.has_events(0)",
            "create table sync.mine ()",
            "create trigger t after insert on users for each row execute function sync.capture_users()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                application.execute(forbidden.encode())
    assert roles.crm.value(
        "select not has_schema_privilege(%s, 'sync', 'usage, create') and not exists ("
        "select from information_schema.role_table_grants where table_schema = 'sync' and grantee in (%s, 'PUBLIC'))",
        APPLICATION,
        APPLICATION,
    )
    works(roles, CONSUMER, "sync")
    assert equal(roles)
    assert roles.billing.rows("orders") == []


def test_the_consumer_can_do_no_more_than_its_work(roles: Pair) -> None:
    roles.crm.execute("create table salaries (id int primary key)")
    with session(roles.crm, CONSUMER) as consumer:
        for forbidden in (
            "select from salaries",
            "truncate orders",
            "alter table orders disable trigger all",
            "drop trigger sync_capture_insert on orders",
            "create table sync.mine ()",
            "create table public.mine ()",
            "create or replace function sync.has_events(bigint) returns boolean return true",
            "set session_replication_role = replica",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                consumer.execute(forbidden.encode())
    code, said = command(roles, CONSUMER, "uninstall", "--yes")
    assert (code, "must be owner" in said) == (1, True)


def test_doctor_says_which_right_the_consumer_lacks(roles: Pair) -> None:
    for right, named in (
        ("usage on schema sync", "grant usage on schema"),
        ("delete on sync.sync_events", "grant delete on"),
        (
            "execute on function sync.has_events(bigint)",
            "grant execute on function sync.has_events",
        ),
        ("update, insert on users", "grant insert, update on public.users"),
        ("select on sync.sync_status", "grant select on"),
    ):
        roles.crm.execute(f"revoke {right} from {CONSUMER}")
        lacking = [found for found in findings(roles, CONSUMER) if found["check"] == "rights"]
        assert {found["level"] for found in lacking} == {"error"}, right
        assert any(named in found["remedy"] for found in lacking), lacking
        roles.crm.execute(f"grant {right} to {CONSUMER}")
    assert findings(roles, CONSUMER) == []


def test_the_script_and_install_may_run_again_in_any_order_and_uninstall_removes_all(
    roles: Pair,
) -> None:
    for node in roles.nodes:
        run_script(node)
    assert "nothing was missing" in works(roles, OWNER, "install")
    works(roles, OWNER, "uninstall", "--yes")
    for node in roles.nodes:
        assert node.value("select to_regnamespace('sync')") is None
        run_script(node)
    works(roles, OWNER, "install")
    fill(roles.billing)
    works(roles, CONSUMER, "sync")
    assert equal(roles)


def test_partitions_belong_to_the_owner_too_and_doctor_names_one_that_does_not(pair: Pair) -> None:
    with separated(pair):
        for node in pair.nodes:
            node.execute(
                "create table visits (id int primary key) partition by range (id);"
                'create table "Visits 1" partition of visits for values from (0) to (9)'
            )
            run_script(node, "accounts, visits")
        write_config(pair.config_path, ["accounts", "visits"])
        pair.crm.execute('alter table "Visits 1" owner to postgres')
        (found,) = (each for each in findings(pair, OWNER) if each["check"] == "rights")
        assert 'does not own public."Visits 1"' in found["message"]
        run_script(pair.crm, "accounts, visits")
        works(pair, OWNER, "install")


def test_a_role_that_may_not_create_the_schema_is_told_so(pair: Pair) -> None:
    pair.crm.execute("create role guest login")
    try:
        assert (
            any("authorization guest" in finding["remedy"] for finding in findings(pair, "guest"))
            or command(pair, "guest", "doctor")[0] == 1
        )
    finally:
        drop(pair.crm, "guest")
