"""Failures, conflicts, replay, backfill and verify: what an operator does about records."""

import re
from typing import Any

import pytest

from tests.engine import equal, installed, sync_pair
from tests.helpers import Node, Pair, write_config
from tests.program import answer, refused, run, succeed
from tests.shapes import link as linked

WITHOUT_CAPTURE = "begin; set local session_replication_role = replica; {}; commit"


@pytest.fixture
def link(pair: Pair) -> Pair:
    installed(pair)
    return pair


@pytest.fixture
def failing(link: Pair) -> Pair:
    """A link with the failures users 1, 2 and 3 of crm: billing takes adults only."""
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("accounts", id=1, name="one")
    for number in (1, 2, 3):
        link.crm.insert("users", id=number, account_id=1, email=f"{number}@x.org", age=number)
    sync_pair(link)
    return link


def silently(node: Node, statement: str) -> None:
    """Change rows behind the triggers' back, so that both sides differ."""
    node.execute(WITHOUT_CAPTURE.format(statement))


def keys(found: dict[str, Any]) -> list[str]:
    return sorted(failure["record_id"] for failure in found["failures"])


# ---- failures ----------------------------------------------------------------------------------


def test_failures_say_which_record_was_refused_and_why(failing: Pair) -> None:
    found = answer(failing, "failures")["failures"]
    first = next(failure for failure in found if failure["record_id"] == "1")
    assert first["node"] == "crm"
    assert first["table_name"] == "users"
    assert first["state"] == "retrying"
    assert first["attempts"] == 1
    assert first["error_class"] == "23514"
    assert "adult" in first["error"]
    assert "23514" in succeed(failing, "failures")


def test_failures_are_filtered_by_table_key_state_and_node(failing: Pair) -> None:
    failing.crm.execute("update sync.sync_failures set state = 'dead' where record_id = '3'")
    assert keys(answer(failing, "failures", "users")) == ["1", "2", "3"]
    assert keys(answer(failing, "failures", "list", "users", "--key", "1", "--key", "3")) == [
        *("1", "3"),
    ]
    assert keys(answer(failing, "failures", "accounts")) == []
    assert keys(answer(failing, "failures", "--state", "dead")) == ["3"]
    assert keys(answer(failing, "failures", "--node", "billing")) == []
    assert keys(answer(failing, "failures", "--limit", "2")) == ["1", "2"]


def test_a_retried_failure_is_applied_by_the_next_sync_a_dead_one_too(failing: Pair) -> None:
    failing.crm.execute("update sync.sync_failures set state = 'dead', next_attempt_at = null")
    failing.billing.execute("alter table users drop constraint adult")
    assert answer(failing, "failures", "retry", "--key", "2")["retried"] == 1
    sync_pair(failing)
    assert failing.billing.rows("select id from users") == [(2,)]
    assert "2 failures" in succeed(failing, "failures", "retry", "--all")
    sync_pair(failing)
    assert equal(failing)


def test_discard_gives_up_only_what_is_meant_and_only_with_yes(failing: Pair) -> None:
    message = refused(failing, "failures", "discard", "--key", "1", code=2)
    assert "1 failure;" in message
    assert keys(answer(failing, "failures")) == ["1", "2", "3"]
    assert answer(failing, "failures", "discard", "--key", "1", "--yes")["discarded"] == 1
    assert keys(answer(failing, "failures")) == ["2", "3"]
    succeed(failing, "failures", "discard", "--all", "--yes")
    assert keys(answer(failing, "failures")) == []


def test_failures_of_a_table_that_is_no_longer_synced_can_be_discarded(link: Pair) -> None:
    link.crm.execute(
        "insert into sync.sync_events (table_name, record_id) values ('unicorns', '1')"
    )
    sync_pair(link)
    assert keys(answer(link, "failures", "list", "unicorns")) == ["1"]
    assert answer(link, "failures", "discard", "unicorns", "--yes")["discarded"] == 1


# ---- conflicts ---------------------------------------------------------------------------------


def conflict(pair: Pair, account: int) -> None:
    pair.crm.execute("update accounts set name = 'crm' where id = %s", account)
    pair.billing.execute("update accounts set name = 'billing' where id = %s", account)


