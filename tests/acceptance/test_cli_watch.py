"""Status and pending: what an operator looks at."""

import os
import pty
import re
import select
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from sync_pipeline.cli.watch import Rates
from sync_pipeline.demo.screen import save_picture
from sync_pipeline.views import Backlog, NodeStatus, Status
from tests.engine import installed, sync_pair
from tests.helpers import Node, Pair, eventually, write_config
from tests.program import (
    PROGRAM,
    answer,
    line_with,
    refused,
    run,
    running,
    stop,
    succeed,
    variables,
)

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# All of them but colours.
SCREEN_MOVES = re.compile(r"\x1b\[[0-9;?]*[a-ln-zA-Z]")


@pytest.fixture
def link(pair: Pair) -> Pair:
    installed(pair)
    return pair


def test_status_counts_what_waits_failed_and_conflicted_on_each_node(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    sync_pair(link)
    link.crm.execute("update accounts set name = 'crm'")
    link.billing.execute("update accounts set name = 'billing'")
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("users", id=1, account_id=1, email="a@x.org", age=3)
    sync_pair(link)
    link.billing.insert("accounts", id=2, name="two")
    link.billing.insert("accounts", id=3, name="three")

    found = answer(link, "status")
    assert found["paused"] is False
    assert found["leader"] is None
    crm, billing = found["nodes"]["crm"], found["nodes"]["billing"]
    assert (crm["pending"], crm["retrying"], crm["dead"]) == (0, 1, 0)
    assert (billing["pending"], billing["retrying"], billing["dead"]) == (2, 0, 0)
    assert crm["conflicts_24h"] + billing["conflicts_24h"] == 1
    assert crm["oldest_seconds"] == 0
    assert billing["oldest_seconds"] > 0
    assert crm["last_pass_at"] is not None
    # Both servers run on this machine, so their clocks are the same one.
    assert abs(found["clock_difference_seconds"]) <= found["clock_accuracy_seconds"] + 0.001
    shown = succeed(link, "status")
    assert "nobody leads" in shown


def test_status_names_the_session_whose_lock_the_consumer_waits_for(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    sync_pair(link)
    link.crm.execute("update accounts set name = 'two'")
    with link.billing.connect(autocommit=False) as application:
        application.execute("set application_name = 'night shift'")
        application.execute("select from accounts for update")
        with running(link, "sync"):
            blocker = eventually(
                "the consumer waits",
                lambda: answer(link, "status")["nodes"]["billing"]["blocker"],
            )
            assert blocker["pid"] == application.info.backend_pid
            assert (blocker["application_name"], blocker["state"]) == (
                "night shift",
                "idle in transaction",
            )
            assert blocker["seconds"] > 0
            shown = succeed(link, "status")
            assert f"a lock of backend {blocker['pid']} (night shift, idle in transaction)" in shown
    assert answer(link, "status")["nodes"]["billing"]["blocker"] is None


def test_status_names_the_node_that_is_down_and_shows_the_other(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    down = "postgresql://127.0.0.1:1/nothing"
    shown = run(link, "status", BILLING_DSN=down)
    assert shown.returncode == 0
    assert "billing: cannot connect" in shown.stdout
    document = run(link, "status", "--json", BILLING_DSN=down)
    assert '"pending": 1' in document.stdout
    assert "billing: cannot connect" in document.stdout
    both = run(link, "status", BILLING_DSN=down, CRM_DSN="postgresql://127.0.0.1:2/nothing")
    assert both.returncode == 1
    assert both.stdout == ""


def test_status_names_the_node_that_is_not_installed(link: Pair) -> None:
    link.billing.execute("drop schema sync cascade")
    found = answer(link, "status")["nodes"]
    assert found["crm"]["error"] is None
    assert "sync-pipeline install" in found["billing"]["error"]


def test_watch_prints_lines_where_there_is_no_terminal(link: Pair) -> None:
    with running(link, "status", "--watch", "--interval", "0.1") as watching:
        first = line_with(watching, "pending")
        assert "crm: 0 pending" in first
        assert "0 conflicts in 24 h" in first
        link.crm.insert("accounts", id=1, name="one")
        assert "billing: 0 pending" in line_with(watching, "crm: 1 pending")
        assert stop(watching) == 0


def test_rates_are_what_came_and_went_between_two_looks() -> None:
    def look(captured: int, pending: int) -> Status:
        backlog = Backlog("crm", pending, None, 0.0, 0, 0, 0, 0, None, None)
        return Status({"crm": NodeStatus(backlog, captured=captured), "billing": NodeStatus()})

    moments = iter((0.0, 2.0, 4.0))
    rates = Rates(lambda: next(moments))
    rates.see(look(captured=100, pending=0))
    assert rates.of("crm") == "-"
    rates.see(look(captured=3100, pending=1000))
    assert rates.of("crm") == "1,500 in, 1,000 out"
    # The statistics were reset.
    rates.see(look(captured=0, pending=0))
    assert rates.of("crm") == "0 in, 500 out"
    assert rates.of("billing") == "-"


def test_watch_fits_a_terminal_of_80_columns(link: Pair) -> None:
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("accounts", id=1, name="one")
    link.crm.insert("users", id=1, account_id=1, email="a@x.org", age=3)
    sync_pair(link)
    link.crm.insert("accounts", id=2, name="two")
    with on_a_terminal(link, "status", "--watch") as (watching, terminal):
        screen = _read_until(terminal, "Ctrl-C ends it")
        assert stop(watching) == 0
    lines = [line.rstrip() for line in ESCAPES.sub("", screen).splitlines()]
    assert max(map(len, lines)) <= 80
    assert any("pending" in line and "1" in line and "0" in line for line in lines)
    assert "nobody leads" in screen
    assert any("events a second" in line for line in lines)
    assert any("last error" in line and "23514 users" in line for line in lines)
    assert len([line for line in lines if line]) <= 24


def test_watch_shows_a_link_at_work_as_in_the_picture(
    link: Pair, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A consumer leads, changes come and go, a record is refused; `--screenshots docs/images` renews the picture."""
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("accounts", id=0, name="conflict")
    sync_pair(link)
    for node in link.nodes:
        node.execute("update accounts set name = %s", node.name)
    link.crm.insert("users", id=1, account_id=0, email="a@x.org", age=3)
    at_work = re.compile(r"[1-9][\d,]* in, [1-9][\d,]* out.*[1-9][\d,]* in, [1-9][\d,]* out")
    with (
        running(link, "stream") as stream,
        on_a_terminal(link, "status", "--watch", "--interval", "0.5") as (watching, terminal),
    ):
        frame = ""
        for number in range(1, 100):
            for node, first in ((link.crm, number * 1000), (link.billing, -number * 1000)):
                node.execute(
                    "insert into accounts (id, name) select %s::int + g, 'busy' from generate_series(1, 300) as g",
                    first,
                )
            frame = _read_until(terminal, "Ctrl-C ends it")
            shown = ESCAPES.sub("", frame)
            if at_work.search(shown) and "led by backend" in shown and "23514 users" in shown:
                break
        else:
            pytest.fail(f"never at work: {frame}")
        assert stop(watching) == 0
        assert stop(stream) == 0
    picture = (request.config.getoption("--screenshots") or tmp_path) / "status.svg"
    console = Console(record=True, width=80, file=StringIO(), force_terminal=True)
    lines = SCREEN_MOVES.sub("", frame.rpartition("\x1b[H")[2]).replace("\r\n", "\n")
    console.print(Text.from_ansi(lines.rstrip()))
    save_picture(console, picture, "sync-pipeline status --watch")
    assert "led&#160;by" in picture.read_text("utf-8")


def test_backfill_and_verify_show_bars_on_a_terminal(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    with on_a_terminal(link, "backfill", "--from", "crm") as (_, terminal):
        drawn = _read_until(terminal, "1 record marked")
    assert re.search(r"accounts .*━.*1/1", ESCAPES.sub("", drawn))
    sync_pair(link)
    with on_a_terminal(link, "verify") as (_, terminal):
        drawn = _read_until(terminal, "both sides are equal")
    assert "accounts: 1 row compared" in drawn
    assert re.search(r"comparing .*━.*3/3", ESCAPES.sub("", drawn))


def test_pending_shows_the_oldest_events_and_whether_their_rows_exist(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    link.crm.insert("users", id=10, account_id=1, email="u@x.org")
    link.crm.execute("delete from users")
    link.billing.insert("accounts", id=2, name="two")
    mark(link.crm, "unicorns", "1")
    mark(link.crm, "users", "no number")

    found = answer(link, "pending")
    assert found["pending"] == {"crm": 5, "billing": 1}
    seen = {(e["table_name"], e["record_id"], e["event_type"]): e for e in found["events"]}
    assert seen["accounts", "1", "insert"]["row_exists"] is True
    assert seen["users", "10", "insert"]["row_exists"] is False
    assert seen["users", "10", "delete"]["row_exists"] is False
    assert seen["unicorns", "1", "update"]["row_exists"] is None
    assert seen["users", "no number", "update"]["row_exists"] is None
    assert seen["accounts", "2", "insert"]["node"] == "billing"
    made = [event["created_at"] for event in found["events"]]
    assert made == sorted(made)
    assert all(event["age_seconds"] > 0 for event in found["events"])

    assert len(answer(link, "pending", "--limit", "2")["events"]) == 2
    users = answer(link, "pending", "users", "--node", "crm")
    assert {event["table_name"] for event in users["events"]} == {"users"}
    assert users["pending"] == {"crm": 3}
    assert answer(link, "pending", "unicorns")["pending"]["crm"] == 1
    assert "gone" in succeed(link, "pending")


def test_pending_of_one_node_needs_only_that_node(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    down = "postgresql://127.0.0.1:1/nothing"
    assert run(link, "pending", "--node", "crm", BILLING_DSN=down).returncode == 0
    assert run(link, "pending", BILLING_DSN=down).returncode == 1


def test_a_value_cannot_steer_the_terminal(link: Pair) -> None:
    write_config(link.config_path, ["accounts"])
    mark(link.crm, "accounts", "\x1b[2J[red]1[/red]")
    shown = succeed(link, "pending")
    assert "\x1b" not in shown
    assert "[red]1[/red]" in shown.replace("\n", "")


def test_an_unknown_table_is_refused_unless_events_name_it(link: Pair) -> None:
    assert "accounts, users, orders" in refused(link, "pending", "unicorns")


def mark(node: Node, table: str, record_id: str) -> None:
    node.execute(
        "insert into sync.sync_events (table_name, record_id) values (%s, %s)", table, record_id
    )


@contextmanager
def on_a_terminal(link: Pair, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command on a terminal of 80 columns for a `with` block; whatever is left of it at the end is killed."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    try:
        with subprocess.Popen(
            [*PROGRAM, *arguments, "--config", str(link.config_path)],
            env=variables(link),
            stdin=slave,
            stdout=slave,
            stderr=slave,
        ) as process:
            try:
                yield process, master
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        os.close(slave)
        os.close(master)


def _read_until(terminal: int, text: str) -> str:
    """Read what a program draws until it has drawn `text`."""
    drawn = ""
    while text not in drawn:
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, f"nothing more is drawn after {drawn!r}"
        with suppress(OSError):
            drawn += os.read(terminal, 65536).decode(errors="replace")
    return drawn
