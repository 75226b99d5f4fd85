"""Random work on both sides, random deaths of the consumer; afterwards everything is as the rules say.

Hypothesis chooses the steps and shrinks a failure to the shortest list of them. Each run has a new seed, printed when
it fails; `CONVERGENCE_SEED` repeats one, `CONVERGENCE_EXAMPLES` asks for another number of examples in `make test`.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from sync_pipeline import stream
from sync_pipeline.errors import LockTaken, PassInterrupted
from tests.clients import TRACED, Client, Effects, assert_nothing_is_lost
from tests.consumer import DEATHS, Consumer, Died
from tests.engine import config_of, equal, installed
from tests.helpers import Pair, Row, write_config
from tests.model import LoggedConflict, Model, Record, Work
from tests.shapes import link

EXAMPLES = [
    pytest.param(int(os.environ.get("CONVERGENCE_EXAMPLES", "30")), id="short"),
    pytest.param(2_000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(6 * 3600)]),
]
STEPS = 30
# Everything runs in one thread: who waits for a lock would wait for ever.
LOCK_TIMEOUT_SECONDS = 0.03
SETTLING_ROUNDS = 10

RULES_DDL = "create table notes (id int primary key, body text); create table prices (id int primary key, body text);"
# Rows, waiting events and the conflict log, in one look.
STATE = """
select
    (select coalesce(json_agg(row), '[]') from (
        select json_build_array('notes', id, body) as row from notes
        union all select json_build_array('prices', id, body) from prices
    ) as rows),
    (select coalesce(json_agg(json_build_array(table_name, record_id::int, event_type)), '[]') from sync.sync_events),
    (select coalesce(json_agg(json_build_array(table_name, record_id::int, kind, winner, local_row, remote_row)), '[]')
     from sync.sync_conflicts)
"""

nodes = st.sampled_from(["crm", "billing"])
endings = st.sampled_from(["commit", "rollback"])
# Each write commits by itself, or goes into a transaction that stays open over many steps.
sessions = st.sampled_from(["own", "held"])
deaths = st.sampled_from(DEATHS)
pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]


def explore(machine: Callable[[], RuleBasedStateMachine], examples: int) -> None:
    """Run a state machine with a new seed, and say which it was."""
    chosen = int(os.environ.get("CONVERGENCE_SEED") or secrets.randbits(32))
    print(f"CONVERGENCE_SEED={chosen}")

    factory: Any = seed(chosen)(machine)
    run_state_machine_as_test(
        factory,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def empty(pair: Pair, *tables: str) -> None:
    """Empty the tables and the pipeline's own without a trace."""
    for node in pair.nodes:
        node.execute("set session_replication_role = replica")
        node.execute(f"truncate {', '.join(tables)}")
        node.execute(
            "truncate sync.sync_events, sync.sync_failures, sync.sync_conflicts, sync.sync_applied"
        )
        node.execute("set session_replication_role = origin")


@pytest.fixture(autouse=True)
def _quiet_deaths() -> None:
    """What psycopg warns of when a connection dies under it is what these tests are about."""
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


class Machine(RuleBasedStateMachine):
    """A consumer whose steps come between those of the applications, and that dies."""

    def __init__(self, pair: Pair, consumer: Consumer) -> None:
        super().__init__()
        self.pair = pair
        self.node = {node.name: node for node in pair.nodes}
        self.consumer = consumer
        self.last_step = "over"

    @rule()
    def step(self) -> None:
        self.take_step()

    @rule()
    def pass_whole(self) -> None:
        while self.take_step() not in {"over", "interrupted"}:
            pass

    @rule(death=deaths)
    def pass_and_die(self, death: str) -> None:
        while self.take_step(death) not in {"over", "interrupted", "died"}:
            pass

    @rule()
    def die_between_two_steps(self) -> None:
        self.consumer.die()
        self.last_step = "over"

    @precondition(lambda self: self.last_step != "over")
    @rule()
    def stop_in_the_middle(self) -> None:
        self.consumer.interrupt()
        self.last_step = "over"

    def take_step(self, death: str | None = None) -> str:
        before, self.last_step = self.last_step, "over"
        try:
            taken = self.consumer.step(death)
        except Died:
            if death is not None:
                self.died(before.split(maxsplit=1)[0], death)
            return "died"
        except PassInterrupted:
            assert self.may_be_interrupted()
            return "interrupted"
        self.last_step = taken
        self.took(taken)
        return taken

    def took(self, step: str) -> None:
        """The consumer took a step."""

    def died(self, source: str, death: str) -> None:
        """The consumer died in the last step of a direction."""

    def may_be_interrupted(self) -> bool:
        """Whether an application holds a lock, or a connection was lost."""
        raise NotImplementedError

    def settle(self) -> None:
        """Everybody ends their work; then check what must hold."""
        raise NotImplementedError

    def teardown(self) -> None:
        if sys.exc_info()[0] is None:
            self.settle()
        else:
            self.consumer.die()


