"""What operators do: look at a link, retry and give up failures, replay, backfill, pause.

Every function takes the configuration and open connections by node, and returns values; the command line and
Dagster only show them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import psycopg
from psycopg.rows import kwargs_row

from sync_pipeline import catalog, clocks, conditions, install, locks, marks, queries
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, error_class, in_words, query, scalar
from sync_pipeline.errors import CatalogMismatch, ConnectionFailed, SyncPipelineError
from sync_pipeline.records import Relation
from sync_pipeline.views import (
    Backlog,
    Blocker,
    Conflict,
    FailedRecord,
    LastFailure,
    NodeStatus,
    PendingEvent,
    Selection,
    Status,
    TableStatus,
)

CHUNK_ROWS = 10_000

Connections = Mapping[str, Connection]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Replay:
    """Which records of a table to mark: exactly one of the three."""

    record_ids: Sequence[str] = ()
    condition: str | None = None
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Backfill:
    """What a backfill will mark: tables of a node, parents first; the first of them beyond the key `after`."""

    node: str
    relations: tuple[Relation, ...]
    after: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackfillStep:
    """A chunk that is marked and committed: a later backfill may begin after the key `last`."""

    table: str
    marked: int
    last: str


def status(
    config: Config,
    connections: Connections,
    unreachable: Mapping[str, SyncPipelineError] | None = None,
) -> Status:
    """Read what an operator asks first; a node that cannot be read says why and does not hide the other.

    `unreachable` holds why a node has no connection. Raises only when neither node can be read.
    """
    errors = dict(unreachable or {})
    nodes = {}
    readings: list[clocks.Reading] = []
    for node in config.nodes:
        try:
            if node.name in errors:
                raise errors[node.name]
            nodes[node.name] = _node_status(config, node.name, connections[node.name])
            with _asking(node.name), clocks.reading() as read:
                statement = query(queries.get("read_clock", config.schema_name))
                read.clock = scalar(connections[node.name], statement)
            readings.append(read)
        except SyncPipelineError as error:
            errors[node.name] = error
            nodes[node.name] = NodeStatus(error=str(error))
    if len(errors) == len(nodes):
        raise errors[config.first.name]
    both = len(readings) == len(nodes)
    return Status(nodes, readings[0].difference(readings[1]) if both else None)


def _node_status(config: Config, node: str, connection: Connection) -> NodeStatus:
    with _asking(node):
        install.require(config, node, connection)
        backlog = _rows(connection, config, "read_status", Backlog, {})
        failures = _rows(connection, config, "read_last_failure", LastFailure, {})
        blockers = _rows(connection, config, "read_blocker", Blocker, {})
        return NodeStatus(
            backlog[0],
            locks.leader(connection, config),
            captured=scalar(connection, query(queries.get("count_captured", config.schema_name))),
            last_failure=failures[0] if failures else None,
            blocker=blockers[0] if blockers else None,
        )


def table_statuses(config: Config, connections: Connections) -> dict[str, list[TableStatus]]:
    """Return what waits and what failed on each connected node, by table; nothing for a table without either."""

    def read(_: str, connection: Connection) -> list[TableStatus]:
        return _rows(connection, config, "read_table_status", TableStatus, {})

    return _on_each(config, connections, read)


def pending_counts(
    config: Config, connections: Connections, table: str | None = None
) -> dict[str, int]:
    """Count the events that wait on each connected node, of one table or of all."""
    statement = query(queries.get("count_pending", config.schema_name))

    def count(_: str, connection: Connection) -> int:
        return int(scalar(connection, statement, {"table_name": table}))

    return _on_each(config, connections, count)


def pending(
    config: Config,
    connections: Connections,
    table: str | None = None,
    limit: int = 100,
    *,
    nodes: Sequence[str] | None = None,
) -> list[PendingEvent]:
    """Return the oldest events that wait on `nodes` (all connected ones), at most `limit`, and if their rows exist.

    Whether a row exists can be told only with both connections.
    """
    clock = query(queries.get("read_clock", config.schema_name))
    parameters = {"table_name": table, "limit": limit}
    found: Mapping[str, Mapping[str, Relation]] = {}
    if len(connections) == len(config.nodes):
        found = catalog.inspect(config, connections, strict=False)[0].relations

    def read(node: str, connection: Connection) -> list[PendingEvent]:
        events = _rows(connection, config, "read_pending", partial(PendingEvent, node), parameters)
        now = scalar(connection, clock)
        exists = _existing_rows(config, connection, found.get(node, {}), events)
        return [
            replace(
                event,
                age_seconds=max(0.0, (now - event.created_at).total_seconds()),
                row_exists=exists.get((event.table_name, event.record_id)),
            )
            for event in events
        ]

    asked = {name: connections[name] for name in (connections if nodes is None else nodes)}
    events = chain.from_iterable(_on_each(config, asked, read).values())
    return sorted(events, key=lambda event: (event.created_at, event.node, event.id))[:limit]


def _existing_rows(
    config: Config,
    connection: Connection,
    relations: Mapping[str, Relation],
    events: Sequence[PendingEvent],
) -> dict[tuple[str, str], bool]:
    """Say of each record whether it has a row, where that can be told."""
    answers: dict[tuple[str, str], bool] = {}
    for table, relation in relations.items():
        ids = list({event.record_id for event in events if event.table_name == table})
        keys = marks.valid_keys(connection, config.schema_name, relation, ids) if ids else []
        present = marks.existing(connection, relation, keys) if keys else frozenset()
        answers |= {(table, key): key in present for key in keys}
    return answers


def failures(
    config: Config, connections: Connections, selection: Selection, limit: int | None = None
) -> list[FailedRecord]:
    """Return the selected failures of the connected nodes, oldest first, at most `limit`."""
    parameters = {**selection.parameters, "limit": limit}

    def read(node: str, connection: Connection) -> list[FailedRecord]:
        record = partial(FailedRecord, node)
        return _rows(connection, config, "read_failures", record, parameters)

    found = chain.from_iterable(_on_each(config, connections, read).values())
    return sorted(found, key=lambda failure: failure.first_failed_at)[:limit]


def retry(config: Config, connections: Connections, selection: Selection) -> int:
    """Make the selected failures due now, dead ones too, held ones never; return how many."""
    return _change(config, connections, "retry_failures", selection.parameters)


def discard(config: Config, connections: Connections, selection: Selection) -> int:
    """Give the selected failures up, held ones never; return how many. They differ until they change again."""
    return _change(config, connections, "discard_failures", selection.parameters)


def conflicts(
    config: Config, connections: Connections, table: str | None = None, limit: int = 100
) -> list[Conflict]:
    """Return the newest logged conflicts of the connected nodes, at most `limit`, newest first."""
    parameters = {"table_name": table, "limit": limit}

    def read(node: str, connection: Connection) -> list[Conflict]:
        record = partial(Conflict, node)
        return _rows(connection, config, "read_conflicts", record, parameters)

    found = chain.from_iterable(_on_each(config, connections, read).values())
    return sorted(found, key=lambda conflict: conflict.detected_at, reverse=True)[:limit]


def replay(config: Config, connections: Connections, table: str, node: str, which: Replay) -> int:
    """Mark records of a node's table as changed, in one statement; return how many.

    A key that has no row on the node is marked as deleted: that replays the delete. Needs both connections.
    """
    relation = _sending(config, _catalog(config, connections, [table]), table, node)
    connection = connections[node]
    schema = config.schema_name
    with _asking(node):
        if which.condition is not None:
            said = conditions.fault(connection, relation.schema, relation.name, which.condition)
            if said is not None:
                raise SyncPipelineError(
                    f"the condition cannot be used: {said}",
                    node=node,
                    remedy="write one SQL condition on the columns of this node",
                )
        if which.everything or which.condition is not None:
            return marks.mark_rows(connection, schema, relation, which.condition)
        return marks.mark_keys(connection, schema, relation, which.record_ids)


def plan_backfill(
    config: Config,
    connections: Connections,
    node: str,
    tables: Sequence[str] = (),
    after: str | None = None,
) -> Backfill:
    """Say what a backfill of these tables, or of all that `node` sends, will mark. Needs both connections."""
    config.node(node)
    found = _catalog(config, connections, tables or None)
    for table in tables:
        _sending(config, found, table, node)
    names = [name for name in found.tables if not tables or name in tables]
    sent = [name for name in names if config.table(name).sends(node)]
    relations = tuple(found.relation(node, name) for name in sent)
    if after is not None and relations:
        with _asking(node):
            marks.require_keys(connections[node], config.schema_name, relations[0], [after])
    return Backfill(node, relations, after, tuple(name for name in names if name not in sent))


def count_backfill(connections: Connections, plan: Backfill) -> dict[str, int]:
    """Count the rows of each table that a backfill will mark."""
    with _asking(plan.node):
        return {
            relation.table: marks.count_rows(connections[plan.node], relation, after)
            for relation, after in _starts(plan)
        }


def backfill(
    config: Config, connections: Connections, plan: Backfill, chunk_rows: int = CHUNK_ROWS
) -> Iterator[BackfillStep]:
    """Mark every row of the planned tables, in chunks by key range, each committed before it is yielded."""
    for relation, after in _starts(plan):
        chunks = marks.mark_in_chunks(
            connections[plan.node], config.schema_name, relation, chunk_rows, after
        )
        with _asking(plan.node):
            for chunk in chunks:
                yield BackfillStep(relation.table, chunk.marked, chunk.last)


def backfill_part(config: Config, connections: Connections, plan: Backfill, condition: str) -> int:
    """Mark the rows of the planned tables that meet a condition, a statement for each table; return how many."""
    with _asking(plan.node):
        return sum(
            marks.mark_rows(connections[plan.node], config.schema_name, relation, condition)
            for relation in plan.relations
        )


def pause(config: Config, connections: Connections) -> None:
    """Stop consumption of the link; capture goes on. One node that knows is enough to stop it."""
    _change(config, connections, "pause", {})


def resume(config: Config, connections: Connections) -> None:
    """Let consumption go on. Needs both connections, and changes nothing unless both nodes can be told."""
    with ExitStack() as both:
        for node in config.nodes:
            with _asking(node.name):
                both.enter_context(connections[node.name].transaction())
        _change(config, connections, "resume", {})


def _starts(plan: Backfill) -> Iterator[tuple[Relation, str | None]]:
    for number, relation in enumerate(plan.relations):
        yield relation, plan.after if number == 0 else None


def _catalog(
    config: Config, connections: Connections, only: Sequence[str] | None
) -> catalog.Catalog:
    _on_each(config, connections, lambda *_: None)
    return catalog.read(config, connections, only=only)


def _sending(config: Config, found: catalog.Catalog, table: str, node: str) -> Relation:
    config.node(node)
    if not config.table(table).sends(node):
        raise CatalogMismatch(
            f"{node} does not send this table",
            table=table,
            remedy=f"it is one-way: mark its records on {config.other(node).name}",
        )
    return found.relation(node, table)


def _on_each(
    config: Config, connections: Connections, work: Callable[[str, Connection], R]
) -> dict[str, R]:
    """Do something on each connected node, in the order of the configuration; requires the installed schema."""
    results = {}
    for node in config.nodes:
        if node.name in connections:
            with _asking(node.name):
                install.require(config, node.name, connections[node.name])
                results[node.name] = work(node.name, connections[node.name])
    return results


def _change(config: Config, connections: Connections, name: str, parameters: dict[str, Any]) -> int:
    """Run a named statement on each connected node; return how many rows it met in all."""
    statement = query(queries.get(name, config.schema_name))

    def run(_: str, connection: Connection) -> int:
        return connection.execute(statement, parameters).rowcount

    return sum(_on_each(config, connections, run).values())


def _rows(
    connection: Connection,
    config: Config,
    name: str,
    kind: Callable[..., R],
    parameters: dict[str, Any],
) -> list[R]:
    with connection.cursor(row_factory=kwargs_row(kind)) as cursor:
        statement = query(queries.get(name, config.schema_name))
        return cursor.execute(statement, parameters).fetchall()


@contextmanager
def _asking(node: str) -> Iterator[None]:
    """Say which node an error of PostgreSQL comes from."""
    try:
        yield
    except psycopg.Error as error:
        problem = in_words(error)
        if error_class(error) == "transient":
            raise ConnectionFailed(problem, node=node) from error
        raise SyncPipelineError(problem, node=node) from error
