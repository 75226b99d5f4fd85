"""A long run: applications on both sides, two consumers, and a fault every few seconds. `make soak` runs it.

`SOAK_MINUTES` says how long, `SOAK_SEED` repeats the choices of a run (not its timing). Ends with a report, and with an
error when the two sides differ or a write of an application is nowhere to be found.
"""

import os
import random
import secrets
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from sync_pipeline import stream
from sync_pipeline.servers import Server
from tests import disputes
from tests.bookkeeping import ORPHANS
from tests.clients import (
    PARENTS,
    TABLES,
    TRACED,
    UNIQUE,
    Client,
    Effects,
    assert_nothing_is_lost,
)
from tests.engine import config_of, equal, installed
from tests.helpers import NODES, Cluster, Node, Pair, write_config
from tests.program import PROGRAM, variables

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
CLIENTS_PER_NODE = 2
CONSUMERS = 2
KEYS = range(1, 200)
FIRST_PROBE = 1_000_000
PAUSE_SECONDS = 0.02
LOCK_TIMEOUT_SECONDS = 2.0
FAULT_EVERY_SECONDS = (1.0, 5.0)
FAULT_LASTS_SECONDS = (0.2, 3.0)
PROBE_PATIENCE_SECONDS = 120.0
SETTLING_ROUNDS = 20
PROBED = "select exists (select from accounts where id = %s)"
SESSIONS = """
select pid from pg_stat_activity
where application_name like 'sync-pipeline %' and datname = current_database()
"""
UNKNOWN_TABLE = "no such; table --"
NO_KEYS = ["1'; drop table users; --", "99999999999999999999"]


@dataclass
class Books:
    """What happened; each thread adds to counters of its own name."""

    done: list[Effects] = field(default_factory=list)
    unsure: list[Effects] = field(default_factory=list)
    load: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    lag: list[float] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    dice: random.Random = field(default_factory=random.Random)


