"""Parents that are to be deleted while rows still refer to them: who stays, who waits, and who is refused.

And those that give a value away which rows refer to: these follow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import psycopg
from psycopg import sql

from sync_pipeline import conflicts, parking, queries
from sync_pipeline.applier import FOREIGN_KEY_VIOLATION, Applier, Refusal, Step
from sync_pipeline.companions import Companions
from sync_pipeline.config import Config
from sync_pipeline.conflicts import Decision
from sync_pipeline.database import query
from sync_pipeline.records import Failure, ForeignKey
from sync_pipeline.waiting import Dirty


class ChildrenLeftError(Exception):
    """Rows refer to records about to be deleted; on the source they may be gone as well, in a later batch."""


@dataclass
class Parents:
    """The guard of one batch. `failures` are those of the batch so far, which go on being added there."""

    applier: Applier
    config: Config
    target: str
    read_at: datetime
    companions: Companions
    failures: list[Failure]
    # How many records to be deleted stay, by table, in this savepoint, and which wait.
    kept: dict[str, int] = field(default_factory=dict, init=False)
    waiting: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._schema = self.config.schema_name
        self._connection = self.applier.connection

    def forget(self) -> None:
        """Begin anew: what was done since the savepoint is undone."""
        self.kept = {}
        self.waiting = {}

    def guard(
        self,
        step: Step,
        refused: Sequence[Refusal],
        successors: parking.Successors,
        parked: Mapping[str, set[int]],
        *,
        gathered: bool,
    ) -> list[Refusal]:
        """Before a parent is deleted: rows that still refer to it are the target's own work, so it stays.

        But where such a row is one that was refused, its parent is refused as well and returned; so is one whose place
        a refused record was to take, and one that the target could not send back. Raises `ChildrenLeftError` where a
        row is found and what the source has deleted later is not `gathered` yet, and a unique violation where one of
        the `parked` rows has to stay.
        """
        applier = self.applier
        if step.phase != "delete":
            for table in applier.catalog.followed.intersection(step.tables):
                self._mark_followers(table)
            return []
        if applier.catalog.left_out:
            for table in step.tables:
                self._await_absent_children(table)
        guarded = [table for table in step.tables if table in applier.catalog.referenced]
        for table in guarded:
            self._connection.execute(applier.statements(table).lock_gone)
        parents = self._refuse_replaced(refused, successors, guarded)
        parents += self._refuse_parents_of([*refused, *parents], guarded)
        # A parent that stays refers to parents itself: those may be among the records of this very step.
        while any(
            self._keep_referenced(step, table, parents, parked, gathered=gathered)
            for table in guarded
        ):
            pass
        return parents

    def _mark_followers(self, table: str) -> None:
        """Mark the rows that follow a value of their parent, about to be written, on this node alone.

        On the source each refers to whoever has the old value now.
        """
        parent = self.applier.statements(table)
        for child, key in self._children(table):
            if not (
                key.moves_with(parent.relation) and self.config.table(child).sends(self.target)
            ):
                continue
            rows = self._connection.execute(
                parent.followers(
                    self.applier.statements(child),
                    key,
                    self._schema,
                    child_is_staged=child in self.applier.staged,
                )
            )
            # What the source has changed as well is sent by its own event.
            found = [record_id for (record_id,) in rows]
            changed = self.companions.changed(child, found)
            ids = [record_id for record_id in found if record_id not in changed]
            if ids:
                self._connection.execute(
                    query(queries.get("mark_followers", self._schema)),
                    {"table_name": child, "record_ids": ids},
                )

    def _refuse_replaced(
        self, refused: Sequence[Refusal], successors: parking.Successors, tables: list[str]
    ) -> list[Refusal]:
        """Refuse to delete the rows whose place refused records were to take."""
        waiting = {(refusal.table, refusal.number) for refusal in refused}
        replaced = [
            Refusal(
                table,
                number,
                FOREIGN_KEY_VIOLATION,
                "what takes its place was refused, and rows refer to it",
            )
            for (table, number), numbers in successors.items()
            if table in tables and not waiting.isdisjoint((table, n) for n in numbers)
        ]
        parking.sit_out(self.applier, replaced)
        return replaced

    def _refuse_parents_of(self, refused: Sequence[Refusal], tables: list[str]) -> list[Refusal]:
        """Refuse to delete what records refer to whose own change was refused, and so on."""
        named = self._not_applied(refused)
        parents: list[Refusal] = []
        while named:
            more = [
                refusal
                for table in tables
                for child, key in self._children(table)
                for refusal in self._refused(
                    table,
                    child,
                    self._connection.execute(
                        self.applier.statements(table).referenced_by(
                            self.applier.statements(child), key
                        ),
                        {"record_ids": [rid for name, rid in named if name == child]},
                    ).fetchall(),
                )
            ]
            named = self._not_applied(more) if more else set()
            parents += more
        return parents

    def _not_applied(self, refused: Sequence[Refusal]) -> set[tuple[str, str]]:
        """Return the records, by table and record_id, of which the target has not got the source's change."""
        failures = [*self.failures, *self.applier.failures(refused)]
        return self.companions.unreadable.union(
            (failure.table_name, failure.record_id) for failure in failures if not failure.held
        )

    def _refused(self, table: str, child: str, found: list[tuple[int, str]]) -> list[Refusal]:
        refused = [
            Refusal(table, number, FOREIGN_KEY_VIOLATION, f"rows of {child} still refer to it")
            for number, _ in found
        ]
        parking.sit_out(self.applier, refused)
        return refused

    def _children(self, table: str) -> Iterator[tuple[str, ForeignKey]]:
        for child in self.applier.catalog.tables:
            for key in self.applier.catalog.relation(self.target, child).foreign_keys:
                if key.parent == table:
                    yield child, key

    def _await_absent_children(self, table: str) -> None:
        """Let a delete wait while a row refers to it whose table is left out: nobody can say whose work that row is."""
        applier = self.applier
        parent = applier.statements(table)
        known = [applier.catalog.relation(self.target, each).oid for each in applier.catalog.tables]
        references = self._connection.execute(
            query(queries.get("read_absent_children", self._schema)),
            {"parent": parent.relation.oid, "known": known},
        ).fetchall()
        if references:
            self._connection.execute(parent.lock_gone)
        for schema, child, columns, own_columns in references:
            rows = self._connection.execute(
                parent.referenced_from(sql.Identifier(schema, child), columns, own_columns)
            ).fetchall()
            if rows:
                applier.unstage([number for number, _ in rows], table)
                self.waiting.setdefault(table, []).extend(record_id for _, record_id in rows)

    def _keep_referenced(
        self,
        step: Step,
        table: str,
        refused: list[Refusal],
        parked: Mapping[str, set[int]],
        *,
        gathered: bool,
    ) -> bool:
        """Keep, or add to the refused, what rows still refer to; true if there was any."""
        applier = self.applier
        parent = applier.statements(table)
        found = False
        for child_table, key in self._children(table):
            together = child_table in step.tables and child_table in applier.staged
            kept = self._connection.execute(
                parent.still_referenced(
                    applier.statements(child_table), key, child_is_staged=together
                )
            ).fetchall()
            if kept and not gathered:
                raise ChildrenLeftError
            if kept and not self.config.table(table).sends(self.target):
                refused += self._refused(table, child_table, kept)
            elif kept:
                if parked.get(table, set()).intersection(number for number, _ in kept):
                    raise psycopg.errors.UniqueViolation("a row that was to make room has to stay")
                self._keep_parents(table, kept, child_table)
            found = found or bool(kept)
        return found

    def _keep_parents(self, table: str, kept: list[tuple[int, str]], child: str) -> None:
        applier = self.applier
        numbers = [number for number, _ in kept]
        parent = applier.statements(table)
        decisions = [
            Decision(
                Dirty(table, number, record_id, self.read_at, inserted=False, event_ids=[]),
                "parent_deleted",
                self.target,
            )
            for number, record_id in kept
        ]
        conflicts.log(applier, self._schema, table, decisions)
        self._connection.execute(
            query(queries.get("mark_kept", self._schema)),
            {"table_name": table, "record_ids": [rid for _, rid in kept]},
        )
        refused = self.companions.unreadable.union(
            (failure.table_name, failure.record_id) for failure in self.failures
        )
        for named, key in self._children(table):
            if named == child and self.config.table(child).sends(self.target):
                self._connection.execute(
                    parent.mark_children(
                        applier.statements(child),
                        key,
                        self._schema,
                        child_is_staged=child in applier.staged,
                    ),
                    {
                        "numbers": numbers,
                        "refused": [rid for name, rid in refused if name == child],
                    },
                )
        self.kept[table] = self.kept.get(table, 0) + len(kept)
        applier.unstage(numbers, table)
