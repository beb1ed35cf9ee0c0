"""The opening round on sums of made-up features, whose best linear head is known."""

import dataclasses
import re

import numpy as np
import pytest
import toy

from fedspine_edge.protocol import DeviceReport, Layout, Update, head_linear
from fedspine_server import coordinator
from fedspine_server.attackers import ATTACKS, falsified
from fedspine_server.coordinator import DeviceResult, LateResult, Participant
from fedspine_server.opening import solved_head
from fedspine_server.settings import RunSettings

WIDTH, CLASSES = 6, 3
EXAMPLES = {"a": 200, "b": 90, "c": 40}
HEAD = (("classifier.weight", (CLASSES, WIDTH)), ("classifier.bias", (CLASSES,)))


def layout() -> Layout:
    return dataclasses.replace(toy.layout(), task_head=HEAD)


def features(device_id, count):
    """Inputs and classes of a device; shards differ in their classes, and class 2 is rare."""
    generator = np.random.default_rng(ord(device_id))
    centres = np.random.default_rng(0).standard_normal((CLASSES, WIDTH))
    shares = generator.dirichlet([3.0, 2.0, 0.5])
    labels = generator.choice(CLASSES, count, p=shares)
    return centres[labels] + 0.4 * generator.standard_normal((count, WIDTH)), labels


def summed(assignment, *, work=features):
    inputs, labels = work(assignment.device_id, EXAMPLES[assignment.device_id])
    one_hot = np.eye(CLASSES)[labels]
    lower = np.tril_indices(WIDTH)
    return Update(
        run_id=assignment.run_id, device_id=assignment.device_id, round_index=0, base_sha256=assignment.base_sha256,
        pruning_ratio=0.0, rank=assignment.rank,
        report=DeviceReport(len(labels), assignment.num_steps, 1.1, 1.1, 2.0, 1),
        tensors={
            "head_statistics/counts": one_hot.sum(0).astype(np.int32),
            "head_statistics/sums": (one_hot.T @ inputs / len(labels)).astype(np.float16),
            "head_statistics/products": ((inputs.T @ inputs / len(labels))[lower]).astype(np.float16),
        },
    )  # fmt: skip


def begun(**changes):
    plain = RunSettings(
        rounds=6, steps_per_round=8, ranks=(2, 4), fixed_rank=4, controller="fixed", participants=2,
        head_start="closed-form",
    )  # fmt: skip
    settings = dataclasses.replace(plain, **changes)
    head = {name: np.zeros(shape, dtype=np.float32) for name, shape in HEAD}
    state = coordinator.init(settings, layout(), head)
    return coordinator.enlist(state, [Participant(name, count, 8 << 30) for name, count in EXAMPLES.items()])


def closed(state, updates):
    results = [DeviceResult(u.device_id, "arrived", u, 2.0, 0.1, 0.2, board="TX2", power_mode=0) for u in updates]
    return coordinator.close_round(state, results, round_seconds=2.5)


def opened(*, change=lambda update: update, **changes):
    assignments, state = coordinator.assign(begun(**changes))
    return closed(state, [change(summed(assignment)) for assignment in assignments])


def accuracy(head):
    inputs, labels = (np.concatenate(parts) for parts in zip(*(features(n, 400) for n in "xyz"), strict=True))
    scores = inputs @ head["classifier.weight"].T + head["classifier.bias"]
    return float((scores.argmax(1) == labels).mean())


def test_the_opening_asks_every_device_once_and_tuning_begins_in_the_second_round():
    assignments, state = coordinator.assign(begun())
    assert [(a.device_id, a.work, a.num_steps) for a in assignments] == [
        ("a", "head-statistics", 4), ("b", "head-statistics", 4), ("c", "head-statistics", 3),
    ]  # fmt: skip
    assert set(assignments[0].tensors) == {"task_head/classifier.weight", "task_head/classifier.bias"}
    after = closed(state, [summed(assignment) for assignment in assignments])
    second, _ = coordinator.assign(after)
    assert [assignment.work for assignment in second] == ["tune", "tune"]
    np.testing.assert_array_equal(second[0].tensors["task_head/classifier.bias"], after.task_head["classifier.bias"])
    assert all(np.array_equal(after.adapter[n].lora_a, state.adapter[n].lora_a) for n in state.adapter)
    assert after.history[0]["num_merged"] == 3


def test_the_opening_is_asked_for_in_half_precision_whatever_dtype_the_run_has():
    for assignment in coordinator.assign(begun(update_dtype="int8", base_dtype="int8"))[0]:
        assert (assignment.update_dtype, assignment.base_dtype) == ("float16", "int8")
    after = opened(update_dtype="int8", base_dtype="int8")
    assert (after.history[0]["num_merged"], accuracy(after.task_head) > 0.9) == (3, True)
    assert {a.update_dtype for a in coordinator.assign(after)[0]} == {"int8"}


