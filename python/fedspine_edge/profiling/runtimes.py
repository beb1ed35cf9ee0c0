"""Models in the runtimes that serve them, behind one small interface: the measured side of a profile.

Comes in: a path; its kind chooses the runtime in `RUNTIMES`. Goes out: `Runtime`s that take tokens. A new kind of file
is one entry there. Only the chosen runtime's library is imported, for its memory is measured.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedspine_edge.errors import CheckpointError, IncompatibleError

GGUF_MAGIC = b"GGUF"
TOKENIZER = "tokenizer.json"
CONFIG = "config.json"
ONNX_FILE = "model.onnx"
_HEADER_BYTES = 8


class Opening(NamedTuple):
    """What a model is opened with.

    Attributes:
        path: File or directory.
        num_context: Tokens held at once.
        num_threads: Threads.
        num_batch: Tokens of one step of a prompt, at most.
    """

    path: Path
    num_context: int
    num_threads: int
    num_batch: int


class Facts(NamedTuple):
    """What a runtime tells of its model; None where it does not.

    Attributes:
        model_type: As llama-bench names it.
        num_parameters: Weights.
        model_bytes: Bytes of the weights.
        num_vocab: Tokens to choose from.
        generates: Whether it is a decoder; an encoder has prompts only.
    """

    model_type: str
    num_parameters: int | None
    model_bytes: int
    num_vocab: int
    generates: bool


class Runtime(Protocol):
    """A loaded model that keeps the tokens it was fed."""

    facts: Facts

    def clear(self) -> None:
        """Forgets every token."""

    def feed(self, tokens: Sequence[int]) -> int:
        """Feeds the next tokens and returns the most likely one after them (a class, for an encoder)."""

    def losses(self, tokens: Sequence[int]) -> list[float]:
        """Returns the loss of each token but the first, nats, the cache cleared before; at most a context of them."""

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text; empty where no tokenizer is at hand."""


class LlamaRuntime:
    """A GGUF file in llama.cpp."""

    def __init__(self, opening: Opening) -> None:
        from fedspine_edge.export.llama_session import open_session

        self._opened = open_session(opening.path, num_context=opening.num_context, num_threads=opening.num_threads)
        session = self._session = self._opened.__enter__()
        self._num_batch, self._position = opening.num_batch, 0
        size = importlib.import_module("llama_cpp").llama_model_size(session.model)
        self.facts = Facts(session.description, session.num_parameters, int(size), session.num_vocab, True)

    def clear(self) -> None:
        """Forgets every token."""
        self._session.clear()
        self._position = 0

    def feed(self, tokens: Sequence[int]) -> int:
        """Feeds the next tokens in steps of the batch and returns the most likely one after them."""
        for start in range(0, len(tokens), self._num_batch):
            last = self._step(tokens[start : start + self._num_batch], every=False)
        return self._session.best(last)

    def losses(self, tokens: Sequence[int]) -> list[float]:
        """Returns the loss of each token but the first."""
        self.clear()
        found: list[float] = []
        for start in range(0, len(tokens) - 1, self._num_batch):
            chunk = tokens[start : min(start + self._num_batch, len(tokens) - 1)]
            self._step(chunk, every=True)
            found += [_loss(self._session.logits(i), tokens[start + i + 1]) for i in range(len(chunk))]
        return found

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        return self._session.tokenize(text)

    def _step(self, chunk: Sequence[int], *, every: bool) -> int:
        """Decodes one batch, wanting the logits of every token or of the last, and returns the last one's index."""
        count = len(chunk)
        self._session.decode(
            chunk,
            positions=range(self._position, self._position + count),
            sequences=[0] * count,
            wanted=[every] * (count - 1) + [True],
        )
        self._position += count
        return count - 1


