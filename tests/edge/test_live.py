from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from fedspine_edge.live import LiveView, sparkline, table_view
from fedspine_edge.progress import Progress, advance, duration, seconds_left

STEPS = {"num_steps": 40, "reason": "best ratio within 1m30s"}


def asked(name: str, board: str = "TX2") -> dict[str, Any]:
    return {"device_id": name, "board": board, "pruning_ratio": 0.2, "rank": 8, **STEPS}


def done(name: str, state: str = "merged", **changes: object) -> dict[str, Any]:
    times = {"download_seconds": 1.0, "compute_seconds": 80.0, "upload_seconds": 2.0, "waiting_seconds": 5.0}
    return {
        **asked(name),
        **times,
        "state": state,
        "detail": "",
        "loss_before": 0.7,
        "loss_after": 0.65,
        **changes,
    }


def round_start(index: int = 0, names: tuple[str, ...] = ("a", "b"), rounds: int = 4) -> dict[str, Any]:
    return {
        "kind": "round_start",
        "round_index": index,
        "rounds": rounds,
        "virtual_seconds": 100.0 * index,
        "deadline_seconds": 90.0,
        "devices": [asked(name) for name in names],
    }


def round_end(index: int = 0, accuracy: float | None = 0.612, **states: str) -> dict[str, Any]:
    devices = [done(name, state) for name, state in (states or {"a": "merged", "b": "late"}).items()]
    return {
        "kind": "round_end",
        "record": {
            "round_index": index,
            "virtual_end_seconds": 100.0 * (index + 1) + 25,
            "accuracy": accuracy,
            "loss_before": 0.693,
            "loss_after": 0.65,
            "num_merged": sum(device["state"] == "merged" for device in devices),
            "devices": devices,
        },
    }


def phase(text: str, done: int = 0, total: int | None = None) -> dict[str, Any]:
    return {"kind": "phase", "text": text, "total": total, "done": done}


def plain(*events: Mapping[str, Any], quiet: bool = False) -> str:
    out = io.StringIO()
    clock = iter(float(second) for second in range(100))
    with LiveView(Console(file=out, width=80), quiet=quiet, clock=lambda: next(clock)) as view:
        for event in events:
            view.handle(event)
    return out.getvalue()


def drawn(*events: Mapping[str, Any], width: int = 80, height: int = 24) -> str:
    progress = Progress()
    for second, event in enumerate(events):
        progress = advance(progress, event, now=float(second))
    console = Console(file=io.StringIO(), width=width, height=height, record=True, force_terminal=True)
    view = table_view(progress, width=width, height=height, now=float(len(events)), wall_seconds=75.0)
    console.print(view)
    return console.export_text()


def test_a_pipe_gets_one_line_for_each_phase_and_each_round() -> None:
    text = plain(
        phase("loading"),
        phase("evaluating", 0, 2),
        phase("evaluating", 1, 2),
        phase("evaluating", 2, 2),
        round_start(),
        {"kind": "device", **done("a", "tuning")},
        {"kind": "device", **done("a")},
        round_end(),
    )
    assert text == (
        "loading\n"
        "evaluating (0/2)\n"
        "evaluating (2/2)\n"
        "round 1/4: accuracy 61.2%, loss 0.693 -> 0.650, merged 1/2 (1 late), virtual 2m05s, wall 8.0s\n"
    )


def test_a_round_without_accuracy_or_losses_says_so() -> None:
    event = round_end(1, None, a="dropped", b="away", c="rejected")
    event["record"].update(loss_before=None, loss_after=float("nan"))
    line = "round 2/4: loss - -> -, merged 0/3 (1 dropped, 1 rejected, 1 away), virtual 3m45s, wall 2.0s\n"
    assert plain(round_start(1), event) == line


def test_quiet_prints_nothing() -> None:
    assert plain(phase("loading"), round_start(), round_end(), quiet=True) == ""


def test_plain_lines_carry_no_control_characters() -> None:
    text = plain(phase("loading \x1b[31m\nred\u202e"))
    assert text == "loading  [31m red \n"


def test_forced_colour_does_not_turn_a_pipe_into_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert plain(phase("loading")) == "loading\n"


