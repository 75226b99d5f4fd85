"""A record is its key: composite, natural, a unique constraint, changed, swapped, chained."""

import pytest

from sync_pipeline import operate, resolution
from sync_pipeline.database import connected
from sync_pipeline.errors import CatalogMismatch
from tests.engine import installed, sync_pair, totals
from tests.helpers import Pair, write_config
from tests.shapes import converge, failures, link, marked, texts


@pytest.mark.core
def test_a_composite_key_of_any_types_identifies_a_record(pair: Pair) -> None:
    link(
        pair,
        """create table visits (place text, at timestamptz, part numeric, note text,
        primary key (place, at, part))""",
        "visits",
    )
    pair.crm.execute(
        """insert into visits values
        ('a", "b', '2024-03-31 02:30:00.000001+01', 1.50, 'quotes'),
        ('a', '-infinity', 1.5, 'x'), ('', 'infinity', 'NaN', ''), ('[1]\\', '4713-01-02 BC', 0, null),
        (chr(9) || 'é' || chr(10), '2024-01-01', -1e100, 'white space')"""
    )
    converge(pair, "visits")
    assert len(texts(pair.billing, "visits")) == 5
    pair.billing.execute("update visits set note = upper(note), part = part + 1")
    converge(pair, "visits")
    pair.crm.execute("delete from visits where place <> 'a'")
    converge(pair, "visits")
    assert len(texts(pair.billing, "visits")) == 1


def test_the_order_of_a_composite_key_may_differ(pair: Pair) -> None:
    link(
        pair,
        (
            "create table pairs (a int, b text, c text, primary key (a, b))",
            "create table pairs (c text, b text, a bigint, primary key (b, a))",
        ),
        "pairs",
    )
    pair.crm.execute("insert into pairs values (1, 'x', 'from crm')")
    pair.billing.execute("insert into pairs (a, b, c) values (2, 'y', 'from billing')")
    converge(pair, "pairs", columns="a, b, c")
    # The same text of the key on both nodes: changes of both sides meet as one conflict.
    pair.crm.execute("update pairs set c = 'one' where a = 1")
    pair.billing.execute("update pairs set c = 'two' where a = 1")
    converge(pair, "pairs", columns="a, b, c")
    assert pair.crm.value("select c from pairs where a = 1") == "two"
    assert pair.billing.rows("select record_id, kind from sync.sync_conflicts") == [
        ('["1", "x"]', "update_update")
    ]


def test_integer_and_bigint_numeric_and_text_of_one_key_are_one_record(pair: Pair) -> None:
    link(
        pair,
        (
            "create table a (id int primary key, w text); create table b (id varchar(9) primary key, w text)",
            "create table a (id numeric primary key, w text); create table b (id text primary key, w text)",
        ),
        "a",
        "b",
    )
    for table in ("a", "b"):
        pair.crm.execute(f"insert into {table} values ('1', 'one')")
        converge(pair, table)
        pair.billing.execute(f"update {table} set w = 'two'")
        converge(pair, table)
        pair.crm.execute(f"delete from {table}")
        converge(pair, table)
    assert pair.billing.rows("select * from sync.sync_conflicts") == []


