"""Draw the pictures of docs/performance.md from figures: `python -m benchmarks.pictures [build/bench.json]`."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pygal
from pygal.style import Style

from benchmarks.figures import JSON_PATH

DIRECTORY = Path(__file__).parent.parent / "docs" / "images"

# Readable on a light and on a dark page: the picture brings its own ground.
STYLE = Style(
    background="#ffffff",
    plot_background="#ffffff",
    foreground="#333333",
    foreground_strong="#111111",
    foreground_subtle="#999999",
    font_family="Helvetica, Arial, sans-serif",
    title_font_size=18,
    label_font_size=13,
    major_label_font_size=13,
    legend_font_size=14,
    opacity=1,
    guide_stroke_color="#dddddd",
    major_guide_stroke_color="#cccccc",
    # Told apart by those who see no red or green, too.
    colors=("#0072b2", "#d55e00", "#777777", "#009e73"),
    stroke_width=2.5,
)
NAMES = {"captured": "sync-pipeline", "rowwise": "row-level trigger", "plain": "no trigger"}


def backlog(points: Sequence[Sequence[float]]) -> pygal.XY:
    """Records per second against the size of the backlog: the median, with the least and the most."""
    chart = _chart(
        "Drain rate against backlog",
        x_title="records in the backlog",
        y_title="records/s",
        x_value_formatter=lambda x: f"{10**x:,.0f}",
        range=(0, 1.1 * max(most for *_, most in points)),
    )
    chart.x_labels = [math.log10(size) for size, *_ in points]
    chart.add("median", [(math.log10(size), median) for size, median, *_ in points])
    ends = [(size, end) for size, _, *least_and_most in points for end in least_and_most]
    chart.add(
        "least and most", [(math.log10(size), end) for size, end in ends], stroke=False, dots_size=3
    )
    return chart


def sustained(points: Sequence[Sequence[float]]) -> pygal.XY:
    """The age of the oldest event over time."""
    chart = _chart(
        "Lag under one million changes a minute",
        x_title="seconds since the load began",
        y_title="age of the oldest event, seconds",
        x_value_formatter=lambda x: f"{x:,.0f}",
        range=(0, max(1.0, 1.1 * max(lag for _, lag, _ in points))),
        show_dots=False,
        show_legend=False,
        value_formatter=lambda y: f"{y:g}",
    )
    chart.add("age of the oldest event", [(second, lag) for second, lag, _ in points])
    return chart


def capture(series: dict[str, Sequence[Sequence[float]]]) -> pygal.XY:
    """Microseconds per updated row against the rows of a statement, both in powers of ten."""
    costs = [cost for points in series.values() for _, cost in points]
    powers = range(math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs))))
    chart = _chart(
        "What an updated row costs the application",
        x_title="rows of a statement",
        y_title="µs per row",
        x_value_formatter=lambda x: f"{x:,.0f}",
        logarithmic=True,
    )
    chart.x_labels = [size for size, _ in series["plain"]]
    chart.y_labels = [
        *(step * 10.0**power for power in powers for step in (1, 2, 5)),
        10.0**powers.stop,
    ]
    for kind, name in NAMES.items():
        chart.add(name, [(size, cost) for size, cost in series[kind]])
    return chart


PICTURES: dict[str, Callable[[Any], pygal.XY]] = {
    "backlog": backlog,
    "sustained": sustained,
    "capture": capture,
}


def draw(document: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what the document has figures for; return the files."""
    written = []
    for figure in document["figures"]:
        details = figure["details"]
        if picture := details.get("picture"):
            path = directory / f"{picture}.svg"
            chart = PICTURES[picture](details["series"])
            path.write_text(chart.render(is_unicode=True) + "\n", encoding="utf-8")
            written.append(path)
    return written


def _chart(title: str, **options: Any) -> pygal.XY:
    chart = pygal.XY(
        **{
            "title": title,
            "style": STYLE,
            "width": 800,
            "height": 420,
            "legend_at_bottom": True,
            "legend_at_bottom_columns": 3,
            "truncate_legend": -1,
            "dots_size": 4,
            "margin_right": 40,
            "show_x_guides": True,
            "value_formatter": lambda y: f"{y:,.10g}",
            # A file that needs nothing from elsewhere and is the same for the same figures.
            "js": (),
            "disable_xml_declaration": True,
            "pretty_print": False,
            **options,
        }
    )
    # Its prefix in the style sheet, at random otherwise.
    chart.uuid = "picture"
    return chart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="?", default=JSON_PATH)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    arguments = parser.parse_args()
    document = json.loads(arguments.json.read_text(encoding="utf-8"))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for path in draw(document, arguments.directory):
        print(path)


if __name__ == "__main__":
    main()
