"""What conflicts and failures cost: a backlog in which some records changed on both sides, or are refused."""

from collections.abc import Callable
from typing import TypeVar

from benchmarks import drain, figures, stages, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.figures import Figure, Options
from benchmarks.workloads import STRIDE, Workload

CONFLICTS = 0.05
FAILURES = 0.01
REFUSED = "refused"

T = TypeVar("T")


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Drain the same backlog without trouble, with conflicts and with failures, in turns."""
    rows, records = options.of(200_000), options.of(50_000)
    workload = workloads.single_updates(records, rows)
    rates: dict[str, list[float]] = {"none": [], "conflicts": [], "failures": []}
    with (
        arena.without_autovacuum(),
        arena.link("trouble", workload.schema, workload.tables) as databases,
    ):
        databases.target.execute(
            f"alter table items add constraint acceptable check (name <> '{REFUSED}')".encode()
        )
        for number in range(options.rounds):
            kinds = list(rates) if number % 2 == 0 else list(rates)[::-1]
            for kind in kinds:
                mark = f"{kind} {number}"
                report = _drain(databases, workload, rows, kind, mark, Databases.sync)
                rates[kind].append(records / report.seconds)
            figures.progress(
                "    "
                + ", ".join(f"{kind} {samples[-1]:,.0f}/s" for kind, samples in rates.items())
            )
        profiles = {
            kind: _drain(databases, workload, rows, kind, f"profiled {kind}", stages.profiled)
            for kind in rates
        }
    return [
        *(
            Figure(
                f"{records:,} updates, trouble: {kind}",
                samples,
                "records/s",
                details={"profile": profiles[kind]},
            )
            for kind, samples in rates.items()
        ),
        *(
            Figure(
                f"{share:.0%} {kind} ÷ none",
                [mine / none for mine, none in zip(rates[kind], rates["none"], strict=True)],
                at_least=0.6,
            )
            for kind, share in (("conflicts", CONFLICTS), ("failures", FAILURES))
        ),
    ]


def _drain(
    databases: Databases,
    workload: Workload,
    rows: int,
    kind: str,
    mark: str,
    drained: Callable[[Databases], T],
) -> T:
    """Make a backlog with some trouble in it, let `drained` drain it, and see that all went as it should."""
    every = round(1 / (CONFLICTS if kind == "conflicts" else FAILURES))
    # Numbers scatter as the workload's do, so these are some of its records, spread over all of it.
    some = f"""
    update items set {{change}}
    where id in (
        select 1 + (i * {STRIDE}::bigint) % {rows} from generate_series(1, {workload.records}, {every}) as i
    )"""
    if kind == "failures":
        databases.source.execute("set session_replication_role = replica")
        databases.source.execute(some.format(change=f"name = '{REFUSED}'").encode())
        databases.source.execute("reset session_replication_role")
    drain.make(databases, workload, mark)
    if kind == "conflicts":
        databases.target.execute(some.format(change=f"note = 'also {mark}'").encode())
    result = drained(databases)
    _require(databases, kind, len(range(1, workload.records + 1, every)))
    if kind == "failures":
        _mend(databases, some)
    databases.require_equal(workload.tables)
    return result


def _require(databases: Databases, kind: str, expected: int) -> None:
    """Raise unless the trouble was what the figure says."""
    table = "sync_failures" if kind == "failures" else "sync_conflicts"
    found = 0
    for session in databases.sessions:
        row = session.execute(f"select count(*) from sync.{table}".encode()).fetchone()
        found += int(row[0]) if row else 0
        if kind == "conflicts":
            session.execute("truncate sync.sync_conflicts")
    if found != (0 if kind == "none" else expected):
        raise AssertionError(f"{found} {kind} instead of {expected}")


def _mend(databases: Databases, some: str) -> None:
    databases.source.execute(some.format(change="name = 'item'").encode())
    databases.sync()
    databases.source.execute("update sync.sync_failures set next_attempt_at = now()")
    databases.sync()


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
