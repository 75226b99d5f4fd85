"""Foreign keys hold on both sides at all times, whatever the order in which the application worked."""

import random

import pytest

from sync_pipeline import companions
from sync_pipeline.companions import Companions
from sync_pipeline.snapshot import Part
from tests.engine import sync_pair, totals
from tests.helpers import Pair
from tests.shapes import converge, failures, link, texts

LEVELS = 8


@pytest.mark.core
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_many_levels_arrive_and_leave_in_batches_of_any_size(pair: Pair, batch_size: int) -> None:
    tables = [f"level_{n}" for n in range(LEVELS)]
    ddl = "create table level_0 (id int primary key, up int);" + "".join(
        f"create table level_{n} (id int primary key, up int not null references level_{n - 1});"
        for n in range(1, LEVELS)
    )
    link(pair, ddl, *reversed(tables), batch_size=batch_size)
    for table in tables:
        pair.crm.execute(f"insert into {table} values (1, 1), (2, 1)")
    converge(pair, *tables)
    for number, table in enumerate(tables[1:]):
        pair.billing.execute(f"update {table} set up = 2 where id = 2")
        pair.crm.execute(f"insert into {table} select 10 + {number}, 1")
    converge(pair, *tables)
    for table in reversed(tables):
        pair.billing.execute(f"delete from {table}")
    converge(pair, *tables)
    assert texts(pair.crm, "level_0") == []


@pytest.mark.core
@pytest.mark.parametrize("deferrable", ["", "deferrable initially deferred"])
@pytest.mark.parametrize("batch_size", [2, 1000])
def test_deep_trees_arrive_and_leave_in_any_order(
    pair: Pair, batch_size: int, deferrable: str
) -> None:
    link(
        pair,
        f"create table nodes (id int primary key, up int references nodes {deferrable}, word text)",
        "nodes",
        batch_size=batch_size,
    )
    # The deepest has the least key: parents come last in the order of keys.
    pair.crm.execute(
        "insert into nodes select n, case when n < 12 then n + 1 end, 'x' from generate_series(1, 12) as n"
    )
    pair.crm.execute("insert into nodes values (50, 50, 'its own parent')")
    converge(pair, "nodes")
    # Turn the chain around.
    pair.billing.execute("update nodes set up = case when id > 1 then id - 1 end where id < 50")
    converge(pair, "nodes")
    pair.crm.execute("delete from nodes where id > 6")
    pair.crm.execute(
        "insert into nodes values (7, 6, 'again'), (100, 101, 'a'), (101, 102, 'b'), (102, 7, 'c')"
    )
    converge(pair, "nodes")
    pair.billing.execute("delete from nodes")
    converge(pair, "nodes")
    assert texts(pair.crm, "nodes") == []


CYCLE = """
create table teams (id int primary key, leader int, word text);
create table people (id int primary key, team int not null references teams {0}, word text);
alter table teams add constraint leads foreign key (leader) references people {0};
"""


@pytest.mark.core
@pytest.mark.parametrize("deferrable", ["", "deferrable initially immediate"])
@pytest.mark.parametrize("batch_size", [2, 1000])
def test_tables_that_refer_to_each_other_travel(
    pair: Pair, deferrable: str, batch_size: int
) -> None:
    link(pair, CYCLE.format(deferrable), "teams", "people", batch_size=batch_size)
    pair.crm.execute(
        """with t as (insert into teams values (1, 10, 'a'), (2, 20, 'b'))
        insert into people values (10, 1, 'x'), (20, 2, 'y')"""
    )
    converge(pair, "teams", "people")
    pair.billing.execute("update teams set leader = case id when 1 then 20 else 10 end")
    pair.billing.execute("update people set team = case id when 10 then 2 else 1 end")
    converge(pair, "teams", "people")
    pair.crm.execute("with gone as (delete from people) delete from teams")
    converge(pair, "teams", "people")
    assert texts(pair.billing, "teams") == []


def test_a_refused_record_takes_none_along_of_those_that_refer_to_each_other(pair: Pair) -> None:
    ddl = """create table ones (id int primary key, two int not null, word text);
        create table twos (id int primary key, one int not null references ones);
        alter table ones add foreign key (two) references twos"""
    link(pair, ddl, "ones", "twos")
    pair.billing.execute("alter table ones add check (word <> 'bad')")
    pair.crm.execute(
        """with added as (insert into ones select n, n, case n when 3 then 'bad' end from generate_series(1, 4) as n)
        insert into twos select n, n from generate_series(1, 4) as n"""
    )
    sync_pair(pair)
    assert (
        texts(pair.billing, "ones", "id")
        == texts(pair.billing, "twos", "id")
        == ["(1)", "(2)", "(4)"]
    )
    refused = [failure[:3] for failure in failures(pair.crm)]
    assert refused == [("ones", "3", "23514"), ("twos", "3", "23503")]


