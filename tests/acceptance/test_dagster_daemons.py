"""Dagster as it is deployed: real processes, driven over GraphQL as the browser drives it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest

from sync_pipeline.defs.glance import leading
from tests.dagster_processes import HOME, Dagster, eventually, free_port
from tests.engine import config_of, equal, installed
from tests.helpers import Cluster, Node, Pair, write_config

pytestmark = [pytest.mark.dagster, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def link(
    crm_server: Cluster, billing_server: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two installed databases for the tests of this module; each test leaves them equal."""
    servers = {"crm": crm_server, "billing": billing_server}
    nodes = {
        name: Node(name, cluster.server.dsn(cluster.clone()), cluster.server)
        for name, cluster in servers.items()
    }
    path = write_config(tmp_path_factory.mktemp("link") / "sync.yaml", lock_timeout_seconds=60)
    pair = Pair(nodes["crm"], nodes["billing"], path)
    installed(pair)
    yield pair
    for name, cluster in servers.items():
        nodes[name].close()
        cluster.drop(nodes[name].dsn.rpartition("/")[2])


@pytest.fixture(scope="module")
def dagster(link: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dagster]:
    with Dagster(link, tmp_path_factory.mktemp("dagster") / "home") as dagster:
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
    tags = {tag["key"]: tag["value"] for tag in dagster.runs("sync_job")[0]["tags"]}
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
        for worker in dagster.workers():
            worker.kill()
        eventually("the locks are free", lambda: nobody_leads(link), 3)
    assert dagster.ended(run["id"]) == "FAILURE"
    eventually("the next run has applied everything", lambda: is_synced(link))
    assert equal(link)


def test_the_health_checks_of_the_deployment_tell_who_is_alive(dagster: Dagster) -> None:
    for name in ("code", "webserver", "daemon"):
        eventually(f"{name} is healthy", partial(dagster.is_healthy, name), 90)
    assert not dagster.is_healthy("webserver", port=free_port())


def test_a_killed_code_server_or_daemon_only_delays(link: Pair, dagster: Dagster) -> None:
    dagster.kill("code")
    dagster.kill("daemon")
    add_accounts(link.crm, 1, 100)
    dagster.start("code")
    dagster.start("daemon")
    eventually("everything is applied", lambda: is_synced(link), 90)
    assert equal(link)


def test_one_stream_run_takes_over_from_the_other_under_load(link: Pair, dagster: Dagster) -> None:
    def stream(seconds: int) -> str:
        return dagster.launch(
            "stream_job", {"ops": {"stream_changes": {"config": {"seconds": seconds}}}}
        )

    over = Event()

    def work() -> None:
        insert = "insert into accounts (id, name) values (%s, 'new')"
        with link.crm.connect() as one, link.billing.connect() as two:
            number = 0
            while not over.wait(0.01) and number < 20_000:
                number += 2
                one.execute(insert, [number])
                two.execute(insert, [number + 1])

    first = stream(12)
    eventually("the first leads", lambda: not nobody_leads(link))
    load = Thread(target=work)
    load.start()
    try:
        second = stream(60)
        assert dagster.ended(first) == "SUCCESS"
        eventually("the second leads", lambda: not nobody_leads(link), 10)
    finally:
        over.set()
        load.join()
    eventually("everything is applied", lambda: is_synced(link))
    assert equal(link)
    dagster.terminate(second)
    eventually("the locks are free", lambda: nobody_leads(link), 5)
    assert dagster.ended(second) == "CANCELED"


def test_a_backfill_of_the_backfill_page_marks_a_table_and_the_sensor_applies_it(
    link: Pair, dagster: Dagster
) -> None:
    link.billing.execute(
        "begin; set local session_replication_role = replica;"
        " insert into accounts (id, name) select n, 'billing' from generate_series(1, 20) n; commit"
    )
    assert not equal(link)
    slices = ["accounts/01-of-16"]
    backfill = dagster.backfill(slices, {"sync/from": "billing"})
    eventually(
        "the backfill has ended",
        lambda: (
            dagster.ask(
                "query ($id: String!) { partitionBackfillOrError(backfillId: $id) {"
                " ... on PartitionBackfill { status } } }",
                id=backfill,
            )["partitionBackfillOrError"]["status"]
            == "COMPLETED_SUCCESS"
        ),
        90,
    )
    eventually("everything is applied", lambda: is_synced(link))
    marked = len(link.crm.rows("accounts"))
    assert 0 < marked < 20
    tags = [{t["key"]: t["value"] for t in run["tags"]} for run in dagster.runs("backfill_job")]
    assert [tag["dagster/partition"] for tag in tags] == slices


@pytest.mark.soak
def test_everything_works_on_postgres_storage(
    link: Pair, billing_server: Cluster, tmp_path: Path
) -> None:
    database = billing_server.clone()
    server = billing_server.server
    environment = {
        "DAGSTER_PG_HOST": "127.0.0.1",
        "DAGSTER_PG_PORT": str(server.port),
        "DAGSTER_PG_DB": database,
        "DAGSTER_PG_USERNAME": "postgres",
        "DAGSTER_PG_PASSWORD": "unused",
    }
    settings = HOME / "prod" / "dagster.yaml"
    try:
        with Dagster(link, tmp_path / "home", settings=settings, environment=environment) as prod:
            add_accounts(link.crm, 1, 5)
            eventually("both nodes are synced", lambda: is_synced(link), 90)
            verify = prod.launch("verify_job")
            assert prod.ended(verify) == "SUCCESS"
            replay = {"table": "accounts", "node": "crm", "everything": True}
            dry = prod.launch("replay_job", {"ops": {"replay_records": {"config": replay}}})
            assert prod.ended(dry) == "SUCCESS"
            assert "would mark 5 records" in str(prod.runs("replay_job"))
            prune = {"ops": {"prune": {"config": {"keep_days": 0}}}}
            assert prod.ended(prod.launch("maintenance_job", prune)) == "SUCCESS"
            assert prod.runs("verify_job") == []
        with psycopg.connect(server.dsn(database)) as storage:
            row = storage.execute("select count(*) from event_logs").fetchone()
            assert row is not None
            assert row[0] > 0
    finally:
        billing_server.drop(database)
