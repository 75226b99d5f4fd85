"""A million changes a minute for five minutes: producer, consumer and both servers on the same machine.

The producer updates in statements of a hundred rows, each its own transaction. A row comes round every twelve seconds,
so hardly a change is saved because the record changes again before it was sent. Lag is the age of the oldest event.
"""

import statistics
import threading
import time

import psycopg

from benchmarks import figures, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure, Options

CHANGES_PER_SECOND = 1_000_000 / 60
STATEMENT_ROWS = 100
SAMPLE_SECONDS = 0.5


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Produce at a fixed rate while `stream` runs; sample lag and backlog."""
    rows = 200_000
    seconds = options.minutes * 60
    with arena.link("sustained", workloads.items(rows), ["items"]) as databases:
        databases.settle()
        with databases.consumer("--stream") as consumer:
            consumer.go()
            consumer.expect("leading")
            stop = threading.Event()
            produced: list[int] = []
            producer = threading.Thread(target=_produce, args=(databases, rows, stop, produced))
            started = time.monotonic()
            producer.start()
            series = []
            while (elapsed := time.monotonic() - started) < seconds:
                series.append([round(elapsed, 2), *_waiting(databases)])
                time.sleep(SAMPLE_SECONDS)
            stop.set()
            producer.join()
            rate = sum(produced) / (time.monotonic() - started)
            report = consumer.finish()
        databases.sync()
        databases.require_equal(["items"])
    lags = sorted(lag for _, lag, _ in series)
    third = len(series) // 3
    early, late = (
        statistics.mean(waiting for _, _, waiting in part)
        for part in (series[third : 2 * third], series[2 * third :])
    )
    return [
        Figure("sustained load", [rate * 60], "changes/minute", at_least=999_000),
        Figure(
            "lag under sustained load, p95",
            [lags[int(len(lags) * 0.95)]],
            "s",
            at_most=3,
            details={"picture": "sustained", "series": series, "cpu": report.used},
        ),
        # Flat: the last third holds no more than the middle one, but for noise.
        Figure("backlog of the last third ÷ middle third", [late / max(early, 1)], at_most=1.5),
        Figure("peak memory under sustained load", [report.peak_mb], "MB", at_most=150),
    ]


def _produce(databases: Databases, rows: int, stop: threading.Event, produced: list[int]) -> None:
    statements = rows // STATEMENT_ROWS
    with psycopg.connect(databases.dsns["crm"], autocommit=True) as session:
        session.execute("set synchronous_commit = off")
        started = time.monotonic()
        number = 0
        while not stop.is_set():
            due = started + number * STATEMENT_ROWS / CHANGES_PER_SECOND
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
