"""`fedspine top`: the fleet at a glance in a terminal; the page's answers in the page's words.

Comes in: the server's overview. Goes out: a view redrawn in place, or printed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedspine_edge.commands.rollout import standing
from fedspine_edge.errors import LinkError
from fedspine_edge.live import sparkline
from fedspine_edge.progress import duration, printable

STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "note": "dim"}
CONDITIONS = {
    "working": "cyan",
    "waiting": "green",
    "paused": "yellow",
    "silent": "dim",
    "pending": "yellow",
    "revoked": "dim strike",
}
ROLLOUTS = {"canary": "cyan", "rolling": "cyan", "awaiting": "dim", "stopped": "yellow"}
URGENT = ("pending", "silent", "paused")
SHORT = ("health", "slow", "model", "chosen", "next")  # the five questions of the diagnosis, in its order
FIXED_LINES = 12
WIDE = 110
MARKS = {"merged": ("▪", "cyan"), "late": ("▪", "yellow"), "dropped": ("▪", "red"), "rejected": ("▪", "magenta")}


def show(look: Callable[[], Any], *, once: bool, every: float, console: Console | None = None) -> None:
    """Shows what `look` returns until Ctrl-C.

    Args:
        look: Asks the server for its overview.
        once: Whether to print one view and end.
        every: Seconds between two looks.
        console: Where to draw; stdout when None.
    """
    console = console or Console()
    if once or not console.is_terminal:
        console.print(view(look(), width=console.width, height=1000))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_looked(look, console), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        return


def _looked(look: Callable[[], Any], console: Console) -> RenderableType:
    try:
        return view(look(), width=console.width, height=console.height)
    except LinkError as error:  # it may come back; what was there is not shown as if it were now
        return Text(f"no word from the server: {error}", style="red")


def view(overview: Mapping[str, Any], *, width: int, height: int) -> RenderableType:
    """Returns the whole view, at most `height` lines of `width` columns."""
    answers, findings = overview["diagnosis"]["answers"], overview["diagnosis"]["findings"]
    room = max(1, height - FIXED_LINES - min(3, len(findings)) - len(_rollout(overview.get("rollout"))))
    return Group(
        _run(overview["run"], width),
        *_rollout(overview.get("rollout")),
        _answers(answers),
        Text(),
        _devices(overview, width=width, room=room),
        *(_line(f"{f['title']}: {f['why']}", STYLES[f["level"]]) for f in findings[:3]),
    )


def _line(words: str, style: str = "") -> Text:
    return Text(printable(words), style=style, no_wrap=True, overflow="ellipsis")


def _run(run: Mapping[str, Any] | None, width: int) -> Text:
    if run is None:
        return _line("no run", "dim")
    text = _line(f"{run['run_id']}  {run['status']}  round {run['round_index']} of {run['rounds']}", "bold")
    values = run["accuracies"] or run["losses"]
    if len(values) > 1:
        text.append(f"  {'accuracy' if run['accuracies'] else 'loss'} ", style="not bold")
        text.append(sparkline(tuple(values), max(8, min(40, width - 70))), style="cyan")
        text.append(f" {values[-1]:.3f}")
    return text


def _rollout(rollout: Mapping[str, Any] | None) -> list[Text]:
    """Returns the newest rollout's line while it matters: under way, stopped, or over but for who is away."""
    if rollout is None or rollout["status"] not in ROLLOUTS:
        return []
    told = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in sorted(rollout["counts"].items()))
    status, why = standing(rollout)
    words = f"rollout {rollout['rollout_id']}  {status}  {rollout['model']}  {told}  {why}"
    return [_line(words.rstrip(), ROLLOUTS[rollout["status"]])]


def _answers(answers: list[Mapping[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for width in (6, 30):
        table.add_column(no_wrap=True, overflow="ellipsis", min_width=width)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for answer, short in zip(answers, SHORT, strict=True):
        said = _line(answer["answer"], STYLES[answer["level"]] if answer["level"] != "note" else "bold")
        table.add_row(_line(short, "dim"), said, _line(answer["because"], "dim"))
    return table


def _devices(overview: Mapping[str, Any], *, width: int, room: int) -> RenderableType:
    wide, now = width >= WIDE, overview["now"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, expand=True)
    columns = ["device", "board", "state", "seen", "step", "asked", "temp", "free"]
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=20)
    table.add_column("last rounds", no_wrap=True)
    if wide:
        table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1)
    devices = sorted(
        (device for device in overview["devices"] if device["condition"] != "revoked"),
        key=lambda d: (d["condition"] not in URGENT, not d["problem"], d["device_id"]),
    )
    for device in devices[:room]:
        table.add_row(*_cells(device, now, wide=wide))
    hidden = len(devices) - room
    return Group(table, _line(f"and {hidden} more", "dim")) if hidden > 0 else table


def _cells(device: Mapping[str, Any], now: float, *, wide: bool) -> list[Text]:
    seen, celsius, free = device["seen_at"], device["temperature_celsius"], device["memory_available_bytes"]
    ratio, rank = device["pruning_ratio"], device["rank"]
    marks = Text()
    for mark in device["marks"][-12:]:
        marks.append(*MARKS.get(mark["state"], ("·", "dim")))
    style = "dim" if device["condition"] == "silent" else ""
    cells = [
        _line(device["device_id"], style),
        _line(device["board"], style),
        _line(device["condition"], CONDITIONS.get(device["condition"], "")),
        _line("-" if seen is None else duration(max(0.0, now - seen)), style),
        _line(f"{device['step']}/{device['num_steps']}" if device["num_steps"] else "-", style),
        _line("-" if ratio is None else f"{100 * ratio:.0f}% r{rank}", style),
        _line("-" if celsius is None else f"{celsius:.0f}°C", "yellow" if device["throttled_by"] else style),
        _line("-" if free is None else f"{free / 1e9:.1f} GB", style),
        marks,
    ]
    return (
        [*cells, _line(device["problem"] or device["reason"], "yellow" if device["problem"] else "dim")]
        if wide
        else cells
    )
