from __future__ import annotations

import itertools
import json
import math
import re
from html import unescape as html_unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.errors import CheckpointError
from fedspine_edge.report import wording, write_report
from fedspine_edge.report.curves import spread_labels, time_ticks, value_ticks
from fedspine_edge.report.fleet import timelines
from fedspine_edge.report.page import render
from fedspine_edge.report.records import read_run

BOARDS = ("TX2", "Xavier NX", "AGX Xavier")
SPEED_OF = {"TX2": 1.0, "Xavier NX": 0.55, "AGX Xavier": 0.25}


def device_record(index: int, round_index: int, *, num_devices: int, state: str, ratio: float) -> dict[str, Any]:
    board = BOARDS[min(2, 3 * index // max(1, num_devices))]
    rank = (2, 4, 8, 16, 32, 64)[(index + round_index) % 6]
    present = state != "away"
    compute = 100 * SPEED_OF[board] * (0.22 + 0.78 * (1 - ratio)) * (1 + 0.1 * ((3 * index + round_index) % 4))
    compute *= 2.2 if state == "late" else 0.4 if state == "dropped" else 1.0
    done = state in ("merged", "late", "rejected")
    return {
        "device_id": f"{board.lower().replace(' ', '-')}-{index}",
        "board": board,
        "power_mode": index % 3,
        "pruning_ratio": ratio,
        "rank": rank,
        "num_steps": 40,
        "reason": f"ratio {ratio:.2f} and rank {rank} promise the most within the deadline: 0.71 ± 0.05 from 12 pulls",
        "compute_seconds": compute if present else 0.0,
        "download_seconds": 1.5 + rank / 16 if present else 0.0,
        "upload_seconds": 2.5 + rank / 8 if done else 0.0,
        "waiting_seconds": 0.0,
        "download_bytes": 300_000 if present else 0,
        "upload_bytes": 250_000 if done else 0,
        "state": state,
        "detail": {"late": "arrived 31 s after the deadline", "dropped": "link lost"}.get(state, ""),
        "loss_before": 0.69 - 0.03 * round_index if done else None,
        "loss_after": 0.65 - 0.03 * round_index if done else None,
        "num_examples": 100 + 7 * index,
        "reward": 0.4 + 0.01 * index if state == "merged" else None,
    }


def round_records(num_devices: int = 8, num_rounds: int = 8, *, dense: bool = False) -> list[dict[str, Any]]:
    """Rounds with a late device in round 3, a dropped one in round 5, and one that joins in round 3."""
    start, records = 0.0, []
    for t in range(num_rounds):
        schedule = 0.0 if dense else 0.3 * (1 - (1 - min(1.0, t / max(1, num_rounds - 2))) ** 3)
        devices = []
        for i in range(num_devices):
            state = "merged"
            if not dense and num_devices > 3:
                if i == num_devices - 1 and t < 2:
                    state = "away"
                elif (t, i) == (2, 0):
                    state = "late"
                elif (t, i) == (4, 3):
                    state = "dropped"
            ratio = 0.0 if dense else min(0.7, max(0.0, schedule + 0.05 * ((i + t) % 3 - 1)))
            devices.append(device_record(i, t, num_devices=num_devices, state=state, ratio=ratio))
        busy = {d["device_id"]: d["download_seconds"] + d["compute_seconds"] + d["upload_seconds"] for d in devices}
        length = max(busy[d["device_id"]] for d in devices if d["state"] == "merged")
        for d in devices:
            if d["state"] == "merged":
                d["waiting_seconds"] = length - busy[d["device_id"]]
        records.append(
            {
                "round_index": t,
                "virtual_start_seconds": start,
                "virtual_end_seconds": start + length,
                "deadline_seconds": None if dense else length * 1.03,
                "schedule_ratio": schedule,
                "loss_before": 0.69 - 0.03 * t,
                "loss_after": 0.66 - 0.03 * t,
                "accuracy": 0.82 - 0.3 * math.exp(-0.5 * (t + 1)) - (0 if dense else 0.012),
                "num_merged": sum(d["state"] == "merged" for d in devices),
                "devices": devices,
            }
        )
        start += length
    return records


def spread(median: float) -> dict[str, float]:
    return {"median": median, "min": 0.97 * median, "max": 1.02 * median}


def export(path: str, quant: str, size_bytes: int, *, dense: bool) -> dict[str, Any]:
    return {
        "path": path,
        "format": "gguf",
        "quant": quant,
        "size_bytes": size_bytes,
        "max_abs_dlogit": 0.0123,
        "top1_agreement": 0.996,
        "mean_kl": 0.00021,
        "accuracy": 0.82 if dense else 0.8075,
        "dense": dense,
    }


def speed(path: str, quant: str, size_bytes: int, *, dense: bool) -> dict[str, Any]:
    return {
        "path": path,
        "dense": dense,
        "quant": quant,
        "size_bytes": size_bytes,
        "prompt_tokens_per_second": spread(400.0 if dense else 592.0),
        "generation_tokens_per_second": spread(100.0 if dense else 142.0),
        "ttft_seconds": 0.64 if dense else 0.43,
        "peak_memory_bytes": 410_000_000 if dense else 320_000_000,
    }


def summary_record(rounds: list[dict[str, Any]], dense_rounds: list[dict[str, Any]]) -> dict[str, Any]:
    files = (
        ("dense-f16.gguf", "F16", 269_000_000, True),
        ("pruned-f16.gguf", "F16", 197_000_000, False),
        ("dense-q8_0.gguf", "Q8_0", 143_000_000, True),
        ("pruned-q8_0.gguf", "Q8_0", 105_000_000, False),
    )
    return {
        "format": 1,
        "name": "smol-demo",
        "preset": "quick",
        "model": "SmolLM-135M",
        "model_parameters": 134_515_008,
        "data": "sst2-small",
        "num_examples": 1964,
        "num_classes": 2,
        "num_held_out": 400,
        "num_devices": len(rounds[0]["devices"]),
        "rounds": len(rounds),
        "seed": 7,
        "controller": "structured",
        "aggregation": "spine",
        "accuracy": 0.8075,
        "accuracy_torch": 0.81,
        "accuracy_dense_tuned": 0.82,
        "accuracy_untuned": 0.505,
        "sparsity": 0.298,
        "target_sparsity": 0.3,
        "parameters_dense": 134_515_008,
        "parameters_pruned": 102_903_000,
        "virtual_seconds": rounds[-1]["virtual_end_seconds"],
        "virtual_seconds_dense": dense_rounds[-1]["virtual_end_seconds"] if dense_rounds else None,
        "wall_seconds": 187.3,
        "peak_rss_bytes": 1_910_000_000,
        "adapter_sha256": "ab" * 32,
        "transfer_bytes": {"down": 19_200_000, "up": 15_900_000},
        "exports": [export(p, q, s, dense=d) for p, q, s, d in files],
        "speedup": {"prompt": 1.48, "generation": 1.42},
        "speed": [speed(p, q, s, dense=d) for p, q, s, d in files],
        "layers": [
            {"layer": i, "heads_kept": 2 if i % 3 else 3, "heads": 3, "ffn_kept": 1536 - 64 * (i % 9), "ffn": 1536}
            for i in range(30)
        ],
        "examples": [
            {"prompt": "Review: a quiet triumph of a film.\nSentiment:", "expected": "positive", "answer": "positive"},
            {"prompt": "Review: two hours I want back.\nSentiment:", "expected": "negative", "answer": "positive"},
        ],
        "llama_cli": "llama-cli -m pruned-q8_0.gguf -no-cnv -n 4 -p 'Review: a quiet triumph of a film.\nSentiment:'",
        "machine": {"cpu": "Example CPU @ 2.5 GHz", "cores": 2, "memory_bytes": 8_000_000_000},
    }


def write_run(
    run_dir: Path, *, num_devices: int = 8, num_rounds: int = 8, dense: bool = True, **changes: object
) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    rounds = round_records(num_devices, num_rounds)
    dense_rounds = round_records(num_devices, num_rounds, dense=True) if dense else []
    (run_dir / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rounds))
    if dense:
        (run_dir / "rounds_dense.jsonl").write_text("".join(json.dumps(record) + "\n" for record in dense_rounds))
    (run_dir / "summary.json").write_text(json.dumps({**summary_record(rounds, dense_rounds), **changes}))
    return run_dir


def edit_rounds(run_dir: Path, **device_changes: object) -> None:
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        record["devices"][0].update(device_changes)
    (run_dir / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


ENCODER: dict[str, object] = {"exports": [], "speed": None, "speedup": None, "llama_cli": None, "examples": []}


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "input", "br", "line", "polyline"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.loads.append(value or "")
            if name == "title":
                self.titles.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(write_run(tmp_path_factory.mktemp("run"))).read_text())


def test_the_report_lies_beside_its_inputs_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "demo"))
    assert path == tmp_path / "demo" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "report.html",
        "rounds.jsonl",
        "rounds_dense.jsonl",
        "summary.json",
    ]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


