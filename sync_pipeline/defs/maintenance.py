"""What Dagster keeps and does not remove by itself: runs, their events, logs and outputs; and old conflicts."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import psycopg
import sqlalchemy as sa
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from pydantic import Field

from sync_pipeline import conflicts, install
from sync_pipeline.database import connected, in_words
from sync_pipeline.defs.names import Names
from sync_pipeline.defs.session import Session, failure
from sync_pipeline.errors import SyncPipelineError

FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED]
FAILED = [dg.DagsterRunStatus.FAILURE]
# What sensors report belongs to no run: Dagster stores it under the empty run id.
NO_RUN = ""
# How many values one statement takes; SQLite sets the limit.
PARAMETERS = 500

T = TypeVar("T")


class MaintenanceConfig(dg.Config):
    """How long runs are kept, and how much one run of the job removes at most."""

    keep_days: float = Field(default=3.0, ge=0)
    keep_failed_days: float = Field(default=14.0, ge=0)
    limit: int = Field(default=2000, ge=1)
    # Two hundred quiet tables have six thousand in an hour, a busy one has three hundred.
    report_limit: int = Field(default=100_000, ge=1)
    seconds: float = Field(default=300.0, gt=0)


@dg.op(
    required_resource_keys={"link"},
    out=dg.Out(dg.Nothing),
    description="Removes this link's old runs with all that belongs to them, old sensor reports, and old conflicts.",
)
def prune(context: dg.OpExecutionContext, config: MaintenanceConfig) -> None:
    """Prune within the limits; what is left is for the next run."""
    session: Session = context.resources.link
    instance = context.instance
    deadline = time.monotonic() + config.seconds
    now = datetime.now(UTC)
    removed = 0
    for statuses, days in ((FINISHED, config.keep_days), (FAILED, config.keep_failed_days)):
        filters = dg.RunsFilter(
            statuses=statuses,
            tags=session.names.tags,
            updated_before=now - timedelta(days=days),
        )
        removed += _remove_runs(
            instance, filters, config.limit - removed, lambda: time.monotonic() > deadline
        )
    reports = _remove_reports(
        instance, session.names, now - timedelta(days=config.keep_days), config.report_limit
    )
    try:
        old_conflicts = _remove_conflicts(session)
    except SyncPipelineError as error:
        raise failure(error) from None
    context.log.info(
        "removed %s runs, %s reports of sensors, %s conflicts", removed, reports, old_conflicts
    )
    context.add_output_metadata(
        {"runs": removed, "sensor_reports": reports, "conflicts": old_conflicts}
    )


def maintenance_job(names: Names, **options: Any) -> dg.JobDefinition:
    """Return the job that prunes."""
    name = names.of("maintenance_job")

    @dg.graph(
        name=name,
        description="Removes old runs, their event logs and stored outputs, and old conflicts; bounded per run.",
    )
    def maintenance() -> None:
        prune()

    return maintenance.to_job(name=name, executor_def=dg.in_process_executor, **options)


def _remove_runs(
    instance: dg.DagsterInstance, filters: dg.RunsFilter, limit: int, enough: Callable[[], bool]
) -> int:
    removed = 0
    if limit < 1:
        # Dagster takes a limit of 0 for none.
        return removed
    for record in instance.get_run_records(filters, limit=limit, ascending=True):
        if enough():
            break
        _remove_run(instance, record.dagster_run.run_id)
        removed += 1
    return removed


def _remove_run(instance: dg.DagsterInstance, run_id: str) -> None:
    instance.delete_run(run_id)
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    storage = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage):
        # SQLite has a file for each run, and deleting the events leaves it.
        for file in Path(storage.path_for_shard(run_id)).parent.glob(f"{run_id}.db*"):
            file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        shutil.rmtree(Path(instance.storage_directory()) / run_id)


def _remove_reports(
    instance: dg.DagsterInstance, names: Names, before: datetime, limit: int
) -> int:
    """Remove what was reported of this link's tables long ago; Dagster itself offers no way to.

    Others report of other assets, and may need it for ever. The latest result of each check stays, so that its page
    goes on showing it.
    """
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        return 0
    events, results = SqlEventLogStorageTable.c, AssetCheckExecutionsTable.c
    keys = [key.to_string() for key in names.assets()]
    moment = before.replace(tzinfo=None)
    of_assets = (
        sa.select(events.id)
        .where(events.run_id == NO_RUN, events.asset_key.in_(keys), events.timestamp < moment)
        .order_by(events.id)
        .limit(limit)
    )
    latest = (
        sa.select(sa.func.max(results.id))
        .where(results.asset_key.in_(keys))
        .group_by(results.asset_key, results.check_name)
    )
    # Dagster keeps results of checks a second time, in a table of their own, and those of removed runs, too.
    of_checks = (
        sa.select(results.id, results.evaluation_event_storage_id, results.evaluation_event)
        .where(
            results.asset_key.in_(keys),
            results.evaluation_event_timestamp < moment,
            results.id.not_in(latest),
        )
        .order_by(results.id)
        .limit(limit)
    )
    with storage.index_connection() as connection:
        removed = connection.execute(_delete_events(of_assets)).rowcount
        old = connection.execute(of_checks).fetchall()
        for some in _chunks(old):
            ids, event_ids, _ = zip(*some, strict=True)
            connection.execute(AssetCheckExecutionsTable.delete().where(results.id.in_(ids)))
            connection.execute(_delete_events(event_ids))
    if isinstance(storage, SqliteEventLogStorage):
        # Reports are there a second time, under other ids, in the file of the run that has no name.
        with storage.run_connection(NO_RUN) as connection:
            connection.execute(_delete_events(of_assets))
            for some in _chunks(old):
                texts = [text for *_, text in some]
                connection.execute(
                    SqlEventLogStorageTable.delete().where(
                        events.run_id == NO_RUN, events.event.in_(texts)
                    )
                )
    return removed + len(old)


def _delete_events(ids: Any) -> sa.Delete:
    # Those of a run are deleted with it.
    events = SqlEventLogStorageTable
    return events.delete().where(events.c.id.in_(ids), events.c.run_id == NO_RUN)


def _chunks(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), PARAMETERS):
        yield rows[start : start + PARAMETERS]


def _remove_conflicts(session: Session) -> int:
    config = session.config
    removed = 0
    for node in config.nodes:
        with connected(node, config, "maintenance") as connection:
            try:
                install.require(config, node.name, connection)
                removed += conflicts.prune(
                    connection, config.schema_name, config.conflict_retention_days
                )
            except psycopg.Error as error:
                raise SyncPipelineError(in_words(error), node=node.name) from error
    return removed
