"""`sync_job` and `sync_sensor`, run in the process of the test."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from dagster._core.definitions.schedule_definition import ScheduleExecutionData

from sync_pipeline import database, definitions
from sync_pipeline import link as links
from sync_pipeline.defs import failed
from tests import dagster_runs
from tests.dagster_runs import failure_of, metadata, run, tick
from tests.engine import config_of, equal
from tests.helpers import Node, Pair, write_config


def sync_job() -> dg.JobDefinition:
    return definitions.defs().resolve_job_def("sync_job")


def add_family(node: Node, account: int = 1) -> None:
    node.insert("accounts", id=account, name=f"account {account}")
    node.insert("users", id=account * 10, account_id=account, email=f"u{account}@x.org", age=30)
    node.insert("orders", id=account * 100, user_id=account * 10, amount="12.50", note="first")


def tags(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """The pipeline's own tags of a run."""
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None
    return {key: value for key, value in stored.tags.items() if key.startswith("sync/")}


def test_one_run_makes_both_databases_equal(link: Pair, instance: dg.DagsterInstance) -> None:
    add_family(link.crm, 1)
    add_family(link.billing, 2)
    result = run(link, instance)
    assert result.success
    assert equal(link)
    assert len(link.crm.rows("orders")) == 2
    assert [event.step_key for event in result.all_events if event.is_step_success] == [
        f"{direction}.{stage}"
        for direction in ("crm_to_billing", "billing_to_crm")
        for stage in ("fetch_dependents", "process_parents", "process_dependents")
    ]


def test_a_run_tells_what_it_did_to_each_table_and_no_row_of_it(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    link.crm.execute("update users set email = 'secret@x.org'")
    result = run(link, instance)
    told = metadata(result, "crm_to_billing.process_dependents")
    assert (told["upserted"], told["deleted"], told["events"]) == (3, 0, 4)
    assert [record["table"] for record in told["tables"]] == ["accounts", "orders", "users"]
    assert told["lag_seconds_before"] >= 0
    (first, second) = metadata(result, "billing_to_crm.process_dependents")["run"]
    assert (first["direction"], first["upserted"]) == ("crm->billing", 3)
    assert (second["direction"], second["upserted"]) == ("billing->crm", 0)
    assert first["lag_seconds_before"] > first["lag_seconds_after"] == 0
    assert tags(instance, result) == {
        "sync/link": "crm-billing",
        "sync/exclusive": "crm-billing",
        "sync/result": "3 upserted",
    }
    assert not any("secret" in str(entry) for entry in instance.all_logs(result.run_id))


def test_a_run_that_finds_the_lock_taken_succeeds_does_nothing_and_says_who_leads(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    with links.lead(config_of(link)) as other:
        leader = other.sides["crm"].writer.info.backend_pid
        result = run(link, instance)
    assert result.success
    assert link.billing.rows("accounts") == []
    assert f"backend {leader}" in metadata(result, "crm_to_billing.fetch_dependents")["stood_back"]
    assert f"backend {leader}" in tags(instance, result)["sync/result"]


def test_a_run_of_a_paused_link_succeeds_does_nothing_and_says_so(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    link.billing.execute("update sync.sync_node set paused_at = now()")
    result = run(link, instance)
    assert result.success
    assert link.billing.rows("accounts") == []
    assert "the link is paused" in tags(instance, result)["sync/result"]
    with links.lead(config_of(link)):
        pass


def test_re_execution_from_the_middle_is_refused_in_plain_words(
    link: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNC_CONFIG", str(link.config_path))
    with dg.instance_for_test() as instance:
        job = dg.reconstructable(sync_job)
        with dg.execute_job(job, instance) as first:
            assert first.success
        add_family(link.crm)
        from_the_middle = dg.ReexecutionOptions(
            first.run_id,
            [f"crm_to_billing.{stage}" for stage in ("process_parents", "process_dependents")],
        )
        with dg.execute_job(job, instance, reexecution_options=from_the_middle) as again:
            assert not again.success
            assert "cannot start in the middle of a pass" in failure_of(again)
    assert link.crm.pending() == 3


@pytest.mark.parametrize("steps", [["fetch_dependents"], ["fetch_dependents", "process_parents"]])
def test_a_run_of_the_first_steps_alone_is_refused_and_not_green(
    link: Pair, monkeypatch: pytest.MonkeyPatch, steps: list[str]
) -> None:
    monkeypatch.setenv("SYNC_CONFIG", str(link.config_path))
    add_family(link.crm)
    with dg.instance_for_test() as instance:
        job = dg.reconstructable(sync_job)
        chosen = [f"crm_to_billing.{step}" for step in steps]
        with dg.execute_job(job, instance, op_selection=chosen) as result:
            assert not result.success
            assert "leaves out crm_to_billing.process_dependents" in failure_of(result)
    assert link.crm.pending() == 3
    with links.lead(config_of(link)):
        pass


def test_a_run_of_one_direction_alone_syncs_it(link: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNC_CONFIG", str(link.config_path))
    add_family(link.crm)
    with (
        dg.instance_for_test() as instance,
        dg.execute_job(
            dg.reconstructable(sync_job), instance, op_selection=["crm_to_billing"]
        ) as result,
    ):
        assert result.success
    assert link.crm.pending() == 0
    assert equal(link)


def test_a_failed_run_says_in_one_line_what_is_wrong_and_frees_the_locks(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    link.billing.execute("alter table users drop constraint users_pkey cascade")
    result = run(link, instance)
    assert not result.success
    assert "users" in failure_of(result)
    assert "billing" in failure_of(result)
    link.billing.execute("alter table users add primary key (id)")
    with links.lead(config_of(link)):
        pass


def test_the_sensor_asks_for_a_run_only_when_something_waits(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    idle = tick(link, instance)
    assert idle.requests == []
    assert idle.skipped == "nothing waits on crm or billing"
    add_family(link.billing)
    asked = tick(link, instance)
    assert len(asked.requests) == 1
    assert asked.requests[0].run_key is None
    assert asked.requests[0].tags["sync/asked_by"] == "changes wait on billing"


def test_the_sensor_asks_for_no_run_beside_a_leader(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    with links.lead(config_of(link)) as other:
        beside = tick(link, instance)
        leader = other.sides["crm"].writer.info.backend_pid
    assert beside.requests == []
    assert f"changes wait on crm; backend {leader}" in beside.skipped
    assert len(tick(link, instance).requests) == 1


def test_the_sensor_asks_for_no_run_while_all_that_waits_is_of_tables_that_are_left_out(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    link.billing.execute("alter table orders rename to away")
    assert len(tick(link, instance).requests) == 1
    assert run(link, instance).success
    link.crm.execute(
        "insert into sync.sync_failures (table_name, record_id, state, attempts, next_attempt_at, error_class, error)"
        " values ('orders', '100', 'retrying', 1, now(), '23514', 'refused')"
    )
    skipped = tick(link, instance)
    assert skipped.requests == []
    assert skipped.skipped.startswith("changes wait on crm, all of tables that are left out: ")
    assert "(orders): billing: table orders does not exist; create it" in skipped.skipped
    link.billing.insert("accounts", id=2, name="of a table that is there")
    assert len(tick(link, instance).requests) == 1
    assert run(link, instance).success
    assert tick(link, instance).requests == []
    link.billing.execute("alter table away rename to orders")
    assert len(tick(link, instance).requests) == 1
    assert run(link, instance).success
    assert equal(link)
    assert tick(link, instance).skipped == "nothing waits on crm or billing"


def test_the_sensor_says_that_the_link_is_paused_or_not_installed(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    link.crm.execute("update sync.sync_node set paused_at = now()")
    assert "paused on crm since" in tick(link, instance).skipped
    link.crm.execute("drop schema sync cascade")
    assert "run `sync-pipeline install`" in tick(link, instance).skipped


@pytest.mark.parametrize("sensor", ["sync_sensor", "stream_sensor", "watch_sensor"])
def test_a_sensor_skips_in_one_line_without_a_password_while_a_node_is_down(
    link: Pair, instance: dg.DagsterInstance, sensor: str
) -> None:
    nobody = "host=127.0.0.1 port=1 dbname=none password=hunter2"
    text = link.config_path.read_text().replace("${BILLING_DSN}", nobody)
    link.config_path.write_text(text)
    skipped = tick(link, instance, sensor).skipped
    assert skipped.startswith("billing: cannot connect: ")
    assert skipped.endswith("; check the dsn, the network and pg_hba.conf")
    assert "hunter2" not in skipped
    assert "\n" not in skipped


def test_a_look_at_a_node_that_takes_connections_and_says_nothing_ends_by_itself(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CONNECT_TIMEOUT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"host=127.0.0.1 port={silent.getsockname()[1]} dbname=none"
        link.config_path.write_text(link.config_path.read_text().replace("${BILLING_DSN}", dsn))
        skipped = tick(link, instance).skipped
    assert skipped.startswith("billing: cannot connect: ")
    assert "timeout" in skipped


def test_the_sensor_never_asks_twice_for_the_same_work(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    add_family(link.crm)
    job = dagster_runs.definitions(link).resolve_job_def("sync_job")
    queued = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, tags=job.tags)
    asked = tick(link, instance)
    assert asked.requests == []
    assert f"run {queued.run_id[:8]} was asked for" in asked.skipped


@pytest.mark.parametrize("came_to", ["STARTING", "STARTED"])
def test_the_sensor_ends_a_run_whose_process_is_gone_so_that_others_get_its_place(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, came_to: str
) -> None:
    """Or hangs before it begins, as a process can that is forked while other threads run."""
    add_family(link.crm)
    job = dagster_runs.definitions(link).resolve_job_def("sync_job")
    ghost, behind = (
        instance.create_run_for_job(job, status=status, tags=job.tags)
        for status in (dg.DagsterRunStatus(came_to), dg.DagsterRunStatus.NOT_STARTED)
    )

    def statuses() -> list[str]:
        runs = [instance.get_run_by_id(run.run_id) for run in (ghost, behind)]
        return [run.status.value for run in runs if run is not None]

    tick(link, instance)
    assert statuses() == [came_to, "NOT_STARTED"]
    dagster_runs.pass_time(monkeypatch, 70)
    with links.lead(config_of(link)):
        tick(link, instance)
        assert statuses() == [came_to, "NOT_STARTED"]
    assert f"run {behind.run_id[:8]} was asked for" in tick(link, instance).skipped
    assert statuses() == ["FAILURE", "NOT_STARTED"]


def test_the_sensor_leaves_a_run_alone_that_said_something_a_moment_ago(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_family(link.crm)
    job = dagster_runs.definitions(link).resolve_job_def("sync_job")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=job.tags)
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now + 69)
        instance.report_engine_event("works", run)
    dagster_runs.pass_time(monkeypatch, 70)
    tick(link, instance)
    stored = instance.get_run_by_id(run.run_id)
    assert stored is not None
    assert stored.status is dg.DagsterRunStatus.STARTED


def test_the_sensor_asks_less_and_less_often_while_runs_fail(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_family(link.crm)
    link.billing.execute("alter table users drop constraint users_pkey cascade")
    waits = []
    for _ in range(7):
        failed_run = run(link, instance)
        asked = tick(link, instance)
        assert asked.requests == []
        assert f"run {failed_run.run_id[:8]} failed: {failure_of(failed_run)}; " in asked.skipped
        waits.append(int(asked.skipped.rsplit(" ", maxsplit=2)[1]))
    assert waits == pytest.approx([10, 20, 40, 80, 160, 300, 300], abs=3)
    ahead = SimpleNamespace(time=lambda: time.time() + 310)
    monkeypatch.setattr(failed, "time", ahead)
    assert len(tick(link, instance).requests) == 1
    monkeypatch.undo()
    link.billing.execute("alter table users add primary key (id)")
    assert run(link, instance).success
    add_family(link.crm, 2)
    assert len(tick(link, instance).requests) == 1


def test_the_schedule_asks_for_no_run_behind_one_that_has_yet_to_begin(link: Pair) -> None:
    found = dagster_runs.definitions(link)
    job = found.resolve_job_def("sync_job")
    with dg.instance_for_test() as instance:

        def minute() -> ScheduleExecutionData:
            context = dg.build_schedule_context(instance=instance)
            return found.resolve_schedule_def("sync_schedule").evaluate_tick(context)

        # A batch may take an hour.
        instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=job.tags)
        assert len(minute().run_requests or []) == 1
        queued = instance.create_run_for_job(
            job, status=dg.DagsterRunStatus.NOT_STARTED, tags=job.tags
        )
        skipped = minute()
    assert not skipped.run_requests
    assert skipped.skip_message == f"run {queued.run_id[:8]} was asked for and has yet to begin"


def test_the_sensor_leaves_runs_of_another_link_alone_whose_job_has_the_same_name(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_config(link.config_path.with_name("other.yaml"), ["users"], schema="sync_users")
    definitions = dagster_runs.definitions(Pair(link.crm, link.billing, other))
    foreign = definitions.resolve_job_def("sync_job")
    runs = [
        instance.create_run_for_job(foreign, status=status, tags=foreign.tags)
        for status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.NOT_STARTED)
    ]
    add_family(link.crm)
    dagster_runs.pass_time(monkeypatch, 70)
    # They are of a second code server: this link waits for none of them, and calls none dead.
    assert len(tick(link, instance).requests) == 1
    stored = instance.get_run_by_id(runs[0].run_id)
    assert stored is not None
    assert stored.status is dg.DagsterRunStatus.STARTED
    mine = dagster_runs.definitions(link).resolve_job_def("sync_job")
    assert mine.tags["sync/exclusive"] != runs[0].tags["sync/exclusive"]


@pytest.mark.dagster
def test_a_run_in_a_process_of_its_own_syncs_and_frees_the_locks(
    link: Pair, tmp_path: Path
) -> None:
    add_family(link.crm)
    done = dagster_runs.command(
        link, tmp_path, "job", "execute", "-m", "sync_pipeline.definitions", "-j", "sync_job"
    )
    assert done.returncode == 0, done.stderr
    assert equal(link)
    assert link.crm.pending() == 0
    with links.lead(config_of(link)):
        pass


@pytest.mark.dagster
def test_a_missing_configuration_is_the_error_that_the_code_location_shows(
    link: Pair, tmp_path: Path
) -> None:
    link.config_path.unlink()
    done = dagster_runs.command(
        link, tmp_path, "definitions", "validate", "-m", "sync_pipeline.definitions"
    )
    assert done.returncode != 0
    assert "sync.yaml: does not exist; copy sync.example.yaml there" in done.stdout + done.stderr
