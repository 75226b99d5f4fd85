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
from sync_pipeline.capture import has_one_text, is_key, key_names, key_values, named
from sync_pipeline.database import Connection, query, scalar
from sync_pipeline.statements import TableStatements

# Fewer events are read faster than they are copied; more at once could take longer than a statement may.
WORTHWHILE_EVENTS = 50_000
MOST_EVENTS = 1_000_000
# A table of the application that had this name would be hidden from its triggers.
_COPY = sql.Identifier("pg_temp", "sync_pipeline_waiting")


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
    # The first event that waited when the pass first had to know.
    _least: int | None = field(default=None, init=False)
    # Up to where the last `find` has seen every event that there will ever be.
    _seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._bound = self.floor

    def find(self, applier: Applier) -> list[Dirty]:
        """Return the staged records that are dirty, before the batch has written anything."""
        self._seen = self._bound
        pending = self._pending(self._bound)
        if pending.events:
            self._look()
        return self._dirty(applier, pending, self._bound, after=-1)

    def find_again(self, applier: Applier, last_number: int) -> list[Dirty]:
        """Return the staged records that have become dirty since `find`; of those that came since, by number, all."""
        came = any(
            part.last_number > last_number for parts in applier.staged.values() for part in parts
        )
        bound = self._bound if came else self._seen
        return self._dirty(applier, self._pending(bound), bound, after=last_number)

    def close(self) -> None:
        """Free the copy."""
        if self._is_copied:
            self.connection.execute(sql.SQL("drop table if exists {}").format(_COPY))

    def _pending(self, bound: int) -> "_Pending":
        with self.connection.cursor(row_factory=class_row(_Pending)) as cursor:
            statement = query(queries.get("has_pending", self.schema))
            found = cursor.execute(statement, {"bound": bound}).fetchone()
        if found is None:
            raise AssertionError("a query without a table returned no row")
        return found

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
            if missing >= WORTHWHILE_EVENTS and self._are_many(up_to):
                self._copy(min(up_to, self._bound + MOST_EVENTS))
                self._seen = max(self._seen, self._bound)
            if missing <= MOST_EVENTS:
                self._next = None

    def _are_many(self, up_to: int) -> bool:
        """True when as many ids lie between the first event that waits and another as are worth a copy."""
        if self._least is None:
            # Once: on its way may be many dead rows that no vacuum can remove.
            statement = query(queries.get("read_least_event", self.schema))
            self._least = scalar(self.connection, statement, {"bound": self._bound})
        return self._least is not None and up_to - self._least >= WORTHWHILE_EVENTS - 1

    def _copy(self, up_to: int) -> None:
        copied = sql.SQL(
            'select id as event_id, table_name, record_id collate "C" as record_id, '
            "coalesce(changed_at, created_at) as changed_at, event_type "
            "from {events} where id > {bound} and id <= {up_to}"
        ).format(events=sql.Identifier(self.schema, "sync_events"), bound=self._bound, up_to=up_to)
        if self._is_copied:
            statement = sql.SQL("insert into {copy} {copied}")
        else:
            statement = sql.SQL(
                "drop table if exists {copy}; create temporary table {copy} as {copied}; "
                # Of hashes: a key can be longer than an index takes.
                "create index on {copy} (pg_catalog.hashtextextended(record_id, 0))"
            )
            self._is_copied = True
        self.connection.execute(statement.format(copy=_COPY, copied=copied))
        self._bound = up_to

    def _dirty(self, applier: Applier, pending: "_Pending", bound: int, after: int) -> list[Dirty]:
        dirty: list[Dirty] = []
        for table in applier.staged:
            statements = applier.statements(table)
            # Two texts can be one key: then values are compared, which the copy does not have.
            is_copied = self._is_copied and has_one_text(statements.relation)
            since = bound if is_copied or bound > self._bound else self.floor
            has_events = pending.events or (self._is_copied and not is_copied)
            if not (has_events or pending.failures or is_copied):
                continue
            statement = _dirty(
                statements,
                self.schema,
                events=has_events,
                failures=pending.failures,
                copied=is_copied,
            )
            with self.connection.cursor(row_factory=class_row(Dirty)) as cursor:
                dirty += cursor.execute(statement, {"bound": since, "after": after}).fetchall()
        return dirty


@dataclass(frozen=True, slots=True)
class _Pending:
    """Whether the target has events above an id, and whether it has failures."""

    events: bool
    failures: bool


