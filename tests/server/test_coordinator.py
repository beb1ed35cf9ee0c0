import dataclasses

import numpy as np
import pytest
import toy

from fedspine_server import coordinator
from fedspine_server.coordinator import DeviceResult

EXAMPLES = {"a": 10, "b": 30, "c": 20}


def arrived(updates):
    return [DeviceResult(u.device_id, "arrived", u, 3.0, 1.0, 2.0, board="TX2", power_mode=1) for u in updates]


def play(state, rounds=1, *, change=lambda update: update):
    tune = toy.tuner(EXAMPLES)
    for _ in range(rounds):
        assignments, state = coordinator.assign(state)
        updates = [change(update) for update in tune(assignments)]
        state = coordinator.close_round(state, arrived(updates), round_seconds=6.0)
    return state


def test_the_first_adapter_has_a_random_a_and_a_zero_b(begin):
    factors = begin().adapter["layers.0.down"]
    assert factors.lora_a.shape == (4, toy.FFN)
    assert np.abs(factors.lora_a).max() <= 1 / np.sqrt(toy.FFN)
    assert len(np.unique(factors.lora_a)) > 60
    assert not factors.lora_b.any()


def test_a_run_is_named_after_its_settings(begin):
    assert begin().run_id == begin().run_id
    assert begin(seed=1).run_id != begin().run_id


def test_a_task_head_of_another_shape_is_refused(settings):
    with pytest.raises(ValueError, match=r"expected task head .*\(3,\).*found .*\(4,\)"):
        coordinator.init(settings, toy.layout(), {"classifier.bias": np.zeros(4, dtype=np.float32)})


def test_a_device_without_examples_is_refused(begin):
    with pytest.raises(ValueError, match="device d must have at least 1 example, found 0"):
        coordinator.register(begin(), "d", num_examples=0, memory_bytes=1)


def test_a_run_that_is_over_hands_out_nothing(begin):
    state = dataclasses.replace(begin(), round_index=10)
    with pytest.raises(ValueError, match="the run is over after 10 rounds"):
        coordinator.assign(state)


def test_assignments_carry_the_adapter_at_their_rank_in_half_precision(begin):
    state = begin(fixed_rank=2)
    assignments, _ = coordinator.assign(state)
    assert [assignment.device_id for assignment in assignments] == ["a", "b", "c"]
    tensors = assignments[0].tensors
    assert tensors["lora_a/layers.0.q"].shape == (2, 12)
    assert tensors["lora_b/layers.0.q"].shape == (12, 2)
    assert tensors["lora_a/layers.0.q"].dtype == np.float16
    np.testing.assert_array_equal(
        tensors["lora_a/layers.0.q"], state.adapter["layers.0.q"].lora_a[:2].astype(np.float16)
    )
    assert tensors["keep/layers.1.ffn"].dtype == np.int32
    assert np.isnan(tensors["importance/layers.1.ffn"]).all()
    assert np.isnan(tensors["mean_input/layers.1.down"]).all()


@pytest.mark.parametrize("compensates", [True, False])
def test_mean_inputs_are_sent_only_where_they_are_used(begin, compensates):
    assignment = coordinator.assign(begin(mean_compensation=compensates))[0][0]
    assert ("mean_input/layers.0.o" in assignment.tensors) == compensates


def test_each_device_and_round_has_its_own_seed(begin):
    state = begin()
    first, _ = coordinator.assign(state)
    second, _ = coordinator.assign(play(state))
    seeds = [assignment.seed for assignment in (*first, *second)]
    assert len(set(seeds)) == len(seeds)


def test_candidates_are_the_last_kept_members_between_revival_and_cooldown(begin):
    state = play(begin(rounds=20, cooldown_fraction=0.2), 14)
    assignment = coordinator.assign(state)[0][0]
    assert (assignment.round_index, assignment.revive) == (14, False)
    kept = state.devices["a"].kept["layers.0.ffn"]
    assert len(kept) < toy.FFN
    np.testing.assert_array_equal(assignment.tensors["keep/layers.0.ffn"], kept)
    assert assignment.tensors["lora_b/layers.0.up"].shape == (len(kept), 4)
    assert assignment.tensors["lora_a/layers.0.down"].shape == (4, len(kept))


def test_cooldown_offers_every_member_and_the_servers_ranking_alone(begin):
    state = play(begin(rounds=20, cooldown_fraction=0.2), 16)
    assignment = coordinator.assign(state)[0][0]
    assert (assignment.revive, assignment.mask_agreement, assignment.pruning_ratio) == (True, 1.0, 0.5)
    assert len(assignment.tensors["keep/layers.0.ffn"]) == toy.FFN


