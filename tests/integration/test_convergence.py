"""Random work on both sides, workers that die, race and wake too late; afterwards everything is as the rules say.

Hypothesis chooses the steps and shrinks a failure to the shortest list of them. Each run has a new seed, printed when
it fails; `CONVERGENCE_SEED` repeats one, `CONVERGENCE_EXAMPLES` asks for another number of examples in `make test`.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from sync_pipeline import companions, stream, waiting
from sync_pipeline.errors import LockTaken, PassInterrupted
from tests import disputes
from tests.clients import TRACED, UNIQUE, Client, Effects, assert_nothing_is_lost
from tests.consumer import DEATHS, Consumer, Died
from tests.engine import config_of, equal, installed
from tests.helpers import NODES, Pair, Row, write_config
from tests.model import LoggedConflict, Model, Record, Work
from tests.shapes import link

EXAMPLES = [
    pytest.param(int(os.environ.get("CONVERGENCE_EXAMPLES", "40")), id="short"),
    pytest.param(2_000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(6 * 3600)]),
]
STEPS = 30
# Everything runs in one thread: who waits for a lock would wait for ever.
LOCK_TIMEOUT_SECONDS = 0.03
SETTLING_ROUNDS = 10

RULES_DDL = """
create table notes (id int primary key, body text);
create table prices (id int primary key, body text);
create table badges (id int primary key, body text, code text not null unique);
"""
# Rows, waiting events and the conflict log, in one look.
STATE = """
select
    (select coalesce(json_agg(row), '[]') from (
        select json_build_array('notes', id, body) as row from notes
        union all select json_build_array('prices', id, body) from prices
        union all select json_build_array('badges', id, body, code) from badges
    ) as rows),
    (select coalesce(json_agg(json_build_array(table_name, record_id::int, event_type)), '[]') from sync.sync_events),
    (select coalesce(json_agg(json_build_array(table_name, record_id::int, kind, winner, local_row, remote_row)), '[]')
     from sync.sync_conflicts),
    (select count(*) from sync.sync_applied),
    (select count(*) from sync.sync_failures)
"""
UNSETTLED = """
select
    (select count(*) from sync.sync_events),
    (select count(*) from sync.sync_applied),
    (select array_agg(row(table_name, record_id, error_class)::text order by table_name, record_id)
     from sync.sync_failures)
"""
SETTLED = (0, 0, None)

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
    """Empty the tables and the pipeline's own without a trace. Not by TRUNCATE: new files cost more than a few rows."""
    own = (f"sync.sync_{name}" for name in ("events", "failures", "conflicts", "applied"))
    deletes = "; ".join(f"delete from {table}" for table in (*tables, *own))
    for node in pair.nodes:
        node.execute(f"begin; set local session_replication_role = replica; {deletes}; commit")


@pytest.fixture(autouse=True)
def _quiet_deaths() -> None:
    """What psycopg warns of when a connection dies under it is what these tests are about."""
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)


