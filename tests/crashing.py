"""A consumer that kills itself with SIGKILL at a named point of a pass: `python -m tests.crashing POINT`.

It wraps one function of the engine and then runs the engine's own loop; nothing else is different.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sync_pipeline import ledger, outbox, stream
from sync_pipeline.batch import Batch
from sync_pipeline.config import load
from sync_pipeline.passes import Acknowledger, Pass


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str) -> None:
    """Die where `name` would be called."""
    setattr(owner, name, die)


def after(owner: Any, name: str) -> None:
    """Die where `name` returns."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        die()
        return result

    setattr(owner, name, wrapped)


POINTS: dict[str, Callable[[], None]] = {
    "after the fetch of dependents": lambda: after(Pass, "fetch_dependents"),
    "after the rows are staged": lambda: after(Batch, "_open"),
    "after the parents are written": lambda: after(Batch, "upsert"),
    "before the ledger is written": lambda: before(ledger, "record"),
    "before the target's commit": lambda: after(ledger, "record"),
    "after the target's commit": lambda: before(Acknowledger, "submit"),
    "before the source's delete": lambda: before(outbox, "acknowledge"),
    "after the source's delete": lambda: after(outbox, "acknowledge"),
    "before the ledger is cleared": lambda: before(Acknowledger, "finish"),
    "after the pass": lambda: after(Pass, "process_dependents"),
}

if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    stream.sync(load())
