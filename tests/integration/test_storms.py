"""Bulk work, old snapshots, records that nobody takes, and tables that are away for a while."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from sync_pipeline import passes, stream
from sync_pipeline.config import Config
from sync_pipeline.link import WORTHWHILE_ROWS, Link, lead
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import Node, Pair, eventually, write_config

WAIT_SECONDS = 60
ROUNDS = 10
short = pytest.param(100_000, id="short")
long = pytest.param(1_000_000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(1800)])


@contextmanager
def streaming(config: Config, listener: stream.Listener | None = None) -> Iterator[None]:
    """A consumer that works beside the test until the block ends."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.stream, config, stop, listener=listener)
        try:
            yield
        finally:
            stop.set()
            running.result(WAIT_SECONDS)


def add_accounts(node: Node, count: int, first: int = 1) -> None:
    node.execute(
        "insert into accounts select g, 'account ' || g from generate_series(%s::int, %s::int) as g",
        first,
        first + count - 1,
    )


def floor_follows(node: Node, link: Link, distance: int) -> bool:
    """Take one more look; a transaction that runs anywhere on the server may have kept the floor until now."""
    passes.run(link)
    greatest = int(node.value("select pg_sequence_last_value('sync.sync_events_id_seq')"))
    return greatest - link.sides[node.name].floor <= distance + WORTHWHILE_ROWS


def blocks_of_events(node: Node, link: Link) -> int:
    """How many blocks of `sync_events` the sessions of the consumer have read so far."""
    for side in link.sides.values():
        for session in side.connections:
            session.execute("select pg_stat_force_next_flush()")
            session.execute("select")
    node.execute("select pg_stat_force_next_flush()")
    node.execute("select")
    return int(
        node.value(
            "select heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read"
            " from pg_statio_user_tables where relid = 'sync.sync_events'::regclass"
        )
    )


@pytest.mark.parametrize("events", [short, long])
def test_events_pass_at_the_same_cost_while_an_old_snapshot_keeps_all_that_are_dead(
    pair: Pair, events: int
) -> None:
    config = installed(pair)
    each = events // ROUNDS
    pair.crm.execute("alter table sync.sync_events set (autovacuum_enabled = off)")
    add_accounts(pair.crm, each)
    sync_pair(pair)
    costs = []
    with lead(config) as link, pair.crm.connect(autocommit=False) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("select")
        for number in range(ROUNDS):
            pair.crm.execute("update accounts set name = %s", f"round {number}")
            before = blocks_of_events(pair.crm, link)
            while passes.run(link):
                pass
            eventually("the floor follows", partial(floor_follows, pair.crm, link, each))
            costs.append(blocks_of_events(pair.crm, link) - before)
    assert equal(pair, ("accounts",))
    # Ten times as many dead events lie there at the end as at the beginning.
    assert costs[-1] < 2.5 * costs[1], costs


