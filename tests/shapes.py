"""Tables of any shape on both nodes, and what is in them to the byte."""

from typing import Any

from psycopg import sql

from sync_pipeline.config import Config
from tests.engine import installed, sync_pair
from tests.helpers import Node, Pair, write_config


def link(
    pair: Pair, ddl: str | tuple[str, str], *tables: str | dict[str, Any], **options: object
) -> Config:
    """Create tables (the same on both nodes, or first's and second's) and install the pipeline for them alone."""
    for node, statements in zip(
        pair.nodes, (ddl, ddl) if isinstance(ddl, str) else ddl, strict=True
    ):
        node.execute(statements)
    write_config(pair.config_path, tables, **options)
    return installed(pair)


def texts(node: Node, table: str, columns: str = "") -> list[str]:
    """The rows of a table, or some columns of them, as text that loses nothing; ordered."""
    row = f"row({columns})" if columns else "t.*"
    query = sql.SQL(f"select ({row})::text from {{}} as t").format(
        sql.Identifier(*table.split("."))
    )
    return sorted(text for (text,) in node.connection.execute(query))


def failures(node: Node) -> list[tuple[Any, ...]]:
    """Table, record, SQLSTATE and message of what could not be applied from here."""
    return node.rows(
        "select table_name, record_id, error_class, error from sync.sync_failures order by 1, 2"
    )


def marked(node: Node) -> list[tuple[str, str]]:
    """Table and record of the events that wait on a node, without repetitions."""
    return node.rows("select distinct table_name, record_id from sync.sync_events order by 1, 2")


def converge(pair: Pair, *tables: str, columns: str = "") -> None:
    """Sync; then the tables are the same text on both nodes, nothing failed and nothing is left to send."""
    sync_pair(pair)
    for node in pair.nodes:
        assert failures(node) == [], node.name
        assert marked(node) == [], node.name
    for table in tables:
        assert texts(pair.crm, table, columns) == texts(pair.billing, table, columns), table
