"""What survives a power cut in the middle of a task: the task, and what is to be sent of it.

Comes in: JSON documents. Goes out: the same, if they are whole. A device has one task at a time, so there is one of
each. A damaged document counts as missing: the server then offers the task again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.atomic import write_bytes

logger = logging.getLogger(__name__)


class Journal:
    """A device's task on disk.

    Args:
        state: The device's state directory.
    """

    def __init__(self, state: Path) -> None:
        self._task = state / "task.json"
        self._result = state / "outbox" / "result.json"
        self.update_path = state / "outbox" / "update.zst"
        self.inbox = state / "inbox"
        self.states = state / "states"
        for folder in (self.inbox, self._result.parent, self.states):
            folder.mkdir(parents=True, exist_ok=True)

    def task(self) -> dict[str, Any] | None:
        """Returns the task in hand, None when there is none."""
        return read_document(self._task)

    def begin(self, task: Mapping[str, Any], message: bytes | None = None) -> None:
        """Keeps a task before any work on it, and its message if that came with it."""
        if message is not None:
            write_bytes(self.inbox / task["blob"]["sha256"], message)
        write_document(self._task, task)

    def result(self) -> dict[str, Any] | None:
        """Returns the manifest that is to be sent, None when there is none or its upload is damaged."""
        manifest, task = read_document(self._result), self.task()
        if manifest is None or task is None or manifest["attempt"] != task["attempt"]:
            return None
        if manifest.get("sha256") is not None and _file_hash(self.update_path) != manifest["sha256"]:
            logger.warning("damaged upload task=%s: it is made again", task["task_id"])
            return None
        return manifest

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Keeps what is to be sent; the work is done."""
        write_document(self._result, manifest)

    def clear(self) -> None:
        """Forgets the task and all that belongs to it."""
        for path in (self._result, self._task, self.update_path, *self.inbox.iterdir()):
            path.unlink(missing_ok=True)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Keeps a document with its checksum, whole or not at all."""
    text = json.dumps(document, sort_keys=True)
    write_bytes(path, json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "document": text}).encode())


def read_document(path: Path) -> dict[str, Any] | None:
    """Returns a kept document, None when there is none or it is damaged."""
    try:
        outer = json.loads(path.read_bytes())
        text = outer["document"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("checksum differs")
        document: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("skipped damaged file=%s reason=%s", path.name, error)
        return None
    return document


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError:
        return ""
