"""Run: `sync`, `stream`, `pause`, `resume`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer

from sync_pipeline import config as configuration
from sync_pipeline import operate
from sync_pipeline import stream as loop
from sync_pipeline.cli import show
from sync_pipeline.cli.app import ConfigOption, JsonOption, example, open_nodes, open_reachable
from sync_pipeline.cli.export import DEFAULT_HOST
from sync_pipeline.cli.signals import stopped_by_signals
from sync_pipeline.config import Config
from sync_pipeline.errors import LockTaken, SyncPipelineError
from sync_pipeline.link import Link
from sync_pipeline.records import OUTCOMES, DirectionReport, counted, printable
from sync_pipeline.stream import Listener, Totals

PANEL = "Run"


class LogFormat(StrEnum):
    """How `stream` says what it does."""

    text = "text"
    json = "json"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel=PANEL, epilog=example("sync --json"))(sync)
    app.command(
        rich_help_panel=PANEL, epilog=example("stream --log-format json --metrics-port 9188")
    )(stream)
    app.command(rich_help_panel=PANEL, epilog=example("pause"))(pause)
    app.command(rich_help_panel=PANEL, epilog=example("resume"))(resume)


def sync(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Pass until nothing is pending that can be applied now; exit 3 when another consumer leads."""
    link = configuration.load(config)
    told: set[str] = set()

    def passed(reports: list[DirectionReport]) -> None:
        for report in reports:
            if report.clock_warning is not None and report.clock_warning not in told:
                told.add(report.clock_warning)
                show.complain(report.clock_warning)

    totals = loop.sync(link, Listener(interrupted=_interrupted, opened=_opened, passed=passed))
    with open_nodes(link) as connections:
        pending = operate.pending_counts(link, connections)
    if as_json:
        show.document(_totals(totals) | {"paused": totals.paused, "pending": pending})
        return
    if totals.paused and not totals.passes:
        waiting = ", ".join(f"{number:,} pending on {node}" for node, number in pending.items())
        show.say(f"paused: nothing was synced, {waiting}; `sync-pipeline resume` lets it go on")
        return
    rows = [(name, *astuple(counts)) for name, counts in totals.directions.items()]
    show.console().print(show.table(None, ("direction", *OUTCOMES), rows))
    waiting = ", ".join(f"{node} {number:,}" for node, number in pending.items())
    show.say(
        f"{counted(totals.passes, 'pass')} in {show.duration(totals.seconds)}; still pending: {waiting}"
    )
    if totals.paused:
        show.say("paused meanwhile; `sync-pipeline resume` lets it go on")
    if any(counts.failed for counts in totals.directions.values()):
        show.say("some records failed: `sync-pipeline failures` shows why")


def stream(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            min=0,
            metavar="N",
            help="End after N seconds; default: run until stopped.",
            show_default=False,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="One line of text or of JSON per occurrence.")
    ] = LogFormat.text,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            min=0,
            max=65535,
            metavar="PORT",
            help="Serve metrics for Prometheus on this port; 0: a free one.",
            show_default=False,
        ),
    ] = None,
    metrics_host: Annotated[
        str,
        typer.Option(
            "--metrics-host", metavar="ADDRESS", help="Serve them on this address; no login."
        ),
    ] = DEFAULT_HOST,
) -> None:
    """Sync continuously until stopped; a second consumer stands by until the first is gone.

    SIGINT and SIGTERM end it cleanly after the running pass, a second one at once. The log goes to stdout, with
    `--json` to stderr.
    """
    link = configuration.load(config)
    log = Log(link, log_format, to_stderr=as_json)
    if log_format is LogFormat.text:
        show.complain(
            "syncing until stopped; next: `sync-pipeline status --watch` in another terminal, "
            "and `sync-pipeline verify` to compare both sides"
        )
    with stopped_by_signals() as stop, _measured(link, log, metrics_host, metrics_port) as listener:
        totals = loop.stream(link, stop, seconds=seconds, listener=listener)
    log.stopped(totals)
    if as_json:
        show.document(_totals(totals))


@contextmanager
def _measured(link: Config, log: "Log", host: str, port: int | None) -> Iterator[Listener]:
    """Serve metrics for a `with` block, if a port was given; yields who listens to the loop."""
    if port is None:
        yield log.listener()
        return
    from sync_pipeline import metrics

    registry = metrics.registry(link)
    work = metrics.Work(link, registry)
    with metrics.served(registry, host, port) as address:
        log.serving(address)
        yield work.counting(log.listener())