class Machine(RuleBasedStateMachine):
    """Two workers whose steps come between those of the applications. One leads; either dies, or wakes up too late."""

    def __init__(self, pair: Pair, workers: list[Consumer]) -> None:
        super().__init__()
        self.pair = pair
        self.node = {node.name: node for node in pair.nodes}
        # Whoever led at the end of the last example goes on.
        self.leader, self.other = sorted(workers, key=lambda worker: not worker.is_leading)
        self.last_step = "over"
        # Sessions of the leader that an administrator has ended.
        self.lost: set[tuple[str, str]] = set()
        # Whether the snapshot of the leader may no longer show some rows.
        self.has_lost_rows = False

    def begin(self, *tables: str) -> None:
        """Let each example begin alike: with empty tables and a leader that has looked into both directions."""
        empty(self.pair, *tables)
        if not self.leader.is_leading:
            self.leader.finish()

    @rule()
    def step(self) -> None:
        self.take_step()

    @rule()
    def pass_whole(self) -> None:
        self.take_steps()

    @rule(death=deaths, heir=st.booleans())
    def pass_and_die(self, death: str, heir: bool) -> None:  # noqa: FBT001 - drawn by Hypothesis
        while (taken := self.take_step(death)) not in {"over", "interrupted", "died"}:
            pass
        if taken == "died":
            self.bequeath(heir=heir)

    @rule(heir=st.booleans())
    def die_between_two_steps(self, heir: bool) -> None:  # noqa: FBT001 - drawn by Hypothesis
        self.leader.die()
        self.gone()
        self.bequeath(heir=heir)

    @rule()
    def stop_in_the_middle(self) -> None:
        self.leader.interrupt()
        self.gone()

    @rule()
    def lose_the_lead(self) -> None:
        """The leader does not know yet, and nobody has taken its place."""
        for node in NODES:
            self.lose(node, "writer")

    @rule()
    def the_other_tries(self) -> None:
        """It is told who leads, takes an empty place, or finds that its own was taken while it slept."""
        if self.other.is_leading:
            self.wake_the_other()
        elif self.leader.is_leading and not self.has_lost_the_lead:
            with pytest.raises(LockTaken):
                self.other.lead()
        else:
            self.take_over()

    @rule(point=deaths)
    def sleep_and_be_overtaken(self, point: str) -> None:
        """The leader stops in the middle of a step; when it wakes, the other has taken its place and done the work."""
        sleeper = self.leader
        troubles: list[BaseException] = []
        has_slept = False

        def sleep() -> None:
            nonlocal has_slept
            has_slept = True
            try:
                self.cut(before.split(maxsplit=1)[0], point)
                self.lose_the_lead()
                self.take_over()
                self.pass_whole()
            except BaseException as error:  # noqa: BLE001 - raised below: the engine would take it for its own
                troubles.append(error)

        taken = ""
        while taken != "over":
            before = self.last_step
            try:
                taken = sleeper.step(point, sleep)
            except PassInterrupted as error:
                if troubles:
                    raise troubles[0] from None
                if not has_slept:
                    self.interrupted(error)
                return
            assert not has_slept, "a worker that had lost its place finished a step"
            self.last_step = taken
            self.took(taken)

    def take_step(self, death: str | None = None) -> str:
        before = self.last_step
        try:
            taken = self.leader.step(death)
        except Died:
            self.gone()
            if death is not None:
                self.cut(before.split(maxsplit=1)[0], death)
            return "died"
        except PassInterrupted as error:
            self.interrupted(error)
            return "interrupted"
        self.last_step = taken
        self.has_lost_rows = False
        self.took(taken)
        return taken

    def take_steps(self) -> str:
        """Take the steps that are left of a pass; tell how it ended."""
        while (taken := self.take_step()) not in {"over", "interrupted"}:
            pass
        return taken

    def interrupted(self, error: PassInterrupted) -> None:
        """The leader's pass was interrupted, which needs a reason."""
        if not self.lost and not self.has_lost_rows and not self.applications_hold():
            raise AssertionError("nobody was in the way") from error
        self.gone()

    def gone(self) -> None:
        """The leader's life has ended."""
        self.last_step = "over"
        self.lost = set()
        self.has_lost_rows = False

    def bequeath(self, *, heir: bool) -> None:
        """After a death: the other takes over though the servers may not have noticed it yet, or nobody for now."""
        if heir:
            self.take_over()
        else:
            self.leader.bury()

    def take_over(self) -> None:
        if self.other.is_leading:
            self.wake_the_other()
        self.leader, self.other = self.other, self.leader
        self.gone()
        self.leader.lead_when_free()

    def wake_the_other(self) -> None:
        with pytest.raises(PassInterrupted):
            # Where nothing was to be sent, the rest of a pass asks nobody.
            self.steps_of_the_other(4)

    def steps_of_the_other(self, number: int) -> None:
        for _ in range(number):
            self.other.step()

    def lose(self, node: str, role: str) -> None:
        if self.leader.lose(self.node[node], role):
            self.lost.add((node, role))

    @property
    def has_lost_the_lead(self) -> bool:
        return {(node, "writer") for node in NODES} <= self.lost

    def took(self, step: str) -> None:
        """The leader took a step."""

    def cut(self, source: str, point: str) -> None:
        """The leader was cut off for good at this point of the last step of a direction."""

    def applications_hold(self) -> bool:
        """Whether an application may hold a lock."""
        raise NotImplementedError

    def settle(self) -> None:
        """Everybody ends their work; then check what must hold."""
        raise NotImplementedError

    def teardown(self) -> None:
        has_failed = sys.exc_info()[0] is not None
        if not has_failed:
            if self.other.is_leading:
                self.wake_the_other()
            self.settle()
        if has_failed or self.lost:
            # The next example gets workers that are whole.
            self.leader.die()
            self.other.die()
        for worker in (self.leader, self.other):
            worker.bury()


