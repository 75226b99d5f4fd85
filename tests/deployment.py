"""What `deploy/compose.yaml` says, for tests that start the same processes without containers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]


def command(service: str, places: Mapping[str, str]) -> list[str]:
    """The command of a service, with the places of the containers replaced by those of a test."""
    return [_placed(word, places) for word in SERVICES[service]["command"]]


def health_check(service: str, places: Mapping[str, str]) -> list[str]:
    """The health check of a service as a command, placed likewise."""
    kind, *words = SERVICES[service]["healthcheck"]["test"]
    return [
        *(["sh", "-c"] if kind == "CMD-SHELL" else []),
        *(_placed(word, places) for word in words),
    ]


def proxy_configuration(places: Mapping[str, str]) -> str:
    """The configuration of the proxy, placed likewise."""
    return _placed((DEPLOY / "nginx.conf").read_text("utf-8"), places)


def _placed(text: str, places: Mapping[str, str]) -> str:
    # In one go: what was put in may look like another place.
    names = re.compile("|".join(map(re.escape, places)))
    return names.sub(lambda found: places[found[0]], text)
