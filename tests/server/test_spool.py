import tracemalloc

import numpy as np
import pytest
import toy

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.protocol import Group, Layout, Matrix, tensors_nbytes
from fedspine_server import coordinator
from fedspine_server.coordinator import DeviceResult
from fedspine_server.settings import RunSettings
from fedspine_server.spool import Spool


@pytest.fixture
def update(begin):
    assignments, _ = coordinator.assign(begin())
    return toy.tune_one(toy.layout(), assignments[0], 10)


def test_a_spooled_update_is_the_same_update(update, tmp_path):
    with Spool(tmp_path) as spool:
        kept = spool.keep(update)
        assert kept == update
        assert sorted(kept.tensors) == sorted(update.tensors)
        assert tensors_nbytes(kept) == tensors_nbytes(update)
        for name, array in update.tensors.items():
            assert kept.tensors[name].dtype == array.dtype
            np.testing.assert_array_equal(kept.tensors[name], array)


def test_a_spool_leaves_nothing_behind(update, tmp_path):
    with Spool(tmp_path) as spool:
        spool.keep(update)
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    assert not list(tmp_path.iterdir())


def test_a_message_cut_short_is_refused_and_not_kept(tmp_path):
    with Spool(tmp_path) as spool:
        with pytest.raises(IncompatibleError, match="expected one whole update"):
            spool.keep_message(b"\0" * 100)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_is_said(update, tmp_path):
    spool = Spool(tmp_path)
    spool.__exit__(None, None, None)  # nothing can be written into a folder that is gone
    with pytest.raises(CheckpointError, match="cannot keep an update"):
        spool.keep(update)


def wide_layout():
    groups = [Group("ffn", "ffn", 512, 16, 512)]
    matrices = [Matrix(f"up{layer}", 512, 128, "ffn", None) for layer in range(6)]
    return Layout("ba5e", tuple(groups), tuple(matrices))


def peak_of_a_round(num_devices, tmp_path):
    settings = RunSettings(rounds=10, ranks=(8,), fixed_rank=8, controller="fixed", target_sparsity=0.0)
    state = coordinator.init(settings, wide_layout(), {})
    for index in range(num_devices):
        state = coordinator.register(state, f"d{index:02d}", num_examples=10, memory_bytes=8 << 30)
    assignments, state = coordinator.assign(state)
    with Spool(tmp_path) as spool:
        results = []
        for assignment in assignments:
            tensors = {
                name: array + np.float16(0.01) if name.startswith("lora") else array
                for name, array in assignment.tensors.items()
                if not name.startswith("mean_input")
            }
            update = spool.keep(toy.answer(assignment, tensors))
            results.append(DeviceResult(update.device_id, "arrived", update))
        one = tensors_nbytes(update)
        del assignments, assignment, tensors
        tracemalloc.start()
        closed = coordinator.close_round(state, results, round_seconds=6.0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert closed.history[0]["num_merged"] == num_devices
    return peak, one


def test_a_round_of_80_devices_never_holds_all_their_updates(tmp_path):
    few, _ = peak_of_a_round(8, tmp_path)
    many, one = peak_of_a_round(80, tmp_path)
    assert many - few < 72 * one
