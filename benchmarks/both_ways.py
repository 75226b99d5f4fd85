"""Changes on both sides at once, without conflicts, against as many on one side; and ten times as many."""

from benchmarks import drain, figures, stages, workloads
from benchmarks.arena import Arena
from benchmarks.figures import Figure, Options

MANY_TIMES = 10


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Drain half of a backlog from each side, and all of it from one, in turns."""
    rows, half = options.of(500_000), options.of(25_000)
    many = MANY_TIMES * half
    all_of_it = workloads.single_updates(2 * half, rows)
    both: list[float] = []
    one: list[float] = []
    large: list[float] = []
    with (
        arena.without_autovacuum(),
        arena.link("both_ways", all_of_it.schema, all_of_it.tables) as databases,
    ):

        def make_both(mark: str, each: int) -> None:
            there = workloads.single_updates(each, rows, first=each)
            databases.target.execute("set synchronous_commit = off")
            databases.target.execute(there.backlog.format(mark=mark).encode())
            drain.make(databases, workloads.single_updates(each, rows), mark)

        def rate(changes: int) -> float:
            seconds = databases.sync().seconds
            databases.require_equal(["items"])
            return changes / seconds

        for number in range(options.rounds):
            for ways in (1, 2) if number % 2 == 0 else (2, 1):
                mark = f"round {number} {ways}"
                if ways == 1:
                    drain.make(databases, all_of_it, mark)
                    one.append(rate(2 * half))
                else:
                    make_both(mark, half)
                    both.append(rate(2 * half))
            make_both(f"round {number} many", many)
            large.append(rate(2 * many))
            figures.progress(
                f"    both ways {both[-1]:,.0f}/s, one way {one[-1]:,.0f}/s, of many {large[-1]:,.0f}/s"
            )
        make_both("profiled", half)
        profile = stages.profiled(databases)
    return [
        Figure(f"{half:,} changes on each side", both, "records/s", details={"profile": profile}),
        Figure(f"{2 * half:,} changes on one side", one, "records/s"),
        Figure(
            "both ways ÷ one way",
            [mine / other for mine, other in zip(both, one, strict=True)],
            at_least=0.9,
        ),
        Figure(f"{many:,} changes on each side", large, "records/s"),
        Figure(
            f"both ways: rate at {many:,} ÷ rate at {half:,}",
            [mine / other for mine, other in zip(large, both, strict=True)],
        ),
    ]


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
