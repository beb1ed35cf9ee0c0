"""The one door to onnxruntime: load an ONNX file, feed tokens through its cache or classify rows, read logits.

In: an ONNX file with Optimum's names of inputs and outputs (ours or another's) and token ids. Out: float32 logits.
Needs the optional package onnxruntime. numpy and the standard library only, so that a process measuring a model's
memory holds little else.

Source: onnxruntime's Python interface; Optimum's names of inputs, caches and outputs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.errors import CheckpointError, IncompatibleError

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
METADATA_PREFIX = "fedspine."

_PAST, _PRESENT = "past_key_values.", "present."
_FATAL_ONLY = 4
_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def optional_library(name: str) -> Any:
    """Returns a module of the extra `onnx`, imported when first asked for.

    Raises:
        IncompatibleError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".", maxsplit=1)[0].replace("_", "-")
        raise IncompatibleError(
            f"expected the package {package}, found none", hint="pip install 'fedspine-edge[onnx]'"
        ) from error


@functools.lru_cache(maxsize=1)
def _failures() -> tuple[type[Exception], ...]:
    """Returns the exceptions of onnxruntime, which share no base class."""
    state = optional_library("onnxruntime.capi.onnxruntime_pybind11_state")
    found = (value for value in vars(state).values() if isinstance(value, type))
    return tuple(kind for kind in found if issubclass(kind, Exception))


