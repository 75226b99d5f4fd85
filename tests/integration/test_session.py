"""The sessions of the pipeline, whatever the settings of databases and roles are."""

from collections.abc import Callable

import psycopg
import pytest

from sync_pipeline.database import Connection, Question, connected, error_class, node_of
from tests.engine import config_of
from tests.helpers import Pair


@pytest.mark.parametrize(("setting", "used"), [("off", "on"), ("local", "local")])
def test_a_commit_of_the_pipeline_is_never_asynchronous(
    pair: Pair, setting: str, used: str
) -> None:
    config = config_of(pair)
    database = pair.crm.value("select current_database()")
    pair.crm.execute(f"alter database {database} set synchronous_commit = {setting}")
    with connected(config.first, config, "test") as connection:
        row = connection.execute("show synchronous_commit").fetchone()
    assert row == (used,)


def test_no_timeout_of_a_database_ends_a_long_batch(pair: Pair) -> None:
    config = config_of(pair)
    database = pair.crm.value("select current_database()")
    names = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
    if int(pair.crm.value("select current_setting('server_version_num')")) >= 170000:
        names.append("transaction_timeout")
    for name in names:
        pair.crm.execute(f"alter database {database} set {name} = '1s'")
    shown = {}
    for role in ("writer", "reader"):
        with connected(config.first, config, role) as connection:
            rows = [connection.execute(f"show {name}".encode()).fetchone() for name in names]
        shown[role] = [row[0] for row in rows if row is not None]
    assert shown["writer"] == ["0", "10s", "10min", "0"][: len(names)]
    # Its snapshot stays open while a batch is applied on the other node.
    assert shown["reader"] == ["0", "10s", "1h", "0"][: len(names)]


def test_a_question_gives_one_row_as_text(pair: Pair) -> None:
    config = config_of(pair)
    with connected(config.first, config, "test") as connection:
        question = Question(connection, "asked", b"select ($1 + 1)::text, 'caf\xc3\xa9'")
        assert [question.ask(number) for number in (1, 2)] == [("2", "café"), ("3", "café")]
        connection.execute("deallocate all")
        assert question.ask(3) == ("4", "café")


@pytest.mark.parametrize(
    ("before", "raised", "kind"),
    [
        pytest.param(
            lambda pair, _: pair.crm.execute("drop table asked"),
            psycopg.errors.UndefinedTable,
            "catalog",
            id="its table is gone",
        ),
        pytest.param(
            lambda pair, connection: pair.crm.execute(
                "select pg_terminate_backend(%s, 60000)", connection.info.backend_pid
            ),
            psycopg.OperationalError,
            "transient",
            id="its session is gone",
        ),
        pytest.param(
            lambda _, connection: connection.execute("set statement_timeout = '10ms'"),
            psycopg.errors.QueryCanceled,
            "transient",
            id="it takes too long",
        ),
        pytest.param(
            lambda _, connection: connection.close(),
            psycopg.OperationalError,
            "transient",
            id="its connection is closed",
        ),
    ],
)
def test_a_question_without_an_answer_raises_what_a_cursor_raises(
    pair: Pair,
    before: Callable[[Pair, Connection], object],
    raised: type[psycopg.Error],
    kind: str,
) -> None:
    config = config_of(pair)
    pair.crm.execute("create table asked as select 0.1::double precision as seconds")
    with connected(config.first, config, "test") as connection:
        question = Question(connection, "asked", b"select pg_sleep(seconds)::text from asked")
        assert question.ask() == ("",)
        before(pair, connection)
        with pytest.raises(raised) as found:
            question.ask()
    assert (node_of(found.value), error_class(found.value)) == ("crm", kind)