class Rules(Machine):
    """The pipeline and the model do the same work, step by step, and must agree after each pass."""

    tables = st.sampled_from(["notes", "prices", "badges"])
    keys = st.integers(1, 3)
    records = st.tuples(tables, keys)
    values = st.sampled_from(["a", "b", None])

    def __init__(
        self, pair: Pair, workers: list[Consumer], sessions: dict[str, psycopg.Connection[Row]]
    ) -> None:
        super().__init__(pair, workers)
        for session in sessions.values():
            session.rollback()
        self.begin("notes", "prices", "badges")
        self.model = Model("crm", "billing", {"prices": "crm", "badges": "crm"})
        # One transaction of each node can be held open over many steps.
        self.sessions = sessions
        self.held: dict[str, Work | None] = {"crm": None, "billing": None}
        self.codes = count(1)

    @rule(node=nodes, session=sessions, record=records, value=values)
    def write(self, node: str, session: str, record: Record, value: str | None) -> None:
        with self.transaction(node, session) as application:
            application.put(record, value)

    @rule(session=sessions, circle=st.permutations([1, 2, 3]), size=st.integers(2, 3))
    def exchange_codes(self, session: str, circle: list[int], size: int) -> None:
        """In one transaction, by way of a free value; only on the node that wins conflicts about badges."""
        with self.transaction("crm", session) as application:
            found = application.seen
            badges = [("badges", key) for key in circle[:size] if ("badges", key) in found]
            codes = [found[badge][1] for badge in [*badges[1:], *badges[:1]]]
            if badges:
                application.set_code(badges[0], self.new_code())
            for badge, code in reversed(list(zip(badges, codes, strict=True))):
                application.set_code(badge, code)

    @rule(session=sessions, key=keys, heir=keys)
    def delete_a_badge_and_pass_its_code_on(self, session: str, key: int, heir: int) -> None:
        with self.transaction("crm", session) as application:
            found = application.seen
            badge, other = ("badges", key), ("badges", heir)
            if key != heir and badge in found and other in found:
                application.put(badge, None)
                application.set_code(other, found[badge][1])

    @rule(node=nodes, session=sessions, record=records, new=keys)
    def change_the_key(self, node: str, session: str, record: Record, new: int) -> None:
        with self.transaction(node, session) as application:
            found = application.seen
            # A badge that moved on billing would share its code with one that crm kept.
            if (
                record in found
                and (record[0], new) not in found
                and (node, record[0]) != ("billing", "badges")
            ):
                application.change_the_key(record, new)

    @rule(node=nodes, ending=endings)
    def end_the_held_transaction(self, node: str, ending: str) -> None:
        work, self.held[node] = self.held[node], None
        if ending == "rollback" or work is None:
            self.sessions[node].rollback()
            return
        self.sessions[node].commit()
        self.model.commit(node, work)

    @rule(node=nodes, table=tables)
    def truncate(self, node: str, table: str) -> None:
        with self.transaction(node, "own") as application:
            application.truncate(table)
            # The rows of these tables are read in the next step, and no snapshot keeps what TRUNCATE took.
            self.has_lost_rows |= self.last_step == f"{node} fetched"

    @rule(node=nodes, record=records)
    def replay(self, node: str, record: Record) -> None:
        self.node[node].execute(
            "insert into sync.sync_events (table_name, record_id, event_type) values (%s, %s, 'update')",
            record[0],
            str(record[1]),
        )
        self.model.mark(node, record)

    @contextmanager
    def transaction(self, node: str, session: str) -> Iterator["Application"]:
        """Yield an application in a transaction: its own, or the one that is held open. Who meets a lock rolls back."""
        if session == "held":
            work = self.held[node] or Work()
            self.held[node] = work
            try:
                yield Application(self, node, self.sessions[node], work)
            except psycopg.errors.LockNotAvailable:
                self.end_the_held_transaction(node, "rollback")
            return
        work = Work()
        connection = self.node[node].connection
        with suppress(psycopg.errors.LockNotAvailable):
            with connection.transaction():
                yield Application(self, node, connection, work)
            self.model.commit(node, work)

    def new_code(self) -> str:
        return f"code {next(self.codes)}"

    def took(self, step: str) -> None:
        source = step.split(maxsplit=1)[0]
        if step.endswith("fetched"):
            self.model.fetch(source)
        elif step.endswith("done"):
            self.model.apply(source)
            self.model.acknowledge(source)
            self.compare()

    def cut(self, source: str, point: str) -> None:
        if point != "before the target's commit":
            self.model.apply(source)
        if point == "after the source's delete":
            self.model.acknowledge(source, clear_ledger=False)

    def applications_hold(self) -> bool:
        return any(self.held.values())

    def settle(self) -> None:
        for name in self.node:
            self.end_the_held_transaction(name, "rollback")
        # What a direction decides against its source goes over in the other, or in the pass after this.
        for _ in range(SETTLING_ROUNDS):
            self.pass_whole()
            if not any(side.events or side.ledger for side in self.model.sides.values()):
                break
        self.compare()
        crm, billing = self.model.sides.values()
        assert crm.rows == billing.rows
        assert not crm.events
        assert not billing.events

    def compare(self) -> None:
        for name, side in self.model.sides.items():
            rows, waiting, conflicts, ledger, failures = self.node[name].rows(STATE)[0]
            assert {(table, key): tuple(row) for table, key, *row in rows} == side.rows, name
            expected = [(*event.record, event.kind) for event in side.events.values()]
            assert sorted(map(tuple, waiting)) == sorted(expected), name
            logged = [
                LoggedConflict((table, key), kind, winner, logged_row(local), logged_row(remote))
                for table, key, kind, winner, local, remote in conflicts
            ]
            assert sorted(map(repr, logged)) == sorted(map(repr, side.conflicts)), name
            assert (ledger, failures) == (len(side.ledger), 0), name


