"""A code location: what it holds, two links side by side, the component, the files of DAGSTER_HOME, what is pruned."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import copyfile

import dagster as dg
import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config
from dagster.components.testing import create_defs_folder_sandbox

from sync_pipeline import SyncComponent
from sync_pipeline import link as links
from sync_pipeline.config import load
from sync_pipeline.defs import build_sync_definitions
from sync_pipeline.defs.maintenance import MaintenanceConfig
from tests import dagster_runs
from tests.dagster_processes import storage_environment
from tests.dagster_runs import metadata, run, tick
from tests.engine import installed
from tests.helpers import Cluster, Pair, write_config

PRUNE_ALL = {"ops": {"prune": {"config": {"keep_days": 0}}}}
ROOT = Path(__file__).resolve().parents[2]
# What `dg` writes into a new project, and the defs.yaml of docs/dagster.md.
PROJECT = """
from pathlib import Path

from dagster import definitions, load_from_defs_folder


@definitions
def defs():
    return load_from_defs_folder(path_within_project=Path(__file__).parent)
"""
PYPROJECT = """
[project]
name = "warehouse"
version = "0.1.0"

[tool.dg]
directory_type = "project"

[tool.dg.project]
root_module = "warehouse"
"""
DEFS_YAML = """
type: sync_pipeline.SyncComponent
attributes:
  config: sync.yaml
  name: eu
  owners: ["team:data"]
