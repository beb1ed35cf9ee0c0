"""A simulated run's directory: what it was asked, its data, its workers and where it stands.

Comes in: a preset or TOML file and the flags over it. Goes out: `runs/NAME/experiment.json`, the fleet, the examples of
each device, and the coordinator's first or last state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.atomic import write_bytes
from fedspine_edge.base_model import BaseModel, open_base
from fedspine_edge.batches import Encoding, TokenSet
from fedspine_edge.commands.boards import Fleet
from fedspine_edge.commands.workers import WorkerSetup
from fedspine_edge.config import Experiment, cache_directory, load_table, method, settings_from
from fedspine_edge.data import Example, Split, by_domain, load_examples, partition, split
from fedspine_edge.errors import CheckpointError, UsageError
from fedspine_edge.protocol import Layout
from fedspine_edge.sources import model_directory
from fedspine_edge.workbench import Workbench, open_workbench
from fedspine_server import step_law
from fedspine_server.coordinator import RunState, init
from fedspine_server.device_models import DeviceSpec, make_specs
from fedspine_server.settings import RunSettings

FORMAT = 1
EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True)
class Overrides:
    """What flags say over a preset; None leaves the preset's value."""

    model: str | None = None
    data: str | None = None
    devices: int | None = None
    rounds: int | None = None
    seed: int | None = None
    controller: str | None = None
    sparsity: float | None = None
    dense_reference: bool | None = None
    law: Path | None = None
    engine: str | None = None
    ray_address: str | None = None
    method: str | None = None
    base_dtype: str | None = None


def prepare(experiment: str | None, overrides: Overrides, *, out: Path | None, resume: Path | None) -> Path:
    """Returns the run directory, made and described for a new run, checked for one to go on with.

    Args:
        experiment: A preset's name or a TOML file; None when going on with a run.
        overrides: What the flags say.
        out: Where a new run goes; `runs/NAME` when None, with a number when that is taken.
        resume: The run to go on with.

    Raises:
        UsageError: Contradictory flags, unknown preset or key, a value out of range, no step-time law in its file.
        CheckpointError: The run directory is none, or of another version.
    """
    if resume is not None:
        if experiment is not None or overrides != Overrides() or out is not None:
            raise UsageError(
                "expected --resume DIR alone, found other settings beside it",
                hint="a run keeps the settings it began with",
            )
        read_experiment(resume)
        return resume
    if experiment is None:
        raise UsageError("expected a preset or a .toml file, found none", hint="fedspine simulate quickstart")
    table = _with_overrides(load_table(experiment), overrides)
    _check(table, experiment)
    preset = Path(experiment).stem
    run_dir = new_run_directory(preset, out, hint="go on with it with --resume, or choose another --out")
    write_experiment(run_dir, preset, table)
    return run_dir


def new_run_directory(name: str, out: Path | None, *, hint: str) -> Path:
    """Returns a directory, made for a new run.

    Args:
        name: What it is called below `runs/` when `out` is None, with a number when that is taken.
        out: Where it goes.
        hint: What to do when there is a run.

    Raises:
        UsageError: There is a run in it.
        CheckpointError: It cannot be made.
    """
    run_dir = out or _free_name(Path("runs") / name)
    if (run_dir / EXPERIMENT_FILE).exists():
        raise UsageError(f"expected a new directory, found the run {run_dir}", hint=hint)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {run_dir}: {error.strerror}", hint="choose another --out") from error
    return run_dir


def write_experiment(run_dir: Path, preset: str, table: Mapping[str, Any]) -> None:
    """Writes what a run was asked; with this file a directory is a run."""
    document = {"format": FORMAT, "preset": preset, "experiment": table}
    write_bytes(run_dir / EXPERIMENT_FILE, (json.dumps(document, indent=2) + "\n").encode())


