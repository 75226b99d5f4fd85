"""A consumer whose steps a test takes one by one, and that can die between any two of them.

Death shuts the sockets without a word, as the end of its process would: the servers roll back what was open. What
the engine's threads or `finally` blocks try afterwards meets dead connections.
"""

import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from unittest import mock

import psycopg

from sync_pipeline import catalog, passes
from sync_pipeline.config import Config
from sync_pipeline.errors import LockTaken, PassInterrupted
from sync_pipeline.link import Link, lead
from sync_pipeline.passes import Pass
from tests.crashing import POINTS
from tests.engine import config_of
from tests.helpers import Node, Pair

GONE_SECONDS = 20.0


class Died(BaseException):
    """The consumer is no more."""


# Where a step of a pass can be cut off for good.
DEATHS = (
    "before the target's commit",
    "after the target's commit",
    "before the source's delete",
    "after the source's delete",
)


class Consumer:
    """One worker; leads again by itself after it died or was interrupted.

    The catalogs are read once: for steps that do not change the schema.
    """

    def __init__(self, pair: Pair, config: Config | None = None) -> None:
        self._pair = pair
        self._config = config or config_of(pair)
        self._catalog: catalog.Catalog | None = None
        self._life = ExitStack()
        self._link: Link | None = None
        # Of earlier lives that nobody has buried.
        self._backends: dict[str, list[int]] = {}
        self._pass: Generator[str, None, None] | None = None
        self._has_died = False

    @property
    def is_leading(self) -> bool:
        """Whether it believes so: it learns of a lost connection from the next step."""
        return self._link is not None

    def lead(self) -> Link:
        """Take the lead at the first attempt. Raises `LockTaken`."""
        with ExitStack() as exits:
            if self._catalog is not None:
                exits.enter_context(mock.patch.object(catalog, "read", return_value=self._catalog))
            self._link = self._life.enter_context(lead(self._config))
        self._catalog = self._link.catalog
        return self._link

    def lead_when_free(self) -> None:
        """Take the lead as soon as the servers have noticed that the worker before this one died."""
        deadline = time.monotonic() + GONE_SECONDS
        while self._link is None:
            with suppress(LockTaken):
                self.lead()
            assert time.monotonic() < deadline, "the locks of a dead consumer never became free"

    @property
    def link(self) -> Link:
        """The open link; leads if need be."""
        self.lead_when_free()
        if self._link is None:
            raise AssertionError("it leads")
        return self._link

    def step(self, point: str | None = None, fault: Callable[[], None] | None = None) -> str:
        """Take the next step of a pass; tell which it was: "crm fetched", "crm parents written", "crm done"…, "over".

        A `PassInterrupted` ends the consumer's life, as it ends the `with` block of the engine's own loop. With a
        point of DEATHS the fault strikes there, if the step comes to it; by default the consumer dies, and `Died` is
        raised: by this step, or by the next one, where the thread that acknowledges met the point after this one had
        ended.
        """
        try:
            if self._pass is None:
                self._pass = _steps(self.link)
            with ExitStack() as exits:
                if point is not None:
                    exits.enter_context(POINTS[point].struck_by(fault or self._drop_dead))
                taken = next(self._pass)
        except BaseException as error:
            has_died = self._has_died
            self.close()
            if has_died:
                # Another thread of the engine may have been the first to meet a dead connection.
                raise Died from error
            raise
        if self._has_died:
            # The thread that acknowledges met the point, and this one had nothing to wait for any more.
            self.close()
            raise Died
        if taken == "over":
            self._pass = None
        return taken

    def finish(self, death: str | None = None) -> None:
        """Take the steps that are left of this pass, or all of a new one."""
        while self.step(death) != "over":
            pass

    def die(self) -> None:
        """Shut every socket without a goodbye. The servers may notice it a moment later; see `bury`.

        The next step is that of a new worker.
        """
        if self._link is not None:
            shut_sockets(self._link)
        self.close()

    def bury(self) -> None:
        """Return when the servers have noticed that a dead worker's sessions are gone."""
        if self._link is None:
            for node in self._pair.nodes:
                wait_until_gone(node, self._backends.pop(node.name, []))

    def lose(self, node: Node, role: str) -> bool:
        """Let an administrator end the sessions that write ("writer") or the "reader"; tell whether there were any.

        By their names: a thread may be opening the second writer at this moment. Nobody else's are alive.
        """
        if self._link is None:
            return False
        # Waits for their end, up to the time given in milliseconds.
        statement = (
            "select coalesce(bool_or(pg_terminate_backend(pid, 20000)), false) from pg_stat_activity "
            "where datname = current_database() and application_name like %s"
        )
        return bool(node.value(statement, f"sync-pipeline sync %{role}"))

    def interrupt(self) -> None:
        """End the life as a stop in the middle of a pass does: cleanly, everything closed."""
        if self._pass is not None:
            steps, self._pass = self._pass, None
            with suppress(psycopg.Error, PassInterrupted):
                steps.close()
        self.close()

    def close(self) -> None:
        """Stop leading."""
        if self._link is not None:
            for name, side in self._link.sides.items():
                pids = [each.info.backend_pid for each in side.connections if not each.closed]
                self._backends.setdefault(name, []).extend(pids)
        self._link = None
        steps, self._pass = self._pass, None
        # What the engine's own clean-up meets on dead connections is of no interest to a dead worker.
        with suppress(psycopg.Error, PassInterrupted, Died):
            if steps is not None:
                steps.close()
        with suppress(psycopg.Error, PassInterrupted, Died):
            self._life.close()
        self._life = ExitStack()
        self._has_died = False

    def _drop_dead(self) -> None:
        self._has_died = True
        if self._link is not None:
            shut_sockets(self._link)
        raise Died


def shut_sockets(link: Link) -> None:
    """Shut the connections of a link under it; safe while other threads use them."""
    for side in link.sides.values():
        for connection in side.connections:
            if connection.closed:
                continue
            with socket.socket(fileno=os.dup(connection.fileno())) as twin, suppress(OSError):
                twin.shutdown(socket.SHUT_RDWR)


def wait_until_gone(node: Node, backends: list[int]) -> None:
    """Return when none of these processes of a server lives."""
    deadline = time.monotonic() + GONE_SECONDS
    while backends and node.value(
        "select count(*) from pg_stat_activity where pid = any (%s)", backends
    ):
        assert time.monotonic() < deadline, "the server keeps the sessions of a dead consumer"
        time.sleep(0.002)


def _steps(link: Link) -> Generator[str, None, None]:
    """One pass as `passes.run` makes it, step by step."""
    for source, target in link.config.directions:
        with passes.interruptions():
            if source.name not in link.unrecovered and not passes._has_work(link, source.name):
                continue
            with Pass(link, source.name, target.name) as one:
                one.fetch_dependents()
                yield f"{source.name} fetched"
                one.process_parents()
                yield f"{source.name} parents written"
                one.process_dependents()
        yield f"{source.name} done"
    yield "over"
