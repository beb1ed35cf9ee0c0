"""`/metrics` for Prometheus: the fleet and its runs, from what is on record at the moment of the scrape.

Comes in: a fleet. Goes out: the text format. Counters are counted from the runs' history, so they are the same from any
server process and do not begin anew when one restarts. Base units, ratios 0 to 1; what a board does not measure is
left out, never 0.

Source: https://prometheus.io/docs/practices/naming/ and https://prometheus.io/docs/instrumenting/writing_clientlibs/
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fedspine_server.page.views import PENDING, REVOKED, SILENT, Device, Fleet, Rollout, Run

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
BUCKETS = (1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800)
REASONS = (
    ("not_finite", r"finite|NaN"),
    ("norm", r"norm"),
    ("mask", r"members?|candidates|sorted and unique|keep/"),
    ("base", r"base_sha256|base model"),
    ("identity", r"device_id|run_id|round_index"),
    ("shape", r"array|dimension|float|int32|\[\d"),
    ("report", r"num_steps|num_examples|seconds|pruning_ratio|loss"),
)
"""Reason of a refusal -> the words of `admission` that say it; first match, so that labels stay few."""


def exposition(fleet: Fleet) -> bytes:
    """Returns everything in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Fleet(fleet))
    return generate_latest(registry)


def reason_of(detail: str) -> str:
    """Returns the short name of why an update was refused."""
    return next((name for name, words in REASONS if re.search(words, detail)), "other")


