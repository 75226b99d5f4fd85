"""Drain and poll while somebody holds an old snapshot, so that no vacuum can remove a million consumed events.

A worker that has led for a while drains and polls, as `stream` does; the drains without a snapshot come half before and
half after the others. A worker that begins while the snapshot is held passes all dead events once; it has figures of
its own.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from benchmarks import drain, figures, stages, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure, Options
from sync_pipeline import passes
from sync_pipeline.link import Link, lead

EVENTS = 1_000_000
POLLS = 100


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Drain a backlog and poll an empty one, before and while the snapshot is held."""
    rows, records = options.of(200_000), options.of(50_000)
    workload = workloads.single_updates(records, rows)
    with arena.link("held", workload.schema, workload.tables) as databases:

        def sample(link: Link, mark: str, rounds: int) -> list[float]:
            rates = []
            for number in range(rounds):
                drain.make(databases, workload, f"{mark} {number}")
                rates.append(records / _run(link))
                databases.require_equal(workload.tables)
            return rates

        half = (options.rounds + 1) // 2
        with lead(databases.config()) as link:
            free_polls = _polls(link, options.rounds)
            free = sample(link, "before", half)
        with _held(databases):
            with lead(databases.config()) as link:
                _consume(databases, link, options.of(EVENTS), rows)
                held_polls = _polls(link, options.rounds)
                held = sample(link, "held", options.rounds)
            beginning = drain.drain(databases, workload, "begins")
            with lead(databases.config()) as link:
                fresh_polls = _polls(link, options.rounds)
            drain.make(databases, workload, "profiled")
            profile = stages.profiled(databases)
        with lead(databases.config()) as link:
            free += sample(link, "after", half)
            free_polls += _polls(link, options.rounds)
    figures.progress(f"    free {free}, held {held}")
    return [
        Figure("drain without an old snapshot", free, "records/s"),
        Figure("drain with one held", held, "records/s"),
        Figure(
            "drain with an old snapshot ÷ without",
            [mine / statistics.median(free) for mine in held],
            at_least=0.9,
        ),
        Figure(
            "drain with one held, by a worker that just began",
            [records / beginning.seconds],
            "records/s",
            details={"profile": profile},
        ),
        Figure("poll without an old snapshot", free_polls, "ms"),
        Figure("poll with one held", held_polls, "ms"),
        Figure(
            "poll rate with an old snapshot ÷ without",
            [statistics.median(free_polls) / mine for mine in held_polls],
            at_least=0.9,
        ),
        Figure("poll with one held, by a worker that just began", fresh_polls, "ms"),
    ]


@contextmanager
def _held(databases: Databases) -> Iterator[None]:
    with psycopg.connect(databases.dsns["crm"]) as session:
        session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        session.execute("select")
        yield


def _consume(databases: Databases, link: Link, events: int, rows: int) -> None:
    """Let events come and go. Replays: the rows themselves should not grow old versions as well."""
    databases.source.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) "
        "select 'items', 1 + i %% %s, 'update' from generate_series(1, %s) as i",
        [rows, events],
    )
    _run(link)


def _run(link: Link) -> float:
    """Pass until nothing is left; return the seconds."""
    started = time.perf_counter()
    while passes.run(link):
        pass
    return time.perf_counter() - started


def _polls(link: Link, rounds: int) -> list[float]:
    """Milliseconds of a look at an empty backlog, the median of many, `rounds` times."""
    medians = []
    for _ in range(rounds):
        samples = []
        for _ in range(POLLS):
            started = time.perf_counter()
            passes.run(link)
            samples.append(time.perf_counter() - started)
        medians.append(statistics.median(samples) * 1000)
    return medians


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
