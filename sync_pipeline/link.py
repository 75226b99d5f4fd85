"""The open connections of a link, held by the one consumer that leads: a writer with the lock and a reader per node.

While a backlog is drained, its target has a second writer with a lock of its own: one batch is staged there while the
other writer applies the one before.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import psycopg

from sync_pipeline import catalog, conflicts, identity, install, locks, queries
from sync_pipeline.applier import Applier
from sync_pipeline.config import Config, NodeConfig
from sync_pipeline.database import Connection, Question, connect, query
from sync_pipeline.errors import (
    CatalogMismatch,
    ConnectionFailed,
    PassInterrupted,
    TableMissing,
)
from sync_pipeline.records import Moment
from sync_pipeline.snapshot import LAST_ID

CANCEL_TIMEOUT_SECONDS = 0.5
WORTHWHILE_ROWS = 500


@dataclass
class Side:
    """One node of an open link.

    No event with an id up to `floor` exists or will come, so polls need not pass the dead rows there. A floor is
    proven in two steps. The greatest id of a snapshot becomes the candidate, with the number of a later transaction:
    whoever was handed a smaller id has a smaller number, since a trigger runs in a transaction that has already
    written. Once a later snapshot, taken when all of those had ended, has been consumed whole, the candidate is the
    floor. (A snapshot's own bounds would not do: its upper one only says which transaction was the last to end.)
    """

    node: NodeConfig
    writer: Connection
    reader: Connection
    leader: locks.Leader
    second_writer: Connection | None = None
    # Whether consumption was paused here when this was last asked.
    is_paused: bool = False
    floor: int = 0
    _candidate: tuple[int, int] | None = None

    @property
    def connections(self) -> list[Connection]:
        """Every open connection to the node."""
        found = [self.writer, self.reader]
        return found if self.second_writer is None else [*found, self.second_writer]

    def consumed(self, greatest_id: int, moment: Moment, later: int | None) -> None:
        """Note that everything in a snapshot has been consumed, and a transaction that began after it, if one did."""
        if self._candidate is not None and moment.oldest_running >= self._candidate[1]:
            self.floor = self._candidate[0]
            self._candidate = None
        if self._candidate is None and later is not None:
            self._candidate = (max(greatest_id, self.floor), later)

    def floor_can_rise(self, oldest_running: int) -> bool:
        """True when one more look would prove a floor that saves polls from many dead rows."""
        return (
            self._candidate is not None
            and self._candidate[0] - self.floor > WORTHWHILE_ROWS
            and oldest_running >= self._candidate[1]
        )

    def forget_floor(self) -> None:
        """Look at everything again."""
        self.floor = 0
        self._candidate = None


@dataclass
class Link:
    """Two nodes, led by this process. Make one with `lead`."""

    config: Config
    sides: dict[str, Side]
    catalog: catalog.Catalog
    generation: int = 0
    # Sources whose last batches may be committed on the other node but not acknowledged.
    unrecovered: set[str] = field(default_factory=set)
    _appliers: dict[tuple[str, bool], Applier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        statement = queries.get("read_poll", self.config.schema_name)
        self._questions = {
            name: Question(side.writer, "sync_pipeline_poll", statement)
            for name, side in self.sides.items()
        }

    @property
    def writers(self) -> dict[str, Connection]:
        """The writer connection of each node."""
        return {name: side.writer for name, side in self.sides.items()}

    def applier(self, node: str, *, second: bool = False) -> Applier:
        """Return what writes to a node, for the catalog as it was last read: by its writer, or by the second one."""
        if (node, second) not in self._appliers:
            side = self.sides[node]
            connection = self._second_writer(side) if second else side.writer
            self._appliers[node, second] = Applier(connection, self.catalog, node, self.generation)
        return self._appliers[node, second]

    def _second_writer(self, side: Side) -> Connection:
        if side.second_writer is None:
            try:
                connection = connect(side.node, self.config, "second writer")
            except ConnectionFailed as error:
                raise PassInterrupted(
                    f"the second writer {error.problem}", node=side.node.name
                ) from error
            try:
                locks.take_second(connection, side.leader, self.config, side.node.name)
            except BaseException:
                _release(connection, self.config)
                connection.close()
                raise
            side.second_writer = connection
        return side.second_writer

    def read_catalog(self) -> None:
        """Read both catalogs again; where they changed, forget what was composed from the old ones."""
        found = catalog.read(self.config, self.writers, forgive=CatalogMismatch)
        if found != self.catalog:
            self.catalog = found
            self.generation += 1
            self._appliers = {}
            for side in self.sides.values():
                for connection in side.connections:
                    connection.execute("discard temp")
        for side in self.sides.values():
            for connection in side.connections:
                # A plan that was made for an empty table must not outlive it, should nobody analyse the table.
                connection.execute("discard plans")
        self.revive()
        for name, side in self.sides.items():
            # An event inserted by hand can have any id: now and then a look goes below the floor.
            waiting, _ = self.poll(name, floor=0)
            if waiting:
                side.forget_floor()

    def is_outdated(self, node: str, table: str) -> bool:
        """True when the columns of a table are no longer those that the catalog had when it was read."""
        current = catalog.read(self.config, self.writers, forgive=CatalogMismatch)
        found = current.relations[node].get(table)
        return found is None or found.columns != self.catalog.relation(node, table).columns

    def revive(self) -> None:
        """Retry what was set aside because its table was not synced, where it is now."""
        for name, side in self.sides.items():
            side.writer.execute(
                query(queries.get("revive_failures", self.config.schema_name)),
                {"tables": [t for t in self.catalog.tables if self.config.table(t).sends(name)]},
            )

    def prune_conflicts(self) -> None:
        """Delete settled conflicts that are older than the retention."""
        for side in self.sides.values():
            conflicts.prune(
                side.writer, self.config.schema_name, self.config.conflict_retention_days
            )

    def cancel(self) -> None:
        """Cancel what runs on the link's connections."""
        for side in self.sides.values():
            for connection in side.connections:
                _cancel(connection)

    def poll(self, node: str, floor: int) -> tuple[bool, int]:
        """Return whether events of a node wait or a failure is due, and the oldest transaction that runs there."""
        waiting, paused, oldest_running = self._questions[node].ask(floor)
        self.sides[node].is_paused = paused == "true"
        return waiting == "true", int(oldest_running)

    def is_paused(self) -> bool:
        """Ask whether an operator paused consumption on either node."""
        for node in self.sides:
            # No event is looked for: a consumer that begins would pass all that are dead.
            self.poll(node, LAST_ID)
        return self.was_paused

    @property
    def was_paused(self) -> bool:
        """Whether consumption was paused on either node when it was last asked: by each look for work, too."""
        return any(side.is_paused for side in self.sides.values())


@contextmanager
def lead(config: Config, *, standing_by: bool = False, again: bool = False) -> Iterator[Link]:
    """Connect to both nodes, take both locks, and hold them for a `with` block.

    Who is `standing_by` asks for one lock again and again: then nothing else is opened before it is taken. A missing
    table is left out; for who leads `again`, so is every table that can no longer be synced, and the others go on.

    Raises `LockTaken` when another consumer leads, `PoolerRefused` behind a pooler that shares sessions,
    `NotInstalled`, `WrongDatabase` where a dsn leads to another database than the one that was installed or to one
    that has lost commits, `ConnectionFailed`, `CatalogMismatch`. At the end running statements are cancelled, so that
    the locks are free at once even after an interruption.
    """
    with ExitStack() as stack:
        first, second = config.nodes
        wanted = [(first, "writer"), (first, "reader"), (second, "writer"), (second, "reader")]
        opened = _open(wanted[:1] if standing_by else wanted, config, stack)
        leaders = {first.name: _take(opened[first.name, "writer"], config, first, stack)}
        if standing_by:
            opened |= _open(wanted[1:], config, stack)
        writers = {node.name: opened[node.name, "writer"] for node in config.nodes}
        identity.refuse_one_database(config, writers)
        leaders[second.name] = _take(writers[second.name], config, second, stack)
        identity.require_commits(config, writers)
        sides = {
            node.name: Side(
                node, writers[node.name], opened[node.name, "reader"], leaders[node.name]
            )
            for node in config.nodes
        }
        for side in sides.values():
            stack.callback(_close_second, side, config)
        found = catalog.read(config, writers, forgive=CatalogMismatch if again else TableMissing)
        link = Link(config, sides, found, unrecovered=set(sides))
        link.revive()
        yield link


def _open(
    wanted: list[tuple[NodeConfig, str]], config: Config, stack: ExitStack
) -> dict[tuple[str, str], Connection]:
    """Open connections all at once, each to a node and for a role; the stack closes them."""
    with ThreadPoolExecutor(len(wanted)) as pool:
        opening = {
            (node.name, role): pool.submit(connect, node, config, role) for node, role in wanted
        }
    for each in opening.values():
        if each.exception() is None:
            stack.callback(_close, each.result())
    return {key: each.result() for key, each in opening.items()}


def _take(writer: Connection, config: Config, node: NodeConfig, stack: ExitStack) -> locks.Leader:
    """Take a node's lock, where this is the database that was installed as this node."""
    locks.refuse_shared_sessions(writer, node)
    install.require(config, node.name, writer)
    identity.require(config, node.name, writer)
    leader = locks.take(writer, config, node.name)
    stack.callback(_release, writer, config)
    writer.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    return leader


def _release(connection: Connection, config: Config) -> None:
    """Give a lock back before closing, where nothing runs: a server notices a closed connection a moment later."""
    with suppress(psycopg.Error):
        if connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            locks.release(connection, config)


def _close_second(side: Side, config: Config) -> None:
    if side.second_writer is not None:
        _release(side.second_writer, config)
        _close(side.second_writer)


def _close(connection: Connection) -> None:
    _cancel(connection)
    connection.close()


def _cancel(connection: Connection) -> None:
    with suppress(Exception):
        if connection.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
            connection.cancel_safe(timeout=CANCEL_TIMEOUT_SECONDS)
