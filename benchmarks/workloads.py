"""Tables, and backlogs to drain. Every backlog touches each of its records once, so that nothing can be left out."""

from dataclasses import dataclass

# Scatters consecutive numbers over the table; a prime that no size used here is a multiple of.
STRIDE = 7919


def items(rows: int, *, name: str = "items") -> str:
    """A table of `rows` rows, about 100 bytes each."""
    return f"""
create table {name} (
    id bigint primary key,
    name text not null,
    amount numeric(12, 2) not null,
    note text,
    updated_at timestamptz not null
);
insert into {name}
select i, 'item ' || i, i % 1000, 'as it was', '2026-01-01'::timestamptz + i * interval '1 second'
from generate_series(1, {rows}) as i;
"""


FAMILIES = """
create table parents (id bigint primary key, name text not null, created_at timestamptz not null);
create table children (
    id bigint primary key,
    parent_id bigint not null references parents,
    label text not null,
    quantity integer not null
);
create index on children (parent_id);
"""


@dataclass(frozen=True, slots=True)
class Workload:
    """A backlog: how it is made, which query tells that the last of it has arrived, how it is taken back."""

    name: str
    records: int
    schema: str
    tables: tuple[str, ...]
    backlog: str
    arrived: str
    reset: str = ""


def single_updates(records: int, rows: int, *, first: int = 0) -> Workload:
    """`records` transactions that update one row each, scattered over a table of `rows` rows.

    `first` leaves out as many rows: two backlogs of one table need not meet.
    """
    last = first + records
    return Workload(
        name=f"{records:,} single-row updates",
        records=records,
        schema=items(rows),
        tables=("items",),
        backlog=f"""
do $$ begin
    for i in {first + 1}..{last} loop
        update items
        set amount = amount + 1, note = '{{mark}}', updated_at = clock_timestamp()
        where id = 1 + (i * {STRIDE}::bigint) % {rows};
        commit;
    end loop;
end $$""",
        arrived=f"select note = '{{mark}}' from items where id = {1 + last * STRIDE % rows}",
    )


def one_update(rows: int) -> Workload:
    """One statement that updates every row."""
    return Workload(
        name=f"one update of {rows:,} rows",
        records=rows,
        schema=items(rows),
        tables=("items",),
        backlog="update items set amount = amount + 1, note = '{mark}', updated_at = clock_timestamp()",
        arrived="select note = '{mark}' from items where id = 1",
    )


def chunks(records: int, rows: int, size: int = 1000) -> Workload:
    """Updates of `size` neighbouring rows each, the chunks scattered over a table of `rows` rows.

    However many records: the rows of a batch lie equally close together.
    """
    return Workload(
        name=f"{records:,} updates in statements of {size:,}",
        records=records,
        schema=items(rows),
        tables=("items",),
        backlog=f"""
do $$ declare first bigint; begin
    for i in 1..{records // size} loop
        first := {size} * ((i * {STRIDE}::bigint) % {rows // size}) + 1;
        update items
        set amount = amount + 1, note = '{{mark}}', updated_at = clock_timestamp()
        where id between first and first + {size - 1};
        commit;
    end loop;
end $$""",
        arrived="",
    )


def insert_storm(parents: int, *, enforced: bool = True) -> Workload:
    """Transactions of a parent with its three children each, into tables with a foreign key, if it is `enforced`."""
    name = f"insert storm of {parents:,} + {3 * parents:,} rows"
    return Workload(
        name=name if enforced else f"{name}, no foreign key",
        records=4 * parents,
        schema=FAMILIES if enforced else FAMILIES.replace(" references parents", ""),
        tables=("parents", "children"),
        backlog=f"""
do $$ begin
    for i in 1..{parents} loop
        insert into parents values (i, '{{mark}}', clock_timestamp());
        for j in 1..3 loop
            insert into children values (3 * i + j, i, 'child of ' || i, j);
        end loop;
        commit;
    end loop;
end $$""",
        arrived=f"select exists (select from children where id = {3 * parents + 3})",
        # As a replica: nobody's triggers look.
        reset="set session_replication_role = replica; truncate parents, children; reset session_replication_role",
    )
