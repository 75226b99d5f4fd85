"""Applications whose every write can be traced: each appends a token of its own to the history of the row it writes.

So a row tells which writes it was built on, and of each committed write it can be said at the end where it is: in a
row, in a row that a later delete took away knowingly, or in a row that the conflict log kept. Nowhere means lost.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

import psycopg

from tests.helpers import Node, Pair, Row

TRACED = """
alter table accounts add column history text[] not null default '{}';
alter table users add column history text[] not null default '{}';
alter table orders add column history text[] not null default '{}';
alter table accounts add column number text not null unique deferrable default gen_random_uuid();
"""
TABLES = ("accounts", "users", "orders")
PARENTS = {"users": ("account_id", "accounts"), "orders": ("user_id", "users")}
# What a row cannot do without; None: a text that no other row has.
REQUIRED: dict[str, tuple[str, object]] = {
    "accounts": ("name", None),
    "users": ("email", None),
    "orders": ("amount", 1),
}
PAYLOAD = {"accounts": "name", "users": "name", "orders": "note"}
# What no two records may have: checked at the end of a statement, and row by row.
UNIQUE = {"accounts": "number", "users": "email"}

Record = tuple[str, int]

# What an application can meet and answers by rolling back.
_REFUSALS = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.ForeignKeyViolation,
    psycopg.errors.UniqueViolation,
    psycopg.errors.DeadlockDetected,
)


@dataclass
class Effects:
    """The tokens that a transaction wrote, those that it took away with their records, or brought with a new key."""

    written: set[str] = field(default_factory=set)
    removed: dict[Record, set[str]] = field(default_factory=dict)
    brought: dict[Record, set[str]] = field(default_factory=dict)

    def add(self, other: "Effects") -> None:
        """Add what happened after."""
        self.written |= other.written
        for record, tokens in other.removed.items():
            self.removed.setdefault(record, set()).update(tokens)
        for record, tokens in other.brought.items():
            self.brought.setdefault(record, set()).update(tokens)


class Client:
    """One session of an application. Opens a transaction with the first write after `begin`, else commits each."""

    _numbers = count(1)
    # Which record each token was written to.
    records: ClassVar[dict[str, Record]] = {}

    def __init__(
        self, node: Node, done: Effects, lock_timeout_seconds: float, unsure: Effects | None = None
    ) -> None:
        """`unsure` gets what was lost with a connection: nobody can know whether it was committed."""
        self.node = node
        self._done = done
        self._unsure = Effects() if unsure is None else unsure
        self._connection = node.connect()
        self._connection.execute(f"set lock_timeout = '{lock_timeout_seconds}s'".encode())
        self._open: Effects | None = None

    @property
    def holds(self) -> bool:
        """Whether a transaction is open."""
        return self._open is not None

    def note_in(self, done: Effects) -> None:
        """Note from now on what was committed here in `done`."""
        self._done = done

    def begin(self) -> None:
        """Keep what follows in one transaction until `end`."""
        if self._open is None:
            self._connection.execute("begin")
            self._open = Effects()

    def end(self, *, commits: bool) -> None:
        """Commit or roll back the open transaction, if there is one."""
        if self._open is not None:
            effects, self._open = self._open, None
            with self._doubt(effects):
                self._connection.execute("commit" if commits else "rollback")
            if commits:
                self._done.add(effects)

    def close(self) -> None:
        """End the session; what is open rolls back."""
        self._connection.close()

    def insert(self, table: str, key: int, parent: int) -> None:
        """Insert a record below a parent."""

        def insert(effects: Effects) -> None:
            token = self._token()
            self.records[token] = table, key
            values: dict[str, object] = {"id": key, "history": [token]}
            if table in PARENTS:
                values[PARENTS[table][0]] = parent
            column, value = REQUIRED[table]
            values[column] = token if value is None else value
            names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
            self._execute(f"insert into {table} ({names}) values ({marks})", *values.values())
            effects.written.add(token)

        self._run(insert)

    def update(self, table: str, key: int) -> None:
        """Write the payload of a record."""

        def update(effects: Effects) -> None:
            self._write(effects, table, key, PAYLOAD[table], "written")

        self._run(update)

    def move(self, table: str, key: int, parent: int) -> None:
        """Give a record another parent."""

        def move(effects: Effects) -> None:
            self._write(effects, table, key, PARENTS[table][0], parent)

        self._run(move)

    def rename(self, table: str, key: int, new: int) -> None:
        """Change the key of a record."""

        def rename(effects: Effects) -> None:
            rows = self._execute(
                f"select history from {table} where id = %s for update", key
            ).fetchall()
            if not rows or key == new:
                return
            self._write(effects, table, key, "id", new)
            effects.removed.setdefault((table, key), set()).update(rows[0][0])
            effects.brought.setdefault((table, new), set()).update(rows[0][0])

        self._run(rename)

    def exchange(self, table: str, keys: list[int]) -> None:
        """Pass the unique values of some records on in a circle: in one statement, or by way of a free value."""

        def exchange(effects: Effects) -> None:
            column = UNIQUE[table]
            found: dict[int, str] = dict(
                self._execute(
                    f"select id, {column} from {table} where id = any (%s) order by id for update",
                    keys,
                ).fetchall()
            )
            circle = [key for key in keys if key in found]
            values = [found[key] for key in [*circle[1:], *circle[:1]]]
            if len(circle) < 2:
                return
            if table == "accounts":
                tokens = [self._token() for _ in circle]
                self._execute(
                    "update accounts set number = given.number, history = history || given.token "
                    "from unnest(%s::int[], %s::text[], %s::text[]) as given (id, number, token) "
                    "where accounts.id = given.id",
                    circle,
                    values,
                    tokens,
                )
                effects.written.update(tokens)
                self.records.update(zip(tokens, ((table, key) for key in circle), strict=True))
                return
            self._write(effects, table, circle[0], column, self._token())
            for key, value in reversed(list(zip(circle, values, strict=True))):
                self._write(effects, table, key, column, value)

        self._run(exchange)

    def make_unique(self, table: str, key: int) -> None:
        """Give a record a unique value that nobody else ever had."""

        def make_unique(effects: Effects) -> None:
            self._write(effects, table, key, UNIQUE[table], self._token())

        self._run(make_unique)

    def delete(self, table: str, key: int) -> None:
        """Delete a record with everything below it."""

        def delete(effects: Effects) -> None:
            below = list(self._below(table, "id", [key]))
            if not below:
                # Somebody may insert it now, and then it would be deleted unseen.
                return
            for record, history in below:
                effects.removed.setdefault(record, set()).update(history)
            self._execute(f"delete from {table} where id = %s", key)

        self._run(delete)

    def truncate_orders(self) -> None:
        """Empty the table that nothing refers to."""

        def truncate(effects: Effects) -> None:
            self._execute("lock table orders")
            for key, history in self._execute("select id, history from orders").fetchall():
                effects.removed.setdefault(("orders", key), set()).update(history)
            self._execute("truncate orders")

        self._run(truncate)

    def _run(self, work: Callable[[Effects], None]) -> None:
        effects = Effects()
        try:
            if self._open is not None:
                work(effects)
                self._open.add(effects)
            else:
                with self._doubt(effects), self._connection.transaction():
                    work(effects)
                self._done.add(effects)
        except _REFUSALS:
            self.end(commits=False)

    @contextmanager
    def _doubt(self, effects: Effects) -> Iterator[None]:
        try:
            yield
        except psycopg.Error:
            if self._connection.closed:
                self._unsure.add(effects)
            raise

    def _below(
        self, table: str, column: str, values: list[int]
    ) -> Iterator[tuple[Record, list[str]]]:
        # By the reference to the parent, which is locked: who waits here for a child may find it with another key.
        rows = self._execute(
            f"select id, history from {table} where {column} = any (%s) for update", values
        ).fetchall()
        yield from (((table, key), history) for key, history in rows)
        for child, (reference, parent) in PARENTS.items():
            if parent == table and rows:
                yield from self._below(child, reference, [key for key, _ in rows])

    def _write(self, effects: Effects, table: str, key: int, column: str, value: object) -> None:
        token = self._token()
        done = self._execute(
            f"update {table} set {column} = %s, history = history || %s where id = %s",
            value,
            [token],
            key,
        )
        if done.rowcount:
            effects.written.add(token)
            self.records[token] = table, key

    def _token(self) -> str:
        return f"{self.node.name}-{next(self._numbers)}"

    def _execute(self, statement: str, *args: object) -> psycopg.Cursor[Row]:
        return self._connection.execute(statement.encode(), args or None)


def _told(pair: Pair, tokens: set[str]) -> str:
    """What both nodes know of the records that were written."""
    lines = []
    for token in sorted(tokens):
        table, key = Client.records[token]
        lines.append(f"{token} to {table} {key}")
        for node in pair.nodes:
            lines += [
                f"{node.name}: {row}"
                for row in [
                    *node.rows(f"select * from {table} where id = %s", key),
                    *node.rows(
                        "select * from sync.sync_conflicts "
                        "where table_name = %s and record_id = %s order by id",
                        table,
                        str(key),
                    ),
                ]
            ]
    return "\n".join(lines)


def assert_nothing_is_lost(pair: Pair, done: Effects, unsure: Effects | None = None) -> None:
    """Every committed write is in a row, was deleted knowingly, or is in the conflict log; nothing came back unsaid."""
    rows = {
        (table, key): history
        for table in TABLES
        for key, history in pair.crm.rows(f"select id, history from {table}")
    }
    log = [
        (row, node.name)
        for node in pair.nodes
        for row in node.rows(
            "select table_name, record_id, winner, (local_row ->> 'history')::text[], "
            "(remote_row ->> 'history')::text[] from sync.sync_conflicts"
        )
    ]
    present = {token for history in rows.values() for token in history}
    logged = {
        token
        for (*_, winner, local, remote), node in log
        # The row that lost; what won is in a row, or was changed again since.
        for token in ((remote if winner == node else local) or [])
    }
    unsure = unsure or Effects()
    removed = {
        token for one in (done, unsure) for tokens in one.removed.values() for token in tokens
    }
    lost = done.written - present - logged - removed
    assert not lost, f"lost writes: {_told(pair, lost)}"
    invented = present - done.written - unsure.written
    assert not invented, f"writes that nobody committed: {sorted(invented)}"
    explained = {(table, int(key)) for (table, key, *_), _ in log}
    for record, history in rows.items():
        assert len(history) == len(set(history)), f"{record} has a write twice: {history}"
        gone = done.removed.get(record, set()) - done.brought.get(record, set())
        back = gone.intersection(history)
        assert not back or record in explained, f"{record} came back with {sorted(back)}"
