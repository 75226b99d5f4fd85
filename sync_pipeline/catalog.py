"""What both nodes' catalogs say about the synced tables: keys, columns, foreign keys, and the order they ask for."""

import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from typing import Any, TypeVar

from psycopg.rows import dict_row

from sync_pipeline import capture, conditions, queries
from sync_pipeline.config import Config, FrozenMap, TableConfig
from sync_pipeline.database import Connection, query
from sync_pipeline.errors import CatalogMismatch, ConditionRefused, RightsLacking, TableMissing
from sync_pipeline.records import Column, ForeignKey, Relation, spelled

_TABLE_KINDS = {"r", "p"}

M = TypeVar("M", bound=CatalogMismatch)


@dataclass(frozen=True)
class Catalog:
    """The synced tables on both nodes. `order` lists components (cycles together), parents first."""

    relations: Mapping[str, Mapping[str, Relation]]
    order: tuple[tuple[str, ...], ...]
    parents: frozenset[str]
    referenced: frozenset[str]
    # Those with values, other than their key, that rows follow when they change.
    followed: frozenset[str]
    warnings: tuple[str, ...] = ()
    # Tables that cannot be synced now, and why.
    left_out: Mapping[str, str] = FrozenMap()

    def relation(self, node: str, table: str) -> Relation:
        """Return a table as `node` has it."""
        return self.relations[node][table]

    @property
    def tables(self) -> tuple[str, ...]:
        """All synced tables, parents first."""
        return tuple(table for component in self.order for table in component)


def read(
    config: Config,
    connections: Mapping[str, Connection],
    *,
    strict: bool = False,
    forgive: type[CatalogMismatch] | None = None,
    only: Collection[str] | None = None,
) -> Catalog:
    """Read both catalogs, one query each. Raises `CatalogMismatch` for the first table that cannot be synced.

    Who works with some tables `only` does not care for others, which may be missing from the catalog.

    Columns that only one side has are left out with a warning; with `strict` (install, doctor) they are an error.
    Tables with a problem of the kind to `forgive` are left out as well, unless that is every table. A consumer forgives
    some kind: for it alone, a table that its role may not read and write is a problem, and one that is not captured a
    warning.
    """
    catalog, problems = inspect(config, connections, strict=strict, consuming=forgive is not None)
    if only is not None:
        problems = [each for each in problems if each.table in only]
    fatal = [each for each in problems if forgive is None or not isinstance(each, forgive)]
    if problems and (fatal or not catalog.tables):
        raise (fatal or problems)[0]
    return replace(
        catalog,
        warnings=(*catalog.warnings, *(f"{problem}: left out" for problem in problems)),
        left_out={problem.table: problem.problem for problem in problems if problem.table},
    )


def inspect(
    config: Config,
    connections: Mapping[str, Connection],
    *,
    strict: bool = True,
    consuming: bool = False,
) -> tuple[Catalog, list[CatalogMismatch]]:
    """Like `read`, but return every problem found, with the catalog of the tables that have none."""
    with ThreadPoolExecutor(len(config.nodes)) as pool:
        asked = {
            node.name: pool.submit(_rows, config, node.name, connections[node.name])
            for node in config.nodes
        }
    rows = {node: each.result() for node, each in asked.items()}
    relations: dict[str, dict[str, Relation]] = {node.name: {} for node in config.nodes}
    problems: list[CatalogMismatch] = []
    warnings: list[str] = []
    for index, table in enumerate(config.tables):
        found = {node.name: rows[node.name][index] for node in config.nodes}
        try:
            both = _relations(config, index, table, found, warnings, strict=strict)
            if consuming:
                for node, row in found.items():
                    _require_rights(_Place(config, index, table.name, node), table, row)
                    if table.sends(node):
                        warnings += _uncaptured(config, both[node], row)
            for node, relation in both.items():
                _check_condition(
                    _Place(config, index, table.name, node), connections[node], relation
                )
        except CatalogMismatch as problem:
            problems.append(problem)
            continue
        for node, relation in both.items():
            relations[node][table.name] = relation
    _link_foreign_keys(config, relations, rows)
    names = [table.name for table in config.tables if table.name in relations[config.first.name]]
    order = _order(names, relations)
    references = {
        (table, key.parent)
        for by_table in relations.values()
        for table, relation in by_table.items()
        for key in relation.foreign_keys
    }
    children = {table for table, parent in references if table != parent}
    catalog = Catalog(
        relations=relations,
        order=order,
        parents=frozenset(table for table in names if table not in children),
        referenced=frozenset(parent for _, parent in references),
        followed=frozenset(
            key.parent
            for by_table in relations.values()
            for relation in by_table.values()
            for key in relation.foreign_keys
            if key.moves_with(by_table[key.parent])
        ),
        warnings=tuple(warnings),
    )
    return catalog, problems


