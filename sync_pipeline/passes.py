"""One pass: the protocol. Read this module first; `docs/protocol.md` explains every crash window.

A direction, source to target: recover; fetch dependents, then parents, in one snapshot of the source; process
parents, then dependents, on the target in bounded batches, each one transaction with its ledger row; acknowledge
exactly the events that were read. Then the other direction, with its own snapshot.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

import psycopg

from sync_pipeline import clocks, ledger, outbox, snapshot
from sync_pipeline.batch import Batch
from sync_pipeline.database import error_class, in_words, node_of
from sync_pipeline.errors import CatalogMismatch, PassInterrupted, TableAltered
from sync_pipeline.link import Link
from sync_pipeline.records import DirectionReport
from sync_pipeline.snapshot import Intake, ReadFailed, Snapshot
from sync_pipeline.waiting import Waiting


@dataclass
class Pass:
    """One direction of a pass: three stages, called in order inside a `with` block.

    The loop and Dagster's ops both call `fetch_dependents`, `process_parents` and `process_dependents`. The first
    batch goes through them in this order; what is more than a batch follows in the last, one batch at a time.
    """

    link: Link
    source: str
    target: str
    report: DirectionReport = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _intakes: Iterator[Intake] = field(default_factory=lambda: iter(()), init=False)
    _first: Intake | None = field(default=None, init=False)
    _batch: Batch | None = field(default=None, init=False)
    _ahead: "Ahead | None" = field(default=None, init=False)
    _last_id: int = field(default=0, init=False)
    _not_won: set[tuple[str, str, str | None]] = field(default_factory=set, init=False)
    # Of the first and of the second writer.
    _waiting: dict[bool, Waiting] = field(default_factory=dict, init=False)
    _ended: bool = field(default=False, init=False)
    _consumed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.report = DirectionReport(self.source, self.target)
        self._side = self.link.sides[self.source]
        self._catalog = self.link.catalog
        self._schema = self.link.config.schema_name
        self._size = self.link.config.batch_size
        parents = self._catalog.parents
        self._parents = [table for table in self._catalog.tables if table in parents]
        self._dependents = [table for table in self._catalog.tables if table not in parents]

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
            self.link.cancel()
        if self._first is not None:
            self._first.close()
        self._stack.__exit__(kind, error, traceback)

    def fetch_dependents(self) -> DirectionReport:
        """Recover, open the one snapshot of this direction, and read what the first batch takes of dependents."""
        for source, target in self.link.config.directions:
            # Both directions: what this target has sent, unacknowledged, would look like changes that nobody has seen.
            if source.name in self.link.unrecovered:
                sides = self.link.sides[source.name], self.link.sides[target.name]
                self.report.recovered += ledger.recover(
                    sides[0].writer, sides[1].writer, self._schema, source.name
                )
        self.link.unrecovered.add(self.source)
        self._snapshot: Snapshot = self._stack.enter_context(
            snapshot.opened(self._side.reader, self._schema, self._catalog.relations[self.source])
        )
        self._intakes = self._all_intakes()
        self._first = next(self._intakes, None)
        if self._first is not None:
            if self._first.oldest_at is not None:
                lag = (self._snapshot.read_at - self._first.oldest_at).total_seconds()
                self.report.lag_seconds = max(lag, 0.0)
            with self._unreadable_records_end_the_pass():
                self._read(self._first, self._dependents)
        return self.report

    def process_parents(self) -> DirectionReport:
        """Read what the first batch takes of parents, from the same snapshot; upsert them on the target."""
        if self._first is not None and not self._ended:
            with self._unreadable_records_end_the_pass():
                with closing(self._first):
                    self._read(self._first, self._parents)
                    self._snapshot.let_go()
                    self._ahead = Ahead(self._further())
                    self._stack.callback(self._ahead.close)
                    self._batch = self._staged(self._first)
                self._stack.callback(self._batch.close)
                self._compare_clocks(self._batch)
                self._batch.upsert(self._parents, settled=set())
        return self.report

    def process_dependents(self) -> DirectionReport:
        """Process dependents and deletes, then all further batches; wait until the source has acknowledged them."""
        if self._ended:
            return self.report
        with self._unreadable_records_end_the_pass():
            if self._batch is not None and self._ahead is not None:
                last = self._batch
                self._commit(last)
                for batch in self._ahead:
                    with closing(batch):
                        batch.upsert(self._parents, last.settled)
                        self._commit(batch)
                    last = batch
            self._consumed = not self._catalog.left_out and not self.report.paused
        self._acknowledger.finish()
        self.link.unrecovered.discard(self.source)
        for waiting in self._waiting.values():
            waiting.close()
        if self._consumed:
            moment = self._snapshot.moment
            self._side.consumed(self._last_id, moment, self._acknowledger.transaction)
        return self.report

    def _compare_clocks(self, batch: Batch) -> None:
        difference = self._snapshot.clock.difference(batch.clock)
        limit = self.link.config.clock_warning_seconds
        if difference is not None:
            self.report.clock_difference_seconds = difference.seconds
            if difference.exceeds(limit):
                self.report.clock_warning = clocks.warning(
                    self.source, self.target, difference, limit
                )

    # --- reading ---

    def _all_intakes(self) -> Iterator[Intake]:
        """Yield what each batch takes: events in the order of their ids, and failures that are due where they fit."""
        self.report.warnings += self._catalog.warnings
        retries = [self._known(intake) for intake in self._snapshot.retries(self._size)]
        ignored = list(self._catalog.left_out)
        after = self._side.floor
        while intake := self._snapshot.intake(after, self._size, ignored):
            if unknown := self._set_aside_unknown(intake):
                ignored += unknown
                continue
            after = self._last_id = intake.last_id
            is_full = intake.size == self._size
            if retries and intake.size + retries[0].size <= self._size:
                intake.parts += retries.pop(0).parts
            yield intake
            if not is_full:
                break
        yield from (intake for intake in retries if intake.parts)

    def _known(self, intake: Intake) -> Intake:
        """Leave out failures of tables that are missing on a node, for now, or that nobody syncs from here."""
        unknown = self._set_aside_unknown(intake)
        intake.parts = [
            part
            for part in intake.parts
            if part.table not in unknown and part.table not in self._catalog.left_out
        ]
        return intake

    def _set_aside_unknown(self, intake: Intake) -> list[str]:
        """Set aside, where it can be seen, what waits for tables that nobody syncs from here; return their names."""
        sent = {table.name for table in self.link.config.tables if table.sends(self.source)}
        unknown = list(dict.fromkeys(p.table for p in intake.parts if p.table not in sent))
        for table in unknown:
            reason = f"no table {table!r} is synced from {self.source}"
            self.report.set_aside += self._acknowledger.run(
                partial(outbox.set_aside_unknown, self._side.writer, self._schema, table, reason)
            )
        return unknown

    def _read(self, intake: Intake, tables: list[str]) -> None:
        for part in intake.of(tables):
            self._snapshot.read_rows(part, intake.last_number + 1)

    def _further(self) -> Iterator[Batch]:
        """Read and stage further batches, one when it is asked for, in turn on the two writers of the target."""
        second = True
        for intake in self._intakes:
            with closing(intake):
                self._read(intake, [*self._dependents, *self._parents])
                self._snapshot.let_go()
                batch = self._staged(intake, second=second)
            if batch.is_paused:
                batch.close()
                self.report.paused = True
                return
            yield batch
            second = not second

    @contextmanager
    def _unreadable_records_end_the_pass(self) -> Iterator[None]:
        """Set aside what made the read of a batch fail; the next pass does the rest."""
        try:
            yield
        except ReadFailed as failure:
            table = failure.part.table
            outdated = partial(self.link.is_outdated, self.source, table)
            if self._acknowledger.run(outdated):
                raise CatalogMismatch(
                    "its columns have changed", node=self.source, table=table
                ) from failure
            at = self._side.writer, self._schema, self._catalog.relation(self.source, table)
            moved = self._acknowledger.run(partial(outbox.set_aside_invalid_keys, *at))
            if not moved:
                moved = self._acknowledger.run(
                    partial(outbox.set_aside_unreadable, *at, failure.part)
                )
            if not moved:
                raise
            self.report.set_aside += moved
            self._ended = True

    # --- writing ---

    def _staged(self, intake: Intake, *, second: bool = False) -> Batch:
        applier = self.link.applier(self.target, second=second)
        if second not in self._waiting:
            floor = self.link.sides[self.target].floor
            self._waiting[second] = Waiting(applier.connection, self._schema, floor)
        return Batch(
            applier=applier,
            config=self.link.config,
            snapshot=self._snapshot,
            intake=intake,
            source=self.source,
            target=self.target,
            forget=self._acknowledger.acknowledged,
            waiting=self._waiting[second],
            not_won=self._not_won,
        ).stage()

    def _commit(self, batch: Batch) -> None:
        batch.finish()
        self._acknowledger.submit(batch)
        self.report.batches += 1
        self.report.events += batch.intake.events
        for table, counts in batch.counts.items():
            self.report.table(table).add(counts)


class Ahead:
    """Prepares batches in a thread of its own: the next one is read and staged while the caller works on the last."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._upcoming = self._prepare()

    def _prepare(self) -> Future[Batch | None]:
        return self._pool.submit(next, self._batches, None)

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._upcoming.result()) is not None:
            self._upcoming = self._prepare()
            yield batch

    def close(self) -> None:
        """Wait for the thread to end, and roll back a batch that nobody has asked for."""
        self._pool.shutdown(wait=True)
        if self._upcoming.exception() is None and (batch := self._upcoming.result()) is not None:
            batch.close()


