"""The models on a device: each in a directory named by its hash, and one name that programs load by.

Comes in: whole files. Goes out: `models/current/model.gguf`, which is always a whole model that passed its gate, or not
there at all. What changes it is one rename.

    models/SHA256/model.gguf     one or two of them
    models/current -> SHA256     what to load
    models/staging/SHA256        what is being fetched
    models/rollout.json          how far the latest rollout is
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from fedspine_edge.agent.journal import read_document, write_document
from fedspine_edge.agent.rollout import PHASES, Record
from fedspine_edge.atomic import sync_directory, write_bytes
from fedspine_edge.errors import CheckpointError

MODEL_FILE, CURRENT, PASSAGE_FILE = "model.gguf", "current", "passage.txt"


class Models:
    """A device's models.

    Args:
        state: Its state directory.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / "models"
        self._staging = self.folder / "staging"
        self._record = self.folder / "rollout.json"

    def record(self) -> Record:
        """Returns how far the latest rollout is; a damaged record counts as none, and the server then asks again."""
        document = read_document(self._record)
        try:
            record = Record(**document) if document is not None else Record()
        except TypeError:
            return Record()
        return record if record.phase in PHASES else Record()

    def keep_record(self, record: Record) -> Record:
        """Keeps a record and returns it."""
        self._staging.mkdir(parents=True, exist_ok=True)
        write_document(self._record, dataclasses.asdict(record))
        return record

    def keep_passage(self, passage: str) -> Path | None:
        """Keeps a text that is to be measured and returns its file; None for none."""
        file = self._staging / PASSAGE_FILE
        write_bytes(file, passage.encode(errors="replace"))
        return file if passage else None

    def path(self, sha256: str) -> Path:
        """Returns where a model lies once it is installed."""
        return self.folder / sha256 / MODEL_FILE

    def staged(self, sha256: str) -> Path:
        """Returns where a model is put while it is fetched."""
        return self._staging / sha256

    def current(self) -> str | None:
        """Returns the hash of the model that programs load; None for none."""
        try:
            sha256 = os.readlink(self.folder / CURRENT)  # noqa: PTH115 - Path.readlink returns a Path
        except OSError:
            return None
        return sha256 if self.path(sha256).is_file() else None

    def install(self, sha256: str) -> None:
        """Puts a fetched model in its place, beside the current one; done twice it changes nothing.

        Raises:
            CheckpointError: The disk does not take it.
        """
        target = self.path(sha256)
        try:
            target.parent.mkdir(exist_ok=True)
            if self.staged(sha256).is_file():
                self.staged(sha256).replace(target)
            sync_directory(target.parent)
            sync_directory(self.folder)
        except OSError as error:
            raise _not_written(target, error) from error

    def switch(self, sha256: str | None) -> None:
        """Makes an installed model the one that programs load, by one rename; None leaves them none.

        Raises:
            CheckpointError: The disk does not take it.
        """
        link, aside = self.folder / CURRENT, self.folder / f".{CURRENT}"
        try:
            if sha256 is None:
                link.unlink(missing_ok=True)
            else:
                aside.unlink(missing_ok=True)
                aside.symlink_to(sha256)
                aside.replace(link)
            sync_directory(self.folder)
        except OSError as error:
            raise _not_written(link, error) from error

    def keep_only(self, *kept: str | None) -> None:
        """Removes every other model, and what was fetched of others."""
        names = {name for name in kept if name is not None}
        for entry in self.folder.iterdir() if self.folder.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink() and entry != self._staging and entry.name not in names:
                shutil.rmtree(entry, ignore_errors=True)
        for entry in self._staging.iterdir() if self._staging.is_dir() else ():
            if entry.name.removesuffix(".partial") not in names:
                entry.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {path}: {error.strerror or error}", hint="free some space")
