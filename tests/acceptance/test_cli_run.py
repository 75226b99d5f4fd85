"""Install, sync, stream, pause and uninstall, as an operator runs them."""

import inspect
import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from sync_pipeline.cli.run import Log, LogFormat
from sync_pipeline.errors import LockTaken
from sync_pipeline.records import DirectionReport
from tests.engine import config_of, equal, installed
from tests.helpers import Pair, eventually
from tests.program import answer, line_with, refused, run, running, stop, succeed


@pytest.fixture
def link(pair: Pair) -> Pair:
    installed(pair)
    return pair


def fill(pair: Pair) -> None:
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=10, account_id=1, email="u@x.org", age=30)
    pair.billing.insert("accounts", id=2, name="two")


def test_install_says_what_it_did_and_the_second_time_that_nothing_was_missing(pair: Pair) -> None:
    assert "crm: installed" in succeed(pair, "install")
    again = succeed(pair, "install")
    assert again.count("nothing was missing") == 2
    assert answer(pair, "install") == {"dry_run": False, "steps": []}


def test_a_dry_run_prints_sql_that_installs_the_same(pair: Pair) -> None:
    printed = succeed(pair, "install", "--dry-run")
    assert pair.crm.value("select to_regnamespace('sync')") is None
    crm, billing = printed.split("-- billing\n")
    for node, script in ((pair.crm, crm.removeprefix("-- crm\n")), (pair.billing, billing)):
        with node.connect(autocommit=False) as connection:
            connection.execute(script.encode())
    assert answer(pair, "install")["steps"] == []
    fill(pair)
    succeed(pair, "sync")
    assert equal(pair)


def test_sync_makes_both_equal_and_says_what_it_did(link: Pair) -> None:
    fill(link)
    done = answer(link, "sync")
    assert equal(link)
    assert done["passes"] == 1
    assert done["paused"] is False
    assert done["pending"] == {"crm": 0, "billing": 0}
    assert done["directions"] == {
        "crm->billing": {
            "upserted": 2, "deleted": 0, "unchanged": 0, "conflicts": 0, "failed": 0
        },
        "billing->crm": {
            "upserted": 1, "deleted": 0, "unchanged": 0, "conflicts": 0, "failed": 0
        },
    }  # fmt: skip
    shown = succeed(link, "sync")
    assert "crm->billing" in shown
    assert "0 passes" in shown


def test_sync_points_to_the_failures(link: Pair) -> None:
    link.billing.execute("alter table accounts add constraint named check (name <> 'one')")
    fill(link)
    assert "sync-pipeline failures" in succeed(link, "sync")


def test_sync_ends_with_three_while_another_worker_streams_and_works_again_after(
    link: Pair,
) -> None:
    with running(link, "stream") as worker:
        line_with(worker, "leading crm and billing")
        assert "another consumer leads" in refused(link, "sync", code=3)
        assert answer(link, "status")["leader"]["node"] == "crm"
        assert stop(worker) == 0
    assert run(link, "sync").returncode == 0


def test_stream_says_each_pass_that_did_something_and_ends_cleanly_when_asked(link: Pair) -> None:
    with running(link, "stream") as worker:
        line_with(worker, "leading")
        fill(link)
        # Both sides were filled, and either direction may be the first that sees it.
        assert "upserted" in line_with(worker, "crm->billing: ")
        assert stop(worker, signal.SIGINT) == 0
        assert worker.stdout is not None
        assert "stopped after" in worker.stdout.read()


def test_a_second_stream_stands_by_and_takes_over(link: Pair) -> None:
    with running(link, "stream") as first, running(link, "stream") as second:
        workers = {"first": first, "second": second}
        # Either may have been quicker; the other says that it stands by.
        lines = {name: line_with(each, "ing") for name, each in workers.items()}
        (leader,) = [name for name, line in lines.items() if "leading" in line]
        (standby,) = [name for name, line in lines.items() if "standing by: " in line]
        assert stop(workers[leader]) == 0
        assert "leading" in line_with(workers[standby], "ing")
        fill(link)
        eventually("both are equal", lambda: equal(link))
        assert stop(workers[standby]) == 0


def test_standing_by_is_said_once_until_it_leads_again(
    link: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(config_of(link), LogFormat.text, to_stderr=False)
    for _ in range(2):
        log.standing_by(LockTaken("another consumer leads", node="crm"))
        log.standing_by(LockTaken("another consumer leads", node="crm"))
        log.leading()
    said = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        *("standing by: crm: another consumer leads", "leading crm and billing"),
        *("standing by: crm: another consumer leads", "leading crm and billing"),
    ]


