"""`fedspine serve`: the server of a fleet, from its first certificate to its last request.

Comes in: a directory. Goes out, made once by `--init`: CA, server certificate, database, `server.json`, and
`operator.json`, with which the operator's commands find the server, and `metrics.token`, with which Prometheus reads
`/metrics`. Then HTTPS until it is stopped: the link below `/v1/`, the fleet page beside it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from fedspine_edge.errors import LinkError, UsageError
from fedspine_edge.systemd import Pulse, notify
from fedspine_server.link.app import Steward, create_app
from fedspine_server.link.certificates import (
    CA_FILE,
    SERVER_FILE,
    SERVER_KEY_FILE,
    fingerprint,
    make_certificates,
    write_private,
)
from fedspine_server.link.credentials import CLAIM, OPERATOR, issue
from fedspine_server.link.hub import Hub, open_hub
from fedspine_server.page.app import Front, create_page
from fedspine_server.page.fleet_source import FleetSource
from fedspine_server.page.sessions import new_metrics_token, new_password

SETTINGS_FILE, OPERATOR_FILE, METRICS_FILE = "server.json", "operator.json", "metrics.token"
PATIENCE_SECONDS = 600.0  # merging a large model takes so long on a small server


@dataclass(frozen=True)
class ServerSettings:
    """What `--init` decided.

    Attributes:
        url: Under which devices find the server.
        host: Address it listens on.
        port: And port.
        database: URL of a database; None keeps an SQLite file in the directory.
    """

    url: str
    host: str
    port: int
    database: str | None = None


def init(directory: Path, settings: ServerSettings, names: list[str], *, claim_hours: float) -> dict[str, Any]:
    """Makes a server's directory and returns what the operator must know.

    Args:
        directory: Must not hold a server yet.
        settings: How it is reached.
        names: Host names and addresses the certificate is for.
        claim_hours: How long the claim token holds.

    Raises:
        UsageError: There is a server in the directory.
    """
    if (directory / SETTINGS_FILE).exists():
        raise UsageError(f"expected a new directory, found the server {directory}", hint="start it without --init")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca_fingerprint = make_certificates(directory, names)
    hub = open_hub(directory, database=settings.database)
    with hub.database.write() as session:
        now = hub.clock()
        operator = issue(session, OPERATOR, now=now, seconds=None)
        claim = issue(session, CLAIM, now=now, seconds=3600 * claim_hours)
    password = new_password(hub)
    write_private(directory / METRICS_FILE, new_metrics_token(hub).encode())
    hub.database.close()
    ca = (directory / CA_FILE).read_text()
    _write_json(directory / OPERATOR_FILE, {"url": settings.url, "ca": ca, "token": operator})
    _write_json(directory / SETTINGS_FILE, dataclasses.asdict(settings))
    return {
        "url": settings.url,
        "fingerprint": ca_fingerprint,
        "token": f"{claim}.{ca_fingerprint}",
        "token_hours": claim_hours,
        "operator_file": str((directory / OPERATOR_FILE).resolve()),
        "page_password": password,
        "metrics_token_file": str((directory / METRICS_FILE).resolve()),
    }


def renew_password(directory: Path) -> str:
    """Makes a new password of the page and returns it; the old one and everybody signed in end.

    Raises:
        UsageError: There is no server in the directory.
    """
    hub = open_hub(directory, database=read_settings(directory).database)
    try:
        return new_password(hub)
    finally:
        hub.database.close()


def _write_json(path: Path, document: dict[str, Any]) -> None:
    # The database's URL may hold a password, the operator's file does hold a token.
    write_private(path, (json.dumps(document, indent=2) + "\n").encode())


def read_settings(directory: Path) -> ServerSettings:
    """Returns how a directory's server is reached.

    Raises:
        UsageError: There is none.
    """
    try:
        return ServerSettings(**json.loads((directory / SETTINGS_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"expected a server in {directory}, found: {error}", hint=f"fedspine serve --init --dir {directory}"
        ) from error


def serve(directory: Path) -> None:
    """Serves until it is stopped.

    Raises:
        LinkError: The port is taken, the database cannot be opened, or nobody looks after the runs any more.
    """
    settings = read_settings(directory)
    hub = open_hub(directory, database=settings.database, ca=(directory / CA_FILE).read_text())
    steward = Steward(hub)
    config = uvicorn.Config(
        Front(create_app(hub, steward), create_page(FleetSource(hub), hub)),
        ssl_certfile=directory / SERVER_FILE,
        ssl_keyfile=directory / SERVER_KEY_FILE,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,  # longer than a long poll, so that a device keeps its connection
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    server = _Server(config, hub)
    _watch(server, steward)
    try:
        # Over a database of its own, several processes may share the port: each takes some of the devices.
        listener = socket.create_server((settings.host, settings.port), reuse_port=settings.database is not None)
    except OSError as error:
        raise LinkError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", hint="choose another --port"
        ) from error
    logging.getLogger(__name__).info("serving url=%s ca=%s", settings.url, fingerprint(directory / CA_FILE)[:12])
    with listener:
        server.run([listener])
    if steward.failed:
        raise LinkError("expected runs to be looked after, found that it ended by an error", hint="see the log above")


class _Server(uvicorn.Server):
    """uvicorn, which tells systemd when it is ready and ends long polls when it stops."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to answer."""
        await super().startup(sockets)
        notify("READY=1")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops: devices wait for nothing here any more."""
        notify("STOPPING=1")
        self._hub.bell.close_soon()
        await super().shutdown(sockets)


def _watch(server: uvicorn.Server, steward: Steward) -> None:
    """The service lives while its steward does: its thread beats the pulse."""
    pulse = Pulse(PATIENCE_SECONDS)

    def look() -> None:
        beats = -1
        while not server.should_exit:
            time.sleep(1.0)
            # A server that answers and moves no run would look well: better that systemd starts it anew.
            server.should_exit = server.should_exit or steward.failed
            if steward.beats != beats:
                beats = steward.beats
                pulse.beat()

    pulse.start()
    threading.Thread(target=look, name="pulse", daemon=True).start()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    serve(Path(sys.argv[1]))
