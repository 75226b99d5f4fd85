"""Triggers of the application: what they do elsewhere is work of their node and travels; nothing ping-pongs."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from sync_pipeline import passes, servers
from sync_pipeline.errors import CatalogMismatch, PassInterrupted
from sync_pipeline.link import lead
from tests.engine import config_of, installed, sync_pair, totals
from tests.helpers import Cluster, Node, Pair, write_config
from tests.shapes import converge, failures, link, marked, texts

AUDIT = """
create table items (id int primary key, word text);
create table audit (id uuid primary key default gen_random_uuid(), item int, what text);
create function note() returns trigger language plpgsql as $$
begin
    insert into audit (item, what) values (coalesce(new.id, old.id), tg_op);
    return null;
end $$;
create trigger note after insert or update or delete on items for each row execute function note();
"""

CARELESS = """create function {name}() returns trigger language plpgsql as $$
begin
    if new.word = 'bad' then perform count(*) from forgotten; end if;
    return new;
end $$;
create trigger careless before insert or update on t for each row execute function {name}()"""


@pytest.mark.core
def test_what_a_trigger_writes_to_another_table_is_captured_on_both_nodes(pair: Pair) -> None:
    link(pair, AUDIT, "items", "audit")
    pair.crm.execute("insert into items values (1, 'a')")
    converge(pair, "items", "audit")
    # One row by each node's trigger; both travelled.
    assert pair.crm.value("select count(*) from audit") == 2
    pair.billing.execute("update items set word = 'b'")
    pair.billing.execute("delete from items")
    converge(pair, "items", "audit")
    # Two changes there, but the pass carries what the record is now: one delete here.
    assert sorted(pair.billing.rows("select what, count(*) from audit group by 1")) == [
        ("DELETE", 2),
        ("INSERT", 2),
        ("UPDATE", 1),
    ]
    assert totals(pair).passes == 0


def test_a_trigger_can_stand_back_while_the_pipeline_applies(pair: Pair) -> None:
    quiet = AUDIT.replace(
        "for each row execute",
        "for each row when (coalesce(current_setting('sync_pipeline.applying', true), '') = '') execute",
    )
    link(pair, quiet, "items", "audit")
    pair.crm.execute("insert into items values (1, 'a')")
    converge(pair, "items", "audit")
    assert pair.billing.rows("select item, what from audit") == [(1, "INSERT")]


TOUCH = """
create table parents (id int primary key, name text, touched int not null default 0);
create table children (id int primary key, parent int references parents, word text);
create function touch() returns trigger language plpgsql as $$
begin
    update parents set touched = touched + 1 where id = new.parent;
    return null;
end $$;
create trigger touch after insert or update on children for each row execute function touch();
"""


@pytest.mark.core
def test_a_trigger_that_touches_the_parent_loses_no_change_and_does_not_ping_pong(
    pair: Pair,
) -> None:
    link(pair, TOUCH, "parents", "children")
    pair.crm.execute("insert into parents values (1, 'old')")
    pair.crm.execute("insert into children values (1, 1, 'a')")
    converge(pair, "parents", "children")
    # The parent's own change and the child's are in one batch; the trigger there touches the parent again.
    pair.crm.execute("update parents set name = 'new'")
    pair.crm.execute("update children set word = 'b'")
    converge(pair, "parents", "children")
    assert pair.billing.value("select name from parents") == "new"
    assert totals(pair).passes == 0
    for node in pair.nodes:
        assert node.rows("select kind from sync.sync_conflicts") == []


def test_a_trigger_that_fails_fails_its_record_alone(pair: Pair) -> None:
    picky = """create table t (id int primary key, word text);
        create function picky() returns trigger language plpgsql as $$
        begin
            if new.word = 'bad' then raise exception 'no % here', new.word using errcode = 'P0042'; end if;
            return new;
        end $$"""
    link(pair, picky, "t")
    pair.billing.execute(
        "create trigger picky before insert or update on t for each row execute function picky()"
    )
    pair.crm.execute("insert into t values (1, 'good'), (2, 'bad'), (3, 'good')")
    totals(pair)
    assert texts(pair.billing, "t") == ["(1,good)", "(3,good)"]
    assert failures(pair.crm) == [("t", "2", "P0042", "no bad here")]


REWRITING = """
create table t (id int primary key, word text, version int);
create function rewrite() returns trigger language plpgsql as $$
begin
    new.version := coalesce(new.version, 0) + 1;
    return new;
