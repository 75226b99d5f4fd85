from collections.abc import Iterator

import pytest

from tests.engine import installed
from tests.helpers import Cluster, Node, Pair, write_config


@pytest.fixture(scope="module")
def link(
    crm_server: Cluster, billing_server: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two installed databases for the tests of this module; each test leaves them equal."""
    servers = {"crm": crm_server, "billing": billing_server}
    nodes = {
        name: Node(name, cluster.server.dsn(cluster.clone()), cluster.server)
        for name, cluster in servers.items()
    }
    path = write_config(tmp_path_factory.mktemp("link") / "sync.yaml", lock_timeout_seconds=60)
    pair = Pair(nodes["crm"], nodes["billing"], path)
    installed(pair)
    yield pair
    for name, cluster in servers.items():
        nodes[name].close()
        cluster.drop(nodes[name].dsn.rpartition("/")[2])
