"""The main job: one pass makes both databases equal."""

import pytest

from sync_pipeline import stream
from sync_pipeline.records import DirectionReport
from tests.bookkeeping import marked_so_far
from tests.engine import config_of, equal, installed, sync_pair, totals
from tests.helpers import Node, Pair, shift_clock

pytestmark = pytest.mark.core


@pytest.fixture
def link(pair: Pair) -> Pair:
    """Two empty databases with the pipeline installed."""
    installed(pair)
    return pair


def add_family(node: Node, account: int = 1) -> None:
    node.insert("accounts", id=account, name=f"account {account}")
    node.insert("users", id=account * 10, account_id=account, email=f"u{account}@x.org", age=30)
    node.insert("orders", id=account * 100, user_id=account * 10, amount="12.50", note="first")


def test_inserts_updates_and_deletes_travel_from_the_first_node_to_the_second(link: Pair) -> None:
    add_family(link.crm)
    sync_pair(link)
    assert equal(link)
    assert link.billing.rows("orders")[0][0] == 100

    link.crm.execute("update users set name = 'Ann', age = 31")
    link.crm.execute("delete from orders")
    sync_pair(link)
    assert equal(link)
    assert link.billing.rows("orders") == []


def test_inserts_updates_and_deletes_travel_from_the_second_node_to_the_first(link: Pair) -> None:
    add_family(link.billing)
    sync_pair(link)
    assert equal(link)
    link.billing.execute("delete from accounts")
    sync_pair(link)
    assert equal(link)
    assert link.crm.rows("users") == []


def test_nothing_is_echoed_back(link: Pair) -> None:
    add_family(link.crm)
    sync_pair(link)
    link.crm.execute("delete from accounts")
    sync_pair(link)
    assert marked_so_far(link.billing) == 0
    assert link.crm.pending() == 0
    assert totals(link).passes == 0


def test_each_pass_compares_the_clocks_of_the_nodes(link: Pair) -> None:
    add_family(link.crm)
    add_family(link.billing, 2)
    reports: list[DirectionReport] = []
    stream.sync(config_of(link), stream.Listener(passed=reports.extend))
    assert [report.name for report in reports] == ["crm->billing", "billing->crm"]
    for report in reports:
        # Both servers run on this machine, so their clocks are the same one.
        assert report.clock_difference_seconds is not None
        assert abs(report.clock_difference_seconds) < 2
        assert report.clock_warning is None


def test_a_clock_that_is_ahead_is_said_and_decides_conflicts_but_holds_up_nothing(
    pair: Pair,
) -> None:
    shift_clock(pair.crm, "1 hour")
    installed(pair)
    reports: list[DirectionReport] = []
    listener = stream.Listener(passed=reports.extend)
    add_family(pair.crm)
    stream.sync(config_of(pair), listener)
    pair.billing.execute("update accounts set name = 'an hour older, and newer'")
    stream.sync(config_of(pair), listener)
    assert pair.crm.rows("select name from accounts") == [("an hour older, and newer",)]
    said = {report.clock_warning for report in reports if report.clock_warning}
    assert [warning.partition(":")[0] for warning in said] == [
        "the clock of crm is more than 5 s ahead of that of billing"
    ]
    pair.crm.execute("update accounts set name = 'first'")
    pair.billing.execute("update accounts set name = 'second'")
    stream.sync(config_of(pair))
    assert equal(pair)
    assert pair.billing.rows("select name from accounts") == [("first",)]


def test_a_replay_by_hand_sends_the_row_again(link: Pair) -> None:
    add_family(link.crm)
    sync_pair(link)
    link.billing.execute(
        "begin; set local session_replication_role = replica; update users set name = 'x'; commit"
    )
    link.crm.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) values ('users', '10', 'update')"
    )
    sync_pair(link)
    assert equal(link)


def test_a_later_update_wins_and_both_rows_are_logged(link: Pair) -> None:
    add_family(link.crm)
    sync_pair(link)
    link.crm.execute("update users set name = 'crm'")
    link.billing.execute("update users set name = 'billing'")
    sync_pair(link)
    assert equal(link)
    assert link.crm.rows("select name from users") == [("billing",)]
    logged = link.billing.rows(
        "select kind, winner, local_row ->> 'name', remote_row ->> 'name', resolved_at is not null"
        " from sync.sync_conflicts"
    )
    assert logged == [("update_update", "billing", "billing", "crm", True)]


def test_a_record_that_the_target_refuses_fails_alone(link: Pair) -> None:
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    for account in range(1, 6):
        add_family(link.crm, account)
    link.crm.execute("update users set age = 3 where id = 30")
    sync_pair(link)
    assert [row[0] for row in link.billing.rows("users")] == [10, 20, 40, 50]
    failures = link.crm.rows(
        "select table_name, record_id, error_class, state from sync.sync_failures order by 1"
    )
    assert failures == [
        ("orders", "300", "23503", "retrying"),
        ("users", "30", "23514", "retrying"),
    ]
    assert link.crm.pending() == 0

    link.crm.execute("update users set age = 33 where id = 30")
    sync_pair(link)
    link.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(link)
    assert equal(link)
    assert link.crm.rows("select * from sync.sync_failures") == []