class Rules(Machine):
    """The pipeline and the model do the same work, step by step, and must agree after each pass."""

    records = st.tuples(st.sampled_from(["notes", "prices"]), st.integers(1, 3))
    values = st.sampled_from(["a", "b", None])

    def __init__(
        self, pair: Pair, consumer: Consumer, sessions: dict[str, psycopg.Connection[Row]]
    ) -> None:
        super().__init__(pair, consumer)
        for session in sessions.values():
            session.rollback()
        empty(pair, "notes", "prices")
        self.model = Model("crm", "billing", {"prices": "crm"})
        # One transaction of each node can be held open over many steps.
        self.sessions = sessions
        self.held: dict[str, Work | None] = {"crm": None, "billing": None}

    @rule(node=nodes, record=records, value=values)
    def write(self, node: str, record: Record, value: str | None) -> None:
        try:
            put(self.node[node].connection, record, value)
        except psycopg.errors.LockNotAvailable:
            return
        work = Work()
        self.model.write(node, work, record, None if value is None else (value,))
        self.model.commit(node, work)

    @rule(node=nodes, record=records, value=values)
    def write_in_a_held_transaction(self, node: str, record: Record, value: str | None) -> None:
        work = self.held[node] or Work()
        try:
            put(self.sessions[node], record, value)
        except psycopg.errors.LockNotAvailable:
            self.end_the_held_transaction(node, "rollback")
            return
        self.model.write(node, work, record, None if value is None else (value,))
        self.held[node] = work

    @rule(node=nodes, ending=endings)
    def end_the_held_transaction(self, node: str, ending: str) -> None:
        work, self.held[node] = self.held[node], None
        if ending == "rollback" or work is None:
            self.sessions[node].rollback()
            return
        self.sessions[node].commit()
        self.model.commit(node, work)

    @rule(node=nodes, table=st.sampled_from(["notes", "prices"]))
    def truncate(self, node: str, table: str) -> None:
        try:
            self.node[node].execute(f"truncate {table}")
        except psycopg.errors.LockNotAvailable:
            return
        work = Work()
        for record in self.model.sides[node].rows:
            if record[0] == table:
                self.model.write(node, work, record, None)
        self.model.commit(node, work)

    @rule(node=nodes, record=records)
    def replay(self, node: str, record: Record) -> None:
        self.node[node].execute(
            "insert into sync.sync_events (table_name, record_id, event_type) values (%s, %s, 'update')",
            record[0],
            str(record[1]),
        )
        self.model.mark(node, record)

    def took(self, step: str) -> None:
        source = step.split(maxsplit=1)[0]
        if step.endswith("fetched"):
            self.model.fetch(source)
        elif step.endswith("done"):
            self.model.apply(source)
            self.model.acknowledge(source)
            self.compare()

    def died(self, source: str, death: str) -> None:
        if death != "before the target's commit":
            self.model.apply(source)
        if death == "after the source's delete":
            self.model.acknowledge(source, clear_ledger=False)

    def may_be_interrupted(self) -> bool:
        return any(self.held.values())

    def settle(self) -> None:
        for name in self.node:
            self.end_the_held_transaction(name, "rollback")
        # What a direction decides against its source goes over in the other, or in the pass after this.
        for _ in range(3):
            self.pass_whole()
        self.compare()
        crm, billing = self.model.sides.values()
        assert crm.rows == billing.rows
        for node in self.pair.nodes:
            assert node.pending() == 0
            assert node.rows("select * from sync.sync_applied") == []
            assert node.rows("select * from sync.sync_failures") == []

    def compare(self) -> None:
        for name, side in self.model.sides.items():
            rows, waiting, conflicts = self.node[name].rows(STATE)[0]
            assert {(table, key): (body,) for table, key, body in rows} == side.rows, name
            expected = [(*event.record, event.kind) for event in side.events.values()]
            assert sorted(map(tuple, waiting)) == sorted(expected), name
            logged = [
                LoggedConflict(
                    (table, key),
                    kind,
                    winner,
                    local and (local["body"],),
                    remote and (remote["body"],),
                )
                for table, key, kind, winner, local, remote in conflicts
            ]
            assert sorted(map(repr, logged)) == sorted(map(repr, side.conflicts)), name


