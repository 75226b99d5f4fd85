"""The demo as its users run it, and as it ends when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sync_pipeline import demo
from sync_pipeline.defs import dev
from sync_pipeline.demo import story, traffic
from sync_pipeline.demo.shop import Shop
from sync_pipeline.demo.stage import DemoFailed, Stage

LONGEST_SECONDS = 100


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files of the demo: short, as the path of a Unix socket must be."""
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as directory:
        # The servers may run as a user of their own.
        Path(directory).chmod(0o755)
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(directory)


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "sync_pipeline", "demo", *options]


def processes_in(directory: Path) -> list[str]:
    """The processes whose command line names the directory: servers and consumers."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(directory) in " ".join(words):
            found.append(" ".join(words))
    return found


@pytest.mark.slow
def test_the_demo_ends_equal_and_leaves_nothing_behind(scratch: Path) -> None:
    ended = subprocess.run(
        command("--json"), capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    document = json.loads(ended.stdout)
    assert document["equal"] is True
    assert {name: table["equal"] for name, table in document["tables"].items()} == {
        "accounts": True,
        "users": True,
        "orders": True,
    }
    after = {step["title"]: step["nodes"] for step in document["steps"]}
    assert after["A record that the other side refuses"]["crm"]["failures"] == 1
    assert after["kill -9 between the two commits"]["crm"]["pending"] == 10
    assert after["A conflict, and the recovery"]["billing"]["conflicts"] == 1
    assert after["The end"]["crm"]["rows"] == after["The end"]["billing"]["rows"]
    assert [statement["result"] for statement in document["sql"]][0::3] == [
        "INSERT 0 1",
        "DELETE 1",
    ]
    assert list(scratch.iterdir()) == []
    assert processes_in(scratch) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_servers_and_consumers(
    scratch: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            # Two servers and two consumers run now, and a third is still to come.
            if "stands by" in line:
                break
        assert len(processes_in(scratch)) >= 4
        process.send_signal(number)
        _, errors = process.communicate(timeout=LONGEST_SECONDS)
    assert process.returncode == demo.INTERRUPTED, errors
    assert list(scratch.iterdir()) == []
    assert processes_in(scratch) == []
    # Not a terminal: plain lines.
    assert not any("\x1b" in line for line in lines)


def test_databases_that_differ_at_the_end_fail_the_demo(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tamper(stage: Stage) -> None:
        with stage.shop.crm.transaction() as connection:
            connection.execute("alter table accounts disable trigger user")
            connection.execute("insert into accounts (id, name) values (7, 'unseen')")
            connection.execute("alter table accounts enable trigger user")
            connection.commit()

    steps = (("install", story.install), ("tamper", tamper))
    monkeypatch.setattr(story, "STEPS", steps)
    assert demo.run(json_output=True) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["equal"] is False
    assert document["tables"]["accounts"]["equal"] is False
    assert document["tables"]["users"]["equal"] is True
    assert list(scratch.iterdir()) == []


def test_a_promise_that_is_not_kept_fails_the_demo_in_one_message(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_consumer(stage: Stage) -> None:
        stage.shop.config_path.write_text("nodes: none\n", encoding="utf-8")
        stage.start_consumer("A")
        with pytest.raises(DemoFailed, match="a consumer ended by itself; expected that it leads"):
            stage.wait("it leads", lambda: False)

    def expect_too_much(stage: Stage) -> None:
        stage.expect("accounts on crm", stage.shop.crm.value("select count(*) from accounts"), 1)

    monkeypatch.setattr(
        story, "STEPS", (("install", story.install), ("a", lose_a_consumer), ("b", expect_too_much))
    )
    assert demo.run(json_output=True) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["equal"] is False
    assert captured.err == "the demo failed: accounts on crm: found 0, expected 1\n"
    assert list(scratch.iterdir()) == []


def test_with_the_ui_changes_trickle_in_on_both_sides_until_dagster_ends(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = threading.Event()
    seen: list[int] = []

    def run_dagster_dev(
        config_path: Path, environment: dict[str, str], home: Path, port: int = 3000
    ) -> int:
        """In place of `dagster dev`: wait until each change has been made at least once."""
        assert config_path.exists()
        assert set(environment) == {"CRM_DSN", "BILLING_DSN"}
        assert (home.parent, port) == (config_path.parent, 3000)
        assert rounds.wait(LONGEST_SECONDS)
        return 0

    def count(shop: Shop, stop: threading.Event) -> None:
        """Go through all changes twice, without waiting between them."""
        for _ in range(2):
            traffic.change(shop, threading.Event())
        seen.extend(node.observe().pending for node in shop.nodes)
        rounds.set()
        stop.wait()

    monkeypatch.setattr(dev, "run_dagster_dev", run_dagster_dev)
    monkeypatch.setattr(traffic, "CHANGE_SECONDS", 0.0)
    monkeypatch.setattr(traffic, "trickle", count)
    assert demo.run(ui=True) == 0
    # More than what the two sides began with.
    assert seen[0] > 480
    assert seen[1] > 160
    assert list(scratch.iterdir()) == []
