"""How much memory Dagster's processes and a run of each way hold, on Linux: what /proc/PID/smaps_rollup says.

All of it is real: webserver, daemon, code server, and runs in processes of their own. A run is looked at while it
works: the stream after it has applied changes for a while, a sync run in the middle of a large batch, which a lock on
the target holds up. Rss counts each page for everyone who maps it; Pss shares pages out, so that it can be added up.

It is not part of `make bench`. `--write` puts the table into docs/dagster.md.
"""

import re
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from benchmarks import dagster_page, report, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure
from benchmarks.processes import repeated
from tests.dagster_processes import Dagster
from tests.helpers import eventually

SAMPLES = 3
ITEMS = 100_000
STREAM_CHANGES = 300
CHANGE_SECONDS = 0.01
SERVICES = ("webserver", "daemon", "code")


def measure(arena: Arena, samples: int) -> list[Figure]:
    """Look at the three services and at runs, one of each way for each sample."""
    seen: dict[str, list[dict[str, float]]] = {}
    with (
        arena.link("memory", workloads.items(ITEMS), ["items"]) as databases,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        Dagster(databases.config_path, {}, Path(directory) / "home") as dagster,
    ):
        dagster.stop_sensor("sync_sensor")
        for _ in range(samples):
            with _streaming(dagster, databases) as pid:
                seen.setdefault("a run of `stream_job`", []).append(memory(pid))
            with _syncing(dagster, databases) as pid:
                seen.setdefault("a run of `sync_job`", []).append(memory(pid))
            for name in SERVICES:
                label = "code server" if name == "code" else name
                seen.setdefault(label, []).append(memory(dagster.pid(name)))
    return [
        Figure(
            name,
            [sample["Pss"] for sample in looks],
            "MB",
            details={"rss": statistics.median(sample["Rss"] for sample in looks)},
        )
        for name, looks in seen.items()
    ]


def memory(pid: int) -> dict[str, float]:
    """Return Rss and Pss of a process in MB (10^6 bytes)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return {
        name: int(kilobytes) * 1024 / 1e6
        for name, kilobytes in re.findall(r"^(Rss|Pss): +([0-9]+) kB$", rollup, re.MULTILINE)
    }


def render(found: list[Figure]) -> str:
    """A line for each process."""
    rows = [
        (figure.name, f"{figure.value:.0f} MB", f"{figure.details['rss']:.0f} MB")
        for figure in found
    ]
    return report.table(("process", "Pss", "Rss"), rows)


@contextmanager
def _streaming(dagster: Dagster, databases: Databases) -> Iterator[int]:
    """A stream that has applied changes of both nodes."""
    run = dagster.launch("stream_job")
    eventually("the stream leads", lambda: "leads" in dagster.said(run))
    statement = "update items set amount = amount + 1 where id = %s"
    changes = 0
    with (
        psycopg.connect(databases.dsns["crm"], autocommit=True) as crm,
        psycopg.connect(databases.dsns["billing"], autocommit=True) as billing,
    ):

        def change(number: int) -> None:
            nonlocal changes
            crm.execute(statement, [number])
            billing.execute(statement, [ITEMS - number])
            changes = number

        with repeated(change, CHANGE_SECONDS):
            eventually("enough changes", lambda: changes >= STREAM_CHANGES)
            yield dagster.run_pid(run)
    dagster.terminate(run)
    dagster.ended(run)


@contextmanager
def _syncing(dagster: Dagster, databases: Databases) -> Iterator[int]:
    """A run in the middle of a batch of every row, which waits for a lock on the target."""
    databases.source.execute("update items set amount = amount + 1")
    with psycopg.connect(databases.dsns["billing"]) as application:
        application.execute("lock table items in share mode")
        run = dagster.launch("sync_job")
        eventually("the run is in mid-batch", lambda: _waits_for_a_lock(databases))
        yield dagster.run_pid(run)
        application.rollback()
    assert dagster.ended(run) == "SUCCESS"


def _waits_for_a_lock(databases: Databases) -> bool:
    row = databases.target.execute(
        "select count(*) from pg_stat_activity where application_name like 'sync-pipeline%'"
        " and wait_event_type = 'Lock' and datname = current_database()"
    ).fetchone()
    return row is not None and row[0] > 0


if __name__ == "__main__":
    dagster_page.main(measure, render, samples=SAMPLES, description=__doc__)
