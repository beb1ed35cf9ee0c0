"""Rounds held over a carrier, with devices that answer, fail, come late or never."""

import pytest
import toy

from fedspine_server import coordinator
from fedspine_server.carried import CarriedRun, Terms
from fedspine_server.carriers import Failed, Inventory, Joined, Left, Result
from fedspine_server.settings import RunSettings
from fedspine_server.state import adapter_sha256

EXAMPLES = {"a": 20, "b": 30, "c": 40}


class FakeCarrier:
    """Devices on a clock of their own: device -> seconds to answer, or a reason why it fails."""

    def __init__(self, ways):
        self.now = 0.0
        self.ways = ways
        self.under_way = []
        self.base = "ba5e"
        self.given_up = []
        self.offered = []

    def inventory(self):
        self.now += 0.001
        return {name: Inventory(EXAMPLES[name], 8 << 30, self.base, {"board": "toy"}) for name in self.ways}

    def offer(self, assignments):
        for one in assignments:
            self.offered.append((one.device_id, one.round_index))
            way = self.ways[one.device_id]
            if isinstance(way, str):
                self.under_way.append((self.now, Failed(one.device_id, one.round_index, way)))
            else:
                update = toy.tune_one(toy.layout(), one, EXAMPLES[one.device_id])
                self.under_way.append((self.now + way, Result(one.device_id, one.round_index, update, way)))

    def cancel(self, device_id, round_index):
        self.given_up.append((device_id, round_index))

    def events(self, seconds):
        self.now += max(0.01, seconds)
        here = [event for at, event in self.under_way if at <= self.now]
        self.under_way = [(at, event) for at, event in self.under_way if at > self.now]
        return here


def settings(**changes):
    return RunSettings(rounds=4, steps_per_round=3, prune_interval=3, ranks=(2, 4), min_quorum=0.3, **changes)


def first(**changes):
    return coordinator.init(settings(**changes), toy.layout(), toy.task_head())


def run(carrier, state=None, saved=None, **terms):
    saved = [] if saved is None else saved
    return CarriedRun(
        state or first(), carrier, Terms(**terms), save=saved.append, clock=lambda: carrier.now
    ).run()  # fmt: skip


def fates(record):
    return {device["device_id"]: device["state"] for device in record["devices"]}


def test_all_devices_answer_and_every_round_merges_them():
    state = run(FakeCarrier({"a": 1.0, "b": 2.0, "c": 3.0}), min_devices=3)
    assert [fates(record) for record in state.history] == [dict.fromkeys("abc", "merged")] * 4
    assert {device["board"] for device in state.history[0]["devices"]} == {"toy"}


def test_a_failure_ends_the_wait_for_a_device_and_is_on_record():
    state = run(FakeCarrier({"a": 1.0, "b": "no memory"}), min_devices=2)
    assert fates(state.history[0]) == {"a": "merged", "b": "dropped"}
    assert state.history[0]["devices"][1]["detail"] == "failed: no memory"


def test_a_device_that_never_answers_costs_a_round_its_timeout_at_most():
    carrier = FakeCarrier({"a": 1.0, "b": 1e9})
    state = run(carrier, min_devices=2, round_timeout_seconds=30.0)
    assert fates(state.history[0]) == {"a": "merged", "b": "dropped"}
    assert state.clock_seconds == pytest.approx(sum(30.0 for _ in range(4)), rel=0.9)
    assert state.clock_seconds <= 4 * 30.0 + 1e-6


def test_a_late_answer_is_merged_once_with_less_weight_in_the_next_round():
    begin = first(controller="fixed", fixed_rank=2)  # sets no deadline: every round takes its timeout
    state = run(FakeCarrier({"a": 1.0, "b": 35.0}), begin, min_devices=2, round_timeout_seconds=30.0)
    late = [one for record in state.history for one in record["late"]]
    assert late
    assert all(one["device_id"] == "b" and one["state"] in ("merged", "superseded") for one in late)
    assert late[0]["weight"] == pytest.approx(2**-0.5)
    assert len({one["round_index"] for one in late}) == len(late)