def test_the_view_writes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView() as view:
        view.handle(phase("loading"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "loading\n"


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an event of kind phase, round_start, device or round_end"):
        plain({"kind": "party"})


def test_the_table_at_eighty_columns() -> None:
    text = drawn(
        round_start(),
        {"kind": "device", **asked("a"), "state": "tuning"},
        {"kind": "device", **done("a")},
        {"kind": "device", **asked("b", "Xavier NX"), "state": "tuning"},
    )
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines == [
        "round 1 of 4",
        "virtual 0.0s   deadline 1m30s   wall 1m15s",
        "",
        "device   board   pruned   rank    time   loss            state",
        "───────────────────────────────────────────────────────────────",
        "a        TX2        20%      8   1m23s   0.700 → 0.650   merged",
        "b        NX         20%      8       -   -               tuning",
        "why b: best ratio within 1m30s",
    ]


def test_a_wide_table_has_a_column_for_the_reason() -> None:
    text = drawn(round_start(), {"kind": "device", **done("b", "dropped", detail="link lost")}, width=120)
    assert "why the controller chose" in text
    assert "best ratio within 1m30s" in text
    assert "dropped   link lost" in text
    assert "why b" not in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 30), (140, 40), (60, 16)])
@pytest.mark.parametrize("num_devices", [1, 7, 80])
def test_the_view_fits_the_terminal(width: int, height: int, num_devices: int) -> None:
    names = tuple(f"agx-xavier-of-a-long-name-{i}" for i in range(num_devices))
    text = drawn(
        round_start(0, names),
        {"kind": "device", **done(names[0], reason="x" * 300)},
        round_end(0, 0.5, **dict.fromkeys(names, "merged")),
        round_start(1, names),
        {"kind": "device", **done(names[-1], "tuning", reason="y" * 300)},
        phase("z" * 200, 1, 3),
        width=width,
        height=height,
    )
    lines = text.splitlines()
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width


def test_devices_that_need_a_look_come_first_when_there_is_no_room() -> None:
    names = tuple(f"d{i}" for i in range(80))
    text = drawn(
        round_start(0, names),
        *({"kind": "device", **done(name)} for name in names[:40]),
        {"kind": "device", **done("d3", "late")},
        {"kind": "device", **done("d60", "tuning")},
        height=14,
    )
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("d") and line[1].isdigit()]
    assert shown == ["d3", "d36", "d37", "d38", "d39", "d60"]
    assert "and 35 merged, 39 queued" in text


def test_the_header_shows_accuracy_with_its_course_and_the_time_left() -> None:
    text = drawn(
        round_start(0),
        round_end(0, 0.5),
        round_start(1),
        round_end(1, 0.7),
        round_start(2),
    )
    assert "round 3 of 4   accuracy 70.0%   ▁█  from 50.0%" in text
    assert "about 1.0s left" in text


def test_a_running_phase_shows_how_far_it_is() -> None:
    text = drawn(phase("exporting", 2, 6))
    assert "starting" in text
    assert "exporting" in text
    assert "2/6" in text


def test_a_state_the_view_does_not_know_is_shown_as_it_is() -> None:
    assert "resting" in drawn(round_start(), {"kind": "device", **done("a", "resting")})


def test_names_cannot_move_the_cursor_nor_style_the_table() -> None:
    text = drawn(round_start(0, ("\x1b[2Jevil", "[red]bold[/red]")))
    assert "\x1b" not in text
    assert " [2Jevil" in text
    assert "[red]bold[/red]" in text


def test_a_terminal_is_redrawn_in_place_and_left_with_the_last_state() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True, color_system=None)
    with LiveView(console, interactive=True) as view:
        view.handle(round_start())
        view.handle(round_end())
    assert "61.2%" in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    with LiveView(Console(file=out, width=80, height=24, force_terminal=True), interactive=True) as view:
        view.handle(round_end())
    assert "\x1b[3" not in out.getvalue()


def test_a_resumed_run_estimates_from_its_own_rounds() -> None:
    progress = advance(Progress(), round_start(10, rounds=13), now=100.0)
    assert seconds_left(progress, now=105.0) is None
    progress = advance(progress, round_end(10), now=110.0)
    assert seconds_left(progress, now=110.0) == 20.0
    assert seconds_left(progress, now=114.0) == 16.0
    assert seconds_left(progress, now=500.0) == 0.0


def test_a_second_run_starts_its_estimate_and_its_course_anew() -> None:
    progress = advance(Progress(), round_start(0, rounds=2), now=0.0)
    progress = advance(progress, round_end(0), now=50.0)
    progress = advance(progress, round_start(0, rounds=2), now=60.0)
    assert progress.accuracies == ()
    assert seconds_left(progress, now=65.0) is None
    progress = advance(progress, round_end(0), now=70.0)
    assert seconds_left(progress, now=70.0) == 10.0


@pytest.mark.parametrize(("value", "text"), [(8.44, "8.4s"), (59.97, "1m00s"), (125.0, "2m05s"), (11220.0, "3h07m")])
def test_durations_are_short(value: float, text: str) -> None:
    assert duration(value) == text


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline((0.0, 0.5, 1.0), 8) == "▁▅█"
    assert sparkline((9.0, 0.0, 1.0), 2) == "▁█"
    assert sparkline((0.5, 0.5), 8) == "▄▄"
    assert sparkline((0.5,), 8) == ""
