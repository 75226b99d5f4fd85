"""Dagster as it is deployed: real processes, driven over GraphQL as the browser drives it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest

from sync_pipeline.defs.glance import leading
from tests.dagster_processes import (
    ENDED,
    HOME,
    Dagster,
    free_port,
    storage_environment,
)
from tests.engine import config_of, equal
from tests.helpers import Cluster, Node, Pair, eventually

pytestmark = [pytest.mark.dagster, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def storage(billing_server: Cluster) -> Iterator[str]:
    """The DSN of an empty database for what Dagster stores."""
    database = billing_server.clone()
    yield billing_server.server.dsn(database)
    billing_server.drop(database)


@pytest.fixture(scope="module")
def dagster(
    link: Pair, storage: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dagster]:
    """Dagster with the settings for production, so on PostgreSQL; the tests of its pages use those for development."""
    environment = {**link.environment, **storage_environment(storage)}
    home = tmp_path_factory.mktemp("dagster") / "home"
    settings = HOME / "prod" / "dagster.yaml"
    with Dagster(link.config_path, environment, home, settings) as dagster:
        yield dagster


@pytest.fixture(autouse=True)
def empty(link: Pair) -> None:
    """Each test begins with empty tables and nothing pending, whatever the one before left."""
    for node in link.nodes:
        node.execute(
            "begin; set local session_replication_role = replica; truncate accounts, users, orders; commit"
        )
        node.execute("delete from sync.sync_events; delete from sync.sync_failures")


def add_accounts(node: Node, first: int, last: int) -> None:
    node.execute(
        "insert into accounts (id, name) select n, 'x' from generate_series(%s::int, %s::int) n",
        first,
        last,
    )


def is_synced(pair: Pair) -> bool:
    return pair.crm.pending() == 0 and pair.billing.pending() == 0


@contextmanager
def locked(node: Node, table: str) -> Iterator[None]:
    """Let nobody write a table, as an application's long transaction may; the end of the block frees it."""
    with node.connect(autocommit=False) as connection:
        connection.execute(f"lock table {table} in share mode".encode())
        yield
        connection.rollback()


def waits_for_a_lock(node: Node) -> bool:
    return bool(
        node.value(
            "select count(*) from pg_stat_activity where application_name like 'sync-pipeline%%writer'"
            " and wait_event_type = 'Lock' and datname = current_database()"
        )
    )


def nobody_leads(pair: Pair) -> bool:
    return leading(config_of(pair)) is None


def test_the_sensor_finds_a_change_and_both_databases_end_equal(
    link: Pair, dagster: Dagster
) -> None:
    add_accounts(link.crm, 1, 3)
    add_accounts(link.billing, 11, 13)
    eventually("both nodes are synced", lambda: is_synced(link))
    assert equal(link)
    assert len(link.crm.rows("accounts")) == 6
    run = dagster.runs("sync_job")[0]
    assert dagster.ended(run["id"]) == "SUCCESS"
    tags = dagster.tags(run["id"])
    assert tags["sync/asked_by"].startswith("changes wait on")
    assert "upserted" in tags["sync/result"]


def test_a_terminated_run_frees_the_locks_and_the_next_one_loses_nothing(
    link: Pair, dagster: Dagster
) -> None:
    with locked(link.billing, "accounts"):
        add_accounts(link.crm, 1, 500)
        eventually("a run is in mid-batch", lambda: waits_for_a_lock(link.billing))
        run = next(r for r in dagster.runs("sync_job") if r["status"] == "STARTED")
        dagster.terminate(run["id"])
        eventually("the locks are free", lambda: nobody_leads(link), 3)
        assert link.crm.pending() == 500
    assert dagster.ended(run["id"]) == "CANCELED"
    eventually("the next run has applied everything", lambda: is_synced(link))
    assert equal(link)


def test_a_killed_run_frees_the_locks_and_the_next_one_loses_nothing(
    link: Pair, dagster: Dagster
) -> None:
    with locked(link.billing, "accounts"):
        add_accounts(link.crm, 1, 500)
        eventually("a run is in mid-batch", lambda: waits_for_a_lock(link.billing))
        run = next(r for r in dagster.runs("sync_job") if r["status"] == "STARTED")
        dagster.kill_run(run["id"])
        eventually("the locks are free", lambda: nobody_leads(link), 3)
    assert dagster.ended(run["id"]) == "FAILURE"
    eventually("the next run has applied everything", lambda: is_synced(link))
    assert equal(link)


def test_the_health_checks_of_the_deployment_tell_who_is_alive(dagster: Dagster) -> None:
    for name in ("code", "webserver", "daemon"):
        eventually(f"{name} is healthy", partial(dagster.is_healthy, name), 90)
    assert not dagster.is_healthy("webserver", port=free_port())


