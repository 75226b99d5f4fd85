"""Room for records of one batch that exchange unique values: 1 takes what 2 had, 2 what 1 had.

PostgreSQL checks a unique index row by row, so no order of updates can swap two values. A row of the target that is in
the way is *parked*: it gets a free value for a moment, in the transaction that then writes or deletes it as the batch
says. Only rows of the batch are moved, and only in columns that the batch writes again. One that foreign keys refer to
is moved only where its children go along and come back (ON UPDATE CASCADE), or where the check waits (deferrable).
Where that does not help, a row that is to be deleted becomes the record that takes its value: see `rename`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from sync_pipeline import queries
from sync_pipeline.applier import FOREIGN_KEY_VIOLATION, VIOLATIONS, Applier, Refusal
from sync_pipeline.capture import named, record_id
from sync_pipeline.database import error_class, query, scalar
from sync_pipeline.statements import TableStatements

# Begins the names of what stands beside an application's columns, which may have any other name.
_OURS = "sync_pipeline"

_TEXTS = {"text", "character varying", "bpchar"}
_NUMBERS = {"smallint", "integer", "bigint", "numeric", "real", "double precision"}
_RANGES = {"int4range", "int8range", "numrange", "daterange", "tsrange", "tstzrange"}
_DAYS = {"date", "timestamp without time zone", "timestamp with time zone"}


@dataclass(frozen=True, slots=True)
class UniqueIndex:
    """A unique index, or one of an exclusion constraint, which has `operators`.

    Foreign keys refer to `referenced`, whose children could not come back; to `followed` with ON UPDATE CASCADE;
    `referring` are part of one.

    `columns` are what it is made of; for a generated column, which is in `generated` with its expression, those that
    it is computed from. `plain` are the columns of its key, null where that has expressions. One that is not checked at
    once (`immediate`) needs no parking.
    """

    immediate: bool
    expressions: list[str]
    predicate: str | None
    nulls_not_distinct: bool
    operators: list[str] | None
    columns: list[str]
    plain: list[str] | None
    generated: dict[str, str]
    referenced: list[str]
    followed: list[str]
    referring: list[str]


@dataclass(frozen=True, slots=True)
class Holder:
    """A row of the target that has a unique value which a staged record wants; `held_by` is its number if staged."""

    number: int
    record_id: str
    held_by: int | None


# By table and number of a row that is to be deleted, the numbers of the records that take its place.
Successors = Mapping[tuple[str, int], set[int]]


def park(applier: Applier) -> dict[str, set[int]]:
    """Move the batch's own rows out of each other's way; return their numbers by table.

    Raises the error of PostgreSQL when no free value is accepted.
    """
    parked: dict[str, set[int]] = {}
    for table in applier.staged:
        statements = applier.statements(table)
        for index in _indexes(applier, table):
            if index.immediate:
                parked.setdefault(table, set()).update(_park(applier, statements, index))
    return parked


def rename(applier: Applier) -> bool:
    """Give rows that are to be deleted the new key of the record that takes their place; true if any got one.

    A record whose key changed is a delete and an insert. Where rows refer to the old one by a value that the new one
    keeps, neither can come first: so it is moved, and they follow or need not.
    """
    found = False
    for table, index in referred_indexes(applier):
        if (statement := _renamed(applier.statements(table), index)) is None:
            continue
        try:
            with applier.connection.transaction():
                renamed = applier.connection.execute(statement)
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
        else:
            found = found or renamed.rowcount > 0
    return found


def successors(applier: Applier) -> Successors:
    """Return, by table and number, the staged records that take the place of each row that is to be deleted."""
    found: dict[tuple[str, int], set[int]] = {}
    for table, index in referred_indexes(applier):
        statements = applier.statements(table)
        statement = sql.SQL("select gone.n, s.n from {}").format(_succeeded(statements, index))
        for gone, number in _asked(applier, statement):
            found.setdefault((table, gone), set()).add(number)
    return found


def referred_indexes(applier: Applier) -> Iterator[tuple[str, UniqueIndex]]:
    """Yield the unique indexes, but for keys, of values that rows refer to.

    Who takes any other value is another record; so is who takes one that only some rows must not share.
    """
    relations = [applier.catalog.relation(applier.node, each) for each in applier.catalog.tables]
    for table in applier.staged:
        own = applier.catalog.relation(applier.node, table)
        keys = [key for each in relations for key in each.foreign_keys if key.parent == table]
        referred = {column for key in keys for column in key.parent_columns}
        for index in _indexes(applier, table):
            if (
                index.plain
                and index.predicate is None
                and index.operators is None
                and referred.union(index.referenced, index.followed).issuperset(index.plain)
                and {own.columns[field].name for field in own.key} != set(index.plain)
            ):
                yield table, index


def holders(applier: Applier, table: str) -> list[Holder]:
    """Return which rows of the target hold a unique value that a staged record of another key wants."""
    statements = applier.statements(table)
    found: list[Holder] = []
    for index in _indexes(applier, table):
        statement = sql.SQL(
            "select blocked.n as number, {record_id} as record_id, s.n as held_by "
            "from {blocked} left join {stage} as s on {same_key}"
        ).format(
            record_id=_id(statements),
            blocked=_blocked(statements, index),
            stage=statements.stage,
            same_key=_same(statements),
        )
        found += [Holder(*row) for row in _asked(applier, statement)]
    return found


def outsiders(applier: Applier, table: str, schema: str) -> list[str]:
    """Return the ids of clean rows in the way that the batch does not hold."""
    statements = applier.statements(table)
    found: dict[str, None] = {}
    for index in _indexes(applier, table):
        statement = sql.SQL(
            "select distinct {record_id} from {blocked} "
            "where not exists (select from {stage} as s where {same_key}) and {is_clean}"
        ).format(
            record_id=_id(statements),
            blocked=_blocked(statements, index),
            stage=statements.stage,
            same_key=_same(statements),
            is_clean=statements.is_clean(_id(statements), schema),
        )
        found |= dict.fromkeys(rid for (rid,) in _asked(applier, statement))
    return list(found)


def _asked(applier: Applier, statement: sql.Composed) -> list[tuple[Any, ...]]:
    """Return what a look finds; nothing where an expression of the index does not accept a staged record."""
    try:
        with applier.connection.transaction():
            return applier.connection.execute(statement).fetchall()
    except psycopg.Error as error:
        if error_class(error) != "data":
            raise
        return []


def sit_out(applier: Applier, refused: Sequence[Refusal]) -> None:
    """Leave refused records out of what follows; they stay staged, so that they can still be named."""
    for table in dict.fromkeys(refusal.table for refusal in refused):
        applier.connection.execute(
            applier.statements(table).sit_out,
            {"numbers": [refusal.number for refusal in refused if refusal.table == table]},
        )


def go_again(applier: Applier, refused: Sequence[Refusal], successors: Successors) -> None:
    """Take rows in again that were to be deleted and waited for who takes their place."""
    for table in dict.fromkeys(refusal.table for refusal in refused):
        numbers = [
            r.number for r in refused if r.table == table and (table, r.number) in successors
        ]
        applier.connection.execute(applier.statements(table).go_again, {"numbers": numbers})


def divide(
    applier: Applier, refused: Sequence[Refusal], successors: Successors
) -> tuple[list[Refusal], list[Refusal]]:
    """Divide refused records into those that may pass together and those that cannot; name who holds a value.

    Together pass records that exchange values, that refer to each other, or that take each other's place. Hopeless
    is what was refused for another reason, wants what a row outside of the batch has or is, or waits for a hopeless
    record.
    """
    held: dict[tuple[str, int], list[Holder]] = {}
    waiting: dict[tuple[str, int], list[tuple[str, int | None]]] = {}
    for table in dict.fromkeys(r.table for r in refused if r.error_class in VIOLATIONS):
        for holder in holders(applier, table):
            held.setdefault((table, holder.number), []).append(holder)
            waiting.setdefault((table, holder.number), []).append((table, holder.held_by))
    orphaned: dict[tuple[str, int], list[tuple[str, int | None]]] = {}
    for table in dict.fromkeys(r.table for r in refused if r.error_class == FOREIGN_KEY_VIOLATION):
        for number, parent in orphans(applier, table):
            orphaned.setdefault((table, number), []).append(parent)
    hopeless: set[tuple[str, int | None]] = set()
    wanting: dict[tuple[str, int | None], list[tuple[str, int]]] = {}
    for refusal in refused:
        record = refusal.table, refusal.number
        if refusal.error_class == FOREIGN_KEY_VIOLATION:
            found = orphaned.get(record, [])
            found += [(refusal.table, number) for number in successors.get(record, ())]
            is_hopeless = not found
        else:
            found, is_hopeless = waiting.get(record, []), refusal.error_class not in VIOLATIONS
        if is_hopeless or any(number is None for _, number in found):
            hopeless.add(record)
        for other in found:
            wanting.setdefault(other, []).append(record)
    spreading = list(hopeless)
    while spreading:
        more = [each for each in wanting.get(spreading.pop(), []) if each not in hopeless]
        hopeless.update(more)
        spreading += more
    named = [_name(refusal, held.get((refusal.table, refusal.number), [])) for refusal in refused]
    return (
        [refusal for refusal in named if (refusal.table, refusal.number) not in hopeless],
        [refusal for refusal in named if (refusal.table, refusal.number) in hopeless],
    )


def orphans(applier: Applier, table: str) -> Iterator[tuple[int, tuple[str, int | None]]]:
    """Yield which staged records lack a parent, each with the parent's table and number; null if not staged."""
    for key in applier.catalog.relation(applier.node, table).foreign_keys:
        if key.is_carried:
            statement = applier.statements(table).orphans(
                applier.statements(key.parent), key, parent_is_staged=key.parent in applier.staged
            )
            for number, parent in applier.connection.execute(statement).fetchall():
                yield number, (key.parent, parent)


