"""Lost answers, consumers that wake up late, and peers that vanish: nobody knows what the other one knows."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from sync_pipeline import stream
from sync_pipeline.config import load
from sync_pipeline.errors import LockTaken
from sync_pipeline.servers import Server
from tests.bookkeeping import assert_each_write_had_its_effect_once, go_on, keep_books, work
from tests.crashing import POINTS
from tests.engine import config_of, installed, sync_pair
from tests.helpers import NODES, Cluster, Node, Pair, dsn_variable, eventually, write_config
from tests.networks import SERVER_ADDRESS, Loses, Namespaces, Proxy, two_namespaces
from tests.program import line_with

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 60
# The program as it is, but for the time that it believes in a silent peer.
IMPATIENT = """
from sync_pipeline import database
from sync_pipeline.cli import main
database._PATIENCE.update(keepalives_idle=1, keepalives_interval=1, keepalives_count=2, tcp_user_timeout=2000)
main()
"""
PATIENT = "from sync_pipeline.cli import main; main()"
END_SESSIONS = """
select pg_terminate_backend(pid, 10000) from pg_stat_activity
where application_name like 'sync-pipeline %' and datname = current_database()
"""
WAITING_FOR_A_LOCK = """
select count(*) from pg_stat_activity
where application_name like 'sync-pipeline %' and datname = current_database() and wait_event_type = 'Lock'
"""


# --- an ambiguous commit ---


@pytest.mark.parametrize("loses", ["the answer", "the commit"])
@pytest.mark.parametrize("whose", ["the target's", "the source's"])
@pytest.mark.parametrize("batch_size", [10_000, 7], ids=["one batch", "many batches"])
def test_a_connection_that_is_lost_in_a_commit(
    pair: Pair, whose: str, loses: Loses, batch_size: int
) -> None:
    """The consumer cannot know whether it happened; users change the same records before it looks again."""
    write_config(pair.config_path, batch_size=batch_size)
    keep_books(pair)
    installed(pair)
    work(pair, 10)
    target_commits = whose == "the target's"
    point = POINTS["before the target's commit" if target_commits else "before the source's delete"]
    through = pair.billing if target_commits else pair.crm
    interruptions: list[Exception] = []

    def interrupted(error: Exception, _: float) -> None:
        interruptions.append(error)
        go_on(pair, 10)

    with Proxy(through.dsn) as proxy:
        config = load(pair.config_path, pair.environment | {dsn_variable(through.name): proxy.dsn})
        with point.struck_by(lambda: proxy.arm(loses), source="crm"):
            stream.sync(config, stream.Listener(interrupted=interrupted))
        assert (proxy.cuts, len(interruptions)) == (1, 1)
    assert_each_write_had_its_effect_once(pair, 10)


# --- a zombie ---


@contextmanager
def stopped_at(pair: Pair, point: str) -> Iterator[subprocess.Popen[bytes]]:
    """A consumer that was stopped at a point of a pass, as by a machine that hangs."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.crashing", point, "crm", "SIGSTOP"],
        cwd=ROOT,
        env={**os.environ, **pair.environment, "SYNC_CONFIG": str(pair.config_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert found is not None
            assert found.si_status == signal.SIGSTOP
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="waits for a stop as Linux tells of it")
@pytest.mark.parametrize("batch_size", [10_000, 7], ids=["one batch", "many batches"])
@pytest.mark.parametrize(
    "point",
    ["after the parents are written", "before the target's commit", "before the source's delete"],
)
def test_a_zombie_does_not_overwrite_what_came_after_it(
    pair: Pair, point: str, batch_size: int
) -> None:
    """It keeps its locks until someone ends its sessions; then another consumer works, and then it wakes up."""
    write_config(pair.config_path, batch_size=batch_size)
    keep_books(pair)
    installed(pair)
    work(pair, 10)
    with stopped_at(pair, point) as zombie:
        with pytest.raises(LockTaken):
            sync_pair(pair)
        for node in pair.nodes:
            node.execute(END_SESSIONS)
        go_on(pair, 10)
        sync_pair(pair)
        zombie.send_signal(signal.SIGCONT)
        zombie.wait(WAIT_SECONDS)
        assert_each_write_had_its_effect_once(pair, 10)


# --- a half-open connection ---


class SocketServer(Server):
    """A server that the test reaches through its Unix socket, which no network namespace hides."""

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        return f"postgresql://{user}@/{dbname}?host={self.socket_directory}&port={self.port}"


@pytest.fixture
def spaces() -> Iterator[Namespaces]:
    with two_namespaces() as spaces:
        yield spaces


@pytest.fixture
def remote_pair(spaces: Namespaces, pg_version: int, tmp_path: Path) -> Iterator[Pair]:
    """Two databases of one server that listens in one of the namespaces, and nowhere else."""

    def start() -> Server:
        spaces.run_here(spaces.server)
        return SocketServer.create(
            directory, pg_version, settings={"listen_addresses": SERVER_ADDRESS}
        )

    with ExitStack() as exits:
        # A short path, because that of a Unix socket must be short.
        directory = exits.enter_context(
            tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True)
        )
        # A thread of its own, since it is the thread that moves.
        with ThreadPoolExecutor(1) as elsewhere:
            server = elsewhere.submit(start).result()
        cluster = Cluster(server)
        exits.callback(cluster.close)
        with (server.data_directory / "pg_hba.conf").open("a", encoding="utf-8") as rules:
            rules.write("host all all samenet trust\n")
        crm, billing = (Node(name, server.dsn(cluster.clone()), server) for name in NODES)
        exits.enter_context(closing(crm))
        exits.enter_context(closing(billing))
        crm.execute("select pg_reload_conf()")
        yield Pair(crm, billing, write_config(tmp_path / "sync.yaml", lock_timeout_seconds=600))


