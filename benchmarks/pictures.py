"""Draw the pictures of docs/performance.md from figures: `python -m benchmarks.pictures [build/bench.json]`."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.charts import XY, chart
from benchmarks.figures import JSON_PATH

DIRECTORY = Path(__file__).parent.parent / "docs" / "images"

NAMES = {"captured": "sync-pipeline", "rowwise": "row-level trigger", "plain": "no trigger"}


def backlog(points: Sequence[Sequence[float]]) -> XY:
    """Records per second against the size of the backlog: the median, with the least and the most."""
    picture = chart(
        "Drain rate against backlog",
        x_title="records in the backlog",
        y_title="records/s",
        x_value_formatter=lambda x: f"{10**x:,.0f}",
        range=(0, 1.1 * max(most for *_, most in points)),
    )
    picture.x_labels = [math.log10(size) for size, *_ in points]
    picture.add("median", [(math.log10(size), median) for size, median, *_ in points])
    ends = [(size, end) for size, _, *least_and_most in points for end in least_and_most]
    picture.add(
        "least and most", [(math.log10(size), end) for size, end in ends], stroke=False, dots_size=3
    )
    return picture


def sustained(points: Sequence[Sequence[float]]) -> XY:
    """The age of the oldest event over time."""
    picture = chart(
        "Age of the oldest event under one million changes a minute",
        x_title="seconds since the load began",
        y_title="seconds",
        x_value_formatter=lambda x: f"{x:,.0f}",
        range=(0, max(1.0, 1.1 * max(lag for _, lag, _ in points))),
        show_dots=False,
        show_legend=False,
        value_formatter=lambda y: f"{y:g}",
    )
    picture.add("age of the oldest event", [(second, lag) for second, lag, _ in points])
    return picture


def capture(series: dict[str, Sequence[Sequence[float]]]) -> XY:
    """Microseconds per updated row against the rows of a statement, both in powers of ten."""
    costs = [cost for points in series.values() for _, cost in points]
    powers = range(math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs))))
    picture = chart(
        "What an updated row costs the application",
        x_title="rows of a statement",
        y_title="µs per row",
        x_value_formatter=lambda x: f"{x:,.0f}",
        logarithmic=True,
    )
    picture.x_labels = [size for size, _ in series["plain"]]
    picture.y_labels = [
        *(step * 10.0**power for power in powers for step in (1, 2, 5)),
        10.0**powers.stop,
    ]
    for kind, name in NAMES.items():
        picture.add(name, [(size, cost) for size, cost in series[kind]])
    return picture


PICTURES: dict[str, Callable[[Any], XY]] = {
    "backlog": backlog,
    "sustained": sustained,
    "capture": capture,
}


def draw(document: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what the document has figures for; return the files."""
    written = []
    for figure in document["figures"]:
        details = figure["details"]
        if name := details.get("picture"):
            path = directory / f"{name}.svg"
            picture = PICTURES[name](details["series"])
            path.write_text(picture.render(is_unicode=True) + "\n", encoding="utf-8")
            written.append(path)
    return written


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
