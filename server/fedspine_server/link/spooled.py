"""Updates whose factors stay on the disk until a matrix of them is merged, so that a round of any size fits in memory.

Comes in: the name of a kept frame. Goes out: an `Update` that reads its LoRA factors anew each time it is asked for
one; everything else, some kilobytes, it holds.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.protocol import MAX_MESSAGE_BYTES, Update, unpack, update_from_bytes
from fedspine_server.link.blobs import BlobStore

FACTORS = "lora_"


class StoredArrays(Mapping[str, np.ndarray]):
    """Arrays by name: the factors in a file, the rest in memory.

    Args:
        file: A safetensors file; may be removed once this has opened it.
        held: Arrays that are not read from it.
    """

    def __init__(self, file: Path, held: Mapping[str, np.ndarray]) -> None:
        opened: Any = safe_open(file, framework="numpy")
        self._file = opened
        self._names = list[str](opened.keys())
        self._held = held

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._held:
            return self._held[name]
        if name not in self._names:
            raise KeyError(name)
        array: np.ndarray = self._file.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def spooled_update(blobs: BlobStore, sha256: str) -> Update | None:
    """Returns a kept update; None for one that cannot be read any more, which then counts as missing.

    Raises:
        CheckpointError: There is no room to unpack it.
    """
    try:
        message = unpack(blobs.read(sha256), max_bytes=MAX_MESSAGE_BYTES)
        update = update_from_bytes(message)
    except (CheckpointError, IncompatibleError, KeyError):
        return None
    held = {name: array for name, array in update.tensors.items() if not name.startswith(FACTORS)}
    return dataclasses.replace(update, tensors=_stored(message, held))


def _stored(message: bytes, held: Mapping[str, np.ndarray]) -> StoredArrays:
    try:
        with tempfile.NamedTemporaryFile(prefix="fedspine-", suffix=".update") as file:
            file.write(message)
            file.flush()
            return StoredArrays(Path(file.name), held)
    except OSError as error:
        raise CheckpointError(
            f"cannot unpack an update in {tempfile.gettempdir()}: {error.strerror or os.strerror(error.errno or 0)}",
            hint="free some space, or set TMPDIR to where there is some",
        ) from error
