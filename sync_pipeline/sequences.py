"""The sequences behind synced columns, and which will hand out a value that is taken or that the peer takes too."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd

from psycopg import sql
from psycopg.rows import dict_row

from sync_pipeline import queries
from sync_pipeline.catalog import Catalog
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, query, scalar

HEADROOM_VALUES = 1000


@dataclass(frozen=True, slots=True)
class Sequence:
    """A sequence that gives a synced field its values on one node.

    `taken` and `greatest` are what the field holds of these values; null where its default computes others from them.
    """

    node: str
    table: str
    field: str
    schema: str
    name: str
    next_value: int
    increment: int
    last: int
    taken: int | None
    greatest: int | None

    @property
    def shown(self) -> str:
        """Schema and name, quoted where SQL asks for it by `psycopg.sql`."""
        return sql.Identifier(self.schema, self.name).as_string(None)


@dataclass(frozen=True, slots=True)
class Risk:
    """A sequence that should be moved. `peer` is set when both nodes will hand out the same values."""

    sequence: Sequence
    peer: Sequence | None = None


def sequences_at_risk(
    config: Config, connections: Mapping[str, Connection], found: Catalog
) -> list[Risk]:
    """Return the sequences whose next values are taken in their own table, or will be given by both nodes.

    Looked at are the nodes that send a table: on a node that only receives it, applications insert nothing.
    """
    by_field: dict[tuple[str, str], list[Sequence]] = {}
    for node in config.nodes:
        for sequence in _sequences(config, node.name, connections[node.name], found):
            by_field.setdefault((sequence.table, sequence.field), []).append(sequence)
    risks = [
        Risk(sequence)
        for sequences in by_field.values()
        for sequence in sequences
        if sequence.taken is not None
    ]
    risks += [
        Risk(pair[0], pair[1]) for pair in by_field.values() if len(pair) == 2 and _meet(*pair)
    ]
    return risks


def interleaving(risk: Risk, *, first: bool) -> str:
    """Return the statement that makes a sequence odd (on the first node) or even, beyond all values so far.

    One that counts in steps gives every other step: Hibernate takes all keys of a step for one value. Alone it keeps
    its steps.
    """
    sequences = [risk.sequence] + ([risk.peer] if risk.peer else [])
    step = max(abs(s.increment) for s in sequences)
    beyond = max(max(s.next_value, s.greatest or 0) for s in sequences) + step
    increment, like = 2 * step, 1 if first else 1 + step
    if risk.peer is None and step > 1:
        increment, like = step, risk.sequence.next_value
    start = beyond + (like - beyond) % increment
    return f"alter sequence {risk.sequence.shown} increment by {increment} restart with {start}"


def interleave(
    config: Config, connections: Mapping[str, Connection], found: Catalog
) -> Iterator[tuple[str, str]]:
    """Yield node and statement for each sequence at risk: odd on the first node, even on the second."""
    for risk in sequences_at_risk(config, connections, found):
        # Applications go on while this runs; what they take meanwhile must not be given again.
        one, two = (
            s and replace(s, next_value=s.next_value + HEADROOM_VALUES * abs(s.increment))
            for s in (risk.sequence, risk.peer)
        )
        for mine, peer in ((one, two), (two, one)):
            if mine is not None:
                first = mine.node == config.first.name
                yield mine.node, interleaving(Risk(mine, peer), first=first)


def _meet(one: Sequence, two: Sequence) -> bool:
    """True when two arithmetic progressions share a value that both have yet to reach."""
    low = max(min(one.next_value, one.last), min(two.next_value, two.last))
    high = min(max(one.next_value, one.last), max(two.next_value, two.last))
    return (
        low <= high and (one.next_value - two.next_value) % gcd(one.increment, two.increment) == 0
    )


def _sequences(
    config: Config, node: str, connection: Connection, found: Catalog
) -> Iterator[Sequence]:
    relations = {
        relation.oid: relation
        for table, relation in found.relations[node].items()
        if config.table(table).sends(node)
    }
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            query(queries.get("read_sequences", config.schema_name)), {"oids": list(relations)}
        ).fetchall()
    for row in rows:
        relation = relations[row["oid"]]
        field = next(
            (f for f, column in relation.columns.items() if column.name == row["column_name"]), None
        )
        if field is None or not row["readable"]:
            continue
        increment = row["increment"]
        next_value = scalar(
            connection,
            sql.SQL(
                "select case when is_called then last_value + {} else last_value end from {}"
            ).format(increment, sql.Identifier(row["schema_name"], row["sequence_name"])),
        )
        # `taken` looks at the progression alone: with odd and even values, what the peer gave is not in the way.
        taken, greatest = None, None
        if row["direct"]:
            taken, greatest = connection.execute(
                sql.SQL(
                    "select (select max({column})::bigint from {relation} where {column} {beyond} {next} "
                    "and pg_catalog.mod({column}::numeric - {next}, {step}) = 0), "
                    "(select max({column})::bigint from {relation})"
                ).format(
                    column=sql.Identifier(row["column_name"]),
                    relation=sql.Identifier(relation.schema, relation.name),
                    beyond=sql.SQL(">=" if increment > 0 else "<="),
                    next=next_value,
                    step=increment,
                )
            ).fetchall()[0]
        yield Sequence(
            node=node,
            table=relation.table,
            field=field,
            schema=row["schema_name"],
            name=row["sequence_name"],
            next_value=next_value,
            increment=increment,
            last=row["greatest"] if increment > 0 else row["least"],
            taken=taken,
            greatest=greatest,
        )
