"""What the pipeline costs, counted and not timed: statements, round trips, commits, rows and WAL."""

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import pytest
from psycopg import pq

from sync_pipeline import isolation, passes, queries, snapshot, waiting
from sync_pipeline.database import query, scalar
from sync_pipeline.link import WORTHWHILE_ROWS, Link, lead
from sync_pipeline.waiting import Waiting
from tests.crashing import Point
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import Node, Pair, write_config
from tests.shapes import link as linked

FEW = 10
MANY = 2_000
BATCH = MANY // 10
ROUND_TRIPS_PER_BATCH = 30
ROUND_TRIPS_PER_TABLE = 4
# The rows here are about 40 bytes, each index entry 16; with the headers of WAL records, and some for what runs beside.
SOURCE_WAL_BYTES_PER_EVENT = 90
TARGET_WAL_BYTES_PER_EVENT = 300
# An event is about 80 bytes with its header, its entry in the one index 16; both with the headers of their records.
CAPTURE_WAL_BYTES_PER_EVENT = 200
TARGET_WAL_BYTES_OF_A_BATCH = 4_000
# Of the 500 blocks or so that hold the dead events of the test. Up to 500 of them are not worth a look.
BLOCKS_PER_POLL = 20
TUPLES_PER_POLL = 2
# psycopg prepares what it has met five times, in one round trip more.
PASSES_UNTIL_PREPARED = 8
FLOOR_SECONDS = 60


@pytest.fixture
def pair(pair: Pair) -> Pair:
    """Two databases with the pipeline installed and accounts on both, in sync."""
    installed(pair)
    for node in pair.nodes:
        # No vacuum or analysis while something is counted.
        for table in ("accounts", "sync.sync_events", "sync.sync_applied"):
            node.execute(f"alter table {table} set (autovacuum_enabled = off)")
    add_accounts(pair.crm, MANY)
    with lead(config_of(pair)) as link:
        consume(link)
    return pair


@pytest.fixture
def link(pair: Pair) -> Iterator[Link]:
    """A worker that leads and has made its staging tables."""
    with lead(config_of(pair)) as link:
        rename(pair.crm, FEW, "first")
        consume(link)
        yield link


@pytest.fixture
def warm_link(pair: Pair, link: Link) -> Link:
    """A worker that has been at work for a while."""
    for number in range(PASSES_UNTIL_PREPARED):
        rename(pair.crm, FEW, f"warm {number}")
        consume(link)
    return link


def add_accounts(node: Node, count: int, *, first: int = 1) -> None:
    node.execute(
        "insert into accounts (id, name) select i, 'account ' || i from generate_series(%s::int, %s::int) as i",
        first,
        first + count - 1,
    )


def rename(node: Node, count: int, name: str) -> None:
    """Change the first accounts."""
    node.execute("update accounts set name = %s where id <= %s", name, count)


def remove_accounts(node: Node) -> None:
    node.execute("delete from accounts")


def replay(node: Node, count: int) -> None:
    """Mark the first accounts, which do not change."""
    node.execute(
        "insert into sync.sync_events (table_name, record_id, event_type)"
        " select 'accounts', i::text, 'update' from generate_series(1, %s::int) as i",
        count,
    )


def consume(link: Link) -> None:
    """Pass until nothing is left."""
    for _ in range(100):
        if not passes.run(link):
            return
    raise AssertionError("the passes do not end")


def raise_floor(node: Node, link: Link) -> None:
    """Pass until polls need not look at what is dead: a transaction anywhere on the server can delay that."""
    greatest = node.value("select pg_sequence_last_value('sync.sync_events_id_seq')")
    deadline = time.monotonic() + FLOOR_SECONDS
    while greatest - link.sides[node.name].floor > WORTHWHILE_ROWS:
        assert time.monotonic() < deadline, "some transaction never ends, so the floor never rises"
        passes.run(link)


