"""What a comparison of 1,000,000 rows per side costs, beside a plain full scan of both sides in the same run.

The scan is `select md5(string_agg(...))` over the table in key order, on both servers at once, as ours is: it tells
that two tables are equal, and neither where they differ nor what is only pending.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks import figures, processes, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure, Options

SCAN = b"select pg_catalog.md5(pg_catalog.string_agg(t::text, ',' order by t.id)) from items as t"
SILENTLY = "set session_replication_role = replica; {}; reset session_replication_role"


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Compare tables that are equal, that differ in ten records, and that differ in every record."""
    rows = options.of(1_000_000)
    schema = workloads.items(rows)
    ours: list[dict[str, float]] = []
    scans: list[float] = []
    with arena.link("verified", schema, ["items"]) as databases:
        databases.settle()
        for number in range(options.rounds):
            for turn in (0, 1) if number % 2 == 0 else (1, 0):
                if turn == 0:
                    ours.append(check(databases, 0))
                else:
                    scans.append(scan(databases))
            figures.progress(f"    ours {ours[-1]['seconds']:.2f} s, the scan {scans[-1]:.2f} s")
        silently(databases, f"update items set note = 'drift' where id % {rows // 10} = 0")
        few = [check(databases, 10) for _ in range(options.rounds)]
        silently(databases, "update items set note = 'all drifted'")
        every = [check(databases, rows)]
    ratios = [one["seconds"] / other for one, other in zip(ours, scans, strict=True)]
    return [
        Figure(f"verify {rows:,} equal rows per side", _all(ours, "seconds"), "s"),
        Figure("plain full scan of both sides", scans, "s"),
        Figure("verify ÷ plain scan", ratios, at_most=1.5),
        Figure("verify: peak memory", _all(ours, "peak_mb"), "MB", at_most=100),
        Figure("verify, ten records differ", _all(few, "seconds"), "s"),
        Figure("verify, every record differs", _all(every, "seconds"), "s"),
        Figure("verify, every record differs: peak memory", _all(every, "peak_mb"), "MB", at_most=120),
    ]  # fmt: skip


def check(databases: Databases, expected: int) -> dict[str, float]:
    """Compare in a process of its own; the time of its start is not counted."""
    command = [sys.executable, "-m", "benchmarks.checker", str(databases.config_path)]
    with processes.started(*command) as process:
        report: dict[str, float] = json.loads(process.read_line())
    if report["found"] != expected:
        raise AssertionError(f"found {report['found']} differences, not {expected}")
    return report


def scan(databases: Databases) -> float:
    """Hash both tables whole, at the same time."""
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        hashes = set(
            pool.map(lambda session: session.execute(SCAN).fetchall()[0], databases.sessions)
        )
    seconds = time.monotonic() - started
    if len(hashes) != 1:
        raise AssertionError("the tables differ")
    return seconds


def silently(databases: Databases, statement: str) -> None:
    """Change the target without marking anything."""
    databases.target.execute(SILENTLY.format(statement).encode())
    databases.target.execute("vacuum analyze items")
    databases.settle()


def _all(reports: list[dict[str, float]], name: str) -> list[float]:
    return [report[name] for report in reports]


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