@pytest.mark.core
def test_a_unique_constraint_can_be_the_key_and_each_side_keeps_its_own_primary_key(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table products (
            id int generated always as identity primary key, sku text not null unique, price numeric)""",
        {"name": "products", "key": ["sku"], "exclude": ["id"]},
    )
    pair.billing.execute("select nextval('products_id_seq') from generate_series(1, 100)")
    pair.crm.execute("insert into products (sku, price) values ('a', 1), ('b', 2)")
    pair.billing.execute("insert into products (sku, price) values ('c', 3)")
    converge(pair, "products", columns="sku, price")
    assert [row[0] for row in pair.billing.rows("select id from products order by 1")] == [
        101,
        102,
        103,
    ]
    pair.billing.execute("update products set price = price + 1 where sku = 'a'")
    pair.crm.execute("update products set sku = 'd' where sku = 'b'")
    pair.crm.execute("delete from products where sku = 'c'")
    converge(pair, "products", columns="sku, price")
    assert pair.billing.rows("select sku, price from products order by 1") == [("a", 2), ("d", 2)]


@pytest.mark.parametrize(
    ("ddl", "options", "problem"),
    [
        ("create table t (id int)", {}, "no primary key"),
        ("create table t (id int, a int not null)", {"key": ["a"]}, "is not unique"),
        ("create table t (id int, a int unique)", {"key": ["a"]}, "allows null"),
        (
            "create table t (a int not null, b int not null, unique (a, b))",
            {"key": ["a"]},
            "unique",
        ),
        (
            "create table t (a int not null); create unique index on t (a) where a > 0",
            {"key": ["a"]},
            "is not unique",
        ),
        (
            "create table t (a text not null); create unique index on t (lower(a))",
            {"key": ["a"]},
            "is not unique",
        ),
        ("create table t (id int primary key)", {"key": ["nix"]}, "does not exist"),
    ],
)
def test_a_table_without_a_usable_key_is_refused_and_nothing_is_installed(
    pair: Pair, ddl: str, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(CatalogMismatch, match=problem):
        link(pair, ddl, {"name": "t", **options})
    assert pair.crm.rows("select 1 from pg_namespace where nspname = 'sync'") == []


@pytest.mark.core
def test_a_changed_key_moves_the_record(pair: Pair) -> None:
    link(pair, "create table items (id int primary key, word text)", "items")
    pair.crm.execute("insert into items values (1, 'a'), (2, 'b'), (3, 'c')")
    converge(pair, "items")
    pair.crm.execute("update items set id = 10 where id = 1")
    pair.billing.execute("update items set id = 20 where id = 2")
    converge(pair, "items")
    assert texts(pair.crm, "items") == ["(10,a)", "(20,b)", "(3,c)"]


def test_chains_and_swaps_of_keys_arrive(pair: Pair) -> None:
    link(pair, "create table items (id int primary key, word text)", "items")
    pair.crm.execute("insert into items select n, 'word ' || n from generate_series(1, 5) as n")
    converge(pair, "items")
    # 1 -> 2 -> 3 -> 4 -> 5 -> 6, one statement each, then 1 <-> 2 by way of a free key.
    for number in (5, 4, 3, 2, 1):
        pair.crm.execute("update items set id = id + 1 where id = %s", number)
    pair.crm.execute("update items set id = 0 where id = 2")
    pair.crm.execute("update items set id = 2 where id = 3")
    pair.crm.execute("update items set id = 3 where id = 0")
    converge(pair, "items")
    assert pair.billing.rows("items") == [
        (2, "word 2"),
        (3, "word 1"),
        (4, "word 3"),
        (5, "word 4"),
        (6, "word 5"),
    ]


def test_keys_swapped_by_one_statement_under_a_deferrable_primary_key_arrive(pair: Pair) -> None:
    link(
        pair,
        "create table items (id int primary key deferrable initially immediate, word text)",
        "items",
    )
    pair.crm.execute("insert into items values (1, 'a'), (2, 'b'), (3, 'c')")
    converge(pair, "items")
    pair.crm.execute("update items set id = case id when 3 then 1 else id + 1 end")
    converge(pair, "items")
    assert texts(pair.billing, "items") == ["(1,c)", "(2,a)", "(3,b)"]


@pytest.mark.core
def test_a_parents_key_changed_with_on_update_cascade_takes_its_children_along(pair: Pair) -> None:
    link(
        pair,
        """create table regions (country text, code int, name text, primary key (country, code));
        create table cities (id int primary key, country text, code int,
            foreign key (country, code) references regions on update cascade);
        create table streets (id int primary key, city int references cities on update cascade)""",
        "streets",
        "cities",
        "regions",
    )
    pair.crm.execute("insert into regions values ('de', 1, 'north'), ('de', 2, 'south')")
    pair.crm.execute("insert into cities values (1, 'de', 1), (2, 'de', 1), (3, 'de', 2)")
    pair.crm.execute("insert into streets values (1, 1), (2, 2), (3, 3)")
    converge(pair, "regions", "cities", "streets")
    pair.crm.execute("update regions set country = 'at', code = 9 where code = 1")
    pair.crm.execute("update cities set id = id + 100")
    converge(pair, "regions", "cities", "streets")
    assert texts(pair.billing, "cities") == ["(101,at,9)", "(102,at,9)", "(103,de,2)"]
    pair.billing.execute("update regions set code = code + 10")
    converge(pair, "regions", "cities", "streets")
    assert texts(pair.crm, "streets") == ["(1,101)", "(2,102)", "(3,103)"]


@pytest.mark.parametrize("batch_size", [10_000, 1])
@pytest.mark.parametrize("action", ["", "on update cascade", "on delete cascade"])
def test_a_changed_key_leaves_its_children_where_they_refer_to_another_unique_value(
    pair: Pair, action: str, batch_size: int
) -> None:
    link(
        pair,
        f"""create table people (id int primary key, email text not null unique, name text);
        create table visits (id int primary key, person int not null references people {action})""",
        {"name": "people", "key": ["email"]},
        "visits",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into people values (1, 'ann@old', 'Ann'), (2, 'bob@old', 'Bob')")
    pair.crm.execute("insert into visits values (1, 1), (2, 2), (3, 2)")
    converge(pair, "people", "visits")
    pair.crm.execute(
        "update people set email = replace(email, 'old', 'new'), name = name || '!';"
        "update visits set person = 1 where id = 3"
    )
    converge(pair, "people", "visits")
    assert texts(pair.billing, "people") == ["(1,ann@new,Ann!)", "(2,bob@new,Bob!)"]
    for node in pair.nodes:
        assert node.rows("select kind from sync.sync_conflicts") == []


def test_a_changed_key_moves_the_record_though_another_one_of_its_batch_is_refused(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table people (id int primary key, email text not null unique);
        create table visits (id int primary key, person int not null references people)""",
        {"name": "people", "key": ["email"]},
        "visits",
    )
    pair.crm.execute("insert into people values (1, 'ann@old'); insert into visits values (1, 1)")
    converge(pair, "people", "visits")
    pair.crm.execute(
        "insert into people values (9, 'eve'); update people set email = 'ann' where id = 1"
    )
    pair.billing.execute("insert into people values (9, 'mallory')")
    sync_pair(pair)
    assert [(table, key, error) for table, key, error, _ in failures(pair.crm)] == [
        ("people", "eve", "23505")
    ]
    assert texts(pair.billing, "people") == ["(1,ann)", "(9,mallory)"]


