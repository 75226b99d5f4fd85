"""Every crash window of the protocol, with a consumer that is really killed."""

import signal

import pytest

from tests.bookkeeping import assert_each_write_had_its_effect_once, go_on, keep_books, work
from tests.crashing import POINTS, consume
from tests.engine import installed, sync_pair
from tests.helpers import NODES, Pair, write_config
from tests.program import forked


def crash(pair: Pair, point: str, source: str = "crm") -> None:
    """Run a consumer that dies at `point` of the direction from `source`."""
    done = forked(pair, consume, point, source, "SIGKILL", SYNC_CONFIG=str(pair.config_path))
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("batch_size", [10_000, 7], ids=["one batch", "many batches"])
@pytest.mark.parametrize("point", POINTS)
def test_a_consumer_killed_in_one_direction_and_the_next_one_in_the_other(
    pair: Pair, point: str, batch_size: int
) -> None:
    """The second one dies while it recovers from the first; the applications go on before anybody does."""
    write_config(pair.config_path, batch_size=batch_size)
    keep_books(pair)
    installed(pair)
    for first, source in zip((10, 20), NODES, strict=True):
        work(pair, first)
        crash(pair, point, source)
        go_on(pair, first)
    assert_each_write_had_its_effect_once(pair, 10, 20)


@pytest.mark.parametrize("source", NODES)
def test_a_batch_committed_but_not_acknowledged_is_not_applied_twice(
    pair: Pair, source: str
) -> None:
    installed(pair)
    here, there = pair.nodes if source == "crm" else pair.nodes[::-1]
    here.insert("accounts", id=1, name="first")
    crash(pair, "after the target's commit", source)
    assert here.pending() == 1
    assert len(there.rows("select * from sync.sync_applied")) == 1
    # Applied again, this delete's record would come back; taken for a conflict, it would be logged.
    there.execute("delete from accounts where id = 1")
    sync_pair(pair)
    for node in pair.nodes:
        assert node.rows("select * from sync.sync_conflicts") == []
        assert node.rows("accounts") == []


def test_a_failure_retried_but_not_acknowledged_is_no_change_that_the_target_does_not_know(
    pair: Pair,
) -> None:
    write_config(pair.config_path, [{"name": "accounts", "conflict": "crm"}])
    installed(pair)
    pair.billing.execute("alter table accounts add constraint no_x check (name <> 'x')")
    pair.crm.insert("accounts", id=1, name="x")
    sync_pair(pair)
    pair.billing.execute("alter table accounts drop constraint no_x")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    crash(pair, "after the target's commit")
    assert len(pair.crm.rows("select from sync.sync_failures")) == 1
    pair.billing.execute("update accounts set name = 'newer'")
    sync_pair(pair)
    for node in pair.nodes:
        assert node.rows("select * from sync.sync_conflicts") == []
        assert node.rows("select * from sync.sync_failures") == []
        assert node.rows("select name from accounts") == [("newer",)]


def test_a_held_record_that_became_equal_is_settled_though_nobody_acknowledged(pair: Pair) -> None:
    write_config(pair.config_path, [{"name": "accounts", "conflict": "hold"}, "users", "orders"])
    installed(pair)
    for node in pair.nodes:
        node.insert("accounts", id=1, name=node.name)
    sync_pair(pair)
    assert len(pair.billing.rows("select from sync.sync_conflicts where winner is null")) == 1
    pair.billing.execute("update accounts set name = 'crm'")
    crash(pair, "after the target's commit", "billing")
    sync_pair(pair)
    assert pair.billing.rows("select winner from sync.sync_conflicts") == [("billing",)]
    assert [n.rows("select * from sync.sync_failures") for n in pair.nodes] == [[], []]


def test_events_whose_ids_come_back_after_a_restore_are_not_taken_for_applied(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    crash(pair, "after the target's commit")
    # The source is restored to a state before the crash: its sequence hands out the same id again.
    pair.crm.execute("delete from sync.sync_events")
    pair.crm.execute("alter table sync.sync_events alter id restart with 1")
    pair.crm.insert("accounts", id=2, name="second")
    sync_pair(pair)
    assert [row[0] for row in pair.billing.rows("accounts")] == [1, 2]
