"""What the protocol promises beyond the plain case: order, visibility, conflicts, failures, one leader."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import psycopg
import pytest

from sync_pipeline import database, locks, passes, stream
from sync_pipeline import link as links
from sync_pipeline.batch import Batch
from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.database import Connection, connected
from sync_pipeline.errors import LockTaken, PassInterrupted
from sync_pipeline.link import Link, lead
from sync_pipeline.passes import Pass
from sync_pipeline.stream import Listener
from tests.engine import config_of, equal, installed, sync_pair, totals
from tests.helpers import Node, Pair, write_config

pytestmark = pytest.mark.core


@pytest.fixture
def config(pair: Pair) -> Config:
    return installed(pair)


@pytest.fixture
def link(config: Config) -> Iterator[Link]:
    """The pair, led by this test."""
    with lead(config) as led:
        passes.run(led)
        yield led


def family(node: Node, key: int = 1) -> None:
    """An account with one user with one order, all with the same key."""
    node.insert("accounts", id=key, name=f"account {key}")
    node.insert("users", id=key, account_id=key, email=f"{key}@x.org")
    node.insert("orders", id=key, user_id=key, amount=1)


def failures(node: Node) -> list[tuple[object, ...]]:
    return node.rows(
        "select table_name, record_id, error_class, state from sync.sync_failures order by 1, 2"
    )


# --- order and visibility ---


def test_a_transaction_that_commits_late_with_an_early_id_is_not_skipped(
    pair: Pair, config: Config
) -> None:
    with pair.crm.connect(autocommit=False) as late:
        late.execute("insert into accounts values (1, 'late')")
        pair.crm.insert("accounts", id=2, name="early")
        sync_pair(pair)
        assert [row[0] for row in pair.billing.rows("accounts")] == [2]
        late.commit()
    sync_pair(pair)
    assert equal(pair)
    assert len(pair.billing.rows("accounts")) == 2


def test_an_event_that_commits_between_the_read_and_the_acknowledgement_stays(
    pair: Pair, link: Link
) -> None:
    with pair.crm.connect(autocommit=False) as late:
        pair.crm.insert("accounts", id=1, name="before")
        late.execute("insert into accounts values (2, 'late')")
        pair.crm.insert("accounts", id=3, name="after")
        with Pass(link, "crm", "billing") as one:
            one.fetch_dependents()
            late.commit()
            one.process_parents()
            one.process_dependents()
    assert pair.crm.rows("select record_id from sync.sync_events") == [("2",)]
    passes.run(link)
    assert equal(pair)


@pytest.mark.parametrize("stage", ["fetch_dependents", "process_parents"])
def test_a_child_and_its_parent_deleted_between_two_stages(
    pair: Pair, link: Link, stage: str
) -> None:
    family(pair.crm)
    passes.run(link)
    pair.crm.execute("update users set name = 'new'")
    with Pass(link, "crm", "billing") as one:
        for name in ("fetch_dependents", "process_parents", "process_dependents"):
            getattr(one, name)()
            if name == stage:
                pair.crm.execute("delete from users")
                pair.crm.execute("delete from accounts")
    assert pair.billing.rows("select name from users") == [("new",)]
    passes.run(link)
    assert equal(pair)
    assert pair.billing.rows("accounts") == []


@pytest.mark.parametrize("stage", ["fetch_dependents", "process_parents"])
def test_a_child_moved_and_its_old_parent_deleted_between_two_stages(
    pair: Pair, link: Link, stage: str
) -> None:
    family(pair.crm)
    family(pair.crm, 2)
    passes.run(link)
    pair.crm.execute("update accounts set name = 'new'")
    with Pass(link, "crm", "billing") as one:
        for name in ("fetch_dependents", "process_parents", "process_dependents"):
            getattr(one, name)()
            if name == stage:
                pair.crm.execute("update users set account_id = 2")
                pair.crm.execute("delete from accounts where id = 1")
    passes.run(link)
    assert equal(pair)
    assert len(pair.billing.rows("users")) == 2


def test_a_transaction_that_commits_between_two_stages_is_not_seen_by_half(
    pair: Pair, link: Link
) -> None:
    family(pair.crm)
    change = "with a as (update accounts set name = %s) update users set name = %s"
    pair.crm.execute(change, "first", "first")
    with Pass(link, "crm", "billing") as one:
        one.fetch_dependents()
        pair.crm.execute(change, "second", "second")
        one.process_parents()
        one.process_dependents()
    names = "select accounts.name, users.name from accounts join users on account_id = accounts.id"
    assert pair.billing.rows(names) == [("first", "first")]
    passes.run(link)
    assert pair.billing.rows(names) == [("second", "second")]


@pytest.mark.parametrize("batch_size", [10_000, 2])
def test_a_child_whose_event_is_older_than_its_parents_arrives_after_it(
    pair: Pair, batch_size: int
) -> None:
    write_config(pair.config_path, batch_size=batch_size)
    pair.crm.execute("alter table users drop constraint users_account_id_fkey")
    pair.crm.execute(
        "alter table users add foreign key (account_id) references accounts on delete cascade"
        " deferrable initially deferred"
    )
    installed(pair)
    with pair.crm.connect(autocommit=False) as application:
        for key in range(1, 6):
            application.execute("insert into users values (%s, %s, %s)", [key, key, f"{key}@x.org"])
        for key in range(1, 6):
            application.execute("insert into accounts values (%s, 'later')", [key])
    sync_pair(pair)
    assert equal(pair)
    assert failures(pair.crm) == []


def test_a_source_transaction_that_fits_one_batch_is_one_transaction_on_the_target(
    pair: Pair, link: Link
) -> None:
    family(pair.crm)
    passes.run(link)
    pair.crm.execute(
        "with a as (update accounts set name = 'new'), u as (update users set name = 'new')"
        " update orders set note = 'new'"
    )
    passes.run(link)
    written = pair.billing.rows(
        "select count(distinct xmin::text) from (select xmin from accounts union all select xmin from users"
        " union all select xmin from orders) as rows"
    )
    assert written == [(1,)]


@pytest.mark.parametrize("batch_size", [10_000, 3])
def test_a_backlog_of_many_batches_with_every_kind_of_change(pair: Pair, batch_size: int) -> None:
    write_config(pair.config_path, batch_size=batch_size)
    installed(pair)
    for key in range(1, 21):
        family(pair.crm, key)
    sync_pair(pair)
    pair.crm.execute("update users set account_id = account_id + 1 where id < 10")
    pair.crm.execute("delete from accounts where id between 5 and 9")
    pair.crm.execute("delete from orders where id > 15")
    for key in range(30, 40):
        family(pair.crm, key)
    pair.crm.execute("delete from accounts where id between 33 and 36")
    pair.crm.execute("delete from users where id = 2")
    pair.crm.execute("insert into users values (2, 1, '2@x.org', 'again')")
    sync_pair(pair)
    assert equal(pair)
    assert failures(pair.crm) == []
    assert pair.crm.rows("select * from sync.sync_conflicts") == []


def test_a_deleted_record_and_its_unique_value_used_again_at_once(
    pair: Pair, config: Config
) -> None:
    family(pair.crm)
    pair.crm.execute("delete from orders")
    sync_pair(pair)
    pair.crm.execute("delete from users")
    pair.crm.insert("users", id=2, account_id=1, email="1@x.org")
    sync_pair(pair)
    assert equal(pair)


# --- conflicts ---


def conflict_log(node: Node) -> list[tuple[object, ...]]:
    return node.rows(
        "select table_name, record_id, kind, winner from sync.sync_conflicts order by id"
    )


def test_the_same_record_inserted_on_both_sides(pair: Pair, config: Config) -> None:
    pair.crm.insert("accounts", id=1, name="crm")
    pair.billing.insert("accounts", id=1, name="billing")
    sync_pair(pair)
    assert equal(pair)
    assert pair.crm.rows("select name from accounts") == [("billing",)]
    assert conflict_log(pair.billing) == [("accounts", "1", "insert_insert", "billing")]


def test_a_record_updated_on_one_side_and_later_deleted_on_the_other(
    pair: Pair, config: Config
) -> None:
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    pair.crm.execute("update accounts set name = 'updated'")
    pair.billing.execute("delete from accounts")
    sync_pair(pair)
    assert pair.crm.rows("accounts") == pair.billing.rows("accounts") == []
    assert conflict_log(pair.billing) == [("accounts", "1", "update_delete", "billing")]
    logged = pair.billing.rows("select local_row, remote_row ->> 'name' from sync.sync_conflicts")
    assert logged == [(None, "updated")]


def test_a_record_deleted_on_one_side_and_later_updated_on_the_other(
    pair: Pair, config: Config
) -> None:
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    pair.billing.execute("delete from accounts")
    pair.crm.execute("update accounts set name = 'updated'")
    sync_pair(pair)
    assert equal(pair)
    assert pair.billing.rows("select name from accounts") == [("updated",)]


def test_a_named_node_wins_whatever_the_clocks_say(pair: Pair) -> None:
    write_config(
        pair.config_path, tables=[{"name": "accounts", "conflict": "crm"}, "users", "orders"]
    )
    installed(pair)
    pair.crm.insert("accounts", id=1, name="crm")
    pair.billing.insert("accounts", id=1, name="billing")
    sync_pair(pair)
    assert equal(pair)
    assert pair.billing.rows("select name from accounts") == [("crm",)]


def test_equal_rows_on_both_sides_are_no_conflict(pair: Pair, config: Config) -> None:
    for node in pair.nodes:
        node.insert("accounts", id=1, name="same")
    sync_pair(pair)
    assert conflict_log(pair.billing) == conflict_log(pair.crm) == []
    assert pair.crm.pending() == pair.billing.pending() == 0


def test_a_tie_goes_to_the_node_listed_first(pair: Pair, config: Config) -> None:
    for node in pair.nodes:
        node.insert("accounts", id=1, name=node.name)
        node.execute("update sync.sync_events set created_at = '2026-01-01'")
    sync_pair(pair)
    assert equal(pair)
    assert pair.billing.rows("select name from accounts") == [("crm",)]


@pytest.mark.parametrize("deleting", ["crm", "billing"])
def test_a_parent_deleted_on_one_side_and_given_a_child_on_the_other_comes_back(
    pair: Pair, config: Config, deleting: str
) -> None:
    by_name = {node.name: node for node in pair.nodes}
    remover = by_name.pop(deleting)
    (keeper,) = by_name.values()
    family(pair.crm)
    sync_pair(pair)
    remover.execute("delete from accounts")
    keeper.insert("users", id=2, account_id=1, email="2@x.org")
    sync_pair(pair)
    assert equal(pair)
    assert [row[0] for row in pair.crm.rows("accounts")] == [1]
    assert [row[0] for row in pair.crm.rows("users")] == [2]
    kinds = {kind for node in pair.nodes for _, _, kind, _ in conflict_log(node)}
    assert kinds == {"parent_deleted"}
    assert pair.crm.pending() == pair.billing.pending() == 0


def test_a_parent_missing_on_the_target_without_a_conflict_is_sent_along(
    pair: Pair, config: Config
) -> None:
    family(pair.crm)
    sync_pair(pair)
    pair.billing.execute(
        "begin; set local session_replication_role = replica; delete from orders; delete from users;"
        " delete from accounts; commit"
    )
    pair.crm.execute("update orders set note = 'new'")
    sync_pair(pair)
    assert equal(pair)
    assert failures(pair.crm) == []


# --- failures ---


def test_an_event_for_a_table_that_nobody_syncs_is_set_aside(pair: Pair, config: Config) -> None:
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id) values ('invoices', '1')"
    )
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    assert equal(pair)
    assert failures(pair.crm) == [("invoices", "1", "42P01", "dead")]
    assert pair.crm.pending() == 0


def test_an_event_whose_key_is_no_key_is_set_aside(pair: Pair, config: Config) -> None:
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id) values ('accounts', 'x'), ('users', '')"
    )
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    assert equal(pair)
    assert failures(pair.crm) == [
        ("accounts", "x", "22P02", "dead"),
        ("users", "", "22P02", "dead"),
    ]
    assert pair.crm.pending() == 0


def test_a_value_that_the_target_cannot_even_read_fails_alone(pair: Pair) -> None:
    pair.billing.execute("alter table orders alter column id type int using id::int")
    installed(pair)
    family(pair.crm)
    pair.crm.insert("orders", id=5_000_000_000, user_id=1, amount=1)
    pair.crm.insert("orders", id=7, user_id=1, amount=1)
    sync_pair(pair)
    assert [row[0] for row in pair.billing.rows("orders")] == [1, 7]
    assert failures(pair.crm) == [("orders", "5000000000", "22003", "retrying")]


def test_attempts_grow_to_dead_and_plain_sql_retries(pair: Pair) -> None:
    write_config(
        pair.config_path, retry={"max_attempts": 2, "base_seconds": 0.01, "max_seconds": 1}
    )
    installed(pair)
    pair.billing.execute("alter table accounts add constraint named check (name <> '')")
    pair.crm.insert("accounts", id=1, name="")
    sync_pair(pair)
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(pair)
    assert failures(pair.crm) == [("accounts", "1", "23514", "dead")]
    pair.billing.execute("alter table accounts drop constraint named")
    sync_pair(pair)
    assert failures(pair.crm) == [("accounts", "1", "23514", "dead")]
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(pair)
    assert equal(pair)
    assert failures(pair.crm) == []


def test_a_record_that_fails_in_many_batches_of_a_pass_has_used_up_one_attempt(pair: Pair) -> None:
    retry = {"max_attempts": 3, "base_seconds": 600, "max_seconds": 6000}
    write_config(pair.config_path, batch_size=1, retry=retry)
    installed(pair)
    pair.billing.execute("alter table accounts add constraint named check (name <> '')")
    pair.crm.insert("accounts", id=1, name="")
    for number in range(5):
        pair.crm.execute("update accounts set plan = %s", str(number))
    sync_pair(pair)
    attempts = (
        "select attempts, state, next_attempt_at - now() < '13 minutes' from sync.sync_failures"
    )
    assert pair.crm.rows(attempts) == [(1, "retrying", True)]
    pair.crm.execute("update accounts set plan = 'last'")
    sync_pair(pair)
    assert pair.crm.rows(attempts) == [(2, "retrying", False)]


def test_the_message_of_a_failure_is_bounded(pair: Pair, config: Config) -> None:
    pair.billing.execute(
        "create function refuse() returns trigger language plpgsql as"
        " $$ begin raise exception '%', repeat('x', 100000); end $$;"
        " create trigger refuse before insert on accounts for each row execute function refuse()"
    )
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    assert pair.crm.value("select length(error) from sync.sync_failures") == 500


def test_a_lock_timeout_on_the_target_costs_no_attempt(pair: Pair) -> None:
    write_config(pair.config_path, lock_timeout_seconds=0.1)
    config = installed(pair)
    family(pair.crm)
    sync_pair(pair)
    interrupted = threading.Event()
    with pair.billing.connect(autocommit=False) as application:
        application.execute("update accounts set plan = 'held'")
        pair.crm.execute("update accounts set name = 'new'")
        listener = stream.Listener(interrupted=lambda error, seconds: interrupted.set())
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(stream.sync, config, listener)
            assert interrupted.wait(20)
            application.rollback()
            running.result()
    assert equal(pair)
    assert failures(pair.crm) == []


# --- one leader ---


def test_a_second_consumer_is_told_who_leads(pair: Pair, link: Link) -> None:
    with pytest.raises(LockTaken, match=r"another consumer leads: backend [0-9]+ from"):
        stream.sync(config_of(pair))


def test_a_second_consumer_stands_by_and_takes_over(pair: Pair, config: Config) -> None:
    stop = threading.Event()
    leading, standing_by = threading.Event(), threading.Event()
    listener = stream.Listener(leading=leading.set, standing_by=lambda error: standing_by.set())
    with ThreadPoolExecutor(1) as pool:
        with lead(config):
            running = pool.submit(stream.stream, config, stop, seconds=30, listener=listener)
            assert standing_by.wait(20)
            assert not leading.is_set()
        assert leading.wait(20)
        stop.set()
        running.result()


def test_a_consumer_that_stands_by_opens_one_connection_at_a_time(
    pair: Pair, config: Config
) -> None:
    stop = threading.Event()
    tries = iter(range(3))
    opened: list[str] = []

    def stand_by(_: LockTaken) -> None:
        if next(tries, None) is None:
            stop.set()

    def connect(node: NodeConfig, config: Config, role: str) -> Connection:
        opened.append(role)
        return database.connect(node, config, role)

    with lead(config), mock.patch.object(links, "connect", connect):
        listener = stream.Listener(standing_by=stand_by)
        stream.stream(config, stop, seconds=30, listener=listener)
    # The first try does not know yet.
    assert sorted(opened[:4]) == ["reader", "reader", "writer", "writer"]
    assert opened[4:] == ["writer"] * 3


def test_the_lock_of_a_failed_start_is_given_back(pair: Pair, config: Config) -> None:
    with connected(config.second, config, "other") as other:
        locks.take(other, config, "billing")
        with pytest.raises(LockTaken):
            stream.sync(config)
        assert pair.crm.value("select count(*) from pg_locks where locktype = 'advisory'") == 0


def test_nobody_leads_while_a_second_writer_of_the_last_leader_lives(
    pair: Pair, config: Config
) -> None:
    with lead(config) as last:
        last.applier("billing", second=True)
        for node, side in zip(pair.nodes, last.sides.values(), strict=True):
            node.execute("select pg_terminate_backend(%s, 10000)", side.writer.info.backend_pid)
        with pytest.raises(LockTaken, match="it has just left"), lead(config):
            pass
        second = last.sides["billing"].second_writer
        assert second is not None
        pair.billing.execute("select pg_terminate_backend(%s, 10000)", second.info.backend_pid)
        with lead(config):
            pass


def test_who_leads_no_longer_gets_no_second_writer(pair: Pair, config: Config) -> None:
    with lead(config) as last:
        for node, side in zip(pair.nodes, last.sides.values(), strict=True):
            node.execute("select pg_terminate_backend(%s, 10000)", side.writer.info.backend_pid)
        with pytest.raises(PassInterrupted, match="has lost its lock"):
            last.applier("billing", second=True)
        with lead(config), pytest.raises(PassInterrupted, match="has lost its lock"):
            last.applier("billing", second=True)


@pytest.mark.parametrize("node", ["crm", "billing"])
@pytest.mark.parametrize("role", ["writer", "reader"])
def test_the_loop_reconnects_by_itself(pair: Pair, config: Config, node: str, role: str) -> None:
    victim = {n.name: n for n in pair.nodes}[node]
    stop = threading.Event()
    interrupted, applied = threading.Event(), threading.Event()
    listener = stream.Listener(
        passed=lambda reports: applied.set(), interrupted=lambda error, seconds: interrupted.set()
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream.stream, config, stop, seconds=60, listener=listener)
        family(pair.crm)
        assert applied.wait(20)
        victim.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name like %s"
            " and datname = current_database()",
            f"sync-pipeline % {role}",
        )
        pair.crm.execute("update users set name = 'new'")
        pair.billing.execute("update orders set note = 'new'")
        assert interrupted.wait(20)
        for _ in range(200):
            if not (pair.crm.pending() or pair.billing.pending()):
                break
            stop.wait(0.05)
        stop.set()
        running.result()
    assert equal(pair)
    assert failures(pair.crm) == []


def test_the_setting_that_silences_capture_never_outlives_a_transaction(
    pair: Pair, link: Link
) -> None:
    family(pair.crm)
    passes.run(link)
    for side in link.sides.values():
        row = side.writer.execute(
            "select current_setting('sync_pipeline.applying', true)"
        ).fetchone()
        assert row is not None
        assert row[0] in (None, "")


def test_pausing_on_either_node_stops_consumption_and_capture_goes_on(
    pair: Pair, config: Config
) -> None:
    pair.billing.execute("update sync.sync_node set paused_at = now()")
    family(pair.crm)
    assert totals(pair).paused
    assert pair.crm.pending() == 3
    pair.billing.execute("update sync.sync_node set paused_at = null")
    sync_pair(pair)
    assert equal(pair)


def test_a_pause_takes_effect_between_two_batches(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(pair.config_path, batch_size=10)
    config = installed(pair)
    pair.crm.execute("insert into accounts select n, 'many' from generate_series(1, 100) as n")
    finish = Batch.finish
    told: list[bool] = []
    stop = threading.Event()

    def finish_and_pause(batch: Batch) -> None:
        finish(batch)
        pair.billing.execute("update sync.sync_node set paused_at = now()")

    def paused(is_paused: bool) -> None:  # noqa: FBT001 - the listener's signature
        told.append(is_paused)
        if is_paused:
            waiting.append(pair.crm.pending())
            monkeypatch.undo()
            pair.billing.execute("update sync.sync_node set paused_at = null")

    def passed(_: object) -> None:
        if pair.crm.pending() == 0:
            stop.set()

    waiting: list[int] = []
    monkeypatch.setattr(Batch, "finish", finish_and_pause)
    stream.stream(config, stop, seconds=60, listener=Listener(paused=paused, passed=passed))
    assert told == [True, False]
    # One was under way, another was staged already.
    assert waiting[0] >= 80
    assert equal(pair)


def test_no_direction_begins_once_a_look_has_seen_the_pause(pair: Pair, config: Config) -> None:
    with lead(config) as link:
        passes.run(link)
        family(pair.crm)
        waiting = pair.crm.pending()
        pair.crm.execute("update sync.sync_node set paused_at = now()")
        assert passes.run(link) == []
        assert pair.crm.pending() == waiting > 0
        pair.crm.execute("update sync.sync_node set paused_at = null")
        assert passes.run(link)
    assert equal(pair)


def test_a_sync_that_is_paused_between_two_passes_says_so(pair: Pair, config: Config) -> None:
    def pause_and_go_on(_: object) -> None:
        pair.crm.execute("update sync.sync_node set paused_at = now()")
        pair.crm.execute("update accounts set name = 'waits'")

    family(pair.crm)
    done = stream.sync(config, Listener(passed=pause_and_go_on))
    assert (done.passes, done.paused) == (1, True)
    assert pair.crm.pending() > 0


def test_the_application_that_was_ahead_of_us_is_seen_under_our_locks(
    pair: Pair, config: Config
) -> None:
    """The target's application holds the row and commits while we wait for it: a conflict, not a lost update."""
    family(pair.crm)
    sync_pair(pair)
    pair.crm.execute("update users set name = 'crm'")
    with pair.billing.connect(autocommit=False) as application, ThreadPoolExecutor(1) as pool:
        application.execute("update users set name = 'billing'")
        running = pool.submit(stream.sync, config)
        waiting = (
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
            " and datname = current_database()"
        )
        for _ in range(400):
            if pair.billing.value(waiting):
                break
            threading.Event().wait(0.02)
        application.commit()
        running.result()
    assert equal(pair)
    assert pair.crm.rows("select name from users") == [("billing",)]
    assert conflict_log(pair.billing) == [("users", "1", "update_update", "billing")]


