"""Processes that talk in lines, and what they cost."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

END_SECONDS = 10.0
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Process:
    """A child that reads and writes lines."""

    popen: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.popen.pid

    def write_line(self, line: str) -> None:
        if self.popen.stdin is None:
            raise AssertionError("started without a pipe")
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def read_line(self) -> str:
        """The next line; raises when the process ended instead of saying one."""
        if self.popen.stdout is None:
            raise AssertionError("started without a pipe")
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.popen.args!r} ended with {self.popen.wait(END_SECONDS)}")
        return line.rstrip("\n")


@contextmanager
def started(*command: str) -> Iterator[Process]:
    """Start a program in the repository's root; at the end of the block it is gone."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as popen:
        try:
            yield Process(popen)
            if popen.stdin is not None:
                popen.stdin.close()
            popen.wait(END_SECONDS)
        finally:
            if popen.poll() is None:
                popen.kill()


@contextmanager
def repeated(step: Callable[[int], None], seconds: float) -> Iterator[None]:
    """Call `step` with 1, 2, 3 … in a thread, with a pause of some seconds before each, until the block ends."""
    over = threading.Event()

    def work() -> None:
        number = 0
        while not over.wait(seconds):
            number += 1
            step(number)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def peak_mb() -> float:
    """The most memory that this process ever held, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a child begins with its parent's.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource  # noqa: PLC0415 - not on Windows
    import sys  # noqa: PLC0415

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