@contextmanager
def many_dead_events(node: Node, link: Link) -> Iterator[None]:
    """Let events be consumed and lie there, dead, for the time of a `with` block, below a floor that has risen."""
    with node.connect(autocommit=False) as reader:
        reader.execute("set transaction isolation level repeatable read")
        reader.execute("select")
        for number in range(20):
            rename(node, MANY, f"dead {number}")
            consume(link)
        raise_floor(node, link)
        yield


@contextmanager
def traced(link: Link) -> Iterator[dict[str, Counter[str]]]:
    """Count what the servers answer to each connection: by command, and `round trip` for each end of an answer."""
    connections = {
        f"{name} {role}": connection
        for name, side in link.sides.items()
        for role, connection in (("writer", side.writer), ("reader", side.reader))
    }
    files = {name: tempfile.TemporaryFile() for name in connections}  # noqa: SIM115 - closed below
    counts: dict[str, Counter[str]] = {}
    for name, connection in connections.items():
        connection.pgconn.trace(files[name].fileno())
        connection.pgconn.set_trace_flags(pq.Trace.SUPPRESS_TIMESTAMPS)
    try:
        yield counts
    finally:
        for name, connection in connections.items():
            connection.pgconn.untrace()
            with files[name] as file:
                file.seek(0)
                counts[name] = _answers(file.read().decode())


def _answers(trace: str) -> Counter[str]:
    commands = re.findall(r'^B\t\d+\tCommandComplete\t "([A-Z ]+?)[ \d]*"$', trace, re.MULTILINE)
    round_trips = re.findall(r"^B\t\d+\tReadyForQuery\t", trace, re.MULTILINE)
    return Counter(commands) + Counter({"round trip": len(round_trips)})


def written(node: Node, link: Link, table: str) -> Counter[str]:
    """How many rows of a table were inserted, updated and deleted so far."""
    sessions = [node.connection]
    for side in link.sides.values():
        sessions += side.connections
    for session in sessions:
        # Sent at the end of the next transaction instead of whenever a second has passed.
        session.execute("select pg_stat_force_next_flush()")
        session.execute("select")
    row = node.rows(
        "select n_tup_ins, n_tup_upd, n_tup_del from pg_stat_user_tables where relid = %s::regclass",
        table,
    )[0]
    return Counter(dict(zip(("inserted", "updated", "deleted"), row, strict=True)))


def wal_position(node: Node) -> int:
    """How many bytes of WAL the node's server has written so far."""
    return int(node.value("select pg_current_wal_insert_lsn() - '0/0'"))


def needs_trace() -> pytest.MarkDecorator:
    return pytest.mark.skipif(sys.platform != "linux", reason="psycopg traces on Linux only")


@needs_trace()
@pytest.mark.parametrize(
    "change",
    [
        replay,
        lambda node, count: rename(node, count, f"to {count}"),
        # Some that nobody has yet, and others when it is called again.
        lambda node, count: add_accounts(node, count, first=MANY + count),
        lambda node, count: node.execute("delete from accounts where id > %s", MANY - count),
    ],
    ids=["replays", "updates", "inserts", "deletes"],
)
def test_a_batch_takes_as_many_statements_round_trips_and_commits_whatever_its_rows(
    pair: Pair, warm_link: Link, change: Callable[[Node, int], None]
) -> None:
    counts = []
    for count in (FEW, MANY):
        change(pair.crm, count)
        with traced(warm_link) as counted:
            passes.run(warm_link)
        counts.append(counted)

    assert counts[0] == counts[1]
    assert counts[0]["billing writer"]["COPY"] == 1
    # Begin, the moment, a savepoint, the events, their rows, back to it, the end: a batch that is not full is the last.
    assert counts[0]["crm reader"]["round trip"] == 7


@needs_trace()
def test_an_idle_look_is_one_round_trip_per_node(warm_link: Link) -> None:
    with traced(warm_link) as counted:
        passes.run(warm_link)

    assert {name: counts["round trip"] for name, counts in counted.items()} == {
        "crm writer": 1,
        "crm reader": 0,
        "billing writer": 1,
        "billing reader": 0,
    }