def _rows(config: Config, node: str, connection: Connection) -> list[dict[str, Any]]:
    names = [table.relation(node) for table in config.tables]
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(
            query(queries.get("read_catalog", config.schema_name)),
            {
                "schemas": [schema for schema, _ in names],
                "names": [name for _, name in names],
                "own_schema": config.schema_name,
                "functions": [capture.function_name(table.name) for table in config.tables],
            },
        ).fetchall()


def _relations(
    config: Config,
    index: int,
    table: TableConfig,
    found: dict[str, dict[str, Any]],
    warnings: list[str],
    *,
    strict: bool,
) -> dict[str, Relation]:
    columns: dict[str, dict[str, Column]] = {}
    keys: dict[str, tuple[str, ...]] = {}
    for node, row in found.items():
        place = _Place(config, index, table.name, node)
        _require_fit(table, node, row, place)
        columns[node] = _columns(table, node, row, place)
        keys[node] = _key(table, row, columns[node], place)
    names = {(node, column["name"]) for node, row in found.items() for column in row["columns"]}
    for field in table.exclude:
        if not any((node, table.column(node, field)) in names for node in found):
            text = f"`exclude` names {field}, which neither node has"
            if strict:
                raise _Place(config, index, table.name, None).problem(
                    text, f"correct it in {config.file}: a column of another name is synced"
                )
            warnings.append(f"{table.name}: {text}")
    first, second = (node.name for node in config.nodes)
    if set(keys[first]) != set(keys[second]):
        raise _Place(config, index, table.name, None).problem(
            f"the key is {_list(keys[first])} on {first} but {_list(keys[second])} on {second}",
            "give both tables the same primary key, or name a unique constraint of both as `key`",
        )
    key = keys[first]
    for field in key:
        ours, theirs = columns[first][field], columns[second][field]
        if ours.equality != theirs.equality:
            raise _Place(config, index, table.name, None).problem(
                f"key column {ours.name} is {ours.formatted_type} on {first} and {theirs.formatted_type} on {second}:"
                " keys that are equal on one node are not on the other",
                "give the key the same type and collation on both nodes",
            )
    shared = [field for field in columns[first] if field in columns[second]]
    missing = {
        node: tuple(field for field in columns[other] if field not in columns[node])
        for node, other in ((first, second), (second, first))
    }
    for node, other in ((first, second), (second, first)):
        for field in missing[node]:
            text = f"column {table.column(other, field)} of {other} does not exist here"
            mapped = [f for f in columns[node] if f != field and table.column(node, f) == field]
            if mapped:
                text = f"field {field} has no column here: column {field} is mapped to field {mapped[0]}"
            if strict:
                raise _Place(config, index, table.name, node).problem(
                    text,
                    f"add the column on {node}, map it under `columns`, or list {field} in `exclude`",
                )
            warnings.append(f"{table.name}: {node}: {text}: not synced")
    fields = [*key, *(field for field in shared if field not in key)]
    return {
        node: Relation(
            table=table.name,
            node=node,
            oid=row["oid"],
            schema=row["schema_name"],
            name=row["table_name"],
            key=key,
            columns={field: columns[node][field] for field in fields},
            key_is_deferrable=_key_is_deferrable(row, table, node, key),
            deferrable_constraints=row["deferrable_constraints"],
            foreign_keys=(),
            partitions=tuple((schema, name) for schema, name in row["partitions"]),
            where=table.where(node),
            shape=row["shape"],
            missing_fields=missing[node],
            uncarried=_uncarried(table, node, row),
        )
        for node, row in found.items()
    }


def _require_fit(table: TableConfig, node: str, row: dict[str, Any], place: "_Place") -> None:
    """Raise unless the relation of a node is there and of a kind that can be synced."""
    config = place.config
    if row["oid"] is None:
        shown = ".".join(filter(None, table.relation(node)))
        raise place.missing(
            f"table {shown} does not exist",
            f"create it, give its new name as `{node}: {{table: …}}` in {config.file} (`name` stays: events that wait "
            "have it), or grant this role usage on its schema",
        )
    shown = f"{row['schema_name']}.{row['table_name']}"
    if row["kind"] not in _TABLE_KINDS:
        raise place.problem(
            f"{shown} is not a table", "only ordinary and partitioned tables can be synced"
        )
    if row["is_partition"]:
        # A statement that names the partitioned table fires no statement trigger of its partitions.
        raise place.problem(
            f"{shown} is a partition", "sync the partitioned table that it belongs to"
        )
    if row["inherits"]:
        raise place.problem(
            f"{shown} inherits from a table or is inherited from",
            "use partitions instead of inheritance, or leave the table out",
        )
    if row["row_security"]:
        raise place.problem(
            f"row-level security can hide rows of {shown}",
            "connect as the table's owner (without FORCE ROW LEVEL SECURITY) or as a role with BYPASSRLS",
        )
    if row["rule"] and table.sends(config.other(node).name):
        raise place.problem(
            f"PostgreSQL refuses what the pipeline writes to a table with a rule, such as {row['rule']}",
            "make a trigger of the rule",
        )


