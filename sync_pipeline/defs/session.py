"""The link as one run of Dagster holds it: opened by the first op that needs it, closed however the run ends."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import dagster as dg

from sync_pipeline import passes, queries
from sync_pipeline.config import Config
from sync_pipeline.database import query, scalar
from sync_pipeline.defs.names import Names
from sync_pipeline.errors import LockTaken, SyncPipelineError, without_passwords
from sync_pipeline.link import Link, lead
from sync_pipeline.passes import Pass
from sync_pipeline.records import DirectionReport

CANCEL_ROUNDS = 10
CANCEL_ROUND_SECONDS = 0.05

PAUSED = "the link is paused; `sync-pipeline resume` ends that"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done:
    """What one direction of this run did, and the age of the oldest event that was left on its source."""

    report: DirectionReport
    lag_seconds_after: float


@dataclass
class Session:
    """What the ops of a run share: the configuration, the link once one of them leads, the pass that is under way."""

    names: Names
    stood_back: str | None = field(default=None, init=False)
    done: list[Done] = field(default_factory=list, init=False)
    _link: Link | None = field(default=None, init=False)
    _current: Pass | None = field(default=None, init=False)
    _exits: ExitStack = field(default_factory=ExitStack, init=False)
    _pass_exits: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def config(self) -> Config:
        """The configuration of the link."""
        return self.names.config

    def lead(self) -> Link | None:
        """Take both locks on the first call.

        None when another consumer leads or the link is paused: `stood_back` says which, for this run.
        """
        if self.stood_back is None and self._link is None:
            try:
                with passes.interruptions():
                    link = self._exits.enter_context(lead(self.config))
                    if link.is_paused():
                        self._exits.close()
                        self.stood_back = PAUSED
                        return None
                    self._link = link
            except LockTaken as error:
                self.stood_back = str(error)
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

    def lag(self, node: str) -> float:
        """Return the age in seconds of the oldest event that waits on a node now. The run must lead."""
        if self._link is None:
            raise RuntimeError("the run does not lead")
        statement = query(queries.get("read_lag", self.config.schema_name))
        with passes.interruptions():
            return float(scalar(self._link.sides[node].writer, statement))

    def end(self) -> None:
        """End the pass that is under way: close its snapshot."""
        self._current = None
        self._pass_exits.close()

    def run(self, stage: Callable[[], T]) -> T:
        """Run a stage of a pass so that a termination of the run cancels what it waits for in PostgreSQL.

        Dagster raises the termination in the main thread, wherever that is. Here it only ever waits: the stage runs
        beside it, meets the cancelled statement as any other interruption and rolls back in its own order.
        """

        def interruptible() -> T:
            with passes.interruptions():
                return stage()

        with beside(interruptible, lambda: self._link) as running:
            return running.result()

    def close(self) -> None:
        """Give the locks back. Statements that still run are cancelled; nothing is waited for."""
        cancel(self._link)
        try:
            self.end()
        finally:
            self._link = None
            self._exits.close()


@contextmanager
def beside(work: Callable[[], T], link: Callable[[], Link | None]) -> Iterator[Future[T]]:
    """Run `work` in a thread for a `with` block, which waits for it.

    However the block is left, what `work` still runs on the link's connections is cancelled, again and again until
    it ends, for at most half a second.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="beside-dagster")
    running = pool.submit(work)
    try:
        yield running
    finally:
        for _ in range(CANCEL_ROUNDS):
            if running.done():
                break
            cancel(link())
            wait([running], CANCEL_ROUND_SECONDS)
        pool.shutdown(wait=False)


def cancel(link: Link | None) -> None:
    """Cancel the statements that the connections of a link run."""
    if link is not None:
        link.cancel()


def failure(error: SyncPipelineError) -> dg.Failure:
    """Return what a red run shows: the one line of the error. Rows and keys of PostgreSQL's details stay out.

    So do passwords: a text in a run's configuration may be `{env: NAME}`, and an error repeats what was given.
    """
    return dg.Failure(description=without_passwords(str(error)), allow_retries=False)


def resource(names: Names) -> dg.ResourceDefinition:
    """Return the resource `link` of a run. Setting it up connects nowhere: Dagster may set it up more than once."""

    @dg.resource(description="The link to sync; the first op that needs it takes both locks")
    def link(_: dg.InitResourceContext) -> Iterator[Session]:
        session = Session(names)
        try:
            yield session
        finally:
            session.close()

    return link
