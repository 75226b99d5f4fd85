"""Records that changed on both nodes: found under our row locks, decided by the table's policy, logged with both rows.

"Has an event or a failure" is the version vector: a record that is dirty on the target too was changed there without
knowledge of the source's change, whatever the clocks say.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from psycopg import sql
from psycopg.rows import class_row

from sync_pipeline import queries
from sync_pipeline.applier import Applier
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, query
from sync_pipeline.records import Failure
from sync_pipeline.snapshot import Change
from sync_pipeline.statements import AMONG, TableStatements
from sync_pipeline.waiting import Dirty

# Not the key: a composite value of nulls `is null`.
_FOUND = sql.SQL("(t.tableoid is not null)")

# The error class of a held record in `sync_failures`; SQLSTATEs have five characters.
HELD = "HELD"

# When a record changed of which there is nothing but the mark of a command, as `marks` writes it.
_MARKED = datetime(1970, 1, 1, tzinfo=UTC)

Kind = Literal["insert_insert", "update_update", "update_delete", "parent_deleted"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a record that is dirty on both nodes. `winner` None: the rows are equal, or it is held.

    `again`: an earlier batch of the pass had it, did not let the source win either, and has logged that.
    """

    dirty: Dirty
    kind: Kind
    winner: str | None
    equal: bool = False
    again: bool = False


@dataclass(frozen=True, slots=True)
class _Comparison:
    n: int
    staged_present: bool
    target_present: bool
    equal: bool


def decide(
    applier: Applier,
    config: Config,
    source: str,
    target: str,
    dirty: list[Dirty],
    changes: Callable[[str, list[str]], Mapping[str, Change]],
) -> list[Decision]:
    """Compare both rows of each dirty record and apply its table's policy. Equal rows are no conflict."""
    decisions = []
    for table in dict.fromkeys(item.table for item in dirty):
        mine = [item for item in dirty if item.table == table]
        statements = applier.statements(table)
        with applier.connection.cursor(row_factory=class_row(_Comparison)) as cursor:
            rows = cursor.execute(_compare(statements), {"numbers": [item.number for item in mine]})
            compared = {row.n: row for row in rows.fetchall()}
        theirs = changes(table, [item.record_id for item in mine])
        policy = config.table(table).policy
        for item in mine:
            row = compared.get(item.number)
            if row is None:
                continue
            change = theirs.get(item.record_id)
            decisions.append(
                Decision(
                    dirty=item,
                    kind=_kind(item, row, change),
                    winner=None
                    if row.equal
                    else _winner(config, policy, source, target, item, change),
                    equal=row.equal,
                )
            )
    return decisions


def settle(
    applier: Applier, config: Config, source: str, target: str, decisions: list[Decision]
) -> list[Failure]:
    """Log the decisions with both rows and carry them out in the transaction that decides.

    Where the source wins, the target's events of the record go and the staged row is applied; where the target wins,
    the record leaves the batch and the target's own event brings its row over. A held record leaves the batch and
    stays dirty on both nodes; it is returned as a failure for the source to keep.
    """
    schema = config.schema_name
    connection = applier.connection
    held: list[Failure] = []
    for table in dict.fromkeys(decision.dirty.table for decision in decisions):
        mine = [decision for decision in decisions if decision.dirty.table == table]
        logged = [decision for decision in mine if not (decision.equal or decision.again)]
        if logged:
            log(applier, schema, table, logged)
        cleared = [d.dirty for d in mine if d.equal or d.winner == source]
        if cleared:
            connection.execute(
                query(queries.get("delete_events", schema)),
                {"ids": [event for item in cleared for event in item.event_ids]},
            )
            connection.execute(
                query(queries.get("delete_failures", schema)),
                {
                    "table_name": table,
                    "record_ids": [text for item in cleared for text in item.failed_as],
                },
            )
        # A failure of such a record may say that it was held before.
        decided = [d for d in mine if d.dirty.failed_as and (d.equal or d.winner)]
        if decided:
            connection.execute(
                query(queries.get("settle_conflicts", schema)),
                {
                    "table_name": table,
                    "record_ids": [text for d in decided for text in d.dirty.failed_as],
                    "winners": [d.winner or source for d in decided for _ in d.dirty.failed_as],
                },
            )
        undecided = [d.dirty for d in mine if not d.equal and d.winner is None]
        if undecided:
            reason = f"changed on both nodes; see sync_conflicts on {target}"
            connection.execute(
                query(queries.get("hold_records", schema)),
                {
                    "ids": [event for item in undecided for event in item.event_ids],
                    "record_ids": [item.record_id for item in undecided for _ in item.event_ids],
                    "table_name": table,
                    "error_class": HELD,
                    "error": reason,
                },
            )
            held += [Failure(table, d.record_id, HELD, reason, held=True) for d in undecided]
        lost = [d.dirty.number for d in mine if d.equal or d.winner != source]
        if lost:
            applier.unstage(lost, table)
    return held