def _with_overrides(table: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    if overrides.method is not None:
        table = method(overrides.method).applied_to(table)
    run, fleet = dict(table.get("run", {})), dict(table.get("fleet", {}))
    top = {"model": overrides.model, "data": overrides.data, "seed": overrides.seed}
    top |= {name: getattr(overrides, name) for name in ("dense_reference", "engine", "ray_address")}
    inner = {"rounds": overrides.rounds, "controller": overrides.controller, "target_sparsity": overrides.sparsity}
    inner["base_dtype"] = overrides.base_dtype
    run |= {key: value for key, value in inner.items() if value is not None}
    if overrides.devices is not None:
        fleet = dataclasses.asdict(settings_from(Fleet, fleet, where="[fleet]").scaled(overrides.devices))
    if overrides.law is not None:
        run, fleet = _with_law(run, fleet, step_law.read(overrides.law))
    return {**table, **{key: value for key, value in top.items() if value is not None}, "run": run, "fleet": fleet}


def _with_law(
    run: dict[str, Any], fleet: dict[str, Any], law: step_law.StepLaw
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run and fleet tables with a measured law: the simulated boards follow it, `structured` begins with it."""
    parts = [law.constant, law.kept, law.lora]
    if run.get("controller", RunSettings().controller) == "structured":
        run = {**run, "controller_options": {**run.get("controller_options", {}), "step_law": parts}}
    return run, {**fleet, "step_law": parts}


def _check(table: Mapping[str, Any], where: str) -> None:
    settings_from(Experiment, table, where=where)
    settings_from(Fleet, table["fleet"], where=f"{where} [fleet]")
    settings_from(RunSettings, table["run"], where=f"{where} [run]")


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def read_experiment(run_dir: Path) -> tuple[str, Experiment]:
    """Returns the preset's name and the settings a run directory was made with.

    Raises:
        CheckpointError: No run directory, or one of another version.
    """
    file = run_dir / EXPERIMENT_FILE
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a run directory with {EXPERIMENT_FILE}, found {run_dir}: {error}") from error
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{run_dir} is a run of format {document.get('format')}, this program reads {FORMAT}",
            hint="go on with the fedspine version that began it",
        )
    return document["preset"], settings_from(Experiment, document["experiment"], where=str(file))


@dataclass(frozen=True)
class Scene:
    """Everything a run works with, built anew from its directory each time.

    Attributes:
        name: The preset's name, or the TOML file's.
        experiment: The settings.
        settings: The settings of the rounds.
        fleet: The devices.
        base: The unpruned model.
        layout: Its layout.
        task_head: First values of the densely trained parameters.
        encoding: How examples become tokens.
        split: The examples.
        devices: The devices of the simulated fleet.
        setup: What the workers need to know.
    """

    name: str
    experiment: Experiment
    settings: RunSettings
    fleet: Fleet
    base: BaseModel
    layout: Layout
    task_head: Mapping[str, np.ndarray]
    encoding: Encoding
    split: Split
    devices: tuple[DeviceSpec, ...]
    setup: WorkerSetup

    def first_state(self, settings: RunSettings) -> RunState:
        """Returns the state before the first round of a run with the given settings."""
        return init(settings, self.layout, self.task_head)


def build_scene(run_dir: Path) -> Scene:
    """Opens the model and the data of a run.

    Raises:
        FedSpineError: Model or data are missing, damaged or too small.
    """
    name, experiment = read_experiment(run_dir)
    settings = settings_from(RunSettings, {**experiment.run, "seed": experiment.seed}, where="[run]")
    fleet = settings_from(Fleet, experiment.fleet, where="[fleet]")
    examples = load_examples(experiment.data)
    parts = split(examples, held_out=experiment.held_out, validation=experiment.validation, seed=experiment.seed)
    base = open_base(model_directory(experiment.model, cache_directory()))
    classes = tuple(sorted({example.label for example in examples}))
    decoder = base.family.task == "decoder"
    encoding = Encoding(base.tokenizer(), classes, experiment.prompt if decoder else None, experiment.max_tokens)
    choices = encoding.choice_tokens() if decoder else None
    bench = open_workbench(base.path, sha256=base.sha256, num_labels=len(classes), choices=choices)
    liars = fleet.liars(experiment.seed)
    shards = _shards(experiment, parts, encoding, fleet)
    devices = make_specs(
        [len(shard) for shard in shards],
        boards=fleet.boards,
        seed=experiment.seed,
        rounds=settings.rounds,
        churn=fleet.churn,
    )
    devices = tuple(
        dataclasses.replace(device, attack=fleet.attack if index in liars else None)
        for index, device in enumerate(devices)
    )
    setup = WorkerSetup(
        base_path=base.path,
        base_sha256=base.sha256,
        num_labels=len(classes),
        choices=choices,
        shards={device.device_id: shard for device, shard in zip(devices, shards, strict=True)},
        judged={"validation": encoding.encode(parts.validation), "held_out": encoding.encode(parts.held_out)},
    )
    return Scene(
        name=name,
        experiment=experiment,
        settings=settings,
        fleet=fleet,
        base=bench.base,
        layout=bench.layout,
        task_head=first_task_head(bench),
        encoding=encoding,
        split=parts,
        devices=devices,
        setup=setup,
    )


def shares_of(experiment: Experiment, parts: Split, num_devices: int) -> list[np.ndarray]:
    """Returns which rows of the training examples each device has."""
    if experiment.by_domain:
        return by_domain([e.domain for e in parts.train], num_devices=num_devices, seed=experiment.seed)
    labels = [example.label for example in parts.train]
    return partition(labels, num_devices=num_devices, alpha=experiment.dirichlet_alpha, seed=experiment.seed)


def _shards(experiment: Experiment, parts: Split, encoding: Encoding, fleet: Fleet) -> list[TokenSet]:
    tokens = encoding.encode(parts.train)
    shares = shares_of(experiment, parts, len(fleet.boards))
    flips = set(fleet.liars(experiment.seed)) if fleet.attack == "label-flip" else set()
    # A decoder learns its label as text, so wrong labels have to be there before they are encoded.
    wrong = encoding.encode(_mislabelled(parts.train, encoding.classes)) if flips else tokens
    return [(wrong if index in flips else tokens).take(share) for index, share in enumerate(shares)]


def _mislabelled(examples: Sequence[Example], classes: Sequence[str]) -> list[Example]:
    """Each example with the opposite label: the last class for the first."""
    opposite = dict(zip(classes, reversed(classes), strict=True))
    return [dataclasses.replace(example, label=opposite[example.label]) for example in examples]


def first_task_head(bench: Workbench) -> dict[str, np.ndarray]:
    """Returns the first values of the densely trained parameters."""
    parameters = dict(bench.model.named_parameters())
    return {name: parameters[name].detach().numpy().copy() for name, _ in bench.layout.task_head}


__all__ = [
    "Overrides",
    "Scene",
    "build_scene",
    "new_run_directory",
    "prepare",
    "read_experiment",
    "write_experiment",
]