class TorchRuntime:
    """A model directory in PyTorch, as `load_pruned` opens it."""

    def __init__(self, opening: Opening) -> None:
        import torch

        from fedspine_edge.checkpoint import load_pruned

        torch.set_num_threads(opening.num_threads)
        torch.set_grad_enabled(False)
        self._torch, self._path, self._num_batch = torch, opening.path, opening.num_batch
        self._model: Any = load_pruned(opening.path).eval()
        config: Any = self._model.config
        self._cache: Any = None
        unique = {parameter.data_ptr(): parameter for parameter in self._model.parameters()}.values()
        count, size = sum(p.numel() for p in unique), sum(p.nbytes for p in unique)
        generates = "CausalLM" in type(self._model).__name__
        name = f"{config.model_type} {_short_count(count)} F32"
        self.facts = Facts(name, count, size, config.vocab_size, generates)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and opening.num_context > longest:
            raise IncompatibleError(
                f"expected at most {longest} tokens for {opening.path.name}, found {opening.num_context}",
                hint="choose a smaller -p or -n",
            )

    def clear(self) -> None:
        """Forgets every token."""
        self._cache = None

    def feed(self, tokens: Sequence[int]) -> int:
        """Feeds the next tokens and returns the most likely one after them, or the class."""
        if not self.facts.generates:
            return int(self._model(self._torch.tensor([tokens])).logits[0].argmax())
        for start in range(0, len(tokens), self._num_batch):
            chunk = self._torch.tensor([tokens[start : start + self._num_batch]])
            answer = self._model(chunk, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = answer.past_key_values
        return int(answer.logits[0, -1].argmax())

    def losses(self, tokens: Sequence[int]) -> list[float]:
        """Returns the loss of each token but the first."""
        logits = self._model(self._torch.tensor([tokens[:-1]]), use_cache=False).logits[0].numpy()
        return [_loss(row, token) for row, token in zip(logits, tokens[1:], strict=True)]

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text by the directory's tokenizer."""
        return _tokenize(self._path / TOKENIZER, text)


class OnnxRuntime:
    """An ONNX file, or a directory with one, in onnxruntime."""

    def __init__(self, opening: Opening) -> None:
        from fedspine_edge.export.onnx_session import open_onnx

        self._session = open_onnx(opening.path, num_threads=opening.num_threads)
        folder = opening.path if opening.path.is_dir() else opening.path.parent
        self._folder, self._num_batch = folder, opening.num_batch
        files = folder.glob("model.onnx*") if opening.path.is_dir() else folder.glob(f"{opening.path.name}*")
        precision = self._session.metadata.get("fedspine.precision", "")
        self.facts = Facts(
            model_type=f"{_model_type(folder)} {precision}".strip(),
            num_parameters=None,
            model_bytes=sum(file.stat().st_size for file in files),
            num_vocab=self._session.num_vocab or _num_vocab(folder),
            generates=self._session.task == "decoder",
        )

    def clear(self) -> None:
        """Forgets every token."""
        self._session.clear()

    def feed(self, tokens: Sequence[int]) -> int:
        """Feeds the next tokens and returns the most likely one after them, or the class."""
        if not self.facts.generates:
            return int(self._session.classify([tokens])[0].argmax())
        for start in range(0, len(tokens), self._num_batch):
            logits = self._session.decode(tokens[start : start + self._num_batch])
        return int(logits[-1].argmax())

    def losses(self, tokens: Sequence[int]) -> list[float]:
        """Returns the loss of each token but the first."""
        self.clear()
        rows = self._session.decode(tokens[:-1])
        return [_loss(row, token) for row, token in zip(rows, tokens[1:], strict=True)]

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text by the tokenizer beside the file."""
        return _tokenize(self._folder / TOKENIZER, text)


RUNTIMES: dict[str, Callable[[Opening], Runtime]] = {
    "llama.cpp": LlamaRuntime,
    "onnxruntime": OnnxRuntime,
    "torch": TorchRuntime,
}
"""By the name of the backend that `backend_of` gives."""

LLAMA_BENCH_NAMES = {"llama.cpp": "CPU"}
"""What llama-bench's column `backend` says, where it has a name for it."""


def backend_of(path: Path) -> str:
    """Returns the runtime a file or directory is for, a key of `RUNTIMES`.

    Raises:
        CheckpointError: There is nothing at that path.
        IncompatibleError: It is no kind of model that can be profiled.
    """
    if not path.exists():
        raise CheckpointError(f"expected a model at {path}, found nothing", hint="check the path")
    if path.suffix == ".onnx" or (path / ONNX_FILE).is_file():
        return "onnxruntime"
    if (path / CONFIG).is_file():
        return "torch"
    if path.is_file() and _header(path).startswith(GGUF_MAGIC):
        return "llama.cpp"
    raise IncompatibleError(
        f"expected a GGUF file, an ONNX file or a model directory, found {path.name}, which is none of them",
        hint="give a .gguf file, an .onnx file, or a directory with config.json and model.safetensors",
    )


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES)


def _loss(logits: np.ndarray, token: int) -> float:
    """Returns -log softmax(logits)[token]."""
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(top + np.log(np.exp(wide - top).sum()) - wide[token])


def _tokenize(file: Path, text: str) -> list[int]:
    if not file.is_file():
        return []
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)


def _config(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _model_type(folder: Path) -> str:
    return str(_config(folder).get("model_type", "onnx"))


def _num_vocab(folder: Path) -> int:
    """Returns the vocabulary's size, or a number that every vocabulary reaches."""
    size = _config(folder).get("vocab_size")
    return size if isinstance(size, int) and size > 0 else 8


def _short_count(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
