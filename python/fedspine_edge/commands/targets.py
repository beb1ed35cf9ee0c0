"""What a command was given: a run, a model directory, a packaged model or an exported file -> what to work on.

Comes in: the words of the command line. Goes out: paths that exist, the task they were tuned for, and tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from fedspine_edge.base_model import load_tokenizer
from fedspine_edge.batches import DEFAULT_PROMPT, Encoding
from fedspine_edge.checkpoint import PRUNE_FILE
from fedspine_edge.config import cache_directory
from fedspine_edge.data import Example
from fedspine_edge.errors import DataError, IncompatibleError
from fedspine_edge.sources import MODELS, model_directory
from fedspine_edge.structure import family_of

EXPERIMENT_FILE = "experiment.json"
FILE_KINDS = (".gguf", ".onnx")


@dataclass(frozen=True)
class Target:
    """Something to work on.

    Attributes:
        path: A model directory, a GGUF file or an ONNX model's directory.
        kind: `directory`, `gguf` or `onnx`.
        run_dir: The run it belongs to, None when it belongs to none.
    """

    path: Path
    kind: str
    run_dir: Path | None

    @property
    def name(self) -> str:
        """What people would call it."""
        if self.run_dir is not None and self.kind == "directory":
            return self.run_dir.resolve().name
        return self.path.resolve().stem if self.kind == "gguf" else self.path.resolve().name


def find_target(words: str) -> Target:
    """Returns what the words mean: a run stands for its pruned model.

    Raises:
        IncompatibleError: There is no such thing, or it is not a model.
    """
    if words in MODELS:
        return Target(model_directory(words, cache_directory()), "directory", None)
    path = Path(words)
    if path.is_file() and path.suffix == ".gguf":
        return Target(path, "gguf", _run_of(path))
    if path.is_file() and path.suffix == ".onnx":
        return Target(path.parent, "onnx", _run_of(path))
    if (path / EXPERIMENT_FILE).is_file():
        pruned = path / "models" / "pruned"
        if not pruned.is_dir():
            raise IncompatibleError(
                f"expected a finished run with {pruned}, found none", hint=f"fedspine simulate --resume {path}"
            )
        return Target(pruned, "directory", path)
    if (path / "model.onnx").is_file():
        return Target(path, "onnx", _run_of(path))
    if (path / "config.json").is_file():
        return Target(path, "directory", _run_of(path))
    raise IncompatibleError(
        f"expected a run, a model directory, a .gguf or .onnx file, or one of {', '.join(sorted(MODELS))},"
        f" found {words!r}"
    )


def model_target(words: str) -> Target:
    """Returns a model directory.

    Raises:
        IncompatibleError: It is something else.
    """
    target = find_target(words)
    if target.kind != "directory":
        raise IncompatibleError(
            f"expected a run or a model directory, found the {target.kind} file {words!r}",
            hint="exported files cannot be exported, pruned or tuned: give the directory they came from",
        )
    return target


def _run_of(path: Path) -> Path | None:
    return next((folder for folder in path.resolve().parents if (folder / EXPERIMENT_FILE).is_file()), None)


@dataclass(frozen=True)
class Task:
    """What a model was, or is to be, tuned for.

    Attributes:
        classes: Names of the classes, in the order of their numbers.
        prompt: A decoder's template with `{text}`; None for a classifier.
    """

    classes: tuple[str, ...]
    prompt: str | None


def task_for(target: Target, examples: list[Example], prompt: str | None) -> Task:
    """Returns the task of some examples for a model: the classes it was tuned for, or else theirs.

    Args:
        target: The model.
        examples: Labelled texts.
        prompt: The user's own template; the one the model was tuned with when None.

    Raises:
        DataError: The examples have classes the model was not tuned for.
    """
    known = known_task(target)
    labels = tuple(sorted({example.label for example in examples}))
    decoder = target.kind == "gguf" or is_decoder(target.path)
    if known is None:
        return Task(labels, (prompt or DEFAULT_PROMPT) if decoder else None)
    strange = sorted(set(labels) - set(known.classes))
    if strange:
        raise DataError(
            f"expected the classes {', '.join(known.classes)} that the model was tuned for, found {strange[0]!r}"
        )
    return Task(known.classes, (prompt or known.prompt or DEFAULT_PROMPT) if decoder else None)


def known_task(target: Target) -> Task | None:
    """Returns the task a model was tuned for, as its directory or its run tells; None where nothing does."""
    folder = target.path.parent if target.kind == "gguf" else target.path
    task = _json(folder / PRUNE_FILE).get("task")
    if task is None and target.run_dir is not None:
        task = _json(target.run_dir / "models" / "pruned" / PRUNE_FILE).get("task")
    return None if task is None else Task(tuple(task["classes"]), task["prompt"])


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def is_decoder(path: Path) -> bool:
    """Whether a model directory, or that of an ONNX model, is a causal language model's."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise IncompatibleError(f"expected a readable config.json in {path}: {error}") from error
    return family_of(config).task == "decoder"


def encoding_of(path: Path, task: Task) -> Encoding:
    """Returns how examples become a model's tokens."""
    return Encoding(load_tokenizer(path), task.classes, task.prompt)