def test_the_solved_head_is_as_good_as_one_from_all_examples_together():
    inputs, labels = (np.concatenate(p) for p in zip(*(features(n, c) for n, c in EXAMPLES.items()), strict=True))
    one_hot = np.eye(CLASSES)[labels] / len(labels)
    head = {name: np.zeros(shape, dtype=np.float32) for name, shape in HEAD}
    products = (inputs.T @ inputs / len(labels))[np.tril_indices(WIDTH)]
    whole = solved_head(layout(), head, one_hot.sum(0), one_hot.T @ inputs, products)
    apart = opened().task_head
    np.testing.assert_allclose(apart["classifier.weight"], whole["classifier.weight"], rtol=0.05, atol=0.05)
    assert accuracy(apart) > 0.9
    assert accuracy(opened(aggregation="median").task_head) > 0.8


def test_a_class_nobody_has_is_never_the_likeliest():
    head = {name: np.zeros(shape, dtype=np.float32) for name, shape in HEAD}
    inputs = np.random.default_rng(1).standard_normal((50, WIDTH)) + np.eye(WIDTH)[0]
    one_hot = np.zeros((50, CLASSES))
    one_hot[np.arange(50), np.arange(50) % 2] = 1 / 50
    products = (inputs.T @ inputs / 50)[np.tril_indices(WIDTH)]
    solved = solved_head(layout(), head, one_hot.sum(0), one_hot.T @ inputs, products)
    scores = inputs @ solved["classifier.weight"].T + solved["classifier.bias"]
    assert np.isfinite(scores).all()
    assert set(scores.argmax(1)) == {0, 1}


def with_array(name, change):
    def changed(update):
        key = f"head_statistics/{name}"
        return dataclasses.replace(update, tensors={**update.tensors, key: change(update.tensors[key])})

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_array("sums", lambda a: a * np.float16(np.nan)), "finite values in head_statistics/sums"),
        (with_array("sums", lambda a: a * np.float16(10)), "found longer ones"),
        (with_array("sums", lambda a: a[:, :2]), r"expected head_statistics/sums float16 \[3, 6\]"),
        (with_array("counts", lambda a: a * 1000), "expected counts of 1 to"),
        (with_array("counts", lambda a: -a), "expected counts of 1 to"),
        (with_array("products", lambda a: a.astype(np.float32)), "found float32"),
        (lambda update: dataclasses.replace(update, tensors={}), "found none"),
        (lambda update: dataclasses.replace(update, base_sha256="0ther"), "expected base_sha256"),
    ],
)
def test_sums_that_cannot_be_are_refused_and_the_others_count(change, reason):
    state = opened(change=lambda update: change(update) if update.device_id == "b" else update)
    record = {device["device_id"]: device for device in state.history[0]["devices"]}
    assert [record[name]["state"] for name in "abc"] == ["merged", "rejected", "merged"]
    assert re.search(reason, record["b"]["detail"])
    assert accuracy(state.task_head) > 0.8


@pytest.mark.parametrize("attack", ATTACKS)
def test_attackers_lie_in_the_opening_too(attack):
    assignments, _ = coordinator.assign(begun())
    honest = summed(assignments[0])
    lie = falsified(attack, layout(), assignments[0], honest)
    assert {n: a.dtype for n, a in lie.tensors.items()} == {n: a.dtype for n, a in honest.tensors.items()}
    same = np.array_equal(lie.tensors["head_statistics/sums"], honest.tensors["head_statistics/sums"])
    assert same == (attack == "label-flip")  # whose labels are wrong before anything is summed


def test_an_answer_that_comes_after_the_opening_is_not_merged():
    assignments, state = coordinator.assign(begun())
    updates = [summed(assignment) for assignment in assignments]
    state = closed(state, updates[:2])
    _, state = coordinator.assign(state)
    late = LateResult(assignments[2], DeviceResult("c", "late", updates[2], 2.0, 0.1, 0.2))
    state = coordinator.close_round(state, [], round_seconds=1.0, late=[late])
    assert [(one["state"], one["detail"]) for one in state.history[1]["late"]] == [
        ("superseded", "made for the opening, which is over")
    ]


def test_the_controller_knows_every_device_by_its_forward_passes():
    state = begun(controller="structured", participants=0)
    assignments, state = coordinator.assign(state)
    seconds = {"a": 2.0, "b": 8.0, "c": 2.0}
    results = [
        DeviceResult(a.device_id, "arrived", summed(a), seconds[a.device_id] * a.num_steps, 0.1, 0.1)
        for a in assignments
    ]
    state = coordinator.close_round(state, results, round_seconds=9.0)
    second = {assignment.device_id: assignment for assignment in coordinator.assign(state)[0]}
    reasons = {choice.reason for choice in coordinator.assign(state)[1].open_choices.values()}
    assert not any("no timings yet" in reason for reason in reasons)
    assert second["b"].num_steps < min(second["a"].num_steps, second["c"].num_steps)


def test_a_model_without_a_task_head_begins_at_once():
    settings = RunSettings(rounds=3, ranks=(2, 4), fixed_rank=4, controller="fixed", head_start="closed-form")
    decoder = dataclasses.replace(toy.layout(), task_head=())
    assert head_linear(decoder) is None
    state = coordinator.enlist(coordinator.init(settings, decoder, {}), [Participant("a", 3, 8 << 30)])
    assert coordinator.assign(state)[0][0].work == "tune"
