from collections.abc import Iterator

import dagster as dg
import pytest

from tests import dagster_runs
from tests.engine import installed
from tests.helpers import Pair


@pytest.fixture
def link(pair: Pair) -> Pair:
    """Two empty databases with the pipeline installed."""
    installed(pair)
    return pair


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """A Dagster of its own, in memory."""
    with dagster_runs.instance() as instance:
        yield instance
