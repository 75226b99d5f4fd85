"""Records that the target refuses, told apart from the others of their batch, which are applied.

When a statement fails, PostgreSQL names one row. Which others it would refuse is guessed for all at once, from the
constraints of the table; the suspects are tried one by one, on the server, and the rest together. Where a guess misses
a record, halving the rest finds it; where it misses many, the rest is tried one by one as well. A guess decides
nothing: a suspect that is accepted is applied like any other.
"""

from collections.abc import Callable, Sequence

import psycopg
from psycopg import sql

from sync_pipeline import parking, queries
from sync_pipeline.applier import (
    FOREIGN_KEY_VIOLATION,
    MAY_PASS_LATER,
    VIOLATIONS,
    Applier,
    Refusal,
    Step,
    bounded,
    describe,
    try_each,
)
from sync_pipeline.database import error_class, query
from sync_pipeline.records import Counts, Failure
from sync_pipeline.snapshot import Part
from sync_pipeline.statements import TableStatements

NOT_NULL_VIOLATION = "23502"
CHECK_VIOLATION = "23514"
# A character that the encoding lacks, and bytes that are no text in it.
NO_TEXT_HERE = {"22P05", "22021"}
# Enough to find two or three records among ten thousand.
MAX_ATTEMPTS = 80
# How often those that wait for each other are tried: each turn tries all of them.
MAX_TURNS = 8


def isolate(
    applier: Applier,
    schema: str,
    steps: Sequence[Step],
    counts: dict[str, Counts],
    prepare_step: Callable[[Step, Sequence[Refusal]], list[Refusal]],
    met: tuple[Step | None, str | None],
) -> list[Refusal]:
    """Apply steps so that a record which the target refuses fails alone; return the refused records.

    `prepare_step` is called before each with those refused so far, and returns what is to be refused as well. `met` is
    the step that was refused as a whole, if it is known which, and why: its suspects need no failure to be looked for.
    Records that failed on a foreign key or a unique value get another turn once the others are in: what was missing
    may have come, what was in the way may be gone. Each turn goes the other way round, since such records often wait
    for the next or for the one before. What still waits after some turns is refused: of ten thousand in a chain of no
    order, each turn may free only few.
    """
    refused: list[Refusal] = []
    for step in steps:
        refused += prepare_step(step, refused)
        failing = _apply(applier, schema, step, counts, met[1] if met[0] == step else None)
        for _ in range(MAX_TURNS):
            waiting = [refusal for refusal in failing if refusal.error_class in MAY_PASS_LATER]
            backwards = [refusal.number for refusal in reversed(waiting)]
            again = _one_by_one(applier, schema, step, backwards, counts)
            if len(again) == len(waiting):
                break
            failing = [r for r in failing if r not in waiting] + again
        refused += failing
    return refused


def leave_out_unreadable(applier: Applier, schema: str, part: Part) -> list[Failure]:
    """Take the records out of the batch of which a value that was staged raw cannot be read; return them.

    But for those that are gone on the source and have a key of characters that this encoding lacks: they are not here.
    """
    statements = applier.statements(part.table)
    if statements.raw is None or not part.count:
        return []
    numbers = range(part.first_number, part.last_number + 1)
    rows = try_each(applier.connection, schema, statements.read_each, numbers)
    refused = [
        Refusal(part.table, number, sqlstate, bounded(sqlstate, message, detail))
        for number, _, sqlstate, message, detail in rows
        if sqlstate is not None
    ]
    if not refused:
        return []
    unreadable = [refusal.number for refusal in refused]
    gone = applier.connection.execute(statements.gone_among, {"numbers": unreadable}).fetchall()
    failures = applier.failures(
        [r for r in refused if (r.number,) not in gone or r.error_class not in NO_TEXT_HERE]
    )
    applier.unstage(unreadable, part.table)
    return failures


def _apply(
    applier: Applier, schema: str, step: Step, counts: dict[str, Counts], met: str | None
) -> list[Refusal]:
    """Apply a step but for the suspects of each kind of refusal that is met, then these one by one."""
    span = applier.numbers(step.tables)
    suspects: list[int] = []

    def leave_out(sqlstate: str | None) -> bool:
        found = sorted(set(_suspects(applier, step, sqlstate)).difference(suspects))
        if found:
            suspects.extend(found)
            sit_out = applier.statements(*step.tables).sit_out
            applier.connection.execute(sit_out, {"numbers": found})
        return bool(found)

    leave_out(met)
    while (error := _attempt(applier, step, counts, None)) is not None:
        if not leave_out(error.sqlstate):
            break
    refused = [] if error is None else _search(applier, schema, step, counts, span, error)
    if suspects:
        applier.connection.execute(applier.statements(*step.tables).sit_in, {"numbers": suspects})
        refused += _one_by_one(applier, schema, step, suspects, counts)
    return refused


