"""A node that goes back in time: a replica that lacks the last commits takes over, or an old backup is restored."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from sync_pipeline import doctor, ledger, passes, stream
from sync_pipeline.config import load
from sync_pipeline.errors import ConnectionFailed, PassInterrupted, WrongDatabase
from sync_pipeline.link import lead
from sync_pipeline.servers import Server
from tests.crashing import POINTS, Point
from tests.engine import (
    accused,
    config_of,
    confirm,
    equal,
    installed,
    repaired,
    sync_pair,
    verified,
)
from tests.helpers import Node, Pair, dsn_variable, write_config
from tests.replicas import Replica, replicable, short_directory, until

# What the runbook says for a node that was restored.
FORGET = (
    "delete from sync.sync_events; delete from sync.sync_failures; delete from sync.sync_applied"
)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
def own_crm(directory: Path, pg_version: int) -> Iterator[Node]:
    with replicable(directory, pg_version) as node:
        yield node


@pytest.fixture
def pair(own_crm: Node, billing: Node, tmp_path: Path) -> Pair:
    return Pair(own_crm, billing, write_config(tmp_path / "sync.yaml"))


@contextmanager
def replaced(pair: Pair, server: Server) -> Iterator[Pair]:
    """The pair with crm on another server."""
    database = urlsplit(pair.crm.dsn).path.removeprefix("/")
    with closing(Node("crm", server.dsn(database), server)) as crm:
        yield Pair(crm, pair.billing, pair.config_path)


def of_several(pair: Pair, *servers: Server) -> dict[str, str]:
    """The variables of the pair, but the DSN of crm names several servers."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return pair.environment | {dsn_variable("crm"): re.sub(r"@[^/]*", f"@{hosts}", pair.crm.dsn)}


def add(node: Node, first: int, last: int) -> None:
    node.execute(
        "insert into accounts select g, 'account ' || g from generate_series(%s::int, %s::int) as g",
        first,
        last,
    )


def caught_up(primary: Node, replica: Server) -> None:
    """Return when the replica has everything."""
    end = primary.value("select pg_current_wal_flush_lsn()::text")
    until(replica, "pg_last_wal_replay_lsn() >= %s::pg_lsn", end)


def last_id(node: Node) -> int:
    return int(node.value("select pg_sequence_last_value('sync.sync_events_id_seq')"))


def mend(pair: Pair) -> None:
    """Follow the runbook, section "After a restore"."""
    pair.crm.execute(FORGET)
    confirm(config_of(pair))
    assert not verified(pair).equal
    repaired(pair, "billing")
    sync_pair(pair)
    assert verified(pair).equal


def refused(pair: Pair, match: str) -> None:
    """Nobody leads, `install` changes nothing, and doctor says why."""
    with pytest.raises(WrongDatabase, match=match):
        sync_pair(pair)
    with pytest.raises(WrongDatabase, match=match):
        installed(pair)
    [found] = [f for f in doctor.examine(config_of(pair)) if f.check == "identity"]
    assert (found.level, found.node) == ("error", "crm")


def test_a_replica_that_lacks_the_last_commits_takes_over_and_ids_come_back(
    pair: Pair, directory: Path
) -> None:
    installed(pair)
    with Replica.of(pair.crm.server, directory / "replica") as replica:
        add(pair.crm, 1, 100)
        sync_pair(pair)
        caught_up(pair.crm, replica)
        replica.stop()
        # What the replica will never know; the consumer is cut off between the two commits of the last batch.
        add(pair.crm, 101, 300)
        cut_off = POINTS["before the source's delete"].struck_by(
            lambda: pair.crm.server.stop("immediate"), source="crm"
        )
        with cut_off, pytest.raises(ConnectionFailed, match="crm"):
            sync_pair(pair)
        assert len(pair.billing.rows("select from sync.sync_applied")) == 1
        replica.start()
        replica.promote()
        # One address list for both, as an application would have it: the consumer finds the new primary by itself.
        config = load(pair.config_path, of_several(pair, pair.crm.server, replica))
        with replaced(pair, replica) as pair:  # noqa: PLR1704 - from here on it is another server
            add(pair.crm, 1001, 1050)
            assert last_id(pair.crm) <= 300, "the ids did not come back"
            stream.sync(config)
            # New events with ids that the ledger knows: they were not taken for those of the lost batch.
            new = "select count(*) from accounts where id > 1000"
            assert pair.billing.value(new) == pair.crm.value(new) == 50
            assert pair.billing.rows("select * from sync.sync_applied") == []
            mend(pair)
            assert equal(pair)
            assert pair.crm.value("select count(*) from accounts") == 350


