"""Records that exchange unique values converge; a real collision is seen, and no row goes to make room."""

from unittest import mock

import pytest

from sync_pipeline import companions, isolation
from sync_pipeline.companions import Companions
from tests.engine import sync_pair, totals
from tests.helpers import Node, Pair
from tests.shapes import converge, failures, link, texts

SEATS = "create table seats (id int primary key, place {} unique, word text)"


def exchange(node: Node, table: str, column: str, order: str, free: str) -> None:
    """Move each row's value to the next row, by way of a free value, in one transaction."""
    ids = [row[0] for row in node.rows(f"select id from {table} order by {order}")]
    values: dict[int, str] = dict(node.rows(f"select id, {column}::text from {table}"))
    with node.connect(autocommit=False) as session:
        for number in ids:
            session.execute(f"update {table} set {column} = {free} where id = {number}".encode())
        for number, source in zip(ids, [*ids[1:], ids[0]], strict=True):
            session.execute(
                f"update {table} set {column} = %s where id = %s".encode(), [values[source], number]
            )


TYPES = {
    "text": ("'a'", "'b'", "'c'"),
    "text not null": ("'a'", "'b'", "'c'"),
    "varchar(3) not null": ("'abc'", "'bcd'", "'cde'"),
    "char(8) not null": ("'a'", "'b'", "'c'"),
    "int not null": ("1", "2", "3"),
    "bigint not null check (place > 0)": ("1", "2", "3"),
    "smallint not null": ("-32768", "0", "1"),
    "numeric not null": ("1.5", "2.5", "3.5"),
    "double precision not null": ("1.5", "2.5", "3.5"),
    "uuid not null": tuple(f"'{n}'" for n in (
        "00000000-0000-0000-0000-000000000001",
        "00000000-0000-0000-0000-000000000002",
        "00000000-0000-0000-0000-000000000003",
    )),
    "date not null": ("'2024-01-01'", "'2024-01-02'", "'2024-01-03'"),
    "timestamptz not null": ("'2024-01-01'", "'2024-01-02'", "'2024-01-03'"),
    "timestamp not null": ("'2024-01-01'", "'2024-01-02'", "'2024-01-03'"),
    "inet": ("'10.0.0.1'", "'10.0.0.2'", "'10.0.0.3'"),
}  # fmt: skip
FREE = {
    "text": "'x' || id",
    "varchar": "'x' || id",
    "char": "'x' || id",
    "smallint": "1000 + id",
    "int": "1000 + id",
    "bigint": "1000 + id",
    "numeric": "1000 + id",
    "double": "1000 + id",
    "uuid": "gen_random_uuid()",
    "date": "'2030-01-01'::date + id",
    "timestamptz": "'2030-01-01'::timestamptz + id * interval '1 day'",
    "timestamp": "'2030-01-01'::timestamp + id * interval '1 day'",
    "inet": "null",
}


@pytest.mark.core
def test_unique_values_of_any_usual_type_rotate(pair: Pair) -> None:
    tables = {f"seats_{n}": name for n, name in enumerate(TYPES)}
    ddl = ";".join(
        SEATS.format(name).replace("table seats", f"table {table}")
        for table, name in tables.items()
    )
    link(pair, ddl, *tables)
    for table, name in tables.items():
        for number, value in enumerate(TYPES[name], 1):
            pair.crm.execute(f"insert into {table} values ({number}, {value})")
    converge(pair, *tables)
    before = {table: texts(pair.crm, table) for table in tables}
    for table, name in tables.items():
        exchange(pair.crm, table, "place", "id", FREE[name.replace("(", " ").split()[0]])
    converge(pair, *tables)
    for table, name in tables.items():
        assert texts(pair.billing, table) != before[table], name
    for table, name in tables.items():
        exchange(pair.billing, table, "place", "id desc", FREE[name.replace("(", " ").split()[0]])
    converge(pair, *tables)
    assert {table: texts(pair.crm, table) for table in tables} == before