def _dirty(
    statements: TableStatements, schema: str, *, events: bool, failures: bool, copied: bool
) -> sql.Composed:
    """Compose the search for staged records that later `events`, `failures` or the copied events are about."""
    relation = statements.relation
    parameters = {
        "copy": _COPY,
        "events": sql.Identifier(schema, "sync_events"),
        "events_after": sql.Identifier(schema, "events_after"),
        "events_about": sql.Identifier(schema, "events_about"),
        "failures": sql.Identifier(schema, "sync_failures"),
        "table": sql.Literal(relation.table),
    }
    found = []
    # What our own rows made triggers do, and what we keep, is news for the source, not a change that it did not know.
    is_news = sql.SQL("caused_by is distinct from pg_catalog.pg_current_xact_id()")
    if events and has_one_text(relation):
        found.append(
            sql.SQL(
                "select staged.n, staged.record_id, about.changed_at, about.event_type, about.event_id, null "
                "from staged join {events_about}(%(bound)s, {table}, array(select record_id from staged)) as about "
                "on about.record_id = staged.record_id where about.{is_news}"
            ).format(**parameters, is_news=is_news)
        )
    elif events:
        later = sql.SQL(
            "select record_id, changed_at, event_type, event_id from {events_after}(%(bound)s, {table}) "
            "where {is_news}"
        )
        found.append(_matched(statements, schema, later.format(**parameters, is_news=is_news)))
    if failures and has_one_text(relation):
        found.append(
            sql.SQL(
                "select staged.n, staged.record_id, failed.*, null::bigint, staged.record_id from staged "
                "cross join lateral (select changed_at, event_type from {failures} "
                "where table_name = {table} and record_id = staged.record_id offset 0) as failed"
            ).format(**parameters)
        )
    elif failures:
        failed = sql.SQL(
            "select record_id, changed_at, event_type, null::bigint as event_id "
            "from {failures} where table_name = {table}"
        )
        found.append(_matched(statements, schema, failed.format(**parameters)))
    if copied:
        found.append(
            sql.SQL(
                "select staged.n, staged.record_id, copied.changed_at, copied.event_type, copied.event_id, null "
                "from staged join (select record_id, changed_at, event_type, event_id from {copy} "
                "where pg_catalog.hashtextextended(record_id, 0) = any (array("
                'select pg_catalog.hashtextextended(record_id collate "C", 0) from staged where n > %(after)s)) '
                "and table_name = {table} offset 0) as copied on copied.record_id = staged.record_id "
                "where staged.n > %(after)s and (select true from {events} where id = copied.event_id)"
            ).format(**parameters)
        )
    return sql.SQL(
        """
with staged as materialized (select s.n, {record_id} as record_id, {keys} from {stage} as s),
found (n, record_id, changed_at, event_type, event_id, failed_as) as ({found})
select
    {table} as "table",
    n as number,
    record_id,
    max(changed_at) as changed_at,
    bool_or(event_type = 'insert') as inserted,
    coalesce(array_agg(event_id) filter (where event_id is not null), '{{}}') as event_ids,
    coalesce(array_agg(failed_as) filter (where event_id is null), '{{}}') as failed_as
from found
group by n, record_id
order by n"""
    ).format(
        record_id=statements.record_id,
        keys=named(map(statements.staged, relation.key), key_names(relation)),
        stage=statements.stage,
        found=sql.SQL(" union all ").join(found),
        table=relation.table,
    )


def _matched(statements: TableStatements, schema: str, waiting: sql.Composed) -> sql.Composed:
    """Compose the join of the staged records with what waits, by the values of keys that have several texts."""
    keys = key_names(statements.relation)
    # Whatever is no key is nobody's.
    text = sql.SQL("waiting.record_id")
    values = sql.SQL("").join(
        sql.SQL(", case when {} then {} end as {}").format(
            is_key(statements.relation, text, schema), value, key
        )
        for value, key in zip(key_values(statements.relation, text), keys, strict=True)
    )
    return sql.SQL(
        "select staged.n, staged.record_id, waiting.changed_at, waiting.event_type, waiting.event_id, "
        "waiting.record_id from staged "
        "join (select waiting.*{values} from ({waiting}) as waiting) as waiting on {same_key}"
    ).format(
        values=values,
        waiting=waiting,
        same_key=sql.SQL(" and ").join(
            sql.SQL("waiting.{0} = staged.{0}").format(key) for key in keys
        ),
    )
