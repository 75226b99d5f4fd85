"""`sync-pipeline demo`: the whole program on two embedded PostgreSQL servers, with real changes and real crashes."""

import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
from rich.console import Console

from sync_pipeline.demo import epilogue, story, traffic
from sync_pipeline.demo.screen import Screen, save_picture
from sync_pipeline.demo.shop import opened
from sync_pipeline.demo.stage import Stage
from sync_pipeline.errors import SyncPipelineError

INTERRUPTED = 130
PICTURE_WIDTH = 96


def run(*, ui: bool = False, json_output: bool = False, picture: Path | None = None) -> int:
    """Run the demo and return its exit code: 0 only if both databases are equal at the end.

    `ui` starts the same two servers with changes trickling in and Dagster on 127.0.0.1:3000, until Ctrl-C.
    `json_output` prints one JSON document instead of the story. `picture` also writes what is printed to an SVG
    file. Servers, consumers and files are gone when it returns, after Ctrl-C and SIGTERM too.
    """
    try:
        with (
            _signals_interrupt(),
            tempfile.TemporaryDirectory(
                prefix="sync-demo-", ignore_cleanup_errors=True
            ) as directory,
        ):
            if ui:
                return traffic.run(Path(directory))
            return _tell(Path(directory), json_output=json_output, picture=picture)
    except KeyboardInterrupt:
        _complain("stopped; servers, consumers and files are gone")
        return INTERRUPTED
    except (SyncPipelineError, psycopg.Error) as error:
        if json_output:
            _print_json({"equal": False, "error": str(error)})
        _complain(f"the demo failed: {error}")
        return 1


def _tell(directory: Path, *, json_output: bool, picture: Path | None) -> int:
    started = time.monotonic()
    console = Console(quiet=json_output)
    if picture is not None:
        console = Console(record=True, width=PICTURE_WIDTH, force_terminal=True)
    live = console.is_terminal and picture is None and not json_output
    with ExitStack() as stack:
        screen = stack.enter_context(Screen(console, live=live).following())
        screen.begin("Two PostgreSQL servers, crm and billing")
        shop = stack.enter_context(opened(directory))
        version = shop.servers["crm"].version
        screen.say(f"PostgreSQL {version}; each database has accounts <- users <- orders")
        screen.end(time.monotonic() - started)
        stage = Stage(shop, screen)
        stack.callback(stage.close)
        for title, act in story.STEPS:
            with stage.step(title):
                act(stage)
        with stage.step("sync-pipeline verify"):
            report = epilogue.compare(stage)
        with stage.step("What an operator types"):
            statements = epilogue.operate(stage)
        screen.conclude(equal=report.equal, seconds=time.monotonic() - started)
    if picture is not None:
        save_picture(console, picture)
    if json_output:
        _print_json(
            {
                "equal": report.equal,
                "seconds": round(time.monotonic() - started, 3),
                "steps": [asdict(step) for step in screen.steps],
                "tables": {
                    name: {"equal": table.equal, "rows": dict(table.rows)}
                    for name, table in report.tables.items()
                },
                "sql": [asdict(statement) for statement in statements],
            }
        )
    return 0 if report.equal else 1


def _complain(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does, once: what follows must not disturb the cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
