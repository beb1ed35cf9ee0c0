"""A made-up fleet on record, for the page's benchmark and its pictures: forty Jetsons in mid-run, none of them real.

Comes in: a server's directory as `fedspine serve --init` makes it. Goes out: devices, tasks, events and a run's history
in its database, as if they had worked; and a way to let them go on.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
from sqlalchemy import select

from fedspine_edge.protocol import Group, Layout, Matrix
from fedspine_edge.rollout_gate import parse, to_json
from fedspine_server import coordinator
from fedspine_server.controllers.contract import Choice
from fedspine_server.link.hub import Hub
from fedspine_server.link.tables import (
    ACCEPTED,
    DONE,
    LEASED,
    PENDING,
    RUNNING,
    DeviceRow,
    ModelRow,
    RolloutDeviceRow,
    RolloutRow,
    RunRow,
    TaskRow,
)
from fedspine_server.settings import RunSettings
from fedspine_server.state import DeviceState, RunState

BOARDS = (
    ("NVIDIA Jetson TX2", "32.7.4", 8 << 30, 21.0, 9.1),
    ("NVIDIA Jetson Xavier NX", "35.4.1", 8 << 30, 13.0, 11.6),
    ("NVIDIA Jetson AGX Xavier", "35.4.1", 32 << 30, 7.0, 19.8),
    ("NVIDIA Jetson Orin Nano", "36.3.0", 8 << 30, 9.5, 10.4),
)
NAMES = ("tx2", "xavier-nx", "agx", "orin-nano")
LAYERS, HEADS, FFN = 12, 12, 1536
CLOSED, ROUNDS = 41, 60
RUN_ID = "support-questions"
BASE = "5e" * 32
ROW = {"num_examples": 400, "memory_bytes": 8 << 30, "base_sha256": BASE, "boot_id": "b" * 32, "link_version": 1}


def fill(hub: Hub, num_devices: int = 40, seed: int = 7) -> None:
    """Puts the fleet and its run on record."""
    chance, now = random.Random(seed), hub.clock()
    names = [f"{NAMES[i % 4]}-{i // 4 + 1:02d}" for i in range(num_devices)]
    state = _state(names, chance)
    sha256 = hub.keep_state(state)
    with hub.database.write() as session:
        session.add(_run_row(state, sha256, now))
        session.flush()
        for i, name in enumerate(names):
            _, l4t, memory, _, watts = BOARDS[i % 4]
            facts = {"board": BOARDS[i % 4][0], "l4t": l4t, "memory_bytes": memory, "cores": 6, "version": "0.1.0"}
            silent, hot = i == 17, i == 8
            seen = now - (412 if silent else chance.uniform(0, 8))
            work = {"step": chance.randint(6, 20), "num_steps": 24, "round_index": CLOSED, "at": seen, "attempt": 1}
            sample = {
                "temperature_celsius": 88.5 if hot else chance.uniform(44, 66),
                "power_watts": watts * chance.uniform(0.9, 1.1),
                "throttled_by": ["cpu-therm"] if hot else [],
                "clock_ratio": 0.71 if hot else 1.0,
                "memory_available_bytes": int(memory * chance.uniform(0.25, 0.5)),
            }
            row = dict(ROW, num_examples=200 + 13 * i, enrolled_at=now - 9000, last_seen_at=seen)
            session.add(
                DeviceRow(
                    device_id=name, secret_sha256="0" * 64, status=ACCEPTED, facts=facts, sample=sample | work, **row
                )
            )
        session.flush()
        for i, name in enumerate(names):
            session.add(_task(name, state.open_choices[name], DONE if i % 3 == 1 and i != 17 else LEASED, now))
        facts = {"board": "NVIDIA Jetson Orin NX", "l4t": "36.3.0", "memory_bytes": 16 << 30}
        row = dict(ROW, num_examples=0, boot_id="", enrolled_at=now - 40, last_seen_at=now - 3)
        session.add(
            DeviceRow(device_id="orin-nx-01", secret_sha256="1" * 64, status=PENDING, facts=facts, sample={}, **row)
        )
        _events(hub, session, names)


def roll_out(hub: Hub, seed: int = 7) -> None:
    """Puts two rollouts on record: one that is over, and a second that some boards have and one refused."""
    chance, now = random.Random(seed), hub.clock()
    gate = "ppl<=1.05*base and tokens_per_second>=0.9*base"
    with hub.database.write() as session:
        names = list(session.scalars(select(DeviceRow.device_id).where(DeviceRow.status == ACCEPTED)))
        for number, (file, mebibytes) in enumerate(
            (("support-q8_0.gguf", 138), ("support-pruned30-q8_0.gguf", 101)), 1
        ):
            row = {"name": file, "num_bytes": mebibytes << 20, "added_at": now - 90000 / number}
            session.add(ModelRow(sha256=f"{number}a" * 32, **row))
            session.add(
                RolloutRow(
                    rollout_id=number, status=("finished", "rolling")[number - 1], model_sha256=f"{number}a" * 32,
                    model_name=file, model_bytes=mebibytes << 20, created_at=now - 88000 / number**4, detail="",
                    gate={"text": gate if number > 1 else "ppl<=24", "conditions": to_json(parse(gate))},
                    targets={"canaries": names[1:3], "devices": None},
                )
            )  # fmt: skip
            session.flush()
            for i, name in enumerate(names):
                if i != 17 and (number == 1 or i < 30):
                    session.add(_rollout_device(number, name, i, now, chance))


def _rollout_device(number: int, name: str, i: int, now: float, chance: random.Random) -> RolloutDeviceRow:
    speed = (9.4, 14.2, 31.0, 22.5)[i % 4] * chance.uniform(0.97, 1.03)
    last = number == 2
    state = (
        {24: "failed", 27: "checking", 28: "downloading", 29: "downloading"}.get(i, "committed")
        if last
        else "committed"
    )
    base = {
        "ppl": 21.3,
        "tokens_per_second": speed,
        "prompt_tokens_per_second": 9 * speed,
        "peak_memory_bytes": 2 << 27,
    }
    faster = 0.84 if state == "failed" else 1.34
    own = {"ppl": 22.0, "tokens_per_second": faster * speed, "prompt_tokens_per_second": 11 * speed}
    reason = f"tokens_per_second>=0.9*base: {faster * speed:.4g}, limit {0.9 * speed:.4g}" if state == "failed" else ""
    measured = state in ("committed", "failed")
    report = {
        "reason": reason,
        "figures": (own if last else base) if measured else None, "base": base if last and measured else None,
        "current": f"{2 if last and state == 'committed' else 1}a" * 32, "received_bytes": (30 + i) << 20,
    }  # fmt: skip
    return RolloutDeviceRow(rollout_id=number, device_id=name, state=state, report=report, reported_at=now - 100 + i)


def go_on(hub: Hub, count: int, turn: int) -> None:
    """Lets some devices report progress, as each does every ten seconds."""
    with hub.database.write() as session:
        names = list(session.scalars(select(DeviceRow.device_id).where(DeviceRow.status == ACCEPTED)))
        for i in range(count):
            device = session.get_one(DeviceRow, names[(turn * count + i) % len(names)])
            step = device.sample["step"] % 24 + 1
            device.sample = {**device.sample, "step": step, "at": hub.clock()}
            device.last_seen_at = hub.clock()


def _events(hub: Hub, session: Any, names: list[str]) -> None:
    hub.record(session, "round_closed", run_id=RUN_ID, round_index=CLOSED - 1, merged=names[2:], loss_after=0.61)
    hub.record(session, "round_opened", run_id=RUN_ID, round_index=CLOSED, devices=len(names))
    for name in names[1::3][:7]:
        hub.record(
            session,
            "result_kept",
            run_id=RUN_ID,
            device_id=name,
            round_index=CLOSED,
            attempt=1,
            staleness=0,
            detail=None,
        )
    hub.record(session, "device_enrolled", device_id="orin-nx-01", board="NVIDIA Jetson Orin NX")


def _run_row(state: RunState, sha256: str, now: float) -> RunRow:
    options = {"min_devices": 1, "present_seconds": 120.0, "round_timeout_seconds": 3600.0, "max_staleness": 1}
    return RunRow(
        run_id=RUN_ID, status=RUNNING, recipe={"classes": ["a", "b"], "prompt": None}, experiment={},
        options={**options, "timings": None}, base_sha256=BASE, state_sha256=sha256, adapter_sha256="ad" * 32,
        round_index=CLOSED, rounds=ROUNDS, created_at=now - 1400, opened_at=now - 9, closing_at=None, detail="",
    )  # fmt: skip


def _task(name: str, choice: Choice, status: str, now: float) -> TaskRow:
    spec = {"pruning_ratio": choice.pruning_ratio, "rank": choice.rank, "num_steps": 24, "seed": 0, "message_bytes": 1}
    return TaskRow(
        task_id=f"{abs(hash(name)):032x}"[:32], run_id=RUN_ID, round_index=CLOSED, device_id=name, status=status,
        attempt=1, spec={**spec, "deadline_seconds": 3500.0}, blob_sha256="0" * 64, blob_bytes=1, max_update_bytes=1,
        created_at=now - 9, lease_until=now + 1e6,
    )  # fmt: skip


def _state(names: list[str], chance: random.Random) -> RunState:
    groups = [Group(f"layers.{i}.heads", "heads", HEADS, 1, 12) for i in range(LAYERS)]
    groups += [Group(f"layers.{i}.ffn", "ffn", FFN, 32, 12) for i in range(LAYERS)]
    matrices = [Matrix(f"layers.{i}.q", HEADS, 4, f"layers.{i}.heads", None) for i in range(LAYERS)]
    matrices += [Matrix(f"layers.{i}.up", FFN, 4, f"layers.{i}.ffn", None) for i in range(LAYERS)]
    layout = Layout(BASE, tuple(groups), tuple(matrices), ())
    settings = RunSettings(rounds=ROUNDS, ranks=(4, 8, 16), target_sparsity=0.5)
    state = coordinator.init(settings, layout, {})
    importance = {
        group.name: np.random.default_rng(len(group.name) + i).random(group.num_members)
        for i, group in enumerate(groups)
    }
    devices = {name: DeviceState(name, 400, 8 << 30, kept=_kept(groups, importance, chance)) for name in names}
    history = tuple(_record(t, names, chance) for t in range(CLOSED))
    start = 0.0
    for record in history:
        record["virtual_start_seconds"], record["virtual_end_seconds"] = start, start + record["virtual_end_seconds"]
        start = record["virtual_end_seconds"]
    choices = {
        d["device_id"]: Choice(d["device_id"], d["pruning_ratio"], d["rank"], 24, d["reason"])
        for d in history[-1]["devices"]
    }
    return dataclasses.replace(
        state,
        run_id=RUN_ID,
        round_index=CLOSED,
        clock_seconds=start,
        devices=devices,
        open_choices=choices,
        history=history,
    )


def _kept(groups: list[Group], importance: dict[str, np.ndarray], chance: random.Random) -> dict[str, np.ndarray]:
    kept = {}
    for group in groups:
        layer = int(group.name.split(".")[1])
        share = min(1.0, 0.95 - 0.045 * layer * chance.uniform(0.9, 1.1))
        noise = np.random.default_rng(chance.randrange(1 << 30)).normal(0, 0.06, group.num_members)
        best = np.argsort(-(importance[group.name] + noise))[: max(1, round(share * group.num_members))]
        kept[group.name] = np.sort(best).astype(np.int32)
    return kept


def _record(t: int, names: list[str], chance: random.Random) -> dict[str, Any]:
    schedule = 0.5 * (1 - (1 - min(1.0, t / 45)) ** 3)
    devices = [_device(i, name, t, schedule, chance) for i, name in enumerate(names)]
    length = max(
        d["compute_seconds"] + d["upload_seconds"] + d["download_seconds"] for d in devices if d["state"] == "merged"
    )
    for device in devices:
        spent = device["compute_seconds"] + device["upload_seconds"] + device["download_seconds"]
        device["waiting_seconds"] = max(0.0, length - spent) if device["state"] == "merged" else 0.0
    return {
        "round_index": t, "virtual_start_seconds": 0.0, "virtual_end_seconds": length,
        "deadline_seconds": round(length * 0.96, 1),
        "schedule_ratio": schedule, "loss_before": 0.62 + 1.6 * math.exp(-t / 11), "accuracy": None, "late": [],
        "loss_after": 0.58 + 1.5 * math.exp(-t / 11) + chance.uniform(-0.02, 0.03),
        "num_merged": sum(d["state"] == "merged" for d in devices), "devices": devices,
    }  # fmt: skip


def _device(i: int, name: str, t: int, schedule: float, chance: random.Random) -> dict[str, Any]:
    board, _, _, usual, _ = BOARDS[i % 4]
    lost, hot = i == 17 and t > CLOSED - 4, i == 8 and t > CLOSED - 6
    luck = chance.random()
    state = "dropped" if lost or luck < 0.006 else "late" if luck < 0.018 else "rejected" if luck < 0.02 else "merged"
    ratio = max(0.0, min(0.7, schedule * (1.3, 1.05, 0.7, 0.9)[i % 4]))
    seconds = usual * (1 - 0.55 * ratio) * chance.uniform(0.92, 1.08) * (1.9 if hot else 1.0)
    detail = {"dropped": "no answer", "late": f"arrived {chance.uniform(1, 6):.1f} s after the round's end"}.get(state)
    detail = "expected finite values in lora_a/layers.3.q, found NaN or Inf" if state == "rejected" else detail
    gone = state == "dropped"
    return {
        "device_id": name, "board": board, "power_mode": "MAXN", "pruning_ratio": round(ratio, 3),
        "rank": (8, 8, 16, 16)[i % 4],
        "num_steps": 24,
        "reason": f"{seconds:.1f} s expected of {usual + 2:.1f} s, gain {chance.uniform(1, 3):.2f}, {t} rounds known",
        "compute_seconds": 0.0 if gone else seconds, "download_seconds": 0.0 if gone else chance.uniform(0.4, 1.4),
        "upload_seconds": 0.0 if gone else chance.uniform(0.5, 2.0), "waiting_seconds": 0.0, "download_bytes": 910_000,
        "upload_bytes": 0 if gone else 720_000, "state": state, "detail": detail, "loss_before": None if gone else 1.2,
        "loss_after": None if gone else 0.6 + 1.5 * math.exp(-t / 11), "num_examples": 200 + 13 * i,
        "reward": None if gone else chance.uniform(0.3, 0.7),
    }  # fmt: skip