class Consumer:
    """A process that runs `sync-pipeline stream`, again whenever it was killed."""

    def __init__(self, pair: Pair, log: Path) -> None:
        self._pair = pair
        self.log = log
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*PROGRAM, "stream", "--config", str(self._pair.config_path)],
                env=variables(self._pair),
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """Kill it without warning and start the next."""
        self._process.kill()
        self._process.wait()
        self._process = self._start()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ended(self) -> bool:
        """Whether it ended by itself, which nothing should make it do."""
        return self._process.poll() is not None

    def stop(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(60)


def apply_one_change(client: Client, dice: random.Random) -> str:
    """Do one thing that applications do; return its name."""
    table, key, other = dice.choice(TABLES), dice.choice(KEYS), dice.choice(KEYS)
    does = dice.choices(
        ["insert", "update", "delete", "move", "change key", "exchange", "hold", "end", "truncate"],
        [40, 40, 6, 10, 4, 4, 3, 6, 0.05],
    )[0]
    if does == "insert":
        client.insert(table, key, other)
    elif does == "update":
        client.update(table, key)
    elif does == "delete":
        client.delete(table, key)
    elif does == "move" and table in PARENTS:
        client.move(table, key, other)
    elif does == "change key":
        client.rename(table, key, other)
    elif does == "exchange" and table in UNIQUE:
        client.exchange(table, list({key, other, dice.choice(KEYS)}))
    elif does == "hold":
        client.begin()
    elif does == "end":
        client.end(commits=dice.random() < 0.7)
    elif does == "truncate":
        client.truncate_orders()
    return does


def be_an_application(node: Node, books: Books, stop: threading.Event, seed: int) -> None:
    """Change records until told to stop; come back after each lost connection."""
    dice = random.Random(seed)
    done, unsure = Effects(), Effects()
    books.done.append(done)
    books.unsure.append(unsure)
    while not stop.is_set():
        try:
            client = Client(node, done, LOCK_TIMEOUT_SECONDS, unsure)
        except psycopg.Error:
            stop.wait(0.2)
            continue
        try:
            while not stop.is_set():
                books.load[apply_one_change(client, dice)] += 1
                stop.wait(dice.uniform(0, PAUSE_SECONDS))
            client.end(commits=True)
        except psycopg.Error as error:
            books.load[f"refused: {type(error).__name__}"] += 1
        finally:
            client.close()


def probe(source: Node, target: Node, books: Books, stop: threading.Event, first: int) -> None:
    """Insert a row on one side and see when it is on the other; faults in between count."""
    number = first
    while not stop.is_set():
        number += 1
        with suppress(psycopg.Error), source.connect() as connection:
            connection.execute("insert into accounts (id, name) values (%s, 'probe')", [number])
            began = time.monotonic()
            while time.monotonic() - began < PROBE_PATIENCE_SECONDS and not stop.is_set():
                if has_arrived(target, number):
                    books.lag.append(time.monotonic() - began)
                    break
                stop.wait(0.01)
        stop.wait(0.1)


def has_arrived(node: Node, number: int) -> bool:
    with suppress(psycopg.Error), node.connect() as connection:
        row = connection.execute(PROBED, [number]).fetchone()
        return row is not None and bool(row[0])
    return False


def be_hostile(node: Node, books: Books, stop: threading.Event, seed: int) -> None:
    """Write what nobody can apply: events for nothing, keys that are none, values that the other side refuses."""
    dice = random.Random(seed)
    event = (
        "insert into sync.sync_events (table_name, record_id, event_type) values (%s, %s, 'update')"
    )
    inputs: dict[str, tuple[str, list[object]]] = {
        "an unknown table": (event, [UNKNOWN_TABLE, "1"]),
        "a key that is none": (event, ["users", NO_KEYS[0]]),
        "a key out of range": (event, ["accounts", NO_KEYS[1]]),
        "an event for a record that is equal": (event, ["accounts", "1"]),
        "a value that the other side refuses": (
            "update users set age = 1000 where id = %s",
            [dice.choice(KEYS)],
        ),
    }
    while not stop.is_set():
        name = dice.choice(list(inputs))
        with suppress(psycopg.Error), node.connect() as connection:
            connection.execute("set lock_timeout = '2s'")
            connection.execute(inputs[name][0].encode(), inputs[name][1])
            books.bad[name] += 1
        stop.wait(dice.uniform(0.5, 2.0))


# --- faults ---


class Faults:
    """What strikes: each method is a fault that lasts for a moment and is then mended."""

    def __init__(
        self, pair: Pair, consumers: list[Consumer], books: Books, stop: threading.Event
    ) -> None:
        self._pair = pair
        self._consumers = consumers
        self._books = books
        self._stop = stop

    def strike_until_told_to_stop(self) -> None:
        dice = self._books.dice
        faults: list[Callable[[], None]] = [
            self.kill_a_consumer,
            self.stop_a_consumer_for_a_while,
            self.stop_a_consumer_and_give_its_place_away,
            self.stop_a_server_without_warning,
            self.end_a_session_of_the_consumer,
            self.pause_for_a_while,
            self.lock_a_table,
            self.change_the_schema_behind_a_reader,
            self.take_a_table_away_for_a_while,
        ]
        while not self._stop.is_set():
            self._stop.wait(dice.uniform(*FAULT_EVERY_SECONDS))
            fault = dice.choice(faults)
            try:
                fault()
            except psycopg.Error as error:
                self._books.faults[f"could not strike: {type(error).__name__}"] += 1
            else:
                self._books.faults[fault.__name__.replace("_", " ")] += 1
            for consumer in self._consumers:
                if consumer.ended():
                    self._books.unexpected.append(consumer.log.read_text("utf-8")[-2000:])
                    consumer.kill()

    def kill_a_consumer(self) -> None:
        self._consumer().kill()

    def stop_a_consumer_for_a_while(self) -> None:
        with self._stopped():
            self._wait()

    def stop_a_consumer_and_give_its_place_away(self) -> None:
        with self._stopped():
            for node in self._pair.nodes:
                self._run(node, f"select pg_terminate_backend(pid) from ({SESSIONS}) as sessions")
            self._wait()

    def stop_a_server_without_warning(self) -> None:
        server = self._node().server
        server.stop("immediate")
        self._wait()
        server.start()

    def end_a_session_of_the_consumer(self) -> None:
        self._run(
            self._node(),
            f"select pg_terminate_backend(pid) from ({SESSIONS}) as sessions order by random() limit 1",
        )

    def pause_for_a_while(self) -> None:
        node = self._node()
        self._run(node, "update sync.sync_node set paused_at = now()")
        self._wait()
        self._run(node, "update sync.sync_node set paused_at = null")

    def lock_a_table(self) -> None:
        with self._node().connect(autocommit=False) as connection:
            connection.execute(
                f"lock table {self._books.dice.choice(TABLES)} in exclusive mode".encode()
            )
            self._wait()

    def change_the_schema_behind_a_reader(self) -> None:
        node = self._node()
        with node.connect(autocommit=False) as reader, node.connect() as administrator:
            reader.execute("select from orders limit 1")
            administrator.execute("set lock_timeout = '1s'")
            with suppress(psycopg.errors.LockNotAvailable):
                administrator.execute("alter table orders alter column note set statistics 50")
            reader.rollback()
            administrator.execute("alter table orders alter column note set statistics 60")

    def take_a_table_away_for_a_while(self) -> None:
        node, table = self._node(), self._books.dice.choice(TABLES)
        self._run(node, f"alter table {table} rename to away")
        try:
            self._wait()
        finally:
            self._run(node, f"alter table away rename to {table}")

    def _consumer(self) -> Consumer:
        return self._books.dice.choice(self._consumers)

    def _node(self) -> Node:
        return self._books.dice.choice(self._pair.nodes)

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        consumer = self._consumer()
        consumer.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            consumer.signal(signal.SIGCONT)

    def _wait(self) -> None:
        self._stop.wait(self._books.dice.uniform(*FAULT_LASTS_SECONDS))

    def _run(self, node: Node, statement: str) -> None:
        with node.connect() as connection:
            connection.execute(statement.encode())


# --- the run ---


def settle(pair: Pair, books: Books) -> tuple[int, int]:
    """Cure what was poisoned or is disputed, retry what failed, sync; return how many were set aside, or conflicts."""
    for node in pair.nodes:
        node.execute("update sync.sync_node set paused_at = null")
        node.execute("update users set age = 1 where age >= 1000")
    done, aside, before = Effects(), 0, -1
    books.done.append(done)
    with ExitStack() as exits:
        clients = {node.name: Client(node, done, LOCK_TIMEOUT_SECONDS) for node in pair.nodes}
        for client in clients.values():
            exits.callback(client.close)
        for _ in range(SETTLING_ROUNDS):
            stream.sync(config_of(pair))
            left = 0
            for node in pair.nodes:
                # Events for nothing stay for good, as they should; no other record may be given up.
                aside += node.execute(
                    "delete from sync.sync_failures where table_name = %s or record_id = any (%s)",
                    UNKNOWN_TABLE,
                    NO_KEYS,
                ).rowcount
                assert node.rows("select * from sync.sync_failures where state = 'dead'") == []
                left += node.execute(
                    "update sync.sync_failures set next_attempt_at = clock_timestamp()"
                ).rowcount
            if not left:
                break
            if left == before:
                # Nothing moves by itself any more.
                disputed = disputes.settle(pair, clients)
                books.load["records left that wait for a disputed value"] += disputed
            before = left
    conflicts = sum(node.value("select count(*) from sync.sync_conflicts") for node in pair.nodes)
    return aside, conflicts


def check(pair: Pair, books: Books) -> int:
    """Raise an AssertionError for any difference; return how many rows were compared."""
    done, unsure = Effects(), Effects()
    for one in books.done:
        done.add(one)
    for one in books.unsure:
        unsure.add(one)
    for node in pair.nodes:
        for nothing in ("sync_events", "sync_applied", "sync_failures"):
            left = node.rows(f"select * from sync.{nothing}")
            assert not left, f"{node.name}: {nothing} holds {left[:5]}"
        assert node.rows(ORPHANS) == [(0,), (0,)]
    assert equal(pair), "the two sides differ"
    assert_nothing_is_lost(pair, done, unsure)
    assert not books.unexpected, "consumers ended by themselves:\n" + "\n".join(books.unexpected)
    return sum(int(pair.crm.value(f"select count(*) from {table}")) for table in TABLES)


def report(books: Books, seconds: float, rows: int, aside: int, conflicts: int) -> None:
    changes = sum(number for name, number in books.load.items() if not name.startswith("refused"))
    committed = sum(len(one.written) for one in books.done)
    print(
        f"load: {changes:,} changes tried in {seconds:.0f} s, {committed:,} writes committed: {_told(books.load)}"
    )
    survived = sum(n for name, n in books.faults.items() if not name.startswith("could not"))
    print(f"faults survived: {survived}: {_told(books.faults)}")
    print(f"bad inputs tried: {books.bad.total()}: {_told(books.bad)}; {aside} records set aside")
    print(f"conflicts logged: {conflicts}")
    lag = statistics.quantiles(books.lag, n=100)
    print(
        f"lag, faults included, of {len(books.lag)} rows: p50 {lag[49]:.3f} s, p90 {lag[89]:.3f} s,"
        f" p99 {lag[98]:.3f} s, longest {max(books.lag):.3f} s"
    )
    print(f"rows compared: {rows:,}")
    print("differences: 0")


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.most_common())