class _Fleet(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        devices = [device for device in self._fleet.devices if device.condition != REVOKED]
        yield from _devices(devices, self._fleet.now)
        yield from _chosen(devices)
        yield from _runs(self._fleet.runs)
        yield from _rounds(self._fleet.runs)
        yield from _exchange(self._fleet.runs)
        yield from _rollouts(self._fleet.rollouts)


def _gauge(name: str, words: str, labels: list[str], found: Iterable[tuple[list[str], float | None]]) -> Metric:
    family = GaugeMetricFamily(f"fedspine_{name}", words, labels=labels)
    for values, value in found:
        if value is not None:
            family.add_metric(values, value)
    return family


def _devices(devices: list[Device], now: float) -> Iterator[Metric]:
    up = [([d.device_id], float(d.condition not in (SILENT, PENDING))) for d in devices]
    yield _gauge("device_up", "1 while an accepted device is heard of.", ["device"], up)
    seen = [([d.device_id], d.seen_at) for d in devices]
    yield _gauge("device_last_seen_timestamp_seconds", "When a device was heard of last.", ["device"], seen)
    info = [([d.device_id, d.board, d.l4t, d.condition], 1.0) for d in devices]
    yield _gauge("device_info", "What a device is, and its condition.", ["device", "board", "l4t", "condition"], info)
    memory = [([d.device_id, "total"], float(d.memory_bytes) if d.memory_bytes else None) for d in devices]
    memory += [([d.device_id, "available"], d.memory_available_bytes) for d in devices]
    memory += [([d.device_id, "worker_rss"], d.sample.get("worker_rss_bytes")) for d in devices]
    yield _gauge("device_memory_bytes", "Memory of a board.", ["device", "kind"], memory)
    heat = [([d.device_id], d.temperature_celsius) for d in devices]
    yield _gauge("device_temperature_celsius", "Hottest zone of a board.", ["device"], heat)
    power = [([d.device_id, "input"], d.power_watts) for d in devices]
    yield _gauge("device_power_watts", "What a board draws.", ["device", "rail"], power)
    throttled = [([d.device_id], _throttled(d)) for d in devices]
    yield _gauge("device_throttled_ratio", "Share of its clock a board has lost to throttling.", ["device"], throttled)
    energy = CounterMetricFamily("fedspine_device_energy_joules", "Counted by the board.", labels=["device", "rail"])
    for device in devices:
        if device.energy_joules is not None:
            energy.add_metric([device.device_id, "input"], device.energy_joules)
    yield energy


def _throttled(device: Device) -> float | None:
    if device.sample.get("throttled_by") is None:
        return None
    ratio = device.sample.get("clock_ratio")
    return 0.0 if not device.throttled_by else 1.0 if ratio is None else max(0.0, 1.0 - ratio)


def _chosen(devices: list[Device]) -> Iterator[Metric]:
    ratios = [([d.device_id], d.pruning_ratio) for d in devices]
    yield _gauge("controller_pruning_ratio", "Share the controller asks a device to prune.", ["device"], ratios)
    ranks = [([d.device_id], None if d.rank is None else float(d.rank)) for d in devices]
    yield _gauge("controller_lora_rank", "LoRA rank the controller asks of a device.", ["device"], ranks)


def _runs(runs: tuple[Run, ...]) -> Iterator[Metric]:
    yield _gauge("round", "Round under way, from 0.", ["run"], [([r.run_id], float(r.round_index)) for r in runs])
    planned = [([r.run_id], float(r.rounds)) for r in runs]
    yield _gauge("rounds_planned", "Rounds of a run.", ["run"], planned)
    states = [([r.run_id, r.status], 1.0) for r in runs]
    yield _gauge("run_status", "1 for the status a run has.", ["run", "status"], states)
    stands = [([r.run_id], float(bool(r.detail) and not r.simulated)) for r in runs]
    yield _gauge("run_stands", "1 while a run waits or cannot go on.", ["run"], stands)
    waiting = [([r.run_id], float(r.asked - r.answered)) for r in runs]
    yield _gauge("round_waiting_devices", "Devices that have not answered in the open round.", ["run"], waiting)
    accuracy = [([r.run_id, "validation"], r.story.latest("accuracy")) for r in runs]
    yield _gauge("eval_accuracy_ratio", "Accuracy of the global model.", ["run", "split"], accuracy)
    loss = [([r.run_id, when], r.story.latest(f"loss_{when}")) for r in runs for when in ("before", "after")]
    yield _gauge("train_loss", "Mean loss on the devices in the last closed round.", ["run", "when"], loss)


def _rounds(runs: tuple[Run, ...]) -> Iterator[Metric]:
    outcomes = CounterMetricFamily("fedspine_rounds", "Closed rounds.", labels=["run", "outcome"])
    length = HistogramMetricFamily("fedspine_round_duration_seconds", "Length of closed rounds.", labels=["run"])
    for run in runs:
        merged = Counter("merged" if record["num_merged"] else "empty" for record in run.story.rounds)
        for outcome in ("merged", "empty"):
            outcomes.add_metric([run.run_id, outcome], merged[outcome])
        seconds = [run.story.seconds(index) for index in range(len(run.story.rounds))]
        buckets = [(f"{limit:g}", float(sum(s <= limit for s in seconds))) for limit in BUCKETS]
        length.add_metric([run.run_id], [*buckets, ("+Inf", float(len(seconds)))], sum(seconds))
    yield outcomes
    yield length


def _exchange(runs: tuple[Run, ...]) -> Iterator[Metric]:
    size: Counter[tuple[str, str]] = Counter()
    refused: Counter[str] = Counter({name: 0 for name, _ in REASONS})
    states: Counter[tuple[str, str]] = Counter()
    for record in (record for run in runs for record in run.story.rounds):
        for device in record["devices"]:
            size[device["device_id"], "download"] += device["download_bytes"]
            size[device["device_id"], "upload"] += device["upload_bytes"]
            states[device["device_id"], device["state"]] += device["state"] != "away"
            if device["state"] == "rejected":
                refused[reason_of(device["detail"] or "")] += 1
    transfer = CounterMetricFamily("fedspine_transfer_bytes", "Messages' arrays.", labels=["device", "direction"])
    for (name, direction), count in sorted(size.items()):
        transfer.add_metric([name, direction], count)
    updates = CounterMetricFamily("fedspine_updates", "What became of assignments.", labels=["device", "state"])
    for (name, state), count in sorted(states.items()):
        if state != "away":
            updates.add_metric([name, state], count)
    rejected = CounterMetricFamily("fedspine_updates_rejected", "Updates that were refused.", labels=["reason"])
    for reason, count in sorted(refused.items()):
        rejected.add_metric([reason], count)
    yield from (transfer, updates, rejected)


def _rollouts(rollouts: tuple[Rollout, ...]) -> Iterator[Metric]:
    newest = rollouts[:1]
    status = [([str(r.rollout_id), r.model, r.status], 1.0) for r in newest]
    yield _gauge("rollout_status", "1 for the status of the newest rollout.", ["rollout", "model", "status"], status)
    states = [([str(r.rollout_id), state], float(count)) for r in newest for state, count in sorted(r.counts.items())]
    yield _gauge("rollout_devices", "Devices of the newest rollout by state.", ["rollout", "state"], states)
    parts = [part for r in newest for part in r.parts]
    for figure, words in (
        ("ppl", "Perplexity of the rollout's model on a device."),
        ("tokens_per_second", "Generated tokens per second of the rollout's model on a device."),
    ):
        name = "rollout_perplexity" if figure == "ppl" else f"rollout_{figure}"
        yield _gauge(name, words, ["device"], [([part.device_id], part.figures.get(figure)) for part in parts])
