"""What the policy `merge` would cost the application: capture that also notes which fields an update changed.

To merge two rows by field it must be known which fields each side changed. Values stay out of the queue, so their names
would go in: the triggers would compare every column of the old and the new row and write a list per record. Measured
beside capture as it is, in the same run, and beside a table without any trigger.
"""

import statistics

from benchmarks import figures, workloads
from benchmarks.arena import Arena, Databases
from benchmarks.capture import _seconds
from benchmarks.figures import Figure, Options

COLUMNS = ("id", "name", "amount", "note", "updated_at")
UPDATE = "update items set amount = amount + 1, updated_at = clock_timestamp()"
MANY = (
    "do $$ begin for i in 1..{number} loop "
    + UPDATE
    + " where id = 1 + (i * 7919::bigint) % {rows}; commit; end loop; end $$"
)


def measure(arena: Arena, options: Options) -> list[Figure]:
    """Compare single-row updates, each a transaction, and one statement over the whole table."""
    rows, number = options.of(200_000), options.of(20_000)
    schema = workloads.items(rows)
    many = MANY.format(number=number, rows=rows)
    with (
        arena.databases("plain", schema) as plain,
        arena.link("captured", schema, ["items"]) as captured,
        arena.link("fields", schema, ["items"]) as fields,
    ):
        note_changed_fields(fields)
        found = []
        for name, statement in (
            (f"{number:,} single-row updates", many),
            (f"one update of {rows:,} rows", UPDATE),
        ):
            samples: dict[str, list[float]] = {"plain": [], "captured": [], "fields": []}
            for turn in range(options.rounds):
                order = [plain, captured, fields]
                for databases in order if turn % 2 == 0 else order[::-1]:
                    clean(databases)
                    databases.source.execute(b"set synchronous_commit = off")
                    samples[databases.name].append(_seconds(databases.source, statement))
            extra = [
                (two - none) / (one - none)
                for none, one, two in zip(*samples.values(), strict=True)
            ]
            figures.progress(f"    {name}: {statistics.median(extra):.2f} times the cost")
            found += [
                Figure(f"{name}, without a trigger", samples["plain"], "s"),
                Figure(f"{name}, captured", samples["captured"], "s"),
                Figure(f"{name}, changed fields noted", samples["fields"], "s"),
                Figure(f"{name}: cost of capture with fields ÷ without", extra),
            ]
        return found


def note_changed_fields(databases: Databases) -> None:
    """Let the capture function of `items` compare each column and write the names of those that changed."""
    session = databases.source
    session.execute(b"alter table sync.sync_events add column changed_fields text[]")
    row = session.execute(
        b"select pg_get_functiondef(p.oid) from pg_proc as p "
        b"where p.pronamespace = 'sync'::regnamespace and p.proname = 'capture_items'"
    ).fetchone()
    if row is None:
        raise AssertionError("items is not captured")
    update, rest = str(row[0]).split("elsif tg_op = 'INSERT'", 1)
    compared = ", ".join(
        f"case when new_rows.{column} is distinct from old_rows.{column} then '{column}' end"
        for column in COLUMNS
    )
    for before, after in (
        ("caused_by)", "caused_by, changed_fields)"),
        (
            "consumer\n        from",
            f"consumer, array_remove(array[{compared}], null)\n        from",
        ),
    ):
        if before not in update:
            raise AssertionError(f"the capture function has no {before!r}")
        update = update.replace(before, after)
    session.execute(f"{update}elsif tg_op = 'INSERT'{rest}".encode())
    session.execute(UPDATE.encode() + b" where id = 1")
    noted = session.execute(b"select changed_fields from sync.sync_events").fetchone()
    if noted != (["amount", "updated_at"],):
        raise AssertionError(f"noted {noted}")


def clean(databases: Databases) -> None:
    """Forget events that nobody consumes here, and the dead rows of the sample before."""
    if databases.name != "plain":
        databases.source.execute(b"truncate sync.sync_events")
    databases.source.execute(b"vacuum analyze items")
    databases.source.execute(b"checkpoint")


if __name__ == "__main__":
    figures.main(measure, description=__doc__)
