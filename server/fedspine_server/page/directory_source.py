"""The page's content from a run's directory: a simulation that goes on or is over, or a run that was fetched.

Comes in: a directory as `fedspine simulate` writes it. Goes out: a `Source` that cannot be written to. Files are read
again when they change; one that is being replaced or is damaged shows what was there before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from fedspine_edge.errors import CheckpointError
from fedspine_server import store
from fedspine_server.page.story import Record, Story
from fedspine_server.page.structure import groups_of
from fedspine_server.page.views import SILENT, WAITING, WORKING, Device, Fleet, Group, Run

LIVE_FILE = "live.json"
LIVE_SECONDS = 15.0  # a simulation that wrote nothing for so long is not there any more
LATE_STATES = ("rejected", "dropped", "late")


class DirectorySource:
    """A run's directory.

    Args:
        directory: With `rounds.jsonl`, and what else there is.
        clock: Seconds since 1970.
    """

    writable = False

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory.resolve()
        self._clock = clock
        self._read: dict[str, tuple[Hashable, Any]] = {}

    def stamp(self) -> Hashable:
        """Returns what changes with every file of the run."""
        names = ("rounds.jsonl", LIVE_FILE, "summary.json")
        return tuple(self._mark(name) for name in names), bool(self._live())

    def fleet(self) -> Fleet:
        """Returns the run and its devices at this moment."""
        now, live = self._clock(), self._live()
        rounds = self._parsed("rounds.jsonl", _rounds, ())
        summary = self._parsed("summary.json", json.loads, {})
        noted = {int(index): seconds for index, seconds in self._noted().get("wall", {}).items()}
        story = self._story(rounds, tuple(noted.get(index) for index in range(len(rounds))))
        run = self._run(story, summary, live)
        asked: Mapping[str, Any] = live.get("devices", {}) if live else {}
        names = sorted({*story.by_device, *asked})
        return Fleet(now, tuple(_device(name, run, asked.get(name, {})) for name in names), (run,))

    def structure(self, run_id: str) -> tuple[Group, ...]:
        """Returns what is left of each layer, from the newest saved state."""
        folder = self._directory / "state"
        key = tuple(sorted(path.name for path in folder.glob("round-*.safetensors"))) if folder.is_dir() else ()
        known = self._read.get("structure")
        if known is None or known[0] != key:
            try:
                known = (key, groups_of(store.load(folder)))
            except (CheckpointError, ValueError, KeyError):
                known = (key, ())
            self._read["structure"] = known
        return known[1]

    def file(self, run_id: str, name: str) -> Path | None:
        """Returns an exported file that the summary names, or one of the run's own records."""
        summary = self._parsed("summary.json", json.loads, {})
        allowed = {"rounds.jsonl", "summary.json", *(export["path"] for export in summary.get("exports") or ())}
        for candidate in (self._directory / name, self._directory / "models" / name):
            if name in allowed and candidate.is_file() and self._directory in candidate.resolve().parents:
                return candidate
        return None

    def _run(self, story: Story, summary: Mapping[str, Any], live: Mapping[str, Any]) -> Run:
        asked = self._parsed("experiment.json", json.loads, {}).get("experiment", {}).get("run", {})
        rounds = summary.get("rounds") or self._noted().get("rounds") or asked.get("rounds") or len(story.rounds)
        over = bool(summary) and not live
        deadline = live.get("deadline_seconds")
        last = story.rounds[-1] if story.rounds else {}
        states = [device.get("state") for device in live.get("devices", {}).values()]
        return Run(
            run_id=self._directory.name,
            status="finished" if over else "running" if live else "stopped",
            round_index=len(story.rounds),
            rounds=rounds,
            story=story,
            asked=len(states),
            answered=sum(state not in ("queued", "tuning") for state in states),
            controller=summary.get("controller") or asked.get("controller") or "structured",
            target_sparsity=summary.get("target_sparsity", asked.get("target_sparsity", 0.0)),
            schedule_ratio=last.get("schedule_ratio"),
            simulated=True,
            detail=f"round planned for {deadline:.0f} virtual seconds" if deadline else "",
            phase=live.get("phase", ""),
            summary=summary,
        )

    def _story(self, rounds: tuple[Record, ...], wall: tuple[float | None, ...]) -> Story:
        known = self._read.get("story")
        key = (self._mark("rounds.jsonl"), wall)
        if known is None or known[0] != key:
            known = (key, Story(rounds, wall))
            self._read["story"] = known
        return known[1]

    def _live(self) -> Mapping[str, Any]:
        noted = self._noted()
        return noted if noted and not noted.get("over") and self._clock() - noted["at"] < LIVE_SECONDS else {}

    def _noted(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._parsed(LIVE_FILE, json.loads, {})
        return found

    def _mark(self, name: str) -> Hashable:
        try:
            found = (self._directory / name).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    def _parsed(self, name: str, parse: Callable[[str], Any], empty: Any) -> Any:
        mark, known = self._mark(name), self._read.get(name)
        if mark is None:
            return empty
        if known is None or known[0] != mark:
            try:
                known = (mark, parse((self._directory / name).read_text(encoding="utf-8")))
            except (OSError, ValueError):
                return known[1] if known else empty
            self._read[name] = known
        return known[1]


def _rounds(text: str) -> tuple[Record, ...]:
    return tuple(json.loads(line) for line in text.splitlines() if line.strip())


def _device(name: str, run: Run, asked: Mapping[str, Any]) -> Device:
    last = run.story.last(name)
    now = asked or last or {}
    state = asked.get("state", "")
    known = run.story.by_device.get(name, [None])[-1]
    away = not asked and (known is None or known["state"] == "away")
    trouble = now if now.get("state") in LATE_STATES else {}
    return Device(
        device_id=name,
        condition=WORKING if state == "tuning" else SILENT if away else WAITING,
        board=now.get("board") or "",
        pruning_ratio=now.get("pruning_ratio"),
        rank=now.get("rank"),
        reason=now.get("reason") or "",
        run_id=run.run_id,
        marks=run.story.marks(name),
        last_state=(last or {}).get("state", ""),
        problem=f"{trouble['state']}: {trouble.get('detail') or 'no answer'}" if trouble else "",
        num_examples=(last or {}).get("num_examples", 0),
    )
