"""`page`, `simulate --page`, `top` and the reports: what they say, and that a simulation tells its page where it is."""

import io
import json
import urllib.request

import pytest
from page_world import long_run
from rich.console import Console
from test_report import write_run

from fedspine_edge.commands.page import Feed, open_page
from fedspine_edge.commands.top import show, view
from fedspine_edge.errors import LinkError, UsageError
from fedspine_edge.profiling.comparison import Metric
from fedspine_edge.profiling.intervals import Estimate
from fedspine_edge.progress import Progress, advance
from fedspine_edge.report import markdown_report
from fedspine_edge.report.comparison import comparison_page
from fedspine_server.page.directory_source import DirectorySource

DEVICE = {
    "device_id": "a", "board": "TX2", "condition": "working", "seen_at": 90.0, "step": 3, "num_steps": 8,
    "pruning_ratio": 0.25, "rank": 8, "temperature_celsius": 61.0, "memory_available_bytes": 4 << 30,
    "throttled_by": [], "marks": [{"state": "merged", "share": 1.0}], "problem": "", "reason": "first",
}  # fmt: skip
ANSWERS = [{"question": q, "answer": f"answer {q}", "because": "so", "level": "good"} for q in "abcde"]


def overview(*devices, **run):
    shown = {
        "run_id": "mine",
        "status": "running",
        "round_index": 3,
        "rounds": 9,
        "losses": [2.0, 1.0],
        "accuracies": [],
    }
    diagnosis = {"level": "good", "answers": ANSWERS, "findings": []}
    return {"now": 100.0, "run": shown | run, "devices": list(devices), "diagnosis": diagnosis}


def printed(width, *devices, height=40):
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    try:
        console.print(view(overview(*devices), width=width, height=height))
        return console.export_text()
    finally:
        console.file.close()


def test_top_has_the_run_the_answers_and_every_device_with_its_figures():
    text = printed(130, DEVICE)
    for words in ("mine  running  round 3 of 9", "answer c", "10.0s", "3/8", "25% r8", "61°C", "4.3 GB", "first"):
        assert words in text


def test_top_shows_who_needs_a_look_first_and_says_how_many_do_not_fit():
    devices = [{**DEVICE, "device_id": f"d{i:02d}"} for i in range(40)] + [
        {**DEVICE, "device_id": "z", "condition": "silent"}
    ]
    text = printed(100, *devices, height=24)
    assert text.index(" silent") < text.index("d00")
    assert "more" in text
    assert len(text.splitlines()) <= 24


def test_top_tells_a_rollout_while_it_matters():
    rollout = {"rollout_id": 4, "model": "m.gguf", "counts": {"waiting": 3}}
    told = {**overview(DEVICE), "rollout": rollout}
    for status, detail, words in (
        ("canary", "", "rollout 4  canary  m.gguf  3 waiting"),
        ("stopped", "no canary is left", "rollout 4  stopped  m.gguf  3 waiting  no canary is left"),
        ("awaiting", "finished but for 3 that are away", "rollout 4  finished but for 3 that are away  m.gguf"),
        ("finished", "", ""),
    ):
        console = Console(width=130, file=io.StringIO(), record=True)
        console.print(view({**told, "rollout": {**rollout, "status": status, "detail": detail}}, width=130, height=20))
        text = console.export_text()
        assert words in text
        assert len(text.splitlines()) <= 20
        assert ("rollout" in text) == bool(words)


def test_top_prints_once_where_there_is_no_terminal_and_a_name_cannot_move_the_cursor(tmp_path):
    with (tmp_path / "out").open("w") as file:
        show(
            lambda: overview({**DEVICE, "board": "a\x1b[2Jb"}),
            once=True,
            every=1,
            console=Console(file=file, width=120),
        )
    assert "\x1b" not in (tmp_path / "out").read_text()


def test_a_page_over_a_directory_answers_and_over_anything_else_is_refused(tmp_path):
    long_run(tmp_path / "mine", 2, 3)
    url = open_page(tmp_path / "mine", 0)
    with urllib.request.urlopen(url, timeout=10) as reply:
        assert b"jetson-02" in reply.read()
    with pytest.raises(LinkError, match=r"cannot listen on 127\.0\.0\.1"):
        open_page(tmp_path / "mine", int(url.rsplit(":", 1)[1].strip("/")))
    with pytest.raises(UsageError, match="expected a run in"):
        open_page(tmp_path, 0)


def test_a_simulation_tells_its_page_who_tunes_and_when_rounds_ended_on_the_wall(tmp_path):
    record = long_run(tmp_path, 1, 2)[0]
    feed = Feed(tmp_path)
    try:
        start = {"kind": "round_start", "round_index": 0, "rounds": 4, "virtual_seconds": 0.0, "deadline_seconds": 9.0}
        asked = {
            "device_id": "jetson-00",
            "board": "TX2",
            "pruning_ratio": 0.1,
            "rank": 4,
            "num_steps": 2,
            "reason": "x",
        }
        progress = advance(Progress(), {**start, "devices": [asked]}, now=0.0)
        feed.follow(progress)
        run = DirectorySource(tmp_path).fleet().current
        assert (run.status, run.rounds, run.asked, run.answered) == ("running", 4, 1, 0)
        feed.follow(advance(progress, {"kind": "round_end", "record": record}, now=1.0))
    finally:
        feed.close()
    run = DirectorySource(tmp_path).fleet().current
    assert run.status == "stopped"
    assert len(run.story.wall) == 1
    assert run.story.wall[0] >= 0
    assert json.loads((tmp_path / "live.json").read_text())["over"]


def test_the_markdown_report_has_the_figures_and_no_markup_of_a_name(tmp_path):
    write_run(tmp_path, data="[x](http://elsewhere) <b>")
    text = markdown_report(tmp_path)
    assert "| pruned is |" in text
    assert "accuracy kept" in text
    assert r"\[x\](http://elsewhere) \<b\>" in text


@pytest.mark.parametrize(
    ("ratio", "trusted", "better"),
    [
        (Estimate(1.5, 1.4, 1.6), True, True),
        (Estimate(3.0, 0.1, 90.0), True, False),  # no clear difference
        (Estimate(1.5, 1.4, 1.6), False, False),  # other programs were at work
        (Estimate(0.5, 0.4, 0.6), True, False),
        (Estimate(1.5, None, None), True, True),  # counted, not sampled
    ],
)
def test_only_what_is_clearly_better_is_shown_as_better(ratio, trusted, better):
    metric = Metric("prompt t/s", ("faster", "slower"), True, (100.0, 150.0), (None, ratio), 0, trusted)
    assert ('class="better"' in comparison_page([metric], ["a", "b"], [])) == better


def test_the_page_of_a_comparison_has_every_figure_and_escapes_names():
    metric = Metric("prompt t/s", ("faster", "slower"), True, (100.0, 150.0), (None, None), 0)
    page = comparison_page([metric], ["dense.gguf", "<script>x</script>"], ["six runs"])
    assert "150" in page
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
