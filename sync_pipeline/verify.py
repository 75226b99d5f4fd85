"""Compare both nodes record by record, while applications and the consumer go on; repair by marking.

Each table is read once per side, in one snapshot of each, as hashes of buckets. Where buckets differ their records
are listed and merged. A record is accused only when nothing of it is pending on either side and a later look meets
the same two rows again: a difference that live traffic makes is pending or gone by then, a real one stays as it is.
"""

import heapq
import json
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter

import psycopg

from sync_pipeline import catalog, install, marks, queries
from sync_pipeline.comparison import Bucket, Record, Side
from sync_pipeline.config import Config
from sync_pipeline.database import Connection, error_class, in_words, query
from sync_pipeline.errors import CatalogMismatch, PassInterrupted, SyncPipelineError

LISTED = 1000
CHUNK = 5000
LOOKS = 5
IN_MEMORY_BYTES = 4 * 1024 * 1024
CANCEL_TIMEOUT_SECONDS = 0.5
EMPTY = Bucket()

# A record's id and the hashes of its rows on the first and on the second node, None without one.
Suspect = tuple[str, str | None, str | None]


class Spool:
    """Records in the order they were added, beyond some megabytes on disk."""

    def __init__(self) -> None:
        # Closed with this object, which nobody has to remember to do.
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, "w+", encoding="utf-8")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._last: list[Suspect] = []
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._last)

    def add(self, suspect: Suspect) -> None:
        """Add one record."""
        self._last.append(suspect)
        if len(self._last) == CHUNK:
            self._file.write(json.dumps(self._last) + "\n")
            self._written += CHUNK
            self._last = []

    def chunks(self) -> Iterator[list[Suspect]]:
        """Yield all records, a bounded number at a time."""
        self._file.seek(0)
        for line in self._file:
            yield [(record_id, one, two) for record_id, one, two in json.loads(line)]
        if self._last:
            yield self._last


@dataclass
class TableReport:
    """How a table compares. The lists name at most 1000 records each, the counts count all.

    `missing` has by node the ids of records that this node lacks; `pending` is how many records differ and wait to
    be synced, were refused or are held: they were left out.
    """

    table: str
    rows: dict[str, int]
    missing: dict[str, list[str]]
    different: list[str] = field(default_factory=list)
    missing_count: dict[str, int] = field(default_factory=dict)
    different_count: int = 0
    pending: int = 0
    accused: Spool = field(default_factory=Spool, repr=False, compare=False)

    @property
    def equal(self) -> bool:
        """True when no record was accused."""
        return self.different_count == 0 and not any(self.missing_count.values())

    def accuse(self, suspect: Suspect) -> None:
        """Note a record that differs: its row is missing on a node, or is not the same on both."""
        self.accused.add(suspect)
        record_id, *digests = suspect
        listed = self.different
        if None in digests:
            node = list(self.missing)[digests.index(None)]
            self.missing_count[node] += 1
            listed = self.missing[node]
        else:
            self.different_count += 1
        if len(listed) < LISTED:
            listed.append(record_id)


@dataclass
class VerifyReport:
    """How all compared tables compare."""

    tables: dict[str, TableReport] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """True when every table is."""
        return all(table.equal for table in self.tables.values())


