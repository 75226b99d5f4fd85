"""Metrics for Prometheus: what both nodes hold, asked at each scrape, and what a running consumer has done.

Names, units and labels are those of docs/metrics.md. Nothing here knows a row or a key.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sync_pipeline import operate
from sync_pipeline.config import Config
from sync_pipeline.database import connected
from sync_pipeline.errors import LockTaken, SyncPipelineError
from sync_pipeline.records import OUTCOMES, DirectionReport
from sync_pipeline.stream import Listener
from sync_pipeline.views import FAILURE_STATES, NodeStatus, Status, TableStatus

# Events of tables that are not in sync.yaml share this label: whoever writes events by hand makes no series.
OTHER_TABLE = "other"
LAG_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)


class NodesCollector(Collector):
    """Asks both nodes at each scrape. A node that cannot be asked is down and has no other metric."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples, so that registering one connects nowhere."""
        return _families().values()

    def collect(self) -> Iterator[Metric]:
        """Yield what both nodes say now."""
        families = _families()
        found, tables = self._read()
        for name, node in found.nodes.items():
            _add_node(families, name, node)
            for table, state, number in _by_table(self._config, tables.get(name, [])):
                if state is None:
                    families["pending_events"].add_metric([name, table], number)
                else:
                    families["failed_records"].add_metric([name, table, state], number)
        if found.clocks is not None:
            families["clock_difference_seconds"].add_metric([], found.clocks.seconds)
        yield from families.values()

    def _read(self) -> tuple[Status, dict[str, list[TableStatus]]]:
        connections = {}
        unreachable = {}
        tables: dict[str, list[TableStatus]] = {}
        with ExitStack() as stack:
            for node in self._config.nodes:
                try:
                    connections[node.name] = stack.enter_context(
                        connected(node, self._config, "metrics")
                    )
                except SyncPipelineError as error:
                    unreachable[node.name] = error
            try:
                found = operate.status(self._config, connections, unreachable)
                for name, node_status in found.nodes.items():
                    if node_status.error is None:
                        one = {name: connections[name]}
                        tables |= operate.table_statuses(self._config, one)
            except SyncPipelineError as error:
                # Neither node can be asked.
                found = Status(
                    {node.name: NodeStatus(error=str(error)) for node in self._config.nodes}
                )
        return found, tables


def _families() -> dict[str, Any]:
    gauges = {
        "up": ("Whether the node can be asked and has the pipeline's schema.", ["node"]),
        "pending_events": ("Events that wait.", ["node", "table"]),
        "lag_seconds": ("Age of the oldest event that waits, 0 without one.", ["node"]),
        "failed_records": ("Records that the other node refused.", ["node", "table", "state"]),
        "conflicts_held": ("Conflicts that wait for a decision.", ["node"]),
        "conflicts_last_day": ("Conflicts of the last 24 hours.", ["node"]),
        "paused": ("Whether consumption is paused on the node.", ["node"]),
        "led": ("Whether a consumer holds the node's lock.", ["node"]),
        "last_pass_timestamp_seconds": (
            "When a pass last took something from the node, as Unix time.",
            ["node"],
        ),
        "clock_difference_seconds": (
            "How far the second node's clock is ahead of the first's.",
            [],
        ),
    }
    families: dict[str, Any] = {
        name: GaugeMetricFamily(f"sync_pipeline_{name}", text, labels=labels)
        for name, (text, labels) in gauges.items()
    }
    families["captured_events"] = CounterMetricFamily(
        "sync_pipeline_captured_events", "Events that were captured or marked.", labels=["node"]
    )
    return families


def _add_node(families: dict[str, Any], name: str, node: NodeStatus) -> None:
    backlog = node.backlog
    families["up"].add_metric([name], float(backlog is not None))
    if backlog is None:
        return
    families["lag_seconds"].add_metric([name], backlog.oldest_seconds)
    families["conflicts_held"].add_metric([name], backlog.conflicts_held)
    families["conflicts_last_day"].add_metric([name], backlog.conflicts_24h)
    families["paused"].add_metric([name], float(backlog.paused_at is not None))
    families["led"].add_metric([name], float(node.leader is not None))
    families["captured_events"].add_metric([name], node.captured)
    if backlog.last_pass_at is not None:
        families["last_pass_timestamp_seconds"].add_metric([name], backlog.last_pass_at.timestamp())


def _by_table(
    config: Config, statuses: Iterable[TableStatus]
) -> Iterator[tuple[str, str | None, int]]:
    """Yield table, state and number: the state None counts events. Every table has all of them, 0 included."""
    known = {table.name for table in config.tables}
    numbers = {(table, state): 0 for table in known for state in (None, *FAILURE_STATES)}
    for status in statuses:
        table = status.table_name if status.table_name in known else OTHER_TABLE
        for state in (None, *FAILURE_STATES):
            number = status.pending if state is None else getattr(status, state)
            numbers[table, state] = numbers.get((table, state), 0) + number
    yield from ((table, state, number) for (table, state), number in numbers.items())


class Work:
    """What this process has done, counted by listening to the loop."""

    def __init__(self, config: Config, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no type here
        self._passes = Counter(
            "sync_pipeline_passes",
            "Directions of passes that did something.",
            ["source", "target"],
            registry=registry,
        )
        self._records = Counter(
            "sync_pipeline_records",
            "Records that passes have dealt with.",
            ["source", "target", "table", "outcome"],
            registry=registry,
        )
        self._lag = Histogram(
            "sync_pipeline_pass_lag_seconds",
            "Age of the oldest event that a pass found.",
            ["source", "target"],
            buckets=LAG_BUCKETS_SECONDS,
            registry=registry,
        )
        self._interruptions = Counter(
            "sync_pipeline_interruptions",
            "Passes and attempts to connect that ended early.",
            registry=registry,
        )
        self._leading = Gauge(
            "sync_pipeline_leading", "Whether this process leads.", registry=registry
        )
        for source, target in config.directions:
            self._passes.labels(source.name, target.name)
            self._lag.labels(source.name, target.name)
            for table in config.tables:
                for outcome in OUTCOMES:
                    self._records.labels(source.name, target.name, table.name, outcome)

    def counting(self, listener: Listener) -> Listener:
        """Return a listener that counts and then tells `listener`."""

        def passed(reports: list[DirectionReport]) -> None:
            for report in reports:
                self._count(report)
            listener.passed(reports)

        def leading() -> None:
            self._leading.set(1)
            listener.leading()

        def standing_by(error: LockTaken) -> None:
            self._leading.set(0)
            listener.standing_by(error)

        def interrupted(error: Exception, seconds: float) -> None:
            self._leading.set(0)
            self._interruptions.inc()
            listener.interrupted(error, seconds)

        return replace(
            listener,
            passed=passed,
            leading=leading,
            standing_by=standing_by,
            interrupted=interrupted,
        )

    def _count(self, report: DirectionReport) -> None:
        if not (report.did_something or report.recovered):
            return
        self._passes.labels(report.source, report.target).inc()
        self._lag.labels(report.source, report.target).observe(report.lag_seconds)
        for table, counts in report.tables.items():
            for outcome in OUTCOMES:
                self._records.labels(report.source, report.target, table, outcome).inc(
                    getattr(counts, outcome)
                )


def registry(config: Config) -> CollectorRegistry:
    """Return a registry of what both nodes hold."""
    found = CollectorRegistry()
    found.register(NodesCollector(config))
    return found


@contextmanager
def served(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Serve a registry over HTTP for a `with` block; yields the address. Port 0 takes a free one."""
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise SyncPipelineError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            remedy="choose another port or address",
        ) from error
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
