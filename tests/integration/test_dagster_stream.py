"""`stream_job` and `stream_sensor`, run in the process of the test."""

import re
from itertools import pairwise
from threading import Event, Thread
from typing import Any

import dagster as dg
import pytest

from sync_pipeline import link as links
from sync_pipeline.defs import streaming
from tests import dagster_runs
from tests.dagster_runs import failure_of, metadata, run, tick
from tests.engine import config_of, equal
from tests.helpers import Pair

ACCOUNTS = dg.AssetKey(["sync", "accounts"])
HALF_A_MINUTE = 30.0
BRIEFLY = {"ops": {"stream_changes": {"config": {"seconds": 2}}}}


def test_a_stream_run_applies_changes_until_its_budget_is_over_and_tells_what_it_did(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    link.crm.insert("accounts", id=1, name="one")
    later = Thread(target=link.billing.insert, args=("accounts",), kwargs={"id": 2, "name": "two"})
    later.start()
    result = run(link, instance, "stream_job", config=BRIEFLY)
    later.join()
    assert result.success
    assert equal(link)
    seen = [event.asset_key for event in result.get_asset_observation_events()]
    assert seen == [ACCOUNTS]
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None
    assert "2 upserted" in stored.tags["sync/result"]


def test_a_stream_run_tells_of_a_table_now_and_then_and_the_rest_at_its_end(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert streaming.OBSERVE_SECONDS >= HALF_A_MINUTE
    monkeypatch.setattr(streaming, "OBSERVE_SECONDS", 0.6)
    over = Event()

    def work() -> None:
        with link.crm.connect() as application:
            number = 0
            while not over.wait(0.02):
                number += 1
                application.execute("insert into accounts values (%s, 'x')", [number])

    load = Thread(target=work)
    load.start()
    result = run(link, instance, "stream_job", config=BRIEFLY)
    over.set()
    load.join()
    told = [
        (event.event_log_entry.timestamp, event.asset_observation)
        for event in instance.fetch_observations(ACCOUNTS, limit=100, ascending=True).records
    ]
    assert result.success
    assert 1 < len(told) <= 3
    assert all(later - sooner >= 0.55 for (sooner, _), (later, _) in pairwise(told))
    rows: list[Any] = [observation.metadata["rows"].value for _, observation in told if observation]
    assert sum(rows) == len(link.billing.rows("accounts"))


def test_a_stream_run_stands_by_while_another_worker_leads(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    link.crm.insert("accounts", id=1, name="one")
    with links.lead(config_of(link)):
        result = run(link, instance, "stream_job", config=BRIEFLY)
    assert result.success
    assert link.crm.pending() == 1
    said = [entry.message for entry in instance.all_logs(result.run_id)]
    assert sum(message.startswith("stands by: another consumer leads") for message in said) == 1


def test_a_stream_run_of_a_paused_link_says_so(link: Pair, instance: dg.DagsterInstance) -> None:
    link.crm.insert("accounts", id=1, name="one")
    link.crm.execute("update sync.sync_node set paused_at = now()")
    result = run(link, instance, "stream_job", config=BRIEFLY)
    assert result.success
    assert link.crm.pending() == 1
    said = [entry.message for entry in instance.all_logs(result.run_id)]
    assert "the link is paused; `sync-pipeline resume` ends that" in said


def test_a_stream_run_on_nodes_without_the_pipeline_fails_in_one_line(
    pair: Pair, instance: dg.DagsterInstance
) -> None:
    result = run(pair, instance, "stream_job", config=BRIEFLY)
    assert not result.success
    assert failure_of(result).endswith("run `sync-pipeline install`")


def test_the_stream_sensor_asks_for_a_run_when_nobody_leads_and_for_no_second_one(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    asked = tick(link, instance, "stream_sensor")
    assert len(asked.requests) == 1
    assert asked.requests[0].run_key is None
    assert asked.requests[0].tags["sync/asked_by"] == "nobody leads"
    start_stream(link, instance)
    again = tick(link, instance, "stream_sensor")
    assert again.requests == []
    assert "was asked for and leads or stands by" in again.skipped


def test_the_stream_sensor_has_a_successor_stand_by_before_a_run_ends(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_stream(link, instance)
    with links.lead(config_of(link)):
        dagster_runs.pass_time(monkeypatch, 500)
        early = tick(link, instance, "stream_sensor")
        dagster_runs.pass_time(monkeypatch, 560)
        due = tick(link, instance, "stream_sensor")
        start_stream(link, instance)
        dagster_runs.pass_time(monkeypatch, 570)
        enough = tick(link, instance, "stream_sensor")
    assert early.requests == []
    assert "seconds left; backend " in early.skipped
    assert len(due.requests) == 1
    assert enough.requests == []


def test_the_stream_sensor_replaces_a_run_that_only_seems_to_run(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_stream(link, instance)
    dagster_runs.pass_time(monkeypatch, 300)
    assert len(tick(link, instance, "stream_sensor").requests) == 1


def test_the_stream_sensor_asks_less_often_while_runs_fail(
    pair: Pair, instance: dg.DagsterInstance
) -> None:
    assert not run(pair, instance, "stream_job", config=BRIEFLY).success
    asked = tick(pair, instance, "stream_sensor")
    assert asked.requests == []
    assert "run `sync-pipeline install`; tries again in" in asked.skipped


def test_runs_of_a_link_last_as_long_as_its_definitions_say(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    job = dagster_runs.definitions(link, stream_seconds=1).resolve_job_def("stream_job")
    result = job.execute_in_process(instance=instance)
    assert metadata(result, "stream_changes")["seconds"] < 30


def test_the_stream_sensor_counts_the_budget_that_a_run_was_launched_with(
    link: Pair, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_stream(link, instance, seconds=3600)
    with links.lead(config_of(link)):
        dagster_runs.pass_time(monkeypatch, 600)
        early = tick(link, instance, "stream_sensor")
        dagster_runs.pass_time(monkeypatch, 3570)
        due = tick(link, instance, "stream_sensor")
    assert early.requests == []
    # A second may pass meanwhile.
    assert re.search("(2999|3000) seconds left", early.skipped)
    assert len(due.requests) == 1


def start_stream(pair: Pair, instance: dg.DagsterInstance, *, seconds: float | None = None) -> None:
    """Put a run into the list that is shown as running, and do nothing else."""
    job = dagster_runs.definitions(pair).resolve_job_def("stream_job")
    config = {"seconds": seconds} if seconds is not None else {}
    instance.create_run_for_job(
        job,
        run_config={"ops": {"stream_changes": {"config": config}}},
        status=dg.DagsterRunStatus.STARTED,
        tags=job.tags,
    )