@dataclass(frozen=True)
class Application:
    """A transaction that writes to the database and to the model."""

    machine: Rules
    node: str
    connection: psycopg.Connection[Row]
    work: Work

    @property
    def seen(self) -> dict[Record, Any]:
        """The rows as this transaction sees them."""
        return self.machine.model.seen(self.node, self.work)

    def put(self, record: Record, body: str | None) -> None:
        """Insert, update or delete a record."""
        table, key = record
        if body is None:
            self._run(f"delete from {table} where id = %s", key)
            self._note(record, None)
            return
        code = [self.machine.new_code()] if table == "badges" else []
        marks = ", ".join(["%s"] * (2 + len(code)))
        self._run(
            f"insert into {table} values ({marks}) on conflict (id) do update set body = excluded.body",
            key,
            body,
            *code,
        )
        present = self.seen.get(record)
        self._note(record, (body, *(present[1:] if present else code)))

    def set_code(self, badge: Record, code: str) -> None:
        """Give a badge another code."""
        self._run("update badges set code = %s where id = %s", code, badge[1])
        self._note(badge, (self.seen[badge][0], code))

    def change_the_key(self, record: Record, new: int) -> None:
        """Give a record a key that is free."""
        table, key = record
        self._run(f"update {table} set id = %s where id = %s", new, key)
        row = self.seen[record]
        self._note(record, None)
        self._note((table, new), row)

    def truncate(self, table: str) -> None:
        """Delete all records of a table."""
        self._run(f"truncate {table}")
        for record in self.seen:
            if record[0] == table:
                self._note(record, None)

    def _run(self, statement: str, *values: object) -> None:
        self.connection.execute(statement.encode(), values or None)

    def _note(self, record: Record, row: Any) -> None:
        self.machine.model.write(self.node, self.work, record, row)