def _require_rights(place: "_Place", table: TableConfig, row: dict[str, Any]) -> None:
    receives = table.sends(place.config.other(place.node or "").name)
    lacking = [right for right in row["lacking"] or () if right == "select" or receives]
    if lacking:
        rights, shown = ", ".join(lacking), spelled(row["schema_name"], row["table_name"])
        raise place.lacking(
            f"the pipeline's role lacks the right to {rights} on {shown}",
            f"grant {rights} on {shown} to it",
        )


def _uncaptured(config: Config, relation: Relation, row: dict[str, Any]) -> Iterable[str]:
    shown = spelled(relation.schema, relation.name)
    problem = None
    if row["captures"] < len(capture.EVENTS) * (1 + len(relation.partitions)):
        where = f"{shown} or a partition of it" if relation.partitions else shown
        problem = f"triggers on {where} are missing or disabled: changes are not marked"
    elif row["capture_body"] != capture.body(relation, config.schema_name):
        problem = f"triggers on {shown} are of another configuration or version: some changes may not be marked"
    if problem is not None:
        yield (
            f"{relation.table}: {relation.node}: {problem}; "
            f"run `sync-pipeline install`, then `doctor` and `verify {relation.table}`"
        )


def _check_condition(place: "_Place", connection: Connection, relation: Relation) -> None:
    if relation.where is None:
        return
    said = conditions.fault(connection, relation.schema, relation.name, relation.where)
    if said is not None:
        raise place.refused(
            f"the condition in `where` cannot be used: {said}",
            "write one SQL condition on the columns of this node, as it would stand after WHERE",
        )


def _columns(
    table: TableConfig, node: str, row: dict[str, Any], place: "_Place"
) -> dict[str, Column]:
    mapped = table.sides[node].columns if node in table.sides else {}
    fields = {column: field for field, column in mapped.items()}
    columns = {}
    names = {column["name"] for column in row["columns"]}
    for field, column in mapped.items():
        if column not in names:
            raise place.problem(
                f"column {column}, mapped from {field}, does not exist",
                f"correct `columns` in {place.config.file}",
            )
    for column in row["columns"]:
        field = fields.get(column["name"], column["name"])
        if column["generated"] or field in table.exclude:
            continue
        if field in mapped and column["name"] not in fields:
            # Another column holds the field of this name.
            continue
        if re.search("[{}%]", column["type"]):
            raise place.problem(
                f"column {column['name']} has the type {column['type']}, whose name has a brace or a percent sign",
                "rename the type, or exclude the column",
            )
        columns[field] = Column(
            name=column["name"],
            type_name=column["type"],
            formatted_type=column["formatted"],
            domain=column["domain"],
            not_null=column["not_null"],
            identity=column["identity"],
            collation=column["collation"],
        )
    return columns


