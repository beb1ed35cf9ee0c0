"""The one door to llama.cpp: quantise a file, load it, decode tokens, read logits.

In: a GGUF file and token ids. Out: float32 logits. Needs the optional package llama-cpp-python; its low-level calls
are used because its `Llama` class keeps a [context, vocabulary] array and decodes one sequence at a time.
numpy and the standard library only, so that a process measuring a model's memory holds little else.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.errors import CheckpointError, IncompatibleError

FLASH_ATTENTION = 1
"""Without it the V cache is padded to the widest layer's heads."""

_GGML_F32, _GGML_F16 = 0, 1
_ERROR_LEVEL = 4


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        raise IncompatibleError(
            "expected the package llama-cpp-python, found none", hint="pip install 'fedspine-edge[llama]'"
        ) from error


@functools.lru_cache(maxsize=1)
def _error_lines() -> tuple[collections.deque[str], Any]:
    """Returns the last errors llama.cpp logged; the callback is kept here, for C holds a bare pointer to it."""
    lines: collections.deque[str] = collections.deque(maxlen=8)

    def keep(level: int, text: bytes, _: object) -> None:
        if level == _ERROR_LEVEL:
            lines.append(text.decode("utf-8", "replace").strip())

    callback = _library().llama_log_callback(keep)
    _library().llama_log_set(callback, ctypes.c_void_p(0))
    return lines, callback


def _what_went_wrong() -> str:
    lines = [line for line in _error_lines()[0] if line]
    return lines[0] if lines else "llama.cpp gave no reason"


def quantize_file(source: Path, output: Path, *, file_type: int, num_threads: int = 0) -> None:
    """Writes a quantised copy of an F32 or F16 GGUF file.

    Args:
        source: File to read.
        output: File to write.
        file_type: `llama_ftype` number.
        num_threads: Threads; 0 = one a core.

    Raises:
        CheckpointError: llama.cpp refused, or the disk is full.
    """
    library, lines = _library(), _error_lines()[0]
    lines.clear()
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, num_threads
    if library.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)) != 0:
        raise CheckpointError(f"expected a quantised file, llama.cpp failed: {_what_went_wrong()}")


