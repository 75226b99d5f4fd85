"""Servers that stop without warning and connections that are cut, at every point of a pass.

The consumer lives on here; `test_crashes.py` kills it at the same points.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sync_pipeline import ledger, passes, stream
from sync_pipeline.config import Config
from sync_pipeline.errors import PassInterrupted
from sync_pipeline.link import lead
from sync_pipeline.servers import Server, Setting
from tests.bookkeeping import assert_each_write_had_its_effect_once, go_on, keep_books, work
from tests.crashing import POINTS, Point
from tests.engine import equal, installed
from tests.helpers import NODES, Cluster, Node, Pair, write_config

CONNECTIONS = [("crm", "writer"), ("crm", "reader"), ("billing", "writer"), ("billing", "reader")]


@pytest.fixture(scope="module")
def durable_clusters(server_directory: Path, pg_version: int) -> Iterator[list[Cluster]]:
    """Two servers that keep what they committed when they are stopped without warning."""
    with ExitStack() as exits:
        clusters = []
        for name in NODES:
            # A folder of its own each time: tests of a module need not come one after the other.
            directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=server_directory)) / "server"
            # What was committed without waiting for the disk is not there before somebody asks for it.
            settings: dict[str, Setting] = {"wal_writer_delay": "10s"}
            server = Server.create(directory, pg_version, durable=True, settings=settings)
            clusters.append(Cluster(server))
            exits.callback(clusters[-1].close)
        yield clusters


@pytest.fixture
def durable_pair(durable_clusters: list[Cluster], tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as exits:
        nodes = []
        for name, cluster in zip(NODES, durable_clusters, strict=True):
            database = cluster.clone()
            exits.callback(cluster.drop, database)
            nodes.append(Node(name, cluster.server.dsn(database), cluster.server))
            exits.callback(nodes[-1].close)
        crm, billing = nodes
        yield Pair(crm, billing, write_config(tmp_path / "sync.yaml"))


def prepared(pair: Pair) -> Config:
    """Install on tables that keep books."""
    keep_books(pair)
    return installed(pair)


def reconnected(pair: Pair) -> Pair:
    """The pair with new sessions: the old ones were lost with their server."""
    for node in pair.nodes:
        node.close()
    crm, billing = (Node(node.name, node.dsn, node.server) for node in pair.nodes)
    return Pair(crm, billing, pair.config_path)


@pytest.mark.parametrize("victim", NODES)
@pytest.mark.parametrize("point", POINTS)
def test_a_server_stops_without_warning(durable_pair: Pair, point: str, victim: str) -> None:
    """As the source of one direction and the target of the other; it comes back, and the same consumer goes on."""
    config = prepared(durable_pair)
    pair = durable_pair
    server = getattr(pair, victim).server
    for first, source in zip((10, 20), NODES, strict=True):
        work(pair, first)
        interruptions: list[Exception] = []

        def interrupted(error: Exception, _: float) -> None:
            nonlocal pair
            interruptions.append(error)  # noqa: B023
            if not server.is_running:
                server.start()
                pair = reconnected(pair)
                go_on(pair, first)  # noqa: B023

        with POINTS[point].struck_by(lambda: server.stop("immediate"), source=source):
            stream.sync(config, stream.Listener(interrupted=interrupted))
        assert interruptions, "nobody noticed"
    with closing(pair.crm), closing(pair.billing):
        assert_each_write_had_its_effect_once(pair, 10, 20)


@pytest.mark.parametrize("point", POINTS)
def test_a_connection_is_cut(pair: Pair, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the four that a consumer always has, in each direction; there are several batches to apply."""
    monkeypatch.setattr(stream, "FIRST_BACKOFF_SECONDS", 0.02)
    write_config(pair.config_path, batch_size=7)
    config = prepared(pair)
    cuts = [(source, *connection) for source in NODES for connection in CONNECTIONS]
    firsts = range(10, 10 + 10 * len(cuts), 10)
    for first, (source, node, role) in zip(firsts, cuts, strict=True):
        work(pair, first)
        cut: list[int] = []

        def strike() -> None:
            cut.extend(terminate(getattr(pair, node), role))  # noqa: B023
            go_on(pair, first)  # noqa: B023

        interruptions: list[Exception] = []
        listener = stream.Listener(interrupted=lambda error, _: interruptions.append(error))  # noqa: B023
        with POINTS[point].struck_by(strike, source=source):
            stream.sync(config, listener)
        assert len(cut) == 1
        assert all(isinstance(error, PassInterrupted) for error in interruptions)
    assert_each_write_had_its_effect_once(pair, *firsts)


@pytest.mark.parametrize("point", list(POINTS)[1:])
def test_the_connection_of_the_second_writer_is_cut(pair: Pair, point: str) -> None:
    """It is there from the second batch on."""
    write_config(pair.config_path, batch_size=7)
    config = prepared(pair)
    interruptions: list[Exception] = []
    listener = stream.Listener(interrupted=lambda error, _: interruptions.append(error))
    for first, source, target in ((10, "crm", "billing"), (20, "billing", "crm")):
        work(pair, first)
        cut: list[int] = []

        def strike() -> bool:
            cut.extend(terminate(getattr(pair, target), "second writer"))  # noqa: B023
            if cut:  # noqa: B023
                go_on(pair, first)  # noqa: B023
            return bool(cut)  # noqa: B023

        with POINTS[point].struck_by(strike, source=source):
            stream.sync(config, listener)
        assert cut
    assert all(isinstance(error, PassInterrupted) for error in interruptions)
    assert_each_write_had_its_effect_once(pair, 10, 20)


def terminate(node: Node, role: str) -> list[int]:
    """End the backend of one of the consumer's connections; return its process id."""
    with node.connect() as other:
        found = other.execute(
            "select pid from pg_stat_activity where application_name = %s and datname = current_database()",
            [f"sync-pipeline sync {role}"],
        ).fetchall()
        for (pid,) in found:
            other.execute("select pg_terminate_backend(%s, 10000)", [pid])
    return [pid for (pid,) in found]


def test_a_recovery_waits_until_the_batch_is_on_the_disk_of_the_target(durable_pair: Pair) -> None:
    config = installed(durable_pair)
    crm, billing = durable_pair.crm, durable_pair.billing
    crm.insert("accounts", id=1, name="the only copy")
    ids = crm.value("select int8multirange(int8range(id, id, '[]'))::text from sync.sync_events")
    with billing.connect(autocommit=False) as consumer:
        # A batch, committed as the consumer commits, by a session that does nothing after it.
        consumer.execute(
            "select set_config('synchronous_commit', 'off', true),"
            " set_config('sync_pipeline.applying', 'sync', true)"
        )
        consumer.execute("insert into accounts (id, name) values (1, 'the only copy')")
        ledger.record(consumer, "sync", "crm", ids, [], "now")
        consumer.commit()
        with (
            Point("before", ledger, "forget").struck_by(lambda: billing.server.stop("immediate")),
            pytest.raises(PassInterrupted),
            lead(config) as successor,
        ):
            passes.run(successor)
    billing.server.start()
    stream.sync(config)

    pair = reconnected(durable_pair)
    with closing(pair.crm), closing(pair.billing):
        assert pair.billing.rows("select id, name from accounts") == [(1, "the only copy")]
        assert equal(pair, ("accounts",))