def test_a_cycle_of_three_tables_and_a_table_below_it_travel(pair: Pair) -> None:
    link(
        pair,
        """create table a (id int primary key, other int);
        create table b (id int primary key, other int references a);
        create table c (id int primary key, other int references b);
        alter table a add foreign key (other) references c;
        create table d (id int primary key, other int not null references b)""",
        "d",
        "c",
        "b",
        "a",
    )
    pair.crm.execute(
        """with a as (insert into a values (1, 1)), b as (insert into b values (1, 1)),
        c as (insert into c values (1, 1)) insert into d values (1, 1)"""
    )
    converge(pair, "a", "b", "c", "d")
    pair.billing.execute("delete from d")
    pair.billing.execute("with a as (delete from a), b as (delete from b) delete from c")
    converge(pair, "a", "b", "c", "d")
    assert texts(pair.crm, "b") == []


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_events_of_children_may_be_older_than_those_of_their_parents(
    pair: Pair, batch_size: int
) -> None:
    link(
        pair,
        """create table parents (id int primary key);
        create table children (id int primary key, parent int not null
            references parents deferrable initially deferred)""",
        "parents",
        "children",
        batch_size=batch_size,
    )
    with pair.crm.connect(autocommit=False) as session:
        session.execute("insert into children values (1, 1), (2, 2), (3, 1)")
        session.execute("insert into parents values (1), (2)")
    events = "select table_name from sync.sync_events order by id"
    assert pair.crm.rows(events)[0] == ("children",)
    converge(pair, "parents", "children")


@pytest.mark.core
@pytest.mark.parametrize("batch_size", [2, 1000])
def test_children_move_to_a_new_parent_and_the_old_one_goes(pair: Pair, batch_size: int) -> None:
    link(
        pair,
        """create table parents (id int primary key);
        create table children (id int primary key, parent int not null references parents)""",
        "parents",
        "children",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into parents values (1)")
    pair.crm.execute("insert into children values (1, 1), (2, 1), (3, 1)")
    converge(pair, "parents", "children")
    pair.crm.execute("insert into parents values (2)")
    pair.crm.execute("update children set parent = 2")
    pair.crm.execute("delete from parents where id = 1")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "parents") == ["(2)"]
    assert pair.billing.rows("select * from sync.sync_conflicts") == []


ACTIONS = {
    "no action": None,
    "restrict": None,
    "cascade": [],
    "set null": ["(1,,x)", "(2,,x)"],
    "set default": ["(1,0,x)", "(2,0,x)"],
}


@pytest.mark.core
@pytest.mark.parametrize("batch_size", [1, 1000])
def test_what_a_delete_does_to_children_arrives_as_it_happened(pair: Pair, batch_size: int) -> None:
    names = {action: action.replace(" ", "_") for action in ACTIONS}
    ddl = "".join(
        f"""create table parents_{name} (id int primary key);
        create table children_{name} (id int primary key,
            parent int default 0 references parents_{name} on delete {action}, word text);
        create table grandchildren_{name} (id int primary key,
            child int default 0 references children_{name} on delete {action});"""
        for action, name in names.items()
    )
    levels = ("parents", "children", "grandchildren")
    tables = [f"{level}_{name}" for name in names.values() for level in levels]
    link(pair, ddl, *tables, batch_size=batch_size)
    for name in names.values():
        pair.crm.execute(
            f"""insert into parents_{name} values (0), (1);
            insert into children_{name} values (0, 0, 'zero'), (1, 1, 'x'), (2, 1, 'x');
            insert into grandchildren_{name} values (1, 1), (2, 2)"""
        )
    converge(pair, *tables)
    for action, name in names.items():
        if ACTIONS[action] is None:
            pair.billing.execute(f"delete from grandchildren_{name}")
            pair.billing.execute(f"delete from children_{name} where parent = 1")
        pair.billing.execute(f"delete from parents_{name} where id = 1")
    converge(pair, *tables)
    for action, name in names.items():
        expected = ["(0,0,zero)", *(ACTIONS[action] or [])]
        assert texts(pair.crm, f"children_{name}") == expected, action
    assert pair.crm.rows("select * from sync.sync_conflicts") == []


