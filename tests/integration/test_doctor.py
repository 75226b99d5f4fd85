"""Doctor names what would hurt, with the remedy, before it does."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest

from sync_pipeline import catalog, doctor, install, node_checks, servers, stream
from sync_pipeline.database import connect, connected
from sync_pipeline.errors import CatalogMismatch, ConnectionFailed, TableMissing
from sync_pipeline.node_checks import OLDEST_VERSION
from sync_pipeline.records import Finding
from sync_pipeline.servers import Setting
from tests.engine import config_of, equal, installed
from tests.helpers import Cluster, Node, Pair, encoded, shift_clock, write_config
from tests.replicas import Replica, replicable, short_directory, until
from tests.shapes import converge

pytestmark = pytest.mark.core


def findings(pair: Pair, check: str | None = None) -> list[Finding]:
    found = doctor.examine(config_of(pair))
    return [finding for finding in found if check in {None, finding.check}]


def only(pair: Pair, check: str) -> Finding:
    found = findings(pair, check)
    assert len(found) == 1, doctor.examine(config_of(pair))
    return found[0]


def configure(pair: Pair, *tables: str | dict[str, Any]) -> None:
    write_config(pair.config_path, tables)


def on_both(pair: Pair, statement: str) -> None:
    for node in pair.nodes:
        node.execute(statement)


def test_a_healthy_pair_has_no_findings(pair: Pair) -> None:
    installed(pair)

    assert findings(pair) == []


def test_a_node_that_cannot_be_reached_is_an_error_and_the_other_one_is_still_examined(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pair)
    pair.billing.execute("alter table sync.sync_events set (autovacuum_enabled = false)")
    environment = pair.environment | {"CRM_DSN": "postgresql://a:secret@127.0.0.1:1/x"}
    monkeypatch.setattr(Pair, "environment", environment)

    found = findings(pair)

    assert [(f.level, f.check, f.node) for f in found] == [
        ("error", "connection", "crm"),
        ("warning", "autovacuum", "billing"),
    ]
    assert "secret" not in str(found)


def test_a_missing_table_a_missing_key_and_a_missing_column_are_all_named_at_once(
    pair: Pair,
) -> None:
    pair.billing.execute("drop table orders")
    on_both(pair, "create table tags (name text)")
    pair.crm.execute("alter table accounts add column region text")
    configure(pair, "accounts", "users", "orders", "tags")

    found = {(f.node, f.table): f for f in findings(pair, "catalog")}

    assert {f.level for f in found.values()} == {"error"}
    assert "does not exist" in found["billing", "orders"].message
    assert "no primary key" in found["crm", "tags"].message
    assert "region" in found["billing", "accounts"].message
    assert "exclude" in found["billing", "accounts"].remedy


def test_a_remedy_names_the_file_that_was_given(pair: Pair, tmp_path: Path) -> None:
    other = write_config(
        tmp_path / "other.yaml",
        [
            {"name": "accounts", "exclude": ["id"]},
            {"name": "users", "key": ["nick"]},
            {"name": "orders", "crm": {"columns": {"note": "remark"}}},
            "nowhere",
        ],
    )

    found = [f for f in doctor.examine(config_of(pair, other)) if f.check == "catalog"]

    assert [(f.table, str(other) in f.remedy) for f in found] == [
        *(("accounts", True), ("users", True), ("orders", True), ("nowhere", True)),
    ]
    assert "take it out of `exclude`" in found[0].remedy


def test_an_excluded_field_that_neither_node_has_is_an_error_and_stops_no_consumer(
    pair: Pair,
) -> None:
    installed(pair)
    configure(pair, {"name": "accounts", "exclude": ["paln"]}, "users", "orders")

    (finding,) = findings(pair, "catalog")
    assert (finding.level, finding.table) == ("error", "accounts")
    assert "`exclude` names paln, which neither node has" in finding.message
    with pytest.raises(CatalogMismatch, match="paln"):
        installed(pair)
    config = config_of(pair)
    with connected(config.first, config, "t") as crm, connected(config.second, config, "t") as two:
        found = catalog.read(config, {"crm": crm, "billing": two}, forgive=TableMissing)
    assert found.warnings == ("accounts: `exclude` names paln, which neither node has",)


def test_a_column_that_is_mapped_to_another_field_is_not_said_to_be_missing(pair: Pair) -> None:
    configure(pair, {"name": "accounts", "crm": {"columns": {"plan": "name"}}})

    (message,) = [f.message for f in findings(pair, "catalog") if f.table == "accounts"]

    assert message == "field name has no column here: column name is mapped to field plan"


def test_a_table_with_an_error_of_its_own_is_not_said_to_be_left_out_of_the_syncing(
    pair: Pair,
) -> None:
    installed(pair)
    pair.crm.execute("alter table users add column phone text")

    assert [(f.level, f.table) for f in findings(pair, "catalog")] == [("error", "users")]
    assert findings(pair, "foreign_key") == []


def test_nothing_installed_is_a_warning_and_installed_on_one_node_only_is_an_error(
    pair: Pair,
) -> None:
    assert [(f.level, f.check) for f in findings(pair)] == [("warning", "schema")]
    installed(pair)
    pair.billing.execute("drop schema sync cascade")

    finding = only(pair, "schema")

    assert (finding.level, finding.node) == ("error", "billing")
    assert "install" in finding.remedy


def test_a_disabled_and_a_missing_trigger_are_errors_with_different_remedies(pair: Pair) -> None:
    installed(pair)
    pair.crm.execute("alter table users disable trigger sync_capture_update")
    pair.billing.execute("drop trigger sync_capture_truncate on orders")

    found = {f.node: f for f in findings(pair, "capture")}

    assert {f.level for f in found.values()} == {"error"}
    assert "sync_capture_update on public.users is disabled" in found["crm"].message
    assert "enable trigger" in found["crm"].remedy
    assert "sync_capture_truncate on public.orders is missing" in found["billing"].message
    assert "install" in found["billing"].remedy


def test_the_capture_of_many_tables_is_read_at_once(pair: Pair) -> None:
    """All functions of a node, read anew for each table, took minutes where there are a thousand."""
    installed(pair)
    with mock.patch.object(install, "_functions", wraps=install._functions) as read:
        assert findings(pair, "capture") == []

    assert read.call_count == 2


def test_a_role_without_rights_is_told_which_it_lacks(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.crm.execute("drop role if exists doctor_guest")
    pair.crm.execute("create role doctor_guest login")
    pair.crm.execute("grant select on accounts to doctor_guest")
    dsn = psycopg.conninfo.make_conninfo(pair.crm.dsn, user="doctor_guest")
    monkeypatch.setattr(Pair, "environment", pair.environment | {"CRM_DSN": dsn})
    configure(pair, "accounts", "users")

    messages = [f.message for f in findings(pair, "rights") if f.level == "error"]

    pair.crm.execute("drop owned by doctor_guest")
    pair.crm.execute("drop role doctor_guest")
    assert any("may not create schema sync" in message for message in messages)
    assert any(
        "lacks the right to select, insert, update, delete on public.users" in m for m in messages
    )
    assert any(
        "lacks the right to insert, update, delete on public.accounts" in m for m in messages
    )
    assert any("does not own public.accounts" in message for message in messages)


# For each table: the same statements on both nodes or crm's and billing's, and what doctor says of it.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, str, str, str]]] = {
    "narrow": (
        (
            "create table narrow (id int primary key, word text)",
            "create table narrow (id int primary key, word varchar(9))",
        ),
        ("warning", "type", "not every value fits", "alter column word type text"),
    ),
    "other_kind": (
        (
            "create table other_kind (id int primary key, value uuid)",
            "create table other_kind (id int primary key, value int)",
        ),
        ("error", "type", "another kind of type", "the same type"),
    ),
    "strict": (
        (
            "create table strict (id int primary key, word text)",
            "create table strict (id int primary key, word text not null)",
        ),
        ("warning", "type", "a null fails", "NOT NULL"),
    ),
    "moods": (
        (
            "create type mood as enum ('calm', 'wi''ld'); create table moods (id int primary key, mood mood)",
            "create type mood as enum ('calm'); create table moods (id int primary key, mood mood)",
        ),
        ("warning", "enum", "lacks labels of crm: wi'ld", "add value 'wi''ld'"),
    ),
    "computed": (
        (
            "create table computed (id int primary key, twice int generated always as (id * 2) stored)",
        ),
        ("info", "generated_column", "twice", "nothing to do"),
    ),
    "numbered": (
        ("create table numbered (id int primary key, n int generated always as identity)",),
        ("warning", "identity_column", "generated always as identity", "set generated by default"),
    ),
    "lazy": (
        ("create table lazy (id int primary key, place int unique deferrable)",),
        ("info", "deferrable", "checked at the end of a batch", "nothing to do"),
    ),
    "lazy_key": (
        ("create table lazy_key (id int primary key deferrable)",),
        ("warning", "deferrable", "is deferrable", "NOT DEFERRABLE"),
    ),
    "counted": (
        ("create table counted (id serial primary key)",),
        ("warning", "sequence", "the same values", "increment by 2"),
    ),
    "demanding": (
        ("create table demanding (id int primary key, own text not null)",),
        ("error", "column", "NOT NULL without a default: own", "a default"),
    ),
    "parent": (
        (
            "create table parent (id int primary key); create table unseen (p int references parent on delete cascade)",
        ),
        ("warning", "foreign_key", "ON DELETE CASCADE", "sync unseen too"),
    ),
    "child": (
        (
            """create table unsynced (id int primary key);
            create table child (id int primary key, p int references unsynced)""",
        ),
        ("warning", "foreign_key", "refers to unsynced, which is not synced", "sync unsynced too"),
    ),
    "stamped": (
        (
            """create table stamped (id int primary key, word text);
            create function stamp() returns trigger language plpgsql
                as 'begin new.word = ''stamped''; return new; end';
            create trigger stamp before insert on stamped for each row execute function stamp()""",
        ),
        (
            "warning",
            "rewriting",
            "stamp may rewrite rows",
            "when (current_setting('sync_pipeline.applying', true) is distinct from 'sync')",
        ),
    ),
    "linked": (
        (
            "create table linked (id int primary key); create table keeper (l int references linked)",
        ),
        (
            "warning",
            "foreign_key",
            "a delete of the other node fails while rows of keeper",
            "keeper",
        ),
    ),
    "behind": (
        (
            "create table behind (id serial primary key); insert into behind values (7)",
            "create table behind (id int primary key)",
        ),
        ("warning", "sequence", "gives id = 1 next, but values up to 7", "restart with 9"),
    ),
    "received": (
        ("create table received (id int primary key)",),
        ("info", "where", "has no effect: this table is sent from billing alone", "nothing to do"),
    ),
    "light": (
        ("create unlogged table light (id int primary key)",),
        ("warning", "unlogged", "a crash of the server empties it", "set logged"),
    ),
}


def test_each_shape_of_a_table_that_can_hurt_is_named_with_its_remedy(pair: Pair) -> None:
    for statements, _ in SHAPES.values():
        for node, statement in zip(pair.nodes, (statements[0], statements[-1]), strict=True):
            node.execute(statement)
    options: dict[str, dict[str, Any]] = {
        "demanding": {"exclude": ["own"]},
        "received": {"source": "billing", "where": {"crm": "id > 0"}},
    }
    configure(pair, *({"name": table, **options.get(table, {})} for table in SHAPES))
    installed(pair)

    found = findings(pair)

    for table, (_, (level, check, message, remedy)) in SHAPES.items():
        mine = [f for f in found if f.table == table and f.check == check]
        assert {f.level for f in mine} == {level}, (table, mine)
        assert any(message in f.message and remedy in f.remedy for f in mine), (table, mine)
    assert {f.check for f in found} == {check for _, (_, check, _, _) in SHAPES.values()}


def test_a_key_that_follows_a_value_which_is_no_key_is_a_warning(pair: Pair) -> None:
    on_both(
        pair,
        """create table people (id int primary key, code text not null unique);
        create table badges (code text primary key references people (code) on update cascade);
        create table visits (id int primary key, code text references people (code) on update cascade);
        create table homes (person int primary key references people on update cascade)""",
    )
    configure(pair, "people", "badges", "visits", "homes")
    installed(pair)

    found = findings(pair)

    assert {(f.level, f.check, f.table) for f in found} == {("warning", "foreign_key", "badges")}
    assert "follows code of public.people, which is not the key there" in found[0].message
    assert "a key of its own" in found[0].remedy
    configure(pair, "people", {"name": "badges", "source": "crm"}, "visits", "homes")
    assert findings(pair, "foreign_key") == []


def test_a_trigger_that_stands_back_is_no_finding(pair: Pair) -> None:
    on_both(
        pair,
        """create table clauses (id int primary key, at timestamptz);
        create table bodies (id int primary key, at timestamptz);
        create function stamp() returns trigger language plpgsql
            as 'begin new.at = clock_timestamp(); return new; end';
        create trigger stamp before insert on clauses for each row execute function stamp()""",
    )
    configure(pair, "clauses", "bodies")
    installed(pair)
    [remedy] = {f.remedy for f in findings(pair) if f.check == "rewriting"}
    clause = remedy.split("`")[1]
    on_both(
        pair,
        f"""create or replace trigger stamp before insert on clauses for each row {clause}
            execute function stamp();
        create function guarded() returns trigger language plpgsql as $$
        begin
            if coalesce(current_setting('sync_pipeline.applying', true), '') = '' then
                new.at = clock_timestamp();
            end if;
            return new;
        end $$;
        create trigger guarded before insert on bodies for each row execute function guarded()""",
    )
    assert [f for f in findings(pair) if f.check == "rewriting"] == []
    for table in ("clauses", "bodies"):
        pair.crm.execute(f"insert into {table} values (1)")
        converge(pair, table)
        assert pair.crm.value(f"select at from {table}") is not None


def test_the_default_of_a_domain_is_one(pair: Pair) -> None:
    on_both(
        pair,
        "create domain words as text default 'none'; "
        "create table notes (id int primary key, word words not null)",
    )
    configure(pair, {"name": "notes", "exclude": ["word"]})
    installed(pair)

    assert findings(pair, "column") == []


def test_a_table_that_once_had_an_heir_is_as_good_as_any(pair: Pair) -> None:
    pair.crm.execute("create table heir () inherits (accounts); drop table heir")
    installed(pair)

    assert findings(pair) == []


def test_row_security_that_could_hide_rows_is_an_error(pair: Pair) -> None:
    installed(pair)
    on_both(pair, "drop role if exists doctor_reader")
    pair.crm.execute("create role doctor_reader login in role pg_read_all_data")
    pair.crm.execute("alter table users enable row level security")
    pair.crm.execute("grant usage on schema sync to doctor_reader")
    dsn = psycopg.conninfo.make_conninfo(pair.crm.dsn, user="doctor_reader")

    found = doctor.examine(config_of(replace(pair, crm=replace(pair.crm, dsn=dsn))))

    pair.crm.execute("drop owned by doctor_reader; drop role doctor_reader")
    [error] = [f for f in found if f.level == "error" and "row-level security" in f.message]
    assert (error.check, error.node, error.table) == ("catalog", "crm", "users")
    assert "BYPASSRLS" in error.remedy


def test_a_partition_without_capture_is_an_error(pair: Pair) -> None:
    on_both(pair, "create table parts (id int primary key) partition by range (id)")
    on_both(pair, "create table parts_1 partition of parts for values from (0) to (10)")
    configure(pair, "parts")
    installed(pair)
    pair.crm.execute("create table parts_2 partition of parts for values from (10) to (20)")

    found = findings(pair, "capture")

    assert {(f.level, f.node) for f in found} == {("error", "crm")}
    assert all("public.parts_2 is missing" in f.message for f in found)
    assert "install" in found[0].remedy
    installed(pair)
    assert findings(pair, "capture") == []


def test_who_holds_back_vacuum_is_named_with_the_way_to_end_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(pair)
    monkeypatch.setattr(node_checks, "LONG_TRANSACTION_SECONDS", -1.0)
    pair.billing.execute("alter table sync.sync_events reset (autovacuum_vacuum_scale_factor)")
    with pair.crm.connect(autocommit=False) as session:
        session.execute("set application_name = 'report'; select pg_current_xact_id()")

        found = findings(pair, "vacuum")

        ((pid,),) = session.execute("select pg_backend_pid()").fetchall()
        session.rollback()
    assert [(f.level, f.node) for f in found] == [("warning", "crm")]
    assert "of report" in found[0].message
    assert f"pg_terminate_backend({pid})" in found[0].remedy
    assert "scale_factor" in only(pair, "autovacuum").remedy


@pytest.mark.parametrize(
    ("setting", "check", "message", "remedy"),
    [
        ("default_transaction_read_only = on", "read_only", "is on for this role", "off"),
        ("session_replication_role = replica", "replication_role", "do not work", "reset"),
    ],
)
def test_a_setting_of_the_database_that_would_spoil_everything_is_an_error(
    pair: Pair, setting: str, check: str, message: str, remedy: str
) -> None:
    installed(pair)
    pair.crm.execute(f"alter database {pair.crm.connection.info.dbname} set {setting}")

    finding = only(pair, check)

    assert (finding.level, finding.node) == ("error", "crm")
    assert message in finding.message
    assert remedy in finding.remedy


def test_a_role_that_may_not_stage_records_is_told_so(pair: Pair) -> None:
    installed(pair)
    database = pair.crm.connection.info.dbname
    pair.crm.execute("drop role if exists doctor_consumer; create role doctor_consumer login")
    pair.crm.execute(f"revoke temporary on database {database} from public")
    pair.crm.execute("grant usage on schema sync to doctor_consumer")
    dsn = psycopg.conninfo.make_conninfo(pair.crm.dsn, user="doctor_consumer")

    found = doctor.examine(config_of(replace(pair, crm=replace(pair.crm, dsn=dsn))))

    pair.crm.execute("drop owned by doctor_consumer; drop role doctor_consumer")
    messages = [f for f in found if "may not create temporary tables" in f.message]
    assert [(f.level, f.check, f.node) for f in messages] == [("error", "rights", "crm")]
    assert "grant temporary on database" in messages[0].remedy


def test_a_schema_of_an_older_version_is_an_error(pair: Pair) -> None:
    installed(pair)
    pair.crm.execute(
        "delete from sync.sync_migrations where version = (select max(version) from sync.sync_migrations)"
    )

    finding = only(pair, "schema")

    assert (finding.level, finding.node) == ("error", "crm")
    assert "sync-pipeline install" in finding.remedy


@pytest.mark.parametrize(
    ("oldest", "newest", "level", "message"),
    [(99, 99, "error", "is too old"), (14, 14, "warning", "has not been tested")],
)
def test_a_version_of_postgresql_that_is_not_supported_is_named(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, oldest: int, newest: int, level: str, message: str
) -> None:
    monkeypatch.setattr(node_checks, "OLDEST_VERSION", oldest)
    monkeypatch.setattr(node_checks, "NEWEST_VERSION", newest)

    found = findings(pair, "version")

    assert {(f.level, f.node) for f in found} == {(level, "crm"), (level, "billing")}
    assert all(message in f.message for f in found)


def test_two_versions_of_postgresql_are_worth_knowing_and_no_obstacle(
    crm: Node, pg_version: int, tmp_path: Path
) -> None:
    others = [n for n in servers.available_versions() if n != pg_version and n >= OLDEST_VERSION]
    if not others:
        pytest.skip("only one version of PostgreSQL on this machine")
    with (
        short_directory() as directory,
        closing(Cluster(servers.Server.create(directory, others[-1]))) as cluster,
        closing(Node("billing", cluster.server.dsn(cluster.clone()), cluster.server)) as billing,
    ):
        pair = Pair(crm, billing, write_config(tmp_path / "sync.yaml"))
        config = installed(pair)

        finding = only(pair, "version")

        assert finding.level == "info"
        assert (
            f"crm runs PostgreSQL {pg_version}, billing PostgreSQL {others[-1]}" in finding.message
        )
        for number, node in enumerate(pair.nodes):
            node.insert("accounts", id=number, name=node.name)
        stream.sync(config)
        assert equal(pair)
        assert len(crm.rows("accounts")) == 2


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        (("utf8", "latin1"), "crm stores UTF8, billing LATIN1"),
        (("sql_ascii", "sql_ascii"), "SQL_ASCII databases hold bytes that may be no text"),
    ],
)
def test_an_encoding_that_cannot_hold_everything_is_named(
    pair: Pair, encodings: tuple[str, str], message: str
) -> None:
    crm, billing = encodings
    with encoded(pair, crm=crm, billing=billing) as other:
        finding = only(other, "encoding")

    assert finding.level == "warning"
    assert message in finding.message
    assert "UTF8" in finding.remedy


@pytest.mark.parametrize(("ahead", "behind"), [("crm", "billing"), ("billing", "crm")])
def test_clocks_that_differ_are_a_warning(pair: Pair, ahead: str, behind: str) -> None:
    installed(pair)
    shift_clock(getattr(pair, ahead), "6 seconds")
    assert f"{ahead} is more than 5 s ahead of that of {behind}" in only(pair, "clock").message

    write_config(pair.config_path, clock_warning_seconds=3600)
    assert findings(pair) == []


def test_what_waits_was_refused_or_is_held_is_counted(pair: Pair) -> None:
    write_config(pair.config_path, [{"name": "accounts", "conflict": "hold"}, "users", "orders"])
    config = installed(pair)
    for node in pair.nodes:
        node.insert("accounts", id=1, name=node.name)
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) values ('nothing', '1', 'update')"
    )
    stream.sync(config)
    pair.crm.insert("accounts", id=2, name="waits")
    pair.crm.execute("update sync.sync_node set paused_at = now()")

    found = {(f.node, f.level, f.check): f for f in findings(pair)}

    assert "1 event waits" in found["crm", "info", "backlog"].message
    assert "resume" in found["crm", "info", "paused"].remedy
    assert "1 record is out of attempts" in found["crm", "warning", "failures"].message
    # The decision is asked for where it was found.
    assert "1 conflict is held" in found["billing", "warning", "conflicts"].message
    assert len(found) == 4


@pytest.fixture
def tired(billing: Node, tmp_path: Path, pg_version: int) -> Iterator[Pair]:
    """An installed pair whose crm has a server of its own, without autovacuum, with what other servers do not allow."""
    settings: dict[str, Setting] = {
        "autovacuum": False,
        "hot_standby_feedback": True,
        "max_prepared_transactions": 2,
    }
    with short_directory() as directory, replicable(directory, pg_version, settings) as crm:
        pair = Pair(crm, billing, write_config(tmp_path / "sync.yaml"))
        installed(pair)
        yield pair


def test_a_prepared_transaction_and_a_slot_of_a_standby_that_left_hold_back_vacuum(
    tired: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_checks, "LONG_TRANSACTION_SECONDS", -1.0)
    crm = tired.crm
    with Replica.of(crm.server, crm.server.directory.parent / "replica", "left") as replica:
        database = crm.connection.info.dbname
        standby = replace(tired, crm=replace(crm, dsn=replica.dsn(database)))
        assert "the server is a standby" in only(standby, "read_only").message
        config = config_of(standby)
        with pytest.raises(ConnectionFailed, match="let the dsn lead to the primary"):
            connect(config.first, config, "writer")
        until(crm, "xmin is not null from pg_replication_slots")
        # A standby that follows holds back nothing that matters.
        assert findings(tired, "vacuum") == []
    until(crm, "not active from pg_replication_slots")
    with crm.connect(autocommit=False) as session:
        session.execute("select pg_current_xact_id(); prepare transaction 'Ann''s'")

    found = findings(tired, "vacuum")

    assert {(f.level, f.node) for f in found} == {("warning", "crm")}
    prepared, slot = sorted(found, key=lambda finding: finding.message)
    assert prepared.message.startswith("prepared transaction Ann's of postgres, open for")
    assert slot.message.startswith("replication slot left of physical holds back vacuum")
    assert "autovacuum is off on this server" in only(tired, "autovacuum").message
    # The remedies are as they can be typed.
    crm.execute(prepared.remedy.partition(" or ")[2])
    crm.execute(slot.remedy.partition("drop it: ")[2])
    assert findings(tired, "vacuum") == []
