"""Which database a connection leads to, and whether it is the one that `install` noted for its node, as it was left.

A copy or a restore holds the events of another database, or of an older time: to consume them could undo what the
peer has. So nobody leads until an operator has confirmed it. A physical replica that took its primary's place and a
backup restored over its own cluster have the identity of what was there; which batches they know tells whether they
lack commits.
"""

import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from sync_pipeline import queries
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, query, scalar
from sync_pipeline.errors import WrongDatabase


@dataclass(frozen=True, slots=True)
class Identity:
    """A database of a cluster. `system_identifier` is None where the server does not tell it to this role."""

    system_identifier: str | None
    database_oid: int

    def may_be(self, other: "Identity") -> bool:
        """True unless something that is known of both differs."""
        clusters = {self.system_identifier, other.system_identifier} - {None}
        return self.database_oid == other.database_oid and len(clusters) < 2

    def __str__(self) -> str:
        return f"database {self.database_oid} of cluster {self.system_identifier or 'unknown'}"


@dataclass(frozen=True, slots=True)
class Noted:
    """What `install` noted: the node's name, its peer's, and which database it was."""

    node: str
    peer: str
    system_identifier: str | None
    database_oid: int

    @property
    def identity(self) -> Identity:
        """The database that was installed."""
        return Identity(self.system_identifier, self.database_oid)


@dataclass(frozen=True, slots=True)
class Batches:
    """The last batch that a node has applied, acknowledged and forgotten."""

    applied: int
    acknowledged: int
    forgotten: int


def read(connection: Connection) -> Identity:
    """Return which database this is; the connection must be in no transaction."""
    system_identifier = None
    # Some providers keep it to themselves. The database's own number is still compared.
    with suppress(psycopg.errors.InsufficientPrivilege):
        system_identifier = scalar(
            connection, query(queries.get("read_system_identifier", schema=""))
        )
    oid = scalar(connection, query(queries.get("read_database_oid", schema="")))
    return Identity(system_identifier, oid)


def noted(connection: Connection, schema: str) -> Noted | None:
    """Return what `install` noted in this database, None when it did not."""
    with connection.cursor(row_factory=class_row(Noted)) as cursor:
        return cursor.execute(query(queries.get("read_noted", schema))).fetchone()


def require(config: Config, node: str, connection: Connection) -> None:
    """Raise `WrongDatabase` unless this is the database that was installed as this node."""
    known = noted(connection, config.schema_name)
    if known is None:
        return
    peer = config.other(node).name
    if (known.node, known.peer) == (peer, node):
        raise WrongDatabase(
            f"the dsn leads to the database that was installed as {known.node}",
            node=node,
            remedy=f"exchange the dsns of {node} and {peer}",
        )
    if (known.node, known.peer) != (node, peer):
        raise WrongDatabase(
            f"this database was installed as {known.node} with the peer {known.peer}, not as {node} with {peer}",
            node=node,
            remedy=f"correct the dsn or the names in {config.file}; if a node was renamed on purpose: "
            "`sync-pipeline install --confirm-identity`",
        )
    here = read(connection)
    if not here.may_be(known.identity):
        raise WrongDatabase(
            f"this is not the database that was installed as {node} but a copy or a restore of it: "
            f"found {here}, expected {known.identity}",
            node=node,
            remedy="if it is a copy: drop its schema "
            f"{config.schema_name}; if it takes the other's place: see `After a restore` in docs/runbook.md, "
            "then `sync-pipeline install --confirm-identity`",
        )


def require_commits(config: Config, connections: Mapping[str, Connection]) -> None:
    """Raise `WrongDatabase` when a node lacks what it had committed, as far as the other one knows."""
    first, second = config.nodes
    # A consumer may be at work. The numbers only grow: what a node has is read after what the other one knows of.
    known, found, again = (
        _batches(config, connections[node.name]) for node in (first, second, first)
    )
    if known is None or found is None or again is None:
        return
    for node, peer, here, there in ((second, first, found, known), (first, second, again, found)):
        for what, has, knows in (
            ("acknowledged", here.acknowledged, there.forgotten),
            ("applied", here.applied, there.acknowledged),
        ):
            if has < knows:
                raise WrongDatabase(
                    f"lost commits: it has {what} batch {has}, {peer.name} knows of {knows}; "
                    "a replica that lagged took its place, or it was restored",
                    node=node.name,
                    remedy="see `After a failover` in docs/runbook.md, then `sync-pipeline install --confirm-identity`",
                )


def _batches(config: Config, connection: Connection) -> Batches | None:
    with connection.cursor(row_factory=class_row(Batches)) as cursor:
        return cursor.execute(query(queries.get("read_batches", config.schema_name))).fetchone()


def refuse_one_database(config: Config, connections: Mapping[str, Connection]) -> None:
    """Raise `WrongDatabase` when both dsns lead to the same database."""
    first, second = (connections[node.name] for node in config.nodes)
    key = secrets.randbits(62)
    with first.transaction():
        first.execute("select pg_catalog.pg_advisory_xact_lock(%s)", [key])
        # Whoever shares the database with the holder of a lock that nobody else knows does not get it.
        free = scalar(second, b"select pg_catalog.pg_try_advisory_xact_lock(%(key)s)", {"key": key})
    if not free:
        raise WrongDatabase(
            f"the dsns of {config.first.name} and {config.second.name} lead to the same database",
            remedy="correct one of them",
        )


def confirmation(config: Config, node: str, connection: Connection) -> list[str]:
    """Return the statements that make this database the node's, none if it is already; never of exchanged dsns."""
    try:
        require(config, node, connection)
    except WrongDatabase:
        known = noted(connection, config.schema_name)
        if known is None or known.node == config.other(node).name:
            raise
    else:
        return []
    here = read(connection)
    schema, peer = config.schema_name, config.other(node).name
    statements = [
        sql.SQL(
            "update {} set node = {}, peer = {}, system_identifier = {}, database_oid = {}"
        ).format(
            sql.Identifier(schema, "sync_node"),
            node,
            peer,
            here.system_identifier,
            here.database_oid,
        )
    ]
    if known.peer != peer:
        statements.append(
            sql.SQL("update {} set source = {}").format(
                sql.Identifier(schema, "sync_applied"), peer
            )
        )
    return [statement.as_string(None) for statement in statements]
