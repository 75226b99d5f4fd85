"""Names are written as the catalog has them and mean nothing to the pipeline."""

import pytest
from psycopg import sql

from tests.engine import installed, sync_pair
from tests.helpers import Pair, write_config
from tests.shapes import converge, link, marked, texts

LONG = "n" * 63
NAMES = [
    "Capital", "with space", 'quo"ted', "it's", "100%", "%s", "%(x)s", "{}", "{name}", "{0}", "$1", "a;b",
    "select", "user", "order", "table", "naïve", "表", "🐘", "émoji 🐘 " + "x" * 40, LONG, "é" * 31, "-- no",
    "/*", "back\\slash", "new\nline", "tab\t", " ", ":x", "t", "s", "n", "present", "c0", "excluded",
    "new_rows", "old_rows", "marker", "record_id", "changed", "key 0", "tg_op", "updated_0",
]  # fmt: skip


def create(name: str, schema: str = "public") -> sql.Composed:
    """A table of that name whose columns have such names, too."""
    return sql.SQL("create table {} ({} int, {} text, {} text, primary key ({}, {}))").format(
        sql.Identifier(schema, name),
        sql.Identifier(name),
        sql.Identifier(name[:20] + "b"),
        sql.Identifier("%" + name[:20] + '"'),
        sql.Identifier(name),
        sql.Identifier(name[:20] + "b"),
    )


@pytest.mark.core
def test_tables_and_columns_of_any_name_travel(pair: Pair) -> None:
    for node in pair.nodes:
        for name in NAMES:
            node.connection.execute(create(name))
    write_config(pair.config_path, NAMES)
    installed(pair)
    for name in NAMES:
        pair.crm.connection.execute(
            sql.SQL("insert into {} values (1, '%s {{}}', 'a'), (2, '', 'b')").format(
                sql.Identifier(name)
            )
        )
    assert len(marked(pair.crm)) == 2 * len(NAMES)
    converge(pair, *NAMES)
    for name in NAMES:
        assert len(texts(pair.billing, name)) == 2, name
        pair.billing.connection.execute(
            sql.SQL("update {} set {} = upper({})").format(
                sql.Identifier(name),
                sql.Identifier("%" + name[:20] + '"'),
                sql.Identifier("%" + name[:20] + '"'),
            )
        )
        pair.billing.connection.execute(
            sql.SQL("delete from {0} as x where x.{1} = 2").format(
                sql.Identifier(name), sql.Identifier(name)
            )
        )
    converge(pair, *NAMES)
    assert all(texts(pair.crm, name)[0].endswith(",A)") for name in NAMES)


def test_conflicts_and_missing_parents_are_found_under_any_name(pair: Pair) -> None:
    parent, child = '1 "Parent" %s {}', "Kïnd; -- '"
    for node in pair.nodes:
        node.connection.execute(
            sql.SQL("create table {} ({} int primary key, {} text)").format(
                sql.Identifier(parent), sql.Identifier("%s"), sql.Identifier("{} %")
            )
        )
        node.connection.execute(
            sql.SQL("create table {} (id int primary key, {} int references {})").format(
                sql.Identifier(child), sql.Identifier("Up %"), sql.Identifier(parent)
            )
        )
    write_config(pair.config_path, [parent, child])
    installed(pair)
    pair.crm.connection.execute(
        sql.SQL("insert into {} values (1, 'x')").format(sql.Identifier(parent))
    )
    converge(pair, parent)
    for node in pair.nodes:
        node.connection.execute(
            sql.SQL("update {} set {} = {}").format(
                sql.Identifier(parent), sql.Identifier("{} %"), node.name
            )
        )
    converge(pair, parent)
    # Deleted here, given a child there.
    pair.crm.connection.execute(sql.SQL("delete from {}").format(sql.Identifier(parent)))
    pair.billing.connection.execute(
        sql.SQL("insert into {} values (1, 1)").format(sql.Identifier(child))
    )
    converge(pair, parent, child)
    assert texts(pair.crm, child) == ["(1,1)"]
    kinds = "select table_name, kind from sync.sync_conflicts order by id"
    assert sorted(pair.crm.rows(kinds) + pair.billing.rows(kinds)) == [
        (parent, "parent_deleted"),
        (parent, "update_update"),
    ]


def test_tables_of_one_name_in_several_schemas_are_kept_apart(pair: Pair) -> None:
    ddl = """create schema a; create schema "B c";
        create table a.t (id int primary key, word text);
        create table "B c".t (id int primary key, up int references a.t);
        create table public.t (id int primary key, up int references "B c".t)"""
    link(pair, ddl, "t", "B c.t", "a.t")
    pair.crm.execute("insert into a.t values (1, 'a')")
    pair.crm.execute('insert into "B c".t values (2, 1)')
    pair.crm.execute("insert into t values (3, 2)")
    assert marked(pair.crm) == [("B c.t", "2"), ("a.t", "1"), ("t", "3")]
    converge(pair, "t", "B c.t", "a.t")
    assert texts(pair.billing, "B c.t") == ["(2,1)"]


def test_the_search_path_finds_a_table_that_is_named_without_its_schema(pair: Pair) -> None:
    for node, schema in zip(pair.nodes, ("one", "two"), strict=True):
        database = node.connection.info.dbname
        node.execute(f"create schema {schema}; create table {schema}.t (id int primary key)")
        node.execute(f"alter database {database} set search_path = {schema}")
    link(pair, "", "t")
    pair.crm.execute("insert into one.t values (1)")
    sync_pair(pair)
    assert texts(pair.billing, "two.t") == ["(1)"]


def test_the_pipelines_own_schema_may_have_any_plain_name(pair: Pair) -> None:
    link(pair, "create table t (id int primary key)", "t", schema="Sync_é$1")
    pair.crm.execute("insert into t values (1)")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1)"]
    assert pair.crm.rows('select * from "Sync_é$1".sync_events') == []


def test_two_links_with_schemas_of_their_own_share_a_table(pair: Pair) -> None:
    # Both links run between the same databases here; neither silences what the other wrote.
    link(pair, "create table t (id int primary key)", "t", schema="one")
    write_config(pair.config_path, ["t"], schema="two")
    installed(pair)
    pair.crm.execute("insert into t values (1)")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1)"]
    assert pair.billing.rows("select table_name, record_id from one.sync_events") == [("t", "1")]
    assert pair.billing.rows("select * from two.sync_events") == []


def test_temporary_tables_and_types_of_the_application_do_not_disturb_capture(pair: Pair) -> None:
    link(pair, "create table t (id int primary key, word text)", "t")
    with pair.crm.connect() as session:
        session.execute("create temporary table sync_events (id int)")
        session.execute("create temporary table new_rows (id int)")
        session.execute("create temporary table t (id int primary key)")
        session.execute("insert into t values (9)")
        session.execute("set search_path = pg_temp")
        session.execute("insert into public.t values (1, 'a')")
    assert marked(pair.crm) == [("t", "1")]
    converge(pair, "t")
