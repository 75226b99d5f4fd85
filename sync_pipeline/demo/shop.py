"""Two databases of one small shop, `crm` and `billing`, on two embedded servers and linked by a `sync.yaml`.

The demo speaks to them as applications and operators do: in plain SQL, through sessions of its own.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg

from sync_pipeline import config, install, locks
from sync_pipeline.config import Config
from sync_pipeline.database import connected
from sync_pipeline.servers import Server

TABLES = ("accounts", "users", "orders")
# An ordinary role that owns the tables and may create a schema: the pipeline needs no more.
ROLE = "shop"

_TABLES_SQL: LiteralString = """
create table accounts (
    id integer primary key,
    name text not null,
    plan text not null default 'basic'
);
create table users (
    id integer primary key,
    account_id integer not null references accounts on delete cascade,
    email text not null unique,
    name text not null
);
create table orders (
    id integer primary key,
    user_id integer not null references users on delete cascade deferrable,
    amount numeric(12, 2) not null,
    note text
);
create index on users (account_id);
create index on orders (user_id);
"""
# billing is the stricter of the two: one day it refuses what crm allows.
_BILLING_SQL: LiteralString = (
    "alter table orders add constraint orders_within_limit check (amount <= 1000)"
)

_YAML = """\
nodes:
  crm:     {dsn: "${CRM_DSN}"}
  billing: {dsn: "${BILLING_DSN}"}
tables: [accounts, users, orders]
# Long enough that a record which is refused waits for the operator of the demo.
retry: {base_seconds: 300}
"""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the live table shows of one node."""

    node: str
    rows: dict[str, int]
    pending: int
    failures: int
    conflicts: int


@dataclass(frozen=True)
class Application:
    """One node as its application sees it: a session in which every statement commits by itself."""

    name: str
    dsn: str
    connection: psycopg.Connection[tuple[Any, ...]]

    def execute(self, statement: LiteralString, parameters: Sequence[object] = ()) -> int:
        """Run a statement; return how many rows it wrote or found."""
        return self.connection.execute(statement, parameters or None).rowcount

    def rows(
        self, statement: LiteralString, parameters: Sequence[object] = ()
    ) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        return self.connection.execute(statement, parameters or None).fetchall()

    def value(self, statement: LiteralString, parameters: Sequence[object] = ()) -> Any:
        """Return the first column of the first row."""
        return self.rows(statement, parameters)[0][0]

    @contextmanager
    def transaction(self) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        """Open another session with a transaction that ends without a commit unless the block commits it."""
        with closing(psycopg.connect(self.dsn, application_name="shop")) as connection:
            yield connection

    def observe(self) -> Observation:
        """Count what there is and what waits."""
        accounts, users, orders, pending, failures, conflicts = self.rows(
            "select (select count(*) from accounts), (select count(*) from users), "
            "(select count(*) from orders), pending, retrying + dead, conflicts_24h from sync.sync_status"
        )[0]
        counts = dict(zip(TABLES, (accounts, users, orders), strict=True))
        return Observation(self.name, counts, pending, failures, conflicts)

    def content(self) -> tuple[Any, ...]:
        """Return a fingerprint of every row of the three tables."""
        return self.rows(
            "select (select md5(string_agg(t::text, '|' order by id)) from accounts as t), "
            "(select md5(string_agg(t::text, '|' order by id)) from users as t), "
            "(select md5(string_agg(t::text, '|' order by id)) from orders as t)"
        )[0]


@dataclass(frozen=True)
class Shop:
    """The two nodes and what a consumer needs to link them. Make one with `opened`."""

    crm: Application
    billing: Application
    servers: dict[str, Server]
    directory: Path
    config_path: Path

    @property
    def nodes(self) -> tuple[Application, Application]:
        """Both nodes, in the order of the configuration."""
        return self.crm, self.billing

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the configuration reads."""
        return {"CRM_DSN": self.crm.dsn, "BILLING_DSN": self.billing.dsn}

    @property
    def config(self) -> Config:
        """The configuration, read as every command reads it."""
        return config.load(self.config_path, os.environ | self.environment)

    def install(self) -> int:
        """Install capture on both nodes; return how many statements it took."""
        link = self.config
        with (
            connected(link.first, link, "install") as first,
            connected(link.second, link, "install") as second,
        ):
            return len(install.install(link, {link.first.name: first, link.second.name: second}))

    def leader(self, node: Application) -> int | None:
        """Return the backend that holds a node's lock, or None."""
        found = locks.leader(node.connection, self.config)
        return found.pid if found else None

    def is_equal(self) -> bool:
        """True when both nodes hold the same rows."""
        return self.crm.content() == self.billing.content()


@contextmanager
def opened(directory: Path) -> Iterator[Shop]:
    """Start both servers, create the databases and their tables, and stop the servers at the end of the block."""
    path = directory / "sync.yaml"
    path.write_text(_YAML, encoding="utf-8")
    with ExitStack() as stack:
        servers = _start(directory, stack)
        nodes = {}
        for name, server in servers.items():
            with psycopg.connect(server.dsn(), autocommit=True) as admin:
                admin.execute("create role shop login")
                admin.execute(
                    "create database crm owner shop"
                    if name == "crm"
                    else "create database billing owner shop"
                )
            dsn = server.dsn(name, ROLE)
            connection = stack.enter_context(
                closing(psycopg.connect(dsn, autocommit=True, application_name="shop"))
            )
            connection.execute(_TABLES_SQL)
            nodes[name] = Application(name, dsn, connection)
        nodes["billing"].execute(_BILLING_SQL)
        yield Shop(nodes["crm"], nodes["billing"], servers, directory, path)


def _start(directory: Path, stack: ExitStack) -> dict[str, Server]:
    def start(name: str) -> Server:
        # Durable: the demo kills consumers, and a server that forgot a commit would prove nothing.
        server = Server.create(directory / name, durable=True)
        stack.callback(server.stop)
        return server

    names = ("crm", "billing")
    with ThreadPoolExecutor(len(names)) as executor:
        return dict(zip(names, executor.map(start, names), strict=True))