def test_a_stream_goes_on_without_code_server_and_daemon_and_sensors_go_on_with_new_ones(
    link: Pair, dagster: Dagster
) -> None:
    run = dagster.launch("stream_job")
    eventually("it leads", lambda: "leads" in dagster.said(run))
    dagster.kill("code")
    dagster.kill("daemon")
    add_accounts(link.crm, 1, 100)
    eventually("the stream has applied everything", lambda: is_synced(link))
    assert len(link.billing.rows("accounts")) == 100
    dagster.kill_run(run)
    eventually("the locks are free", lambda: nobody_leads(link), 3)
    add_accounts(link.crm, 101, 200)
    dagster.start("code")
    dagster.start("daemon")
    eventually("a new run has applied the rest", lambda: is_synced(link), 90)
    assert equal(link)
    # Nobody noticed the end of a run whose code server was gone; it stands in no one's way.
    assert dagster.status(run) == "STARTED"


def test_a_backfill_goes_on_without_its_daemon_and_is_resumed_where_it_failed(
    link: Pair, dagster: Dagster
) -> None:
    link.billing.execute(
        "begin; set local session_replication_role = replica;"
        " insert into accounts (id, name) select n, 'billing' from generate_series(1, 40) n; commit"
    )
    slices = [f"accounts/{number:02}-of-16" for number in (1, 2, 3)]
    # A record of the third slice can't be marked.
    refused = link.billing.value(
        "select min(id) from accounts where (hashtext(id::text)::bigint + 2147483648) / 268435456 = 2"
    )
    link.billing.execute(
        f"alter table sync.sync_events add constraint refused check (record_id <> '{refused}')"
    )
    backfill = dagster.backfill(slices, {"sync/from": "billing"})
    dagster.restart("daemon")
    eventually("all slices were tried", lambda: len(ended_slices(dagster)) == 3, 90)
    assert ended_slices(dagster) == dict(
        zip(slices, ("SUCCESS", "SUCCESS", "FAILURE"), strict=True)
    )
    eventually("the backfill has ended", lambda: dagster.backfill_ended(backfill), 90)
    link.billing.execute("alter table sync.sync_events drop constraint refused")
    dagster.resume_backfill(backfill)
    dagster.restart("daemon")
    eventually("it went on", lambda: set(ended_slices(dagster).values()) == {"SUCCESS"}, 90)
    assert set(ended_slices(dagster)) == set(slices)
    assert len(dagster.runs("backfill_job")) == 4
    eventually("everything is applied", lambda: is_synced(link))
    marked = {row[0] for row in link.crm.rows("accounts")}
    assert refused in marked
    assert len(marked) < 40


def test_replays_checks_observations_and_maintenance_work_on_postgres_storage(
    link: Pair, dagster: Dagster, storage: str
) -> None:
    add_accounts(link.crm, 1, 5)
    eventually("both nodes are synced", lambda: is_synced(link))
    replay = {"table": "accounts", "node": "crm", "condition": "id <= 3"}
    dry = dagster.launch("replay_job", {"ops": {"replay_records": {"config": replay}}})
    assert dagster.ended(dry) == "SUCCESS"
    assert dagster.tags(dry)["sync/result"] == "would mark 3 records"
    real = {"ops": {"replay_records": {"config": {**replay, "dry_run": False}}}}
    assert dagster.ended(dagster.launch("replay_job", real)) == "SUCCESS"
    eventually("what was marked is applied", lambda: "3 unchanged" in results(dagster))
    assert dagster.ended(dagster.launch("verify_job")) == "SUCCESS"
    eventually("the sensor has looked", lambda: dagster.checks("sync", "accounts").get("lag"), 90)
    assert dagster.checks("sync", "accounts") == {
        "lag": "SUCCEEDED",
        "dead_letters": "SUCCEEDED",
        "verify": "SUCCEEDED",
    }
    assert {"rows", "upserted", "lag_seconds"} <= dagster.observed("sync", "accounts")
    assert {"pending", "dead", "lag_seconds"} <= dagster.observed("crm", "accounts")
    prune = {"ops": {"prune": {"config": {"keep_days": 0, "keep_failed_days": 0}}}}
    assert dagster.ended(dagster.launch("maintenance_job", prune)) == "SUCCESS"
    assert dagster.runs("replay_job") == []
    with psycopg.connect(storage) as connection:
        stored = connection.execute("select count(distinct run_id) from event_logs").fetchall()
    assert 0 < stored[0][0] < 5


def ended_slices(dagster: Dagster) -> dict[str, str]:
    """How the latest run of each slice of a backfill ended, of those that have."""
    return {
        dagster.tags(run["id"])["dagster/partition"]: run["status"]
        for run in reversed(dagster.runs("backfill_job"))
        if run["status"] in ENDED
    }


def results(dagster: Dagster) -> set[str]:
    """What the passes say that they did."""
    return {dagster.tags(run["id"]).get("sync/result", "") for run in dagster.runs("sync_job")}