@pytest.mark.parametrize(
    ("crm_action", "billing_action"),
    [("cascade", "no action"), ("set null", "cascade"), ("no action", "set null")],
)
def test_the_sides_may_disagree_about_what_a_delete_does(
    pair: Pair, crm_action: str, billing_action: str
) -> None:
    ddl = """create table parents (id int primary key);
        create table children (id int primary key, parent int references parents on delete {})"""
    link(pair, (ddl.format(crm_action), ddl.format(billing_action)), "parents", "children")
    pair.crm.execute("insert into parents values (1), (2)")
    pair.crm.execute("insert into children values (1, 1), (2, 2)")
    converge(pair, "parents", "children")
    if crm_action == "no action":
        pair.crm.execute("delete from children where parent = 1")
    pair.crm.execute("delete from parents where id = 1")
    converge(pair, "parents", "children")
    expected = ["(1,)", "(2,2)"] if crm_action == "set null" else ["(2,2)"]
    assert texts(pair.billing, "children") == expected


def test_a_foreign_key_to_a_unique_constraint_is_followed(pair: Pair) -> None:
    link(
        pair,
        """create table parents (id int primary key, code text unique, extra text);
        create table children (id int primary key, code text references parents (code) on update cascade)""",
        "children",
        "parents",
    )
    pair.crm.execute("insert into parents values (1, 'a', ''), (2, 'b', '')")
    pair.crm.execute("insert into children values (1, 'a'), (2, 'b'), (3, null)")
    converge(pair, "parents", "children")
    pair.crm.execute("update parents set code = 'z' where id = 1")
    converge(pair, "parents", "children")
    pair.billing.execute("delete from children")
    pair.billing.execute("delete from parents")
    converge(pair, "parents", "children")
    assert texts(pair.crm, "parents") == []


@pytest.mark.parametrize("batch_size", [10_000, 1])
@pytest.mark.parametrize(("action", "followed"), [("cascade", "(1,c)"), ("set null", "(1,)")])
def test_a_child_that_follows_its_parent_on_one_side_alone_does_so_on_the_other(
    pair: Pair, action: str, followed: str, batch_size: int
) -> None:
    """When it arrived there, the value that it refers to had gone over to another parent."""
    link(
        pair,
        f"""create table parents (id int primary key, code text not null unique);
        create table children (id int primary key,
            code text references parents (code) on update {action})""",
        "parents",
        "children",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into parents values (1, 'a'), (2, 'b')")
    converge(pair, "parents")
    pair.crm.execute("insert into children values (1, 'b')")
    pair.billing.execute("update parents set code = 'c' where id = 2")
    pair.billing.execute("update parents set code = 'b' where id = 1")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "children") == [followed]
    for node in pair.nodes:
        assert node.rows("select * from sync.sync_conflicts") == []


def test_a_child_follows_its_parent_where_only_one_side_has_the_foreign_key(pair: Pair) -> None:
    ddl = """create table parents (id int primary key, code text not null unique);
        create table children (id int primary key, code text {})"""
    here, there = ddl.format(""), ddl.format("references parents (code) on update cascade")
    link(pair, (here, there), "parents", "children")
    pair.crm.execute("insert into parents values (1, 'a'); insert into children values (1, 'a')")
    converge(pair, "parents", "children")
    pair.crm.execute("update parents set code = 'b'")
    converge(pair, "parents", "children")
    assert texts(pair.crm, "children") == ["(1,b)"]


def test_a_foreign_key_that_only_one_side_has_is_respected(pair: Pair) -> None:
    link(
        pair,
        (
            """create table parents (id int primary key);
            create table children (id int primary key, parent int)""",
            """create table parents (id int primary key);
            create table children (id int primary key, parent int references parents)""",
        ),
        "children",
        "parents",
        batch_size=2,
    )
    pair.crm.execute("insert into children select n, n from generate_series(1, 5) as n")
    pair.crm.execute("insert into parents select n from generate_series(1, 5) as n")
    converge(pair, "parents", "children")
    pair.crm.execute("delete from parents")
    pair.crm.execute("delete from children")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "parents") == []


