"""When Dagster starts runs by itself. The database says who leads; the run list only what was asked for just now."""

from datetime import UTC, datetime

import dagster as dg

from sync_pipeline.config import Config
from sync_pipeline.defs.glance import look

# A run that was started and does not lead after this long is dead or has nothing to do.
START_SECONDS = 60.0
NOT_STARTED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
UNDER_WAY = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def sync_sensor(config: Config, name: str, job: dg.JobDefinition) -> dg.SensorDefinition:
    """Return the sensor that asks for a pass when something can be applied and nobody leads."""

    @dg.sensor(
        name=name,
        job=job,
        minimum_interval_seconds=5,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for a pass when changes wait on either node and no worker leads.",
    )
    def sync(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        seen = look(config)
        if seen.obstacle is not None:
            return dg.SkipReason(seen.obstacle)
        if not seen.waiting:
            return dg.SkipReason(f"nothing waits on {config.first.name} or {config.second.name}")
        where = " and ".join(seen.waiting)
        if seen.leader is not None:
            return dg.SkipReason(f"changes wait on {where}; {seen.leader}")
        coming = on_its_way(context.instance, job.name)
        if coming is not None:
            return dg.SkipReason(
                f"changes wait on {where}; run {coming[:8]} was asked for and is about to lead"
            )
        return dg.RunRequest(tags={"sync/asked_by": f"changes wait on {where}"})

    return sync


def on_its_way(instance: dg.DagsterInstance, job_name: str) -> str | None:
    """Return a run of the job that waits in the queue or was started so recently that it may not lead yet.

    A run that says it is running may be dead, so its status counts only for as long as a start takes.
    """
    statuses = [*NOT_STARTED, *UNDER_WAY]
    now = datetime.now(UTC).timestamp()
    for record in instance.get_run_records(
        dg.RunsFilter(job_name=job_name, statuses=statuses), limit=10
    ):
        run = record.dagster_run
        started = record.start_time or record.create_timestamp.timestamp()
        if run.status in NOT_STARTED or now - started < START_SECONDS:
            return run.run_id
    return None
