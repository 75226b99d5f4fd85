"""Everything that one link brings to a code location."""

import os
from collections.abc import Sequence

import dagster as dg

from sync_pipeline.config import Config
from sync_pipeline.defs import (
    alerts,
    assets,
    checks,
    maintenance,
    marking,
    sensors,
    session,
    stages,
    streaming,
    watching,
)
from sync_pipeline.defs.names import LINK_TAG, Names

WEBHOOK_VARIABLE = "SYNC_ALERT_WEBHOOK"


def build_sync_definitions(
    config: Config,
    *,
    name: str | None = None,
    stream_seconds: float = streaming.DEFAULT_BUDGET_SECONDS,
    lag_seconds: float = checks.DEFAULT_LAG_SECONDS,
    owners: Sequence[str] = (),
    channels: Sequence[alerts.Channel] = (),
) -> dg.Definitions:
    """Return the jobs, sensors, schedules and assets of one link.

    `name` comes before all their names (`eu_sync_job`), so that several links live in one code location. Alerts go to
    `channels`; without any, to the log, and to the webhook that $SYNC_ALERT_WEBHOOK names. Nothing here connects to a
    database: a code location loads while both nodes are down.
    """
    names = Names(config, name)
    link = {"link": session.resource(names)}
    sync_job = stages.sync_job(
        names,
        resource_defs={**link, "io_manager": _stages},
        tags={
            **names.tags,
            # One at a time in the queue; beside other consumers the lock decides.
            "sync/exclusive": names.tags[LINK_TAG],
            # Whoever turns run retries on: only a whole pass can be retried.
            "dagster/retry_strategy": "ALL_STEPS",
        },
    )
    verify_checks = checks.verify_checks(names)
    stream_job = streaming.stream_job(names, stream_seconds, resource_defs=link, tags=names.tags)
    maintenance_job = maintenance.maintenance_job(names, resource_defs=link, tags=names.tags)
    return dg.Definitions(
        assets=assets.asset_specs(names, owners),
        asset_checks=[checks.status_checks(names, lag_seconds), verify_checks],
        jobs=[
            sync_job,
            stream_job,
            marking.replay_job(names, resource_defs=link, tags=names.tags),
            marking.backfill_job(
                names,
                resource_defs=link,
                tags={**names.tags, "sync/backfill": names.of("backfill")},
            ),
            maintenance_job,
            checks.verify_job(names, verify_checks),
        ],
        sensors=[
            sensors.sync_sensor(names, sync_job),
            sensors.stream_sensor(names, stream_job, stream_seconds),
            watching.watch_sensor(names, lag_seconds),
            alerts.alert_sensor(names, lag_seconds, channels or _channels()),
        ],
        schedules=[
            sensors.sync_schedule(names, sync_job),
            dg.ScheduleDefinition(
                name=names.of("maintenance_schedule"),
                job=maintenance_job,
                cron_schedule="17 * * * *",
                description="Prunes what Dagster keeps, each hour.",
            ),
        ],
    )


def _channels() -> list[alerts.Channel]:
    webhook = os.environ.get(WEBHOOK_VARIABLE)
    if not webhook:
        return [alerts.log_channel]
    try:
        return [alerts.log_channel, alerts.webhook_channel(webhook)]
    except ValueError as error:
        raise ValueError(f"{WEBHOOK_VARIABLE}: {error}") from None


@dg.io_manager(description="Descriptors of a pass, kept in the run's own process")
def _stages(_: dg.InitResourceContext) -> stages.Stages:
    return stages.Stages()