def test_an_answer_that_comes_too_late_to_count_is_given_up():
    begin = first(controller="fixed", fixed_rank=2)
    carrier = FakeCarrier({"a": 1.0, "b": 1e9})
    run(carrier, begin, min_devices=2, round_timeout_seconds=30.0, max_staleness=1)
    assert carrier.given_up == [("b", 0), ("b", 1), ("b", 2), ("b", 3)]


class Flaky(FakeCarrier):
    """Device b loses what it was sent in round 1, and comes back after 5 seconds with nothing or as another node."""

    def __init__(self, ways, *, back=True):
        super().__init__(ways)
        self.back = back
        self.lost = False

    def offer(self, assignments):
        super().offer(assignments)
        if assignments[0].round_index == 1 and not self.lost:
            self.lost = True
            self.under_way = [(at, event) for at, event in self.under_way if event.device_id != "b"]
            self.under_way.append((self.now + 2.0, Left("b")))
            if self.back:
                self.under_way.append((self.now + 5.0, Joined("b")))


def test_a_device_that_comes_back_within_a_round_is_asked_again():
    carrier = Flaky({"a": 10.0, "b": 1.0})
    state = run(carrier, first(controller="fixed", fixed_rank=2), min_devices=2)
    assert [fates(record) for record in state.history] == [dict.fromkeys("ab", "merged")] * 4
    assert carrier.offered.count(("b", 1)) == 2


def test_the_round_does_not_wait_for_a_device_that_left():
    state = run(Flaky({"a": 3.0, "b": 1.0}, back=False), first(controller="fixed", fixed_rank=2), min_devices=2)
    assert fates(state.history[1]) == {"a": "merged", "b": "dropped"}
    assert state.history[1]["devices"][1]["detail"] == "failed: it can no longer be reached"
    assert state.history[1]["virtual_end_seconds"] - state.history[1]["virtual_start_seconds"] < 10.0


def test_an_answer_that_comes_twice_counts_once():
    class Twice(FakeCarrier):
        def events(self, seconds):
            found = super().events(seconds)
            self.under_way += [(self.now + 31.0, one) for one in found if isinstance(one, Result)]
            return found

    state = run(
        Twice({"a": 1.0, "b": 29.0}), first(controller="fixed", fixed_rank=2), min_devices=2, max_staleness=3
    )  # fmt: skip
    assert [fates(record) for record in state.history] == [dict.fromkeys("ab", "merged")] * 4
    assert [record["late"] for record in state.history] == [[]] * 4


def test_a_rounds_updates_wait_on_disk(tmp_path):
    class Watched(FakeCarrier):
        most = 0

        def events(self, seconds):
            self.most = max(self.most, sum(path.is_file() for path in tmp_path.rglob("*")))
            return super().events(seconds)

    carrier = Watched({"a": 1.0, "b": 2.0, "c": 9.0})
    CarriedRun(
        first(), carrier, Terms(min_devices=3), save=lambda _: None, spool_folder=tmp_path, clock=lambda: carrier.now
    ).run()  # fmt: skip
    assert carrier.most == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_at_any_save_goes_on_to_the_same_adapter():
    ways = {"a": 1.0, "b": 2.0}
    saved = []
    whole = run(FakeCarrier(ways), saved=saved, min_devices=2)
    assert len(saved) == 2 * 4
    for state in saved[:-1]:
        again = run(FakeCarrier(ways), state=state, min_devices=2)
        assert adapter_sha256(again) == adapter_sha256(whole)


def test_recorded_seconds_give_the_recorded_history():
    whole = run(FakeCarrier({"a": 1.0, "b": 2.0}), min_devices=2)
    again = run(FakeCarrier({"a": 9.0, "b": 0.5}), min_devices=2, timings=whole.history)
    assert again.history == whole.history
    assert adapter_sha256(again) == adapter_sha256(whole)


def test_devices_with_another_base_are_not_asked():
    class Impatient(FakeCarrier):
        def events(self, seconds):
            raise TimeoutError

    carrier = Impatient({"a": 1.0})
    carrier.base = "other"
    with pytest.raises(TimeoutError):
        run(carrier)
