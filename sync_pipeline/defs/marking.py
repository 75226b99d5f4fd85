"""Jobs that mark records as changed, so that they sync again: a replay of some, a backfill of a whole table."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import dagster as dg
import psycopg
from psycopg import sql
from pydantic import Field

from sync_pipeline import operate
from sync_pipeline.config import Config, TableConfig
from sync_pipeline.database import Connection, connected, in_words
from sync_pipeline.defs.names import Names
from sync_pipeline.defs.session import Session, failure
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.operate import Replay
from sync_pipeline.records import Relation, counted, printable

SLICES = 16
# Where a backfill takes its rows from; the backfill page has no configuration, but it has tags.
FROM_TAG = "sync/from"

T = TypeVar("T")


class ReplayConfig(dg.Config):
    """Which records to mark: some keys, those that meet a condition, or everything. Nothing is marked in a dry run."""

    table: str
    node: str
    keys: list[str] = Field(default_factory=list)
    condition: str | None = None
    everything: bool = False
    dry_run: bool = True


@dg.op(
    required_resource_keys={"link"},
    out=dg.Out(dg.Nothing),
    description="Marks records as changed on one node; the next pass sends them as they are then.",
)
def replay_records(context: dg.OpExecutionContext, config: ReplayConfig) -> None:
    """Mark, or count what would be marked."""
    session: Session = context.resources.link
    which = _which(config)

    def replay(connections: dict[str, Connection]) -> int:
        session.config.node(config.node)
        # Rolled back in a dry run: the count is that of the real statement.
        with connections[config.node].transaction(force_rollback=config.dry_run):
            return operate.replay(session.config, connections, config.table, config.node, which)

    marked = _with_connections(session.config, replay)
    verb = "would mark" if config.dry_run else "marked"
    context.log.info("%s %s records of %s on %s", verb, marked, config.table, config.node)
    context.add_output_metadata({"marked": marked, "dry_run": config.dry_run})
    context.instance.add_run_tags(
        context.run_id, {"sync/result": f"{verb} {counted(marked, 'record')}"}
    )


@dg.op(
    required_resource_keys={"link"},
    out=dg.Out(dg.Nothing),
    description=(
        f"Marks one slice of a table. The tag {FROM_TAG} says from which node, else it is the first that sends the"
        " table."
    ),
)
def backfill_slice(context: dg.OpExecutionContext) -> None:
    """Mark every row whose key falls into the slice."""
    session: Session = context.resources.link
    config = session.config
    if not context.has_partition_key:
        raise dg.Failure(
            description="a backfill needs to know which slices: choose partitions, then launch",
            allow_retries=False,
        )
    found = _slices(config).get(context.partition_key)
    if found is None:
        raise dg.Failure(
            description=f"no slice of a synced table is called `{context.partition_key}`; `sync.yaml` may have changed",
            allow_retries=False,
        )
    table, number = found
    node = context.run_tags.get(FROM_TAG, _first_sender(config, table))

    def mark(connections: dict[str, Connection]) -> int:
        plan = operate.plan_backfill(config, connections, node, [table.name])
        (relation,) = plan.relations
        return operate.backfill_part(config, connections, plan, _in_slice(relation, number))

    marked = _with_connections(config, mark)
    context.log.info("marked %s records of %s on %s", marked, table.name, node)
    context.add_output_metadata({"marked": marked, "table": table.name, "node": node})
    context.instance.add_run_tags(context.run_id, {"sync/result": f"marked {marked} on {node}"})


def replay_job(names: Names, **options: Any) -> dg.JobDefinition:
    """Return the job of a replay."""
    name = names.of("replay_job")

    @dg.graph(name=name, description="Marks some records so that they sync again. A dry run first.")
    def replay() -> None:
        replay_records()

    example = {"table": names.config.tables[0].name, "node": names.config.first.name, "keys": ["1"]}
    return replay.to_job(
        name=name,
        executor_def=dg.in_process_executor,
        config={"ops": {"replay_records": {"config": {**example, "dry_run": True}}}},
        **options,
    )


def backfill_job(names: Names, **options: Any) -> dg.JobDefinition:
    """Return the job that marks whole tables, a partition for each slice of a table."""
    name = names.of("backfill_job")

    @dg.graph(
        name=name,
        description=(
            f"Marks every row of the chosen tables, slice by slice, so that all of it syncs again. The tag {FROM_TAG}"
            " names the node that the rows come from."
        ),
    )
    def backfill() -> None:
        backfill_slice()

    return backfill.to_job(
        name=name,
        executor_def=dg.in_process_executor,
        partitions_def=dg.StaticPartitionsDefinition(list(_slices(names.config))),
        **options,
    )


def _which(config: ReplayConfig) -> Replay:
    chosen = [bool(config.keys), config.condition is not None, config.everything]
    if sum(chosen) != 1:
        raise dg.Failure(
            description="choose exactly one of `keys`, `condition` and `everything`",
            allow_retries=False,
        )
    return Replay(config.keys, config.condition, config.everything)


def _slices(config: Config) -> dict[str, tuple[TableConfig, int]]:
    return {
        # Dagster refuses line breaks and the like in the name of a partition.
        f"{printable(table.name)}/{number + 1:02}-of-{SLICES}": (table, number)
        for table in config.tables
        for number in range(SLICES)
    }


def _first_sender(config: Config, table: TableConfig) -> str:
    return next(node.name for node in config.nodes if table.sends(node.name))


def _in_slice(relation: Relation, number: int) -> str:
    """Return the condition on the rows of a slice: a range of the hashes of their keys.

    Ranges of the keys themselves would move while the table grows, and a row could fall between two runs of one
    backfill. The hash of a key never moves.
    """
    key = [
        sql.SQL("t.{}").format(sql.Identifier(relation.columns[name].name)) for name in relation.key
    ]
    condition = sql.SQL(
        "(pg_catalog.hashtext(({key})::text)::bigint + 2147483648) / {width} = {number}"
    ).format(
        key=key[0] if len(key) == 1 else sql.SQL("row({})").format(sql.SQL(", ").join(key)),
        width=2**32 // SLICES,
        number=number,
    )
    return condition.as_string(None)


def _with_connections(config: Config, work: Callable[[dict[str, Connection]], T]) -> T:
    try:
        with ExitStack() as exits:
            connections = {
                node.name: exits.enter_context(connected(node, config, "mark"))
                for node in config.nodes
            }
            return work(connections)
    except SyncPipelineError as error:
        raise failure(error) from None
    except psycopg.Error as error:
        raise failure(SyncPipelineError(in_words(error))) from None
