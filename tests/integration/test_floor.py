"""The floor below which polls do not look: it saves them from dead rows and never hides an event."""

from collections.abc import Iterator

import pytest

from sync_pipeline import link, passes
from sync_pipeline.link import Link, lead
from tests.engine import equal, installed
from tests.helpers import Pair

MANY = 6000


@pytest.fixture
def led(pair: Pair) -> Iterator[Link]:
    config = installed(pair)
    with lead(config) as opened:
        passes.run(opened)
        yield opened


def many(pair: Pair, first: int = 1) -> None:
    pair.crm.execute(
        "insert into accounts select g, 'name' from generate_series(%s::int, %s::int) as g",
        first,
        first + MANY - 1,
    )


def drain(led: Link) -> None:
    while any(report.did_something for report in passes.run(led)):
        pass


def test_the_floor_rises_over_what_was_consumed(pair: Pair, led: Link) -> None:
    many(pair)
    drain(led)
    passes.run(led)
    assert led.sides["crm"].floor == MANY
    assert MANY > link.WORTHWHILE_ROWS


def test_the_floor_waits_for_transactions_that_may_still_hold_an_early_id(
    pair: Pair, led: Link
) -> None:
    with pair.crm.connect(autocommit=False) as late:
        late.execute("insert into accounts values (0, 'late')")
        many(pair)
        drain(led)
        passes.run(led)
        assert led.sides["crm"].floor == 0
        late.commit()
    drain(led)
    assert equal(pair, ("accounts",))
    passes.run(led)
    assert led.sides["crm"].floor > 0


def test_the_floor_waits_for_a_transaction_that_began_after_the_last_one_that_ended(
    pair: Pair, led: Link
) -> None:
    """Which a snapshot does not name: for it, what no later one has ended before has not begun."""
    with pair.crm.connect(autocommit=False) as one, pair.crm.connect(autocommit=False) as late:
        one.execute("select pg_current_xact_id()")
        late.execute("insert into accounts values (0, 'late')")
        one.execute("insert into accounts values (-1, 'one')")
        one.commit()
        drain(led)
        pair.crm.insert("accounts", id=-2, name="more")
        drain(led)
        late.commit()
    drain(led)
    assert equal(pair, ("accounts",))


def test_a_poll_reads_nothing_below_the_floor_while_an_old_snapshot_is_held(
    pair: Pair, led: Link
) -> None:
    with pair.crm.connect(autocommit=False) as old:
        old.execute("set transaction isolation level repeatable read")
        old.execute("select 1")
        many(pair)
        drain(led)
        passes.run(led)
        assert led.sides["crm"].floor == MANY
        plan = "\n".join(
            row[0]
            for row in pair.crm.rows(
                "explain (analyze, buffers, costs off, timing off) select sync.has_events(%s)", MANY
            )
        )
        buffers = sum(int(part.split("=")[1]) for part in plan.split() if part.startswith("hit="))
        assert buffers < 200, plan
        pair.crm.execute("update accounts set name = 'new' where id = 1")
        drain(led)
        assert equal(pair, ("accounts",))


def test_an_event_inserted_by_hand_below_the_floor_is_found_when_the_catalog_is_read_again(
    pair: Pair, led: Link
) -> None:
    many(pair)
    drain(led)
    passes.run(led)
    pair.crm.execute(
        "insert into sync.sync_events (id, table_name, record_id) values (1, 'accounts', '1')"
    )
    led.read_catalog()
    drain(led)
    assert pair.crm.pending() == 0
