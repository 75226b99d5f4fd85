"""Servers that stop without warning and connections that are cut, at every point of a pass.

The consumer lives on here; `test_crashes.py` kills it at the same points.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sync_pipeline import stream
from sync_pipeline.config import Config
from sync_pipeline.errors import ConnectionFailed, PassInterrupted
from sync_pipeline.servers import Server
from tests.crashing import POINTS
from tests.engine import installed
from tests.helpers import NODES, Cluster, Node, Pair, write_config
from tests.integration.test_crashes import REVISIONS, settled, work

CONNECTIONS = [("crm", "writer"), ("crm", "reader"), ("billing", "writer"), ("billing", "reader")]


@pytest.fixture(scope="module")
def durable_clusters(server_directory: Path, pg_version: int) -> Iterator[list[Cluster]]:
    """Two servers that keep what they committed when they are stopped without warning."""
    with ExitStack() as exits:
        clusters = []
        for name in NODES:
            directory = server_directory / f"durable-{name}-{pg_version}"
            server = Server.create(directory, pg_version, durable=True)
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
    """Install on tables that count the application's own writes, and do the first work."""
    for node in pair.nodes:
        node.execute(REVISIONS)
    config = installed(pair)
    work(pair, range(10, 20))
    return config


def reconnected(pair: Pair) -> Pair:
    """The pair with new sessions: the old ones were lost with their server."""
    for node in pair.nodes:
        node.close()
    crm, billing = (Node(node.name, node.dsn, node.server) for node in pair.nodes)
    return Pair(crm, billing, pair.config_path)


def go_on(pair: Pair, first: int = 10) -> None:
    """What the applications do before anybody recovers: newer changes to records that were in hand."""
    pair.crm.execute("update users set name = 'after the fault' where id = %s", first + 2)
    pair.crm.execute("delete from users where id = %s", first + 4)
    pair.crm.execute(
        "insert into users values (%s, %s, %s)", first + 4, first + 3, f"{first}@again"
    )
    pair.billing.execute("update users set name = 'after the fault' where id = %s", first + 1002)
    pair.billing.execute("delete from accounts where id = %s", first + 1008)


def check(pair: Pair, first: int = 10) -> None:
    """Equal, no conflict, nothing left; and the counter shows that each write had its effect once."""
    settled(pair)
    changed = ("after the fault", 2)
    for node in pair.nodes:
        assert node.rows(
            "select name, revision from users where id in (%s, %s)", first + 2, first + 1002
        ) == [changed, changed]
        assert node.rows("select email from users where id = %s", first + 4) == [
            (f"{first}@again",)
        ]
        assert node.rows("select * from accounts where id = %s", first + 1008) == []


@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("point", POINTS)
def test_a_server_stops_without_warning(durable_pair: Pair, point: str, victim: str) -> None:
    config = prepared(durable_pair)
    node = durable_pair.crm
    # The first direction of the pass reads crm, the second one writes it.
    turn = 1 if victim == "source" else 2
    with (
        POINTS[point].struck_by(lambda: node.server.stop("immediate"), turn=turn),
        pytest.raises((PassInterrupted, ConnectionFailed)),
    ):
        stream.sync(config)
    assert not node.server.is_running
    node.server.start()
    pair = reconnected(durable_pair)
    with closing(pair.crm), closing(pair.billing):
        go_on(pair)
        check(pair)


@pytest.mark.parametrize("batch_size", [10_000, 7], ids=["one batch", "many batches"])
@pytest.mark.parametrize("point", POINTS)
def test_a_connection_is_cut(pair: Pair, point: str, batch_size: int) -> None:
    write_config(pair.config_path, batch_size=batch_size)
    config = prepared(pair)
    for first, (node, role) in zip(range(10, 50, 10), CONNECTIONS, strict=True):
        if first > 10:
            work(pair, range(first, first + 10))
        cut: list[int] = []
        interruptions: list[Exception] = []
        listener = stream.Listener(interrupted=lambda error, _: interruptions.append(error))  # noqa: B023
        with POINTS[point].struck_by(lambda: cut.extend(terminate(getattr(pair, node), role))):  # noqa: B023
            stream.sync(config, listener)
        assert len(cut) == 1
        assert all(isinstance(error, PassInterrupted) for error in interruptions)
        go_on(pair, first)
        check(pair, first)


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
