"""The repository as a stranger finds it."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
# Put together here, so that this file is not found by itself.
PRIVATE = [
    first + second
    for first, second in (("/wo", "rk/"), ("/ro", "ot/"), ("--index", "-url"), ("/simp", "le/"))
]


def tracked() -> list[Path]:
    """The files of the repository, by git's account."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_registry_or_a_path_of_somebodys_machine() -> None:
    files = tracked()
    assert ROOT / "README.md" in files
    found = [
        f"{path.relative_to(ROOT)}: {words}"
        for path in files
        for words in PRIVATE
        if words.encode() in path.read_bytes()
    ]
    assert found == []


def test_the_lock_holds_names_and_versions_only_and_one_of_each() -> None:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line)] == []
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))


def test_what_is_locked_installs_on_the_oldest_python_that_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    locked = [line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()]
    needs = {
        f"{name} {installed.version}": installed.metadata["Requires-Python"]
        for name in locked
        for installed in metadata.distributions(name=name)
        if "Requires-Python" in installed.metadata
    }
    assert len(needs) > len(locked) / 2
    assert [which for which, pythons in needs.items() if oldest not in SpecifierSet(pythons)] == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert sorted(re.findall(r"^  make ([\w-]+) ", shown, re.MULTILINE)) == sorted(targets)


def test_the_changelog_has_one_list_for_each_kind_of_change() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for release in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", release, re.MULTILINE)
        assert len(kinds) == len(set(kinds))
        for part in re.split(r"^### .*\n", release, flags=re.MULTILINE)[1:]:
            entries = part.strip("\n")
            assert entries.startswith("- ")
            assert "\n\n" not in entries, f"an empty line divides a list after: {entries[:60]}"


def test_each_query_has_a_name_of_its_own() -> None:
    names = re.findall(
        r"^-- name: (\w+)", (ROOT / "sql/queries.sql").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(set(names)) == sorted(names)
