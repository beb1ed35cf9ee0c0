"""What an operator wants to know in five seconds: is it healthy, who is slow, how good, what was chosen, what next.

Comes in: a fleet at one moment. Goes out: five answers and what deserves a look, worst first. Every sentence rests on a
figure of the fleet; nothing is guessed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedspine_server.page import wording
from fedspine_server.page.rollout_findings import rollout_findings
from fedspine_server.page.story import Story, busy_seconds, why_slow
from fedspine_server.page.views import ACCEPTED_CONDITIONS, PAUSED, PENDING, SILENT, Device, Fleet, Run

GOOD, NOTE, WARN, BAD = "good", "note", "warn", "bad"
LEVELS = (GOOD, NOTE, WARN, BAD)
SLOW = 1.5  # times the median
RECENT = 3  # rounds looked at
HOT_CELSIUS = 85.0
LITTLE_MEMORY = 0.08
ACCURACY_DROP, FLAT_ROUNDS, FLAT = 0.03, 5, 0.004


@dataclass(frozen=True)
class Finding:
    """Something that deserves a look.

    Attributes:
        level: `GOOD`, `NOTE`, `WARN` or `BAD`.
        title: What.
        why: With figures.
        next: What the operator would do.
        link: Page to look at.
    """

    level: str
    title: str
    why: str
    next: str = ""
    link: str = ""


@dataclass(frozen=True)
class Answer:
    """One of the five questions, answered: a word or a figure, and a sentence."""

    question: str
    answer: str
    because: str
    level: str = NOTE
    link: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All answers, and every finding, worst first."""

    level: str
    answers: tuple[Answer, ...]
    findings: tuple[Finding, ...]


def diagnose(fleet: Fleet) -> Diagnosis:
    """Returns the five answers about a fleet and its current run."""
    run = fleet.current
    found = [*_of_fleet(fleet), *(Finding(*said) for said in rollout_findings(fleet))]
    if run is not None:
        found += [*_of_run(run), *_of_learning(run), *_of_updates(run), *_of_speed(run, fleet)]
    found.sort(key=lambda finding: -LEVELS.index(finding.level))
    worst = found[0].level if found else GOOD
    answers = (_healthy(fleet, run, worst), _slow(run, fleet), _model(run), _chosen(run), _next(run, found))
    return Diagnosis(worst if worst != NOTE else GOOD, answers, tuple(found))


def _of_fleet(fleet: Fleet) -> Iterator[Finding]:
    pending = [device.device_id for device in fleet.devices if device.condition == PENDING]
    if pending:
        yield Finding(
            WARN, f"{wording.plural(len(pending), 'device')} waiting to be let in", wording.names(pending),
            "check that you know the board, then accept it", "#pending",
        )  # fmt: skip
    silent = [device for device in fleet.devices if device.condition == SILENT and device.seen_at is not None]
    if silent:
        oldest = max(fleet.now - device.seen_at for device in silent if device.seen_at is not None)
        yield Finding(
            WARN, f"{wording.plural(len(silent), 'device')} not heard of",
            f"{wording.names([d.device_id for d in silent])}, silent for up to {wording.seconds(round(oldest, -1))}",
            "check power and network of the board; the run goes on without it", f"/devices/{silent[0].device_id}",
        )  # fmt: skip
    for device in fleet.devices:
        if device.condition in ACCEPTED_CONDITIONS:
            yield from _of_board(device)


def _of_board(device: Device) -> Iterator[Finding]:
    link, celsius = f"/devices/{device.device_id}", device.temperature_celsius
    if device.throttled_by:
        heat = f" at {celsius:.0f} °C" if celsius is not None else ""
        yield Finding(
            WARN, f"{device.device_id} is throttled{heat}", f"held back by {wording.names(list(device.throttled_by))}",
            "see to its cooling or its power mode", link,
        )  # fmt: skip
    elif device.condition == PAUSED or (celsius is not None and celsius >= HOT_CELSIUS):
        why = device.problem or f"{celsius:.0f} °C, near where boards slow down"
        yield Finding(WARN, f"{device.device_id} is hot or paused", why, "see to its cooling", link)
    free = device.memory_available_bytes
    if free is not None and device.memory_bytes and free < LITTLE_MEMORY * device.memory_bytes:
        yield Finding(
            WARN, f"{device.device_id} is short of memory",
            f"{wording.data_size(free)} of {wording.data_size(device.memory_bytes)} free",
            "end other work on the board, or give it a lower --memory", link,
        )  # fmt: skip


