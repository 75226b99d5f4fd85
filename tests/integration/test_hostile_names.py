"""Random names and conditions that try to be SQL: what is accepted works, the rest is refused, nothing else happens."""

import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from sync_pipeline import catalog, conditions, marks
from sync_pipeline.config import Config, fault_in_condition, parse
from sync_pipeline.database import Connection, connect
from sync_pipeline.errors import ConfigurationError
from tests.engine import installed, sync_pair
from tests.helpers import Pair, write_config
from tests.shapes import texts

# A test's databases outlive its examples on purpose: what an example breaks, a later one shows.
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WORDS = (
    *(
        "'",
        '"',
        "''",
        "\\",
        "\\'",
        "$$",
        "$a$",
        "$1",
        "%s",
        "%",
        "{}",
        "{schema}",
        "--",
        "/*",
        "*/",
        ";",
        ",",
        ".",
    ),
    *(
        "(",
        ")",
        "[",
        "]",
        "e'",
        "E'\\''",
        "1e'\\''",
        "U&'",
        "n'",
        "x'1",
        "$x$a$x$",
        "\n",
        "\r",
        "\0",
        "\ud800",
        "表",
    ),
    *(
        " or ",
        " and ",
        "true",
        "null",
        "name",
        "id",
        "t",
        "1",
        "select",
        "drop table canary",
        "where",
        "union",
        "as",
    ),
    *(
        " limit 0",
        "pg_sleep(0)",
        "now()",
        "count(*)",
        "?",
        ":a",
        "$tag",
        "exists(select 1)",
        "::text",
        " collate ",
    ),
)
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), min_size=1, max_size=8).map("".join)
NAMES = TEXTS.filter(
    lambda name: "\0" not in name and "\ud800" not in name and 0 < len(name.encode()) < 60
)


@pytest.fixture
def canary(pair: Pair) -> Iterator[tuple[Config, Connection]]:
    """A database with a table that an injection would drop, and a session like the consumer's."""
    write_config(pair.config_path, ["accounts"])
    config = installed(pair)
    for node in pair.nodes:
        node.execute("create table canary (id int primary key)")
    with connect(config.first, config, "test") as connection:
        yield config, connection


@settings(SETTINGS, max_examples=150)
@given(TEXTS)
@example("true); drop table canary; --")
@example("1e'\\''; drop table canary; --'")
@example("true) or (true")
@example("true] or array[true")
@example("exists (select 1) /*")
@example("U&'\\0027' is null; drop table canary")
def test_a_condition_is_one_expression_or_is_refused(
    canary: tuple[Config, Connection], condition: str
) -> None:
    _, connection = canary
    if fault_in_condition(condition) is not None:
        return
    with connection.transaction(force_rollback=True):
        connection.execute("savepoint before")
        if conditions.fault(connection, "public", "accounts", condition) is None:
            # Then it can stand where conditions stand, and what follows it there still holds.
            found = connection.execute(
                sql.SQL("select count(*) from accounts as t where ({}) and false").format(
                    sql.SQL(condition)
                )
                if "{" not in condition
                else b"select 0"
            ).fetchone()
            assert found == (0,)
        else:
            connection.execute("rollback to before")
        assert connection.execute("select to_regclass('canary') is not null").fetchone() == (True,)


@settings(SETTINGS, max_examples=8)
@given(NAMES, NAMES, NAMES)
@example('x"; drop table canary; --', "a'b", "c%s")
def test_tables_and_columns_of_any_name_sync_and_break_nothing(
    canary: tuple[Config, Connection], pair: Pair, table: str, key: str, payload: str
) -> None:
    columns = [sql.Identifier(f"k{key}"), sql.Identifier(f"p{payload}")]
    name = sql.Identifier("public", table)
    exists = pair.crm.connection.execute(
        "select to_regclass(quote_ident(%s)) is not null", [table]
    ).fetchone()
    if exists == (True,):
        return
    for node in pair.nodes:
        node.connection.execute(
            sql.SQL("create table {} ({} text primary key, {} text)").format(name, *columns)
        )
    quoted: str | dict[str, object] = {
        "name": "any",
        **{node.name: {"table": ["public", table]} for node in pair.nodes},
    }
    try:
        write_config(pair.config_path, [quoted])
        installed(pair)
    except ConfigurationError:
        return
    insert = sql.SQL("insert into {} values ({}, {})").format(name, table, payload)
    pair.crm.connection.execute(insert)
    sync_pair(pair)
    assert texts(pair.billing, table) == texts(pair.crm, table)
    marked = pair.crm.rows("select count(*) from sync.sync_events")
    assert marked == [(0,)]
    for node in pair.nodes:
        assert node.rows("canary") == []


@settings(SETTINGS, max_examples=80)
@given(st.lists(TEXTS, min_size=5, max_size=5))
def test_a_configuration_of_any_texts_is_read_or_refused_in_words(values: list[str]) -> None:
    node, name, column, condition, schema = (json.dumps(value) for value in values)
    text = (
        f"nodes:\n  {node}: {{dsn: 'dbname=a'}}\n  billing: {{dsn: 'dbname=b'}}\nschema: {schema}\n"
        f"tables:\n  - name: {name}\n    key: [{column}]\n    where: {{billing: {condition}}}\n"
    )
    with suppress(ConfigurationError):
        config = parse(text, {})
        assert config.tables[0].where("billing") is not None
        assert config.schema_name.isprintable()


def test_marking_takes_any_text_for_a_key_and_no_sql(
    canary: tuple[Config, Connection], pair: Pair
) -> None:
    config, connection = canary
    for node in pair.nodes:
        node.execute("create table words (word text primary key)")
    write_config(pair.config_path, ["words"])
    config = installed(pair)
    with connect(config.second, config, "test") as other:
        relation = catalog.read(config, {"crm": connection, "billing": other}).relation(
            "crm", "words"
        )
        keys = [word for word in WORDS if "\0" not in word and "\ud800" not in word]
        assert marks.mark_keys(connection, "sync", relation, keys) == len(keys)
    assert pair.crm.rows("canary") == []
