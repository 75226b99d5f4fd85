"""How the measurements of Dagster are run, and their tables in docs/dagster.md, each between markers of its own."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks import figures, report
from benchmarks.arena import Arena, opened
from benchmarks.figures import Figure
from sync_pipeline.servers import default_version

PAGE = Path(__file__).parent.parent / "docs" / "dagster.md"

Measure = Callable[[Arena, int], list[Figure]]
# The table of some figures, and what has to be said about it, as Markdown.
Render = Callable[[list[Figure]], str]


def begin(name: str) -> str:
    """The marker that a measurement's part of the page begins with."""
    return f"<!-- figures: written by `python -m benchmarks.{name} --write` -->"


def main(measure: Measure, render: Render, *, samples: int, description: str | None) -> None:
    """Measure on servers made for it, print the table, and with `--write` put it into the page."""
    name = Path(sys.modules[measure.__module__].__file__ or "").stem
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--samples", type=int, default=samples, help=f"per figure, by default {samples}"
    )
    parser.add_argument("--pg-version", type=int, help="by default the newest that is installed")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    version = arguments.pg_version or default_version()
    started = time.monotonic()
    with opened(version) as arena:
        measured = measure(arena, arguments.samples)
    figures.progress(f"measured in {(time.monotonic() - started) / 60:.1f} minutes")
    text = f"{render(measured)}\n\n{_circumstances(version, arguments.samples)}"
    print(text)
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(report.replace(page, text, begin(name)), encoding="utf-8")


def _circumstances(version: int, samples: int) -> str:
    return (
        f"Measured on {datetime.now(UTC).date().isoformat()}: {os.cpu_count()} cores,"
        f" {platform.system()} {platform.machine()}, Python {platform.python_version()},"
        f" Dagster {metadata.version('dagster')}, PostgreSQL {version}; {samples} samples each."
    )
