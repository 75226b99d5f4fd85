"""What the steps of the story share: the shop, its consumers, the screen, and waiting for what must happen."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sync_pipeline.demo.consumer import Consumer
from sync_pipeline.demo.screen import Screen
from sync_pipeline.demo.shop import Application, Shop
from sync_pipeline.errors import SyncPipelineError

WAIT_SECONDS = 30.0
POLL_SECONDS = 0.01
REFRESH_SECONDS = 0.05
# On a live screen only: time to read a step before the next one begins.
READING_SECONDS = 0.6


class DemoFailed(SyncPipelineError):
    """Something that the demo promises did not happen: report it as a bug."""


@dataclass
class Stage:
    """The state of a running demo."""

    shop: Shop
    screen: Screen
    consumers: list[Consumer] = field(default_factory=list)
    _refreshed: float = 0.0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Tell one step of the story."""
        self.screen.begin(title)
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.observe(now=True)
        self.screen.end(seconds)
        if self.screen.is_live:
            time.sleep(READING_SECONDS)

    def say(self, line: str) -> None:
        """Tell a line of the current step."""
        self.screen.say(line)

    def observe(self, *, now: bool = False) -> None:
        """Bring the live table up to date, not more often than an eye can follow."""
        if now or (self.screen.is_live and time.monotonic() - self._refreshed > REFRESH_SECONDS):
            self._refreshed = time.monotonic()
            self.screen.show([node.observe() for node in self.shop.nodes])

    def wait(
        self, what: str, happened: Callable[[], object], seconds: float = WAIT_SECONDS
    ) -> float:
        """Wait until something has happened; return after how many seconds. Raises `DemoFailed` when it does not."""
        started = time.monotonic()
        while not happened():
            is_late = time.monotonic() - started > seconds
            failed = [one for one in self.consumers if one.has_failed]
            if is_late or failed:
                problem = (
                    "a consumer ended by itself" if failed else f"{seconds:.0f} s were too short"
                )
                outputs = [f"consumer {one.name}: {one.output()}" for one in self.consumers]
                raise DemoFailed(
                    f"{problem}; expected that {what}", remedy="\n".join(["output:", *outputs])
                )
            self.observe()
            time.sleep(POLL_SECONDS)
        return time.monotonic() - started

    def expect(self, what: str, value: object, expected: object) -> None:
        """Raise `DemoFailed` unless a value is what was promised."""
        if value != expected:
            raise DemoFailed(f"{what}: found {value!r}, expected {expected!r}")

    def settle(self) -> float:
        """Wait until nothing is pending and both nodes hold the same rows; return after how many seconds."""
        return self.wait("both nodes are equal", lambda: self._is_idle and self.shop.is_equal())

    def drain(self) -> float:
        """Wait until nothing is pending; a record that was refused may still differ."""
        return self.wait("nothing is pending", lambda: self._is_idle)

    def start_consumer(self, name: str) -> Consumer:
        """Start another consumer."""
        consumer = Consumer(self.shop, name)
        self.consumers.append(consumer)
        return consumer

    def wait_for_block(self, node: Application, by: int) -> int:
        """Wait until the leader's session on a node waits for a lock of session `by`; return the leader's session."""

        def is_blocked() -> bool:
            leader = self.shop.leader(node)
            return leader is not None and bool(
                node.value("select %s = any (pg_blocking_pids(%s))", [by, leader])
            )

        self.wait("the consumer is in mid-batch", is_blocked)
        leader = self.shop.leader(node)
        if leader is None:
            raise DemoFailed("the leader left while it was waiting for a lock", node=node.name)
        return leader

    def close(self) -> None:
        """Stop every consumer that still runs."""
        for consumer in self.consumers:
            if consumer.is_running:
                consumer.stop()

    @property
    def _is_idle(self) -> bool:
        return not any(
            node.value("select exists (select from sync.sync_events)") for node in self.shop.nodes
        )
