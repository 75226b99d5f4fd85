"""What becomes of the figures of `make bench`: the page, the pictures, the names of the stages."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dagster_page, pictures, report, stages
from benchmarks.figures import Figure, Options, Run


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """What a run of two scripts has written."""
    profile = {
        "stages": {"upsert": {"seconds": 2.0, "cpu": 1.5}, "other": {"seconds": 1, "cpu": 1}}
    }
    details = {"profile": profile, "cpu": {"consumer": 0.5, "both servers": 3.0}}
    backlog = {"picture": "backlog", "series": [[50_000, 9, 8, 10], [2_000_000, 8, 7, 9]]}
    costs = [[1, 20.0], [1_000, 2.0]]
    run = Run(Options(), 18)
    run.figures["drain"] = [
        Figure("ours", [90_000, 110_000, 100_000], "records/s", details=details),
        Figure("ratio", [1.7, 1.5, 1.65], at_least=1.6),
        Figure("peak memory", [151], "MB", at_most=150),
    ]
    run.figures["backlog"] = [
        Figure("large", [8], details=backlog),
        Figure("lag", [1], details={"picture": "sustained", "series": [[0, 0, 0], [1, 0.2, 50]]}),
        Figure(
            "capture",
            [1],
            details={"picture": "capture", "series": dict.fromkeys(pictures.NAMES, costs)},
        ),
    ]
    path = tmp_path / "bench.json"
    run.write(path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_the_report_has_a_line_for_each_figure_and_profile(document: dict[str, Any]) -> None:
    text = report.render(document)

    assert "| ours |  | 100,000 records/s | 90,000 - 110,000 |  |" in text
    assert "| ratio | ≥ 1.60 | 1.65 | 1.50 - 1.70 | yes |" in text
    assert "| peak memory | ≤ 150 | 151 MB |  | no |" in text
    assert "1.50 (2.00)" in text
    assert "both servers 3.00, consumer 0.50" in text


def test_the_report_changes_nothing_outside_its_markers() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"

    once = report.replace(page, "new")

    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replace(once, "new") == once


def test_the_performance_page_has_the_markers() -> None:
    page = report.PAGE.read_text(encoding="utf-8")

    assert "\n\nnew\n\n" in report.replace(page, "new")


@pytest.mark.parametrize("name", ["dagster_latency", "dagster_memory", "dagster_storage"])
def test_the_page_about_dagster_has_the_markers_of_each_measurement(name: str) -> None:
    page = dagster_page.PAGE.read_text(encoding="utf-8")

    written = report.replace(page, "new", dagster_page.begin(name))

    assert written.count("\n\nnew\n\n") == 1
    assert written.count(report.END) == page.count(report.END) == 3


def test_the_same_figures_draw_the_same_pictures(document: dict[str, Any], tmp_path: Path) -> None:
    drawn = [
        {path.name: path.read_bytes() for path in pictures.draw(document, tmp_path)}
        for _ in range(2)
    ]

    assert drawn[0].keys() == {"backlog.svg", "sustained.svg", "capture.svg"}
    assert drawn[0] == drawn[1]
    assert b"2,000,000" in drawn[0]["backlog.svg"]


def test_what_was_not_measured_is_not_counted_as_a_target() -> None:
    run = Run(Options(), 18)
    run.figures["drain"] = [
        Figure("met", [1], at_most=2),
        Figure("missed", [3], at_most=2),
        Figure("only told", [1]),
    ]

    assert run.summary.startswith("1 of 2 targets met")


@pytest.mark.parametrize(
    ("statement", "stage"),
    [
        ('copy "pg_temp"."sync_pipeline_stage_0" from stdin', "stage"),
        ("COMMIT", "commit"),
        (
            'with "u" as (update "items" as t set a = s.c1 from "sync_pipeline_stage_0" as s) select 1',
            "upsert",
        ),
        ("-- a comment\ndelete from sync.sync_events as event\nusing ids", "acknowledge"),
        ("select sync.has_events(5)", "check"),
        ("insert into sync.sync_applied (source) values ('crm')", "ledger"),
        ("select version()", "other"),
    ],
)
def test_a_statement_is_named_by_its_stage(statement: str, stage: str) -> None:
    assert stages.stage_of(stages.shortened(statement)) == stage


def test_zero_is_written_as_zero() -> None:
    assert Figure("rows written", [0], "rows", at_most=0).result == "0 rows"
    assert Figure("rows written", [0], at_most=0).target == "≤ 0"