@pytest.mark.parametrize(
    "figure",
    [
        "80.8 % accuracy kept of 400 held-out examples right, by the exported file (95 %: ±3.9).",
        "Tuned without pruning: 82.0 % (−1.2 points). Before tuning: 50.5 %.",
        "23.5 % smaller of all parameters gone: 135 M → 103 M.",
        "29.8 % are really gone (asked for: 30 %).",
        "1.42× generation speed",
        "Reading a prompt: 1.48×.",
        "15 min 04 s to train virtual time for 8 rounds on 8 devices.",
        "Simulated here in 3 min 07 s.",
        "All 1 964 training examples stayed in their devices' shares.",
        "19.2 MB to the devices, 15.9 MB back.",
    ],
)
def test_each_headline_says_its_figure_in_words(page: Page, figure: str) -> None:
    assert figure in page.text


@pytest.mark.parametrize(
    "line",
    [
        "File size 143 MB 105 MB 1.36× smaller",
        "Generation tokens a second, median (range) 100 (97.0–102) 142 (138–145) 1.42× faster",
        "First token time to it 0.64 s 0.43 s 1.49× sooner",
        "Memory peak 410 MB 320 MB 1.28× less",
        "Accuracy of the file 82.0 % 80.8 % −1.2 points",
        "Same top token file against its model in memory 99.6 % 99.6 %",
        "Divergence mean KL, nats a token 0.00021 0.00021",
        "Logit difference largest 0.012 0.012",
        "Unpruned: dense-q8_0.gguf . Pruned: pruned-q8_0.gguf .",
    ],
)
def test_the_tables_set_pruned_against_unpruned(page: Page, line: str) -> None:
    assert line in page.text


