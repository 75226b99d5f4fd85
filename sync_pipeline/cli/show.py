"""How values look: JSON for programs, tables for people, one line for a log."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sync_pipeline.records import printable

# Rich takes 80 columns for what is no terminal; a file or a pipe has room for more.
PIPE_COLUMNS = 160


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints data as it is: no markup, no emoji, no colours from guesses."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def document(value: object) -> None:
    """Print a value as the one JSON document of a command."""
    say(json.dumps(value, default=_plain, indent=2))


def say(text: str) -> None:
    """Print a line of the result; at once, for whoever follows it."""
    print(text, flush=True)  # noqa: T201 - the result of a program


def complain(text: str) -> None:
    """Print a message beside the result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the message of a program


def table(title: str | None, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Lay rows out as a table; numbers to the right, long text folded and never cut off."""
    rows = list(rows)
    laid_out = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, heading in enumerate(headings):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        laid_out.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        laid_out.add_row(*(_cell(value) for value in row))
    return laid_out


def duration(seconds: float) -> str:
    """Return a length of time that is easy to read: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `4 d 3 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, size in (("d", "h", 3600), ("h", "min", 60), ("min", "s", 1)):
        factor = 24 if large == "d" else 60
        if whole >= factor * size:
            first, second = divmod(whole // size, factor)
            return f"{first} {large} {second} {small}" if second else f"{first} {large}"
    return f"{whole} s"


def moment(at: datetime | None) -> str:
    """Return a time to the second, or a dash."""
    return "-" if at is None else at.isoformat(sep=" ", timespec="seconds")


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    if value is None:
        return Text("-")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int):
        return Text(f"{value:,}")
    if isinstance(value, datetime):
        return Text(moment(value))
    return Text(printable(str(value)))


def _plain(value: Any) -> object:
    """Return what JSON can hold for a value that it cannot."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return str(value)
