"""Who leads: a session advisory lock of each node, held by the connection that writes there.

Never the blocking form. Whoever loses the lock has lost the connection and can no longer write: that is the fence.
A second connection may write beside the first, under a second lock. It begins only while the first has its lock, and
nobody takes that one while somebody has the second: so it is inside the fence as well.
"""

from dataclasses import dataclass
from datetime import datetime

import psycopg
from psycopg.rows import class_row

from sync_pipeline import queries
from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.database import Connection, query, scalar
from sync_pipeline.errors import LockTaken, PassInterrupted, PoolerRefused


@dataclass(frozen=True, slots=True)
class Leader:
    """The session that holds a node's lock."""

    pid: int
    application_name: str | None
    client_address: str | None
    backend_start: datetime | None

    def __str__(self) -> str:
        since = f" since {self.backend_start:%Y-%m-%d %H:%M:%S %Z}" if self.backend_start else ""
        return f"backend {self.pid} from {self.client_address or 'a local socket'}{since}"


def take(connection: Connection, config: Config, node: str) -> Leader:
    """Take a node's lock for the life of this connection. Raises `LockTaken` at once when another has it."""
    taken = scalar(
        connection,
        query(queries.get("take_lock", config.schema_name)),
        {"schema": config.schema_name},
    )
    holder = leader(connection, config)
    if not taken or holder is None:
        raise LockTaken(
            f"another consumer leads: {holder or 'it has just left'}",
            node=node,
            remedy="wait for it, or stop it; only one works at a time",
        )
    return holder


def take_second(connection: Connection, first: Leader, config: Config, node: str) -> None:
    """Take a node's second lock for the life of this connection, beside the session that has the first.

    Raises `PassInterrupted` unless that one still leads, here, after the second lock was taken.
    """
    taken = scalar(
        connection,
        query(queries.get("take_second_lock", config.schema_name)),
        {"schema": config.schema_name},
    )
    if not taken or leader(connection, config) != first:
        raise PassInterrupted("the writer has lost its lock", node=node)


def release(connection: Connection, config: Config) -> None:
    """Give back what locks of the node this connection has."""
    connection.execute(query(queries.get("release_locks", config.schema_name)))


def leader(connection: Connection, config: Config) -> Leader | None:
    """Return who holds the node's lock, or None."""
    with connection.cursor(row_factory=class_row(Leader)) as cursor:
        return cursor.execute(
            query(queries.get("read_leader", config.schema_name)), {"schema": config.schema_name}
        ).fetchone()


def refuse_shared_sessions(connection: Connection, node: NodeConfig) -> None:
    """Raise `PoolerRefused` when the connection runs through a pooler that hands its session to other clients.

    A direct connection talks to the backend it was told of. Where it does not, a second client is opened while this
    one is idle: if it meets the same backend, sessions are shared.
    """
    mine = scalar(connection, b"select pg_catalog.pg_backend_pid()")
    if mine == connection.info.backend_pid:
        return
    for _ in range(3):
        with psycopg.connect(
            node.dsn.get_secret_value(), autocommit=True, connect_timeout=10
        ) as second:
            row = second.execute("select pg_catalog.pg_backend_pid()").fetchone()
        again = scalar(connection, b"select pg_catalog.pg_backend_pid()")
        if (row is not None and row[0] == mine) or again != mine:
            raise PoolerRefused(
                "the connection runs through a pooler in transaction mode, where no lock lasts",
                node=node.name,
            )