class Families(Machine):
    """Parents, children and grandchildren; nothing committed is lost unsaid, whatever happens in between."""

    tables = st.sampled_from(["accounts", "users", "orders"])
    keys = st.integers(1, 3)
    tables_below: ClassVar = st.sampled_from(["users", "orders"])

    def __init__(
        self, pair: Pair, workers: list[Consumer], clients: dict[tuple[str, str], Client]
    ) -> None:
        super().__init__(pair, workers)
        self.done = Effects()
        self.client = clients
        for client in clients.values():
            client.end(commits=False)
            client.note_in(self.done)
        self.begin("accounts", "users", "orders")

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

    @rule(
        node=nodes,
        session=sessions,
        table=st.sampled_from(list(UNIQUE)),
        circle=st.permutations([1, 2, 3]),
        size=st.integers(2, 3),
    )
    def exchange_unique_values(
        self, node: str, session: str, table: str, circle: list[int], size: int
    ) -> None:
        self.at(node, session).exchange(table, circle[:size])

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
    def lose_a_connection(self, node: str, role: str) -> None:
        self.lose(node, role)

    @rule(node=nodes)
    def an_operator_pauses(self, node: str) -> None:
        """Where nobody leads, a worker that comes meanwhile does nothing; a leader asks before each of its passes."""
        waiting = [one.pending() for one in self.pair.nodes]
        self.node[node].execute("update sync.sync_node set paused_at = now()")
        if not self.leader.is_leading:
            assert stream.sync(config_of(self.pair)).paused
        elif not self.lost and self.last_step == "over":
            assert self.leader.link.is_paused()
        self.node[node].execute("update sync.sync_node set paused_at = null")
        assert [one.pending() for one in self.pair.nodes] == waiting

    def applications_hold(self) -> bool:
        return any(client.holds for client in self.client.values())

    def settle(self) -> None:
        for client in self.client.values():
            client.end(commits=False)
        clients = {node: self.client[node, "own"] for node in NODES}
        before: object = None
        for _ in range(SETTLING_ROUNDS):
            ended = self.take_steps()
            now = [node.rows(UNSETTLED)[0] for node in self.pair.nodes]
            if now == [SETTLED, SETTLED]:
                break
            for node in self.pair.nodes:
                node.execute("update sync.sync_failures set next_attempt_at = now()")
            # A pass that only met a connection that was lost before says nothing.
            if now == before and ended == "over":
                # Nothing moves by itself any more.
                assert disputes.settle(self.pair, clients)
            before = now
        assert [node.rows(UNSETTLED)[0] for node in self.pair.nodes] == [SETTLED, SETTLED]
        assert equal(self.pair)
        assert_nothing_is_lost(self.pair, self.done)


def logged_row(values: dict[str, str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values[n] for n in ("body", "code") if n in values)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_pipeline_does_what_the_rules_say_whoever_dies(pair: Pair, examples: int) -> None:
    ruled_by_crm = [{"name": name, "conflict": "crm"} for name in ("prices", "badges")]
    link(pair, RULES_DDL, "notes", *ruled_by_crm, lock_timeout_seconds=LOCK_TIMEOUT_SECONDS)
    workers = [Consumer(pair), Consumer(pair)]
    sessions = {node.name: node.connect(autocommit=False) for node in pair.nodes}
    for node in pair.nodes:
        for session in (node.connection, sessions[node.name]):
            session.execute(f"set lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'".encode())
        sessions[node.name].commit()
    try:
        explore(lambda: Rules(pair, workers, sessions), examples)
    finally:
        for worker in workers:
            worker.close()
        for session in sessions.values():
            session.close()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("batch_size", [10_000, 2], ids=["one batch", "many batches"])
def test_no_write_is_lost_and_none_comes_back_unsaid(
    pair: Pair, batch_size: int, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if batch_size < 10_000:
        # And let each be checked against a copy of what waits on its target, and reach for more than it needs.
        monkeypatch.setattr(waiting, "WORTHWHILE_EVENTS", 0)
        monkeypatch.setattr(companions, "PATIENT_LEVELS", 0)
        monkeypatch.setattr(companions, "FIRST_REACH", 2)
    for node in pair.nodes:
        node.execute(TRACED)
    write_config(
        pair.config_path,
        batch_size=batch_size,
        lock_timeout_seconds=LOCK_TIMEOUT_SECONDS,
        retry={"max_attempts": 1000},
    )
    installed(pair)
    workers = [Consumer(pair), Consumer(pair)]
    clients = {
        (node.name, session): Client(node, Effects(), LOCK_TIMEOUT_SECONDS)
        for node in pair.nodes
        for session in ("own", "held")
    }
    try:
        explore(lambda: Families(pair, workers, clients), examples)
    finally:
        for worker in workers:
            worker.close()
        for client in clients.values():
            client.close()
