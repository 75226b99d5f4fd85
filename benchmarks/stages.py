"""Where the consumer's time goes, seen from outside: every statement that it sends is timed and named by what it is.

The names are those of the protocol. Work on both servers overlaps, so the sum may exceed the time of the clock.
"""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
from psycopg import sql

# The first pattern that a statement contains names its stage.
_STAGES = [
    ("stage", r"^copy .* from stdin"),
    ("source read", r"^copy "),
    (
        "upsert",
        r"^with .*\b(insert into|delete from|update)\b.*stage_|^(insert into|merge|update|delete) .*stage_",
    ),
    ("acknowledge", r"(delete from|update) .*sync_events|sync_failures|set last_pass_at"),
    ("source read", r"next_events|waiting_events|sync_events.*(read_ids|limit|group by)"),
    ("check", r"has_events|sync_events|set constraints|stage_"),
    ("ledger", r"sync_applied"),
    ("catalog", r"pg_class|pg_constraint|pg_attribute|pg_trigger|sync_node"),
]
_COMPILED = [(stage, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for stage, pattern in _STAGES]


class Clock:
    """Seconds by stage, added up over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] += seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - started)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, the longest first."""
        return dict(sorted(self._seconds.items(), key=lambda item: -item[1]))


def watch() -> Clock:
    """Time every statement, COPY and transaction of this process from now on."""
    clock = Clock()
    _watch_statements(clock)
    _watch_copies(clock)
    _watch_transactions(clock)
    return clock


def stage_of(statement: str) -> str:
    """Name the stage that a statement belongs to."""
    text = " ".join(line for line in statement.splitlines() if not line.startswith("--")).strip()
    for stage, pattern in _COMPILED:
        if pattern.search(text):
            return stage
    return "other"


def _watch_statements(clock: Clock) -> None:
    execute: Callable[..., Any] = psycopg.Cursor.execute

    def timed_execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        with clock.timed(stage_of(_text(query, self))):
            return execute(self, query, *args, **options)

    psycopg.Cursor.execute = timed_execute  # type: ignore[method-assign]


def _watch_copies(clock: Clock) -> None:
    copy: Callable[..., Any] = psycopg.Cursor.copy
    read: Callable[..., Any] = psycopg.Copy.read

    @contextmanager
    def timed_copy(self: Any, statement: Any, *args: Any, **options: Any) -> Iterator[Any]:
        stage = stage_of(_text(statement, self))
        if stage == "source read":
            with ExitStack() as exits:
                # The server answers with its first rows: by then it has scanned and sorted. The rest travels.
                with clock.timed(stage):
                    opened = exits.enter_context(copy(self, statement, *args, **options))
                yield opened
        else:
            with clock.timed(stage), copy(self, statement, *args, **options) as opened:
                yield opened

    def timed_read(self: Any) -> Any:
        with clock.timed("transfer"):
            return read(self)

    psycopg.Cursor.copy = timed_copy  # type: ignore[method-assign]
    psycopg.Copy.read = timed_read  # type: ignore[method-assign]


def _watch_transactions(clock: Clock) -> None:
    leave: Callable[..., Any] = psycopg.Transaction.__exit__

    def timed_leave(self: Any, *args: Any) -> Any:
        with clock.timed("commit"):
            return leave(self, *args)

    psycopg.Transaction.__exit__ = timed_leave  # type: ignore[method-assign]


def _text(query: Any, cursor: Any) -> str:
    if isinstance(query, sql.Composable):
        return query.as_string(cursor)
    return query.decode() if isinstance(query, bytes) else str(query)
