"""The loop in one warm run: well under a second from a change to its copy, for as long as the budget lasts."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
from pydantic import Field

from sync_pipeline import stream
from sync_pipeline.defs.metadata import counts_in_words, observations
from sync_pipeline.defs.names import Names
from sync_pipeline.defs.session import PAUSED, Session, beside, failure
from sync_pipeline.errors import LockTaken, SyncPipelineError
from sync_pipeline.link import Link
from sync_pipeline.records import Counts, DirectionReport, counted
from sync_pipeline.stream import Listener, Totals

DEFAULT_BUDGET_SECONDS = 600.0
OBSERVE_SECONDS = 30.0
LEADS = "leads"


class StreamConfig(dg.Config):
    """How long the run lasts; its successor stands by before it ends."""

    seconds: float = Field(default=DEFAULT_BUDGET_SECONDS, gt=0)


@dg.op(
    required_resource_keys={"link"},
    description=(
        "Passes and waits until the time budget is over. While another consumer leads, it stands by; lost connections"
        " are survived."
    ),
)
def stream_changes(context: dg.OpExecutionContext, config: StreamConfig) -> Iterator[Any]:
    """Stream, and tell what was done at most once for each table in half a minute."""
    session: Session = context.resources.link
    following = _Following()
    stop = threading.Event()

    def work() -> Totals:
        try:
            return stream.stream(
                session.config, stop, seconds=config.seconds, listener=following.listener
            )
        finally:
            following.say(None)

    try:
        with beside(work, lambda: following.link) as running:
            try:
                yield from _tell(context, session.names, following, config.seconds)
                totals = running.result()
            finally:
                stop.set()
    except SyncPipelineError as error:
        raise failure(error) from None
    context.instance.add_run_tags(context.run_id, {"sync/result": _in_words(totals)})
    yield dg.Output(None, metadata={"passes": totals.passes, "seconds": round(totals.seconds, 1)})


def stream_job(names: Names, budget_seconds: float, **options: Any) -> dg.JobDefinition:
    """Return the job of the loop; a run that is not told otherwise lasts `budget_seconds`."""
    name = names.of("stream_job")

    @dg.graph(
        name=name,
        description="The loop in one warm run with a time budget: changes are seen within a fraction of a second.",
    )
    def loop() -> None:
        stream_changes()

    return loop.to_job(
        name=name,
        executor_def=dg.in_process_executor,
        config={"ops": {"stream_changes": {"config": {"seconds": budget_seconds}}}},
        **options,
    )


def budget_of(run: dg.DagsterRun, otherwise: float) -> float:
    """Return how many seconds a run of the loop was told to last."""
    config: Any = run.run_config
    told = config.get("ops", {}).get("stream_changes", {}).get("config", {})
    return float(told.get("seconds", otherwise))


class _Following:
    """What the loop's thread reports, for the thread that talks to Dagster."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self._sentences: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._reports: list[DirectionReport] = []
        self._standing_by = False
        self.listener = Listener(
            passed=self._passed,
            leading=self._lead,
            standing_by=self._stand_by,
            interrupted=self._interrupted,
            opened=self._open,
            paused=self._pause,
        )

    def say(self, sentence: str | None) -> None:
        """Add a sentence for the log; None ends it."""
        self._sentences.put(sentence)

    def next_sentence(self, timeout: float) -> str | None:
        """Return the next sentence, an empty one when none came in time, None at the end."""
        try:
            return self._sentences.get(timeout=max(0.0, timeout))
        except queue.Empty:
            return ""

    def take_reports(self) -> list[DirectionReport]:
        """Return what was done since the last call, one report for each direction."""
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def _open(self, link: Link) -> None:
        self.link = link

    def _lead(self) -> None:
        self._standing_by = False
        self.say(LEADS)

    def _stand_by(self, error: LockTaken) -> None:
        # Once, not at every try.
        if not self._standing_by:
            self.say(f"stands by: {error.problem}")
        self._standing_by = True

    def _pause(self, paused: bool) -> None:  # noqa: FBT001 - as the listener calls it
        self.say(PAUSED if paused else "goes on: the link is no longer paused")

    def _interrupted(self, error: Exception, seconds: float) -> None:
        self.say(f"interrupted, tries again in {seconds:.1f} s: {error}")

    def _passed(self, reports: list[DirectionReport]) -> None:
        with self._lock:
            for report in reports:
                _merge(self._reports, report)


def _merge(reports: list[DirectionReport], new: DirectionReport) -> None:
    for known in reports:
        if known.name == new.name:
            for table, counts in new.tables.items():
                known.table(table).add(counts)
            known.lag_seconds = max(known.lag_seconds, new.lag_seconds)
            return
    merged = DirectionReport(new.source, new.target, lag_seconds=new.lag_seconds)
    for table, counts in new.tables.items():
        merged.table(table).add(counts)
    reports.append(merged)


def _tell(
    context: dg.OpExecutionContext, names: Names, following: _Following, seconds: float
) -> Iterator[dg.AssetObservation]:
    """Yield observations, the last ones at the end, with `OBSERVE_SECONDS` between them at least.

    A run that takes over has told nothing yet, but the one before it may just have: the time begins when it leads.
    """
    now = time.monotonic()
    end, due = now + seconds, now + OBSERVE_SECONDS
    while (sentence := following.next_sentence(due - now)) is not None:
        now = time.monotonic()
        if sentence:
            context.log.info(sentence)
        if sentence == LEADS:
            due = now + OBSERVE_SECONDS
        elif now >= due:
            due = now + OBSERVE_SECONDS
            # What is told now would be too close to what is told at the end: that tells both.
            if now < end - OBSERVE_SECONDS:
                yield from observations(names, following.take_reports())
    yield from observations(names, following.take_reports())


def _in_words(totals: Totals) -> str:
    total = Counts.sum(totals.directions.values())
    return f"{counted(totals.passes, 'pass')}: {counts_in_words(total)}"
