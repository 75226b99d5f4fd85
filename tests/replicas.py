"""A server that can be replicated, and its physical replicas."""

import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

import psycopg

from sync_pipeline.servers import Server, Setting, _free_port
from tests.helpers import Cluster, Node

REPLICATED: dict[str, Setting] = {"wal_level": "replica", "max_wal_senders": 4, "hot_standby": True}
WAIT_SECONDS = 60


class Replica(Server):
    """A streaming replica, made by pg_basebackup and started."""

    @classmethod
    def of(cls, primary: Server, directory: Path, slot: str | None = None) -> Self:
        """Make one; it follows its primary, by a slot if one is named, until one of the two stops."""
        directory.mkdir()
        shutil.copymode(primary.directory, directory)
        shutil.chown(directory, primary.directory.owner(), primary.directory.group())
        replica = cls(directory, version=primary.version, port=_free_port(), durable=True)
        backup = primary._spawn(
            "pg_basebackup",
            *("--pgdata", replica.data_directory, "--checkpoint", "fast", "--wal-method", "stream"),
            *(("--create-slot", "--slot", slot) if slot else ()),
            *("--write-recovery-conf", "--dbname", primary.dsn()),
        )
        assert backup.wait(WAIT_SECONDS) == 0
        replica.start()
        return replica

    def promote(self) -> None:
        """Let it be a primary; return when it is."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            row = connection.execute(f"select pg_promote(true, {WAIT_SECONDS})".encode()).fetchone()
        assert row == (True,)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory for servers, whose path is short enough for their sockets."""
    with tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True) as directory:
        path = Path(directory)
        # Servers run as a user of their own.
        path.chmod(0o711)
        yield path


@contextmanager
def replicable(
    directory: Path, version: int, settings: Mapping[str, Setting] | None = None
) -> Iterator[Node]:
    """The node crm on a durable server of its own, which can be replicated."""
    server = Server.create(
        directory / "crm", version, durable=True, settings={**REPLICATED, **(settings or {})}
    )
    with (
        closing(Cluster(server)) as cluster,
        closing(Node("crm", server.dsn(cluster.clone()), server)) as node,
    ):
        yield node


def until(node: Node | Server, condition: str, *args: object) -> None:
    """Return when a query of a node or a server is true."""
    dsn = node.dsn if isinstance(node, Node) else node.dsn()
    with psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(WAIT_SECONDS * 20):
            if connection.execute(f"select {condition}".encode(), args).fetchone() == (True,):
                return
            threading.Event().wait(0.05)
    message = f"never true: {condition}"
    raise AssertionError(message)
