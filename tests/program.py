"""The program as its users run it: a process of its own, with nothing but arguments and variables."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from sync_pipeline import cli
from tests.helpers import Pair

TIMEOUT_SECONDS = 60
PROGRAM = (sys.executable, "-m", "sync_pipeline")
# Most of what a short command costs are its imports. The process that is forked for each has done them.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


def run(
    pair: Pair, *arguments: str, configured: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. It reads the pair's configuration unless `configured` is false."""
    command = _command(pair, arguments, configured=configured)
    return forked(pair, _be_the_program, command[len(PROGRAM) - 1 :], **environment)


def forked(
    pair: Pair, work: Callable[..., None], *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a function to its end in a process of its own, with a pair's variables, in the folder of its `sync.yaml`."""
    with TemporaryDirectory() as directory:
        outputs = Path(directory, "stdout"), Path(directory, "stderr")
        with mock.patch.dict(os.environ, variables(pair), clear=True):
            forkserver.ensure_running()
        process = _FORKS.Process(
            target=_take_on,
            args=(variables(pair) | environment, pair.config_path.parent, outputs, work, arguments),
        )
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(work.__name__, TIMEOUT_SECONDS)
        stdout, stderr = (output.read_text(encoding="utf-8") for output in outputs)
        return subprocess.CompletedProcess(work.__name__, process.exitcode, stdout, stderr)


def _take_on(
    environment: Mapping[str, str],
    directory: Path,
    outputs: Sequence[Path],
    work: Callable[..., None],
    arguments: Sequence[object],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    work(*arguments)


def _be_the_program(command: Sequence[str]) -> None:
    sys.argv = list(command)
    cli.main()


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
