"""The pages: that they make a site, and that nobody is sent to a place that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("mkdocs", reason="the site's generator is not installed: `make setup`")


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_every_page_and_every_link_of_the_site_is_there(tmp_path: Path) -> None:
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert pages >= {"index.html", "CHANGELOG.html", "CONTRIBUTING.html"}
    assert pages >= {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")}
    assert (tmp_path / "site/sync.example.yaml").is_file()  # linked from a page, outside of docs/


def test_a_link_to_nowhere_is_an_error_and_a_new_page_is_not(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    for page in (tmp_path / "docs").glob("*.md"):
        page.write_text(f"# {page.stem}\n\n[next](limits.md)\n", "utf-8")
    (tmp_path / "README.md").write_text("# Home\n\n[no file](docs/nowhere.md)\n", "utf-8")
    (tmp_path / "docs/new.md").write_text("# New page\n\n[no part](limits.md#nothing)\n", "utf-8")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    found = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    assert len(found) == 2, built.stderr
    assert "docs/nowhere.md" in "".join(found)
    assert "limits.md#nothing" in "".join(found)
    menu = (tmp_path / "site/index.html").read_text("utf-8")
    assert "new.html" in menu[menu.index("More") :]
