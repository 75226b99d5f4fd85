"""The highest steady rate: more and more of the load of `sustained`, until the producer or the consumer falls behind.

Producer, consumer and both servers are on the same machine.
"""

from benchmarks import figures, workloads
from benchmarks.arena import Arena
from benchmarks.figures import Figure, Options
from benchmarks.sustained import CHANGES_PER_MINUTE, MOST_LAG_SECONDS, ROWS, under_load

# Times the load of `sustained`.
STEPS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
# A step takes as long as this share of the minutes of `sustained`.
STEP_SHARE = 1 / 15
KEPT_UP = 0.99


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Raise the load step by step; return the last one that was carried."""
    seconds = max(5.0, options.minutes * 60 * STEP_SHARE)
    carried = 0.0
    series = []
    with arena.link("ceiling", workloads.items(ROWS), ["items"]) as databases:
        for step in STEPS:
            wanted = step * CHANGES_PER_MINUTE
            load = under_load(databases, wanted, seconds)
            databases.sync()
            databases.require_equal(["items"])
            # A consumer that falls behind shows it in the lag of the last samples, whatever it was in the middle.
            last_lag = load.series[-1][1]
            series.append([load.changes_per_minute, last_lag])
            figures.progress(f"    {load.changes_per_minute:,.0f}/minute, at last {last_lag:.1f} s")
            if load.changes_per_minute < KEPT_UP * wanted or last_lag > MOST_LAG_SECONDS:
                break
            carried = load.changes_per_minute
    return [
        Figure(
            "highest steady load of those tried",
            [carried],
            "changes/minute",
            details={"series": series},
        )
    ]


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
