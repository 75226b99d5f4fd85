"""Verify finds every difference, and accuses no record that live traffic or a pending change explains."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from sync_pipeline import comparison, stream, verify
from sync_pipeline.comparison import Bucket, Record, Side
from sync_pipeline.database import connected
from sync_pipeline.errors import ConfigurationError, NotInstalled, SyncPipelineError
from tests import shapes
from tests.engine import accused, config_of, equal, installed, repaired, sync_pair, verified
from tests.helpers import Node, Pair, encoded

pytestmark = pytest.mark.core

ROWS = 5000
ITEMS = "create table items (id bigint primary key, name text, note text, amount numeric)"


def silently(node: Node, statement: str) -> None:
    """Change rows with triggers off, as a restore or a careless administrator does: nothing is marked."""
    with node.connection.transaction():
        node.execute("set local session_replication_role = replica")
        node.execute(statement)


def on_both(pair: Pair, statement: str) -> None:
    for node in pair.nodes:
        silently(node, statement)


@pytest.fixture
def items(pair: Pair) -> Pair:
    """A table of 5000 equal rows on both nodes, the pipeline installed, nothing pending."""
    shapes.link(pair, ITEMS, "items")
    on_both(
        pair,
        "insert into items select i, 'name ' || i, nullif('note ' || i % 10, 'note 0'), i / 4.0 "
        f"from generate_series(1, {ROWS}) as i",
    )
    return pair


def test_tables_can_be_compared_and_repaired_while_another_one_is_missing(pair: Pair) -> None:
    config = installed(pair)
    pair.billing.execute("alter table orders rename to away")
    silently(pair.crm, "insert into accounts (id, name) values (1, 'one')")

    assert accused(verified(pair, "accounts").tables["accounts"]) != {}
    assert repaired(pair, "crm", "accounts") == 1
    stream.sync(config)
    assert verified(pair, "accounts").equal
    with pytest.raises(SyncPipelineError, match=r"orders.*does not exist"):
        verified(pair)


def test_equal_tables_are_equal_and_their_rows_are_counted(items: Pair) -> None:
    report = verified(items)

    assert report.equal
    assert report.tables["items"].rows == {"crm": ROWS, "billing": ROWS}
    assert accused(report.tables["items"]) == {}


def test_empty_tables_and_a_table_that_is_empty_on_one_node_compare(pair: Pair) -> None:
    installed(pair)
    assert verified(pair).equal
    silently(pair.billing, "insert into accounts values (1, 'a')")

    report = verified(pair, "accounts")

    assert list(report.tables) == ["accounts"]
    assert accused(report.tables["accounts"]) == {"missing on crm": ["1"]}


# Differences, each of them on records of its own, and what must be said of them.
SEEDS = {
    "a row that billing lacks": ("billing", "delete from items where id = 1000"),
    "a row that crm lacks": ("crm", "delete from items where id = 1001"),
    "the first row, missing": ("billing", "delete from items where id = 1"),
    "the last row, changed": ("crm", f"update items set name = 'x' where id = {ROWS}"),
    "a row beyond the other's greatest key": ("billing", "insert into items values (999999, 'x')"),
    "a row before the other's least key": ("crm", "insert into items values (-5, 'x')"),
    "a changed value": ("billing", "update items set name = 'other' where id = 2000"),
    "a null against a value": ("crm", "update items set note = null where id = 2001"),
    "a null against an empty text": ("crm", "update items set note = '' where id = 2010"),
    "a blank at the end": ("billing", "update items set name = name || ' ' where id = 2002"),
    "a scale of a number": ("crm", "update items set amount = 501.0 where id = 2004"),
    "the last field": ("billing", "update items set amount = 0.1 where id = 2003"),
    "a value that moved to the next field": (
        "crm",
        "update items set name = 'name 2005,note 5', note = null where id = 2005",
    ),
}  # fmt: skip
FOUND = {
    "missing on billing": ["-5", "1", "1000"],
    "missing on crm": ["1001", "999999"],
    "different": ["2000", "2001", "2002", "2003", "2004", "2005", "2010", "5000"],
}


@pytest.fixture
def seeded(items: Pair) -> Pair:
    for node, statement in SEEDS.values():
        silently(getattr(items, node), statement)
    return items


@pytest.fixture
def swapped(items: Pair) -> tuple[str, str]:
    """Two records of one bucket that have swapped their values on crm."""
    bucket = f'hashtextextended(id::text collate "C", 0) & {comparison.BUCKETS - 1}'
    one, two = items.crm.rows(
        "select min(id), max(id) from items where id between 3000 and 4999 "
        f"group by {bucket} having count(*) = 2 limit 1"
    )[0]
    silently(
        items.crm,
        "update items as t set name = o.name, note = o.note, amount = o.amount from items as o "
        f"where t.id in ({one}, {two}) and o.id = {one} + {two} - t.id",
    )
    return str(one), str(two)


def test_every_seeded_difference_is_found_and_nothing_else(
    seeded: Pair, swapped: tuple[str, str]
) -> None:
    report = verified(seeded)

    table = report.tables["items"]
    assert not report.equal
    assert accused(table) == FOUND | {"different": sorted([*FOUND["different"], *swapped])}
    assert table.rows == {"crm": ROWS, "billing": ROWS - 1}
    assert table.missing_count == {"crm": 2, "billing": 3}
    assert table.different_count == 10


# --- mutants: a checker that is broken must not pass the test above ---


def _hashing(text: LiteralString) -> property:
    def row_text(side: Side) -> sql.Composed:
        columns = [sql.Identifier(column.name) for column in side.relation.columns.values()]
        return sql.SQL(text).format(*columns)

    return property(row_text)


_merge = verify._merge


Merged = Generator[tuple[Record, Record], None, None]


def _without_a_bucket(first: Side, second: Side, buckets: list[int]) -> Merged:
    yield from _merge(first, second, buckets[1:])


def _until_one_side_ends(first: Side, second: Side, buckets: list[int]) -> Merged:
    rows = list(_merge(first, second, buckets))
    while rows and None in {rows[-1][0].digest, rows[-1][1].digest}:
        rows.pop()
    yield from rows


def _of_both_sides(first: Side, second: Side, buckets: list[int]) -> Merged:
    yield from (row for row in _merge(first, second, buckets) if row[0].digest and row[1].digest)


MUTANTS: dict[str, tuple[object, str, object]] = {
    "the last field is not hashed": (Side, "_row_text", _hashing("row({0}, {1}, {2})::text")),
    "the id is not hashed": (Side, "_row_text", _hashing("row({1}, {2}, {3})::text")),
    "null is taken for ''": (
        Side,
        "_row_text",
        _hashing("row({0}, {1}, coalesce({2}, ''), {3})::text"),
    ),
    "fields run into each other": (
        Side,
        "_row_text",
        _hashing("concat_ws(',', {0}, {1}, {2}, {3})"),
    ),
    "blanks at the end are cut": (
        Side,
        "_row_text",
        _hashing("row({0}, rtrim({1}), {2}, {3})::text"),
    ),
    "numbers are compared by value": (
        Side,
        "_row_text",
        _hashing("row({0}, {1}, {2}, trim_scale({3}))::text"),
    ),
    "only rows are counted": (Bucket, "equals", lambda one, two: one.compared == two.compared),
    "only a greater sum differs": (
        Bucket,
        "equals",
        lambda one, two: int(one.first_sum or 0) >= int(two.first_sum or 0),
    ),
    "a bucket is left out": (verify, "_merge", _without_a_bucket),
    "the merge ends with the shorter side": (verify, "_merge", _until_one_side_ends),
    "only rows that both have are compared": (verify, "_merge", _of_both_sides),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_checker_does_not_find_what_was_seeded(
    mutant: str, seeded: Pair, swapped: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, broken = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, broken)

    found = accused(verified(seeded).tables["items"])

    assert found != FOUND | {"different": sorted([*FOUND["different"], *swapped])}


# --- what is pending is left out, and nothing is accused at first sight ---


def test_records_that_wait_were_refused_or_are_held_are_left_out_and_counted(items: Pair) -> None:
    items.crm.execute("update items set name = 'new' where id = 1")
    items.billing.execute("delete from items where id = 2")
    items.crm.execute("insert into items values (6000, 'new')")
    silently(items.billing, "update items set name = 'refused' where id = 3")
    items.crm.execute(
        "insert into sync.sync_failures (table_name, record_id, error_class, error, state) "
        "values ('items', '3', '23514', 'refused', 'dead')"
    )
    silently(items.crm, "update items set name = 'held' where id = 4")
    items.billing.execute(
        "insert into sync.sync_conflicts (table_name, record_id, kind) values ('items', '4', 'update_update')"
    )
    silently(items.crm, "update items set name = 'drift' where id = 5")

    table = verified(items).tables["items"]

    assert accused(table) == {"different": ["5"]}
    assert table.pending == 5


def test_an_event_of_another_table_hides_nothing(items: Pair) -> None:
    silently(items.crm, "update items set name = 'drift' where id = 5")
    items.crm.execute("insert into sync.sync_events (table_name, record_id) values ('other', '5')")

    assert accused(verified(items).tables["items"]) == {"different": ["5"]}


@contextmanager
def before_look(
    monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]
) -> Iterator[list[int]]:
    """Do something just before each further look; yields how many records each look asked for."""
    original = Side.look
    waiting = list(actions)
    looks: list[int] = []

    def look(side: Side, record_ids: list[str]) -> dict[str, Record]:
        if side.relation.node == "crm":
            looks.append(len(record_ids))
            if waiting:
                waiting.pop(0)()
        return original(side, record_ids)

    with monkeypatch.context() as patch:
        patch.setattr(Side, "look", look)
        yield looks


def test_a_difference_that_is_gone_at_the_next_look_is_not_accused(
    items: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    silently(items.crm, "update items set name = 'new' where id = 7")

    def arrive() -> None:
        silently(items.billing, "update items set name = 'new' where id = 7")

    with before_look(monkeypatch, arrive) as looks:
        report = verified(items)

    assert report.equal
    assert looks == [1]


def test_a_difference_that_is_pending_at_the_next_look_is_not_accused(
    items: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    silently(items.crm, "update items set name = 'new' where id = 7")

    with before_look(
        monkeypatch, lambda: items.billing.execute("update items set note = 'z' where id = 7")
    ):
        report = verified(items)

    assert report.equal
    assert report.tables["items"].pending == 1


def test_a_difference_that_changes_from_look_to_look_is_accused_once_it_stays(
    items: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    silently(items.crm, "update items set name = 'drift' where id = 7")

    def change(value: int) -> Callable[[], object]:
        return lambda: silently(items.crm, f"update items set name = 'n{value}' where id = 7")

    with before_look(monkeypatch, change(1), change(2)) as looks:
        report = verified(items)
    assert accused(report.tables["items"]) == {"different": ["7"]}
    assert looks == [1, 1, 1]

    with before_look(monkeypatch, *map(change, range(20))) as looks:
        report = verified(items)
    assert report.equal
    assert report.tables["items"].pending == 1
    assert len(looks) == verify.LOOKS


def test_live_traffic_is_never_accused_and_drift_below_it_is_always_found(items: Pair) -> None:
    silently(items.crm, "update items set name = 'drift' where id = 4000")
    config = config_of(items)
    stop = threading.Event()

    def write(node: Node, first: int) -> None:
        with node.connect() as session:
            number = 0
            while not stop.is_set():
                number += 1
                key = first + number % 40
                session.execute("update items set name = %s where id = %s", [f"w{number}", key])
                session.execute("delete from items where id = %s", [first + number % 7 + 100])
                session.execute(
                    "insert into items values (%s, 'back') on conflict do nothing",
                    [first + (number + 3) % 7 + 100],
                )

    threads = [
        threading.Thread(target=stream.stream, args=(config, stop)),
        threading.Thread(target=write, args=(items.crm, 0)),
        threading.Thread(target=write, args=(items.billing, 500)),
    ]
    for thread in threads:
        thread.start()
    try:
        reports = [verified(items) for _ in range(20)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert [accused(report.tables["items"]) for report in reports] == [{"different": ["4000"]}] * 20
    sync_pair(items)
    assert accused(verified(items).tables["items"]) == {"different": ["4000"]}


# --- tables of every shape ---


def test_names_and_columns_may_differ_and_excluded_columns_are_ignored(pair: Pair) -> None:
    shapes.link(
        pair,
        (
            'create schema "S"; create table "S"."In %s" ("Key" int primary key, total int, own int)',
            "create table invoice (own text, amount bigint, id bigint primary key)",
        ),
        {
            "name": "invoices",
            "crm": {"table": ["S", "In %s"], "columns": {"id": "Key", "amount": "total"}},
            "billing": {"table": "invoice"},
            "exclude": ["own"],
        },
    )
    silently(pair.crm, """insert into "S"."In %s" values (1, 10, 1), (2, 20, 2)""")
    silently(pair.billing, "insert into invoice values ('a', 10, 1), ('b', 21, 2)")

    assert accused(verified(pair).tables["invoices"]) == {"different": ["2"]}


def test_columns_of_different_types_are_compared_by_what_both_can_hold(pair: Pair) -> None:
    shapes.link(
        pair,
        (
            "create table items (id int primary key, c char(5), n numeric(8, 2), d date, j json, i int, f float)",
            "create table items (id int8 primary key, c text, n numeric(9,4), d timestamp, j jsonb, i numeric, f real)",
        ),
        "items",
    )
    on_both(
        pair,
        """insert into items values (1, 'ab', 1.5, '2024-02-29', '{"b": 1,"a": 2}', 7, 0.25)""",
    )
    on_both(pair, "insert into items values (2, 'ab', 1.5, '2024-02-29', '1', 7, 0.25)")
    assert verified(pair).equal

    for column, value in {
        "c": "'abc'", "n": "1.51", "d": "'2024-03-01'", "j": "'2'", "i": "8", "f": "0.5",
    }.items():  # fmt: skip
        before = pair.billing.value(f"select {column}::text from items where id = 2")
        silently(pair.billing, f"update items set {column} = {value} where id = 2")
        assert accused(verified(pair).tables["items"]) == {"different": ["2"]}, column
        silently(pair.billing, f"update items set {column} = '{before}' where id = 2")


def test_a_record_that_only_the_receiver_of_a_one_way_table_has_is_missing_on_the_source(
    pair: Pair,
) -> None:
    shapes.link(pair, ITEMS, {"name": "items", "source": "billing"})
    silently(pair.crm, "insert into items values (1, 'extra'), (2, 'same'), (3, 'changed')")
    silently(pair.billing, "insert into items values (2, 'same'), (3, 'x'), (4, 'new')")

    assert accused(verified(pair).tables["items"]) == {
        "missing on billing": ["1"],
        "missing on crm": ["4"],
        "different": ["3"],
    }


def test_a_record_whose_row_is_outside_of_its_nodes_condition_is_not_compared(pair: Pair) -> None:
    shapes.link(pair, ITEMS, {"name": "items", "where": {"crm": "name <> 'draft' and amount > 0"}})
    silently(
        pair.crm,
        "insert into items (id, name, amount) values "
        "(1, 'draft', 1), (2, 'draft', 1), (3, 'sent', 1), (4, null, 1), (5, 'sent', 1)",
    )
    silently(
        pair.billing,
        "insert into items (id, name, amount) values (2, 'sent before', 1), (3, 'x', 1), (6, 'draft', 1)",
    )

    table = verified(pair).tables["items"]

    assert accused(table) == {
        "missing on billing": ["5"],
        "missing on crm": ["6"],
        "different": ["3"],
    }
    assert table.rows == {"crm": 5, "billing": 3}


def test_a_partitioned_table_is_compared_with_a_plain_one(pair: Pair) -> None:
    plain = "create table items (id int primary key, name text)"
    parts = (
        "create table items (id int primary key, name text) partition by range (id); "
        "create table items_low partition of items for values from (minvalue) to (100); "
        "create table items_high partition of items for values from (100) to (maxvalue)"
    )
    shapes.link(pair, (plain, parts), "items")
    on_both(pair, "insert into items select i, 'n' from generate_series(1, 200) as i")
    assert verified(pair).equal
    silently(pair.billing, "update items_high set name = 'x' where id = 100")

    assert accused(verified(pair).tables["items"]) == {"different": ["100"]}


def test_composite_and_textual_keys_are_compared_whatever_their_text(pair: Pair) -> None:
    names = ["a", "A", "ä", "Z", "z z", "é", "\U0001f600", "\uffff", 'q"\\', "tab\there", "%s", ""]
    shapes.link(pair, "create table items (a text, b int, v int, primary key (a, b))", "items")
    for node in pair.nodes:
        for number, name in enumerate(names):
            with node.connection.transaction():
                node.execute("set local session_replication_role = replica")
                node.execute("insert into items values (%s, %s, 0)", name, number)
    assert verified(pair).equal
    silently(pair.crm, "update items set v = 1")
    silently(pair.billing, "delete from items where b % 2 = 0")

    table = verified(pair).tables["items"]

    assert table.different_count == 6
    assert table.missing_count == {"crm": 0, "billing": 6}
    assert repaired(pair, "billing") == 12
    sync_pair(pair)
    assert equal(pair, ("items",))
    assert len(pair.crm.rows("items")) == 6


@pytest.fixture
def latin(pair: Pair) -> Iterator[Pair]:
    """The pair with billing in a database of another encoding and another collation."""
    with encoded(pair, crm="utf8", billing="latin1") as latin:
        yield latin


def test_databases_of_different_encodings_are_compared_by_their_characters(latin: Pair) -> None:
    shapes.link(latin, "create table items (id text primary key, name text)", "items")
    on_both(latin, "insert into items select chr(i), 'é' || i from generate_series(192, 255) as i")
    on_both(latin, "insert into items select chr(i), 'é' || i from generate_series(65, 90) as i")
    assert verified(latin).equal
    silently(latin.crm, "update items set name = 'è' where id in ('À', 'B')")
    silently(latin.billing, "delete from items where id in ('ÿ', 'A')")

    assert accused(verified(latin).tables["items"]) == {
        "missing on billing": ["A", "ÿ"],
        "different": ["B", "À"],
    }


# --- the report, and errors ---


def test_lists_are_bounded_and_counts_are_not(items: Pair) -> None:
    silently(items.crm, "update items set name = 'x' where id <= 3000")
    silently(items.billing, "delete from items where id > 3500")

    table = verified(items).tables["items"]

    assert (len(table.different), table.different_count) == (verify.LISTED, 3000)
    assert (len(table.missing["billing"]), table.missing_count["billing"]) == (verify.LISTED, 1500)
    assert repaired(items, "crm") == 4500
    sync_pair(items)
    assert verified(items).equal


CHECKER = """
import resource
from sync_pipeline import config, database, verify
loaded = config.load()
with database.connected(loaded.first, loaded, "verify") as crm:
    with database.connected(loaded.second, loaded, "verify") as billing:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        table = verify.verify(loaded, {"crm": crm, "billing": billing}, ["items"]).tables["items"]
        print(table.different_count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_stays_small_when_every_record_differs(pair: Pair) -> None:
    shapes.link(pair, ITEMS, "items")
    on_both(pair, "insert into items select i, 'n' from generate_series(1, 200000) as i")
    silently(pair.crm, "update items set name = 'x'")

    checked = subprocess.run(
        [sys.executable, "-c", CHECKER],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **pair.environment, "SYNC_CONFIG": str(pair.config_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )

    different, growth_mb = map(int, checked.stdout.split())
    assert different == 200_000
    # Their ids and hashes alone are 60 MB as Python objects.
    assert growth_mb < 25


def test_progress_hears_of_every_table(pair: Pair) -> None:
    config = installed(pair)
    heard: list[tuple[str, int]] = []
    silently(pair.crm, "insert into accounts values (1, 'a'), (2, 'b')")
    with (
        connected(config.first, config, "verify") as crm,
        connected(config.second, config, "verify") as billing,
    ):
        verify.verify(
            config,
            {"crm": crm, "billing": billing},
            progress=lambda table, rows: heard.append((table, rows)),
        )
        # Nothing of the comparison stays behind on the connections.
        assert crm.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        crm.execute("create temporary table writable (id int)")

    assert heard == [("accounts", 2), ("users", 0), ("orders", 0)]


def test_a_comparison_that_is_interrupted_leaves_both_connections_free(
    items: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    silently(items.crm, "update items set name = repeat('long ', 1000)")
    config = config_of(items)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        connected(config.first, config, "verify") as crm,
        connected(config.second, config, "verify") as billing,
    ):
        for owner, name in ((verify.Spool, "add"), (Bucket, "equals"), (Side, "look")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    verify.verify(config, {"crm": crm, "billing": billing})
            for connection in (crm, billing):
                idle = psycopg.pq.TransactionStatus.IDLE
                assert connection.info.transaction_status == idle, name
                assert connection.execute("select 1").fetchone() == (1,)


def test_an_unknown_table_and_a_node_without_the_pipeline_are_refused(pair: Pair) -> None:
    with pytest.raises(NotInstalled):
        verified(pair)
    installed(pair)
    with pytest.raises(ConfigurationError, match="nobody"):
        verified(pair, "nobody")


# --- repair ---


@pytest.mark.parametrize("node", ["crm", "billing"])
def test_repair_makes_the_other_node_like_this_one_by_the_ordinary_pass(
    seeded: Pair, node: str
) -> None:
    source, target = (seeded.crm, seeded.billing) if node == "crm" else (seeded.billing, seeded.crm)
    wanted = source.rows("items")

    assert repaired(seeded, node, dry_run=True) == 13
    assert source.pending() == 0
    assert repaired(seeded, node) == 13

    assert (source.pending(), target.pending()) == (13, 0)
    sync_pair(seeded)
    assert source.rows("items") == wanted
    assert shapes.texts(seeded.crm, "items") == shapes.texts(seeded.billing, "items")
    assert verified(seeded).equal


def test_a_repair_sends_the_row_of_its_time_and_never_an_older_one(items: Pair) -> None:
    silently(items.crm, "update items set name = 'drift' where id in (1, 2)")
    assert repaired(items, "crm") == 2
    items.crm.execute("update items set name = 'later' where id = 1")
    items.crm.execute("delete from items where id = 2")

    sync_pair(items)

    assert items.billing.rows("select id, name from items where id < 3") == [(1, "later")]
    assert verified(items).equal


def test_families_are_repaired_whatever_the_order_of_their_tables(pair: Pair) -> None:
    installed(pair)
    silently(pair.crm, "insert into accounts values (1, 'a')")
    silently(pair.crm, "insert into users values (10, 1, 'u@x.org')")
    silently(pair.crm, "insert into orders values (100, 10, 5)")
    silently(pair.billing, "insert into accounts values (2, 'b')")
    silently(pair.billing, "insert into users values (20, 2, 'v@x.org')")

    assert repaired(pair, "crm") == 5
    sync_pair(pair)

    assert equal(pair)
    assert [row[0] for row in pair.billing.rows("accounts")] == [1]


def test_a_table_is_repaired_only_from_a_node_that_sends_it(pair: Pair) -> None:
    shapes.link(pair, ITEMS, {"name": "items", "source": "billing"}, "accounts")
    silently(pair.crm, "insert into items values (1, 'extra')")
    silently(pair.crm, "insert into accounts values (1, 'a')")

    with pytest.raises(SyncPipelineError, match="items is not sent from crm"):
        repaired(pair, "crm")
    assert pair.crm.pending() == 0

    assert repaired(pair, "billing") == 2
    sync_pair(pair)
    assert pair.crm.rows("items") == []
    assert verified(pair).equal


def test_equal_databases_need_no_repair(items: Pair) -> None:
    assert repaired(items, "crm") == 0
    assert items.crm.pending() == 0
