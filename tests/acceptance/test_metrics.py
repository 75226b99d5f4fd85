"""Metrics: what is served is what the manual, the dashboard and the alert rules say."""

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sync_pipeline import metrics
from sync_pipeline.servers import _free_port
from tests.engine import config_of, installed, sync_pair
from tests.helpers import Pair
from tests.program import answer, line_with, refused, run, running, stop, succeed

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus-rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"
MANUAL = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")

NODE = ', node="crm"'
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def link(pair: Pair) -> Pair:
    installed(pair)
    return pair


def parsed(text: str) -> Samples:
    return {
        (sample.name.removeprefix("sync_pipeline_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def scrape(line: str) -> Samples:
    found = re.search(r"http://[\w.:]+/metrics", line)
    assert found, line
    with urllib.request.urlopen(found[0], timeout=60) as response:  # noqa: S310 - an address of this test
        assert response.headers["Content-Type"].startswith("text/plain")
        return parsed(response.read().decode())


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    return [*asked, *(rule["expr"] for rule in rules())]


def test_the_manual_lists_exactly_what_is_served(link: Pair) -> None:
    link.crm.insert("accounts", id=1, name="one")
    sync_pair(link)
    config = config_of(link)
    registry = metrics.registry(config)
    metrics.Work(config, registry)
    listed = re.findall(r"^\| `(sync_pipeline_\w+)` \| (\w+) \|(.*?)\|", MANUAL, re.MULTILINE)
    assert len({name for name, _, _ in listed}) == len(listed)
    documented = {
        name: (kind, set(re.findall(r"\w+", labels.replace("`", ""))))
        for name, kind, labels in listed
    }
    served = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in registry.collect()
        if family.samples
    }
    assert documented == served


def test_dashboard_and_rules_use_only_what_is_served() -> None:
    listed = re.findall(r"^\| `(sync_pipeline_\w+)` \| (\w+)", MANUAL, re.MULTILINE)
    known = {name for name, kind in listed if kind != "histogram"} | {
        f"{name}_{part}"
        for name, kind in listed
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    used = {
        name
        for expression in expressions()
        for name in re.findall(r"sync_pipeline_\w+", expression)
    }
    assert used <= known
    # Each metric is worth a place; a histogram is drawn by its buckets.
    assert {name for name in known if not name.endswith(("_sum", "_count"))} <= used
    for expression in expressions():
        assert all(expression.count(a) == expression.count(b) for a, b in ("()", "[]", "{}"))


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[str]:
    """A Prometheus of its own that scrapes one address each second; gives the address of its API."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on the path; it is Debian's package of that name")
    file = directory / "prometheus.yaml"
    job = {
        "job_name": "sync-pipeline",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [target], "labels": {"link": "crm-billing"}}],
    }
    file.write_text(yaml.safe_dump({"scrape_configs": [job]}), encoding="utf-8")
    address = f"127.0.0.1:{_free_port()}"
    with subprocess.Popen(
        [
            program,
            f"--config.file={file}",
            f"--storage.tsdb.path={directory / 'series'}",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield f"http://{address}/api/v1/query"
        finally:
            process.terminate()


def asked(api: str, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers to a query; nothing while it does not listen yet."""
    query = expression.replace("$link", ".*").replace("$__rate_interval", "10s")
    try:
        with urllib.request.urlopen(  # noqa: S310 - an address of this test
            f"{api}?{urllib.parse.urlencode({'query': query})}", timeout=60
        ) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{query}: {error.read().decode()}")
    except urllib.error.URLError:
        return []
    return found


def test_prometheus_has_an_answer_to_every_query_of_the_dashboard(
    link: Pair, tmp_path: Path
) -> None:
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("accounts", id=0, name="first")
    link.crm.insert("users", id=1, account_id=0, email="a@x.org", age=3)
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    left = {target["expr"] for panel in panels for target in panel["targets"]}
    with running(link, "stream", "--metrics-port", "0") as worker:
        target = re.search(r"http://([\w.:]+)/metrics", line_with(worker, "metrics: "))
        assert target
        with prometheus(tmp_path, target[1]) as api:
            for number in range(1, 121):
                link.crm.insert("accounts", id=number, name="one more")
                left = {expression for expression in left if not asked(api, expression)}
                if not left:
                    break
                threading.Event().wait(0.5)
            assert not left
        assert stop(worker) == 0


def test_every_alert_leads_to_a_section_of_the_runbook() -> None:
    sections = re.findall(r"^## (.+)$", RUNBOOK, re.MULTILINE)
    for rule in rules():
        assert rule["annotations"]["runbook"] in sections, rule["alert"]
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_prometheus_itself_takes_the_rules_and_the_names(link: Pair) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on the path; Debian's package is prometheus")
    subprocess.run([promtool, "check", "rules", RULES], check=True, timeout=60)
    config = config_of(link)
    registry = metrics.registry(config)
    metrics.Work(config, registry)
    subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registry), check=True, timeout=60
    )


def firing(directory: Path, expected: set[str], **series: str) -> None:
    """Let promtool say that exactly these alerts fire after 90 minutes of such values."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on the path; Debian's package is prometheus")
    labels = {
        "pending_events": ', node="crm", table="t"',
        "failed_records": ', node="crm", table="t", state="dead"',
        "interruptions_total": "",
        "clock_difference_seconds": "",
    }
    test = {
        "interval": "1m",
        "input_series": [
            {
                "series": f'sync_pipeline_{name}{{link="l", instance="i"{labels.get(name, NODE)}}}',
                "values": f"{values}x100",
            }
            for name, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "90m",
                "exp_samples": [
                    {"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(expected)
                ],
            }
        ],
    }
    file = directory / "rules_test.yaml"
    document = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    subprocess.run([promtool, "test", "rules", file], check=True, timeout=60)


def test_every_alert_fires_in_its_trouble_and_none_without(tmp_path: Path) -> None:
    alerts = {rule["alert"] for rule in rules()}
    firing(tmp_path, {"SyncPipelineAbsent"}, captured_events_total="0+1")
    # Nobody leads while nothing is paused; the other alerts do not ask each other.
    firing(
        tmp_path,
        alerts - {"SyncPipelineAbsent", "SyncPipelinePaused"},
        up="0",
        lag_seconds="0+60",
        pending_events="0+6000",
        led="0",
        paused="0",
        failed_records="3",
        conflicts_held="1",
        conflicts_last_day="200",
        interruptions_total="0+5",
        clock_difference_seconds="-9",
    )
    firing(tmp_path, {"SyncPipelinePaused"}, up="1", led="0", paused="1")
    firing(
        tmp_path,
        set(),
        up="1",
        lag_seconds="0.2",
        pending_events="12",
        led="1",
        paused="0",
        failed_records="0",
        conflicts_held="0",
        conflicts_last_day="2",
        interruptions_total="3",
        clock_difference_seconds="0.01",
    )


def test_the_exporter_says_what_both_nodes_hold_without_a_consumer(link: Pair) -> None:
    link.billing.execute("alter table users add constraint adult check (age >= 18)")
    link.crm.insert("accounts", id=1, name="one")
    link.crm.insert("users", id=1, account_id=1, email="a@x.org", age=3)
    sync_pair(link)
    with running(link, "metrics", "--port", "0") as exporter:
        line = line_with(exporter, "metrics: ")
        link.billing.insert("accounts", id=2, name="two")
        link.billing.execute(
            "insert into sync.sync_events (table_name, record_id) values ('typo', '1')"
        )
        found = scrape(line)
        assert stop(exporter) == 0
    assert value(found, "up", node="crm") == value(found, "up", node="billing") == 1
    assert value(found, "pending_events", node="billing", table="accounts") == 1
    assert value(found, "pending_events", node="billing", table="other") == 1
    assert value(found, "pending_events", node="crm", table="orders") == 0
    assert value(found, "failed_records", node="crm", table="users", state="retrying") == 1
    assert value(found, "lag_seconds", node="billing") > 0
    assert value(found, "led", node="crm") == value(found, "paused", node="crm") == 0
    assert value(found, "last_pass_timestamp_seconds", node="crm") > 1e9
    assert not any(name.startswith("records") for name, _ in found)


def test_a_node_that_is_down_does_not_hide_the_other_and_both_down_is_an_answer(link: Pair) -> None:
    down = "postgresql://127.0.0.1:1/nothing"
    one = parsed(run(link, "metrics", "--once", BILLING_DSN=down).stdout)
    assert (value(one, "up", node="crm"), value(one, "up", node="billing")) == (1, 0)
    assert ("lag_seconds", frozenset({("node", "billing")})) not in one
    assert value(one, "lag_seconds", node="crm") == 0
    none = run(link, "metrics", "--once", BILLING_DSN=down, CRM_DSN=down.replace(":1/", ":2/"))
    assert none.returncode == 0
    assert set(parsed(none.stdout).values()) == {0}


def test_a_stream_serves_what_it_has_done(link: Pair) -> None:
    with running(link, "stream", "--metrics-port", "0") as worker:
        line = line_with(worker, "metrics: ")
        line_with(worker, "leading")
        before = scrape(line)
        link.crm.insert("accounts", id=1, name="one")
        link.crm.insert("accounts", id=2, name="two")
        line_with(worker, "upserted")
        found = scrape(line)
        while value(found, "records_total", **to_billing, outcome="upserted") < 2:
            line_with(worker, "upserted")
            found = scrape(line)
        assert stop(worker) == 0
    assert value(before, "leading") == value(before, "led", node="billing") == 1
    assert value(before, "records_total", **to_billing, outcome="upserted") == 0
    assert value(found, "passes_total", source="crm", target="billing") >= 1
    assert value(found, "pass_lag_seconds_count", source="crm", target="billing") >= 1
    assert value(found, "interruptions_total") == 0
    address = re.search(r"http://[\w.:]+", line)
    assert address
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address[0], timeout=10)  # noqa: S310 - as above


to_billing = {"source": "crm", "target": "billing", "table": "accounts"}


def test_metrics_are_printed_once_as_text_or_json(link: Pair) -> None:
    text = succeed(link, "metrics", "--once")
    assert "# TYPE sync_pipeline_up gauge" in text
    document = answer(link, "metrics")
    names = {family["name"] for family in document["metrics"]}
    assert {"sync_pipeline_up", "sync_pipeline_captured_events"} <= names


def test_a_port_that_is_taken_is_one_clear_message(link: Pair) -> None:
    with metrics.served(CollectorRegistry(), "127.0.0.1", 0) as address:
        port = address.split(":")[2].split("/")[0]
        message = refused(link, "metrics", "--port", port)
    assert message.startswith(f"cannot listen on 127.0.0.1:{port}: ")
