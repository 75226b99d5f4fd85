"""Conflicts that wait for an operator, and decisions that an operator undoes."""

import pytest

from sync_pipeline import operate
from sync_pipeline.batch import Batch
from sync_pipeline.config import Config
from sync_pipeline.database import connected
from sync_pipeline.errors import SyncPipelineError
from tests.crashing import Point
from tests.engine import config_of, equal, installed, resolve, sync_pair
from tests.helpers import Node, Pair, write_config
from tests.shapes import converge, link, texts

pytestmark = pytest.mark.core


@pytest.fixture
def held(pair: Pair) -> Config:
    """A pair whose account 1 was changed on both nodes, under the policy `hold`."""
    write_config(
        pair.config_path, tables=[{"name": "accounts", "conflict": "hold"}, "users", "orders"]
    )
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    pair.crm.insert("accounts", id=2, name="second")
    sync_pair(pair)
    pair.crm.execute("update accounts set name = 'crm' where id = 1")
    pair.billing.execute("update accounts set name = 'billing' where id = 1")
    pair.crm.execute("update accounts set name = 'other' where id = 2")
    sync_pair(pair)
    return config


def names(node: Node) -> list[tuple[object, ...]]:
    return node.rows("select name from accounts order by id")


def open_conflicts(pair: Pair) -> list[tuple[object, ...]]:
    return [
        row
        for node in pair.nodes
        for row in node.rows("select id, kind from sync.sync_conflicts where winner is null")
    ]


def test_a_held_record_moves_on_neither_side_and_others_flow(pair: Pair, held: Config) -> None:
    assert names(pair.crm) == [("crm",), ("other",)]
    assert names(pair.billing) == [("billing",), ("other",)]
    assert pair.crm.pending() == pair.billing.pending() == 0
    assert len(open_conflicts(pair)) == 1
    states = [n.rows("select record_id, state from sync.sync_failures") for n in pair.nodes]
    assert states == [[("1", "held")], [("1", "held")]]


def test_a_held_record_that_changes_again_stays_one_conflict(pair: Pair, held: Config) -> None:
    pair.crm.execute("update accounts set name = 'crm again' where id = 1")
    sync_pair(pair)
    pair.billing.execute("update accounts set name = 'billing again' where id = 1")
    sync_pair(pair)
    assert names(pair.billing)[0] == ("billing again",)
    assert names(pair.crm)[0] == ("crm again",)
    assert pair.crm.pending() == pair.billing.pending() == 0
    assert len(open_conflicts(pair)) <= 2


def test_the_log_has_the_last_rows_of_a_held_record(pair: Pair, held: Config) -> None:
    pair.crm.execute("update accounts set name = 'crm again' where id = 1")
    sync_pair(pair)
    [(number, _)] = open_conflicts(pair)
    for winner in ("billing", "crm"):
        resolve(held, int(str(number)), winner)
        sync_pair(pair)
    assert equal(pair)
    assert names(pair.crm)[0] == ("crm again",)


@pytest.mark.parametrize(
    ("by", "name"), [(("crm", "billing"), "same"), (("crm",), "billing"), (("billing",), "crm")]
)
def test_a_held_record_that_became_equal_is_settled_and_the_next_conflict_is_logged(
    pair: Pair, held: Config, by: tuple[str, ...], name: str
) -> None:
    for node in pair.nodes:
        if node.name in by:
            node.execute("update accounts set name = %s where id = 1", name)
    sync_pair(pair)
    assert [n.value("select conflicts_held from sync.sync_status") for n in pair.nodes] == [0, 0]
    assert [n.rows("select * from sync.sync_failures") for n in pair.nodes] == [[], []]
    assert pair.billing.rows("select winner from sync.sync_conflicts") == [(by[0],)]
    for node in pair.nodes:
        node.execute("update accounts set name = %s where id = 1", f"{node.name} again")
    sync_pair(pair)
    assert pair.billing.rows(
        "select local_row ->> 'name', remote_row ->> 'name' from sync.sync_conflicts "
        "where resolved_at is null"
    ) == [("billing again", "crm again")]


