"""One pass over many tables with one change each: what a pass costs per table."""

import time

from benchmarks import figures, workloads
from benchmarks.arena import Arena
from benchmarks.figures import Figure, Options
from sync_pipeline import passes
from sync_pipeline.link import lead

TABLES = 50
# The first pass makes its staging tables; a statement that comes back often enough is planned once and kept.
WARM_UP = 12


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Time passes of a consumer that has been at work for a while."""
    names = [f"items_{number}" for number in range(TABLES)]
    schema = "\n".join(workloads.items(100, name=name) for name in names)
    milliseconds = []
    with arena.link("tables", schema, names) as databases:
        with lead(databases.config()) as link:
            for number in range(WARM_UP + options.rounds):
                with databases.source.transaction():
                    for name in names:
                        databases.source.execute(
                            f"update {name} set note = 'round {number}' where id = 1".encode()
                        )
                started = time.perf_counter()
                reports = passes.run(link)
                milliseconds.append((time.perf_counter() - started) * 1000)
                if sum(report.total.upserted for report in reports) != TABLES:
                    raise AssertionError(f"the pass did something else: {reports}")
        databases.require_equal(names)
    figures.progress(f"    {', '.join(f'{sample:.0f} ms' for sample in milliseconds)}")
    return [
        Figure(f"a pass over {TABLES} tables", milliseconds[WARM_UP:], "ms", at_most=100),
        Figure("the first such pass of a consumer", milliseconds[:1], "ms"),
    ]


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
