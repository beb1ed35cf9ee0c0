"""`fedspine runs start`: what a server must know of a run, worked out where the base model is.

Comes in: the TOML file that `fedspine simulate` takes too. Goes out: one request: settings, the model's layout,
classes, the first values of what is trained densely. Neither the base model nor any example travels.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.numpy import save as save_blob

from fedspine_edge.base_model import open_base
from fedspine_edge.batches import Encoding
from fedspine_edge.commands.experiment import first_task_head
from fedspine_edge.config import Experiment, cache_directory, load_table, nearest, settings_from
from fedspine_edge.data import load_examples
from fedspine_edge.errors import UsageError
from fedspine_edge.sources import model_directory
from fedspine_edge.workbench import open_workbench
from fedspine_server.link.operator_schemas import RunOptions
from fedspine_server.settings import RunSettings


def run_request(config: str, *, name: str | None, timings: Path | None) -> dict[str, Any]:
    """Returns the body of the call that begins a run.

    Args:
        config: A preset or a TOML file.
        name: The run's name; the file's when None.
        timings: `rounds.jsonl` of another run, whose seconds the coordinator is given instead of measured ones.

    Raises:
        FedSpineError: Settings, model or data are not as they must be.
    """
    table = load_table(config)
    experiment = settings_from(Experiment, table, where=config)
    settings = settings_from(RunSettings, {**experiment.run, "seed": experiment.seed}, where="[run]")
    options = _options(experiment, timings)
    given = experiment.link.get("classes") or {example.label for example in load_examples(experiment.data)}
    classes = tuple(sorted(given))
    base = open_base(model_directory(experiment.model, cache_directory()))
    prompt = experiment.prompt if base.family.task == "decoder" else None
    encoding = Encoding(base.tokenizer(), classes, prompt)
    choices = encoding.choice_tokens() if prompt is not None else None
    bench = open_workbench(base.path, sha256=base.sha256, num_labels=len(classes), choices=choices)
    return {
        "run_id": name or Path(config).stem,
        "settings": settings.to_json(),
        "layout": bench.layout.to_json(),
        "recipe": {"classes": list(classes), "prompt": prompt},
        "options": options.model_dump(),
        "experiment": {"preset": Path(config).stem, "experiment": table},
        "task_head": base64.b64encode(save_blob(first_task_head(bench))).decode(),
    }


def _options(experiment: Experiment, timings: Path | None) -> RunOptions:
    table = {key: value for key, value in experiment.link.items() if key != "classes"}
    for key in table:
        if key not in RunOptions.model_fields or key == "timings":
            known = {*RunOptions.model_fields, "classes"} - {"timings"}
            raise UsageError(f"unknown key {key!r} in [link]", hint=nearest(key, known))
    try:
        return RunOptions(**table, timings=_recorded(timings) if timings else None)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"[link]: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _recorded(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"expected recorded rounds in {path}, found: {error}", hint="RUN/rounds.jsonl") from error
