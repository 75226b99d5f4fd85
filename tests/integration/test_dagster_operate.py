"""Replay, backfill, verify, checks, observations and alerts, run in the process of the test."""

import logging
from dataclasses import replace
from typing import Any

import dagster as dg
import psycopg
import pytest
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationPlanned,
)
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.events import EngineEventData
from dagster._core.execution.api import execute_run
from dagster._grpc.client import DagsterGrpcClient
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster_shared.error import SerializableErrorInfo
from psycopg import sql

from sync_pipeline import catalog
from sync_pipeline.config import load
from sync_pipeline.defs.alerts import Alert, webhook_channel
from sync_pipeline.errors import ConfigurationError
from tests import dagster_runs
from tests.dagster_runs import definitions, failure_of, metadata, run, tick
from tests.engine import equal, installed, sync_pair
from tests.helpers import Node, Pair, write_config
from tests.integration.test_names import NAMES
from tests.webhooks import webhook

USERS = dg.AssetKey(["sync", "users"])
PRUNE_ALL = {"ops": {"prune": {"config": {"keep_days": 0, "keep_failed_days": 0}}}}


@pytest.fixture
def link(link: Pair) -> Pair:
    """Two installed databases with one account and forty users each, all synced."""
    link.crm.insert("accounts", id=1, name="one")
    link.crm.execute(
        "insert into users (id, account_id, email) select n, 1, n || '@x.org' from generate_series(1, 40) n"
    )
    sync_pair(link)
    return link


def drift(node: Node, statement: str) -> None:
    """Change rows behind capture's back."""
    node.execute(f"begin; set local session_replication_role = replica; {statement}; commit")


def begin_verify(pair: Pair, instance: dg.DagsterInstance) -> None:
    """Leave a run of `verify_job` that has yet to answer for users."""
    begun = instance.create_run_for_job(definitions(pair).resolve_job_def("verify_job"))
    planned = AssetCheckEvaluationPlanned(asset_key=USERS, check_name="verify")
    event = dg.DagsterEvent(
        "ASSET_CHECK_EVALUATION_PLANNED", "verify_job", event_specific_data=planned
    )
    instance.report_dagster_event(event, begun.run_id)


def replay(**config: Any) -> dict[str, Any]:
    return {"ops": {"replay_records": {"config": {"table": "users", "node": "crm", **config}}}}


def test_a_replay_counts_in_a_dry_run_and_marks_when_told_to(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    dry = run(link, instance, "replay_job", config=replay(condition="id <= 7"))
    assert metadata(dry, "replay_records") == {"marked": 7, "dry_run": True}
    assert link.crm.pending() == 0
    real = run(link, instance, "replay_job", config=replay(keys=["3", "99"], dry_run=False))
    assert metadata(real, "replay_records") == {"marked": 2, "dry_run": False}
    assert link.crm.rows("select record_id, event_type from sync.sync_events order by 1") == [
        ("3", "update"),
        ("99", "delete"),
    ]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "choose exactly one of `keys`, `condition` and `everything`"),
        ({"keys": ["1"], "everything": True}, "choose exactly one"),
        ({"keys": ["x"]}, "`x` is no key of users"),
        ({"keys": ["1"], "table": "user"}, "has no table `user`"),
        ({"keys": ["1"], "node": "crn"}, "has no node `crn`"),
    ],
)
def test_a_replay_that_makes_no_sense_fails_in_plain_words(
    link: Pair, instance: dg.DagsterInstance, config: dict[str, Any], words: str
) -> None:
    result = run(link, instance, "replay_job", config=replay(**config))
    assert not result.success
    assert words in failure_of(result)


