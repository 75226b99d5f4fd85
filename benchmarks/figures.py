"""What a benchmark measured, beside its target; the table and the JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.arena import SETTINGS, Arena, opened
from sync_pipeline.servers import default_version

ROUNDS = 5
QUICK_ROUNDS = 3
QUICK_SCALE = 0.1
# Of the largest table of most benchmarks; every other size keeps its proportion to it.
ROWS = 200_000
# Of sustained load.
MINUTES = 5.0
QUICK_MINUTES = 0.5
JSON_PATH = Path("build/bench.json")
TABLE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Options:
    """How thoroughly to measure. `scale` shrinks every workload: for trying out, not for figures."""

    rounds: int = ROUNDS
    scale: float = 1.0
    minutes: float = MINUTES
    only: str = ""

    def of(self, count: int) -> int:
        """A workload's size at this scale."""
        return max(100, int(count * self.scale))


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of some samples, and what it should be."""

    name: str
    samples: Sequence[float]
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return None

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {_number(self.at_least)}"
        return f"≤ {_number(self.at_most)}" if self.at_most is not None else ""

    @property
    def result(self) -> str:
        """The value with its unit."""
        return f"{_number(self.value)} {self.unit}".strip()

    @property
    def spread(self) -> str:
        """The least and the greatest sample."""
        if len(self.samples) < 2:
            return ""
        return f"{_number(min(self.samples))} - {_number(max(self.samples))}"

    def as_json(self) -> dict[str, Any]:
        """All of it, with what follows from it."""
        return {
            **asdict(self),
            "value": self.value,
            "met": self.is_met,
            "target": self.target,
            "result": self.result,
            "spread": self.spread,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured so far, by script, and the circumstances."""

    options: Options
    version: int
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """How many targets were reached, and how long it took."""
        met = [figure.is_met for measured in self.figures.values() for figure in measured]
        minutes = sum(self.seconds.values()) / 60
        small = "" if self.options.scale == 1 else " (small sizes: no figures for a decision)"
        counted = f"{met.count(True)} of {len(met) - met.count(None)} targets met"
        return f"{counted}, in {minutes:.0f} minutes{small}"

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        document = {
            "machine": {
                "cores": os.cpu_count(),
                "system": f"{platform.system()} {platform.machine()}",
                "python": platform.python_version(),
                "psycopg": psycopg.__version__,
                "postgresql": self.version,
                "settings": SETTINGS,
            },
            "day": datetime.now(UTC).date().isoformat(),
            "options": asdict(self.options),
            "seconds": self.seconds,
            "figures": [
                {"script": script, **figure.as_json()}
                for script, measured in self.figures.items()
                for figure in measured
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


Measure = Callable[[Arena, Options], list[Figure]]


def main(*measures: Measure, description: str | None) -> None:
    """Run some measurements on servers made for them; print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small and few: to try out")
    parser.add_argument("--rounds", type=int, help=f"samples per figure, by default {ROUNDS}")
    parser.add_argument(
        "--rows", type=int, help=f"of the largest table, by default {ROWS:,}; all sizes go with it"
    )
    parser.add_argument("--minutes", type=float, help=f"of sustained load, by default {MINUTES}")
    parser.add_argument("--only", default="", help="leave out workloads without this in their name")
    parser.add_argument("--statements", action="store_true", help="print the dearest statements")
    parser.add_argument("--pg-version", type=int, help="by default the newest that is installed")
    parser.add_argument("--json", type=Path, default=JSON_PATH, help=f"by default {JSON_PATH}")
    arguments = parser.parse_args()
    quick = arguments.quick
    options = Options(
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.rows / ROWS if arguments.rows else (QUICK_SCALE if quick else 1.0),
        arguments.minutes or (QUICK_MINUTES if quick else MINUTES),
        arguments.only,
    )
    console = _console(stderr=True)
    run = Run(options, arguments.pg_version or default_version())
    for measure in measures:
        module = sys.modules[measure.__module__]
        name = Path(module.__file__ or "").stem
        console.print(f"[dim]{name} …[/]")
        started = time.monotonic()
        try:
            # Fresh servers for each: nothing that one leaves behind slows the next.
            with opened(arguments.pg_version) as arena:
                measured = measure(arena, options)
        except Exception:  # noqa: BLE001 - the others have still to be measured; the run as a whole fails
            console.print_exception()
            run.failed.append(name)
            continue
        run.seconds[name] = round(time.monotonic() - started, 1)
        run.figures[name] = measured
        show(measured, console, statements=arguments.statements)
        run.write(arguments.json)
    if len(measures) > 1:
        output = _console(stderr=False)
        show([figure for measured in run.figures.values() for figure in measured], output)
        output.print(run.summary)
    console.print(f"[dim]written to {arguments.json}[/]")
    if run.failed:
        sys.exit(f"failed: {', '.join(run.failed)}")


def show(figures: Sequence[Figure], console: Console, *, statements: bool = False) -> None:
    """Print figures as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("figure", "median", "spread", "target", ""):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        met = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[figure.is_met]
        table.add_row(figure.name, figure.result, figure.spread, figure.target, met)
    console.print(table)
    for figure in figures:
        if profile := figure.details.get("profile"):
            console.print(
                f"[dim]{figure.name}, stages: {_spent(profile['stages'], ', ')}[/]", highlight=False
            )
            if statements:
                console.print(f"[dim]{_spent(profile['statements'], chr(10))}[/]", highlight=False)
        if used := figure.details.get("cpu"):
            parts = ", ".join(f"{who} {seconds:.2f} s" for who, seconds in used.items())
            console.print(f"[dim]{figure.name}, processor time: {parts}[/]", highlight=False)


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def _spent(entries: dict[str, dict[str, float]], separator: str) -> str:
    return separator.join(
        f"{name} {spent['seconds']:.2f} s ({spent['cpu']:.2f} s cpu)"
        for name, spent in entries.items()
    )


def _console(*, stderr: bool) -> Console:
    # A name should stay on its line where the output is no terminal and its width a guess.
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=TABLE_WIDTH)


def _number(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"
