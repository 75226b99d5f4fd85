"""The consumer alone in a process, without Dagster: `python -m benchmarks.consumer sync.yaml [--stream] [--stages]`.

Says `ready` when all is imported, begins at the first line on its input, and reports as one line of JSON. With
`--stream` it says `leading` once it leads, and runs until the next line. `--stages` adds where the time went.
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import processes, stages
from sync_pipeline import stream
from sync_pipeline.config import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--stages", action="store_true")
    arguments = parser.parse_args()
    config = load(arguments.config, {})
    clock = stages.watch() if arguments.stages else None
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, started = time.process_time(), time.monotonic()
    if arguments.stream:
        stop = threading.Event()

        def listen() -> None:
            sys.stdin.readline()
            stop.set()

        threading.Thread(target=listen, daemon=True).start()
        totals = stream.stream(
            config, stop, listener=stream.Listener(leading=lambda: print("leading", flush=True))
        )
    else:
        totals = stream.sync(config)
    report = {
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": processes.peak_mb(),
        "passes": totals.passes,
        "directions": {name: asdict(counts) for name, counts in totals.directions.items()},
        "stages": clock.seconds() if clock else {},
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