def _search(
    applier: Applier,
    schema: str,
    step: Step,
    counts: dict[str, Counts],
    span: tuple[int, int],
    error: psycopg.Error,
) -> list[Refusal]:
    """Find the refused records of a span by halving it; where these are many, try what is left one by one."""
    first, last = span
    if first == last:
        return _refusal(applier, step, first, error)
    refused: list[Refusal] = []
    # In the order of the records, each half to its end: in a cycle of tables the later ones need the earlier ones.
    waiting = _halves(span)
    attempts = 0
    while waiting:
        first, last = waiting.pop()
        attempts += 1
        if (found := _attempt(applier, step, counts, (first, last))) is None:
            continue
        if first == last:
            refused += _refusal(applier, step, first, found)
        elif attempts >= MAX_ATTEMPTS and len(step.tables) == 1:
            refused += _one_by_one(applier, schema, step, list(range(first, last + 1)), counts)
        else:
            waiting += _halves((first, last))
    return refused


def _halves(span: tuple[int, int]) -> list[tuple[int, int]]:
    """Divide a span; the first half comes last, to be taken first."""
    first, last = span
    middle = (first + last) // 2
    return [(middle + 1, last), (first, middle)]


def _alone(applier: Applier, step: Step, counts: dict[str, Counts], number: int) -> list[Refusal]:
    error = _attempt(applier, step, counts, (number, number))
    return [] if error is None else _refusal(applier, step, number, error)


def _refusal(applier: Applier, step: Step, number: int, error: psycopg.Error) -> list[Refusal]:
    table = applier.table_of(step, number)
    return [Refusal(table, number, error.sqlstate or "", describe(error))] if table else []


def _attempt(
    applier: Applier, step: Step, counts: dict[str, Counts], span: tuple[int, int] | None
) -> psycopg.Error | None:
    """Apply the records of a span, or all where there is none, as a whole or not at all; return why not."""
    done: dict[str, Counts] = {}
    try:
        with applier.connection.transaction():
            applier.defer_constraints()
            applier.run(step, done, span)
            applier.check_constraints()
    except psycopg.Error as error:
        if error_class(error) != "data":
            raise
        return error
    for table, entry in done.items():
        counts.setdefault(table, Counts()).add(entry)
    return None


def _one_by_one(
    applier: Applier, schema: str, step: Step, numbers: list[int], counts: dict[str, Counts]
) -> list[Refusal]:
    """Apply some records each on its own, in one round trip where it is one table; return those that are refused."""
    if len(step.tables) > 1:
        return [r for n in numbers for r in _alone(applier, step, counts, n)]
    if not numbers:
        return []
    [table] = step.tables
    single = applier.statements(table).single
    connection = applier.connection
    connection.execute(single.create_stage)
    connection.execute(single.fill_from(applier.statements(table)), {"numbers": numbers})
    connection.execute(sql.SQL("create index on {} (n)").format(single.stage))
    parts, count = (
        single.upsert(0, "known", of_all=False)
        if step.phase == "upsert"
        else single.delete(0, of_all=False)
    )
    statement = sql.SQL("with {} select {}").format(sql.SQL(", ").join(parts), count)
    rows = try_each(connection, schema, statement, numbers)
    connection.execute(single.drop_stage)
    entry = counts.setdefault(table, Counts())
    refused = []
    for number, written, sqlstate, message, detail in rows:
        if sqlstate is not None:
            refused.append(Refusal(table, number, sqlstate, bounded(sqlstate, message, detail)))
        elif step.phase == "upsert":
            entry.upserted += written
        else:
            entry.deleted += written
    return refused


def _suspects(applier: Applier, step: Step, sqlstate: str | None) -> list[int]:
    """Return the numbers of the records that constraints of a kind speak against: a guess, for single tables."""
    if step.phase != "upsert" or len(step.tables) > 1:
        return []
    [table] = step.tables
    statements = applier.statements(table)
    connection = applier.connection
    if sqlstate in VIOLATIONS:
        return list(dict.fromkeys(holder.number for holder in parking.holders(applier, table)))
    if sqlstate == FOREIGN_KEY_VIOLATION:
        return list({number for number, _ in parking.orphans(applier, table)})
    if sqlstate in {NOT_NULL_VIOLATION, CHECK_VIOLATION}:
        carried = {column.name for column in statements.relation.columns.values()}
        rows = connection.execute(
            query(queries.get("read_checks", "")), {"oid": statements.relation.oid}
        ).fetchall()
        checks = [expression for expression, columns in rows if carried.issuperset(columns)]
        return _against(applier, statements, checks)
    return []


def _against(applier: Applier, statements: TableStatements, checks: list[str]) -> list[int]:
    """Return the numbers of the records for which a check is false; none when the checks cannot be asked this way."""
    if not checks:
        return []
    try:
        with applier.connection.transaction():
            return [n for (n,) in applier.connection.execute(statements.against(checks))]
    except psycopg.Error as error:
        if error_class(error) == "transient":
            raise
        return []
