"""Begin: `init`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr, ValidationError

from sync_pipeline import config as configuration
from sync_pipeline import proposal
from sync_pipeline.cli import show
from sync_pipeline.cli.app import ConfigOption, JsonOption, example, open_nodes, refuse
from sync_pipeline.cli.set_up import PANEL
from sync_pipeline.config import Config, NodeConfig, TableConfig
from sync_pipeline.errors import ConfigurationError
from sync_pipeline.records import counted, printable


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        rich_help_panel=PANEL,
        epilog=example("init --first crm=CRM_DSN --second billing=BILLING_DSN"),
    )(init)


def init(
    first: Annotated[
        str,
        typer.Option(
            "--first",
            metavar="NODE=VARIABLE",
            help="A node and the environment variable that holds its DSN; it wins ties.",
        ),
    ],
    second: Annotated[
        str, typer.Option("--second", metavar="NODE=VARIABLE", help="The other node, likewise.")
    ],
    config: ConfigOption = None,
    as_json: JsonOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Inspect two databases and write a commented sync.yaml that fits them; nothing is changed on either.

    The file is that of --config. It names the variables, so that no password is in it or in the arguments.
    """
    variables = dict((_named(first), _named(second)))
    if len(variables) != 2:
        refuse("--first and --second are the same node; give them different names")
    file = Path(config or os.environ.get(configuration.PATH_VARIABLE) or configuration.DEFAULT_PATH)
    if file.exists() and not force:
        refuse(f"{file} is there already and was not touched; repeat with --force to write over it")
    one, two = (_node(name, variable) for name, variable in variables.items())
    try:
        # Only to connect: no table of that name is asked for.
        link = Config(nodes=(one, two), tables=(TableConfig(name="none"),))
    except ValidationError as error:
        raise ConfigurationError(_problem(error)) from None
    with open_nodes(link) as connections:
        proposed = proposal.propose((one, two), connections, variables)
    configuration.parse(proposed.text, file=str(file))
    try:
        file.write_text(proposed.text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"cannot be written: {error.strerror}", file=str(file), remedy="name another: --config"
        ) from None
    if as_json:
        show.document({"file": str(file), "tables": proposed.tables, "left_out": proposed.left_out})
        return
    for table, remarks in proposed.tables.items():
        show.say(printable(": ".join([table, *(["; ".join(remarks)] if remarks else [])])))
    for table, reason in proposed.left_out.items():
        show.say(printable(f"left out: {table}: {reason}"))
    show.say(f"{file}: {counted(len(proposed.tables), 'table')}")
    show.say(f"next: read {file}, then `sync-pipeline doctor`")


def _named(argument: str) -> tuple[str, str]:
    node, equals, variable = argument.partition("=")
    if not (node and equals and variable):
        refuse(f"`{argument}` is not NODE=VARIABLE, as in crm=CRM_DSN")
    if "://" in variable or "=" in variable or " " in variable:
        refuse(f"{node}: give the name of a variable that holds the DSN, not the DSN itself")
    return node, variable


def _node(name: str, variable: str) -> NodeConfig:
    if variable not in os.environ:
        raise ConfigurationError(
            f"${variable} is not set", place=name, remedy=f"export {variable}=postgresql://…"
        )
    try:
        return NodeConfig(name=name, dsn=SecretStr(os.environ[variable]))
    except ValidationError as error:
        is_name = error.errors(include_url=False, include_input=False)[0]["loc"] == ("name",)
        place = name if is_name else f"{name}: ${variable}"
        raise ConfigurationError(_problem(error), place=place) from None


def _problem(error: ValidationError) -> str:
    # Not chained, and without the input: it may be a connection string.
    return str(error.errors(include_url=False, include_input=False)[0]["msg"])
