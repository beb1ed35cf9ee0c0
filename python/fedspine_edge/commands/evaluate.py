"""`fedspine eval`: how many examples a model gets right, in the runtime that will serve it.

Comes in: a model directory, a GGUF file or an ONNX model, and labelled examples. Goes out: accuracy with its confidence
interval, and where each class goes wrong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.batches import Encoding, TokenSet
from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.commands.experiment import read_experiment
from fedspine_edge.commands.targets import Target, Task, encoding_of, find_target, task_for
from fedspine_edge.config import cache_directory
from fedspine_edge.data import Example, load_examples, split
from fedspine_edge.errors import IncompatibleError
from fedspine_edge.export.onnx_session import open_onnx
from fedspine_edge.export.verify import classify
from fedspine_edge.hardware import usable_cores
from fedspine_edge.sources import model_directory
from fedspine_edge.tuning import predict

NORMAL_95 = 1.96
ROWS_AT_A_TIME = 32


@dataclass(frozen=True)
class ClassScore:
    """How one class fared; `mistaken_for` is empty where nothing went wrong."""

    label: str
    rows: int
    right: int
    mistaken_for: str


@dataclass(frozen=True)
class Score:
    """What a model scored.

    Attributes:
        target: What was judged.
        runtime: `torch`, `llama.cpp` or `onnxruntime`.
        rows: Examples.
        accuracy: Share it got right, 0..1.
        low: Lower end of the 95 % interval (Wilson).
        high: Upper end.
        classes: Class by class.
    """

    target: str
    runtime: str
    rows: int
    accuracy: float
    low: float
    high: float
    classes: tuple[ClassScore, ...]

    def record(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        return asdict(self)

    def lines(self) -> str:
        """Returns what a person reads."""
        width = max(len(score.label) for score in self.classes)
        table = "\n".join(
            f"  {score.label:<{width}}  {score.right:>5} of {score.rows:<5}"
            + (f"  most often taken for {score.mistaken_for}" if score.mistaken_for else "")
            for score in self.classes
        )
        return (
            f"{self.target} in {self.runtime}: accuracy {self.accuracy:.3f} on {self.rows} rows"
            f" (95 % interval {self.low:.3f} to {self.high:.3f})\n{table}"
        )


def evaluate(words: str, data: str | None, *, prompt: str | None) -> Score:
    """Judges a model by labelled examples.

    Args:
        words: A run, a model directory, a GGUF file or an ONNX model.
        data: A packaged data set or the user's file, every row of it; None for the rows that the model's own run held
            out.
        prompt: A decoder's template; the one it was tuned with when None.

    Raises:
        FedSpineError: Model or data are missing, damaged or do not fit together.
    """
    target = find_target(words)
    examples = _held_out(target) if data is None else load_examples(data)
    task = task_for(target, examples, prompt)
    encoding = encoding_of(_tokenizer_directory(target), task)
    tokens = encoding.encode(examples)
    runtime, predictions = _answers(target, encoding, task, tokens)
    right = int((predictions == tokens.labels).sum())
    low, high = wilson(right, len(tokens))
    return Score(
        target=words,
        runtime=runtime,
        rows=len(tokens),
        accuracy=right / len(tokens),
        low=low,
        high=high,
        classes=tuple(_class_scores(task.classes, tokens.labels, predictions)),
    )


def _held_out(target: Target) -> list[Example]:
    if target.run_dir is None:
        raise IncompatibleError(f"expected --data for {target.path}, found none", hint="it belongs to no run")
    _, experiment = read_experiment(target.run_dir)
    parts = split(
        load_examples(experiment.data),
        held_out=experiment.held_out,
        validation=experiment.validation,
        seed=experiment.seed,
    )
    return list(parts.held_out)


def _tokenizer_directory(target: Target) -> Path:
    if target.kind != "gguf":
        return target.path
    if target.run_dir is not None:
        return model_directory(read_experiment(target.run_dir)[1].model, cache_directory())
    beside = target.path.parent
    if (beside / "tokenizer.json").is_file() and (beside / "config.json").is_file():
        return beside
    raise IncompatibleError(
        f"expected the tokenizer of {target.path.name} in its run or beside it, found none",
        hint="keep config.json and tokenizer.json of its model directory in the same folder",
    )


def _answers(target: Target, encoding: Encoding, task: Task, tokens: TokenSet) -> tuple[str, np.ndarray]:
    decoder = task.prompt is not None
    if target.kind == "gguf":
        found = classify(target.path, tokens.prompts(), encoding.choice_tokens(), num_threads=usable_cores())
        return "llama.cpp", np.asarray(found)
    if target.kind == "onnx":
        return "onnxruntime", _onnx_answers(target.path / "model.onnx", encoding if decoder else None, tokens)
    choices = encoding.choice_tokens() if decoder else None
    return "torch", predict(load_pruned(target.path), tokens, choices=choices)


def _onnx_answers(path: Path, decoding: Encoding | None, tokens: TokenSet) -> np.ndarray:
    prompts = tokens.prompts()
    session = open_onnx(path, num_threads=usable_cores())
    if decoding is None:
        batches = [prompts[start : start + ROWS_AT_A_TIME] for start in range(0, len(prompts), ROWS_AT_A_TIME)]
        answers: np.ndarray = np.concatenate([session.classify(batch) for batch in batches]).argmax(axis=1)
        return answers
    choices, found = decoding.choice_tokens(), []
    for prompt in prompts:
        session.clear()
        found.append(int(session.decode(prompt)[-1][choices].argmax()))
    return np.asarray(found)


def _class_scores(classes: tuple[str, ...], labels: np.ndarray, predictions: np.ndarray) -> list[ClassScore]:
    scores = []
    for number, label in enumerate(classes):
        mine = predictions[labels == number]
        wrong = mine[mine != number]
        rival = classes[int(np.bincount(wrong).argmax())] if len(wrong) else ""
        scores.append(ClassScore(label, len(mine), int((mine == number).sum()), rival))
    return scores


def wilson(right: int, total: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a share."""
    share, spread = right / total, NORMAL_95**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = NORMAL_95 * sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return centre - half, centre + half
