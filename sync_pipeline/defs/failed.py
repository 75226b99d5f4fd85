"""Runs that failed, and why: for sensors that ask again, and for those that tell."""

import time
from itertools import takewhile

import dagster as dg

from sync_pipeline.defs.names import Names
from sync_pipeline.errors import without_passwords

# After a run that failed the next one waits, longer each time: what is wrong is seldom mended within seconds.
FIRST_REST_SECONDS = 10.0
LONGEST_REST_SECONDS = 300.0
COUNTED = 6
STACK = "\n\nStack Trace:"


def reason_of(instance: dg.DagsterInstance, run_id: str) -> str | None:
    """Return what the failed op says, or why the run did not come to its ops, as with a `sync.yaml` that is broken now.

    None for a run that ended without a word, such as a killed one.
    """
    found = instance.get_records_for_run(
        run_id, of_type={dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.ENGINE_EVENT}
    ).records
    for record in found:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        if event.is_step_failure:
            said = event.step_failure_data.user_failure_data
            # The text of an error that nobody foresaw may hold a value.
            return said.description if said and said.description else "unexpectedly; see its page"
        if (error := event.engine_event_data.error) is not None:
            # Without the name of its class, and without the stack of another process that a message may repeat.
            reason = error.message.partition(": ")[2].partition(STACK)[0].strip()
            return without_passwords(reason or event.message or "")
    return None


def rest(instance: dg.DagsterInstance, names: Names, job_name: str) -> str | None:
    """Say why the next run of a job should not be asked for yet, when the last ones failed; None when it may be.

    A run that was killed says nothing, and is replaced at once.
    """
    filters = dg.RunsFilter(job_name=job_name, tags=names.tags)
    last = instance.get_run_records(filters, limit=COUNTED)
    failed = list(takewhile(lambda record: _failed_in_words(instance, record), last))
    if not failed:
        return None
    seconds = min(FIRST_REST_SECONDS * 2 ** (len(failed) - 1), LONGEST_REST_SECONDS)
    left = seconds - (time.time() - (failed[0].end_time or 0.0))
    if left <= 0:
        return None
    run_id = failed[0].dagster_run.run_id
    return (
        f"run {run_id[:8]} failed: {reason_of(instance, run_id)}; tries again in {left:.0f} seconds"
    )


def _failed_in_words(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool:
    run = record.dagster_run
    return run.status is dg.DagsterRunStatus.FAILURE and reason_of(instance, run.run_id) is not None
