"""Consumers of the demo: real processes that run `sync-pipeline stream`, so that they can really be killed."""

import os
import subprocess
import sys

from sync_pipeline.demo.shop import Shop

# A consumer survives lost servers by design; this bounds its life should the demo itself be killed.
LONGEST_SECONDS = 300
STOP_SECONDS = 10.0


class Consumer:
    """One process that runs `sync-pipeline stream`; starts at once."""

    def __init__(self, shop: Shop, name: str) -> None:
        self.name = name
        self._is_ended = False
        self.log_path = shop.directory / f"consumer-{name}.log"
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "sync_pipeline",
                    "stream",
                    "--config",
                    str(shop.config_path),
                    "--seconds",
                    str(LONGEST_SECONDS),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | shop.environment,
                # Ctrl-C in the terminal is for the demo alone, which then stops its consumers.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    @property
    def has_failed(self) -> bool:
        """Whether the process ended though nobody ended it."""
        return not self._is_ended and not self.is_running

    def output(self) -> str:
        """Return what the consumer has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace").strip()

    def kill(self) -> None:
        """Send SIGKILL: no handler runs, nothing is cleaned up."""
        self._is_ended = True
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """Ask the consumer to end, wait for it, and return its exit code; kill it when it does not listen."""
        self._is_ended = True
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode
