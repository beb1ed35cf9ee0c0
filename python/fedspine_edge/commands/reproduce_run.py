"""One run of the grid: its experiment -> one small JSON document.

Comes in: a cell and its table. Goes out: `RESULTS/NAME.json` with the accuracy over virtual time and traffic, written
when the run is over. The run itself is a run directory like any other's, so a killed one goes on from its last round.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspine_edge.atomic import write_bytes
from fedspine_edge.commands.engines import Engine
from fedspine_edge.commands.experiment import EXPERIMENT_FILE, build_scene, read_experiment, write_experiment
from fedspine_edge.commands.reproduce_grid import Cell, digest
from fedspine_edge.commands.run_state import global_model, last_state, save_state
from fedspine_edge.errors import CheckpointError
from fedspine_edge.hardware import this_machine
from fedspine_edge.live import LiveView
from fedspine_server.fleet import run_fleet

FORMAT = 1


def result_path(results: Path, cell: Cell) -> Path:
    """Returns where a cell's result is kept."""
    return results / f"{cell.name}.json"


def read_result(results: Path, cell: Cell) -> dict[str, Any] | None:
    """Returns a stored result; None where there is none.

    Raises:
        CheckpointError: The file is none, or of another format.
    """
    path = result_path(results, cell)
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a result of the grid in {path}, found: {error}", hint="delete it") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"expected a result of format {FORMAT} in {path}, found another", hint="delete it")
    return document


def run_cell(
    cell: Cell, table: Mapping[str, Any], *, work: Path, results: Path, engine: Engine, live: LiveView
) -> dict[str, Any]:
    """Runs a cell, or goes on with it, and stores and returns its result.

    Args:
        cell: The run.
        table: Its experiment.
        work: Folder of run directories; the cell's is removed once the result is stored.
        results: Folder of results.
        engine: Who does the devices' rounds.
        live: Where progress is shown.

    Raises:
        FedSpineError: Model, data or state are not as they must be; what is saved stays.
    """
    start, cpu = time.monotonic(), time.process_time()
    run_dir = _run_directory(work / cell.name, cell, table)
    scene = build_scene(run_dir)
    with engine.open(scene.setup) as pool:
        state = run_fleet(
            last_state(scene, scene.settings, run_dir / "state"),
            scene.devices,
            tune=functools.partial(pool.tune, state_folder=run_dir / "devices"),
            evaluate=lambda state: pool.accuracy(global_model(state), "validation"),
            save=functools.partial(save_state, run_dir),
            on_event=live.handle,
            eval_every=scene.experiment.validate_every,
            fleet=scene.fleet.world(scene.experiment.seed),
        )
        final = global_model(state, pruning_ratio=scene.settings.target_sparsity)
        accuracy = pool.accuracy(final, "held_out")
    document = {
        "format": FORMAT,
        **dataclasses.asdict(cell),
        "digest": digest(table),
        "accuracy": accuracy,
        "num_held_out": len(scene.split.held_out),
        "reached_sparsity": final.sparsity(scene.layout),
        **_measured(state.history),
        "wall_seconds": time.monotonic() - start,
        "server_cpu_seconds": time.process_time() - cpu,
        "machine": dataclasses.asdict(this_machine()),
        "settings": dict(table),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_bytes(result_path(results, cell), (json.dumps(document, sort_keys=True) + "\n").encode())
    shutil.rmtree(run_dir)
    return document


def _run_directory(run_dir: Path, cell: Cell, table: Mapping[str, Any]) -> Path:
    """The cell's run directory; one that was begun with other settings is begun anew."""
    if (run_dir / EXPERIMENT_FILE).exists():
        document = json.loads((run_dir / EXPERIMENT_FILE).read_text())
        if digest(document["experiment"]) == digest(table):
            read_experiment(run_dir)
            return run_dir
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_experiment(run_dir, cell.name, table)
    return run_dir


def _measured(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy over time and traffic, waiting, and what the controller asked for."""
    curve, rounds, moved, busy, waiting = [], [], 0, 0.0, 0.0
    for record in history:
        asked = [device for device in record["devices"] if device["state"] != "away"]
        moved += sum(device["download_bytes"] + device["upload_bytes"] for device in asked)
        busy += math.fsum(d["compute_seconds"] + d["download_seconds"] + d["upload_seconds"] for d in asked)
        waiting += math.fsum(device["waiting_seconds"] for device in asked)
        if record["accuracy"] is not None:
            curve.append([round(record["virtual_end_seconds"], 2), moved, round(record["accuracy"], 5)])
        rounds.append([_mean(asked, name) for name in ("pruning_ratio", "rank", "num_steps")] + [record["num_merged"]])
    return {
        "curve": curve,
        "rounds": rounds,
        "reason": next((d["reason"] for r in reversed(history) for d in r["devices"] if d.get("reason")), None),
        "virtual_seconds": history[-1]["virtual_end_seconds"],
        "transfer_bytes": moved,
        "waiting_share": waiting / (busy + waiting) if busy + waiting else None,
    }


def _mean(devices: Sequence[Mapping[str, Any]], name: str) -> float:
    return round(sum(float(device[name]) for device in devices) / max(1, len(devices)), 3)
