"""Where many changes of the target's own wait, batches are checked against a copy of them: it hides none."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from unittest import mock

import pytest

from sync_pipeline import waiting
from sync_pipeline.applier import Applier
from sync_pipeline.batch import Batch
from sync_pipeline.waiting import Dirty, Waiting
from tests.crashing import Point
from tests.engine import equal, installed, sync_pair
from tests.helpers import Node, Pair, write_config
from tests.shapes import link

ACCOUNTS = 12
SHARED = (5, 6, 7, 8)
pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def _any_number_is_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WORTHWHILE_EVENTS", 0)


@pytest.fixture
def pair(pair: Pair) -> Pair:
    """A link that sends one event in a batch, with accounts on both nodes."""
    write_config(pair.config_path, batch_size=1)
    installed(pair)
    pair.crm.execute(
        "insert into accounts select i, 'first' from generate_series(1, %s) as i", ACCOUNTS
    )
    sync_pair(pair)
    return pair


@contextmanager
def copies() -> Iterator[list[int]]:
    """The ids up to which events are copied in a `with` block."""
    found: list[int] = []
    copy = Waiting._copy

    def noted(self: Waiting, up_to: int) -> None:
        found.append(up_to)
        copy(self, up_to)

    with mock.patch.object(Waiting, "_copy", noted):
        yield found


@contextmanager
def at_find(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something when the first check of a batch is over for the nth time."""
    finds = 0

    def count() -> bool:
        nonlocal finds
        finds += 1
        if finds == number:
            action()
        return finds >= number

    with Point("after", Waiting, "find").struck_by(count):
        yield
    assert finds == number


def rename(node: Node, *ids: int) -> None:
    for each in ids:
        node.execute("update accounts set name = %s where id = %s", node.name, each)


def conflicts(pair: Pair) -> list[tuple[str, str]]:
    """Which records were in conflict, and who won."""
    return [
        row
        for node in pair.nodes
        for row in node.rows(
            "select record_id, winner from sync.sync_conflicts order by record_id::int"
        )
    ]


def test_conflicts_are_found_in_the_copy(pair: Pair) -> None:
    rename(pair.crm, 1, 2, 3, 4, *SHARED)
    rename(pair.billing, *SHARED, 9, 10, 11, 12)

    with copies() as found:
        sync_pair(pair)

    assert found
    assert equal(pair)
    assert conflicts(pair) == [(str(number), "billing") for number in SHARED]


@pytest.mark.parametrize(
    ("changed", "found"),
    [pytest.param((1, 1), [1, 1, 0], id="the same"), pytest.param((1, 2), [1, 1], id="others")],
)
def test_a_look_is_repeated_where_the_batch_before_has_settled_the_same_record(
    pair: Pair, changed: tuple[int, ...], found: list[int]
) -> None:
    rename(pair.billing, 1, 2)
    for number, each in enumerate(changed):
        pair.crm.execute("update accounts set name = %s where id = %s", f"crm {number}", each)
    looks: list[int] = []
    both_have_looked = threading.Event()
    find, finish = Waiting.find, Batch.finish

    def counted(self: Waiting, applier: Applier) -> list[Dirty]:
        dirty = find(self, applier)
        looks.append(len(dirty))
        if len(looks) == 2:
            both_have_looked.set()
        return dirty

    def held(self: Batch) -> None:
        assert both_have_looked.wait(20)
        finish(self)

    with mock.patch.object(Waiting, "find", counted), mock.patch.object(Batch, "finish", held):
        sync_pair(pair)

    assert looks[: len(found)] == found
    assert equal(pair)
    assert conflicts(pair) == [(str(number), "crm") for number in sorted(set(changed))]


def test_a_copy_is_made_in_several_parts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_EVENTS", 2)
    monkeypatch.setattr(waiting, "WORTHWHILE_EVENTS", 1)
    rename(pair.crm, 1, 2, 3, 4, *SHARED)
    rename(pair.billing, *SHARED, 9, 10, 11, 12)
    with copies() as found:
        sync_pair(pair)
    assert len(set(found)) > 2
    assert equal(pair)
    assert conflicts(pair) == [(str(number), "billing") for number in SHARED]