@pytest.mark.parametrize("changed", ["crm", "billing"])
@pytest.mark.parametrize("policy", ["crm", "billing"])
def test_a_held_record_is_settled_by_the_policy_that_the_table_has_later(
    pair: Pair, held: Config, policy: str, changed: str
) -> None:
    write_config(
        pair.config_path, tables=[{"name": "accounts", "conflict": policy}, "users", "orders"]
    )
    node = pair.crm if changed == "crm" else pair.billing
    node.execute("update accounts set name = %s where id = 1", changed)
    node.execute("update accounts set plan = 'new' where id = 1")
    sync_pair(pair)
    assert equal(pair)
    assert names(pair.crm)[0] == (policy,)
    assert [n.rows("select * from sync.sync_failures") for n in pair.nodes] == [[], []]
    winners = [
        row for n in pair.nodes for row in n.rows("select distinct winner from sync.sync_conflicts")
    ]
    assert set(winners) == {(policy,)}


@pytest.mark.parametrize("winner", ["crm", "billing"])
def test_an_operator_settles_a_held_record(pair: Pair, held: Config, winner: str) -> None:
    [(number, kind)] = open_conflicts(pair)
    assert kind == "update_update"
    resolve(held, int(str(number)), winner)
    sync_pair(pair)
    assert equal(pair)
    assert names(pair.crm)[0] == (winner,)
    assert open_conflicts(pair) == []
    assert [n.rows("select * from sync.sync_failures") for n in pair.nodes] == [[], []]
    # The record is free again.
    pair.billing.execute("update accounts set name = 'later' where id = 1")
    sync_pair(pair)
    assert equal(pair)


def test_a_change_that_no_pass_has_seen_is_not_decided_by_an_operator(
    pair: Pair, held: Config
) -> None:
    [(number, _)] = open_conflicts(pair)
    pair.billing.execute("update accounts set name = 'unseen' where id = 1")
    resolve(held, int(str(number)), "crm")
    sync_pair(pair)
    assert names(pair.billing)[0] == ("unseen",)
    [(number, _)] = open_conflicts(pair)
    resolve(held, int(str(number)), "crm")
    sync_pair(pair)
    assert equal(pair)
    assert names(pair.billing)[0] == ("crm",)
    assert ("unseen",) in pair.billing.rows("select local_row ->> 'name' from sync.sync_conflicts")


def test_a_conflict_is_not_resolved_for_a_node_that_does_not_send_the_table(pair: Pair) -> None:
    prices = {"name": "prices", "source": "crm", "conflict": "hold"}
    config = link(pair, "create table prices (id int primary key, price int)", prices)
    pair.crm.execute("insert into prices values (1, 1)")
    sync_pair(pair)
    for node, price in zip(pair.nodes, (2, 3), strict=True):
        node.execute("update prices set price = %s", price)
    pair.billing.execute(
        "insert into sync.sync_events (table_name, record_id) values ('prices', '1')"
    )
    sync_pair(pair)
    [(number, _)] = open_conflicts(pair)
    with pytest.raises(SyncPipelineError, match="prices is not synced from billing"):
        resolve(config, int(str(number)), "billing")
    assert len(open_conflicts(pair)) == 1
    resolve(config, int(str(number)), "crm")
    converge(pair, "prices")
    assert texts(pair.billing, "prices") == ["(1,2)"]


@pytest.fixture
def decided(pair: Pair) -> Config:
    """A pair whose user 1 was changed on both nodes and decided for billing, the later."""
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    pair.crm.insert("users", id=1, account_id=1, email="1@x.org", age=40)
    sync_pair(pair)
    pair.crm.execute("update users set name = 'crm', age = null")
    pair.billing.execute("update users set name = 'billing'")
    sync_pair(pair)
    return config