def _name(refusal: Refusal, found: list[Holder]) -> Refusal:
    if refusal.error_class not in VIOLATIONS or not found:
        return refusal
    others = ", ".join(dict.fromkeys(holder.record_id for holder in found))
    return replace(refusal, error=f"{refusal.error} The value is held by record {others[:200]}.")


def _indexes(applier: Applier, table: str) -> list[UniqueIndex]:
    if table not in applier.indexes:
        with applier.connection.cursor(row_factory=class_row(UniqueIndex)) as cursor:
            applier.indexes[table] = cursor.execute(
                query(queries.get("read_unique_indexes", "")),
                {"oid": applier.catalog.relation(applier.node, table).oid},
            ).fetchall()
    return applier.indexes[table]


def _park(applier: Applier, statements: TableStatements, index: UniqueIndex) -> set[int]:
    refused: psycopg.Error | None = None
    in_the_way = sql.SQL(
        "from {stage} as s where {same_key} and ({own}) in (select {keys} from {blocked})"
    ).format(
        stage=statements.stage,
        same_key=statements.same_key(),
        own=sql.SQL(", ").join(
            sql.SQL("t.{}").format(statements.column(field)) for field in statements.relation.key
        ),
        keys=sql.SQL(", ").join(sql.SQL("blocked.{}").format(k) for k in _keys(statements)),
        blocked=_blocked(statements, index),
    )
    # An assignment may be accepted and change nothing: null for a column that is null in all rows of a partial index.
    remaining = sql.SQL(
        "select exists (select from {target} as t cross join lateral (select {in_the_way}) as s)"
    ).format(target=statements.target, in_the_way=in_the_way)
    for assignment in _assignments(statements, index):
        statement = sql.SQL(
            "update {target} as t set {assignment} {in_the_way} returning s.n"
        ).format(target=statements.target, assignment=assignment, in_the_way=in_the_way)
        try:
            with applier.connection.transaction() as attempt:
                moved = {number for (number,) in applier.connection.execute(statement)}
                if not moved or not scalar(applier.connection, remaining):
                    return moved
                raise psycopg.Rollback(attempt)
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
            refused = error
    if refused is not None:
        raise refused
    return set()


