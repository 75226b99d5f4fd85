"""The stream kept alive by its sensor, beside everything else that starts runs; two links in one code location."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise, repeat
from threading import Event, Thread
from typing import Any

import psycopg
import pytest

from sync_pipeline import link as links
from sync_pipeline import locks
from sync_pipeline.defs.glance import leading
from tests.dagster_processes import HOME, Dagster, storage_environment
from tests.engine import config_of, equal, installed
from tests.helpers import Cluster, Pair, eventually, write_config
from tests.webhooks import webhook

pytestmark = [pytest.mark.dagster, pytest.mark.timeout(300)]

STREAM_SECONDS = 60
# The first stream's. The sensor asks for the next one when half of STREAM_SECONDS is left, and when a quarter of it is
# over: so a busy machine has 25 seconds to start one.
FIRST_SECONDS = 60
LAST_STAGES = ("crm_to_billing.process_parents", "crm_to_billing.process_dependents")
# The code location that docs/dagster.md shows, with a stream that ends soon.
LOCATION = f"""
import os

from dagster import Definitions
from sync_pipeline import build_sync_definitions, load

defs = Definitions.merge(
    build_sync_definitions(load(), stream_seconds={STREAM_SECONDS}),
    build_sync_definitions(load(os.environ["NOTES_CONFIG"]), name="notes"),
)
"""


@pytest.fixture(scope="module")
def notes(link: Pair) -> Pair:
    """The same databases as another link has them: with a table, a schema and locks of its own."""
    for node in link.nodes:
        node.execute("create table notes (id int primary key, body text)")
    path = write_config(link.config_path.with_name("notes.yaml"), ["notes"], schema="sync_notes")
    pair = Pair(link.crm, link.billing, path)
    installed(pair)
    return pair


@dataclass(frozen=True)
class Alerts:
    """A team's channel, and what it got so far."""

    address: str
    got: list[dict[str, Any]]


@pytest.fixture(scope="module")
def alerts() -> Iterator[Alerts]:
    got: list[dict[str, Any]] = []
    with webhook(got, repeat(204)) as address:
        yield Alerts(address, got)


@pytest.fixture(scope="module")
def dagster(
    link: Pair,
    notes: Pair,
    alerts: Alerts,
    billing_server: Cluster,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Dagster]:
    """Dagster with both links in one code location, and the settings for production."""
    storage = billing_server.clone()
    directory = tmp_path_factory.mktemp("dagster")
    (directory / "two_links.py").write_text(LOCATION)
    environment = {
        **link.environment,
        **storage_environment(billing_server.server.dsn(storage)),
        "NOTES_CONFIG": str(notes.config_path),
        "SYNC_ALERT_WEBHOOK": alerts.address,
        "PYTHONPATH": str(directory),
    }
    settings = HOME / "prod" / "dagster.yaml"
    with Dagster(
        link.config_path, environment, directory / "home", settings, "two_links"
    ) as dagster:
        yield dagster
    billing_server.drop(storage)


@dataclass
class Traffic:
    """What applications wrote on both nodes so far, and who led after each write: a backend of crm, or nobody."""

    written: int = 0
    leaders: list[int | None] = field(default_factory=list)


@contextmanager
def writing(pair: Pair) -> Iterator[Traffic]:
    """Applications that insert on both nodes, over and over, until the block ends."""
    config = config_of(pair)
    traffic = Traffic()
    over = Event()

    def work() -> None:
        insert = "insert into accounts (id, name) values (%s, 'new')"
        with pair.crm.connect() as one, pair.billing.connect() as two:
            while not over.wait(0.02):
                one.execute(insert, [traffic.written + 1])
                two.execute(insert, [traffic.written + 2])
                traffic.written += 2
                leader = locks.leader(one, config)
                traffic.leaders.append(leader.pid if leader else None)

    load = Thread(target=work)
    load.start()
    try:
        yield traffic
    finally:
        over.set()
        load.join()


def leads(dagster: Dagster, run_id: str) -> bool:
    return "leads" in dagster.said(run_id)


def stands_by(dagster: Dagster, run_id: str) -> bool:
    return any(message.startswith("stands by") for message in dagster.said(run_id))


def streams(dagster: Dagster) -> list[str]:
    """The runs of the stream, the oldest first."""
    return [run["id"] for run in reversed(dagster.runs("stream_job"))]


def next_stream(dagster: Dagster, known: list[str]) -> str:
    """Wait for a run of the stream that is not yet known, and return it."""
    new = eventually("another stream", lambda: [r for r in streams(dagster) if r not in known])
    known += new
    return new[0]


def leader_of(asked_by: str) -> int:
    """The backend that a sensor saw leading."""
    return int(asked_by.split()[1])


def new_tick(dagster: Dagster, sensor: str) -> dict[str, Any]:
    """Wait until a sensor has looked once more, from begin to end, and return that tick."""

    def ticks() -> dict[str, dict[str, Any]]:
        return {tick["id"]: tick for tick in dagster.ticks(sensor)}

    known = set(ticks())
    eventually("a look that begins now", lambda: set(ticks()) - known)
    (new, *_) = set(ticks()) - known
    return eventually(
        "its end", lambda: [ticks()[new]] if ticks()[new]["status"] != "STARTED" else []
    )[0]


def longest_gap(leaders: list[int | None]) -> int:
    """How many writes in a row saw no leader."""
    return max((len(list(same)) for pid, same in groupby(leaders) if pid is None), default=0)


