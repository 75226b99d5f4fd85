"""Everything that one link brings to a code location."""

import dagster as dg

from sync_pipeline.config import Config
from sync_pipeline.defs import sensors, session, stages, streaming
from sync_pipeline.defs.names import Names


def build_sync_definitions(
    config: Config,
    *,
    name: str | None = None,
    stream_seconds: float = streaming.DEFAULT_BUDGET_SECONDS,
) -> dg.Definitions:
    """Return the jobs, sensors, schedules and assets of one link.

    `name` comes before all their names (`eu_sync_job`), so that several links live in one code location. Nothing here
    connects to a database: a code location loads while both nodes are down.
    """
    names = Names(config, name)
    link = {"link": session.resource(names)}
    sync_job = stages.sync_job(
        names,
        resource_defs={**link, "io_manager": _stages},
        tags={
            **names.tags,
            # One at a time in the queue; beside other workers the lock decides.
            "sync/exclusive": names.of("sync_job"),
            # Whoever turns run retries on: only a whole pass can be retried.
            "dagster/retry_strategy": "ALL_STEPS",
        },
    )
    stream_job = streaming.stream_job(names, resource_defs=link, tags=names.tags)
    return dg.Definitions(
        jobs=[sync_job, stream_job],
        sensors=[
            sensors.sync_sensor(names, sync_job),
            sensors.stream_sensor(names, stream_job, stream_seconds),
        ],
        schedules=[
            dg.ScheduleDefinition(
                name=names.of("sync_schedule"),
                job=sync_job,
                cron_schedule="* * * * *",
                description="A pass each minute, whether anything waits or not; an alternative to the sensor.",
            )
        ],
    )


@dg.io_manager(description="Descriptors of a pass, kept in the run's own process")
def _stages(_: dg.InitResourceContext) -> stages.Stages:
    return stages.Stages()
