"""A call to the local agent over its Unix socket, and how both sides frame what they say. Standard library only.

Comes in: a header (JSON) and bytes. Goes out: the same. One call a connection.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedspine_edge.errors import LinkError

MAX_HEADER_BYTES, MAX_CONTENT_BYTES = 1 << 20, 1 << 31


class Stream(Protocol):
    """A buffered stream of bytes, both ways."""

    def readline(self, size: int, /) -> bytes:
        """Reads a line."""

    def read(self, size: int, /) -> bytes:
        """Reads so many bytes, fewer at the end."""

    def write(self, content: bytes, /) -> object:
        """Writes all of it."""

    def flush(self) -> None:
        """Sends what was written."""


def call(path: Path, header: Mapping[str, Any], content: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """Returns what the local agent answers, however long it takes.

    Raises:
        LinkError: There is no agent, or it ended before it answered.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            with connection.makefile("rwb") as stream:
                send(stream, header, content)
                return receive(stream)
    except (OSError, ValueError) as error:
        raise LinkError(
            f"expected this device's agent at {path}, found: {error}", hint="start it: fedspine flower device DIR"
        ) from error


def send(stream: Stream, header: Mapping[str, Any], content: bytes = b"") -> None:
    """Writes one message."""
    stream.write(json.dumps({**header, "num_bytes": len(content)}).encode() + b"\n" + content)
    stream.flush()


def receive(stream: Stream) -> tuple[dict[str, Any], bytes]:
    """Returns one message.

    Raises:
        ValueError: Not a whole message, or one that is too large.
    """
    line = stream.readline(MAX_HEADER_BYTES)
    if not line.endswith(b"\n"):
        raise ValueError(f"expected a header in a line, found {line[:40]!r}")
    header = json.loads(line)
    num_bytes = header.pop("num_bytes")
    if not isinstance(num_bytes, int) or not 0 <= num_bytes <= MAX_CONTENT_BYTES:
        raise ValueError(f"expected 0 to {MAX_CONTENT_BYTES} bytes, found {num_bytes!r}")
    content = stream.read(num_bytes)
    if len(content) != num_bytes:
        raise ValueError(f"expected {num_bytes} bytes, found {len(content)}")
    return header, content
