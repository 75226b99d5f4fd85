"""What doctor looks for in the synced tables, beyond what `catalog` must have to sync them at all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from psycopg.rows import dict_row

from sync_pipeline import install, queries, sequences
from sync_pipeline.catalog import Catalog
from sync_pipeline.column_types import narrowing
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, query
from sync_pipeline.errors import NotInstalled
from sync_pipeline.records import Column, Finding, Relation, spelled

Level = Literal["error", "warning", "info"]
_ON_DELETE = {"c": "delete cascade", "n": "set null", "d": "set default"}


def examine(
    config: Config, connections: Mapping[str, Connection], found: Catalog
) -> Iterator[Finding]:
    """Yield what is wrong or risky with tables that exist on both nodes and have a key."""
    for node in config.nodes:
        connection = connections[node.name]
        relations = {relation.oid: relation for relation in found.relations[node.name].values()}
        is_installed = _is_installed(config, node.name, connection)
        for row in _rows(connection, "examine_tables", config.schema_name, list(relations)):
            relation = relations[row["oid"]]
            yield from _rights(config, relation, row, is_installed=is_installed)
            yield from _shape(config, relation, row)
        if is_installed:
            sent = [
                each for each in relations.values() if config.table(each.table).sends(node.name)
            ]
            yield from _captures(config, connection, sent)
        broken = _broken(config, node.name, connection, found)
        rows = _rows(connection, "examine_foreign_keys", config.schema_name, list(relations))
        for row in rows:
            if broken.isdisjoint((row["child"], row["parent"])):
                yield _foreign_key(relations, row)
    yield from _types(config, connections, found)
    yield from _sequences(config, connections, found)


def _broken(config: Config, node: str, connection: Connection, found: Catalog) -> frozenset[str]:
    """Return the tables that have an error of their own, as `regclass` spells them: they are to be synced."""
    names = [
        table.relation(node) for table in config.tables if table.name not in found.relations[node]
    ]
    rows = connection.execute(
        "select to_regclass(concat_ws('.', quote_ident(schema), quote_ident(name)))::text "
        "from unnest(%s::text[], %s::text[]) as given (schema, name)",
        [[schema for schema, _ in names], [name for _, name in names]],
    )
    return frozenset(name for (name,) in rows)


def _finding(level: Level, check: str, relation: Relation, message: str, remedy: str) -> Finding:
    return Finding(level, check, relation.node, relation.table, message, remedy)


def _shown(relation: Relation) -> str:
    return spelled(relation.schema, relation.name)


def _rights(
    config: Config, relation: Relation, row: dict[str, Any], *, is_installed: bool
) -> Iterator[Finding]:
    table = config.table(relation.table)
    sends, receives = table.sends(relation.node), table.sends(config.other(relation.node).name)
    shown = _shown(relation)
    lacking = [right for right in row["lacking"] if right == "select" or receives]
    if lacking:
        yield _finding(
            "error",
            "rights",
            relation,
            f"the pipeline's role lacks the right to {', '.join(lacking)} on {shown}",
            f"grant {', '.join(lacking)} on {shown} to it",
        )
    # Once the triggers are there, a consumer need not own the table.
    if sends and not row["owned"] and not is_installed:
        yield _finding(
            "error",
            "rights",
            relation,
            f"the pipeline's role does not own {shown}, so it cannot create triggers there",
            "run install as the owner, or make the role a member of it",
        )
    if relation.row_security:
        yield _finding(
            "error",
            "row_security",
            relation,
            f"row-level security may hide rows of {shown}, and a hidden row looks deleted",
            "use a role that owns the table without FORCE ROW LEVEL SECURITY, or has BYPASSRLS",
        )


def _shape(config: Config, relation: Relation, row: dict[str, Any]) -> Iterator[Finding]:
    table = config.table(relation.table)
    receives = table.sends(config.other(relation.node).name)
    shown = _shown(relation)
    columns = relation.columns.values()
    for column in columns:
        in_key = column in [relation.columns[field] for field in relation.key]
        if column.identity == "a" and not in_key and receives:
            yield _finding(
                "warning",
                "identity_column",
                relation,
                f"column {column.name} is generated always as identity: an update of it cannot be applied",
                f"alter table {shown} alter column {spelled(column.name)} set generated by default, or exclude it",
            )
        if in_key and not column.collation_is_deterministic:
            yield _finding(
                "warning",
                "collation",
                relation,
                f"key column {column.name} has a nondeterministic collation: one key may be written in two ways",
                "write keys in one form, or give the column a deterministic collation",
            )
    if row["generated_columns"]:
        yield _finding(
            "info",
            "generated_column",
            relation,
            f"not synced, because each node computes them: {', '.join(row['generated_columns'])}",
            "nothing to do if the expressions are equal on both nodes",
        )
    if relation.node in table.conditions and not table.sends(relation.node):
        yield _finding(
            "info",
            "where",
            relation,
            f"the condition of {relation.node} in `where` has no effect: this table is sent from {table.source} alone",
            "nothing to do, or remove the condition",
        )
    carried = {column.name for column in columns}
    required = [name for name in row["required_columns"] if name not in carried]
    if required and receives:
        yield _finding(
            "error",
            "column",
            relation,
            f"columns that are not synced are NOT NULL without a default: {', '.join(required)}",
            "give them a default or let them be null, or new records of the other node cannot be inserted",
        )
    if relation.key_is_deferrable:
        yield _finding(
            "warning",
            "deferrable",
            relation,
            f"the constraint of the key ({', '.join(relation.key)}) is deferrable: a record that "
            "both nodes insert at the same moment fails once and is tried again",
            "make the constraint NOT DEFERRABLE",
        )
    if row["deferrable_uniques"]:
        yield _finding(
            "info",
            "deferrable",
            relation,
            f"deferrable constraints are checked at the end of a batch: {', '.join(row['deferrable_uniques'])}",
            "nothing to do",
        )
    for name in row["rewriting_triggers"]:
        if receives:
            yield _finding(
                "warning",
                "rewriting",
                relation,
                f"trigger {name} may rewrite rows that the pipeline writes, and the nodes then differ",
                "let it leave rows alone while current_setting('sync_pipeline.applying', true) = "
                f"'{config.schema_name}', or exclude the columns that it sets",
            )
    if row["unlogged"]:
        yield _finding(
            "warning",
            "unlogged",
            relation,
            f"{shown} is unlogged: a crash of the server empties it, and no event says so",
            f"alter table {shown} set logged",
        )


def _captures(
    config: Config, connection: Connection, relations: Sequence[Relation]
) -> Iterator[Finding]:
    for relation, problem in install.missing_captures(config, connection, relations):
        disabled = problem.endswith("is disabled")
        yield _finding(
            "error",
            "capture",
            relation,
            f"{problem}: changes are not marked",
            f"alter table … enable trigger …, then backfill {relation.table} or verify it"
            if disabled
            else f"run `sync-pipeline install`, then verify {relation.table}",
        )


def _foreign_key(relations: Mapping[int, Relation], row: dict[str, Any]) -> Finding:
    if row["child_oid"] is not None:
        return _finding(
            "warning",
            "foreign_key",
            relations[row["child_oid"]],
            f"{row['name']} refers to {row['parent']}, which is not synced: "
            "records whose parent is missing on this node fail",
            f"sync {row['parent']} too, or keep its rows equal by other means",
        )
    relation = relations[row["parent_oid"]]
    if row["on_delete"] in _ON_DELETE:
        return _finding(
            "warning",
            "foreign_key",
            relation,
            f"a delete that is applied here reaches rows of {row['child']}, which is not synced: "
            f"{row['name']} says ON {_ON_DELETE[row['on_delete']].upper()}",
            f"sync {row['child']} too, or let the key say ON DELETE RESTRICT",
        )
    return _finding(
        "warning",
        "foreign_key",
        relation,
        f"a delete of the other node fails while rows of {row['child']}, which is not synced, "
        f"refer to the record by {row['name']}",
        f"sync {row['child']} too, or delete its rows before",
    )


def _types(
    config: Config, connections: Mapping[str, Connection], found: Catalog
) -> Iterator[Finding]:
    labels = {
        node.name: {
            (row["oid"], row["column_name"]): row["labels"]
            for row in _rows(
                connections[node.name],
                "examine_enums",
                config.schema_name,
                [relation.oid for relation in found.relations[node.name].values()],
            )
        }
        for node in config.nodes
    }
    for source, target in config.directions:
        for table, relation in found.relations[target.name].items():
            if not config.table(table).sends(source.name):
                continue
            origin = found.relations[source.name][table]
            for field, column in relation.columns.items():
                theirs = origin.columns[field]
                yield from _type(relation, source.name, theirs, column)
                mine = labels[target.name].get((relation.oid, column.name))
                given = labels[source.name].get((origin.oid, theirs.name), [])
                lacking = [] if mine is None else [label for label in given if label not in mine]
                if lacking:
                    yield _finding(
                        "warning",
                        "enum",
                        relation,
                        f"the type of {column.name} lacks labels of {source.name}: {', '.join(lacking)}",
                        "; ".join(
                            f"alter type {column.formatted_type} add value '{label.replace(chr(39), chr(39) * 2)}'"
                            for label in lacking
                        ),
                    )


def _type(relation: Relation, source: str, theirs: Column, mine: Column) -> Iterator[Finding]:
    problem = narrowing(theirs, mine)
    shown = f"{theirs.name} of {source} is {theirs.formatted_type}, {mine.name} here is {mine.formatted_type}"
    if problem == "other":
        yield _finding(
            "error",
            "type",
            relation,
            f"{shown}: another kind of type",
            "give both columns the same type, or exclude the field",
        )
    elif problem == "narrower":
        yield _finding(
            "warning",
            "type",
            relation,
            f"{shown}: not every value fits",
            f"alter table {_shown(relation)} alter column {spelled(mine.name)} type {theirs.formatted_type}",
        )
    if mine.not_null and not theirs.not_null:
        yield _finding(
            "warning",
            "type",
            relation,
            f"{mine.name} here is NOT NULL, {theirs.name} of {source} is not: a null fails",
            "make both columns NOT NULL, or neither",
        )


def _sequences(
    config: Config, connections: Mapping[str, Connection], found: Catalog
) -> Iterator[Finding]:
    for risk in sequences.sequences_at_risk(config, connections, found):
        one, two = risk.sequence, risk.peer
        relation = found.relation(one.node, one.table)
        if two is None:
            yield _finding(
                "warning",
                "sequence",
                relation,
                f"{one.shown} gives {one.field} = {one.next_value} next, but values up to {one.taken} are taken",
                sequences.interleaving(risk, first=one.node == config.first.name),
            )
        else:
            mirrored = sequences.Risk(two, one)
            yield Finding(
                "warning",
                "sequence",
                None,
                one.table,
                f"{one.shown} of {one.node} and {two.shown} of {two.node} give {one.field} the same values: "
                "two different records will share a key",
                f"on {one.node}: {sequences.interleaving(risk, first=True)}; "
                f"on {two.node}: {sequences.interleaving(mirrored, first=False)}",
            )


def _is_installed(config: Config, node: str, connection: Connection) -> bool:
    try:
        install.require(config, node, connection)
    except NotInstalled:
        return False
    return True


def _rows(connection: Connection, name: str, schema: str, oids: list[int]) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query(queries.get(name, schema)), {"oids": oids}).fetchall()
