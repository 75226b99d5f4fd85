"""No password and no value of a row leaves the place where it belongs."""

import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import dagster as dg
import psycopg
import pytest
from typer.testing import CliRunner

from sync_pipeline.cli import app
from tests.dagster_runs import run as run_job
from tests.dagster_runs import tick
from tests.engine import installed
from tests.helpers import Pair, write_config
from tests.program import line_with, running, stop

PASSWORD = "hush/murmur é"  # %-escapes in a URI, quotes in the other form
PRIVATE = "private-0815"
UNREACHABLE = [
    "postgresql://postgres:{}@127.0.0.1:1/nothing",
    "host=127.0.0.1 port=1 dbname=nothing user=postgres password='{}'",
    "postgresql://postgres:{}@127.0.0.1:1,127.0.0.1:2/nothing?target_session_attrs=read-write",
    "postgresql://postgres@127.0.0.1:1/nothing?password={}",
    "postgresql://postgres:{}@[::1/nothing",
    "postgresql://postgres:hush@{}/murmur@127.0.0.1:1/nothing",
    "postgresql://postgres:{}",
    "password={}",
]
SPELLINGS = ("hush", PASSWORD, "hush%2Fmurmur%20%C3%A9", "hush/murmur", "hush%2Fmurmur", "murmur")


def with_password(pair: Pair) -> Pair:
    """The same pair, with a password in both connection strings, which the test's servers do not ask for."""
    crm, billing = (
        replace(node, dsn=psycopg.conninfo.make_conninfo(node.dsn, password=PASSWORD))
        for node in pair.nodes
    )
    return replace(pair, crm=crm, billing=billing)


def leaks(text: str) -> list[str]:
    return [spelling for spelling in SPELLINGS if spelling in text]


@pytest.fixture
def secret(pair: Pair) -> Pair:
    installed(pair)
    return with_password(pair)


def test_no_error_of_a_connection_repeats_a_password(pair: Pair) -> None:
    for dsn in UNREACHABLE:
        escaped = quote(PASSWORD, safe="") if dsn.startswith("postgresql") else PASSWORD
        environment = pair.environment | {"BILLING_DSN": dsn.replace("{}", escaped)}
        for arguments in (
            *(
                ("doctor",),
                ("install",),
                ("status", "--json"),
                ("sync",),
                ("stream", "--seconds", "0.2"),
            ),
            *(
                ("verify",),
                ("init", "--first", "a=CRM_DSN", "--second", "b=BILLING_DSN", "--force"),
            ),
        ):
            done = CliRunner().invoke(
                app, [*arguments, "--config", str(pair.config_path)], env=environment
            )
            told = "".join(traceback.format_exception(done.exception)) if done.exception else ""
            assert done.exit_code != 0 or arguments[0] in {"status", "stream"}, (dsn, arguments)
            assert leaks(done.output + told + repr(done.exception)) == [], (dsn, arguments)


def test_a_running_stream_shows_no_password_to_other_processes_and_in_no_log(secret: Pair) -> None:
    with running(secret, "stream", "--log-format", "json") as worker:
        said = line_with(worker, "leading")
        commands = [path.read_bytes().decode(errors="replace") for path in _command_lines()]
        assert any(str(secret.config_path) in command for command in commands)
        assert leaks("".join(commands)) == []
        sessions = secret.crm.rows("select application_name, query from pg_stat_activity")
        assert leaks(str(sessions)) == []
        secret.crm.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where application_name like 'sync-pipeline sync %%' and datname = current_database()"
        )
        said += line_with(worker, "interrupted")
        assert stop(worker) == 0
        assert worker.stdout is not None
        assert worker.stderr is not None
        assert leaks(said + worker.stdout.read() + worker.stderr.read()) == []


def test_dagster_stores_neither_password_nor_row(pair: Pair, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    condition = "plan is null or plan::int > 0"
    write_config(pair.config_path, [{"name": "accounts", "where": {"crm": condition}}, "users"])
    installed(pair)
    secret = with_password(pair)
    secret.crm.insert("accounts", id=1, name=PRIVATE)
    secret.crm.insert("users", id=1, account_id=1, email=f"{PRIVATE}@x.org", age=30)
    secret.billing.execute("alter table users add constraint adult check (age > 30)")
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        assert run_job(secret, instance).success
        assert secret.billing.rows("select name from accounts") == [(PRIVATE,)]
        tick(secret, instance, "watch_sensor")
        tick(secret, instance, "alert_sensor")
        secret.crm.execute("update accounts set plan = %s", PRIVATE)
        assert run_job(secret, instance).success
        failed = "select table_name, error_class from sync.sync_failures order by 1"
        assert secret.crm.rows(failed) == [("accounts", "22P02"), ("users", "23514")]
        dsn = f"postgresql://x:{quote(PASSWORD, safe='')}@127.0.0.1:1/x"
        down = replace(secret, billing=replace(secret.billing, dsn=dsn))
        assert not run_job(down, instance).success
        skipped = tick(down, instance).skipped
    stored = "".join(
        path.read_bytes().decode(errors="replace") for path in home.rglob("*") if path.is_file()
    )
    assert "cannot connect" in skipped
    assert leaks(stored + skipped) == []
    assert PRIVATE not in stored


@pytest.mark.parametrize("option", ["table", "node", "keys", "condition"])
def test_a_run_that_is_told_to_read_a_dsn_from_the_environment_shows_no_password(
    secret: Pair, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    dsn = f"postgresql://x:{quote(PASSWORD, safe='')}@127.0.0.1:1/x"
    monkeypatch.setenv("ANOTHER_DSN", dsn)
    value: object = {"env": "ANOTHER_DSN"}
    replay: dict[str, object] = {"table": "users", "node": "crm"}
    replay |= {option: [value] if option == "keys" else value}
    if option in {"table", "node"}:
        replay["everything"] = True
    with dg.DagsterInstance.ephemeral() as instance:
        config = {"ops": {"replay_records": {"config": replay}}}
        done = run_job(secret, instance, "replay_job", config=config)
        said = str(instance.all_logs(done.run_id))
    assert not done.success
    assert leaks(said) == []


def _command_lines() -> Iterator[Path]:
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("this system shows no command lines in /proc")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.exists():
            yield path