def test_a_child_that_arrives_with_the_delete_of_its_parent_is_not_taken_for_the_targets_own(
    pair: Pair,
) -> None:
    """Only the target forbids a child without a parent."""
    children = "create table parents (id int primary key); create table children (id int primary key, parent int{})"
    ddl = children.format(""), children.format(" references parents")
    link(pair, ddl, "parents", "children")
    pair.crm.execute("insert into parents values (1)")
    converge(pair, "parents", "children")
    pair.crm.execute("insert into children values (1, 1)")
    pair.crm.execute("delete from parents")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "children") == ["(1,1)"]
    kinds = pair.billing.rows("select table_name, kind, winner from sync.sync_conflicts")
    assert kinds == [("parents", "parent_deleted", "billing")]


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_a_child_whose_move_is_refused_is_not_moved_back_when_its_old_parent_is_deleted(
    pair: Pair, *, in_one_pass: bool
) -> None:
    children = (
        "create table children (id int primary key, parent int references parents, word text{})"
    )
    parents = "create table parents (id int primary key);"
    ddl = (parents + children.format(""), parents + children.format(" check (word <> 'x')"))
    link(pair, ddl, "parents", "children")
    pair.crm.execute("insert into parents values (1), (2)")
    pair.crm.execute("insert into children values (1, 1, 'old')")
    converge(pair, "parents", "children")
    pair.crm.execute("update children set parent = 2, word = 'x'")
    if not in_one_pass:
        sync_pair(pair)
    pair.crm.execute("delete from parents where id = 1")
    sync_pair(pair)
    assert texts(pair.crm, "children") == ["(1,2,x)"]
    # The delete waits for the move: nobody has given the old parent a child.
    assert [failure[:2] for failure in failures(pair.crm)] == [("children", "1"), ("parents", "1")]
    pair.billing.execute("alter table children drop constraint children_word_check")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "children") == ["(1,2,x)"]
    assert texts(pair.billing, "parents") == ["(2)"]


@pytest.mark.parametrize("in_one_pass", [True, False])
def test_a_parent_is_not_brought_back_by_a_child_whose_delete_was_refused(
    pair: Pair, *, in_one_pass: bool
) -> None:
    ddl = """create table parents (id int primary key, above int references parents);
        create table children (id int primary key, parent int references parents on delete cascade);
        create function stay() returns trigger language plpgsql as $$ begin raise 'stay'; end $$"""
    link(pair, ddl, "parents", "children")
    pair.crm.execute("insert into parents values (1, null), (2, 1), (3, null)")
    pair.crm.execute("insert into children values (1, 2)")
    converge(pair, "parents", "children")
    pair.billing.execute(
        "create trigger stay before delete on children for each row execute function stay()"
    )
    pair.crm.execute("delete from children")
    if not in_one_pass:
        sync_pair(pair)
    pair.crm.execute("delete from parents")
    sync_pair(pair)
    assert texts(pair.crm, "parents") == []
    assert texts(pair.billing, "parents") == ["(1,)", "(2,1)"]
    assert pair.billing.rows("select * from sync.sync_conflicts") == []
    assert [failure[:3] for failure in failures(pair.crm)] == [
        ("children", "1", "P0001"),
        ("parents", "1", "23503"),
        ("parents", "2", "23503"),
    ]
    pair.billing.execute("drop trigger stay on children")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "parents") == []


@pytest.mark.parametrize(
    ("parents", "children", "exclude"),
    [
        ("", " (id int primary key, team int references teams on delete cascade)", ["team"]),
        (
            "",
            """ (id int primary key, team int) partition by range (id);
            create table low partition of people for values from (0) to (10);
            alter table low add foreign key (team) references teams on delete cascade""",
            [],
        ),
        (
            " partition by range (id); create table few partition of teams for values from (0) to (10)",
            " (id int primary key, team int references few on delete cascade)",
            [],
        ),
    ],
    ids=["an excluded column", "of a partition", "to a partition"],
)
def test_no_delete_takes_along_what_refers_by(
    pair: Pair, parents: str, children: str, exclude: list[str]
) -> None:
    link(
        pair,
        f"create table teams (id int primary key){parents}; create table people{children}",
        "teams",
        {"name": "people", "exclude": exclude},
    )
    pair.crm.execute("insert into teams values (1), (2)")
    converge(pair, "teams", "people")
    pair.billing.execute("insert into people values (1, 1)")
    pair.crm.execute("delete from teams")
    converge(pair, "teams")
    assert texts(pair.crm, "teams") == ["(1)"]
    for node in pair.nodes:
        assert texts(node, "people", "id") == ["(1)"]
    assert pair.billing.rows("select record_id, kind from sync.sync_conflicts") == [
        ("1", "parent_deleted")
    ]


