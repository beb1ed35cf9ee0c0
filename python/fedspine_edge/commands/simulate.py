"""`fedspine simulate`: a federated run of a simulated fleet, its exports and its report.

Comes in: a prepared run directory. Goes out, in that directory: the coordinator's state after each round,
`rounds.jsonl`, the models, `summary.json` and `report.html`. Killed at any moment, it goes on from the last finished
round.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.atomic import write_bytes
from fedspine_edge.checkpoint import save_pruned
from fedspine_edge.commands.engines import Engine, Pool
from fedspine_edge.commands.experiment import Scene, build_scene
from fedspine_edge.commands.judgement import ModelFiles, judge_files
from fedspine_edge.commands.run_state import global_model, last_state, save_state
from fedspine_edge.hardware import MemoryWatch, this_machine, usable_cores
from fedspine_edge.live import LiveView
from fedspine_edge.masks import kept_counts
from fedspine_edge.progress import Progress
from fedspine_edge.report import write_report
from fedspine_edge.structure import prunable_parameters
from fedspine_edge.workbench import GlobalModel
from fedspine_server.coordinator import RunState, adapter_sha256
from fedspine_server.fleet import run_fleet
from fedspine_server.settings import RunSettings

SUMMARY_FORMAT = 1


@dataclass(frozen=True)
class Finished:
    """A run that is over.

    Attributes:
        state: The coordinator's last state.
        world: The global model at its final mask.
        accuracy: Share of the held-out rows the PyTorch model gets right; None for a decoder, judged as a file.
    """

    state: RunState
    world: GlobalModel
    accuracy: float | None


def simulate(
    run_dir: Path, *, workers: int | None, quiet: bool, follow: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """Runs, or goes on with, the run in a directory and returns its summary.

    Args:
        run_dir: From `experiment.prepare`.
        workers: Devices trained at once; all cores when None.
        quiet: Whether progress is kept to itself.
        follow: Called with the progress after each event.

    Raises:
        FedSpineError: Model, data or state are not as they must be; what is saved stays.
    """
    start = time.monotonic()
    with LiveView(quiet=quiet, follow=follow) as live, MemoryWatch() as memory:
        live.handle({"kind": "phase", "text": "reading model and data", "total": None, "done": 0})
        scene = build_scene(run_dir)
        engine = Engine(scene.experiment.engine, workers or usable_cores(), scene.experiment.ray_address or None)
        with engine.open(scene.setup) as pool:
            untuned = _untuned_accuracy(scene, pool, live)
            pruned = _federate(scene, scene.settings, run_dir, "", pool, live)
            dense = _dense_reference(scene, run_dir, pool, live)
        files = _save_models(scene, run_dir, pruned, dense, live)
        judgement = judge_files(scene, files, live)
        summary = (
            _summary(scene, run_dir, pruned, dense)
            | judgement
            | {
                "accuracy_untuned": untuned,
                "wall_seconds": time.monotonic() - start,
                "peak_rss_bytes": memory.peak_bytes,
            }
        )
        write_bytes(run_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        live.handle({"kind": "phase", "text": "writing the report", "total": None, "done": 0})
        write_report(run_dir)
    return summary


def _untuned_accuracy(scene: Scene, pool: Pool, live: LiveView) -> float:
    live.handle({"kind": "phase", "text": "accuracy before any tuning", "total": None, "done": 0})
    return pool.accuracy(global_model(scene.first_state(scene.settings), pruning_ratio=0.0), "validation")


def _dense_reference(scene: Scene, run_dir: Path, pool: Pool, live: LiveView) -> Finished | None:
    """The same run at sparsity 0, to compare with."""
    if not scene.experiment.dense_reference or scene.settings.target_sparsity == 0:
        return None
    live.handle({"kind": "phase", "text": "the same run without pruning, to compare with", "total": None, "done": 0})
    settings = dataclasses.replace(scene.settings, target_sparsity=0.0)
    return _federate(scene, settings, run_dir, "_dense", pool, live)


def _federate(scene: Scene, settings: RunSettings, run_dir: Path, suffix: str, pool: Pool, live: LiveView) -> Finished:
    """Runs the rounds that are not yet done and judges the result on the held-out rows."""
    save = functools.partial(save_state, run_dir, suffix=suffix)
    state = last_state(scene, settings, run_dir / f"state{suffix}")
    tune = functools.partial(pool.tune, state_folder=run_dir / f"devices{suffix}")
    state = run_fleet(
        state,
        scene.devices,
        tune=tune,
        evaluate=lambda state: pool.accuracy(global_model(state), "validation"),
        save=save,
        on_event=live.handle,
        eval_every=scene.experiment.validate_every,
        fleet=scene.fleet.world(scene.experiment.seed),
        spool_folder=run_dir,
    )
    save(state)
    final = global_model(state, pruning_ratio=settings.target_sparsity)
    if scene.setup.choices is not None:
        return Finished(state, final, None)
    live.handle({"kind": "phase", "text": "accuracy on the held-out rows", "total": None, "done": 0})
    return Finished(state, final, pool.accuracy(final, "held_out"))


def _save_models(
    scene: Scene, run_dir: Path, pruned: Finished, dense: Finished | None, live: LiveView
) -> tuple[ModelFiles, ...]:
    """Writes the merged models as directories: the pruned one, and the tuned, unpruned one."""
    found: list[ModelFiles] = []
    for name, finished in (("dense", dense), ("pruned", pruned)):
        if finished is None:
            continue
        live.handle({"kind": "phase", "text": f"merging the {name} model", "total": None, "done": 0})
        folder = run_dir / "models" / name
        task = {"classes": list(scene.encoding.classes), "prompt": scene.encoding.prompt}
        save_pruned(folder, scene.base, scene.layout, finished.world, mode=scene.settings.mask_mode, task=task)
        found.append(ModelFiles(folder, dense=name == "dense", sparsity=finished.world.sparsity(scene.layout)))
    return tuple(found)


def _summary(scene: Scene, run_dir: Path, pruned: Finished, dense: Finished | None) -> dict[str, Any]:
    parameters_dense = sum(_count(scene.base.read(name).shape) for name in scene.base.files)
    kept = kept_counts(pruned.world.keep)
    gone = prunable_parameters(scene.layout) - prunable_parameters(scene.layout, kept)
    return {
        "format": SUMMARY_FORMAT,
        "name": run_dir.name,
        "preset": scene.name,
        "model": scene.experiment.model,
        "model_parameters": parameters_dense,
        "data": scene.experiment.data,
        "num_examples": len(scene.split.train),
        "num_classes": len(scene.encoding.classes),
        "num_held_out": len(scene.split.held_out),
        "num_devices": len(scene.devices),
        "rounds": scene.settings.rounds,
        "seed": scene.experiment.seed,
        "controller": scene.settings.controller,
        "aggregation": scene.settings.aggregation,
        "accuracy_torch": pruned.accuracy,
        "accuracy_dense_tuned": dense.accuracy if dense else None,
        "sparsity": pruned.world.sparsity(scene.layout),
        "target_sparsity": scene.settings.target_sparsity,
        "parameters_dense": parameters_dense,
        "parameters_pruned": parameters_dense - gone,
        "virtual_seconds": pruned.state.clock_seconds,
        "virtual_seconds_dense": dense.state.clock_seconds if dense else None,
        "adapter_sha256": adapter_sha256(pruned.state),
        "transfer_bytes": _transfer_bytes(pruned.state.history),
        "layers": _layers(scene, kept),
        "machine": dataclasses.asdict(this_machine()),
    }


def _count(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total


def _transfer_bytes(history: tuple[Mapping[str, Any], ...]) -> dict[str, int]:
    devices = [device for record in history for device in record["devices"]]
    return {
        "down": sum(device["download_bytes"] for device in devices),
        "up": sum(device["upload_bytes"] for device in devices),
    }


def _layers(scene: Scene, kept: Mapping[str, int]) -> list[dict[str, int]]:
    groups = {group.name: group for group in scene.layout.groups}
    num_layers = sum(group.kind == "ffn" for group in scene.layout.groups)
    return [
        {
            "layer": layer,
            "heads_kept": kept[f"layers.{layer}.heads"],
            "heads": groups[f"layers.{layer}.heads"].num_members,
            "ffn_kept": kept[f"layers.{layer}.ffn"],
            "ffn": groups[f"layers.{layer}.ffn"].num_members,
        }
        for layer in range(num_layers)
    ]


def as_json(summary: Mapping[str, Any]) -> str:
    """Returns the summary as one JSON document."""
    return json.dumps(summary, indent=2)


def as_text(summary: Mapping[str, Any], run_dir: Path) -> str:
    """Returns what a person wants to know of a finished run, a few lines."""
    return "\n".join(lines for lines in _text_lines(summary, run_dir) if lines)


def _text_lines(summary: Mapping[str, Any], run_dir: Path) -> Iterator[str]:
    yield (
        f"{summary['model']} tuned by {summary['num_devices']} devices in {summary['rounds']} rounds,"
        f" {summary['sparsity']:.1%} of its prunable weights gone"
    )
    compared = f"untuned {summary['accuracy_untuned']:.3f}"
    if summary["accuracy_dense_tuned"] is not None:
        compared += f", tuned without pruning {summary['accuracy_dense_tuned']:.3f}"
    yield f"accuracy   {summary['accuracy']:.3f} on {summary['num_held_out']} held-out rows ({compared})"
    if summary["speedup"]:
        speedup = summary["speedup"]
        yield f"llama.cpp  prompt {speedup['prompt']:.2f}x, generation {speedup['generation']:.2f}x the unpruned model"
    yield (
        f"time       {summary['virtual_seconds']:.0f} virtual seconds on the fleet,"
        f" {summary['wall_seconds']:.0f} s here; peak memory {summary['peak_rss_bytes'] / 2**30:.2f} GiB"
    )
    yield f"report     {run_dir / 'report.html'}"
    if summary["llama_cli"]:
        yield f"try        {summary['llama_cli']}"