class OnnxSession:
    """A loaded model; a decoder keeps the keys and values of the tokens it was fed. Made by `open_onnx`.

    Attributes:
        task: `decoder` or `classifier`.
        metadata: The file's own properties, e.g. `fedspine.precision`.
        num_cached: Tokens in a decoder's cache.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {entry.name: entry for entry in session.get_inputs()}
        self._outputs = [entry.name for entry in session.get_outputs()]
        self.task = _task_of(list(self._inputs), self._outputs)
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self.clear()

    @property
    def num_vocab(self) -> int | None:
        """Entries of the vocabulary; None where the file does not tell."""
        return self._told("vocab_size")

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest row a classifier takes; None where the file does not tell."""
        return self._told("max_tokens")

    def clear(self) -> None:
        """Forgets every token."""
        make = optional_library("onnxruntime").OrtValue.ortvalue_from_numpy
        self.num_cached = 0
        self._cache = {
            name: make(np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=_CACHE_TYPES[entry.type]))
            for name, entry in self._inputs.items()
            if name.startswith(_PAST)
        }

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Feeds the next tokens of the sequence to a decoder and returns what it says after each.

        Args:
            tokens: Token ids, [T], T >= 1; many at once for a prompt, one at a time to generate.

        Returns:
            float32 [T, V].

        Raises:
            ValueError: No token, one outside the vocabulary, or the model is a classifier.
            IncompatibleError: onnxruntime failed.
        """
        if self.task != "decoder":
            raise ValueError("expected a decoder, found a classifier: use classify")
        self._check([tokens])
        total = self.num_cached + len(tokens)
        outputs = self._run(
            {
                "input_ids": np.array([tokens], dtype=np.int64),
                "attention_mask": np.ones((1, total), dtype=np.int64),
                "position_ids": np.arange(self.num_cached, total, dtype=np.int64)[None],
            },
            self._cache,
        )
        self._cache = {
            _PAST + name.removeprefix(_PRESENT): value for name, value in outputs.items() if name.startswith(_PRESENT)
        }
        self.num_cached = total
        logits: np.ndarray = outputs["logits"].numpy()[0].astype(np.float32)
        return logits

    def classify(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns a classifier's logits of each row, computed as one batch padded at the right.

        Args:
            rows: Token ids of each text, special tokens included; N rows.

        Returns:
            float32 [N, C].

        Raises:
            ValueError: No row, an empty or too long one, a token outside the vocabulary, or the model is a decoder.
            IncompatibleError: onnxruntime failed.
        """
        if self.task != "classifier":
            raise ValueError("expected a classifier, found a decoder: use decode")
        self._check(rows)
        longest = max(len(row) for row in rows)
        tokens, mask = (np.zeros((len(rows), longest), dtype=np.int64) for _ in range(2))
        for index, row in enumerate(rows):
            tokens[index, : len(row)], mask[index, : len(row)] = row, 1
        inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
        logits: np.ndarray = self._run(inputs, {})["logits"].numpy().astype(np.float32)
        return logits

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        if len(rows) == 0 or not all(len(row) for row in rows):
            raise ValueError("expected rows of at least one token, found an empty one")
        lowest, highest = min(min(row) for row in rows), max(max(row) for row in rows)
        if lowest < 0 or (self.num_vocab is not None and highest >= self.num_vocab):
            raise ValueError(f"expected tokens from 0 to below {self.num_vocab}, found {lowest} to {highest}")
        longest = max(len(row) for row in rows)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise ValueError(f"expected at most {self.max_tokens} tokens in a row, found {longest}")

    def _told(self, key: str) -> int | None:
        value = self.metadata.get(METADATA_PREFIX + key, "")
        return int(value) if value.isdigit() else None

    def _run(self, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> dict[str, Any]:
        make = optional_library("onnxruntime").OrtValue.ortvalue_from_numpy
        feeds = {name: make(array) for name, array in arrays.items() if name in self._inputs}
        try:
            outputs = self._session.run_with_ort_values(self._outputs, {**feeds, **values})
        except _failures() as error:
            raise IncompatibleError(f"expected logits, onnxruntime failed: {_reason(error)}") from error
        return dict(zip(self._outputs, outputs, strict=True))


def open_onnx(path: Path, *, num_threads: int = 1) -> OnnxSession:
    """Returns a loaded model.

    Args:
        path: ONNX file, or a directory with `model.onnx`.
        num_threads: Threads of one operation.

    Raises:
        ValueError: Fewer threads than one.
        CheckpointError: There is no such file, it is damaged, or its weights file is missing or damaged.
        IncompatibleError: It is no decoder or classifier with Optimum's names, or onnxruntime is not installed.
    """
    if num_threads < 1:
        raise ValueError(f"expected at least one thread, found {num_threads}")
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"expected an ONNX file at {file}, found none")
    library = optional_library("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = _FATAL_ONLY
    try:
        session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except _failures() as error:
        raise CheckpointError(
            f"expected a whole ONNX file at {file}, found one onnxruntime does not load: {_reason(error)}",
            hint=f"export it again, or copy it with its {DATA_FILE} if it has one",
        ) from error
    return OnnxSession(session)


def onnx_logits(path: Path, token_ids: Sequence[int], *, num_threads: int = 1) -> np.ndarray:
    """Returns the logits after each token of one sequence: half of it as a prompt, the rest one by one.

    So both uses of a decoder's graph are exercised, and the cache between them.

    Args:
        path: ONNX file of a decoder.
        token_ids: The sequence, [T], T >= 1.
        num_threads: Threads.

    Returns:
        float32 [T, V].

    Raises:
        ValueError: No token, one outside the vocabulary, or the model is a classifier.
        CheckpointError: As `open_onnx`.
        IncompatibleError: As `open_onnx`, or onnxruntime failed.
    """
    session = open_onnx(path, num_threads=num_threads)
    num_prompt = (len(token_ids) + 1) // 2
    parts = [session.decode(token_ids[:num_prompt])]
    parts += [session.decode([token]) for token in token_ids[num_prompt:]]
    return np.concatenate(parts)


def onnx_class_logits(path: Path, rows: Sequence[Sequence[int]], *, num_threads: int = 1) -> np.ndarray:
    """Returns a classifier's logits of each row, float32 [N, C].

    Args:
        path: ONNX file of a classifier.
        rows: Token ids of each text, special tokens included; N rows.
        num_threads: Threads.

    Raises:
        ValueError: No row, an empty or too long one, a token outside the vocabulary, or the model is a decoder.
        CheckpointError: As `open_onnx`.
        IncompatibleError: As `open_onnx`, or onnxruntime failed.
    """
    return open_onnx(path, num_threads=num_threads).classify(rows)


def _task_of(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    if "input_ids" not in inputs or "logits" not in outputs:
        raise IncompatibleError(
            f"expected input input_ids and output logits, found {', '.join(inputs)} and {', '.join(outputs)}",
            hint="export the model with fedspine, or with Optimum's names",
        )
    return "decoder" if any(name.startswith(_PAST) for name in inputs) else "classifier"


def _reason(error: Exception) -> str:
    """Returns the first line of onnxruntime's message, without its code in front."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.rpartition(" : ")[2] if line.startswith("[ONNXRuntimeError]") else line