def _of_run(run: Run) -> Iterator[Finding]:
    link = f"/runs/{run.run_id}"
    if run.detail and not run.simulated:
        waiting = run.detail.startswith("waiting")
        yield Finding(
            WARN if waiting else BAD, f"run {run.run_id} stands", run.detail,
            "start or accept devices with this base model" if waiting else "fix what it says; the run then goes on",
            link,
        )  # fmt: skip
    last = run.story.rounds[-1] if run.story.rounds else None
    if last is not None and run.status == "running":
        taking_part = [device for device in last["devices"] if device["state"] != "away"]
        if taking_part and last["num_merged"] < len(taking_part) / 2:
            yield Finding(
                BAD, f"round {last['round_index'] + 1} merged {last['num_merged']} of {len(taking_part)} updates",
                _states(last), "look at the reasons in the round before it goes on", link,
            )  # fmt: skip


def _states(record: Mapping[str, Any]) -> str:
    states = [device["state"] for device in record["devices"]]
    return ", ".join(f"{states.count(s)} {s}" for s in ("merged", "late", "dropped", "rejected", "away") if s in states)


def _of_learning(run: Run) -> Iterator[Finding]:
    link, accuracies = f"/runs/{run.run_id}", [value for _, value in run.story.values("accuracy")]
    losses = [value for _, value in run.story.values("loss_after")]
    if accuracies and accuracies[-1] < max(accuracies) - ACCURACY_DROP:
        fall = 100 * (max(accuracies) - accuracies[-1])
        yield Finding(
            WARN, f"accuracy fell {fall:.1f} points below its best",
            f"{wording.percent(max(accuracies), 1)} to {wording.percent(accuracies[-1], 1)}"
            f" while {wording.percent(run.schedule_ratio)} is pruned",
            "let the cool-down rounds recover it, or aim at less sparsity", link,
        )  # fmt: skip
    elif len(losses) > RECENT and all(a < b for a, b in zip(losses[-1 - RECENT :], losses[-RECENT:], strict=False)):
        yield Finding(
            WARN, f"loss rose {RECENT} rounds in a row",
            f"{wording.number(losses[-1 - RECENT])} to {wording.number(losses[-1])}",
            "lower the learning rate or the target sparsity", link,
        )  # fmt: skip
    elif len(accuracies) > FLAT_ROUNDS and max(accuracies[-FLAT_ROUNDS:]) - min(accuracies[-FLAT_ROUNDS:]) < FLAT:
        yield Finding(
            NOTE, f"accuracy has not moved for {FLAT_ROUNDS} rounds", wording.percent(accuracies[-1], 1),
            "it may be as good as it gets", link,
        )  # fmt: skip


def _of_updates(run: Run) -> Iterator[Finding]:
    """Devices whose updates were refused or missing in more than one of the last rounds."""
    for name, records in run.story.by_device.items():
        recent = [device for device in records[-RECENT:] if device is not None]
        for state, verb in (("rejected", "were refused"), ("dropped", "did not come")):
            bad = [device for device in recent if device["state"] == state]
            if len(bad) > 1:
                yield Finding(
                    WARN, f"updates of {name} {verb}", f"{len(bad)} of {len(recent)} rounds: {bad[-1]['detail']}",
                    "look at the device; revoke it if it goes on" if state == "rejected" else "see its agent's log",
                    f"/devices/{name}",
                )  # fmt: skip


def slow_devices(story: Story) -> list[tuple[str, float, str]]:
    """Returns (device, times the median, why), slowest first, of those slow in more than one of the last rounds."""
    counts: dict[str, list[tuple[float, str]]] = {}
    for record in story.rounds[-RECENT:]:
        taking_part = [d for d in record["devices"] if d["state"] != "away" and busy_seconds(d) > 0]
        if len(taking_part) < 2:
            continue
        usual = statistics.median(busy_seconds(device) for device in taking_part)
        for device in taking_part:
            times = busy_seconds(device) / usual if usual else 0.0
            if times >= SLOW or device["state"] == "late":
                counts.setdefault(device["device_id"], []).append((times, why_slow(device, taking_part)))
    needed = min(2, len(story.rounds))
    slow = [(name, found[-1][0], found[-1][1]) for name, found in counts.items() if len(found) >= needed]
    return sorted(slow, key=lambda entry: -entry[1])


def _of_speed(run: Run, fleet: Fleet) -> Iterator[Finding]:
    for record in run.story.rounds[-1:]:
        late = [device for device in record["devices"] if device["state"] == "late"]
        if late:
            names = [device["device_id"] for device in late]
            yield Finding(
                NOTE, f"{wording.plural(len(late), 'device')} late in round {record['round_index'] + 1}",
                f"{wording.names(names)}: {late[0]['detail'] or 'after the deadline'}",
                "the controller asks less of it from here on", f"/runs/{run.run_id}",
            )  # fmt: skip


