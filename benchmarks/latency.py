"""How long a single change takes through `stream`, and what `stream` costs while nothing happens.

A change's time runs from its commit on the source to its commit on the target, where a trigger of the application
tells a listening session.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import psycopg

from benchmarks import figures, workloads
from benchmarks.arena import Arena, Consumer, Databases
from benchmarks.figures import Figure, Options

IDLE_SECONDS = 60.0
REST_SECONDS = 3.0
RESTS = 30
# More than PostgreSQL's LOG_SNAPSHOT_INTERVAL_MS.
SETTLING_SECONDS = 16.0
INTERVAL_SECONDS = 0.05
STEADY_CHANGES = 200
ARRIVAL_SECONDS = 90.0

TELL = """
create function tell() returns trigger language plpgsql as $$
begin
    perform pg_notify('arrived', new.note);
    return null;
end $$;
create trigger tell after insert or update on items for each row execute function tell();
"""


class Arrivals:
    """When which mark arrived on the target, by the clock of this process."""

    def __init__(self, dsn: str) -> None:
        self._session = psycopg.connect(dsn, autocommit=True)
        self._session.execute("listen arrived")
        self._times: dict[str, float] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen)
        self._stopped = False
        self._thread.start()

    def _listen(self) -> None:
        while not self._stopped:
            for notice in self._session.notifies(timeout=0.5, stop_after=1):
                now = time.perf_counter()
                with self._changed:
                    self._times[notice.payload] = now
                    self._changed.notify_all()

    def of(self, mark: str) -> float:
        """Wait until a mark has arrived; return when it did."""
        with self._changed:
            if not self._changed.wait_for(lambda: mark in self._times, ARRIVAL_SECONDS):
                raise RuntimeError(f"{mark!r} does not arrive")
            return self._times[mark]

    def close(self) -> None:
        self._stopped = True
        self._thread.join()
        self._session.close()


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Time single changes after rest and in a steady trickle; then weigh the idle loop."""
    with arena.link("latency", workloads.items(10_000), ["items"]) as databases:
        databases.target.execute(TELL)
        with databases.consumer("--stream") as consumer:
            consumer.go()
            consumer.expect("leading")
            with _arrivals(databases) as arrivals:
                first = [
                    _after_rest(databases, arrivals, f"first {number}")
                    for number in range(max(options.rounds, RESTS))
                ]
                steady = _trickle(databases, arrivals, options.of(STEADY_CHANGES))
            # What autovacuum writes is not ours.
            with arena.without_autovacuum():
                idle = _idle(databases, consumer, options)
            consumer.finish()
    steady.sort()
    return [
        Figure("latency of the first change after idle", first, "ms", at_most=100),
        Figure(
            "latency of changes every 50 ms",
            steady,
            "ms",
            at_most=15,
            details={"p95": steady[int(len(steady) * 0.95)]},
        ),
        *idle,
    ]


@contextmanager
def _arrivals(databases: Databases) -> Iterator[Arrivals]:
    arrivals = Arrivals(databases.dsns["billing"])
    try:
        yield arrivals
    finally:
        arrivals.close()


def _change(databases: Databases, mark: str, record: int) -> float:
    databases.source.execute("update items set note = %s where id = %s", [mark, record])
    return time.perf_counter()


def _after_rest(databases: Databases, arrivals: Arrivals, mark: str) -> float:
    time.sleep(REST_SECONDS)
    committed = _change(databases, mark, 1)
    return max(0.0, arrivals.of(mark) - committed) * 1000


def _trickle(databases: Databases, arrivals: Arrivals, changes: int) -> list[float]:
    committed = {}
    due = time.perf_counter()
    for number in range(changes):
        mark = f"steady {number}"
        committed[mark] = _change(databases, mark, 2 + number)
        due += INTERVAL_SECONDS
        time.sleep(max(0.0, due - time.perf_counter()))
    return [max(0.0, arrivals.of(mark) - at) * 1000 for mark, at in committed.items()]


def _idle(databases: Databases, consumer: Consumer, options: Options) -> list[Figure]:
    processes = [psutil.Process(consumer.pid)]
    for session in databases.sessions:
        rows = session.execute(
            "select pid from pg_stat_activity where application_name like 'sync-pipeline%'"
        ).fetchall()
        processes += [psutil.Process(pid) for (pid,) in rows]
    time.sleep(REST_SECONDS)
    seconds = max(5.0, IDLE_SECONDS * min(1.0, options.scale))
    databases.settle()
    # The first looks tidy what the work before has left. A server that has written anything, a checkpoint too, notes
    # once more which transactions run.
    time.sleep(SETTLING_SECONDS)
    wal, tuples = _wal(databases), _rows(databases)
    cpu, started = _cpu(processes), time.perf_counter()
    time.sleep(seconds)
    elapsed = time.perf_counter() - started
    spent = [after - before for after, before in zip(_cpu(processes), cpu, strict=True)]
    written = _wal(databases) - wal, _rows(databases) - tuples
    figures.progress(f"    idle: {spent[0]:.3f} s consumer, {sum(spent[1:]):.3f} s servers")
    return [
        Figure(
            "idle stream: consumer and its backends, of one core",
            [sum(spent) / elapsed * 100],
            "%",
            at_most=1,
            details={"consumer": spent[0] / elapsed * 100},
        ),
        Figure("idle stream: WAL written on both nodes", [written[0]], "bytes", at_most=0),
        Figure("idle stream: rows written on both nodes", [written[1]], "rows", at_most=0),
    ]


def _cpu(processes: list[psutil.Process]) -> list[float]:
    times = [process.cpu_times() for process in processes]
    return [used.user + used.system for used in times]


def _rows(databases: Databases) -> int:
    """How many rows were ever written to both databases."""
    total = 0
    for session in databases.sessions:
        row = session.execute(
            "select tup_inserted + tup_updated + tup_deleted from pg_stat_database where datname = %s",
            [databases.name],
        ).fetchone()
        total += int(row[0]) if row else 0
    return total


def _wal(databases: Databases) -> int:
    """How many bytes of WAL the consumer's sessions have written; before PostgreSQL 18, both servers."""
    total = 0
    for session in databases.sessions:
        counted = (
            "select coalesce(sum(written.wal_bytes), 0) from pg_stat_activity as found"
            " cross join pg_stat_get_backend_wal(found.pid) as written"
            " where found.application_name like 'sync-pipeline%'"
            if session.info.server_version >= 180000
            else "select pg_current_wal_insert_lsn() - '0/0'"
        )
        row = session.execute(counted.encode()).fetchone()
        total += int(row[0]) if row else 0
    return total


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
