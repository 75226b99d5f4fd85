"""One batch on the target: stage, apply, check under our row locks, settle conflicts, record in the ledger, commit."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Self

import psycopg

from sync_pipeline import capture, clocks, conflicts, isolation, ledger, parking, queries
from sync_pipeline.applier import FOREIGN_KEY_VIOLATION, VIOLATIONS, Applier, Refusal, Step
from sync_pipeline.companions import Companions
from sync_pipeline.config import Config
from sync_pipeline.conflicts import Decision
from sync_pipeline.database import error_class, query, scalar
from sync_pipeline.errors import PassInterrupted
from sync_pipeline.outbox import Outcome
from sync_pipeline.parents import ChildrenLeftError, Parents
from sync_pipeline.records import Counts, Failure
from sync_pipeline.snapshot import Change, Intake, Part, Snapshot, require_shapes
from sync_pipeline.waiting import Dirty, Waiting

MAX_ROUNDS = 8


@dataclass
class Batch:
    """Some records of the source, applied to the target in one transaction.

    `stage` touches no table of the user, so that it can happen while another session applies the batch before. When
    that one is committed comes `upsert`, then `finish`, which applies the rest and commits. `close` rolls back what
    was not finished.
    """

    applier: Applier
    config: Config
    snapshot: Snapshot
    intake: Intake
    source: str
    target: str
    # The ledger rows that are no longer needed, asked for at the end.
    forget: Callable[[], list[int]]
    waiting: Waiting
    # The records of this pass that the source did not win, and who did: a later batch can have more events of them.
    not_won: set[tuple[str, str, str | None]]
    counts: dict[str, Counts] = field(default_factory=dict, init=False)
    outcomes: list[Outcome] = field(default_factory=list, init=False)
    ledger_id: int = field(default=0, init=False)
    # The records, by table and record_id, that were dirty on both nodes.
    settled: set[tuple[str, str]] = field(default_factory=set, init=False)
    # Whether an operator had paused the target when this one was staged.
    is_paused: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._schema = self.config.schema_name
        self._connection = self.applier.connection
        self._stack = ExitStack()
        # Rows of the target that are parked in this savepoint, and whether to do so; see `parking`.
        self._parked: dict[str, set[int]] = {}
        self._exchanging = False
        # Whether rows to be deleted become the records that take their values, where nothing else makes room.
        self._renaming = False
        self._successors: parking.Successors = {}
        self._gathered = False
        self._done: list[Step] = []
        # Why a savepoint failed, and in which step, if in one.
        self._error: psycopg.Error | None = None
        self._running: Step | None = None
        self._failures: list[Failure] = []
        self._conflicts: dict[str, int] = {}
        self._lost: dict[str, list[str]] = {}
        self._decisions: list[Decision] = []
        # Rows with greater numbers were brought along: they have no events in this batch.
        self._last_number = self.intake.last_number

    def stage(self) -> Self:
        """Begin the transaction, stage the rows of the intake, look for conflicts and decide them."""
        try:
            try:
                self._open(raw=False)
            except psycopg.Error as error:
                if error_class(error) != "data":
                    raise
                # A value is not even readable here: stage all of them raw, so that its record can be told apart.
                self._stack.close()
                self._open(raw=True)
            self._decisions = self._decided(self.waiting.find(self.applier))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End the transaction: nothing of it stays, unless `finish` has committed."""
        with suppress(psycopg.Error):
            self._stack.close()

    def _open(self, *, raw: bool) -> None:
        tables = dict.fromkeys(part.table for part in self.intake.parts)
        relations = [self.applier.catalog.relation(self.target, table) for table in tables]
        self.applier.prepare(tables, raw=raw)
        self._transaction = self._stack.enter_context(
            self._connection.transaction(force_rollback=True)
        )
        # Local to the transaction: a setting that outlived it could silence an application's changes. The commit does
        # not wait for the disk; the acknowledgement does.
        with clocks.reading() as self.clock:
            row = self._connection.execute(
                query(queries.get("begin_batch", self._schema)),
                {
                    "applying": capture.APPLYING,
                    "schema": self._schema,
                    "tables": [relation.oid for relation in relations],
                },
            ).fetchone()
        if row is None:
            raise AssertionError("a query without a table returned no row")
        self.clock.clock = row[2]
        require_shapes(relations, row[3])
        self.is_paused = row[4]
        for part in self.intake.parts:
            self.applier.stage(part)
            self._failures += isolation.leave_out_unreadable(self.applier, self._schema, part)
        self._companions = Companions(
            self.applier,
            self.snapshot,
            self._schema,
            self._last_number,
            self.intake.last_id,
            frozenset(table.name for table in self.config.tables if table.sends(self.source)),
            self._stack,
        )
        self._parents = Parents(
            self.applier,
            self.config,
            self.target,
            self.snapshot.read_at,
            self._companions,
            self._failures,
        )

    def upsert(self, tables: list[str], settled: set[tuple[str, str]]) -> None:
        """Settle the conflicts that are here already; upsert the staged records of some tables.

        `settled` are those of the batch before, by table and record_id: it was not committed when this one was staged.
        A refusal is dealt with in `finish`.
        """
        # Most conflicts are here before us. Those that come while we write are found when our locks are held.
        decisions = self._decisions
        if settled.intersection((d.dirty.table, d.dirty.record_id) for d in decisions):
            decisions = self._decided(self.waiting.find(self.applier))
        self._settle(decisions)
        self._savepoint()
        steps = self._deletes_first() + self.applier.steps(tables, "upsert")
        try:
            self._run(steps)
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
            self._error = error

    def finish(self) -> None:
        """Apply what is left, settle conflicts, write the ledger and commit."""
        for _ in range(MAX_ROUNDS):
            refused = self._apply()
            dirty = self._dirty(refused)
            if not dirty:
                break
            self._rollback()
            self._drop(refused)
            self._settle(self._decided(dirty))
            self._savepoint()
        else:
            raise PassInterrupted(
                "applications keep changing the same records on both nodes", node=self.target
            )
        self._drop(refused)
        self._connection.execute("release savepoint batch")
        self._record()
        self._transaction.force_rollback = False
        self._stack.close()

    # --- applying ---

    def _apply(self) -> list[Refusal]:
        """Run the steps that are left; on a refusal, bring what is missing along, make room, or isolate the records."""
        for _ in range(MAX_ROUNDS):
            if self._error is None:
                self._running = None
                try:
                    if self._renaming:
                        parking.rename(self.applier)
                    if self._exchanging:
                        self._parked = parking.park(self.applier)
                    self._run([step for step in self._steps() if step not in self._done])
                    self.applier.check_constraints()
                except psycopg.Error as error:
                    if error_class(error) != "data":
                        raise
                    self._error = error
                except ChildrenLeftError:
                    self._rollback()
                    self._gather()
                    self._savepoint()
                    continue
                else:
                    return []
            self._rollback()
            sqlstate = self._error.sqlstate
            self._error = None
            if sqlstate in VIOLATIONS and self.applier.expect_new:
                self.applier.expect_new = False
                self._savepoint()
                continue
            if sqlstate in VIOLATIONS and not self._exchanging:
                self._exchanging = True
                self._companions.bring_partners()
                self._savepoint()
                continue
            if sqlstate in VIOLATIONS and not self._renaming and self._can_rename():
                self._renaming = True
                self._gather()
                self._savepoint()
                continue
            if sqlstate == FOREIGN_KEY_VIOLATION and self._companions.bring_parents():
                self._savepoint()
                continue
            self._gather()
            self._savepoint()
            self.counts = {}
            self.applier.expect_new = False
            self._successors = parking.successors(self.applier)
            refused = isolation.isolate(
                self.applier,
                self._schema,
                self._steps(),
                self.counts,
                self._guard_parents,
                (self._running, sqlstate),
            )
            return self._exchange(refused)
        raise PassInterrupted("parents keep disappearing", node=self.target)

    def _gather(self) -> None:
        """Bring along, once, what keeps rows from being deleted and has changed on the source as well."""
        if not self._gathered:
            self._gathered = True
            self._companions.bring_children()
            self._companions.bring_successors()

    def _can_rename(self) -> bool:
        with self._connection.transaction(force_rollback=True):
            return parking.rename(self.applier)

    def _exchange(self, refused: list[Refusal]) -> list[Refusal]:
        """Let those of the refused records that can exchange unique values or places; return the others."""
        hopeful, hopeless = parking.divide(self.applier, refused, self._successors)
        if not hopeful:
            return hopeless
        counts = deepcopy(self.counts)
        try:
            with self._connection.transaction():
                self.applier.defer_constraints()
                parking.sit_out(self.applier, hopeless)
                parking.go_again(self.applier, hopeful, self._successors)
                parking.rename(self.applier)
                self._parked = parking.park(self.applier)
                self._run(self._steps())
                self.applier.check_constraints()
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
            self.counts = counts
            return [*hopeful, *hopeless]
        finally:
            self._parked = {}
        return hopeless

    def _steps(self) -> list[Step]:
        tables = list(self.applier.staged)
        upserts = self.applier.steps(tables, "upsert")
        deletes = self.applier.steps(tables, "delete")
        first = self._deletes_first()
        return first + upserts + [step for step in deletes if step not in first]

    def _deletes_first(self) -> list[Step]:
        """Deletes that no foreign key forbids go first: they free the unique values that upserts may want."""
        referenced = self.applier.catalog.referenced
        return [
            step
            for step in self.applier.steps(list(self.applier.staged), "delete")
            if not referenced.intersection(step.tables)
        ]

    def _run(self, steps: list[Step]) -> None:
        for step in steps:
            if self._guard_parents(step, ()):
                raise psycopg.errors.ForeignKeyViolation("rows that have to wait refer to others")
            self._running = step
            self.applier.run(step, self.counts)
            self._running = None
            self._done.append(step)

    def _rollback(self) -> None:
        self._connection.execute("rollback to savepoint batch")
        self._connection.execute("release savepoint batch")
        self._done = []
        self._parked = {}
        self._parents.forget()
        self.counts = {}

    def _savepoint(self) -> None:
        self._connection.execute("savepoint batch")
        self.applier.defer_constraints()
        self.applier.survey()

    def _guard_parents(self, step: Step, refused: Sequence[Refusal]) -> list[Refusal]:
        return self._parents.guard(
            step, refused, self._successors, self._parked, gathered=self._gathered
        )

    # --- conflicts ---

    def _dirty(self, refused: list[Refusal]) -> list[Dirty]:
        failing = {(refusal.table, refusal.number) for refusal in refused}
        return [
            dirty
            for dirty in self.waiting.find_again(self.applier, self._last_number)
            if (dirty.table, dirty.number) not in failing
        ]

    def _decided(self, dirty: list[Dirty]) -> list[Decision]:
        parents = [each for each in dirty if self._is_parent_brought_along(each.number)]
        others = [each for each in dirty if not self._is_parent_brought_along(each.number)]
        return conflicts.decide(
            self.applier, self.config, self.source, self.target, others, self._changes
        ) + self._decided_of_parents(parents)

    def _decided_of_parents(self, dirty: list[Dirty]) -> list[Decision]:
        """Let parents that were brought along come back, whatever the policy.

        The target deleted what the source has given new children, or moved the value that they refer to. But where the
        source has changed the parent itself, too, that is a conflict like any other.
        """
        changed: dict[tuple[str, str], Change] = {}

        def changes(table: str, record_ids: list[str]) -> dict[str, Change]:
            found = self.snapshot.changes_of_keys([Part(table)], record_ids)
            changed.update(((table, record_id), change) for record_id, change in found.items())
            return found

        decisions = conflicts.decide(
            self.applier, self.config, self.source, self.target, dirty, changes
        )
        return [
            d
            if d.equal
            or (d.kind != "update_delete" and (d.dirty.table, d.dirty.record_id) in changed)
            else Decision(d.dirty, "parent_deleted", self.source)
            for d in decisions
        ]

    def _is_parent_brought_along(self, number: int) -> bool:
        return number > self._last_number and number not in self._companions.further_numbers

    def _settle(self, decisions: list[Decision]) -> None:
        self.settled.update((d.dirty.table, d.dirty.record_id) for d in decisions)
        decisions = [
            # A later event of the source can turn a decision: that is told too.
            replace(d, again=True)
            if (d.dirty.table, d.dirty.record_id, d.winner) in self.not_won
            else d
            for d in decisions
        ]
        self._failures += conflicts.settle(
            self.applier, self.config, self.source, self.target, decisions
        )
        for decision in decisions:
            if decision.equal:
                continue
            table = decision.dirty.table
            if not decision.again:
                self._conflicts[table] = self._conflicts.get(table, 0) + 1
            if decision.winner != self.source:
                self._lost.setdefault(table, []).append(decision.dirty.record_id)
                self.not_won.add((table, decision.dirty.record_id, decision.winner))

    def _changes(self, table: str, record_ids: list[str]) -> dict[str, Change]:
        """Return what the source knows of some records of the batch: nothing of those that were brought along."""
        parts = self.intake.of([table])
        return self.snapshot.changes_of_keys(parts, record_ids) if parts else {}

    # --- the end of a batch ---

    def _drop(self, refused: list[Refusal]) -> None:
        """Take refused records out of the batch and remember why."""
        self._failures += self.applier.failures(
            [refusal for refusal in refused if refusal.number <= self._last_number]
        )
        for table in dict.fromkeys(refusal.table for refusal in refused):
            self.applier.unstage([r.number for r in refused if r.table == table], table)

    def _record(self) -> None:
        waiting = [
            change.ids
            for table, record_ids in self._parents.waiting.items()
            for change in self._changes(table, record_ids).values()
            if change.ids is not None
        ]
        if waiting:
            self.intake.leave(self._without(waiting))
        left_out: list[str] = []
        brought = self._brought_along()
        for table in dict.fromkeys([*(part.table for part in self.intake.parts), *brought]):
            parts = self.intake.of([table])
            # A failure that waits stays one.
            away = set(self._parents.waiting.get(table, []))
            tried = [*(rid for part in parts for rid in part.retried), *brought.get(table, [])]
            retried = [record_id for record_id in tried if record_id not in away]
            failures = {f.record_id: f for f in self._failures if f.table_name == table}
            known = self._changes(table, list(failures)) if failures else {}
            failed = [failure for record_id, failure in failures.items() if record_id in known]
            failed_ids = [change.ids for change in known.values() if change.ids is not None]
            self.outcomes.append(
                Outcome(table, retried, failed, failed_ids, self._lost.get(table, []))
            )
            left_out += failed_ids
        ledger.forget(self._connection, self._schema, self.forget())
        self.ledger_id = ledger.record(
            self._connection,
            self._schema,
            self.source,
            self._without(left_out),
            [
                (outcome.table, record_id)
                for outcome in self.outcomes
                for record_id in set(outcome.retried).difference(
                    failure.record_id for failure in outcome.failures
                )
            ],
            self.snapshot.read_at,
        )
        self._count()

    def _brought_along(self) -> dict[str, list[str]]:
        """Return, by table, the records that were brought along without an event: a failure of theirs is over."""
        numbers = {
            table: [
                number
                for part in parts
                if part.first_number > self._last_number and not part.first_id
                for number in range(part.first_number, part.last_number + 1)
            ]
            for table, parts in self.applier.staged.items()
        }
        return {
            table: list(self.applier.record_ids(table, mine).values())
            for table, mine in numbers.items()
            if mine
        }

    def _without(self, ids: list[str]) -> str:
        """Return the ids of the batch without some: a recovery must leave those of records that failed alone."""
        if not ids:
            return self.intake.ids
        statement = query(queries.get("subtract_ids", self._schema))
        return str(scalar(self._connection, statement, {"ids": self.intake.ids, "left_out": ids}))

    def _count(self) -> None:
        for part in self.intake.parts:
            entry = self.counts.setdefault(part.table, Counts())
            entry.failed += sum(1 for f in self._failures if f.table_name == part.table)
        for table, number in [*self._conflicts.items(), *self._parents.kept.items()]:
            self.counts.setdefault(table, Counts()).conflicts += number
        staged: dict[str, int] = {}
        for part in self.intake.parts:
            staged[part.table] = staged.get(part.table, 0) + part.count
        for table, number in staged.items():
            entry = self.counts[table]
            not_written = (
                len(self._lost.get(table, []))
                + self._parents.kept.get(table, 0)
                + len(self._parents.waiting.get(table, []))
            )
            written = entry.upserted + entry.deleted + entry.failed
            entry.unchanged = max(0, number - written - not_written)
