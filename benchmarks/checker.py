"""One comparison in a process of its own: `python -m benchmarks.checker sync.yaml`. Reports as one line of JSON."""

import json
import sys
import time
from pathlib import Path

from benchmarks import processes
from sync_pipeline.config import load
from sync_pipeline.database import connected
from sync_pipeline.verify import verify


def main() -> None:
    config = load(Path(sys.argv[1]), {})
    with (
        connected(config.first, config, "verify") as first,
        connected(config.second, config, "verify") as second,
    ):
        before = processes.peak_mb()
        started = time.monotonic()
        report = verify(config, {config.first.name: first, config.second.name: second})
        seconds = time.monotonic() - started
    found = sum(
        table.different_count + sum(table.missing_count.values())
        for table in report.tables.values()
    )
    peak = processes.peak_mb()
    print(
        json.dumps(
            {"seconds": seconds, "found": found, "peak_mb": peak, "growth_mb": peak - before}
        )
    )


if __name__ == "__main__":
    main()
