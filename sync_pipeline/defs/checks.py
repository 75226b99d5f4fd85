"""Checks of every table over both nodes: does it lag, are there dead letters, is it equal?"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import (
    UnresolvedAssetJobDefinition,
)
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from sync_pipeline import verify
from sync_pipeline.config import Config
from sync_pipeline.database import connected
from sync_pipeline.defs.glance import table_statuses
from sync_pipeline.defs.metadata import seconds
from sync_pipeline.defs.names import Names
from sync_pipeline.defs.session import failure
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.verify import TableReport
from sync_pipeline.views import TableStatus

DEFAULT_LAG_SECONDS = 300.0
LAG = "lag"
DEAD_LETTERS = "dead_letters"
VERIFY = "verify"

Statuses = Mapping[str, Mapping[str, TableStatus]]
T = TypeVar("T")


def status_checks(names: Names, lag_seconds: float) -> dg.AssetChecksDefinition:
    """Return the checks `lag` and `dead_letters` of every table, which one short query for each node answers."""
    specs = [
        spec
        for _, key in names.link_assets()
        for spec in (
            dg.AssetCheckSpec(
                LAG, asset=key, description=f"No change waits longer than {lag_seconds:g} seconds."
            ),
            dg.AssetCheckSpec(
                DEAD_LETTERS, asset=key, description="No record has run out of attempts or is held."
            ),
        )
    ]

    def check_status(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        _tag(context, names)
        try:
            statuses = table_statuses(names.config)
        except SyncPipelineError as error:
            raise failure(error) from None
        for result in judge(names, statuses, lag_seconds):
            if key_of(result) in context.selected_asset_check_keys:
                yield result

    return _checks(
        names.of("check_status"), specs, check_status, "Asks each node what waits and what failed."
    )


def verify_checks(names: Names) -> dg.AssetChecksDefinition:
    """Return the check `verify` of every table: both nodes compared record by record, while work goes on."""
    tables = {dg.AssetCheckKey(key, VERIFY): table for table, key in names.link_assets()}
    specs = [
        dg.AssetCheckSpec(
            VERIFY,
            asset=key.asset_key,
            description="Both nodes hold the same rows, apart from what waits to be synced.",
        )
        for key in tables
    ]

    def verify_tables(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        _tag(context, names)
        keys = specs_in_order(specs, context.selected_asset_check_keys)
        try:
            # In one go: the catalogs of all tables are read once, however many there are.
            for key, report in zip(
                keys, _verify(names.config, [tables[key] for key in keys]), strict=True
            ):
                yield _verdict(key, report)
        except SyncPipelineError as error:
            raise failure(error) from None

    return _checks(
        names.of("verify_tables"), specs, verify_tables, "Compares both nodes, table by table."
    )


def verify_job(names: Names, checks: dg.AssetChecksDefinition) -> UnresolvedAssetJobDefinition:
    """Return the job that verifies all tables, or those whose checks are selected."""
    return dg.define_asset_job(
        names.of("verify_job"),
        selection=dg.AssetSelection.checks(*checks.check_keys),
        description="Compares both nodes table by table; a check fails where they differ. Changes nothing.",
        executor_def=dg.in_process_executor,
        tags=names.tags,
    )


def differs(instance: dg.DagsterInstance, key: dg.AssetKey) -> bool:
    """True when the last answer of an asset's check `verify` was no; a run that has yet to answer does not count."""
    answers = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}
    last = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(key, VERIFY), limit=1, status=answers
    )
    return any(record.status is AssetCheckExecutionRecordStatus.FAILED for record in last)