@pytest.fixture
def conflicting(pair: Pair) -> Pair:
    """A link where account 1 is held, and where account 2 was decided for billing."""
    write_config(pair.config_path, [{"name": "accounts", "conflict": "billing"}, "users", "orders"])
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("accounts", id=2, name="two")
    sync_pair(pair)
    conflict(pair, 2)
    sync_pair(pair)
    write_config(pair.config_path, [{"name": "accounts", "conflict": "hold"}, "users", "orders"])
    conflict(pair, 1)
    sync_pair(pair)
    return pair


def test_conflicts_are_listed_with_both_rows_newest_first(conflicting: Pair) -> None:
    held, decided = answer(conflicting, "conflicts")["conflicts"]
    assert (held["record_id"], held["winner"], held["resolved_at"]) == ("1", None, None)
    assert (decided["record_id"], decided["winner"]) == ("2", "billing")
    assert decided["kind"] == "update_update"
    names = {decided["local_row"]["name"], decided["remote_row"]["name"]}
    assert names == {"crm", "billing"}
    assert answer(conflicting, "conflicts", "users")["conflicts"] == []
    assert "held" in succeed(conflicting, "conflicts")


def test_both_rows_are_shown_side_by_side_with_the_differing_fields_marked(
    conflicting: Pair,
) -> None:
    conflicting.crm.execute("update accounts set name = '' where id = 2")
    conflicting.billing.execute("delete from accounts where id = 2")
    sync_pair(conflicting)
    deleted, held, decided = succeed(conflicting, "conflicts").split(" on ")[1:]
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in held.splitlines()]
    fields = {row[1]: (row[0], *row[2:]) for row in cells if len(row) == 4}
    assert "accounts 1, update_update, held until you decide" in held
    assert fields["field"] == ("", "crm", "billing")
    assert fields["id"] == ("", "1", "1")
    assert fields["name"] == ("*", "crm", "billing")
    assert "accounts 2, update_update, billing won" in decided
    assert "billing (deleted)" in deleted
    assert '""' in deleted


@pytest.mark.parametrize(
    ("type_name", "value"),
    [
        ("numeric", "1" * 5000),
        ("numeric", "12345678901234567890.10"),
        ("numeric[]", "{" + "1" * 5000 + "}"),
        ("json", "[" * 3000 + "]" * 3000),
        ("jsonb", '{"price": 1.10}'),
    ],
)
def test_a_value_that_no_program_would_read_exactly_is_listed_as_text_and_resolved(
    pair: Pair, type_name: str, value: str
) -> None:
    linked(pair, f"create table things (id int primary key, value {type_name})", "things")
    pair.crm.execute("insert into things values (1, null)")
    sync_pair(pair)
    pair.crm.execute(f"update things set value = %s::{type_name}", value)
    pair.billing.execute("delete from things")
    sync_pair(pair)
    [conflict] = answer(pair, "conflicts")["conflicts"]
    assert conflict["remote_row"] == {"id": 1, "value": value}
    assert value[-5:] in succeed(pair, "conflicts")
    succeed(pair, "conflicts", "resolve", str(conflict["id"]), "--winner", "crm")
    sync_pair(pair)
    assert pair.billing.rows("select value::text from things") == [(value,)]


def test_a_held_record_is_neither_retried_nor_discarded(conflicting: Pair) -> None:
    assert answer(conflicting, "failures", "retry")["retried"] == 0
    assert answer(conflicting, "failures", "discard", "--all", "--yes")["discarded"] == 0
    assert {f["state"] for f in answer(conflicting, "failures")["failures"]} == {"held"}
    assert "conflicts resolve" in refused(
        conflicting, "failures", "retry", "--state", "held", code=2
    )


@pytest.mark.parametrize("winner", ["crm", "billing"])
def test_a_held_conflict_is_resolved_and_an_automatic_decision_undone(
    conflicting: Pair, winner: str
) -> None:
    for each in answer(conflicting, "conflicts")["conflicts"]:
        number, node = str(each["id"]), each["node"]
        succeed(conflicting, "conflicts", "resolve", number, "--winner", winner, "--node", node)
    sync_pair(conflicting)
    assert equal(conflicting)
    assert conflicting.crm.rows("select name from accounts") == [(winner,), (winner,)]


