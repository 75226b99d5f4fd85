"""Keep equal: `failures`, `conflicts`, `verify`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from sync_pipeline import config as configuration
from sync_pipeline import operate, resolution
from sync_pipeline import verify as comparison
from sync_pipeline.cli import show, side_by_side
from sync_pipeline.cli.app import (
    FAILED,
    ConfigOption,
    JsonOption,
    KeyOption,
    NodeOption,
    TableArgument,
    example,
    open_nodes,
    open_reachable,
    refuse,
)
from sync_pipeline.config import Config
from sync_pipeline.errors import ConfigurationError, SyncPipelineError
from sync_pipeline.records import counted, printable
from sync_pipeline.verify import VerifyReport
from sync_pipeline.views import FailedRecord, Selection

PANEL = "Keep equal"
FAILURE_ACTIONS = ("list", "retry", "discard")
CONFLICT_ACTIONS = ("list", "resolve")
SHOWN_IDS = 10


class State(StrEnum):
    """The states of a failure."""

    retrying = "retrying"
    dead = "dead"
    held = "held"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel=PANEL, epilog=example("failures retry users --key 42"))(failures)
    app.command(rich_help_panel=PANEL, epilog=example("conflicts resolve 7 --winner crm"))(
        conflicts
    )
    app.command(rich_help_panel=PANEL, epilog=example("verify users --repair-from crm"))(verify)


def failures(
    action: Annotated[
        str | None,
        typer.Argument(
            metavar="ACTION", help="list (default), retry or discard.", show_default=False
        ),
    ] = None,
    table: TableArgument = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    key: KeyOption = None,
    state: Annotated[
        State | None,
        typer.Option("--state", help="Only failures of this state.", show_default=False),
    ] = None,
    node: NodeOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All of them; what discard asks for without a filter.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Really discard; without this, only say what would go.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="List at most so many.")] = 1000,
) -> None:
    """List the records that the other node refused, retry them now, or give them up.

    A retried record is due at once, a dead one too. A discarded one stays different until it changes again. Records
    held because of a conflict are only listed; `conflicts resolve` decides them.
    """
    link = configuration.load(config)
    action, table = _action(link, FAILURE_ACTIONS, action, table)
    selection = Selection(table, key or None, state.value if state else None)
    filtered = bool(table or key or state or node)
    if action != "list" and state is State.held:
        refuse("a held record waits for a decision: `sync-pipeline conflicts resolve`")
    if everything and key:
        refuse("--all and --key exclude each other")
    if action == "discard" and not (filtered or everything):
        refuse("discard wants a TABLE, --key, --state, --node or --all")
    with open_reachable(link, node) as (connections, unreachable):
        for error in unreachable.values():
            raise error
        found = operate.failures(link, connections, selection, limit)
        _known(link, table, found)
        if action != "list":
            found = [failure for failure in found if failure.state != "held"]
        if action == "discard" and not yes:
            refuse(
                f"discard would give up {counted(len(found), 'failure')}; "
                "nothing was done; repeat with --yes to do it"
            )
        number = 0
        if action != "list":
            change = operate.retry if action == "retry" else operate.discard
            number = change(link, connections, selection)
    done = {"retry": "retried", "discard": "discarded"}.get(action)
    if as_json:
        show.document({"failures": found} | ({done: number} if done else {}))
    elif done:
        show.say(f"{counted(number, 'failure')} {'due now' if action == 'retry' else done}")
    else:
        headings = (
            "node",
            "table",
            "record",
            "state",
            "attempts",
            "next attempt",
            "class",
            "error",
        )
        show.console().print(show.table(None, headings, map(_failure_row, found)))
        show.say(counted(len(found), "failure"))


def conflicts(
    action: Annotated[
        str | None,
        typer.Argument(metavar="ACTION", help="list (default) or resolve.", show_default=False),
    ] = None,
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE|ID",
            help="list: only this table. resolve: the id of a conflict.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    winner: Annotated[
        str | None,
        typer.Option(
            "--winner",
            metavar="NODE",
            help="resolve: the node whose row both shall have.",
            show_default=False,
        ),
    ] = None,
    node: NodeOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="List at most so many.")] = 100,
) -> None:
    """List the conflicts with both rows, newest first, or decide one; that also undoes an automatic decision.

    Each node numbers its own conflicts: where an id is not unique, --node says which is meant.
    """
    link = configuration.load(config)
    action, which = _action(link, CONFLICT_ACTIONS, action, which)
    if action == "resolve":
        _resolve(link, which, winner, node, as_json=as_json)
        return
    with open_reachable(link, node) as (connections, unreachable):
        for error in unreachable.values():
            raise error
        found = operate.conflicts(link, connections, which, limit)
        _known(link, which, found)
    if as_json:
        show.document({"conflicts": found})
        return
    for conflict in found:
        show.console().print(side_by_side.render(link, conflict))
    show.say(counted(len(found), "conflict") + f"; {side_by_side.MARK} marks what differs")


def verify(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="TABLE", help="Only these tables.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    repair_from: Annotated[
        str | None,
        typer.Option(
            "--repair-from",
            metavar="NODE",
            help="Mark what differs on this node, so that the next pass sends its rows.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --repair-from: only say how many it would mark.")
    ] = False,
) -> None:
    """Compare both sides, leaving out what is still pending; exit 1 on a difference.

    With --repair-from the differing records are marked and the exit code is 0: the next pass makes them equal.
    """
    if dry_run and repair_from is None:
        refuse("--dry-run goes with --repair-from")
    link = configuration.load(config)
    for name in tables or ():
        link.table(name)
    if repair_from is not None:
        link.node(repair_from)
    marked = None
    number = len(set(tables)) if tables else len(link.tables)
    with open_nodes(link) as connections:
        with _progress(number) as progress:
            report = comparison.verify(link, connections, tables or None, progress=progress)
        if repair_from is not None:
            marked = comparison.repair(link, connections, report, repair_from, dry_run=dry_run)
    if as_json:
        names = (
            *("equal", "rows", "missing", "different"),
            *("missing_count", "different_count", "pending"),
        )
        compared = {
            table: {name: getattr(each, name) for name in names}
            for table, each in report.tables.items()
        }
        repaired = {} if marked is None else {"marked": marked, "dry_run": dry_run}
        show.document({"equal": report.equal, "tables": compared} | repaired)
    else:
        _show_report(link, report)
        if marked is not None:
            done = "would be marked" if dry_run else "marked; the next pass sends them"
            show.say(f"{counted(marked, 'record')} {done}")
    if not report.equal and (repair_from is None or dry_run):
        differing = [table for table, each in report.tables.items() if not each.equal]
        show.complain(
            f"the two sides differ in {', '.join(differing)}; "
            "`sync-pipeline verify --repair-from NODE` makes the other node like NODE"
        )
        raise typer.Exit(FAILED)


def _known(link: Config, table: str | None, found: Sequence[object]) -> None:
    """Refuse the name of a table that is neither synced nor found: rows of a former table can still be met."""
    if table is not None and not found:
        link.table(table)


def _action(
    link: Config, actions: tuple[str, ...], action: str | None, rest: str | None
) -> tuple[str, str | None]:
    """Tell `failures users` from `failures retry users`: the action may be left out."""
    if action is None or action in actions:
        return action or "list", rest
    try:
        link.table(action)
    except ConfigurationError as error:
        raise SyncPipelineError(
            f"`{action}` is neither an action ({', '.join(actions)}) nor a table",
            remedy=error.remedy,
        ) from None
    if rest is not None:
        refuse(f"`{action}` is no action: expected one of {', '.join(actions)}")
    return "list", action


def _resolve(
    link: Config, which: str | None, winner: str | None, node: str | None, *, as_json: bool
) -> None:
    if which is None or not which.isdecimal() or winner is None:
        refuse("resolve wants the id of a conflict and --winner NODE")
    link.node(winner)
    if node is not None:
        link.node(node)
    with open_nodes(link) as connections:
        done = resolution.resolve(link, connections, int(which), winner, node)
    if as_json:
        show.document(done)
    elif done.changed_node is None:
        show.say(f"conflict {which}: {winner} has won already; nothing was done")
    else:
        record = printable(f"{done.table_name} {done.record_id}")
        show.say(
            f"conflict {which}: {record} as {winner} had it, marked on {done.changed_node}; the next pass sends it"
        )


def _failure_row(failure: FailedRecord) -> tuple[object, ...]:
    return (
        failure.node,
        failure.table_name,
        failure.record_id,
        failure.state,
        failure.attempts,
        failure.next_attempt_at,
        failure.error_class,
        failure.error,
    )


@contextmanager
def _progress(tables: int) -> Iterator[Callable[[str, int], None] | None]:
    """Show on a terminal how many tables are compared: a large one takes a while."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("comparing", total=tables)

        def advance(table: str, rows: int) -> None:
            progress.console.print(printable(f"{table}: {counted(rows, 'row')} compared"))
            progress.advance(task)

        yield advance


