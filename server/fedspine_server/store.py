"""A run's state on disk: one safetensors file a round, written so that a power cut costs at most the round under way.

Comes in: a directory and a state. Goes out: the same state. A file is written beside its place, synced and renamed; it
holds a checksum over everything in it; the newest two are kept and the newest valid one is taken. Between `assign` and
`close_round` the open choices are saved too, so the same assignments are handed out again after a restart.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_blob
from safetensors.numpy import save as save_blob

from fedspine_edge.errors import CheckpointError
from fedspine_edge.protocol import Layout
from fedspine_edge.quantized import mask_bits
from fedspine_server.aggregation.contribution import Factors
from fedspine_server.controllers.contract import Choice
from fedspine_server.history import pack_history, unpack_history
from fedspine_server.settings import RunSettings
from fedspine_server.state import DeviceState, RunState

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)  # 1 had the history in the document and masks as members
NUM_KEPT = 2
METADATA_KEY = "fedspine_state"
DEVICE_FIELDS = tuple(field.name for field in dataclasses.fields(DeviceState) if field.name != "kept")
FILE_NAME = re.compile(r"round-(\d{6})\.safetensors")

logger = logging.getLogger(__name__)


def save(directory: Path, state: RunState) -> Path:
    """Saves a state and returns its file; older files but the last are removed once the new one is in place.

    Args:
        directory: Where the run's files are; made when missing.
        state: What to save.

    Raises:
        CheckpointError: The disk is full, or the file cannot be written; files saved before are still there.
    """
    blob = to_bytes(state)
    path = directory / f"round-{state.round_index:06d}.safetensors"
    temporary = directory / f".{path.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(temporary, blob)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
    except OSError as error:
        raise _cannot_write(path, len(blob), error) from error
    for old in [*_saved(directory)[NUM_KEPT:], *directory.glob(".round-*.partial")]:
        old.unlink(missing_ok=True)
    return path


def load(directory: Path) -> RunState:
    """Returns the newest valid state of a directory; damaged files are skipped with a warning.

    Raises:
        CheckpointError: The newest readable file is of another version, or no file is valid.
    """
    files = _saved(directory)
    for path in files:
        try:
            return _from_blob(path.read_bytes(), path)
        except _DamagedError as damage:
            logger.warning("skipped damaged state file=%s reason=%s", path.name, damage)
    found = f"{len(files)} damaged" if files else "none"
    raise CheckpointError(
        f"expected a valid round-*.safetensors in {directory}, found {found}",
        hint="give the directory of a run that was saved, or start the run anew",
    )


def from_bytes(blob: bytes) -> RunState:
    """Returns the state in a blob made by `to_bytes`.

    Raises:
        CheckpointError: It is damaged or of another version.
    """
    try:
        return _from_blob(blob, "a blob")
    except _DamagedError as damage:
        raise CheckpointError(f"expected a whole state, found one damaged: {damage}") from damage


class _DamagedError(Exception):
    """A file that is truncated or does not match its checksum."""


def _saved(directory: Path) -> list[Path]:
    """The state files of a directory, newest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if FILE_NAME.fullmatch(path.name)), reverse=True)


def _write_synced(path: Path, blob: bytes) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Makes the rename itself survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, num_bytes: int, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"expected {num_bytes} free bytes for {path}, found the disk full",
            hint="free some space and resume: the state saved before is intact",
        )
    return CheckpointError(
        f"expected to write {path}, found: {error.strerror}", hint="the state saved before is intact"
    )


def to_bytes(state: RunState) -> bytes:
    """Returns a state as one safetensors blob that holds a checksum over everything in it."""
    arrays = {f"task_head/{name}": value for name, value in state.task_head.items()}
    arrays |= {f"importance/{name}": value for name, value in state.importance.items()}
    arrays |= {f"mean_input/{name}": value for name, value in state.mean_input.items()}
    for name, factors in state.adapter.items():
        arrays |= {f"lora_a/{name}": factors.lora_a, f"lora_b/{name}": factors.lora_b}
    # A bit a member: a device's masks of RoBERTa-base are 5 KB so, and 74 KB as they are in memory.
    sizes = {group.name: group.num_members for group in state.layout.groups}
    for index, device in enumerate(state.devices.values()):
        arrays |= {f"kept/{index}/{name}": mask_bits(members, sizes[name]) for name, members in device.kept.items()}
    arrays |= {f"history/{index:06d}": packed for index, packed in enumerate(pack_history(state.history))}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    devices = [{name: getattr(device, name) for name in DEVICE_FIELDS} for device in state.devices.values()]
    document = {
        "run_id": state.run_id,
        "settings": state.settings.to_json(),
        "layout": state.layout.to_json(),
        "round_index": state.round_index,
        "clock_seconds": state.clock_seconds,
        "devices": devices,
        "controller_state": state.controller_state,
        "open_choices": [dataclasses.asdict(choice) for choice in state.open_choices.values()],
    }
    text = json.dumps(document, sort_keys=True)
    header = {"version": FORMAT_VERSION, "sha256": _checksum(text, arrays), "state": text}
    return bytes(save_blob(arrays, metadata={METADATA_KEY: json.dumps(header)}))


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _from_blob(blob: bytes, where: Path | str) -> RunState:
    try:
        arrays = load_blob(blob)
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][METADATA_KEY])
        version, checksum, text = header["version"], header["sha256"], header["state"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _DamagedError(f"not a whole state file: {error}") from error
    if version not in READ_VERSIONS:
        raise CheckpointError(
            f"expected state format {FORMAT_VERSION}, found {version} in {where}",
            hint="resume with the version of fedspine-edge that saved it",
        )
    if checksum != _checksum(text, arrays):
        raise _DamagedError("checksum differs")
    return _from_document(json.loads(text), arrays)


def _from_document(document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> RunState:
    layout = Layout.from_json(document["layout"])
    kept: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    for name, members in _named(arrays, "kept/").items():
        index, group = name.split("/", 1)
        kept[int(index)][group] = _as_members(members)
    devices = {
        entry["device_id"]: DeviceState(**entry, kept=kept[index]) for index, entry in enumerate(document["devices"])
    }
    lora_a, lora_b = _named(arrays, "lora_a/"), _named(arrays, "lora_b/")
    choices = [Choice(**entry) for entry in document["open_choices"]]
    return RunState(
        run_id=document["run_id"],
        settings=RunSettings.from_json(document["settings"]),
        layout=layout,
        round_index=document["round_index"],
        clock_seconds=document["clock_seconds"],
        adapter={matrix.name: Factors(lora_a[matrix.name], lora_b[matrix.name]) for matrix in layout.matrices},
        task_head=_named(arrays, "task_head/"),
        importance={group.name: arrays[f"importance/{group.name}"] for group in layout.groups},
        mean_input=_named(arrays, "mean_input/"),
        devices=devices,
        controller_state=document["controller_state"],
        open_choices={choice.device_id: choice for choice in choices},
        history=_history(document, arrays),
    )


def _as_members(found: np.ndarray) -> np.ndarray:
    """Members from bits; the format before had the members themselves."""
    return np.flatnonzero(np.unpackbits(found)).astype(np.int32) if found.dtype == np.uint8 else found


def _history(document: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[Mapping[str, Any], ...]:
    if "history" in document:
        return tuple(document["history"])
    return unpack_history([array for _, array in sorted(_named(arrays, "history/").items())])


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
