"""Backlogs far larger than a batch, and what they cost the consumer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import equal, installed
from tests.helpers import Pair

ROOT = Path(__file__).parents[2]
# The kernel's high-water mark of this program alone: `ru_maxrss` remembers the process that started it as well.
CONSUMER = """
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

import json
from sync_pipeline import config, stream
loaded = config.load()
totals = stream.sync(loaded)
print(json.dumps({
    "upserted": sum(counts.upserted for counts in totals.directions.values()),
    "peak_mb": peak() / 1024,
}))
"""


def consume(pair: Pair) -> dict[str, float]:
    """Sync in a process of its own and return what it did and what memory it took."""
    done = subprocess.run(
        [sys.executable, "-c", CONSUMER],
        cwd=ROOT,
        env={**os.environ, **pair.environment, "SYNC_CONFIG": str(pair.config_path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_backlog_of_200_000_records_drains_in_bounded_memory(pair: Pair) -> None:
    installed(pair)
    pair.crm.execute(
        "insert into accounts select g, repeat('name ', 20) || g from generate_series(1, 20000) as g"
    )
    small = consume(pair)
    pair.crm.execute(
        "insert into accounts select g, repeat('name ', 20) || g from generate_series(20001, 220000) as g"
    )
    large = consume(pair)
    assert (small["upserted"], large["upserted"]) == (20_000, 200_000)
    assert equal(pair, ("accounts",))
    assert pair.crm.pending() == 0
    # The rows alone are more than 20 MB as text; ten times the backlog takes about the same memory.
    assert large["peak_mb"] < 150
    assert large["peak_mb"] < small["peak_mb"] + 12
