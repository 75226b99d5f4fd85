"""A node that goes back in time: a replica that lacks the last commits takes over, or an old backup is restored."""

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import psycopg
import pytest

from sync_pipeline import stream
from sync_pipeline.config import load
from sync_pipeline.errors import ConnectionFailed
from sync_pipeline.servers import Server, Setting, _free_port
from tests.crashing import POINTS
from tests.engine import equal, installed, sync_pair
from tests.helpers import Cluster, Node, Pair, dsn_variable, write_config
from tests.program import run, succeed

REPLICATED: dict[str, Setting] = {"wal_level": "replica", "max_wal_senders": 4, "hot_standby": True}
WAIT_SECONDS = 60
# What the runbook says for the node that went back.
FORGET = (
    "delete from sync.sync_events; delete from sync.sync_failures; delete from sync.sync_applied"
)


class Replica(Server):
    """A streaming replica, made by pg_basebackup and started."""

    @classmethod
    def of(cls, primary: Server, directory: Path) -> Self:
        """Make one; it follows its primary until one of the two stops."""
        directory.mkdir()
        shutil.copymode(primary.directory, directory)
        shutil.chown(directory, primary.directory.owner(), primary.directory.group())
        replica = cls(directory, version=primary.version, port=_free_port(), durable=True)
        backup = primary._spawn(
            "pg_basebackup",
            *("--pgdata", replica.data_directory, "--checkpoint", "fast", "--wal-method", "stream"),
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


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True) as directory:
        path = Path(directory)
        # Servers run as a user of their own.
        path.chmod(0o711)
        yield path


@pytest.fixture
def own_crm(directory: Path, pg_version: int) -> Iterator[Node]:
    """The node crm on a durable server of its own, which can be replicated."""
    server = Server.create(directory / "crm", pg_version, durable=True, settings=REPLICATED)
    cluster = Cluster(server)
    node = Node("crm", server.dsn(cluster.clone()), server)
    yield node
    node.close()
    cluster.close()


@pytest.fixture
def pair(own_crm: Node, billing: Node, tmp_path: Path) -> Pair:
    return Pair(own_crm, billing, write_config(tmp_path / "sync.yaml"))


@contextmanager
def replaced(pair: Pair, server: Server) -> Iterator[Pair]:
    """The pair with crm on another server."""
    database = urlsplit(pair.crm.dsn).path.removeprefix("/")
    with closing(Node("crm", server.dsn(database), server)) as crm:
        yield Pair(crm, pair.billing, pair.config_path)


def add(node: Node, first: int, last: int) -> None:
    node.execute(
        "insert into accounts select g, 'account ' || g from generate_series(%s::int, %s::int) as g",
        first,
        last,
    )


def caught_up(primary: Node, replica: Server) -> None:
    """Return when the replica has everything."""
    end = primary.value("select pg_current_wal_flush_lsn()::text")
    with psycopg.connect(replica.dsn(), autocommit=True) as connection:
        for _ in range(WAIT_SECONDS * 20):
            row = connection.execute(
                "select pg_last_wal_replay_lsn() >= %s::pg_lsn", [end]
            ).fetchone()
            if row == (True,):
                return
            threading.Event().wait(0.05)
    raise AssertionError("the replica never caught up")


def last_id(node: Node) -> int:
    return int(node.value("select pg_sequence_last_value('sync.sync_events_id_seq')"))


def mend(pair: Pair) -> None:
    """Follow the runbook, section "After a restore"."""
    succeed(pair, "pause")
    pair.crm.execute(FORGET)
    assert run(pair, "verify").returncode == 1
    assert run(pair, "verify", "--repair-from", "billing").returncode in (0, 1)
    succeed(pair, "resume")
    sync_pair(pair)
    assert "equal" in succeed(pair, "verify")


def test_a_replica_that_lacks_the_last_commits_takes_over_and_ids_come_back(
    pair: Pair, directory: Path
) -> None:
    installed(pair)
    with Replica.of(pair.crm.server, directory / "replica") as replica:
        add(pair.crm, 1, 100)
        sync_pair(pair)
        caught_up(pair.crm, replica)
        replica.stop()
        # What the replica will never know; the consumer is cut off between the two commits of the last batch.
        add(pair.crm, 101, 300)
        cut_off = POINTS["before the source's delete"].struck_by(
            lambda: pair.crm.server.stop("immediate"), source="crm"
        )
        with cut_off, pytest.raises(ConnectionFailed, match="crm"):
            sync_pair(pair)
        assert len(pair.billing.rows("select from sync.sync_applied")) == 1
        replica.start()
        replica.promote()
        # One address list for both, as an application would have it: the consumer finds the new primary by itself.
        both = re.sub(
            r"@[^/]*", f"@127.0.0.1:{pair.crm.server.port},127.0.0.1:{replica.port}", pair.crm.dsn
        )
        dsns = pair.environment | {dsn_variable("crm"): f"{both}?target_session_attrs=read-write"}
        config = load(pair.config_path, dsns)
        with replaced(pair, replica) as pair:  # noqa: PLR1704 - from here on it is another server
            add(pair.crm, 1001, 1050)
            assert last_id(pair.crm) <= 300, "the ids did not come back"
            stream.sync(config)
            # New events with ids that the ledger knows: they were not taken for those of the lost batch.
            new = "select count(*) from accounts where id > 1000"
            assert pair.billing.value(new) == pair.crm.value(new) == 50
            assert pair.billing.rows("select * from sync.sync_applied") == []
            mend(pair)
            assert equal(pair)
            assert pair.crm.value("select count(*) from accounts") == 350


def test_a_node_is_restored_from_an_older_backup(pair: Pair, directory: Path) -> None:
    """A copy of the files of a server that was stopped without warning is a backup."""
    installed(pair)
    server = pair.crm.server
    add(pair.crm, 1, 100)
    sync_pair(pair)
    pair.crm.execute("update accounts set name = 'not sent before the backup' where id = 1")
    server.stop("immediate")
    backup = directory / "backup"
    _copy(server.data_directory, backup)
    server.start()
    with replaced(pair, server) as later:
        later.crm.execute("update accounts set name = 'later' where id <= 50")
        later.crm.execute("delete from accounts where id > 90")
        sync_pair(later)
        add(later.billing, 201, 250)
        later.billing.execute("update accounts set name = 'of billing' where id = 1")
        sync_pair(later)
        add(later.billing, 251, 260)
    server.stop("immediate")
    shutil.rmtree(server.data_directory)
    backup.rename(server.data_directory)
    server.start()
    with replaced(pair, server) as restored:
        assert restored.crm.pending() == 1
        mend(restored)
        assert equal(restored)
        assert restored.crm.rows("select name from accounts where id = 1") == [("of billing",)]
        assert restored.crm.value("select count(*) from accounts") == 150
        for node in restored.nodes:
            assert node.rows("select * from sync.sync_failures") == []
            node.execute(
                "update accounts set name = 'goes on' where id = %s", 2 if node.name == "crm" else 3
            )
        sync_pair(restored)
        assert equal(restored)


def _copy(source: Path, target: Path) -> None:
    """Copy a directory with its owner."""
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
