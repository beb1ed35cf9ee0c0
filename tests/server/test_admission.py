import dataclasses

import numpy as np
import pytest
import toy

from fedspine_server import coordinator
from fedspine_server.admission import refusal

ROUND = 5


@pytest.fixture
def asked(begin):
    """An assignment in the middle of a run."""
    state = begin()
    state = dataclasses.replace(state, round_index=ROUND)
    assignments, _ = coordinator.assign(state)
    return assignments[0]


@pytest.fixture
def honest(asked):
    return toy.tune_one(toy.layout(), asked, 10)


def verdict(update, asked):
    return refusal(update, asked, toy.layout(), num_examples=10, max_update_norm=1000.0)


def with_array(update, name, array):
    return dataclasses.replace(update, tensors={**update.tensors, name: array})


def with_report(update, **changes):
    return dataclasses.replace(update, report=dataclasses.replace(update.report, **changes))


def test_an_honest_update_passes(honest, asked):
    assert verdict(honest, asked) is None


def test_importances_and_mean_inputs_may_be_missing_or_unmeasured(honest, asked):
    few = {name: array for name, array in honest.tensors.items() if not name.startswith(("importance", "mean_input"))}
    assert verdict(dataclasses.replace(honest, tensors=few), asked) is None
    nothing = np.full(toy.HEADS, np.nan, dtype=np.float16)
    assert verdict(with_array(honest, "importance/layers.0.heads", nothing), asked) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": "run-other"}, "expected run_id run-"),
        ({"device_id": "b"}, "expected device_id a, found b"),
        ({"round_index": 4}, "expected round_index 5, found 4"),
        ({"round_index": 5.0}, "expected round_index 5, found 5.0"),
        ({"base_sha256": "0ther"}, "expected base_sha256 ba5e, found 0ther"),
        ({"rank": 2}, "expected rank 4, found 2"),
        ({"pruning_ratio": 0.69}, "expected pruning_ratio in 0.."),
        ({"pruning_ratio": float("nan")}, "expected pruning_ratio in 0.."),
        ({"pruning_ratio": "all"}, "expected pruning_ratio in 0.."),
    ],
)
def test_a_wrong_identity_is_refused(honest, asked, changes, reason):
    assert verdict(dataclasses.replace(honest, **changes), asked).startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_examples": 1_000_000}, "expected num_examples 10 as registered, found 1000000"),
        ({"num_steps": 0}, "expected num_steps in 1..8, found 0"),
        ({"num_steps": 9}, "expected num_steps in 1..8, found 9"),
        ({"loss_after": float("nan")}, "expected a finite loss_after of at least 0, found nan"),
        ({"loss_before": -1.0}, "expected a finite loss_before of at least 0, found -1.0"),
        ({"compute_seconds": float("inf")}, "expected a finite compute_seconds"),
        ({"compute_seconds": None}, "expected a finite compute_seconds"),
    ],
)
def test_a_wrong_report_is_refused(honest, asked, changes, reason):
    assert verdict(with_report(honest, **changes), asked).startswith(reason)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (np.array([1, 0], dtype=np.int32), "sorted and unique"),
        (np.array([1, 1], dtype=np.int32), "sorted and unique"),
        (np.array([0, 4], dtype=np.int32), "within the assigned candidates, found others"),
        (np.array([-1, 0], dtype=np.int32), "within the assigned candidates, found others"),
        (np.array([], dtype=np.int32), "expected at least one member in keep/layers.0.heads, found none"),
        (np.array([0, 1], dtype=np.int64), r"int32 in one dimension, found int64"),
        (np.array([[0, 1]], dtype=np.int32), "int32 in one dimension, found int32"),
        (np.array([0, 1, 2, 3], dtype=np.int32), "expected about 2 members in layers.0.heads at ratio"),
    ],
)
def test_a_wrong_mask_is_refused(honest, asked, members, reason):
    assert reason in verdict(with_array(honest, "keep/layers.0.heads", members), asked)


def test_a_missing_mask_is_refused(honest, asked):
    tensors = {name: array for name, array in honest.tensors.items() if name != "keep/layers.1.ffn"}
    assert "expected an array keep/layers.1.ffn, found none" in verdict(
        dataclasses.replace(honest, tensors=tensors), asked
    )


def test_kept_members_must_be_among_the_candidates(honest, asked):
    narrow = {**asked.tensors, "keep/layers.0.heads": np.array([0, 3], dtype=np.int32)}
    update = with_array(honest, "keep/layers.0.heads", np.array([0, 1], dtype=np.int32))
    assert "within the assigned candidates" in verdict(update, dataclasses.replace(asked, tensors=narrow))


def test_counts_may_differ_between_layers_in_per_layer_mode_but_not_in_sum(honest, asked):
    asked = dataclasses.replace(asked, mask_mode="per-layer")
    one, all_four = np.array([0], dtype=np.int32), np.arange(4, dtype=np.int32)
    lopsided = with_array(with_array(honest, "keep/layers.0.heads", one), "keep/layers.1.heads", all_four)
    assert verdict(lopsided, asked).startswith("expected lora_b/layers.0.q")  # masks pass, the old arrays do not fit
    greedy = with_array(with_array(honest, "keep/layers.0.heads", all_four), "keep/layers.1.heads", all_four)
    assert "members in 2 heads groups at ratio" in verdict(greedy, asked)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("lora_a/layers.0.q", np.zeros((4, 11), dtype=np.float16), r"float16 [4, 12], found float16 [4, 11]"),
        ("lora_a/layers.0.q", np.zeros((4, 12), dtype=np.float32), r"float16 [4, 12], found float32 [4, 12]"),
        ("lora_b/layers.0.o", np.full((12, 4), np.nan, dtype=np.float16), "finite values in lora_b/layers.0.o"),
        ("lora_b/layers.0.o", np.full((12, 4), np.inf, dtype=np.float16), "finite values in lora_b/layers.0.o"),
        ("lora_b/layers.0.o", np.full((12, 4), 6e4, dtype=np.float16), "an update of layers.0.o of norm up to 1000"),
        ("task_head/classifier.bias", np.full(3, 1e6, dtype=np.float32), "classifier.bias of norm up to 1000"),
        ("task_head/classifier.bias", np.full(3, np.nan, dtype=np.float32), "finite values in task_head"),
        ("importance/layers.0.ffn", np.full(16, np.inf, dtype=np.float16), "finite values in importance"),
        ("importance/layers.0.ffn", np.full(16, -1, dtype=np.float16), "importances of at least 0"),
        ("importance/layers.0.ffn", np.ones(15, dtype=np.float16), "found float16 [15]"),
        ("mean_input/layers.0.o", np.ones(12, dtype=np.float32), "float16 [12], found float32 [12]"),
        ("mean_input/layers.0.q", np.ones(12, dtype=np.float16), "expected no array mean_input/layers.0.q"),
        ("keep/layers.9.heads", np.zeros(1, dtype=np.int32), "expected no array keep/layers.9.heads"),
        ("payload", np.zeros(1, dtype=np.uint8), "expected no array payload"),
    ],
)
def test_wrong_arrays_are_refused(honest, asked, name, array, reason):
    assert reason in verdict(with_array(honest, name, array), asked)


def test_a_missing_factor_is_refused(honest, asked):
    tensors = {name: array for name, array in honest.tensors.items() if name != "lora_b/layers.1.down"}
    assert (
        verdict(dataclasses.replace(honest, tensors=tensors), asked)
        == "expected an array lora_b/layers.1.down, found none"
    )