class Acknowledger:
    """Writes to the source in a thread of its own: acknowledges a batch while the next one is applied, in order."""

    def __init__(self, link: Link, source: str, target: str) -> None:
        self._link = link
        self._source = link.sides[source].writer
        self._target = link.sides[target]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="acknowledge")
        self._running: list[tuple[int, Future[None]]] = []
        # The number of the last transaction that acknowledged.
        self.transaction: int | None = None

    def run(self, work: Callable[[], int]) -> int:
        """Let something else use the connection to the source, after what is under way."""
        return self._pool.submit(work).result()

    def submit(self, batch: Batch) -> None:
        """Acknowledge a committed batch. Waits for the one before: at most two are ever in the ledger."""
        for _, future in self._running:
            future.result()
        self._running.append((batch.ledger_id, self._pool.submit(self._acknowledge, batch)))

    def _acknowledge(self, batch: Batch) -> None:
        # The target's commit did not wait for its disk. The source forgets nothing before the target is sure.
        ledger.make_durable(self._target.reader)
        config = self._link.config
        self.transaction = outbox.acknowledge(
            self._source,
            config.schema_name,
            batch.intake.ids,
            batch.outcomes,
            config.retry,
            batch.ledger_id,
            batch.snapshot.read_at,
        )

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
        ledger.forget(self._target.writer, self._link.config.schema_name, numbers)

    def close(self) -> None:
        """Let a running acknowledgement end; what was not acknowledged stays in the ledger."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def run(link: Link) -> list[DirectionReport]:
    """Run one pass: each direction that has something to do, one after the other.

    A direction is left out when its source has no events and no failure that is due, which one short query tells. When
    an operator pauses the link, no direction begins, and one that has begun ends after the batch that is under way and
    the one that is staged already. Raises `PassInterrupted` for what a retry can mend.
    """
    reports = []
    for source, target in link.config.directions:
        with interruptions():
            if source.name not in link.unrecovered and not _has_work(link, source.name):
                continue
            if link.was_paused:
                break
            try:
                reports.append(_direction(link, source.name, target.name))
            except TableAltered:
                link.read_catalog()
                reports.append(_direction(link, source.name, target.name))
        if reports and reports[-1].paused:
            break
    return reports


def _direction(link: Link, source: str, target: str) -> DirectionReport:
    with Pass(link, source, target) as one:
        one.fetch_dependents()
        one.process_parents()
        return one.process_dependents()


def _has_work(link: Link, source: str) -> bool:
    side = link.sides[source]
    waiting, oldest_running = link.poll(source, side.floor)
    return waiting or side.floor_can_rise(oldest_running)


@contextmanager
def interruptions() -> Iterator[None]:
    """Turn what PostgreSQL raises into what the caller can do about it."""
    try:
        yield
    except psycopg.Error as error:
        summary, node = in_words(error), node_of(error)
        if error_class(error) == "transient":
            raise PassInterrupted(f"the pass was interrupted: {summary}", node=node) from error
        raise CatalogMismatch(
            f"the pass met something it does not expect: {summary}",
            node=node,
            remedy="run `sync-pipeline doctor`",
        ) from error
    except ReadFailed as error:
        reason = in_words(error.__cause__) if isinstance(error.__cause__, psycopg.Error) else ""
        raise CatalogMismatch(f"{error}: {reason}", remedy="run `sync-pipeline doctor`") from error