def test_a_role_that_owns_the_tables_is_enough_and_applications_need_no_rights(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute(
            "do $$ begin create role sync_owner login; create role sync_app login;"
            " exception when duplicate_object then null; end $$"
        )
        for table in ("accounts", "users", "orders"):
            node.execute(f"alter table {table} owner to sync_owner")
            node.execute(f"grant select, insert, update, delete, truncate on {table} to sync_app")
        node.execute(f"grant create on database {node.dsn.rsplit('/', 1)[1]} to sync_owner")
    crm, billing = (
        Node(n.name, n.dsn.replace("postgres@", "sync_owner@"), n.server) for n in pair.nodes
    )
    owner = Pair(crm, billing, pair.config_path)
    installed(owner)
    application = psycopg.connect(pair.crm.dsn.replace("postgres@", "sync_app@"), autocommit=True)
    with application:
        application.execute("insert into accounts values (1, 'by the application')")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            application.execute("select * from sync.sync_events")
    sync_pair(owner)
    assert equal(pair)
    assert len(pair.billing.rows("accounts")) == 1


def test_a_conflict_in_the_batch_in_which_a_parent_is_kept(pair: Pair, config: Config) -> None:
    """The batch is rolled back to its savepoint and applied again: nothing made on the way may be missing then."""
    family(pair.crm)
    family(pair.crm, 2)
    sync_pair(pair)
    pair.billing.insert("orders", id=9, user_id=1, amount=9)
    pair.billing.execute("update accounts set name = 'billing' where id = 2")
    pair.crm.execute("update accounts set name = 'crm' where id = 2")
    pair.crm.execute("delete from accounts where id = 1")
    sync_pair(pair)
    assert equal(pair)
    assert [row[0] for row in pair.crm.rows("orders")] == [2, 9]
    pair.crm.execute("update orders set note = 'still works'")
    sync_pair(pair)
    assert equal(pair)


def test_an_event_from_the_future_is_consumed_once(pair: Pair, config: Config) -> None:
    pair.crm.insert("accounts", id=1, name="first")
    pair.crm.execute("update sync.sync_events set created_at = now() + interval '1 hour'")
    assert totals(pair).passes == 1
    assert pair.crm.pending() == 0