def verify(
    config: Config,
    connections: Mapping[str, Connection],
    tables: Sequence[str] | None = None,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> VerifyReport:
    """Compare some tables, or all, and change nothing. `progress` hears each table's name and rows when it is done.

    Takes no lock that anybody would wait for. Raises `NotInstalled`, `CatalogMismatch`, or `PassInterrupted` when a
    connection is lost.
    """
    report = VerifyReport()
    for table in verify_each(config, connections, tables):
        report.tables[table.table] = table
        if progress is not None:
            progress(table.table, max(table.rows.values()))
    return report


def verify_each(
    config: Config, connections: Mapping[str, Connection], tables: Sequence[str] | None = None
) -> Iterator[TableReport]:
    """Like `verify`, but yield the report of each table when it is done."""
    names = [config.table(name).name for name in tables or [table.name for table in config.tables]]
    for node in config.nodes:
        try:
            install.require(config, node.name, connections[node.name])
        except psycopg.Error as error:
            raise SyncPipelineError(in_words(error), node=node.name) from error
    with _comparing():
        found = catalog.read(config, connections, only=names)
        encodings, portable = _hashing(config, connections)
        for name in dict.fromkeys(names):
            relations = [found.relation(node.name, name) for node in config.nodes]
            first, second = (
                Side(
                    connections[mine.node],
                    mine,
                    other,
                    config.schema_name,
                    encodings[mine.node],
                    portable,
                )
                for mine, other in (relations, reversed(relations))
            )
            yield _compare(first, second)


def repair(
    config: Config,
    connections: Mapping[str, Connection],
    report: VerifyReport,
    from_node: str,
    *,
    dry_run: bool,
) -> int:
    """Mark what differs on `from_node`, so that the next pass makes the other node like it; return how many records.

    A mark carries no data: what is sent is the row as it is then, and a record that has changed meanwhile is settled
    as any other. A record that `from_node` lacks is marked too, and deleted on the other. With `dry_run` nothing is
    marked. Raises when a table with differences is not sent from this node.
    """
    config.node(from_node)
    differing = [name for name, table in report.tables.items() if not table.equal]
    for name in differing:
        if not config.table(name).sends(from_node):
            other = config.other(from_node).name
            raise SyncPipelineError(
                f"{name} is not sent from {from_node}",
                node=from_node,
                remedy=f"repair it from {other}, and name the tables to repair from {from_node}",
            )
    if dry_run or not differing:
        return sum(len(report.tables[name].accused) for name in differing)
    marked = 0
    with _comparing():
        found = catalog.read(config, connections, only=differing)
        for name in differing:
            relation = found.relation(from_node, name)
            for chunk in report.tables[name].accused.chunks():
                ids = [record_id for record_id, _, _ in chunk]
                marked += marks.mark_keys(connections[from_node], config.schema_name, relation, ids)
    return marked


def _compare(first: Side, second: Side) -> TableReport:
    nodes = (first.relation.node, second.relation.node)
    suspects = Spool()
    with _snapshots(first, second):
        scans = _scans(first, second)
        report = TableReport(
            first.relation.table,
            rows={
                node: sum(bucket.rows for bucket in scan.values())
                for node, scan in zip(nodes, scans, strict=True)
            },
            missing={node: [] for node in nodes},
            missing_count=dict.fromkeys(nodes, 0),
        )
        buckets = [
            number
            for number in {**scans[0], **scans[1]}
            if not scans[0].get(number, EMPTY).equals(scans[1].get(number, EMPTY))
        ]
        with closing(_merge(first, second, buckets)) as records:
            for one, two in records if buckets else ():
                if one.digest == two.digest or "outside" in {one.state, two.state}:
                    continue
                if "pending" in {one.state, two.state}:
                    report.pending += 1
                else:
                    suspects.add((one.record_id, one.digest, two.digest))
    _look_again(first, second, suspects, report)
    return report


@contextmanager
def _snapshots(first: Side, second: Side) -> Iterator[None]:
    """Hold a snapshot of each node, taken as close to each other as can be, for a `with` block."""
    connections = (first.connection, second.connection)
    with ExitStack() as stack:
        for connection in connections:
            stack.enter_context(connection.transaction())
            connection.execute("set transaction isolation level repeatable read, read only")
        # A snapshot is taken by the first statement that reads.
        for connection in connections:
            connection.execute("select 1")
        yield


def _scans(first: Side, second: Side) -> tuple[dict[int, Bucket], dict[int, Bucket]]:
    with ThreadPoolExecutor(2, thread_name_prefix="verify") as pool:
        running = pool.submit(first.scan), pool.submit(second.scan)
        try:
            return running[0].result(), running[1].result()
        except BaseException:
            # An interrupted comparison must not wait for the scans to end.
            for side in (first, second):
                side.connection.cancel_safe(timeout=CANCEL_TIMEOUT_SECONDS)
            raise


def _merge(
    first: Side, second: Side, buckets: list[int]
) -> Generator[tuple[Record, Record], None, None]:
    """Yield each record of some buckets as it is on both sides, in the order of ids; one row at a time in memory."""
    with (
        closing(first.records(buckets)) as ones,
        closing(second.records(buckets)) as twos,
    ):
        with ThreadPoolExecutor(2, thread_name_prefix="verify") as pool:
            # Both servers sort at the same time.
            starts = list(pool.map(lambda records: list(islice(records, 1)), (ones, twos)))
        in_order = heapq.merge(
            ((record.record_id, 0, record) for record in chain(starts[0], ones)),
            ((record.record_id, 1, record) for record in chain(starts[1], twos)),
        )
        for record_id, group in groupby(in_order, key=itemgetter(0)):
            found = {side: record for _, side, record in group}
            absent = Record(record_id, None, "")
            yield found.get(0, absent), found.get(1, absent)


def _look_again(first: Side, second: Side, suspects: Spool, report: TableReport) -> None:
    """Accuse the suspects that a later look finds as they were; those that changed meanwhile get another look."""
    for _ in range(LOOKS):
        changing = Spool()
        for chunk in suspects.chunks():
            ids = [record_id for record_id, _, _ in chunk]
            ones, twos = first.look(ids), second.look(ids)
            for before in chunk:
                one, two = ones[before[0]], twos[before[0]]
                now = (one.record_id, one.digest, two.digest)
                if one.digest == two.digest or "outside" in {one.state, two.state}:
                    continue
                if "pending" in {one.state, two.state}:
                    report.pending += 1
                elif now == before:
                    report.accuse(now)
                else:
                    changing.add(now)
        suspects = changing
        if not suspects:
            return
    # Without an event and never twice the same: the nodes change it faster than anybody can look.
    report.pending += len(suspects)


def _hashing(config: Config, connections: Mapping[str, Connection]) -> tuple[dict[str, str], bool]:
    """Return each node's encoding, and whether their hash functions cannot be compared."""
    found = {}
    for node in config.nodes:
        statement = query(queries.get("read_hashing", config.schema_name))
        found[node.name] = connections[node.name].execute(statement).fetchall()[0]
    return {name: row[0] for name, row in found.items()}, len(set(found.values())) > 1


@contextmanager
def _comparing() -> Iterator[None]:
    """Turn what PostgreSQL raises into what the caller can do about it."""
    try:
        yield
    except psycopg.Error as error:
        summary = in_words(error)
        if error_class(error) == "transient":
            raise PassInterrupted(f"the comparison was interrupted: {summary}") from error
        raise CatalogMismatch(
            f"the tables cannot be compared: {summary}", remedy="run `sync-pipeline doctor`"
        ) from error