def test_the_slices_of_a_backfill_mark_every_row_once_from_the_node_of_the_tag(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    partitions = dagster_runs.definitions(link).resolve_job_def("backfill_job").partitions_def
    assert partitions is not None
    slices = [key for key in partitions.get_partition_keys() if key.startswith("users/")]
    for number, key in enumerate(slices):
        tags = {"sync/from": "billing"} if number else {}
        assert run(link, instance, "backfill_job", partition=key, tags=tags).success
    marked = link.crm.rows("select record_id from sync.sync_events") + link.billing.rows(
        "select record_id from sync.sync_events"
    )
    assert sorted(int(row[0]) for row in marked) == list(range(1, 41))
    assert 0 < link.crm.pending() < 40
    sync_pair(link)
    assert equal(link)


def test_a_slice_that_cannot_be_marked_fails_in_one_line_without_a_value(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    link.crm.execute("alter table sync.sync_events add check (record_id <> '7')")
    partitions = dagster_runs.definitions(link).resolve_job_def("backfill_job").partitions_def
    assert partitions is not None
    slices = [key for key in partitions.get_partition_keys() if key.startswith("users/")]
    failed = [
        r for key in slices if not (r := run(link, instance, "backfill_job", partition=key)).success
    ]
    assert [failure_of(result) for result in failed] == [
        "crm: check violation (SQLSTATE 23514, table sync_events, constraint sync_events_record_id_check)"
    ]


def test_a_slice_of_a_table_that_is_no_longer_synced_fails_in_plain_words(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    result = run(link, instance, "backfill_job", tags={"dagster/partition": "gone/01-of-16"})
    assert not result.success
    assert failure_of(result).startswith("no slice of a synced table is called `gone/01-of-16`")


def test_a_backfill_without_slices_says_what_to_choose(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    result = run(link, instance, "backfill_job")
    assert not result.success
    assert "choose partitions" in failure_of(result)


def test_a_slice_of_a_table_with_a_composite_key_is_marked(
    pair: Pair, instance: dg.DagsterInstance
) -> None:
    for node in pair.nodes:
        node.execute('create table seats ("Row" int, seat text, primary key ("Row", seat))')
    write_config(pair.config_path, ["seats"])
    installed(pair)
    pair.crm.execute("insert into seats select n % 5, n::text from generate_series(1, 50) n")
    pair.crm.execute("delete from sync.sync_events")
    partitions = dagster_runs.definitions(pair).resolve_job_def("backfill_job").partitions_def
    assert partitions is not None
    for key in partitions.get_partition_keys():
        assert run(pair, instance, "backfill_job", partition=key).success
    assert pair.crm.value("select count(distinct record_id) from sync.sync_events") == 50
    assert pair.crm.pending() == 50


def test_tables_of_any_name_are_synced_checked_observed_and_marked(
    pair: Pair, instance: dg.DagsterInstance
) -> None:
    names = [*NAMES, "order-items", "order_items"]
    for node in pair.nodes:
        for name in names:
            table = sql.Identifier(name)
            node.connection.execute(
                sql.SQL("create table {} (id int primary key, note text)").format(table)
            )
    write_config(pair.config_path, names)
    installed(pair)
    for name in names:
        pair.crm.connection.execute(
            sql.SQL("insert into {} values (1, 'x')").format(sql.Identifier(name))
        )
    found = dagster_runs.definitions(pair)
    dg.Definitions.validate_loadable(found)
    assert run(pair, instance).success
    verified = run(pair, instance, "verify_job").get_asset_check_evaluations()
    tables = [evaluation.asset_key.path[1] for evaluation in verified if evaluation.passed]
    assert tables == names
    every = dg.define_asset_job("every", selection=dg.AssetSelection.all_asset_checks())
    job = dg.Definitions.merge(found, dg.Definitions(jobs=[every])).resolve_job_def("every")
    judged = job.execute_in_process(instance=instance).get_asset_check_evaluations()
    assert len(judged) == 3 * len(names)
    for event in tick(pair, instance, "watch_sensor").asset_events:
        instance.report_runless_asset_event(event)
    partitions = found.resolve_job_def("backfill_job").partitions_def
    assert partitions is not None
    assert len(partitions.get_partition_keys()) == 16 * len(names)
    for key in partitions.get_partition_keys():
        if key.startswith("new") and key.endswith(("01-of-16", "16-of-16")):
            assert run(pair, instance, "backfill_job", partition=key).success


def test_verify_fails_the_check_of_the_table_that_differs_and_names_no_record(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    drift(link.billing, "delete from users where id = 7")
    result = run(link, instance, "verify_job")
    found = {e.asset_key.to_user_string(): e for e in result.get_asset_check_evaluations()}
    assert {key: e.passed for key, e in found.items()} == {
        "sync/accounts": True,
        "sync/users": False,
        "sync/orders": True,
    }
    numbers = {name: value.value for name, value in found["sync/users"].metadata.items()}
    assert (numbers["rows_crm"], numbers["rows_billing"], numbers["missing_billing"]) == (40, 39, 1)
    assert found["sync/users"].description == "see which: `sync-pipeline verify users`"


def test_verify_reads_the_catalogs_once_however_many_tables_it_compares(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = catalog.read, []

    def counting(*arguments: Any, **options: Any) -> catalog.Catalog:
        times.append(1)
        return read(*arguments, **options)

    monkeypatch.setattr(catalog, "read", counting)
    result = run(link, instance, "verify_job")
    assert len(result.get_asset_check_evaluations()) == 3
    assert len(times) == 1


def test_the_watch_sensor_reports_backlog_lag_and_dead_letters(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    link.crm.execute("update users set name = 'new' where id <= 5")
    link.crm.execute("update sync.sync_events set created_at = now() - interval '1 hour'")
    link.billing.execute(
        "insert into sync.sync_failures (table_name, record_id, state, error_class, error)"
        " values ('users', '7', 'dead', '23514', 'no')"
    )
    events = tick(link, instance, "watch_sensor").asset_events
    observed: dict[str, dict[str, Any]] = {
        event.asset_key.to_user_string(): {
            name: value.value for name, value in event.metadata.items()
        }
        for event in events
        if isinstance(event, dg.AssetObservation)
    }
    assert observed["crm/users"]["pending"] == 5
    assert observed["crm/users"]["lag_seconds"] >= 3600
    assert observed["billing/users"]["dead"] == 1
    judged = {
        (e.asset_key.to_user_string(), e.check_name): e.passed
        for e in events
        if isinstance(e, dg.AssetCheckEvaluation)
    }
    assert judged["sync/users", "lag"] is False
    assert judged["sync/users", "dead_letters"] is False
    assert judged["sync/accounts", "lag"] is True
    fresh = [e.asset_key for e in events if isinstance(e, dg.AssetMaterialization)]
    assert USERS not in fresh
    assert dg.AssetKey(["sync", "accounts"]) in fresh


def test_the_watch_sensor_is_quiet_about_tables_that_stay_as_they_were(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    first = tick(link, instance, "watch_sensor")
    assert first.asset_events
    assert first.skipped == "reported 3 tables"
    link.crm.execute("update users set name = 'new' where id = 1")
    second = tick(link, instance, "watch_sensor", cursor=first.cursor)
    assert {e.asset_key.path[-1] for e in second.asset_events} == {"users"}
    sync_pair(link)
    third = tick(link, instance, "watch_sensor", cursor=second.cursor)
    fourth = tick(link, instance, "watch_sensor", cursor=third.cursor)
    assert fourth.asset_events == []
    assert fourth.skipped == "every table is as it was"


def test_a_table_that_verify_finds_different_is_not_fresh_so_that_its_red_check_stays_in_sight(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    def fresh() -> set[str]:
        events = tick(link, instance, "watch_sensor").asset_events
        return {e.asset_key.path[-1] for e in events if isinstance(e, dg.AssetMaterialization)}

    drift(link.billing, "delete from users where id = 7")
    run(link, instance, "verify_job")
    assert fresh() == {"accounts", "orders"}
    begin_verify(link, instance)
    assert fresh() == {"accounts", "orders"}
    drift(link.crm, "delete from users where id = 7")
    run(link, instance, "verify_job")
    assert fresh() == {"accounts", "orders", "users"}


def test_the_checks_of_the_status_can_be_executed_by_hand(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    job = dg.define_asset_job(
        "by_hand", selection=dg.AssetSelection.checks(dg.AssetCheckKey(USERS, "lag"))
    )
    found = dg.Definitions.merge(dagster_runs.definitions(link), dg.Definitions(jobs=[job]))
    result = found.resolve_job_def("by_hand").execute_in_process(instance=instance)
    judged = [(event.check_name, event.passed) for event in result.get_asset_check_evaluations()]
    assert judged == [("lag", True)]


@pytest.mark.parametrize("check", ["lag", "verify"])
def test_checks_that_the_page_of_an_asset_executes_are_runs_of_the_link(
    link: Pair, instance: dg.DagsterInstance, check: str
) -> None:
    chosen = {dg.AssetCheckKey(USERS, check)}
    job = definitions(link).resolve_implicit_global_asset_job_def()
    begun = instance.add_run(
        dg.DagsterRun(
            job_name=job.name,
            run_config={"execution": {"config": {"in_process": {}}}},
            asset_selection=frozenset(),
            asset_check_selection=frozenset(chosen),
        )
    )
    assert execute_run(InMemoryJob(job), begun, instance).success
    stored = instance.get_run_by_id(begun.run_id)
    assert stored is not None
    assert stored.tags["sync/link"] == "crm-billing"
    told = metadata(run(link, instance, "maintenance_job", config=PRUNE_ALL), "prune")
    assert told["runs"] == 1


def test_an_alert_is_told_once_when_it_begins_and_once_when_it_has_ended(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []

    def channel(alert: Alert) -> None:
        told.append(str(alert))

    def look(cursor: str | None) -> str | None:
        return tick(link, instance, "alert_sensor", cursor=cursor, channels=[channel]).cursor

    cursor = look(None)
    link.crm.execute("update users set name = 'new' where id = 1")
    link.crm.execute("update sync.sync_events set created_at = now() - interval '1 hour'")
    cursor = look(look(cursor))
    assert told == ["crm-billing: changes on crm wait for more than 300 seconds"]
    sync_pair(link)
    cursor = look(look(cursor))
    assert told[1:] == ["crm-billing: resolved: changes on crm wait for more than 300 seconds"]


def test_a_table_that_verify_finds_different_is_an_alert_until_verify_finds_it_equal(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []

    def look(cursor: str | None) -> dagster_runs.Tick:
        channels = [lambda alert: told.append(str(alert))]
        return tick(link, instance, "alert_sensor", cursor=cursor, channels=channels)

    drift(link.billing, "delete from users where id = 7")
    assert run(link, instance, "verify_job").success
    seen = look(look(None).cursor)
    differs = "users differs between crm and billing; see which: `sync-pipeline verify users`"
    assert told == [f"crm-billing: {differs}"]
    begin_verify(link, instance)
    seen = look(seen.cursor)
    assert seen.skipped == f"still: {differs}"
    drift(link.crm, "delete from users where id = 7")
    assert run(link, instance, "verify_job").success
    look(seen.cursor)
    assert told[1:] == [f"crm-billing: resolved: {differs}"]


def test_a_failed_run_of_the_link_is_told_once(link: Pair, instance: dg.DagsterInstance) -> None:
    told: list[str] = []
    channels = [lambda alert: told.append(str(alert))]
    first = tick(link, instance, "alert_sensor", channels=channels)
    failed = run(link, instance, "replay_job", config=replay(keys=["x"]))
    second = tick(link, instance, "alert_sensor", cursor=first.cursor, channels=channels)
    tick(link, instance, "alert_sensor", cursor=second.cursor, channels=channels)
    assert told == [
        f"crm-billing: run {failed.run_id[:8]} of replay_job failed: {failure_of(failed)}"
    ]


def test_runs_that_fail_again_and_again_for_one_reason_are_told_once_until_one_succeeds(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []

    def look(cursor: str | None) -> dagster_runs.Tick:
        channels = [lambda alert: told.append(str(alert))]
        return tick(link, instance, "alert_sensor", cursor=cursor, channels=channels)

    link.billing.execute("alter table users drop constraint users_pkey cascade")
    seen = look(None)
    for _ in range(3):
        assert not run(link, instance).success
        seen = look(seen.cursor)
    assert len(told) == 1
    assert seen.skipped.startswith("still: runs of sync_job fail: ")
    link.billing.execute("alter table users add primary key (id)")
    assert run(link, instance).success
    seen = look(seen.cursor)
    assert seen.skipped == "all is well"
    link.billing.execute("alter table users drop constraint users_pkey")
    run(link, instance)
    look(seen.cursor)
    assert len(told) == 2


def test_a_run_that_cannot_read_its_configuration_is_told_with_the_reason_and_not_asked_for_again_at_once(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []
    channels = [lambda alert: told.append(str(alert))]
    first = tick(link, instance, "alert_sensor", channels=channels)
    job = dagster_runs.definitions(link).resolve_job_def("sync_job")
    begun = instance.create_run_for_job(job, tags=job.tags)
    with pytest.raises(ConfigurationError) as caught:
        load(link.config_path.with_name("nothing.yaml"))
    # As the process of a run reports it when `sync.yaml` was removed after the code location had loaded.
    info = serializable_error_info_from_exc_info((caught.type, caught.value, caught.tb))
    error = EngineEventData.engine_error(info)
    instance.report_engine_event("Could not load job definition.", begun, error)
    instance.report_run_failed(begun)
    tick(link, instance, "alert_sensor", cursor=first.cursor, channels=channels)
    assert len(told) == 1
    assert f"run {begun.run_id[:8]} of sync_job failed: " in told[0]
    assert "nothing.yaml: does not exist" in told[0]
    link.crm.execute("update users set name = 'new' where id = 1")
    skipped = tick(link, instance).skipped
    assert "does not exist" in skipped
    assert "tries again in" in skipped


def test_a_run_that_cannot_be_started_because_the_code_server_is_away_is_told_without_a_stack_trace(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []
    channels = [lambda alert: told.append(str(alert))]
    first = tick(link, instance, "alert_sensor", channels=channels)
    job = dagster_runs.definitions(link).resolve_job_def("sync_job")
    asked = instance.create_run_for_job(job, tags=job.tags)
    # As the run queue reports it: its error repeats that of the location, stack and all.
    with pytest.raises(DagsterUserCodeUnreachableError) as away:
        DagsterGrpcClient(port=1, host="127.0.0.1").list_repositories()
    info = serializable_error_info_from_exc_info((away.type, away.value, away.tb))
    message = (
        f"dagster.DagsterCodeLocationLoadError: Failure loading sync-pipeline: {info.to_string()}"
    )
    assert "Stack Trace" in message
    error = EngineEventData.engine_error(SerializableErrorInfo(message, [], None))
    instance.report_engine_event("Failed to launch run", asked, error)
    instance.report_run_failed(asked)
    tick(link, instance, "alert_sensor", cursor=first.cursor, channels=channels)
    (text,) = told
    assert "Failure loading sync-pipeline: " in text
    assert "Could not reach user code server" in text
    assert "Stack Trace" not in text
    assert "\n" not in text


@pytest.mark.parametrize("job", ["verify_job", "maintenance_job"])
def test_a_job_on_nodes_without_the_pipeline_or_without_rights_fails_in_one_line(
    pair: Pair, instance: dg.DagsterInstance, job: str
) -> None:
    assert failure_of(run(pair, instance, job)) == (
        "crm: schema sync has no pipeline in it; run `sync-pipeline install`"
    )
    installed(pair)
    pair.crm.execute("create role stranger login")
    try:
        dsn = psycopg.conninfo.make_conninfo(pair.crm.dsn, user="stranger")
        stranger = replace(pair, crm=replace(pair.crm, dsn=dsn))
        assert failure_of(run(stranger, instance, job)) == "crm: permission denied for schema sync"
    finally:
        pair.crm.execute("drop role stranger")


@pytest.mark.parametrize("sensor", ["sync_sensor", "watch_sensor"])
def test_a_sensor_skips_in_one_line_where_a_part_of_the_pipeline_is_gone(
    link: Pair, instance: dg.DagsterInstance, sensor: str
) -> None:
    link.crm.execute("drop table sync.sync_failures cascade")
    skipped = tick(link, instance, sensor).skipped
    assert skipped == 'crm: relation "sync.sync_failures" does not exist'


def test_a_node_that_cannot_be_reached_is_an_alert(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    nobody = link.config_path.read_text().replace(
        "${BILLING_DSN}", "host=127.0.0.1 port=1 dbname=none password=hunter2"
    )
    link.config_path.write_text(nobody)
    tick(link, instance, "alert_sensor", channels=[lambda alert: told.append(str(alert))])
    assert len(told) == 1
    assert "billing: cannot connect" in told[0]
    assert "hunter2" not in told[0]


def test_what_was_wrong_on_a_node_has_not_ended_because_the_node_cannot_be_asked(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []
    channels = [lambda alert: told.append(str(alert))]
    link.billing.execute(
        "insert into sync.sync_failures (table_name, record_id, state, error_class, error)"
        " values ('users', '7', 'dead', '23514', 'no')"
    )
    first = tick(link, instance, "alert_sensor", channels=channels)
    written = link.config_path.read_text()
    link.config_path.write_text(written.replace("${BILLING_DSN}", "host=127.0.0.1 port=1"))
    link.crm.execute("update users set name = 'new' where id = 1")
    link.crm.execute("update sync.sync_events set created_at = now() - interval '1 hour'")
    down = tick(link, instance, "alert_sensor", cursor=first.cursor, channels=channels)
    link.config_path.write_text(written)
    link.billing.execute("delete from sync.sync_failures")
    tick(link, instance, "alert_sensor", cursor=down.cursor, channels=channels)
    assert told[0] == "crm-billing: users on billing has dead letters"
    # The other node is asked meanwhile.
    assert told[1] == "crm-billing: changes on crm wait for more than 300 seconds"
    assert told[2].startswith("crm-billing: billing: cannot connect")
    assert told[3].startswith("crm-billing: resolved: billing: cannot connect")
    assert told[4:] == ["crm-billing: resolved: users on billing has dead letters"]


def test_a_dead_letter_of_a_table_that_is_not_synced_is_an_alert(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    told: list[str] = []
    # By hand, with a typing error.
    link.crm.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) values ('user', '1', 'update')"
    )
    sync_pair(link)
    tick(link, instance, "alert_sensor", channels=[lambda alert: told.append(str(alert))])
    assert told == ["crm-billing: user on crm has dead letters"]


def test_alerts_go_to_the_log_and_to_the_webhook_of_the_environment(
    link: Pair,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    link.crm.execute("update users set name = 'new' where id = 1")
    link.crm.execute("update sync.sync_events set created_at = now() - interval '1 hour'")
    got: list[dict[str, Any]] = []
    with webhook(got, [204]) as address:
        monkeypatch.setenv("SYNC_ALERT_WEBHOOK", address)
        tick(link, instance, "alert_sensor")
    text = "crm-billing: changes on crm wait for more than 300 seconds"
    assert got == [
        {"link": "crm-billing", "subject": "lag on crm", "text": text, "resolved": False}
    ]
    assert (logging.ERROR, text) in [(entry.levelno, entry.message) for entry in caplog.records]


def test_an_address_that_is_none_is_refused_with_the_name_of_its_variable(
    link: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNC_ALERT_WEBHOOK", "chat.example.org/hook")
    with pytest.raises(ValueError, match=r"SYNC_ALERT_WEBHOOK: .* https://"):
        dagster_runs.definitions(link)


def test_an_alert_that_could_not_be_delivered_is_sent_again(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    link.billing.execute(
        "insert into sync.sync_failures (table_name, record_id, state, error_class, error)"
        " values ('users', '7', 'dead', '23514', 'no')"
    )
    got: list[dict[str, Any]] = []
    with webhook(got, [503, 204]) as address:
        channels = [webhook_channel(address)]
        with pytest.raises(OSError, match="503"):
            tick(link, instance, "alert_sensor", channels=channels)
        done = tick(link, instance, "alert_sensor", channels=channels)
    assert [one["subject"] for one in got] == ["dead letters of users on billing"] * 2
    assert tick(link, instance, "alert_sensor", cursor=done.cursor, channels=channels).skipped == (
        "still: users on billing has dead letters"
    )
