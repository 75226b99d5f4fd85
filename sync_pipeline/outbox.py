"""The events of the source, written: acknowledge what the target has, set aside what nobody understands."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import sql

from sync_pipeline import queries
from sync_pipeline.applier import bounded, try_each
from sync_pipeline.capture import is_key
from sync_pipeline.config import RetryConfig
from sync_pipeline.database import Connection, query, scalar, server_encoding
from sync_pipeline.records import Failure, Relation
from sync_pipeline.snapshot import EMPTY, LAST_ID, Part, count, one_row


@dataclass(slots=True)
class Outcome:
    """What became of a table's records on the target: which were retried, which failed, which lost a conflict.

    `failed_ids` are the ids of the events of those that failed, as multiranges.
    """

    table: str
    retried: list[str]
    failures: list[Failure]
    failed_ids: list[str]
    lost: list[str]


def acknowledge(
    connection: Connection,
    schema: str,
    ids: str,
    outcomes: Sequence[Outcome],
    retry: RetryConfig,
    batch: int,
    read_at: datetime,
) -> int:
    """Delete exactly the events that a batch took; those of records that failed become failures, in one transaction.

    `batch` is its number in the ledger, `read_at` when its pass has read the node. Return the transaction's number.
    """

    def run(name: str, **parameters: Any) -> None:
        connection.execute(query(queries.get(name, schema)), parameters)

    # One for all records of a batch: those that need each other are tried together again.
    jitter = random.uniform(0.75, 1.25)  # noqa: S311 - jitter
    with connection.transaction():
        has_failures = scalar(connection, query(queries.get("has_failures", schema)))
        for outcome in outcomes:
            failing = outcome.failures
            if has_failures:
                connection.execute(
                    query(queries.get("clear_failures", schema)),
                    {
                        "table_name": outcome.table,
                        "ids": ids,
                        "events": count(ids),
                        "retried": outcome.retried,
                        "still_failing": [failure.record_id for failure in failing],
                        "lost": outcome.lost,
                    },
                    # Planned for this number of events.
                    prepare=False,
                )
            if failing:
                run(
                    "record_failures",
                    table_name=outcome.table,
                    ids=outcome.failed_ids,
                    record_ids=[failure.record_id for failure in failing],
                    error_classes=[failure.error_class for failure in failing],
                    errors=[_storable(connection, failure.error) for failure in failing],
                    held=[failure.held for failure in failing],
                    max_attempts=retry.max_attempts,
                    base_seconds=retry.base_seconds,
                    max_seconds=retry.max_seconds,
                    jitter=jitter,
                    read_at=read_at,
                )
        if ids != EMPTY:
            run("acknowledge", ids=ids)
        statement = query(queries.get("note_acknowledged", schema))
        return int(scalar(connection, statement, {"batch": batch}))


def _storable(connection: Connection, text: str) -> str:
    """What the other node said, in characters that this one has."""
    if server_encoding(connection) == "UTF8":
        return text
    return text.encode("ascii", errors="backslashreplace").decode()


def set_aside_unknown(connection: Connection, schema: str, table: str, reason: str) -> int:
    """Move the events and due failures of a table that nobody syncs from here out of the way; return how many."""
    return _set_aside(connection, schema, table, None, "42P01", reason)


def set_aside_invalid_keys(connection: Connection, schema: str, relation: Relation) -> int:
    """Move events whose `record_id` is no key of their table out of the way; return how many."""
    statement = sql.SQL(
        "select record_id from ("
        "select record_id from {events} where table_name = {table} union "
        "select record_id from {failures} where table_name = {table} and next_attempt_at is not null"
        ") as waiting where not {is_key}"
    ).format(
        events=sql.Identifier(schema, "sync_events"),
        failures=sql.Identifier(schema, "sync_failures"),
        table=relation.table,
        is_key=is_key(relation, sql.SQL("record_id"), schema),
    )
    rows = connection.execute(statement).fetchall()
    if not rows:
        return 0
    return _set_aside(
        connection,
        schema,
        relation.table,
        [row[0] for row in rows],
        "22P02",
        f"the record_id is no key of {relation.table}: expected {relation.key_in_words}",
    )


def set_aside_unreadable(
    connection: Connection, schema: str, relation: Relation, part: Part
) -> int:
    """Move the records of a part whose rows cannot be read out of the way, with the reason; return how many.

    But for events that come meanwhile: what they mark may be readable.
    """
    found = connection.execute(
        query(queries.get("read_record_ids", schema)),
        {
            "table_name": part.table,
            "first_id": 0 if part.retried else part.first_id,
            "last_id": LAST_ID if part.retried else part.last_id,
            "record_ids": list(part.retried) or None,
        },
    ).fetchall()
    events: dict[str, list[int]] = {record_id: [] for record_id in part.retried}
    events |= dict(found)
    record_ids = list(events)
    numbers = range(1, len(record_ids) + 1)
    tried = try_each(connection, schema, one_row(relation, record_ids), numbers)
    return sum(
        _set_aside(
            connection,
            schema,
            part.table,
            [record_ids[number - 1]],
            sqlstate,
            bounded(sqlstate, message, detail),
            events[record_ids[number - 1]],
        )
        for number, _, sqlstate, message, detail in tried
        if sqlstate is not None
    )


def _set_aside(
    connection: Connection,
    schema: str,
    table: str,
    record_ids: list[str] | None,
    error_class: str,
    error: str,
    ids: list[int] | None = None,
) -> int:
    parameters = {
        "ids": ids,
        "table_name": table,
        "record_ids": record_ids,
        "error_class": error_class,
        "error": error,
    }
    with connection.transaction():
        moved = connection.execute(query(queries.get("set_aside", schema)), parameters).rowcount
        buried = connection.execute(
            query(queries.get("bury_invalid_failures", schema)), parameters
        ).rowcount
    return moved + buried
