"""`stream_job` and `stream_sensor`, run in the process of the test."""

from collections.abc import Iterator
from threading import Thread

import dagster as dg
import pytest

from sync_pipeline import link as links
from tests import dagster_runs
from tests.dagster_runs import failure_of, run, tick
from tests.engine import config_of, equal, installed
from tests.helpers import Pair

BRIEFLY = {"ops": {"stream_changes": {"config": {"seconds": 2}}}}


@pytest.fixture
def link(pair: Pair) -> Pair:
    installed(pair)
    return pair


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dagster_runs.instance() as instance:
        yield instance


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
    assert seen == [dg.AssetKey(["sync", "accounts"])]
    stored = instance.get_run_by_id(result.run_id)
    assert stored is not None
    assert "2 upserted" in stored.tags["sync/result"]


def test_a_stream_run_stands_by_while_another_worker_leads(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    link.crm.insert("accounts", id=1, name="one")
    with links.lead(config_of(link)):
        result = run(link, instance, "stream_job", config=BRIEFLY)
    assert result.success
    assert link.crm.pending() == 1
    said = [entry.message for entry in instance.all_logs(result.run_id)]
    assert sum(message.startswith("stands by: another worker leads") for message in said) == 1


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
    job = dagster_runs.definitions(link).resolve_job_def("stream_job")
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    again = tick(link, instance, "stream_sensor")
    assert again.requests == []
    assert "was asked for and leads or stands by" in again.skipped
