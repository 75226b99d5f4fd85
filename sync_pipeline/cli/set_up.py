"""Set up: `install`, `uninstall`, `doctor`, `demo`."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sync_pipeline import config as configuration
from sync_pipeline import doctor as physician
from sync_pipeline import install as installation
from sync_pipeline import operate
from sync_pipeline.cli import show
from sync_pipeline.cli.app import (
    FAILED,
    ConfigOption,
    JsonOption,
    example,
    open_nodes,
    refuse,
)
from sync_pipeline.config import Config
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.install import Step
from sync_pipeline.records import Finding, counted, printable

PANEL = "Set up"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel=PANEL, epilog=example("install --dry-run"))(install)
    app.command(rich_help_panel=PANEL, epilog=example("uninstall --yes"))(uninstall)
    app.command(rich_help_panel=PANEL, epilog=example("doctor --json"))(doctor)
    app.command(rich_help_panel=PANEL, epilog=example("demo"))(demo)


def install(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the SQL that is still needed and run none.")
    ] = False,
    confirm_identity: Annotated[
        bool,
        typer.Option(
            "--confirm-identity",
            help="A restored, upgraded or renamed database takes its node's place from now on.",
        ),
    ] = False,
) -> None:
    """Create or upgrade the pipeline's schema and triggers on both nodes.

    Safe to run again, and while applications work: where nothing is missing, nothing is done.
    """
    link = configuration.load(config)
    with open_nodes(link) as connections:
        run = installation.plan if dry_run else installation.install
        steps = run(link, connections, confirm_identity=confirm_identity)
    if as_json:
        show.document({"dry_run": dry_run, "steps": steps})
    elif dry_run:
        _print_sql(link, steps)
    else:
        for node in link.nodes:
            number = sum(step.node == node.name for step in steps)
            done = counted(number, "statement") + " run" if number else "nothing was missing"
            show.say(f"{node.name}: installed; {done}")
        first = link.first.name
        show.say(
            f"next: `sync-pipeline backfill --from {first}` if the tables are not equal yet, "
            "then `sync-pipeline stream`"
        )


def uninstall(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Really remove it; without this, only say what would go.")
    ] = False,
) -> None:
    """Remove the pipeline's schema and triggers from both nodes; the tables keep every row.

    Pending events, failures and logged conflicts go with the schema.
    """
    link = configuration.load(config)
    with open_nodes(link) as connections:
        if not yes:
            refuse(_what_would_go(link, connections))
        steps = installation.uninstall(link, connections)
    if as_json:
        show.document({"steps": steps})
        return
    for node in link.nodes:
        number = sum(step.node == node.name for step in steps)
        done = counted(number, "statement") + " run" if number else "nothing was there"
        show.say(f"{node.name}: removed; {done}")


def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check both nodes before they hurt; exit 1 on any finding of level error."""
    link = configuration.load(config)
    findings = physician.examine(link)
    if as_json:
        names = ("level", "check", "node", "table", "message", "remedy")
        show.document(
            {"findings": [{name: getattr(each, name) for name in names} for each in findings]}
        )
    else:
        for finding in findings:
            where = ": ".join(part for part in (finding.node, finding.table) if part)
            text = f"{where}: {finding.message}" if where else finding.message
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            show.say(printable(f"{finding.level}: {text}{remedy}"))
        show.say(_summary([finding.level for finding in findings]))
        show.say(f"next: {_next(link, findings)}")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        show.complain(f"doctor found {counted(errors, 'error')}; each comes with its remedy")
        raise typer.Exit(FAILED)


def demo(
    config: Annotated[  # noqa: ARG001 - every command takes it
        Path | None,
        typer.Option("--config", "-c", help="Not read: the demo writes its own."),
    ] = None,
    as_json: JsonOption = False,
    ui: Annotated[
        bool,
        typer.Option("--ui", help="Start Dagster on 127.0.0.1:3000 over the two servers instead."),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Also write what is shown to this SVG file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Sync two embedded PostgreSQL servers, live, and verify them equal; no configuration needed."""
    from sync_pipeline import demo as demonstration

    raise typer.Exit(demonstration.run(ui=ui, json_output=as_json, picture=picture))


def _print_sql(link: Config, steps: list[Step]) -> None:
    for node in link.nodes:
        mine = [step for step in steps if step.node == node.name]
        show.say(f"-- {node.name}" if mine else f"-- {node.name}: nothing is missing")
        for step in mine:
            show.say(step.statement.rstrip().rstrip(";") + ";\n")


def _what_would_go(link: Config, connections: operate.Connections) -> str:
    names = " and ".join(node.name for node in link.nodes)
    text = (
        f"uninstall would remove the schema {link.schema_name} and the capture triggers of "
        f"{counted(len(link.tables), 'table')} from {names}"
    )
    with contextlib.suppress(SyncPipelineError):
        waiting = sum(operate.pending_counts(link, connections).values())
        if waiting:
            text += f", and with them {counted(waiting, 'pending event')}"
    return f"{text}; the tables keep every row. Nothing was done; repeat with --yes to do it"


def _next(link: Config, findings: Sequence[Finding]) -> str:
    if any(finding.level == "error" for finding in findings):
        return "do what the errors ask for, then `sync-pipeline doctor` again"
    if any(finding.check == "schema" for finding in findings):
        return "`sync-pipeline install`"
    if any(finding.check == "paused" for finding in findings):
        return "`sync-pipeline resume`, once nothing speaks against it"
    with open_nodes(link) as connections:
        if operate.status(link, connections).leader is not None:
            return "`sync-pipeline status`: a consumer runs"
    return "`sync-pipeline stream`"


def _summary(levels: list[str]) -> str:
    if not levels:
        return "nothing to report: both nodes are ready"
    found = {level: levels.count(level) for level in ("error", "warning", "info")}
    words = {"error": "error", "warning": "warning", "info": "note"}
    return ", ".join(counted(number, words[level]) for level, number in found.items())