def swapped(
    pair: Pair, ddl: str, rows: str, statement: str, *, batch_size: int = 1000
) -> list[str]:
    """What billing has after crm swapped what is unique by one statement under a deferrable constraint of its own."""
    link(pair, ddl, "t", batch_size=batch_size)
    pair.crm.execute(f"insert into t values {rows}")
    converge(pair, "t")
    # crm alone lets the application swap in one statement; billing enforces row by row.
    indexes = pair.crm.rows(
        "select indexrelid::regclass::text, pg_get_indexdef(indexrelid) from pg_index "
        "where indrelid = 't'::regclass and not indisprimary"
    )
    with pair.crm.connect(autocommit=False) as session:
        for name, _ in indexes:
            session.execute(f"alter table t drop constraint if exists {name}".encode())
            session.execute(f"drop index if exists {name}".encode())
        session.execute(statement.encode())
        for _, definition in indexes:
            session.execute(definition.encode())
    sync_pair(pair)
    assert failures(pair.crm) == []
    assert texts(pair.billing, "t") == texts(pair.crm, "t")
    return texts(pair.billing, "t")


@pytest.mark.core
def test_a_whole_table_of_positions_shifts_by_one(pair: Pair) -> None:
    rows = swapped(
        pair,
        "create table t (id int primary key, position int not null unique)",
        ", ".join(f"({n}, {n})" for n in range(1, 101)),
        "update t set position = position % 100 + 1",
    )
    assert "(100,1)" in rows


def test_a_partial_index_changes_its_row(pair: Pair) -> None:
    rows = swapped(
        pair,
        """create table t (id int primary key, owner int not null, is_default boolean not null);
        create unique index on t (owner) where is_default""",
        "(1, 1, true), (2, 1, false), (3, 2, false), (4, 2, true)",
        "update t set is_default = not is_default",
    )
    assert rows == ["(1,1,f)", "(2,1,t)", "(3,2,t)", "(4,2,f)"]


def test_an_expression_index_rotates(pair: Pair) -> None:
    rows = swapped(
        pair,
        """create table t (id int primary key, email text not null);
        create unique index on t (lower(email))""",
        "(1, 'A'), (2, 'b'), (3, 'C')",
        "update t set email = case id when 1 then 'B' when 2 then 'c' else 'a' end",
    )
    assert rows == ["(1,B)", "(2,c)", "(3,a)"]


@pytest.mark.parametrize("null", ["", "not null"])
def test_an_index_on_an_expression_of_rows_that_are_not_deleted_softly_rotates(
    pair: Pair, null: str
) -> None:
    rows = swapped(
        pair,
        f"""create table t (id int primary key, email text {null}, tenant int not null, deleted_at date);
        create unique index on t (tenant, lower(email)) where deleted_at is null""",
        "(1, 'A', 1, null), (2, 'b', 1, null), (3, 'C', 1, null), (4, 'c', 1, '2024-01-01'), (5, 'a', 2, null)",
        """update t set
            email = case id when 1 then 'B' when 2 then 'a' else email end,
            deleted_at = case id when 3 then date '2024-02-02' when 4 then null else deleted_at end""",
    )
    assert rows == ["(1,B,1,)", "(2,a,1,)", "(3,C,1,2024-02-02)", "(4,c,1,)", "(5,a,2,)"]


def test_a_composite_constraint_with_a_foreign_key_in_it_swaps(pair: Pair) -> None:
    rows = swapped(
        pair,
        """create table o (id int primary key); insert into o values (1), (2);
        create table t (id int primary key, owner int not null references o, rank int not null,
            unique (owner, rank))""",
        "(1, 1, 1), (2, 1, 2), (3, 2, 1)",
        "update t set rank = 3 - rank where owner = 1",
    )
    assert rows == ["(1,1,2)", "(2,1,1)", "(3,2,1)"]


def test_the_one_row_that_is_not_deleted_softly_changes(pair: Pair) -> None:
    rows = swapped(
        pair,
        """create table o (id int primary key); insert into o values (1), (2);
        create table t (id int primary key, owner int not null references o, deleted_at timestamptz);
        create unique index on t (owner) where deleted_at is null""",
        "(1, 1, null), (2, 2, null)",
        "update t set owner = 3 - owner",
    )
    assert rows == ["(1,2,)", "(2,1,)"]


