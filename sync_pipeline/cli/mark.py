"""Mark: `replay`, `backfill`."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sync_pipeline import config as configuration
from sync_pipeline import operate
from sync_pipeline.cli import show
from sync_pipeline.cli.app import (
    PROGRAM,
    ConfigOption,
    JsonOption,
    KeyOption,
    example,
    open_nodes,
    refuse,
)
from sync_pipeline.operate import Backfill, BackfillStep, Replay
from sync_pipeline.records import counted, printable

PANEL = "Send again"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel=PANEL, epilog=example("replay users --node crm --key 42"))(replay)
    app.command(rich_help_panel=PANEL, epilog=example("backfill --from crm accounts users"))(
        backfill
    )


def replay(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="The table, by its name in sync.yaml.")
    ],
    node: Annotated[
        str, typer.Option("--node", metavar="NODE", help="The node whose rows are sent.")
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
    key: KeyOption = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="SQL",
            help="The rows that meet this condition on the columns of NODE.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every row.")] = False,
) -> None:
    """Mark records of a node as changed, so that they sync again; exactly one of --key, --where and --all.

    A key without a row on NODE is marked too: the record is then deleted on the other node.
    """
    if [bool(key), where is not None, everything].count(True) != 1:
        refuse("replay wants exactly one of --key, --where and --all")
    link = configuration.load(config)
    if where is not None:
        fault = configuration.fault_in_condition(where)
        if fault or not where.strip():
            refuse(
                f"--where {fault or 'is empty'}; write one SQL condition, as it would stand after WHERE"
            )
    link.node(node)
    link.table(table)
    with open_nodes(link) as connections:
        marked = operate.replay(
            link, connections, table, node, Replay(key or (), where, everything=everything)
        )
    if as_json:
        show.document({"marked": marked})
    else:
        show.say(f"{counted(marked, 'record')} of {table} marked on {node}")


def backfill(
    node: Annotated[
        str, typer.Option("--from", metavar="NODE", help="The node whose rows are sent.")
    ],
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE",
            help="Only these tables; default: all that NODE sends.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="KEY",
            help="Begin the first table after this record_id: how to go on after an interruption.",
            show_default=False,
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option("--chunk", min=1, max=1_000_000, help="Rows marked in one transaction.")
    ] = operate.CHUNK_ROWS,
) -> None:
    """Mark every row of a node, parents first, in chunks that are committed one by one.

    Rows outside of a table's `where` are left out. Marking twice is harmless. When it is interrupted, the message
    says how to go on.
    """
    link = configuration.load(config)
    link.node(node)
    for name in tables or ():
        link.table(name)
    marked: dict[str, int] = {}
    with open_nodes(link) as connections:
        plan = operate.plan_backfill(link, connections, node, tables or (), after)
        if plan.left_out:
            show.complain(f"{node} does not send {', '.join(plan.left_out)}: left out")
        marked = {relation.table: 0 for relation in plan.relations}
        steps = operate.backfill(link, connections, plan, chunk)
        with _resumable(plan) as position, _progress(plan, connections) as advance:
            for step in steps:
                marked[step.table] += step.marked
                position.reach(step)
                advance(step)
    total = sum(marked.values())
    if as_json:
        show.document({"marked": total, "tables": marked})
    else:
        for table, number in marked.items():
            show.say(f"{table}: {number:,}")
        show.say(f"{counted(total, 'record')} marked on {node}")
        show.say("next: `sync-pipeline stream` sends them, or `sync-pipeline sync` once")


class Position:
    """How far a backfill has come."""

    def __init__(self, plan: Backfill) -> None:
        self._plan = plan
        self._step: BackfillStep | None = None

    def reach(self, step: BackfillStep) -> None:
        """Remember the last chunk that is committed."""
        self._step = step

    @property
    def remedy(self) -> str:
        """The command that goes on from here."""
        tables = [relation.table for relation in self._plan.relations]
        after = self._plan.after
        if self._step is not None:
            tables = tables[tables.index(self._step.table) :]
            after = self._step.last
        arguments = ["backfill", "--from", self._plan.node, *tables]
        if after is not None:
            arguments += ["--after", after]
        return f"{PROGRAM} {shlex.join(arguments)}"


@contextmanager
def _resumable(plan: Backfill) -> Iterator[Position]:
    """Say how to go on when the block ends early."""
    position = Position(plan)
    try:
        yield position
    except BaseException:
        show.complain(f"interrupted; what is marked stays marked; go on with: {position.remedy}")
        raise


@contextmanager
def _progress(
    plan: Backfill, connections: operate.Connections
) -> Iterator[Callable[[BackfillStep], None]]:
    """Show a bar for each table on stderr, or a line for each chunk where that is no terminal."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield lambda step: show.complain(
            printable(f"{step.table}: {step.marked:,} marked, up to {step.last}")
        )
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = {
            table: progress.add_task(table, total=rows)
            for table, rows in operate.count_backfill(connections, plan).items()
        }
        yield lambda step: progress.advance(tasks[step.table], step.marked)
