"""The archives that a release consists of: built from the tree, installed where there is no tree."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import sync_pipeline
from tests.helpers import Pair

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = f"sync_pipeline-{sync_pipeline.__version__}"
PURELIB = "import sysconfig; print(sysconfig.get_paths()['purelib'])"

pytest.importorskip("hatchling", reason="the build backend is not installed: `make setup`")
pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    """Run a program outside of the tree and return what it printed."""
    settings = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=settings,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of the tree, and the wheel built from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    source = folder / f"{ARCHIVE}.tar.gz"
    # Not by tarfile: only from Python 3.11.4 on does it unpack without a warning.
    run("tar", "-xzf", source, cwd=folder)
    unpacked = folder / ARCHIVE
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked)
    return source, folder / f"{ARCHIVE}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and from this one only what the wheel depends on."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    run(
        *(sys.executable, "-m", "pip", "--python", programs / "python", "--no-cache-dir", "-q"),
        *("install", "--no-index", "--no-deps", archives[1]),
        cwd=folder,
    )
    site = Path(run(programs / "python", "-c", PURELIB, cwd=folder).strip())
    # A folder that is named in a .pth file is searched last, and its own .pth files (the tree) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    return programs


def test_the_source_archive_holds_all_that_a_packager_needs(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.removeprefix(f"{ARCHIVE}/") for name in archive.getnames()}
    assert names >= {
        "sync_pipeline/py.typed",
        "sql/queries.sql",
        "sql/migrations/001_initial.sql",
        "tests/conftest.py",
        "docs/protocol.md",
        "mkdocs.yml",
        "sync.example.yaml",
        "workspace.yaml",
        "dagster_home/prod/dagster.yaml",
        "Makefile",
        "requirements.lock",
        "LICENSE",
    }
    assert not [name for name in names if name.startswith((".", "site/")) and "/" in name]


def test_the_wheel_holds_the_package_its_sql_and_its_types(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    sql = {
        f"sync_pipeline/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("sql/**/*.sql")
    }
    code = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("sync_pipeline/**/*.py")}
    assert names >= sql | code | {"sync_pipeline/py.typed"}
    assert {name.split("/")[0] for name in names} == {"sync_pipeline", f"{ARCHIVE}.dist-info"}


def test_the_installed_program_plans_an_installation(
    installed: Path, pair: Pair, tmp_path: Path
) -> None:
    """The SQL is read from inside the package: neither the tree nor its `sql/` is in reach."""
    where = run(
        installed / "python",
        "-c",
        "import sync_pipeline.queries as q; print(q.__file__)",
        cwd=tmp_path,
    )
    assert where.startswith(str(installed.parent))
    assert run(installed / "sync-pipeline", "--version", cwd=tmp_path).split()[1] == (
        sync_pipeline.__version__
    )
    plan = run(
        installed / "sync-pipeline",
        *("install", "--dry-run", "--config", pair.config_path),
        cwd=tmp_path,
    )
    assert "create table sync.sync_events" in plan.lower().replace('"', "")
