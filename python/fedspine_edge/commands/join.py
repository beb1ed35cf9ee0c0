"""`fedspine join`: makes this board a device of a fleet.

Comes in: the server's address and a token. Goes out: a state directory with identity and settings; then the agent.
"""

from __future__ import annotations

import dataclasses
import os
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


def join(url: str, token: str, state: Path, settings: AgentSettings, *, name: str | None = None) -> str:
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


def run_agent(state: Path) -> None:
    """Becomes the agent: the program's own libraries would take twice its memory."""
    os.execv(sys.executable, [sys.executable, "-m", "fedspine_edge.agent", str(state)])
