"""What somebody with few rights cannot do, and what no message and no log repeats."""

from collections.abc import Iterator

import psycopg
import pytest

from sync_pipeline import doctor, operate, passes
from sync_pipeline.database import connected, in_words
from sync_pipeline.errors import CatalogMismatch, SyncPipelineError, TableMissing
from sync_pipeline.link import lead
from sync_pipeline.operate import Replay
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import Pair, Row, write_config
from tests.roles import APPLICATION, CONSUMER, OWNER, drop, pair_of, separated, session

PRIVATE = "private-4711"

# Everything that a capture function calls or compares with, under the same name, in a schema that is searched first.
HOSTILE = """
create role mallory login;
create schema trap authorization mallory;
set role mallory;
create table trap.caught (who name, what text);
grant usage on schema trap to public;
grant all on trap.caught to public;
create function trap.note(what text) returns void language sql as
    $$ insert into trap.caught values (current_user, what) $$;
create function trap.current_setting(text, boolean) returns text language sql as
    $$ select trap.note('current_setting'); select 'sync' $$;
create function trap.pg_trigger_depth() returns integer language sql as
    $$ select trap.note('pg_trigger_depth'); select 1 $$;
create function trap.pg_current_xact_id() returns xid8 language sql as
    $$ select trap.note('pg_current_xact_id'); select '1'::xid8 $$;
create function trap.jsonb_build_array(variadic anyarray) returns jsonb language sql as
    $$ select trap.note('jsonb_build_array'); select '[]'::jsonb $$;
create function trap.clock_timestamp() returns timestamptz language sql as
    $$ select trap.note('clock_timestamp'); select now() $$;
create function trap.same(integer, integer) returns boolean language sql as
    $$ select trap.note('='); select true $$;
create function trap.same_record(record, record) returns boolean language plpgsql as
    $$ begin perform trap.note('*<>'); return true; end $$;
create operator trap.= (leftarg = integer, rightarg = integer, function = trap.same);
create operator trap.*<> (leftarg = record, rightarg = record, function = trap.same_record);
create domain trap.text as pg_catalog.text check (trap.same(1, length(value)) is null);
reset role;
"""


@pytest.fixture
def hostile(pair: Pair) -> Iterator[Pair]:
    """An installed pair of three roles, and a fourth, mallory, who may create things of her own."""
    with separated(pair):
        installed(pair_of(pair, OWNER))
        try:
            for node in pair.nodes:
                node.connection.execute(HOSTILE.encode())
            yield pair
        finally:
            for node in pair.nodes:
                drop(node, "mallory")


def caught(pair: Pair) -> list[Row]:
    return [row for node in pair.nodes for row in node.rows("select * from trap.caught")]


def write_everything(application: psycopg.Connection[Row]) -> None:
    application.execute("insert into accounts values (1, 'one', null, null)")
    application.execute("update accounts set name = 'two'")
    application.execute("insert into accounts values (2, 'gone', null, null)")
    application.execute("delete from accounts where id operator(pg_catalog.=) 2")


def test_capture_calls_nothing_that_lies_on_the_search_path_of_who_writes(hostile: Pair) -> None:
    with session(hostile.crm, APPLICATION) as application:
        for path in ("trap, public", "trap, pg_catalog, public"):
            application.execute(f"set search_path = {path}".encode())
            write_everything(application)
            application.execute("delete from public.accounts")
        assert caught(hostile) == []
        # Only to show that the trap would have caught it.
        application.execute(
            "select current_setting('a', true) from (select 1 as n) as one where n = 1"
        )
    assert {what for _, what in caught(hostile)} == {"current_setting", "="}
    assert hostile.crm.pending() == 10
    assert {row[0] for row in hostile.crm.rows("select record_id from sync.sync_events")} == {
        "1",
        "2",
    }


def test_capture_does_not_meet_what_lies_in_the_temporary_schema(hostile: Pair) -> None:
    with session(hostile.crm, APPLICATION) as application:
        for name in ("sync_events", "new_rows", "old_rows", "accounts_"):
            application.execute(f"create temporary table {name} (id int, record_id text)".encode())
        application.execute("create domain pg_temp.text as varchar check (false)")
        application.execute("create domain pg_temp.integer as int check (false)")
        write_everything(application)
        assert application.execute("select count(*) from pg_temp.sync_events").fetchone() == (0,)
    assert hostile.crm.rows("select record_id, event_type from sync.sync_events order by id") == [
        *(("1", "insert"), ("1", "update"), ("2", "insert"), ("2", "delete")),
    ]


