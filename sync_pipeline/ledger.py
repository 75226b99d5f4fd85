"""The ledger on the target: which batches of the source are committed here but perhaps not acknowledged there.

Written in the transaction that applies the batch, read before a pass, so that a crash between the two commits is
noticed: the events of such a batch are deleted on the source, not applied again. Ids can come back after a failover
or a restore; a batch therefore matches only events that are not younger than its read.
(The idea of remembering the consumed batch on the target is PgQ's and Londiste's.)
"""

import json
from collections.abc import Sequence

import psycopg

from sync_pipeline import queries
from sync_pipeline.database import Connection, query
from sync_pipeline.errors import PassInterrupted


def record(
    target: Connection,
    schema: str,
    source_node: str,
    ids: str,
    retried: Sequence[tuple[str, str]],
    read_at: object,
) -> int:
    """Write a batch into the ledger, in the caller's transaction; return its number.

    `retried` are the failures, by table and record_id, that were applied without an event.
    """
    row = target.execute(
        query(queries.get("record_batch", schema)),
        {
            "source": source_node,
            "ids": ids,
            "retried": json.dumps(retried, ensure_ascii=False),
            "read_at": read_at,
        },
    ).fetchone()
    if row is None:
        raise AssertionError("an insert that returns its id returned nothing")
    return int(row[0])


def recover(source: Connection, target: Connection, schema: str, source_node: str) -> int:
    """Acknowledge on the source what the target has already committed; return how many batches were found."""
    rows = target.execute(
        query(queries.get("read_ledger", schema)), {"source": source_node}
    ).fetchall()
    if rows:
        make_durable(target)
    for batch, ids, retried, read_at in rows:
        with source.transaction():
            source.execute(
                query(queries.get("clear_applied_failures", schema)),
                {"ids": ids, "retried": retried, "read_at": read_at},
            )
            source.execute(
                query(queries.get("acknowledge_recovered", schema)),
                {"ids": ids, "read_at": read_at},
            )
            source.execute(query(queries.get("note_acknowledged", schema)), {"batch": batch})
    forget(target, schema, [row[0] for row in rows])
    return len(rows)


def forget(target: Connection, schema: str, batch_ids: list[int]) -> None:
    """Remove batches that the source has acknowledged."""
    if batch_ids:
        target.execute(query(queries.get("forget_batches", schema)), {"batch_ids": batch_ids})


def make_durable(target: Connection) -> None:
    """Return when every commit of the target up to now is on its disk, and on its synchronous standbys.

    Batches are committed without that wait. Before the source forgets one, somebody waits here. Raises
    `PassInterrupted` when the wait for a standby was cancelled: PostgreSQL says no more of that than a warning.
    """
    severities = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        severities.append(notice.severity_nonlocalized)

    target.add_notice_handler(note)
    try:
        target.execute(query(queries.get("make_durable", "")))
    finally:
        target.remove_notice_handler(note)
    if "WARNING" in severities:
        raise PassInterrupted("the wait for a synchronous standby was cancelled")