def test_a_change_after_the_copy_is_found(pair: Pair) -> None:
    rename(pair.billing, 12)
    rename(pair.crm, 1, 2, 3, 4)
    with copies() as found, at_find(2, lambda: rename(pair.billing, 4)):
        sync_pair(pair)
    assert found
    assert equal(pair)
    assert conflicts(pair) == [("4", "billing")]


def test_a_transaction_that_has_an_earlier_id_keeps_the_copy_from_passing_it(pair: Pair) -> None:
    with pair.billing.connect(autocommit=False) as late:
        late.execute("update accounts set name = 'late' where id = 4")
        rename(pair.billing, 12)
        rename(pair.crm, 1, 2, 3, 4)
        with at_find(3, late.commit):
            sync_pair(pair)
    assert equal(pair)
    assert [record for record, _ in conflicts(pair)] == ["4"]


def test_an_earlier_id_that_commits_between_the_two_checks_of_a_batch_is_found(pair: Pair) -> None:
    with pair.billing.connect(autocommit=False) as late:
        late.execute("update accounts set name = 'late' where id = 1")
        rename(pair.billing, 12)
        rename(pair.crm, 1, 2)
        with at_find(1, late.commit):
            sync_pair(pair)
    assert equal(pair)
    assert [record for record, _ in conflicts(pair)] == ["1"]


def test_the_copy_grows_with_what_the_application_goes_on_writing(pair: Pair) -> None:
    rename(pair.crm, *range(1, ACCOUNTS + 1))
    rename(pair.billing, 1)
    others = iter(range(2, ACCOUNTS + 1))

    def write() -> bool:
        rename(pair.billing, *islice(others, 1))
        return False

    with copies() as found, Point("after", Waiting, "find").struck_by(write):
        sync_pair(pair)

    assert len(set(found)) > 2
    assert equal(pair)
    assert len(conflicts(pair)) == ACCOUNTS


def test_an_event_that_an_operator_deletes_is_no_change_any_more(pair: Pair) -> None:
    rename(pair.crm, 1, 2, 3, 4)
    rename(pair.billing, 4)
    deleted = "delete from sync.sync_events where record_id = '4'"
    with copies() as found, at_find(2, lambda: pair.billing.execute(deleted)):
        sync_pair(pair)
    assert found
    assert conflicts(pair) == []
    assert pair.billing.rows("select name from accounts where id = 4") == [("crm",)]


def test_a_parent_brought_along_is_looked_for_in_the_copy(pair: Pair) -> None:
    """Its number is not among those that the first check saw."""
    rename(pair.billing, 11)
    pair.billing.execute("delete from accounts where id = 12")
    rename(pair.crm, 1, 2)
    pair.crm.insert("users", id=1, account_id=12, email="1@x.org")
    sync_pair(pair)
    assert equal(pair)
    assert pair.billing.rows("select id from accounts where id = 12") == [(12,)]
    assert [row[:2] for row in conflicts(pair)] == [("12", "crm")]


def test_keys_with_several_spellings_are_compared_by_their_values(pair: Pair) -> None:
    link(pair, "create table spans (k interval primary key, word text)", "spans", batch_size=1)
    with copies() as found:
        for number in (1, 2, 3):
            pair.crm.execute("insert into spans values (make_interval(hours => %s), 'crm')", number)
        pair.billing.execute("insert into spans values ('180 minutes', 'billing')")
        sync_pair(pair)
    assert found
    assert equal(pair, ("spans",))
    assert [len(node.rows("select from sync.sync_conflicts")) for node in pair.nodes] == [0, 1]


def test_keys_longer_than_an_index_takes_are_copied(pair: Pair) -> None:
    link(pair, "create table blobs (k bytea primary key, word text)", "blobs", batch_size=1)
    # Random bytes, which are not compressed.
    key = "(select string_agg(sha256(i::text::bytea), '') from generate_series(1, 60) as i)"
    pair.crm.execute(f"insert into blobs values ('a', 'crm'), ({key}, 'crm')")
    pair.billing.execute(f"insert into blobs values ({key}, 'billing')")
    with copies() as found:
        sync_pair(pair)
    assert found
    assert equal(pair, ("blobs",))
    assert len(pair.billing.rows("select from sync.sync_conflicts")) == 1
