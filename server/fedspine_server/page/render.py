"""Views -> HTML: whole pages, and the parts of a page that are sent again when they change.

Comes in: a fleet, the name of a view. Goes out: text in which everything that came from outside is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from fedspine_server.page import drawing, wording
from fedspine_server.page.diagnosis import diagnose
from fedspine_server.page.views import PENDING, REVOKED, SILENT, Device, Fleet, Run, Source

TEMPLATES = Path(__file__).parent / "templates"
AGE = re.compile(r"(<time[^>]*>)[^<]*")
ORDER = {PENDING: 0, SILENT: 1}
CACHED_ROWS = 4096


@dataclass(frozen=True)
class View:
    """Which page: `fleet`, `run`, `model`, `device` or `rollouts`, and of what."""

    page: str
    name: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a page with an id of its own; a new `signature` says that it must be shown anew."""

    id: str
    html: str
    signature: object
    inside: str = ""  # id of the part that holds it: sent with that one when both are new


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.globals |= {"wording": wording, "levels": drawing.runs_of_level}
    return environment


def page(template: str, context: Mapping[str, Any]) -> str:
    """Returns a whole page."""
    return _environment().get_template(template).render(context)


def _macro(name: str) -> Any:
    return getattr(_environment().get_template("parts.html").module, name)


def parts_of(view: View, fleet: Fleet, source: Source) -> list[Part]:
    """Returns the parts of a page; empty when what it is about does not exist (any more)."""
    if view.page == "fleet":
        return _fleet_parts(fleet, writable=source.writable)
    if view.page == "device":
        return _device_parts(view.name, fleet, writable=source.writable)
    if view.page == "rollouts":
        return _rollout_parts(fleet, writable=source.writable)
    run = fleet.run(view.name)
    if run is None:
        return []
    return _run_parts(run, fleet, source) if view.page == "run" else _model_parts(run, fleet, source)


def _part(name: str, html: str, signature: object = None, inside: str = "") -> Part:
    return Part(name, html, AGE.sub(r"\1", html) if signature is None else signature, inside)


@lru_cache(maxsize=CACHED_ROWS)
def _row(device: Device) -> str:
    return str(_macro("device_row")(device))


def ordered(devices: tuple[Device, ...]) -> list[Device]:
    """Returns the devices of a fleet as they are listed: who needs a look first, then by name."""
    here = [device for device in devices if device.condition not in (PENDING, REVOKED)]
    return sorted(here, key=lambda d: (ORDER.get(d.condition, 2 if d.problem or d.throttled_by else 3), d.device_id))


def _fleet_parts(fleet: Fleet, *, writable: bool) -> list[Part]:
    diagnosis = diagnose(fleet)
    devices = ordered(fleet.devices)
    pending = [device for device in fleet.devices if device.condition == PENDING]
    revoked = [device for device in fleet.devices if device.condition == REVOKED]
    rows = [_part(f"device-{d.device_id}", _row(d), d, "fleet") for d in devices]
    table = _macro("fleet_table")(devices, revoked, [row.html for row in rows], real=fleet_is_real(fleet))
    names = tuple(device.device_id for device in devices), len(revoked)
    return [
        _part("answers", _macro("answers")(diagnosis, fleet.current)),
        _part("pending", _macro("pending")(pending, fleet.now, writable=writable)),
        _part("findings", _macro("findings")(diagnosis)),
        _part("rollout", _rollouts("summary")(fleet.rollouts[0] if fleet.rollouts else None)),
        _part("fleet", table, names),
        *rows,
        _part("runs", _macro("runs")(fleet)),
        _part("events", _macro("events")(fleet.events[:14], fleet.now)),
    ]


def fleet_is_real(fleet: Fleet) -> bool:
    """Returns whether there are boards behind the devices."""
    return not any(run.simulated for run in fleet.runs)


def _run_parts(run: Run, fleet: Fleet, source: Source) -> list[Part]:
    events = tuple(event for event in fleet.events if event.run_id == run.run_id)[:14]
    energy = [device.energy_joules for device in fleet.devices if device.energy_joules is not None]
    closed = len(run.story.rounds)
    curves = _macro("curves")(drawing.charts(run.story, wall=False), drawing.charts(run.story, wall=True), run)
    diagnosis = diagnose(Fleet(fleet.now, fleet.devices, (run,)))
    return [
        _part("run-head", _macro("run_head")(run, fleet.now, sum(energy) if energy else None, source.writable)),
        _part("findings", _macro("findings")(diagnosis)),
        _part("curves", curves, (closed, len(run.story.values("accuracy")))),
        _part("rounds", _macro("rounds")(run), closed),
        _part("heat", _macro("heat")(run), closed),
        _part("events", _macro("events")(events, fleet.now)),
    ]


def _model_parts(run: Run, fleet: Fleet, source: Source) -> list[Part]:
    groups = source.structure(run.run_id)
    found = [
        _part("model", _macro("model")(run, groups)),
        _part("exports", _macro("exports")(run, simulated=run.simulated)),
    ]
    if source.writable:
        found.append(_part("models", _rollouts("models")(fleet)))
    return found


def _rollout_parts(fleet: Fleet, *, writable: bool) -> list[Part]:
    newest = fleet.rollouts[0] if fleet.rollouts else None
    return [
        _part("rollout-now", _rollouts("now")(newest, fleet, writable=writable)),
        _part("models", _rollouts("models")(fleet)),
        _part("rollout-history", _rollouts("history")(fleet.rollouts[1:])),
    ]


def _rollouts(name: str) -> Any:
    return getattr(_environment().get_template("rollouts.html").module, name)


def _device_parts(name: str, fleet: Fleet, *, writable: bool) -> list[Part]:
    device = fleet.device(name)
    if device is None:
        return []
    run = fleet.run(device.run_id) or fleet.current
    records = [] if run is None else run.story.by_device.get(name, [])
    history = [(index, record) for index, record in enumerate(records) if record is not None][::-1]
    events = tuple(event for event in fleet.events if event.device_id == name)[:14]
    return [
        _part("device-head", _macro("device_head")(device, fleet.now, writable=writable)),
        _part("device-history", _macro("device_history")(device, run, history[:200])),
        _part("device-facts", _macro("device_facts")(device)),
        _part("events", _macro("events")(events, fleet.now)),
    ]


def round_html(run: Run, index: int) -> str:
    """Returns one round of a run: who took part, what its time went into, what came of it."""
    return str(_macro("round_detail")(run, run.story.round_view(index)))
