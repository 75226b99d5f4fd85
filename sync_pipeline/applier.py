"""The target's side of a pass: stage a batch and apply it set by set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, LiteralString

import psycopg
from psycopg import sql

from sync_pipeline import queries
from sync_pipeline.catalog import Catalog
from sync_pipeline.database import (
    DATA_CLASSES,
    Connection,
    compiled,
    error_class,
    query,
    server_encoding,
)
from sync_pipeline.errors import CatalogMismatch
from sync_pipeline.records import Counts, Failure
from sync_pipeline.snapshot import Part
from sync_pipeline.statements import Expected, TableStatements

ERROR_LENGTH = 500
IDLE_BATCHES = 50
FEW_RECORDS = 100
Phase = Literal["upsert", "delete"]


@dataclass(frozen=True, slots=True)
class Step:
    """One statement of a batch: the upserts or deletes of one component of tables."""

    phase: Phase
    tables: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A staged record that the target refused."""

    table: str
    number: int
    error_class: str
    error: str


class Applier:
    """Writes batches to one node. Owns the staging tables of the node's writer connection."""

    def __init__(
        self, connection: Connection, catalog: Catalog, node: str, generation: int
    ) -> None:
        self.connection = connection
        self.catalog = catalog
        self.node = node
        self._generation = generation
        self._statements: dict[tuple[str, bool], TableStatements] = {}
        self._compiled: dict[
            tuple[Phase, bool, tuple[tuple[str, bool, Expected], ...]], LiteralString
        ] = {}
        # The staging tables of this session, and how many batches have not needed each.
        self._created: dict[str, int] = {}
        # The tables whose values are staged raw, and the encoding that takes any bytes and gives them back.
        self._raw: set[str] = set()
        encoding = server_encoding(connection)
        self._raw_encoding = "LATIN1" if encoding == "UTF8" else encoding
        self.staged: dict[str, list[Part]] = {}
        # Which of the staged tables have records to write, and which have records to delete.
        self._work: dict[Phase, set[str]] = {}
        # Inserts alone or first are cheaper for new records; updates first free unique values that inserts may want.
        self.expect_new = True
        self._numbers: dict[str, tuple[int, int]] = {}
        # What `parking` has read of the unique indexes of tables, for one batch.
        self.indexes: dict[str, list[Any]] = {}

    def statements(self, table: str) -> TableStatements:
        """Return how a table is written."""
        raw = table in self._raw
        found = self._statements.get((table, raw))
        if found is None:
            index = self.catalog.tables.index(table)
            name = f"sync_pipeline_stage_{self._generation}_{index}{'_raw' if raw else ''}"
            relation = self.catalog.relation(self.node, table)
            found = TableStatements(relation, name, self._raw_encoding if raw else None)
            self._statements[table, raw] = found
        return found

    def prepare(self, tables: Iterable[str], *, raw: bool = False) -> None:
        """Make the staging tables that a batch can need, before its transaction: a rollback must not take them."""
        self.staged = {}
        self.expect_new = True
        self._numbers = {}
        self.indexes = {}
        wanted = self._with_ancestors(tables)
        self._raw = wanted if raw else set()
        needed = [self.statements(table) for table in wanted]
        if missing := [each for each in needed if each.stage_name not in self._created]:
            # In one transaction: the end of each empties all staging tables that there are.
            self.connection.execute(sql.SQL("; ").join(each.create_stage for each in missing))
        self._created = {name: idle + 1 for name, idle in self._created.items()}
        self._created |= dict.fromkeys((statements.stage_name for statements in needed), 0)
        # Each commit empties every staging table, whether it was used or not.
        for name in [name for name, idle in self._created.items() if idle > IDLE_BATCHES]:
            self.connection.execute(
                sql.SQL("drop table {}").format(sql.Identifier("pg_temp", name))
            )
            del self._created[name]

    def _with_ancestors(self, tables: Iterable[str]) -> set[str]:
        found: set[str] = set()
        waiting = list(tables)
        while waiting:
            table = waiting.pop()
            if table not in found:
                found.add(table)
                keys = self.catalog.relation(self.node, table).foreign_keys
                waiting += [key.parent for key in keys]
        return found

    def defer_constraints(self) -> None:
        """Let deferrable constraints be checked at the batch's end instead of each statement's."""
        if self._has_deferrable:
            self.connection.execute("set constraints all deferred")

    def check_constraints(self) -> None:
        """Check deferred constraints now, where the record is still known."""
        if self._has_deferrable:
            self.connection.execute("set constraints all immediate")

    @property
    def _has_deferrable(self) -> bool:
        return any(
            self.catalog.relation(self.node, table).deferrable_constraints for table in self.staged
        )

    def stage(self, part: Part) -> None:
        """Stream a part's rows into its staging table; not a value is looked at."""
        statements = self.statements(part.table)
        if part.rows is None:
            raise ValueError("the part was not read")
        if statements.stage_name not in self._created:
            # A child that was brought along. Not remembered: a rollback takes the table.
            self.connection.execute(statements.create_stage)
        part.rows.seek(0)
        with self.connection.cursor().copy(statements.copy_in) as copy:
            while chunk := part.rows.read(262144):
                copy.write(chunk)
        self.staged.setdefault(part.table, []).append(part)
        first, last = self._numbers.get(part.table, (part.first_number, part.last_number))
        self._numbers[part.table] = (min(first, part.first_number), max(last, part.last_number))

    def survey(self) -> None:
        """Find out which staged tables have records to write, and which have records to delete."""
        tables = list(self.staged)
        found = sql.SQL(
            "exists (select from {stage} where present), exists (select from {stage} where not present)"
        )
        row: Any = self.connection.execute(
            sql.SQL("select {}").format(
                sql.SQL(", ").join(found.format(stage=self.statements(t).stage) for t in tables)
            )
        ).fetchone()
        self._work = {
            "upsert": {table for table, present in zip(tables, row[::2], strict=True) if present},
            "delete": {table for table, gone in zip(tables, row[1::2], strict=True) if gone},
        }

    def steps(self, tables: Iterable[str], phase: Phase) -> list[Step]:
        """Order the work on some tables by foreign keys: upserts parents first, deletes children first."""
        wanted = set(tables) & self._work[phase]
        components = [
            tuple(table for table in component if table in wanted)
            for component in self.catalog.order
        ]
        steps = [Step(phase, component) for component in components if component]
        return steps if phase == "upsert" else steps[::-1]

    def run(
        self, step: Step, counts: dict[str, Counts], span: tuple[int, int] | None = None
    ) -> None:
        """Execute a step for the records numbered in `span`, or all; raises what PostgreSQL raises."""
        first, last = span or self.numbers(step.tables)
        row = self.connection.execute(
            self._statement(step, of_all=span is None),
            {"first": first, "last": last},
            # To plan a statement takes longer than to write a few records; for many, the plan must fit their number.
            prepare=None if last - first < FEW_RECORDS else False,
        ).fetchone()
        for table, written in zip(step.tables, row or (), strict=True):
            entry = counts.setdefault(table, Counts())
            if step.phase == "upsert":
                entry.upserted += written
            else:
                entry.deleted += written

    def _statement(self, step: Step, *, of_all: bool) -> LiteralString:
        kinds = tuple((table, table in self._raw, self._expected(table)) for table in step.tables)
        if (step.phase, of_all, kinds) not in self._compiled:
            parts: list[sql.Composed] = []
            columns: list[sql.Composed] = []
            for number, (table, _, expected) in enumerate(kinds):
                statements = self.statements(table)
                expressions, count = (
                    statements.upsert(number, expected, of_all=of_all)
                    if step.phase == "upsert"
                    else statements.delete(number, of_all=of_all)
                )
                parts += expressions
                columns.append(count)
            self._compiled[step.phase, of_all, kinds] = compiled(
                sql.SQL("with {} select {}").format(
                    sql.SQL(", ").join(parts), sql.SQL(", ").join(columns)
                )
            )
        return self._compiled[step.phase, of_all, kinds]

    def _expected(self, table: str) -> Expected:
        if not self.expect_new:
            return "known"
        events = sum(part.events for part in self.staged[table])
        inserts = sum(part.inserts for part in self.staged[table])
        if inserts == events > 0:
            return "new"
        return "mostly new" if 2 * inserts > events else "known"

    def numbers(self, tables: Iterable[str]) -> tuple[int, int]:
        """Return the least and greatest number of the staged records of some tables."""
        spans = [self._numbers[table] for table in tables if table in self._numbers]
        return min(first for first, _ in spans), max(last for _, last in spans)

    def table_of(self, step: Step, number: int) -> str | None:
        """Return which table of a step the record of a number belongs to."""
        for table in step.tables:
            if any(p.first_number <= number <= p.last_number for p in self.staged.get(table, [])):
                return table
        return None

    def unstage(self, numbers: Iterable[int], table: str) -> None:
        """Take records out of the batch."""
        self.connection.execute(self.statements(table).unstage, {"numbers": list(numbers)})

    def record_ids(self, table: str, numbers: Iterable[int]) -> dict[int, str]:
        """Return the ids of staged records by their number."""
        statements = self.statements(table)
        rows = self.connection.execute(statements.ids_of, {"numbers": list(numbers)}).fetchall()
        if statements.raw is None:
            return dict(rows)
        try:
            return {number: utf8.decode() for number, utf8 in rows}
        except UnicodeDecodeError as error:
            raise CatalogMismatch("a key holds bytes that are no text", table=table) from error

    def failures(self, refused: Sequence[Refusal]) -> list[Failure]:
        """Name the refused records by their ids."""
        failures = []
        for table in dict.fromkeys(refusal.table for refusal in refused):
            mine = [refusal for refusal in refused if refusal.table == table]
            ids = self.record_ids(table, [refusal.number for refusal in mine])
            failures += [
                Failure(table, ids[refusal.number], refusal.error_class, refusal.error)
                for refusal in mine
                if refusal.number in ids
            ]
        return failures


