"""The consumer alone in a process, without Dagster: `python -m benchmarks.consumer sync.yaml [--stream]`.

Says `ready` when all is imported, begins at the first line on its input, and reports as one line of JSON. With
`--stream` it says `leading` once it leads, and runs until the next line.
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from benchmarks import cpu, processes
from sync_pipeline import stream
from sync_pipeline.config import Config, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    config = load(arguments.config, {})
    print("ready", flush=True)
    sys.stdin.readline()
    names = {
        int(str(conninfo_to_dict(node.dsn.get_secret_value())["port"])): node.name
        for node in config.nodes
    }
    with cpu.backends(names) as backends:
        before, started = time.process_time(), time.monotonic()
        totals = _stream(config) if arguments.stream else stream.sync(config)
        seconds, spent = time.monotonic() - started, time.process_time() - before
    report = {
        "seconds": seconds,
        "cpu_seconds": spent,
        "backend_seconds": backends,
        "peak_mb": processes.peak_mb(),
        "passes": totals.passes,
        "directions": {name: asdict(counts) for name, counts in totals.directions.items()},
    }
    print(json.dumps(report), flush=True)


def _stream(config: Config) -> stream.Totals:
    """Run the loop until the next line of the input."""
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    listener = stream.Listener(leading=lambda: print("leading", flush=True))
    return stream.stream(config, stop, listener=listener)


if __name__ == "__main__":
    main()
