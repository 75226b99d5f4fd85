"""The source's side of a pass: one snapshot, the backlog in it, the rows of a batch, and the acknowledgement."""

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import IO, Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from sync_pipeline import queries
from sync_pipeline.config import RetryConfig
from sync_pipeline.database import Connection, error_class, query, scalar
from sync_pipeline.records import Failure, Moment, Relation, TableBacklog

ROWS_IN_MEMORY_BYTES = 8 * 1024 * 1024
EMPTY = "{}"
UPSERTS = ("insert", "update")
DELETES = ("delete",)
ALL = UPSERTS + DELETES


@dataclass(slots=True)
class Part:
    """What a batch holds of one table: the ids of its events and, once read, the rows as COPY text.

    `first_number` and `last_number` are the numbers that the rows carry in their first column; they are unique
    within the batch. `retried` lists records taken from the failures instead of events.
    """

    table: str
    event_types: tuple[str, ...]
    ids: str = EMPTY
    events: int = 0
    inserts: int = 0
    after_id: int = 0
    last_id: int = 0
    retried: tuple[str, ...] = ()
    rows: IO[bytes] | None = None
    first_number: int = 0
    last_number: int = -1

    @property
    def size(self) -> int:
        """How many records the part holds at most."""
        return self.events + len(self.retried)

    @property
    def count(self) -> int:
        """How many rows were read."""
        return self.last_number - self.first_number + 1

    def discard(self) -> None:
        """Free the rows."""
        if self.rows is not None:
            self.rows.close()
            self.rows = None


@dataclass(frozen=True, slots=True)
class Change:
    """What the source knows of a record of a batch: when it last changed, whether it is new, its events' ids."""

    record_id: str
    changed_at: datetime
    inserted: bool
    ids: str | None


class ReadFailed(Exception):
    """The rows of a batch could not be read because of a value: most likely an event whose key is no key."""

    def __init__(self, table: str) -> None:
        super().__init__(f"cannot read the records of {table}")
        self.table = table


@dataclass(slots=True)
class Outcome:
    """What became of a part on the target: what the acknowledgement needs."""

    part: Part
    failures: list[Failure] = field(default_factory=list)
    not_applied: list[str] = field(default_factory=list)
    postponed: list[str] = field(default_factory=list)


