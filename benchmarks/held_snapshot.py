"""Drain and poll while somebody holds an old snapshot, so that no vacuum can remove a million consumed events.

Beside a second link, whose databases have consumed as many events while nobody holds one; the two take turns. Both are
drained and polled by a consumer that has led for a while, as `stream` does. A consumer that begins while the snapshot
is held passes all dead events once; it has figures of its own.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psycopg

from benchmarks import drain, figures, stages, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure, Options
from sync_pipeline import passes
from sync_pipeline.link import Link, lead

EVENTS = 1_000_000
POLLS = 100


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Drain backlogs and poll empty ones, where the snapshot is held and where none is."""
    rows, records = options.of(200_000), options.of(50_000)
    workload = workloads.single_updates(records, rows)
    with ExitStack() as stack:
        held, free = (
            stack.enter_context(arena.link(name, workload.schema, workload.tables))
            for name in ("held", "free")
        )
        rates: dict[str, list[float]] = {"held": [], "free": []}
        polls: dict[str, list[float]] = {"held": [], "free": []}
        stack.enter_context(_held(held))
        with lead(held.config()) as one, lead(free.config()) as other:
            turns = [(held, one), (free, other)]
            for databases, link in turns:
                _consume(databases, link, options.of(EVENTS), rows)
            for number in range(options.rounds):
                for databases, link in turns[:: 1 if number % 2 == 0 else -1]:
                    polls[databases.name].append(_poll(link))
                    drain.make(databases, workload, f"round {number}")
                    rates[databases.name].append(records / _run(link))
                    databases.require_equal(workload.tables)
        beginning = drain.drain(held, workload, "begins")
        with lead(held.config()) as link:
            fresh_poll = _poll(link)
        drain.make(held, workload, "profiled")
        profile = stages.profiled(held)
    figures.progress(f"    {rates}, {polls}")
    return [
        Figure("drain without an old snapshot", rates["free"], "records/s"),
        Figure("drain with one held", rates["held"], "records/s"),
        Figure(
            "drain with an old snapshot ÷ without",
            [mine / theirs for mine, theirs in zip(rates["held"], rates["free"], strict=True)],
            at_least=0.9,
        ),
        Figure(
            "drain with one held, by a consumer that just began",
            [records / beginning.seconds],
            "records/s",
            details={"profile": profile},
        ),
        Figure("poll without an old snapshot", polls["free"], "ms"),
        Figure("poll with one held", polls["held"], "ms"),
        Figure(
            "poll rate with an old snapshot ÷ without",
            [theirs / mine for mine, theirs in zip(polls["held"], polls["free"], strict=True)],
            at_least=0.9,
        ),
        Figure("poll with one held, by a consumer that just began", [fresh_poll], "ms"),
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


def _poll(link: Link) -> float:
    """Milliseconds of a look at an empty backlog, the median of many."""
    samples = []
    for _ in range(POLLS):
        started = time.perf_counter()
        passes.run(link)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples) * 1000


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
