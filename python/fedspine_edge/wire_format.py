"""The messages of `protocol` <-> bytes: one safetensors blob each, one zstd frame where it travels.

Comes in: an `Assignment` or an `Update`. Goes out: its blob, scalars as JSON in the blob's metadata; and back, with
everything that does not fit refused. No torch: the server reads and writes these too.
Source: the safetensors format and RFC 8878 (zstd); docs/protocol.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import zstandard
from safetensors import SafetensorError
from safetensors.numpy import load as load_blob
from safetensors.numpy import save as save_blob

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import Assignment, DeviceReport, Update, sent_tensors

PROTOCOL_VERSION = 3
MAX_MESSAGE_BYTES = 1 << 31
COMPRESSION_LEVEL = 1  # float16 factors hardly shrink; higher levels save no more and take longer


def to_bytes(message: Assignment | Update) -> bytes:
    """Returns a message as one safetensors blob, its scalars as JSON in the blob's metadata."""
    scalars = {f.name: getattr(message, f.name) for f in dataclasses.fields(message) if f.name != "tensors"}
    if isinstance(message, Update):
        scalars["report"] = dataclasses.asdict(message.report)
    header = {"protocol": PROTOCOL_VERSION, "kind": type(message).__name__, **scalars}
    arrays = {name: np.ascontiguousarray(array) for name, array in sent_tensors(message).items()}
    return bytes(save_blob(arrays, metadata={"fedspine": json.dumps(header, sort_keys=True)}))


def pack(message: bytes) -> bytes:
    """Returns a message as one zstd frame that tells its size and carries a checksum."""
    return zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_checksum=True).compress(message)


def unpack(frame: bytes, *, max_bytes: int) -> bytes:
    """Returns the message in a zstd frame; its size is checked before any of it is unpacked.

    Raises:
        IncompatibleError: Not one whole frame, one that hides its size, or a message of more than `max_bytes`.
    """
    try:
        declared = zstandard.frame_content_size(frame)
        if not 0 <= declared <= max_bytes:
            raise IncompatibleError(f"expected a message of 0 to {max_bytes} bytes, found one of {declared}")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IncompatibleError(f"expected one whole zstd frame, found: {error}") from error


def assignment_from_bytes(blob: bytes) -> Assignment:
    """Returns the assignment in a blob made by `to_bytes`; raises IncompatibleError as `update_from_bytes` does."""
    return _build(Assignment, *_from_bytes(blob, "Assignment"))


def update_from_bytes(blob: bytes) -> Update:
    """Returns the update in a blob made by `to_bytes`.

    Raises:
        IncompatibleError: The blob is truncated, another kind of message, or of another protocol version.
    """
    scalars, tensors = _from_bytes(blob, "Update")
    scalars["report"] = _build(DeviceReport, dict(scalars.get("report") or {}), None)
    return _build(Update, scalars, tensors)


def _from_bytes(blob: bytes, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if len(blob) > MAX_MESSAGE_BYTES:
        raise IncompatibleError(f"message has {len(blob)} bytes, at most {MAX_MESSAGE_BYTES} are taken")
    try:
        tensors = load_blob(blob)
        metadata = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")]).get("__metadata__", {})
        scalars = json.loads(metadata["fedspine"])
        version, found_kind = scalars.pop("protocol"), scalars.pop("kind")
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise IncompatibleError(f"expected one whole {kind.lower()} as safetensors, found: {error}") from error
    if version != PROTOCOL_VERSION:
        raise IncompatibleError(
            f"{kind.lower()} is protocol {version}, this side speaks {PROTOCOL_VERSION}",
            hint="upgrade the older side",
        )
    if found_kind != kind:
        raise IncompatibleError(f"expected a message of kind {kind}, found {found_kind}")
    return scalars, tensors


Message = TypeVar("Message")


def _build(message_type: type[Message], scalars: dict[str, Any], tensors: Mapping[str, np.ndarray] | None) -> Message:
    scalars = scalars if tensors is None else {**scalars, "tensors": tensors}
    try:
        return message_type(**scalars)
    except TypeError as error:
        kind = message_type.__name__.lower()
        raise IncompatibleError(f"{kind} does not fit protocol {PROTOCOL_VERSION}: {error}") from error
