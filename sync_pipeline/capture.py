"""The triggers that mark changed records, composed for each table: one function and four triggers.

A statement's changes are marked by one INSERT … SELECT over its transition tables, whatever their number. The
functions run with their owner's rights, so that applications need none on the pipeline's schema, and with a pinned
search_path. While the consumer applies (a setting local to its transaction), its own direct writes are not marked;
what the application's triggers do as a consequence is work of this node and is.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from psycopg import sql

from sync_pipeline.records import PLAIN_TYPES, SAME_WHEN_EQUAL, TEXT_SETTINGS, Relation

APPLYING = "sync_pipeline.applying"
# Each has a trigger.
EVENTS = ("insert", "update", "delete", "truncate")

_ONE_TEXT = SAME_WHEN_EQUAL | {"numeric", "bpchar", "real", "double precision"}
_COMPARABLE_TYPES = PLAIN_TYPES | SAME_WHEN_EQUAL | {"real", "double precision"}
_TEXT_SETTINGS = sql.SQL("").join(
    sql.SQL("\nset {} = {}").format(sql.SQL(name), value) for name, value in TEXT_SETTINGS.items()
)

_FUNCTION = sql.SQL(
    """\
create or replace function {function}() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp{settings}
as {body};
revoke all on function {function}() from public"""
)

# What runs for each statement of the application: measured by `benchmarks.capture`, and short for a reason. A key is
# compared with null as a whole (`is distinct from`), since `is null` looks into a composite value. The variable is
# named with its block: a table may have a column of that name.
_BODY = sql.SQL(
    """
<<capture>>
declare
    consumer xid8;
begin
    if current_setting({applying}, true) = {schema_name} then
        if pg_trigger_depth() = 1 then
            return null;
        end if;
        capture.consumer := pg_current_xact_id();
    end if;
    if tg_op = 'UPDATE' then
        insert into {events} (table_name, record_id, event_type, caused_by)
        select
            {table},
            {either_key},
            case
                when {old_rows_lack_it} then 'insert'
                when {new_rows_lack_it} then 'delete'
                else 'update'
            end,
            capture.consumer
        from new_rows
        full join old_rows on {same_key}
        where {new_rows_lack_it}
            or {old_rows_lack_it}
            or {new_row} operator(pg_catalog.*<>) {old_row};
    elsif tg_op = 'INSERT' then
        insert into {events} (table_name, record_id, event_type, caused_by)
        select {table}, {new_key}, 'insert', capture.consumer
        from new_rows;
    elsif tg_op = 'DELETE' then
        insert into {events} (table_name, record_id, event_type, caused_by)
        select {table}, {old_key}, 'delete', capture.consumer
        from old_rows;
    else
        -- By the name that the table has now: a renamed one can still be truncated.
        execute {truncated} || format('%I.%I', tg_table_schema, tg_table_name) || ' as old_rows'
        using capture.consumer;
    end if;
    return null;
