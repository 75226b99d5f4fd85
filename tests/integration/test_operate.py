"""Marks and looks below the command line: keys of every shape, conditions, chunks, nodes that are missing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sync_pipeline import operate
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, connected
from sync_pipeline.errors import CatalogMismatch, ConnectionFailed, NotInstalled, SyncPipelineError
from sync_pipeline.link import lead
from sync_pipeline.operate import Replay
from sync_pipeline.views import Selection
from tests.engine import config_of, equal, installed, sync_pair
from tests.helpers import Node, Pair, write_config

ODD_TEXTS = ("%s", "100%", 'quo"te', "it's", "back\\slash", "{braces}", "comma,", " blank ", "日本")


@contextmanager
def opened(config: Config) -> Iterator[dict[str, Connection]]:
    with (
        connected(config.first, config, "operator") as one,
        connected(config.second, config, "operator") as two,
    ):
        yield {config.first.name: one, config.second.name: two}


def linked(pair: Pair, table: str, key_columns: str, **options: object) -> Config:
    """Create a table of its own on both nodes and install a link for it alone."""
    for node in pair.nodes:
        node.execute(f"create table {table} ({key_columns}, note text)")
    write_config(pair.config_path, [{"name": table, **options}])
    return installed(pair)


def marked(node: Node) -> list[tuple[str, str]]:
    return [
        (record_id, event_type)
        for record_id, event_type in node.rows(
            "select record_id, event_type from sync.sync_events order by id"
        )
    ]


def forget(node: Node) -> None:
    node.execute("delete from sync.sync_events")


def mark(config: Config, table: str, node: str, which: Replay) -> int:
    with opened(config) as connections:
        return operate.replay(config, connections, table, node, which)


def fill(config: Config, node: str, *, chunk: int, after: str | None = None) -> list[str]:
    """Backfill all tables of a node; return the last key of each chunk."""
    with opened(config) as connections:
        plan = operate.plan_backfill(config, connections, node, after=after)
        return [step.last for step in operate.backfill(config, connections, plan, chunk)]


def test_a_composite_key_is_marked_as_capture_marks_it(pair: Pair) -> None:
    config = linked(pair, "seats", "hall text, number int, primary key (hall, number)")
    pair.crm.execute("insert into seats values ('a', 1), ('a', 2), ('b \"1\"', 3)")
    captured = [record_id for record_id, _ in marked(pair.crm)]
    sync_pair(pair)

    mark(config, "seats", "crm", Replay(everything=True))
    assert [record_id for record_id, _ in marked(pair.crm)] == captured
    forget(pair.crm)
    assert mark(config, "seats", "crm", Replay(['["a","1"]', '["a", 2]', '["z", "9"]'])) == 3
    assert marked(pair.crm) == [
        ('["a", "1"]', "update"),
        ('["a", "2"]', "update"),
        ('["z", "9"]', "delete"),
    ]
    forget(pair.crm)
    assert fill(config, "crm", chunk=1) == captured


@pytest.mark.parametrize("wrong", ["a", '["a"]', '["a", "b"]', '["a", "1", "x"]', "{}", "null"])
def test_what_is_no_composite_key_is_refused(pair: Pair, wrong: str) -> None:
    config = linked(pair, "seats", "hall text, number int, primary key (hall, number)")
    with pytest.raises(SyncPipelineError, match="a JSON array of text, integer"):
        mark(config, "seats", "crm", Replay([wrong]))
    assert marked(pair.crm) == []


def test_one_record_written_in_two_ways_is_marked_once(pair: Pair) -> None:
    config = linked(pair, "prices", "price numeric primary key")
    pair.crm.execute("insert into prices values (1.50)")
    forget(pair.crm)
    assert mark(config, "prices", "crm", Replay(["1.5", "1.50", "01.500"])) == 1
    assert marked(pair.crm) == [("1.5", "update")]


def test_keys_of_odd_text_are_marked_and_chunked_like_any_other(pair: Pair) -> None:
    config = linked(pair, "odd", "name text primary key")
    for text in ODD_TEXTS:
        pair.crm.insert("odd", name=text)
    forget(pair.crm)
    assert mark(config, "odd", "crm", Replay(ODD_TEXTS)) == len(ODD_TEXTS)
    assert sorted(record_id for record_id, _ in marked(pair.crm)) == sorted(ODD_TEXTS)
    forget(pair.crm)
    fill(config, "crm", chunk=2)
    assert sorted(record_id for record_id, _ in marked(pair.crm)) == sorted(ODD_TEXTS)
    sync_pair(pair)
    assert equal(pair, ("odd",))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
def test_a_backfill_marks_each_row_once_whatever_the_chunk(pair: Pair, rows: int) -> None:
    config = installed(pair)
    pair.crm.execute(
        "insert into accounts (id, name) select n, n from generate_series(1, %s) n", rows
    )
    forget(pair.crm)
    fill(config, "crm", chunk=2)
    assert marked(pair.crm) == [(str(number), "update") for number in range(1, rows + 1)]


def test_each_chunk_of_a_backfill_is_a_transaction_of_its_own(pair: Pair) -> None:
    config = installed(pair)
    pair.crm.execute("insert into accounts (id, name) select n, n from generate_series(1, 5) n")
    forget(pair.crm)
    assert fill(config, "crm", chunk=2) == ["2", "4", "5"]
    assert pair.crm.value("select count(distinct xmin::text) from sync.sync_events") == 3


def test_only_the_first_table_of_a_backfill_begins_after_a_key(pair: Pair) -> None:
    config = installed(pair)
    for number in (1, 2):
        pair.crm.insert("accounts", id=number, name="x")
        pair.crm.insert("users", id=number, account_id=number, email=f"{number}@x.org")
    forget(pair.crm)
    fill(config, "crm", chunk=10, after="1")
    assert pair.crm.rows("select table_name, record_id from sync.sync_events order by id") == [
        *(("accounts", "2"), ("users", "1"), ("users", "2")),
    ]


def test_rows_outside_of_the_condition_are_not_marked(pair: Pair) -> None:
    condition = "note is null or note not like '%draft%'"
    config = linked(pair, "papers", "id int primary key", where={"crm": condition})
    pair.crm.execute("insert into papers values (1, 'a draft'), (2, 'done'), (3, null)")
    pair.billing.execute("insert into papers values (4, 'a draft')")
    forget(pair.crm)
    forget(pair.billing)
    fill(config, "crm", chunk=1)
    assert marked(pair.crm) == [("2", "update"), ("3", "update")]
    with opened(config) as connections:
        plan = operate.plan_backfill(config, connections, "crm")
        assert operate.count_backfill(connections, plan) == {"papers": 2}
    forget(pair.crm)
    assert mark(config, "papers", "crm", Replay(everything=True)) == 2
    # An `or` in either condition does not reach into the other.
    forget(pair.crm)
    assert mark(config, "papers", "crm", Replay(condition="id = 2 or id = 1")) == 1
    fill(config, "billing", chunk=1)
    assert marked(pair.billing) == [("4", "update")]


def test_names_that_differ_between_the_nodes_are_those_of_the_node_that_is_marked(
    pair: Pair,
) -> None:
    pair.crm.execute('create table "Bills" ("No" int primary key, total numeric)')
    pair.billing.execute(
        "create schema b; create table b.bill (id int primary key, amount numeric)"
    )
    write_config(
        pair.config_path,
        [
            {
                "name": "bills",
                "crm": {"table": "Bills", "columns": {"id": "No", "amount": "total"}},
                "billing": {"table": "b.bill"},
            }
        ],
    )
    config = installed(pair)
    pair.crm.execute('insert into "Bills" values (1, 10), (2, 20)')
    sync_pair(pair)
    assert mark(config, "bills", "crm", Replay(condition='"No" > 1 and total > 10')) == 1
    assert mark(config, "bills", "billing", Replay(condition="id > 1 and amount > 10")) == 1
    assert marked(pair.crm) == marked(pair.billing) == [("2", "update")]


def test_a_one_way_table_cannot_be_marked_on_the_side_that_receives(pair: Pair) -> None:
    config = linked(pair, "papers", "id int primary key", source="billing")
    with pytest.raises(CatalogMismatch, match="mark its records on billing"):
        mark(config, "papers", "crm", Replay(["1"]))
    with opened(config) as connections:
        plan = operate.plan_backfill(config, connections, "crm")
        assert (plan.relations, plan.left_out) == ((), ("papers",))


def test_status_knows_the_worker_that_leads(pair: Pair) -> None:
    config = installed(pair)
    with opened(config) as connections:
        assert operate.status(config, connections).leader is None
        with lead(config) as link:
            found = operate.status(config, connections)
            assert found.leader is not None
            assert found.leader[1].pid == link.sides["crm"].writer.info.backend_pid
            assert found.nodes["billing"].leader is not None
        assert operate.status(config, connections).leader is None


def test_status_tells_a_lost_connection_from_a_missing_installation(pair: Pair) -> None:
    config = installed(pair)
    pair.billing.execute("drop schema sync cascade")
    with opened(config) as connections:
        found = operate.status(config, connections)
        assert found.nodes["crm"].backlog is not None
        assert "no pipeline" in str(found.nodes["billing"].error)
        pair.crm.execute("select pg_terminate_backend(%s)", connections["crm"].info.backend_pid)
        with pytest.raises(ConnectionFailed, match=r"^crm: "):
            operate.status(config, connections)


def test_failures_are_retried_on_the_connected_nodes_only(pair: Pair) -> None:
    config = installed(pair)
    for node in pair.nodes:
        node.execute(
            "insert into sync.sync_failures (table_name, record_id, state, error_class, error)"
            " values ('users', '1', 'dead', '23514', 'no')"
        )
    with opened(config) as connections:
        crm = {"crm": connections["crm"]}
        assert [f.node for f in operate.failures(config, crm, Selection())] == ["crm"]
        assert operate.retry(config, crm, Selection("users", ["1"], "dead")) == 1
        assert operate.retry(config, crm, Selection("accounts")) == 0
        assert operate.discard(config, crm, Selection(state="retrying")) == 0
        assert operate.discard(config, connections, Selection()) == 2
    assert pair.billing.rows("sync.sync_failures") == []


def test_everything_but_status_wants_the_pipeline_installed(pair: Pair) -> None:
    config = config_of(pair)
    with opened(config) as connections:
        for run in (
            lambda: operate.pause(config, connections),
            lambda: operate.pending(config, connections),
            lambda: operate.failures(config, connections, Selection()),
            lambda: operate.replay(config, connections, "users", "crm", Replay(["1"])),
            lambda: operate.plan_backfill(config, connections, "crm"),
        ):
            with pytest.raises(NotInstalled, match="sync-pipeline install"):
                run()
