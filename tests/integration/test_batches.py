"""Both nodes work on the same families while batches are small: they end equal, nothing fails, nothing new is lost."""

import tempfile

import pytest

from sync_pipeline import companions, outbox, passes, snapshot
from sync_pipeline.companions import Companions
from sync_pipeline.errors import PassInterrupted
from sync_pipeline.link import lead
from tests.crashing import Point
from tests.engine import config_of, equal, sync_pair
from tests.helpers import Pair
from tests.shapes import converge, failures, link, texts

FAMILY = """
create table parents (id int primary key, name text);
create table children (id int primary key, parent int not null references parents on update cascade, word text)
"""


def filled(pair: Pair, *, batch_size: int, policy: str = "last_update_wins") -> None:
    """Four parents with two children each, on both nodes."""
    tables = ({"name": name, "conflict": policy} for name in ("children", "parents"))
    link(pair, FAMILY, *tables, batch_size=batch_size)
    pair.crm.execute("insert into parents select n, 'old' from generate_series(1, 4) as n")
    pair.crm.execute(
        "insert into children select n, (n - 1) / 2 + 1, 'old' from generate_series(1, 8) as n"
    )
    converge(pair, "parents", "children")


@pytest.mark.parametrize("batch_size", [2, 3])
def test_keys_of_parents_rotate_and_their_children_follow(pair: Pair, batch_size: int) -> None:
    filled(pair, batch_size=batch_size)
    for node in pair.nodes:
        node.execute("update parents set id = 100 where id = 1")
        for number in (2, 3, 4):
            node.execute("update parents set id = %s where id = %s", number - 1, number)
        node.execute("update parents set id = 4 where id = 100")
        converge(pair, "parents", "children")
    owners = pair.billing.rows("select id, parent from children order by id")
    assert owners == [(1, 3), (2, 3), (3, 4), (4, 4), (5, 1), (6, 1), (7, 2), (8, 2)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_nodes_change_the_key_of_one_parent_and_one_gives_it_a_child(
    pair: Pair, batch_size: int
) -> None:
    filled(pair, batch_size=batch_size)
    pair.crm.execute("update parents set id = 10 where id = 1")
    pair.billing.execute("update parents set id = 20 where id = 1")
    pair.crm.execute("update parents set id = 30 where id = 2")
    pair.billing.execute("update children set word = 'edited' where id = 3")
    pair.billing.execute("insert into children values (100, 2, 'new')")
    pair.crm.execute("update parents set name = 'edited' where id = 3")
    pair.billing.execute("update parents set id = 40 where id = 3")
    converge(pair, "parents", "children")
    assert pair.crm.rows("select parent, word from children where id = 100") == [(2, "new")]
    assert pair.crm.value("select word from children where id = 3") == "edited"


@pytest.mark.parametrize("policy", ["last_update_wins", "crm", "billing"])
def test_children_leave_a_parent_that_is_deleted_here_and_edited_there(
    pair: Pair, policy: str
) -> None:
    filled(pair, batch_size=2, policy=policy)
    pair.crm.execute("update children set parent = 2 where parent = 1")
    pair.crm.execute("delete from parents where id = 1")
    pair.billing.execute("update parents set name = 'edited' where id = 1")
    pair.billing.execute("update children set word = 'edited' where id = 1")
    pair.billing.execute("update children set parent = 3 where parent = 4")
    pair.billing.execute("delete from parents where id = 4")
    pair.crm.execute("update parents set name = 'edited' where id = 4")
    pair.crm.execute("insert into children values (50, 4, 'new')")
    converge(pair, "parents", "children")
    assert pair.billing.rows("select parent, word from children where id = 50") == [(4, "new")]


@pytest.mark.parametrize("batch_size", [2, 1000])
def test_rows_change_their_partition_on_both_nodes_and_wait_for_one_that_is_missing(
    pair: Pair, batch_size: int
) -> None:
    link(
        pair,
        """create table visits (id int, region text, word text, primary key (id, region))
            partition by list (region);
        create table visits_a partition of visits for values in ('a');
        create table visits_b partition of visits for values in ('b');
        create table notes (id int primary key, visit int not null, region text not null,
            foreign key (visit, region) references visits on update cascade)""",
        "notes",
        "visits",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into visits select n, 'a', 'x' from generate_series(1, 5) as n")
    pair.crm.execute("insert into notes select n, n, 'a' from generate_series(1, 5) as n")
    converge(pair, "visits", "notes")
    pair.crm.execute("update visits set region = 'b' where id <= 3")
    pair.billing.execute("update visits set word = 'y' where id = 4")
    pair.billing.execute("insert into visits values (9, 'b', 'z')")
    converge(pair, "visits", "notes")
    pair.billing.execute("update visits set region = case region when 'a' then 'b' else 'a' end")
    converge(pair, "visits", "notes")
    pair.crm.execute("create table visits_c partition of visits for values in ('c')")
    pair.crm.execute("update visits set region = 'c' where id = 1")
    sync_pair(pair)
    assert ("visits", "23514") in {(row[0], row[2]) for row in failures(pair.crm)}
    pair.billing.execute("create table visits_c partition of visits for values in ('c')")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "visits", "notes")


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_rows_enter_and_leave_the_conditions_of_both_nodes(pair: Pair, batch_size: int) -> None:
    link(
        pair,
        """create table papers (id int primary key, state text, word text);
        create table pages (id int primary key, paper int not null references papers on delete cascade)""",
        "pages",
        {"name": "papers", "where": {"crm": "state <> 'draft'", "billing": "state <> 'closed'"}},
        batch_size=batch_size,
    )
    pair.crm.execute(
        "insert into papers select n, case n % 2 when 0 then 'draft' else 'open' end, 'x' "
        "from generate_series(1, 6) as n"
    )
    sync_pair(pair)
    assert [row[0] for row in pair.billing.rows("papers")] == [1, 3, 5]
    pair.crm.execute("update papers set state = 'draft' where id = 1")
    pair.crm.execute("insert into pages values (1, 3), (2, 4)")
    sync_pair(pair)
    # The page of a draft waits for its paper.
    assert [row[:3] for row in failures(pair.crm)] == [("pages", "2", "23503")]
    pair.crm.execute("update papers set state = 'open'")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "papers", "pages")
    pair.billing.execute("update papers set state = 'closed', word = 'closed'")
    sync_pair(pair)
    assert {row[1] for row in pair.crm.rows("papers")} == {"open"}
    pair.billing.execute("update papers set state = 'done'")
    converge(pair, "papers", "pages")
    pair.crm.execute("delete from papers where id in (1, 3, 4)")
    converge(pair, "papers", "pages")
    assert texts(pair.billing, "pages") == []