def test_a_consumer_works_on_the_primary_wherever_its_dsn_leads_first(
    pair: Pair, directory: Path
) -> None:
    installed(pair)
    with Replica.of(pair.crm.server, directory / "replica") as replica:
        # One that lags: it shows none of the rows to come.
        replica.stop()
        (replica.data_directory / "postgresql.auto.conf").write_text("primary_conninfo = ''")
        replica.start()
        add(pair.crm, 1, 10)
        stream.sync(load(pair.config_path, of_several(pair, replica, pair.crm.server)))
    assert pair.crm.pending() == 0
    assert equal(pair)


@pytest.fixture
def failed_over(pair: Pair, directory: Path) -> Iterator[Pair]:
    """A replica that lacks the last work of both nodes has taken crm's place."""
    installed(pair)
    with Replica.of(pair.crm.server, directory / "replica") as replica:
        add(pair.crm, 1, 10)
        sync_pair(pair)
        pair.crm.execute("update accounts set name = 'acknowledged too late' where id = 9")
        caught_up(pair.crm, replica)
        replica.stop()
        # From here on the replica knows nothing. This was synced, so billing has it:
        add(pair.crm, 11, 13)
        pair.crm.execute("update accounts set name = 'of crm' where id = 1")
        pair.crm.execute("delete from accounts where id = 2")
        add(pair.billing, 21, 22)
        pair.billing.execute("update accounts set name = 'of billing' where id = 3")
        pair.billing.execute("delete from accounts where id = 4")
        sync_pair(pair)
        pair.billing.execute("update accounts set name = 'newer' where id = 9")
        sync_pair(pair)
        assert equal(pair)
        # This was not synced, so nobody has it:
        pair.crm.execute("update accounts set name = 'lost' where id = 5")
        add(pair.crm, 31, 32)
        pair.crm.server.stop("immediate")
        replica.start()
        replica.promote()
        with replaced(pair, replica) as promoted:
            yield promoted


def work_on(pair: Pair) -> None:
    """What the applications write after the failover."""
    add(pair.crm, 41, 42)
    add(pair.billing, 51, 52)
    pair.crm.execute("update accounts set name = 'goes on' where id = 6")
    pair.billing.execute("update accounts set name = 'goes on' where id = 7")
    pair.crm.execute("delete from accounts where id = 8")


def accounts(*ranges: range) -> set[int]:
    return {number for numbers in ranges for number in numbers}


def test_a_promoted_replica_is_the_same_database_on_a_new_timeline(failed_over: Pair) -> None:
    crm = failed_over.crm
    timeline = "left(pg_walfile_name(pg_current_wal_lsn()), 8)"
    same = "system_identifier = (select system_identifier::text from pg_control_system())"
    assert crm.rows(f"select {timeline}, {same} from sync.sync_node") == [("00000002", True)]
    assert {f.check for f in doctor.examine(config_of(failed_over))} == {"backlog", "identity"}
    work_on(failed_over)
    crm.insert("accounts", id=13, name="a new record with the key of a lost one")
    refused(failed_over, "lost commits: it has acknowledged batch 1, billing knows of 2")
    assert crm.pending() == 6
    # Once it is confirmed, what is written from now on converges.
    confirm(config_of(failed_over))
    sync_pair(failed_over)

    # Exactly what the lost commits left: nothing of what only crm had, nothing of the work since.
    assert accused(verified(failed_over).tables["accounts"]) == {
        "missing on billing": ["2", "4"],
        "missing on crm": ["11", "12", "21", "22"],
        "different": ["1", "3"],
    }
    # The price of going on at once: an acknowledgement was lost, and the older row went out again; a key came back.
    for node in failed_over.nodes:
        assert node.rows("select name from accounts where id in (9, 13) order by id") == [
            ("acknowledged too late",),
            ("a new record with the key of a lost one",),
        ]

    assert repaired(failed_over, "billing") == 8
    sync_pair(failed_over)

    assert equal(failed_over)
    assert verified(failed_over).equal
    kept = accounts(range(1, 8), range(9, 14), range(21, 23), range(41, 43), range(51, 53)) - {2, 4}
    assert {row[0] for row in failed_over.crm.rows("accounts")} == kept


