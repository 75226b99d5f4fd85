"""The values that the engine's modules hand each other."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Literal

from sync_pipeline.errors import SyncPipelineError

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def spelled(*names: str) -> str:
    """Spell a name for SQL that an operator will copy: in quotes unless it is plain."""
    return ".".join(
        name if _PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'
        for name in names
    )


def counted(number: int, noun: str) -> str:
    """Return `1 record`, `2 records`, `1,200 records`, `3 passes`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun[-1] == "s" else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def printable(text: str) -> str:
    """Return text with control characters escaped: a value must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# What the text of a value depends on: the same where it is marked and where it is sent, whatever a database says.
TEXT_SETTINGS = {
    "datestyle": "ISO, YMD", "timezone": "UTC", "intervalstyle": "postgres", "bytea_output": "hex",
    "extra_float_digits": "1", "lc_monetary": "C",
}  # fmt: skip
# The text of these types depends on no setting of the session.
PLAIN_TYPES = {
    "smallint", "integer", "bigint", "uuid", "text", "character varying", "bpchar", '"char"', "name",
    "boolean", "numeric", "oid", "inet", "cidr", "macaddr", "macaddr8", '"bit"', "bit varying",
}  # fmt: skip
# Values of these types that are equal are the same to the byte, apart from what a collation says.
SAME_WHEN_EQUAL = PLAIN_TYPES - {"numeric", "bpchar"} | {
    "date", "timestamp without time zone", "timestamp with time zone", "time without time zone",
    "time with time zone", "bytea", "money", "pg_lsn", "xid8",
}  # fmt: skip
# jsonb holds values of these types as they are; of any other one it would change some, or refuse them.
SAME_IN_JSONB = {"boolean", "smallint", "integer", "bigint", "bpchar"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column as the catalog has it; `type_name` is its base type without length, ready for a cast."""

    name: str
    type_name: str
    formatted_type: str
    domain: str | None
    not_null: bool
    identity: str
    # Named only where texts that are not the same can be equal by it.
    collation: str | None = None

    @property
    def collation_is_deterministic(self) -> bool:
        """True when equal texts are the same."""
        return self.collation is None

    @property
    def equality(self) -> str:
        """What lets different texts be equal: `bpchar`, `citext`, a `collation`; empty where nothing does."""
        name = self.type_name.rsplit(".", maxsplit=1)[-1]
        if name in {"bpchar", "citext"}:
            return name
        return "" if self.collation_is_deterministic else "collation"

    @property
    def is_same_when_equal(self) -> bool:
        """True when equal values are the same to the byte."""
        return self.type_name in SAME_WHEN_EQUAL and self.collation_is_deterministic


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """A reference from a synced table, or a partition of it, to a synced table or a partition of it.

    By the names of columns; also by those of fields, where all of them are carried.
    """

    # What refers: schema and name.
    child: tuple[str, str]
    columns: tuple[str, ...]
    fields: tuple[str, ...]
    parent: str
    parent_columns: tuple[str, ...]
    parent_fields: tuple[str, ...]
    # Schema and name of what a pair of columns is compared by, where each has another one.
    collations: tuple[tuple[str, str] | None, ...]
    # Whether PostgreSQL changes the child when what it refers to changes: ON UPDATE CASCADE, SET NULL, SET DEFAULT.
    follows: bool

    @property
    def is_carried(self) -> bool:
        """True when the rows that travel say what they refer to."""
        return bool(self.fields and self.parent_fields)

    def moves_with(self, parent: "Relation") -> bool:
        """True when rows follow a change of the parent that leaves its key as it is."""
        return self.follows and self.is_carried and not set(self.parent_fields) <= set(parent.key)


