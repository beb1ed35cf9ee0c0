"""What a person sees while a run goes on: a table redrawn in place on a terminal, plain lines anywhere else.

In: events, dicts as `LiveView.handle` lists them. Out: text on stderr only, so that stdout stays free for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedspine_edge.progress import Progress, advance, duration, loss, percent, plain_line, printable, seconds_left

WIDE = 100
FIXED_LINES = 8
SPARKS = "▁▂▃▄▅▆▇█"
SHORT_BOARDS = {"Xavier NX": "NX", "AGX Xavier": "AGX"}
STATE_STYLES = {
    "tuning": "cyan",
    "late": "yellow",
    "dropped": "red",
    "rejected": "magenta",
    "merged": "green",
    "queued": "dim",
    "away": "dim",
}
TROUBLE = ("late", "dropped", "rejected")
URGENCY = tuple(STATE_STYLES)


def table_view(progress: Progress, *, width: int, height: int, now: float, wall_seconds: float) -> RenderableType:
    """Returns the whole view, at most `height` lines of `width` columns.

    Args:
        progress: What to draw.
        width: Columns of the terminal.
        height: Lines of the terminal.
        now: Clock reading, seconds, for the estimate of the time left.
        wall_seconds: Since the view was opened.
    """
    parts: list[RenderableType] = [_header(progress, width=width, now=now, wall_seconds=wall_seconds)]
    if progress.phase:
        parts.append(_phase(progress, width))
    if progress.devices:
        room = max(1, height - FIXED_LINES - bool(progress.phase))
        parts.append(Text())
        parts.append(_devices(progress, width=width, room=room))
        reason = _why(progress.devices.get(progress.latest, {}))
        if reason and width < WIDE:
            parts.append(_one_line(f"why {progress.latest}: {reason}", "dim"))
    return Group(*parts)


def sparkline(values: tuple[float, ...], width: int) -> str:
    """Returns the last `width` values as bars between their lowest and their highest."""
    shown = values[-width:]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return SPARKS[3] * len(shown)
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in shown)


def _header(progress: Progress, *, width: int, now: float, wall_seconds: float) -> RenderableType:
    top, times = Text(no_wrap=True, overflow="ellipsis"), Text(no_wrap=True, overflow="ellipsis", style="dim")
    if progress.round_index is None:
        top.append("starting", style="bold")
    else:
        top.append(f"round {progress.round_index + 1} of {progress.rounds}", style="bold")
    if progress.accuracies:
        top.append("   accuracy ")
        top.append(percent(progress.accuracies[-1]), style="bold")
        if len(progress.accuracies) > 1:
            top.append("   ")
            top.append(sparkline(progress.accuracies, max(8, width - 55)), style="cyan")
            top.append(f"  from {percent(progress.accuracies[0])}", style="dim")
    times.append(f"virtual {duration(progress.virtual_seconds)}")
    if progress.deadline_seconds is not None:
        times.append(f"   deadline {duration(progress.deadline_seconds)}")
    times.append(f"   wall {duration(wall_seconds)}")
    left = seconds_left(progress, now=now)
    if left is not None and progress.rounds_done < progress.rounds:
        times.append(f"   about {duration(left)} left")
    return Group(top, times)


def _phase(progress: Progress, width: int) -> RenderableType:
    if not progress.phase_total:
        return _one_line(progress.phase, "cyan")
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(
        total=progress.phase_total, completed=progress.phase_done, width=max(8, width // 4), complete_style="cyan"
    )
    count = Text(f"{progress.phase_done}/{progress.phase_total}")
    row.add_row(_one_line(progress.phase[: width // 2], "cyan"), bar, count)
    return row


def _devices(progress: Progress, *, width: int, room: int) -> RenderableType:
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, expand=wide)
    for name, justify in (
        ("device", "left"),
        ("board", "left"),
        ("pruned", "right"),
        ("rank", "right"),
        ("time", "right"),
        ("loss", "left"),
        ("state", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True, max_width=16)  # type: ignore[arg-type]
    if wide:
        table.add_column("why the controller chose", no_wrap=True, overflow="ellipsis", ratio=1)
    shown, hidden = _fitting(progress.devices, room)
    for device in shown:
        table.add_row(*_cells(device, wide=wide))
    return Group(table, _one_line(f"and {hidden}", "dim")) if hidden else table


def _fitting(devices: Mapping[str, Mapping[str, Any]], room: int) -> tuple[list[Mapping[str, Any]], str]:
    """Returns the most urgent devices that fit, the last of equals, in their own order, and what the others do."""
    latest_first = list(devices.values())[::-1]
    urgent = sorted(latest_first, key=lambda device: _urgency(device["state"]))
    names = {device["device_id"] for device in urgent[:room]}
    hidden = [device["state"] for device in urgent[room:]]
    counts = [f"{hidden.count(state)} {printable(state)}" for state in sorted(set(hidden), key=_urgency)]
    return [device for name, device in devices.items() if name in names], ", ".join(counts)


def _urgency(state: str) -> int:
    return URGENCY.index(state) if state in URGENCY else 0


def _cells(device: Mapping[str, Any], *, wide: bool) -> list[Text]:
    state, board = device["state"], device["board"]
    parts = [device.get(f"{part}_seconds") or 0.0 for part in ("download", "compute", "upload")]
    losses = [device.get("loss_before"), device.get("loss_after")]
    return [
        _one_line(device["device_id"]),
        _one_line(board if wide else SHORT_BOARDS.get(board, board)),
        Text(f"{100 * device['pruning_ratio']:.0f}%"),
        Text(str(device["rank"])),
        Text(duration(sum(parts)) if any(parts) else "-"),
        Text("-" if losses == [None, None] else f"{loss(losses[0])} → {loss(losses[1])}"),
        _one_line(state, STATE_STYLES.get(state, "")),
        *([_one_line(_why(device), "dim")] if wide else []),
    ]


def _why(device: Mapping[str, Any]) -> str:
    """Returns what went wrong with a device where something did, else why the controller chose its assignment."""
    trouble = device.get("detail") if device.get("state") in TROUBLE else None
    return str(trouble or device.get("reason") or "")


def _one_line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=True, overflow="ellipsis")


class LiveView:
    """Shows the events of a run on stderr; a context manager.

    Args:
        console: Where to draw; stderr by default.
        quiet: Show nothing.
        interactive: Redraw in place; by default on a terminal that can, with an encoding that has the signs.
        clock: Monotonic seconds.
        follow: Called with the progress after each event.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        follow: Callable[[Progress], None] | None = None,
    ) -> None:
        self._follow = follow
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._clock = clock
        self._opened = clock()
        self._progress = Progress()
        self._live: Live | None = None
        if not quiet and (_can_redraw(self._console) if interactive is None else interactive):
            self._live = Live(
                get_renderable=self._draw, console=self._console, redirect_stdout=False, refresh_per_second=4
            )

    def __enter__(self) -> LiveView:
        self._opened = self._clock()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def handle(self, event: Mapping[str, Any]) -> None:
        """Takes one event.

        Args:
            event: By its `kind`: `phase` (text, total or None, done); `round_start` (round_index, rounds,
                virtual_seconds, deadline_seconds or None, devices with device_id, board, pruning_ratio, rank,
                num_steps, reason); `device` (a device's record, state `tuning` when it has begun); `round_end`
                (record, the round's record).

        Raises:
            ValueError: The event is of no known kind.
        """
        before, now = self._progress, self._clock()
        self._progress = advance(before, event, now=now)
        if self._follow is not None:
            self._follow(self._progress)
        if self._quiet or self._live is not None:
            return
        line = plain_line(before, self._progress, event, wall_seconds=now - self._opened)
        if line is not None:
            self._console.file.write(line + "\n")
            self._console.file.flush()

    def _draw(self) -> RenderableType:
        now, size = self._clock(), self._console.size
        return table_view(
            self._progress, width=size.width, height=size.height, now=now, wall_seconds=now - self._opened
        )


def _can_redraw(console: Console) -> bool:
    capable = console.is_terminal and console.file.isatty() and not console.is_dumb_terminal
    return capable and console.encoding.startswith("utf")
