"""Two models side by side on the same real text: `fedspine verify`, and the last word on every export.

Comes in: a reference and what is to be judged, each a model directory, a GGUF file or an ONNX model. Goes out: `Parity`
beside the bounds of the judged format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedspine_edge.base_model import load_tokenizer
from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.commands.targets import Target, encoding_of, is_decoder, known_task, task_for
from fedspine_edge.data import load_examples
from fedspine_edge.errors import IncompatibleError, VerificationError
from fedspine_edge.export.adapter_check import read_facts
from fedspine_edge.export.gguf import FILE_TYPES
from fedspine_edge.export.llama_session import open_session
from fedspine_edge.export.onnx_parity import ONNX_TOLERANCES
from fedspine_edge.export.onnx_session import onnx_class_logits, onnx_logits, open_onnx
from fedspine_edge.export.verify import (
    TOLERANCES,
    Parity,
    Tolerance,
    compare_logits,
    llama_logits,
    missed_bound,
    parity_line,
)
from fedspine_edge.hardware import usable_cores

DEFAULT_POSITIONS = 320
ROWS_AT_A_TIME = 32
SAME_MODEL = TOLERANCES["F32"]


@dataclass(frozen=True)
class Text:
    """What both models are shown.

    Attributes:
        token_ids: Running text for decoders, [T]; empty for classifiers.
        rows: Texts for classifiers, token ids each; empty for decoders.
    """

    token_ids: tuple[int, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A judged model.

    Attributes:
        format: The format it was judged as, e.g. `Q8_0`, `int8`, `directory`.
        parity: How near it is to the reference.
        tolerance: What its format may lose.
        missed: The first bound that is missed, None when it passed.
    """

    format: str
    parity: Parity
    tolerance: Tolerance
    missed: str | None

    def line(self) -> str:
        """Returns the verdict in one line, each figure beside its bound."""
        return parity_line(self.parity, self.format, self.tolerance)


def text_for(targets: Sequence[Target], data: str, *, positions: int) -> Text:
    """Returns real text in the tokens of the first model directory among the targets, or of the GGUF file.

    A decoder that was tuned is shown what it was tuned for, prompts and answers end to end.

    Args:
        targets: What will be shown the text.
        data: Packaged data set or the user's file.
        positions: Tokens for decoders, texts for classifiers.
    """
    directory = next((target for target in targets if target.kind != "gguf"), None)
    if directory is None:
        with open_session(targets[0].path, num_context=8) as session:
            joined = "\n".join(example.text for example in load_examples(data))[: 16 * positions]
            return Text(token_ids=tuple(int(t) for t in np.resize(session.tokenize(joined), positions)))
    examples = load_examples(data)
    if not is_decoder(directory.path):
        encoding = encoding_of(directory.path, task_for(directory, examples, None))
        return Text(rows=tuple(tuple(row) for row in encoding.encode(examples[:positions]).prompts()))
    task = known_task(directory)
    if task is not None and {example.label for example in examples} <= set(task.classes):
        rows = encoding_of(directory.path, task).encode(examples[:positions]).rows
    else:
        tokenizer = load_tokenizer(directory.path)
        rows = tuple(np.asarray(tokenizer(e.text + "\n")["input_ids"]) for e in examples[:positions])
    return Text(token_ids=tuple(int(token) for token in np.resize(np.concatenate(rows), positions)))


def logits_of(target: Target, text: Text) -> np.ndarray:
    """Returns what a model says: after each token [T, V], or of each text [N, C]; float32.

    Raises:
        IncompatibleError: A decoder is asked of a classifier's texts, or the other way round.
    """
    threads = usable_cores()
    if target.kind == "gguf":
        if not text.token_ids:
            raise IncompatibleError(f"expected a decoder's file to compare with decoders, found {target.path.name}")
        return llama_logits(target.path, text.token_ids, num_threads=threads)
    if target.kind == "onnx":
        file = target.path / "model.onnx"
        if text.token_ids:
            return onnx_logits(file, text.token_ids, num_threads=threads)
        return onnx_class_logits(file, text.rows, num_threads=threads)
    return _torch_logits(target.path, text)


@torch.no_grad()
def _torch_logits(path: Path, text: Text) -> np.ndarray:
    model = load_pruned(path)
    if text.token_ids:
        logits: np.ndarray = model(torch.tensor([text.token_ids])).logits[0].numpy()
        return logits
    return np.concatenate([model(torch.tensor([row])).logits.numpy() for row in text.rows])


def judge(reference: np.ndarray, target: Target, text: Text) -> Verdict:
    """Returns how near a model is to the reference, and whether its format may be that far.

    Args:
        reference: What the model it came from says of the same text.
        target: What is judged.
        text: The text.

    Raises:
        IncompatibleError: The two have other vocabularies or classes.
    """
    found = logits_of(target, text)
    if found.shape != reference.shape:
        raise IncompatibleError(
            f"expected {reference.shape[1]} logits a position as the reference has, found {found.shape[1]}",
            hint="the two are not forms of one model",
        )
    parity = compare_logits(reference, found, token_ids=text.token_ids or None)
    name = format_of(target)
    tolerance = {**TOLERANCES, **ONNX_TOLERANCES}.get(name, SAME_MODEL)
    return Verdict(name, parity, tolerance, missed_bound(parity, tolerance, name))


def format_of(target: Target) -> str:
    """Returns the format of a target: a quantisation, an ONNX precision, or `directory`."""
    if target.kind == "gguf":
        number = int(read_facts(target.path, ("general.file_type",))["general.file_type"])
        return next((name for name, value in FILE_TYPES.items() if int(value) == number), "unknown")
    if target.kind == "onnx":
        return str(open_onnx(target.path / "model.onnx").metadata.get("fedspine.precision", "fp32"))
    return "directory"


def require(verdict: Verdict, what: str) -> None:
    """Raises VerificationError when a verdict is negative."""
    if verdict.missed is not None:
        raise VerificationError(
            f"{what} does not say what its model says: {verdict.missed}",
            hint="take a finer format; if F32 fails too, the export is at fault: please report it",
        )