end $$;
create trigger rewrite before insert or update on t for each row {} execute function rewrite();
"""


def test_a_trigger_that_rewrites_its_own_row_does_not_ping_pong(pair: Pair) -> None:
    # The sides differ in what the trigger writes: doctor finds such triggers, docs/limits.md says what to do.
    link(pair, REWRITING.format(""), "t")
    pair.crm.execute("insert into t values (1, 'a')")
    sync_pair(pair)
    pair.billing.execute("update t set word = 'b'")
    sync_pair(pair)
    assert totals(pair).passes == 0
    assert marked(pair.crm) == marked(pair.billing) == []
    assert pair.crm.value("select word from t") == "b"


def test_a_rewriting_trigger_that_stands_back_keeps_both_sides_equal(pair: Pair) -> None:
    guard = "when (coalesce(current_setting('sync_pipeline.applying', true), '') = '')"
    link(pair, REWRITING.format(guard), "t")
    pair.crm.execute("insert into t values (1, 'a')")
    converge(pair, "t")
    pair.billing.execute("update t set word = 'b'")
    converge(pair, "t")
    assert texts(pair.crm, "t") == ["(1,b,2)"]


AGAIN = """
create table t (id int primary key, word text, version int not null default 0);
create function again() returns trigger language plpgsql as $$
begin
    update t set version = version + 1 where id = new.id;
    return null;