def test_undoing_a_decision_writes_the_losing_row_back_on_both_sides(
    pair: Pair, decided: Config
) -> None:
    assert pair.crm.rows("select name, age from users") == [("billing", 40)]
    number = pair.billing.value("select id from sync.sync_conflicts")
    resolve(decided, number, "crm")
    sync_pair(pair)
    assert equal(pair)
    assert pair.crm.rows("select name, age from users") == [("crm", None)]
    assert pair.billing.rows("select winner from sync.sync_conflicts") == [("crm",)]


def test_undoing_a_decision_hides_no_table_of_the_application_from_its_triggers(
    pair: Pair, decided: Config
) -> None:
    pair.billing.execute(
        """create table resolved (id int, name text);
        create function note() returns trigger language plpgsql as $$
            begin insert into resolved values (new.id, new.name); return null; end $$;
        create trigger note after update on users for each row execute function note()"""
    )
    resolve(decided, pair.billing.value("select id from sync.sync_conflicts"), "crm")
    assert pair.billing.rows("resolved") == [(1, "crm")]


def test_undoing_a_delete_brings_the_row_back(pair: Pair, decided: Config) -> None:
    pair.crm.execute("update users set name = 'updated'")
    pair.billing.execute("delete from users")
    sync_pair(pair)
    assert pair.crm.rows("users") == []
    number = pair.billing.value("select max(id) from sync.sync_conflicts")
    resolve(decided, number, "crm")
    sync_pair(pair)
    assert equal(pair)
    assert pair.billing.rows("select name from users") == [("updated",)]


def conflict_about(pair: Pair, table: str, change: str) -> int:
    """Change record 1 on crm, later its word on billing, which wins; return the number of the conflict."""
    pair.crm.execute(change)
    pair.billing.execute(f"update {table} set word = 'billing' where id = 1")
    sync_pair(pair)
    [(number,)] = pair.billing.rows("select id from sync.sync_conflicts")
    return int(number)


def test_undoing_a_decision_leaves_a_column_alone_that_the_log_does_not_know(pair: Pair) -> None:
    config = link(pair, "create table words (id int primary key, word text)", "words")
    pair.crm.execute("insert into words values (1, 'old')")
    sync_pair(pair)
    number = conflict_about(pair, "words", "update words set word = 'crm'")
    for node in pair.nodes:
        node.execute("alter table words add column phone text")
    config = installed(pair)
    pair.crm.execute("update words set phone = '555'")
    sync_pair(pair)
    resolve(config, number, "crm")
    converge(pair, "words")
    assert texts(pair.crm, "words") == ["(1,crm,555)"]


def test_a_row_that_cannot_be_written_back_says_what_stands_in_the_way(pair: Pair) -> None:
    config = link(pair, "create table words (id int primary key, word text unique)", "words")
    pair.crm.execute("insert into words values (1, 'old')")
    sync_pair(pair)
    number = conflict_about(pair, "words", "update words set word = 'crm'")
    pair.crm.execute("insert into words values (2, 'crm')")
    sync_pair(pair)
    with pytest.raises(
        SyncPipelineError, match=r"words 1 cannot be written.*words_word_key"
    ) as said:
        resolve(config, number, "crm")

    assert said.value.remedy is not None
    assert "resolve again" in said.value.remedy
    assert texts(pair.billing, "words") == ["(1,billing)", "(2,crm)"]


@pytest.mark.parametrize("change", ["update words set word = 'crm'", "delete from words"])
@pytest.mark.parametrize(
    "columns",
    [
        "id int primary key deferrable, word text",
        "id int primary key, number int generated always as identity, word text",
    ],
)
def test_decisions_about_deferrable_keys_and_identity_columns_are_undone(
    pair: Pair, columns: str, change: str
) -> None:
    config = link(pair, f"create table words ({columns})", "words")
    pair.crm.execute("insert into words (id, word) values (1, 'old')")
    sync_pair(pair)
    before = conflict_about(pair, "words", change)
    for winner in ("crm", "billing"):
        resolve(config, before, winner)
        converge(pair, "words")
        words = pair.crm.rows("select word from words")
        assert words == ([] if winner == "crm" and "delete" in change else [(winner,)])


