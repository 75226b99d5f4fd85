"""Write the figures into docs/performance.md, between its markers: `python -m benchmarks.report [build/bench.json]`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import JSON_PATH

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN = "<!-- figures: written by `python -m benchmarks.report` -->"
END = "<!-- end of figures -->"
REACHED = {True: "yes", False: "no", None: ""}
STAGES = ("source read", "transfer", "stage", "upsert", "check", "commit", "acknowledge")


def render(document: dict[str, Any]) -> str:
    """The figures of a run as Markdown: in which circumstances, the table, the profiles of the drains."""
    figures = document["figures"]
    machine, options = document["machine"], document["options"]
    circumstances = (
        f"Measured on {document['day']}: {machine['cores']} cores, {machine['system']}, "
        f"PostgreSQL {machine['postgresql']}, Python {machine['python']}, psycopg {machine['psycopg']}; "
        f"{options['rounds']} rounds"
    )
    if options["scale"] != 1:
        circumstances += f"; **sizes at {options['scale']:g} of what the targets are for**"
    rows = [
        (
            figure["name"],
            figure["target"],
            figure["result"],
            figure["spread"],
            REACHED[figure["met"]],
        )
        for figure in figures
    ]
    parts = [
        f"{circumstances}.",
        table(("figure", "target", "median", "least - most", "reached"), rows),
    ]
    profiles = [figure for figure in figures if "profile" in figure["details"]]
    if profiles:
        parts += [
            "Where the processor's time of a drain goes, in seconds (by the clock in parentheses):",
            table(("drain", *STAGES, "rest"), map(_profile, profiles)),
        ]
    users = [figure for figure in figures if "cpu" in figure["details"]]
    if users:
        parts += [
            "Processor time by who used it, in seconds:",
            table(("drain", "who"), map(_users, users)),
        ]
    return "\n\n".join(parts)


def replace(page: str, text: str, begin: str = BEGIN) -> str:
    """Put a text between a marker of a page and the end after it."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    if not rest or END not in rest:
        raise SystemExit(f"the page has no {begin} with {END} after it")
    return f"{before}{begin}\n\n{text}\n\n{END}{after}"


def _profile(figure: dict[str, Any]) -> tuple[str, ...]:
    stages: dict[str, dict[str, float]] = figure["details"]["profile"]["stages"]
    rest = [spent for name, spent in stages.items() if name not in STAGES]
    cells = []
    for name in STAGES:
        spent = stages.get(name, {"cpu": 0, "seconds": 0})
        cells.append(f"{spent['cpu']:.2f} ({spent['seconds']:.2f})")
    others = sum(spent["cpu"] for spent in rest), sum(spent["seconds"] for spent in rest)
    return (figure["name"], *cells, f"{others[0]:.2f} ({others[1]:.2f})")


def _users(figure: dict[str, Any]) -> tuple[str, str]:
    used: dict[str, float] = figure["details"]["cpu"]
    listed = sorted(used.items(), key=lambda item: -item[1])
    return figure["name"], ", ".join(f"{name} {seconds:.2f}" for name, seconds in listed)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="?", default=JSON_PATH)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    document = json.loads(arguments.json.read_text(encoding="utf-8"))
    page = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(replace(page, render(document)), encoding="utf-8")
    print(arguments.page)


if __name__ == "__main__":
    main()