def test_nulls_not_distinct_pass_their_null_on(pair: Pair, pg_version: int) -> None:
    if pg_version < 15:
        pytest.skip("NULLS NOT DISTINCT came with PostgreSQL 15")
    rows = swapped(
        pair,
        "create table t (id int primary key, code text, unique nulls not distinct (code))",
        "(1, null), (2, 'b')",
        "update t set code = case id when 1 then 'b' end",
    )
    assert rows == ["(1,b)", "(2,)"]


def test_nulls_not_distinct_of_several_columns_rotate(pair: Pair, pg_version: int) -> None:
    if pg_version < 15:
        pytest.skip("NULLS NOT DISTINCT came with PostgreSQL 15")
    rows = swapped(
        pair,
        """create table t (id int primary key, a int, b boolean not null, c date);
        create unique index on t (a, b, c) nulls not distinct where b""",
        "(1, null, true, null), (2, 1, true, null), (3, null, true, '2024-01-01'), (4, null, false, null)",
        """update t set a = case id when 1 then 1 end, c = case id when 2 then date '2024-01-01' end,
            b = true where id < 4""",
    )
    assert rows == ["(1,1,t,)", "(2,,t,2024-01-01)", "(3,,t,)", "(4,,f,)"]


def test_columns_may_have_the_names_that_the_exchange_uses_itself(pair: Pair) -> None:
    rows = swapped(
        pair,
        """create table t (id int, "key 0" int, n text not null, "value 0" int, "staged n" int, present int not null,
            primary key (id, "key 0"));
        create unique index on t (n, present) include ("value 0");
        create unique index on t ("key 0", "staged n");
        create unique index on t ("value 0")""",
        "(1, 1, 'a', 1, 1, 1), (2, 1, 'b', 2, 2, 1)",
        """update t set n = case n when 'a' then 'b' else 'a' end, "value 0" = 3 - id, "staged n" = 3 - id""",
    )
    assert rows == ["(1,1,b,2,2,1)", "(2,1,a,1,1,1)"]


def test_two_unique_columns_swap_at_once(pair: Pair) -> None:
    rows = swapped(
        pair,
        "create table t (id int primary key, a int not null unique, b text unique)",
        "(1, 1, 'x'), (2, 2, 'y'), (3, 3, 'z')",
        """update t set a = 4 - a, b = case b when 'x' then 'y' when 'y' then 'z' else 'x' end""",
    )
    assert rows == ["(1,3,y)", "(2,2,z)", "(3,1,x)"]


def test_a_swap_over_two_batches_brings_the_other_record_along(pair: Pair) -> None:
    rows = swapped(
        pair,
        "create table t (id int primary key, code text not null unique)",
        "(1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')",
        "update t set code = case id when 1 then 'd' when 2 then 'c' when 3 then 'b' else 'a' end",
        batch_size=1,
    )
    assert rows == ["(1,d)", "(2,c)", "(3,b)", "(4,a)"]


@pytest.mark.core
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_a_record_takes_the_value_of_one_that_is_deleted_or_gets_a_new_key(
    pair: Pair, batch_size: int
) -> None:
    link(
        pair,
        """create table people (id int primary key, email text not null unique);
        create table notes (id int primary key,
            person int not null references people on update cascade)""",
        "people",
        "notes",
    )
    pair.crm.execute(
        "insert into people values (1, 'a'), (2, 'b'); insert into notes values (1, 1)"
    )
    converge(pair, "people", "notes")
    # Children keep the old row from being deleted before the new one is in.
    pair.crm.execute("update people set id = 10 where id = 1")
    pair.crm.execute("delete from people where id = 2")
    pair.crm.execute("insert into people values (20, 'b')")
    converge(pair, "people", "notes")
    assert texts(pair.billing, "people") == ["(10,a)", "(20,b)"]
    assert texts(pair.billing, "notes") == ["(1,10)"]