end $$;
create trigger again after update of word on t for each row {} execute function again();
"""


def test_a_trigger_that_updates_its_own_row_again_goes_back_and_forth(pair: Pair) -> None:
    config = link(pair, AGAIN.format(""), "t")
    pair.crm.execute("insert into t values (1, 'a')")
    converge(pair, "t")
    pair.crm.execute("update t set word = 'b'")
    with lead(config) as held:
        for _ in range(4):
            assert any(report.did_something for report in passes.run(held))


def test_such_a_trigger_comes_to_rest_when_it_stands_back(pair: Pair) -> None:
    guard = "when (coalesce(current_setting('sync_pipeline.applying', true), '') = '')"
    link(pair, AGAIN.format(guard), "t")
    pair.crm.execute("insert into t values (1, 'a')")
    pair.crm.execute("update t set word = 'b'")
    converge(pair, "t")
    assert texts(pair.billing, "t") == ["(1,b,1)"]


def test_a_trigger_that_swallows_a_row_is_no_failure_and_no_loop(pair: Pair) -> None:
    swallow = """create table t (id int primary key);
        create function swallow() returns trigger language plpgsql as 'begin return null; end'"""
    link(pair, swallow, "t")
    pair.billing.execute(
        "create trigger swallow before insert on t for each row execute function swallow()"
    )
    pair.crm.execute("insert into t values (1)")
    sync_pair(pair)
    assert texts(pair.billing, "t") == []
    assert marked(pair.crm) == failures(pair.crm) == []


def test_a_deferred_constraint_trigger_fails_the_right_record(pair: Pair) -> None:
    ddl = """create table t (id int primary key, word text);
        create function check_word() returns trigger language plpgsql as $$
        begin
            if exists (select from t where id = new.id and word = 'bad') then
                raise check_violation using message = 'bad word';
            end if;
            return null;
        end $$"""
    link(pair, ddl, "t")
    pair.billing.execute(
        """create constraint trigger check_word after insert or update on t
        deferrable initially deferred for each row execute function check_word()"""
    )
    pair.crm.execute(
        "insert into t select n, case n when 3 then 'bad' else 'good' end "
        "from generate_series(1, 6) as n"
    )
    totals(pair)
    assert pair.billing.value("select array_agg(id order by id) from t") == [1, 2, 4, 5, 6]
    assert failures(pair.crm) == [("t", "3", "23514", "bad word")]


def test_rules_and_triggers_of_views_that_write_to_a_synced_table_are_captured(pair: Pair) -> None:
    ddl = """create table t (id int primary key, word text);
        create view v as select * from t;
        create view w as select id, upper(word) as word from t;
        create rule add as on insert to w do instead insert into t values (new.id, lower(new.word))"""
    link(pair, ddl, "t")
    pair.crm.execute("insert into v values (1, 'a'); insert into w values (2, 'B')")
    pair.crm.execute("update v set word = 'c' where id = 1")
    converge(pair, "t")
    assert texts(pair.billing, "t") == ["(1,c)", "(2,b)"]


@pytest.mark.parametrize(
    ("statement", "error_class"),
    [
        ("perform count(*) from forgotten;", "42P01"),
        ("perform currval('ids');", "55000"),
        ("raise lock_not_available;", "55P03"),
        ("raise query_canceled;", "57014"),
        ("execute 'select missing(1)';", "42883"),
    ],
)
def test_what_is_wrong_in_a_trigger_is_said_of_its_record(
    pair: Pair, statement: str, error_class: str
) -> None:
    link(pair, "create table t (id int primary key, word text); create sequence ids", "t")
    pair.billing.execute(
        f"""create function careless() returns trigger language plpgsql as $$
        begin
            if new.word = 'bad' then {statement} end if;
            return new;
        end $$;
        create trigger careless before insert or update on t for each row execute function careless()"""
    )
    pair.crm.execute("insert into t values (1, 'good'), (2, 'bad'), (3, 'good')")
    totals(pair)
    assert texts(pair.billing, "t") == ["(1,good)", "(3,good)"]
    assert [failure[:3] for failure in failures(pair.crm)] == [("t", "2", error_class)]


@pytest.mark.parametrize("name", ["capture_payment", '"take a note"'])
def test_what_is_wrong_in_a_trigger_is_said_of_its_record_whatever_its_function_is_called(
    pair: Pair, name: str
) -> None:
    link(pair, "create table t (id int primary key, word text)", "t")
    pair.billing.execute(CARELESS.format(name=name))
    pair.crm.execute("insert into t values (1, 'good'), (2, 'bad')")
    totals(pair)
    assert texts(pair.billing, "t") == ["(1,good)"]
    assert [failure[:3] for failure in failures(pair.crm)] == [("t", "2", "42P01")]


@pytest.mark.parametrize("language", ["fr", "ko"])
def test_what_is_wrong_in_a_function_is_said_of_its_record_in_any_language(
    pair: Pair, server_directory: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    found = servers.available_versions().items()
    versions = [version for version, path in found if "site-packages" not in path.parts]
    if not versions:
        pytest.skip("only the wheel's PostgreSQL is here, which speaks no other language")
    monkeypatch.setenv("LANGUAGE", language)
    directory, settings = server_directory / language, {"lc_messages": "C.utf8"}
    with (
        closing(
            Cluster(servers.Server.create(directory, versions[-1], settings=settings))
        ) as cluster,
        closing(Node("billing", cluster.server.dsn(cluster.clone()), cluster.server)) as billing,
    ):
        with pytest.raises(psycopg.errors.UndefinedTable) as said:
            billing.rows("forgotten")
        if "does not exist" in str(said.value):
            pytest.skip("this PostgreSQL has no other language")
        pair = replace(pair, billing=billing)
        link(
            pair,
            "create table t (id int primary key, word text); create table u (like t including all)",
            "t",
            "u",
        )
        billing.execute(CARELESS.format(name="careless"))
        billing.execute(
            """create table lost ();
            create function is_known(text) returns boolean language sql
                as $$ select exists (select from lost) or $1 = 'good' $$;
            alter table u add check (is_known(word));
            drop table lost"""
        )
        pair.crm.execute(
            "insert into t values (1, 'good'), (2, 'bad'); insert into u select * from t"
        )
        totals(pair)
        assert texts(billing, "t") == ["(1,good)"]
        assert [failure[:3] for failure in failures(pair.crm)] == [
            ("t", "2", "42P01"),
            ("u", "1", "42P01"),
            ("u", "2", "42P01"),
        ]


def test_a_table_with_a_rule_is_refused_where_it_is_written_to(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create table t (id int primary key, word text)")
    pair.crm.execute("create rule also as on update to t do also notify t")
    write_config(pair.config_path, ["t"])
    with pytest.raises(CatalogMismatch, match="a table with a rule, such as also"):
        installed(pair)
    write_config(pair.config_path, [{"name": "t", "source": "crm"}])
    installed(pair)


def test_a_lock_that_a_trigger_waits_for_costs_its_record_no_attempt(pair: Pair) -> None:
    tables = "create table t (id int primary key); create table sums (n int)"
    link(pair, tables, "t", lock_timeout_seconds=0.1)
    pair.billing.execute(
        """create function add() returns trigger language plpgsql as $$
        begin
            lock table sums;
            return new;
        end $$;
        create trigger add before insert on t for each row execute function add()"""
    )
    pair.crm.execute("insert into t values (1)")
    with pair.billing.connect(autocommit=False) as session, lead(config_of(pair)) as leader:
        session.execute("lock table sums")
        with pytest.raises(PassInterrupted):
            passes.run(leader)
    assert failures(pair.crm) == []
    converge(pair, "t")