def test_devices_measure_importance_until_cooldown_even_where_they_follow_the_server(begin):
    assert coordinator.assign(begin(mask_agreement=1.0))[0][0].mask_agreement < 1.0


def test_importances_stand_still_in_cooldown_and_all_keep_the_same(begin):
    state = play(begin(rounds=10, cooldown_fraction=0.3), 7)
    done = play(state, 3)
    for name, values in state.importance.items():
        np.testing.assert_array_equal(values, done.importance[name])
        kept = [device.kept[name] for device in done.devices.values()]
        np.testing.assert_array_equal(kept[0], kept[1])
        np.testing.assert_array_equal(kept[0], kept[2])


def test_members_that_are_gone_for_good_have_no_rows_left_in_the_adapter(begin):
    state = play(begin(), 10)
    kept = state.devices["a"].kept["layers.0.ffn"]
    assert len(kept) == 8
    gone = np.setdiff1d(np.arange(toy.FFN), kept)
    assert not state.adapter["layers.0.up"].lora_b[gone].any()
    assert state.adapter["layers.0.up"].lora_b[kept].any()
    down = state.adapter["layers.0.down"]
    assert np.abs(down.lora_b @ down.lora_a[:, gone]).max() < 1e-6


def test_the_task_head_is_the_mean_weighted_by_examples(begin):
    state = begin()
    assignments, state = coordinator.assign(state)
    updates = []
    for value, assignment in zip((1.0, 2.0, 3.0), assignments, strict=True):
        update = toy.tune_one(toy.layout(), assignment, EXAMPLES[assignment.device_id])
        head = np.full(3, value, dtype=np.float32)
        updates.append(dataclasses.replace(update, tensors={**update.tensors, "task_head/classifier.bias": head}))
    state = coordinator.close_round(state, arrived(updates), round_seconds=6.0)
    np.testing.assert_allclose(state.task_head["classifier.bias"], (10 * 1 + 30 * 2 + 20 * 3) / 60, rtol=1e-6)


@pytest.mark.parametrize(("weights", "expected"), [("equal", 2.0), ("sqrt-examples", 2.09993)])
def test_devices_may_weigh_otherwise(begin, weights, expected):
    _, state = coordinator.assign(begin(example_weights=weights))
    updates = []
    for value, assignment in zip((1.0, 2.0, 3.0), coordinator.assign(state)[0], strict=True):
        update = toy.tune_one(toy.layout(), assignment, EXAMPLES[assignment.device_id])
        head = np.full(3, value, dtype=np.float32)
        updates.append(dataclasses.replace(update, tensors={**update.tensors, "task_head/classifier.bias": head}))
    state = coordinator.close_round(state, arrived(updates), round_seconds=6.0)
    np.testing.assert_allclose(state.task_head["classifier.bias"], expected, rtol=1e-4)


def test_a_rejected_update_is_on_record_and_changes_nothing(begin):
    def lie(update):
        return dataclasses.replace(update, rank=3) if update.device_id == "b" else update

    with_lie = play(begin(), change=lie)
    record = with_lie.history[0]
    assert record["num_merged"] == 2
    liar = record["devices"][1]
    assert (liar["state"], liar["detail"], liar["reward"]) == ("rejected", "expected rank 4, found 3", None)
    assignments, state = coordinator.assign(begin())
    honest = [update for update in toy.tuner(EXAMPLES)(assignments) if update.device_id != "b"]
    without = coordinator.close_round(state, arrived(honest), round_seconds=6.0)
    assert coordinator.adapter_sha256(without) == coordinator.adapter_sha256(with_lie)


def test_a_round_from_which_nothing_comes_back_leaves_the_adapter_and_goes_on(begin):
    state = begin()
    _, opened = coordinator.assign(state)
    closed = coordinator.close_round(opened, [], round_seconds=60.0)
    assert coordinator.adapter_sha256(closed) == coordinator.adapter_sha256(state)
    assert (closed.round_index, closed.clock_seconds) == (1, 60.0)
    record = closed.history[0]
    assert (record["num_merged"], record["loss_before"], record["loss_after"]) == (0, None, None)
    assert {device["state"] for device in record["devices"]} == {"dropped"}
    assert record["devices"][0]["detail"] == "no answer"


def test_an_answer_without_an_update_is_rejected(begin):
    _, state = coordinator.assign(begin())
    state = coordinator.close_round(state, [DeviceResult("a", "arrived")], round_seconds=1.0)
    assert state.history[0]["devices"][0]["detail"] == "expected an update, found none"


def test_who_left_is_away_and_comes_back_with_its_past(begin):
    state = play(begin(), 2)
    state = play(coordinator.leave(state, "b"), 1)
    assert [device["state"] for device in state.history[2]["devices"]] == ["merged", "away", "merged"]
    state = coordinator.register(state, "b", num_examples=30, memory_bytes=1 << 33)
    assert state.devices["b"].kept
    assert [device["state"] for device in play(state).history[3]["devices"]] == ["merged"] * 3