"""
JOBS = {"sync_job", "stream_job", "replay_job", "backfill_job", "verify_job", "maintenance_job"}


def test_a_code_location_loads_while_both_nodes_are_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in ("CRM", "BILLING"):
        monkeypatch.setenv(f"{node}_DSN", f"host=127.0.0.1 port=1 dbname={node}")
    found = build_sync_definitions(load(write_config(tmp_path / "sync.yaml")))
    dg.Definitions.validate_loadable(found)
    assert {job.name for job in found.resolve_all_job_defs() if "__" not in job.name} == JOBS


def test_only_what_needs_no_decision_is_on_by_default(link: Pair) -> None:
    repository = dagster_runs.definitions(link).get_repository_def()
    on = {s.name for s in repository.sensor_defs if s.default_status.value == "RUNNING"}
    assert on == {"sync_sensor", "watch_sensor", "alert_sensor"}
    assert {s.name for s in repository.sensor_defs} - on == {"stream_sensor"}
    schedules = {
        s.name: (s.cron_schedule, s.default_status.value) for s in repository.schedule_defs
    }
    assert schedules == {
        "sync_schedule": ("* * * * *", "STOPPED"),
        "maintenance_schedule": ("17 * * * *", "STOPPED"),
    }


def test_every_job_runs_its_ops_in_the_process_of_the_run(link: Pair) -> None:
    found = dagster_runs.definitions(link)
    executors = {name: found.resolve_job_def(name).executor_def.name for name in JOBS}
    assert set(executors.values()) == {"in_process"}


def test_each_table_is_an_asset_on_both_nodes_and_one_over_both(link: Pair) -> None:
    write_config(link.config_path, ["public.users", "accounts"])
    graph = dagster_runs.definitions(link, owners=["team:data"]).resolve_asset_graph()
    over_both = graph.get(dg.AssetKey(["sync", "public", "users"]))
    assert over_both.parent_keys == {
        dg.AssetKey(["crm", "public", "users"]),
        dg.AssetKey(["billing", "public", "users"]),
    }
    assert over_both.owners == ["team:data"]
    assert "postgres" in over_both.kinds
    assert over_both.freshness_policy is not None
    names = {key.name for key in graph.asset_check_keys if key.asset_key == over_both.key}
    assert names == {"lag", "dead_letters", "verify"}


def test_a_node_may_be_called_as_the_assets_over_both_are(tmp_path: Path) -> None:
    nodes = {name: {"dsn": f"host=127.0.0.1 port=1 dbname={name}"} for name in ("sync", "billing")}
    path = tmp_path / "sync.yaml"
    path.write_text(yaml.safe_dump({"nodes": nodes, "tables": ["users"]}, sort_keys=False))
    found = build_sync_definitions(load(path))
    dg.Definitions.validate_loadable(found)
    keys = found.resolve_asset_graph().get_all_asset_keys()
    assert {key.path[0] for key in keys} == {"sync", "billing", "link"}


def test_two_links_live_side_by_side_each_with_its_own_schema_locks_jobs_and_sensors(
    pair: Pair, instance: dg.DagsterInstance
) -> None:
    write_config(pair.config_path, ["accounts"])
    other = write_config(pair.config_path.with_name("users.yaml"), ["users"], schema="sync_users")
    first, second = installed(pair), installed(pair, other)
    merged = dg.Definitions.merge(
        build_sync_definitions(first), build_sync_definitions(second, name="people")
    )
    dg.Definitions.validate_loadable(merged)
    for node in pair.nodes:
        node.insert("accounts", id=1, name="one")
    pair.crm.insert("users", id=1, account_id=1, email="a@x.org")
    # The lock of the one does not stop the other.
    with links.lead(first):
        result = merged.resolve_job_def("people_sync_job").execute_in_process(instance=instance)
    assert result.success
    assert len(pair.billing.rows("users")) == 1
    assert pair.crm.rows("select table_name from sync.sync_events") == [("accounts",)]
    context = dg.build_sensor_context(instance=instance, definitions=merged)
    ticks = {
        name: merged.resolve_sensor_def(name).evaluate_tick(context)
        for name in ("sync_sensor", "people_sync_sensor")
    }
    assert len(ticks["sync_sensor"].run_requests or []) == 1
    assert "nothing waits" in (ticks["people_sync_sensor"].skip_message or "")


def test_the_component_makes_a_link_of_the_file_beside_its_defs_yaml(link: Pair) -> None:
    with create_defs_folder_sandbox() as sandbox:
        folder = sandbox.scaffold_component(
            component_cls=SyncComponent,
            defs_path="crm_billing",
            defs_yaml_contents={
                "type": "sync_pipeline.SyncComponent",
                "attributes": {"config": "sync.yaml", "name": "eu"},
            },
        )
        (folder / "sync.yaml").write_text(link.config_path.read_text())
        with sandbox.load_component_and_build_defs(Path("crm_billing")) as (_, found):
            assert found.resolve_job_def("eu_sync_job").name == "eu_sync_job"
            keys = found.resolve_asset_graph().get_all_asset_keys()
            assert dg.AssetKey(["eu", "sync", "users"]) in keys


@pytest.mark.dagster
def test_the_component_loads_in_a_project_as_dg_makes_it(link: Pair, tmp_path: Path) -> None:
    package = tmp_path / "src" / "warehouse"
    folder = package / "defs" / "crm_billing"
    folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "definitions.py").write_text(PROJECT)
    (folder / "defs.yaml").write_text(DEFS_YAML)
    (folder / "sync.yaml").write_text(link.config_path.read_text())
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    done = dagster_runs.command(
        link,
        tmp_path,
        *("definitions", "validate", "-m", "warehouse.definitions"),
        PYTHONPATH=str(tmp_path / "src"),
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_dagster() -> None:
    code = "import sys, sync_pipeline; sys.exit('dagster' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("home", ["dagster_home", "dagster_home/prod"])
def test_the_settings_of_both_homes_are_valid_and_telemetry_is_off(home: str) -> None:
    settings, _ = dagster_instance_config(str(ROOT / home))
    assert settings["telemetry"] == {"enabled": False}
    assert settings["run_monitoring"]["enabled"] is True
    limits = settings["concurrency"]["runs"]["tag_concurrency_limits"]
    assert {limit["key"] for limit in limits} == {"sync/exclusive", "sync/backfill"}


def test_production_names_the_driver_of_its_storage() -> None:
    settings = yaml.safe_load((ROOT / "dagster_home/prod/dagster.yaml").read_text())
    assert settings["storage"]["postgres"]["postgres_db"]["scheme"] == "postgresql+psycopg2"


def test_jobs_run_and_are_pruned_on_postgres_storage(
    link: Pair, billing_server: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = billing_server.clone()
    for name, value in storage_environment(billing_server.server.dsn(database)).items():
        monkeypatch.setenv(name, value)
    copyfile(ROOT / "dagster_home/prod/dagster.yaml", tmp_path / "dagster.yaml")
    link.crm.insert("accounts", id=1, name="one")
    try:
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            for event in tick(link, instance, "watch_sensor").asset_events:
                instance.report_runless_asset_event(event)
            done = run(link, instance)
            assert done.success
            assert instance.all_logs(done.run_id)
            told = metadata(run(link, instance, "maintenance_job", config=PRUNE_ALL), "prune")
            # The latest results of the checks stay: two of each table.
            assert told == {"runs": 1, "sensor_reports": 9, "conflicts": 0}
            assert not instance.all_logs(done.run_id)
            assert reports(instance) == 6
    finally:
        billing_server.drop(database)


def test_maintenance_removes_old_runs_of_this_link_with_all_that_belongs_to_them(
    link: Pair,
) -> None:
    with dg.instance_for_test() as instance:
        # The oldest of all, so that nothing but its tag keeps it.
        foreign = instance.create_run_for_job(
            dagster_runs.definitions(link).resolve_job_def("sync_job"),
            status=dg.DagsterRunStatus.SUCCESS,
            tags={"sync/link": "another"},
        )
        runs = [run(link, instance) for _ in range(3)]
        events = tick(link, instance, "watch_sensor").asset_events
        for event in events:
            instance.report_runless_asset_event(event)
        assert reports(instance) > 0
        files = list(Path(instance.root_directory).rglob(f"*{runs[0].run_id}*"))
        assert files

        def prune(**limits: float) -> dg.ExecuteInProcessResult:
            config = {"ops": {"prune": {"config": {"keep_days": 0, **limits}}}}
            return run(link, instance, "maintenance_job", config=config)

        out_of_time = prune(seconds=1e-9, limit=1, report_limit=1)
        assert metadata(out_of_time, "prune")["runs"] == 0
        done = prune(limit=2, report_limit=2)
        told = metadata(done, "prune")
        assert (told["runs"], told["sensor_reports"]) == (2, 2)
        left = {record.dagster_run.run_id for record in instance.get_run_records()}
        assert left == {run.run_id for run in (runs[2], foreign, out_of_time, done)}
        assert not list(Path(instance.root_directory).rglob(f"*{runs[0].run_id}*"))


def test_maintenance_stops_at_its_limit_before_it_comes_to_failed_runs(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    job = dagster_runs.definitions(link).resolve_job_def("sync_job")
    for status in (dg.DagsterRunStatus.SUCCESS, *[dg.DagsterRunStatus.FAILURE] * 3):
        instance.create_run_for_job(job, status=status, tags=job.tags)
    limits = {"keep_days": 0, "keep_failed_days": 0, "limit": 1}
    config = {"ops": {"prune": {"config": limits}}}
    done = run(link, instance, "maintenance_job", config=config)
    assert metadata(done, "prune")["runs"] == 1
    assert len(instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))) == 3


def test_maintenance_keeps_up_with_the_reports_of_many_tables(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    names = [f"t{number}" for number in range(200)]
    write_config(link.config_path, names)
    reported = tick(link, instance, "watch_sensor").asset_events
    # Told every ten minutes of a quiet table, while the job runs once in an hour.
    assert len(reported) * 6 < MaintenanceConfig().report_limit


def test_maintenance_leaves_alone_what_others_report_of_their_assets(link: Pair) -> None:
    with dg.instance_for_test() as instance:
        theirs = dg.AssetKey(["lake", "users"])
        for event in (
            dg.AssetMaterialization(theirs, partition="2026-01-01"),
            dg.AssetObservation(theirs),
            dg.AssetCheckEvaluation(asset_key=theirs, check_name="rows", passed=True),
            dg.AssetCheckEvaluation(asset_key=theirs, check_name="rows", passed=False),
            *tick(link, instance, "watch_sensor").asset_events,
        ):
            instance.report_runless_asset_event(event)
        run(link, instance, "maintenance_job", config=PRUNE_ALL)
        # Theirs, and the latest results of our checks.
        assert reports(instance) == 4 + 6
        assert instance.get_materialized_partitions(theirs) == {"2026-01-01"}
        check = dg.AssetCheckKey(theirs, "rows")
        history = instance.event_log_storage.get_asset_check_execution_history(check, limit=5)
        assert len(history) == 2


def test_maintenance_keeps_the_latest_result_of_a_check_and_removes_those_before(
    link: Pair,
) -> None:
    with dg.instance_for_test() as instance:
        for _ in range(3):
            for event in tick(link, instance, "watch_sensor").asset_events:
                instance.report_runless_asset_event(event)
            assert run(link, instance, "verify_job").success
        run(link, instance, "maintenance_job", config=PRUNE_ALL)
        for name in ("lag", "verify"):
            check = dg.AssetCheckKey(dg.AssetKey(["sync", "users"]), name)
            history = instance.event_log_storage.get_asset_check_execution_history(check, limit=5)
            assert [result.status.value for result in history] == ["SUCCEEDED"], name


def test_maintenance_keeps_what_is_young_and_removes_old_conflicts(
    link: Pair, instance: dg.DagsterInstance
) -> None:
    kept = run(link, instance)
    link.crm.execute(
        "insert into sync.sync_conflicts (table_name, record_id, kind, winner, detected_at, resolved_at)"
        " values ('users', '1', 'update_update', 'crm', %s, %s), ('users', '2', 'update_update', 'crm', now(), now())",
        datetime.now(UTC) - timedelta(days=60),
        datetime.now(UTC) - timedelta(days=60),
    )
    done = run(link, instance, "maintenance_job")
    assert metadata(done, "prune") == {"runs": 0, "sensor_reports": 0, "conflicts": 1}
    assert instance.get_run_by_id(kept.run_id) is not None
    assert link.crm.rows("select record_id from sync.sync_conflicts") == [("2",)]


def reports(instance: dg.DagsterInstance) -> int:
    """How many events of no run are stored."""
    return len(instance.all_logs(""))