@pytest.mark.parametrize("rows", [short, long])
def test_a_bulk_storm(pair: Pair, rows: int) -> None:
    """One large update, COPY, TRUNCATE, and a schema change that waits in the target's queue of locks."""
    installed(pair)
    config = config_of(pair, write_config(pair.config_path, lock_timeout_seconds=0.5))
    interrupted = threading.Event()
    listener = stream.Listener(interrupted=lambda error, _: interrupted.set())
    with streaming(config, listener):
        add_accounts(pair.crm, rows)
        pair.crm.execute("update accounts set plan = 'all of them'")
        with pair.crm.connection.cursor().copy(
            "copy users (id, account_id, email) from stdin"
        ) as copy:
            for key in range(1, rows // 10):
                copy.write_row((key, key, f"{key}@x.org"))
        pair.crm.execute("insert into orders select id, id, 1 from users")
        pair.crm.execute("truncate orders")
        with (
            pair.billing.connect(autocommit=False) as reader,
            pair.billing.connect() as administrator,
            ThreadPoolExecutor(1) as pool,
        ):
            # Who reads holds up who alters, who holds up everybody.
            reader.execute("select from accounts limit 1")
            altered = pool.submit(
                administrator.execute,
                "alter table accounts alter column plan set statistics 10, add check (id > 0)",
            )
            pair.crm.execute("update accounts set plan = 'again' where id <= 1000")
            assert interrupted.wait(WAIT_SECONDS)
            reader.rollback()
            altered.result(WAIT_SECONDS)
        eventually("the storm is over", lambda: not (pair.crm.pending() or pair.billing.pending()))
    assert equal(pair)
    for node in pair.nodes:
        assert node.rows("select * from sync.sync_failures") == []
        assert node.rows("select * from sync.sync_conflicts") == []


def test_a_poison_record_and_a_table_that_is_away_for_a_while(pair: Pair) -> None:
    """The poison is tried as often as its own errors say; the storm burns nobody's attempts and buries nobody."""
    write_config(
        pair.config_path, retry={"max_attempts": 3, "base_seconds": 600, "max_seconds": 600}
    )
    config = installed(pair)
    add_accounts(pair.crm, 3)
    sync_pair(pair)
    pair.billing.execute("alter table users add constraint no_poison check (name <> 'poison')")
    pair.crm.execute(
        "insert into users values (1, 1, 'p@x.org', 'poison'), (2, 2, 'good@x.org', 'good')"
    )
    sync_pair(pair)
    assert [key for key, *_ in pair.billing.rows("users")] == [2]
    attempts = "select table_name, record_id, state, attempts from sync.sync_failures"
    assert pair.crm.rows(attempts) == [("users", "1", "retrying", 1)]
    leading = threading.Event()
    listener = stream.Listener(leading=leading.set)
    applied = "select count(*) from accounts where plan = 'during the storm'"
    with streaming(config, listener):
        assert leading.wait(WAIT_SECONDS)
        pair.billing.execute("alter table users rename to users_elsewhere")
        for key in range(10, 200):
            pair.crm.insert("users", id=key, account_id=1, email=f"{key}@x.org")
        pair.crm.execute("update accounts set plan = 'during the storm'")
        # The other tables go on without it.
        eventually("what has its table is applied", lambda: pair.billing.value(applied) == 3)
        assert pair.crm.rows(attempts) == [("users", "1", "retrying", 1)]
        pair.billing.execute("alter table users_elsewhere rename to users")
        pair.crm.execute("update users set name = 'cured' where id = 1")
    sync_pair(pair)
    assert equal(pair)
    for node in pair.nodes:
        assert node.rows("select * from sync.sync_failures") == []
        assert node.pending() == 0


def test_a_child_in_a_table_whose_partner_is_away_survives_the_delete_of_its_parent(
    pair: Pair,
) -> None:
    installed(pair)
    add_accounts(pair.crm, 2)
    sync_pair(pair)
    pair.crm.execute("alter table users rename to elsewhere")
    pair.billing.insert("users", id=9, account_id=1, email="new@x.org")
    pair.crm.execute("delete from accounts where id = 1")
    sync_pair(pair)
    assert pair.billing.rows("select id from users") == [(9,)]
    assert pair.crm.pending() == 1, "the delete waits until the table is back"
    pair.crm.execute("alter table elsewhere rename to users")
    sync_pair(pair)
    assert equal(pair)
    assert pair.crm.rows("select id, account_id from users") == [(9, 1)]
    assert pair.billing.rows("select kind from sync.sync_conflicts") == [("parent_deleted",)]


def test_the_delete_of_a_parent_goes_on_where_no_row_of_a_missing_table_refers_to_it(
    pair: Pair,
) -> None:
    installed(pair)
    add_accounts(pair.crm, 3)
    pair.crm.insert("users", id=1, account_id=1, email="old@x.org")
    sync_pair(pair)
    pair.crm.execute("alter table users rename to elsewhere")
    pair.crm.execute("delete from accounts where id in (1, 2)")
    pair.crm.execute("update accounts set name = 'goes on' where id = 3")
    sync_pair(pair)
    assert pair.billing.rows("select id, name from accounts order by id") == [
        (1, "account 1"),
        (3, "goes on"),
    ]
    pair.crm.execute("alter table elsewhere rename to users")
    sync_pair(pair)
    assert equal(pair)
    assert pair.billing.rows("select id from accounts") == [(3,)]
