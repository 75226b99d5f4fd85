"""The program: its options for every command, its connections, and what becomes of an error."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import psycopg
import typer

from sync_pipeline import __version__, identity, locks
from sync_pipeline.cli.show import complain, say
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, connected, in_words
from sync_pipeline.errors import SyncPipelineError

PROGRAM = "sync-pipeline"
FAILED = 1
USAGE = 2
# What a file of the output, or a temporary one, answers when it is full or broken.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="The configuration; default: $SYNC_CONFIG, else ./sync.yaml.",
        # Who reads it says what is wrong.
        readable=False,
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
KeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="KEY",
        help='A record, by its record_id: 42, or \'["42", "7"]\' for two columns; may be repeated.',
        show_default=False,
    ),
]
TableArgument = Annotated[
    str | None, typer.Argument(metavar="TABLE", help="Only this table.", show_default=False)
]
NodeOption = Annotated[
    str | None,
    typer.Option("--node", metavar="NODE", help="Only this node.", show_default=False),
]

app = typer.Typer(
    name=PROGRAM,
    epilog=f"Example: {PROGRAM} install && {PROGRAM} stream",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def example(arguments: str) -> str:
    """Return the last line of a command's help."""
    return f"Example: {PROGRAM} {arguments}"


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Keep two PostgreSQL databases equal in both directions."""


def main() -> None:
    """Run the program on the arguments of the process. Expected errors are one clear message on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Who started the program has closed it.
            _silence(name)
        # A name that the terminal's encoding lacks must not end the program.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    # Unwind, so that running statements are cancelled and the locks are free at once.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name=PROGRAM)
    except SyncPipelineError as error:
        complain(str(error))
        sys.exit(error.exit_code)
    except psycopg.Error as error:
        complain(f"PostgreSQL: {in_words(error)}")
        sys.exit(FAILED)
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        # What is still buffered would be tried again at the end.
        _silence("stdout")
        complain(
            f"the output or a temporary file cannot be written: {error.strerror}; make room there, "
            "or write them elsewhere (TMPDIR)"
        )
        sys.exit(FAILED)


@contextmanager
def open_nodes(config: Config) -> Iterator[dict[str, Connection]]:
    """Connect to both nodes for a `with` block; raises for the first that cannot be reached.

    And for two that are one database, and for a pooler that shares sessions: no command can do its work there.
    """
    with open_reachable(config) as (connections, unreachable):
        for error in unreachable.values():
            raise error
        for node in config.nodes:
            locks.refuse_shared_sessions(connections[node.name], node)
        identity.refuse_one_database(config, connections)
        yield connections


@contextmanager
def open_reachable(
    config: Config, only: str | None = None
) -> Iterator[tuple[dict[str, Connection], dict[str, SyncPipelineError]]]:
    """Connect to the nodes for a `with` block; yields connections, and why a node has none."""
    connections = {}
    unreachable = {}
    with ExitStack() as stack:
        for node in config.nodes if only is None else (config.node(only),):
            try:
                connections[node.name] = stack.enter_context(connected(node, config, "operator"))
            except SyncPipelineError as error:
                unreachable[node.name] = error
        yield connections, unreachable


def refuse(message: str) -> NoReturn:
    """End as for wrong usage: nothing was done, and the message says what to add."""
    complain(message)
    raise typer.Exit(USAGE)


def _silence(name: str) -> None:
    """Let what is written to `stdout` or `stderr` go nowhere from now on."""
    # It lives as long as the process.
    setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _terminate(signum: int, _: object) -> NoReturn:
    sys.exit(128 + signum)
