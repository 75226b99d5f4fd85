"""One pass: the protocol. Read this module first; `docs/protocol.md` explains every crash window.

A direction, source to target: recover; fetch dependents, then parents, in one snapshot of the source; process
parents, then dependents, on the target in bounded batches, each one transaction with its ledger row; acknowledge
exactly the events that were read. Then the other direction, with its own snapshot.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psycopg

from sync_pipeline import ledger, outbox
from sync_pipeline.batch import Batch
from sync_pipeline.database import error_class
from sync_pipeline.errors import CatalogMismatch, PassInterrupted
from sync_pipeline.link import Link
from sync_pipeline.outbox import ALL, DELETES, UPSERTS, Part, Snapshot
from sync_pipeline.records import DirectionReport, TableBacklog


@dataclass
class Pass:
    """One direction of a pass: three stages, called in order inside a `with` block.

    The loop and Dagster's ops both call `fetch_dependents`, `process_parents` and `process_dependents`.
    """

    link: Link
    source: str
    target: str
    report: DirectionReport = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _backlog: dict[str, TableBacklog] = field(default_factory=dict, init=False)
    _fetched: list[Part] = field(default_factory=list, init=False)
    _batch: Batch | None = field(default=None, init=False)
    _fits_one_batch: bool = field(default=True, init=False)
    _ended: bool = field(default=False, init=False)
    _consumed: bool = field(default=True, init=False)
    # Parts whose rows are held, by identity: an interrupted pass leaves some that no batch has taken.
    _held: dict[int, Part] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.report = DirectionReport(self.source, self.target)
        self._side = self.link.sides[self.source]
        self._catalog = self.link.catalog
        self._schema = self.link.config.schema_name
        self._size = self.link.config.batch_size

    def __enter__(self) -> Self:
        self._acknowledger = Acknowledger(self.link, self.source, self.target)
        self._stack.callback(self._acknowledger.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            # Threads that read or acknowledge must not keep an interrupted pass, and so its locks, alive.
            self.link.cancel(self.source)
        for part in self._held.values():
            part.discard()
        self._stack.__exit__(kind, error, traceback)

    def fetch_dependents(self) -> DirectionReport:
        """Recover, open the one snapshot of this direction, and fetch what waits for dependents."""
        if self.source in self.link.unrecovered:
            target = self.link.sides[self.target].writer
            self.report.recovered = ledger.recover(
                self._side.writer, target, self._schema, self.source
            )
        self.link.unrecovered.add(self.source)
        self._snapshot: Snapshot = self._stack.enter_context(
            outbox.snapshot(self._side.reader, self._schema, self._catalog.relations[self.source])
        )
        self._backlog = self._known(self._snapshot.backlog(self._side.floor, self._size))
        if self._backlog:
            oldest = min(waiting.oldest_at for waiting in self._backlog.values())
            lag = (self._snapshot.read_at - oldest).total_seconds()
            self.report.lag_seconds = max(lag, 0.0)
        waiting = sum(table.events + table.due_failures for table in self._backlog.values())
        self._fits_one_batch = waiting <= self._size
        if self._fits_one_batch:
            dependents = [t for t in self._catalog.tables if t not in self._catalog.parents]
            self._fetched = list(self._parts(dependents, ALL))
            with self._invalid_keys_end_the_pass():
                for part in self._fetched:
                    self._read(part)
        return self.report

    def process_parents(self) -> DirectionReport:
        """Fetch parents from the same snapshot and process them."""
        if self._ended or not self._backlog:
            return self.report
        parents = [t for t in self._catalog.tables if t in self._catalog.parents]
        with self._invalid_keys_end_the_pass():
            if self._fits_one_batch:
                for part in self._parts(parents, ALL):
                    self._read(part)
                    self._fetched.append(part)
                self._batch = self._stack.enter_context(self._new_batch(self._fetched))
                self._batch.upsert(parents)
            else:
                self._drain(self._upsert_phase(parents))
        return self.report

    def process_dependents(self) -> DirectionReport:
        """Process dependents, then what was deleted, and wait until the source has acknowledged everything."""
        if self._ended:
            return self.report
        if self._batch is not None:
            self._commit(self._batch)
        elif self._backlog:
            tables = self._catalog.tables
            dependents = [t for t in tables if t not in self._catalog.parents]
            with self._invalid_keys_end_the_pass():
                self._drain(self._upsert_phase(dependents))
                # Children first, and only now: no parent goes before its last child is gone or moved.
                gone = [t for t in reversed(tables) if t in self._catalog.referenced]
                self._drain(self._parts(gone, DELETES))
        self._acknowledger.finish()
        self.link.unrecovered.discard(self.source)
        if self._consumed:
            greatest = max((waiting.last_id for waiting in self._backlog.values()), default=0)
            self._side.consumed(greatest, self._snapshot.moment)
        return self.report

    def _known(self, backlog: dict[str, TableBacklog]) -> dict[str, TableBacklog]:
        """Return the backlog of synced tables; what nobody syncs from here is set aside where it can be seen."""
        known = {}
        sent = {table.name for table in self.link.config.tables if table.sends(self.source)}
        self.report.warnings += self._catalog.warnings
        for name, waiting in backlog.items():
            if name in sent and name in self._catalog.left_out:
                # The table is missing on a node, perhaps for a moment: its events wait, and cost no attempt.
                self._consumed = False
            elif name in sent:
                known[name] = waiting
            else:
                reason = f"no table {name!r} is synced from {self.source}"
                self.report.set_aside += outbox.set_aside_unknown(
                    self._side.writer, self._schema, name, reason
                )
        return known

    def _upsert_phase(self, tables: list[str]) -> Iterator[Part]:
        for table in tables:
            # What other tables refer to is deleted at the very end, what nothing refers to at once.
            types = UPSERTS if table in self._catalog.referenced else ALL
            yield from self._parts([table], types)

    def _parts(self, tables: list[str], event_types: tuple[str, ...]) -> Iterator[Part]:
        for table in tables:
            waiting = self._backlog.get(table)
            if waiting is None:
                continue
            after = waiting.first_id - 1
            if event_types == DELETES and not waiting.deletes:
                after = waiting.last_id
            if waiting.ids is not None and event_types == ALL:
                yield Part(
                    table, ALL, waiting.ids, waiting.events, waiting.inserts, after, waiting.last_id
                )
                after = waiting.last_id
            while after < waiting.last_id and (
                part := self._snapshot.next_part(
                    table, event_types, after, waiting.last_id, self._size
                )
            ):
                after = part.last_id
                yield part
            if waiting.due_failures:
                yield from self._snapshot.due_failures(table, self._size, event_types)

    def _read(self, part: Part, first_number: int | None = None) -> int:
        start = sum(p.count for p in self._fetched) if first_number is None else first_number
        self._snapshot.read_rows(part, start)
        self._stack.callback(part.discard)
        return part.last_number + 1

    def _batches(self, parts: Iterator[Part]) -> Iterator[list[Part]]:
        """Gather parts into batches of bounded size and read their rows."""
        batch: list[Part] = []
        number = 0
        for part in parts:
            if batch and number + part.size > self._size:
                yield batch
                batch, number = [], 0
            self._held[id(part)] = part
            self._snapshot.read_rows(part, number)
            number = part.last_number + 1
            batch.append(part)
        if batch:
            yield batch

    def _drain(self, parts: Iterator[Part]) -> None:
        """Apply all parts, reading the next batch while the last is applied and the one before acknowledged."""
        with closing(_read_ahead(self._batches(parts))) as batches:
            for batch in batches:
                with self._new_batch(batch) as application:
                    application.upsert([])
                    self._commit(application)
                for part in batch:
                    part.discard()
                    del self._held[id(part)]

    def _new_batch(self, parts: list[Part]) -> Batch:
        return Batch(
            applier=self.link.applier(self.target),
            config=self.link.config,
            snapshot=self._snapshot,
            parts=parts,
            source=self.source,
            target=self.target,
            forget=self._acknowledger.acknowledged(),
            target_floor=self.link.sides[self.target].floor,
        )

    def _commit(self, batch: Batch) -> None:
        batch.finish()
        self._acknowledger.submit(batch)
        self.report.batches += 1
        self.report.events += sum(part.events for part in batch.parts)
        self._consumed = self._consumed and not batch.postponed
        for table, counts in batch.counts.items():
            self.report.table(table).add(counts)

    @contextmanager
    def _invalid_keys_end_the_pass(self) -> Iterator[None]:
        """Set aside events whose key is no key, found when the read of a batch fails; the next pass does the rest."""
        try:
            yield
        except outbox.ReadFailed as failure:
            relation = self._catalog.relation(self.source, failure.table)
            moved = outbox.set_aside_invalid_keys(
                self._side.writer, self._schema, relation, self._backlog[failure.table].last_id
            )
            if not moved:
                raise
            self.report.set_aside += moved
            self._ended = True


class Acknowledger:
    """Acknowledges batches on the source while the next one is applied to the target, in order."""

    def __init__(self, link: Link, source: str, target: str) -> None:
        self._link = link
        self._source = link.sides[source].writer
        self._target = link.sides[target].writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="acknowledge")
        self._running: list[tuple[int, Future[None]]] = []

    def submit(self, batch: Batch) -> None:
        """Acknowledge a committed batch. Waits for the one before: at most two are ever in the ledger."""
        for _, future in self._running:
            future.result()
        config = self._link.config
        future = self._pool.submit(
            outbox.acknowledge,
            self._source,
            config.schema_name,
            batch.outcomes,
            batch.ids,
            config.retry,
        )
        self._running.append((batch.ledger_id, future))

    def acknowledged(self) -> list[int]:
        """Return the ledger rows that are no longer needed; the next batch removes them in its transaction."""
        done = [
            number for number, future in self._running if future.done() and not future.exception()
        ]
        self._running = [(n, future) for n, future in self._running if n not in done]
        return done

    def finish(self) -> None:
        """Wait for every acknowledgement, then clear the ledger."""
        for _, future in self._running:
            future.result()
        numbers = [number for number, _ in self._running]
        self._running = []
        # Losing this in a crash is harmless: the next pass finds a batch whose events are gone.
        ledger.forget(self._target, self._link.config.schema_name, numbers)

    def close(self) -> None:
        """Let a running acknowledgement end; what was not acknowledged stays in the ledger."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def run(link: Link) -> list[DirectionReport]:
    """Run one pass: each direction that has something to do, one after the other.

    A direction is left out when its source has no events and no failure that is due, which one short query tells.
    Raises `PassInterrupted` for what a retry can mend.
    """
    reports = []
    for source, target in link.config.directions:
        with interruptions():
            if source.name not in link.unrecovered and not _has_work(link, source.name):
                continue
            with Pass(link, source.name, target.name) as one:
                one.fetch_dependents()
                one.process_parents()
                reports.append(one.process_dependents())
    return reports


def _has_work(link: Link, source: str) -> bool:
    side = link.sides[source]
    waiting, oldest_running = outbox.poll(side.writer, link.config.schema_name, side.floor)
    return waiting or side.floor_can_rise(oldest_running)


@contextmanager
def interruptions() -> Iterator[None]:
    """Turn what PostgreSQL raises into what the caller can do about it."""
    try:
        yield
    except psycopg.Error as error:
        text = str(error).strip().splitlines()
        summary = text[0] if text else type(error).__name__
        if error_class(error) == "transient":
            raise PassInterrupted(f"the pass was interrupted: {summary}") from error
        raise CatalogMismatch(
            f"the pass met something it does not expect: {summary}",
            remedy="run `sync-pipeline doctor`",
        ) from error
    except outbox.ReadFailed as error:
        raise CatalogMismatch(
            f"{error}: {error.__cause__}".splitlines()[0], remedy="run `sync-pipeline doctor`"
        ) from error


def _read_ahead(batches: Iterator[list[Part]]) -> Generator[list[Part], None, None]:
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch
