"""What sensors and checks ask the nodes. Cheap, and outside of any pass: nobody's lock is touched."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psycopg
from psycopg.rows import class_row

from sync_pipeline import catalog, install, locks, queries
from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.database import Connection, connected, in_words, query, scalar
from sync_pipeline.errors import CatalogMismatch, ConnectionFailed, NotInstalled, TableMissing
from sync_pipeline.views import TableStatus


@dataclass(frozen=True, slots=True)
class Glance:
    """What was seen: the nodes where changes wait, and what stands against applying them now, in words."""

    waiting: tuple[str, ...] = ()
    leader: str | None = None
    obstacle: str | None = None


def look(config: Config) -> Glance:
    """Ask whether a pass would find work: one short query for each node, a second where changes wait.

    Raises `ConnectionFailed`.
    """
    waiting = []
    leader = obstacle = None
    for node in config.nodes:
        try:
            with _asking(node, config) as connection:
                row = connection.execute(
                    query(queries.get("read_glance", config.schema_name))
                ).fetchone()
                if row is not None and row[1] is not None:
                    obstacle = (
                        f"paused on {node.name} since {row[1]:%Y-%m-%d %H:%M:%S %Z};"
                        " `sync-pipeline resume` ends that"
                    )
                if row is not None and row[0]:
                    waiting.append(node.name)
                    leader = leader or _leader(connection, config, node)
        except NotInstalled as error:
            return Glance(obstacle=str(error))
    return Glance(tuple(waiting), leader, obstacle)


def left_out(config: Config) -> str | None:
    """Say why a pass would leave out all that waits; None when it would not, or when only a run can tell.

    Reads both catalogs: for who is about to start a run. Raises `ConnectionFailed`.
    """
    with ExitStack() as exits:
        connections = {
            node.name: exits.enter_context(connected(node, config, "sensor"))
            for node in config.nodes
        }
        try:
            found, problems = catalog.inspect(config, connections, strict=False)
            if not found.tables or not all(isinstance(each, TableMissing) for each in problems):
                return None
            statement = query(queries.get("has_waiting_beside", config.schema_name))
            tables = {"tables": [each.table for each in problems]}
            if any(scalar(connection, statement, tables) for connection in connections.values()):
                return None
        except (CatalogMismatch, psycopg.Error):
            return None
    return "; ".join(map(str, problems)) or None


def leading(config: Config) -> str | None:
    """Say who leads, asking both nodes; None when nobody does. Raises `ConnectionFailed`, `NotInstalled`."""
    for node in config.nodes:
        with _asking(node, config) as connection:
            found = _leader(connection, config, node)
            if found is not None:
                return found
    return None


def table_statuses(config: Config) -> dict[str, dict[str, TableStatus]]:
    """Return the status of tables by node, as `node_statuses` does. Raises `ConnectionFailed`, `NotInstalled`."""
    return {node.name: node_statuses(config, node) for node in config.nodes}


def node_statuses(config: Config, node: NodeConfig) -> dict[str, TableStatus]:
    """Return the status of every synced table on a node, and of others that anything is noted of.

    Raises `ConnectionFailed`, `NotInstalled`.
    """
    with (
        _asking(node, config) as connection,
        connection.cursor(row_factory=class_row(TableStatus)) as cursor,
    ):
        rows = cursor.execute(query(queries.get("read_table_status", config.schema_name)))
        found = {row.table_name: row for row in rows}
    return {table.name: TableStatus(table.name) for table in config.tables} | found


def _leader(connection: Connection, config: Config, node: NodeConfig) -> str | None:
    found = locks.leader(connection, config)
    return f"{found} leads on {node.name}" if found is not None else None


@contextmanager
def _asking(node: NodeConfig, config: Config) -> Iterator[Connection]:
    """Connect for a few short queries; an error says which node it comes from, in one line."""
    with connected(node, config, "sensor") as connection:
        try:
            yield connection
        except psycopg.Error as error:
            if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn):
                # Says what is missing; asked only now, so that a tick costs one query.
                install.require(config, node.name, connection)
            raise ConnectionFailed(in_words(error), node=node.name) from error
