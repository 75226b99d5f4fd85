"""Faults at named points of a pass; `python -m tests.crashing POINT` is a consumer that kills itself there.

A point is the call of one function of the engine: a fault strikes before it or after it. Nothing else is different.
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
    def struck_by(self, fault: Callable[[], None], *, turn: int = 1) -> Iterator[None]:
        """Let a fault strike once, when the point is reached for the `turn`-th time in a `with` block."""
        original = getattr(self.owner, self.name)
        left = turn

        def strike() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                fault()

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.when == "before":
                strike()
            result = original(*args, **kwargs)
            if self.when == "after":
                strike()
            return result

        with mock.patch.object(self.owner, self.name, wrapped):
            yield


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


def die() -> None:
    """End this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with POINTS[sys.argv[1]].struck_by(die):
        stream.sync(load())