def _show_report(link: Config, report: VerifyReport) -> None:
    names = [node.name for node in link.nodes]
    headings = ("table", *(f"rows on {name}" for name in names))
    headings += (*(f"missing on {name}" for name in names), "different", "pending", "equal")
    rows = [
        (
            table,
            *(each.rows[name] for name in names),
            *(each.missing_count[name] for name in names),
            each.different_count,
            each.pending,
            "yes" if each.equal else "NO",
        )
        for table, each in report.tables.items()
    ]
    show.console().print(show.table(None, headings, rows))
    for table, each in report.tables.items():
        for label, ids, number in (
            *(
                (f"missing on {name}", each.missing[name], each.missing_count[name])
                for name in names
            ),
            ("different", each.different, each.different_count),
        ):
            if ids:
                more = f" and {number - SHOWN_IDS:,} more" if number > SHOWN_IDS else ""
                listed = ", ".join(ids[:SHOWN_IDS])
                show.say(printable(f"{table}: {label}: {listed}{more}"))
    if report.equal:
        left_out = sum(each.pending for each in report.tables.values())
        states = (
            "waits, has failed or is held" if left_out == 1 else "wait, have failed or are held"
        )
        exception = f", except {counted(left_out, 'record')} that {states}" if left_out else ""
        show.say(f"both sides are equal{exception}")
