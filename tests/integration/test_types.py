"""Every type of PostgreSQL travels to the byte, as payload and, where it has an order, as key."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from sync_pipeline import doctor, servers
from tests.engine import config_of, resolve, totals
from tests.helpers import Clusters, Node, Pair, write_config
from tests.shapes import converge, failures, link, texts

# Written as PostgreSQL reads them; "\N" is two characters here, never a null.
VALUES: dict[str, tuple[str, ...]] = {
    "boolean": ("true", "false"),
    "smallint": ("-32768", "32767", "0"),
    "integer": ("-2147483648", "2147483647"),
    "bigint": ("-9223372036854775808", "9223372036854775807"),
    "numeric": (
        "NaN", "Infinity", "-Infinity", "0", "-0.01", "1.10", "1.5", "1e-1000", "1e+1000",
        "12345678901234567890123.12345678901234567890123",
    ),
    "numeric(12,2)": ("-9999999999.99", "0.10", "NaN"),
    "numeric(4,-2)": ("123400", "-99900"),
    "real": ("NaN", "Infinity", "-Infinity", "-0", "1e-45", "3.4028235e38", "0.1", "16777217"),
    "double precision": (
        "NaN", "Infinity", "-Infinity", "-0", "5e-324", "1.7976931348623157e308", "0.1",
        "0.30000000000000004",
    ),
    "money": ("-92233720368547758.08", "92233720368547758.07", "0.01"),
    "text": (
        "", " ", "\\N", "\\.", "NULL", "a\tb\nc\rd\\e\vf\bg", "it''s \"x\"", "naïve 🐘 \u202e",
        "%s {} $1 :x", "\x01\x7f",
    ),
    "varchar(5)": ("", "abcde", "a    "),
    "char(5)": ("", "ab", "abcde"),
    "bpchar": ("ab  ", "abc"),
    '"char"': ("x", "", "\\200"),
    "name": ("x", "with space"),
    "bytea": ("", "\\x00ff5c4e0a", "\\x5c4e"),
    "date": ("infinity", "-infinity", "4713-01-01 BC", "5874897-12-31", "2024-02-29"),
    "time": ("00:00", "24:00:00", "12:34:56.789012"),
    "time(3)": ("12:34:56.789",),
    "timetz": ("00:00:00+15:59:59", "23:59:59.999999-15:59:59"),
    "timestamp": (
        "infinity", "-infinity", "4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999",
    ),
    "timestamptz": (
        "infinity", "-infinity", "4713-01-02 00:00:00+00 BC", "294276-12-31 23:59:59.999999+00",
        "2024-03-31 02:30:00.000001+01", "0001-01-01 00:00:00+00",
    ),
    "interval": (
        "178000000 years", "-178000000 years", "1 mon -1 day +00:00:00.000001", "-1 days +00:00:01",
        "0", "1 year -1 mon", "2562047788:00:54.775807",
    ),
    "interval year to month": ("1 year 2 mons",),
    "uuid": ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"),
    "json": (
        '{"b": 1,  "a": 1.10, "a": null}', "null", '"\\u00e9"', "1e400", "1e1000000",
        '{"a": "\\u0000"}', '"\\ud800"',
    ),
    "jsonb": ('{"b": 1, "a": 1.10}', "null", "[]", "12345678901234567890.10"),
    "jsonpath": ('$."a"[*] ? (@ > 1)',),
    "bit(5)": ("10101", "00000"),
    "bit varying": ("", "1", "01010101010101"),
    "inet": ("10.1.2.3/8", "::1", "2001:db8::1/64", "10.0.0.0"),
    "cidr": ("10.0.0.0/8", "2001:db8::/32"),
    "macaddr": ("08:00:2b:01:02:03",),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
    "tsvector": ("'a':1A,2B 'it''s' 'x y':3",),
    "tsquery": ("'a' & !'b' <-> 'c':*A",),
    "point": ("(1.5,-0)", "(NaN,Infinity)"),
    "line": ("{1,-1,0.1}",),
    "lseg": ("[(0,0),(1,0.1)]",),
    "box": ("(1,1),(0,0)",),
    "path": ("((0,0),(1,1),(2,0))", "[(0,0),(1,1)]"),
    "polygon": ("((0,0),(1,1),(2,0))",),
    "circle": ("<(0,0),0.1>",),
    "pg_lsn": ("0/0", "FFFFFFFF/FFFFFFFF"),
    "oid": ("0", "4294967295"),
    "xid8": ("18446744073709551615",),
    "xid": ("3",),
    "tid": ("(4294967295,1)",),
    "pg_snapshot": ("10:20:10,14,15",),
    "oidvector": ("1 2 3",),
    "integer[]": ("{}", "{1,NULL,-3}", "[2:3]={1,2}", "[-1:0][5:6]={{1,2},{3,4}}"),
    "text[]": ("{}", '{"",NULL,"NULL","a\\"b\\\\c","{,}"," "}', "{{a,b},{c,d}}"),
    "numeric[]": ("{1.0,NaN}",),
    "timestamptz[]": ('{"2024-01-01 00:00:00+00",infinity}',),
    "bytea[]": ('{"\\\\x00ff"}',),
    "int4range": ("empty", "[1,5)", "(,)", "[,3)"),
    "int8range": ("[-9223372036854775808,9223372036854775807)",),
    "numrange": ("[1.0,1.10]", "(-Infinity,NaN)"),
    "tsrange": ('["2024-01-01 00:00:00","2024-01-01 00:00:00.000001")', "[-infinity,infinity]"),
    "tstzrange": ('["2024-01-01 00:00:00+00",infinity)',),
    "daterange": ("[2024-01-01,infinity]", "empty"),
    "int4multirange": ("{}", "{[1,3),[5,8)}"),
    "datemultirange": ("{[2024-01-01,2024-02-01),[2024-03-01,)}",),
    "mood": ("sad", "it's ok", "ÜBER"),
    "mood[]": ("{sad,NULL}",),
    "positive": ("1", "99"),
    "tags": ('{a,"b c"}',),
    "small_code": ("abc",),
    "pair_of": ('(1,"a, \\"b\\"")', "(,)", '(2,"")'),
    "pair_of[]": ('{"(1,x)",NULL}',),
    "span": ("[0.1,0.2]",),
    "nested": ('("(1,x)",{sad},"[1,2)")',),
}  # fmt: skip

SINCE_17 = {"interval": ("infinity", "-infinity"), "interval[]": ("{infinity}",)}

# Types without an order, which cannot be in an index of the usual kind.
NOT_KEYS = {
    "json", "jsonpath", "point", "line", "lseg", "box", "path", "polygon", "circle", "xid",
    "pg_snapshot", "nested",
}  # fmt: skip

USER_TYPES = """
create type mood as enum ('sad', 'it''s ok', 'ÜBER');
create domain positive as integer check (value > 0);
create domain small_code as varchar(5) collate "C" not null default 'x';
create domain tags as text[] check (cardinality(value) < 10);
create type pair_of as (number integer, word text);
create type span as range (subtype = double precision);
create type nested as (inside pair_of, moods mood[], during int4range);
"""


def values_of(version: int) -> dict[str, tuple[str, ...]]:
    values = dict(VALUES)
    for name, more in SINCE_17.items() if version >= 17 else ():
        values[name] = (*values.get(name, ()), *more)
    if version < 15:
        del values["numeric(4,-2)"]
    return values


def rows_of(values: dict[str, tuple[str, ...]]) -> list[list[str]]:
    """Rows that together hold every value; short lists begin again."""
    count = max(map(len, values.values()))
    return [[choice[n % len(choice)] for choice in values.values()] for n in range(count)]


def wide_table(values: dict[str, tuple[str, ...]]) -> str:
    columns = ", ".join(f"c{n} {name}" for n, name in enumerate(values))
    return f"{USER_TYPES} create table wide (id int primary key, {columns})"


def fill(node: Node, values: dict[str, tuple[str, ...]]) -> None:
    for number, row in enumerate(rows_of(values), 1):
        literals = sql.SQL(", ").join(
            sql.SQL("{}::" + name).format(value) for name, value in zip(values, row, strict=True)
        )
        node.connection.execute(
            sql.SQL("insert into wide values ({}, {})").format(number, literals)
        )


def differing_columns(pair: Pair, values: dict[str, tuple[str, ...]]) -> list[str]:
    """The types whose values are not the same text on both nodes."""
    return [
        name
        for n, name in enumerate(values)
        if texts(pair.crm, "wide", f"id, c{n}") != texts(pair.billing, "wide", f"id, c{n}")
    ]


@pytest.mark.core
def test_every_type_travels_as_payload_in_both_directions(pair: Pair, pg_version: int) -> None:
    values = values_of(pg_version)
    link(pair, wide_table(values), "wide")
    fill(pair.crm, values)
    # One row of nulls; the domain that forbids them keeps its default.
    pair.crm.execute("insert into wide (id) values (1000)")
    totals(pair)
    assert failures(pair.crm) == []
    assert differing_columns(pair, values) == []

    # Every row takes the values of another one, so that every column changes.
    names = ", ".join(f"c{n}" for n in range(len(values)))
    other_row = f"select {names} from wide where id = mine.id % {len(rows_of(values))} + 1"
    pair.billing.execute(f"update wide as mine set ({names}) = ({other_row}) where id < 1000")
    converge(pair, "wide")
    assert differing_columns(pair, values) == []


def test_a_decision_that_is_undone_brings_every_type_back(pair: Pair, pg_version: int) -> None:
    values = values_of(pg_version)
    config = link(pair, wide_table(values), "wide")
    fill(pair.crm, values)
    pair.crm.execute("insert into wide (id) values (1000)")
    converge(pair, "wide")
    written = texts(pair.crm, "wide")
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id) select 'wide', id::text from wide"
    )
    nulls = ", ".join(f"c{n} = null" for n, name in enumerate(values) if name != "small_code")
    pair.billing.execute(f"update wide set {nulls}")
    converge(pair, "wide")
    for (number,) in pair.billing.rows("select id from sync.sync_conflicts"):
        resolve(config, number, "crm")
    converge(pair, "wide")
    assert texts(pair.crm, "wide") == written


def test_equal_rows_of_any_type_are_not_written_again(pair: Pair, pg_version: int) -> None:
    values = values_of(pg_version)
    link(pair, wide_table(values), "wide")
    fill(pair.crm, values)
    totals(pair)
    before = pair.billing.rows("select id, xmin::text from wide order by id")
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id, event_type) "
        "select 'wide', id::text, 'update' from wide"
    )
    done = totals(pair).directions["crm->billing"]
    assert (done.upserted, done.unchanged) == (0, len(before))
    assert pair.billing.rows("select id, xmin::text from wide order by id") == before


@pytest.mark.core
def test_every_type_with_an_order_works_as_key(pair: Pair, pg_version: int) -> None:
    types = {name: v for name, v in values_of(pg_version).items() if name not in NOT_KEYS}
    tables = {name: f"key_{n}" for n, name in enumerate(types)}
    ddl = "".join(
        f"create table {table} (k {name} primary key, word text);" for name, table in tables.items()
    )
    link(pair, USER_TYPES + ddl, *tables.values())
    for name, table in tables.items():
        for value in types[name]:
            statement = sql.SQL("insert into {} values ({}::" + name + ", 'new')")
            pair.crm.connection.execute(statement.format(sql.Identifier(table), value))
    converge(pair, *tables.values())
    assert all(len(texts(pair.billing, t)) == len(types[name]) for name, t in tables.items())

    for table in tables.values():
        pair.billing.execute(f"update {table} set word = 'changed'")
    converge(pair, *tables.values())
    for name, table in tables.items():
        assert pair.crm.value(f"select bool_and(word = 'changed') from {table}"), name
        pair.crm.execute(f"delete from {table}")
    converge(pair, *tables.values())
    assert all(texts(pair.billing, table) == [] for table in tables.values())


SETTINGS = {
    "datestyle": ("German, DMY", "SQL, MDY"),
    "timezone": ("Asia/Kathmandu", "America/St_Johns"),
    "intervalstyle": ("sql_standard", "iso_8601"),
    "bytea_output": ("escape", "hex"),
    "extra_float_digits": ("-4", "0"),
    "lc_monetary": ("C", "C.UTF-8"),
    "client_encoding": ("LATIN1", "EUC_JP"),
    "array_nulls": ("off", "on"),
    "transform_null_equals": ("on", "off"),
    "quote_all_identifiers": ("on", "off"),
    "default_transaction_isolation": ("serializable", "repeatable read"),
}


def test_settings_of_databases_and_sessions_change_nothing(pair: Pair, pg_version: int) -> None:
    types = {
        name: values
        for name, values in values_of(pg_version).items()
        if name not in {"text", "mood", "mood[]", "nested"}
    }
    keys = {
        name: f"key_{n}"
        for n, name in enumerate(
            ("timestamptz", "interval", "bytea", "double precision", "money", "date", "tstzrange")
        )
    }
    ddl = "".join(f"create table {table} (k {name} primary key);" for name, table in keys.items())
    link(pair, wide_table(types) + ";" + ddl, "wide", *keys.values())
    for index, node in enumerate(pair.nodes):
        for setting, choices in SETTINGS.items():
            node.connection.execute(
                sql.SQL("alter database {} set {} = {}").format(
                    sql.Identifier(node.connection.info.dbname),
                    sql.Identifier(setting),
                    choices[index],
                )
            )
    # New sessions of the application have the settings; the one that compares the texts was opened before.
    with pair.crm.connect() as application:
        assert application.execute("show timezone").fetchone() == ("Asia/Kathmandu",)
        for name, table in keys.items():
            for value in types[name]:
                literal = sql.SQL("insert into {} values ({}::" + name + ")")
                application.execute(literal.format(sql.Identifier(table), value))
    fill(pair.crm, types)
    converge(pair, "wide", *keys.values())
    assert differing_columns(pair, types) == []
    with pair.billing.connect() as application:
        for table in keys.values():
            application.execute(sql.SQL("delete from {}").format(sql.Identifier(table)))
    converge(pair, *keys.values())


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("numeric", "1.0", "1.00"),
        ("double precision", "-0", "0"),
        ("interval", "1 mon", "30 days"),
        ("numeric[]", "{1.0}", "{1.00}"),
        ("jsonb", "1.0", "1.00"),
        ("bpchar", "a", "a  "),
    ],
)
def test_a_key_that_changes_its_text_but_not_its_value_is_carried(
    pair: Pair, name: str, first: str, second: str
) -> None:
    link(pair, f"create table odd (k {name} primary key, word text)", "odd")
    pair.crm.execute(f"insert into odd values (%s::{name}, 'x')", first)
    converge(pair, "odd")
    pair.billing.execute(f"update odd set k = %s::{name}", second)
    converge(pair, "odd")
    assert len(texts(pair.crm, "odd")) == 1


def test_values_of_twenty_megabytes_travel(pair: Pair) -> None:
    link(pair, "create table big (id int primary key, words text, bytes bytea)", "big")
    pair.crm.execute(
        "insert into big values (1, repeat('a\\b' || chr(10) || 'é', 4000000), "
        "decode(repeat('00ff5c4e', 5000000), 'hex'))"
    )
    totals(pair)
    digests = "select octet_length(words), md5(words), octet_length(bytes), md5(bytes) from big"
    assert pair.billing.rows(digests) == pair.crm.rows(digests)
    assert pair.billing.rows(digests)[0][0] >= 20_000_000


def test_a_wider_value_than_the_other_side_takes_fails_alone_and_is_not_cut(pair: Pair) -> None:
    link(
        pair,
        (
            "create table codes (id int primary key, number bigint, word varchar(20), dom varchar(20))",
            """create domain code as varchar(5);
            create table codes (id int primary key, number int, word varchar(5), dom code)""",
        ),
        "codes",
    )
    pair.crm.execute(
        "insert into codes values (1, 1, 'abc', 'abc'), (2, 5000000000, 'abc', 'abc'), "
        "(3, 1, 'abcdefgh', 'abc'), (4, 1, 'abc', 'abcdefgh')"
    )
    totals(pair)
    assert pair.billing.rows("codes") == [(1, 1, "abc", "abc")]
    assert [(row[1], row[2]) for row in failures(pair.crm)] == [
        ("2", "22003"),
        ("3", "22001"),
        ("4", "22001"),
    ]


def test_a_value_of_finer_grain_is_rounded_as_an_assignment_rounds_it(pair: Pair) -> None:
    link(
        pair,
        (
            "create table fine (id int primary key, n numeric, at timestamp, f float8, word text, span interval)",
            """create table fine (id int primary key, n numeric(12,2), at timestamp(0), f real, word varchar(3),
            span interval hour to minute)""",
        ),
        "fine",
    )
    pair.crm.execute(
        "insert into fine values (1, 1.239, '2024-01-01 10:00:00.6', 0.1234567891, 'abc  ', '02:03:04')"
    )
    totals(pair)
    assert failures(pair.crm) == []
    rounded = ['(1,1.24,"2024-01-01 10:00:01",0.12345679,abc,02:03:00)']
    assert texts(pair.billing, "fine") == rounded
    pair.billing.execute("update fine set word = word || ''")
    pair.billing.execute("update fine set f = f * 2")
    totals(pair)
    assert texts(pair.crm, "fine") == texts(pair.billing, "fine")
    warned = [f.message for f in doctor.examine(config_of(pair)) if f.check == "type"]
    assert [message.split()[0] for message in warned] == ["n", "at", "f", "word"]


@pytest.fixture
def extended(clusters: Clusters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A pair on the system's own PostgreSQL, which has extensions and XML."""
    with ExitStack() as exits:

        def node(name: str, version: int) -> Node:
            cluster = clusters.get(version, name)
            database = cluster.clone()
            exits.callback(cluster.drop, database)
            return exits.enter_context(
                closing(Node(name, cluster.server.dsn(database), cluster.server))
            )

        for version in sorted(v for v in servers.available_versions() if v >= 14):
            pair = Pair(
                node("crm", version), node("billing", version), write_config(tmp_path / "sync.yaml")
            )
            try:
                pair.crm.execute("begin; create extension citext; select '<a/>'::xml; rollback")
            except psycopg.Error:
                continue
            for variable, dsn in pair.environment.items():
                monkeypatch.setenv(variable, dsn)
            yield pair
            return
        pytest.skip("no PostgreSQL with citext and XML on this machine")