@pytest.mark.core
def test_a_real_collision_fails_with_both_keys_named_and_no_row_goes(pair: Pair) -> None:
    link(pair, "create table people (id int primary key, email text not null unique)", "people")
    pair.crm.execute("insert into people values (1, 'same'), (3, 'other')")
    pair.billing.execute("insert into people values (2, 'same')")
    sync_pair(pair)
    assert texts(pair.crm, "people") == ["(1,same)", "(3,other)"]
    assert texts(pair.billing, "people") == ["(2,same)", "(3,other)"]
    for node, mine, theirs in ((pair.crm, "1", "2"), (pair.billing, "2", "1")):
        (failure,) = failures(node)
        assert failure[:3] == ("people", mine, "23505")
        assert "(email)=(same)" in failure[3]
        assert f"held by record {theirs}" in failure[3]
    # An operator gives one of them another value; both heal.
    pair.billing.execute("update people set email = 'new' where id = 2")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    pair.billing.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "people")
    assert texts(pair.crm, "people") == ["(1,same)", "(2,new)", "(3,other)"]


def test_a_swap_is_not_spoilt_by_a_record_that_fails_in_the_same_batch(pair: Pair) -> None:
    link(
        pair,
        (
            "create table t (id int primary key, code text not null unique, age int)",
            "create table t (id int primary key, code text not null unique, age int check (age > 0))",
        ),
        "t",
    )
    pair.crm.execute("insert into t values (1, 'a', 1), (2, 'b', 1), (3, 'c', 1)")
    converge(pair, "t")
    exchange(pair.crm, "t", "code", "id", "'x' || id")
    pair.crm.execute("insert into t values (4, 'd', -1), (5, 'e', 1)")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1,b,1)", "(2,c,1)", "(3,a,1)", "(5,e,1)"]
    assert [row[:3] for row in failures(pair.crm)] == [("t", "4", "23514")]


def test_a_swap_is_not_spoilt_by_a_real_collision_in_the_same_batch(pair: Pair) -> None:
    link(pair, "create table t (id int primary key, code text not null unique)", "t")
    pair.crm.execute("insert into t values (1, 'a'), (2, 'b'), (3, 'c')")
    converge(pair, "t")
    pair.billing.execute("insert into t values (9, 'taken')")
    # 3 wants what billing's own row has, 4 what 3 keeps because of that; 1 and 2 swap.
    pair.crm.execute("update t set code = 'taken' where id = 3; insert into t values (4, 'c')")
    pair.crm.execute("update t set code = 'x' where id = 1; update t set code = 'a' where id = 2")
    pair.crm.execute("update t set code = 'b' where id = 1")
    sync_pair(pair)
    assert texts(pair.billing, "t") == ["(1,b)", "(2,a)", "(3,c)", "(9,taken)"]
    first, second = failures(pair.crm)
    assert (first[1], second[1]) == ("3", "4")
    assert "held by record 9" in first[3]
    assert "held by record 3" in second[3]


def test_a_whole_table_of_positions_shifts_in_few_turns_beside_a_record_that_fails(
    pair: Pair,
) -> None:
    rows = 300
    link(pair, SEATS.format("int not null"), "seats")
    pair.crm.execute(f"insert into seats select n, n from generate_series(1, {rows}) as n")
    converge(pair, "seats")
    pair.billing.execute("alter table seats add check (word <> 'bad')")
    with pair.crm.connect(autocommit=False) as session:
        session.execute("update seats set place = place + 1000")
        session.execute("update seats set place = place - 999")
        session.execute("insert into seats values (0, 0, 'bad')")
    with mock.patch.object(isolation, "_one_by_one", wraps=isolation._one_by_one) as turn:
        sync_pair(pair)
    assert [failure[:3] for failure in failures(pair.crm)] == [("seats", "0", "23514")]
    assert texts(pair.billing, "seats", "id, place") == texts(pair.crm, "seats", "id, place")[1:]
    assert sum(len(call.args[3]) for call in turn.call_args_list) <= 3 * rows


