"""The rival: PostgreSQL's logical replication of the same tables, in databases of its own on the same servers."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
    """How long the rival needed, and the processor time that its processes and both servers used."""

    seconds: float
    used: dict[str, float]


@dataclass(frozen=True, slots=True)
class Rival:
    """One subscription that is not enabled yet; what is changed from now on waits for it in the source's WAL."""

    databases: Databases

    def drain(self, arrived: str) -> Drained:
        """Enable the subscription and wait until the query `arrived` is true on the subscriber."""
        session = self.databases.target
        before = self.databases.server_seconds()
        started = time.perf_counter()
        session.execute(sql.SQL("alter subscription {} enable").format(sql.Identifier(NAME)))
        while True:
            row = session.execute(arrived.encode()).fetchone()
            seconds = time.perf_counter() - started
            if row and row[0]:
                used = _used(self.databases.source, SENDER) | _used(session, WORKERS)
                used["both servers"] = self.databases.server_seconds() - before
                return Drained(seconds, used)
            if seconds > GIVE_UP_SECONDS:
                raise RuntimeError("the subscription does not get there")
            time.sleep(POLL_SECONDS)


def _used(session: Connection, processes: str) -> dict[str, float]:
    rows = session.execute(processes.encode(), [NAME]).fetchall()
    return {name: cpu.of_process(pid) for name, pid in rows}


@contextmanager
def subscribed(databases: Databases, tables: Iterable[str]) -> Iterator[Rival]:
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
        yield Rival(databases)
    finally:
        target.execute(sql.SQL("drop subscription {}").format(name))
        source.execute(sql.SQL("drop publication {}").format(name))