@needs_trace()
def test_every_batch_of_a_large_backlog_takes_as_many_round_trips(pair: Pair) -> None:
    write_config(pair.config_path, batch_size=BATCH)
    with lead(config_of(pair)) as link:
        rename(pair.crm, MANY, "warm")
        consume(link)
        round_trips = {}
        for batches in (4, 8):
            rename(pair.crm, batches * BATCH, f"{batches} batches")
            with traced(link) as counted:
                passes.run(link)
            round_trips[batches] = sum(counts["round trip"] for counts in counted.values())

    assert round_trips[8] - round_trips[4] <= 4 * ROUND_TRIPS_PER_BATCH


@needs_trace()
def test_a_table_more_in_a_batch_costs_few_round_trips(pair: Pair, warm_link: Link) -> None:
    for node, statement in (
        (pair.crm, "insert into users (id, account_id, email) values (1, 1, 'a@b')"),
        (pair.crm, "insert into orders (id, user_id, amount) values (1, 1, 1)"),
    ):
        node.execute(statement)
        consume(warm_link)
    round_trips = []
    for tables in ("accounts",), ("accounts", "users", "orders"):
        with pair.crm.connection.transaction():
            for table in tables:
                column = "note" if table == "orders" else "name"
                pair.crm.execute(f"update {table} set {column} = %s where id = 1", str(tables))
        with traced(warm_link) as counted:
            reports = passes.run(warm_link)
        assert sum(report.total.upserted for report in reports) == len(tables)
        round_trips.append(sum(counts["round trip"] for counts in counted.values()))

    assert (round_trips[1] - round_trips[0]) / 2 <= ROUND_TRIPS_PER_TABLE


def test_each_changed_row_is_written_once_on_the_target(pair: Pair, link: Link) -> None:
    before = written(pair.billing, link, "accounts")
    rename(pair.crm, MANY, "once")
    add_accounts(pair.crm, MANY, first=MANY + 1)
    pair.crm.execute("delete from accounts where id > %s", MANY + MANY // 2)
    pair.crm.execute("delete from accounts where id <= %s", FEW)
    consume(link)

    after = written(pair.billing, link, "accounts")
    assert after - before == {"updated": MANY - FEW, "inserted": MANY // 2, "deleted": FEW}
    assert equal(pair)


def test_a_record_that_changed_many_times_is_written_once(pair: Pair, link: Link) -> None:
    before = written(pair.billing, link, "accounts")
    for number in range(5):
        rename(pair.crm, MANY, f"time {number}")
    consume(link)

    assert written(pair.billing, link, "accounts") - before == {"updated": MANY}
    assert equal(pair)


def test_rows_that_are_equal_already_are_not_written(pair: Pair, link: Link) -> None:
    before = written(pair.billing, link, "accounts")
    replay(pair.crm, MANY)
    wal = wal_position(pair.billing)
    consume(link)

    assert wal_position(pair.billing) - wal < TARGET_WAL_BYTES_OF_A_BATCH
    assert written(pair.billing, link, "accounts") == before


def test_the_ledger_costs_the_target_one_row_a_batch(pair: Pair, link: Link) -> None:
    before = written(pair.billing, link, "sync.sync_applied")
    rename(pair.crm, MANY, "in one batch")
    consume(link)

    assert written(pair.billing, link, "sync.sync_applied") - before == {
        "inserted": 1,
        "deleted": 1,
    }
    assert written(pair.billing, link, "sync.sync_events").total() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda node: rename(node, MANY, "logged"),
        lambda node: add_accounts(node, MANY, first=MANY + 1),
        remove_accounts,
    ],
    ids=["updates", "inserts", "deletes"],
)
def test_a_change_costs_few_bytes_of_wal(
    pair: Pair, link: Link, change: Callable[[Node], None]
) -> None:
    change(pair.crm)
    source, target = wal_position(pair.crm), wal_position(pair.billing)
    consume(link)

    assert (wal_position(pair.crm) - source) / MANY < SOURCE_WAL_BYTES_PER_EVENT
    assert (wal_position(pair.billing) - target) / MANY < TARGET_WAL_BYTES_PER_EVENT


