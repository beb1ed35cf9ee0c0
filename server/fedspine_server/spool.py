"""Updates that wait on disk: a round's are never in memory together, however many devices take part.

Comes in: updates, one after the other. Goes out: the same updates, whose arrays are read from a file each time somebody
looks at one. Aggregation goes matrix by matrix, so what it holds of 80 devices is two arrays each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from fedspine_edge.errors import CheckpointError
from fedspine_edge.protocol import Update
from fedspine_edge.wire_format import to_bytes, update_from_bytes


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an array is in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class FileArrays(Mapping[str, np.ndarray]):
    """The arrays of one message in a file, each read anew when it is asked for.

    Args:
        path: A whole message as safetensors.
        places: Where each array is.
    """

    def __init__(self, path: Path, places: Mapping[str, _Place]) -> None:
        self._path = path
        self._places = places

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        with self._path.open("rb") as file:
            file.seek(place.offset)
            count = math.prod(place.shape)
            return np.frombuffer(file.read(count * place.dtype.itemsize), place.dtype, count).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Spool:
    """A folder for the updates of one round, gone when the round is closed; a context manager.

    Args:
        parent: Where to make it; the system's temporary directory when None. A disk, not memory, is what is wanted.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="round-", dir=parent)
        self._count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def keep(self, update: Update) -> Update:
        """Returns the update with its arrays on disk."""
        return self.keep_message(to_bytes(update))

    def keep_message(self, message: bytes) -> Update:
        """Returns the update in a message, with its arrays on disk.

        Raises:
            IncompatibleError: The message is no whole update.
            CheckpointError: The disk is full.
        """
        update = update_from_bytes(message)
        path = Path(self._folder.name) / str(self._count)
        self._count += 1
        try:
            path.write_bytes(message)
        except OSError as error:
            raise CheckpointError(
                f"cannot keep an update in {path.parent}: {error.strerror}", hint="free some space"
            ) from error
        return dataclasses.replace(update, tensors=FileArrays(path, _places(message, update.tensors)))


def _places(message: bytes, arrays: Mapping[str, np.ndarray]) -> dict[str, _Place]:
    """Safetensors: the header's length in 8 bytes, the header as JSON, the arrays at the offsets it tells."""
    begin = 8 + int.from_bytes(message[:8], "little")
    header = json.loads(message[8:begin])
    return {
        name: _Place(array.dtype, array.shape, begin + header[name]["data_offsets"][0])
        for name, array in arrays.items()
    }
