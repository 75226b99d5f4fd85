"""`dagster dev` as a child of this process: webserver, daemon and code server, all gone when it returns."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shutil import copyfile

STOP_SECONDS = 20.0
_HOME_OF_CHECKOUT = Path(__file__).resolve().parents[2] / "dagster_home"


def run_dagster_dev(
    config_path: Path, environment: Mapping[str, str], home: Path, port: int = 3000
) -> int:
    """Run `dagster dev` on 127.0.0.1 until it ends or Ctrl-C; return its exit code, 0 after Ctrl-C.

    `environment` holds what the configuration reads. `home` becomes DAGSTER_HOME; one without a `dagster.yaml` gets
    that of the checkout.
    """
    home.mkdir(parents=True, exist_ok=True)
    settings = _HOME_OF_CHECKOUT / "dagster.yaml"
    if settings.exists() and not (home / settings.name).exists():
        copyfile(settings, home / settings.name)
    process = subprocess.Popen(
        [
            sys.executable,
            *("-m", "dagster", "dev"),
            *("-m", "sync_pipeline.definitions"),
            *("-h", "127.0.0.1", "-p", str(port)),
        ],
        env={
            **os.environ,
            **environment,
            "DAGSTER_HOME": str(home.resolve()),
            "SYNC_CONFIG": str(config_path.resolve()),
        },
        # Ctrl-C in the terminal is for us alone: we end the whole session of processes in order.
        start_new_session=True,
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a session of Dagster's processes: it is asked to, and after a while it is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(STOP_SECONDS)
    # What is left of its group, whether it ended by itself or not.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
