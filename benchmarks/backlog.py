"""Does the rate hold, and the memory stay, when the backlog is large? The same table and statements for every size."""

import statistics

from benchmarks import drain, figures, stages, workloads
from benchmarks.arena import Arena
from benchmarks.figures import Figure, Options

SMALL = 50_000
LARGE = 2_000_000
# Drained once each, for the picture.
BETWEEN = (100_000, 200_000, 500_000, 1_000_000)


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Compare the drain of a large backlog with that of a small one."""
    small, *between, large = (
        max(1000, options.of(size) // 1000 * 1000) for size in (SMALL, *BETWEEN, LARGE)
    )
    rates: dict[int, list[float]] = {}
    peaks: dict[int, list[float]] = {}
    with arena.link("backlog", workloads.items(large), ["items"]) as databases:

        def sample(size: int, mark: str) -> None:
            report = drain.drain(databases, workloads.chunks(size, large), mark)
            rates.setdefault(size, []).append(size / report.seconds)
            peaks.setdefault(size, []).append(report.peak_mb)
            figures.progress(
                f"    {size:,}: {rates[size][-1]:,.0f}/s, {report.peak_mb:.0f} MB at most"
            )

        for number in range(options.rounds):
            for size in (small, large) if number % 2 == 0 else (large, small):
                sample(size, f"round {number} of {size}")
        for size in between:
            sample(size, f"picture {size}")
        drain.make(databases, workloads.chunks(between[-1], large), "profiled")
        profile = stages.profiled(databases)
    series = [
        [size, statistics.median(samples), min(samples), max(samples)]
        for size, samples in sorted(rates.items())
    ]
    return [
        Figure(f"backlog of {small:,}", rates[small], "records/s"),
        Figure(
            f"backlog of {large:,}",
            rates[large],
            "records/s",
            details={"picture": "backlog", "series": series},
        ),
        Figure(
            f"backlog of {between[-1]:,}",
            rates[between[-1]],
            "records/s",
            details={"profile": profile},
        ),
        Figure(
            "rate at the large backlog ÷ small",
            _ratios(rates[large], rates[small]),
            at_least=0.85,
        ),
        Figure(f"peak memory at {large:,}", peaks[large], "MB", at_most=150),
        Figure(
            "peak memory at the large backlog ÷ small",
            _ratios(peaks[large], peaks[small]),
            at_most=1.1,
        ),
    ]


def _ratios(ours: list[float], others: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, others, strict=True)]


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
