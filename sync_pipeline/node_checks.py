"""What doctor looks for on one node: the server, the pipeline's own objects, and what waits in them."""

from collections.abc import Iterator
from typing import Any

from psycopg.rows import dict_row

from sync_pipeline import identity, install, locks, queries
from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.database import Connection, query
from sync_pipeline.errors import NotInstalled, SyncPipelineError, WrongDatabase
from sync_pipeline.records import Finding, counted, spelled

OLDEST_VERSION = 14
NEWEST_VERSION = 18
LONG_TRANSACTION_SECONDS = 600.0
OLD_SLOT_TRANSACTIONS = 1_000_000


def describe(config: Config, connection: Connection) -> dict[str, Any]:
    """Return what the two servers are compared by: version, encoding, whether installed."""
    return _row(connection, "examine_server", config.schema_name)


def examine(
    config: Config, node: NodeConfig, connection: Connection, server: dict[str, Any]
) -> Iterator[Finding]:
    """Yield what is wrong with one node; `server` is what `describe` returned for it."""
    name = node.name
    try:
        locks.refuse_shared_sessions(connection, node)
    except SyncPipelineError as error:
        yield Finding.of(error, "pooler", name)
    yield from _server(name, server)
    if not server["installed"]:
        if not server["may_create_schema"]:
            role = spelled(server["role"])
            yield Finding(
                "error",
                "rights",
                name,
                None,
                f"role {role} may not create schema {config.schema_name}",
                f"let the schema belong to the role that installs: create schema {spelled(config.schema_name)} "
                f"authorization {role}",
            )
        return
    lacking = list(_own_rights(config, name, connection, server))
    yield from lacking
    if lacking:
        return
    try:
        install.require(config, name, connection)
    except NotInstalled as error:
        yield Finding.of(error, "schema", name)
        return
    yield from _own_tables(config, name, connection, server)
    try:
        identity.require(config, name, connection)
    except WrongDatabase as error:
        yield Finding.of(error, "identity", name)
    yield from _vacuum(config, name, connection)
    yield from _waiting(config, name, connection)


def _server(node: str, server: dict[str, Any]) -> Iterator[Finding]:
    version = server["version"]
    if version < OLDEST_VERSION:
        yield Finding(
            "error",
            "version",
            node,
            None,
            f"PostgreSQL {version} is too old",
            f"upgrade to PostgreSQL {OLDEST_VERSION} or newer",
        )
    elif version > NEWEST_VERSION:
        yield Finding(
            "warning",
            "version",
            node,
            None,
            f"PostgreSQL {version} has not been tested",
            f"use PostgreSQL {OLDEST_VERSION} to {NEWEST_VERSION}, or run the tests on {version}",
        )
    if server["standby"]:
        yield Finding(
            "error",
            "read_only",
            node,
            None,
            "the server is a standby: nothing can be written",
            "let the dsn lead to the primary, with target_session_attrs=read-write",
        )
    elif server["read_only"]:
        yield Finding(
            "error",
            "read_only",
            node,
            None,
            "default_transaction_read_only is on for this role or database",
            "set it to off for the pipeline's role",
        )
    for schema in server["open_schemas"]:
        yield Finding(
            "warning",
            "search_path",
            node,
            None,
            f"everybody may create objects in schema {schema}, which role {server['role']} searches: "
            "a function or an operator that somebody put there could run with its rights",
            f"revoke create on schema {spelled(schema)} from public, as PostgreSQL 15 and newer have it",
        )
    if server["replication_role"] != "origin":
        yield Finding(
            "error",
            "replication_role",
            node,
            None,
            f"session_replication_role is {server['replication_role']}: foreign keys and triggers do not work",
            "reset it: alter role … reset session_replication_role, or the same for the database",
        )


def _own_rights(
    config: Config, node: str, connection: Connection, server: dict[str, Any]
) -> Iterator[Finding]:
    role = spelled(server["role"])
    grants = [row["lacking"] for row in _rows(connection, "examine_own_rights", config.schema_name)]
    if grants:
        yield Finding(
            "error",
            "rights",
            node,
            None,
            f"role {role} may not work with the pipeline's own tables in schema {config.schema_name}",
            "; ".join(f"{grant} to {role}" for grant in grants) + "; sql/roles.sql does all of it",
        )
    if not server["may_create_temporary"]:
        yield Finding(
            "error",
            "rights",
            node,
            None,
            f"role {role} may not create temporary tables, which records are staged in",
            f"grant temporary on database … to {role}",
        )