@dataclass(frozen=True, slots=True)
class Relation:
    """One synced table on one node. Columns are listed by field, in the order of the link's fields."""

    table: str
    node: str
    oid: int
    schema: str
    name: str
    key: tuple[str, ...]
    columns: dict[str, Column]
    key_is_deferrable: bool
    # Whether any constraint of the database is deferrable, and so may be checked after our statements.
    deferrable_constraints: bool
    foreign_keys: tuple[ForeignKey, ...]
    partitions: tuple[tuple[str, str], ...]
    where: str | None
    # Another one when the table was renamed or dropped since, or got a column or a foreign key.
    shape: str
    missing_fields: tuple[str, ...] = ()
    # Columns that are never carried, whatever the other node has: excluded or generated ones.
    uncarried: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.table, self.node, self.oid))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are carried, key first."""
        return tuple(self.columns)

    @property
    def key_in_words(self) -> str:
        """What a record_id of the table is: `integer`, or `a JSON array of integer, text`."""
        types = [self.columns[field].type_name for field in self.key]
        return types[0] if len(types) == 1 else f"a JSON array of {', '.join(types)}"

    @property
    def has_lookup_key(self) -> bool:
        """True when rows can be looked up by an array of keys: in one index, by values that have one spelling."""
        key = self.columns[self.key[0]]
        return len(self.key) == 1 and not self.partitions and key.is_same_when_equal


@dataclass(frozen=True, slots=True)
class Moment:
    """When a snapshot was taken: the node's clock; all transactions before `oldest_running` had ended.

    `shapes` are those of the synced tables, in the order in which they were asked for.
    """

    read_at: datetime
    failures_are_due: bool
    oldest_running: int
    shapes: list[str]


@dataclass(slots=True)
class Counts:
    """What a pass did to one table, in records."""

    upserted: int = 0
    deleted: int = 0
    unchanged: int = 0
    conflicts: int = 0
    failed: int = 0

    @classmethod
    def sum(cls, all_counts: Iterable["Counts"]) -> "Counts":
        """Add up some counts."""
        total = cls()
        for counts in all_counts:
            total.add(counts)
        return total

    def add(self, other: "Counts") -> None:
        """Add another count to this one."""
        self.upserted += other.upserted
        self.deleted += other.deleted
        self.unchanged += other.unchanged
        self.conflicts += other.conflicts
        self.failed += other.failed

    def in_words(self) -> str:
        """Return `3 upserted, 1 conflict`, nothing where all counts are 0."""
        return ", ".join(
            counted(number, "conflict") if name == "conflicts" else f"{number:,} {name}"
            for name, number in asdict(self).items()
            if number
        )

    @property
    def total(self) -> int:
        """All records that were looked at."""
        return self.upserted + self.deleted + self.unchanged + self.conflicts + self.failed


# What can become of a record, by the name of its count.
OUTCOMES = tuple(each.name for each in fields(Counts))


@dataclass(frozen=True, slots=True)
class Failure:
    """A record that the target refused, with the refusal; `held` when a conflict waits for an operator."""

    table_name: str
    record_id: str
    error_class: str
    error: str
    held: bool = False


@dataclass(slots=True)
class DirectionReport:
    """What one direction of a pass did."""

    source: str
    target: str
    tables: dict[str, Counts] = field(default_factory=dict)
    batches: int = 0
    events: int = 0
    lag_seconds: float = 0.0
    # How far the target's clock is ahead of the source's.
    clock_difference_seconds: float | None = None
    clock_warning: str | None = None
    recovered: int = 0
    set_aside: int = 0
    # An operator paused the link in between: the rest waits.
    paused: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The direction as users write it: `crm->billing`."""
        return f"{self.source}->{self.target}"

    def table(self, name: str) -> Counts:
        """Return the counts of a table, made on first use."""
        return self.tables.setdefault(name, Counts())

    @property
    def total(self) -> Counts:
        """The counts over all tables."""
        return Counts.sum(self.tables.values())

    @property
    def did_something(self) -> bool:
        """True when events were consumed or records looked at."""
        return self.events > 0 or self.total.total > 0 or self.set_aside > 0


Level = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What an examination found: `error` keeps records from being synced, `warning` may, `info` is worth knowing."""

    level: Level
    check: str
    node: str | None
    table: str | None
    message: str
    remedy: str

    @classmethod
    def of(cls, error: SyncPipelineError, check: str, node: str | None) -> "Finding":
        """Make a finding of an error that the pipeline would stop at."""
        remedy = error.remedy or "see the message"
        return cls("error", check, error.node or node, None, error.problem, remedy)
