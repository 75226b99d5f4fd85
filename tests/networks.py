"""Networks that fail: a proxy that loses the answer to a COMMIT, and two network namespaces that lose each other."""

import os
import selectors
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

import pytest

CHUNK_BYTES = 65536
COMMIT = b"COMMIT"
# The prefixes of RFC 5737 are for examples: no host has such an address.
SERVER_ADDRESS = "198.51.100.1"
CLIENT_ADDRESS = "198.51.100.2"
NOBODY = "02:00:00:00:00:01"

Loses = Literal["the answer", "the commit"]


class Proxy:
    """A TCP proxy in front of a server. Once armed it cuts the connection that commits next, and only that.

    It loses the answer, so that the commit has happened and nobody was told, or the commit itself.
    """

    def __init__(self, dsn: str) -> None:
        parts = urlsplit(dsn)
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.dsn = parts._replace(netloc=f"postgres@127.0.0.1:{port}").geturl()
        self._loses: Loses | None = None
        self.cuts = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone would not wake the thread that waits in `accept`.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def arm(self, loses: Loses) -> None:
        """Cut at the next COMMIT."""
        self._loses = loses

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(self._server) as server,
            selectors.DefaultSelector() as ready,
            suppress(OSError),
        ):
            other = {client: server, server: client}
            for side in other:
                ready.register(side, selectors.EVENT_READ)
            while True:
                for key, _ in ready.select():
                    side = client if key.fileobj is client else server
                    data = side.recv(CHUNK_BYTES)
                    if not data:
                        return
                    if side is client and self._loses is not None and COMMIT in data.upper():
                        loses, self._loses = self._loses, None
                        if loses == "the answer":
                            server.sendall(data)
                            server.recv(CHUNK_BYTES)
                        self.cuts += 1
                        return
                    other[side].sendall(data)


@dataclass(frozen=True)
class Namespaces:
    """Two network namespaces with a cable between them; neither has another way out."""

    server: str
    client: str

    def command(self, namespace: str, *command: str) -> list[str]:
        """The command that runs a program in one of them."""
        return ["ip", "netns", "exec", namespace, *command]

    def run_here(self, namespace: str) -> None:
        """Move this thread, and so what it starts, into one of them."""
        with Path("/run/netns", namespace).open("rb") as file:
            _setns(file.fileno())

    def lose_each_other(self) -> None:
        """Let every packet be dropped without a word, either way: both send to a machine that is not there."""
        for namespace, peer in ((self.server, CLIENT_ADDRESS), (self.client, SERVER_ADDRESS)):
            _ip(
                "-n",
                namespace,
                "neigh",
                "replace",
                peer,
                "lladdr",
                NOBODY,
                "dev",
                "cable",
                "nud",
                "permanent",
            )

    def find_each_other(self) -> None:
        """Mend it."""
        for namespace, peer in ((self.server, CLIENT_ADDRESS), (self.client, SERVER_ADDRESS)):
            _ip("-n", namespace, "neigh", "del", peer, "dev", "cable")


@contextmanager
def two_namespaces() -> Iterator[Namespaces]:
    """Make the namespaces for a `with` block; skips the test where that cannot be done."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    spaces = Namespaces(f"sync-server-{os.getpid()}", f"sync-client-{os.getpid()}")
    with ExitStack() as exits:
        try:
            for name in (spaces.server, spaces.client):
                _ip("netns", "add", name)
                exits.callback(_ip, "netns", "del", name)
            _ip(
                *("-n", spaces.server, "link", "add", "cable", "type", "veth"),
                *("peer", "name", "cable", "netns", spaces.client),
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for name, address in ((spaces.server, SERVER_ADDRESS), (spaces.client, CLIENT_ADDRESS)):
            _ip("-n", name, "addr", "add", f"{address}/30", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield spaces


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _setns(descriptor: int) -> None:
    import ctypes  # noqa: PLC0415 - Python 3.12 has os.setns

    clone_newnet = 0x40000000
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet) != 0:
        raise OSError(ctypes.get_errno(), "setns")