def pause(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Stop consumption on both nodes; changes are still captured and wait.

    A consumer that runs notices within seconds. With one node down the other is paused, which is enough to stop, and
    the command ends with 1.
    """
    link = configuration.load(config)
    with open_reachable(link) as (connections, unreachable):
        operate.pause(link, connections)
    for name, error in unreachable.items():
        reached = ", ".join(connections)
        done = f"{reached} is paused, which stops the link, {name} is not" if reached else ""
        problem = "; ".join(filter(None, (error.problem, done)))
        raise SyncPipelineError(problem, node=name, remedy=error.remedy)
    _switched(paused=True, as_json=as_json)


def resume(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Let consumption go on, on both nodes; with one of them down nothing is changed."""
    link = configuration.load(config)
    with open_nodes(link) as connections:
        operate.resume(link, connections)
    _switched(paused=False, as_json=as_json)


def _switched(*, paused: bool, as_json: bool) -> None:
    if as_json:
        show.document({"paused": paused})
    else:
        show.say("paused; changes are still captured" if paused else "resumed")


class Log:
    """What `stream` does, a line each. With JSON, `event` is one of a few constant names."""

    def __init__(self, link: Config, log_format: LogFormat, *, to_stderr: bool) -> None:
        self._link = link
        self._format = log_format
        self._print = show.complain if to_stderr else show.say
        self._standing_by = False
        self._warned: set[str] = set()
        # What the schemas kept from being synced when they were last read.
        self._is_left_out: set[str] = set()

    def listener(self) -> Listener:
        """Return what the loop tells."""
        return Listener(
            passed=self.passed,
            opened=self.opened,
            leading=self.leading,
            standing_by=self.standing_by,
            interrupted=self.interrupted,
            paused=self.paused,
        )

    def serving(self, address: str) -> None:
        """Metrics can be scraped."""
        self._write("serving", f"metrics: {address}", address=address)

    def opened(self, link: Link) -> None:
        """What the schemas of the nodes keep from being synced."""
        self._left_out(link.catalog.warnings)

    def _left_out(self, warnings: Iterable[str]) -> None:
        """Say what was not left out the last time: once, and again where it comes back after it was mended."""
        now = dict.fromkeys(warnings)
        for text in now:
            if text not in self._is_left_out:
                self._write("left_out", text, reason=text)
        self._is_left_out = set(now)

    def _new(self, warnings: Iterable[str]) -> list[str]:
        """Return the warnings that were not said yet; each is said once."""
        new = [text for text in dict.fromkeys(warnings) if text not in self._warned]
        self._warned.update(new)
        return new

    def leading(self) -> None:
        """This consumer has the locks of both nodes."""
        self._standing_by = False
        names = " and ".join(node.name for node in self._link.nodes)
        self._write("leading", f"leading {names}", nodes=[node.name for node in self._link.nodes])

    def standing_by(self, error: LockTaken) -> None:
        """Another consumer leads; said once, not at every try."""
        if not self._standing_by:
            self._standing_by = True
            self._write(
                "standing_by", f"standing by: {error.node}: {error.problem}", reason=error.problem
            )

    def passed(self, reports: list[DirectionReport]) -> None:
        """A pass has ended; one that did nothing is not mentioned."""
        if reports:
            self._left_out(warning for report in reports for warning in report.warnings)
        for text in self._new(each.clock_warning for each in reports if each.clock_warning):
            self._write("clocks", text, reason=text)
        worth = [report for report in reports if report.did_something or report.recovered]
        if worth:
            directions = {report.name: _report(report) for report in worth}
            self._write("pass", "; ".join(map(_in_words, worth)), directions=directions)

    def interrupted(self, error: Exception, seconds: float) -> None:
        """A pass or an attempt to connect ended early."""
        text = f"interrupted: {error}; trying again in {show.duration(seconds)}"
        self._write("interrupted", text, error=str(error), retry_seconds=round(seconds, 3))

    def paused(self, paused: bool) -> None:
        """An operator has paused the link, or lets it go on."""
        if paused:
            self._write("paused", "paused; `sync-pipeline resume` lets it go on")
        else:
            self._write("resumed", "resumed")

    def stopped(self, totals: Totals) -> None:
        """The loop has ended as it was asked to."""
        text = f"stopped after {show.duration(totals.seconds)}, passes that did something: {totals.passes:,}"
        self._write("stopped", text, passes=totals.passes, seconds=round(totals.seconds, 3))

    def _write(self, event: str, text: str, **details: Any) -> None:
        now = datetime.now(UTC)
        if self._format is LogFormat.json:
            line = {"event": event, "at": now.isoformat(timespec="milliseconds"), **details}
            self._print(json.dumps(line))
        else:
            at = now.astimezone().isoformat(sep=" ", timespec="seconds")
            self._print(printable(f"{at} {text}"))


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        "passes": totals.passes,
        "seconds": round(totals.seconds, 3),
        "directions": {name: asdict(counts) for name, counts in totals.directions.items()},
    }


def _report(report: DirectionReport) -> dict[str, Any]:
    return asdict(report.total) | {
        "lag_seconds": round(report.lag_seconds, 3),
        "clock_difference_seconds": report.clock_difference_seconds
        and round(report.clock_difference_seconds, 6),
        "set_aside": report.set_aside,
        "recovered": report.recovered,
    }


def _in_words(report: DirectionReport) -> str:
    parts = [report.total.in_words()] if report.total.total else []
    if report.set_aside:
        parts.append(f"{report.set_aside:,} set aside")
    if report.recovered:
        parts.append(f"{report.recovered:,} recovered")
    return f"{report.name}: {', '.join(parts) or 'nothing to apply'} (lag {show.duration(report.lag_seconds)})"


def _opened(link: Link) -> None:
    for warning in link.catalog.warnings:
        show.complain(warning)


def _interrupted(error: Exception, seconds: float) -> None:
    show.complain(f"interrupted: {error}; trying again in {show.duration(seconds)}")
