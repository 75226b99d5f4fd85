"""How long a change takes through Dagster, by runs that a sensor asks for and by the stream; and a run that is stopped.

All of it is real: webserver, daemon, code server, and runs in processes of their own. A change's time runs from its
commit on the source to its commit on the target. Idle: it is the only one, and comes at any moment between two looks
of the sensor. Load: applications update records on both nodes all the time.

It is not part of `make bench`: 50 changes take a quarter of an hour, most of it the sensor's. `--samples 3` tries it
out; `--write` puts the table into docs/dagster.md.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg

from benchmarks import dagster_page, figures, report, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure
from benchmarks.latency import TELL, Arrivals
from benchmarks.processes import repeated
from sync_pipeline.defs.glance import leading
from tests.dagster_processes import Dagster

CHANGES = 50
STOPS = 5
ITEMS = 10_000
# Between two looks of the sensor any moment is as likely as another.
SENSOR_REST_SECONDS = 5.0
STREAM_REST_SECONDS = 0.5
LOAD_REST_SECONDS = 2.0
LOAD_INTERVAL_SECONDS = 0.01
BUDGET_SECONDS = 3600
LEAD_SECONDS = 60.0
LOOK_SECONDS = 0.005


def measure(arena: Arena, changes: int) -> list[Figure]:
    """Time changes through both ways, idle and under load; then stop runs in both ways."""
    found = []
    with arena.link("dagster", workloads.items(ITEMS), ["items"]) as databases:
        databases.target.execute(TELL)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            home = Path(directory) / "home"
            with (
                Dagster(databases.config_path, {}, home) as dagster,
                closing(Arrivals(databases.dsns["billing"])) as seen,
            ):
                found += _both("sensor runs", databases, seen, changes, SENSOR_REST_SECONDS)
                # Else its runs could lead where the stream is meant to.
                dagster.stop_sensor("sync_sensor")
                with _streaming(dagster):
                    found += _both("the stream", databases, seen, changes, STREAM_REST_SECONDS)
                found += _stops(dagster, databases, min(STOPS, changes))
    return found


def _both(
    way: str, databases: Databases, seen: Arrivals, changes: int, rest: float
) -> list[Figure]:
    idle = []
    for number in range(changes):
        mark = f"{way} {number}"
        committed = _change(databases, mark, number, rest)
        idle.append(max(0.0, seen.of(mark) - committed))
    with _load(databases):
        # Each at a moment of its own, whether the one before has arrived or not.
        marks = [f"{way} under load {number}" for number in range(changes)]
        times = [_change(databases, mark, n, LOAD_REST_SECONDS) for n, mark in enumerate(marks)]
        loaded = [
            max(0.0, seen.of(mark) - committed)
            for mark, committed in zip(marks, times, strict=True)
        ]
    return [_figure(f"{way}, idle", idle), _figure(f"{way}, under load", loaded)]


def _figure(name: str, samples: list[float]) -> Figure:
    samples.sort()
    p95 = samples[min(len(samples) - 1, int(len(samples) * 0.95))]
    figures.progress(f"    {name}: p95 {p95:.3f} s of {len(samples)}")
    return Figure(name, samples, "s", details={"p95": p95})


def _change(databases: Databases, mark: str, number: int, rest: float) -> float:
    """Change a record that the load leaves alone, after a while; return when it was committed."""
    time.sleep(random.uniform(0, rest))
    databases.source.execute("update items set note = %s where id = %s", [mark, 1 + number])
    return time.perf_counter()


@contextmanager
def _load(databases: Databases) -> Iterator[None]:
    """Update other records on both nodes, a hundred times a second each, until the block ends."""
    statement = "update items set note = %s where id = %s"
    with (
        psycopg.connect(databases.dsns["crm"], autocommit=True) as crm,
        psycopg.connect(databases.dsns["billing"], autocommit=True) as billing,
    ):

        def change(number: int) -> None:
            record = number % (ITEMS // 2 - CHANGES) + 1
            crm.execute(statement, [f"load {number}", CHANGES + record])
            billing.execute(statement, [f"load {number}", ITEMS // 2 + record])

        with repeated(change, LOAD_INTERVAL_SECONDS):
            yield


def _stream(dagster: Dagster) -> str:
    config = {"ops": {"stream_changes": {"config": {"seconds": BUDGET_SECONDS}}}}
    run = dagster.launch("stream_job", config)
    _until(lambda: "leads" in dagster.said(run))
    return run


@contextmanager
def _streaming(dagster: Dagster) -> Iterator[None]:
    run = _stream(dagster)
    try:
        yield
    finally:
        dagster.terminate(run)
        dagster.ended(run)


def _stops(dagster: Dagster, databases: Databases, rounds: int) -> list[Figure]:
    """Stop a stream that is applying changes; take the time until both locks are free."""
    ways: dict[str, Callable[[str], None]] = {
        "terminated": dagster.terminate,
        "killed with -9": dagster.kill_run,
    }
    found = []
    for words, stop in ways.items():
        samples = []
        for _ in range(rounds):
            run = _stream(dagster)
            with _load(databases):
                asked = time.perf_counter()
                stop(run)
                _until(lambda: leading(databases.config()) is None)
                samples.append(time.perf_counter() - asked)
        found.append(Figure(f"locks free after a run is {words}", samples, "s", at_most=1))
    return found


def _until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LEAD_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            raise RuntimeError("the leader does not change")
        time.sleep(LOOK_SECONDS)


def render(found: list[Figure]) -> str:
    """The table of both ways, and how soon the locks are free."""
    *ways, terminated, killed = found
    rows = [
        (name, *(cell for figure in ways[first : first + 2] for cell in _cells(figure)))
        for name, first in (("runs that `sync_sensor` asks for", 0), ("`stream_job`", 2))
    ]
    how = (
        f"Under load means {1 / LOAD_INTERVAL_SECONDS:.0f} updates a second on each node. After a stream run under that"
        f" load was terminated, both locks were free in {_stopped(terminated)}; after `kill -9`, in {_stopped(killed)}."
    )
    headings = ("", "idle: median", "p95", "under load: median", "p95")
    return f"{report.table(headings, rows)}\n\n{how}"


def _cells(figure: Figure) -> tuple[str, str]:
    return _seconds(figure.value), _seconds(figure.details["p95"])


def _stopped(figure: Figure) -> str:
    return f"{_seconds(figure.value)} (at most {max(figure.samples):.2f})"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


if __name__ == "__main__":
    dagster_page.main(measure, render, samples=CHANGES, description=__doc__)
