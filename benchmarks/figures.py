"""What a benchmark measured, beside its target; the table and the JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
TABLE_WIDTH = 120


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
    figures: list[Figure] = []
    for measure in measures:
        name = measure.__module__.rsplit(".", 1)[-1] if measure.__module__ != "__main__" else ""
        console.print(f"[dim]{name or 'measuring'} …[/]")
        # Fresh servers for each: nothing that one leaves behind slows the next.
        with opened(arguments.pg_version) as arena:
            measured = measure(arena, options)
        figures += measured
        show(measured, console, statements=arguments.statements)
        write(arguments.json, figures, options, arguments.pg_version)
    if len(measures) > 1:
        show(figures, _console(stderr=False))
    console.print(f"[dim]written to {arguments.json}[/]")


def show(figures: Sequence[Figure], console: Console, *, statements: bool = False) -> None:
    """Print figures as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("figure", "median", "spread", "target", ""):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        spread = f"{_number(min(figure.samples))} - {_number(max(figure.samples))}"
        met = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[figure.is_met]
        table.add_row(
            figure.name,
            f"{_number(figure.value)} {figure.unit}".strip(),
            spread if len(figure.samples) > 1 else "",
            figure.target,
            met,
        )
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


def write(path: Path, figures: Sequence[Figure], options: Options, version: int | None) -> None:
    """Write figures and the circumstances that they were measured in."""
    document = {
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "psycopg": psycopg.__version__,
            "postgresql": version or default_version(),
            "settings": SETTINGS,
        },
        "options": asdict(options),
        "figures": [
            {**asdict(figure), "value": figure.value, "met": figure.is_met} for figure in figures
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}"
