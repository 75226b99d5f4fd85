"""How far the clocks of the two nodes are apart, measured beside what is asked of them anyway."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class ClockDifference:
    """How far the second node's clock is ahead of the first's, give or take `accuracy_seconds`."""

    seconds: float
    accuracy_seconds: float

    def exceeds(self, seconds: float) -> bool:
        """True when the clocks are certainly further apart."""
        return abs(self.seconds) - self.accuracy_seconds > seconds


@dataclass(slots=True)
class Reading:
    """What a node's clock said, and when that was by ours: between `before` and `after`, in monotonic seconds."""

    before: float
    after: float = 0.0
    clock: datetime | None = None

    def difference(self, second: "Reading") -> ClockDifference | None:
        """Compare with the clock of the second node; None where one was not read."""
        if self.clock is None or second.clock is None:
            return None
        ours = (second.before + second.after - self.before - self.after) / 2
        theirs = (second.clock - self.clock).total_seconds()
        accuracy = (self.after - self.before + second.after - second.before) / 2
        return ClockDifference(theirs - ours, accuracy)


@contextmanager
def reading() -> Iterator[Reading]:
    """Read a node's clock within a `with` block, and put it into `clock`."""
    found = Reading(time.monotonic())
    yield found
    found.after = time.monotonic()


def warning(first: str, second: str, difference: ClockDifference, limit_seconds: float) -> str:
    """Say which clock is ahead; the same text as long as it is, so that it can be said once."""
    ahead, behind = (second, first) if difference.seconds > 0 else (first, second)
    return (
        f"the clock of {ahead} is more than {limit_seconds:g} s ahead of that of {behind}: "
        "`last_update_wins` decides by these clocks"
    )