end
"""
)


@dataclass(frozen=True, slots=True)
class Trigger:
    """One trigger that a captured relation must have."""

    name: str
    create: str


@dataclass(frozen=True, slots=True)
class Capture:
    """What must exist to capture one relation: a function and, on it and each partition, four triggers."""

    relation: Relation
    function: str
    body: str
    create_function: str
    triggers: dict[tuple[str, str], tuple[Trigger, ...]]


def compose(relation: Relation, schema: str) -> Capture:
    """Compose the capture of a relation. Writes straight to a partition are captured by triggers of its own."""
    name = function_name(relation.table)
    function = sql.Identifier(schema, name)
    text = body(relation, schema)
    plain = all(relation.columns[field].type_name in PLAIN_TYPES for field in relation.key)
    create_function = _FUNCTION.format(
        function=function, settings=sql.SQL("") if plain else _TEXT_SETTINGS, body=text
    ).as_string(None)
    targets = [(relation.schema, relation.name), *relation.partitions]
    return Capture(
        relation=relation,
        function=name,
        body=text,
        create_function=create_function,
        triggers={target: _triggers(target, schema, function) for target in targets},
    )


@lru_cache(maxsize=2048)
def body(relation: Relation, schema: str) -> str:
    """Compose the body of the function of a relation."""
    columns = {field: sql.Identifier(relation.columns[field].name) for field in relation.key}

    def whole(rows: str) -> sql.Composed:
        # By name only the key, and as text what does not count: a column may be dropped before `install` knows of it.
        if not relation.uncarried:
            return sql.SQL("row({}.*)::record").format(sql.Identifier(rows))
        nothing = json.dumps(dict.fromkeys(relation.uncarried), ensure_ascii=False)
        return sql.SQL("jsonb_populate_record({}.*, {}::jsonb)").format(
            sql.Identifier(rows), nothing
        )

    def key(rows: str) -> dict[str, sql.Composed]:
        return {
            field: sql.SQL("{}.{}").format(sql.Identifier(rows), column)
            for field, column in columns.items()
        }

    new, old = key("new_rows"), key("old_rows")

    def same(field: str) -> sql.Composed:
        values = new[field], old[field]
        type_name = relation.columns[field].type_name
        if type_name not in _COMPARABLE_TYPES:
            # The operator of an extension's type is not on the pinned search_path. Where a key has several texts, both
            # the old one and the new one are marked.
            values = _text(type_name, new[field]), _text(type_name, old[field])
        elif not relation.columns[field].collation_is_deterministic:
            values = (
                sql.SQL('{} collate "C"').format(new[field]),
                sql.SQL('{} collate "C"').format(old[field]),
            )
        return sql.SQL("{} = {}").format(*values)

    def lacks(rows: dict[str, sql.Composed]) -> sql.Composed:
        return sql.SQL("{} is not distinct from null").format(rows[relation.key[0]])

    either = {
        field: sql.SQL("coalesce({}, {})").format(new[field], old[field]) for field in relation.key
    }
    truncated = (
        sql.SQL(
            "insert into {} (table_name, record_id, event_type, caused_by) select {}, {}, 'delete', $1 from "
        )
        .format(sql.Identifier(schema, "sync_events"), relation.table, record_id(relation, old))
        .as_string(None)
    )
    return _BODY.format(
        applying=APPLYING,
        schema_name=schema,
        events=sql.Identifier(schema, "sync_events"),
        table=relation.table,
        truncated=truncated,
        new_key=record_id(relation, new),
        old_key=record_id(relation, old),
        either_key=record_id(relation, either),
        new_rows_lack_it=lacks(new),
        old_rows_lack_it=lacks(old),
        new_row=whole("new_rows"),
        old_row=whole("old_rows"),
        same_key=sql.SQL(" and ").join(map(same, relation.key)),
    ).as_string(None)


def trigger_names(schema: str) -> tuple[str, ...]:
    """Return the names of the four triggers of a link, as a table has them."""
    return tuple(_short(f"{schema}_capture_{event}") for event in EVENTS)


def _triggers(
    target: tuple[str, str], schema: str, function: sql.Identifier
) -> tuple[Trigger, ...]:
    insert, update, delete, truncate = trigger_names(schema)
    referencing = {
        insert: "after insert on {} referencing new table as new_rows",
        update: "after update on {} referencing old table as old_rows new table as new_rows",
        delete: "after delete on {} referencing old table as old_rows",
        truncate: "before truncate on {}",
    }
    return tuple(
        Trigger(
            name,
            sql.SQL(
                "create or replace trigger {} "
                + when
                + "\nfor each statement execute function {}()"
            )
            .format(sql.Identifier(name), sql.Identifier(*target), function)
            .as_string(None),
        )
        for name, when in referencing.items()
    )


def function_name(table: str) -> str:
    """Return the name of a table's capture function: readable where the table's name is plain."""
    if re.fullmatch(r"[a-z][a-z0-9_]{0,40}", table):
        return f"capture_{table}"
    slug = re.sub(r"[^a-z0-9]+", "_", table.lower()).strip("_")[:30]
    digest = hashlib.sha256(table.encode()).hexdigest()[:12]
    return f"capture_{slug}_{digest}"


def record_id(relation: Relation, parts: dict[str, sql.Composed]) -> sql.Composed:
    """Compose the text of a record's key from expressions of its fields: the same on both nodes."""
    texts = [_text(relation.columns[field].type_name, parts[field]) for field in relation.key]
    if len(texts) == 1:
        return texts[0]
    return sql.SQL("pg_catalog.jsonb_build_array({})::text").format(sql.SQL(", ").join(texts))


