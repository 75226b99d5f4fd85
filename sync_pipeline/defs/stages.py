"""One pass as a graph of ops: each direction fetches dependents, processes parents, then dependents."""

from dataclasses import dataclass
from typing import Any

import dagster as dg

from sync_pipeline.defs.metadata import (
    counts_in_words,
    direction_metadata,
    observations,
    run_metadata,
    sentence,
)
from sync_pipeline.defs.names import Names
from sync_pipeline.defs.session import Done, Session, failure
from sync_pipeline.errors import SyncPipelineError
from sync_pipeline.passes import Pass
from sync_pipeline.records import Counts


@dataclass(frozen=True, slots=True)
class Stage:
    """What an op hands to the next: where the pass stands. Rows never travel between ops."""

    direction: str
    reached: str


class Stages(dg.IOManager):
    """Keeps the descriptors of a run in its own process, so that a pass leaves no files behind."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Stage] = {}

    def handle_output(self, context: dg.OutputContext, obj: Stage) -> None:
        """Keep a descriptor."""
        self._kept[tuple(context.get_identifier())] = obj

    def load_input(self, context: dg.InputContext) -> Stage:
        """Return the descriptor of the op before; refuse when that op ran in another run."""
        upstream = context.upstream_output
        identifier = tuple(upstream.get_identifier()) if upstream is not None else ()
        if identifier not in self._kept:
            raise _no_snapshot(f"the step after {upstream.step_key if upstream else 'it'}")
        return self._kept[identifier]


@dg.op(
    ins={"after": dg.In(dg.Nothing)},
    out=dg.Out(Stage),
    required_resource_keys={"link"},
    description=(
        "Takes both locks, recovers what a crash left, opens the one snapshot of this direction and reads the waiting"
        " changes of tables that refer to others."
    ),
)
def fetch_dependents(context: dg.OpExecutionContext) -> Stage:
    """Begin a direction."""
    session, source, target = _direction(context)
    _refuse_a_part(context)
    try:
        if session.lead() is None:
            return _stand_back(context, session)
        one = session.begin(source, target)
        report = session.run(one.fetch_dependents)
    except SyncPipelineError as error:
        raise failure(error) from None
    context.add_output_metadata({"lag_seconds_before": round(report.lag_seconds, 3)})
    if report.recovered:
        context.log.info("recovered %s batches that a crash had left", report.recovered)
    return Stage(report.name, "fetched")


@dg.op(
    out=dg.Out(Stage),
    required_resource_keys={"link"},
    description="Reads the waiting changes of parents from the same snapshot and applies them on the target.",
)
def process_parents(context: dg.OpExecutionContext, fetched: Stage) -> Stage:
    """Apply parents."""
    session, one = _pass(context)
    if one is None:
        return fetched
    try:
        report = session.run(one.process_parents)
    except SyncPipelineError as error:
        raise failure(error) from None
    return Stage(report.name, "parents")


@dg.op(
    out=dg.Out(Stage),
    required_resource_keys={"link"},
    description=(
        "Applies dependents and deletes on the target, commits, and acknowledges on the source exactly the events read."
    ),
)
def process_dependents(context: dg.OpExecutionContext, parents: Stage) -> Stage:
    """Apply dependents and acknowledge; the end of a direction."""
    session, one = _pass(context)
    if one is None:
        return parents
    try:
        report = session.run(one.process_dependents)
        lag_after = session.lag(report.source)
        session.end()
    except SyncPipelineError as error:
        raise failure(error) from None
    session.done.append(Done(report, lag_after))
    metadata = direction_metadata(report, lag_after)
    if len(session.done) == len(session.names.directions):
        metadata["run"] = run_metadata(
            (done.report, done.lag_seconds_after) for done in session.done
        )
    context.add_output_metadata(metadata)
    context.log.info(sentence(report))
    for warning in report.warnings:
        context.log.warning(warning)
    for observation in observations(session.names, [report]):
        context.log_event(observation)
    context.instance.add_run_tags(
        context.run_id,
        {"sync/result": counts_in_words(Counts.sum(done.report.total for done in session.done))},
    )
    return Stage(report.name, "done")


@dg.graph(description="One direction of a pass, from one snapshot of its source.")
def direction(after: Any) -> Any:
    """Wire the three stages."""
    return process_dependents(process_parents(fetch_dependents(after)))


def sync_job(names: Names, **options: Any) -> dg.JobDefinition:
    """Return the job of one pass: the first node's changes, then the second's."""
    name = names.of("sync_job")
    first, second = (node.name for node in names.config.nodes)

    @dg.graph(
        name=name,
        description=(
            f"One pass over {first} and {second}: each direction takes one snapshot of its source. A run that finds"
            " another consumer leading ends at once as a success that did nothing."
        ),
    )
    def both() -> None:
        one, other = names.directions
        direction.alias(other)(direction.alias(one)())

    return both.to_job(name=name, executor_def=dg.in_process_executor, **options)


def _direction(context: dg.OpExecutionContext) -> tuple[Session, str, str]:
    session: Session = context.resources.link
    parent = context.op_handle.parent
    if parent is None:
        raise RuntimeError("a stage is part of a direction")
    source, target = session.names.directions[parent.name]
    return session, source, target


def _refuse_a_part(context: dg.OpExecutionContext) -> None:
    """Fail where the run leaves out the end of this direction: it would be green and have done nothing."""
    snapshot = context.run.execution_plan_snapshot_id
    if snapshot is None:
        return
    planned = context.instance.get_execution_plan_snapshot(snapshot).step_keys_to_execute
    last = f"{context.op_handle.parent}.process_dependents"
    if last not in planned:
        raise dg.Failure(
            description=(
                f"this run leaves out {last}, which commits what the steps before it apply. Nothing was done: launch"
                " all steps of a direction."
            ),
            allow_retries=False,
        )


def _pass(context: dg.OpExecutionContext) -> tuple[Session, Pass | None]:
    session, source, target = _direction(context)
    if session.stood_back is not None:
        return session, None
    one = session.current(source, target)
    if one is None:
        raise _no_snapshot(str(context.op_handle))
    return session, one


def _stand_back(context: dg.OpExecutionContext, session: Session) -> Stage:
    reason = f"did nothing: {session.stood_back}"
    context.log.info(reason)
    context.add_output_metadata({"stood_back": reason})
    context.instance.add_run_tags(context.run_id, {"sync/result": reason[:200]})
    return Stage(str(context.op_handle), "stood back")


def _no_snapshot(step: str) -> dg.Failure:
    return dg.Failure(
        description=(
            f"{step} cannot start in the middle of a pass: the snapshot that it reads from was in another run and is"
            " gone. Nothing is lost: launch a new run, or re-execute all steps of this one."
        ),
        allow_retries=False,
    )
