"""Faults at named points of a pass.

`python -m tests.crashing POINT SOURCE SIGNAL` is a consumer that sends itself a signal there: SIGKILL or SIGSTOP.

A point is the call of one function of the engine: a fault strikes before it or after it, in the direction that was
asked for. Nothing else is different.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sync_pipeline import ledger, outbox, stream
from sync_pipeline.batch import Batch
from sync_pipeline.config import load
from sync_pipeline.passes import Acknowledger, Pass


@dataclass(frozen=True)
class Point:
    """Before or after the call of a function of the engine."""

    when: str
    owner: Any
    name: str

    @contextmanager
    def struck_by(
        self, fault: Callable[[], bool | None], *, source: str | None = None
    ) -> Iterator[None]:
        """Let a fault strike once in a `with` block: when the direction from `source`, or any, first comes here.

        A fault that returns False did not strike; it is tried again at the next call.
        """
        original = getattr(self.owner, self.name)
        has_struck = False

        def strike() -> None:
            nonlocal has_struck
            if not has_struck and (source is None or source in running):
                has_struck = True
                has_struck = fault() is not False

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.when == "before":
                strike()
            result = original(*args, **kwargs)
            if self.when == "after":
                strike()
            return result

        with _noted_directions() as running, mock.patch.object(self.owner, self.name, wrapped):
            yield


@contextmanager
def _noted_directions() -> Iterator[list[str]]:
    """Yield the source of the direction that runs; one runs at a time, in whatever threads."""
    running: list[str] = []
    enter = Pass.__enter__

    def entered(one: Pass) -> Pass:
        running[:] = [one.source]
        return enter(one)

    with mock.patch.object(Pass, "__enter__", entered):
        yield running


POINTS = {
    "after the fetch of dependents": Point("after", Pass, "fetch_dependents"),
    "after the rows are staged": Point("after", Batch, "_open"),
    "after the parents are written": Point("after", Batch, "upsert"),
    "before the ledger is written": Point("before", ledger, "record"),
    "before the target's commit": Point("after", ledger, "record"),
    "after the target's commit": Point("before", Acknowledger, "submit"),
    "before the source's delete": Point("before", outbox, "acknowledge"),
    "after the source's delete": Point("after", outbox, "acknowledge"),
    "before the ledger is cleared": Point("before", Acknowledger, "finish"),
    "after the pass": Point("after", Pass, "process_dependents"),
}


def consume(point: str, source: str, signal_name: str) -> None:
    """Sync until nothing is pending, but for the signal that this process gets at a point."""
    number = signal.Signals[signal_name]
    with POINTS[point].struck_by(lambda: os.kill(os.getpid(), number), source=source):
        stream.sync(load())


if __name__ == "__main__":
    consume(*sys.argv[1:])
