"""When Dagster starts runs by itself. The database says who leads; the run list only what was asked for just now."""

import time
from collections.abc import Iterator

import dagster as dg

from sync_pipeline.defs.failed import rest
from sync_pipeline.defs.glance import leading, left_out, look
from sync_pipeline.defs.names import Names
from sync_pipeline.defs.streaming import budget_of
from sync_pipeline.errors import SyncPipelineError

MINIMUM_INTERVAL_SECONDS = 5
# A run that was started and does not lead after this long is dead or has nothing to do.
START_SECONDS = 60.0
# How long before the end of a stream its successor is asked for: a launch takes seconds, a busy queue longer.
SUCCESSOR_SECONDS = 45.0
GHOST = "its process is gone or hangs: it neither leads nor says anything"
NOT_STARTED = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED]
UNDER_WAY = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def sync_sensor(names: Names, job: dg.JobDefinition) -> dg.SensorDefinition:
    """Return the sensor that asks for a pass when something can be applied and nobody leads."""
    config = names.config

    @dg.sensor(
        name=names.of("sync_sensor"),
        job=job,
        minimum_interval_seconds=MINIMUM_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for a pass when changes wait on either node and no consumer leads.",
    )
    def sync(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            seen = look(config)
        except SyncPipelineError as error:
            return dg.SkipReason(str(error))
        if seen.obstacle is not None:
            return dg.SkipReason(seen.obstacle)
        if not seen.waiting:
            return dg.SkipReason(f"nothing waits on {config.first.name} or {config.second.name}")
        where = " and ".join(seen.waiting)
        if seen.leader is not None:
            return dg.SkipReason(f"changes wait on {where}; {seen.leader}")
        _end_ghosts(context.instance, names, job.name)
        for run, seconds in _in_progress(context.instance, names, job.name):
            if seconds is None or seconds < START_SECONDS:
                return dg.SkipReason(
                    f"changes wait on {where}; run {run.run_id[:8]} was asked for and is about to lead"
                )
        if (why := rest(context.instance, names, job.name)) is not None:
            return dg.SkipReason(f"changes wait on {where}; {why}")
        try:
            # A run for them would end as it began, and the next one would be asked for.
            reasons = left_out(config)
        except SyncPipelineError as error:
            return dg.SkipReason(str(error))
        if reasons is not None:
            return dg.SkipReason(
                f"changes wait on {where}, all of tables that are left out: {reasons}"
            )
        return dg.RunRequest(tags={"sync/asked_by": f"changes wait on {where}"})

    return sync


def sync_schedule(names: Names, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Return the schedule that asks for a pass each minute, but not for one behind another that has yet to begin."""

    @dg.schedule(
        name=names.of("sync_schedule"),
        job=job,
        cron_schedule="* * * * *",
        description="A pass each minute, whether anything waits or not; an alternative to the sensor.",
    )
    def each_minute(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        for run, seconds in _in_progress(context.instance, names, job.name):
            if seconds is None:
                return dg.SkipReason(f"run {run.run_id[:8]} was asked for and has yet to begin")
        return dg.RunRequest()

    return each_minute


def stream_sensor(
    names: Names, job: dg.JobDefinition, budget_seconds: float
) -> dg.SensorDefinition:
    """Return the sensor that keeps a `stream_job` run alive, and has a successor stand by before it ends."""
    config = names.config
    successor_seconds = min(SUCCESSOR_SECONDS, budget_seconds / 2)
    start_seconds = min(START_SECONDS, (budget_seconds - successor_seconds) / 2)

    @dg.sensor(
        name=names.of("stream_sensor"),
        job=job,
        minimum_interval_seconds=MINIMUM_INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=(
            f"Keeps one run of {job.name} alive; {successor_seconds:.0f} seconds before it ends, the next one is asked"
            " for and stands by."
        ),
    )
    def stream(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        try:
            leader = leading(config)
        except SyncPipelineError as error:
            return dg.SkipReason(str(error))
        within_budget = 0
        for run, seconds in _in_progress(context.instance, names, job.name):
            name = f"run {run.run_id[:8]}"
            if seconds is None or seconds < start_seconds:
                return dg.SkipReason(f"{name} was asked for and leads or stands by")
            # A run that was launched by hand may have a budget of its own.
            left = budget_of(run, budget_seconds) - seconds
            # Whatever its status says, a run that should lead while nobody does is dead.
            if left > successor_seconds and leader is not None:
                return dg.SkipReason(f"{name} has {left:.0f} seconds left; {leader}")
            within_budget += left > 0
            if within_budget == 2:
                return dg.SkipReason("two runs are there and neither leads: read their logs")
        if (why := rest(context.instance, names, job.name)) is not None:
            return dg.SkipReason(f"{leader or 'nobody leads'}; {why}")
        return dg.RunRequest(tags={"sync/asked_by": leader or "nobody leads"})

    return stream


def _end_ghosts(instance: dg.DagsterInstance, names: Names, job_name: str) -> None:
    """Mark runs as failed whose process is gone; only for while nobody leads, since a run that works on a pass leads.

    The code server notices when a run that it started dies. Where both are gone, as after a restart of their machine,
    nobody does; nor where the process hangs before it begins. Such a run would keep its place in the queue from all
    that come after it. One that begins after all finds that it has ended, and does nothing.
    """
    ended = {dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED}
    for run, seconds in _in_progress(instance, names, job_name):
        if run.status not in ended or seconds is None:
            continue
        # One that has just led and is about to end has said so a moment ago.
        said = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
        quiet = time.time() - said[0].event_log_entry.timestamp if said else seconds
        if min(quiet, seconds) > START_SECONDS:
            instance.report_run_failed(run, GHOST)


def _in_progress(
    instance: dg.DagsterInstance, names: Names, job_name: str
) -> Iterator[tuple[dg.DagsterRun, float | None]]:
    """Yield the unfinished runs of a job, the newest first, with the seconds since their start; None: not started.

    Another code location may have a job of the same name, for another link: the tags tell them apart.
    A run that says it is running may be dead, so what its age means is the caller's to judge.
    """
    now = time.time()
    filters = dg.RunsFilter(job_name=job_name, tags=names.tags, statuses=[*NOT_STARTED, *UNDER_WAY])
    for record in instance.get_run_records(filters, limit=10):
        run = record.dagster_run
        started = record.start_time or record.create_timestamp.timestamp()
        yield run, None if run.status in NOT_STARTED else now - started
