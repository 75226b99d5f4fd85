"""The source's side of a pass, read: one snapshot, the events that batches take from it, the rows of their records."""

import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import IO, Any, LiteralString

import psycopg
from psycopg import generators, pq, sql
from psycopg.abc import PQGen
from psycopg.rows import class_row
from psycopg.waiting import Wait

from sync_pipeline import clocks, queries
from sync_pipeline.capture import has_one_text, key_names, key_values, named
from sync_pipeline.database import (
    Connection,
    Statement,
    compiled,
    error_class,
    query,
    scalar,
    server_encoding,
)
from sync_pipeline.errors import PassInterrupted, TableAltered
from sync_pipeline.records import Moment, Relation

ROWS_IN_MEMORY_BYTES = 8 * 1024 * 1024
CHUNK_BYTES = 65536
EMPTY = "{}"
LAST_ID = 2**63 - 2
# In one pass, which holds their names in memory.
MOST_RETRIES = 100_000
# What the function `has_lost_rows` raises.
ROWS_LOST = "SY001"


@dataclass(slots=True)
class Part:
    """What a batch holds of one table: which events or failures, and, once read, the rows as COPY text.

    `first_number` and `last_number` are the numbers that the rows carry in their first column; they are unique
    within the batch. `retried` lists records taken from the failures instead of events.
    """

    table: str
    events: int = 0
    inserts: int = 0
    first_id: int = 0
    last_id: int = LAST_ID
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

    def close(self) -> None:
        """Free the rows."""
        if self.rows is not None:
            self.rows.close()
            self.rows = None


@dataclass(slots=True)
class Intake:
    """What one batch takes in: the ids of its events, as ranges, and its parts, one or two per table."""

    parts: list[Part] = field(default_factory=list)
    ids: str = EMPTY
    last_id: int = 0
    oldest_at: datetime | None = None
    # How many of its events are left to wait on the source.
    left: int = 0

    @property
    def events(self) -> int:
        """How many events it consumes."""
        return sum(part.events for part in self.parts) - self.left

    def leave(self, ids: str) -> None:
        """Consume only these of the ids; the others wait."""
        self.left, self.ids = count(self.ids) - count(ids), ids

    @property
    def size(self) -> int:
        """How many records it holds at most."""
        return sum(part.size for part in self.parts)

    @property
    def last_number(self) -> int:
        """The greatest number of a row that was read so far, -1 when none was."""
        return max((part.last_number for part in self.parts), default=-1)

    def of(self, tables: Sequence[str]) -> list[Part]:
        """Return the parts of some tables, in the order of these."""
        return [part for table in tables for part in self.parts if part.table == table]

    def close(self) -> None:
        """Free the rows."""
        for part in self.parts:
            part.close()


@dataclass(frozen=True, slots=True)
class Change:
    """What the source knows of a record of a batch: when it last changed, whether it is new, its events' ids."""

    record_id: str
    changed_at: datetime
    inserted: bool
    ids: str | None


@dataclass(frozen=True, slots=True)
class _TableEvents:
    table_name: str
    events: int
    inserts: int
    first_id: int
    last_id: int
    oldest_at: datetime


class ReadFailed(Exception):
    """A part could not be read because of a value: a key that is none, a row for which its table's `where` fails."""

    def __init__(self, part: Part) -> None:
        super().__init__(f"cannot read the records of {part.table}")
        self.part = part


