"""Everything, from nothing: `make bench`, or `python -m benchmarks`. One script alone: `python -m benchmarks.drain`."""

from benchmarks import (
    backlog,
    both_ways,
    bucardo,
    capture,
    ceiling,
    drain,
    figures,
    held_snapshot,
    latency,
    sustained,
    tables,
    trouble,
    verify,
)

SCRIPTS = (
    drain,
    both_ways,
    backlog,
    capture,
    held_snapshot,
    sustained,
    ceiling,
    latency,
    trouble,
    tables,
    verify,
    bucardo,
)

if __name__ == "__main__":
    figures.main(*(script.measure for script in SCRIPTS), description=__doc__)