def has_one_text(relation: Relation) -> bool:
    """True when equal keys of a relation always have one text: not so for `interval`, `jsonb`, `numeric[]`."""
    return all(
        (column.type_name in _ONE_TEXT or _is_citext(column.type_name))
        and (column.collation_is_deterministic or _is_citext(column.type_name))
        for column in (relation.columns[field] for field in relation.key)
    )


def key_values(relation: Relation, text: sql.Composable) -> list[sql.Composed]:
    """Compose the values of a key from the text of a record_id; an error where it is none."""
    columns = [relation.columns[field] for field in relation.key]
    parts: list[sql.Composable] = [text]
    if len(columns) > 1:
        # Any number is JSON, too: where there is no such part, the second argument is an error.
        part_or_error = "coalesce(({{0}})::jsonb ->> {}, ({{0}} || ' is no key')::bigint::text)"
        parts = [sql.SQL(part_or_error.format(n)).format(text) for n in range(len(columns))]
    values = []
    for column, part in zip(columns, parts, strict=True):
        collate = sql.SQL(f" collate {column.collation}" if column.collation else "")
        values.append(sql.SQL(f"({{}})::{column.type_name}").format(part) + collate)
    return values


def key_names(relation: Relation) -> list[sql.Identifier]:
    """Return what the values of a key are called in a statement that has them beside a row."""
    return [sql.Identifier(f"key {index}") for index in range(len(relation.key))]


def named(values: Iterable[sql.Composable], names: Iterable[sql.Composable]) -> sql.Composed:
    """Compose a list of values, each by its name."""
    return sql.SQL(", ").join(
        sql.SQL("{} as {}").format(value, name) for value, name in zip(values, names, strict=True)
    )


def is_key(relation: Relation, text: sql.Composable, schema: str) -> sql.Composed:
    """True when a text is a key of a relation: safe to be read as one."""
    is_value = sql.Identifier(schema, "is_value")
    names = [relation.columns[field].type_name for field in relation.key]
    if len(names) == 1:
        return sql.SQL("{}({}, {})").format(is_value, text, names[0])
    parts = [
        sql.SQL(
            f"({{0}}::jsonb ->> {index}) is not null and {{1}}({{0}}::jsonb ->> {index}, {{2}})"
        ).format(text, is_value, name)
        for index, name in enumerate(names)
    ]
    return sql.SQL(
        "case when not {0}({1}, 'jsonb') then false when pg_catalog.jsonb_typeof({1}::jsonb) <> 'array' then false "
        "when pg_catalog.jsonb_array_length({1}::jsonb) <> {2} then false else {3} end"
    ).format(is_value, text, len(names), sql.SQL(" and ").join(parts))


def _is_citext(type_name: str) -> bool:
    return type_name.rsplit(".", maxsplit=1)[-1] == "citext"


def _text(type_name: str, value: sql.Composed) -> sql.Composed:
    # Equal values have one text: 1.0 and 1.00, -0 and 0, a citext in any case.
    if type_name == "numeric":
        return sql.SQL("pg_catalog.trim_scale({})::text").format(value)
    if type_name in {"real", "double precision"}:
        return sql.SQL("({} + 0)::text").format(value)
    if _is_citext(type_name):
        return sql.SQL("pg_catalog.lower({}::text)").format(value)
    return sql.SQL("{}::text").format(value)


def _short(name: str) -> str:
    if len(name.encode()) <= 63:
        return name
    return f"{name.encode()[:40].decode(errors='ignore')}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