def log(applier: Applier, schema: str, table: str, decisions: list[Decision]) -> None:
    """Write decisions about one table's staged records to `sync_conflicts`, with both rows.

    A held record that changes again is the same conflict: its entry gets the rows that it has now.
    """
    statements = applier.statements(table)
    applier.connection.execute(
        sql.SQL(
            "with decided as ("
            "select s.n, {record_id} as record_id, given.kind, given.winner, "
            "case when {found} then {local_row} end as local_row, "
            "case when s.present then {remote_row} end as remote_row "
            "from unnest(%(numbers)s::bigint[], %(kinds)s::text[], %(winners)s::text[]) "
            "as given (n, kind, winner) "
            "join {stage} as s on s.n = given.n left join {target} as t on {same_key} "
            "where {among}), "
            "again as ("
            "update {conflicts} as open set kind = decided.kind, "
            "local_row = decided.local_row, remote_row = decided.remote_row from decided "
            "where decided.winner is null and open.table_name = {table} "
            "and open.record_id = decided.record_id and open.resolved_at is null returning open.record_id) "
            "insert into {conflicts} (table_name, record_id, kind, winner, local_row, remote_row, resolved_at) "
            "select {table}, record_id, kind, winner, local_row, remote_row, "
            "case when winner is not null then pg_catalog.clock_timestamp() end "
            "from decided where record_id not in (select record_id from again) order by n"
        ).format(
            among=AMONG,
            conflicts=sql.Identifier(schema, "sync_conflicts"),
            table=table,
            record_id=statements.record_id,
            found=_FOUND,
            local_row=statements.as_row("t"),
            remote_row=statements.as_row("s"),
            stage=statements.stage,
            target=statements.target,
            same_key=statements.same_key(),
        ),
        {
            "numbers": [decision.dirty.number for decision in decisions],
            "kinds": [decision.kind for decision in decisions],
            "winners": [decision.winner for decision in decisions],
        },
    )


def _kind(dirty: Dirty, row: _Comparison, change: Change | None) -> Kind:
    if row.staged_present != row.target_present:
        return "update_delete"
    if dirty.inserted and change is not None and change.inserted:
        return "insert_insert"
    return "update_update"


def _winner(
    config: Config, policy: str, source: str, target: str, dirty: Dirty, change: Change | None
) -> str | None:
    if change is not None and (change.changed_at == _MARKED) != (dirty.changed_at == _MARKED):
        # Only one of them was changed: whatever the policy, a mark has nothing that the other node lacks.
        return target if change.changed_at == _MARKED else source
    if policy in (source, target):
        return policy
    if policy == "hold":
        return None
    if change is None or change.changed_at < dirty.changed_at:
        return target
    if change.changed_at > dirty.changed_at:
        return source
    return config.first.name


def _compare(statements: TableStatements) -> sql.Composed:
    return sql.SQL(
        "select s.n, s.present as staged_present, {found} as target_present, "
        "s.present = {found} and not (s.present and {differs}) as equal "
        "from {stage} as s left join {target} as t on {same_key} where {among}"
    ).format(
        among=AMONG,
        found=_FOUND,
        differs=statements.differs,
        stage=statements.stage,
        target=statements.target,
        same_key=statements.same_key(),
    )


def prune(connection: Connection, schema: str, retention_days: int) -> int:
    """Delete settled conflicts older than the retention, at most 10,000 at a time; return how many."""
    return connection.execute(
        query(queries.get("prune_conflicts", schema)), {"days": retention_days}
    ).rowcount
