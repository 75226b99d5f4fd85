"""A pair whose owner, application and consumer are three roles, made by `sql/roles.sql`."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psycopg
from psycopg import sql

from sync_pipeline import queries
from tests.helpers import Node, Pair, Row

OWNER, APPLICATION, CONSUMER = "shop_owner", "shop_app", "sync_consumer"
ROLES = (OWNER, APPLICATION, CONSUMER)


def run_script(node: Node, tables: str = "accounts, users, orders") -> None:
    """Run `sql/roles.sql` with psql, as its first lines say."""
    values = {
        "owner": OWNER, "application": APPLICATION, "consumer": CONSUMER, "schemas": "public", "tables": tables,
    }  # fmt: skip
    variables = [part for name, value in values.items() for part in ("-v", f"{name}={value}")]
    file = queries.directory() / "roles.sql"
    done = subprocess.run(
        [node.server.bin("psql"), "-X", "-q", node.dsn, *variables, "-f", file],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "ERROR" not in done.stderr


@contextmanager
def separated(pair: Pair) -> Iterator[None]:
    """Give both nodes the three roles for a `with` block."""
    try:
        for node in pair.nodes:
            run_script(node)
        yield
    finally:
        for node in pair.nodes:
            drop(node, *ROLES)


def drop(node: Node, *roles: str) -> None:
    """Drop roles with all that they have in this database."""
    for role in roles:
        if node.rows("select from pg_roles where rolname = %s", role):
            name = sql.Identifier(role)
            node.connection.execute(sql.SQL("reassign owned by {} to postgres").format(name))
            node.connection.execute(sql.SQL("drop owned by {}").format(name))
            node.connection.execute(sql.SQL("drop role {}").format(name))


def as_role(node: Node, role: str) -> str:
    """The node's DSN for another role."""
    return psycopg.conninfo.make_conninfo(node.dsn, user=role)


def pair_of(pair: Pair, role: str) -> Pair:
    """The same pair, as another role sees it on both nodes."""
    crm, billing = (replace(node, dsn=as_role(node, role)) for node in pair.nodes)
    return replace(pair, crm=crm, billing=billing)


@contextmanager
def session(node: Node, role: str) -> Iterator[psycopg.Connection[Row]]:
    """A session of a role, every statement by itself."""
    with psycopg.connect(as_role(node, role), autocommit=True) as connection:
        yield connection