@dataclass(frozen=True)
class LlamaSession:
    """A loaded model with one context; made by `open_session`.

    Attributes:
        model: llama.cpp's model handle.
        context: llama.cpp's context handle.
        num_vocab: Entries of the vocabulary.
        max_batch: Tokens one `decode` takes.
        batch: llama.cpp's batch of that many tokens, filled anew by each `decode`.
    """

    model: Any
    context: Any
    num_vocab: int
    max_batch: int
    batch: Any

    def clear(self) -> None:
        """Forgets every sequence."""
        _library().llama_memory_clear(_library().llama_get_memory(self.context), True)

    def decode(
        self,
        tokens: Sequence[int],
        *,
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        """Runs tokens through the model.

        Args:
            tokens: Token ids, at most `max_batch`.
            positions: Position of each token in its sequence.
            sequences: Sequence each token belongs to.
            wanted: Whether the logits of each token are kept.

        Raises:
            ValueError: A token is not in the vocabulary, or there are too many of them.
            IncompatibleError: llama.cpp failed.
        """
        if not 0 < len(tokens) <= self.max_batch:
            raise ValueError(f"expected 1 to {self.max_batch} tokens, found {len(tokens)}")
        if min(tokens) < 0 or max(tokens) >= self.num_vocab:
            raise ValueError(f"expected tokens below {self.num_vocab}, found {min(tokens)} to {max(tokens)}")
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = positions[index]
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequences[index]
            batch.logits[index] = wanted[index]
        code = _library().llama_decode(self.context, batch)
        if code != 0:
            raise IncompatibleError(f"expected logits, llama.cpp's decode returned {code}: {_what_went_wrong()}")

    def logits(self, index: int) -> np.ndarray:
        """Returns a copy of the logits of the batch's token `index` (it was wanted), float32 [V]."""
        return self._logits(index).copy()

    def best(self, index: int) -> int:
        """Returns the most likely token after the batch's token `index` (it was wanted), without a copy."""
        return int(self._logits(index).argmax())

    def _logits(self, index: int) -> np.ndarray:
        pointer = _library().llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.num_vocab,))

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, special tokens parsed, none added."""
        library, encoded = _library(), text.encode()
        buffer = (library.llama_token * (len(encoded) + 8))()
        vocabulary = library.llama_model_get_vocab(self.model)
        count = library.llama_tokenize(vocabulary, encoded, len(encoded), buffer, len(buffer), False, True)
        return list(buffer[:count])

    @property
    def num_parameters(self) -> int:
        """Weights in the file."""
        return int(_library().llama_model_n_params(self.model))

    @property
    def description(self) -> str:
        """Type as llama-bench prints it, e.g. `llama 256M Q8_0`."""
        buffer = ctypes.create_string_buffer(128)
        _library().llama_model_desc(self.model, buffer, len(buffer))
        return buffer.value.decode()


@contextmanager
def open_session(
    path: Path,
    *,
    num_context: int,
    num_sequences: int = 1,
    num_threads: int = 1,
    exact_attention: bool = False,
    adapter: Path | None = None,
) -> Iterator[LlamaSession]:
    """Yields a loaded model, freed at the end.

    Args:
        path: GGUF file.
        num_context: Tokens held at once, over all sequences; also the largest batch.
        num_sequences: Sequences held at once.
        num_threads: Threads.
        exact_attention: Compute attention in float32, for parity; else flash attention, which casts keys and values to
            float16 whatever the cache holds (on SmolLM2 in F32: logits off by 2e-2 instead of 1e-4).
        adapter: GGUF LoRA adapter to add to the model.

    Raises:
        CheckpointError: There is no such file.
        IncompatibleError: llama.cpp does not load it, or the adapter is not of this model.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a GGUF file at {path}, found none")
    if adapter is not None:
        _check_adapter(adapter, path)
    library, lines = _library(), _error_lines()[0]
    lines.clear()
    library.llama_backend_init()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise IncompatibleError(f"expected a file llama.cpp loads, found {path.name}: {_what_went_wrong()}")
    context, batch = None, library.llama_batch_init(num_context, 0, 1)
    try:
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = num_context
        params.n_ubatch = min(num_context, params.n_ubatch)
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = 0 if exact_attention else FLASH_ATTENTION
        params.kv_unified = True
        params.type_k = params.type_v = _GGML_F32 if exact_attention else _GGML_F16
        context = library.llama_init_from_model(model, params)
        if not context:
            raise IncompatibleError(f"expected a context for {path.name}, found none: {_what_went_wrong()}")
        if adapter is not None:
            _add_adapter(model, context, adapter)
        vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        yield LlamaSession(model, context, num_vocab=vocabulary, max_batch=num_context, batch=batch)
    finally:
        library.llama_batch_free(batch)
        if context:
            library.llama_free(context)
        library.llama_model_free(model)


def _check_adapter(adapter: Path, path: Path) -> None:
    # Imported where it is needed: the reader would weigh in the memory of a process that is being measured.
    from fedspine_edge.export.adapter_check import check_gguf_adapter

    check_gguf_adapter(adapter, path)


def _add_adapter(model: Any, context: Any, adapter: Path) -> None:
    """Adds a LoRA adapter to a context; it is freed with the model."""
    library = _library()
    handle = library.llama_adapter_lora_init(model, str(adapter).encode())
    if not handle:
        raise IncompatibleError(f"expected an adapter llama.cpp loads, found {adapter.name}: {_what_went_wrong()}")
    handles = (library.llama_adapter_lora_p_ctypes * 1)(ctypes.cast(handle, library.llama_adapter_lora_p_ctypes))
    if library.llama_set_adapters_lora(context, handles, 1, (ctypes.c_float * 1)(1.0)) != 0:
        raise IncompatibleError(f"expected {adapter.name} to fit the model: {_what_went_wrong()}")