def passes(dagster: Dagster) -> list[dict[str, Any]]:
    """The runs of a pass that have begun."""
    return [run for run in dagster.runs("sync_job") if run["startTime"]]


def with_tag(runs: list[dict[str, Any]], key: str) -> list[str]:
    return [run["id"] for run in runs if any(tag["key"] == key for tag in run["tags"])]


def test_the_stream_sensor_hands_over_under_load_beside_a_sensor_and_a_schedule_and_nothing_is_lost(
    link: Pair, dagster: Dagster, alerts: Alerts
) -> None:
    schedule = dagster.start_schedule("sync_schedule")
    with writing(link) as traffic:
        briefly = {"ops": {"stream_changes": {"config": {"seconds": FIRST_SECONDS}}}}
        first = dagster.launch("stream_job", briefly)
        known = [first]
        dagster.start_sensor("stream_sensor")
        eventually("the first leads", lambda: leads(dagster, first))
        by_hand = dagster.launch("sync_job")
        assert dagster.ended(by_hand) == "SUCCESS"
        from_the_middle = dagster.re_execute(by_hand, "sync_job", LAST_STAGES)
        second = next_stream(dagster, known)
        # On a machine that starts a run slowly, it may lead before it was seen.
        eventually(
            "its successor stands by", lambda: stands_by(dagster, second) or leads(dagster, second)
        )
        assert dagster.ended(first) == "SUCCESS"
        eventually("the second leads", lambda: leads(dagster, second))
        handed_over = len(traffic.leaders)

        dagster.kill_run(second)
        third = next_stream(dagster, known)
        eventually("the third leads", lambda: leads(dagster, third))
        dagster.terminate(third)
        assert dagster.ended(third) == "CANCELED"
        fourth = next_stream(dagster, known)
        eventually("the fourth leads", lambda: leads(dagster, fourth))
        dagster.stop_sensor("stream_sensor")
        dagster.terminate(fourth)
        assert dagster.ended(fourth) == "CANCELED"
    eventually("the schedule ran", lambda: with_tag(passes(dagster), "dagster/schedule_name"), 90)
    dagster.stop_schedule(schedule)
    eventually("all is applied", lambda: link.crm.pending() + link.billing.pending() == 0)

    # Nothing is lost, by whoever it was applied.
    assert equal(link)
    assert link.crm.value("select count(*) from accounts") == traffic.written
    # The successor was asked for while the first led, and led next, nearly at once.
    leader = leader_of(dagster.tags(second)["sync/asked_by"])
    stretch = traffic.leaders[traffic.leaders.index(leader) : handed_over]
    assert longest_gap(stretch) < stretch.count(leader) / 4
    turns = [pid for pid, _ in groupby(traffic.leaders)]
    leaders = [pid for pid in turns if pid is not None]
    assert len(leaders) == len(set(leaders))
    # A run that finds the lock taken has done nothing, and says who leads.
    assert f"backend {leader}" in dagster.tags(by_hand)["sync/result"]
    # One that is executed again from the middle has no snapshot, and says so.
    assert dagster.ended(from_the_middle) == "FAILURE"
    assert "cannot start in the middle of a pass" in dagster.failure_of(from_the_middle)
    # In its time the first told of the table now and then, not at each of hundreds of passes.
    told = dagster.observers("sync", "accounts").count(first)
    assert 1 <= told <= 2
    # Never two passes at once, and the sensor asked for one only when nobody led.
    eventually("no pass runs", lambda: all(run["endTime"] for run in dagster.runs("sync_job")))
    spans = sorted((run["startTime"], run["endTime"]) for run in passes(dagster))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    asked = with_tag(passes(dagster), "sync/asked_by")
    assert len(asked) <= turns.count(None) + 1
    # No run when there is nothing to do.
    seen = new_tick(dagster, "sync_sensor")
    assert seen["skipReason"] == "nothing waits on crm or billing"
    assert with_tag(passes(dagster), "sync/asked_by") == asked
    # The team is told of the run that was killed, and of none that was terminated.
    eventually("an alert", lambda: any(second in alert["subject"] for alert in alerts.got))
    assert not [alert for alert in alerts.got if third in alert["subject"]]


def test_two_links_of_a_code_location_work_each_by_its_own_sensor_jobs_and_locks(
    link: Pair, notes: Pair, dagster: Dagster
) -> None:
    eventually("nobody leads", lambda: leading(config_of(link)) is None)
    with links.lead(config_of(link)):
        notes.billing.insert("notes", id=1, body="read me")
        eventually("the note is there", lambda: notes.crm.rows("notes"))
    assert equal(notes, ("notes",))
    (run,) = dagster.runs("notes_sync_job")
    assert dagster.tags(run["id"])["sync/link"] == "notes"
    assert not [run for run in passes(dagster) if dagster.tags(run["id"])["sync/link"] == "notes"]


def test_a_tick_says_which_node_is_down(link: Pair, dagster: Dagster) -> None:
    database = link.billing.value("select current_database()")
    with psycopg.connect(link.billing.server.dsn(), autocommit=True) as admin:
        admin.execute(f"alter database {database} allow_connections false".encode())
        try:
            seen = new_tick(dagster, "sync_sensor")
        finally:
            admin.execute(f"alter database {database} allow_connections true".encode())
    assert seen["status"] == "SKIPPED"
    assert seen["skipReason"].startswith("billing: cannot connect: ")
    assert "not currently accepting connections" in seen["skipReason"]
