"""Records that a batch turns out to need though their events are not in it: staged from the same snapshot.

Parents that the target lacks; partners that hold a unique value which a record of the batch takes; children that are
gone, too, of parents that are deleted. Each may need further ones.

When all positions of a list move up by one, each record needs the next; a version that refers to the one before needs
that. Such a chain is not followed record by record to its end: after a few, more and more of what the source has to
send comes along as well.
"""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count

import psycopg

from sync_pipeline import isolation, parking
from sync_pipeline.applier import Applier
from sync_pipeline.database import error_class
from sync_pipeline.records import ForeignKey
from sync_pipeline.snapshot import Part, ReadFailed, Snapshot

PATIENT_LEVELS = 8
FIRST_REACH = 1_000


@dataclass
class Companions:
    """Stages companions of a batch. Their numbers follow `last_number`, the greatest of the batch's own records.

    `last_id` is the greatest id of its events, `sent` are the tables that the source sends.
    """

    applier: Applier
    snapshot: Snapshot
    schema: str
    last_number: int
    last_id: int
    sent: frozenset[str]
    stack: ExitStack
    # Of all but parents: if one of them is in a conflict, its table's policy decides.
    further_numbers: set[int] = field(default_factory=set, init=False)
    # Those, by table and record_id, whose rows cannot be read on the source.
    unreadable: set[tuple[str, str]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._next_number = self.last_number + 1
        # Up to which event and which failure of a table has been reached for more to bring along.
        self._reached: dict[str, tuple[int, str]] = {}
        # The values of parents that were asked for: one that did not help does not when it comes again.
        self._asked: set[tuple[ForeignKey, tuple[str, ...]]] = set()

    def bring_parents(self) -> bool:
        """Stage parents that staged rows refer to and the target lacks; true if any came."""
        return _bring(self._bring_level_of_parents)

    def bring_partners(self) -> bool:
        """Stage clean records in the way of a unique value that are about to change as well; true if any came."""
        return _bring(self._bring_level_of_partners)

    def bring_children(self) -> bool:
        """Stage clean children of records to be deleted that have changed on the source as well; true if any came."""
        return _bring(self._bring_level_of_children)

    def bring_successors(self) -> None:
        """Stage records that take the place of rows to be deleted: they have a value of theirs that rows refer to."""
        for table, index in list(parking.referred_indexes(self.applier)):
            statements = self.applier.statements(table)
            fields = {column.name: field for field, column in statements.relation.columns.items()}
            columns = index.plain or []
            if not fields.keys() >= set(columns):
                continue
            values = self.applier.connection.execute(statements.values_of_gone(columns)).fetchall()
            first = self._next_number
            wanted = [fields[column] for column in columns]
            if values and self._stage(self.snapshot.rows_of(table, wanted, values, first)):
                self.further_numbers.update(range(first, self._next_number))
                self.applier.connection.execute(statements.unstage_repeated, {"first": first})

    def changed(self, table: str, record_ids: list[str]) -> Collection[str]:
        """Return those of some records that have an event or a failure on the source."""
        return self.snapshot.changes(Part(table), record_ids) if record_ids else ()

    def _bring_level_of_parents(self, reach: int) -> bool:
        applier = self.applier
        for table in list(applier.staged):
            statements = applier.statements(table)
            for key in applier.catalog.relation(applier.node, table).foreign_keys:
                if key.parent not in self.sent or not key.is_carried:
                    continue
                missing = applier.connection.execute(
                    statements.missing_parents(
                        applier.statements(key.parent),
                        key,
                        parent_is_staged=key.parent in applier.staged,
                    )
                ).fetchall()
                values = [value for value in missing if (key, value) not in self._asked]
                self._asked.update((key, value) for value in values)
                if values and self._stage(
                    self.snapshot.rows_of(key.parent, key.parent_fields, values, self._next_number)
                ):
                    self._stage_further(key.parent, reach)
                    return True
        return False

    def _bring_level_of_partners(self, reach: int) -> bool:
        first = self._next_number
        came = False
        for table in list(self.applier.staged):
            ids = parking.outsiders(self.applier, table, self.schema)
            if self._stage_changed(table, ids):
                came = True
                self._stage_further(table, reach)
        self.further_numbers.update(range(first, self._next_number))
        return came

    def _bring_level_of_children(self, reach: int) -> bool:
        applier = self.applier
        first = self._next_number
        came = False
        for child in applier.catalog.tables:
            for key in applier.catalog.relation(applier.node, child).foreign_keys:
                if key.parent not in applier.staged:
                    continue
                rows = applier.connection.execute(
                    applier.statements(key.parent).children_left(
                        applier.statements(child),
                        key,
                        self.schema,
                        child_is_staged=child in applier.staged,
                    )
                )
                if self._stage_changed(child, [record_id for (record_id,) in rows]):
                    came = True
                    self._stage_further(child, reach)
        self.further_numbers.update(range(first, self._next_number))
        return came

    def _stage_changed(self, table: str, record_ids: list[str]) -> bool:
        """Stage records, gone or not, that have an event or a failure on the source: others are no news."""
        changed = self.changed(table, record_ids)
        if not changed:
            return False
        part = Part(table, retried=tuple(changed))
        try:
            self.snapshot.read_rows(part, self._next_number)
        except ReadFailed:
            # That is told in the batch of its own record.
            if len(record_ids) == 1:
                self.unreadable.add((table, record_ids[0]))
                return False
            middle = len(record_ids) // 2
            came = self._stage_changed(table, record_ids[:middle])
            return self._stage_changed(table, record_ids[middle:]) or came
        return self._stage(part)

    def _stage_further(self, table: str, reach: int) -> None:
        """Stage more of what the source has to send of a table, but for what is staged already or dirty."""
        if not reach:
            return
        last_id, last_record = self._reached.get(table, (self.last_id, ""))
        part = self.snapshot.further(table, last_id, last_record, reach)
        if part is None:
            return
        if part.retried:
            last_record = part.retried[-1]
        else:
            last_id = part.last_id
        self._reached[table] = last_id, last_record
        first = self._next_number
        try:
            self.snapshot.read_rows(part, first)
        except ReadFailed:
            return
        if self._stage(part):
            self.further_numbers.update(range(first, self._next_number))
            statements = self.applier.statements(table)
            for statement in (statements.unstage_repeated, statements.unstage_dirty(self.schema)):
                self.applier.connection.execute(statement, {"first": first})

    def _stage(self, part: Part) -> bool:
        """Stage a part; true if a record of it can be read here."""
        self.stack.callback(part.close)
        if part.count == 0:
            return False
        try:
            with self.applier.connection.transaction():
                self.applier.stage(part)
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
            # A value of them cannot be read here: that is told in the batch of its own record.
            return False
        left_out = isolation.leave_out_unreadable(self.applier, self.schema, part)
        self._next_number = part.last_number + 1
        return len(left_out) < part.count


def _bring(level: Callable[[int], bool]) -> bool:
    """Bring level after level until nothing comes, and reach further and further; true if anything came."""
    for number in count():
        reach = FIRST_REACH << min(number - PATIENT_LEVELS, 20) if number >= PATIENT_LEVELS else 0
        if not level(reach):
            return number > 0
    raise AssertionError("there is no last number")
