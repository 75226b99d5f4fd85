"""The files of deploy/ and the Dockerfile: what can be checked of them without an engine to run them on."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sync_pipeline.config import load
from tests.deployment import COMPOSE, DEPLOY, ROOT, SERVICES, command, proxy_configuration

DATABASES = {"crm-db", "billing-db", "dagster-db"}
OFFLINE_SYSTEMD = 250
PROGRAMS = {"stream", "code", "webserver", "daemon"}
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def run(*words: str | Path) -> str:
    """Run a checker and return its complaints; they are the explanation of a failure, too."""
    ended = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stderr


def needs(program: str) -> str:
    """The path of a program that `make setup` does not bring; skips the test where it is missing."""
    found = shutil.which(
        program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    )
    if found is None:
        pytest.skip(f"{program} is not installed here")
    return found


def environment(service: str) -> dict[str, str]:
    return dict(SERVICES[service].get("environment", {}))


def test_the_compose_file_is_valid() -> None:
    run(
        needs("check-jsonschema"),
        "--builtin-schema",
        "vendor.compose-spec",
        DEPLOY / "compose.yaml",
    )


def test_only_the_proxy_can_be_reached_and_only_from_this_machine() -> None:
    assert {name: s["ports"] for name, s in SERVICES.items() if "ports" in s} == {
        "proxy": ["127.0.0.1:3000:8080"]
    }
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {n: s["networks"] for n, s in SERVICES.items() if s["networks"] != ["inside"]} == {
        "proxy": ["inside", "outside"]
    }


def test_every_service_can_be_watched_stopped_and_kept_small() -> None:
    assert set(SERVICES) == DATABASES | PROGRAMS | {"proxy"}
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"], name
        assert service["stop_grace_period"], name
        assert service["restart"] == "unless-stopped", name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name
    for name in (*PROGRAMS, "proxy"):
        assert SERVICES[name]["read_only"] is True, name
        assert SERVICES[name]["cap_drop"] == ["ALL"], name
    for name in PROGRAMS:
        assert SERVICES[name]["deploy"]["resources"]["limits"]["memory"], name


def test_each_service_is_given_only_the_passwords_that_it_needs() -> None:
    variable = re.compile(r"\$\{(\w+PASSWORD)")
    given = {
        name: set(variable.findall(str(environment(name))))
        for name in SERVICES
        if environment(name)
    }
    assert given == {
        "crm-db": {"CRM_PASSWORD"},
        "billing-db": {"BILLING_PASSWORD"},
        "dagster-db": {"DAGSTER_PASSWORD"},
        "stream": {"CRM_PASSWORD", "BILLING_PASSWORD"},
        "code": {"CRM_PASSWORD", "BILLING_PASSWORD", "DAGSTER_PASSWORD"},
        "webserver": {"DAGSTER_PASSWORD"},
        "daemon": {"DAGSTER_PASSWORD"},
    }
    example = (DEPLOY / ".env.example").read_text("utf-8")
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == set().union(*given.values())
    passwords = [text for name in SERVICES for text in _values(environment(name), "password")]
    assert passwords
    assert all("${" in text for text in passwords)


def _values(values: dict[str, str], what: str) -> list[str]:
    return [text for key, text in values.items() if what in f"{key} {text}".lower()]


def test_the_processes_get_all_that_their_files_read_from_the_environment() -> None:
    settings = (ROOT / "dagster_home/prod/dagster.yaml").read_text("utf-8")
    for_storage = set(re.findall(r"\{env: (\w+)\}", settings))
    assert for_storage
    for name in ("code", "webserver", "daemon"):
        assert for_storage <= set(environment(name)), name
    for name in ("stream", "code"):
        variables = {
            key: re.sub(r"\$\{[^}]*\}", "secret", text) for key, text in environment(name).items()
        }
        config = load(DEPLOY / "example/sync.yaml", variables)
        assert [node.name for node in config.nodes] == ["crm", "billing"]


def test_the_workspace_leads_to_the_code_server() -> None:
    workspace: dict[str, Any] = yaml.safe_load((DEPLOY / "workspace.yaml").read_text("utf-8"))
    server = workspace["load_from"][0]["grpc_server"]
    words = SERVICES["code"]["command"]
    assert server["host"] in SERVICES
    assert str(server["port"]) == words[words.index("--port") + 1]
    assert server["location_name"] == words[words.index("--location-name") + 1]


def test_the_image_runs_as_nobody_from_locked_packages_and_is_stopped_by_sigterm() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["10001"]
    assert 'ENTRYPOINT ["tini", "-g", "--"]' in DOCKERFILE
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert installs
    assert all("--constraint requirements.lock" in install for install in installs)
    copied = {
        path
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for path in line.split()[:-1]
    }
    assert all((ROOT / path).exists() for path in copied)
    admitted = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert {f"!{path}" for path in copied} == {line for line in admitted if line.startswith("!")}


def test_the_dockerfile_passes_its_linter() -> None:
    run(needs("hadolint"), ROOT / "Dockerfile")


def test_nginx_takes_the_configuration_of_the_proxy(tmp_path: Path) -> None:
    nginx = needs("nginx")
    path = tmp_path / "nginx.conf"
    path.write_text(proxy_configuration({"/tmp/": f"{tmp_path}/"}), "utf-8")  # noqa: S108 - of the container
    run(nginx, "-t", "-q", "-c", path, "-p", tmp_path)


def test_systemd_starts_what_compose_starts() -> None:
    places = {"0.0.0.0": "127.0.0.1", "/opt/dagster/": "/var/lib/dagster/"}  # noqa: S104 - of the container
    for name in ("code", "webserver", "daemon"):
        unit = (DEPLOY / f"systemd/dagster-{name}.service").read_text("utf-8")
        started = re.search(r"^ExecStart=/opt/sync-pipeline/bin/(.*)$", unit, re.MULTILINE)
        assert started is not None
        assert started[1].split() == command(name, places)


UNITS = sorted((DEPLOY / "systemd").glob("*.*"))


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    analyze = needs("systemd-analyze")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n", "utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for unit in UNITS:
        text = unit.read_text("utf-8")
        # The programs are not where they will be, and users and files neither.
        (tmp_path / unit.name).write_text(
            re.sub(r"/opt/sync-pipeline/bin/\S+", str(program), text), "utf-8"
        )
    said = run(analyze, "verify", "--man=no", *(tmp_path / unit.name for unit in UNITS))
    # Of a directive that it does not know it only warns.
    assert [line for line in said.splitlines() if str(tmp_path) in line] == []
    version = subprocess.run([analyze, "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.split()[1]) < OFFLINE_SYSTEMD:
        return  # it can only judge units that are running
    for unit in (path for path in UNITS if path.suffix == ".service"):
        run(analyze, "security", "--offline=true", "--threshold=25", tmp_path / unit.name)


def test_a_place_that_contains_the_name_of_another_is_placed_once() -> None:
    placed = command("webserver", {"3000": "40009", "4000": "40985"})
    assert "40009" in " ".join(placed)
