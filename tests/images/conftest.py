"""What the tests of images share: the image, a server on this machine, a folder of updates. See also tests/edge."""

import functools
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "edge"))

from machine import SERVER_ADDRESS, SERVER_PORT, UPDATES_PORT, Machine

from fedspine_edge.agent.identity import split_token
from fedspine_edge.agent.link import UnreachableError, fetch_ca
from fedspine_edge.commands import serve
from fedspine_edge.commands.operate import OPERATOR_FILE, Operator
from fedspine_edge.images.provision import Belonging, provision

UPDATES_URL = f"http://{SERVER_ADDRESS}:{UPDATES_PORT}/"


class World:
    """A server of a fleet, a web server with a folder of updates, and boards that reach both."""

    def __init__(self, folder: Path, image: Path, port: int, token: str, operator: Operator) -> None:
        self.folder, self.image, self.port, self.token, self.operator = folder, image, port, token, operator
        self.updates = folder / "updates"
        self.updates.mkdir()
        self.updates_port = 0
        self.fetched: dict[str, float] = {}  # when each file of it was asked for last

    def board(self, name: str = "board-1", *, memory_mib: int = 1024, **told: object) -> Machine:
        """Returns a board that was told of this server, switched off."""
        board = Machine(
            self.folder / name, self.image, self.port, updates_port=self.updates_port, memory_mib=memory_mib
        )
        url = f"https://{SERVER_ADDRESS}:{SERVER_PORT}"
        provision(board.disk, Belonging(url, self.token, name=name, updates=UPDATES_URL, **told))  # type: ignore[arg-type]
        return board


class Watched(http.server.SimpleHTTPRequestHandler):
    """A web server that remembers when a file was asked for, and writes no log."""

    def __init__(self, *rest: Any, fetched: dict[str, float], **more: Any) -> None:
        self._fetched = fetched
        super().__init__(*rest, **more)

    def log_request(self, *_: object) -> None:
        """Remembers a request."""
        self._fetched[self.path] = time.monotonic()

    def log_message(self, *_: object) -> None:
        """Writes nothing."""


@pytest.fixture(scope="session")
def image() -> Path:
    folder = Path(os.environ.get("FEDSPINE_IMAGE_FOLDER", "dist/images/generic-arm64-agent"))
    return next(folder.glob("*.img"))


@pytest.fixture
def world(tmp_path: Path, image: Path) -> Iterator[World]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = serve.ServerSettings(f"https://127.0.0.1:{port}", "127.0.0.1", port)
    told = serve.init(tmp_path / "server", settings, [SERVER_ADDRESS, "127.0.0.1"], claim_hours=1)
    command = [sys.executable, "-m", "fedspine_edge.commands.serve", str(tmp_path / "server")]
    with (tmp_path / "server.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        limit = time.monotonic() + 60
        while True:
            try:
                fetch_ca(settings.url, split_token(told["token"])[1])
                break
            except UnreachableError:
                assert time.monotonic() < limit
                time.sleep(0.2)
        operator = Operator(tmp_path / "server" / OPERATOR_FILE)
        found = World(tmp_path, image, port, told["token"], operator)
        handler = functools.partial(Watched, directory=str(found.updates), fetched=found.fetched)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
            found.updates_port = web.server_port
            thread = threading.Thread(target=web.serve_forever)
            thread.start()
            yield found
            web.shutdown()
            thread.join()
        operator.close()
        process.terminate()