@pytest.mark.parametrize(
    "action", ["no action", "restrict", "no action deferrable initially deferred"]
)
def test_a_parent_that_cannot_be_deleted_is_named_with_the_table_that_needs_it(
    pair: Pair, action: str
) -> None:
    linked(
        pair,
        f"""create table parents (id int primary key);
        create table children (id int primary key, parent int references parents on delete {action})""",
        *("parents", "children"),
    )
    pair.crm.execute("insert into parents values (1)")
    sync_pair(pair)
    pair.crm.execute("delete from parents")
    pair.billing.execute("insert into children values (1, 1)")
    sync_pair(pair)
    [conflict] = answer(pair, "conflicts")["conflicts"]
    decide = ("conflicts", "resolve", str(conflict["id"]), "--winner", "crm")
    assert refused(pair, *decide) == (
        "billing: parents 1 cannot be deleted: rows of public.children refer to it; "
        "delete or move those rows first, then resolve again\n"
    )
    assert answer(pair, "conflicts")["conflicts"] == [conflict]
    assert pair.billing.rows("parents") == pair.crm.rows("parents") == [(1,)]
    pair.billing.execute("delete from children")
    sync_pair(pair)
    succeed(pair, *decide)
    sync_pair(pair)
    assert pair.billing.rows("parents") == pair.crm.rows("parents") == []


def test_a_row_that_lacks_its_parent_is_not_brought_back_and_the_constraint_is_named(
    link: Pair,
) -> None:
    link.crm.insert("accounts", id=1, name="one")
    link.crm.insert("users", id=1, account_id=1, email="1@x.org")
    sync_pair(link)
    link.crm.execute("update users set name = 'crm'")
    link.billing.execute("delete from users")
    sync_pair(link)
    [conflict] = answer(link, "conflicts")["conflicts"]
    link.crm.execute("delete from accounts")
    sync_pair(link)
    message = refused(link, "conflicts", "resolve", str(conflict["id"]), "--winner", "crm")
    assert message == (
        "billing: users 1 cannot be written: a row that it refers to is missing (users_account_id_fkey); "
        "bring that row back first, then resolve again\n"
    )
    assert link.billing.rows("users") == []


def test_an_id_that_both_nodes_have_is_asked_about_and_decides_only_one(conflicting: Pair) -> None:
    for node in conflicting.nodes:
        node.execute("delete from sync.sync_conflicts")
        node.execute(
            "insert into sync.sync_conflicts (id, table_name, record_id, kind, winner, resolved_at)"
            " values (77, 'accounts', %s, 'update_update', 'crm', now())",
            "1" if node.name == "crm" else "2",
        )
    message = refused(conflicting, "conflicts", "resolve", "77", "--winner", "billing")
    assert "accounts 1 on crm, accounts 2 on billing" in message
    assert "--node" in message
    arguments = ("conflicts", "resolve", "77", "--winner", "billing", "--node", "billing")
    assert answer(conflicting, *arguments)["record_id"] == "2"
    assert conflicting.crm.value("select winner from sync.sync_conflicts") == "crm"


def test_an_unknown_conflict_is_said_to_be_unknown(link: Pair) -> None:
    assert "no conflict" in refused(link, "conflicts", "resolve", "9", "--winner", "crm")


# ---- replay and backfill -----------------------------------------------------------------------


@pytest.fixture
def filled(link: Pair) -> Pair:
    """Three accounts on both nodes, equal."""
    for number in (1, 2, 3):
        link.crm.insert("accounts", id=number, name=f"account {number}")
    sync_pair(link)
    return link


def test_a_replay_by_key_sends_the_row_again(filled: Pair) -> None:
    silently(filled.billing, "update accounts set name = 'drifted' where id <> 2")
    found = answer(filled, "replay", "accounts", "--node", "crm", "--key", "1", "--key", "2")
    assert found == {"marked": 2}
    sync_pair(filled)
    assert filled.billing.rows("select name from accounts order by id") == [
        *(("account 1",), ("account 2",), ("drifted",)),
    ]


def test_a_replay_of_a_deleted_record_deletes_it_on_the_other_side(filled: Pair) -> None:
    silently(filled.crm, "delete from accounts where id = 1")
    assert answer(filled, "replay", "accounts", "--node", "crm", "--key", "1") == {"marked": 1}
    assert filled.crm.value("select event_type from sync.sync_events") == "delete"
    sync_pair(filled)
    assert equal(filled)


def test_a_key_that_exists_on_neither_side_is_marked_all_the_same(filled: Pair) -> None:
    assert answer(filled, "replay", "accounts", "--node", "crm", "--key", "99") == {"marked": 1}
    sync_pair(filled)
    assert filled.crm.pending() == 0
    assert filled.crm.rows("sync.sync_failures") == []


