"""An operator's decision on a conflict: settles a held one, or undoes an automatic one. Both are ordinary changes."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql
from psycopg.errors import ForeignKeyViolation, RestrictViolation
from psycopg.rows import dict_row

from sync_pipeline import catalog, install, queries
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, error_class, in_words, query
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.records import Relation, spelled
from sync_pipeline.statements import TableStatements, Whose


@dataclass(frozen=True, slots=True)
class Resolution:
    """What was done: on which node the record was marked or rewritten, so that the next pass carries it over."""

    conflict_id: int
    table_name: str
    record_id: str
    winner: str
    changed_node: str | None


def resolve(
    config: Config,
    connections: Mapping[str, Connection],
    conflict_id: int,
    winner: str,
    node: str | None = None,
) -> Resolution:
    """Let `winner`'s row win a conflict. Each node numbers its own: `node` says whose number is meant.

    A held conflict: the other node forgets its change, the winner's is sent; what the other node has changed since the
    last pass is a conflict of its own. A decided one whose winner was another: the losing row is written back from the
    log on the node that has the log, as a change that then syncs; whatever became of the record since is overwritten.
    Raises `SyncPipelineError` for an unknown number or node, for a number that both nodes have when `node` is not
    given, for a table that the node with the change does not send, and where a constraint forbids the change; then
    nothing is changed.
    """
    names = [node.name for node in config.nodes]
    if winner not in names:
        raise SyncPipelineError(
            f"unknown node {winner!r}", remedy=f"name one of {', '.join(names)}"
        )
    for name in names:
        install.require(config, name, connections[name])
    node, conflict = _find(config, connections, conflict_id, node)
    table, record_id = conflict["table_name"], conflict["record_id"]
    key = {"table_name": table, "record_id": record_id}
    settled = Resolution(conflict_id, table, record_id, winner, None)
    if conflict["winner"] == winner:
        return settled
    changed = winner if conflict["resolved_at"] is None else node
    if any(each.name == table and not each.sends(changed) for each in config.tables):
        raise SyncPipelineError(
            f"{table} is not synced from {changed}, which would have to send the row",
            node=node,
            remedy="let the other node win, or write the row on the other node by hand",
        )
    if conflict["resolved_at"] is None:
        loser = config.other(winner).name
        # The loser first: a crash in between leaves the winner's record held, and the same command finishes it.
        _run(config, connections[loser], "release_record", key)
        with connections[winner].transaction():
            _run(config, connections[winner], "release_record", key)
            _run(
                config,
                connections[winner],
                "mark_records",
                {"table_name": table, "event_type": "update", "record_ids": [record_id]},
            )
    else:
        relation = catalog.read(config, connections, only=[table]).relation(node, table)
        whose: Whose = "local" if winner == node else "remote"
        fields = conflict[f"{whose}_fields"]
        try:
            # Without the consumer's setting: captured like any change of an application.
            with connections[node].transaction():
                if fields is None:
                    connections[node].execute(_delete(relation, record_id))
                else:
                    _write(config, connections[node], relation, fields, conflict_id, whose)
        except (ForeignKeyViolation, RestrictViolation) as error:
            raise _refused(relation, record_id, error, deleted=fields is None) from error
        except psycopg.Error as error:
            if error_class(error) != "data":
                raise
            raise SyncPipelineError(
                f"{table} {record_id} cannot be {'deleted' if fields is None else 'written'}: {in_words(error)}",
                node=node,
                remedy="change what stands in the way, such as the record that has its unique value, "
                "then resolve again; or write the row by hand",
            ) from error
    for side in config.nodes:
        _run(
            config,
            connections[side.name],
            "resolve_conflicts",
            {**key, "id": conflict_id if side.name == node else None, "winner": winner},
        )
    return Resolution(conflict_id, table, record_id, winner, changed)


def _find(
    config: Config, connections: Mapping[str, Connection], conflict_id: int, node: str | None
) -> tuple[str, dict[str, Any]]:
    statement = query(queries.get("read_conflict", config.schema_name))
    found: dict[str, dict[str, Any]] = {}
    for name in [node] if node is not None else [side.name for side in config.nodes]:
        with connections[name].cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(statement, {"id": conflict_id}).fetchone()
        if row is not None:
            found[name] = row
    if not found:
        raise SyncPipelineError(
            f"no conflict has the number {conflict_id}",
            node=node,
            remedy="see `sync-pipeline conflicts list`",
        )
    if len(found) > 1:
        meant = ", ".join(
            f"{row['table_name']} {row['record_id']} on {name}" for name, row in found.items()
        )
        raise SyncPipelineError(
            f"both nodes have a conflict {conflict_id}: {meant}",
            remedy="say which is meant with --node",
        )
    return found.popitem()


def _run(config: Config, connection: Connection, name: str, parameters: dict[str, Any]) -> None:
    connection.execute(query(queries.get(name, config.schema_name)), parameters)


def _delete(relation: Relation, record_id: str) -> sql.Composed:
    values = json.loads(record_id) if len(relation.key) > 1 else [record_id]
    columns = [relation.columns[field] for field in relation.key]
    return sql.SQL("delete from {} where {}").format(
        sql.Identifier(relation.schema, relation.name),
        sql.SQL(" and ").join(
            sql.SQL("{} = {}::" + column.type_name).format(sql.Identifier(column.name), value)
            for column, value in zip(columns, values, strict=True)
        ),
    )


def _refused(
    relation: Relation, record_id: str, error: psycopg.Error, *, deleted: bool
) -> SyncPipelineError:
    """Say which record a foreign key keeps from being deleted or written, and because of which table."""
    said = error.diag
    cannot = f"{relation.table} {record_id} cannot be {'deleted' if deleted else 'written'}"
    if not deleted and (said.schema_name, said.table_name) == (relation.schema, relation.name):
        return SyncPipelineError(
            f"{cannot}: a row that it refers to is missing ({said.constraint_name})",
            node=relation.node,
            remedy="bring that row back first, then resolve again",
        )
    return SyncPipelineError(
        f"{cannot}: rows of {spelled(said.schema_name or '', said.table_name or '')} refer to it",
        node=relation.node,
        remedy="delete or move those rows first, then resolve again",
    )


def _write(
    config: Config,
    connection: Connection,
    relation: Relation,
    fields: Collection[str],
    conflict_id: int,
    whose: Whose,
) -> None:
    """Make a record what a logged row says, in the columns that were logged. No value leaves the database."""
    logged = {
        field: column
        for field, column in relation.columns.items()
        if field in fields or field in relation.key
    }
    # A table of the application that had this name would be hidden from its triggers.
    statements = TableStatements(replace(relation, columns=logged), "sync_pipeline_resolved")
    connection.execute(statements.create_stage)
    connection.execute(statements.stage_logged(config.schema_name, whose), {"id": conflict_id})
    parts, count = statements.upsert(0, "known", of_all=False)
    connection.execute(
        sql.SQL("with {} select {}").format(sql.SQL(", ").join(parts), count),
        {"first": 1, "last": 1},
    )
    connection.execute(statements.drop_stage)
