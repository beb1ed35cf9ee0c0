"""Who may look at the page: signed in with the operator's token or the page's password, known by a cookie.

Comes in: what a browser sends. Goes out: a session's secret, or nothing. Sessions and the password are credentials on
record like every other, as hashes; so any server process knows them, and they end for all at once. The token that
protects actions is made of the session's secret, which no other origin can read.

Source: OWASP Cross-Site Request Forgery Prevention (HMAC-based token); RFC 6265bis (`__Host-`, `SameSite`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie

from sqlalchemy import delete

from fedspine_server.link.credentials import OPERATOR, hashed, issue
from fedspine_server.link.hub import Hub
from fedspine_server.link.tables import CredentialRow

SESSION, PASSWORD, METRICS = "session", "page-password", "metrics"
COOKIE = "__Host-fedspine"
SESSION_SECONDS = 12 * 3600.0
LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"
PASSWORD_LETTERS, GROUP = 20, 5  # 31 ** 20 is 99 bits, so one SHA-256 protects it at rest
MOST_LETTERS = 256


def new_password(hub: Hub) -> str:
    """Makes the page's password and returns it; an older one and every session end."""
    letters = "".join(secrets.choice(LETTERS) for _ in range(PASSWORD_LETTERS))
    with hub.database.write() as session:
        session.execute(delete(CredentialRow).where(CredentialRow.kind.in_((PASSWORD, SESSION))))
        row = CredentialRow(sha256=hashed(letters), kind=PASSWORD, created_at=hub.clock(), expires_at=None)
        session.add(row)
        hub.record(session, "page_password_made")
    return "-".join(letters[at : at + GROUP] for at in range(0, PASSWORD_LETTERS, GROUP))


def new_metrics_token(hub: Hub) -> str:
    """Makes a token that reads `/metrics` and nothing else, and returns it."""
    with hub.database.write() as session:
        return issue(session, METRICS, now=hub.clock(), seconds=None)


def sign_in(hub: Hub, said: str) -> str | None:
    """Returns the secret of a new session, None when what was said is neither the password nor an operator's token."""
    said = said.strip()
    plain = said.replace("-", "").replace(" ", "").lower()
    if not (holds(hub, said, OPERATOR) or holds(hub, plain, PASSWORD)):
        return None
    with hub.database.write() as session:
        secret = issue(session, SESSION, now=hub.clock(), seconds=SESSION_SECONDS)
        hub.record(session, "operator_signed_in")
    return secret


def sign_out(hub: Hub, secret: str) -> None:
    """Ends a session."""
    with hub.database.write() as session:
        session.execute(delete(CredentialRow).where(CredentialRow.sha256 == hashed(secret)))


def holds(hub: Hub, secret: str, *kinds: str) -> bool:
    """Returns whether a secret is on record as one of these kinds and has not expired."""
    if not secret or len(secret) > MOST_LETTERS:
        return False
    with hub.database.read() as session:
        row = session.get(CredentialRow, hashed(secret))
    return row is not None and row.kind in kinds and (row.expires_at is None or row.expires_at > hub.clock())


def secret_of(cookies: str) -> str:
    """Returns the session's secret in a Cookie header, empty when there is none."""
    try:
        morsel = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


def csrf_token(secret: str) -> str:
    """Returns what a form of this session must carry."""
    return hmac.new(secret.encode(), b"fedspine csrf", hashlib.sha256).hexdigest()


def csrf_is_good(secret: str, token: str) -> bool:
    """Returns whether a form came from a page of this session."""
    return hmac.compare_digest(csrf_token(secret).encode(), token.encode())


def cookie_header(secret: str) -> str:
    """Returns a Set-Cookie header: no script reads it, no other site sends it; an empty secret takes it away."""
    age = int(SESSION_SECONDS) if secret else 0
    return f"{COOKIE}={secret}; Max-Age={age}; Path=/; Secure; HttpOnly; SameSite=Strict"