def test_a_replay_by_condition_or_of_all(filled: Pair) -> None:
    silently(filled.billing, "update accounts set name = 'drifted'")
    condition = "name like '%2' or id = 3"
    assert answer(filled, "replay", "accounts", "--node", "crm", "--where", condition) == {
        "marked": 2
    }
    sync_pair(filled)
    assert filled.billing.value("select name from accounts where id = 1") == "drifted"
    assert "3 records" in succeed(filled, "replay", "accounts", "--node", "crm", "--all")
    sync_pair(filled)
    assert equal(filled)


def test_a_key_that_is_no_key_marks_nothing(filled: Pair) -> None:
    message = refused(filled, "replay", "accounts", "--node", "crm", "--key", "1", "--key", "first")
    assert "`first` is no key of accounts" in message
    assert "integer" in message
    assert filled.crm.pending() == 0


def test_a_backfill_sends_rows_that_were_there_before_the_installation(pair: Pair) -> None:
    pair.crm.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=10, account_id=1, email="u@x.org")
    pair.crm.insert("orders", id=100, user_id=10, amount="1.50")
    installed(pair)
    found = answer(pair, "backfill", "--from", "crm")
    assert found == {"marked": 3, "tables": {"accounts": 1, "users": 1, "orders": 1}}
    # Parents first.
    marks = pair.crm.rows("select table_name from sync.sync_events order by id")
    assert marks == [("accounts",), ("users",), ("orders",)]
    sync_pair(pair)
    assert equal(pair)


def test_a_backfill_goes_on_after_a_key(filled: Pair) -> None:
    result = run(filled, "backfill", "--from", "crm", "accounts", "--after", "1", "--chunk", "1")
    assert "2 records" in result.stdout
    assert "accounts: 1 marked, up to 2\naccounts: 1 marked, up to 3\n" in result.stderr
    assert filled.crm.rows("select record_id from sync.sync_events order by id") == [("2",), ("3",)]


def test_an_interrupted_backfill_says_how_to_go_on(filled: Pair) -> None:
    filled.crm.execute(
        "create function stumble() returns trigger language plpgsql as"
        " $$ begin if new.record_id = '3' then raise 'stumbled'; end if; return new; end $$"
    )
    filled.crm.execute(
        "create trigger stumble before insert on sync.sync_events"
        " for each row execute function stumble()"
    )
    message = refused(filled, "backfill", "--from", "crm", "--chunk", "1")
    assert "sync-pipeline backfill --from crm accounts users orders --after 2\n" in message
    assert "crm: raise exception (SQLSTATE P0001)" in message
    assert filled.crm.rows("select record_id from sync.sync_events order by id") == [("1",), ("2",)]


def test_a_one_way_table_is_marked_only_where_it_is_sent_from(pair: Pair) -> None:
    write_config(pair.config_path, [{"name": "accounts", "source": "billing"}, "users", "orders"])
    installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    for arguments in (
        ("replay", "accounts", "--node", "crm", "--all"),
        ("backfill", "--from", "crm", "accounts"),
    ):
        message = refused(pair, *arguments)
        assert "crm does not send this table" in message
        assert "billing" in message
    result = run(pair, "backfill", "--from", "crm")
    assert result.returncode == 0
    assert "crm does not send accounts: left out" in result.stderr
    assert pair.crm.pending() == 0


# ---- verify ------------------------------------------------------------------------------------


def test_verify_ends_with_one_on_a_difference_and_repairs_by_marking(filled: Pair) -> None:
    assert answer(filled, "verify")["equal"] is True
    silently(filled.billing, "update accounts set name = 'drifted' where id = 1")
    silently(filled.billing, "delete from accounts where id = 2")
    result = run(filled, "verify")
    assert result.returncode == 1
    assert "accounts: missing on billing: 2" in result.stdout
    assert "accounts: different: 1" in result.stdout

    dry = run(filled, "verify", "--repair-from", "crm", "--dry-run")
    assert dry.returncode == 1
    assert "2 records would be marked" in dry.stdout
    assert filled.crm.pending() == 0
    assert answer(filled, "verify", "accounts", "--repair-from", "crm")["marked"] == 2
    sync_pair(filled)
    assert equal(filled)
    assert succeed(filled, "verify").endswith("both sides are equal\n")


def test_verify_says_how_many_records_it_left_out(failing: Pair) -> None:
    verdict = "both sides are equal, except 3 records that wait, have failed or are held\n"
    assert succeed(failing, "verify").endswith(verdict)
    assert answer(failing, "verify")["tables"]["users"]["pending"] == 3
