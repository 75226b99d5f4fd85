"""Unique values that two records have, one on each side: only an application can settle that.

Each side refuses the other's record until one of the two changes. Everything else must get through by itself, however
the values moved: `settle` looks whether each record that waits has such a reason.
"""

from dataclasses import dataclass

import psycopg

from tests.clients import PARENTS, Client, Record
from tests.helpers import Node, Pair

UNIQUE_VIOLATION = psycopg.errors.UniqueViolation.sqlstate
FOREIGN_KEY_VIOLATION = psycopg.errors.ForeignKeyViolation.sqlstate

WAITING = "select table_name, record_id::int, error_class from sync.sync_failures"
ROWS = """
select 'accounts', id, number, null from accounts
union all select 'users', id, email, account_id from users
union all select 'orders', id, null, user_id from orders
"""


@dataclass
class _Side:
    """Which records wait on a node and why; the unique value and the parent of every record there."""

    waiting: dict[Record, str]
    values: dict[Record, str | None]
    parents: dict[Record, int | None]

    @classmethod
    def of(cls, node: Node) -> "_Side":
        rows = node.rows(ROWS)
        return cls(
            {(table, key): error for table, key, error in node.rows(WAITING)},
            {(table, key): value for table, key, value, _ in rows},
            {(table, key): parent for table, key, _, parent in rows},
        )

    def holder(self, table: str, value: str | None) -> Record | None:
        """The record that has a unique value."""
        return next((r for r, v in self.values.items() if v == value and r[0] == table), None)


def settle(pair: Pair, clients: dict[str, Client]) -> int:
    """Give each record whose value is disputed another one, where it waits; return how many records wait.

    Raises an AssertionError for a record that waits without a reason.
    """
    sides = {node.name: _Side.of(node) for node in pair.nodes}
    names = list(sides)
    for here, there in (names, names[::-1]):
        for record, error in sides[here].waiting.items():
            reason = f"{record} waits on {here} with {error}: {sides}"
            assert _must_wait(record, sides[here], sides[there]), reason
            if error == UNIQUE_VIOLATION:
                clients[here].make_unique(*record)
    return sum(len(side.waiting) for side in sides.values())


def _must_wait(record: Record, here: _Side, there: _Side) -> bool:
    """Whether the rules keep a record from the other side, all else being sent."""
    table, _ = record
    passed = set()
    while record not in passed:
        passed.add(record)
        if here.waiting[record] == FOREIGN_KEY_VIOLATION:
            parent = here.parents.get(record)
            return parent is not None and (PARENTS[table][1], parent) in here.waiting
        if here.waiting[record] != UNIQUE_VIOLATION:
            return False
        holder = there.holder(table, here.values.get(record))
        if holder in there.waiting:
            # It was changed there as well.
            return True
        if holder is None or holder not in here.waiting:
            return False
        # The value is there only until the holder's own new value arrives, so ask what keeps that.
        record = holder
    # A circle of values that moved on one side alone.
    return False
