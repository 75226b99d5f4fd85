"""The runbook is run: each of its statements, in the situation that it is written for."""

import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer.main

from sync_pipeline import install, verify
from sync_pipeline.cli import app
from sync_pipeline.database import connected
from sync_pipeline.link import Link, lead
from sync_pipeline.servers import Server
from tests.engine import equal, installed, sync_pair
from tests.helpers import Pair, Row, write_config

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"
_, *_PARTS = re.split(r"^## (.+)$", RUNBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
SECTIONS = dict(zip(_PARTS[::2], _PARTS[1::2], strict=True))
COMMANDS = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


def statements(section: str) -> list[str]:
    text = "\n".join(blocks(section, "sql"))
    return [part.strip() for part in re.split(r";[ ]*$", text, flags=re.MULTILINE) if part.strip()]


@pytest.fixture
def night(pair: Pair) -> Iterator[Pair]:
    """A pair in trouble of every kind: backlog, failures, conflicts, a lock, an old transaction, a dead batch."""
    tables: list[str | dict[str, Any]] = [
        "accounts",
        "users",
        {"name": "orders", "conflict": "hold"},
    ]
    write_config(pair.config_path, tables)
    config = installed(pair)
    crm, billing = pair.nodes
    crm.insert("accounts", id=1, name="one")
    for number in (41, 42):
        crm.insert("users", id=number, account_id=1, email=f"{number}@x.org", age=30)
    crm.insert("orders", id=1, user_id=42, amount=1)
    sync_pair(pair)
    for node in pair.nodes:
        node.execute("update users set name = %s where id = 42", node.name)
        node.execute("update orders set note = %s", node.name)
    sync_pair(pair)
    billing.execute("alter table users add constraint adult check (age >= 18)")
    crm.execute("update users set age = 3")
    crm.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) values ('nothing', '1', 'update')"
    )
    sync_pair(pair)
    crm.execute("update sync.sync_failures set state = 'dead' where record_id = '42'")
    crm.execute("update sync.sync_conflicts set resolved_at = now() - interval '8 days'")
    crm.execute(
        "insert into sync.sync_applied (source, ids, read_at) values ('billing', '{[1,2)}', now())"
    )
    crm.execute("create table report ()")
    with lead(config) as link, closing(crm.connect(autocommit=False)) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("lock table report")
        old.execute("select")
        for node in pair.nodes:
            node.execute("update users set name = 'waits' where id = 42")
        with waiting(link, crm.name):
            yield pair


class waiting:  # noqa: N801 - a context manager, used like a function
    """The consumer's writer waits for the lock of another session until the block ends."""

    def __init__(self, link: Link, node: str) -> None:
        self._connection = link.sides[node].writer

    def __enter__(self) -> None:
        self._connection.execute("set lock_timeout = 0")
        self._connection.execute("begin")
        self._connection.pgconn.send_query(b"lock table report")
        self._connection.pgconn.flush()

    def __exit__(self, *_: object) -> None:
        self._connection.pgconn.finish()


def run(node: psycopg.Connection[Row], statement: str) -> list[Row] | None:
    """Run one statement; return its rows, or None when it has none to return."""
    cursor = node.execute(statement.encode())
    return cursor.fetchall() if cursor.description else None


def test_every_statement_runs_and_every_look_finds_what_it_is_for(night: Pair) -> None:
    """From the first section to the last, as if all of it had to be done in one night."""
    nothing_found = []
    for section in SECTIONS:
        for text in statements(section):
            found = [run(node.connection, text) for node in night.nodes]
            # Nobody is idle for ten minutes in a test.
            if found != [None, None] and not any(found) and "10 minutes" not in text:
                nothing_found.append((section, text))
    assert not nothing_found


def test_every_command_parses() -> None:
    for section in SECTIONS:
        for line in "".join(blocks(section, "console")).splitlines():
            prompt, program, name, *arguments = shlex.split(line)
            assert (prompt, program) == ("$", "sync-pipeline")
            COMMANDS[name].make_context(name, arguments)