def test_a_reference_to_a_table_that_is_not_synced_fails_visibly_and_heals(pair: Pair) -> None:
    link(
        pair,
        """create table kinds (id int primary key);
        create table items (id int primary key, kind int references kinds)""",
        "items",
    )
    pair.crm.execute("insert into kinds values (1); insert into items values (1, 1), (2, null)")
    totals(pair)
    assert texts(pair.billing, "items") == ["(2,)"]
    (failure,) = failures(pair.crm)
    assert failure[:3] == ("items", "1", "23503")
    assert "(kind)=(1)" in failure[3]
    pair.billing.execute("insert into kinds values (1)")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "items")


@pytest.mark.parametrize(
    ("change", "items"),
    [
        ("delete from kinds where id = 1", "not synced"),
        ("update kinds set code = 'x' where id = 1", "not synced"),
        ("update kinds set code = 'x' where id = 1", "synced"),
    ],
)
def test_a_deferred_key_of_a_table_outside_of_the_batch_fails_its_record_alone(
    pair: Pair, change: str, items: str
) -> None:
    tables = ("kinds", "items") if items == "synced" else ("kinds",)
    link(
        pair,
        """create table kinds (id int primary key, code text unique);
        create table items (id int primary key,
            code text references kinds (code) deferrable initially deferred)""",
        *tables,
    )
    pair.crm.execute("insert into kinds values (1, 'a'), (2, 'b')")
    converge(pair, *tables)
    pair.crm.execute(f"{change}; insert into kinds values (3, 'c')")
    pair.billing.execute("insert into items values (1, 'a')")

    sync_pair(pair)

    assert texts(pair.billing, "kinds") == ["(1,a)", "(2,b)", "(3,c)"]
    if items == "synced":
        # The parent comes back with its new child.
        assert pair.crm.rows("select kind from sync.sync_conflicts") == [("parent_deleted",)]
        converge(pair, *tables)
    else:
        assert [row[:3] for row in failures(pair.crm)] == [("kinds", "1", "23503")]


def test_a_missing_parent_that_nobody_marked_is_brought_along(pair: Pair) -> None:
    link(
        pair,
        """create table grandparents (id int primary key);
        create table parents (id int primary key, up int not null references grandparents);
        create table children (id int primary key, up int not null references parents)""",
        "grandparents",
        "parents",
        "children",
    )
    with pair.crm.connect(autocommit=False) as session:
        session.execute("set local session_replication_role = replica")
        session.execute("insert into grandparents values (1), (2)")
        session.execute("insert into parents values (1, 1), (2, 2)")
    pair.crm.execute("insert into children values (1, 1)")
    converge(pair, "children")
    assert texts(pair.billing, "parents") == ["(1,1)"]
    assert texts(pair.billing, "grandparents") == ["(1)"]


def test_a_refused_parent_that_a_child_brings_along_is_no_failure_any_more(pair: Pair) -> None:
    ddl = """create table parents (id int primary key, word text);
        create table children (id int primary key, up int not null references parents, word text)"""
    link(pair, ddl, "parents", "children", retry={"max_attempts": 1})
    pair.billing.execute("alter table parents add constraint short check (length(word) < 9)")
    pair.crm.execute(
        "insert into parents values (1, 'far too long'); insert into children values (1, 1)"
    )
    sync_pair(pair)
    assert [table for table, *_ in failures(pair.crm)] == ["children", "parents"]
    pair.billing.execute("alter table parents drop constraint short")
    pair.crm.execute("update children set word = 'again'")
    converge(pair, "parents", "children")


