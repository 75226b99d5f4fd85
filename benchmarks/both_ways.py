"""Changes on both sides at once, without conflicts, against as many on one side."""

from benchmarks import drain, figures, stages, workloads
from benchmarks.arena import Arena
from benchmarks.figures import Figure, Options


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Drain half of a backlog from each side, and all of it from one, in turns."""
    rows, half = options.of(200_000), options.of(25_000)
    all_of_it = workloads.single_updates(2 * half, rows)
    here = workloads.single_updates(half, rows)
    there = workloads.single_updates(half, rows, first=half)
    both: list[float] = []
    one: list[float] = []
    with (
        arena.without_autovacuum(),
        arena.link("both_ways", all_of_it.schema, all_of_it.tables) as databases,
    ):

        def make_both(mark: str) -> None:
            databases.target.execute("set synchronous_commit = off")
            databases.target.execute(there.backlog.format(mark=mark).encode())
            drain.make(databases, here, mark)

        for number in range(options.rounds):
            for ways in (1, 2) if number % 2 == 0 else (2, 1):
                mark = f"round {number} {ways}"
                if ways == 1:
                    drain.make(databases, all_of_it, mark)
                else:
                    make_both(mark)
                seconds = databases.sync().seconds
                (one if ways == 1 else both).append(2 * half / seconds)
                databases.require_equal(["items"])
            figures.progress(f"    both ways {both[-1]:,.0f}/s, one way {one[-1]:,.0f}/s")
        make_both("profiled")
        profile = stages.profiled(databases)
    return [
        Figure(f"{half:,} changes on each side", both, "records/s", details={"profile": profile}),
        Figure(f"{2 * half:,} changes on one side", one, "records/s"),
        Figure(
            "both ways ÷ one way",
            [mine / other for mine, other in zip(both, one, strict=True)],
            at_least=0.9,
        ),
    ]


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