def test_links_within_the_runbook_lead_somewhere() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    anchors = {name.lower().replace(" ", "-") for name in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    for page in re.findall(r"\]\(([\w./-]+\.md)", text):
        assert (RUNBOOK.parent / page).is_file(), page


def statement(section: str, start: str) -> str:
    (found,) = (text for text in statements(section) if start in text)
    return found


def test_a_prepared_transaction_that_blocks_the_consumer_is_seen(tmp_path: Path) -> None:
    with (
        Server.create(tmp_path, settings={"max_prepared_transactions": 1}) as server,
        psycopg.connect(server.dsn(), autocommit=True) as application,
        psycopg.connect(
            server.dsn(), autocommit=True, application_name="sync-pipeline sync writer"
        ) as consumer,
        ThreadPoolExecutor(1) as pool,
    ):
        application.execute("create table users (id int)")
        application.execute("begin; lock table users; prepare transaction 'forgotten'")
        writing = pool.submit(consumer.execute, "insert into users values (1)")
        while not (found := run(application, statement("The lag grows", "pg_blocking_pids"))):
            assert not writing.done()
        application.execute("rollback prepared 'forgotten'")
        writing.result()
    assert [row[2] for row in found] == [0]


def test_a_record_that_changed_unseen_is_sent_by_one_insert(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    with pair.crm.connection.transaction():
        pair.crm.execute("set local session_replication_role = replica")
        pair.crm.insert("users", id=42, account_id=1, email="a@x.org")
    sync_pair(pair)
    assert not equal(pair)
    pair.crm.execute(statement("A record is stuck", "insert into"))
    sync_pair(pair)
    assert equal(pair)
    # It is no change: one of the other node that waits stays.
    pair.billing.execute("update users set name = 'new'")
    pair.crm.execute(statement("A record is stuck", "insert into"))
    sync_pair(pair)
    assert [node.value("select name from users") for node in pair.nodes] == ["new", "new"]


def test_a_dead_letter_is_retried_by_one_update(pair: Pair) -> None:
    installed(pair)
    pair.billing.execute("alter table users add constraint adult check (age >= 18)")
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=42, account_id=1, email="a@x.org", age=3)
    sync_pair(pair)
    pair.crm.execute("update sync.sync_failures set state = 'dead', next_attempt_at = null")
    pair.billing.execute("alter table users drop constraint adult")
    pair.crm.execute(statement("Dead letters", "update sync"))
    sync_pair(pair)
    assert equal(pair)
    assert pair.crm.value("select count(*) from sync.sync_failures") == 0


@pytest.mark.parametrize("winner", ["crm", "billing"])
def test_a_held_conflict_is_decided_by_hand(pair: Pair, winner: str) -> None:
    write_config(pair.config_path, ["accounts", {"name": "users", "conflict": "hold"}])
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=42, account_id=1, email="a@x.org")
    sync_pair(pair)
    for node in pair.nodes:
        node.execute("update users set name = %s", node.name)
    sync_pair(pair)
    mine, other = sorted(pair.nodes, key=lambda node: node.name != winner)
    other.execute("update users set age = 3")
    for node in (other, mine):
        node.execute(statement("Conflicts", "delete from sync.sync_failures"))
        node.execute(statement("Conflicts", "delete from sync.sync_events"))
    mine.execute(statement("Conflicts", "insert into"))
    for node in pair.nodes:
        noted = statement("Conflicts", "update sync.sync_conflicts")
        node.execute(noted.replace("'crm'", f"'{winner}'"))
    sync_pair(pair)
    assert equal(pair)
    assert mine.value("select name from users") == winner
    for node in pair.nodes:
        assert node.value("select retrying + dead + conflicts_held from sync.sync_status") == 0


def test_a_detached_partition_takes_no_rows_along(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create table years (year int primary key) partition by range (year)")
        node.execute("create table old partition of years for values from (0) to (2000)")
    write_config(pair.config_path, ["years"])
    installed(pair)
    pair.crm.insert("years", year=1999)
    sync_pair(pair)
    with pair.crm.connection.transaction():
        pair.crm.execute("alter table years detach partition old")
        look = statement("Detaching a partition", "drop trigger").replace("'users'", "'old'")
        for (drop,) in pair.crm.rows(look):
            pair.crm.execute(drop)
    pair.crm.execute("delete from old")
    sync_pair(pair)
    assert pair.billing.rows("years") == [(1999,)]
    assert pair.crm.value("select count(*) from pg_trigger where tgrelid = 'old'::regclass") == 0


def test_a_table_that_is_replaced_by_a_copy_goes_on_being_captured(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=1, account_id=1, email="a@x.org")
    sync_pair(pair)
    triggers = pair.crm.rows(statement("Replacing a table", "-- What to run"))
    with pair.crm.connection.transaction():
        pair.crm.execute("create table users_copy (like users including all)")
        pair.crm.execute("insert into users_copy select * from users")
        for (create,) in triggers:
            pair.crm.execute(create)
        pair.crm.execute("alter table users rename to users_before")
        pair.crm.execute("alter table users_copy rename to users")
    pair.crm.execute("update users set name = 'new'")
    sync_pair(pair)

    assert len(triggers) == 4
    assert equal(pair)


def test_one_update_pauses_and_another_resumes(pair: Pair) -> None:
    installed(pair)
    pair.billing.execute(statement("It is paused", "coalesce"))
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(pair)
    assert pair.crm.pending() == 1
    pair.billing.execute(statement("It is paused", "paused_at = null"))
    sync_pair(pair)
    assert equal(pair)


def test_a_restored_node_gets_what_the_other_one_has(pair: Pair) -> None:
    config = installed(pair)
    crm, billing = pair.nodes
    for number in (1, 2):
        crm.insert("accounts", id=number, name="before the backup")
    sync_pair(pair)
    backup: list[Any] = crm.rows("accounts")
    crm.execute("update accounts set name = 'after' where id = 1")
    crm.execute("delete from accounts where id = 2")
    crm.insert("accounts", id=3, name="after")
    sync_pair(pair)
    # The restore: old rows, and an old event that was sent long ago.
    with crm.connection.transaction():
        crm.execute("set local session_replication_role = replica")
        crm.execute("truncate accounts cascade")
        for row in backup:
            crm.execute("insert into accounts values (%s, %s, %s, %s)", *row)
    crm.execute("insert into sync.sync_events (table_name, record_id) values ('accounts', '1')")
    crm.execute("update sync.sync_node set database_oid = 1")
    for start in ("sync_events", "sync_failures", "sync_applied"):
        crm.execute(statement("After a restore", start))
    assert "install --confirm-identity" in SECTIONS["After a restore"]
    with connected(config.first, config, "t") as one, connected(config.second, config, "t") as two:
        connections = {"crm": one, "billing": two}
        install.install(config, connections, confirm_identity=True)
        report = verify.verify(config, connections, None)
        verify.repair(config, connections, report, "billing", dry_run=False)
    sync_pair(pair)
    assert equal(pair)
    assert [row[:2] for row in billing.rows("accounts")] == [(1, "after"), (3, "after")]


def test_dropping_the_schema_removes_everything_but_the_rows(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.execute(statement("Uninstalling", "drop schema"))
    assert pair.crm.value("select count(*) from pg_trigger where not tgisinternal") == 0
    pair.crm.execute("update accounts set name = 'still writable'")
    assert len(pair.crm.rows("accounts")) == 1
