"""The proxy of deploy/: nginx itself with deploy/nginx.conf, in front of a server that tells what reached it."""

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.dagster_processes import free_port
from tests.deployment import proxy_configuration
from tests.helpers import eventually

LOGIN = {"Authorization": f"Basic {base64.b64encode(b'ops:secret').decode()}"}


class Told(BaseHTTPRequestHandler):
    """Answers with the request line and the headers, as they arrived."""

    def do_GET(self) -> None:
        text = f"{self.requestline}\n{self.headers}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        """Print nothing."""


@pytest.fixture(scope="module")
def behind() -> Iterator[int]:
    """The port of a server in the place of Dagster's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def proxy(behind: int) -> Iterator[int]:
    """The port of the proxy."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed here")
    port = free_port()
    # Not below pytest's own directory, which the workers of nginx may not enter if they run as a user of their own.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        digest = base64.b64encode(hashlib.sha1(b"secret").digest()).decode()  # noqa: S324 - one of its formats
        (directory / "htpasswd").write_text(f"ops:{{SHA}}{digest}\n", "utf-8")
        places = {
            "/tmp/": f"{directory}/",  # noqa: S108 - of the container
            "/dev/stderr": f"{directory}/error.log",
            "/dev/stdout": f"{directory}/access.log",
            "/run/secrets/htpasswd": f"{directory}/htpasswd",
            "listen 8080": f"listen 127.0.0.1:{port}",
            "http://webserver:3000": f"http://127.0.0.1:{behind}",
        }
        configuration = directory / "nginx.conf"
        configuration.write_text(proxy_configuration(places), "utf-8")
        command = [nginx, "-p", name, "-c", str(configuration), "-g", "daemon off;"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                eventually("the proxy listens", lambda: is_up(port))
                yield port
            finally:
                process.terminate()


def is_up(port: int) -> bool:
    try:
        return ask(port, "/health") == (200, "ok\n")
    except OSError:
        return False


def ask(
    port: int, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> tuple[int, str]:
    with closing(HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, headers=dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_nobody_gets_through_without_the_password(proxy: int) -> None:
    guess = {"Authorization": f"Basic {base64.b64encode(b'ops:guess').decode()}"}
    assert [ask(proxy, "/graphql", login)[0] for login in ({}, guess)] == [401, 401]
    status, told = ask(proxy, "/runs?cursor=1", LOGIN)
    assert status == 200
    assert told.startswith("GET /runs?cursor=1 HTTP/1.1\n")
    assert f"Host: 127.0.0.1:{proxy}" in told
    assert "Authorization" not in told  # the password stays at the door


def test_a_subscription_of_the_ui_passes_as_a_websocket(proxy: int) -> None:
    _, told = ask(proxy, "/graphql", {**LOGIN, "Upgrade": "websocket", "Connection": "Upgrade"})
    assert "Upgrade: websocket" in told
    assert "Connection: upgrade" in told


def test_a_page_of_another_site_cannot_use_the_login_of_who_looks_at_it(proxy: int) -> None:
    own = {"Origin": f"http://127.0.0.1:{proxy}", "Sec-Fetch-Site": "same-origin"}
    assert ask(proxy, "/graphql", {**LOGIN, **own}, "POST")[0] == 200
    for foreign in (
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Origin": f"http://127.0.0.1:{proxy}.elsewhere.example", "Sec-Fetch-Mode": "navigate"},
    ):
        assert ask(proxy, "/graphql?query=mutation", {**LOGIN, **foreign}, "POST")[0] == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(proxy, "/runs", {**LOGIN, **link})[0] == 200  # a link in a message still works
