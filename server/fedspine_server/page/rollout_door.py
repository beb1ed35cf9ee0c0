"""Starting a rollout from the page: a form, what would happen, and only then the link's own function.

Comes in: requests of who is signed in. Goes out: the form with what is wrong in it, the question, or a rollout begun.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import HTTPException
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fedspine_edge.errors import UsageError
from fedspine_edge.rollout_gate import parse
from fedspine_server.link import models, rollouts
from fedspine_server.link.hub import Hub
from fedspine_server.link.rollout_schemas import RolloutRequest
from fedspine_server.page import sessions
from fedspine_server.page.desk import desk_of, session_of
from fedspine_server.page.doors import checked_form
from fedspine_server.page.render import page

logger = logging.getLogger(__name__)

EMPTY = {"model": "", "canaries": "1", "gate": "", "passage": ""}
FIRST_GATE = "ppl<=1.05*base and tokens_per_second>=0.9*base"


async def new_rollout(request: Request) -> Response:
    """Asks which model, for whom first and under which gate; then whether it is meant; then begins it."""
    hub = desk_of(request).hub
    assert hub is not None
    csrf = sessions.csrf_token(session_of(request))
    if request.method == "GET":
        return await _form(hub, csrf, EMPTY | {"gate": FIRST_GATE})
    form = await checked_form(request)
    said = EMPTY | {name: form.get(name, "") for name in EMPTY}
    try:
        if form.get("change"):
            return await _form(hub, csrf, said)
        asked = _asked(said)
        if form.get("confirmed") != "yes":
            return await _question(hub, csrf, said, asked)
        number = await asyncio.to_thread(rollouts.start, hub, asked)
    except (HTTPException, UsageError) as error:
        problem = (
            error.detail if isinstance(error, HTTPException) else f"{error}; {error.hint}" if error.hint else str(error)
        )
        return await _form(hub, csrf, said, problem)
    logger.info("operator started rollout=%d model=%s", number, asked.model_sha256[:12])
    return RedirectResponse("/rollouts", 303)


def _asked(said: dict[str, str]) -> RolloutRequest:
    try:
        return RolloutRequest(
            model_sha256=said["model"],
            gate=said["gate"],
            num_canaries=int(said["canaries"], 10),
            passage=said["passage"],
        )
    except (ValidationError, ValueError) as error:
        raise UsageError("expected a model, a number of devices that go first, and a gate of one line") from error


async def _form(hub: Hub, csrf: str, said: dict[str, str], problem: str = "") -> Response:
    found = await asyncio.to_thread(models.views, hub)
    context: dict[str, Any] = {
        "title": "Start a rollout",
        "models": found,
        "said": said,
        "problem": problem,
        "csrf": csrf,
    }
    return HTMLResponse(page("rollout.html", {**context, "question": None}), 422 if problem else 200)


async def _question(hub: Hub, csrf: str, said: dict[str, str], asked: RolloutRequest) -> Response:
    conditions = parse(asked.gate)
    first, others = await asyncio.to_thread(rollouts.would_go_first, hub, asked)
    named = {model.sha256: model.name for model in await asyncio.to_thread(models.views, hub)}
    question = {
        "model": named.get(asked.model_sha256, asked.model_sha256[:12]),
        "conditions": conditions,
        "first": first,
        "others": others,
    }
    context = {"title": "Start this rollout?", "models": [], "said": said, "problem": "", "csrf": csrf}
    return HTMLResponse(page("rollout.html", {**context, "question": question}))
