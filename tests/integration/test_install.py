"""Installing: any number of times, any number at once, and nothing but what it owns is touched or left behind."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from sync_pipeline import doctor, install
from sync_pipeline.config import Config
from sync_pipeline.database import connected
from sync_pipeline.errors import CatalogMismatch, PassInterrupted, SyncPipelineError
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import Pair, write_config


def run_install(config: Config) -> int:
    """Install in sessions of its own; return how many statements were run."""
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
    ):
        return len(install.install(config, {config.first.name: one, config.second.name: two}))


def run_uninstall(config: Config) -> int:
    """Uninstall in sessions of its own; return how many statements were run."""
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
    ):
        return len(install.uninstall(config, {config.first.name: one, config.second.name: two}))


def triggers(pair: Pair) -> list[int]:
    """How many triggers applications meet on each node."""
    statement = "select count(*) from pg_trigger where not tgisinternal"
    return [node.value(statement) for node in pair.nodes]


def test_a_second_installation_finds_nothing_to_do(pair: Pair) -> None:
    config = config_of(pair)
    assert run_install(config) > 0
    assert run_install(config) == 0


def test_eight_installations_at_once_end_as_one(pair: Pair) -> None:
    config = config_of(pair)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run_install, [config] * 8))
    for node in pair.nodes:
        assert node.value("select count(*) from sync.sync_migrations") == 1
        assert node.value("select count(*) from sync.sync_node") == 1
    pair.crm.insert("accounts", id=1, name="first")
    sync_pair(pair)
    assert equal(pair)


def test_a_plan_changes_nothing(pair: Pair) -> None:
    config = config_of(pair)
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
    ):
        steps = install.plan(config, {"crm": one, "billing": two})
    assert any("create table" in step.statement for step in steps)
    for node in pair.nodes:
        assert node.value("select to_regnamespace('sync') is null")


def test_uninstalling_leaves_the_tables_and_no_trigger(pair: Pair) -> None:
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    run_uninstall(config)
    for node in pair.nodes:
        assert node.value("select to_regnamespace('sync') is null")
        assert node.value("select count(*) from pg_trigger where not tgisinternal") == 0
    assert pair.crm.rows("select name from accounts") == [("first",)]
    pair.crm.insert("accounts", id=2, name="still works")


def test_what_the_second_node_refuses_is_not_installed_on_the_first_either(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "LOCK_ATTEMPTS", 1)
    with pair.billing.connect(autocommit=False) as application:
        application.execute("lock table users in row exclusive mode")
        with pytest.raises(PassInterrupted, match="billing: a table stayed locked"):
            run_install(config_of(pair))
    for node in pair.nodes:
        assert node.value("select to_regnamespace('sync') is null")
    assert triggers(pair) == [0, 0]


def test_an_application_that_waits_for_an_installation_is_not_ended_by_a_deadlock(
    pair: Pair,
) -> None:
    with pair.crm.connect(autocommit=False) as application, ThreadPoolExecutor(1) as pool:
        application.execute("lock table users in row exclusive mode")
        installing = pool.submit(run_install, config_of(pair))
        waiting = "select count(*) from pg_locks where not granted and relation = 'users'::regclass"
        while not pair.crm.value(waiting):
            assert not installing.done()
        application.execute("insert into accounts (id, name) values (1, 'one')")
        application.commit()
        assert installing.result() > 0


def test_uninstalling_refuses_to_take_along_what_is_not_the_pipelines(pair: Pair) -> None:
    config = installed(pair)
    before = triggers(pair)
    pair.billing.execute("create table sync.notes (note text)")
    pair.billing.execute("create view public.backlog as select count(*) from sync.sync_events")
    pair.billing.execute("create function sync.is_value(integer) returns int return 1")
    pair.billing.execute(
        "create function sync.stamp() returns trigger language plpgsql as 'begin return new; end';"
        "create trigger stamp before insert on users for each row execute function sync.stamp()"
    )
    with pytest.raises(SyncPipelineError, match="nothing was removed") as refused:
        run_uninstall(config)
    for name in ("table sync.notes", "view backlog", "sync.is_value(integer)", "sync.stamp()"):
        assert name in str(refused.value)
    assert "sync_failures" not in str(refused.value)
    assert triggers(pair) == [before[0], before[1] + 1]
    pair.crm.insert("accounts", id=1, name="still captured")
    sync_pair(pair)
    assert equal(pair)

    pair.billing.execute("drop view backlog; drop table sync.notes")
    pair.billing.execute("drop function sync.is_value(integer), sync.stamp() cascade")
    assert run_uninstall(config) > 0
    assert triggers(pair) == [0, 0]


def test_a_schema_in_which_the_pipeline_was_never_installed_is_left_alone(pair: Pair) -> None:
    for node in pair.nodes:
        node.execute("create schema sync; create table sync.sync_migrations (note text)")
    assert run_uninstall(config_of(pair)) == 0
    for node in pair.nodes:
        assert node.rows("sync.sync_migrations") == []


def test_a_name_that_is_taken_by_something_else_is_refused_on_both_nodes(pair: Pair) -> None:
    pair.billing.execute("create schema sync; create table sync.sync_events (note text)")
    pair.billing.execute(
        "create function sync.capture_users() returns trigger language plpgsql as 'begin end'"
    )
    with pytest.raises(CatalogMismatch, match=r"table sync\.sync_events") as refused:
        run_install(config_of(pair))
    assert "capture_users()" in str(refused.value)
    assert "`schema`" in str(refused.value)
    assert pair.crm.value("select to_regnamespace('sync') is null")


def test_a_trigger_function_of_somebody_else_in_the_schema_survives_installing(pair: Pair) -> None:
    installed(pair)
    pair.crm.execute(
        "create function sync.stamp() returns trigger language plpgsql as 'begin return new; end'"
    )
    assert run_install(config_of(pair)) == 0
    assert pair.crm.value("select to_regprocedure('sync.stamp()') is not null")


def test_a_table_that_is_renamed_in_the_configuration_too_is_captured_after_installing(
    pair: Pair,
) -> None:
    installed(pair)
    for node in pair.nodes:
        node.execute("alter table orders rename to purchases")
    write_config(pair.config_path, ["accounts", "users", "purchases"])
    config = installed(pair)
    assert run_install(config) == 0
    for number, node in enumerate(pair.nodes):
        node.execute("insert into accounts values (%s, 'one')", number)
        node.execute("insert into users values (%s, %s, %s)", number, number, node.name)
        node.execute("insert into purchases values (%s, %s, 10)", number, number)
    sync_pair(pair)
    assert equal(pair, ("accounts", "users", "purchases"))


def test_tables_that_have_exchanged_their_names_are_captured_under_the_new_ones(
    pair: Pair,
) -> None:
    for node in pair.nodes:
        node.execute("create table blue (id int primary key, word text)")
        node.execute("create table green (like blue including all)")
    write_config(pair.config_path, ["blue", "green"])
    config = installed(pair)
    for node in pair.nodes:
        node.execute("alter table blue rename to other")
        node.execute("alter table green rename to blue; alter table other rename to green")
    found = [f for f in doctor.examine(config) if f.level == "error"]
    assert {(f.check, f.node, f.table) for f in found} == {
        ("capture", node.name, table) for node in pair.nodes for table in ("blue", "green")
    }
    assert run_install(config) > 0
    pair.crm.execute("insert into blue values (1, 'blue')")
    pair.billing.execute("insert into green values (2, 'green')")
    sync_pair(pair)
    assert equal(pair, ("blue", "green"))
    assert doctor.examine(config) == []