def _uncarried(table: TableConfig, node: str, row: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns that are never carried, without those of a domain, which may not become null."""
    excluded = {table.column(node, field) for field in table.exclude}
    return tuple(
        column["name"]
        for column in row["columns"]
        if (column["generated"] or column["name"] in excluded) and column["domain"] is None
    )


def _key(
    table: TableConfig, row: dict[str, Any], columns: dict[str, Column], place: "_Place"
) -> tuple[str, ...]:
    by_name = {column.name: field for field, column in columns.items()}
    usable = [index for index in row["unique_indexes"] if index["plain"]]
    if table.key is None:
        primary = next((index for index in usable if index["primary"]), None)
        if primary is None:
            raise place.problem(
                "the table has no primary key",
                "add a primary key, or name the columns of a unique constraint as `key`",
            )
        absent = [name for name in primary["columns"] if name not in by_name]
        if absent:
            raise place.problem(
                f"key column {absent[0]} is excluded or generated, and the key must be synced",
                f"take it out of `exclude` in {place.config.file}, "
                "or name the columns of another unique constraint as `key`",
            )
        return tuple(by_name[name] for name in primary["columns"])
    for field in table.key:
        if field not in columns:
            raise place.problem(
                f"key field {field} does not exist", f"correct `key` in {place.config.file}"
            )
        if not columns[field].not_null:
            raise place.problem(f"key field {field} allows null", "make the column NOT NULL")
    wanted = {columns[field].name for field in table.key}
    if not any(set(index["columns"]) == wanted for index in usable):
        raise place.problem(
            f"{_list(table.key)} is not unique",
            "add a unique constraint on exactly these columns, or name another `key`",
        )
    return table.key


def _key_is_deferrable(
    row: dict[str, Any], table: TableConfig, node: str, key: tuple[str, ...]
) -> bool:
    wanted = {table.column(node, field) for field in key}
    matching = [i for i in row["unique_indexes"] if i["plain"] and set(i["columns"]) == wanted]
    return all(index["deferrable"] for index in matching)


def _link_foreign_keys(
    config: Config, relations: dict[str, dict[str, Relation]], rows: dict[str, list[dict[str, Any]]]
) -> None:
    for node, by_table in relations.items():
        tables_by_oid = {relation.oid: relation for relation in by_table.values()}
        # The columns that follow from what travels.
        known = {
            relation.table: {column.name for column in relation.columns.values()}
            for relation in by_table.values()
        }
        for table, row in zip(config.tables, rows[node], strict=True):
            if table.name in known:
                known[table.name].update(c["name"] for c in row["columns"] if c["generated"])
        for index, table in enumerate(config.tables):
            relation = by_table.get(table.name)
            if relation is None:
                continue
            keys = []
            for reference in rows[node][index]["foreign_keys"]:
                parent = tables_by_oid.get(reference["parent"])
                if parent is None:
                    continue
                key = ForeignKey(
                    child=(reference["schema"], reference["table"]),
                    columns=tuple(reference["columns"]),
                    fields=_fields(relation, reference["columns"]),
                    parent=parent.table,
                    parent_columns=tuple(reference["parent_columns"]),
                    parent_fields=_fields(parent, reference["parent_columns"]),
                    collations=tuple(
                        None if name is None else (name[0], name[1])
                        for name in reference["collations"]
                    ),
                    follows=reference["follows"],
                )
                # An excluded column is each node's own affair, but for a delete that would take rows along.
                if reference["cascades"] or (
                    known[table.name].issuperset(key.columns)
                    and known[key.parent].issuperset(key.parent_columns)
                ):
                    keys.append(key)
            by_table[table.name] = replace(relation, foreign_keys=tuple(keys))


def _fields(relation: Relation, columns: Iterable[str]) -> tuple[str, ...]:
    by_name = {column.name: field for field, column in relation.columns.items()}
    names = list(columns)
    return tuple(by_name[name] for name in names) if all(name in by_name for name in names) else ()


def _order(
    tables: list[str], relations: dict[str, dict[str, Relation]]
) -> tuple[tuple[str, ...], ...]:
    """Order tables parents first; tables that reach each other form one component."""
    parents: dict[str, set[str]] = {table: set() for table in tables}
    for by_table in relations.values():
        for table, relation in by_table.items():
            parents[table] |= {key.parent for key in relation.foreign_keys if key.parent != table}
    reach = {table: set(direct) for table, direct in parents.items()}
    for middle in tables:
        for table in tables:
            if middle in reach[table]:
                reach[table] |= reach[middle]
    component = {
        table: tuple(
            other
            for other in tables
            if other == table or (other in reach[table] and table in reach[other])
        )
        for table in tables
    }
    sorter: TopologicalSorter[tuple[str, ...]] = TopologicalSorter()
    for table in tables:
        above = {component[parent] for parent in parents[table]} - {component[table]}
        sorter.add(component[table], *above)
    return tuple(sorter.static_order())


@dataclass(frozen=True)
class _Place:
    config: Config
    index: int
    table: str
    node: str | None

    def missing(self, text: str, remedy: str) -> TableMissing:
        return self._of(TableMissing, text, remedy)

    def refused(self, text: str, remedy: str) -> ConditionRefused:
        return self._of(ConditionRefused, text, remedy)

    def lacking(self, text: str, remedy: str) -> RightsLacking:
        return self._of(RightsLacking, text, remedy)

    def problem(self, text: str, remedy: str) -> CatalogMismatch:
        return self._of(CatalogMismatch, text, remedy)

    def _of(self, kind: type[M], text: str, remedy: str) -> M:
        return kind(
            text,
            node=self.node,
            table=self.table,
            file=str(self.config.path) if self.config.path else None,
            place=f"tables[{self.index}] ({self.table})",
            remedy=remedy,
        )


def _list(names: Iterable[str]) -> str:
    return "(" + ", ".join(names) + ")"