def judge(names: Names, statuses: Statuses, lag_seconds: float) -> Iterator[dg.AssetCheckResult]:
    """Yield what the status of each table means for its checks `lag` and `dead_letters`."""
    for table, key in names.link_assets():
        nodes = {node: tables[table] for node, tables in statuses.items()}
        lag = max(status.oldest_seconds for status in nodes.values())
        yield dg.AssetCheckResult(
            asset_key=key,
            check_name=LAG,
            passed=lag <= lag_seconds,
            metadata={
                "lag_seconds": seconds(lag),
                **{f"pending_{node}": status.pending for node, status in nodes.items()},
            },
        )
        dead = sum(status.dead for status in nodes.values())
        held = sum(status.held for status in nodes.values())
        yield dg.AssetCheckResult(
            asset_key=key,
            check_name=DEAD_LETTERS,
            passed=dead == 0 and held == 0,
            # Retries go on by themselves; dead and held records wait for a person.
            severity=dg.AssetCheckSeverity.ERROR if dead else dg.AssetCheckSeverity.WARN,
            description=_dead_in_words(table, dead, held),
            metadata={
                "dead": dead,
                "held": held,
                "retrying": sum(status.retrying for status in nodes.values()),
            },
        )


def _checks(
    name: str,
    specs: Sequence[dg.AssetCheckSpec],
    answer: Callable[[dg.AssetCheckExecutionContext], Iterator[dg.AssetCheckResult]],
    description: str,
) -> dg.AssetChecksDefinition:
    """Return what `dg.multi_asset_check` would, for tables of any name: Dagster refuses the names it makes of some."""
    outputs = _plainly_named((spec.get_python_identifier(), spec) for spec in specs)
    keys = dict.fromkeys(spec.asset_key for spec in specs)
    inputs = _plainly_named((key.to_python_identifier(), key) for key in keys)
    op = dg.op(
        name=name,
        description=description,
        ins={input_name: dg.In(dg.Nothing) for input_name in inputs},
        out={output: dg.Out(None, is_required=False) for output in outputs},
    )(answer)
    checks: dg.AssetChecksDefinition = dg.AssetChecksDefinition.create(
        keys_by_input_name=inputs,
        node_def=op,
        check_specs_by_output_name=outputs,
        resource_defs={},
        can_subset=True,
    )
    return checks


def _tag(context: dg.AssetCheckExecutionContext, names: Names) -> None:
    """Make a run that the page of an asset has launched, for checks of this link alone, a run of the link.

    Dagster gives it no tags of ours, so alerts and maintenance would pass it over.
    """
    run = context.run
    ours = {key for _, key in names.link_assets()}
    checked = {key.asset_key for key in run.asset_check_selection or ()}
    if checked and checked <= ours and not run.asset_selection:
        context.instance.add_run_tags(run.run_id, names.tags)


def _plainly_named(things: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return things by names of letters, digits and underscores, each its own."""
    named: dict[str, T] = {}
    for name, thing in things:
        plain = re.sub("[^A-Za-z0-9_]", "_", name)
        named[f"{plain}_{len(named)}" if plain in named else plain] = thing
    return named


def key_of(result: dg.AssetCheckResult) -> dg.AssetCheckKey:
    """Return the key of the check that a result of `judge` belongs to."""
    if result.asset_key is None or result.check_name is None:
        raise AssertionError("`judge` names the check of every result")
    return dg.AssetCheckKey(result.asset_key, result.check_name)


def specs_in_order(
    specs: Iterable[dg.AssetCheckSpec], selected: Iterable[dg.AssetCheckKey]
) -> list[dg.AssetCheckKey]:
    """Return the selected checks in the order of the configuration."""
    wanted = set(selected)
    return [spec.key for spec in specs if spec.key in wanted]


def _dead_in_words(table: str, dead: int, held: int) -> str:
    if dead:
        return f"{dead} dead: see `sync-pipeline failures`, then `failures retry {table}` or `failures discard`"
    return f"{held} held: decide with `sync-pipeline conflicts resolve`" if held else ""


def _verify(config: Config, tables: Sequence[str]) -> Iterator[TableReport]:
    with ExitStack() as exits:
        connections = {
            node.name: exits.enter_context(connected(node, config, "verify"))
            for node in config.nodes
        }
        yield from verify.verify_each(config, connections, tables)


def _verdict(key: dg.AssetCheckKey, report: TableReport) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        asset_key=key.asset_key,
        check_name=key.name,
        passed=report.equal,
        description="" if report.equal else f"see which: `sync-pipeline verify {report.table}`",
        metadata={
            **{f"rows_{node}": rows for node, rows in report.rows.items()},
            **{f"missing_{node}": count for node, count in report.missing_count.items()},
            "different": report.different_count,
            "pending": report.pending,
        },
    )
