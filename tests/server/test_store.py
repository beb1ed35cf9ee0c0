import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy
from safetensors.numpy import load as load_blob
from safetensors.numpy import save as save_blob

from fedspine_edge.errors import CheckpointError
from fedspine_server import coordinator, store
from fedspine_server.history import pack_history, unpack_history

EXAMPLES = {"a": 10, "b": 30, "c": 20}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def played(state, rounds):
    tune = toy.tuner(EXAMPLES)
    for _ in range(rounds):
        assignments, state = coordinator.assign(state)
        results = [coordinator.DeviceResult(u.device_id, "arrived", u, 1.0, 0.5, 0.5) for u in tune(assignments)]
        state = coordinator.close_round(state, results, round_seconds=2.0)
    return state


def assert_same(one, other):
    assert coordinator.adapter_sha256(one) == coordinator.adapter_sha256(other)
    assert dataclasses.replace(one, adapter={}, task_head={}, importance={}, mean_input={}) == dataclasses.replace(
        other, adapter={}, task_head={}, importance={}, mean_input={}
    )
    for name in ("importance", "mean_input"):
        for key, value in getattr(one, name).items():
            np.testing.assert_array_equal(value, getattr(other, name)[key])
    for device_id, device in one.devices.items():
        for group, members in device.kept.items():
            np.testing.assert_array_equal(members, other.devices[device_id].kept[group])


@pytest.mark.parametrize("controller", ["structured", "sucb", "fixed"])
def test_a_saved_state_comes_back_as_it_was(begin, tmp_path, controller):
    state = played(begin(controller=controller), 3)
    store.save(tmp_path, state)
    assert_same(store.load(tmp_path), state)


def test_a_state_of_the_format_before_is_read(begin):
    state = played(begin(controller="structured"), 2)
    blob = store.to_bytes(state)
    arrays = {name: array for name, array in load_blob(blob).items() if not name.startswith("history/")}
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][store.METADATA_KEY])
    for index, device in enumerate(state.devices.values()):
        arrays |= {f"kept/{index}/{name}": members for name, members in device.kept.items()}
    text = json.dumps({**json.loads(header["state"]), "history": list(state.history)}, sort_keys=True)
    header = {"version": 1, "sha256": store._checksum(text, arrays), "state": text}
    assert_same(store.from_bytes(save_blob(arrays, metadata={store.METADATA_KEY: json.dumps(header)})), state)


def test_a_closed_rounds_record_is_packed_once(begin):
    state = played(begin(controller="structured"), 3)
    first = pack_history(state.history)
    longer = played(state, 1)
    again = pack_history(longer.history)
    assert [one is other for one, other in zip(first, again, strict=False)] == [True] * 3
    read = unpack_history(again)
    assert read == longer.history
    assert [one is other for one, other in zip(again, pack_history(read), strict=True)] == [True] * 4


def test_damaged_history_is_no_history():
    with pytest.raises(ValueError, match="expected a packed record"):
        unpack_history([np.arange(9, dtype=np.uint8)])


def test_a_state_with_open_assignments_hands_out_the_same_ones_again(begin, tmp_path):
    before, state = coordinator.assign(played(begin(controller="structured"), 2))
    store.save(tmp_path, state)
    after, _ = coordinator.assign(store.load(tmp_path))
    assert after == before
    for one, other in zip(before, after, strict=True):
        for name, array in one.tensors.items():
            np.testing.assert_array_equal(array, other.tensors[name])


def test_the_newest_two_files_are_kept(begin, tmp_path):
    state = begin()
    for round_index in range(4):
        store.save(tmp_path, dataclasses.replace(state, round_index=round_index))
    assert names(tmp_path) == ["round-000002.safetensors", "round-000003.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_newest_file_is_skipped(begin, tmp_path, damage, caplog):
    state = played(begin(), 1)
    store.save(tmp_path, state)
    newest = store.save(tmp_path, played(state, 1))
    blob = bytearray(newest.read_bytes())
    blob[-1] ^= 1
    newest.write_bytes({"truncated": bytes(blob[:-100]), "empty": b"", "flipped": bytes(blob)}[damage])
    assert_same(store.load(tmp_path), state)
    assert "skipped damaged state file=round-000002.safetensors" in caplog.text


def test_a_directory_without_a_valid_file_is_refused(begin, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a valid round-\*.safetensors in .*, found none"):
        store.load(tmp_path / "nowhere")
    store.save(tmp_path, begin()).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="found 1 damaged"):
        store.load(tmp_path)


def test_a_file_of_another_version_is_named(begin, tmp_path):
    path = store.save(tmp_path, begin())
    blob = path.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]["fedspine_state"]
    changed = json.dumps({**json.loads(header), "version": 99})
    path.write_bytes(save_blob(load_blob(blob), metadata={"fedspine_state": changed}))
    with pytest.raises(CheckpointError, match=r"expected state format 2, found 99 in .*round-000000"):
        store.load(tmp_path)


def test_a_disk_that_fills_up_half_way_leaves_the_last_state_and_no_rest(begin, tmp_path, monkeypatch):
    state = begin()
    store.save(tmp_path, state)

    def write_half(path, blob):
        path.write_bytes(blob[: len(blob) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write_synced", write_half)
    with pytest.raises(
        CheckpointError, match=r"expected \d+ free bytes for .*round-000001.safetensors, found the disk full"
    ):
        store.save(tmp_path, dataclasses.replace(state, round_index=1))
    assert names(tmp_path) == ["round-000000.safetensors"]
    assert_same(store.load(tmp_path), state)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system_leaves_the_last_state_and_no_rest(begin, tmp_path):
    state = begin()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        store.save(tmp_path, state)
        (tmp_path / "other").write_bytes(bytes(45_000))
        with pytest.raises(CheckpointError, match="found the disk full"):
            store.save(tmp_path, dataclasses.replace(state, round_index=1))
        assert names(tmp_path) == ["other", "round-000000.safetensors"]
        assert_same(store.load(tmp_path), state)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_directory_that_cannot_be_written_is_named(begin, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"expected to write .*round-000000.safetensors, found: "):
        store.save(tmp_path / "file", begin())


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
import dataclasses
from fedspine_server import store
directory = Path({directory!r})
state = store.load(directory)

def write_half(path, blob):
    path.write_bytes(blob[: len(blob) // 2])
    (directory.parent / "half-way").touch()
    time.sleep(60)

store._write_synced = write_half
store.save(directory, dataclasses.replace(state, round_index=1))
"""


def test_a_server_killed_in_mid_write_starts_from_the_last_state(begin, tmp_path):
    directory = tmp_path / "run"
    state = begin()
    store.save(directory, state)
    paths = [str(Path(module.__file__).parents[1]) for module in (store, sys.modules["fedspine_edge"])]
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(paths=paths, directory=str(directory))])
    try:
        give_up = time.monotonic() + 30
        while not (tmp_path / "half-way").exists():
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(names(directory)) == 2
    assert_same(store.load(directory), state)
    store.save(directory, dataclasses.replace(state, round_index=1))
    assert names(directory) == ["round-000000.safetensors", "round-000001.safetensors"]
