"""Where a run stands: the coordinator's state in its directory, and the global model that it holds.

Comes in: a run directory, a state. Goes out: files that `--resume` goes on from; the adapter at the server's mask.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedspine_edge.atomic import write_bytes
from fedspine_edge.commands.experiment import Scene
from fedspine_edge.masks import choose
from fedspine_edge.workbench import GlobalModel
from fedspine_server import store
from fedspine_server.arms import schedule_ratio
from fedspine_server.coordinator import RunState
from fedspine_server.settings import RunSettings


def global_model(state: RunState, *, pruning_ratio: float | None = None) -> GlobalModel:
    """Returns the global adapter at the server's own mask.

    Args:
        state: The run.
        pruning_ratio: The mask's ratio; the schedule's of the last closed round when None.
    """
    settings = state.settings
    if pruning_ratio is None:
        pruning_ratio = schedule_ratio(settings, max(0, state.round_index - 1))
    keep = choose(state.layout, state.importance, pruning_ratio=pruning_ratio, mode=settings.mask_mode)
    return GlobalModel(
        keep=keep,
        factors={name: (factors.lora_a, factors.lora_b) for name, factors in state.adapter.items()},
        task_head=state.task_head,
        mean_inputs=state.mean_input if settings.mean_compensation else {},
        scaling=settings.scaling,
    )


def save_state(run_dir: Path, state: RunState, *, suffix: str = "") -> None:
    """Writes the coordinator's state and its rounds into a run directory."""
    store.save(run_dir / f"state{suffix}", state)
    lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in state.history)
    write_bytes(run_dir / f"rounds{suffix}.jsonl", lines.encode())


def last_state(scene: Scene, settings: RunSettings, folder: Path) -> RunState:
    """Returns the state a run was saved in, or the one before its first round."""
    return store.load(folder) if folder.is_dir() and any(folder.iterdir()) else scene.first_state(settings)
