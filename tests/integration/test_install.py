"""Installing: any number of times, any number at once, and nothing but what it owns is touched or left behind."""

from concurrent.futures import ThreadPoolExecutor

from sync_pipeline import install
from sync_pipeline.config import Config
from sync_pipeline.database import connected
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import Pair


def run_install(config: Config) -> int:
    """Install in sessions of its own; return how many statements were run."""
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
    ):
        return len(install.install(config, {config.first.name: one, config.second.name: two}))


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
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
    ):
        install.uninstall(config, {"crm": one, "billing": two})
    for node in pair.nodes:
        assert node.value("select to_regnamespace('sync') is null")
        assert node.value("select count(*) from pg_trigger where not tgisinternal") == 0
    assert pair.crm.rows("select name from accounts") == [("first",)]
    pair.crm.insert("accounts", id=2, name="still works")
