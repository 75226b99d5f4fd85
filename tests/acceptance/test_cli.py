"""What holds for every command: help, configuration, exit codes, JSON, and errors without a traceback."""

import json
import os
import re
import shlex
import subprocess
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer.main
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

from sync_pipeline.cli import app, main
from tests.engine import installed, sync_pair
from tests.helpers import Pair, write_config
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

MANUAL = Path(__file__).parents[2] / "docs" / "commands.md"
COMMANDS = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def link(pair: Pair) -> Pair:
    installed(pair)
    return pair


def test_the_console_script_is_the_program() -> None:
    (script,) = entry_points(group="console_scripts", name="sync-pipeline")
    assert script.load() is main


def test_there_is_every_command_of_the_contract() -> None:
    assert set(COMMANDS) == {
        *("install", "uninstall", "doctor", "sync", "stream", "status", "pending", "failures"),
        *(
            "conflicts",
            "replay",
            "backfill",
            "verify",
            "pause",
            "resume",
            "demo",
            "init",
            "metrics",
        ),
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name} has no help"
    options = {option for parameter in command.params for option in parameter.opts}
    assert {"--config", "--json"} <= options
    assert command.epilog.startswith(f"Example: sync-pipeline {name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_at_the_end_of_the_help_is_a_command_that_parses(name: str) -> None:
    arguments = COMMANDS[name].epilog.removeprefix("Example: sync-pipeline ").split()
    COMMANDS[name].make_context(name, arguments[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_is_in_the_manual(name: str) -> None:
    text = MANUAL.read_text(encoding="utf-8")
    assert re.search(rf"^### .*`{name}\b", text, re.MULTILINE), f"{name} has no section"
    for parameter in COMMANDS[name].params:
        for option in parameter.opts:
            assert option[0] != "-" or option in text, f"{name}: {option} is not described"


def test_help_ends_with_the_example() -> None:
    shown = subprocess.run(
        [*PROGRAM, "replay", "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert shown.strip().splitlines()[-1].strip() == (
        "Example: sync-pipeline replay users --node crm --key 42"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_learn_to_complete_commands(shell: str) -> None:
    completed = CliRunner().invoke(
        app,
        [],
        prog_name="sync-pipeline",
        env={
            "_SYNC_PIPELINE_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": "sync-pipeline back",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "COMP_WORDS": "sync-pipeline back",
            "COMP_CWORD": "1",
        },
    )
    assert "backfill" in completed.output


def test_the_version_is_told(pair: Pair) -> None:
    assert run(pair, "--version", configured=False).stdout == "sync-pipeline 0.1.0\n"


def test_an_interrupt_while_the_program_is_still_being_imported_shows_no_traceback(
    pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    python_path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [*PROGRAM, "--version"],
        env=variables(pair) | {"PYTHONPATH": python_path},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_the_configuration_is_found_by_option_variable_or_folder(link: Pair) -> None:
    beside = run(link, "status", "--json", configured=False)
    assert beside.returncode == 0, "the process runs in the folder of sync.yaml"
    elsewhere = link.config_path.rename(link.config_path.with_name("other.yaml"))
    assert run(link, "status", configured=False).returncode == 1
    by_variable = run(link, "status", configured=False, SYNC_CONFIG=str(elsewhere))
    assert by_variable.returncode == 0, by_variable.stderr


@pytest.mark.parametrize(
    "arguments", [["install"], ["sync"], ["status"], ["backfill", "--from", "crm"]], ids=" ".join
)
def test_a_wrong_configuration_is_named_with_file_and_place(
    pair: Pair, arguments: list[str]
) -> None:
    pair.config_path.write_text("nodes: {crm: {dsn: x}}\ntables: [users]\ncolour: red\n")
    message = refused(pair, *arguments)
    assert f"{pair.config_path}:3" in message
    assert "colour" in message


def test_a_configuration_that_may_not_be_read_is_no_wrong_usage(
    link: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so only the answer of the system is another."""
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    done = CliRunner().invoke(app, ["status", "-c", str(link.config_path)], env=link.environment)
    assert done.exit_code != 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", [["status"], ["doctor", "--json"], ["stream"]], ids=" ".join)
def test_an_output_that_is_full_is_one_clear_line(link: Pair, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, *arguments, "--config", str(link.config_path)],
            env=variables(link),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot be written: No space left on device; make room" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_output_stops_no_command(link: Pair, closed: str) -> None:
    line = shlex.join([*PROGRAM, "pause", "--config", str(link.config_path)])
    done = subprocess.run(
        ["/bin/sh", "-c", f"{line} {closed}"],
        env=variables(link),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert link.crm.value("select paused_at is not null from sync.sync_node")


def test_a_table_that_does_not_exist_ends_install_before_anything_is_changed(pair: Pair) -> None:
    write_config(pair.config_path, ["users", "unicorns"])
    message = refused(pair, "install")
    assert "tables[1] (unicorns)" in message
    assert pair.crm.value("select to_regnamespace('sync')") is None


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["pending", "usrs"], ["usrs", "accounts", "users", "orders"]),
        (["pending", "--node", "shop"], ["shop", "crm", "billing"]),
        (["failures", "retry", "usrs"], ["usrs", "accounts", "users", "orders"]),
        (["failures", "retyr"], ["retyr", "list, retry, discard", "accounts", "users"]),
        (["replay", "usrs", "--node", "crm", "--all"], ["usrs", "users", "accounts"]),
        (["replay", "users", "--node", "shop", "--all"], ["shop", "crm", "billing"]),
        (["backfill", "--from", "shop"], ["shop", "crm", "billing"]),
        (["backfill", "--from", "crm", "usrs"], ["usrs", "users", "accounts"]),
        (["conflicts", "resolve", "1", "--winner", "shop"], ["shop", "crm", "billing"]),
        (["verify", "usrs"], ["usrs", "users", "accounts"]),
        (["verify", "--repair-from", "shop"], ["shop", "crm", "billing"]),
    ],
    ids=" ".join,
)
def test_an_unknown_name_is_answered_with_the_known_ones(
    link: Pair, arguments: list[str], known: list[str]
) -> None:
    message = refused(link, *arguments)
    assert len(message.splitlines()) == 1
    for name in known:
        assert name in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["sync", "--loud"],
        ["stream", "--seconds", "soon"],
        ["status", "--watch", "--json"],
        ["replay", "users", "--node", "crm"],
        ["replay", "users", "--node", "crm", "--all", "--key", "1"],
        ["replay", "users", "--node", "crm", "--where", "true; drop table users"],
        ["failures", "discard", "--yes"],
        ["failures", "discard", "--all"],
        ["conflicts", "resolve", "first", "--winner", "crm"],
        ["uninstall"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_two(link: Pair, arguments: list[str]) -> None:
    assert refused(link, *arguments, code=2)


def test_a_node_that_is_down_is_one_line_without_a_password(link: Pair) -> None:
    dsn = "postgresql://sync:secret@127.0.0.1:1/nothing"
    for arguments in (["sync"], ["pending"], ["failures"], ["verify"], ["uninstall", "--yes"]):
        result = run(link, *arguments, BILLING_DSN=dsn)
        assert result.returncode == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("billing: cannot connect")
        assert "secret" not in result.stderr


def test_a_server_without_a_free_connection_is_not_taken_for_a_wrong_address(link: Pair) -> None:
    link.billing.execute("create role crowd login connection limit 0")
    try:
        dsn = make_conninfo(link.billing.dsn, user="crowd")
        result = run(link, "sync", BILLING_DSN=dsn)
        assert "end sessions that nobody needs, or raise the limit" in result.stderr
    finally:
        link.billing.execute("drop role crowd")


@pytest.mark.parametrize(
    "arguments",
    [["verify"], ["replay", "users", "--node", "crm", "--all"], ["resume"], ["uninstall", "--yes"]],
    ids=" ".join,
)
def test_two_names_of_one_database_are_no_pair_that_a_command_works_on(
    link: Pair, arguments: list[str]
) -> None:
    """Both sides of `verify` would be equal, and what changes both nodes would wait for itself."""
    elsewhere = make_conninfo(link.crm.dsn, host="elsewhere", hostaddr="127.0.0.1")
    result = run(link, *arguments, BILLING_DSN=elsewhere)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "the dsns of crm and billing lead to the same database; correct one of them\n"
    )
    assert link.crm.pending() == 0


def test_a_link_that_is_not_installed_is_told_to_be(pair: Pair) -> None:
    for command in ("sync", "stream", "status", "pending", "failures", "conflicts", "pause"):
        assert "run `sync-pipeline install`" in refused(pair, command)
    resolving = refused(pair, "conflicts", "resolve", "1", "--winner", "crm")
    assert "run `sync-pipeline install`" in resolving


def test_a_role_without_the_right_to_install_is_one_clear_line(pair: Pair) -> None:
    pair.billing.execute("create role lowly login")
    pair.billing.execute("grant select on accounts, users, orders to lowly")
    try:
        dsn = make_conninfo(pair.billing.dsn, user="lowly")
        result = run(pair, "install", BILLING_DSN=dsn)
    finally:
        pair.billing.execute("drop owned by lowly")
        pair.billing.execute("drop role lowly")
    assert result.returncode == 1
    assert "permission denied" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_lock_that_is_not_given_in_time_is_one_clear_line(link: Pair) -> None:
    write_config(link.config_path, lock_timeout_seconds=0.05)
    with link.crm.connect(autocommit=False) as application:
        application.execute("lock table sync.sync_conflicts in access exclusive mode")
        message = refused(link, "conflicts", "resolve", "1", "--winner", "crm")
    assert message == "PostgreSQL: canceling statement due to lock timeout\n"


def test_what_postgresql_refuses_is_one_clear_line(link: Pair) -> None:
    message = refused(link, "replay", "users", "--node", "crm", "--where", "colour = 'red'")
    assert message == (
        'crm: the condition cannot be used: column "colour" does not exist; '
        "write one SQL condition on the columns of this node\n"
    )


@pytest.fixture
def eventful(link: Pair) -> Pair:
    """A link with an event, a failure and a conflict."""
    link.crm.insert("accounts", id=1, name="one")
    sync_pair(link)
    link.crm.execute("update accounts set name = 'crm'")
    link.billing.execute("update accounts set name = 'billing'")
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("users", id=1, account_id=1, email="a@x.org", age=3)
    sync_pair(link)
    link.crm.insert("accounts", id=2, name="two")
    return link


def test_json_is_the_only_thing_on_stdout(eventful: Pair) -> None:
    def keys(*arguments: str) -> set[str]:
        document: Any = answer(eventful, *arguments)
        return set(document)

    assert "events" in keys("pending")
    assert "failures" in keys("failures")
    assert "failures" in keys("failures", "retry")
    assert "conflicts" in keys("conflicts")
    assert {"nodes", "paused", "leader"} <= keys("status")
    assert "marked" in keys("replay", "accounts", "--node", "crm", "--all")
    assert "marked" in keys("backfill", "--from", "crm")
    assert {"passes", "seconds", "directions", "pending"} <= keys("sync")
    assert {"passes", "seconds", "directions"} <= keys("stream", "--seconds", "0.3")
    assert "paused" in keys("pause")
    assert "paused" in keys("sync")
    assert "paused" in keys("resume")
    assert "steps" in keys("install")
    assert "steps" in keys("install", "--dry-run")
    assert "discarded" in keys("failures", "discard", "--all", "--yes")
    assert "steps" in keys("uninstall", "--yes")


def test_doctor_and_verify_answer_in_json_whatever_they_find(eventful: Pair) -> None:
    doctor = run(eventful, "doctor", "--json")
    for finding in json.loads(doctor.stdout)["findings"]:
        assert set(finding) == {"level", "check", "node", "table", "message", "remedy"}
    verify = run(eventful, "verify", "--json")
    assert {"equal", "tables"} <= set(json.loads(verify.stdout))


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_finding_or_a_difference_that_ends_with_one_is_a_line_on_stderr(
    link: Pair, options: list[str]
) -> None:
    link.crm.execute("alter table users disable trigger all")
    link.crm.insert("accounts", id=70, name="only here")
    link.crm.execute("delete from sync.sync_events")
    doctor, verify = (run(link, command, *options) for command in ("doctor", "verify"))
    assert (doctor.returncode, verify.returncode) == (1, 1)
    assert re.fullmatch(r"doctor found \d errors; .+\n", doctor.stderr)
    assert re.fullmatch(r"the two sides differ in accounts; .+\n", verify.stderr)


def test_doctor_says_what_to_do_next_by_what_it_found(link: Pair) -> None:
    assert succeed(link, "doctor").endswith("next: `sync-pipeline stream`\n")
    with running(link, "stream") as worker:
        line_with(worker, "leading")
        assert succeed(link, "doctor").endswith("next: `sync-pipeline status`: a consumer runs\n")
        stop(worker)
    succeed(link, "pause")
    assert "next: `sync-pipeline resume`" in succeed(link, "doctor")
    succeed(link, "resume")
