"""Dagster's pages as a person sees them, in a real browser.

`--screenshots docs/images` renews the pictures of the documentation.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests import browser, dagster_runs
from tests.browser import Browser
from tests.dagster_processes import Dagster
from tests.helpers import Pair, eventually

pytestmark = [pytest.mark.browser, pytest.mark.dagster, pytest.mark.timeout(300), browser.needed]

# How many accounts and users change between two passes, and for how many seconds they wait; what the plots draw.
ROUNDS = ((12, 30, 3), (40, 8, 9), (25, 55, 4), (70, 20, 21), (35, 64, 7), (52, 41, 12))
ROUND_SECONDS = 600
SLICES = [f"accounts/{number:02}-of-16" for number in range(1, 4)]


@pytest.fixture(scope="module")
def dagster(link: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dagster]:
    """Dagster with a past: some passes, what the sensors saw between them, and a backfill."""
    dagster = Dagster(
        link.config_path, link.environment, tmp_path_factory.mktemp("dagster") / "home"
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, dsn in link.environment.items():
            environment.setenv(name, dsn)
        work_for_a_while(link, dagster, environment)
    with dagster:
        yield dagster


def work_for_a_while(pair: Pair, dagster: Dagster, patch: pytest.MonkeyPatch) -> None:
    """Change rows, look and pass, several times, as if over an hour; in this process, but for the same storage."""
    now = time.time()
    with dagster.instance() as instance:
        cursor = None
        for number, (accounts, users, waited) in enumerate(ROUNDS, 1):
            moment = now - (len(ROUNDS) - number + 0.2) * ROUND_SECONDS
            patch.setattr(time, "time", partial(float, moment))
            pair.crm.execute(
                "insert into accounts (id, name) select %s::int + n, 'new' from generate_series(1, %s::int) n",
                number * 1000,
                accounts,
            )
            pair.billing.execute(
                "insert into users (id, account_id, email) select %s::int + n, a.id, %s::int + n || '@x.org'"
                " from generate_series(1, %s::int) n, (select min(id) as id from accounts) a where a.id is not null",
                number * 1000,
                number * 1000,
                users,
            )
            for node in pair.nodes:
                node.execute(
                    "update sync.sync_events set created_at = created_at - make_interval(secs => %s)",
                    waited,
                )
            seen = dagster_runs.tick(pair, instance, "watch_sensor", cursor=cursor)
            cursor = seen.cursor
            for event in seen.asset_events:
                instance.report_runless_asset_event(event)
            assert dagster_runs.run(pair, instance).success


@pytest.fixture(scope="module")
def window(dagster: Dagster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("chromium") / "profile"
    with browser.opened(f"http://127.0.0.1:{dagster.port}", profile) as window:
        yield window


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a test leaves what it saw."""
    directory: Path = request.config.getoption("--screenshots") or tmp_path
    return directory


def test_the_graph_of_the_job_shows_two_directions_and_the_three_ops_of_each(
    window: Browser, pictures: Path
) -> None:
    window.open("/locations/sync-pipeline/jobs/sync_job", "crm_to_billing", "billing_to_crm")
    window.click("(//*[text()='Expand'])[last()]")
    window.wait_for("fetch_dependents", "process_parents", "process_dependents")
    window.screenshot(pictures / "sync-job.png")


def test_a_finished_run_shows_who_asked_for_it_and_what_it_did_to_each_table(
    link: Pair, dagster: Dagster, window: Browser, pictures: Path
) -> None:
    # A run that hangs before it begins is ended by the sensor after a minute.
    eventually("nothing waits", lambda: link.crm.pending() + link.billing.pending() == 0, 120)
    before = asked_by_the_sensor(dagster)
    link.crm.execute("update accounts set name = 'renamed' where id % 2 = 0")
    link.billing.execute("delete from users where id % 3 = 0")
    (asked, *_) = eventually(
        "the sensor has asked",
        lambda: [run for run in asked_by_the_sensor(dagster) if run not in before],
    )
    assert dagster.ended(asked) == "SUCCESS"
    window.open(
        f"/runs/{asked}?logs=type%3AASSET_OBSERVATION",
        "Success",
        "Launched by",
        "sync_sensor",
        "ASSET_OBSERVATION",
        "sync / accounts",
        "upserted",
    )
    window.open(f"/runs/{asked}?logs=events", "upserted, from", "deleted, from")
    window.screenshot(pictures / "run.png")


def test_the_plots_of_an_asset_draw_backlog_and_lag(window: Browser, pictures: Path) -> None:
    window.open("/assets/crm/accounts", "Table accounts on crm", "Plots")
    window.click("//*[text()='Plots']")
    window.wait_for("pending", "lag_seconds", "retrying", "dead", "held")
    window.wait("each number has its plot", lambda: window.count("canvas") == 5)
    window.scroll_to("//*[text()='Metadata']")
    window.screenshot(pictures / "plots.png")


def test_the_page_of_an_asset_shows_its_checks_and_how_fresh_it_must_be(
    window: Browser, pictures: Path
) -> None:
    window.open("/assets/sync/accounts", "Freshness policy", "Fails if more than", "Plots")
    window.click("//*[text()='Plots']")
    window.wait_for("rows", "upserted", "conflicts")
    window.open("/assets/sync/accounts?view=checks", "lag", "dead_letters", "verify")


def test_a_backfill_shows_its_slices_and_what_each_marked(
    dagster: Dagster, window: Browser, pictures: Path
) -> None:
    backfill = dagster.backfill(SLICES, {"sync/from": "crm"})
    # Else it looks for backfills only twice a minute.
    dagster.restart("daemon")
    eventually(
        "every slice is marked",
        lambda: (
            [run["status"] for run in dagster.runs("backfill_job")] == ["SUCCESS"] * len(SLICES)
        ),
        180,
    )
    dagster.restart("daemon")
    eventually("the backfill has ended", lambda: dagster.backfill_ended(backfill), 90)
    window.open(f"/runs/b/{backfill}", "3 partitions", "backfill_job")
    window.open(
        f"/runs/b/{backfill}?tab=runs",
        *SLICES,
        "Succeeded",
        "sync/from: crm",
        "sync/result: marked",
    )
    window.screenshot(pictures / "backfill.png")


def asked_by_the_sensor(dagster: Dagster) -> list[str]:
    return [
        run["id"]
        for run in dagster.runs("sync_job")
        if any(tag["key"] == "sync/asked_by" for tag in run["tags"])
    ]
