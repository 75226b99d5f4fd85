"""Two durable servers and the databases that a benchmark runs in: a link of ours, and the same tables without it."""

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import yaml
from psycopg import sql

from benchmarks import cpu, processes
from sync_pipeline import install
from sync_pipeline.config import Config, load
from sync_pipeline.database import connected
from sync_pipeline.servers import Server, Setting

Connection = psycopg.Connection[tuple[Any, ...]]

NODES = ("crm", "billing")

# The backend, its database and its application_name begin each entry of a server's log.
LOG_LINE_PREFIX = "%p %d %a: "

# The same on both servers and for both rivals. Checkpoints are asked for between measurements, not met in them.
SETTINGS: dict[str, Setting] = {
    "wal_level": "logical",
    "shared_buffers": "256MB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    # For the profiles, which read the log.
    "log_line_prefix": LOG_LINE_PREFIX,
}


@dataclass
class Databases:
    """A database of one name on each server, with one open session in each, in autocommit mode."""

    name: str
    servers: dict[str, Server]
    dsns: dict[str, str]
    config_path: Path
    source: Connection
    target: Connection

    @property
    def sessions(self) -> tuple[Connection, Connection]:
        return self.source, self.target

    def config(self) -> Config:
        """The link's configuration, read as the program reads it."""
        return load(self.config_path, {})

    @contextmanager
    def consumer(self, *arguments: str) -> Iterator["Consumer"]:
        """Start the consumer in a process of its own, ready to run; it is killed if it has not ended."""
        command = [sys.executable, "-m", "benchmarks.consumer", str(self.config_path), *arguments]
        with processes.started(*command) as process:
            consumer = Consumer(process)
            consumer.expect("ready")
            yield consumer

    def sync(self) -> "Report":
        """Pass until nothing is pending, in a process of its own; the time of its start is not counted."""
        with self.consumer() as consumer:
            before = self.server_seconds()
            report = consumer.finish()
            return replace(report, server_seconds=self.server_seconds() - before)

    def server_seconds(self) -> float:
        """Return the processor time that both servers have used so far."""
        return cpu.of_servers(self.servers.values())

    def settle(self) -> None:
        """Let nothing that was left over disturb the next measurement."""
        for session in self.sessions:
            session.execute("checkpoint")

    def require_equal(self, tables: Iterable[str]) -> None:
        """Raise unless the tables hold the same rows on both nodes: a figure of wrong work is none."""
        for table in tables:
            statement = sql.SQL(
                "select count(*), sum(pg_catalog.hashtextextended(t::text, 0)) from {} as t"
            ).format(sql.Identifier(table))
            ours, theirs = (session.execute(statement).fetchone() for session in self.sessions)
            if ours != theirs:
                raise AssertionError(f"{self.name}.{table} differs: {ours} and {theirs}")


@dataclass(frozen=True, slots=True)
class Report:
    """What the consumer's process says of its run, and what both servers used meanwhile."""

    seconds: float
    cpu_seconds: float
    backend_seconds: dict[str, float]
    peak_mb: float
    passes: int
    directions: dict[str, dict[str, int]]
    server_seconds: float = 0.0

    @property
    def used(self) -> dict[str, float]:
        """Processor time by who used it: the consumer's process, each backend, and both servers altogether."""
        return {
            "consumer": self.cpu_seconds,
            **self.backend_seconds,
            "both servers": self.server_seconds,
        }


@dataclass(slots=True)
class Consumer:
    """A consumer in a process of its own."""

    process: processes.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    def expect(self, word: str) -> None:
        """Wait for a line of the consumer."""
        line = self.process.read_line()
        if line != word:
            raise RuntimeError(f"the consumer said {line!r} instead of {word!r}")

    def go(self) -> None:
        """Let it begin."""
        self.process.write_line("go")

    def finish(self) -> Report:
        """Let it begin if it waits, end if it streams, and read its report."""
        self.process.write_line("go")
        return Report(**json.loads(self.process.read_line()))


@dataclass(frozen=True, slots=True)
class Arena:
    """Two servers; make them with `opened`."""

    servers: dict[str, Server]
    directory: Path

    @contextmanager
    def without_autovacuum(self) -> Iterator[None]:
        """Leave vacuum to the measurement: otherwise it meets one contestant and not the other."""
        self._set_autovacuum("off")
        try:
            yield
        finally:
            self._set_autovacuum("on")

    def _set_autovacuum(self, value: LiteralString) -> None:
        for server in self.servers.values():
            with psycopg.connect(server.dsn(), autocommit=True) as session:
                session.execute(f"alter system set autovacuum = {value}")
                session.execute("select pg_reload_conf()")

    @contextmanager
    def databases(self, name: str, schema: str) -> Iterator[Databases]:
        """Create a database of the same tables and rows on both servers; drop both at the end."""
        with ExitStack() as exits:
            sessions = {}
            for node, server in self.servers.items():
                admin = exits.enter_context(psycopg.connect(server.dsn(), autocommit=True))
                admin.execute(f"create database {name}".encode())
                exits.callback(admin.execute, f"drop database {name} with (force)".encode())
                session = exits.enter_context(psycopg.connect(server.dsn(name), autocommit=True))
                session.execute(schema.encode())
                session.execute("vacuum analyze")
                sessions[node] = session
            yield Databases(
                name,
                self.servers,
                {node: server.dsn(name) for node, server in self.servers.items()},
                self.directory / f"{name}.yaml",
                *sessions.values(),
            )

    @contextmanager
    def link(
        self,
        name: str,
        schema: str,
        tables: Iterable[str | Mapping[str, Any]],
        **options: object,
    ) -> Iterator[Databases]:
        """As `databases`, with the pipeline installed; `tables` and `options` are as in `sync.yaml`."""
        with self.databases(name, schema) as databases:
            nodes = {node: {"dsn": dsn} for node, dsn in databases.dsns.items()}
            text = yaml.safe_dump(
                {"nodes": nodes, "tables": list(tables), **options}, sort_keys=False
            )
            databases.config_path.write_text(text, encoding="utf-8")
            config = databases.config()
            with (
                connected(config.first, config, "install") as one,
                connected(config.second, config, "install") as two,
            ):
                install.install(config, {config.first.name: one, config.second.name: two})
            yield databases


@contextmanager
def opened(version: int | None = None) -> Iterator[Arena]:
    """Start two servers; the end of the `with` block stops them and removes all they held."""
    with ExitStack() as exits:
        directory = Path(
            exits.enter_context(
                tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
            )
        )
        servers = {
            node: exits.enter_context(
                Server.create(directory / node, version, durable=True, settings=SETTINGS)
            )
            for node in NODES
        }
        yield Arena(servers, directory)
