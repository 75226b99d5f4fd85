"""Watch: `status`, `pending`."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from sync_pipeline import config as configuration
from sync_pipeline import operate
from sync_pipeline.cli import show
from sync_pipeline.cli.app import (
    ConfigOption,
    JsonOption,
    NodeOption,
    TableArgument,
    example,
    open_reachable,
    refuse,
)
from sync_pipeline.cli.signals import stopped_by_signals
from sync_pipeline.config import Config
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.records import counted, printable
from sync_pipeline.views import Backlog, NodeStatus, PendingEvent, Status

PANEL = "Watch"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel=PANEL, epilog=example("status --watch"))(status)
    app.command(rich_help_panel=PANEL, epilog=example("pending users --limit 20"))(pending)


def status(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, help="Seconds between two looks of --watch.")
    ] = 2.0,
) -> None:
    """Show backlog, lag, failures, conflicts, the last error, who leads; with --watch also how fast events move.

    A node that cannot be reached is named and does not hide the other.
    """
    if watch and as_json:
        refuse("--watch and --json exclude each other: one document has one moment")
    link = configuration.load(config)
    if watch:
        _watch(link, interval)
        return
    found = _read(link)
    if as_json:
        show.document(_document(found))
    else:
        show.console().print(_screen(link, found))


def pending(
    table: TableArgument = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    node: NodeOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many events.")] = 100,
) -> None:
    """Show the oldest events that wait, and whether their rows exist now."""
    link = configuration.load(config)
    with open_reachable(link) as (connections, unreachable):
        wanted = [node] if node is not None else [each.name for each in link.nodes]
        for name in wanted:
            link.node(name)
            if name in unreachable:
                raise unreachable[name]
        asked = {name: connections[name] for name in wanted}
        counts = operate.pending_counts(link, asked, table)
        events = operate.pending(link, connections, table, limit, nodes=wanted)
    if table is not None and not events:
        link.table(table)
    if as_json:
        show.document({"events": events, "pending": counts})
        return
    headings = ("node", "id", "table", "record", "event", "age", "row now")
    show.console().print(show.table(None, headings, map(_event_row, events)))
    waiting = ", ".join(f"{name} {number:,}" for name, number in counts.items())
    show.say(f"pending: {waiting}; shown: {len(events):,}")


def _event_row(event: PendingEvent) -> tuple[object, ...]:
    exists = {True: "exists", False: "gone", None: "unknown"}[event.row_exists]
    age = show.duration(event.age_seconds)
    # The id is text: it is to be copied, not to be counted.
    name, record = event.table_name, event.record_id
    return event.node, str(event.id), name, record, event.event_type, age, exists


def _read(link: Config) -> Status:
    with open_reachable(link) as (connections, unreachable):
        return operate.status(link, connections, unreachable)


def _watch(link: Config, interval: float) -> None:
    """Show the status until a signal ends it: a screen on a terminal, a line each time elsewhere."""
    console = show.console()
    rates = Rates()
    with stopped_by_signals() as stop:
        if not console.is_terminal:
            while not stop.is_set():
                show.say(_line(link, rates))
                stop.wait(interval)
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not stop.is_set():
                live.update(_now(link, rates), refresh=True)
                stop.wait(interval)


class Rates:
    """How many events each node captured and had acknowledged in a second, between two looks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: dict[str, tuple[float, int, int]] = {}
        self._rates: dict[str, tuple[float, float]] = {}

    def see(self, found: Status) -> None:
        """Take a look into account. What was captured is about a second behind, as PostgreSQL's statistics are."""
        now = self._clock()
        for name, node in found.nodes.items():
            if node.backlog is None:
                self._before.pop(name, None)
                self._rates.pop(name, None)
                continue
            pending = node.backlog.pending
            if name in self._before:
                then, captured, waited = self._before[name]
                seconds = max(now - then, 0.001)
                came = max(node.captured - captured, 0)
                went = max(came - (pending - waited), 0)
                self._rates[name] = (came / seconds, went / seconds)
            self._before[name] = (now, node.captured, pending)

    def of(self, node: str) -> str:
        """Return captured and sent events per second in words."""
        if node not in self._rates:
            return "-"
        came, went = self._rates[node]
        return f"{came:,.0f} in, {went:,.0f} out"


def _now(link: Config, rates: Rates) -> RenderableType:
    clock = Text(f"{datetime.now().astimezone():%H:%M:%S}  Ctrl-C ends it", style="dim")
    try:
        found = _read(link)
    except SyncPipelineError as error:
        return Group(Text(str(error), style="red"), clock)
    rates.see(found)
    return Group(_screen(link, found, rates), clock)