@pytest.mark.parametrize("batch_size", [2, 1000])
@pytest.mark.parametrize("action", ["", "on delete cascade"])
def test_a_branch_deleted_here_and_grown_there_stays_down_to_its_new_leaf(
    pair: Pair, action: str, batch_size: int
) -> None:
    link(
        pair,
        f"create table nodes (id int primary key, up int references nodes {action}, word text)",
        "nodes",
        batch_size=batch_size,
    )
    pair.crm.execute(
        "insert into nodes select n, nullif(n - 1, 0), 'x' from generate_series(1, 9) as n"
    )
    converge(pair, "nodes")
    pair.crm.execute("delete from nodes where id >= 4")
    pair.billing.execute("insert into nodes values (100, 7, 'leaf'), (101, 100, 'leaf')")
    converge(pair, "nodes")
    # 8 and 9 carry nothing new.
    numbers = [row[0] for row in pair.crm.rows("nodes")]
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 100, 101]


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_a_ring_of_two_tables_that_forbid_null_travels_and_a_part_of_it_can_be_kept(
    pair: Pair, batch_size: int
) -> None:
    link(
        pair,
        """create table a (id int primary key, b int not null, word text);
        create table b (id int primary key,
            a int not null references a deferrable initially deferred);
        alter table a add foreign key (b) references b deferrable initially deferred""",
        "a",
        "b",
        batch_size=batch_size,
    )
    with pair.crm.connect(autocommit=False) as session:
        session.execute("insert into a select n, n, 'x' from generate_series(1, 8) as n")
        session.execute("insert into b select n, n % 8 + 1 from generate_series(1, 8) as n")
    converge(pair, "a", "b")
    with pair.billing.connect(autocommit=False) as session:
        session.execute("delete from a where id <= 4; delete from b where id <= 4")
        session.execute("update a set b = 5 where id = 5; update b set a = 5 where id = 8")
        session.execute("insert into a values (20, 21, 'y'), (21, 20, 'y')")
        session.execute("insert into b values (20, 20), (21, 21)")
    converge(pair, "a", "b")
    with pair.crm.connect(autocommit=False) as session:
        session.execute("delete from a; delete from b")
    pair.billing.execute("update a set word = 'kept' where id = 20")
    converge(pair, "a", "b")
    # The later change wins, and with it comes back what it refers to.
    assert texts(pair.crm, "a") == ["(20,21,kept)", "(21,20,y)"]
    assert texts(pair.crm, "b") == ["(20,20)", "(21,21)"]


@pytest.mark.core
def test_random_work_on_a_tree_below_a_cycle_converges(pair: Pair) -> None:
    link(
        pair,
        """create table teams (id int primary key, leader int,
            up int references teams on delete set null);
        create table people (id int primary key, team int references teams on delete cascade,
            boss int references people);
        alter table teams add foreign key (leader) references people on delete set null;
        create table notes (id int primary key,
            person int not null references people on delete cascade)""",
        "notes",
        "people",
        "teams",
        batch_size=7,
    )
    choose = random.Random(7)

    def one(table: str, share: int) -> str:
        # One in `share` is none; all the others exist.
        given = choose.randrange(share) > 0
        order = f"md5(id::text || '{choose.random()}')"
        return f"(select id from {table} where {given} order by {order} limit 1)"

    def statement(number: int) -> str:
        return choose.choice(
            [
                f"insert into teams values ({number}, {one('people', 4)}, {one('teams', 4)})",
                f"insert into people values ({number}, {one('teams', 9)}, {one('people', 3)})",
                f"insert into notes select {number}, id from people limit 1",
                f"update teams set up = {one('teams', 3)} where id = {one('teams', 9)}",
                (
                    f"update people set team = {one('teams', 5)}, boss = {one('people', 5)} "
                    f"where id = {one('people', 9)}"
                ),
                f"update people set boss = null where team = {one('teams', 9)}",
                (
                    f"delete from teams where id = {one('teams', 2)} and not exists (select from people "
                    "as p join people as b on b.boss = p.id where p.team = teams.id)"
                ),
            ]
        )

    for turn in range(6):
        # The nodes take turns, so that nothing conflicts.
        node = pair.nodes[turn % 2]
        for step in range(25):
            node.execute(statement(turn * 100 + step))
        converge(pair, "teams", "people", "notes")
    assert texts(pair.crm, "people") != []


