"""Who may speak: secrets that are kept as hashes only, tokens that expire, and a limit on how often one may try.

Comes in: bearer tokens from outside. Goes out: a `Principal`, or nothing. Secrets are 256 random bits, so one SHA-256
protects them at rest; they are compared in constant time.

Source: RFC 6750 (bearer tokens).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, select
from sqlalchemy.orm import Session

from fedspine_server.link.tables import REVOKED, CredentialRow, DeviceRow

OPERATOR, CLAIM = "operator", "claim"
SECRET_BYTES = 32
MAX_TOKEN_CHARACTERS = 256
MAX_ADDRESSES = 10_000
KNOWN_SECONDS = 1.0

DEVICE = select(DeviceRow.secret_sha256, DeviceRow.status, DeviceRow.boot_id).where(
    DeviceRow.device_id == bindparam("device_id")
)


@dataclass(frozen=True)
class Principal:
    """Whose request this is.

    Attributes:
        kind: `device` or `operator`.
        device_id: Which device; empty for an operator.
        status: The device's status; empty for an operator.
        boot_id: The boot that owns the device's identity at present.
    """

    kind: str
    device_id: str = ""
    status: str = ""
    boot_id: str = ""


def new_secret() -> str:
    """Returns 256 random bits as text."""
    return secrets.token_urlsafe(SECRET_BYTES)


def hashed(secret: str) -> str:
    """Returns what is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def issue(session: Session, kind: str, *, now: float, seconds: float | None) -> str:
    """Makes a token and returns it; only its hash stays.

    Args:
        session: A writing session.
        kind: `OPERATOR` or `CLAIM`.
        now: Server's clock.
        seconds: How long it holds; None for ever.
    """
    session.execute(delete(CredentialRow).where(CredentialRow.expires_at < now))
    secret = new_secret()
    expires_at = None if seconds is None else now + seconds
    session.add(CredentialRow(sha256=hashed(secret), kind=kind, created_at=now, expires_at=expires_at))
    return secret


def claim_is_good(session: Session, token: str, *, now: float) -> bool:
    """Returns whether a claim token was issued here and has not expired."""
    return _credential(session, token, CLAIM, now)


def principal_of(session: Session, token: str, *, now: float) -> Principal | None:
    """Returns whose bearer token this is: `DEVICE.SECRET` of a device, or an operator's; None when nobody's."""
    if not token or len(token) > MAX_TOKEN_CHARACTERS:
        return None
    device_id, dot, secret = token.rpartition(".")
    if not dot:
        return Principal("operator") if _credential(session, token, OPERATOR, now) else None
    device = session.execute(DEVICE, {"device_id": device_id}).first()
    # A hash is made and compared also where there is no such device, so that time tells nothing.
    known = device.secret_sha256 if device is not None else "0" * 64
    if not hmac.compare_digest(known, hashed(secret)) or device is None or device.status == REVOKED:
        return None
    return Principal("device", device_id, device.status, device.boot_id)


def _credential(session: Session, token: str, kind: str, now: float) -> bool:
    row = session.get(CredentialRow, hashed(token))
    return row is not None and row.kind == kind and (row.expires_at is None or row.expires_at > now)


class KnownTokens:
    """Whose token it is, remembered for a moment: the calls of a round come close together.

    What this process changes holds at once; what another one did, after `KNOWN_SECONDS`. No secret is kept, and only
    tokens that are good, so there are never more entries than tokens.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[float, Principal]] = {}

    def get(self, token: str, now: float) -> Principal | None:
        """Returns whose token it is, None when that has to be looked up."""
        known = self._known.get(_digest(token))
        return known[1] if known is not None and now < known[0] else None

    def put(self, token: str, principal: Principal, now: float) -> None:
        """Remembers what was looked up."""
        self._known[_digest(token)] = (now + KNOWN_SECONDS, principal)

    def forget(self) -> None:
        """Has every token looked up again."""
        self._known = {}


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class RateLimit:
    """So many tries a minute from one address; memory is bounded, and a flood of addresses shares one budget.

    Args:
        tries: Tries in a row.
        every_seconds: After how long a try is given back.
    """

    def __init__(self, tries: int, every_seconds: float) -> None:
        self._tries = tries
        self._every = every_seconds
        self._spent: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def wait_seconds(self, address: str, now: float) -> float:
        """Spends a try and returns 0, or returns how long to wait for one."""
        with self._lock:
            if len(self._spent) >= MAX_ADDRESSES:
                self._forget(now)
            if len(self._spent) >= MAX_ADDRESSES and address not in self._spent:
                address = ""
            spent, since = self._spent.get(address, (0.0, now))
            spent = max(0.0, spent - max(0.0, now - since) / self._every)
            if spent + 1 > self._tries:
                return (spent + 1 - self._tries) * self._every
            self._spent[address] = (spent + 1, now)
            return 0.0

    def _forget(self, now: float) -> None:
        self._spent = {
            address: (spent, since)
            for address, (spent, since) in self._spent.items()
            if spent > (now - since) / self._every
        }
