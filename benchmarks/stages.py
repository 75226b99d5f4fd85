"""Where the time of a drain goes, by the stages of the protocol, as the servers see it.

While a profile is taken both servers log what each statement of the database took, by the clock and of the processor
(`log_statement_stats`). So it does not matter how the consumer sends them: in threads, in a pipeline, by COPY. Work
on both servers overlaps, so the seconds of the stages may add up to more than the time of the clock; the processor's
do not. A COPY waits for its other end: what it took by the clock tells less than what it took of the processor.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from psycopg import sql

from benchmarks.arena import Databases
from sync_pipeline.servers import Server

# The first pattern that a statement of a writer contains names its stage. A reader only reads the source.
_STAGES = [
    ("stage", r"^copy .* from stdin|^(create|truncate|drop|analyze)\b.*stage"),
    ("source read", r"^copy "),
    ("commit", r"^(commit|end)\b"),
    ("upsert", r"(insert into|merge into|update|delete from)\b.*stage"),
    ("acknowledge", r"(delete from|update|insert into) [^ ]*sync_(events|failures)|set last_pass_at"),
    ("check", r"has_events|has_pending|set constraints|sync_failures|sync_events|stage"),
    ("ledger", r"sync_applied"),
    ("catalog", r"pg_class|pg_constraint|pg_attribute|pg_trigger|sync_node|pg_settings|set_config"),
]  # fmt: skip
_COMPILED = [(stage, re.compile(pattern, re.IGNORECASE)) for stage, pattern in _STAGES]

# With the servers' prefix of each entry, see `arena.LOG_LINE_PREFIX`.
_ENTRY = re.compile(
    r"^(?P<pid>\d+) (?P<database>\S+) (?P<application>.*?): LOG:  \w+(?: MESSAGE)? STATISTICS\n"
    r"(?P=pid) .*?: DETAIL:  ! system usage stats:\n"
    r"\t!\t(?P<user>[\d.]+) s user, (?P<system>[\d.]+) s system, (?P<elapsed>[\d.]+) s elapsed\n"
    r"(?:\t!.*\n)*"
    r"(?P=pid) .*?: STATEMENT:  (?P<statement>.*\n(?:\t.*\n)*)",
    re.MULTILINE,
)
_NOTABLE = 12
_NOTABLE_CHARACTERS = 160


@dataclass(slots=True)
class Spent:
    """Seconds by the clock and of the processor."""

    seconds: float = 0.0
    cpu: float = 0.0
    times: int = 0

    def add(self, seconds: float, cpu: float, times: int = 1) -> None:
        self.seconds += seconds
        self.cpu += cpu
        self.times += times

    def rounded(self) -> dict[str, float]:
        return {
            "seconds": round(self.seconds, 4),
            "cpu": round(self.cpu, 4),
            "times": self.times,
        }


@dataclass(slots=True)
class Profile:
    """What the stages took, and the dearest statements by their shortened text."""

    stages: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    statements: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))

    def read(self, node: str, log: str, database: str) -> None:
        """Add what a server has logged."""
        # What a backend's transaction was for: the commit of an acknowledgement belongs to it.
        purposes: dict[str, str] = {}
        for entry in _ENTRY.finditer(log):
            role = entry["application"].rpartition(" ")[2]
            if entry["database"] != database or not entry["application"].startswith(
                "sync-pipeline"
            ):
                continue
            text = shortened(entry["statement"])
            stage = "source read" if role == "reader" else stage_of(text)
            if stage in {"acknowledge", "upsert", "stage"}:
                purposes[entry["pid"]] = stage
            elif stage == "commit" and purposes.pop(entry["pid"], "") == "acknowledge":
                stage = "acknowledge"
            spent = (float(entry["elapsed"]), float(entry["user"]) + float(entry["system"]))
            # One message of three in the extended protocol executes; the other two parse and plan.
            times = int("EXECUTE MESSAGE" in entry[0] or "QUERY STATISTICS" in entry[0])
            self.stages[stage].add(*spent, times)
            name = f"{node} {role}, {stage}: {text[:_NOTABLE_CHARACTERS]}"
            self.statements[name].add(*spent, times)

    def details(self, our_cpu: float, seconds: float) -> dict[str, object]:
        """As JSON has it; the transfer is what our own process does, which only hands on bytes."""
        self.stages["transfer"].add(our_cpu, our_cpu, 0)
        stages = sorted(self.stages.items(), key=lambda item: -item[1].cpu)
        statements = sorted(self.statements.items(), key=lambda item: -item[1].cpu)
        return {
            "seconds": round(seconds, 4),
            "stages": {name: spent.rounded() for name, spent in stages},
            "statements": {name: spent.rounded() for name, spent in statements[:_NOTABLE]},
        }


def stage_of(statement: str) -> str:
    """Name the stage that a statement of a writer belongs to."""
    for stage, pattern in _COMPILED:
        if pattern.search(statement):
            return stage
    return "other"


def shortened(statement: str) -> str:
    """A statement on one line, without its comments and with its numbers left out, so that equal ones look equal."""
    lines = (line.strip() for line in statement.splitlines())
    text = " ".join(line for line in lines if line and not line.startswith("--"))
    return re.sub(r"\b\d+\b", "0", text.replace('"', ""))


@contextmanager
def recorded(databases: Databases) -> Iterator[Profile]:
    """Let both servers log the statements of a database for a `with` block; the profile is filled at its end."""
    profile = Profile()
    name = sql.Identifier(databases.name)
    starts = {node: server.log_path.stat().st_size for node, server in databases.servers.items()}
    for session in databases.sessions:
        session.execute(sql.SQL("alter database {} set log_statement_stats = on").format(name))
    try:
        yield profile
    finally:
        for session in databases.sessions:
            session.execute(sql.SQL("alter database {} reset log_statement_stats").format(name))
    for node, server in databases.servers.items():
        profile.read(node, _log(server, starts[node]), databases.name)


def profiled(databases: Databases) -> dict[str, object]:
    """Drain a backlog by us while both servers log their statements, which costs a little; return the profile."""
    with recorded(databases) as profile:
        report = databases.sync()
    return profile.details(report.cpu_seconds, report.seconds)


def _log(server: Server, start: int) -> str:
    with server.log_path.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace")
