"""`fedspine runs fetch`: a run on real devices as a run directory, with its model merged and shrunk here.

Comes in: the coordinator's state from the server, the base model from this machine: the server has none. Goes out: what
`simulate` leaves and `export` takes: `state/`, `rounds.jsonl`, `models/pruned`, and `experiment.json` last, which makes
the directory a run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.base_model import open_base
from fedspine_edge.checkpoint import save_pruned
from fedspine_edge.commands.experiment import new_run_directory, write_experiment
from fedspine_edge.commands.operate import Operator
from fedspine_edge.commands.run_state import global_model, save_state
from fedspine_edge.config import cache_directory
from fedspine_edge.errors import IncompatibleError, LinkError, UsageError
from fedspine_edge.sources import model_directory
from fedspine_server import store
from fedspine_server.coordinator import RunState, adapter_sha256


@dataclass(frozen=True)
class Fetched:
    """A run that is here now.

    Attributes:
        path: Its directory.
        rounds_done: Closed rounds.
        rounds: Rounds of the whole run.
        sparsity: Share of prunable base weights that is gone.
        adapter_sha256: Hash of the global adapter.
    """

    path: Path
    rounds_done: int
    rounds: int
    sparsity: float
    adapter_sha256: str

    def record(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        return {**vars(self), "path": str(self.path)}

    def lines(self) -> str:
        """Returns what a person reads."""
        whole = self.rounds_done == self.rounds
        return (
            f"{self.path}  after {'all ' if whole else ''}{self.rounds_done} of {self.rounds} rounds,"
            f" {self.sparsity:.1%} of the prunable weights gone, adapter {self.adapter_sha256[:12]}\n"
            f"now        fedspine export gguf|onnx|hf {self.path}"
        )


def fetch(operator: Operator, run_id: str, *, out: Path | None, model: str | None) -> Fetched:
    """Writes a run directory; a run that is not over gives the model of its last closed round.

    Args:
        operator: The server.
        run_id: Which run.
        out: Where it goes; `runs/NAME` when None, with a number when that is taken.
        model: The base model, where it has another name on this machine than where the run was started.

    Raises:
        UsageError: No round is closed yet, or there is a run in `out`.
        IncompatibleError: The base model is not the run's.
        LinkError: The server does not give the state.
    """
    view = operator.get(f"runs/{run_id}")
    if view["round_index"] == 0:
        raise UsageError(f"run {run_id} has no model yet: none of its {view['rounds']} rounds is closed")
    asked = view["experiment"]
    table = {**asked["experiment"], **({"model": model} if model else {})}
    base = open_base(model_directory(table["model"], cache_directory()))
    if base.sha256 != view["base_sha256"]:
        raise IncompatibleError(
            f"expected the base model {view['base_sha256'][:12]} of run {run_id},"
            f" found {base.sha256[:12]} in {table['model']}",
            hint="give it with --model",
        )
    state = _state(operator, view)
    run_dir = new_run_directory(run_id, out, hint="choose another --out")
    over = state.round_index == state.settings.rounds
    world = global_model(state, pruning_ratio=state.settings.target_sparsity if over else None)
    mode = state.settings.mask_mode
    save_pruned(run_dir / "models" / "pruned", base, state.layout, world, mode=mode, task=view["recipe"])
    save_state(run_dir, state)
    write_experiment(run_dir, asked["preset"], table)
    return Fetched(
        run_dir, state.round_index, state.settings.rounds, world.sparsity(state.layout), adapter_sha256(state)
    )


def _state(operator: Operator, view: dict[str, Any]) -> RunState:
    blob = operator.content(f"runs/{view['run_id']}/state")
    found = hashlib.sha256(blob).hexdigest()
    if found != view["state_sha256"]:
        raise LinkError(
            f"expected state {view['state_sha256'][:12]} of run {view['run_id']}, found {found[:12]}",
            hint="the run went on in the meantime: try again",
        )
    return store.from_bytes(blob)
