"""The rival: PostgreSQL's logical replication of the same tables, in databases of its own on the same servers."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from psycopg import sql

from benchmarks import cpu
from benchmarks.arena import Connection, Databases

NAME = "rival"
# Each look costs the rival a little; it needs seconds.
POLL_SECONDS = 0.01
GIVE_UP_SECONDS = 600.0

SENDER = "select 'walsender', pid from pg_stat_replication where application_name = %s"
WORKERS = "select worker_type || ' worker', pid from pg_stat_subscription where subname = %s and pid is not null"


@dataclass(frozen=True, slots=True)
class Drained:
    """How long a rival needed, and the processor time that its processes and both servers used."""

    seconds: float
    used: dict[str, float]


class Rival(Protocol):
    """Somebody who waits for a backlog that is to be made now."""

    def drain(self, arrived: str) -> Drained:
        """Begin, and return when the query `arrived` is true on the target."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """One subscription that is not enabled yet; what is changed from now on waits for it in the source's WAL."""

    databases: Databases

    def drain(self, arrived: str) -> Drained:
        source, target = self.databases.sessions
        before = self.databases.server_seconds()
        started = time.perf_counter()
        target.execute(sql.SQL("alter subscription {} enable").format(sql.Identifier(NAME)))
        seconds = wait(target, arrived, started)
        used = _used(source, SENDER) | _used(target, WORKERS)
        used["both servers"] = self.databases.server_seconds() - before
        return Drained(seconds, used)


def wait(session: Connection, arrived: str, started: float) -> float:
    """Return the seconds from `started` until a query is true."""
    while True:
        row = session.execute(arrived.encode()).fetchone()
        seconds = time.perf_counter() - started
        if row and row[0]:
            return seconds
        if seconds > GIVE_UP_SECONDS:
            raise RuntimeError(f"after {seconds:.0f} seconds it is still false: {arrived}")
        time.sleep(POLL_SECONDS)


def _used(session: Connection, processes: str) -> dict[str, float]:
    rows = session.execute(processes.encode(), [NAME]).fetchall()
    return {name: cpu.of_process(pid) for name, pid in rows}


@contextmanager
def subscribed(databases: Databases, tables: Iterable[str]) -> Iterator[Subscription]:
    """Publish and subscribe equal tables, without an initial copy.

    The slot begins here, so the rival never reads WAL that others wrote before.
    """
    name = sql.Identifier(NAME)
    source, target = databases.sessions
    listed = sql.SQL(", ").join(map(sql.Identifier, tables))
    source.execute(sql.SQL("create publication {} for table {}").format(name, listed))
    source.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", [NAME])
    target.execute(
        sql.SQL(
            "create subscription {} connection {} publication {} "
            "with (enabled = false, create_slot = false, slot_name = {}, copy_data = false)"
        ).format(name, databases.dsns["crm"], name, NAME)
    )
    try:
        yield Subscription(databases)
    finally:
        target.execute(sql.SQL("drop subscription {}").format(name))
        source.execute(sql.SQL("drop publication {}").format(name))