def _line(link: Config, rates: Rates) -> str:
    parts = []
    try:
        found = _read(link)
        rates.see(found)
    except SyncPipelineError as error:
        parts = [str(error)]
    else:
        for name, node in found.nodes.items():
            if node.backlog is None:
                parts.append(f"{node.error}")
            else:
                each = node.backlog
                age = f" (oldest {show.duration(each.oldest_seconds)})" if each.pending else ""
                conflicts = counted(each.conflicts_24h, "conflict")
                parts.append(
                    f"{name}: {each.pending:,} pending{age}, {rates.of(name)}, {each.retrying:,} retrying, "
                    f"{each.dead:,} dead, {conflicts} in 24 h"
                )
        parts.append(_leader(found))
    now = f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}"
    return printable(f"{now} {' | '.join(parts)}")


def _screen(link: Config, found: Status, rates: Rates | None = None) -> RenderableType:
    """Lay the status out: a column for each node, so that it fits 80 columns."""
    rows: list[tuple[object, ...]] = []
    cells: tuple[tuple[str, Callable[[Backlog], str]], ...] = (
        ("pending", lambda each: f"{each.pending:,}"),
        ("oldest waits", lambda each: show.duration(each.oldest_seconds) if each.pending else "-"),
        ("retrying", lambda each: f"{each.retrying:,}"),
        ("dead", lambda each: f"{each.dead:,}"),
        ("conflicts in 24 h", lambda each: f"{each.conflicts_24h:,}"),
        ("conflicts held", lambda each: f"{each.conflicts_held:,}"),
        ("paused", lambda each: f"since {show.moment(each.paused_at)}" if each.paused_at else "no"),
        ("last pass", lambda each: show.moment(each.last_pass_at)),
    )
    for label, cell in cells:
        values = [
            "?" if node.backlog is None else cell(node.backlog) for node in found.nodes.values()
        ]
        rows.append((label, *values))
    rows.append(("last error", *(_last_error(node) for node in found.nodes.values())))
    rows.append(("waits for", *(_blocker(node) for node in found.nodes.values())))
    rows.append(("led by", *(_session(node) for node in found.nodes.values())))
    if rates is not None:
        rows.insert(2, ("events a second", *(rates.of(name) for name in found.nodes)))
    parts: list[RenderableType] = [show.table(None, ("", *found.nodes), rows)]
    parts += [
        Text(printable(node.error), style="red") for node in found.nodes.values() if node.error
    ]
    summary = f"{_leader(found)}; paused" if found.paused else _leader(found)
    parts.append(Text(printable(summary)))
    if found.clocks is not None:
        difference = abs(found.clocks.seconds)
        accuracy = f"± {show.duration(found.clocks.accuracy_seconds)}"
        warn = found.clocks.exceeds(link.clock_warning_seconds)
        parts.append(
            Text(
                f"the clocks differ by {show.duration(difference)} {accuracy}"
                + (": the later change may not win a conflict" if warn else ""),
                style="yellow" if warn else "dim",
            )
        )
    return Group(*parts)


def _last_error(node: NodeStatus) -> str:
    failure = node.last_failure
    if failure is None:
        return "-" if node.backlog is not None else "?"
    return f"{failure.error_class} {failure.table_name}, {show.duration(failure.seconds)} ago"


def _blocker(node: NodeStatus) -> str:
    blocker = node.blocker
    if blocker is None:
        return "-" if node.backlog is not None else "?"
    if blocker.pid == 0:
        return "a lock of a prepared transaction"
    known = [text for text in (blocker.application_name, blocker.state) if text]
    age = "" if blocker.seconds is None else f", open for {show.duration(blocker.seconds)}"
    who = f" ({', '.join(known)})" if known else ""
    return f"a lock of backend {blocker.pid}{who}{age}"


def _session(node: NodeStatus) -> str:
    if node.backlog is None:
        return "?"
    return f"backend {node.leader.pid}" if node.leader else "nobody"


def _leader(found: Status) -> str:
    if found.leader is None:
        return "nobody leads"
    name, leader = found.leader
    return f"led by {leader} (on {name})"


def _document(found: Status) -> dict[str, Any]:
    leader = None
    if found.leader is not None:
        name, session = found.leader
        leader = {
            "node": name,
            "pid": session.pid,
            "application_name": session.application_name,
            "client_address": session.client_address,
            "since": session.backend_start,
        }
    return {
        "nodes": {name: _node(node) for name, node in found.nodes.items()},
        "paused": found.paused,
        "leader": leader,
        "clock_difference_seconds": found.clocks and round(found.clocks.seconds, 6),
        "clock_accuracy_seconds": found.clocks and round(found.clocks.accuracy_seconds, 6),
    }


def _node(node: NodeStatus) -> dict[str, Any]:
    backlog = node.backlog
    names = ("pending", "oldest_seconds", "retrying", "dead", "conflicts_24h", "conflicts_held")
    values: dict[str, Any] = {name: backlog and getattr(backlog, name) for name in names}
    return values | {
        "paused": backlog and backlog.paused_at is not None,
        "last_pass_at": backlog and backlog.last_pass_at,
        "captured": None if backlog is None else node.captured,
        "last_failure": node.last_failure,
        "blocker": node.blocker,
        "leads": node.leader and node.leader.pid,
        "error": node.error,
    }
