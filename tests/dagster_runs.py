"""Verbs for tests of what Dagster runs: definitions of a pair, runs in this process, what a run said."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from sync_pipeline.defs import build_sync_definitions, sensors
from tests.engine import config_of
from tests.helpers import Pair

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def instance() -> Iterator[dg.DagsterInstance]:
    """An empty Dagster instance of its own, in memory."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def definitions(pair: Pair, **options: Any) -> dg.Definitions:
    """The definitions of the pair's link."""
    return build_sync_definitions(config_of(pair), **options)


def run(
    pair: Pair,
    instance: dg.DagsterInstance,
    job: str = "sync_job",
    *,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    partition: str | None = None,
) -> dg.ExecuteInProcessResult:
    """Execute a job of the pair's link in this process; a failure is part of the result."""
    return (
        definitions(pair)
        .resolve_job_def(job)
        .execute_in_process(
            instance=instance,
            run_config=dict(config or {}),
            tags=dict(tags or {}),
            partition_key=partition,
            raise_on_error=False,
        )
    )


def metadata(result: dg.ExecuteInProcessResult, step: str) -> dict[str, Any]:
    """The output metadata of a step, as plain values."""
    for event in result.events_for_node(step.split(".", maxsplit=1)[0]):
        if event.is_successful_output and event.step_key == step:
            data = event.step_output_data.metadata
            return {name: _plain(value) for name, value in data.items()}
    raise AssertionError(f"{step} had no output")


def failure_of(result: dg.ExecuteInProcessResult | dg.JobExecutionResult) -> str:
    """What the failed step says."""
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            return str(data.user_failure_data.description if data.user_failure_data else data.error)
    raise AssertionError("no step failed")


@dataclass(frozen=True)
class Tick:
    """What one evaluation of a sensor decided."""

    requests: list[dg.RunRequest]
    skipped: str
    cursor: str | None
    asset_events: list[Any]


def tick(
    pair: Pair,
    instance: dg.DagsterInstance,
    sensor: str = "sync_sensor",
    *,
    cursor: str | None = None,
    **options: Any,
) -> Tick:
    """Evaluate a sensor of the pair's link once."""
    found = definitions(pair, **options)
    context = dg.build_sensor_context(instance=instance, definitions=found, cursor=cursor)
    decided = found.resolve_sensor_def(sensor).evaluate_tick(context)
    return Tick(
        list(decided.run_requests or []),
        decided.skip_message or "",
        decided.cursor,
        list(decided.asset_events),
    )


def command(
    pair: Pair, home: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `dagster` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dagster", *arguments],
        env={
            **os.environ,
            **pair.environment,
            "DAGSTER_HOME": str(home),
            "SYNC_CONFIG": str(pair.config_path),
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the sensors see a clock that much ahead."""
    ahead = SimpleNamespace(time=lambda: time.time() + seconds)
    monkeypatch.setattr(sensors, "time", ahead)


def _plain(value: dg.MetadataValue[Any]) -> Any:
    if isinstance(value, dg.TableMetadataValue):
        return [dict(record.data) for record in value.records]
    return value.value