def test_a_round_without_any_device_is_empty(begin):
    state = begin()
    for device_id in EXAMPLES:
        state = coordinator.leave(state, device_id)
    assignments, state = coordinator.assign(state)
    assert assignments == ()
    assert coordinator.close_round(state, [], round_seconds=5.0).history[0]["num_merged"] == 0


def test_the_record_of_a_round_says_what_happened(begin):
    state = coordinator.record_accuracy(play(begin(), 2), 0.75)
    record = state.history[1]
    assert {
        key: record[key] for key in ("round_index", "virtual_start_seconds", "virtual_end_seconds", "accuracy")
    } == {
        "round_index": 1,
        "virtual_start_seconds": 6.0,
        "virtual_end_seconds": 12.0,
        "accuracy": 0.75,
    }
    device = record["devices"][0]
    assert (device["device_id"], device["board"], device["power_mode"], device["state"]) == ("a", "TX2", 1, "merged")
    assert (device["rank"], device["num_steps"], device["num_examples"]) == (4, 8, 10)
    assert device["loss_after"] < device["loss_before"]
    assert 0 < device["reward"] <= 1
    assert device["download_bytes"] > device["upload_bytes"] > 0
    assert record["loss_before"] == pytest.approx(
        np.average([d["loss_before"] for d in record["devices"]], weights=[10, 30, 20])
    )


def test_the_order_of_results_changes_nothing(begin):
    assignments, state = coordinator.assign(begin(controller="structured"))
    results = arrived(toy.tuner(EXAMPLES)(assignments))
    one = coordinator.close_round(state, results, round_seconds=6.0)
    other = coordinator.close_round(state, results[::-1], round_seconds=6.0)
    assert coordinator.adapter_sha256(one) == coordinator.adapter_sha256(other)
    assert one.history == other.history
    assert one.controller_state == other.controller_state


def test_participants_are_a_seeded_draw_of_who_is_there():
    settings = coordinator.RunSettings(rounds=4, ranks=(2, 4), fixed_rank=2, participants=3)
    state = coordinator.init(settings, toy.layout(), toy.task_head())
    for index in range(8):
        state = coordinator.register(state, f"device-{index}", num_examples=10, memory_bytes=8 << 30)
    asked = [[a.device_id for a in coordinator.assign(dataclasses.replace(state, round_index=t))[0]] for t in range(4)]
    assert all(len(set(names)) == 3 and names == sorted(names) for names in asked)
    assert len({tuple(names) for names in asked}) > 1
    assert asked[0] == [a.device_id for a in coordinator.assign(state)[0]]
    for index in range(6):
        state = coordinator.leave(state, f"device-{index}")
    assert [a.device_id for a in coordinator.assign(state)[0]] == ["device-6", "device-7"]


@pytest.mark.parametrize(("dtype", "close"), [("int8", 0.02), ("int4", 0.25)])
def test_updates_of_integers_merge_to_nearly_the_same_and_weigh_less(begin, dtype, close):
    half, few = play(begin()), play(begin(update_dtype=dtype))
    assert few.history[0]["num_merged"] == 3
    for name, factors in half.adapter.items():
        whole, other = factors.lora_b @ factors.lora_a, few.adapter[name].lora_b @ few.adapter[name].lora_a
        assert 0 < np.linalg.norm(whole - other) < close * np.linalg.norm(whole)
    for way in ("upload_bytes", "download_bytes"):
        sent, plain = (state.history[0]["devices"][0][way] for state in (few, half))
        assert sent < plain
    assert few.devices["a"].kept["layers.0.ffn"].dtype == np.int32


def test_an_update_of_integers_nobody_can_read_is_rejected_with_the_reason(begin):
    def spoiled(update):
        without = {name: array for name, array in update.tensors.items() if name != "scale_a/layers.0.q"}
        return dataclasses.replace(update, tensors=without) if update.device_id == "b" else update

    record = play(begin(update_dtype="int8"), change=spoiled).history[0]
    assert [device["state"] for device in record["devices"]] == ["merged", "rejected", "merged"]
    assert "expected an array scale_a/layers.0.q, found none" in record["devices"][1]["detail"]


def test_an_update_of_integers_that_nobody_asked_for_is_rejected(begin):
    integers = {u.device_id: u for u in toy.tuner(EXAMPLES)(coordinator.assign(begin(update_dtype="int8"))[0])}
    record = play(
        begin(), change=lambda update: dataclasses.replace(update, tensors=integers[update.device_id].tensors)
    ).history[0]
    assert {device["state"] for device in record["devices"]} == {"rejected"}