@contextmanager
def streaming_from_afar(
    pair: Pair, spaces: Namespaces, program: str
) -> Iterator[subprocess.Popen[str]]:
    """The program in the other namespace, which knows the databases by their address alone."""
    dsns = {
        dsn_variable(node.name): f"postgresql://postgres@{SERVER_ADDRESS}:{node.server.port}/"
        + node.value("select current_database()")
        for node in pair.nodes
    }
    arguments = ("stream", "--config", str(pair.config_path))
    with subprocess.Popen(
        spaces.command(spaces.client, sys.executable, "-c", program, *arguments),
        env={**os.environ, **dsns, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("moment", ["in a batch", "between two looks"])
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(IMPATIENT, id="short"),
        pytest.param(PATIENT, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(300)]),
    ],
)
def test_a_consumer_that_vanished_without_a_word_is_replaced_and_notices_it_itself(
    remote_pair: Pair, spaces: Namespaces, program: str, moment: str
) -> None:
    """What it sent last is answered by nobody, or not even received: two clocks of TCP that run in different cases."""
    pair = remote_pair
    keep_books(pair)
    installed(pair)
    work(pair, 10)
    with streaming_from_afar(pair, spaces, program) as process:
        line_with(process, "leading")
        eventually("the first sync", lambda: not (pair.crm.pending() or pair.billing.pending()))
        with pair.billing.connect(autocommit=False) as application:
            if moment == "in a batch":
                application.execute("lock table users in exclusive mode")
                pair.crm.execute("update users set age = 1 where id = 15")
                eventually("the batch waits", lambda: pair.billing.value(WAITING_FOR_A_LOCK))
            spaces.lose_each_other()
        go_on(pair, 10)
        stop, leading = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            listener = stream.Listener(leading=leading.set)
            other = pool.submit(stream.stream, config_of(pair), stop, listener=listener)
            try:
                assert leading.wait(WAIT_SECONDS), "the servers never gave up on the lost consumer"
                line_with(process, "interrupted")
                spaces.find_each_other()
                line_with(process, "standing by")
                eventually("the sync", lambda: not (pair.crm.pending() or pair.billing.pending()))
            finally:
                stop.set()
                other.result(WAIT_SECONDS)
        line_with(process, "leading")
    for node in pair.nodes:
        node.execute(END_SESSIONS)
    assert_each_write_had_its_effect_once(pair, 10)
