"""Marks: events written on an operator's behalf, so that records sync again. One statement each, set-based.

A mark carries no data, so marking is harmless at any time and as often as one likes: the next pass reads the row as
it is then. Nor is it a change: under `last_update_wins` a change of the other node wins over it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from psycopg import sql

from sync_pipeline.capture import is_key, key_names, key_values, named, record_id
from sync_pipeline.database import Connection, scalar
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.records import Column, Relation

_LONG_AGO = sql.SQL("timestamptz 'epoch'")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a table that were marked together, and the last of them in key order."""

    marked: int
    last: str


def valid_keys(
    connection: Connection, schema: str, relation: Relation, record_ids: Sequence[str]
) -> list[str]:
    """Return those of `record_ids` that are keys of the table."""
    statement = sql.SQL(
        "select record_id from unnest({}::text[]) as given (record_id) where {}"
    ).format(list(record_ids), is_key(relation, sql.SQL("record_id"), schema))
    return [row[0] for row in connection.execute(statement)]


def require_keys(
    connection: Connection, schema: str, relation: Relation, record_ids: Sequence[str]
) -> None:
    """Raise for the first of `record_ids` that is no key of the table."""
    valid = set(valid_keys(connection, schema, relation, record_ids))
    for key in record_ids:
        if key not in valid:
            raise SyncPipelineError(
                f"`{key}` is no key of {relation.table}",
                node=relation.node,
                remedy=f"write {relation.key_in_words}, as in the column record_id of sync_events",
            )


def existing(
    connection: Connection, relation: Relation, record_ids: Sequence[str]
) -> frozenset[str]:
    """Return those of `record_ids`, all of them keys of the table, that have a row now."""
    statement = sql.SQL(
        "select given.record_id from unnest({ids}::text[]) as given (record_id) "
        "where exists (select from {relation} as t where {same_key})"
    ).format(
        ids=list(record_ids),
        relation=sql.Identifier(relation.schema, relation.name),
        same_key=sql.SQL(" and ").join(
            sql.SQL("t.{} = {}").format(sql.Identifier(column.name), value)
            for column, value in zip(
                _key_columns(relation),
                key_values(relation, sql.SQL("given.record_id")),
                strict=True,
            )
        ),
    )
    return frozenset(row[0] for row in connection.execute(statement))


def mark_keys(
    connection: Connection, schema: str, relation: Relation, record_ids: Sequence[str]
) -> int:
    """Mark records by their ids; those without a row are marked as deleted. Returns how many records."""
    require_keys(connection, schema, relation, record_ids)
    columns = _key_columns(relation)
    names = key_names(relation)
    statement = sql.SQL(
        """insert into {events} (table_name, record_id, event_type, changed_at)
select {table}, {record_id}, case when t.{first_column} is null then 'delete' else 'update' end, {long_ago}
from (select distinct {keys} from unnest({ids}::text[]) as given (record_id)) as given
left join {relation} as t on {same_key}
order by {order}"""
    ).format(
        long_ago=_LONG_AGO,
        events=_events(schema),
        table=relation.table,
        record_id=record_id(
            relation,
            {
                field: sql.SQL("given.{}").format(name)
                for field, name in zip(relation.key, names, strict=True)
            },
        ),
        first_column=sql.Identifier(columns[0].name),
        keys=named(key_values(relation, sql.SQL("given.record_id")), names),
        ids=list(record_ids),
        relation=sql.Identifier(relation.schema, relation.name),
        same_key=sql.SQL(" and ").join(
            sql.SQL("t.{} = given.{}").format(sql.Identifier(column.name), name)
            for column, name in zip(columns, names, strict=True)
        ),
        order=sql.SQL(", ").join(sql.SQL("given.{}").format(name) for name in names),
    )
    return connection.execute(statement).rowcount


def mark_rows(
    connection: Connection, schema: str, relation: Relation, condition: str | None = None
) -> int:
    """Mark the rows of a table that meet an SQL condition, or all of them; rows that are not sent are left out."""
    statement = sql.SQL(
        """insert into {events} (table_name, record_id, event_type, changed_at)
select {table}, {record_id}, 'update', {long_ago}
from {relation} as t
where ({sent}) and ({condition})
order by {keys}"""
    ).format(
        long_ago=_LONG_AGO,
        events=_events(schema),
        table=relation.table,
        record_id=_record_id_of_row(relation),
        relation=sql.Identifier(relation.schema, relation.name),
        sent=_sent(relation),
        condition=sql.SQL(condition or "true"),
        keys=_keys_of_row(relation),
    )
    # Without parameters, so that a `%` in a condition stands for itself.
    return connection.execute(statement).rowcount


def mark_in_chunks(
    connection: Connection, schema: str, relation: Relation, size: int, after: str | None = None
) -> Iterator[Chunk]:
    """Mark every row in key order, `size` at a time, each chunk committed by itself; `after` a key, if given."""
    if after is not None:
        require_keys(connection, schema, relation, [after])
    marked = size
    while marked == size:
        marked, last = connection.execute(_chunk(schema, relation, size, after)).fetchall()[0]
        if marked:
            after = last
            yield Chunk(marked, last)


def count_rows(connection: Connection, relation: Relation, after: str | None = None) -> int:
    """Count the rows that `mark_in_chunks` would mark."""
    statement = sql.SQL("select count(*) from {} as t where ({}) and {}").format(
        sql.Identifier(relation.schema, relation.name), _sent(relation), _beyond(relation, after)
    )
    return int(scalar(connection, statement))


def _chunk(schema: str, relation: Relation, size: int, after: str | None) -> sql.Composed:
    return sql.SQL(
        """with chunk as materialized (
    select {record_id} as record_id, row_number() over (order by {keys}) as number
    from {relation} as t
    where ({sent}) and {beyond}
    order by {keys}
    limit {size}
),
marked as (
    insert into {events} (table_name, record_id, event_type, changed_at)
    select {table}, record_id, 'update', {long_ago} from chunk order by number
)
select count(*), (select record_id from chunk order by number desc limit 1) from chunk"""
    ).format(
        record_id=_record_id_of_row(relation),
        keys=_keys_of_row(relation),
        relation=sql.Identifier(relation.schema, relation.name),
        sent=_sent(relation),
        beyond=_beyond(relation, after),
        size=size,
        long_ago=_LONG_AGO,
        events=_events(schema),
        table=relation.table,
    )


def _beyond(relation: Relation, after: str | None) -> sql.Composed:
    if after is None:
        return sql.SQL("true").format()
    return sql.SQL("({}) > ({})").format(
        _keys_of_row(relation),
        sql.SQL(", ").join(key_values(relation, sql.SQL("{}::text").format(after))),
    )


def _key_columns(relation: Relation) -> list[Column]:
    return [relation.columns[field] for field in relation.key]


def _keys_of_row(relation: Relation) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("t.{}").format(sql.Identifier(column.name)) for column in _key_columns(relation)
    )


def _record_id_of_row(relation: Relation) -> sql.Composed:
    return record_id(
        relation,
        {
            field: sql.SQL("t.{}").format(sql.Identifier(relation.columns[field].name))
            for field in relation.key
        },
    )


def _sent(relation: Relation) -> sql.SQL:
    return sql.SQL(relation.where or "true")


def _events(schema: str) -> sql.Identifier:
    return sql.Identifier(schema, "sync_events")