def test_what_a_promoted_replica_had_marked_before_is_forgotten_and_sends_no_older_row(
    failed_over: Pair,
) -> None:
    crm = failed_over.crm
    took_over = crm.value("select clock_timestamp()")
    work_on(failed_over)
    refused(failed_over, "lost commits")

    crm.execute("delete from sync.sync_events where created_at < %s", took_over)
    crm.execute("delete from sync.sync_failures")
    confirm(config_of(failed_over))
    sync_pair(failed_over)

    assert failed_over.billing.rows("select name from accounts where id = 9") == [("newer",)]
    assert accused(verified(failed_over).tables["accounts"]) == {
        "missing on billing": ["2", "4"],
        "missing on crm": ["11", "12", "13", "21", "22"],
        "different": ["1", "3", "9"],
    }
    assert repaired(failed_over, "billing") == 10
    sync_pair(failed_over)
    assert equal(failed_over)
    for node in failed_over.nodes:
        assert node.rows("select * from sync.sync_failures") == []


def test_a_node_is_restored_from_an_older_backup(pair: Pair, directory: Path) -> None:
    """A copy of the files of a server that was stopped without warning is a backup."""
    installed(pair)
    server = pair.crm.server
    add(pair.crm, 1, 100)
    sync_pair(pair)
    pair.crm.execute("update accounts set name = 'not sent before the backup' where id = 1")
    backup = backed_up(server, directory)
    with replaced(pair, server) as later:
        later.crm.execute("update accounts set name = 'later' where id <= 50")
        later.crm.execute("delete from accounts where id > 90")
        sync_pair(later)
        add(later.billing, 201, 250)
        later.billing.execute("update accounts set name = 'of billing' where id = 1")
        sync_pair(later)
        add(later.billing, 251, 260)
    restore(backup, server)
    with replaced(pair, server) as restored:
        assert restored.crm.pending() == 1
        refused(restored, "lost commits: it has acknowledged batch 1, billing knows of 2")
        mend(restored)
        assert equal(restored)
        assert restored.crm.rows("select name from accounts where id = 1") == [("of billing",)]
        assert restored.crm.value("select count(*) from accounts") == 150
        for node in restored.nodes:
            assert node.rows("select * from sync.sync_failures") == []
            node.execute(
                "update accounts set name = 'goes on' where id = %s", 2 if node.name == "crm" else 3
            )
        sync_pair(restored)
        assert equal(restored)


def test_a_node_that_has_lost_what_it_received_is_refused(pair: Pair, directory: Path) -> None:
    installed(pair)
    server = pair.crm.server
    backup = backed_up(server, directory)
    with replaced(pair, server) as later:
        add(later.billing, 1, 10)
        sync_pair(later)
    restore(backup, server)
    with replaced(pair, server) as restored:
        add(restored.billing, 11, 12)
        refused(restored, "lost commits: it has applied batch 0, billing knows of 1")
        confirm(config_of(restored))
        assert repaired(restored, "billing") == 10
        sync_pair(restored)
        assert restored.crm.value("select count(*) from accounts") == 12
        assert equal(restored)


def backed_up(server: Server, directory: Path) -> Path:
    """Stop a server, copy its files and start it again."""
    server.stop("immediate")
    backup = directory / "backup"
    # With their owner.
    subprocess.run(["cp", "-a", str(server.data_directory), str(backup)], check=True)
    server.start()
    return backup


def restore(backup: Path, server: Server) -> None:
    """Let a backup take the place of a server's files."""
    server.stop("immediate")
    shutil.rmtree(server.data_directory)
    backup.rename(server.data_directory)
    server.start()


def test_a_batch_whose_wait_for_a_standby_was_cancelled_is_not_acknowledged(pair: Pair) -> None:
    config = installed(pair)
    add(pair.billing, 1, 2)

    def standbys(names: str) -> None:
        pair.crm.execute(f"alter system set synchronous_standby_names = '{names}'")
        pair.crm.execute("select pg_reload_conf()")
        until(pair.crm, "current_setting('synchronous_standby_names') = %s", names)

    waiting = "from pg_stat_activity where wait_event = 'SyncRep' and application_name = %s"
    reader = "sync-pipeline sync reader"
    vanish = Point("before", ledger, "make_durable").struck_by(lambda: standbys("nobody"))
    with vanish, ThreadPoolExecutor(1) as pool, lead(config) as link:
        one = pool.submit(passes.run, link)
        until(pair.crm, f"count(*) = 1 {waiting}", reader)
        # As when a consumer is stopped. For PostgreSQL the commit is a success then, with a warning.
        link.cancel()
        until(pair.crm, f"count(*) = 0 {waiting}", reader)
        standbys("")
        with pytest.raises(PassInterrupted):
            one.result()
    assert pair.billing.pending() == 2

    sync_pair(pair)
    assert pair.billing.pending() == 0
    assert equal(pair)
