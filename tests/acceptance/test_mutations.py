"""Each part of the protocol is needed: with it removed from a copy of the program, a named test fails.

`make test` tries one of them and looks whether the others still fit the code; `make soak` tries all.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("sync_pipeline", "sql", "tests", "pyproject.toml")
FAILED = 1


@dataclass(frozen=True)
class Mutation:
    """A piece of the program, what stands there instead, and the test that must notice."""

    path: str
    old: str
    new: str
    test: str


CRASHES = "tests/integration/test_crashes.py"
PROTOCOL = "tests/integration/test_protocol.py"
WAITING = "tests/integration/test_waiting.py"
MUTATIONS = {
    "the ledger": Mutation(
        "sync_pipeline/ledger.py",
        "for batch, ids, retried, read_at in rows:",
        "for batch, ids, retried, read_at in rows[:0]:",
        f"{CRASHES}::test_a_batch_committed_but_not_acknowledged_is_not_applied_twice",
    ),
    "the recovery of both directions before the first": Mutation(
        "sync_pipeline/passes.py",
        "if source.name in self.link.unrecovered:",
        "if source.name in self.link.unrecovered and source.name == self.source:",
        f"{CRASHES}::test_a_batch_committed_but_not_acknowledged_is_not_applied_twice",
    ),
    "the exact ids of an acknowledgement": Mutation(
        "sql/queries.sql",
        "where event.id >= lower(read_ids)\n    and event.id < upper(read_ids)\n\n",
        "where event.id < upper(read_ids)\n\n",
        f"{PROTOCOL}::test_an_event_that_commits_between_the_read_and_the_acknowledgement_stays",
    ),
    "the age of the events that the ledger matches": Mutation(
        "sync_pipeline/ledger.py",
        '{"ids": ids, "read_at": read_at},',
        '{"ids": ids, "read_at": "infinity"},',
        f"{CRASHES}::test_events_whose_ids_come_back_after_a_restore_are_not_taken_for_applied",
    ),
    "the wait for the disk of the target": Mutation(
        "sync_pipeline/ledger.py",
        "make_durable(target)\n    for",
        "pass\n    for",
        "tests/integration/test_faults.py::test_a_recovery_waits_until_the_batch_is_on_the_disk_of_the_target",
    ),
    "the dirty check": Mutation(
        "sync_pipeline/batch.py",
        "if not dirty:",
        "if True:",
        f"{PROTOCOL}::test_the_application_that_was_ahead_of_us_is_seen_under_our_locks",
    ),
    "the wait of the copy for transactions that run": Mutation(
        "sync_pipeline/waiting.py",
        "if writers.isdisjoint(running):",
        "if True:",
        f"{WAITING}::test_a_transaction_that_has_an_earlier_id_keeps_the_copy_from_passing_it",
    ),
    "the look at transactions that run before the first check": Mutation(
        "sync_pipeline/waiting.py",
        "if not running:",
        "if True:",
        f"{WAITING}::test_an_earlier_id_that_commits_between_the_two_checks_of_a_batch_is_found",
    ),
    "the lock of both nodes": Mutation(
        "sync_pipeline/locks.py",
        "if not taken or holder is None:",
        "if holder is None:",
        f"{PROTOCOL}::test_a_second_consumer_is_told_who_leads",
    ),
    "the lock of the target alone": Mutation(
        "sync_pipeline/locks.py",
        "if not taken or holder is None:",
        "if (not taken and node == config.first.name) or holder is None:",
        f"{PROTOCOL}::test_the_lock_of_a_failed_start_is_given_back",
    ),
    "the lock of the second writer": Mutation(
        "sync_pipeline/link.py",
        "locks.take_second(connection, side.leader, self.config, side.node.name)",
        "pass",
        f"{PROTOCOL}::test_nobody_leads_while_a_second_writer_of_the_last_leader_lives",
    ),
    "the look of the second writer at the lock of the first": Mutation(
        "sync_pipeline/locks.py",
        "if not taken or leader(connection, config) != first:",
        "if not taken:",
        f"{PROTOCOL}::test_who_leads_no_longer_gets_no_second_writer",
    ),
    "the snapshot": Mutation(
        "sync_pipeline/snapshot.py",
        "psycopg.IsolationLevel.REPEATABLE_READ",
        "psycopg.IsolationLevel.READ_COMMITTED",
        f"{PROTOCOL}::test_a_transaction_that_commits_between_two_stages_is_not_seen_by_half",
    ),
    "the file of a table": Mutation(
        "sync_pipeline/snapshot.py",
        "t.tableoid is not null or (select {}({}::regclass, {}::oid))",
        "t.tableoid is not null",
        "tests/integration/test_schema_changes.py"
        "::test_rows_that_a_snapshot_no_longer_shows_are_not_taken_for_deleted",
    ),
    "the loop guard": Mutation(
        "sync_pipeline/batch.py",
        '"schema": self._schema,',
        '"schema": "",',
        "tests/integration/test_pass.py::test_nothing_is_echoed_back",
    ),
}
CHEAP = "the ledger"


@pytest.mark.parametrize("removed", MUTATIONS)
def test_each_mutation_still_fits_the_program_and_names_a_test(removed: str) -> None:
    mutation = MUTATIONS[removed]
    assert mutation.old in (ROOT / mutation.path).read_text(encoding="utf-8")
    path, name = mutation.test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "removed",
    [name if name == CHEAP else pytest.param(name, marks=pytest.mark.soak) for name in MUTATIONS],
)
def test_without_it_a_named_test_fails(tmp_path: Path, removed: str) -> None:
    mutation = MUTATIONS[removed]
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    mutated = tmp_path / mutation.path
    mutated.write_text(
        mutated.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", mutation.test, "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        # Not the variables by which the processes of a parallel run know each other.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    failed = re.findall(r"^FAILED ([^\s\[]+)", done.stdout, re.MULTILINE)
    assert done.returncode == FAILED, done.stdout + done.stderr
    assert set(failed) == {mutation.test}, done.stdout
