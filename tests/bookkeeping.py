"""Applications and triggers that keep books, so that a test can tell afterwards what was done, and how often.

`revision` counts the application's own updates of a row: it travels with the row, and a write that was lost or done
twice shows in it. `effects` is a table of each node that no one syncs: a trigger notes there what the consumer wrote.
Every state of a row is different from all others, so a state that was noted twice was applied twice.
"""

from tests.engine import equal, sync_pair, totals
from tests.helpers import TABLES, Node, Pair

BOOKS = """
alter table users add column revision int not null default 0;
create function count_revision() returns trigger language plpgsql as $$
begin
    if current_setting('sync_pipeline.applying', true) is distinct from 'sync' then
        new.revision := old.revision + 1;
    end if;
    return new;
end $$;
create trigger count_revision before update on users for each row execute function count_revision();

create table effects (table_name text, operation text, state text);
create function note_effect() returns trigger language plpgsql as $$
begin
    if current_setting('sync_pipeline.applying', true) = 'sync' then
        insert into effects values (tg_table_name, tg_op, (case tg_op when 'DELETE' then old else new end)::text);
    end if;
    return null;
end $$;
"""
NOTE_EFFECTS = """
create trigger note_effect after insert or update or delete on {table}
for each row execute function note_effect();
"""
APPLIED_TWICE = (
    "select table_name, operation, state from effects group by 1, 2, 3 having count(*) > 1"
)
ORPHANS = """
select count(*) from users left join accounts on accounts.id = account_id where accounts.id is null
union all select count(*) from orders left join users on users.id = user_id where users.id is null
"""


def keep_books(pair: Pair) -> None:
    """Give both nodes the counter and the notes. Before `installed`, or the counter is not synced."""
    for node in pair.nodes:
        node.execute(BOOKS)
        for table in TABLES:
            node.execute(NOTE_EFFECTS.format(table=table))


def work(pair: Pair, first: int) -> None:
    """Inserts, updates and deletes with children, on both sides, without a conflict: ten families each."""
    for node, shift in ((pair.crm, 0), (pair.billing, 1000)):
        keys = first + shift, first + shift + 9
        node.execute(
            "insert into accounts select g, 'account ' || g from generate_series(%s::int, %s::int) as g",
            *keys,
        )
        node.execute(
            "insert into users select g, g, g || '@x.org' from generate_series(%s::int, %s::int) as g",
            *keys,
        )
        node.execute(
            "insert into orders select g, g, 1 from generate_series(%s::int, %s::int) as g", *keys
        )
        node.execute(
            "update users set name = 'changed' where id between %s and %s", keys[0], keys[0] + 5
        )
        node.execute("delete from accounts where id = %s", keys[0] + 1)


def go_on(pair: Pair, first: int) -> None:
    """What the applications do before anybody recovers: newer changes to the records that were in hand."""
    pair.crm.execute("update users set name = 'after the fault' where id = %s", first + 2)
    pair.crm.execute("delete from users where id = %s", first + 4)
    pair.crm.execute(
        "insert into users values (%s, %s, %s)", first + 4, first + 3, f"{first}@again"
    )
    pair.billing.execute("update users set name = 'after the fault' where id = %s", first + 1002)
    pair.billing.execute("delete from accounts where id = %s", first + 1008)


def assert_each_write_had_its_effect_once(pair: Pair, *firsts: int) -> None:
    """Settle what `work` and `go_on` did. Then all is equal and valid, nothing was echoed, and nothing is left over."""
    marked = [marked_so_far(node) for node in pair.nodes]
    sync_pair(pair)
    assert totals(pair).passes == 0, "the passes do not come to an end"
    echoed = "what was applied came back as a change"
    assert [marked_so_far(node) for node in pair.nodes] == marked, echoed
    assert equal(pair)
    for node in pair.nodes:
        for nothing in ("sync_events", "sync_applied", "sync_failures", "sync_conflicts"):
            assert node.rows(f"select * from sync.{nothing}") == [], (node.name, nothing)
        assert node.rows(ORPHANS) == [(0,), (0,)]
        assert node.rows(APPLIED_TWICE) == []
        for first in firsts:
            updated = "select name, revision from users where id in (%s, %s)"
            assert node.rows(updated, first + 2, first + 1002) == [("after the fault", 2)] * 2
            assert node.rows("select email from users where id = %s", first + 4) == [
                (f"{first}@again",)
            ]
            assert node.rows("select id from accounts where id = %s", first + 1008) == []


def marked_so_far(node: Node) -> int:
    """How many changes a node has ever marked; an event that came and went is counted, too."""
    return int(node.value("select coalesce(pg_sequence_last_value('sync.sync_events_id_seq'), 0)"))
