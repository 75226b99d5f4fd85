"""Alerts: what is wrong goes to a team's channel once when it begins, and once when it has ended."""

import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from sync_pipeline.defs.checks import VERIFY, differs
from sync_pipeline.defs.failed import reason_of
from sync_pipeline.defs.glance import node_statuses
from sync_pipeline.defs.names import LINK_TAG, Names
from sync_pipeline.errors import SyncPipelineError

INTERVAL_SECONDS = 30
WEBHOOK_TIMEOUT_SECONDS = 10.0
RUNS_AT_ONCE = 50


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should know. `subject` stays the same while it lasts."""

    link: str
    subject: str
    text: str
    resolved: bool = False

    def __str__(self) -> str:
        return f"{self.link}: {'resolved: ' if self.resolved else ''}{self.text}"


# A channel raises when it cannot deliver: the alert is sent again at the next tick.
Channel = Callable[[Alert], None]


def log_channel(alert: Alert) -> None:
    """Write alerts to Dagster's log, where the daemon's own log goes."""
    logger = dg.get_dagster_logger("sync_pipeline.alerts")
    (logger.info if alert.resolved else logger.error)(str(alert))


def webhook_channel(url: str, timeout: float = WEBHOOK_TIMEOUT_SECONDS) -> Channel:
    """Return a channel that posts alerts as JSON: `text` for chat programs, and the alert's own fields."""
    if not url.startswith(("https://", "http://")):
        raise ValueError("the address of a webhook begins with https:// or http://")

    def post(alert: Alert) -> None:
        body = json.dumps({**asdict(alert), "text": str(alert)}).encode()
        request = urllib.request.Request(  # noqa: S310 - the scheme was checked above
            url, body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=timeout):  # noqa: S310 - as above
            pass

    return post


def alert_sensor(
    names: Names, lag_seconds: float, channels: Sequence[Channel]
) -> dg.SensorDefinition:
    """Return the sensor that watches for failed runs, lag, dead letters, differences and nodes that cannot be asked."""
    link = names.tags[LINK_TAG]

    @dg.sensor(
        name=names.of("alert_sensor"),
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            f"Tells the team's channels of failed runs, of changes that wait longer than {lag_seconds:g} seconds, of"
            " dead letters, of tables that `verify` found different, and of nodes that cannot be asked; once when it"
            " begins and once when it has ended."
        ),
    )
    def alert(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        known = _Cursor.parse(context.cursor)
        found = dict(_problems(names, lag_seconds, known.open))
        found |= dict(_differences(context.instance, names))
        news = [Alert(link, *item) for item in found.items() if item[0] not in known.open]
        news += [
            Alert(link, subject, text, resolved=True)
            for subject, text in known.open.items()
            if subject not in found
        ]
        failed = _failed_runs(context.instance, names, known.runs_until)
        failing = {
            job: reason
            for job, reason in known.failing.items()
            if not _has_succeeded(context.instance, names, job)
        }
        for run_id, job, reason, _ in failed:
            # What a sensor or a schedule asks for fails again and again, until somebody mends it.
            if not reason or failing.get(job) != reason:
                said = f": {reason}" if reason else ""
                news.append(Alert(link, f"run {run_id}", f"run {run_id[:8]} of {job} failed{said}"))
            failing[job] = reason
        for item in news:
            for channel in channels:
                channel(item)
        until = max([known.runs_until, *(ended for *_, ended in failed)])
        return dg.SensorResult(
            cursor=_Cursor(found, until, failing).text,
            skip_reason="; ".join(map(str, news)) or _still(found, failing),
        )

    return alert


@dataclass(frozen=True, slots=True)
class _Cursor:
    """What was told: problems that last, by subject, until when failed runs were looked at, and why jobs fail."""

    open: dict[str, str]
    runs_until: float
    failing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> "_Cursor":
        """Read a cursor; the first one begins now, so that old failures stay untold."""
        if text is None:
            return cls({}, datetime.now(UTC).timestamp())
        return cls(**json.loads(text))

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))


def _problems(names: Names, lag_seconds: float, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield subject and text of what is wrong now; of a node that cannot be asked, what was known of it, too."""
    for node in names.config.nodes:
        try:
            statuses = node_statuses(names.config, node)
        except SyncPipelineError as error:
            yield f"node {node.name}", str(error)
            yield from (item for item in known.items() if item[0].endswith(_on(node.name)))
            continue
        if max(status.oldest_seconds for status in statuses.values()) > lag_seconds:
            yield (
                f"lag{_on(node.name)}",
                f"changes on {node.name} wait for more than {lag_seconds:g} seconds",
            )
        for table, status in statuses.items():
            if status.dead:
                yield (
                    f"dead letters of {table}{_on(node.name)}",
                    f"{table} on {node.name} has dead letters",
                )


def _differences(instance: dg.DagsterInstance, names: Names) -> Iterator[tuple[str, str]]:
    """Yield subject and text of each table that `verify` found different when it last gave an answer."""
    keys = {dg.AssetCheckKey(key, VERIFY): table for table, key in names.link_assets()}
    # In one query; for nearly all tables it tells that they were equal, or never compared.
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(keys))
    first, second = (node.name for node in names.config.nodes)
    for key, record in latest.items():
        equal = record.status is AssetCheckExecutionRecordStatus.SUCCEEDED
        if not equal and differs(instance, key.asset_key):
            table = keys[key]
            yield (
                f"difference in {table}",
                f"{table} differs between {first} and {second}; see which: `sync-pipeline verify {table}`",
            )


def _on(node: str) -> str:
    """How the subject of every problem of a node ends that is found by asking it."""
    return f" on {node}"


def _failed_runs(
    instance: dg.DagsterInstance, names: Names, after: float
) -> list[tuple[str, str, str, float]]:
    """Return id, job, reason and end of the link's runs that failed after a moment, the oldest first."""
    filters = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.FAILURE],
        tags=names.tags,
        updated_after=datetime.fromtimestamp(after, UTC),
    )
    records = instance.get_run_records(
        filters, limit=RUNS_AT_ONCE, order_by="update_timestamp", ascending=True
    )
    return [
        (
            record.dagster_run.run_id,
            record.dagster_run.job_name,
            reason_of(instance, record.dagster_run.run_id) or "",
            record.update_timestamp.timestamp(),
        )
        for record in records
        if record.update_timestamp.timestamp() > after
    ]


def _has_succeeded(instance: dg.DagsterInstance, names: Names, job: str) -> bool:
    """True when the latest run of a job that has ended did so well."""
    filters = dg.RunsFilter(
        job_name=job,
        tags=names.tags,
        statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE],
    )
    latest = instance.get_run_records(filters, limit=1)
    return all(record.dagster_run.status is dg.DagsterRunStatus.SUCCESS for record in latest)


def _still(problems: dict[str, str], failing: dict[str, str]) -> str:
    lasting = [
        *problems.values(),
        *(f"runs of {job} fail{reason and ': '}{reason}" for job, reason in failing.items()),
    ]
    return "; ".join(f"still: {text}" for text in lasting) or "all is well"