def test_a_table_that_is_left_out_once_more_is_told_once_more(
    link: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(config_of(link), LogFormat.text, to_stderr=False)
    for warnings in (["no orders"], ["no orders"], [], ["no orders"]):
        report = DirectionReport("crm", "billing", warnings=warnings)
        log.passed([report])
        log.passed([])
    said = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    assert said == ["no orders", "no orders"]


def test_a_second_signal_ends_a_stream_at_once(link: Pair) -> None:
    fill(link)
    with link.billing.connect(autocommit=False) as application:
        application.execute("lock table accounts in access exclusive mode")
        with running(link, "stream") as worker:
            line_with(worker, "leading")
            # The pass waits for the table, so the first signal alone does not end it.
            blocked = "select count(*) from pg_locks where not granted and relation = 'accounts'::regclass"
            while not link.billing.value(blocked):
                assert worker.poll() is None
            worker.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(0.5)
            assert stop(worker) == 128 + signal.SIGTERM


def test_a_terminated_sync_leaves_the_lock_free(link: Pair) -> None:
    fill(link)
    with link.billing.connect(autocommit=False) as application:
        application.execute("lock table accounts in access exclusive mode")
        with running(link, "sync") as worker:
            blocked = "select count(*) from pg_locks where not granted and relation = 'accounts'::regclass"
            while not link.billing.value(blocked):
                assert worker.poll() is None
            assert stop(worker) == 128 + signal.SIGTERM
        application.rollback()
    succeed(link, "sync")
    assert equal(link)


def test_stream_logs_json_lines_with_constant_names(link: Pair) -> None:
    with running(link, "stream", "--log-format", "json") as worker:
        assert json.loads(line_with(worker, "leading"))["event"] == "leading"
        fill(link)
        done = json.loads(line_with(worker, "crm->billing"))
        assert done["event"] == "pass"
        assert done["directions"]["crm->billing"]["upserted"] > 0
        assert "at" in done
        assert stop(worker) == 0
        assert worker.stdout is not None
        last = json.loads(worker.stdout.read().splitlines()[-1])
        assert last["event"] == "stopped"


def test_every_event_of_the_log_is_in_the_manual_and_no_other() -> None:
    source = Path(inspect.getfile(Log)).read_text(encoding="utf-8")
    manual = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    _, section = manual.split("### `stream ")
    section = section.split("\n### ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    documented.remove("event")
    assert sorted(documented) == sorted(re.findall(r'self\._write\(\s*"(\w+)"', source))


def test_with_json_the_log_of_stream_goes_to_stderr(link: Pair) -> None:
    fill(link)
    result = run(link, "stream", "--json", "--seconds", "1")
    assert json.loads(result.stdout)["passes"] >= 1
    assert "leading crm and billing" in result.stderr


def test_a_stream_survives_a_connection_that_is_lost_just_when_it_leads(link: Pair) -> None:
    with running(link, "stream") as worker:
        line_with(worker, "leading")
        for _ in range(3):
            link.crm.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like 'sync-pipeline sync %%' and datname = current_database()"
            )
            line_with(worker, "interrupted")
            line_with(worker, "leading")
        fill(link)
        line_with(worker, "upserted")
        assert stop(worker) == 0


def test_pause_stops_consumption_but_not_capture_until_resume(link: Pair) -> None:
    assert answer(link, "pause") == {"paused": True}
    fill(link)
    done = answer(link, "sync")
    assert done["paused"] is True
    assert done["passes"] == 0
    assert done["pending"] == {"crm": 2, "billing": 1}
    assert "resume" in succeed(link, "sync")
    assert answer(link, "status")["paused"] is True
    assert link.billing.value("select paused_at is not null from sync.sync_status")

    assert answer(link, "resume") == {"paused": False}
    succeed(link, "sync")
    assert equal(link)


def test_pause_with_one_node_down_pauses_the_other_and_says_so(link: Pair) -> None:
    result = run(link, "pause", BILLING_DSN="postgresql://127.0.0.1:1/nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("billing: cannot connect")
    assert "crm is paused, which stops the link, billing is not" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert answer(link, "status")["paused"] is True


def test_resume_changes_nothing_unless_both_nodes_are_reached(link: Pair) -> None:
    succeed(link, "pause")
    result = run(link, "resume", BILLING_DSN="postgresql://127.0.0.1:1/nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("billing: cannot connect")
    link.billing.execute("alter table sync.sync_node rename to hidden")
    assert "run `sync-pipeline install`" in refused(link, "resume")
    link.billing.execute("alter table sync.hidden rename to sync_node")
    for node in link.nodes:
        assert node.value("select paused_at is not null from sync.sync_node")


def test_uninstall_without_yes_says_what_would_go_and_does_nothing(link: Pair) -> None:
    fill(link)
    message = refused(link, "uninstall", code=2)
    assert "3 tables" in message
    assert "3 pending events" in message
    assert link.crm.pending() == 2


def test_uninstall_removes_all_of_it_and_keeps_the_rows(link: Pair) -> None:
    fill(link)
    succeed(link, "uninstall", "--yes")
    for node in link.nodes:
        assert node.value("select to_regnamespace('sync')") is None
        assert node.value("select count(*) from pg_trigger where not tgisinternal") == 0
    assert link.crm.rows("select id from accounts") == [(1,)]
    link.crm.insert("accounts", id=3, name="three")
    assert "nothing was there" in succeed(link, "uninstall", "--yes")