def test_files_of_another_format_do_not_mix_with_the_models(tmp_path: Path) -> None:
    rounds = round_records()
    exports = summary_record(rounds, [])["exports"]
    adapter = {**export("adapter.gguf", "F16", 9_000_000, dense=False), "format": "adapter", "accuracy": None}
    adapter.update(top1_agreement=None, mean_kl=None, max_abs_dlogit=None)
    mixed = Page(write_report(write_run(tmp_path, exports=[*exports, adapter])).read_text())
    assert "gguf F16 unpruned pruned pruned is File size 269 MB 197 MB" in mixed.text
    assert "adapter F16 pruned File size 9 MB Pruned: adapter.gguf" in mixed.text


def test_every_device_and_its_reason_are_named(page: Page) -> None:
    for device in round_records()[-1]["devices"]:
        assert device["device_id"] in page.text
        assert device["reason"] in page.text
        assert any(title.startswith(f"{device['device_id']} (") for title in page.titles)


def test_late_dropped_and_absent_devices_are_marked(page: Page) -> None:
    assert "tx2-0, round 3: late, arrived 31 s after the deadline" in page.titles
    assert "xavier-nx-3, round 5: dropped, link lost" in page.titles
    assert "agx-xavier-7, round 1: away" in page.titles
    assert "Round 3 took 1 min 43 s, 7 of 8 updates merged, accuracy 74.1 %" in page.text
    assert "deadline 1 min 46 s" in page.text