def test_a_domain_that_is_stricter_on_the_other_side_refuses_its_records_alone(pair: Pair) -> None:
    table = "create table t (id int primary key, word domain_of_words, words domain_of_words[], doc jsonb)"
    link(
        pair,
        (
            f"create domain domain_of_words as text; {table}",
            f"create domain domain_of_words as text check (value <> 'bad'); {table}",
        ),
        "t",
        batch_size=2,
    )
    pair.crm.execute(
        """insert into t values (1, 'good', '{good}', 'null'), (2, 'bad', null, null), (3, 'good', '{bad}', '{}'),
        (4, '', '{}', '[]'), (5, null, '{NULL}', '""')"""
    )
    sync_pair(pair)
    assert [row[1:3] for row in failures(pair.crm)] == [("2", "23514"), ("3", "23514")]
    pair.crm.execute("update t set word = 'good', words = '{}' where id in (2, 3)")
    converge(pair, "t")
    # NULL, the null of JSON, '' and an empty array are four things.
    pair.billing.execute(
        "update t set doc = case when doc is null then 'null'::jsonb end, word = coalesce(word, ''), "
        "words = case when words <> '{}' then '{}'::domain_of_words[] end"
    )
    converge(pair, "t")


def test_a_batch_that_reaches_for_more_stands_before_one_with_a_key_that_is_none(
    pair: Pair,
) -> None:
    link(pair, FAMILY, "children", "parents", batch_size=2)
    pair.crm.execute("insert into parents select n, 'old' from generate_series(1, 3) as n")
    pair.crm.execute(
        "insert into children select n, (n + 1) / 2, 'old' from generate_series(1, 6) as n"
    )
    pair.crm.execute("truncate sync.sync_events")
    # The second batch needs a parent of the fourth; the third cannot be read at all.
    marks = "parents 1, children 1, children 3, children 4, children none, parents 1, parents 2, children 2"
    for mark in marks.split(", "):
        pair.crm.execute(
            "insert into sync.sync_events (table_name, record_id, event_type) values (%s, %s, 'update')",
            *mark.split(),
        )
    sync_pair(pair)
    assert texts(pair.billing, "parents", "id") == ["(1)", "(2)"]
    assert texts(pair.billing, "children", "id") == ["(1)", "(2)", "(3)", "(4)"]
    assert pair.crm.pending() == 0
    assert [(table, record) for table, record, *_ in failures(pair.crm)] == [("children", "none")]


