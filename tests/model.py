"""What the rules say must happen: an executable specification of capture, passes and conflicts, without a database.

It knows rows, events and a clock that counts, and covers tables without foreign keys, whose unique values can be given
away on one node only, the one that wins their conflicts: so no two records want the same. A test lets the model and
the pipeline do the same work and compares what comes out, the conflict log included.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

Record = tuple[str, int]
Row = tuple[object, ...]


@dataclass(frozen=True)
class Event:
    """A change of a record, made when the clock said `time`."""

    number: int
    record: Record
    kind: str
    time: int


@dataclass(frozen=True)
class LoggedConflict:
    """What the conflict log must say of a decision."""

    record: Record
    kind: str
    winner: str
    local_row: Row | None
    remote_row: Row | None


@dataclass
class Side:
    """One node: its rows, the events that wait there, its ledger of the other node's batches, its conflict log."""

    rows: dict[Record, Row] = field(default_factory=dict)
    events: dict[int, Event] = field(default_factory=dict)
    ledger: list[set[int]] = field(default_factory=list)
    conflicts: list[LoggedConflict] = field(default_factory=list)


@dataclass
class Work:
    """A transaction of an application that has not ended."""

    rows: dict[Record, Row | None] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


class Model:
    """Two nodes that are kept equal; the first listed wins ties. `policies` gives a table's named winner."""

    def __init__(self, first: str, second: str, policies: dict[str, str]) -> None:
        self.sides = {first: Side(), second: Side()}
        self._other = {first: second, second: first}
        self._policies = policies
        self._clock = 0
        self._snapshot = Side()

    # --- applications ---

    def write(self, node: str, work: Work, record: Record, row: Row | None) -> None:
        """Make a record what `row` says, None for gone, in a transaction; what changes nothing marks nothing."""
        before = self.seen(node, work).get(record)
        if before == row:
            return
        kind = "delete" if row is None else "insert" if before is None else "update"
        work.rows[record] = row
        work.events.append(self._event(record, kind))

    def mark(self, node: str, record: Record) -> None:
        """Replay a record by hand."""
        event = self._event(record, "update")
        self.sides[node].events[event.number] = event

    def seen(self, node: str, work: Work) -> dict[Record, Row]:
        """The rows as the transaction sees them."""
        rows: dict[Record, Row | None] = {**self.sides[node].rows, **work.rows}
        return {record: row for record, row in rows.items() if row is not None}

    def commit(self, node: str, work: Work) -> None:
        """Commit an application's transaction."""
        side = self.sides[node]
        side.rows = self.seen(node, work)
        side.events |= {event.number: event for event in work.events}

    # --- the consumer ---

    def fetch(self, source: str) -> None:
        """Recover both directions, then take the snapshot of one."""
        for name, side in self.sides.items():
            for applied in self.sides[self._other[name]].ledger:
                side.events = {n: event for n, event in side.events.items() if n not in applied}
        for side in self.sides.values():
            side.ledger = []
        self._snapshot = deepcopy(self.sides[source])

    def apply(self, source: str) -> None:
        """Apply what the snapshot holds to the other node and commit it there with its ledger row."""
        name = self._other[source]
        target, snapshot = self.sides[name], self._snapshot
        for record in dict.fromkeys(event.record for event in snapshot.events.values()):
            theirs = [event for event in snapshot.events.values() if event.record == record]
            own = [event for event in target.events.values() if event.record == record]
            incoming, present = snapshot.rows.get(record), target.rows.get(record)
            if own and incoming != present:
                winner = self._winner(source, name, record, theirs, own)
                kind = _kind(incoming, present, theirs, own)
                target.conflicts.append(LoggedConflict(record, kind, winner, present, incoming))
                if winner == name:
                    continue
            for event in own:
                del target.events[event.number]
            if incoming is None:
                target.rows.pop(record, None)
            else:
                target.rows[record] = incoming
        if snapshot.events:
            target.ledger.append(set(snapshot.events))

    def acknowledge(self, source: str, *, clear_ledger: bool = True) -> None:
        """Delete on the source what the target has committed."""
        target = self.sides[self._other[source]]
        for number in self._snapshot.events:
            self.sides[source].events.pop(number, None)
        if clear_ledger:
            target.ledger = []

    def _winner(
        self, source: str, target: str, record: Record, theirs: list[Event], own: list[Event]
    ) -> str:
        named = self._policies.get(record[0])
        if named is not None:
            return named
        latest: Callable[[list[Event]], int] = lambda events: max(event.time for event in events)  # noqa: E731
        return source if latest(theirs) > latest(own) else target

    def _event(self, record: Record, kind: str) -> Event:
        self._clock += 1
        return Event(self._clock, record, kind, self._clock)


def _kind(incoming: Row | None, present: Row | None, theirs: list[Event], own: list[Event]) -> str:
    if (incoming is None) != (present is None):
        return "update_delete"
    inserted = [any(event.kind == "insert" for event in events) for events in (theirs, own)]
    return "insert_insert" if all(inserted) else "update_update"
