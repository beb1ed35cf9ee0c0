"""The records of closed rounds as small arrays: each is packed once, however often the run is saved after it.

Comes in: JSON-ready records. Goes out: their compressed bytes, and the same records. A record never changes once its
round is closed, so saving costs what the last round costs and not what all rounds before it did.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

_packed: dict[int, tuple[Record, np.ndarray]] = {}  # by identity; the record is held, so no other can have its id


def pack_history(history: Sequence[Record]) -> list[np.ndarray]:
    """Returns each record's bytes; those packed or read last are not made again."""
    known = _packed
    arrays = [known[id(record)][1] if id(record) in known else _pack(record) for record in history]
    _remember(history, arrays)
    return arrays


def unpack_history(arrays: Sequence[np.ndarray]) -> tuple[dict[str, Any], ...]:
    """Returns the records.

    Raises:
        ValueError: The bytes are no packed records.
    """
    try:
        history = tuple(json.loads(zlib.decompress(array.tobytes())) for array in arrays)
    except zlib.error as error:
        raise ValueError(f"expected a packed record, found: {error}") from error
    _remember(history, arrays)
    return history


def _remember(history: Sequence[Record], arrays: Sequence[np.ndarray]) -> None:
    """Of the history that was packed or read last; replaced whole, so that threads see the one or the other."""
    global _packed
    _packed = {id(record): (record, array) for record, array in zip(history, arrays, strict=True)}


def _pack(record: Record) -> np.ndarray:
    text = json.dumps(record, sort_keys=True).encode()
    return np.frombuffer(zlib.compress(text, 1), dtype=np.uint8)
