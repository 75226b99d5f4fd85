"""What waits on the target, its own events and failures: a staged record that has one there is dirty on both nodes.

Each batch is checked twice, before it writes and when it holds its locks. Where many events wait, the checks would
read all of them again and again. So this session copies those up to a `bound` to a temporary table with an index, and
the checks read only the later ones.

A bound is safe when nobody can bring an event up to it any more: every transaction that was handed a smaller id has
ended. While it runs it has a lock on `sync_events`, so those that have to end are known by name.
"""

from dataclasses import dataclass, field
from datetime import datetime

from psycopg import sql
from psycopg.rows import class_row

from sync_pipeline import queries
from sync_pipeline.applier import Applier
from sync_pipeline.capture import has_one_text, key_values
from sync_pipeline.database import Connection, query, scalar
from sync_pipeline.statements import TableStatements

# Fewer events are read faster than they are copied; more at once could take longer than a statement may.
WORTHWHILE_EVENTS = 50_000
MOST_EVENTS = 1_000_000
_COPY = sql.Identifier("pg_temp", "waiting_events")


@dataclass(frozen=True, slots=True)
class Dirty:
    """A staged record that has events or a failure on the target as well."""

    table: str
    number: int
    record_id: str
    changed_at: datetime
    inserted: bool
    event_ids: list[int]
    # Its key as the target's failures spell it.
    failed_as: list[str] = field(default_factory=list)


@dataclass
class Waiting:
    """What one writer of the target knows of the target's own changes, for one pass. Up to `floor` there are none."""

    connection: Connection
    schema: str
    floor: int
    _is_copied: bool = field(default=False, init=False)
    # Up to where the copy can grow, and the transactions that have to end before.
    _next: tuple[int, set[str]] | None = field(default=None, init=False)
    # Up to where the last `find` has seen every event that there will ever be.
    _seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._bound = self.floor

    def find(self, applier: Applier) -> list[Dirty]:
        """Return the staged records that are dirty, before the batch has written anything."""
        self._seen = self._bound
        has_later = self._has_later(self._bound)
        if has_later:
            self._look()
        if not has_later and not self._is_copied:
            return []
        return self._dirty(applier, self._bound, after=-1)

    def find_again(self, applier: Applier, last_number: int) -> list[Dirty]:
        """Return the staged records that have become dirty since `find`; of those that came since, by number, all."""
        if any(
            part.last_number > last_number for parts in applier.staged.values() for part in parts
        ):
            bound = self._bound
            may_be_dirty = self._is_copied or self._has_later(bound)
        else:
            bound = self._seen
            may_be_dirty = self._has_later(bound)
        return self._dirty(applier, bound, after=last_number) if may_be_dirty else []

    def close(self) -> None:
        """Free the copy."""
        if self._is_copied:
            self.connection.execute(sql.SQL("drop table if exists {}").format(_COPY))

    def _has_later(self, bound: int) -> bool:
        statement = query(queries.get("has_pending", self.schema))
        return bool(scalar(self.connection, statement, {"bound": bound}))

    def _look(self) -> None:
        """Find out what is there for good; let the copy grow where that is worth it."""
        greatest = scalar(self.connection, query(queries.get("read_greatest_event", self.schema)))
        # Asked for later: whoever has a smaller id and is not among them has ended.
        running = set(
            scalar(
                self.connection,
                query(queries.get("read_event_writers", self.schema)),
                {"schema": self.schema},
            )
        )
        if not running:
            self._seen = greatest
        if self._next is None:
            self._next = greatest, running
        up_to, writers = self._next
        if writers.isdisjoint(running):
            missing = up_to - self._bound
            if missing >= WORTHWHILE_EVENTS:
                self._copy(min(up_to, self._bound + MOST_EVENTS))
                self._seen = max(self._seen, self._bound)
            if missing <= MOST_EVENTS:
                self._next = None

    def _copy(self, up_to: int) -> None:
        copied = sql.SQL(
            'select id as event_id, table_name, record_id collate "C" as record_id, created_at as changed_at, '
            "event_type from {events} where id > {bound} and id <= {up_to}"
        ).format(events=sql.Identifier(self.schema, "sync_events"), bound=self._bound, up_to=up_to)
        if self._is_copied:
            statement = sql.SQL("insert into {copy} {copied}")
        else:
            statement = sql.SQL(
                "drop table if exists {copy}; create temporary table {copy} as {copied}; "
                "create index on {copy} (record_id)"
            )
            self._is_copied = True
        self.connection.execute(statement.format(copy=_COPY, copied=copied))
        self._bound = up_to

    def _dirty(self, applier: Applier, bound: int, after: int) -> list[Dirty]:
        dirty: list[Dirty] = []
        for table in applier.staged:
            statements = applier.statements(table)
            # Two texts can be one key: then values are compared, which the copy does not have.
            is_copied = self._is_copied and has_one_text(statements.relation)
            since = bound if is_copied or bound > self._bound else self.floor
            statement = _dirty(statements, self.schema, is_copied=is_copied)
            parameters = {"bound": since, "after": after}
            with self.connection.cursor(row_factory=class_row(Dirty)) as cursor:
                dirty += cursor.execute(statement, parameters).fetchall()
        return dirty