class Families(Machine):
    """Parents, children and grandchildren; nothing committed is lost unsaid, whatever happens in between."""

    tables = st.sampled_from(["accounts", "users", "orders"])
    keys = st.integers(1, 3)
    tables_below: ClassVar = st.sampled_from(["users", "orders"])

    def __init__(self, pair: Pair, consumer: Consumer) -> None:
        super().__init__(pair, consumer)
        self.done = Effects()
        self.client = {
            (node.name, session): Client(node, self.done, LOCK_TIMEOUT_SECONDS)
            for node in pair.nodes
            for session in ("own", "held")
        }
        empty(pair, "accounts", "users", "orders")
        self.disturbed = False

    def at(self, node: str, session: str) -> Client:
        client = self.client[node, session]
        if session == "held":
            client.begin()
        return client

    @rule(node=nodes, session=sessions, table=tables, key=keys, parent=keys)
    def insert(self, node: str, session: str, table: str, key: int, parent: int) -> None:
        self.at(node, session).insert(table, key, parent)

    @rule(node=nodes, key=keys)
    def insert_a_family(self, node: str, key: int) -> None:
        for table in ("accounts", "users", "orders"):
            self.at(node, "own").insert(table, key, key)

    @rule(node=nodes, session=sessions, table=tables, key=keys)
    def update(self, node: str, session: str, table: str, key: int) -> None:
        self.at(node, session).update(table, key)

    @rule(node=nodes, session=sessions, table=tables_below, key=keys, parent=keys)
    def move(self, node: str, session: str, table: str, key: int, parent: int) -> None:
        self.at(node, session).move(table, key, parent)

    @rule(node=nodes, session=sessions, table=tables, key=keys, new=keys)
    def change_the_key(self, node: str, session: str, table: str, key: int, new: int) -> None:
        self.at(node, session).rename(table, key, new)

    @rule(node=nodes, session=sessions, table=tables, key=keys)
    def delete(self, node: str, session: str, table: str, key: int) -> None:
        self.at(node, session).delete(table, key)

    @rule(node=nodes)
    def truncate(self, node: str) -> None:
        self.at(node, "own").truncate_orders()

    @rule(node=nodes, ending=endings)
    def end_the_held_transaction(self, node: str, ending: str) -> None:
        self.client[node, "held"].end(commits=ending == "commit")

    @rule(node=nodes, role=st.sampled_from(["writer", "reader"]))
    def terminate_a_connection(self, node: str, role: str) -> None:
        ended = self.node[node].value(
            "with found as materialized (select pid from pg_stat_activity where application_name = %s) "
            "select count(pg_terminate_backend(pid, 10000)) from found",
            f"sync-pipeline sync {role}",
        )
        self.disturbed = self.disturbed or ended > 0

    @rule(node=nodes)
    def another_worker_tries(self, node: str) -> None:
        """It is told who leads; where nobody leads, an operator's pause keeps it from working."""
        if self.consumer.is_leading:
            if not self.disturbed:
                with pytest.raises(LockTaken):
                    stream.sync(config_of(self.pair))
            return
        waiting = [one.pending() for one in self.pair.nodes]
        self.node[node].execute("update sync.sync_node set paused_at = now()")
        assert stream.sync(config_of(self.pair)).paused
        self.node[node].execute("update sync.sync_node set paused_at = null")
        assert [one.pending() for one in self.pair.nodes] == waiting

    def may_be_interrupted(self) -> bool:
        excused = self.disturbed or any(client.holds for client in self.client.values())
        self.disturbed = False
        return excused

    def settle(self) -> None:
        for client in self.client.values():
            client.end(commits=False)
        self.consumer.die()
        for _ in range(SETTLING_ROUNDS):
            stream.sync(config_of(self.pair))
            failed = [
                node.execute("update sync.sync_failures set next_attempt_at = now()").rowcount
                for node in self.pair.nodes
            ]
            if not any(failed):
                break
        for node in self.pair.nodes:
            assert node.rows("select * from sync.sync_failures") == []
            assert node.pending() == 0
            assert node.rows("select * from sync.sync_applied") == []
        assert equal(self.pair)
        assert_nothing_is_lost(self.pair, self.done)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            for client in self.client.values():
                client.close()


def put(connection: psycopg.Connection[Row], record: Record, value: str | None) -> None:
    table, key = record
    if value is None:
        connection.execute(f"delete from {table} where id = %s".encode(), [key])
    else:
        connection.execute(
            f"insert into {table} values (%s, %s) on conflict (id) do update set body = excluded.body".encode(),
            [key, value],
        )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_pipeline_does_what_the_rules_say_whoever_dies(pair: Pair, examples: int) -> None:
    prices = {"name": "prices", "conflict": "crm"}
    link(pair, RULES_DDL, "notes", prices, lock_timeout_seconds=LOCK_TIMEOUT_SECONDS)
    consumer = Consumer(pair)
    sessions = {node.name: node.connect(autocommit=False) for node in pair.nodes}
    for node in pair.nodes:
        for session in (node.connection, sessions[node.name]):
            session.execute(f"set lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'".encode())
        sessions[node.name].commit()
    try:
        explore(lambda: Rules(pair, consumer, sessions), examples)
    finally:
        consumer.close()
        for session in sessions.values():
            session.close()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("batch_size", [10_000, 2], ids=["one batch", "many batches"])
def test_no_write_is_lost_and_none_comes_back_unsaid(
    pair: Pair, batch_size: int, examples: int
) -> None:
    for node in pair.nodes:
        node.execute(TRACED)
    write_config(pair.config_path, batch_size=batch_size, lock_timeout_seconds=LOCK_TIMEOUT_SECONDS)
    installed(pair)
    consumer = Consumer(pair)
    try:
        explore(lambda: Families(pair, consumer), examples)
    finally:
        consumer.close()