def test_an_unknown_conflict_or_node_changes_nothing(pair: Pair, decided: Config) -> None:
    with pytest.raises(SyncPipelineError, match="no conflict has the number 999"):
        resolve(decided, 999, "crm")
    with pytest.raises(SyncPipelineError, match="unknown node 'sales'; name one of crm, billing"):
        resolve(decided, pair.billing.value("select id from sync.sync_conflicts"), "sales")


def test_a_record_with_events_in_several_batches_is_one_conflict(pair: Pair) -> None:
    write_config(pair.config_path, batch_size=1)
    installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    for name in ("crm", "crm again"):
        pair.crm.execute("update accounts set name = %s", name)
    pair.billing.execute("update accounts set name = 'billing, the latest'")

    sync_pair(pair)

    assert names(pair.crm) == names(pair.billing) == [("billing, the latest",)]
    assert len(pair.billing.rows("select from sync.sync_conflicts")) == 1


def test_a_later_event_of_the_same_record_may_turn_the_decision(pair: Pair) -> None:
    """The first batch sees only the older event of crm and lets billing win; no row may be lost without a trace."""
    write_config(pair.config_path, batch_size=1)
    installed(pair)
    pair.crm.insert("accounts", id=1, name="crm first")
    pair.billing.insert("accounts", id=1, name="billing")
    pair.crm.execute("update accounts set name = 'crm last'")
    sync_pair(pair)
    assert equal(pair)
    assert names(pair.billing) == [("crm last",)]
    logged = pair.billing.rows(
        "select winner, local_row ->> 'name', remote_row ->> 'name' from sync.sync_conflicts order by id"
    )
    assert logged == [("billing", "billing", "crm last"), ("crm", "billing", "crm last")]


def test_conflict_numbers_never_occur_on_both_nodes(pair: Pair, decided: Config) -> None:
    statement = (
        "select mod(nextval(pg_get_serial_sequence('sync.sync_conflicts', 'id')), 2)"
        " from generate_series(1, 3)"
    )
    assert pair.crm.rows(statement) == [(1,)] * 3
    assert pair.billing.rows(statement) == [(0,)] * 3


def test_settled_conflicts_are_kept_for_the_retention_and_then_deleted(
    pair: Pair, decided: Config
) -> None:
    age = "update sync.sync_conflicts set resolved_at = now() - make_interval(days => %s)"
    pair.billing.execute(age, 29)
    sync_pair(pair)
    assert len(pair.billing.rows("select id from sync.sync_conflicts")) == 1
    pair.billing.execute(age, 31)
    sync_pair(pair)
    assert pair.billing.rows("select id from sync.sync_conflicts") == []


@pytest.mark.parametrize("policy", ["last_update_wins", "crm", "billing", "hold"])
def test_a_conflict_about_a_value_that_one_node_cannot_read_stops_no_other_record(
    pair: Pair, policy: str
) -> None:
    for node in pair.nodes:
        node.execute("create type mood as enum ('sad')")
        node.execute("create table moods (id int primary key, mood mood)")
    write_config(pair.config_path, tables=[{"name": "moods", "conflict": policy}])
    installed(pair)
    pair.crm.execute("insert into moods values (1, 'sad'), (2, 'sad')")
    sync_pair(pair)
    pair.crm.execute("alter type mood add value 'happy'")
    pair.crm.execute("update moods set mood = 'happy' where id = 1")
    pair.crm.execute("update moods set mood = null where id = 2")
    pair.billing.execute("update moods set mood = null where id = 1")
    pair.billing.execute("insert into moods values (3, 'sad')")
    sync_pair(pair)
    for node in pair.nodes:
        assert node.pending() == 0
        assert node.rows("select * from moods where id > 1 order by id") == [(2, None), (3, "sad")]
    pair.billing.execute("alter type mood add value 'happy'")
    for node in pair.nodes:
        node.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(pair)
    if policy == "hold":
        assert open_conflicts(pair)
        states = [n.rows("select record_id, state from sync.sync_failures") for n in pair.nodes]
        assert states == [[("1", "held")], [("1", "held")]]
    else:
        # A mood that billing could not take was no change that it lost.
        assert equal(pair, ("moods",))
        won = {"crm": "happy"}.get(policy)
        assert pair.crm.rows("select mood from moods where id = 1") == [(won,)]
        assert [n.rows("select * from sync.sync_failures") for n in pair.nodes] == [[], []]