def test_a_row_of_the_targets_own_work_is_never_moved(pair: Pair) -> None:
    link(pair, "create table t (id int primary key, code text unique)", "t")
    pair.crm.execute("insert into t values (1, 'a'), (2, 'b')")
    converge(pair, "t")
    # billing gives 'c' to a new record of its own while crm gives it to an old one.
    pair.billing.execute("insert into t values (3, 'c')")
    pair.crm.execute("update t set code = 'c' where id = 1")
    totals(pair)
    assert texts(pair.billing, "t") == ["(1,a)", "(2,b)", "(3,c)"]
    assert "held by record 3" in failures(pair.crm)[0][3]


def test_a_parked_parent_that_has_to_stay_keeps_its_value(pair: Pair) -> None:
    link(
        pair,
        """create table people (id int primary key, email text not null unique);
        create table notes (id int primary key, person int not null references people)""",
        "people",
        "notes",
    )
    pair.crm.execute("insert into people values (1, 'a')")
    converge(pair, "people", "notes")
    # crm hands the value on to a new record; billing gives the old one a child.
    pair.crm.execute("delete from people where id = 1; insert into people values (2, 'a')")
    pair.billing.execute("insert into notes values (1, 1)")
    sync_pair(pair)
    assert pair.billing.value("select email from people where id = 1") == "a"
    (failure,) = failures(pair.crm)
    assert failure[:3] == ("people", "2", "23505")


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How far was reached for each level of partners, in tests that can afford only short chains."""
    monkeypatch.setattr(companions, "FIRST_REACH", 20)
    reached: list[int] = []
    bring = Companions._bring_level_of_partners

    def noted(self: Companions, reach: int) -> bool:
        reached.append(reach)
        return bring(self, reach)

    monkeypatch.setattr(Companions, "_bring_level_of_partners", noted)
    return reached


PLACES = """
create table t (id int primary key, place int not null unique, note text);
insert into t select n, n from generate_series(1, 300) as n;
"""
# Each takes the place that the next one had; by way of free places.
SHIFT = "update t set place = -place; update t set place = 1 - place"


@pytest.mark.core
def test_a_shift_over_many_batches_is_not_followed_record_by_record(
    pair: Pair, levels: list[int]
) -> None:
    link(pair, PLACES, "t", batch_size=10)
    pair.crm.execute(SHIFT)
    # Events of records that the first batch has already are among those that it reaches for.
    pair.crm.execute("update t set note = 'again' where id % 7 = 1")
    converge(pair, "t")
    assert texts(pair.billing, "t")[0] == "(1,2,again)"
    assert len(levels) < 2 * companions.PATIENT_LEVELS
    assert len(pair.billing.rows("select from sync.sync_conflicts")) == 0


def test_a_record_of_the_targets_own_work_is_not_reached_for(pair: Pair, levels: list[int]) -> None:
    """So the others wait for it: their chain is whole only when its conflict is settled."""
    ruled_by_crm = {"name": "t", "conflict": "crm"}
    link(pair, PLACES, ruled_by_crm, batch_size=10)
    pair.crm.execute(SHIFT)
    pair.billing.execute("update t set note = 'billing' where id = 250")
    for _ in range(5):
        sync_pair(pair)
        pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    assert texts(pair.billing, "t") == texts(pair.crm, "t")
    assert failures(pair.crm) == failures(pair.billing) == []
    logged = [
        row
        for n in pair.nodes
        for row in n.rows("select record_id, winner from sync.sync_conflicts")
    ]
    assert logged == [("250", "crm")]
    assert max(levels) < 2**companions.PATIENT_LEVELS * companions.FIRST_REACH


def test_a_record_that_was_refused_and_is_brought_along_is_no_failure_any_more(pair: Pair) -> None:
    """Else what the other node changes next would be a conflict."""
    seats = {"name": "seats", "conflict": "crm"}
    link(pair, SEATS.format("text"), seats, retry={"base_seconds": 600, "max_seconds": 600})
    pair.crm.execute("insert into seats values (1, 'a')")
    sync_pair(pair)
    pair.billing.execute("insert into seats values (9, 'b')")
    pair.crm.execute("update seats set place = 'b'; insert into seats values (2, 'a')")
    sync_pair(pair)
    assert [record for _, record, *_ in failures(pair.crm)] == ["1", "2"]
    pair.billing.execute("update seats set place = 'c' where id = 9")
    sync_pair(pair)

    pair.crm.execute("update seats set word = 'again' where id = 2")
    sync_pair(pair)
    assert texts(pair.billing, "seats") == ["(1,b,)", "(2,a,again)", "(9,c,)"]
    assert failures(pair.crm) == []
    pair.billing.execute("update seats set word = 'later' where id = 1")
    converge(pair, "seats")
    assert texts(pair.crm, "seats")[0] == "(1,b,later)"
    assert pair.crm.rows("select * from sync.sync_conflicts") == []


@pytest.mark.parametrize("batch_size", [2, 1000])
def test_a_deferrable_constraint_shifts_in_batches_of_any_size(pair: Pair, batch_size: int) -> None:
    link(
        pair,
        "create table t (id int primary key, place int not null unique deferrable)",
        "t",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into t select n, n from generate_series(1, 7) as n")
    converge(pair, "t")
    pair.crm.execute("update t set place = place % 7 + 1")
    converge(pair, "t")
    pair.billing.execute("update t set place = 8 - place")
    converge(pair, "t")
    assert texts(pair.crm, "t")[0] == "(1,6)"


def test_a_unique_column_that_is_generated_swaps_by_the_columns_it_is_computed_from(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table t (id int primary key, email text not null,
        plain text generated always as (lower(email)) stored unique)""",
        "t",
        batch_size=2,
    )
    pair.crm.execute("insert into t values (1, 'A'), (2, 'B'), (3, 'C')")
    converge(pair, "t")
    exchange(pair.crm, "t", "email", "id", "'x' || id")
    converge(pair, "t")
    assert texts(pair.billing, "t") == ["(1,B,b)", "(2,C,c)", "(3,A,a)"]