class Snapshot:
    """Everything that a pass reads from the source, as of one moment. Safe to use from two threads."""

    def __init__(
        self,
        connection: Connection,
        schema: str,
        relations: Mapping[str, Relation],
        moment: Moment,
        clock: clocks.Reading,
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._relations = relations
        self._lock = threading.Lock()
        self.moment = moment
        self.read_at = moment.read_at
        self.clock = clock
        # Whether bytes without an encoding are text is for the target to say, record by record.
        is_bytes = server_encoding(connection) == "SQL_ASCII"
        self._to_stdout: LiteralString = (
            "to stdout (encoding 'SQL_ASCII')" if is_bytes else "to stdout"
        )

    def intake(self, after_id: int, size: int, ignored: Sequence[str]) -> Intake | None:
        """Return the next events after an id, at most `size`, whatever their tables; None when there are no more.

        In the order of their ids, but for tables that are `ignored`. Names that nobody configured are included.
        """
        parameters = {"after_id": after_id, "ignored": list(ignored), "at_most": size}
        with self._lock:
            with self._connection.cursor(row_factory=class_row(_TableEvents)) as cursor:
                tables = cursor.execute(self._query("read_next_events"), parameters).fetchall()
            if not tables:
                return None
            first, last = min(t.first_id for t in tables), max(t.last_id for t in tables)
            if sum(t.events for t in tables) == last - first + 1:
                ids = f"{{[{first},{last + 1})}}"
            else:
                bounds = {"first_id": first, "last_id": last, "ignored": list(ignored)}
                ids = str(scalar(self._connection, self._query("read_event_ids"), bounds))
        return Intake(
            [Part(t.table_name, t.events, t.inserts, t.first_id, t.last_id) for t in tables],
            ids,
            last,
            min(t.oldest_at for t in tables),
        )

    def retries(self, size: int) -> list[Intake]:
        """Return records whose next attempt is due and that have no events, at most `size` in one intake.

        Where there are more than MOST_RETRIES, the next pass takes the others.
        """
        if not self.moment.failures_are_due:
            return []
        with self._lock:
            rows = self._connection.execute(
                self._query("read_due_failures"), {"at_most": MOST_RETRIES}
            ).fetchall()
        intakes = []
        for start in range(0, len(rows), size):
            records: dict[str, list[str]] = {}
            for table, record_id in rows[start : start + size]:
                records.setdefault(table, []).append(record_id)
            intakes.append(
                Intake([Part(t, last_id=0, retried=tuple(r)) for t, r in records.items()])
            )
        return intakes

    def further(self, table: str, after_id: int, after_record: str, at_most: int) -> Part | None:
        """Return the next events of a table, at most so many; then its next failures; None when there are no more."""
        parameters = {"table_name": table, "at_most": at_most}
        with self._lock:
            rows = self._connection.execute(
                self._query("read_further_events"), parameters | {"after_id": after_id}
            ).fetchall()
            if rows and rows[0][1]:
                return Part(table, first_id=rows[0][0], last_id=rows[0][1])
            rows = self._connection.execute(
                self._query("read_further_failures"), parameters | {"after": after_record}
            ).fetchall()
        return Part(table, retried=tuple(record_id for (record_id,) in rows)) if rows else None

    def read_rows(self, part: Part, first_number: int) -> None:
        """Read the current rows of a part's records into `part.rows`, numbered from `first_number`, in key order.

        Raises `PassInterrupted` where the snapshot no longer shows the rows of the table.
        """
        statement = _rows(
            self._relations[part.table], self._schema, self._to_stdout, of_events=not part.retried
        )
        parameters = {
            "first": first_number,
            "table_name": part.table,
            "first_id": part.first_id,
            "last_id": part.last_id,
            "record_ids": list(part.retried),
        }
        try:
            self._fill(part, statement, first_number, parameters)
        except psycopg.Error as error:
            if error.sqlstate == ROWS_LOST:
                raise PassInterrupted(
                    f"{part.table} was truncated, rewritten or replaced while it was read",
                    node=self._relations[part.table].node,
                    remedy="the next pass reads it again",
                ) from error
            if error_class(error) == "data":
                raise ReadFailed(part) from error
            raise
        except OSError as error:
            raise PassInterrupted(
                f"cannot keep the rows of {part.table} in a temporary file: {error.strerror}",
                remedy="make room where temporary files go (TMPDIR)",
            ) from error

    def let_go(self) -> None:
        """Give back the locks on the tables that were read: a schema change need not wait for the end of the pass."""
        with self._lock:
            self._connection.execute("rollback to savepoint opened")

    def rows_of(
        self,
        table: str,
        fields: Sequence[str],
        values: Sequence[tuple[str, ...]],
        first_number: int,
    ) -> Part:
        """Read the rows whose `fields` have one of these values (as text): records that a batch turns out to need.

        None of them where one cannot be read, which is told when its own batch is.
        """
        relation = self._relations[table]
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
            "where ({names}) in ({wanted}) and ({condition})) {to_stdout}"
        ).format(
            to_stdout=sql.SQL(self._to_stdout),
            first=first_number,
            columns=_columns(relation),
            relation=sql.Identifier(relation.schema, relation.name),
            names=sql.SQL(", ").join(
                sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in columns
            ),
            wanted=wanted,
            condition=sql.SQL(relation.where or "true"),
        )
        part = Part(table)
        try:
            self._fill(part, statement, first_number)
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
            return Part(table)
        return part

    def changes(self, part: Part, record_ids: list[str]) -> dict[str, Change]:
        """Return what the source knows of some records of a part."""
        with self._lock, self._connection.cursor(row_factory=class_row(Change)) as cursor:
            rows = cursor.execute(
                self._query("read_changes"),
                {
                    "table_name": part.table,
                    "first_id": part.first_id,
                    "last_id": part.last_id,
                    "record_ids": record_ids,
                },
            )
            return {row.record_id: row for row in rows.fetchall()}

    def changes_of_keys(self, parts: Sequence[Part], record_ids: list[str]) -> dict[str, Change]:
        """As `changes`, for the parts of one table; also where an event spells the key in another way.

        By hand, or because equal values of its type have several texts.
        """
        # The first part holds the table's events, if any; failures are looked at for every part.
        found = self.changes(parts[0], record_ids)
        wanted = [record_id for record_id in record_ids if record_id not in found]
        if not has_one_text(self._relations[parts[0].table]):
            wanted = record_ids
        if wanted:
            with self._lock, self._connection.cursor(row_factory=class_row(Change)) as cursor:
                found |= {
                    row.record_id: row
                    for row in cursor.execute(self._changes_by_value(parts, wanted))
                }
        return found

    def _query(self, name: str) -> Any:
        return query(queries.get(name, self._schema))

    def _fill(
        self,
        part: Part,
        statement: Statement,
        first_number: int,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        rows = tempfile.SpooledTemporaryFile(max_size=ROWS_IN_MEMORY_BYTES)  # noqa: SIM115 - the part owns it
        number = first_number
        try:
            with self._lock, self._surviving():
                for chunk, count in copy_out(self._connection, statement, parameters):
                    rows.write(chunk)
                    number += count
        except BaseException:
            rows.close()
            raise
        rows.seek(0)
        part.rows, part.first_number, part.last_number = rows, first_number, number - 1

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Let the snapshot outlive a read that fails because of a value: batches before it are still under way."""
        try:
            yield
        except psycopg.Error as error:
            if error_class(error) == "data":
                self._connection.execute("rollback to savepoint opened")
            raise

    def _changes_by_value(self, parts: Sequence[Part], record_ids: list[str]) -> sql.Composed:
        relation = self._relations[parts[0].table]
        keys = key_names(relation)

        def read(text: str) -> sql.Composed:
            return named(key_values(relation, sql.SQL(text)), keys)

        return sql.SQL(
            """
select
    given.record_id,
    max(changes.changed_at) as changed_at,
    bool_or(changes.event_type = 'insert') as inserted,
    pg_catalog.range_agg(changes.ids)::text as ids
from (select record_id, {given} from unnest({record_ids}::text[]) as asked (record_id)) as given
join (
    select {changed}, coalesce(changed_at, created_at) as changed_at, event_type,
        pg_catalog.int8range(id, id, '[]') as ids
    from {events} as event
    where id between {first_id} and {last_id} and table_name = {table}
    union all
    select {failed}, changed_at, event_type, null
    from {failures} as failure
    where table_name = {table} and record_id = any ({retried}::text[])
) as changes on {same_key}
group by given.record_id"""
        ).format(
            given=read("record_id"),
            record_ids=record_ids,
            changed=read("event.record_id"),
            events=sql.Identifier(self._schema, "sync_events"),
            first_id=parts[0].first_id,
            last_id=parts[0].last_id,
            failed=read("failure.record_id"),
            failures=sql.Identifier(self._schema, "sync_failures"),
            table=parts[0].table,
            retried=[record_id for part in parts for record_id in part.retried],
            same_key=sql.SQL(" and ").join(
                sql.SQL("given.{0} = changes.{0}").format(key) for key in keys
            ),
        )


def count(ids: str) -> int:
    """Return how many ids there are in ranges such as `{[1,5),[7,8)}`."""
    return sum(int(end) - int(start) for start, end in re.findall(r"\[(\d+),(\d+)\)", ids))


@contextmanager
def opened(
    connection: Connection, schema: str, relations: Mapping[str, Relation]
) -> Iterator[Snapshot]:
    """Hold one REPEATABLE READ READ ONLY transaction on the source for a `with` block. Raises `TableAltered`."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    with connection.transaction():
        with clocks.reading() as read, connection.cursor(row_factory=class_row(Moment)) as cursor:
            moment = cursor.execute(
                query(queries.get("read_moment", schema)),
                {"tables": [relation.oid for relation in relations.values()]},
            ).fetchone()
        if moment is None:
            raise AssertionError("a query without a table returned no row")
        require_shapes(relations.values(), moment.shapes)
        read.clock = moment.read_at
        connection.execute("savepoint opened")
        yield Snapshot(connection, schema, relations, moment, read)


def require_shapes(relations: Iterable[Relation], shapes: Sequence[str]) -> None:
    """Raise `TableAltered` where a table has another shape than when the catalogs were read."""
    for relation, shape in zip(relations, shapes, strict=True):
        if shape != relation.shape:
            raise TableAltered(relation.table, node=relation.node)


@lru_cache(maxsize=1024)
def _rows(
    relation: Relation, schema: str, to_stdout: LiteralString, *, of_events: bool
) -> LiteralString:
    """Compose the COPY of the current rows of records: those of a table's events, or given ones.

    They are looked up by their keys: a planner that knows how many events there are would rather read the whole table.
    In the order of the keys: it finds rows that lie together, and what is sorted already is sorted fast at the end.
    Keys of one column are looked up together, which costs less than a descent of the index for each.
    """
    key_columns = [relation.columns[name] for name in relation.key]
    keys = key_names(relation)
    changed = sql.SQL("unnest(%(record_ids)s::text[]) as record_id").format()
    if of_events:
        changed = sql.SQL(
            "{} where id between %(first_id)s and %(last_id)s and table_name = %(table_name)s"
        ).format(sql.Identifier(schema, "sync_events"))
    same_key = sql.SQL(" and ").join(
        sql.SQL("t.{} = changed.{}").format(sql.Identifier(column.name), key)
        for column, key in zip(key_columns, keys, strict=True)
    )
    if relation.has_lookup_key:
        # A full join finds the same, since there is no row without a key; it is never done by comparing each with each.
        joined = sql.SQL(
            "full join (select t.tableoid, t.* from {relation} as t "
            "where t.{column} = any (array(select {key} from changed)) offset 0) as t on {same_key}"
        )
    else:
        joined = sql.SQL(
            "left join lateral (select t.tableoid, t.* from {relation} as t where {same_key} offset 0) as t on true"
        )
    return compiled(
        sql.SQL(
            """copy (
    with changed as materialized (select distinct {casts} from {changed} order by {names})
    select %(first)s + row_number() over (order by {keys}) - 1, {present}, {columns}
    from changed
    {joined}
    where t.tableoid is null or ({condition})
) {to_stdout}"""
        ).format(
            to_stdout=sql.SQL(to_stdout),
            casts=named(key_values(relation, sql.SQL("record_id")), keys),
            changed=changed,
            names=sql.SQL(", ").join(keys),
            keys=sql.SQL(", ").join(sql.SQL("changed.{}").format(key) for key in keys),
            # Asked once, and only when a row is not there.
            present=sql.SQL("t.tableoid is not null or (select {}({}::regclass, {}::oid))").format(
                sql.Identifier(schema, "has_lost_rows"),
                sql.Identifier(relation.schema, relation.name).as_string(None),
                relation.oid,
            ),
            columns=_columns(relation, keys),
            joined=joined.format(
                relation=sql.Identifier(relation.schema, relation.name),
                column=sql.Identifier(key_columns[0].name),
                key=keys[0],
                same_key=same_key,
            ),
            condition=sql.SQL((relation.where or "true").replace("%", "%%")),
        )
    )


def copy_out(
    connection: Connection, statement: Statement, parameters: Mapping[str, Any] | None = None
) -> Iterator[tuple[bytearray, int]]:
    """Yield the rows of a COPY … TO STDOUT in chunks: (text of some rows, how many).

    `Copy.read` of psycopg waits anew for each row, which costs more than the row does; this waits for a chunk.
    """
    with connection.cursor().copy(statement, parameters):
        has_ended = False
        while not has_ended:
            rows = bytearray()
            count, has_ended = connection.wait(_take_rows(connection.pgconn, rows))
            yield rows, count


def _take_rows(pgconn: pq.abc.PGconn, rows: bytearray) -> PQGen[tuple[int, bool]]:
    """Take rows of a COPY until they fill a chunk or there are no more; return how many, and whether it has ended."""
    count = 0
    take = pgconn.get_copy_data
    while len(rows) < CHUNK_BYTES:
        length, row = take(1)
        if length > 0:
            rows += row
            count += 1
        elif length == 0:
            while not (yield Wait.R):
                pass
            pgconn.consume_input()
        else:
            for result in (yield from generators.fetch_many(pgconn)):
                if result.status != pq.ExecStatus.COMMAND_OK:
                    raise psycopg.errors.error_from_result(result)
            return count, True
    return count, False


def one_row(relation: Relation, record_ids: Sequence[str]) -> sql.Composed:
    """Compose a read of the row of the record at position $1 (and $2) of a list, as a batch reads it."""
    record_id = sql.SQL("({}::text[])[$1]").format(list(record_ids))
    return sql.SQL(
        "select count(row({columns}, ({condition}))) from {relation} as t where {same_key} and $1 = $2"
    ).format(
        columns=_columns(relation),
        condition=sql.SQL(relation.where or "true"),
        relation=sql.Identifier(relation.schema, relation.name),
        same_key=sql.SQL(" and ").join(
            sql.SQL("t.{} = {}").format(sql.Identifier(relation.columns[field].name), value)
            for field, value in zip(relation.key, key_values(relation, record_id), strict=True)
        ),
    )


def _columns(relation: Relation, keys: Sequence[sql.Identifier] = ()) -> sql.Composed:
    """Compose the columns of the row `t` in field order; keys fall back to the event's when the row is gone."""
    columns = []
    for index, column in enumerate(relation.columns.values()):
        value = sql.SQL("t.{}").format(sql.Identifier(column.name))
        if index < len(keys):
            value = sql.SQL("coalesce({}, changed.{})").format(value, keys[index])
        columns.append(value)
    return sql.SQL(", ").join(columns)
