"""How much Dagster's own storage grows in a day, by runs that a sensor asks for and by the stream, on PostgreSQL.

Extrapolated: some runs of each way are executed, the growth of the database is divided by their number and multiplied
by the runs of a day. Runs are executed in this process; a run that is launched by the daemon adds a few events more.
The stream's runs are shortened: the observations of ten minutes are told within seconds, so that a run stores what a
real one stores.

It is not part of `make bench`. `--samples 10` executes 10 sync runs instead of 50; `--write` puts the table into
docs/dagster.md.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import dagster as dg
import psycopg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import TickData, TickStatus

from benchmarks import dagster_page, report, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure
from benchmarks.processes import repeated
from sync_pipeline.defs import build_sync_definitions, streaming
from tests.dagster_processes import storage_environment

SETTINGS = Path(__file__).parent.parent / "dagster_home" / "prod" / "dagster.yaml"
SYNC_RUNS = 50
STREAM_RUNS = 4
TICKS = 1000
TABLES = 3
SECONDS_PER_DAY = 86400
# While something always waits: the sensor looks every five seconds, and asks for no run beside one that starts.
SYNC_RUN_SECONDS = 10.0
# A sensor that finds nothing tells so each time it looks; these ticks are kept for a day.
TICKS_PER_DAY = SECONDS_PER_DAY * (2 / 5 + 1 / 60 + 1 / 30)
STREAM_TIME_LAPSE = 100
CHANGE_SECONDS = 0.05
# Nothing on this terminal; what is stored is the same.
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def measure(arena: Arena, runs: int) -> list[Figure]:
    """Execute runs of both ways and scale what they store to a day."""
    tables = [f"items{number}" for number in range(TABLES)]
    schema = "".join(workloads.items(1000, name=table) for table in tables)
    with (
        arena.link("storage", schema, tables) as databases,
        arena.databases("dagster", "") as storage,
        _instance(storage) as instance,
    ):
        found = build_sync_definitions(databases.config())

        def sync() -> None:
            for table in tables:
                databases.source.execute(f"update {table} set amount = amount + 1 where id <= 10")
            job = found.resolve_job_def("sync_job")
            assert job.execute_in_process(instance=instance, run_config=QUIET).success

        def stream() -> None:
            seconds = streaming.DEFAULT_BUDGET_SECONDS / STREAM_TIME_LAPSE
            config = {**QUIET, "ops": {"stream_changes": {"config": {"seconds": seconds}}}}
            job = found.resolve_job_def("stream_job")
            with (
                patch.object(
                    streaming, "OBSERVE_SECONDS", streaming.OBSERVE_SECONDS / STREAM_TIME_LAPSE
                ),
                _changing(databases, tables),
            ):
                assert job.execute_in_process(instance=instance, run_config=config).success

        def tick() -> None:
            instance.create_tick(
                TickData(
                    instigator_origin_id="0" * 40,
                    instigator_name="sync_sensor",
                    instigator_type=InstigatorType.SENSOR,
                    status=TickStatus.SKIPPED,
                    timestamp=time.time(),
                    skip_reason="nothing waits on crm or billing",
                    selector_id="0" * 40,
                )
            )

        per_sync = _bytes_each(storage, sync, runs)
        per_stream = _bytes_each(storage, stream, STREAM_RUNS)
        per_tick = _bytes_each(storage, tick, TICKS)
    sync_per_day = SECONDS_PER_DAY / SYNC_RUN_SECONDS
    stream_per_day = SECONDS_PER_DAY / streaming.DEFAULT_BUDGET_SECONDS
    return [
        Figure("a sync run stores", [per_sync / 1e3], "kB"),
        Figure("a stream run of ten minutes stores", [per_stream / 1e3], "kB"),
        Figure("sync runs, always busy, grow in a day by", [per_sync * sync_per_day / 1e6], "MB"),
        Figure(
            "the stream, always busy, grows in a day by", [per_stream * stream_per_day / 1e6], "MB"
        ),
        Figure("ticks of sensors, kept for a day", [per_tick * TICKS_PER_DAY / 1e6], "MB"),
    ]


def _bytes_each(storage: Databases, work: Callable[[], None], times: int) -> float:
    # Pages and indexes that the first ones fill are not counted as theirs.
    work()
    before = _size(storage)
    for _ in range(times):
        work()
    return (_size(storage) - before) / times


def _size(storage: Databases) -> int:
    row = storage.target.execute("select pg_database_size(current_database())").fetchone()
    return int(row[0]) if row else 0


@contextmanager
def _instance(storage: Databases) -> Iterator[dg.DagsterInstance]:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
        patch.dict(os.environ, storage_environment(storage.dsns["billing"])),
    ):
        shutil.copyfile(SETTINGS, Path(home) / SETTINGS.name)
        with dg.DagsterInstance.from_config(home) as instance:
            yield instance


@contextmanager
def _changing(databases: Databases, tables: list[str]) -> Iterator[None]:
    """Change something in each table, over and over, so that each observation has something to tell."""
    with psycopg.connect(databases.dsns["crm"], autocommit=True) as application:

        def change(_: int) -> None:
            for table in tables:
                application.execute(f"update {table} set amount = amount + 1 where id = 1")

        with repeated(change, CHANGE_SECONDS):
            yield


def render(found: list[Figure]) -> str:
    """What each run stores, and what a day adds."""
    sync, stream, sync_day, stream_day, ticks = (
        f"{figure.value:,.0f} {figure.unit}" for figure in found
    )
    rows = [
        (
            f"runs that `sync_sensor` asks for, one in {SYNC_RUN_SECONDS:.0f} seconds",
            sync,
            sync_day,
        ),
        ("`stream_job`, a run in ten minutes", stream, stream_day),
        ("ticks of all sensors that found nothing, kept for a day", "", f"{ticks} in all"),
    ]
    how = (
        f"Extrapolated: the growth of the database over these sync runs and {STREAM_RUNS} stream runs, divided by their"
        " number and multiplied by the runs of a day (an hour has"
        f" {3600 / SYNC_RUN_SECONDS:.0f} and {3600 / streaming.DEFAULT_BUDGET_SECONDS:.0f})."
    )
    return f"{report.table(('', 'each stores', 'a day adds'), rows)}\n\n{how}"


if __name__ == "__main__":
    dagster_page.main(measure, render, samples=SYNC_RUNS, description=__doc__)