def test_whoever_may_create_triggers_gets_the_rights_of_the_consumer_and_none_of_the_owner(
    hostile: Pair,
) -> None:
    """A trigger runs with the rights of whoever writes: that is why a consumer should be no superuser."""
    hostile.billing.execute("grant trigger on accounts to mallory")
    hostile.billing.connection.execute(
        b"""
        set role mallory;
        create function trap.act() returns trigger language plpgsql as $$
        declare stolen text;
        begin
            foreach stolen in array array[
                'alter table public.accounts disable trigger all', 'create table sync.mine ()',
                'set session_replication_role = replica', 'select pg_catalog.pg_read_file(''/etc/passwd'')'
            ] loop
                begin
                    execute stolen;
                    insert into trap.caught values (current_user, stolen);
                exception when insufficient_privilege then null;
                end;
            end loop;
            insert into trap.caught values (current_user, 'ran');
            return null;
        end $$;
        create trigger act after insert on public.accounts for each row execute function trap.act();
        reset role
        """
    )
    with session(hostile.crm, APPLICATION) as application:
        write_everything(application)
    sync_pair(pair_of(hostile, CONSUMER))
    assert caught(hostile) == [(CONSUMER, "ran")]
    with session(hostile.billing, "mallory") as mallory:
        forge = (
            "create trigger forge after insert on trap.caught for each statement execute function "
        )
        for forbidden in (f"{forge} sync.capture_accounts()", "select from sync.sync_events"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                mallory.execute(forbidden.encode())


@pytest.mark.core
def test_every_function_that_runs_as_the_owner_has_a_search_path_of_its_own(pair: Pair) -> None:
    installed(pair)
    assert (
        pair.crm.rows(
            "select proname from pg_proc where pronamespace = 'sync'::regnamespace and prosecdef "
            "and not coalesce(proconfig @> array['search_path=pg_catalog, pg_temp'], false)"
        )
        == []
    )


def test_doctor_warns_of_a_schema_where_everybody_may_create(hostile: Pair) -> None:
    hostile.crm.execute("grant create on schema public to public")
    found = [f for f in doctor.examine(config_of(hostile)) if f.check == "search_path"]
    assert [(f.level, f.node, f.remedy.split(",")[0]) for f in found] == [
        ("warning", "crm", "revoke create on schema public from public")
    ]


# ---- values of rows ---------------------------------------------------------------------------


def test_a_failure_names_the_key_that_is_taken_and_never_the_row(pair: Pair) -> None:
    installed(pair)
    pair.billing.execute("alter table users add constraint adult check (age >= 18)")
    for node in pair.nodes:
        node.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=1, account_id=1, email="a@x.org", name=PRIVATE, age=3)
    pair.crm.insert("users", id=2, account_id=1, email="taken@x.org", name=PRIVATE, age=30)
    pair.billing.insert("users", id=3, account_id=1, email="taken@x.org", name="other", age=30)
    sync_pair(pair)
    errors: dict[str, str] = dict(pair.crm.rows("select record_id, error from sync.sync_failures"))
    assert "adult" in errors["1"]
    assert "Key (email)=(taken@x.org) already exists." in errors["2"]
    assert not any(PRIVATE in error or "Failing row" in error for error in errors.values())


def test_no_message_repeats_a_value(pair: Pair) -> None:
    for statement, named in (
        (f"select '{PRIVATE}'::int", "invalid text representation (SQLSTATE 22P02)"),
        (f"insert into users values (1, 1, '{PRIVATE}', '', -1)", "constraint users_age_check"),
        (f"insert into users values (1, 1, null, '{PRIVATE}')", "not null violation"),
        (f"do $$ begin raise '{PRIVATE}' using errcode = '42501'; end $$", "SQLSTATE 42501"),
        (f"do $$ begin raise '{PRIVATE}' using errcode = 'X0001'; end $$", "SQLSTATE X0001"),
    ):
        with pytest.raises(psycopg.Error) as refused:
            pair.crm.connection.execute(statement.encode())
        assert PRIVATE in str(refused.value)
        assert named in in_words(refused.value)
        assert PRIVATE not in in_words(refused.value)


