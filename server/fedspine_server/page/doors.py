"""Signing in and out, and what an operator does from the page.

Comes in: forms. Goes out: a session, or the link's own function called. What changes something asks first, and takes
only a form of the same session.
"""

from __future__ import annotations

import asyncio
import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fedspine_server.page import actions, sessions
from fedspine_server.page.desk import desk_of, read_form, session_of
from fedspine_server.page.render import page

logger = logging.getLogger(__name__)


async def login(request: Request) -> Response:
    """Asks who it is, and opens a session for who knows."""
    desk = desk_of(request)
    assert desk.hub is not None
    target = request.query_params.get("next", "/")
    # A path of this server only: `//elsewhere` and `/\elsewhere` would lead away.
    target = target if target.startswith("/") and target[1:2] not in ("/", "\\") else "/"
    context = {"title": "Sign in", "next": target, "problem": ""}
    if request.method == "GET":
        return HTMLResponse(page("login.html", context))
    form = await read_form(request)
    address = request.client.host if request.client else ""
    wait = desk.logins.wait_seconds(address, desk.hub.clock())
    if wait:
        logger.warning("sign-in throttled address=%s", address)
        problem = f"Too many attempts. Try again in {math.ceil(wait)} seconds."
        headers = {"Retry-After": str(math.ceil(wait))}
        return HTMLResponse(page("login.html", context | {"problem": problem}), 429, headers)
    secret = await asyncio.to_thread(sessions.sign_in, desk.hub, form.get("password", ""))
    if secret is None:
        logger.warning("sign-in refused address=%s", address)
        problem = "That is neither the page's password nor an operator's token."
        return HTMLResponse(page("login.html", context | {"problem": problem}), 403)
    return RedirectResponse(target, 303, headers={"Set-Cookie": sessions.cookie_header(secret)})


async def checked_form(request: Request) -> dict[str, str]:
    """Returns the fields of a form of this session; HTTPException 403 for any other."""
    form = await read_form(request)
    if not sessions.csrf_is_good(session_of(request), form.get("csrf", "")):
        raise HTTPException(403, "expected a form of this session: reload the page and try again")
    return form


async def logout(request: Request) -> Response:
    """Ends a session."""
    await checked_form(request)
    hub = desk_of(request).hub
    assert hub is not None
    await asyncio.to_thread(sessions.sign_out, hub, session_of(request))
    return RedirectResponse("/login", 303, headers={"Set-Cookie": sessions.cookie_header("")})


async def action(request: Request) -> Response:
    """Asks whether it is meant; a form that came from that question, and only that, does it."""
    hub, asked = desk_of(request).hub, request.path_params
    found = actions.find(asked["kind"], asked["action"])
    if hub is None or found is None:
        raise HTTPException(404, "there is no such page")
    if request.method == "GET":
        context = {"title": found.title, "action": found, "name": asked["name"], "path": request.url.path}
        return HTMLResponse(page("confirm.html", context | {"csrf": sessions.csrf_token(session_of(request))}))
    form = await checked_form(request)
    if form.get("confirmed") != "yes":
        raise HTTPException(400, "expected a confirmed action")
    await asyncio.to_thread(found.do, hub, asked["name"])
    logger.info("operator did action=%s kind=%s name=%s", found.name, found.kind, asked["name"])
    places = {"devices": "/", "runs": f"/runs/{asked['name']}", "rollouts": "/rollouts"}
    return RedirectResponse(places[found.kind], 303)