def test_the_report_is_honest_about_what_is_simulated(page: Page) -> None:
    assert "Virtual seconds come from a device model" in page.text
    assert "Nothing here has run on a board." in page.text


def test_the_command_to_try_is_shown_exactly(tmp_path: Path) -> None:
    command = """llama-cli -m 'a b.gguf' -p "x < y && z"\nnext line"""
    html = write_report(write_run(tmp_path, llama_cli=command)).read_text()
    shown = re.search(r'<pre id="command">(.*?)</pre>', html, re.DOTALL)
    assert shown is not None
    assert html_unescape(shown[1]) == command


def test_nothing_is_loaded_from_anywhere(page: Page, tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path)).read_text()
    assert sorted(set(page.loads)) == ["#method", "data:,"]
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    attack = """"><script>alert(1)</script><img src=x onerror='alert(2)'>"""
    run_dir = write_run(
        tmp_path,
        name=attack,
        model=attack,
        data=attack,
        llama_cli=attack,
        controller=attack,
        examples=[{"prompt": attack, "expected": attack, "answer": attack}],
    )
    edit_rounds(run_dir, device_id=attack, board=attack, reason=attack, power_mode=attack, detail=attack)
    hostile = Page(write_report(run_dir).read_text())
    assert hostile.tags.count("script") == 1
    assert "img" not in hostile.tags
    assert hostile.text.count(attack) > 10


def test_an_encoder_without_exports_gets_a_report_without_speeds(tmp_path: Path) -> None:
    encoder = Page(write_report(write_run(tmp_path, **ENCODER)).read_text())
    assert "by the pruned model" in encoder.text
    assert "No file was exported" in encoder.text
    assert "generation speed" not in encoder.text
    assert "Try it" not in encoder.text
    assert "Examples" not in encoder.text


def test_one_device_and_one_round_without_a_reference_run(tmp_path: Path) -> None:
    single = Page(write_report(write_run(tmp_path, num_devices=1, num_rounds=1, dense=False)).read_text())
    assert "by 1 simulated device in 1 round" in single.text
    assert "There was no unpruned reference run to compare with." in single.text
    assert "1 of 1 update merged" in single.text


def test_rounds_without_accuracy_show_the_loss(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, dense=False, accuracy_untuned=None, accuracy=None, accuracy_torch=None)
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    lines = [json.dumps({**record, "accuracy": None}) for record in records]
    (run_dir / "rounds.jsonl").write_text("\n".join(lines))
    language = Page(write_report(run_dir).read_text())
    assert "Training loss over virtual time" in language.text
    assert "pruned 0.450" in language.text
    assert "accuracy kept" not in language.text


def test_a_fleet_in_which_nobody_came_back_still_has_a_report(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, num_devices=1, num_rounds=1, dense=False)
    gone = {"loss_before": None, "loss_after": math.nan, "reward": None, "state": "rejected", "detail": "NaN in update"}
    edit_rounds(run_dir, **gone, compute_seconds=0.0, download_seconds=0.0, upload_seconds=0.0)
    lost = Page(write_report(run_dir).read_text())
    assert "rejected (R): update failed a check" in lost.text
    assert any("NaN in update" in title for title in lost.titles)


def test_thirty_rounds_of_sixteen_devices_stay_below_a_megabyte(tmp_path: Path) -> None:
    assert write_report(write_run(tmp_path, num_devices=16, num_rounds=30)).stat().st_size < 1_000_000


def test_a_large_fleet_draws_an_even_selection_of_rounds_and_says_so(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, num_devices=80, num_rounds=40, dense=False))
    numbers = [line.number for line in timelines(run.rounds)]
    assert len(numbers) == 15
    assert (numbers[0], numbers[-1]) == (1, 40)
    large = Page(render(run))
    assert "15 of the 40 rounds are drawn" in large.text
    assert "Xavier NX ×27" in large.text


def test_neighbouring_layers_that_keep_the_same_share_a_line(tmp_path: Path) -> None:
    layers = [{"layer": i, "heads_kept": 2, "heads": 3, "ffn_kept": 1024, "ffn": 1536} for i in range(4)]
    uniform = Page(write_report(write_run(tmp_path, layers=layers)).read_text())
    assert "0–3 2 of 3 1024 of 1536" in uniform.text


