"""What operators are shown, and how they say which failures they mean. Values, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sync_pipeline.clocks import ClockDifference
from sync_pipeline.locks import Leader

State = Literal["retrying", "dead", "held"]
FAILURE_STATES: tuple[State, ...] = ("retrying", "dead", "held")


@dataclass(frozen=True, slots=True)
class Backlog:
    """The status view's row of a node. `oldest_seconds` is the age of its oldest event, by its own clock."""

    node: str
    pending: int
    oldest_at: datetime | None
    oldest_seconds: float
    retrying: int
    dead: int
    conflicts_24h: int
    conflicts_held: int
    paused_at: datetime | None
    last_pass_at: datetime | None


@dataclass(frozen=True, slots=True)
class LastFailure:
    """The failure that was met last on a node, and how long ago by its own clock."""

    table_name: str
    record_id: str
    error_class: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Blocker:
    """The session whose lock the pipeline waits for on a node, and the age of its transaction by the node's clock.

    `pid` is 0 for a prepared transaction; the others are None where the role may not see them.
    """

    pid: int
    application_name: str | None
    state: str | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node: its backlog and who leads there, or why neither could be read.

    `captured` counts the events that were ever written there, as PostgreSQL's statistics know it.
    """

    backlog: Backlog | None = None
    leader: Leader | None = None
    error: str | None = None
    captured: int = 0
    last_failure: LastFailure | None = None
    blocker: Blocker | None = None


@dataclass(frozen=True, slots=True)
class TableStatus:
    """What waits and what failed of one table on one node."""

    table_name: str
    pending: int = 0
    oldest_seconds: float = 0.0
    retrying: int = 0
    dead: int = 0
    held: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """Both nodes at about the same moment."""

    nodes: dict[str, NodeStatus]
    clocks: ClockDifference | None = None

    @property
    def paused(self) -> bool:
        """True when consumption is paused on either node, as far as can be seen."""
        return any(
            node.backlog is not None and node.backlog.paused_at is not None
            for node in self.nodes.values()
        )

    @property
    def leader(self) -> tuple[str, Leader] | None:
        """A node and the session that holds its lock: the consumer that leads."""
        for name, node in self.nodes.items():
            if node.leader is not None:
                return name, node.leader
        return None


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event that waits. `row_exists` is None where that cannot be told: an unknown table, a key that is no key."""

    node: str
    id: int
    table_name: str
    record_id: str
    event_type: str
    created_at: datetime
    age_seconds: float = 0.0
    row_exists: bool | None = None


@dataclass(frozen=True, slots=True)
class FailedRecord:
    """A record of `node` that the other node refused, or that is held because of a conflict."""

    node: str
    table_name: str
    record_id: str
    state: State
    attempts: int
    next_attempt_at: datetime | None
    error_class: str
    error: str
    first_failed_at: datetime
    last_failed_at: datetime


@dataclass(frozen=True, slots=True)
class Conflict:
    """A decision, logged on the node where it was applied: `local_row` is that node's row."""

    node: str
    id: int
    detected_at: datetime
    table_name: str
    record_id: str
    kind: str
    winner: str | None
    local_row: Any
    remote_row: Any
    resolved_at: datetime | None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which failures are meant; what is left out selects all."""

    table: str | None = None
    record_ids: Sequence[str] | None = None
    state: State | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The selection as the named queries take it."""
        return {
            "table_name": self.table,
            "record_ids": None if self.record_ids is None else list(self.record_ids),
            "state": self.state,
        }