@contextmanager
def two_servers(directory: Path) -> Iterator[Pair]:
    """Two databases on durable servers, with the pipeline installed."""
    with ExitStack() as exits:
        nodes = []
        for name in NODES:
            cluster = Cluster(Server.create(directory / name, durable=True))
            exits.callback(cluster.close)
            nodes.append(Node(name, cluster.server.dsn(cluster.clone()), cluster.server))
        retry = {"max_attempts": 1000, "base_seconds": 0.5, "max_seconds": 5}
        config = write_config(directory / "sync.yaml", lock_timeout_seconds=1, retry=retry)
        pair = Pair(nodes[0], nodes[1], config)
        for node in pair.nodes:
            node.execute(TRACED)
        pair.billing.execute("alter table users add constraint no_methuselah check (age < 1000)")
        installed(pair)
        # These sessions would not outlive the faults.
        for node in pair.nodes:
            node.close()
        crm, billing = (Node(node.name, node.dsn, node.server) for node in pair.nodes)
        yield Pair(crm, billing, config)


def main() -> None:
    seed = int(os.environ.get("SOAK_SEED") or secrets.randbits(32))
    print(f"soak: {MINUTES:g} minutes, SOAK_SEED={seed}", flush=True)
    books = Books(dice=random.Random(seed))
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="sync-", ignore_cleanup_errors=True) as name,
        ExitStack() as exits,
    ):
        directory = Path(name)
        directory.chmod(0o711)
        pair = exits.enter_context(two_servers(directory))
        consumers = [Consumer(pair, directory / f"consumer-{n}.log") for n in range(CONSUMERS)]
        faults = Faults(pair, consumers, books, stop)
        threads = [threading.Thread(target=faults.strike_until_told_to_stop)]
        for index, (node, other) in enumerate((pair.nodes, pair.nodes[::-1])):
            for number in range(CLIENTS_PER_NODE):
                arguments = (node, books, stop, seed + 10 * index + number)
                threads.append(threading.Thread(target=be_an_application, args=arguments))
            threads.append(
                threading.Thread(target=be_hostile, args=(node, books, stop, seed + index))
            )
            first = FIRST_PROBE * (index + 1)
            threads.append(threading.Thread(target=probe, args=(node, other, books, stop, first)))
        began = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            stop.wait(MINUTES * 60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            for consumer in consumers:
                consumer.stop()
        seconds = time.monotonic() - began
        aside, conflicts = settle(pair, books)
        rows = check(pair, books)
        report(books, seconds, rows, aside, conflicts)


if __name__ == "__main__":
    main()
