"""Everything that one link brings to a code location."""

import dagster as dg

from sync_pipeline.config import Config
from sync_pipeline.defs import sensors, session, stages


def build_sync_definitions(config: Config, *, name: str | None = None) -> dg.Definitions:
    """Return the jobs, sensors, schedules and assets of one link.

    `name` comes before all their names (`eu_sync_job`), so that several links live in one code location. Nothing here
    connects to a database: a code location loads while both nodes are down.
    """
    prefix = f"{name}_" if name else ""
    link = session.resource(config)
    sync_job = stages.sync_job(
        config, f"{prefix}sync_job", resource_defs={"link": link, "io_manager": _stages}
    )
    return dg.Definitions(
        jobs=[sync_job], sensors=[sensors.sync_sensor(config, f"{prefix}sync_sensor", sync_job)]
    )


@dg.io_manager(description="Descriptors of a pass, kept in the run's own process")
def _stages(_: dg.InitResourceContext) -> stages.Stages:
    return stages.Stages()
