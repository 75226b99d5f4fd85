"""The backlogs of `drain` beside Bucardo, where Debian's packages `bucardo` and `postgresql-plperl-NN` are installed.

Bucardo needs a server with PL/Perl, which the embedded ones lack, so both contestants run on the newest PostgreSQL of
this machine that has it. It runs from the moment its sync is kicked until the target has the last row; its daemon has
started before. Like ours the sync is two-way. It applies as a replica: it checks no foreign key.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks import cpu, figures
from benchmarks.arena import Arena, Databases, opened
from benchmarks.drain import Opponent, entries, race
from benchmarks.figures import Figure, Options
from benchmarks.rival import Drained, wait
from sync_pipeline.servers import available_versions

SYNC = "bench"
# For the daemon's start, and for its end after it was told to stop.
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Bucardo:
    """A running daemon that syncs one pair of databases whenever it is kicked."""

    databases: Databases
    directory: Path

    def drain(self, arrived: str) -> Drained:
        pids = self.pids
        daemons = sum(map(cpu.of_process, pids))
        before = self.databases.server_seconds()
        with psycopg.connect(_control(self.databases), autocommit=True) as session:
            started = time.perf_counter()
            session.execute(f"notify bucardo, 'kick_sync_{SYNC}'")
            seconds = wait(self.databases.target, arrived, started)
        used = {
            "consumer": sum(map(cpu.of_process, pids)) - daemons,
            "both servers": self.databases.server_seconds() - before,
        }
        return Drained(seconds, used)

    @property
    def pids(self) -> list[int]:
        """The daemon's processes; each writes its number into a file."""
        found = []
        for path in self.directory.glob("bucardo.*.pid"):
            first = path.read_text(encoding="ascii").split()[:1]
            found += [int(number) for number in first]
        return found

    @contextmanager
    def waiting(self) -> Iterator["Bucardo"]:
        """Nothing is to be prepared: what its triggers note waits for the next kick."""
        yield self

    def run(self, *command: str, superuser: bool = False) -> None:
        """Run a command of the program `bucardo`."""
        name = "postgres" if superuser else "bucardo"
        where = ["--dbhost=127.0.0.1", f"--dbport={self.databases.servers['crm'].port}"]
        who = [f"--dbuser={name}", f"--dbname={name}", "--no-bucardorc", "--batch"]
        place = [f"--piddir={self.directory}", f"--log-destination={self.directory}"]
        done = subprocess.run(
            ["bucardo", *where, *who, *place, *command],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            # It leaves notes where it runs.
            cwd=self.directory,
        )
        if done.returncode:
            raise RuntimeError(f"bucardo {' '.join(command)}: {done.stdout}{done.stderr}")


def measure(_arena: Arena, options: Options) -> list[Figure]:
    """Race against Bucardo over the three backlogs, on servers of its own; nothing where it is not installed."""
    version = _version_with_perl()
    if shutil.which("bucardo") is None or version is None:
        figures.progress("    skipped: no Bucardo, or no PostgreSQL with PL/Perl for it")
        return []
    measured = []
    for workload, _ in entries(options):
        figures.progress(f"  {workload.name}, on PostgreSQL {version}")
        # Servers of their own for each, since a server keeps one Bucardo.
        with (
            opened(version) as arena,
            arena.databases("theirs", workload.schema) as theirs,
            _running(theirs, workload.tables, arena.directory / "bucardo") as bucardo,
        ):
            opponent = Opponent("Bucardo", theirs, bucardo.waiting, f" on PostgreSQL {version}")
            measured += race(arena, options, workload, opponent)
    return measured


@contextmanager
def _running(databases: Databases, tables: tuple[str, ...], directory: Path) -> Iterator[Bucardo]:
    directory.mkdir()
    bucardo = Bucardo(databases, directory)
    bucardo.run("install", superuser=True)
    for node, server in databases.servers.items():
        dsn = f"dbname={databases.name}", "host=127.0.0.1", f"port={server.port}", "user=postgres"
        bucardo.run("add", "db", node, *dsn)
    listed = [f"public.{table}" for table in tables]
    bucardo.run("add", "table", *listed, "db=crm", f"relgroup={SYNC}")
    nodes = ",".join(f"{node}:source" for node in databases.servers)
    bucardo.run("add", "sync", SYNC, f"relgroup={SYNC}", f"dbs={nodes}", "autokick=0")
    try:
        bucardo.run("start")
        _await_start(bucardo)
        yield bucardo
    finally:
        pids = bucardo.pids
        bucardo.run("stop")
        _await_end(pids)


def _await_start(bucardo: Bucardo) -> None:
    """Wait for the process that applies."""
    deadline = time.monotonic() + START_SECONDS
    while not any(bucardo.directory.glob(f"bucardo.kid.sync.{SYNC}.pid")):
        if time.monotonic() > deadline:
            log = (bucardo.directory / "log.bucardo").read_text(encoding="utf-8")
            raise RuntimeError(f"Bucardo does not start: {log[-2000:]}")
        time.sleep(POLL_SECONDS)


def _await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(POLL_SECONDS)


def _control(databases: Databases) -> str:
    return databases.servers["crm"].dsn("bucardo", "bucardo")


def _version_with_perl() -> int | None:
    for version, binaries in sorted(available_versions().items(), reverse=True):
        shared = subprocess.run(
            [binaries / "pg_config", "--sharedir"], check=False, capture_output=True, text=True
        ).stdout.strip()
        if shared and (Path(shared) / "extension" / "plperlu.control").exists():
            return version
    return None


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
