"""Whose processor time it was: of each backend of the servers and of whole servers, to a hundredth of a second.

Unlike the time of the clock it hardly depends on what else the machine does. The servers run on this machine.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import psycopg

from sync_pipeline.servers import Server


def of_process(pid: int) -> float:
    """Return the seconds that a process has used so far; 0 when it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def of_server(server: Server) -> float:
    """Return the seconds that a server has used so far: its postmaster, all living backends and all that ended."""
    total = 0.0
    postmaster = psutil.Process(server.pid)
    for child in postmaster.children():
        with suppress(psutil.Error):
            total += of_process(child.pid)
    times = postmaster.cpu_times()
    # Linux adds a child that ended to these; elsewhere they may be 0, and what short-lived backends used is not seen.
    return total + times.user + times.system + times.children_user + times.children_system


def of_servers(servers: Iterable[Server]) -> float:
    return sum(map(of_server, servers))


@contextmanager
def backends(names: dict[int, str]) -> Iterator[dict[str, float]]:
    """Collect what the backend of each psycopg connection used, when the connection is closed.

    `names` tells the node from the port of its server. The keys are a node and the last word of the
    application_name: `crm writer`.
    """
    used: dict[str, float] = {}
    close: Callable[..., None] = psycopg.Connection.close

    @functools.wraps(close)
    def counting(self: psycopg.Connection[Any]) -> None:
        if not self.closed:
            application = (self.pgconn.parameter_status(b"application_name") or b"").decode()
            name = f"{names.get(self.info.port, self.info.port)} {application.rpartition(' ')[2]}"
            used[name] = used.get(name, 0.0) + of_process(self.info.backend_pid)
        close(self)

    psycopg.Connection.close = counting  # type: ignore[method-assign]
    try:
        yield used
    finally:
        psycopg.Connection.close = close  # type: ignore[method-assign]