@pytest.mark.parametrize("batch_size", [10_000, 1])
@pytest.mark.parametrize("action", ["on update cascade", "deferrable initially deferred"])
def test_a_changed_part_of_a_key_takes_children_along_though_the_other_part_is_unique(
    pair: Pair, action: str, batch_size: int
) -> None:
    link(
        pair,
        f"""create table items (tenant int, id int unique, primary key (tenant, id));
        create table notes (id int primary key, tenant int, item int,
            foreign key (tenant, item) references items {action})""",
        "items",
        "notes",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into items values (1, 1), (1, 2); insert into notes values (1, 1, 1)")
    converge(pair, "items", "notes")
    with pair.crm.connection.transaction():
        pair.crm.execute("update items set tenant = 2")
        pair.crm.execute("update notes set tenant = 2")
    converge(pair, "items", "notes")
    assert texts(pair.billing, "notes") == ["(1,2,1)"]


def test_a_changed_key_takes_nobody_along_when_another_record_of_its_batch_is_refused(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table items (tenant int, id int unique, primary key (tenant, id));
        create table notes (id int primary key, tenant int, item int,
            foreign key (tenant, item) references items deferrable initially deferred);
        create table others (id int primary key, amount int)""",
        "items",
        "notes",
        "others",
    )
    pair.crm.execute("insert into items values (1, 1), (1, 2); insert into notes values (1, 1, 1)")
    converge(pair, "items", "notes")
    pair.billing.execute("alter table others add check (amount > 0)")
    with pair.crm.connection.transaction():
        pair.crm.execute("update items set tenant = 2; update notes set tenant = 2")
        pair.crm.execute("insert into others values (1, 1), (2, -1), (3, 3)")
    sync_pair(pair)
    assert [failure[:3] for failure in failures(pair.crm)] == [("others", "2", "23514")]
    assert texts(pair.billing, "items") == ["(2,1)", "(2,2)"]
    assert texts(pair.billing, "notes") == ["(1,2,1)"]
    assert texts(pair.billing, "others") == ["(1,1)", "(3,3)"]


@pytest.mark.parametrize("first", ["ann", "ann@old"])
@pytest.mark.parametrize("action", ["", "deferrable initially deferred"])
def test_a_record_whose_key_changed_and_that_is_refused_stays_where_it_was_until_it_is_accepted(
    pair: Pair, action: str, first: str
) -> None:
    link(
        pair,
        f"""create table people (id int primary key, email text not null unique, age int);
        create table visits (id int primary key, person int not null references people {action})""",
        {"name": "people", "key": ["email"]},
        "visits",
    )
    pair.billing.execute("alter table people add constraint aged check (age > 0)")
    pair.crm.execute(
        "insert into people values (1, 'ann@old', 5); insert into visits values (1, 1)"
    )
    converge(pair, "people", "visits")
    pair.crm.execute("update people set email = 'ann', age = -1 where id = 1")
    sync_pair(pair)
    refused = [("people", "ann", "23514"), ("people", "ann@old", "23503")]
    assert [failure[:3] for failure in failures(pair.crm)] == refused
    due = "update sync.sync_failures set next_attempt_at = now() where record_id = %s"
    for record_id in (first, "ann", "ann@old"):
        pair.crm.execute(due, record_id)
        sync_pair(pair)
        assert [failure[:3] for failure in failures(pair.crm)] == refused
    assert texts(pair.billing, "people") == ["(1,ann@old,5)"]
    pair.billing.execute("alter table people drop constraint aged")
    for record_id in (first, "ann", "ann@old"):
        pair.crm.execute(due, record_id)
        sync_pair(pair)
    converge(pair, "people", "visits")
    for node in pair.nodes:
        assert node.rows("select kind from sync.sync_conflicts") == []


def test_a_deleted_record_whose_place_another_takes_in_the_next_batch_does_not_come_back(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table people (id int primary key, email text not null unique);
        create table visits (id int primary key,
            person int not null references people deferrable initially deferred)""",
        {"name": "people", "key": ["email"]},
        "visits",
        batch_size=1,
    )
    pair.crm.execute("insert into people values (1, 'ann@old'); insert into visits values (1, 1)")
    converge(pair, "people", "visits")
    with pair.crm.connection.transaction():
        pair.crm.execute("delete from people; insert into people values (1, 'ann')")
    converge(pair, "people", "visits")
    assert texts(pair.billing, "people") == ["(1,ann)"]
    assert pair.billing.rows("select kind from sync.sync_conflicts") == []


@pytest.mark.parametrize("unique", ["(badge)", "(tenant, badge)", "(tenant) where badge = 'b7'"])
def test_a_child_of_a_deleted_parent_is_not_given_to_the_record_that_takes_a_value_of_it(
    pair: Pair, unique: str
) -> None:
    link(
        pair,
        f"""create table people (tenant int, id int, badge text not null, primary key (tenant, id));
        create unique index on people {unique};
        create table visits (id int primary key, tenant int, person int,
            foreign key (tenant, person) references people on update cascade)""",
        "people",
        "visits",
    )
    pair.crm.execute("insert into people values (1, 1, 'b7')")
    converge(pair, "people")
    pair.crm.execute("delete from people; insert into people values (1, 2, 'b7')")
    pair.billing.execute("insert into visits values (1, 1, 1)")
    sync_pair(pair)
    assert texts(pair.billing, "visits") == ["(1,1,1)"]
    assert [(key, error) for _, key, error, _ in failures(pair.crm)] == [('["1", "2"]', "23505")]


def test_a_role_goes_to_another_record_with_a_generated_key_beside_one_that_is_refused(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table people (tenant int, id int generated always as identity, role text not null,
            email text unique, primary key (tenant, id));
        create unique index on people (tenant) where role = 'owner';
        create table visits (id int primary key, tenant int, person int,
            foreign key (tenant, person) references people)""",
        "people",
        "visits",
    )
    pair.crm.execute("insert into people (tenant, role) values (1, 'owner')")
    converge(pair, "people")
    pair.crm.execute("delete from people; insert into people (tenant, role) values (1, 'owner')")
    pair.crm.execute("insert into people (tenant, role, email) values (2, 'member', 'ann')")
    pair.billing.execute(
        "insert into people overriding system value values (2, 9, 'member', 'ann')"
    )
    sync_pair(pair)
    assert [(key, error) for _, key, error, _ in failures(pair.crm)] == [('["2", "3"]', "23505")]
    assert texts(pair.billing, "people") == ["(1,2,owner,)", "(2,9,member,ann)"]


@pytest.mark.parametrize("action", ["on update cascade", "deferrable initially deferred"])
def test_a_changed_part_of_a_key_takes_children_along_though_the_other_part_is_generated(
    pair: Pair, action: str
) -> None:
    link(
        pair,
        f"""create table items
            (tenant int, id int generated always as identity unique, primary key (tenant, id));
        create table notes (id int primary key, tenant int, item int,
            foreign key (tenant, item) references items {action})""",
        "items",
        "notes",
    )
    pair.crm.execute("insert into items values (1), (1); insert into notes values (1, 1, 1)")
    converge(pair, "items", "notes")
    with pair.crm.connection.transaction():
        pair.crm.execute("update items set tenant = 2")
        pair.crm.execute("update notes set tenant = 2")
    converge(pair, "items", "notes")
    assert texts(pair.billing, "notes") == ["(1,2,1)"]


def test_a_generated_key_that_cannot_be_given_to_the_old_row_fails_alone(pair: Pair) -> None:
    link(
        pair,
        """create table items (id int generated always as identity primary key, code text unique);
        create table notes (id int primary key, code text references items (code))""",
        "items",
        "notes",
    )
    pair.crm.execute("insert into items (code) values ('a'); insert into notes values (1, 'a')")
    converge(pair, "items", "notes")
    with pair.crm.connection.transaction():
        pair.crm.execute("update notes set code = null; delete from items")
        pair.crm.execute("insert into items (code) values ('a'), ('b')")
        pair.crm.execute("update notes set code = 'a'")
    sync_pair(pair)
    assert {key for _, key, _, _ in failures(pair.crm)} == {"1", "2"}
    assert texts(pair.billing, "items") == ["(1,a)", "(3,b)"]


def test_a_key_reused_after_a_delete_is_the_new_row(pair: Pair) -> None:
    link(pair, "create table items (id int primary key, word text)", "items")
    pair.crm.execute("insert into items values (1, 'old')")
    converge(pair, "items")
    pair.crm.execute("delete from items")
    pair.crm.execute("insert into items values (1, 'new')")
    converge(pair, "items")
    assert texts(pair.billing, "items") == ["(1,new)"]


def test_a_table_of_nothing_but_its_key_travels(pair: Pair) -> None:
    link(pair, "create table links (a int, b int, primary key (a, b))", "links")
    pair.crm.execute("insert into links values (1, 1), (1, 2)")
    converge(pair, "links")
    pair.billing.execute("update links set b = 3 where b = 2")
    pair.billing.execute("insert into links values (2, 2)")
    converge(pair, "links")
    assert texts(pair.crm, "links") == ["(1,1)", "(1,3)", "(2,2)"]


def test_a_replay_by_hand_may_write_the_key_in_its_own_way(pair: Pair) -> None:
    link(
        pair,
        """create table items (id int primary key, word text);
        create table pairs (a int, b text, primary key (a, b))""",
        "items",
        "pairs",
    )
    with pair.crm.connect(autocommit=False) as session:
        session.execute("set local session_replication_role = replica")
        session.execute("insert into items values (42, 'x')")
        session.execute("insert into pairs values (7, 'y')")
    pair.crm.execute(
        """insert into sync.sync_events (table_name, record_id, event_type)
        values ('items', ' 042', 'update'), ('pairs', '[7,"y"]', 'update')"""
    )
    converge(pair, "items", "pairs")
    assert texts(pair.billing, "items") == ["(42,x)"]


def test_an_event_whose_key_is_no_key_is_set_aside_and_the_others_go_on(pair: Pair) -> None:
    link(
        pair,
        """create table items (id int primary key, word text);
        create table pairs (a int, b text, primary key (a, b))""",
        "items",
        "pairs",
    )
    pair.crm.execute(
        """insert into sync.sync_events (table_name, record_id, event_type)
        values ('items', 'x', 'update'), ('pairs', '[7]', 'update'), ('pairs', '{', 'update'),
        ('pairs', '[null, "y"]', 'delete')"""
    )
    pair.crm.execute("insert into items values (1, 'good'); insert into pairs values (1, 'good')")
    sync_pair(pair)
    assert texts(pair.billing, "items") == ["(1,good)"]
    assert texts(pair.billing, "pairs") == ["(1,good)"]
    assert marked(pair.crm) == []
    assert [row[:3] for row in failures(pair.crm)] == [
        ("items", "x", "22P02"),
        ("pairs", "[7]", "22P02"),
        ("pairs", '[null, "y"]', "22P02"),
        ("pairs", "{", "22P02"),
    ]
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    pair.crm.execute("insert into items values (2, 'better')")
    sync_pair(pair)
    assert texts(pair.billing, "items") == ["(1,good)", "(2,better)"]
    assert pair.crm.rows("select distinct state, next_attempt_at from sync.sync_failures") == [
        ("dead", None)
    ]


def test_keys_of_the_applications_own_types_are_told_from_what_is_no_key(pair: Pair) -> None:
    config = link(
        pair,
        """create schema shop; create type shop.mood as enum ('calm', 'wild');
        create domain shop.positive as int check (value > 0);
        create table moods (k shop.mood, n shop.positive, word text, primary key (k, n))""",
        "moods",
    )
    pair.crm.execute("insert into moods values ('calm', 1, 'x'), ('wild', 2, 'x')")
    pair.crm.execute(
        """insert into sync.sync_events (table_name, record_id)
        values ('moods', '["sad", "1"]'), ('moods', '["calm", "one"]')"""
    )
    sync_pair(pair)
    assert [row[1] for row in failures(pair.crm)] == ['["calm", "one"]', '["sad", "1"]']
    assert texts(pair.billing, "moods") == ["(calm,1,x)", "(wild,2,x)"]
    pair.crm.execute("delete from sync.sync_failures")
    with connected(config.first, config, "t") as one, connected(config.second, config, "t") as two:
        again = operate.Replay(record_ids=['["calm", "1"]'])
        connections = {"crm": one, "billing": two}
        assert operate.replay(config, connections, "moods", "crm", again) == 1
    converge(pair, "moods")


def test_a_refused_record_is_kept_however_its_replay_wrote_the_key(pair: Pair) -> None:
    link(
        pair,
        (
            "create table pairs (a int, b text, primary key (a, b))",
            "create table pairs (a int check (a < 5), b text, primary key (a, b))",
        ),
        "pairs",
    )
    with pair.crm.connect(autocommit=False) as session:
        session.execute("set local session_replication_role = replica")
        session.execute("insert into pairs values (7, 'y')")
    pair.crm.execute(
        """insert into sync.sync_events (table_name, record_id, event_type)
        values ('pairs', '["7","y"]', 'update')"""
    )
    totals(pair)
    assert [row[2] for row in failures(pair.crm)] == ["23514"]


def test_a_key_whose_type_lies_in_a_schema_of_the_application_is_told_from_what_is_none(
    pair: Pair,
) -> None:
    for node in pair.nodes:
        node.execute("create type mood as enum ('happy', 'sad')")
        node.execute("create table moods (m mood primary key, n int)")
    write_config(pair.config_path, ["moods"])
    installed(pair)
    pair.crm.execute("insert into moods values ('happy', 1)")
    pair.crm.execute(
        "insert into sync.sync_events (table_name, record_id) values ('moods', 'none')"
    )
    sync_pair(pair)
    assert pair.billing.rows("moods") == [("happy", 1)]
    assert pair.crm.rows("select record_id, state, error_class from sync.sync_failures") == [
        ("none", "dead", "22P02")
    ]


def test_what_is_no_composite_key_is_set_aside_though_it_is_json(pair: Pair) -> None:
    link(pair, "create table pairs (a text, b text, primary key (a, b))", "pairs")
    pair.crm.execute("insert into pairs values ('7', 'y')")
    wrong = ["42", "{}", "null", '["7"]', '["7", null]']
    for record_id in wrong:
        pair.crm.execute(
            "insert into sync.sync_events (table_name, record_id) values ('pairs', %s)", record_id
        )
    sync_pair(pair)
    assert pair.billing.rows("pairs") == [("7", "y")]
    failed = pair.crm.rows("select record_id, state, error_class from sync.sync_failures")
    assert sorted(failed) == sorted((record_id, "dead", "22P02") for record_id in wrong)


SEVERAL_TEXTS = {
    "interval": ("'1 mon'", "'30 days'"),
    "jsonb": ("""'{"a": 1.0}'""", """'{"a": 1.00}'"""),
    "numeric[]": ("'{1.0}'", "'{1.00}'"),
}


@pytest.mark.core
def test_a_conflict_is_noticed_though_each_node_spells_the_key_in_its_own_way(pair: Pair) -> None:
    tables = {f"t{number}": name for number, name in enumerate(SEVERAL_TEXTS)}
    ddl = "".join(
        f"create table {table} (k {name}, n int, word text, primary key (k, n));"
        for table, name in tables.items()
    )
    link(pair, ddl, *({"name": table, "conflict": "billing"} for table in tables))
    for table, name in tables.items():
        one, two = SEVERAL_TEXTS[name]
        pair.crm.execute(f"insert into {table} values ({one}, 1, 'crm'), ({one}, 2, 'old')")
        pair.billing.execute(f"insert into {table} values ({two}, 1, 'billing')")
        # Nothing that somebody wrote there by hand is in the way.
        pair.billing.execute(
            "insert into sync.sync_events (table_name, record_id) values (%s, 'x'), (%s, '[1]')",
            table,
            table,
        )
    sync_pair(pair)
    pair.billing.execute("delete from sync.sync_failures where error_class = '22P02'")
    converge(pair, *tables)
    for table, name in tables.items():
        one, two = SEVERAL_TEXTS[name]
        words = pair.crm.rows(f"select word from {table} order by n")
        assert words == [("billing",), ("old",)]
        pair.crm.execute(f"update {table} set k = {two}, word = 'crm' where n = 2")
        pair.billing.execute(f"update {table} set word = 'billing' where n = 2")
    converge(pair, *tables)
    kinds = pair.billing.rows(
        "select table_name, array_agg(kind order by id) from sync.sync_conflicts group by 1 order by 1"
    )
    assert kinds == [(table, ["insert_insert", "update_update"]) for table in tables]


def test_a_held_record_is_settled_whatever_the_spelling_of_its_key(pair: Pair) -> None:
    config = link(
        pair,
        "create table t (k interval primary key, word text)",
        {"name": "t", "conflict": "hold"},
    )
    pair.crm.execute("insert into t values ('1 mon', 'old')")
    converge(pair, "t")
    pair.crm.execute("update t set word = 'crm'")
    pair.billing.execute("update t set k = '30 days', word = 'billing'")
    sync_pair(pair)
    sync_pair(pair)
    assert texts(pair.crm, "t") == ['("1 mon",crm)']
    assert texts(pair.billing, "t") == ['("30 days",billing)']
    ((number,),) = pair.billing.rows("select id from sync.sync_conflicts")
    with connected(config.first, config, "t") as one, connected(config.second, config, "t") as two:
        resolution.resolve(config, {"crm": one, "billing": two}, number, "billing")
    converge(pair, "t")
    assert texts(pair.crm, "t") == ['("30 days",billing)']


@pytest.mark.parametrize("batch_size", [2, 1000])
def test_a_refused_record_whose_key_changed_its_text_is_kept(pair: Pair, batch_size: int) -> None:
    link(
        pair,
        (
            "create table t (k interval primary key, n int)",
            "create table t (k interval primary key, n int check (n < 5))",
        ),
        "t",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into t values ('1 mon', 1), ('2 mon', 1), ('3 mon', 1)")
    converge(pair, "t")
    pair.crm.execute("update t set n = 9; update t set k = '30 days' where k = '1 mon'")
    for _ in range(2):
        sync_pair(pair)
        assert [row[2] for row in failures(pair.crm)] == ["23514"] * 3
        assert marked(pair.crm) == []
        pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    pair.crm.execute("update t set n = 3")
    converge(pair, "t")


@pytest.mark.parametrize(("one", "other"), [("char(5)", "varchar(5)"), ("text", "char(4)")])
def test_a_key_that_each_node_compares_in_its_own_way_is_refused(
    pair: Pair, one: str, other: str
) -> None:
    pair.crm.execute(f"create table codes (id {one} primary key)")
    pair.billing.execute(f"create table codes (id {other} primary key)")
    write_config(pair.config_path, ["codes"])
    with pytest.raises(CatalogMismatch, match="equal on one node are not on the other"):
        installed(pair)


def test_a_key_without_overlaps_is_refused(pair: Pair) -> None:
    if int(pair.crm.value("select current_setting('server_version_num')")) < 180000:
        pytest.skip("keys without overlaps came with PostgreSQL 18")
    for node in pair.nodes:
        node.execute(
            "create table stays (rooms int4range, days daterange, primary key (rooms, days without overlaps))"
        )
    write_config(pair.config_path, ["stays"])
    with pytest.raises(CatalogMismatch, match="no primary key"):
        installed(pair)