def test_xml_and_the_types_of_extensions_travel(extended: Pair) -> None:
    pair = extended
    link(
        pair,
        "create extension citext; create extension hstore; create extension ltree; "
        "create table by_name (k citext primary key, doc xml, more hstore);"
        "create table by_path (k ltree primary key, word text)",
        "by_name",
        "by_path",
    )
    pair.crm.execute(
        "insert into by_name values ('Ann', '<a b=\"1\">&lt;</a>', 'x=>1, y=>NULL'), "
        "('Bob', 'text <b/> and more', ''), "
        '(\'Eve\', \'<?xml version="1.0" encoding="UTF-8"?><e>é</e>\', \'""=>""\')'
    )
    pair.crm.execute("insert into by_path values ('top.science', 'a'), ('top.art', 'b')")
    converge(pair, "by_name", "by_path")
    pair.billing.execute("update by_name set k = upper(k::text)")
    pair.billing.execute("update by_path set word = 'changed' where k <@ 'top.art'")
    pair.billing.execute("update by_path set k = 'top.arts' where k = 'top.art'")
    converge(pair, "by_name", "by_path")
    assert [row[0] for row in pair.crm.rows("select k::text from by_name order by 1")] == [
        "ANN",
        "BOB",
        "EVE",
    ]


def test_a_decision_that_is_undone_brings_the_types_of_extensions_back(extended: Pair) -> None:
    config = link(
        extended,
        """create extension hstore; create extension ltree;
        create table things (id int primary key, doc xml, more hstore, path ltree, word text)""",
        "things",
    )
    extended.crm.execute("insert into things (id) values (1)")
    totals(extended)
    extended.crm.execute("update things set doc = '<a/>', more = 'x=>1, y=>NULL', path = 'a.b'")
    written = texts(extended.crm, "things")
    extended.billing.execute("update things set word = 'billing'")
    converge(extended, "things")
    resolve(config, extended.billing.value("select id from sync.sync_conflicts"), "crm")
    converge(extended, "things")
    assert texts(extended.crm, "things") == written


def test_keys_that_a_collation_finds_equal_are_one_record(extended: Pair) -> None:
    pair = extended
    link(
        pair,
        """create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
        create table words (k text collate loose primary key, word text)""",
        {"name": "words", "conflict": "billing"},
    )
    assert {(f.level, f.check) for f in doctor.examine(config_of(pair))} == {
        ("warning", "collation")
    }
    pair.crm.execute("insert into words values ('One', 'crm'), ('Two', 'x'), ('Three', 'x')")
    pair.billing.execute("insert into words values ('ONE', 'billing')")
    converge(pair, "words")
    assert texts(pair.crm, "words") == ["(ONE,billing)", "(Three,x)", "(Two,x)"]
    pair.crm.execute("update words set k = 'TWO', word = 'crm' where k = 'two'")
    pair.crm.execute("update words set k = 'two' where k = 'two'")
    pair.billing.execute("update words set word = 'billing' where k = 'two'")
    pair.crm.execute("delete from words where k = 'three'")
    converge(pair, "words")
    assert texts(pair.crm, "words") == ["(ONE,billing)", "(Two,billing)"]
    kinds = pair.billing.rows("select kind from sync.sync_conflicts order by id")
    assert kinds == [("insert_insert",), ("update_update",)]