def _renamed(statements: TableStatements, index: UniqueIndex) -> sql.Composed | None:
    """Compose what gives old rows their new key; none where all of it must be generated, and cannot be updated."""
    relation = statements.relation
    generated = [field for field in relation.key if relation.columns[field].identity == "a"]
    written = [field for field in relation.key if field not in generated]
    if not written:
        return None
    return sql.SQL(
        "update {target} as t set {assignments} from {succeeded} "
        "where {same_key} and {same_generated} and not exists (select from {target} as t where {taken})"
    ).format(
        target=statements.target,
        assignments=sql.SQL(", ").join(
            sql.SQL("{} = {}").format(statements.column(field), statements.staged(field))
            for field in written
        ),
        succeeded=_succeeded(statements, index),
        same_key=statements.same_key("gone"),
        same_generated=sql.SQL(" and ").join(
            sql.SQL("t.{} = {}").format(statements.column(field), statements.staged(field))
            for field in generated
        )
        if generated
        else sql.SQL("true"),
        taken=statements.same_key(),
    )


def _succeeded(statements: TableStatements, index: UniqueIndex) -> sql.Composed:
    """Compose the join of `gone`, staged as gone and not yet deleted, with the record `s` that takes its place."""
    return sql.SQL(
        "{blocked} join {stage} as s on s.n = blocked.n join {stage} as gone on not gone.present and {held}"
    ).format(
        blocked=_blocked(statements, index),
        stage=statements.stage,
        held=_same(statements, "gone"),
    )


