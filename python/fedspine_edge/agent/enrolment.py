"""Becoming a device of a fleet: by `fedspine join`, or by what a provisioned image's `fedspine.toml` says.

Comes in: the server's address and a token. Goes out: a state directory with identity and settings.
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import sys
import uuid
from pathlib import Path

from fedspine_edge.agent.identity import (
    Identity,
    check_name,
    load_identity,
    new_secret,
    save_identity,
    split_token,
)
from fedspine_edge.agent.link import Link, fetch_ca
from fedspine_edge.agent.senses import Senses
from fedspine_edge.agent.settings import AgentSettings, save_settings
from fedspine_edge.errors import CheckpointError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a provisioned image tells its device.

    Attributes:
        url: `https://HOST:PORT` of the server.
        token: As `fedspine devices token` printed it: claim and fingerprint of the CA.
        name: The device's name; None takes one made of the host's.
        settings: How it works; without a model it has no worker.
    """

    url: str
    token: str = dataclasses.field(repr=False)
    name: str | None
    settings: AgentSettings


def load_claim(file: Path) -> Claim:
    """Returns what a `fedspine.toml` says.

    Raises:
        UsageError: It is missing, no TOML, or lacks a field.
    """
    try:
        table = tomllib.loads(file.read_text())
        server, device = table["server"], dict(table.get("device", {}))
        name = device.pop("name", None)
        settings = AgentSettings(device.pop("model", ""), device.pop("data", ""), **device)
        return Claim(str(server["url"]), f"{server['token']}.{server['ca']}", name, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"expected server and device in {file.name}, found: {error}",
            hint="fedspine image provision IMAGE --server ...",
        ) from error


def enrol(url: str, token: str, state: Path, settings: AgentSettings, *, name: str | None = None) -> str:
    """Enrols this board and returns its name; asked again after a power cut it goes on where it was.

    Args:
        url: `https://HOST:PORT`.
        token: As the operator gave it.
        state: Directory of this device; made when missing.
        settings: Its model, data and limits.
        name: Its name; made of the host's when None.

    Raises:
        UsageError: Not an address or a token, or the directory is of a device of another server.
        LinkError: The server cannot be reached, is another one, or refuses.
    """
    claim, expected = split_token(token)
    if not url.startswith("https://"):
        raise UsageError(f"expected https://HOST:PORT, found {url!r}")
    url = url.rstrip("/")
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CheckpointError(f"cannot make {state}: {error.strerror}", hint="choose another --state") from error
    identity = load_identity(state)
    if identity is not None and identity.url != url:
        raise UsageError(f"expected a device of {url}, found one of {identity.url}", hint="choose another --state")
    if identity is None or (name is not None and not identity.enrolled and identity.device_id != name):
        identity = Identity(url, fetch_ca(url, expected), check_name(name or _own_name()), new_secret())
        save_identity(state, identity)
    save_settings(state, settings)
    if not identity.enrolled:
        link = Link(identity, uuid.uuid4().hex)
        try:
            link.enroll(identity, claim, Senses(state).facts())
        finally:
            link.close()
        save_identity(state, dataclasses.replace(identity, enrolled=True))
    return identity.device_id


def _own_name() -> str:
    host = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in socket.gethostname())
    return f"{host.strip('-.')[:40] or 'device'}-{secrets.token_hex(3)}"