@pytest.mark.parametrize("policy", ["last_update_wins", "crm", "hold"])
@pytest.mark.parametrize("value", [r'{"a": "\u0000"}', r'"\ud800"', "1e1000000"])
def test_a_conflict_about_json_that_jsonb_refuses_is_decided_and_undone(
    pair: Pair, value: str, policy: str
) -> None:
    config = link(
        pair,
        "create table words (id int primary key, word text, said json)",
        {"name": "words", "conflict": policy},
    )
    pair.crm.execute("insert into words values (1, 'old', null)")
    sync_pair(pair)
    pair.crm.execute("update words set said = %s", value)
    pair.billing.execute("update words set word = 'billing'")
    pair.billing.execute("insert into words values (2, 'innocent', null)")
    sync_pair(pair)
    assert pair.crm.rows("select word from words where id = 2") == [("innocent",)]
    [(number, logged)] = pair.billing.rows(
        "select id, remote_row ->> 'said' from sync.sync_conflicts"
    )
    assert logged == value
    for winner, row in (("billing", ("billing", None)), ("crm", ("old", value))):
        resolve(config, number, winner)
        converge(pair, "words")
        assert pair.billing.rows("select word, said::text from words where id = 1") == [row]


def test_a_deleted_parent_with_json_that_jsonb_refuses_comes_back(pair: Pair) -> None:
    link(
        pair,
        """create table parents (id int primary key, said json);
        create table children (id int primary key, parent int not null references parents)""",
        *("parents", "children"),
    )
    pair.crm.execute("insert into parents values (1, %s)", r'"\u0000"')
    sync_pair(pair)
    pair.crm.execute("delete from parents")
    pair.billing.execute("insert into children values (1, 1)")
    converge(pair, "parents", "children")
    assert pair.billing.rows("select kind from sync.sync_conflicts") == [("parent_deleted",)]


def test_a_key_that_one_node_cannot_read_stops_no_other_record(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create type mood as enum ('sad', 'calm')")
        node.execute("create table moods (mood mood primary key, name text)")
    write_config(pair.config_path, tables=["moods"])
    installed(pair)
    pair.crm.execute("insert into moods values ('sad', 'one')")
    sync_pair(pair)
    pair.crm.execute("alter type mood add value 'happy'")
    pair.crm.execute("insert into moods values ('happy', 'two')")
    pair.crm.execute("update moods set name = 'crm' where mood = 'sad'")
    pair.billing.execute("update moods set name = 'billing' where mood = 'sad'")
    pair.billing.execute("insert into moods values ('calm', 'three')")
    sync_pair(pair)
    assert pair.crm.pending() == pair.billing.pending() == 0
    assert pair.billing.rows("select * from moods order by mood") == [
        ("sad", "billing"),
        ("calm", "three"),
    ]
    # Perhaps it is there under a name that the label had before: that its delete did nothing is to be seen.
    pair.crm.execute("delete from moods where mood = 'happy'")
    sync_pair(pair)
    assert pair.crm.rows("select record_id from sync.sync_failures") == [("happy",)]
    pair.billing.execute("alter type mood add value 'happy'")
    pair.crm.execute("insert into moods values ('happy', 'again')")
    sync_pair(pair)
    assert pair.crm.rows("select * from sync.sync_failures") == []
    assert equal(pair, ("moods",))


def test_a_record_with_events_in_later_batches_is_decided_until_the_last_of_them_is_applied(
    pair: Pair,
) -> None:
    """Also where the other node's change was made on top of what an earlier batch had brought; see docs/limits.md."""
    write_config(pair.config_path, [{"name": "accounts", "conflict": "crm"}], batch_size=1)
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.execute("update accounts set name = 'two'")

    def change() -> bool:
        pair.billing.execute("update accounts set name = name || ', three'")
        return pair.billing.rows("select name from accounts") != []

    with Point("before", Batch, "finish").struck_by(change, source="crm"):
        sync_pair(pair)
    assert [node.rows("select name from accounts") for node in pair.nodes] == [[("two",)]] * 2
    logged = pair.billing.rows("select winner, local_row ->> 'name' from sync.sync_conflicts")
    assert logged == [("crm", "two, three")]


@pytest.mark.parametrize(
    ("policy", "later", "expected"),
    [
        ("billing", "crm", "(1,a,ours)"),
        ("crm", "billing", "(1,b,old)"),
        ("last_update_wins", "billing", "(1,a,ours)"),
        ("last_update_wins", "crm", "(1,b,old)"),
    ],
)
def test_a_parent_that_a_child_of_an_earlier_batch_needs_is_decided_by_the_policy(
    pair: Pair, policy: str, later: str, expected: str
) -> None:
    link(
        pair,
        """create table parents (id int primary key, code text unique, name text);
        create table children (id int primary key,
            code text references parents (code) on update cascade)""",
        {"name": "parents", "conflict": policy},
        "children",
        batch_size=1,
    )
    pair.crm.execute("insert into parents values (1, 'a', 'old')")
    converge(pair, "parents")
    changes = {
        "crm": "insert into children values (1, 'a'); update parents set code = 'b'",
        "billing": "update parents set name = 'ours'",
    }
    for node in sorted(pair.nodes, key=lambda node: node.name == later):
        node.execute(changes[node.name])
    sync_pair(pair)
    # The child waits for the value that its parent has got.
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "parents", "children")
    assert texts(pair.crm, "parents") == [expected]
    assert {kind for (kind,) in pair.billing.rows("select kind from sync.sync_conflicts")} == {
        "update_update"
    }