def test_an_event_is_written_once_and_deleted_once(pair: Pair, link: Link) -> None:
    before = written(pair.crm, link, "sync.sync_events")
    rename(pair.crm, MANY, "one event each")
    consume(link)

    assert written(pair.crm, link, "sync.sync_events") - before == {
        "inserted": MANY,
        "deleted": MANY,
    }


def test_capture_costs_a_change_few_bytes_of_wal(pair: Pair) -> None:
    def wal_of_an_update() -> int:
        before = wal_position(pair.crm)
        rename(pair.crm, MANY, "captured or not")
        return wal_position(pair.crm) - before

    pair.crm.execute("set session_replication_role = replica")
    without = wal_of_an_update()
    pair.crm.execute("reset session_replication_role")
    captured = wal_of_an_update()

    assert (captured - without) / MANY < CAPTURE_WAL_BYTES_PER_EVENT


def test_an_idle_look_reads_few_tuples_however_many_failures_wait(pair: Pair, link: Link) -> None:
    for node in pair.nodes:
        node.execute(
            "insert into sync.sync_failures (table_name, record_id, state, next_attempt_at, error_class, error)"
            " select 'accounts', i::text, case when i %% 2 = 0 then 'dead' else 'retrying' end,"
            " case when i %% 2 <> 0 then now() + interval '1 day' end, '23514', 'refused'"
            " from generate_series(1, %s::int) as i",
            MANY,
        )
        node.execute("analyze sync.sync_failures")
    before = _tuples_read(pair, link)
    for _ in range(FEW):
        assert not passes.run(link)
    after = _tuples_read(pair, link)

    assert after - before <= FEW * len(pair.nodes) * TUPLES_PER_POLL


