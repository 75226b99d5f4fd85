"""Dagster as it is deployed: webserver, daemon and code server, each a process, driven over GraphQL."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import dagster as dg
import psutil
from psycopg.conninfo import conninfo_to_dict

from tests import deployment
from tests.helpers import eventually

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "dagster_home"
LOCATION = "sync-pipeline"
START_SECONDS = 90.0
ENDED = {"SUCCESS", "FAILURE", "CANCELED"}


def storage_environment(dsn: str) -> dict[str, str]:
    """The variables that the settings for production read, for a database that needs no password."""
    parts = conninfo_to_dict(dsn)
    return {
        "DAGSTER_PG_HOST": str(parts["host"]),
        "DAGSTER_PG_PORT": str(parts["port"]),
        "DAGSTER_PG_DB": str(parts["dbname"]),
        "DAGSTER_PG_USERNAME": str(parts["user"]),
        "DAGSTER_PG_PASSWORD": "unused",
    }


class Dagster:
    """Three processes with a DAGSTER_HOME of their own for the link of a `sync.yaml`. Use as a `with` block.

    `environment` holds what the configuration and the settings read; `module` has the definitions.
    """

    def __init__(
        self,
        config_path: Path,
        environment: Mapping[str, str],
        home: Path,
        settings: Path = HOME / "dagster.yaml",
        module: str = "sync_pipeline.definitions",
    ) -> None:
        self.home = home
        home.mkdir(parents=True)
        shutil.copyfile(settings, home / "dagster.yaml")
        self.port, self._code_port = free_port(), free_port()
        (home / "workspace.yaml").write_text(
            f"load_from: [grpc_server: {{host: 127.0.0.1, port: {self._code_port}, location_name: {LOCATION}}}]"
        )
        self._environment = {
            **os.environ,
            **environment,
            "SYNC_CONFIG": str(config_path),
            "DAGSTER_HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._places = {
            "0.0.0.0": "127.0.0.1",  # noqa: S104 - in a container of its own
            "/opt/dagster": str(home),
            "sync_pipeline.definitions": module,
            "3000": str(self.port),
            "4000": str(self._code_port),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        # Three processes that create the tables of one storage at the same moment get into each other's way.
        with self.instance():
            pass
        with ExitStack() as exits:
            exits.push(self.__exit__)
            for name in ("code", "webserver", "daemon"):
                self.start(name)
            eventually("the code location loads", self._is_loaded, START_SECONDS)
            exits.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            for name in self._processes:
                lines = (self.home / f"{name}.log").read_text("utf-8", "replace").splitlines()
                print(f"--- {name}", *lines[-40:], sep="\n")
        family = [
            member
            for process in self._processes.values()
            if process.poll() is None
            for member in psutil.Process(process.pid).children(recursive=True)
        ]
        for process in self._processes.values():
            process.kill()
            process.wait()
        for member in family:
            if member.is_running():
                member.kill()

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """The storage of this Dagster, opened in the process of the test."""
        with (
            patch.dict(os.environ, self._environment),
            dg.DagsterInstance.from_config(str(self.home)) as instance,
        ):
            yield instance

    def start(self, name: str) -> None:
        """Start one of the processes, `code`, `webserver` or `daemon`, as deploy/compose.yaml says."""
        with (self.home / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                deployment.command(name, self._places),
                env=self._environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def is_healthy(self, name: str, port: int | None = None) -> bool:
        """Ask the health check of deploy/compose.yaml; on another port than that of the web server, if one is given."""
        checked = subprocess.run(
            deployment.health_check(name, {**self._places, "3000": str(port or self.port)}),
            env=self._environment,
            cwd=ROOT,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return checked.returncode == 0

    def kill(self, name: str) -> None:
        """Kill one of the processes with SIGKILL; what it started lives on."""
        self._processes[name].send_signal(signal.SIGKILL)
        self._processes[name].wait()

    def restart(self, name: str) -> None:
        """Kill one of the processes and start it again. A daemon that starts looks at once at all it has to do."""
        self.kill(name)
        self.start(name)

    def kill_run(self, run_id: str) -> None:
        """Kill the process of a run with SIGKILL."""
        os.kill(self.run_pid(run_id), signal.SIGKILL)

    def run_pid(self, run_id: str) -> int:
        """The process of a run, as its log tells it."""
        found = [re.search(r"\(pid: (\d+)\)", message) for message in self.said(run_id)]
        (pid,) = {int(match[1]) for match in found if match is not None}
        return pid

    def pid(self, name: str) -> int:
        """One of the processes: `code`, `webserver` or `daemon`."""
        return self._processes[name].pid

    def said(self, run_id: str) -> list[str]:
        """The messages in the log of a run."""
        answer = self.ask(
            """query ($id: ID!) { logsForRun(runId: $id) { ... on EventConnection {
                events { ... on MessageEvent { message } } } } }""",
            id=run_id,
        )
        return [event.get("message") or "" for event in answer["logsForRun"]["events"]]

    def failure_of(self, run_id: str) -> str:
        """What the failed step of a run says."""
        answer = self.ask(
            """query ($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
                ... on ExecutionStepFailureEvent { failureMetadata { description } } } } } }""",
            id=run_id,
        )
        (failed,) = [event for event in answer["logsForRun"]["events"] if event]
        return str(failed["failureMetadata"]["description"])

    def ask(self, query: str, **variables: Any) -> Any:
        """Send a GraphQL query and return its data."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 - our own webserver
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def launch(
        self,
        job: str,
        config: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Launch a run as the launchpad does and return its id."""
        answer = self.ask(
            """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
                ... on LaunchRunSuccess { run { id } } ... on Error { message }
                ... on RunConfigValidationInvalid { errors { message } } } }""",
            params={
                "selector": _selector(jobName=job),
                "runConfigData": config or {},
                "executionMetadata": {
                    "tags": [{"key": k, "value": v} for k, v in (tags or {}).items()]
                },
            },
        )["launchRun"]
        assert "run" in answer, answer
        return str(answer["run"]["id"])

    def backfill(self, partitions: Sequence[str], tags: Mapping[str, str]) -> str:
        """Launch a backfill as Dagster's backfill page does and return its id."""
        answer = self.ask(
            """mutation ($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {
                ... on LaunchBackfillSuccess { backfillId } ... on Error { message } } }""",
            params={
                "selector": {
                    "partitionSetName": "backfill_job_partition_set",
                    "repositorySelector": _selector(),
                },
                "partitionNames": list(partitions),
                "tags": [{"key": k, "value": v} for k, v in tags.items()],
            },
        )["launchPartitionBackfill"]
        assert "backfillId" in answer, answer
        return str(answer["backfillId"])

    def stop_sensor(self, name: str) -> None:
        """Stop a sensor as its switch does."""
        found = self.ask(
            """query ($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) {
                ... on Sensor { id } } }""",
            selector=_selector(sensorName=name),
        )["sensorOrError"]
        answer = self.ask(
            "mutation ($id: String!) { stopSensor(id: $id) { __typename } }", id=found["id"]
        )["stopSensor"]
        assert answer["__typename"] == "StopSensorMutationResult", answer

    def start_sensor(self, name: str) -> None:
        """Start a sensor as its switch does."""
        answer = self.ask(
            "mutation ($selector: SensorSelector!) { startSensor(sensorSelector: $selector) { __typename } }",
            selector=_selector(sensorName=name),
        )["startSensor"]
        assert answer["__typename"] == "Sensor", answer

    def start_schedule(self, name: str) -> str:
        """Start a schedule as its switch does; return the id that stops it."""
        answer = self.ask(
            """mutation ($selector: ScheduleSelector!) { startSchedule(scheduleSelector: $selector) {
                ... on ScheduleStateResult { scheduleState { id } } ... on Error { message } } }""",
            selector=_selector(scheduleName=name),
        )["startSchedule"]
        assert "scheduleState" in answer, answer
        return str(answer["scheduleState"]["id"])

    def stop_schedule(self, schedule_id: str) -> None:
        """Stop a schedule that was started."""
        answer = self.ask(
            "mutation ($id: String!) { stopRunningSchedule(id: $id) { __typename } }",
            id=schedule_id,
        )["stopRunningSchedule"]
        assert answer["__typename"] == "ScheduleStateResult", answer

    def ticks(self, sensor: str) -> list[dict[str, Any]]:
        """The last looks of a sensor, the newest first: status, skipReason, runIds, timestamp and endTimestamp."""
        answer = self.ask(
            """query ($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) {
                ... on Sensor { sensorState { ticks(limit: 25) {
                id status skipReason runIds timestamp endTimestamp } } } } }""",
            selector=_selector(sensorName=sensor),
        )
        return list(answer["sensorOrError"]["sensorState"]["ticks"])

    def re_execute(self, run_id: str, job: str, steps: Sequence[str]) -> str:
        """Re-execute some steps of a run, as its page does, and return the id of the new run."""
        answer = self.ask(
            """mutation ($params: ExecutionParams!) { launchRunReexecution(executionParams: $params) {
                ... on LaunchRunSuccess { run { id } } ... on Error { message } } }""",
            params={
                "selector": _selector(jobName=job),
                "runConfigData": {},
                "stepKeys": list(steps),
                "executionMetadata": {"parentRunId": run_id, "rootRunId": run_id, "tags": []},
            },
        )["launchRunReexecution"]
        assert "run" in answer, answer
        return str(answer["run"]["id"])

    def resume_backfill(self, backfill_id: str) -> None:
        """Re-execute a backfill from failure, as the menu of its page does."""
        answer = self.ask(
            """mutation ($params: ReexecutionParams!) { reexecutePartitionBackfill(reexecutionParams: $params) {
                __typename ... on Error { message } } }""",
            params={"parentRunId": backfill_id, "strategy": "FROM_FAILURE"},
        )["reexecutePartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer

    def backfill_ended(self, backfill_id: str) -> bool:
        """True when a backfill waits for nothing any more."""
        answer = self.ask(
            "query ($id: String!) { partitionBackfillOrError(backfillId: $id) {"
            " ... on PartitionBackfill { status } } }",
            id=backfill_id,
        )
        return str(answer["partitionBackfillOrError"]["status"]).startswith("COMPLETED")

    def terminate(self, run_id: str) -> None:
        """Terminate a run as the button does."""
        answer = self.ask(
            """mutation ($id: String!) { terminateRun(runId: $id) {
                __typename ... on TerminateRunFailure { message } } }""",
            id=run_id,
        )["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def status(self, run_id: str) -> str:
        """The status of a run."""
        answer = self.ask(
            "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run_id
        )
        return str(answer["runOrError"]["status"])

    def ended(self, run_id: str, seconds: float = 90.0) -> str:
        """Wait for the end of a run and return its status."""
        eventually(f"the end of run {run_id}", lambda: self.status(run_id) in ENDED, seconds)
        return self.status(run_id)

    def runs(self, job: str) -> list[dict[str, Any]]:
        """The runs of a job, the newest first: id, status, startTime, endTime, tags."""
        answer = self.ask(
            """query ($filter: RunsFilter) { runsOrError(filter: $filter) {
                ... on Runs { results { id status startTime endTime tags { key value } } } } }""",
            filter={"pipelineName": job},
        )
        return list(answer["runsOrError"]["results"])

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags of a run."""
        answer = self.ask(
            "query ($id: ID!) { runOrError(runId: $id) { ... on Run { tags { key value } } } }",
            id=run_id,
        )
        return {tag["key"]: tag["value"] for tag in answer["runOrError"]["tags"]}

    def checks(self, *asset: str) -> dict[str, str | None]:
        """The latest result of each check of an asset."""
        answer = self.ask(
            """query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
                assetChecksOrError { ... on AssetChecks { checks { name
                executionForLatestMaterialization { status } } } } } } }""",
            key={"path": asset},
        )
        return {
            check["name"]: (check["executionForLatestMaterialization"] or {}).get("status")
            for check in answer["assetNodeOrError"]["assetChecksOrError"]["checks"]
        }

    def observed(self, *asset: str) -> set[str]:
        """The names of the numbers in the observations of an asset."""
        answer = self.ask(
            """query ($key: AssetKeyInput!) { assetOrError(assetKey: $key) { ... on Asset {
                assetObservations(limit: 20) { metadataEntries { label } } } } }""",
            key={"path": asset},
        )
        return {
            entry["label"]
            for observation in answer["assetOrError"]["assetObservations"]
            for entry in observation["metadataEntries"]
        }

    def observers(self, *asset: str) -> list[str]:
        """The runs that observed an asset, once for each observation; empty for those of sensors."""
        answer = self.ask(
            """query ($key: AssetKeyInput!) { assetOrError(assetKey: $key) { ... on Asset {
                assetObservations(limit: 100) { runId } } } }""",
            key={"path": asset},
        )
        return [seen["runId"] for seen in answer["assetOrError"]["assetObservations"]]

    def _is_loaded(self) -> bool:
        for name, process in self._processes.items():
            assert process.poll() is None, f"{name} ended, see its log"
        try:
            answer = self.ask(
                "{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }"
            )
        except OSError:
            return False
        return bool(answer["repositoriesOrError"].get("nodes"))


def _selector(**names: str) -> dict[str, str]:
    return {"repositoryLocationName": LOCATION, "repositoryName": "__repository__", **names}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