@pytest.mark.parametrize("policy", ["last_update_wins", "crm", "hold"])
def test_a_mark_does_not_win_over_a_change_of_the_other_node_that_waits(
    pair: Pair, policy: str
) -> None:
    write_config(pair.config_path, conflict=policy)
    installed(pair)
    pair.crm.insert("accounts", id=1, name="old")
    sync_pair(pair)
    pair.billing.execute("update accounts set name = 'new'")
    config = config_of(pair)
    with connected(config.first, config, "t") as one, connected(config.second, config, "t") as two:
        connections = {config.first.name: one, config.second.name: two}
        plan = operate.plan_backfill(config, connections, "crm", ["accounts"])
        assert len(list(operate.backfill(config, connections, plan))) == 1
    sync_pair(pair)
    assert [node.rows("select name from accounts") for node in pair.nodes] == [[("new",)]] * 2


def test_a_record_that_is_held_after_a_mark_of_it_lost_has_a_conflict_to_resolve(
    pair: Pair,
) -> None:
    write_config(pair.config_path, conflict="hold", batch_size=1)
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="old")
    sync_pair(pair)
    pair.billing.execute("update accounts set name = 'billing'")
    with connected(config.first, config, "t") as one, connected(config.second, config, "t") as two:
        connections = {config.first.name: one, config.second.name: two}
        assert operate.replay(config, connections, "accounts", "crm", operate.Replay(["1"])) == 1
    pair.crm.execute("update accounts set name = 'crm'")
    sync_pair(pair)
    assert names(pair.crm) == [("crm",)]
    assert names(pair.billing) == [("billing",)]
    assert len(open_conflicts(pair)) == 1


def test_a_held_parent_that_a_new_child_brings_back_is_held_no_longer(pair: Pair) -> None:
    write_config(
        pair.config_path, tables=[{"name": "accounts", "conflict": "hold"}, "users", "orders"]
    )
    installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    pair.crm.execute("update accounts set name = 'crm'")
    pair.billing.execute("delete from accounts")
    sync_pair(pair)
    assert len(open_conflicts(pair)) == 1
    pair.crm.insert("users", id=1, account_id=1, email="1@x.org")
    converge(pair, "accounts", "users")
    assert open_conflicts(pair) == []