def test_a_backlog_on_the_target_is_read_once_and_not_for_each_batch(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once by each of its writers, and by the other direction afterwards."""
    monkeypatch.setattr(waiting, "WORTHWHILE_EVENTS", BATCH)
    write_config(pair.config_path, batch_size=BATCH // 10)
    with lead(config_of(pair)) as link:
        rename(pair.crm, FEW, "first")
        consume(link)
        rename(pair.crm, BATCH, "crm")
        add_accounts(pair.billing, MANY, first=MANY + 1)
        read: list[int] = []
        with Point("before", Waiting, "close").struck_by(
            lambda: read.append(_events_read(pair.billing, link))
        ):
            before = _events_read(pair.billing, link)
            consume(link)
    assert equal(pair, ("accounts",))
    assert read[0] - before < 4 * MANY


def _events_read(node: Node, link: Link) -> int:
    """How many events have been read by the sessions of a link on a node."""
    for connection in link.sides[node.name].connections:
        connection.execute("select pg_stat_force_next_flush()")
    return int(
        node.value(
            "select seq_tup_read + idx_tup_fetch from pg_stat_user_tables"
            " where relid = 'sync.sync_events'::regclass"
        )
    )


def _tuples_read(pair: Pair, link: Link) -> int:
    """How many live rows scans and index look-ups of both nodes have read so far."""
    tuples = 0
    for node in pair.nodes:
        written(node, link, "sync.sync_events")
        tuples += int(
            node.value(
                "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) from pg_stat_user_tables"
            )
        )
    return tuples


def test_refusals_that_no_constraint_explains_take_a_bounded_number_of_attempts(
    pair: Pair, link: Link
) -> None:
    pair.billing.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception 'refused'; end $$;"
        " create trigger refuse before update on accounts for each row when (new.id % 3 = 0)"
        " execute function refuse()"
    )
    rename(pair.crm, MANY, "refused")
    with mock.patch.object(isolation, "_attempt", wraps=isolation._attempt) as attempt:
        passes.run(link)
    assert attempt.call_count <= isolation.MAX_ATTEMPTS + MANY.bit_length()
    assert len(pair.crm.rows("sync.sync_failures")) == MANY // 3
    changed = "select count(*) from accounts where name = 'refused'"
    assert pair.billing.value(changed) == MANY - MANY // 3


def test_a_refused_record_of_tables_in_a_cycle_is_found_in_few_attempts(pair: Pair) -> None:
    linked(
        pair,
        """create table projects (id int primary key, name text unique, task int);
        create table tasks (id int primary key, project int not null references projects);
        alter table projects add foreign key (task) references tasks""",
        "projects",
        "tasks",
    )
    pair.billing.execute("insert into projects values (1000, '70')")
    pair.crm.execute(
        """insert into projects select n, n from generate_series(1, 200) as n;
        insert into tasks select n, n from generate_series(1, 200) as n"""
    )
    with mock.patch.object(isolation, "_attempt", wraps=isolation._attempt) as attempt:
        sync_pair(pair)
    assert attempt.call_count < 100
    assert pair.crm.rows("select table_name, record_id from sync.sync_failures order by 1") == [
        ("projects", "70"),
        ("tasks", "70"),
    ]
    assert pair.billing.value("select count(*) from tasks") == 199


def test_failures_are_noted_and_cleared_in_proportion_to_their_number(
    pair: Pair, link: Link
) -> None:
    writer = link.sides["crm"].writer
    replay(pair.crm, MANY)
    records = [str(number) for number in range(1, MANY + 1)]
    first, last = pair.crm.rows("select min(id), max(id) from sync.sync_events")[0]
    noted = {
        "table_name": "accounts",
        "ids": [f"{{[{number},{number + 1})}}" for number in range(first, last + 1)],
        "record_ids": records,
        "error_classes": ["23514"] * MANY,
        "errors": ["refused"] * MANY,
        "held": [False] * MANY,
        "max_attempts": 10,
        "base_seconds": 1,
        "max_seconds": 10,
        "jitter": 1,
        "read_at": pair.crm.value("select now()"),
    }
    cleared = {
        "table_name": "accounts",
        "ids": "{}",
        "events": 0,
        "retried": records,
        "still_failing": records,
        "lost": [],
    }
    for name, parameters in (("record_failures", noted), ("clear_failures", cleared)):
        statement = query(b"explain (analyze, format json) " + queries.get(name, "sync"))
        [plan] = scalar(writer, statement, parameters)
        assert _rows_handled(plan["Plan"]) < 20 * MANY, name


def test_a_batch_passes_no_dead_events_because_a_failure_waits(pair: Pair, link: Link) -> None:
    def blocks_of_a_pass(name: str) -> int:
        rename(pair.crm, FEW, name)
        before = _blocks_read(pair.crm, link)
        passes.run(link)
        return _blocks_read(pair.crm, link) - before

    with many_dead_events(pair.crm, link):
        without = blocks_of_a_pass("no failure waits")
        pair.crm.execute(
            "insert into sync.sync_failures (table_name, record_id, state, error_class, error)"
            " values ('accounts', '0', 'dead', '23514', 'refused')"
        )
        assert blocks_of_a_pass("one waits") <= without + BLOCKS_PER_POLL


def test_whether_the_link_is_paused_is_asked_without_a_look_at_events(
    pair: Pair, link: Link
) -> None:
    rename(pair.crm, MANY, "dead")
    consume(link)
    link.sides["crm"].forget_floor()
    before = _blocks_read(pair.crm, link)
    link.is_paused()
    assert _blocks_read(pair.crm, link) - before < 5


def test_records_that_a_constraint_speaks_against_are_left_out_at_once(
    pair: Pair, link: Link
) -> None:
    pair.billing.execute("alter table accounts add check (name <> 'refused' or id % 100 > 0)")
    rename(pair.crm, MANY, "refused")
    with (
        mock.patch.object(isolation, "_attempt", wraps=isolation._attempt) as attempt,
        mock.patch.object(queries, "get", wraps=queries.get) as get,
    ):
        passes.run(link)
    assert attempt.call_count == 1
    assert [call.args[0] for call in get.call_args_list].count("read_unique_indexes") == 1
    assert len(pair.crm.rows("sync.sync_failures")) == MANY // 100


def test_a_pass_reads_few_of_the_failures_that_lie_around(pair: Pair, link: Link) -> None:
    for node in pair.nodes:
        node.execute(
            "insert into sync.sync_failures (table_name, record_id, state, error_class, error)"
            " select 'accounts', i::text, 'dead', '23514', 'refused' from generate_series(%s::int, %s::int) as i",
            FEW + 1,
            10 * MANY,
        )
        node.execute("analyze sync.sync_failures")
    read = (
        "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_user_tables"
        " where relid = 'sync.sync_failures'::regclass"
    )
    before = []
    for node in pair.nodes:
        written(node, link, "accounts")
        before.append(node.value(read))
    rename(pair.crm, FEW, "beside failures")
    passes.run(link)
    for node, earlier in zip(pair.nodes, before, strict=True):
        written(node, link, "accounts")
        assert node.value(read) - earlier <= 2 * FEW, node.name
    assert equal(pair, ("accounts",))


@pytest.mark.parametrize(("length", "prepared"), [(1, 1), (FEW, 0)])
def test_a_statement_with_a_long_list_is_planned_for_it(
    link: Link, length: int, prepared: int
) -> None:
    writer = link.sides["crm"].writer
    statement = query(queries.get("delete_failures", "sync"))
    for _ in range(20):
        writer.execute(statement, {"table_name": "accounts", "record_ids": ["1"] * length})
    found = b"select count(*) from pg_prepared_statements where statement ~ 'delete from .*sync_failures'"
    assert scalar(writer, query(found)) == prepared


def test_rows_are_looked_up_though_the_planner_knows_how_many_events_there_are(
    pair: Pair, link: Link
) -> None:
    rename(pair.crm, BATCH, "looked up")
    pair.crm.execute("analyze accounts; analyze sync.sync_events")
    scans = "select seq_scan from pg_stat_user_tables where relid = 'accounts'::regclass"
    written(pair.crm, link, "accounts")
    before = pair.crm.value(scans)
    passes.run(link)
    written(pair.crm, link, "accounts")
    assert pair.crm.value(scans) == before
    assert equal(pair, ("accounts",))


@pytest.mark.parametrize("table", ["accounts", "sync.sync_events"])
def test_rows_are_read_in_the_order_of_their_keys_whatever_has_been_analysed(
    pair: Pair, link: Link, table: str
) -> None:
    rename(pair.crm, MANY, "read in order")
    pair.crm.execute(f"analyze {table}")
    relation = link.catalog.relation("crm", "accounts")
    copy = snapshot._rows(relation, "sync", "to stdout", of_events=True)
    statement = re.fullmatch(rb"copy \((.*)\) to stdout", cast("bytes", copy), re.DOTALL)
    assert statement is not None
    [plan] = scalar(
        link.sides["crm"].writer,
        query(b"explain (format json) " + statement[1]),
        {"first": 0, "table_name": "accounts", "first_id": 0, "last_id": snapshot.LAST_ID},
    )
    changed = next(
        each for each in plan["Plan"]["Plans"] if each.get("Subplan Name") == "CTE changed"
    )
    assert changed["Node Type"] in {"Unique", "Sort"}


def do_nothing(_: Pair) -> None:
    """All records of the batch are written."""


def delete_one(pair: Pair) -> None:
    pair.crm.execute("delete from accounts where id = 1")


def refuse_one(pair: Pair) -> None:
    pair.billing.execute("alter table accounts add check (name <> 'looked up' or id <> 1)")


def win_one(pair: Pair) -> None:
    pair.billing.execute("update accounts set name = 'the later one' where id = 1")


@pytest.mark.parametrize("but_for_one", [do_nothing, delete_one, refuse_one, win_one])
def test_the_rows_of_a_batch_are_looked_up_together(
    pair: Pair, link: Link, but_for_one: Callable[[Pair], None]
) -> None:
    if int(pair.crm.value("select current_setting('server_version_num')")) < 170000:
        pytest.skip("before PostgreSQL 17 an index is descended once for each value of an array")
    scans = "select idx_scan from pg_stat_user_tables where relid = 'accounts'::regclass"
    rename(pair.crm, BATCH, "looked up")
    but_for_one(pair)

    def descents() -> list[int]:
        written(pair.crm, link, "accounts")
        written(pair.billing, link, "accounts")
        return [int(node.value(scans)) for node in pair.nodes]

    before = descents()
    consume(link)
    after = descents()
    assert all(now - then < 2 * FEW for then, now in zip(before, after, strict=True))
    assert equal(pair, ("accounts",)) == (but_for_one is not refuse_one)


def test_few_records_are_written_by_a_plan_that_is_kept_and_many_by_one_of_their_own(
    pair: Pair, warm_link: Link
) -> None:
    kept = (
        b"select sum(generic_plans), sum(generic_plans + custom_plans) "
        b"from pg_prepared_statements where statement ~ 'updated_0'"
    )
    writer = warm_link.sides["billing"].writer

    def plans() -> list[int]:
        [row] = writer.execute(kept).fetchall()
        return list(row)

    for number in range(PASSES_UNTIL_PREPARED):
        rename(pair.crm, 1, f"few {number}")
        consume(warm_link)
    generic, all_plans = plans()
    rename(pair.crm, 1, "few")
    consume(warm_link)
    assert plans() == [generic + 1, all_plans + 1]
    rename(pair.crm, BATCH, "many")
    consume(warm_link)
    assert plans() == [generic + 1, all_plans + 1]
    assert equal(pair, ("accounts",))


def test_a_plan_for_a_small_table_is_given_up_when_the_catalog_is_read_again(
    pair: Pair, warm_link: Link
) -> None:
    """Nobody analyses the table again, so nothing else would tell the plan that it has grown."""
    scans = "select seq_tup_read from pg_stat_user_tables where relid = 'users'::regclass"
    pair.billing.execute("alter table users set (autovacuum_enabled = off)")
    pair.crm.execute("insert into users (id, account_id, email) values (0, 1, 'first')")
    consume(warm_link)
    pair.billing.execute("analyze users")
    for number in range(2 * PASSES_UNTIL_PREPARED):
        pair.crm.execute("update users set name = %s where id = 0", str(number))
        consume(warm_link)
    many = "insert into users (id, account_id, email) select i, 1, i::text from generate_series(1, 20000) as i"
    for node in pair.nodes:
        node.execute(f"begin; set local session_replication_role = replica; {many}; commit")

    warm_link.read_catalog()
    written(pair.billing, warm_link, "users")
    before = pair.billing.value(scans)
    pair.crm.execute("update users set name = 'last' where id = 7")
    consume(warm_link)
    written(pair.billing, warm_link, "users")
    assert pair.billing.value(scans) == before
    assert equal(pair, ("accounts", "users"))


def _rows_handled(plan: dict[str, Any]) -> int:
    """How many rows the nodes of a plan have returned or dropped."""
    own = sum(
        plan.get(name, 0)
        for name in ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter")
    )
    return int(own * plan["Actual Loops"]) + sum(map(_rows_handled, plan.get("Plans", [])))


def test_idle_looks_write_nothing(pair: Pair, link: Link) -> None:
    before = [wal_position(node) for node in pair.nodes]
    for _ in range(100):
        assert not passes.run(link)

    assert [wal_position(node) for node in pair.nodes] == before


def test_an_idle_look_reads_a_few_blocks_however_many_dead_events_lie_there(
    pair: Pair, link: Link
) -> None:
    with many_dead_events(pair.crm, link):
        before = _blocks_read(pair.crm, link)
        for _ in range(FEW):
            passes.run(link)
        blocks = _blocks_read(pair.crm, link) - before

    assert blocks <= FEW * BLOCKS_PER_POLL


def _blocks_read(node: Node, link: Link) -> int:
    written(node, link, "sync.sync_events")
    return int(
        node.value(
            "select sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)"
            " from pg_statio_user_tables where relid = 'sync.sync_events'::regclass"
        )
    )
