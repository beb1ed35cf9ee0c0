"""Updates on the disk: the same to the bit, a small part of them in memory at a time."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import toy

from fedspine_edge.errors import CheckpointError
from fedspine_edge.protocol import pack, tensors_nbytes, to_bytes
from fedspine_server import coordinator
from fedspine_server.link.blobs import BlobStore
from fedspine_server.link.spooled import spooled_update
from fedspine_server.merging import merge
from fedspine_server.results import DeviceResult

NUM_DEVICES, FEATURES, RANK = 40, 6000, 8


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path)


def large_update(update, seed):
    """The update with factors of 400 KB in place of its own."""
    generator = np.random.default_rng(seed)
    shapes = {"lora_a/layers.0.q": (RANK, FEATURES), "lora_b/layers.0.q": (FEATURES, RANK)}
    large = {name: generator.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    return dataclasses.replace(update, tensors={**update.tensors, **large})


def updates_of(state):
    assignments, opened = coordinator.assign(state)
    return opened, [toy.tune_one(state.layout, assignment, state.devices[assignment.device_id].num_examples) for assignment in assignments]


def test_a_spooled_update_is_the_update_to_the_bit(begin, blobs):
    _, (update, *_) = updates_of(begin())
    found = spooled_update(blobs, blobs.put(pack(to_bytes(update))))
    assert dataclasses.replace(found, tensors={}) == dataclasses.replace(update, tensors={})
    assert set(found.tensors) == set(update.tensors)
    assert len(found.tensors) == len(update.tensors)
    for name, array in update.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], array)
        assert found.tensors[name].dtype == array.dtype
    assert tensors_nbytes(found) == tensors_nbytes(update)
    assert "lora_a/none" not in found.tensors


def test_merging_spooled_updates_gives_the_same_state_as_merging_held_ones(begin, blobs):
    state, updates = updates_of(begin())
    spooled = [spooled_update(blobs, blobs.put(pack(to_bytes(update)))) for update in updates]
    for name, factors in merge(state, updates).adapter.items():
        np.testing.assert_array_equal(merge(state, spooled).adapter[name].lora_b, factors.lora_b)
    results = [DeviceResult(update.device_id, "arrived", update=update) for update in spooled]
    assert coordinator.close_round(state, results, round_seconds=1.0).history[-1]["num_merged"] == len(updates)


@pytest.mark.slow
def test_a_round_of_updates_takes_the_memory_of_a_few(begin, blobs):
    _, (update, *_) = updates_of(begin())
    names = [blobs.put(pack(to_bytes(large_update(update, seed)))) for seed in range(NUM_DEVICES)]
    size = tensors_nbytes(large_update(update, 0))
    tracemalloc.start()
    try:
        spooled = [spooled_update(blobs, name) for name in names]
        total = sum(float(one.tensors["lora_b/layers.0.q"].astype(np.float32).sum()) for one in spooled)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.isfinite(total)
    assert peak < 8 * size < NUM_DEVICES * size


def test_a_damaged_update_counts_as_missing_and_no_room_is_an_error(begin, blobs, monkeypatch):
    _, (update, *_) = updates_of(begin())
    assert spooled_update(blobs, blobs.put(b"no frame")) is None
    assert spooled_update(blobs, "0" * 64) is None
    name = blobs.put(pack(to_bytes(update)))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    with pytest.raises(CheckpointError, match="cannot unpack an update in /nowhere/at/all"):
        spooled_update(blobs, name)
