"""What mkdocs is told besides `mkdocs.yml`: pages from outside of `docs/`, and a navigation that fits the pages.

The pages are written to be read in the repository, where `../sync.example.yaml` leads out of `docs/`. On the site such
a file is published beside the pages, and the README is the first of them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages from outside of docs/, by what they are called on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
MORE = "More"
# The target of a link or picture, without its anchor.
TARGET = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#\s])")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside and the files that pages link to, then make the navigation fit."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts |= {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
    for path, text in texts.items():
        _put(files, File.generated(config, _place(path), content=TARGET.sub(_moved(path), text)))
        for target in _targets(path, text):
            if not target.startswith("docs/") and target not in PAGES:
                source = str(ROOT / target)
                _put(files, File.generated(config, _place(target), abs_src_path=source))
    named = _named(config.nav)
    others = sorted(f.src_uri for f in files.documentation_pages() if f.src_uri not in named)
    config.nav = [*_existing(config.nav, files), *([{MORE: others}] if others else [])]
    return files


def _place(path: str) -> str:
    """Return where a file of the repository is on the site."""
    return PAGES.get(path, path.removeprefix("docs/"))


def _target(path: str, link: str) -> str | None:
    """Return the file of the repository that a link of another one leads to, if there is one."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if (ROOT / target).is_file() else None


def _targets(path: str, text: str) -> set[str]:
    found = (_target(path, link) for link in TARGET.findall(text))
    return {target for target in found if target is not None}


def _moved(path: str) -> Any:
    """Return what makes a link of a file one of its page; a link that leads nowhere is left for mkdocs to report."""

    def link(match: re.Match[str]) -> str:
        target = _target(path, match[1])
        if target is None:
            return match[0]
        return posixpath.relpath(_place(target), posixpath.dirname(_place(path)) or ".")

    return link


def _put(files: Files, file: File) -> None:
    known = files.get_file_from_path(file.src_uri)
    if known is not None:
        files.remove(known)
    files.append(file)


def _existing(entry: Any, files: Files) -> Any:
    """Return a part of the navigation without the pages that do not exist."""
    if isinstance(entry, list):
        return [part for part in (_existing(part, files) for part in entry) if part]
    if isinstance(entry, dict):
        parts = {title: _existing(part, files) for title, part in entry.items()}
        return {title: part for title, part in parts.items() if part}
    return entry if files.get_file_from_path(entry) is not None else None


def _named(entry: Any) -> set[str]:
    """Return the pages that a part of the navigation names."""
    if isinstance(entry, dict):
        return _named(list(entry.values()))
    if isinstance(entry, list):
        return {page for part in entry for page in _named(part)}
    return {entry}
