"""What the demo shows: a live table below the lines of the story, or the lines alone."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sync_pipeline.demo.shop import TABLES, Observation


@dataclass(slots=True)
class Step:
    """One step of the story as it was told."""

    number: int
    title: str
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nodes: dict[str, Any] = field(default_factory=dict)


class Screen:
    """Prints steps as they happen.

    `live` keeps a table of both nodes below them, within a `following` block. On anything but a terminal, a step
    that changed the numbers ends with a line for each node.
    """

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        self.is_live = live
        self.steps: list[Step] = []
        self._observed: Sequence[Observation] = ()
        self._printed: Sequence[Observation] = ()
        self._live: Live | None = None

    @contextmanager
    def following(self) -> Iterator[Self]:
        """Keep the live table on the screen for a `with` block, where there is a live screen."""
        if not self.is_live:
            yield self
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def begin(self, title: str) -> Step:
        """Start the next step."""
        step = Step(len(self.steps) + 1, title)
        self.steps.append(step)
        self.console.print(
            f"[bold cyan]{step.number:>2}[/]  [bold]{escape(title)}[/]", highlight=False
        )
        return step

    def say(self, line: str) -> None:
        """Print a line of the current step; an indented one is code or output."""
        self.steps[-1].lines.append(line)
        style = "cyan" if line.startswith(" ") else "default"
        self.console.print(f"    {escape(line)}", style=style, highlight=False, soft_wrap=True)

    def show(self, observed: Sequence[Observation]) -> None:
        """Bring the live table up to date."""
        self._observed = observed
        if self._live is not None:
            self._live.update(table(observed), refresh=True)

    def end(self, seconds: float) -> None:
        """End the current step with the state of both nodes."""
        step = self.steps[-1]
        step.seconds = round(seconds, 3)
        step.nodes = {
            seen.node: {
                "rows": seen.rows,
                "pending": seen.pending,
                "failures": seen.failures,
                "conflicts": seen.conflicts,
            }
            for seen in self._observed
        }
        if not self.console.is_terminal and self._observed != self._printed:
            self._printed = self._observed
            for seen in self._observed:
                self.console.print(f"    {line(seen)}", highlight=False, soft_wrap=True)

    def conclude(self, *, equal: bool, seconds: float) -> None:
        """Print the last table and the verdict."""
        self.console.print(table(self._observed))
        verdict = "[bold green]equal[/]" if equal else "[bold red]NOT equal[/]"
        self.console.print(f"Both databases are {verdict}. {seconds:.0f} s.", highlight=False)


def table(observed: Sequence[Observation]) -> Table:
    """Draw both nodes: rows of each table, and what waits or went wrong."""
    drawn = Table(header_style="bold")
    drawn.add_column("node", style="bold cyan")
    for name in (*TABLES, "pending", "failures", "conflicts"):
        drawn.add_column(name, justify="right", min_width=7)
    for seen in observed:
        drawn.add_row(
            seen.node,
            *(str(seen.rows[name]) for name in TABLES),
            _marked(seen.pending, "yellow"),
            _marked(seen.failures, "red"),
            _marked(seen.conflicts, "magenta"),
        )
    return drawn


def line(seen: Observation) -> str:
    """Say the same of one node in one line."""
    rows = "  ".join(f"{name} {seen.rows[name]:>3}" for name in TABLES)
    waiting = f"pending {seen.pending:>3}  failures {seen.failures}  conflicts {seen.conflicts}"
    return f"{seen.node:<7}  {rows}  {waiting}"


def save_picture(console: Console, path: Path, title: str = "sync-pipeline demo") -> None:
    """Write what a recording console has printed to an SVG file that loads nothing from elsewhere."""
    template = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(path), title=title, code_format=template)


def _marked(count: int, style: str) -> str:
    return f"[bold {style}]{count}[/]" if count else "0"
