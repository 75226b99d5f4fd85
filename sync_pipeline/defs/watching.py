"""The sensor that keeps the asset pages current without a run: backlog, lag, checks, freshness."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict

import dagster as dg

from sync_pipeline.defs.checks import LAG, Statuses, differs, judge, key_of
from sync_pipeline.defs.glance import table_statuses
from sync_pipeline.defs.metadata import seconds
from sync_pipeline.defs.names import Names
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.records import counted

INTERVAL_SECONDS = 60
# What does not change is told again after this long, so that a quiet table does not look forgotten.
REPEAT_SECONDS = 600.0

AssetEvent = dg.AssetObservation | dg.AssetMaterialization | dg.AssetCheckEvaluation


def watch_sensor(names: Names, lag_seconds: float) -> dg.SensorDefinition:
    """Return the sensor that reports the status of every table whose numbers changed."""

    @dg.sensor(
        name=names.of("watch_sensor"),
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Reports what waits and what failed of every table as observations and checks, and that it is fresh while"
            " it does not lag. One short query for each node; no run."
        ),
    )
    def watch(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            statuses = table_statuses(names.config)
        except SyncPipelineError as error:
            return dg.SkipReason(str(error))
        told, reported, events = _news(
            context.instance, names, statuses, lag_seconds, json.loads(context.cursor or "{}")
        )
        return dg.SensorResult(
            cursor=json.dumps(told),
            asset_events=events,
            # Else Dagster would say that nothing came of it.
            skip_reason=f"reported {counted(reported, 'table')}"
            if reported
            else "every table is as it was",
        )

    return watch


def _news(
    instance: dg.DagsterInstance,
    names: Names,
    statuses: Statuses,
    lag_seconds: float,
    told: dict[str, list[float]],
) -> tuple[dict[str, list[float]], int, list[AssetEvent]]:
    now = time.time()
    events: list[AssetEvent] = []
    still: dict[str, list[float]] = {}
    reported = 0
    for table, key in names.link_assets():
        nodes = {node: tables[table] for node, tables in statuses.items()}
        numbers = [
            float(number)
            for status in nodes.values()
            for number in (status.pending, status.retrying, status.dead, status.held)
        ]
        told_at, fresh_at, *before = told.get(table, [0.0, 0.0])
        # Only the age of what waits changes by itself.
        if before == numbers and not any(numbers) and now - told_at < REPEAT_SECONDS:
            still[table] = [told_at, fresh_at, *before]
            continue
        reported += 1
        events += _observations(names, table, statuses)
        results = [r for r in judge(names, statuses, lag_seconds) if r.asset_key == key]
        events += [_evaluation(result) for result in results]
        lags = not all(result.passed for result in results if result.check_name == LAG)
        # Now and then is enough to stay fresh, and each one interrupts the lines of the asset's plots. Dagster shows no
        # result of a check that is older: a difference must stay in sight.
        if not lags and now - fresh_at >= REPEAT_SECONDS and not differs(instance, key):
            fresh_at = now
            events.append(
                dg.AssetMaterialization(key, description="nothing waits longer than it may")
            )
        still[table] = [now, fresh_at, *numbers]
    return still, reported, events


def _observations(names: Names, table: str, statuses: Statuses) -> Iterator[dg.AssetObservation]:
    for node, tables in statuses.items():
        status = tables[table]
        numbers = {
            name: value
            for name, value in asdict(status).items()
            if name not in {"table_name", "oldest_seconds"}
        }
        yield dg.AssetObservation(
            names.node_asset(node, table),
            metadata={**numbers, "lag_seconds": seconds(status.oldest_seconds)},
        )


def _evaluation(result: dg.AssetCheckResult) -> dg.AssetCheckEvaluation:
    key = key_of(result)
    return dg.AssetCheckEvaluation(
        asset_key=key.asset_key,
        check_name=key.name,
        passed=result.passed,
        metadata=result.metadata,
        severity=result.severity,
        description=result.description,
    )