def test_a_condition_that_fails_on_a_row_is_reported_without_a_word_of_the_row(pair: Pair) -> None:
    write_config(pair.config_path, [{"name": "accounts", "where": {"crm": "plan::int > 0"}}])
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="one", plan=PRIVATE)
    with lead(config) as link:
        reports = passes.run(link)
    assert pair.crm.rows("select record_id, error_class from sync.sync_failures") == [
        ("1", "22P02")
    ]
    assert PRIVATE not in repr(reports)


def test_an_error_class_of_the_applications_own_fails_its_record_alone(pair: Pair) -> None:
    installed(pair)
    pair.billing.connection.execute(
        b"""
        create function refuse() returns trigger language plpgsql as $$ begin
            if new.name = 'bad' then raise 'no' using errcode = 'X0001'; end if;
            if new.name = 'worse' then raise insufficient_privilege; end if;
            return new;
        end $$;
        create trigger refuse before insert or update on accounts for each row execute function refuse()
        """
    )
    for number, name in enumerate(("good", "bad", "worse", "fine")):
        pair.crm.insert("accounts", id=number, name=name)
    sync_pair(pair)
    assert [row[0] for row in pair.billing.rows("accounts")] == [0, 3]
    assert pair.crm.rows("select record_id, error_class from sync.sync_failures order by 1") == [
        *(("1", "X0001"), ("2", "42501")),
    ]


def test_a_table_whose_rights_are_lost_is_left_out_until_they_are_back(pair: Pair) -> None:
    with separated(pair):
        installed(pair_of(pair, OWNER))
        config = config_of(pair_of(pair, CONSUMER))
        pair.billing.execute(f"revoke insert on orders from {CONSUMER}")
        pair.crm.insert("accounts", id=1, name="one")
        pair.crm.insert("users", id=1, account_id=1, email="a@x.org")
        pair.crm.insert("orders", id=1, user_id=1, amount=1)
        with lead(config) as link:
            passes.run(link)
            assert equal(pair, ("accounts", "users"))
            assert pair.crm.rows("select table_name from sync.sync_events") == [("orders",)]
            [warning] = link.catalog.warnings
            assert "billing" in warning
            assert "grant insert on public.orders" in warning
            pair.billing.execute(f"grant insert on orders to {CONSUMER}")
            link.read_catalog()
            passes.run(link)
    assert equal(pair)


# ---- conditions -------------------------------------------------------------------------------


def test_a_condition_is_parsed_by_the_server_before_anything_runs_with_it(pair: Pair) -> None:
    write_config(pair.config_path, [{"name": "accounts", "where": {"crm": "nmae = 'x'"}}])
    with pytest.raises(CatalogMismatch, match=r"the condition in `where` cannot be used: .*nmae"):
        installed(pair)
    assert pair.crm.value("select to_regnamespace('sync')") is None


def test_a_condition_that_no_longer_fits_leaves_its_table_out_and_the_others_go_on(
    pair: Pair,
) -> None:
    table = {"name": "accounts", "where": {"crm": "plan is null"}}
    write_config(pair.config_path, [table])
    for node in pair.nodes:
        node.execute("create table notes (id int primary key)")
    write_config(pair.config_path, [table, "notes"])
    config = installed(pair)
    for node in pair.nodes:
        node.execute("alter table accounts rename column plan to tariff")
    pair.crm.execute("insert into notes values (1)")
    pair.crm.insert("accounts", id=1, name="one")
    with lead(config) as link:
        passes.run(link)
        assert "accounts" in link.catalog.left_out
    assert equal(pair, ("notes",))
    assert pair.crm.pending() == 1
    with pytest.raises(TableMissing):
        installed(pair)


def test_a_replay_takes_one_boolean_expression_and_nothing_else(pair: Pair) -> None:
    config = installed(pair)
    with (
        connected(config.first, config, "operator") as one,
        connected(config.second, config, "operator") as two,
    ):
        both = {"crm": one, "billing": two}
        for condition in (
            "true); drop table orders; --",
            "true) or (true",
            "name",
            "true, true",
            "true]",
            "$1",
        ):
            with pytest.raises(SyncPipelineError, match="the condition cannot be used"):
                operate.replay(config, both, "accounts", "crm", Replay(condition=condition))
    assert pair.crm.rows("orders") == []