def _healthy(fleet: Fleet, run: Run | None, worst: str) -> Answer:
    question = "Is it healthy?"
    here = sum(device.condition in ACCEPTED_CONDITIONS for device in fleet.devices)
    if run is None:
        return Answer(question, "no run", f"{wording.plural(here, 'device')} here, nothing to do", NOTE)
    word = {GOOD: "Healthy", NOTE: "Healthy", WARN: "Needs a look", BAD: "In trouble"}[worst]
    link = f"/runs/{run.run_id}"
    if run.status != "running":
        over = f"after {run.round_index} of {wording.plural(run.rounds, 'round')}"
        return Answer(question, run.status.capitalize(), over, GOOD if run.status == "finished" else NOTE, link)
    left = run.story.seconds_left(run.rounds)
    rest = "" if left is None else f", about {wording.seconds(left)}{' virtual' if run.simulated else ''} left"
    answered = f"{run.answered} of {run.asked} in" if run.asked else run.phase or "between rounds"
    because = f"round {min(run.round_index + 1, run.rounds)} of {run.rounds}, {answered}{rest}"
    return Answer(question, word, because, worst if worst != NOTE else GOOD, link)


def _slow(run: Run | None, fleet: Fleet) -> Answer:
    question = "Who is slow, and why?"
    if run is None or not run.story.rounds:
        return Answer(question, wording.MISSING, "no round has been closed yet")
    slow = slow_devices(run.story)
    if not slow:
        share = run.story.waiting_share()
        return Answer(question, "Nobody", f"{wording.percent(share)} of device time is waiting for others", GOOD)
    name, times, why = slow[0]
    device = fleet.device(name)
    board = f"{wording.board(device.board)}; " if device is not None and device.board else ""
    more = f" {len(slow) - 1} more." if len(slow) > 1 else ""
    return Answer(question, name, f"{times:.1f}× the median round. {board}{why}.{more}", NOTE, f"/devices/{name}")


def _model(run: Run | None) -> Answer:
    question = "How good is the model?"
    if run is None or not run.story.rounds:
        return Answer(question, wording.MISSING, "no round has been closed yet")
    link, accuracies = f"/runs/{run.run_id}/model", [value for _, value in run.story.values("accuracy")]
    gone = f"{wording.percent(run.schedule_ratio)} pruned of {wording.percent(run.target_sparsity)}"
    final = run.summary.get("accuracy")
    if final is not None:
        untuned = run.summary.get("accuracy_untuned")
        return Answer(
            question, wording.percent(final, 1),
            f"right on held-out rows, {wording.percent(untuned, 1)} untuned; {gone}", GOOD, link,
        )  # fmt: skip
    if accuracies:
        best = f"best {wording.percent(max(accuracies), 1)}"
        return Answer(question, wording.percent(accuracies[-1], 1), f"accuracy, {best}; {gone}", GOOD, link)
    first, now = run.story.values("loss_before"), run.story.latest("loss_after")
    if now is None or math.isnan(now) or not first:
        return Answer(question, wording.MISSING, f"nothing merged yet; {gone}", NOTE, link)
    return Answer(question, f"loss {wording.number(now)}", f"from {wording.number(first[0][1])}; {gone}", GOOD, link)


def _chosen(run: Run | None) -> Answer:
    question = "What did the controller choose?"
    if run is None or not run.story.rounds:
        return Answer(question, wording.MISSING, "it chooses when the first round opens")
    chosen = [device for device in run.story.rounds[-1]["devices"] if device["state"] != "away"]
    if not chosen:
        return Answer(question, wording.MISSING, "nobody was there in the last round")
    ratios, ranks = [d["pruning_ratio"] for d in chosen], [d["rank"] for d in chosen]
    low, high = 100 * min(ratios), 100 * max(ratios)
    span = f"{high:.0f} % pruned" if high - low < 1 else f"{low:.0f}–{high:.0f} % pruned"
    rank = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"rank {min(ranks)}–{max(ranks)}"
    reasons = [device["reason"] for device in chosen if device["reason"]]
    why = max(set(reasons), key=reasons.count) if reasons else "no reason on record"
    return Answer(question, f"{span}, {rank}", why, NOTE, f"/runs/{run.run_id}")


def _next(run: Run | None, findings: list[Finding]) -> Answer:
    question = "What would I do next?"
    urgent = next((finding for finding in findings if finding.next and finding.level in (WARN, BAD)), None)
    if urgent is not None:
        return Answer(question, urgent.title, urgent.next, urgent.level, urgent.link)
    if run is None:
        return Answer(question, "Start a run", "fedspine runs start FILE.toml")
    link = f"/runs/{run.run_id}/model"
    if run.status == "finished" and run.simulated:
        return Answer(question, "Take the model", "files, parity and speed are on its page", GOOD, link)
    if run.status == "finished":
        return Answer(
            question, "Fetch the model", f"fedspine runs fetch {run.run_id}, then fedspine export", GOOD, link
        )
    if run.status == "stopped":
        again = (
            f"fedspine simulate --resume runs/{run.run_id}" if run.simulated else f"fedspine runs resume {run.run_id}"
        )
        return Answer(question, "Go on, or leave it", again)
    return Answer(question, "Nothing", "it goes on by itself", GOOD)
