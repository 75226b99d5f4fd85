"""A million changes a minute for five minutes: producer, consumer and both servers on the same machine.

The producer updates in statements of a hundred rows, each its own transaction. A row comes round every twelve seconds,
so hardly a change is saved because the record changes again before it was sent. Lag is the age of the oldest event.
"""

import statistics
import threading
import time
from dataclasses import dataclass, replace

import psycopg

from benchmarks import figures, workloads
from benchmarks.arena import Arena, Databases, Report
from benchmarks.figures import Figure, Options

CHANGES_PER_MINUTE = 1_000_000
ROWS = 200_000
STATEMENT_ROWS = 100
SAMPLE_SECONDS = 0.5
MOST_LAG_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Load:
    """What happened under a load: samples of (second, age of the oldest event, events waiting), the changes made."""

    series: list[tuple[float, float, int]]
    changes_per_minute: float
    report: Report

    def lag(self, share: float) -> float:
        """The lag that is not exceeded in this share of the samples, in seconds."""
        lags = sorted(lag for _, lag, _ in self.series)
        return lags[int((len(lags) - 1) * share)]

    @property
    def growth(self) -> float:
        """How many more wait in the last third of the time than in the middle one, in percent of the changes made.

        Who carries all but a tenth of a percent falls behind by as much.
        """
        third = len(self.series) // 3
        middle, last = (
            statistics.mean(waiting for *_, waiting in part)
            for part in (self.series[third : 2 * third], self.series[2 * third :])
        )
        seconds = self.series[2 * third][0] - self.series[third][0]
        return 100 * (last - middle) / (self.changes_per_minute / 60 * seconds)


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Produce at a fixed rate while `stream` runs; sample lag and backlog."""
    with arena.link("sustained", workloads.items(ROWS), ["items"]) as databases:
        load = under_load(databases, CHANGES_PER_MINUTE, options.minutes * 60)
        databases.sync()
        databases.require_equal(["items"])
    details = {"picture": "sustained", "series": load.series, "cpu": load.report.used}
    return [
        Figure(
            "sustained load",
            [load.changes_per_minute],
            "changes/minute",
            at_least=0.999 * CHANGES_PER_MINUTE,
        ),
        Figure(
            "lag under sustained load, p95",
            [load.lag(0.95)],
            "s",
            at_most=MOST_LAG_SECONDS,
            details=details,
        ),
        Figure("lag under sustained load, greatest", [load.lag(1.0)], "s"),
        Figure("growth of the backlog, of the changes made", [load.growth], "%", at_most=0.1),
        Figure("peak memory under sustained load", [load.report.peak_mb], "MB", at_most=150),
    ]


def under_load(databases: Databases, changes_per_minute: float, seconds: float) -> Load:
    """Produce for some seconds while `stream` runs."""
    databases.settle()
    before = databases.server_seconds()
    with databases.consumer("--stream") as consumer:
        consumer.go()
        consumer.expect("leading")
        stop = threading.Event()
        produced: list[int] = []
        producer = threading.Thread(
            target=_produce, args=(databases, changes_per_minute / 60, stop, produced)
        )
        started = time.monotonic()
        producer.start()
        series = []
        try:
            while (elapsed := time.monotonic() - started) < seconds:
                series.append((round(elapsed, 2), *_waiting(databases)))
                time.sleep(SAMPLE_SECONDS)
        finally:
            stop.set()
            producer.join()
        rate = sum(produced) / (time.monotonic() - started)
        report = replace(consumer.finish(), server_seconds=databases.server_seconds() - before)
    return Load(series, rate * 60, report)


def _produce(
    databases: Databases, changes_per_second: float, stop: threading.Event, produced: list[int]
) -> None:
    statements = ROWS // STATEMENT_ROWS
    with psycopg.connect(databases.dsns["crm"], autocommit=True) as session:
        session.execute("set synchronous_commit = off")
        started = time.monotonic()
        number = 0
        while not stop.is_set():
            due = started + number * STATEMENT_ROWS / changes_per_second
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            first = STATEMENT_ROWS * (number * workloads.STRIDE % statements) + 1
            session.execute(
                "update items set amount = %s, updated_at = clock_timestamp() where id between %s and %s",
                [number % 1000, first, first + STATEMENT_ROWS - 1],
            )
            produced.append(STATEMENT_ROWS)
            number += 1


def _waiting(databases: Databases) -> tuple[float, int]:
    """The age of the oldest event in seconds, and how many wait."""
    row = databases.source.execute(
        "select coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float, count(*) "
        "from sync.sync_events"
    ).fetchone()
    return (row[0], row[1]) if row else (0.0, 0)


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
