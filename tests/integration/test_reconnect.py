"""The loop outlives its connections, at whatever moment they are lost."""

import threading
from itertools import count

import pytest

from sync_pipeline import passes, stream
from sync_pipeline.database import connected
from sync_pipeline.errors import CatalogMismatch, PassInterrupted
from sync_pipeline.stream import Listener
from tests.engine import config_of, equal, installed
from tests.helpers import Node, Pair

DISCONNECT = """
select pg_terminate_backend(pid) from pg_stat_activity
where application_name like 'sync-pipeline %' and datname = current_database()
"""


def disconnect(node: Node) -> None:
    """End the pipeline's sessions on a node."""
    node.execute(DISCONNECT)


def test_a_stream_survives_connections_that_are_lost_as_soon_as_it_leads(pair: Pair) -> None:
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    stop = threading.Event()
    interruptions: list[Exception] = []
    leads = count()

    def leading() -> None:
        if next(leads) < 3:
            disconnect(pair.crm)

    listener = Listener(
        leading=leading,
        passed=lambda _: stop.set(),
        interrupted=lambda error, _: interruptions.append(error),
    )
    stream.stream(config, stop, seconds=60, listener=listener)
    assert len(interruptions) == 3
    assert equal(pair)


def test_a_sync_survives_connections_that_are_lost_between_two_passes(pair: Pair) -> None:
    config = installed(pair)
    pair.crm.insert("accounts", id=1, name="one")
    interruptions: list[Exception] = []

    def passed(_: object) -> None:
        if not interruptions:
            disconnect(pair.billing)

    stream.sync(
        config, Listener(passed=passed, interrupted=lambda error, _: interruptions.append(error))
    )
    assert len(interruptions) == 1
    assert equal(pair)


def test_the_pause_grows_while_each_pass_fails_though_the_consumer_leads_each_time(
    pair: Pair,
) -> None:
    config = installed(pair)
    pair.billing.execute("alter table sync.sync_applied add constraint never check (false)")
    pair.crm.insert("accounts", id=1, name="one")
    stop = threading.Event()
    pauses: list[float] = []

    def interrupted(_: Exception, seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            stop.set()

    stream.stream(config, stop, seconds=60, listener=Listener(interrupted=interrupted))
    assert pauses[0] < pauses[1] < pauses[2]


def test_an_interruption_names_the_node(pair: Pair) -> None:
    config = config_of(pair)
    with (
        connected(config.second, config, "t") as connection,
        pytest.raises(PassInterrupted, match=r"^billing: .*administrator"),
        passes.interruptions(),
    ):
        connection.execute("select pg_terminate_backend(pg_backend_pid())")


def test_a_statement_that_cannot_be_sent_is_no_broken_connection(pair: Pair) -> None:
    with pytest.raises(CatalogMismatch, match="parameter"), passes.interruptions():
        pair.crm.connection.execute("select %(left_out)s", {})
    pair.crm.close()
    with pytest.raises(PassInterrupted), passes.interruptions():
        pair.crm.connection.execute("select 1")
