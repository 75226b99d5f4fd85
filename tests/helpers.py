"""The verbs and nouns that tests are written in."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg
import yaml
from psycopg import sql

from sync_pipeline.servers import Server

NODES = ("crm", "billing")
TABLES = ("accounts", "users", "orders")
TEMPLATE = "sync_template"

# Three levels of parents and dependents; identical on both nodes.
SCHEMA = """
create table accounts (
    id int primary key,
    name text not null,
    plan text,
    updated_at timestamptz
);
create table users (
    id int primary key,
    account_id int not null references accounts on delete cascade,
    email text not null unique,
    name text,
    age int check (age >= 0)
);
create table orders (
    id bigint primary key,
    user_id int not null references users on delete cascade,
    amount numeric(12, 2) not null,
    note text
);
create index on users (account_id);
create index on orders (user_id);
"""

LOOK_SECONDS = 0.05

Row = tuple[Any, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """One of the two databases, as its application sees it. Every statement commits by itself."""

    name: str
    dsn: str
    server: Server
    _exits: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def connect(self, *, autocommit: bool = True) -> psycopg.Connection[Row]:
        """Open a session of its own; the caller closes it."""
        return psycopg.connect(self.dsn, autocommit=autocommit)

    @cached_property
    def connection(self) -> psycopg.Connection[Row]:
        """The session that the verbs below share, in autocommit mode."""
        return self._exits.enter_context(self.connect())

    def execute(self, statement: str, *args: object) -> psycopg.Cursor[Row]:
        """Run SQL; `%s` stand for the arguments."""
        return self.connection.execute(statement.encode(), args or None)

    def rows(self, table_or_sql: str, *args: object) -> list[Row]:
        """The rows of a query, or those of a table in the order of its first column."""
        if " " in table_or_sql.strip():
            return self.execute(table_or_sql, *args).fetchall()
        query = sql.SQL("select * from {} order by 1").format(_identifier(table_or_sql))
        return self.connection.execute(query).fetchall()

    def value(self, statement: str, *args: object) -> Any:
        """The first column of the first row."""
        row = self.execute(statement, *args).fetchone()
        assert row is not None, f"no row: {statement}"
        return row[0]

    def insert(self, table: str, **values: object) -> None:
        """Insert one row."""
        query = sql.SQL("insert into {} ({}) values ({})").format(
            _identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, values)),
            sql.SQL(", ").join(map(sql.Placeholder, values)),
        )
        self.connection.execute(query, values)

    def pending(self) -> int:
        """How many events wait on this node."""
        return int(self.value("select count(*) from sync.sync_events"))

    def close(self) -> None:
        """Close the shared session."""
        self._exits.close()


@dataclass(frozen=True)
class Pair:
    """Two databases of the same schema, and the configuration that links them."""

    crm: Node
    billing: Node
    config_path: Path

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.crm, self.billing

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the configuration reads."""
        return {dsn_variable(node.name): node.dsn for node in self.nodes}


@contextmanager
def encoded(pair: Pair, *, crm: str, billing: str) -> Iterator[Pair]:
    """Yield a pair of empty databases of these encodings on the servers of another pair."""
    with ExitStack() as exits:
        nodes = []
        for node, encoding in zip(pair.nodes, (crm, billing), strict=True):
            name = f"{node.connection.info.dbname}_{encoding}"
            node.execute(
                f"create database {name} template template0 encoding {encoding} locale 'C'"
            )
            exits.callback(node.execute, f"drop database {name} with (force)")
            dsn = psycopg.conninfo.make_conninfo(
                node.dsn, dbname=name, options="-c client_encoding=utf8"
            )
            nodes.append(exits.enter_context(closing(Node(node.name, dsn, node.server))))
        yield replace(pair, crm=nodes[0], billing=nodes[1])


class Cluster:
    """A server of one node with the template that the databases of its tests are cloned from."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._numbers = count(1)
        self._admin = psycopg.connect(server.dsn(), autocommit=True)
        self._admin.execute(f"create database {TEMPLATE}".encode())
        with psycopg.connect(server.dsn(TEMPLATE)) as connection:
            connection.execute(SCHEMA.encode())
            # As PostgreSQL 15 and newer have it.
            connection.execute("revoke create on schema public from public")
        self._admin.execute(f"alter database {TEMPLATE} allow_connections false".encode())

    def clone(self) -> str:
        """Create a database with the tables of SCHEMA, all empty, and return its name."""
        name = f"test_{next(self._numbers)}"
        # Less than half the time of writing each page to the WAL, and all that older versions can do.
        strategy = "strategy file_copy" if self.server.version >= 15 else ""
        self._admin.execute(f"create database {name} template {TEMPLATE} {strategy}".encode())
        return name

    def drop(self, name: str) -> None:
        """Drop a database with everybody in it."""
        if self._admin.closed or self._admin.broken or not self.server.is_running:
            self._reconnect()
        try:
            self._drop(name)
        except psycopg.OperationalError:
            # The test restarted the server, and this session does not know yet.
            self._reconnect()
            self._drop(name)

    def close(self) -> None:
        """Close the session and stop the server."""
        self._admin.close()
        self.server.stop("immediate")

    def _drop(self, name: str) -> None:
        self._admin.execute(f"drop database if exists {name} with (force)".encode())

    def _reconnect(self) -> None:
        self._admin.close()
        self.server.start()
        self._admin = psycopg.connect(self.server.dsn(), autocommit=True)


class Clusters:
    """The servers of this worker, two for each PostgreSQL version asked for, kept until the `with` block ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[tuple[int, str], Cluster] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for cluster in self._found.values():
            cluster.close()

    def get(self, version: int, node: str) -> Cluster:
        """The cluster of a node; the first call for a version starts those of both nodes, at the same time."""
        if (version, node) not in self._found:
            with ThreadPoolExecutor(len(NODES)) as executor:
                clusters = executor.map(lambda name: self._create(version, name), NODES)
                self._found |= {
                    (version, name): cluster for name, cluster in zip(NODES, clusters, strict=True)
                }
        return self._found[version, node]

    def _create(self, version: int, node: str) -> Cluster:
        return Cluster(Server.create(self._directory / f"{node}-{version}", version))


def eventually(what: str, look: Callable[[], T], seconds: float = 60.0) -> T:
    """Look until something true is seen and return it; fail with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds: {what}"
        time.sleep(LOOK_SECONDS)
    return seen


def dsn_variable(node: str) -> str:
    """The environment variable that `write_config` lets a node's DSN be read from."""
    return f"{node.upper()}_DSN"


def shift_clock(node: Node, interval: str) -> None:
    """Give this database another clock than its server. Existing defaults keep the old one: call before `install`."""
    with node.connection.transaction():
        # Under a new name, because the executor knows the built-in one by its number.
        node.execute("set local allow_system_table_mods = on")
        node.execute("alter function pg_catalog.clock_timestamp() rename to server_clock")
        node.execute(
            "create function pg_catalog.clock_timestamp() returns timestamptz language sql volatile "
            f"return pg_catalog.server_clock() + interval '{interval}'"
        )


def write_config(
    path: Path, tables: Iterable[str | dict[str, Any]] = TABLES, **options: object
) -> Path:
    """Write a `sync.yaml` for crm and billing; `tables` and `options` are as in the file."""
    config: dict[str, Any] = {
        "nodes": {node: {"dsn": f"${{{dsn_variable(node)}}}"} for node in NODES},
        "tables": list(tables),
        **options,
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def _identifier(table: str) -> sql.Identifier:
    parts: Sequence[str] = table.split(".")
    return sql.Identifier(*parts)
