"""The link as one run of Dagster holds it: opened by the first op that needs it, closed however the run ends."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import dagster as dg
from psycopg import pq

from sync_pipeline import passes
from sync_pipeline.config import Config
from sync_pipeline.database import Connection
from sync_pipeline.errors import LockTaken
from sync_pipeline.link import Link, lead
from sync_pipeline.passes import Pass

CANCEL_ROUNDS = 10
CANCEL_ROUND_SECONDS = 0.05
CANCEL_TIMEOUT_SECONDS = 0.5

T = TypeVar("T")


@dataclass
class Session:
    """What the ops of a run share: the configuration, the link once one of them leads, the pass that is under way."""

    config: Config
    stood_back: LockTaken | None = field(default=None, init=False)
    _link: Link | None = field(default=None, init=False)
    _current: Pass | None = field(default=None, init=False)
    _exits: ExitStack = field(default_factory=ExitStack, init=False)
    _pass_exits: ExitStack = field(default_factory=ExitStack, init=False)

    def lead(self) -> Link | None:
        """Take both locks on the first call. None when another worker leads: `stood_back` says who, for this run."""
        if self.stood_back is None and self._link is None:
            try:
                self._link = self._exits.enter_context(lead(self.config))
            except LockTaken as error:
                self.stood_back = error
        return self._link

    def begin(self, source: str, target: str) -> Pass:
        """Begin one direction of a pass. The run must lead."""
        if self._link is None:
            raise RuntimeError("a pass begins only in a run that leads")
        self.end()
        self._current = self._pass_exits.enter_context(Pass(self._link, source, target))
        return self._current

    def current(self, source: str, target: str) -> Pass | None:
        """Return the pass of this direction, or None when this run has not begun it."""
        current = self._current
        if current is None or (current.source, current.target) != (source, target):
            return None
        return current

    def end(self) -> None:
        """End the pass that is under way: close its snapshot."""
        self._current = None
        self._pass_exits.close()

    def run(self, stage: Callable[[], T]) -> T:
        """Run a stage of a pass so that a termination of the run cancels what it waits for in PostgreSQL.

        Dagster raises the termination in the main thread, wherever that is. Here it only ever waits: the stage runs
        beside it, meets the cancelled statement as any other interruption and rolls back in its own order.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="stage")
        future = pool.submit(_interruptible(stage))
        try:
            return future.result()
        except BaseException:
            self._cancel(future)
            raise
        finally:
            pool.shutdown(wait=False)

    def close(self) -> None:
        """Give the locks back. Statements that still run are cancelled; nothing is waited for."""
        self._cancel()
        try:
            self.end()
        finally:
            self._link = None
            self._exits.close()

    def _cancel(self, running: Future[T] | None = None) -> None:
        for _ in range(CANCEL_ROUNDS):
            for connection in self._connections:
                cancel(connection)
            if running is None or wait([running], CANCEL_ROUND_SECONDS).done:
                return

    @property
    def _connections(self) -> list[Connection]:
        if self._link is None:
            return []
        return [c for side in self._link.sides.values() for c in (side.writer, side.reader)]


def cancel(connection: Connection) -> None:
    """Cancel the statement that a connection runs, if it runs one."""
    with suppress(Exception):
        if connection.info.transaction_status == pq.TransactionStatus.ACTIVE:
            connection.cancel_safe(timeout=CANCEL_TIMEOUT_SECONDS)


def resource(config: Config) -> dg.ResourceDefinition:
    """Return the resource `link` of a run. Setting it up connects nowhere: Dagster may set it up more than once."""

    @dg.resource(description="The link to sync; the first op that needs it takes both locks")
    def link(_: dg.InitResourceContext) -> Iterator[Session]:
        session = Session(config)
        try:
            yield session
        finally:
            session.close()

    return link


def _interruptible(stage: Callable[[], T]) -> Callable[[], T]:
    def run() -> T:
        with passes.interruptions():
            return stage()

    return run