def test_a_parent_that_cannot_be_read_is_not_reached_for_and_stops_nobody_else(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create type mood as enum ('sad')")
    parents = "create table parents (id int primary key, mood mood);"
    children = "create table children (id int primary key, parent int not null references parents)"
    link(pair, parents + children, "children", "parents", batch_size=2)
    pair.crm.execute("alter type mood add value 'happy'")
    pair.crm.execute("insert into parents values (1, 'sad'), (2, 'happy'), (3, 'sad')")
    pair.crm.execute("insert into children values (1, 1), (2, 2), (3, 3)")
    pair.crm.execute("truncate sync.sync_events")
    for mark in ["children 1", "children 2", "children 3", "parents 1", "parents 2", "parents 3"]:
        pair.crm.execute(
            "insert into sync.sync_events (table_name, record_id, event_type) values (%s, %s, 'update')",
            *mark.split(),
        )
    sync_pair(pair)
    assert texts(pair.billing, "parents", "id") == ["(1)", "(3)"]
    assert pair.crm.pending() == 0
    assert ("parents", "2", "22P02") in [failure[:3] for failure in failures(pair.crm)]
    pair.billing.execute("alter type mood add value 'happy'")
    for _ in range(2):
        pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
        sync_pair(pair)
    converge(pair, "parents", "children")


@pytest.mark.parametrize(("winner", "stays"), [("billing", True), ("crm", False)])
def test_the_policy_decides_about_a_child_that_changes_while_it_is_brought_along_to_be_deleted(
    pair: Pair, winner: str, *, stays: bool
) -> None:
    filled(pair, batch_size=1, policy=winner)
    pair.crm.execute("update parents set name = 'new' where id = 1")
    pair.crm.execute("delete from children where parent = 1")
    pair.crm.execute("delete from parents where id = 1")
    with Point("after", Companions, "bring_children").struck_by(
        lambda: bool(pair.billing.execute("update children set word = 'mine' where id = 1")),
        source="crm",
    ):
        sync_pair(pair)
    assert equal(pair, ("children", "parents"))
    assert pair.billing.rows("select word from children where id = 1") == [("mine",)] * stays


def test_what_a_batch_needs_and_the_target_cannot_read_is_asked_for_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in pair.nodes:
        node.execute("create type mood as enum ('sad')")
    parents = "create table parents (id int primary key, mood mood, code text unique);"
    children = "create table children (id int primary key, parent int not null references parents)"
    link(pair, parents + children, "children", "parents", batch_size=4)
    pair.crm.execute("insert into parents values (1, 'sad', 'a'), (2, 'sad', 'b')")
    converge(pair, "parents")
    monkeypatch.setattr(companions, "count", lambda: range(20))
    pair.crm.execute("alter type mood add value 'happy'")
    pair.crm.execute("insert into parents values (3, 'happy', 'c')")
    pair.crm.execute("insert into children values (3, 3)")
    # 1 takes what 2 had, which cannot be read in a later batch.
    pair.crm.execute("update parents set code = 'd' where id = 1")
    pair.crm.execute("update parents set code = code || '!', mood = 'happy' where id = 2")
    pair.crm.execute("update parents set code = 'b' where id = 1")

    sync_pair(pair)

    assert texts(pair.billing, "parents") == ["(1,sad,a)", "(2,sad,b)"]
    assert [failure[:3] for failure in failures(pair.crm)] == [
        ("children", "3", "23503"),
        ("parents", "1", "23505"),
        ("parents", "2", "22P02"),
        ("parents", "3", "22P02"),
    ]
    pair.billing.execute("alter type mood add value 'happy'")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "parents", "children")


