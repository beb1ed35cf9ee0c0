"""Whether a GGUF LoRA adapter fits a GGUF base, found out before llama.cpp sees either.

In: the two files. Out: nothing, or IncompatibleError. llama.cpp takes an adapter of another architecture or base
without a word, and may end the process at the first decode.

Source: GGUF specification (ggml-org/ggml, docs/gguf.md), adapter keys; llama.cpp src/llama-adapter.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader

from fedspine_edge.errors import CheckpointError, IncompatibleError

WEIGHTS_KEY = "fedspine.weights_sha256"
"""In a model's file: hash of the directory it was written from."""

BASE_KEY = "fedspine.base_sha256"
"""In an adapter's file: hash of the directory it was tuned on."""

_HINT = "load the adapter on the file of the model it was tuned on"


def check_gguf_adapter(adapter: Path, base: Path) -> None:
    """Checks that a LoRA adapter belongs to a base.

    Args:
        adapter: GGUF file of an adapter.
        base: GGUF file of a model.

    Raises:
        CheckpointError: A file is missing or truncated.
        IncompatibleError: It is no LoRA adapter, of another architecture, tuned on a base of another hash (where both
            files name theirs), or a factor has no partner, no matrix or another shape.
    """
    found, wanted = _open(adapter), _open(base)
    for key, value in (("general.type", "adapter"), ("adapter.type", "lora")):
        if fact(found, key) != value:
            raise IncompatibleError(f"expected {key} {value!r} in {adapter.name}, found {fact(found, key)!r}")
    architecture, own = fact(wanted, "general.architecture"), fact(found, "general.architecture")
    if own != architecture:
        raise IncompatibleError(
            f"expected an adapter of architecture {architecture} for {base.name}, found {own}", hint=_HINT
        )
    named, actual = fact(found, BASE_KEY), fact(wanted, WEIGHTS_KEY)
    if named and actual and named != actual:
        raise IncompatibleError(f"expected an adapter of base {actual[:12]}, found one of {named[:12]}", hint=_HINT)
    _check_tensors(found, wanted, adapter.name)


def fact(reader: Any, key: str) -> Any:
    """Returns a key of an opened GGUF file, None where it has none."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def read_facts(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Returns some keys of a GGUF file, None for those it has not.

    Raises:
        CheckpointError: It is missing or truncated.
    """
    reader = _open(path)
    return {key: fact(reader, key) for key in keys}


def _open(path: Path) -> Any:
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"expected a whole GGUF file at {path}: {error}") from error


def _check_tensors(found: Any, wanted: Any, name: str) -> None:
    """Raises IncompatibleError unless the factors come in pairs that fit their matrices; shapes are [columns, rows]."""
    matrices = {tensor.name: [int(size) for size in tensor.shape] for tensor in wanted.tensors}
    factors = {tensor.name: [int(size) for size in tensor.shape] for tensor in found.tensors}
    if not factors:
        raise IncompatibleError(f"expected LoRA factors in {name}, found none")
    for factor in factors:
        matrix, _, part = factor.rpartition(".")
        if part not in ("lora_a", "lora_b") or matrix not in matrices:
            raise IncompatibleError(f"expected factors of the base's matrices, found {factor} in {name}", hint=_HINT)
        pair = [factors.get(f"{matrix}.{letter}") for letter in ("lora_a", "lora_b")]
        columns, rows = matrices[matrix]
        rank = pair[0][1] if pair[0] else None
        if pair != [[columns, rank], [rank, rows]]:
            raise IncompatibleError(
                f"expected factors of shapes {[columns, 'R']} and {['R', rows]} for {matrix}, found {pair}", hint=_HINT
            )
