import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psutil
import pytest

from sync_pipeline import servers
from tests.helpers import Cluster, Clusters, Node, Pair, write_config

OLDEST_SUPPORTED_VERSION = 14
# Where files are memory, on Linux, and how much of both the servers of all workers may need.
MEMORY_DIRECTORY = Path("/dev/shm")  # noqa: S108 - a directory of a name of its own is made there
MEMORY_BYTES = 4 * 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("PostgreSQL")
    group.addoption(
        "--pg-version",
        type=int,
        metavar="N",
        help="the PostgreSQL version to test on (default: the newest of the installed wheel)",
    )
    group.addoption(
        "--all-pg-versions",
        action="store_true",
        help="run the tests marked `core` on every other supported version found here, too",
    )

    parser.getgroup("Dagster").addoption(
        "--screenshots",
        type=Path,
        metavar="DIRECTORY",
        help="where tests write the pictures of what they see (default: nowhere that is kept)",
    )


def pytest_configure(config: pytest.Config) -> None:
    version = config.getoption("--pg-version")
    if version is not None and version not in servers.available_versions():
        found = ", ".join(map(str, servers.available_versions())) or "none"
        message = f"--pg-version {version}: not found on this machine; found: {found}"
        raise pytest.UsageError(message)


def pytest_report_header(config: pytest.Config) -> str:
    return "PostgreSQL: " + ", ".join(map(str, _versions(config)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_core = metafunc.definition.get_closest_marker("core") is not None
    if is_core and "pg_version" in metafunc.fixturenames:
        versions = _versions(metafunc.config)
        if len(versions) > 1:
            metafunc.parametrize(
                "pg_version", versions, ids="pg{}".format, indirect=True, scope="session"
            )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.parent.name != "acceptance")


@pytest.fixture(scope="session")
def pg_version(request: pytest.FixtureRequest) -> int:
    """The PostgreSQL version under test."""
    version: int = getattr(request, "param", _versions(request.config)[0])
    return version


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A short path, because the path of a Unix socket must be short, for servers that live as long as the session.

    In memory where there is plenty: databases are cloned for every test, each a file system's work of 300 files.
    """
    parent = MEMORY_DIRECTORY if _has_plenty_of_memory() else None
    with tempfile.TemporaryDirectory(
        prefix="sync-", dir=parent, ignore_cleanup_errors=True
    ) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def clusters(server_directory: Path) -> Iterator[Clusters]:
    """The running servers of this worker; ask for `pair` or for a server instead."""
    with Clusters(server_directory) as clusters:
        yield clusters


@pytest.fixture(scope="session")
def crm_server(clusters: Clusters, pg_version: int) -> Cluster:
    return clusters.get(pg_version, "crm")


@pytest.fixture(scope="session")
def billing_server(clusters: Clusters, pg_version: int) -> Cluster:
    return clusters.get(pg_version, "billing")


@pytest.fixture
def crm(crm_server: Cluster) -> Iterator[Node]:
    """An empty database of the three tables, on a server of its own."""
    yield from _node("crm", crm_server)


@pytest.fixture
def billing(billing_server: Cluster) -> Iterator[Node]:
    """As `crm`, on another server."""
    yield from _node("billing", billing_server)


@pytest.fixture
def pair(crm: Node, billing: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Two databases and the `sync.yaml` that links all their tables; nothing is installed yet."""
    pair = Pair(crm, billing, write_config(tmp_path / "sync.yaml"))
    for name, dsn in pair.environment.items():
        monkeypatch.setenv(name, dsn)
    return pair


@pytest.fixture(autouse=True, scope="session")
def _no_settings_of_the_developer() -> None:
    """A test must not meet the servers or the configuration of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("PG") or name in {"SYNC_CONFIG", "CRM_DSN", "BILLING_DSN"}:
            del os.environ[name]


def _node(name: str, cluster: Cluster) -> Iterator[Node]:
    with ExitStack() as exits:
        database = cluster.clone()
        exits.callback(cluster.drop, database)
        node = Node(name, cluster.server.dsn(database), cluster.server)
        yield exits.enter_context(closing(node))


def _has_plenty_of_memory() -> bool:
    return (
        MEMORY_DIRECTORY.is_dir()
        and os.access(MEMORY_DIRECTORY, os.W_OK)
        and shutil.disk_usage(MEMORY_DIRECTORY).free >= MEMORY_BYTES
        and psutil.virtual_memory().available >= MEMORY_BYTES
    )


def _versions(config: pytest.Config) -> list[int]:
    """The version under test, then those that the core suite runs on as well."""
    first = config.getoption("--pg-version") or servers.default_version()
    others: list[int] = []
    if config.getoption("--all-pg-versions"):
        found = servers.available_versions()
        others = [n for n in found if n != first and n >= OLDEST_SUPPORTED_VERSION]
    return [first, *others]