def test_a_row_for_which_the_condition_of_its_table_fails_is_set_aside_alone(pair: Pair) -> None:
    children = {"name": "children", "where": {"crm": "word::int > 0"}}
    link(pair, FAMILY, children, "parents", batch_size=3)
    pair.crm.execute("insert into parents select n, 'old' from generate_series(1, 4) as n")
    pair.crm.execute(
        "insert into children values (1, 1, '1'), (2, 2, 'two'), (3, 3, '-3'), (4, 4, 'four'), (5, 4, '5')"
    )
    sync_pair(pair)
    assert texts(pair.billing, "children", "id") == ["(1)", "(5)"]
    assert len(texts(pair.billing, "parents")) == 4
    assert pair.crm.pending() == 0
    states = "select record_id, state, error_class from sync.sync_failures order by record_id"
    assert pair.crm.rows(states) == [("2", "dead", "22P02"), ("4", "dead", "22P02")]
    # One that is retried as it is fails again, beside others that are in order.
    pair.crm.execute("update sync.sync_failures set state = 'retrying', next_attempt_at = now()")
    pair.crm.execute("update children set word = '2' where id = 2")
    sync_pair(pair)
    assert texts(pair.billing, "children", "id") == ["(1)", "(2)", "(5)"]
    assert pair.crm.rows(states) == [("4", "dead", "22P02")]


@pytest.mark.parametrize(
    ("fails", "error_class"),
    [
        ("raise exception 'no' using errcode = 'AB001'", "AB001"),
        ("raise exception 'no' using errcode = '40001'", "40001"),
        ("assert false", "P0004"),
        ("perform count(*) from forgotten", "42P01"),
    ],
)
def test_a_row_for_which_a_function_in_the_condition_fails_in_any_way_is_set_aside_alone(
    pair: Pair, fails: str, error_class: str
) -> None:
    ddl = f"""create table t (id int primary key, word text);
        create function is_fine(word text) returns boolean language plpgsql as
        $$ begin if word = 'bad' then {fails}; end if; return true; end $$"""
    link(pair, ddl, {"name": "t", "where": {"crm": "is_fine(word)"}})
    pair.crm.execute("insert into t values (1, 'good'), (2, 'bad'), (3, 'good')")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1,good)", "(3,good)"]
    states = "select record_id, state, error_class from sync.sync_failures"
    assert pair.crm.rows(states) == [("2", "dead", error_class)]


def test_a_row_that_is_mended_while_it_is_set_aside_is_sent(pair: Pair) -> None:
    children = {"name": "children", "where": {"crm": "word::int > 0"}}
    link(pair, FAMILY, children, "parents")
    pair.crm.execute("insert into parents values (1, 'old')")
    pair.crm.execute("insert into children values (1, 1, 'two')")
    mended = "update children set word = '2'"
    with Point("before", outbox, "_set_aside").struck_by(lambda: bool(pair.crm.execute(mended))):
        sync_pair(pair)
    converge(pair, "parents", "children")


def test_a_row_that_is_brought_along_and_cannot_be_read_is_set_aside(pair: Pair) -> None:
    children = {"name": "children", "where": {"crm": "word::int > 0"}}
    link(pair, FAMILY, children, "parents", batch_size=1)
    pair.crm.execute("insert into parents values (1, 'old'), (2, 'old')")
    pair.crm.execute("insert into children values (1, 1, '1')")
    converge(pair, "parents", "children")
    pair.crm.execute("update parents set name = 'new' where id = 1")
    pair.crm.execute("update children set parent = 2, word = 'one'")
    pair.crm.execute("delete from parents where id = 1")
    sync_pair(pair)
    assert [failure[:3] for failure in failures(pair.crm)] == [
        ("children", "1", "22P02"),
        ("parents", "1", "23503"),
    ]
    pair.crm.execute("update children set word = '2'")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "parents") == ["(2,old)"]


def test_no_room_for_temporary_files_interrupts_the_pass(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(pair, FAMILY, "parents")
    pair.crm.execute("insert into parents values (1, 'long enough')")
    monkeypatch.setattr(snapshot, "ROWS_IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with lead(config_of(pair)) as leader, pytest.raises(PassInterrupted, match="temporary file"):
        passes.run(leader)
    monkeypatch.undo()
    converge(pair, "parents")