# Number of a record, how many rows were written, and SQLSTATE, message and detail where it was refused.
Trial = tuple[int, int, str | None, str, str | None]


def try_each(
    connection: Connection, schema: str, statement: sql.Composed, numbers: Sequence[int]
) -> list[Trial]:
    """Execute a statement for each record number on the server; return what came of each.

    Where a function of the application raises a class that PostgreSQL knows for something else, or does not know, each
    in a round trip of its own.
    """
    parameters = {
        "statement": statement.as_string(connection),
        "numbers": list(numbers),
        "data_classes": sorted(DATA_CLASSES),
    }
    try:
        with connection.transaction():
            return connection.execute(query(queries.get("try_each", schema)), parameters).fetchall()
    except psycopg.Error as error:
        if error_class(error) != "data":
            raise
        if len(numbers) == 1:
            said = error.diag
            return [
                (
                    numbers[0],
                    0,
                    error.sqlstate,
                    said.message_primary or str(error),
                    said.message_detail,
                )
            ]
    return [
        trial for number in numbers for trial in try_each(connection, schema, statement, [number])
    ]


# A unique and an exclusion constraint: two rows must not have these values at a time.
VIOLATIONS = {"23505", "23P01"}
FOREIGN_KEY_VIOLATION = "23503"
# Another record of the same statement may be what is missing or in the way.
MAY_PASS_LATER = VIOLATIONS | {FOREIGN_KEY_VIOLATION}


def describe(error: psycopg.Error) -> str:
    """Return what PostgreSQL said, bounded: the message and, for constraints, the detail that names the key."""
    message = error.diag.message_primary or str(error)
    return bounded(error.sqlstate or "", message, error.diag.message_detail)


def bounded(sqlstate: str, message: str, detail: str | None) -> str:
    """Return a message of PostgreSQL as it is kept. A detail is added only where it names a key, not a whole row."""
    text = message.strip()
    if sqlstate in MAY_PASS_LATER and detail:
        text = f"{text}: {detail}"
    return text if len(text) <= ERROR_LENGTH else text[: ERROR_LENGTH - 1] + "…"
