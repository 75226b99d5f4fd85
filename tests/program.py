"""The program as its users run it: a process of its own, with nothing but arguments and variables."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.helpers import Pair

TIMEOUT_SECONDS = 60
PROGRAM = (sys.executable, "-m", "sync_pipeline")


def run(
    pair: Pair, *arguments: str, configured: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. It reads the pair's configuration unless `configured` is false."""
    return subprocess.run(
        _command(pair, arguments, configured=configured),
        env=variables(pair) | environment,
        cwd=pair.config_path.parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def succeed(pair: Pair, *arguments: str) -> str:
    """Run a command that must end with 0; return what it printed."""
    result = run(pair, *arguments)
    assert result.returncode == 0, f"{arguments}: {result.returncode}\n{result.stderr}"
    return result.stdout


def answer(pair: Pair, *arguments: str) -> dict[str, Any]:
    """Run a command with `--json`, which must end with 0; return its document."""
    document: dict[str, Any] = json.loads(succeed(pair, *arguments, "--json"))
    return document


def refused(pair: Pair, *arguments: str, code: int = 1) -> str:
    """Run a command that must end with `code` and one message on stderr; return the message."""
    result = run(pair, *arguments)
    assert result.returncode == code, f"{arguments}: {result.returncode}\n{result.stderr}"
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@contextmanager
def running(pair: Pair, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command for a `with` block; whatever is left of it at the end is killed."""
    with subprocess.Popen(
        _command(pair, arguments, configured=True),
        env=variables(pair),
        cwd=pair.config_path.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """Read lines of a running command until one has this text; return it. Fails when the output ends before."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        if text in line:
            return line
        seen.append(line)
    errors = process.stderr.read() if process.stderr is not None else ""
    message = f"no line with {text!r} in:\n{''.join(seen)}{errors}"
    raise AssertionError(message)


def stop(process: subprocess.Popen[Any], signum: int = signal.SIGTERM) -> int:
    """Ask a running command to stop; return its exit code."""
    process.send_signal(signum)
    return process.wait(TIMEOUT_SECONDS)


def _command(pair: Pair, arguments: tuple[str, ...], *, configured: bool) -> list[str]:
    config = ["--config", str(pair.config_path)] if configured else []
    return [*PROGRAM, *arguments[:1], *config, *arguments[1:]]


def variables(pair: Pair) -> dict[str, str]:
    """All that the program finds in its environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    return kept | {"LANG": "C.UTF-8", "TERM": "xterm"} | pair.environment
