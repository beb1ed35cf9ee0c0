"""Whether a file is a whole GGUF model: every count within bounds, every tensor within the file, nothing believed.

Comes in: a path. Goes out: how many tensors it holds, or the reason why llama.cpp is not to see it. The standard
library only; sizes are checked before anything is read.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import IO

from fedspine_edge.errors import IncompatibleError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_ENTRIES, MOST_DIMENSIONS, LONGEST_NAME, DEEPEST = 1 << 16, 8, 1 << 16, 2
MOST_ALIGNMENT = 1 << 16
STRING, ARRAY, UINT32 = 8, 9, 4
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TENSOR_BYTES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip
"""ggml type -> elements of a block, and its bytes."""


def check_gguf(path: Path) -> int:
    """Returns how many tensors a GGUF model holds.

    Raises:
        IncompatibleError: It is none, or not a whole one.
    """
    with path.open("rb") as file:
        return _Walk(file, path.stat().st_size).tensors()


class _Walk:
    """One pass over the head of a file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self._alignment = file, size, 32
        self._has_architecture = False

    def tensors(self) -> int:
        if self._file.read(4) != MAGIC:
            raise IncompatibleError("expected a GGUF file, found another content")
        version = self._number("I")
        if version not in VERSIONS:
            raise IncompatibleError(f"expected GGUF of version 2 or 3, found {version}")
        num_tensors, num_entries = self._count("tensors"), self._count("entries")
        for _ in range(num_entries):
            self._entry()
        ends = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._file.tell() // self._alignment) * self._alignment
        if not ends or not self._has_architecture:
            raise IncompatibleError("expected a model, found a GGUF file without tensors or architecture")
        if start + max(ends) > self._size:
            raise IncompatibleError(
                f"expected a file of {start + max(ends)} bytes, found {self._size}: it was cut short"
            )
        return num_tensors

    def _number(self, kind: str) -> int:
        size = struct.calcsize(f"<{kind}")
        content = self._file.read(size)
        if len(content) != size:
            raise IncompatibleError("expected a whole GGUF head, found its end")
        return int(struct.unpack(f"<{kind}", content)[0])

    def _count(self, what: str, most: int = MOST_ENTRIES) -> int:
        count = self._number("Q")
        if count > most:
            raise IncompatibleError(f"expected at most {most} {what}, found {count}")
        return count

    def _skip(self, num_bytes: int) -> None:
        if self._file.tell() + num_bytes > self._size:
            raise IncompatibleError("expected a whole GGUF head, found its end")
        self._file.seek(num_bytes, 1)

    def _name(self) -> bytes:
        length = self._count("characters of a name", LONGEST_NAME)
        content = self._file.read(length)
        if len(content) != length:
            raise IncompatibleError("expected a whole GGUF head, found its end")
        return content

    def _entry(self) -> None:
        name, kind = self._name(), self._number("I")
        self._has_architecture = self._has_architecture or name == b"general.architecture"
        if name == b"general.alignment" and kind == UINT32:
            self._alignment = self._number("I")
            if not 0 < self._alignment <= MOST_ALIGNMENT:
                raise IncompatibleError(f"expected an alignment, found {self._alignment}")
        else:
            self._value(kind, 0)

    def _value(self, kind: int, depth: int) -> None:
        if kind in SCALAR_BYTES:
            self._skip(SCALAR_BYTES[kind])
        elif kind == STRING:
            self._skip(self._number("Q"))
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self._number("I"), self._count("values", self._size)
            if inner in SCALAR_BYTES:
                self._skip(SCALAR_BYTES[inner] * count)
            else:
                for _ in range(count):  # each takes 8 bytes at least, so the file's end ends it
                    self._value(inner, depth + 1)
        else:
            raise IncompatibleError(f"expected a known kind of value, found {kind}")

    def _tensor(self) -> int:
        """Returns where a tensor ends, from the beginning of the data."""
        self._name()
        num_dimensions = self._number("I")
        if num_dimensions > MOST_DIMENSIONS:
            raise IncompatibleError(f"expected at most {MOST_DIMENSIONS} dimensions, found {num_dimensions}")
        elements = math.prod(self._number("Q") for _ in range(num_dimensions))
        kind, offset = self._number("I"), self._number("Q")
        block, block_bytes = TENSOR_BYTES.get(kind, (1, 0))  # of a newer type only the beginning is known
        return offset + -(-elements // block) * block_bytes
