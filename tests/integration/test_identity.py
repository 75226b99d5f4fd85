"""Nobody leads on a database that is not the one that was installed, until somebody has confirmed it."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest

from sync_pipeline import doctor, identity
from sync_pipeline.config import load
from sync_pipeline.database import connected
from sync_pipeline.errors import NotInstalled, WrongDatabase
from tests.engine import config_of, confirm, equal, installed, sync_pair
from tests.helpers import Cluster, Node, Pair, eventually, write_config


def refused(pair: Pair, match: str, *, is_installed: bool = True) -> None:
    """`install` changes nothing, nobody leads, and doctor says the same."""
    with pytest.raises(WrongDatabase, match=match):
        installed(pair)
    with pytest.raises(WrongDatabase if is_installed else NotInstalled):
        sync_pair(pair)
    messages = [f.message for f in doctor.examine(config_of(pair)) if f.check == "identity"]
    assert any(match in message for message in messages)


@pytest.fixture(params=["template", "dump"])
def copy(
    request: pytest.FixtureRequest,
    pair: Pair,
    crm_server: Cluster,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Pair]:
    """An installed pair in which a copy of crm, or what was restored from a dump, stands where crm was."""
    installed(pair)
    pair.crm.insert("accounts", id=1, name="before the copy")
    server = pair.crm.server
    original = str(pair.crm.value("select current_database()"))
    # Nobody may be connected to a template.
    pair.crm.close()
    name = f"copy_of_{original}"
    with closing(Node("crm", server.dsn(), server)) as admin:
        if request.param == "template":
            admin.execute(f"create database {name} template {original}")
        else:
            admin.execute(f"create database {name}")
            dump = subprocess.run(
                [server.bin("pg_dump"), pair.crm.dsn], check=True, capture_output=True
            )
            subprocess.run(
                [server.bin("psql"), "-qv", "ON_ERROR_STOP=1", server.dsn(name)],
                input=dump.stdout,
                check=True,
                capture_output=True,
            )
    with closing(Node("crm", server.dsn(name), server)) as node:
        monkeypatch.setenv("CRM_DSN", node.dsn)
        yield replace(pair, crm=node)
    crm_server.drop(name)


@pytest.mark.core
def test_a_copy_or_a_restored_dump_of_a_database_is_refused_until_it_is_confirmed(
    copy: Pair,
) -> None:
    refused(copy, "not the database that was installed as crm but a copy or a restore of it")
    assert copy.crm.pending() == 1
    assert copy.billing.rows("accounts") == []
    config = config_of(copy)
    assert [(step.node, "sync_node" in step.statement) for step in confirm(config)] == [
        ("crm", True)
    ]
    assert confirm(config) == []
    sync_pair(copy)
    assert equal(copy)
    assert doctor.examine(config) == []


def test_exchanged_dsns_are_refused_and_cannot_be_confirmed(pair: Pair) -> None:
    installed(pair)
    exchanged = replace(
        pair,
        crm=replace(pair.crm, dsn=pair.billing.dsn),
        billing=replace(pair.billing, dsn=pair.crm.dsn),
    )
    refused(exchanged, "leads to the database that was installed as billing")
    with pytest.raises(WrongDatabase, match="exchange the dsns"):
        confirm(config_of(exchanged))


@pytest.mark.parametrize("state", ["new", "installed"])
def test_two_dsns_of_one_database_are_refused(pair: Pair, state: str) -> None:
    is_installed = state == "installed"
    if is_installed:
        installed(pair)
    # Two names of one server: the configuration cannot tell.
    address = psycopg.conninfo.conninfo_to_dict(pair.crm.dsn)["host"]
    other = psycopg.conninfo.make_conninfo(pair.crm.dsn, host="elsewhere", hostaddr=address)
    twice = replace(pair, billing=replace(pair.billing, dsn=other))
    refused(twice, "lead to the same database", is_installed=is_installed)
    with pytest.raises(WrongDatabase, match="lead to the same database"):
        confirm(config_of(twice))
    assert len(pair.crm.rows("select from pg_namespace where nspname = 'sync'")) == is_installed


def test_a_node_that_was_renamed_on_purpose_goes_on_once_it_is_confirmed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pair)
    text = write_config(pair.config_path).read_text().replace("crm:", "sales:")
    pair.config_path.write_text(text)
    pair.billing.insert("accounts", id=1, name="one")
    refused(pair, "installed as crm with the peer billing, not as sales with billing")
    confirm(load(pair.config_path, pair.environment))
    sync_pair(pair)
    assert equal(pair)


def test_a_node_that_is_installed_anew_has_lost_nothing(pair: Pair) -> None:
    config = installed(pair)
    for number, dropped in enumerate((pair.crm, pair.billing)):
        for node in pair.nodes:
            node.insert("accounts", id=2 * number + (node is pair.crm), name="one")
            sync_pair(pair)
        dropped.execute("drop schema sync cascade")
        installed(pair)
        sync_pair(pair)
    pair.crm.insert("accounts", id=9, name="one")
    sync_pair(pair)
    assert equal(pair)
    assert doctor.examine(config) == []


@pytest.mark.parametrize("number", [0, 1])
def test_batches_of_a_consumer_that_is_at_work_are_no_lost_commits(pair: Pair, number: int) -> None:
    config = installed(pair)
    held, other = pair.nodes[number], pair.nodes[1 - number]
    with (
        connected(config.first, config, "install") as one,
        connected(config.second, config, "install") as two,
        ThreadPoolExecutor(1) as pool,
    ):
        # As a pass does it, while the node that is asked last has not answered yet.
        with held.connection.transaction():
            held.execute("lock table sync.sync_node in access exclusive mode")
            asking = pool.submit(identity.require_commits, config, {"crm": one, "billing": two})
            eventually(
                "waits", lambda: held.value("select count(*) from pg_locks where not granted")
            )
            other.execute("update sync.sync_node set acknowledged_batch = 1")
            held.execute("update sync.sync_node set applied_batch = 1, forgotten_batch = 1")
        asking.result()


def test_a_server_that_keeps_its_identifier_to_itself_is_told_by_the_database_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in pair.nodes:
        node.execute("revoke execute on function pg_control_system() from public")
        node.execute("drop role if exists modest")
        node.execute("create role modest login")
        node.execute("grant create on schema public to modest")
        database = node.value("select current_database()")
        node.execute(f"grant create on database {database} to modest")
        for table in ("accounts", "users", "orders"):
            node.execute(f"alter table {table} owner to modest")
        dsn = psycopg.conninfo.make_conninfo(node.dsn, user="modest")
        monkeypatch.setenv(f"{node.name.upper()}_DSN", dsn)
    crm, billing = (
        replace(node, dsn=psycopg.conninfo.make_conninfo(node.dsn, user="modest"))
        for node in pair.nodes
    )
    modest = replace(pair, crm=crm, billing=billing)
    installed(modest)
    pair.crm.insert("accounts", id=1, name="one")
    sync_pair(modest)
    assert equal(pair)
    assert pair.crm.value("select system_identifier from sync.sync_node") is None
    pair.crm.execute("update sync.sync_node set database_oid = 1")
    refused(modest, "not the database that was installed")
    for node in pair.nodes:
        node.execute("drop owned by modest cascade; drop role modest")