def _blocked(statements: TableStatements, index: UniqueIndex) -> sql.Composed:
    """Compose `blocked`: the number of a staged record and the key of the row that has what it wants.

    The index's expressions name plain columns, so each stands where only its own row is in sight.
    """
    relation = statements.relation
    fields = {column.name: field for field, column in relation.columns.items()}
    values = [sql.Identifier(f"{_OURS} value {n}") for n in range(len(index.expressions))]
    expressions = sql.SQL(", ").join(
        sql.SQL("({}) as {}").format(sql.SQL(text), name)
        for text, name in zip(index.expressions, values, strict=True)
    )
    predicate = sql.SQL(index.predicate or "true")
    keys = _keys(statements)
    equal = "is not distinct from" if index.nulls_not_distinct else "="
    operators = index.operators or [equal] * len(values)
    return sql.SQL(
        "(select wanted.n, {held_keys} from (select {n} as n, {keys}, {expressions} from ("
        "select staged.*{generated} from ("
        "select s.n as {n}, {staged_keys}, {columns} from {stage} as s left join {target} as t on {same_key} "
        "where s.present) as staged) as staged where {predicate}) as wanted "
        "join (select {own_keys}, {expressions} from {target} as t where {predicate}) as held "
        "on {same_values} where not ({one_key})) as blocked"
    ).format(
        n=sql.Identifier(f"{_OURS} n"),
        keys=sql.SQL(", ").join(keys),
        held_keys=sql.SQL(", ").join(sql.SQL("held.{}").format(key) for key in keys),
        staged_keys=named(map(statements.staged, relation.key), keys),
        own_keys=named([sql.SQL("t.{}").format(statements.column(f)) for f in relation.key], keys),
        expressions=expressions,
        columns=sql.SQL(", ").join(
            sql.SQL("{} as {}").format(
                statements.staged(fields[name])
                if name in fields
                else sql.SQL("t.{}").format(sql.Identifier(name)),
                sql.Identifier(name),
            )
            for name in index.columns
        ),
        generated=sql.SQL("").join(
            sql.SQL(", ({}) as {}").format(sql.SQL(expression), sql.Identifier(name))
            for name, expression in index.generated.items()
        ),
        stage=statements.stage,
        target=statements.target,
        same_key=statements.same_key(),
        predicate=predicate,
        same_values=sql.SQL(" and ").join(
            sql.SQL(f"wanted.{{0}} {operator} held.{{0}}").format(name)
            for name, operator in zip(values, operators, strict=True)
        ),
        one_key=sql.SQL(" and ").join(sql.SQL("wanted.{0} = held.{0}").format(key) for key in keys),
    )


def _assignments(statements: TableStatements, index: UniqueIndex) -> Iterator[sql.Composed]:
    """Yield what may take a row out of the index, the least intrusive first."""
    relation = statements.relation
    columns = [
        column
        for field, column in relation.columns.items()
        if column.name in index.columns
        and column.name not in index.referenced
        and field not in relation.key
        and column.identity != "a"
    ]
    for column in columns:
        # Children would follow to null, and not back.
        if not (column.not_null or index.nulls_not_distinct or column.name in index.followed):
            yield sql.SQL("{} = null").format(sql.Identifier(column.name))
    for column in columns:
        if column.name in index.referring:
            continue
        name = sql.Identifier(column.name)
        for value in _free_values(column.type_name, column.formatted_type):
            yield sql.SQL("{} = {}").format(
                name, sql.SQL(value).format(column=name, table=statements.target)
            )


def _free_values(type_name: str, formatted_type: str) -> Iterator[str]:
    if type_name in _TEXTS or type_name.endswith("citext"):
        length = re.search(r"\((\d+)\)$", formatted_type)
        yield (
            "pg_catalog.left(pg_catalog.replace(pg_catalog.gen_random_uuid()::text, '-', ''), "
            f"{length[1] if length else 32})"
        )
    elif type_name in _NUMBERS:
        yield "(select least(min({column}), 0) from {table}) - s.n - 1"
        yield "(select greatest(max({column}), 0) from {table}) + s.n + 1"
    elif type_name in _DAYS:
        yield (
            "coalesce((select max({column}) from {table} where pg_catalog.isfinite({column})), '2000-01-01') "
            "+ (s.n + 1) * interval '1 day'"
        )
    elif type_name == "uuid":
        yield "pg_catalog.gen_random_uuid()"
    elif type_name in _RANGES:
        # Overlaps nothing.
        yield "'empty'"
    elif type_name == "boolean":
        yield "not t.{column}"


def _keys(statements: TableStatements) -> list[sql.Identifier]:
    return [sql.Identifier(f"{_OURS} key {index}") for index in range(len(statements.relation.key))]


def _same(statements: TableStatements, staged: str = "s") -> sql.Composed:
    return sql.SQL(" and ").join(
        sql.SQL("blocked.{} = {}").format(key, statements.staged(field, staged))
        for key, field in zip(_keys(statements), statements.relation.key, strict=True)
    )


def _id(statements: TableStatements) -> sql.Composed:
    keys = zip(statements.relation.key, _keys(statements), strict=True)
    return record_id(
        statements.relation, {field: sql.SQL("blocked.{}").format(key) for field, key in keys}
    )