def _own_tables(
    config: Config, node: str, connection: Connection, server: dict[str, Any]
) -> Iterator[Finding]:
    tables = {
        row["name"]: row for row in _rows(connection, "examine_own_tables", config.schema_name)
    }
    options = dict(option.split("=", 1) for option in tables["sync_events"]["options"])
    events = f"{config.schema_name}.sync_events"
    if not server["autovacuum"]:
        yield Finding(
            "warning",
            "autovacuum",
            node,
            None,
            f"autovacuum is off on this server: acknowledged events stay in {events} as dead rows",
            "turn on autovacuum and track_counts, or vacuum the table often",
        )
    elif options.get("autovacuum_enabled") in {"false", "off", "0", "no"}:
        yield Finding(
            "warning",
            "autovacuum",
            node,
            None,
            f"autovacuum is off for {events}",
            f"alter table {events} reset (autovacuum_enabled)",
        )
    elif options.get("autovacuum_vacuum_scale_factor") is None:
        yield Finding(
            "warning",
            "autovacuum",
            node,
            None,
            f"{events} has lost its vacuum settings: with the server's it is vacuumed too late",
            f"alter table {events} set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000)",
        )


def _vacuum(config: Config, node: str, connection: Connection) -> Iterator[Finding]:
    remedies = {
        "session": "end it: select pg_terminate_backend({name})",
        "prepared transaction": "commit prepared or rollback prepared '{name}'",
        "replication slot": "let its client catch up, or drop it: select pg_drop_replication_slot('{name}')",
    }
    rows = _rows(
        connection,
        "examine_vacuum",
        config.schema_name,
        seconds=LONG_TRANSACTION_SECONDS,
        transactions=OLD_SLOT_TRANSACTIONS,
    )
    for row in rows:
        since = "" if row["seconds"] is None else f", open for {row['seconds']:.0f} s,"
        yield Finding(
            "warning",
            "vacuum",
            node,
            None,
            f"{row['kind']} {row['name']} of {row['owner']}{since} holds back vacuum: "
            f"{config.schema_name}.sync_events grows and passes slow down",
            remedies[row["kind"]].format(name=row["name"].replace("'", "''")),
        )


def _waiting(config: Config, node: str, connection: Connection) -> Iterator[Finding]:
    status = _row(connection, "read_status", config.schema_name)
    if status["paused_at"] is not None:
        yield Finding(
            "info",
            "paused",
            node,
            None,
            f"paused since {status['paused_at']:%Y-%m-%d %H:%M:%S %Z}",
            "run `sync-pipeline resume`",
        )
    if status["pending"]:
        yield Finding(
            "info",
            "backlog",
            node,
            None,
            f"{counted(status['pending'], 'event')} {'waits' if status['pending'] == 1 else 'wait'}, "
            f"the oldest for {status['oldest_seconds']:.0f} s",
            "run `sync-pipeline stream` or `sync`",
        )
    if status["dead"]:
        yield Finding(
            "warning",
            "failures",
            node,
            None,
            f"{counted(status['dead'], 'record')} {_be(status['dead'])} out of attempts",
            "look at `sync-pipeline failures`, mend the cause, then `failures retry`",
        )
    if status["conflicts_held"]:
        yield Finding(
            "warning",
            "conflicts",
            node,
            None,
            f"{counted(status['conflicts_held'], 'conflict')} {_be(status['conflicts_held'])} held",
            "decide them: `sync-pipeline conflicts resolve ID --winner NODE`",
        )


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def _row(connection: Connection, name: str, schema: str, **parameters: Any) -> dict[str, Any]:
    rows = _rows(connection, name, schema, **parameters)
    if not rows:
        raise SyncPipelineError(f"{name} found no row", remedy="run `sync-pipeline install`")
    return rows[0]


def _rows(
    connection: Connection, name: str, schema: str, **parameters: Any
) -> list[dict[str, Any]]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query(queries.get(name, schema)), parameters).fetchall()