def test_the_time_to_the_common_target_is_compared(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    records[1]["accuracy"] = 0.9
    (run_dir / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    quick = Page(write_report(run_dir).read_text())
    assert "The pruned run reached 99 % of the unpruned run's final accuracy (80.6 %) after 4 min 24 s" in quick.text
    assert "the unpruned run after 15 min 39 s: 3.56× sooner." in quick.text


@pytest.mark.parametrize("name", ["summary.json", "rounds.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path) / name).unlink()
    with pytest.raises(CheckpointError, match=rf"expected a readable {name} in .*No such file"):
        write_report(tmp_path)


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:100]]))
    with pytest.raises(CheckpointError, match=r"^rounds\.jsonl line 3: invalid JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "asleep"}, r"line 1: devices\.0\.state: input should be 'merged', 'late'"),
        ({"compute_seconds": -1.0}, r"devices\.0\.compute_seconds: input should be greater than or equal to 0"),
        ({"compute_seconds": math.nan}, r"devices\.0\.compute_seconds: input should be a finite number"),
        ({"pruning_ratio": 30}, r"devices\.0\.pruning_ratio: input should be less than or equal to 1"),
        ({"rank": "8"}, r"devices\.0\.rank: input should be a valid integer"),
    ],
)
def test_an_impossible_value_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    run_dir = write_run(tmp_path)
    edit_rounds(run_dir, **change)
    with pytest.raises(CheckpointError, match=message):
        write_report(run_dir)


def test_rounds_out_of_order_are_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[1]]))
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl line 2: round_index 1 follows 1"):
        write_report(tmp_path)


def test_a_run_without_rounds_is_refused(tmp_path: Path) -> None:
    (write_run(tmp_path) / "rounds.jsonl").write_text("\n")
    with pytest.raises(CheckpointError, match="expected at least one round, found an empty file"):
        write_report(tmp_path)


def test_a_summary_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^summary\.json: format: input should be 1"):
        write_report(write_run(tmp_path, format=2))


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (write_run(tmp_path) / "report.html").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.html"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.42, "0.42 s"), (7.46, "7.5 s"), (59.97, "1 min 00 s"), (125, "2 min 05 s"), (11220, "3 h 07 min"), (None, "–")],
)
def test_durations_read_as_people_say_them(value: float | None, text: str) -> None:
    assert wording.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(812, "812 B"), (4096, "4.1 kB"), (999_600, "1 MB"), (1.25e9, "1.25 GB")])
def test_sizes_use_powers_of_a_thousand(value: float, text: str) -> None:
    assert wording.data_size(value) == text


def test_a_comparison_says_which_way_it_went() -> None:
    assert wording.comparison(100.0, 142.0, ("faster", "slower", True)) == "1.42× faster"
    assert wording.comparison(142.0, 100.0, ("faster", "slower", True)) == "1.42× slower"
    assert wording.comparison(200.0, 100.0, ("smaller", "larger", False)) == "2.00× smaller"
    assert wording.comparison(100.0, 100.2, ("faster", "slower", True)) == "the same"
    assert wording.comparison(None, 1.0, ("faster", "slower", True)) == "–"


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_value_ticks_enclose_their_data(low: float, span: float) -> None:
    ticks = value_ticks(low, low + span)
    slack = 1e-6 * max(1.0, abs(low) + span)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 8


@given(st.floats(1e-3, 1e8))
def test_time_ticks_stay_on_the_axis(end: float) -> None:
    ticks = time_ticks(end)
    assert ticks[0].at == 0
    assert ticks[-1].at <= 100 + 1e-9
    assert len(ticks) <= 6


@given(st.lists(st.floats(0, 100), min_size=1, max_size=4))
def test_spread_labels_keep_apart_and_on_the_plot(wanted: list[float]) -> None:
    places = sorted(spread_labels(wanted, 9))
    assert places[-1] <= 100 + 1e-9
    assert all(b - a >= 9 - 1e-9 for a, b in itertools.pairwise(places))