ROOMS = """create table bookings (id int primary key, room int4range not null, during tsrange not null {},
    exclude using gist (room with =, during with &&) {})"""


@pytest.mark.core
@pytest.mark.parametrize("constraint", ["", "deferrable"])
def test_bookings_exchange_their_rooms_and_an_overlap_fails_with_both_keys_named(
    pair: Pair, constraint: str
) -> None:
    link(pair, ROOMS.format("", constraint), "bookings", batch_size=2)
    pair.crm.execute(
        "insert into bookings select n, int4range(n, n, '[]'), '[2030-01-01 10:00, 2030-01-01 12:00)' "
        "from generate_series(1, 4) as n"
    )
    converge(pair, "bookings")
    pair.crm.execute("update bookings set room = int4range(id + 100, id + 100, '[]')")
    pair.crm.execute("update bookings set room = int4range(id % 4 + 1, id % 4 + 1, '[]')")
    converge(pair, "bookings")
    pair.crm.execute("insert into bookings values (8, '[9,9]', '[2030-01-01, 2030-01-03)')")
    pair.billing.execute("insert into bookings values (9, '[9,9]', '[2030-01-02, 2030-01-04)')")
    sync_pair(pair)
    ((_, record, sqlstate, message),) = failures(pair.crm)
    assert (record, sqlstate) == ("8", "23P01")
    assert "held by record 9" in message
    assert len(texts(pair.billing, "bookings")) == 5


def test_an_exchange_for_which_no_free_value_can_stand_in_is_a_visible_failure(pair: Pair) -> None:
    link(pair, ROOMS.format("check (not isempty(during))", ""), "bookings")
    pair.crm.execute(
        "insert into bookings select n, int4range(n, n, '[]'), '[2030-01-01 10:00, 2030-01-01 12:00)' "
        "from generate_series(1, 2) as n"
    )
    converge(pair, "bookings")
    before = texts(pair.billing, "bookings")
    pair.crm.execute("update bookings set room = '[7,7]' where id = 1")
    pair.crm.execute("update bookings set room = '[1,1]' where id = 2")
    pair.crm.execute("update bookings set room = '[2,2]' where id = 1")
    sync_pair(pair)
    assert [row[1:3] for row in failures(pair.crm)] == [("1", "23P01"), ("2", "23P01")]
    assert texts(pair.billing, "bookings") == before
    # One step aside, synced, and it goes on.
    pair.crm.execute("update bookings set room = '[7,7]' where id = 1")
    sync_pair(pair)
    pair.crm.execute("update bookings set room = '[2,2]' where id = 1")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "bookings")


