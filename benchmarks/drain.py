"""How fast a backlog drains: by us, and by PostgreSQL's logical replication on the same servers in the same run.

Ours: from the first connection until every event is applied and acknowledged. The rival: from the moment its
subscription is enabled until the subscriber has the last row. Making the backlog is timed for neither. The rival
applies as a replica: it checks no foreign key.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from benchmarks import figures, rival, stages, workloads
from benchmarks.arena import Arena, Databases, Report
from benchmarks.figures import Figure, Options
from benchmarks.rival import Rival
from benchmarks.workloads import Workload


@dataclass
class Race:
    """The samples of one workload."""

    ours: list[float] = field(default_factory=list)
    rivals: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    our_cpu: list[dict[str, float]] = field(default_factory=list)
    rivals_cpu: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Opponent:
    """A rival by name, the databases that it drains, how it is made to wait for a backlog, and on what it runs."""

    name: str
    databases: Databases
    waiting: Callable[[], AbstractContextManager[Rival]]
    ground: str = ""


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Race against logical replication over the three backlogs; the last one also without its foreign key."""
    measured = []
    races = entries(options)
    unchecked = workloads.insert_storm(options.of(20_000), enforced=False)
    if options.only in unchecked.name:
        races.append((unchecked, None))
    for workload, target in races:
        figures.progress(f"  {workload.name}")
        with arena.databases("theirs", workload.schema) as theirs:
            waiting = partial(rival.subscribed, theirs, workload.tables)
            opponent = Opponent("logical replication", theirs, waiting)
            measured += race(arena, options, workload, opponent, target)
    return measured


def entries(options: Options) -> list[tuple[Workload, float | None]]:
    """The backlogs to race over, and how many times as fast as logical replication we should be."""
    rows = options.of(200_000)
    every: list[tuple[Workload, float | None]] = [
        (workloads.single_updates(options.of(50_000), rows), 1.6),
        (workloads.one_update(rows), 1.5),
        (workloads.insert_storm(options.of(20_000)), 1.1),
    ]
    return [(workload, target) for workload, target in every if options.only in workload.name]


def race(
    arena: Arena,
    options: Options,
    workload: Workload,
    opponent: Opponent,
    target: float | None = None,
) -> list[Figure]:
    """Drain a backlog by both, taking turns at going first."""
    result = Race()
    theirs = opponent.databases
    with (
        arena.without_autovacuum(),
        arena.link("ours", workload.schema, workload.tables) as ours,
    ):

        def we(mark: str) -> None:
            report = drain(ours, workload, mark)
            result.ours.append(workload.records / report.seconds)
            result.peaks.append(report.peak_mb)
            result.our_cpu.append(report.used)

        def they(mark: str) -> None:
            prepare(theirs, workload)
            with opponent.waiting() as waiting:
                fill(theirs, workload, mark)
                drained = waiting.drain(workload.arrived.format(mark=mark))
            result.rivals.append(workload.records / drained.seconds)
            result.rivals_cpu.append(drained.used)
            theirs.require_equal(workload.tables)

        for number in range(options.rounds):
            turns: list[Callable[[str], None]] = [we, they] if number % 2 == 0 else [they, we]
            for turn in turns:
                turn(f"round {number}")
            figures.progress(
                f"    ours {result.ours[-1]:,.0f}/s, theirs {result.rivals[-1]:,.0f}/s,"
                f" {result.ours[-1] / result.rivals[-1]:.2f}"
            )
        make(ours, workload, "profiled")
        profile = stages.profiled(ours)
    ratios = [mine / rivals for mine, rivals in zip(result.ours, result.rivals, strict=True)]
    our_cpu, rivals_cpu = (medians(samples) for samples in (result.our_cpu, result.rivals_cpu))
    details = {"profile": profile, "cpu": our_cpu}
    name = workload.name + opponent.ground
    return [
        Figure(f"{name}: ours", result.ours, "records/s", details=details),
        Figure(f"{name}: {opponent.name}", result.rivals, "records/s", details={"cpu": rivals_cpu}),
        Figure(f"{name}: ours ÷ {opponent.name}", ratios, at_least=target),
        Figure(
            f"{name}: processor time of {opponent.name} ÷ ours",
            [
                total(theirs) / total(mine)
                for mine, theirs in zip(result.our_cpu, result.rivals_cpu, strict=True)
            ],
        ),
        Figure(f"{name}: our peak memory", result.peaks, "MB", at_most=150),
    ]


def total(used: dict[str, float]) -> float:
    """All processor time of a drain: both servers, and the consumer where there is one."""
    return used["both servers"] + used.get("consumer", 0.0)


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    """The median of each key; a sample without it counts as 0."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {
        name: round(statistics.median(sample.get(name, 0.0) for sample in samples), 3)
        for name in names
    }


def make(databases: Databases, workload: Workload, mark: str) -> None:
    """Make a backlog on the source."""
    prepare(databases, workload)
    fill(databases, workload, mark)


def prepare(databases: Databases, workload: Workload) -> None:
    """Vacuum, analyse, and take the last backlog back where it has to be."""
    for session in databases.sessions:
        # Before a truncation: nobody would analyse an empty table, and plans for one are bad for what comes.
        session.execute("vacuum analyze")
        if workload.reset:
            for statement in workload.reset.split("; "):
                session.execute(statement.encode())


def fill(databases: Databases, workload: Workload, mark: str) -> None:
    """Make a backlog on the source, and let nothing of that be left to do."""
    # The backlog's own commits need not reach the disk one by one; the checkpoint brings them there.
    databases.source.execute("set synchronous_commit = off")
    databases.source.execute(workload.backlog.format(mark=mark).encode())
    for table in workload.tables:
        databases.source.execute(f"vacuum {table}".encode())
    databases.settle()


def drain(databases: Databases, workload: Workload, mark: str) -> Report:
    """Make a backlog and drain it by us."""
    make(databases, workload, mark)
    report = databases.sync()
    databases.require_equal(workload.tables)
    return report


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
