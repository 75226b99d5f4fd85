"""Every crash window of the protocol, with a consumer that is really killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crashing import POINTS
from tests.engine import equal, installed, sync_pair
from tests.helpers import Pair, write_config

ROOT = Path(__file__).parents[2]
# Written by the application alone: an effect applied twice would show in the revision.
REVISIONS = """
alter table users add column revision int not null default 0;
create function count_revision() returns trigger language plpgsql as $$
begin
    if current_setting('sync_pipeline.applying', true) is distinct from 'sync' then
        new.revision := old.revision + 1;
    end if;
    return new;
end $$;
create trigger count_revision before update on users for each row execute function count_revision();
"""


def crash(pair: Pair, point: str) -> None:
    """Run a consumer that dies at `point`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crashing", point],
        cwd=ROOT,
        env={**os.environ, **pair.environment, "SYNC_CONFIG": str(pair.config_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def work(pair: Pair, accounts: range) -> None:
    """Inserts, updates and deletes with children, on both sides, without a conflict."""
    for node, shift in ((pair.crm, 0), (pair.billing, 1000)):
        for number in accounts:
            key = number + shift
            node.execute("insert into accounts values (%s, %s)", key, f"account {key}")
            node.execute("insert into users values (%s, %s, %s)", key, key, f"{key}@x.org")
            node.execute("insert into orders values (%s, %s, 1)", key, key)
        first = accounts[0] + shift
        node.execute(
            "update users set name = 'changed' where id between %s and %s", first, first + 5
        )
        node.execute("delete from accounts where id = %s", first + 1)


def settled(pair: Pair) -> None:
    """Recover and check everything that must hold at the end."""
    sync_pair(pair)
    assert equal(pair)
    for node in pair.nodes:
        assert node.pending() == 0
        assert node.rows("select * from sync.sync_applied") == []
        assert node.rows("select * from sync.sync_failures") == []
        assert node.rows("select * from sync.sync_conflicts") == []


@pytest.mark.parametrize("batch_size", [10_000, 7], ids=["one batch", "many batches"])
@pytest.mark.parametrize("point", POINTS)
def test_a_consumer_killed(pair: Pair, point: str, batch_size: int) -> None:
    write_config(pair.config_path, batch_size=batch_size)
    for node in pair.nodes:
        node.execute(REVISIONS)
    installed(pair)
    work(pair, range(10, 20))
    crash(pair, point)
    # The applications go on before anybody recovers: newer changes to what the dead consumer had in hand.
    pair.crm.execute("update users set name = 'after the crash' where id = 12")
    pair.crm.execute("delete from users where id = 14")
    pair.crm.execute("insert into users values (14, 13, 'again@x.org')")
    pair.billing.execute("update users set name = 'after the crash' where id = 1012")
    settled(pair)
    assert pair.crm.rows("select name, revision from users where id = 12") == [
        ("after the crash", 2)
    ]
    assert pair.crm.rows("select email from users where id = 14") == [("again@x.org",)]


def test_a_batch_committed_but_not_acknowledged_is_not_applied_twice(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    crash(pair, "after the target's commit")
    assert pair.crm.pending() == 1
    assert len(pair.billing.rows("select * from sync.sync_applied")) == 1
    # Applied again, this delete's record would come back; taken for a conflict, it would be logged.
    pair.billing.execute("delete from accounts where id = 1")
    settled(pair)
    assert pair.crm.rows("accounts") == []


def test_events_whose_ids_come_back_after_a_restore_are_not_taken_for_applied(pair: Pair) -> None:
    installed(pair)
    pair.crm.insert("accounts", id=1, name="first")
    crash(pair, "after the target's commit")
    # The source is restored to a state before the crash: its sequence hands out the same id again.
    pair.crm.execute("delete from sync.sync_events")
    pair.crm.execute("alter table sync.sync_events alter id restart with 1")
    pair.crm.insert("accounts", id=2, name="second")
    sync_pair(pair)
    assert [row[0] for row in pair.billing.rows("accounts")] == [1, 2]
