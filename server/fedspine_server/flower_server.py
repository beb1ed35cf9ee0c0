"""Flower's ServerApp around the coordinator.

Comes in: a run request (from `fedspine flower request`) and a directory for the run's state, both named in Flower's run
config. Goes out, in that directory: the state after each round, `rounds.jsonl`, `summary.json`. SuperLink forgets a run
when it ends or restarts; the directory does not: `flwr run` again goes on with the round that was open.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import load as load_blob

from fedspine_edge.errors import UsageError
from fedspine_edge.protocol import Layout
from fedspine_server import store
from fedspine_server.carried import CarriedRun, Terms
from fedspine_server.coordinator import init
from fedspine_server.flower_carrier import FlowerCarrier
from fedspine_server.settings import RunSettings
from fedspine_server.state import RunState, adapter_sha256

REQUEST_KEYS = ("run_id", "settings", "layout", "recipe", "options", "task_head")

logger = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Holds the run that the run config names, from where its directory says it stands."""
    request = _read_request(Path(str(context.run_config["request"])))
    directory = Path(str(context.run_config["directory"]))
    options = request["options"]
    known = {field.name for field in dataclasses.fields(Terms)}
    terms = Terms(**{name: value for name, value in options.items() if name in known})
    state = last_or_first_state(request, directory)
    logger.info("run=%s goes on with round=%d of %d", state.run_id, state.round_index, state.settings.rounds)
    ttl_seconds = terms.round_timeout_seconds * (1 + terms.max_staleness)
    carrier = FlowerCarrier(grid, request["recipe"], ttl_seconds=ttl_seconds)
    directory.mkdir(parents=True, exist_ok=True)
    held = CarriedRun(state, carrier, terms, save=lambda state: keep(directory, state), spool_folder=directory)
    state = held.run()
    summary = {"run_id": state.run_id, "rounds": state.round_index, "adapter_sha256": adapter_sha256(state)}
    _write(directory / "summary.json", json.dumps(summary) + "\n")


def _read_request(path: Path) -> dict[str, Any]:
    try:
        request: dict[str, Any] = json.loads(path.read_text())
        missing = [key for key in REQUEST_KEYS if key not in request]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"expected a run request in {path}, found: {error}", hint="make it with: fedspine flower request"
        ) from error
    if missing:
        raise UsageError(f"expected {', '.join(REQUEST_KEYS)} in {path}, found no {missing[0]}")
    return request


def last_or_first_state(request: Mapping[str, Any], directory: Path) -> RunState:
    """Returns the state a directory holds, or the one before the first round.

    Raises:
        UsageError: The directory holds another run.
        CheckpointError: Its files are damaged.
    """
    settings = RunSettings.from_json(request["settings"])
    task_head = load_blob(base64.b64decode(request["task_head"]))
    first = init(settings, Layout.from_json(request["layout"]), task_head)
    folder = directory / "state"
    if not (folder.is_dir() and any(folder.iterdir())):
        return first
    state = store.load(folder)
    if state.run_id != first.run_id:
        raise UsageError(
            f"expected the run {first.run_id} in {directory}, found {state.run_id}", hint="give a directory of its own"
        )
    return state


def keep(directory: Path, state: RunState) -> None:
    """Saves a run where `last_or_first_state` finds it."""
    store.save(directory / "state", state)
    _write(directory / "rounds.jsonl", "".join(json.dumps(record) + "\n" for record in state.history))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)