class Snapshot:
    """Everything that a pass reads from the source, as of one moment. Safe to use from two threads."""

    def __init__(
        self,
        connection: Connection,
        schema: str,
        relations: Mapping[str, Relation],
        moment: Moment,
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._relations = relations
        self._lock = threading.Lock()
        self.moment = moment
        self.read_at = moment.read_at

    def backlog(self, floor: int, size: int) -> dict[str, TableBacklog]:
        """Return what waits above `floor`, by table name; names that nobody configured included.

        Ids come with it when all of it fits a batch of `size`.
        """
        rows = self._backlog("read_small_backlog", floor=floor, limit=size + 1)
        if sum(row.events for row in rows) > size:
            rows = self._backlog("read_backlog", floor=floor)
        return {row.table_name: row for row in rows}

    def _backlog(self, name: str, **parameters: int) -> list[TableBacklog]:
        with self._lock, self._connection.cursor(row_factory=class_row(TableBacklog)) as cursor:
            return cursor.execute(self._query(name), parameters).fetchall()

    def next_part(
        self, table: str, event_types: tuple[str, ...], after_id: int, last_id: int, size: int
    ) -> Part | None:
        """Return the next events of a table after `after_id`, at most `size`; None when there are no more."""
        with self._lock:
            row = self._connection.execute(
                self._query("read_batch_bounds"),
                {
                    "table_name": table,
                    "event_types": list(event_types),
                    "after_id": after_id,
                    "last_id": last_id,
                    "batch_size": size,
                },
            ).fetchone()
        if row is None or row[0] is None:
            return None
        ids, greatest, events, inserts = row
        return Part(table, event_types, ids, events, inserts, after_id, greatest)

    def due_failures(self, table: str, size: int, event_types: tuple[str, ...]) -> Iterator[Part]:
        """Yield the records of a table whose next attempt is due, in parts of at most `size`."""
        with self._lock:
            rows = self._connection.execute(
                self._query("read_due_failures"), {"table_name": table}
            ).fetchall()
        for start in range(0, len(rows), size):
            retried = tuple(row[0] for row in rows[start : start + size])
            yield Part(table, event_types, retried=retried)

    def read_rows(self, part: Part, first_number: int) -> None:
        """Read the current rows of a part's records into `part.rows`, numbered from `first_number`, in key order."""
        relation = self._relations[part.table]
        rows = tempfile.SpooledTemporaryFile(max_size=ROWS_IN_MEMORY_BYTES)  # noqa: SIM115 - the part owns it
        number = first_number
        try:
            with self._lock:
                statement = self._rows_query(relation, part, first_number)
                for chunk, count in copy_out(self._connection, statement):
                    rows.write(chunk)
                    number += count
        except psycopg.Error as error:
            rows.close()
            if error_class(error) == "data":
                raise ReadFailed(part.table) from error
            raise
        rows.seek(0)
        part.rows = rows
        part.first_number = first_number
        part.last_number = number - 1

    def rows_of(
        self,
        table: str,
        fields: Sequence[str],
        values: Sequence[tuple[str, ...]],
        first_number: int,
    ) -> Part:
        """Read the rows whose `fields` have one of these values (as text): records that a batch turns out to need."""
        relation = self._relations[table]
        part = Part(table, ())
        columns = [relation.columns[name] for name in fields]
        wanted = sql.SQL(", ").join(
            sql.SQL("({})").format(
                sql.SQL(", ").join(
                    sql.SQL("{}::" + column.type_name).format(value)
                    for column, value in zip(columns, row, strict=True)
                )
            )
            for row in values
        )
        statement = sql.SQL(
            "copy (select {first} + row_number() over () - 1, true, {columns} from {relation} as t "
            "where ({names}) in ({wanted}) and ({condition})) to stdout"
        ).format(
            first=first_number,
            columns=_columns(relation, "t"),
            relation=sql.Identifier(relation.schema, relation.name),
            names=sql.SQL(", ").join(
                sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in columns
            ),
            wanted=wanted,
            condition=sql.SQL(relation.where or "true"),
        )
        rows = tempfile.SpooledTemporaryFile(max_size=ROWS_IN_MEMORY_BYTES)  # noqa: SIM115 - the part owns it
        number = first_number
        with self._lock:
            for chunk, count in copy_out(self._connection, statement):
                rows.write(chunk)
                number += count
        rows.seek(0)
        part.rows, part.first_number, part.last_number = rows, first_number, number - 1
        return part

    def changes(self, part: Part, record_ids: list[str]) -> dict[str, Change]:
        """Return what the source knows of some records of a part."""
        with self._lock, self._connection.cursor(row_factory=class_row(Change)) as cursor:
            rows = cursor.execute(
                self._query("read_changes"),
                {
                    "table_name": part.table,
                    "event_types": list(part.event_types),
                    "first_id": part.after_id + 1,
                    "last_id": part.last_id,
                    "record_ids": record_ids,
                },
            )
            return {row.record_id: row for row in rows}

    def _query(self, name: str) -> Any:
        return query(queries.get(name, self._schema))

    def _rows_query(self, relation: Relation, part: Part, first_number: int) -> sql.Composed:
        key_columns = [relation.columns[name] for name in relation.key]
        keys = [sql.Identifier(f"key {index}") for index in range(len(key_columns))]
        if len(keys) == 1:
            casts = [sql.SQL("record_id::" + key_columns[0].type_name)]
        else:
            casts = [
                sql.SQL(f"(record_id::jsonb ->> {index})::{column.type_name}")
                for index, column in enumerate(key_columns)
            ]
        if part.retried:
            changed = sql.SQL("unnest({}::text[]) as record_id").format(list(part.retried))
        else:
            changed = sql.SQL(
                "{} where id > {} and id <= {} and table_name = {} and event_type = any ({})"
            ).format(
                sql.Identifier(self._schema, "sync_events"),
                part.after_id,
                part.last_id,
                part.table,
                list(part.event_types),
            )
        return sql.SQL(
            """copy (
    select {first} + row_number() over (order by {keys}) - 1, t.tableoid is not null, {columns}
    from (select distinct {casts} from {changed}) as changed
    left join {relation} as t on {same_key}
    where t.tableoid is null or ({condition})
) to stdout"""
        ).format(
            first=first_number,
            keys=sql.SQL(", ").join(sql.SQL("changed.{}").format(key) for key in keys),
            columns=_columns(relation, "t", keys),
            casts=sql.SQL(", ").join(
                sql.SQL("{} as {}").format(cast, key) for cast, key in zip(casts, keys, strict=True)
            ),
            changed=changed,
            relation=sql.Identifier(relation.schema, relation.name),
            same_key=sql.SQL(" and ").join(
                sql.SQL("t.{} = changed.{}").format(sql.Identifier(column.name), key)
                for column, key in zip(key_columns, keys, strict=True)
            ),
            condition=sql.SQL(relation.where or "true"),
        )


def poll(connection: Connection, schema: str, floor: int) -> tuple[bool, int]:
    """Return whether events wait or a failure is due, and the oldest transaction that runs: one short query."""
    row = connection.execute(query(queries.get("read_poll", schema)), {"floor": floor}).fetchone()
    if row is None:
        raise AssertionError("a query without a table returned no row")
    return bool(row[0]), int(row[1])


@contextmanager
def snapshot(
    connection: Connection, schema: str, relations: Mapping[str, Relation]
) -> Iterator[Snapshot]:
    """Hold one REPEATABLE READ READ ONLY transaction on the source for a `with` block."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    with connection.transaction():
        with connection.cursor(row_factory=class_row(Moment)) as cursor:
            moment = cursor.execute(query(queries.get("read_moment", schema))).fetchone()
        if moment is None:
            raise AssertionError("a query without a table returned no row")
        yield Snapshot(connection, schema, relations, moment)


def acknowledge(
    connection: Connection,
    schema: str,
    outcomes: Sequence[Outcome],
    ids: str,
    retry: RetryConfig,
) -> None:
    """Delete exactly the events that were applied, in one transaction with what happened to the others."""

    def run(name: str, **parameters: Any) -> None:
        connection.execute(query(queries.get(name, schema)), parameters)

    with connection.transaction():
        has_failures = scalar(connection, query(queries.get("has_failures", schema)))
        for outcome in outcomes:
            part = outcome.part
            failing = outcome.failures
            if has_failures:
                run(
                    "clear_failures",
                    table_name=part.table,
                    ids=part.ids,
                    retried=list(part.retried),
                    still_failing=[*outcome.not_applied, *(f.record_id for f in failing)],
                )
            if failing:
                run(
                    "record_failures",
                    table_name=part.table,
                    ids=part.ids,
                    record_ids=[failure.record_id for failure in failing],
                    error_classes=[failure.error_class for failure in failing],
                    errors=[failure.error for failure in failing],
                    held=[failure.held for failure in failing],
                    max_attempts=retry.max_attempts,
                    base_seconds=retry.base_seconds,
                    max_seconds=retry.max_seconds,
                )
            for postponed in outcome.postponed:
                run("convert_to_delete", ids=postponed)
        if ids != EMPTY:
            run("acknowledge", ids=ids)
        run("note_pass")


def set_aside_unknown(connection: Connection, schema: str, table: str, reason: str) -> int:
    """Move the events and due failures of a table that nobody syncs from here out of the way; return how many."""
    return _set_aside(connection, schema, table, None, "42P01", reason)


def set_aside_invalid_keys(
    connection: Connection, schema: str, relation: Relation, last_id: int
) -> int:
    """Move events whose `record_id` is no key of their table out of the way; return how many."""
    types = [relation.columns[name].type_name for name in relation.key]
    rows = connection.execute(
        query(queries.get("read_invalid_keys", schema)),
        {"table_name": relation.table, "types": types, "last_id": last_id},
    ).fetchall()
    if not rows:
        return 0
    expected = types[0] if len(types) == 1 else f"a JSON array of {', '.join(types)}"
    return _set_aside(
        connection,
        schema,
        relation.table,
        [row[0] for row in rows],
        "22P02",
        f"the record_id is no key of {relation.table}: expected {expected}",
    )


def _set_aside(
    connection: Connection,
    schema: str,
    table: str,
    record_ids: list[str] | None,
    error_class: str,
    error: str,
) -> int:
    parameters = {
        "table_name": table,
        "record_ids": record_ids,
        "error_class": error_class,
        "error": error,
    }
    with connection.transaction():
        moved = connection.execute(query(queries.get("set_aside", schema)), parameters).rowcount
        buried = connection.execute(
            query(queries.get("bury_invalid_failures", schema)), parameters
        ).rowcount
    return moved + buried


def copy_out(connection: Connection, statement: sql.Composed) -> Iterator[tuple[bytes, int]]:
    """Yield the rows of a COPY … TO STDOUT in chunks: (text of some rows, how many)."""
    rows: list[bytes] = []
    size = 0
    with connection.cursor().copy(statement) as copy:
        while data := copy.read():
            rows.append(bytes(data))
            size += len(data)
            if size > 65536:
                yield b"".join(rows), len(rows)
                rows, size = [], 0
    if rows:
        yield b"".join(rows), len(rows)


def _columns(relation: Relation, alias: str, keys: Sequence[sql.Identifier] = ()) -> sql.Composed:
    """Compose the columns of a row in field order; keys fall back to the event's when the row is gone."""
    columns = []
    for index, column in enumerate(relation.columns.values()):
        value = sql.SQL(alias + ".{}").format(sql.Identifier(column.name))
        if index < len(keys):
            value = sql.SQL("coalesce({}, changed.{})").format(value, keys[index])
        columns.append(value)
    return sql.SQL(", ").join(columns)
