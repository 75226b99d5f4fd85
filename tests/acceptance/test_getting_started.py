"""A newcomer: from two databases with rows on both sides to an equal, watched pair, by the page alone."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.engine import equal
from tests.helpers import Pair

PAGE = Path(__file__).parents[2] / "docs" / "getting-started.md"
# What is different on each machine: where the program and the databases are.
GIVEN = ("Install the program", "Say where the databases are")
STREAM = "sync-pipeline stream"
DEADLINE_SECONDS = 60.0


def steps() -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of the page, and the lines that each shall print."""
    _, *parts = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section, text in zip(parts[::2], parts[1::2], strict=True):
        if section in GIVEN:
            continue
        for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *expected = step.splitlines()
                yield command, expected


def pattern(expected: list[str]) -> str:
    """The shown output as a regular expression: `…` alone is any lines, at an end of a line any text."""
    lines = [
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + "\n"
        for line in expected
    ]
    return "".join(lines)


def fill(pair: Pair) -> None:
    for node, name in zip(pair.nodes, ("of crm", "of billing"), strict=True):
        node.insert("accounts", id=1, name=name)
    pair.crm.insert("accounts", id=2, name="only on crm")
    pair.crm.insert("users", id=1, account_id=2, email="a@x.org", age=30)
    pair.billing.insert("accounts", id=3, name="only on billing")
    pair.billing.insert("users", id=2, account_id=3, email="b@x.org", age=40)
    pair.billing.execute("insert into orders values (1, 2, 10, null), (2, 2, 20, null)")


def test_the_page_leads_from_two_databases_to_an_equal_and_watched_pair(pair: Pair) -> None:
    pair.config_path.unlink()
    fill(pair)
    folder = pair.config_path.parent
    programs = [Path(sys.executable).parent, pair.crm.server.bin("psql").parent]
    path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    environment = {**os.environ, **pair.environment, "PATH": path}
    environment.pop("SYNC_CONFIG", None)
    streams: list[subprocess.Popen[bytes]] = []

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    transcript = ""
    try:
        for command, expected in steps():
            if command == STREAM:
                process = subprocess.Popen(
                    command.split(),
                    env=environment,
                    cwd=folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                streams.append(process)
                continue
            deadline = time.monotonic() + DEADLINE_SECONDS
            while True:
                done = run(command)
                transcript += f"$ {command}\n{done.stdout}{done.stderr}"
                assert done.returncode == 0, transcript
                if re.fullmatch(pattern(expected), done.stdout):
                    break
                # Only what waits for the stream may need another look.
                assert streams, f"expected {expected}:\n{transcript}"
                assert time.monotonic() < deadline, f"expected {expected}:\n{transcript}"
        assert [process.poll() for process in streams] == [None]
    finally:
        for process in streams:
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_SECONDS)
    assert equal(pair)
    assert [row[:2] for row in pair.crm.rows("accounts")] == [
        *((1, "Renamed"), (2, "only on crm"), (3, "only on billing")),
    ]
    assert "sync_pipeline_led" in transcript


def test_every_page_that_it_leads_to_is_there() -> None:
    for page in re.findall(r"\]\(([\w./-]+\.md)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / page).is_file(), page
