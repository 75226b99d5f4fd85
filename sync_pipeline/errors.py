"""Every error that the pipeline raises on purpose: one class per decision that the caller can take.

All of them are built alike, `Class(problem, node=…, remedy=…)`, and print as one readable line that says
where, what was found and what to do. Anything else that leaves the package is a bug.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

_URI_PASSWORD = re.compile(r"(\b[a-z][\w+.-]*://[^\s:/@]*):\S*@", re.IGNORECASE)
_KEYWORD_PASSWORD = re.compile(
    r"(password['\"]?\s*[=:]\s*)('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+)", re.IGNORECASE
)


def without_passwords(text: str) -> str:
    """Return `text` with what looks like a password of a connection string replaced by `***`."""
    return _KEYWORD_PASSWORD.sub(r"\1***", _URI_PASSWORD.sub(r"\1:***@", text))


class SyncPipelineError(Exception):
    """The root: catch this to catch everything that the pipeline reports on purpose."""

    exit_code: ClassVar[int] = 1
    default_remedy: ClassVar[str | None] = None

    def __init__(self, problem: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.node = node
        self.remedy = remedy if remedy is not None else self.default_remedy

    def __str__(self) -> str:
        return _line([self.node], self.problem, self.remedy)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a configuration file: where, what was found, what to do."""

    problem: str
    file: str | None = None
    line: int | None = None
    column: int | None = None
    place: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        numbers = (self.line, self.column) if self.line is not None else ()
        position = ":".join(str(part) for part in (self.file, *numbers) if part is not None)
        return _line([position, self.place], self.problem, self.remedy)


class ConfigurationError(SyncPipelineError):
    """Fix `sync.yaml`. Prints one line for each of `problems`; `problem` and `remedy` are those of the first."""

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
        place: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem, remedy=remedy)
        self.problems: tuple[Problem, ...] = (
            Problem(problem, file, line, column, place, self.remedy),
        )

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "ConfigurationError":
        """Gather all problems of a file in one error; at least one is needed."""
        error = cls(problems[0].problem, remedy=problems[0].remedy)
        error.problems = tuple(problems)
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class CatalogMismatch(SyncPipelineError):
    """Fix `sync.yaml` or the database: a table, column or key is not what the configuration says."""

    def __init__(
        self,
        problem: str,
        *,
        node: str | None = None,
        table: str | None = None,
        file: str | None = None,
        place: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem, node=node, remedy=remedy)
        self.table = table
        self.file = file
        self.place = place

    def __str__(self) -> str:
        where = self.place if self.place is not None else self.table
        return _line([self.file, where, self.node], self.problem, self.remedy)


class TableMissing(CatalogMismatch):
    """Create the table or take it out of `sync.yaml`; a running pair leaves it out meanwhile."""


class ConditionRefused(TableMissing):
    """Correct a `where` in `sync.yaml`; a running pair leaves its table out meanwhile."""


class RightsLacking(TableMissing):
    """Grant them; a running pair leaves the table out meanwhile."""


class ConnectionFailed(SyncPipelineError):
    """Wait and retry: a node cannot be reached or refuses us. Never contains a password."""

    def __init__(self, problem: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(without_passwords(problem), node=node, remedy=remedy)


class NotInstalled(SyncPipelineError):
    """Run `install`: the pipeline's schema is missing on a node, or of another version."""

    default_remedy = "run `sync-pipeline install`"


class WrongDatabase(SyncPipelineError):
    """Fix a dsn, or confirm: a node is another database than the one that was installed, or lacks its commits."""


class LockTaken(SyncPipelineError):
    """Leave it or stand by: another consumer leads this link."""

    exit_code = 3


class PoolerRefused(SyncPipelineError):
    """Fix the dsn: the connection runs through a pooler that shares sessions, so no lock would hold."""

    default_remedy = "give a direct connection, or a pooler in session mode, in the node's dsn"


class PassInterrupted(SyncPipelineError):
    """Retry after a backoff: a transient error ended the pass; it cost no record an attempt."""


class TableAltered(PassInterrupted):
    """Read the catalogs again: a table is not what it was when they were read."""

    def __init__(self, table: str, *, node: str) -> None:
        super().__init__(f"{table} was altered, renamed or replaced", node=node)


def _line(where: Sequence[str | None], problem: str, remedy: str | None) -> str:
    text = ": ".join([*(part for part in where if part), problem])
    return f"{text}; {remedy}" if remedy else text
