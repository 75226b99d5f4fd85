"""The loop: lead, pass, wait, pass … until stopped; and the same loop once, until nothing is left to apply."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sync_pipeline import passes
from sync_pipeline.config import Config
from sync_pipeline.errors import CatalogMismatch, ConnectionFailed, LockTaken, PassInterrupted
from sync_pipeline.link import Link, lead
from sync_pipeline.records import Counts, DirectionReport

SHORTEST_WAIT_SECONDS = 0.002
STANDBY_SECONDS = 0.5
WAIT_SHARE = 0.05
SLOW_LOOK_SECONDS = 0.02
SLOW_LOOK_REST = 10.0
FIRST_BACKOFF_SECONDS = 0.2
LONGEST_BACKOFF_SECONDS = 15.0
CATALOG_SECONDS = 30.0
PRUNE_SECONDS = 3600.0
SYNC_INTERRUPTIONS = 5


@dataclass(slots=True)
class Totals:
    """What a run of several passes did."""

    passes: int = 0
    seconds: float = 0.0
    paused: bool = False
    directions: dict[str, Counts] = field(default_factory=dict)

    def add(self, reports: list[DirectionReport]) -> bool:
        """Add one pass, if it did something; return whether it did."""
        if not any(report.did_something or report.recovered for report in reports):
            return False
        self.passes += 1
        for report in reports:
            self.directions.setdefault(report.name, Counts()).add(report.total)
        return True


def _ignore(*_: object) -> None:
    """Nobody listens."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Who wants to know what the loop does. Every function may be left out."""

    passed: Callable[[list[DirectionReport]], None] = _ignore
    leading: Callable[[], None] = _ignore
    # The link of a loop that now leads, for who has to cancel its statements from outside.
    opened: Callable[[Link], None] = _ignore
    standing_by: Callable[[LockTaken], None] = _ignore
    interrupted: Callable[[Exception, float], None] = _ignore
    # Whether an operator has paused the link, each time that this changes.
    paused: Callable[[bool], None] = _ignore


def sync(config: Config, listener: Listener | None = None) -> Totals:
    """Pass until nothing is pending that can be applied now. Raises `LockTaken` when another consumer leads.

    A pass that was interrupted is tried again, up to five times in a row, on new connections.
    """
    listener = listener or Listener()
    totals = _totals(config)
    started = time.monotonic()
    interruptions = 0
    while True:
        try:
            with passes.interruptions(), lead(config) as link:
                listener.opened(link)
                if link.is_paused():
                    totals.paused = True
                else:
                    while not totals.paused and totals.add(reports := passes.run(link)):
                        listener.passed(reports)
                        interruptions = 0
                        totals.paused = any(report.paused for report in reports)
                    totals.paused = totals.paused or link.was_paused
                    link.prune_conflicts()
                break
        except (PassInterrupted, CatalogMismatch) as error:
            interruptions += 1
            # A schema that changed during a pass is read anew once; what is still wrong then stays wrong.
            if interruptions > (SYNC_INTERRUPTIONS if isinstance(error, PassInterrupted) else 1):
                raise
            seconds = _backoff(interruptions)
            listener.interrupted(error, seconds)
            time.sleep(seconds)
    totals.seconds = time.monotonic() - started
    return totals


def stream(
    config: Config,
    stop: threading.Event,
    *,
    seconds: float | None = None,
    listener: Listener | None = None,
) -> Totals:
    """Pass and wait until `stop` is set or `seconds` are over; stand by while another consumer leads.

    Lost connections and transient errors are survived: the loop waits, longer each time, and connects again.
    """
    listener = listener or Listener()
    totals = _totals(config)
    started = time.monotonic()
    deadline = started + seconds if seconds is not None else float("inf")
    interruptions = 0
    has_led = standing_by = False
    while not stop.is_set() and time.monotonic() < deadline:
        try:
            with (
                passes.interruptions(),
                lead(config, standing_by=standing_by, again=has_led) as link,
            ):
                has_led, standing_by = True, False
                listener.opened(link)
                listener.leading()
                for _ in _follow(link, stop, deadline, totals, listener):
                    interruptions = 0
        except LockTaken as error:
            standing_by = True
            listener.standing_by(error)
            _wait(stop, STANDBY_SECONDS, deadline)
        except (PassInterrupted, ConnectionFailed, CatalogMismatch) as error:
            if isinstance(error, CatalogMismatch) and not has_led:
                raise
            interruptions += 1
            pause = _backoff(interruptions)
            listener.interrupted(error, pause)
            _wait(stop, pause, deadline)
    totals.seconds = time.monotonic() - started
    return totals


def _follow(
    link: Link, stop: threading.Event, deadline: float, totals: Totals, listener: Listener
) -> Iterator[None]:
    """Look, pass and wait; yield after each time that went well."""
    catalog_read = worked = time.monotonic()
    pruned = float("-inf")
    paused, is_told = True, False
    while not stop.is_set() and (now := time.monotonic()) < deadline:
        with passes.interruptions():
            if now - pruned > PRUNE_SECONDS:
                link.prune_conflicts()
                pruned = now
            if now - catalog_read > CATALOG_SECONDS:
                link.read_catalog()
                catalog_read = now
            # At first, and while it is so; otherwise each look for work tells it.
            if paused:
                paused = link.is_paused()
        if paused != is_told:
            listener.paused(paused)
            is_told = paused
        began = time.monotonic()
        reports = [] if paused else passes.run(link)
        yield
        if reports:
            totals.add(reports)
            listener.passed(reports)
        paused = link.was_paused or any(report.paused for report in reports)
        ended = time.monotonic()
        if any(report.did_something for report in reports):
            worked = ended
            continue
        # The longer nothing came, the longer the wait for the next look.
        wait = max(SHORTEST_WAIT_SECONDS, WAIT_SHARE * (ended - worked))
        wait = min(wait, link.config.poll_seconds)
        if ended - began > SLOW_LOOK_SECONDS:
            # Dead rows that no vacuum may remove make looking itself slow: look less often.
            wait = max(wait, SLOW_LOOK_REST * (ended - began))
        _wait(stop, wait, deadline)


def _totals(config: Config) -> Totals:
    names = [f"{source.name}->{target.name}" for source, target in config.directions]
    return Totals(directions={name: Counts() for name in names})


def _wait(stop: threading.Event, seconds: float, deadline: float) -> None:
    stop.wait(max(0.0, min(seconds, deadline - time.monotonic())))


def _backoff(interruptions: int) -> float:
    longest = min(FIRST_BACKOFF_SECONDS * 2 ** (interruptions - 1), LONGEST_BACKOFF_SECONDS)
    return random.uniform(longest / 2, longest)  # noqa: S311 - jitter
