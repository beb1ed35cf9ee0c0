"""Who this device is and whom it trusts: one file that only its owner can read.

Comes in: a claim token from the operator. Goes out: `Identity`. The secret is made on the device and kept before it is
sent, so that a power cut while enrolling costs nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import LinkError, UsageError

IDENTITY_FILE = "identity.json"
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
TOKEN = re.compile(r"([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")
PEM = re.compile(r"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Identity:
    """A device and its server.

    Attributes:
        url: Where the server is, `https://HOST:PORT`.
        ca: The fleet's CA certificate, PEM; the only one trusted.
        device_id: The device's name.
        secret: What proves it.
        enrolled: Whether the server knows of it.
    """

    url: str
    ca: str
    device_id: str
    secret: str = dataclasses.field(repr=False)
    enrolled: bool = False


class IdentityError(LinkError):
    """The file that says who this device is cannot be used: it stays stopped until it joins anew (exit code 7)."""

    exit_code = 7


def split_token(token: str) -> tuple[str, str]:
    """Returns a token's claim and the fingerprint of the CA it comes from.

    Raises:
        UsageError: It is no token.
    """
    found = TOKEN.fullmatch(token.strip())
    if found is None:
        raise UsageError(
            "expected a token as `fedspine serve --init` prints it, found another text",
            hint="copy the whole line, with the part behind the dot",
        )
    return found[1], found[2]


def fingerprint(ca: str) -> str:
    """Returns the SHA-256 of a PEM certificate; empty where there is none."""
    found = PEM.search(ca)
    try:
        return hashlib.sha256(base64.b64decode(found[1], validate=False)).hexdigest() if found else ""
    except ValueError:
        return ""


def new_secret() -> str:
    """Returns 256 random bits as text; waits on a board that has not gathered enough yet."""
    return secrets.token_urlsafe(32)


def check_name(name: str) -> str:
    """Returns a device's name; raises UsageError for one that cannot be."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"expected a name of letters, digits, '.', '-' and '_', found {name!r}", hint="choose one with --name"
        )
    return name


def save_identity(state: Path, identity: Identity) -> None:
    """Keeps an identity, readable by its owner alone."""
    document = {"format": FORMAT, **dataclasses.asdict(identity)}
    write_bytes(state / IDENTITY_FILE, (json.dumps(document, indent=2) + "\n").encode(), private=True)


def load_identity(state: Path) -> Identity | None:
    """Returns the identity kept in a directory, None when there is none.

    Raises:
        IdentityError: It is damaged or of another version.
    """
    file = state / IDENTITY_FILE
    try:
        document = json.loads(file.read_text())
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        return Identity(**document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IdentityError(
            f"expected the identity of this device in {file}, found: {error}",
            hint="revoke the device on the server and join again with another --name and --state",
        ) from error