def _dirty(statements: TableStatements, schema: str, *, is_copied: bool) -> sql.Composed:
    relation = statements.relation
    keys = [sql.Identifier(f"key {index}") for index in range(len(relation.key))]
    if has_one_text(relation):
        key_columns: sql.Composable = sql.SQL("")
        same_record: sql.Composable = sql.SQL("later.record_id = staged.record_id")
    else:
        # Whatever is no key is nobody's.
        key_columns = sql.SQL("").join(
            sql.SQL(", case when {} then {} end as {}").format(
                statements.is_key(sql.SQL("waiting.record_id"), schema), value, key
            )
            for value, key in zip(
                key_values(relation, sql.SQL("waiting.record_id")), keys, strict=True
            )
        )
        same_record = sql.SQL(" and ").join(
            sql.SQL("later.{0} = staged.{0}").format(key) for key in keys
        )
    copied: sql.Composable = sql.SQL("")
    if is_copied:
        # The planner knows nothing of a temporary table: what it must not turn into a join is written as it is meant.
        copied = sql.SQL(
            """
    union all
    select staged.n, staged.record_id, copied.*, null
    from staged
    cross join lateral (
        select changed_at, event_type, event_id
        from {copy}
        where record_id = staged.record_id collate "C" and table_name = {table}
        offset 0
    ) as copied
    where staged.n > %(after)s and (select true from {events} where id = copied.event_id)"""
        ).format(copy=_COPY, table=relation.table, events=sql.Identifier(schema, "sync_events"))
    return sql.SQL(
        """
with staged as materialized (select s.n, {record_id} as record_id, {staged_keys} from {stage} as s),
waiting as (
    select record_id, changed_at, event_type, event_id
    from {later_events}
    -- What our own rows made triggers do is news for the source, not a change that it did not know.
    where caused_by is distinct from pg_catalog.pg_current_xact_id()
    union all
    select record_id, changed_at, event_type, null
    from {failures}
    where table_name = {table}
),
found as (
    select staged.n, staged.record_id, later.changed_at, later.event_type, later.event_id, later.record_id as spelled
    from staged
    join (select waiting.*{key_columns} from waiting) as later on {same_record}{copied}
)
select
    {table} as "table",
    n as number,
    record_id,
    max(changed_at) as changed_at,
    bool_or(event_type = 'insert') as inserted,
    coalesce(array_agg(event_id) filter (where event_id is not null), '{{}}') as event_ids,
    coalesce(array_agg(spelled) filter (where event_id is null), '{{}}') as failed_as
from found
group by n, record_id
order by n"""
    ).format(
        later_events=sql.SQL("{}(%(bound)s, {})").format(
            sql.Identifier(schema, "events_after"), relation.table
        ),
        failures=sql.Identifier(schema, "sync_failures"),
        table=relation.table,
        key_columns=key_columns,
        record_id=statements.record_id(),
        staged_keys=sql.SQL(", ").join(
            sql.SQL("{} as {}").format(statements.staged(field_), key)
            for field_, key in zip(relation.key, keys, strict=True)
        ),
        stage=statements.stage,
        same_record=same_record,
        copied=copied,
    )