def test_a_long_chain_of_references_is_not_followed_record_by_record(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each version refers to the one before. The newest is inserted first, the oldest deleted first."""
    monkeypatch.setattr(companions, "FIRST_REACH", 20)
    levels = 0
    stage = Companions._stage

    def noted(self: Companions, part: Part) -> bool:
        nonlocal levels
        levels += 1
        return stage(self, part)

    monkeypatch.setattr(Companions, "_stage", noted)
    link(
        pair,
        "create table versions (id int primary key,"
        " previous int references versions deferrable initially deferred)",
        "versions",
        batch_size=10,
    )
    pair.crm.execute(
        "insert into versions select n, nullif(n - 1, 0) from generate_series(300, 1, -1) as n"
    )
    converge(pair, "versions")
    assert len(texts(pair.billing, "versions")) == 300
    assert 0 < levels < 3 * companions.PATIENT_LEVELS
    levels = 0
    with pair.crm.connect(autocommit=False) as session:
        session.execute("set constraints all deferred")
        session.execute(
            "do $$ begin for n in 1..300 loop delete from versions where id = n; end loop; end $$"
        )
    converge(pair, "versions")
    assert texts(pair.billing, "versions") == []
    assert 0 < levels < 3 * companions.PATIENT_LEVELS


def test_a_parent_is_not_brought_along_against_the_direction_of_its_table(pair: Pair) -> None:
    link(
        pair,
        """create table parents (id int primary key);
        create table children (id int primary key, parent int references parents)""",
        {"name": "parents", "source": "crm"},
        "children",
    )
    pair.billing.execute("insert into parents values (7); insert into children values (1, 7)")
    sync_pair(pair)
    assert texts(pair.crm, "parents") == []
    assert [failure[:3] for failure in failures(pair.billing)] == [("children", "1", "23503")]


def test_a_child_may_sort_by_another_collation_than_its_parent(pair: Pair) -> None:
    link(
        pair,
        """create table parents (area int, code text collate "C", primary key (area, code));
        create table children (id int primary key, area int, code text collate "POSIX",
            foreign key (area, code) references parents on delete cascade)""",
        "parents",
        "children",
    )
    pair.crm.execute("insert into parents values (1, 'a'), (1, 'b')")
    pair.crm.execute("insert into children values (1, 1, 'a'), (2, 1, 'b')")
    converge(pair, "parents", "children")
    pair.crm.execute("delete from parents")
    pair.billing.execute("insert into children values (3, 1, 'b')")
    converge(pair, "parents", "children")
    assert texts(pair.crm, "parents") == ["(1,b)"]
    assert texts(pair.crm, "children") == ["(3,1,b)"]


STEMS = "create table stems (id int primary key);"


@pytest.mark.core
@pytest.mark.parametrize(
    "leaves",
    [
        """create table leaves (id int primary key, data jsonb, branch int
            generated always as ((data ->> 'branch')::int) stored references stems on delete cascade)""",
        """create table leaves (id int primary key, branch int) partition by range (id);
        create table leaves_low partition of leaves for values from (0) to (100);
        alter table leaves_low add foreign key (branch) references stems on delete cascade""",
        """create table leaves (id int primary key, branch int) partition by range (id);
        create table leaves_low partition of leaves for values from (0) to (100) partition by range (id);
        create table leaves_lowest partition of leaves_low for values from (0) to (50);
        alter table leaves_low add foreign key (branch) references stems on delete cascade""",
    ],
    ids=["a generated column", "a partition", "a partition with partitions"],
)
def test_a_key_of_a_generated_column_or_of_a_partition_alone_is_followed(
    pair: Pair, leaves: str
) -> None:
    link(pair, STEMS + leaves, "leaves", "stems")
    grow = "insert into leaves values (%s, %s)"
    if "data" in leaves:
        grow = "insert into leaves (id, data) values (%s, jsonb_build_object('branch', %s::int))"
    pair.crm.execute("insert into stems values (1), (2)")
    pair.crm.execute(grow, 1, 1)
    converge(pair, "stems", "leaves")
    pair.crm.execute("delete from stems")
    pair.billing.execute(grow, 2, 2)
    converge(pair, "stems", "leaves")

    assert pair.crm.rows("stems") == [(2,)]
    assert pair.crm.rows("select id from leaves") == [(2,)]


def test_a_key_of_one_partition_keeps_no_parent_for_the_rows_of_another(pair: Pair) -> None:
    link(
        pair,
        STEMS
        + """create table leaves (id int primary key, branch int) partition by range (id);
        create table leaves_low partition of leaves for values from (0) to (100);
        create table leaves_high partition of leaves for values from (100) to (200);
        alter table leaves_low add foreign key (branch) references stems""",
        "leaves",
        "stems",
    )
    pair.crm.execute("insert into stems values (1); insert into leaves values (150, 1)")
    converge(pair, "stems", "leaves")
    pair.crm.execute("delete from stems")
    converge(pair, "stems", "leaves")

    assert pair.crm.rows("stems") == []


def test_a_key_to_a_partition_alone_is_followed(pair: Pair) -> None:
    link(
        pair,
        """create table stems (id int primary key) partition by range (id);
        create table stems_low partition of stems for values from (0) to (100);
        create table leaves (id int primary key, branch int references stems_low on delete cascade)""",
        "leaves",
        "stems",
    )
    pair.crm.execute("insert into stems values (1), (2); insert into leaves values (1, 1)")
    converge(pair, "stems", "leaves")
    pair.crm.execute("delete from stems")
    pair.billing.execute("insert into leaves values (2, 2)")
    converge(pair, "stems", "leaves")

    assert pair.crm.rows("leaves") == [(2, 2)]


def test_a_foreign_key_that_is_not_enforced_brings_no_parent_back(pair: Pair) -> None:
    if int(pair.crm.value("select current_setting('server_version_num')")) < 180000:
        pytest.skip("keys that are not enforced came with PostgreSQL 18")
    link(
        pair,
        """create table parents (id int primary key);
        create table children (id int primary key, parent int references parents not enforced)""",
        "parents",
        "children",
    )
    pair.crm.execute("insert into parents values (1); insert into children values (1, 1)")
    converge(pair, "parents", "children")
    pair.crm.execute("delete from parents")
    pair.billing.execute("insert into children values (2, 1)")
    converge(pair, "parents", "children")
    assert texts(pair.crm, "parents") == []
    assert texts(pair.crm, "children") == ["(1,1)", "(2,1)"]


@pytest.mark.parametrize("batch_size", [10_000, 1])
def test_a_one_way_parent_with_new_children_of_the_other_side_is_deleted_when_they_are_gone(
    pair: Pair, batch_size: int
) -> None:
    link(
        pair,
        """create table parents (id int primary key);
        create table children (id int primary key, parent int references parents)""",
        {"name": "parents", "source": "crm"},
        "children",
        batch_size=batch_size,
    )
    pair.crm.execute("insert into parents values (1), (2)")
    converge(pair, "parents")
    pair.crm.execute("delete from parents")
    pair.billing.execute("insert into children values (1, 1)")
    sync_pair(pair)
    assert texts(pair.billing, "parents") == ["(1)"]
    for node, table in ((pair.crm, "parents"), (pair.billing, "children")):
        assert [failure[:3] for failure in failures(node)] == [(table, "1", "23503")]
    pair.billing.execute("delete from children")
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    sync_pair(pair)
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "parents", "children")
    assert texts(pair.billing, "parents") == []


def test_a_one_way_child_of_the_other_side_brings_its_parent_back_and_is_not_sent(
    pair: Pair,
) -> None:
    link(
        pair,
        """create table parents (id int primary key);
        create table children (id int primary key, parent int references parents)""",
        "parents",
        {"name": "children", "source": "crm"},
    )
    pair.crm.execute("insert into parents values (1), (2)")
    converge(pair, "parents")
    pair.crm.execute("delete from parents")
    pair.billing.execute("insert into children values (1, 1)")
    converge(pair, "parents")
    assert texts(pair.crm, "parents") == ["(1)"]
    assert texts(pair.crm, "children") == []


def test_a_parent_whose_key_changes_waits_for_the_child_that_the_other_side_has_given_it(
    pair: Pair,
) -> None:
    """Its unique value can't go over to the new key before, and nobody can say whose child that is."""
    ddl = """create table people (id int primary key, email text not null unique);
        create table visits (id int primary key, person int references people on update cascade)"""
    link(pair, ddl, "people", "visits")
    pair.crm.execute("insert into people values (1, 'a@x.org'); insert into visits values (1, 1)")
    converge(pair, "people", "visits")
    pair.crm.execute("update people set id = 2")
    pair.billing.execute("insert into visits values (2, 1)")
    sync_pair(pair)
    waiting = [(table, record) for table, record, *_ in failures(pair.crm)]
    assert waiting == [("people", "1"), ("people", "2"), ("visits", "1")]
    assert [(table, record) for table, record, *_ in failures(pair.billing)] == [("visits", "2")]
    pair.billing.execute("update visits set person = null where id = 2")
    sync_pair(pair)
    pair.crm.execute("update sync.sync_failures set next_attempt_at = now()")
    converge(pair, "people", "visits")
    assert texts(pair.billing, "visits") == ["(1,2)", "(2,)"]