KINDS = """
create table kinds (id int primary key, code text {0} unique);
create table items (id int primary key, code text {0} references kinds (code) {1})
"""


@pytest.mark.parametrize(
    ("action", "null", "batch_size"),
    [
        ("on update cascade", "", 1),
        ("on update cascade", "not null", 1000),
        ("deferrable", "not null", 1),
        ("deferrable", "", 1000),
    ],
)
def test_unique_values_that_others_refer_to_swap_with_their_children(
    pair: Pair, action: str, null: str, batch_size: int
) -> None:
    link(pair, KINDS.format(null, action), "kinds", "items", batch_size=batch_size)
    pair.crm.execute("insert into kinds values (1, 'a'), (2, 'b'), (3, 'c')")
    pair.crm.execute("insert into items values (1, 'a'), (2, 'b'), (3, 'c'), (4, 'a')")
    converge(pair, "kinds", "items")
    with pair.crm.connect(autocommit=False) as session:
        session.execute("set constraints all deferred")
        for free in ("'x' || id", "chr(97 + id % 3)"):
            session.execute(f"update kinds set code = {free}".encode())
        if action == "deferrable":
            session.execute("update items set code = chr(97 + (ascii(code) - 96) % 3)")
    # billing has given one of them a child meanwhile.
    pair.billing.execute("insert into items values (5, 'a')")

    converge(pair, "kinds", "items")

    assert texts(pair.billing, "kinds") == ["(1,b)", "(2,c)", "(3,a)"]
    follower = "b" if action == "on update cascade" else "a"
    assert texts(pair.crm, "items") == ["(1,b)", "(2,c)", "(3,a)", "(4,b)", f"(5,{follower})"]
    assert [node.rows("select * from sync.sync_conflicts") for node in pair.nodes] == [[], []]


@pytest.mark.parametrize("action", ["", "on update set null", "on update restrict"])
def test_a_unique_value_whose_children_would_not_come_back_is_not_parked(
    pair: Pair, action: str
) -> None:
    link(pair, KINDS.format("", action), "kinds", "items")
    pair.crm.execute(
        "insert into kinds values (1, 'a'), (2, 'b'); insert into items values (1, 'a')"
    )
    converge(pair, "kinds", "items")
    pair.crm.execute("update items set code = null")
    exchange(pair.crm, "kinds", "code", "id", "'x' || id")
    pair.crm.execute("update items set code = 'b'")
    sync_pair(pair)
    # Moving the value away would take it from billing's children: a visible failure instead.
    assert [row[1:3] for row in failures(pair.crm)] == [("1", "23505"), ("2", "23505")]
    assert texts(pair.billing, "kinds") == ["(1,a)", "(2,b)"]
    assert pair.billing.rows("select * from items where code is null") == []


def test_an_index_whose_expression_does_not_accept_a_record_stops_no_other_one(pair: Pair) -> None:
    link(pair, "create table docs (id int primary key, name text unique, data jsonb)", "docs")
    pair.billing.execute("create unique index on docs (((data ->> 'n')::int))")
    pair.billing.execute("insert into docs values (4, 'taken', null)")
    sync_pair(pair)
    pair.crm.execute("delete from docs; truncate sync.sync_events")
    pair.crm.execute(
        """insert into docs values (1, 'one', '{"n": "x"}'), (2, 'taken', null), (3, 'three', '{"n": 3}')"""
    )
    sync_pair(pair)
    assert texts(pair.billing, "docs", "id") == ["(3)", "(4)"]
    assert pair.crm.pending() == 0
    assert [failure[:3] for failure in failures(pair.crm)] == [
        ("docs", "1", "22P02"),
        ("docs", "2", "23505"),
    ]
