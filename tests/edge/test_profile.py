"""`fedspine profile` and `compare`: figures, intervals, gates, tables, and whole runs of tiny models in real runtimes.

No assertion depends on how fast the machine is.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from boards import plant
from export_models import DENSE, PER_LAYER, load_decoder, save_decoder
from tiny import questions
from typer.testing import CliRunner

from fedspine_edge.cli_profile import commands
from fedspine_edge.commands.compare import PASSAGE
from fedspine_edge.commands.evaluate import evaluate
from fedspine_edge.commands.profile import Wanted
from fedspine_edge.commands.sweep import sweep
from fedspine_edge.errors import CheckpointError, IncompatibleError, InterruptedRunError, UsageError, VerificationError
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.verify import llama_logits
from fedspine_edge.profiling import bench_table, comparison, figures
from fedspine_edge.profiling.bench import Options, Row, Trial, measure
from fedspine_edge.profiling.child import Child, open_child
from fedspine_edge.profiling.comparison import Metric, Subject
from fedspine_edge.profiling.gates import failures, parse_gate
from fedspine_edge.profiling.intervals import (
    Estimate,
    mean_interval,
    percentile,
    percentile_interval,
    ratio_interval,
    speed_interval,
    student_t,
)
from fedspine_edge.profiling.memory import Memory, PeakMemory, highest, process_memory
from fedspine_edge.profiling.noise import CpuTimes, Quiet, QuietWatch, cpu_times
from fedspine_edge.profiling.plot import Point, pareto_front, pareto_svg
from fedspine_edge.profiling.power_modes import current_mode
from fedspine_edge.profiling.runtimes import backend_of
from fedspine_edge.profiling.self_test import write_tiny_onnx
from fedspine_edge.profiling.watch import BoardWatch

CALM = Quiet(9.0, 2, others_cores=0.01, steal_share=0.0, clock_kept=1.0, held_back=(), spread=0.01)
SMALL = ["-p", "12", "-n", "5", "-r", "2", "-t", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense and a pruned tiny decoder: as directories, and as GGUF files."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, widths in (("dense", DENSE), ("pruned", PER_LAYER)):
        found[f"{name}-dir"] = save_decoder(folder / name, "llama", widths)
        found[name] = write_gguf(found[f"{name}-dir"], folder / f"{name}.gguf", quantization="F16", name=name).path
    return found


class SteadyMeter:
    """Seven watts, always."""

    source, counts_joules = "ina3221", False

    def read(self) -> float:
        return 7.0


def measured(paths: list[Path], options: Options, meter: Any = None) -> list[Row]:
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(BoardWatch(meter))
        children = [opened(stack, path, options.num_context) for path in paths]
        return measure(children, options, watch)


def opened(stack: contextlib.ExitStack, path: Path, num_context: int = 16) -> Child:
    return open_child(stack, path, num_context=num_context, num_threads=1, num_batch=8)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(commands, [*map(str, arguments)])


# Intervals


def test_a_mean_has_student_s_interval() -> None:
    # Deviation 1, t(2) = 4.303, 4.303 / sqrt(3) = 2.4843.
    found = mean_interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, -0.4843, 4.4843), abs=1e-4)
    assert speed_interval([1.0, 2.0, 3.0]).low == 0.0
    assert mean_interval([5.0]) == Estimate(5.0, None, None)


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.706), (15, 2.131), (16, 2.120), (29, 2.045), (120, 1.980)])
def test_student_s_t_is_that_of_the_tables(degrees: int, value: float) -> None:
    assert student_t(degrees) == pytest.approx(value, abs=1e-3)


def test_a_percentile_lies_on_the_line_between_its_neighbours() -> None:
    assert percentile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert percentile([7.0], 0.99) == 7.0


@pytest.mark.parametrize(
    ("count", "share", "low", "high"),
    [
        # 2 * 2^-5 = 6 % of misses with five samples, 3 % with six.
        (5, 0.5, None, None),
        (6, 0.5, 0.0, 5.0),
        # Tables of the binomial: ranks 2 and 9 of ten.
        (10, 0.5, 1.0, 8.0),
        # The largest is below the percentile in 0.95^71 = 2.62 %, 0.95^72 = 2.49 %, 0.99^368 = 2.48 % of cases.
        (2, 0.99, 0.99, None),
        (71, 0.95, 62.0, None),
        (72, 0.95, 63.0, 71.0),
        (367, 0.99, 358.0, None),
        (368, 0.99, 359.0, 367.0),
    ],
)
def test_a_percentile_is_bounded_by_samples_when_there_are_enough(
    count: int, share: float, low: float | None, high: float | None
) -> None:
    found = percentile_interval([float(value) for value in range(count)], share)
    assert (found.low, found.high) == (low, high)


def test_the_interval_of_a_percentile_holds_it_in_95_of_100_cases() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(400):
        found = percentile_interval(generator.exponential(size=100).tolist(), 0.9)
        held += found.low is not None and found.high is not None and found.low <= math.log(10) <= found.high
    assert 0.93 < held / 400 <= 1.0


def test_a_ratio_pairs_neighbours_in_time() -> None:
    # The machine halves its speed in the second run: the ratio does not notice.
    assert ratio_interval([150.0, 75.0], [100.0, 50.0]) == pytest.approx((1.5, 1.5, 1.5))
    # The geometric mean of 2 and 1/2 is 1.
    assert ratio_interval([2.0, 1.0], [1.0, 2.0]).value == pytest.approx(1.0)


# Noise


def test_a_calm_machine_is_trusted() -> None:
    assert CALM.reasons() == ()
    assert dataclasses.replace(CALM, others_cores=None, steal_share=None, clock_kept=None, spread=None).reasons() == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"others_cores": 0.93}, "other programs used 0.93 of 2 cores (limit 0.20)"),
        ({"steal_share": 0.05}, "the host took 5.0% of the CPU time"),
        ({"clock_kept": 0.5}, "the CPU clock fell to 50% of its highest"),
        ({"held_back": ("cpufreq-cpu0",)}, "held back by cpufreq-cpu0"),
        ({"spread": 0.2}, "the runs differ by 20.0% of their mean"),
        ({"seconds": 0.02}, "the runs took 0.02 s together, too short to judge"),
    ],
)
def test_every_disturbance_is_a_reason(change: dict[str, Any], words: str) -> None:
    (reason,) = dataclasses.replace(CALM, **change).reasons()
    assert words in reason


def test_what_others_used_is_what_the_machine_did_beyond_our_own() -> None:
    watch = QuietWatch(cores=2)
    watch.add(CpuTimes(10.0, 1.0), CpuTimes(13.0, 1.2), seconds=2.0, own_seconds=2.0)
    watch.add(CpuTimes(20.0, 2.0), CpuTimes(24.0, 2.0), seconds=2.0, own_seconds=3.0)
    quiet = watch.quiet(clock_kept=None, held_back=(), spread=None)
    assert (quiet.seconds, quiet.others_cores) == (4.0, pytest.approx(0.5))
    assert quiet.steal_share == pytest.approx(0.2 / 8)
    watch.add(None, CpuTimes(1.0, 1.0), seconds=1.0, own_seconds=1.0)
    assert watch.quiet(clock_kept=None, held_back=(), spread=None).others_cores is None


def test_cpu_times_come_from_the_kernel_or_not_at_all(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  100 20 30 999 5 1 2 40 0 0\ncpu0 1 1 1 1 1 1 1 1\n")
    assert cpu_times(tmp_path) == pytest.approx(CpuTimes(153 / tick, 40 / tick))
    for garbage in ("", "cpu 1 2", "cpu  a b c d e f g h", "intr 1 2 3 4 5 6 7 8 9"):
        (tmp_path / "proc/stat").write_text(garbage)
        assert cpu_times(tmp_path) is None


# Memory


def test_this_process_has_a_memory_and_a_process_that_ended_has_none() -> None:
    memory = process_memory(os.getpid())
    assert memory.rss_bytes is not None
    assert memory.rss_bytes > 1 << 20
    assert process_memory(2**30) == Memory()
    assert highest(Memory(1, None, 5), Memory(2, None, 4)) == Memory(2, None, 5)


def test_a_peak_is_seen_though_it_is_over() -> None:
    before = process_memory(os.getpid()).rss_bytes
    with PeakMemory(os.getpid()) as memory:
        np.ones(64 << 20, dtype=np.uint8).sum()
    assert before is not None
    assert memory.peak.rss_bytes is not None
    assert memory.peak.rss_bytes > before + (48 << 20)


def test_a_kernel_without_smaps_tells_less(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/status").write_text("Name:\tx\nVmHWM:\t 300 kB\nVmRSS:\t 200 kB\nRssAnon:\t 50 kB\nbroken\n")
    assert process_memory(7, tmp_path) == Memory(200 << 10, None, 50 << 10)


# Gates


def test_a_gate_is_a_figure_a_sign_and_a_number() -> None:
    gate = parse_gate(" itl_p95_ms > 120 ", ["itl_p95_ms"])
    assert str(gate) == "itl_p95_ms>120"
    rows = {"a tg8": {"itl_p95_ms": 121.5}, "a pp8": {"itl_p95_ms": None}, "b tg8": {"itl_p95_ms": 119.0}}
    assert failures(gate, rows) == ["a tg8: itl_p95_ms is 121.5 (itl_p95_ms>120)"]
    assert failures(gate, {"b": {"itl_p95_ms": 120.0}}) == []
    assert failures(parse_gate("itl_p95_ms>=120", ["itl_p95_ms"]), {"b": {"itl_p95_ms": 120.0}}) != []
    assert failures(gate, {"b": {"itl_p95_ms": math.nan}}) != []


def test_a_figure_nobody_measured_fails_its_gate() -> None:
    (line,) = failures(parse_gate("power_avg_w>5", ["power_avg_w"]), {"a": {"power_avg_w": None}})
    assert line == "power_avg_w was not measured, so power_avg_w>5 cannot be ruled out"


@pytest.mark.parametrize("text", ["", "itl_p95_ms", "itl_p95_ms=3", "itl_p95_ms>fast", "itl_p95_ms>nan", "speed>3"])
def test_a_gate_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text, ["itl_p95_ms"])
    assert caught.value.hint


# Options


def test_options_are_llama_bench_s() -> None:
    wanted = Wanted(prompts="64,512", generates="0", pairs=("16,8",), batches="32", threads="1,2", repetitions=3)
    first, second = wanted.options()
    assert [trial.name for trial in first.tests] == ["pp64", "pp512", "pp16+tg8"]
    assert (first.num_threads, second.num_threads, first.num_batch, first.num_context) == (1, 2, 32, 512)
    assert [trial.name for trial in Wanted().options()[0].tests] == ["pp512", "tg128"]


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(prompts="many"),
        Wanted(prompts="-5"),
        Wanted(threads="0"),
        Wanted(pairs=("3",)),
        Wanted(prompts="0", generates="0"),
        Wanted(generates="99999999999"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_a_hint(wanted: Wanted) -> None:
    with pytest.raises(UsageError) as caught:
        wanted.options()
    assert caught.value.hint


def test_the_kind_of_a_file_chooses_its_runtime(models: dict[str, Path], tmp_path: Path) -> None:
    assert backend_of(models["dense"]) == "llama.cpp"
    assert backend_of(models["dense-dir"]) == "torch"
    (tmp_path / "model.onnx").write_bytes(b"")
    assert backend_of(tmp_path) == backend_of(tmp_path / "model.onnx") == "onnxruntime"
    with pytest.raises(CheckpointError, match="found nothing"):
        backend_of(tmp_path / "missing.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"noise")
    with pytest.raises(IncompatibleError, match=r"noise\.gguf, which is none of them"):
        backend_of(tmp_path / "noise.gguf")


# Whole runs


@pytest.mark.slow
def test_rows_hold_every_sample_and_energy_is_power_times_time(models: dict[str, Path]) -> None:
    trials = (Trial(12, 0), Trial(0, 5), Trial(6, 3))
    rows = measured([models["dense"], models["pruned"]], Options(trials, 3, 1, 8), SteadyMeter())
    assert [(row.path.stem, row.test) for row in rows] == [
        (name, trial) for name in ("dense", "pruned") for trial in trials
    ]
    for row in rows:
        assert len(row.runs) == len(row.run_energies) == 3
        assert 2 <= row.warm_ups <= 3
        assert len(row.itl_seconds) == 3 * row.test.num_generate
        assert len(row.ttft_seconds) == (3 if row.test.num_prompt else 0)
        assert row.energy.joules == pytest.approx(7 * sum(row.seconds), rel=1e-3)
        assert row.energy.idle_watts == pytest.approx(7.0)
        assert row.net_joules_per_token == pytest.approx(0.0, abs=1e-3)
        assert row.memory.peak.rss_bytes > row.memory.base.rss_bytes > 0
    # Runs interleave, and every second round goes the other way.
    by_time = sorted((run.start, row.path.stem) for row in rows if row.test == trials[0] for run in row.runs)
    assert [name for _, name in by_time] == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    ends = sorted((run.start, run.end) for row in rows for run in row.runs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


@pytest.mark.slow
def test_a_child_has_the_stock_environment_and_ends_with_its_stack(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        child = opened(stack, models["dense"])
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
        assert b"PYTHONPATH=" in environment
        assert b"OMP_" not in environment
        assert b"OPENBLAS_" not in environment
        pid = child.pid
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_child_that_dies_is_told_with_its_signal(models: dict[str, Path]) -> None:
    with contextlib.ExitStack() as stack:
        child = opened(stack, models["dense"])
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(IncompatibleError, match=r"dense\.gguf, its process ended by SIGKILL") as caught:
            child.run(4, 0)
        assert caught.value.hint


def test_what_a_library_prints_is_no_answer() -> None:
    code = (
        "import os, sys; from fedspine_edge.profiling import worker\n"
        "def noisy(opening):\n"
        "    print('hello'); os.system('echo from C'); raise worker.FedSpineError('no model', hint='none')\n"
        "worker.RUNTIMES['noisy'] = noisy\n"
        "sys.exit(worker.main())\n"
    )
    command = {"do": "load", "backend": "noisy", "path": "x", "num_context": 1, "num_threads": 1, "num_batch": 1}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(command) + "\n", capture_output=True, text=True, check=False
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"ready": True},
        {"error": "no model", "hint": "none", "kind": "FedSpineError"},
    ]
    assert done.returncode == 1
    assert "from C" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_with_130(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedspine_edge.commands.profile.measure", stop)
    done = run("profile", models["dense"], *SMALL)
    assert isinstance(done.exception, InterruptedRunError)
    assert done.exception.exit_code == 130


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "pruned-dir", "onnx"])
def test_losses_are_those_of_the_logits(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    text = "How far is it from Denver to Aspen?"
    source = models["pruned-dir"] if kind == "onnx" else models[kind]
    path = _as_onnx(source, tmp_path / "onnx") if kind == "onnx" else source
    with contextlib.ExitStack() as stack:
        child = opened(stack, path, num_context=64)
        child.run(5, 3)
        losses, facts = child.losses(text), child.facts
    tokens = _tokens(models["dense-dir"], text)
    if kind == "dense":
        logits = llama_logits(source, tokens, exact_attention=False)
    else:
        import torch

        model = load_decoder(source)
        assert facts.num_parameters in (None, sum(tensor.numel() for tensor in model.parameters()))
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].numpy()
    wide = logits.astype(np.float64)
    expected = [
        math.log(np.exp(row - row.max()).sum()) + row.max() - row[token]
        for row, token in zip(wide[:-1], tokens[1:], strict=True)
    ]
    assert losses == pytest.approx(expected, abs=2e-2 if kind == "dense" else 1e-4)


def _as_onnx(source: Path, folder: Path) -> Path:
    from fedspine_edge.export.onnx import write_onnx

    write_onnx(source, folder, precision="fp32")
    return folder


def _tokens(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "onnx"])
def test_an_encoder_has_prompts_only(tiny_models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = tiny_models["bert"]
    if kind == "onnx":
        path = tmp_path / "tiny.onnx"
        write_tiny_onnx(path)
    (row,) = measured([path], Options((Trial(12, 0), Trial(0, 5)), 2, 1, 16))
    assert row.test == Trial(12, 0)
    assert row.itl_seconds == ()


@pytest.mark.slow
def test_the_markdown_is_llama_bench_s_table_and_explains_itself(models: dict[str, Path]) -> None:
    done = run("profile", models["dense"], "-m", models["pruned"], *SMALL, "-pg", "4,2")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    header = next(line for line in lines if line.startswith("| model"))
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    tests = [line.split("|")[6].strip() for line in lines if "| CPU " in line]
    assert tests == ["pp12", "tg5", "pp4+tg2"] * 2
    assert [line for line in lines if line.endswith(".gguf")] == ["dense.gguf", "pruned.gguf"]
    assert any(line.startswith(("energy: n/a, ", "energy from ")) for line in lines)
    assert any("(!) do not trust pp12: the runs took" in line for line in lines)
    assert max(map(len, lines)) <= 110


@pytest.mark.slow
def test_json_has_llama_bench_s_names_and_csv_no_zero_for_what_is_unknown(models: dict[str, Path]) -> None:
    (prompt, generation) = json.loads(run("profile", models["dense"], *SMALL, "--json").output)
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_threads"], prompt["n_batch"]) == (12, 0, 1, 2048)
    assert len(prompt["samples_ns"]) == len(prompt["samples_ts"]) == 2
    assert prompt["avg_ts"] == pytest.approx(sum(12e9 / ns for ns in prompt["samples_ns"]) / 2, rel=1e-6)
    assert prompt["itl_ns"]["p50"] is generation["ttft_ns"]["p50"] is None
    assert 0 < generation["itl_ns"]["p50"] <= generation["itl_ns"]["p95"] <= generation["itl_ns"]["p99"]
    assert prompt["file_size"] == models["dense"].stat().st_size
    assert prompt["memory"]["load"]["rss_bytes"] > prompt["memory"]["base"]["rss_bytes"]
    assert prompt["trusted"] is False
    rows = list(csv.DictReader(io.StringIO(run("profile", models["dense"], *SMALL, "-o", "csv").output)))
    assert [row["test"] for row in rows] == ["pp12", "tg5"]
    assert rows[1]["ttft_ns_p50"] == "n/a"
    if rows[0]["energy_source"] == "none":
        assert rows[0]["energy_j"] == rows[0]["power_avg_w"] == "n/a"
    assert all(value not in (None, "", "None") for name, value in rows[0].items() if name != "noise")
    lines = run("profile", models["dense"], *SMALL, "-o", "jsonl").output.splitlines()
    assert [json.loads(line)["test"] for line in lines] == ["pp12", "tg5"]


@pytest.mark.slow
def test_a_gate_that_is_hit_fails_after_the_profile_is_shown(models: dict[str, Path]) -> None:
    calm = run("profile", models["dense"], *SMALL, "--fail-if", "itl_p95_ms>1e9")
    assert calm.exit_code == 0, calm.output
    done = run("profile", models["dense"], *SMALL, "--fail-if", "itl_p95_ms>0", "--fail-if", "size_mib<1e-9")
    assert isinstance(done.exception, VerificationError)
    assert done.exception.exit_code == 3
    assert "dense.gguf tg5, 1 threads: itl_p95_ms is" in str(done.exception)
    assert "size_mib" not in str(done.exception)
    assert "| tg5 " in done.output


@pytest.mark.parametrize(
    "arguments",
    [["profile"], ["profile", "x", "-o", "xml"], ["compare", "x"], ["compare", "x", "y", "-o", "csv"]],
)
def test_wrong_words_are_a_usage_error(arguments: list[str]) -> None:
    assert isinstance(run(*arguments).exception, UsageError)


@pytest.mark.slow
def test_a_gate_s_name_is_checked_before_anything_runs(tmp_path: Path) -> None:
    done = run("profile", tmp_path / "missing.gguf", "--fail-if", "speed>3")
    assert isinstance(done.exception, UsageError)
    assert isinstance(run("profile", tmp_path / "missing.gguf").exception, CheckpointError)


@pytest.mark.slow
def test_gates_name_the_figures_there_are(models: dict[str, Path]) -> None:
    (row,) = measured([models["dense"]], Options((Trial(4, 2),), 2, 1, 8))
    assert tuple(figures.gate_figures(row)) == figures.GATE_FIGURES


@pytest.mark.slow
def test_a_comparison_has_ratios_perplexities_and_a_picture(models: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "front.svg"
    text = tmp_path / "text.txt"
    text.write_text("How far is it from Denver to Aspen? " * 4)
    done = run("compare", models["dense"], models["pruned"], *SMALL, "--text", text, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "A  dense.gguf" in done.output
    assert "| perplexity of the text" in done.output
    assert max(map(len, done.output.splitlines())) <= 120
    root = ElementTree.fromstring(picture.read_text())
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 2
    document = json.loads(run("compare", models["dense"], models["dense-dir"], *SMALL, "--text", text, "--json").output)
    by_name = {metric["name"]: metric for metric in document["metrics"]}
    quality = by_name["perplexity of the text"]
    # The same weights in two runtimes say nearly the same of each token.
    assert quality["values"][0] == pytest.approx(quality["values"][1], rel=0.02)
    assert quality["ratios"][1]["low"] <= quality["ratios"][1]["value"] <= quality["ratios"][1]["high"]
    assert by_name["pp12, t/s"]["ratios"][0]["value"] == pytest.approx(1.0)
    assert document["text_tokens"][0] == document["text_tokens"][1] > 16


@pytest.mark.slow
def test_encoders_are_compared_by_what_they_get_right(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "front.svg"
    rows.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions()))
    one, other = tiny_models["bert"], tiny_models["roberta"]
    done = run("compare", one, other, *SMALL, "--data", rows, "--plot", picture, "--json")
    assert done.exception is None
    metric = next(m for m in json.loads(done.output)["metrics"] if m["name"] == "accuracy")
    assert metric["values"] == [
        pytest.approx(evaluate(str(path), str(rows), prompt=None).accuracy) for path in (one, other)
    ]
    assert "wrong answers" in picture.read_text()


def test_a_truncated_file_is_one_clear_error(models: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(models["dense"].read_bytes()[:2000])
    done = run("profile", broken, *SMALL)
    assert isinstance(done.exception, IncompatibleError)
    assert str(done.exception).startswith("expected a file llama.cpp loads, found broken.gguf")


@pytest.mark.slow
def test_memory_is_that_of_every_mapping_as_seen_from_outside(models: dict[str, Path]) -> None:
    (row,) = measured([models["dense"]], Options((Trial(12, 0),), 2, 1, 8))
    with contextlib.ExitStack() as stack:
        child = opened(stack, models["dense"])
        child.run(12, 0)
        lines = Path(f"/proc/{child.pid}/smaps").read_text().splitlines()
        outside = 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        assert process_memory(child.pid).pss_bytes == pytest.approx(outside, rel=0.02)
    assert row.memory.peak.pss_bytes == pytest.approx(outside, rel=0.1)  # another process, with other neighbours


def test_the_built_in_text_is_there() -> None:
    assert len(PASSAGE.read_text().split()) > 300


@pytest.mark.slow
def test_the_program_prints_one_document_and_leaves_no_process(models: dict[str, Path]) -> None:
    code = "import sys; from fedspine_edge.cli_profile import commands; commands()"
    done = subprocess.run(
        [sys.executable, "-c", code, "profile", str(models["dense"]), *SMALL, "-o", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)) == 2
    assert done.stderr == ""


# Power modes


NVPMODEL = """#!{python}
import pathlib, sys
state, calls = pathlib.Path(__file__).with_name("mode"), pathlib.Path(__file__).with_name("calls")
with calls.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "-q":
    print("NV Power Mode: SOME_NAME")
    print(state.read_text())
elif sys.argv[2] != "9":
    state.write_text(sys.argv[2])
"""


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """A Jetson in mode 8 of 0, 8 and 9, the last of which takes a restart, with a fake nvpmodel."""
    root = plant("xavier_nx", tmp_path / "root")
    with (root / "etc/nvpmodel.conf").open("a") as file:
        file.write("< POWER_MODEL ID=9 NAME=RESTART >\n")
    program = root / "nvpmodel"
    program.write_text(NVPMODEL.format(python=sys.executable))
    program.chmod(0o755)
    (root / "mode").write_text("8")
    return root


@pytest.mark.slow
def test_a_sweep_measures_each_mode_and_puts_the_first_back(
    models: dict[str, Path], jetson: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedspine_edge.profiling.bench.IDLE_SECONDS", 0.05)
    shown: list[str] = []
    wanted = Wanted("4", "2", repetitions=2, threads="1")
    for output in ("md", "json"):
        program = str(jetson / "nvpmodel")
        sweep([models["dense"]], wanted, output=output, quiet=True, show=shown.append, root=jetson, program=program)
        assert (jetson / "mode").read_text() == "8"
    chosen = [line for line in (jetson / "calls").read_text().splitlines() if line.startswith("-m")]
    assert chosen == ["-m 0", "-m 8", "-m 9"] * 2
    text, document = shown[0], json.loads(shown[1])
    assert "left out: RESTART could not be set" in text
    assert [(row["power_mode"], row["test"]) for row in document["rows"]] == [
        (mode, test) for mode in ("MODE_15W_2CORE", "MODE_20W_6CORE") for test in ("pp4", "tg2")
    ]
    assert document["left_out"] == ["RESTART"]
    for test in ("pp4", "tg2"):
        rows = [row for row in document["rows"] if row["test"] == test]
        best = min(rows, key=lambda row: row["energy_j_per_token"])
        assert [row["best_tokens_per_joule"] for row in rows] == [row is best for row in rows]
        assert rows[0]["power_avg_w"] == pytest.approx(4.904)


@pytest.mark.slow
def test_a_model_that_crashes_puts_the_power_mode_back(jetson: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(IncompatibleError, match=r"broken\.gguf"):
        sweep(
            [path],
            Wanted("4", "2"),
            output="md",
            quiet=True,
            show=print,
            root=jetson,
            program=str(jetson / "nvpmodel"),
        )
    assert (jetson / "mode").read_text() == "8"
    assert "-m 0" in (jetson / "calls").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_puts_the_power_mode_back(jetson: Path, number: signal.Signals) -> None:
    code = (
        "import sys, time; from fedspine_edge.profiling.power_modes import *\n"
        "with mode_kept(sys.argv[1]):\n"
        "    choose_mode(0, sys.argv[1]); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(jetson / "nvpmodel")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert (jetson / "mode").read_text() == "0"
        process.send_signal(number)
        _, messages = process.communicate(timeout=30)
    assert (jetson / "mode").read_text() == "8"
    assert f"interrupted by {number.name}" in messages


def test_a_board_without_power_modes_says_so(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="expected power modes"):
        sweep([], Wanted(), output="md", quiet=True, show=print, root=tmp_path)
    with pytest.raises(IncompatibleError, match=r"expected \S+ -q to run, found FileNotFoundError"):
        current_mode(str(tmp_path / "no-such-program"))
    with pytest.raises(IncompatibleError, match="it ended with 1"):
        current_mode("false")
    with pytest.raises(IncompatibleError, match="expected a power mode"):
        current_mode("true")


# Words and pictures


@pytest.mark.parametrize(
    ("higher", "ratio", "words"),
    [
        (True, Estimate(1.5, 1.4, 1.6), "1.50x faster [1.40, 1.60]"),
        (True, Estimate(0.5, 0.4, 0.8), "2.00x slower [1.25, 2.50]"),
        (False, Estimate(0.5, 0.4, 0.8), "2.00x faster [1.25, 2.50]"),
        (False, Estimate(2.0, None, None), "2.00x slower"),
        (True, Estimate(1.02, 0.97, 1.08), "1.02x, no clear difference [0.97, 1.08]"),
        (True, None, "n/a"),
    ],
)
def test_a_ratio_in_words_is_above_one(higher: bool, ratio: Estimate | None, words: str) -> None:
    metric = Metric("x", comparison.SPEED, higher, (1.0, None), (None, ratio), digits=2)
    assert comparison.verdict(metric, 1) == words


def test_perplexities_of_different_tokens_have_no_ratio() -> None:
    a, b, c = Subject((), (1.0, 3.0)), Subject((), (2.0, 4.0)), Subject((), (2.0,))
    metric = comparison._perplexity([a, b, c])
    assert metric.values == pytest.approx((math.exp(2), math.exp(3), math.exp(2)))
    assert metric.ratios[1] is not None
    assert metric.ratios[1] == pytest.approx((math.e, math.e, math.e))
    assert metric.ratios[2] is None


def test_a_table_lines_up() -> None:
    assert "\x1b" not in bench_table.markdown_table(("a",), [["\x1b[31mred"]])
    assert bench_table.markdown_table(("a", "value"), [["long name", "1"], ["b", "22222222"]]).splitlines() == [
        "| a         |    value |",
        "| --------- | -------: |",
        "| long name |        1 |",
        "| b         | 22222222 |",
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [Point("a", 10, 5, 1), Point("b", 8, 7, 1), Point("c", 11, 6, 1), Point("d", 8, 8, None)]
    assert [point.name for point in pareto_front(points)] == ["b", "a"]


def test_a_picture_is_well_formed_whatever_the_names_and_values() -> None:
    svg = pareto_svg([Point('<&">', 3.0, 2.0, None)], latency_name="a<b", loss_name="c&d")
    root = ElementTree.fromstring(svg)
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 1
    points = [Point("a", 1.0, 2.0, 100), Point("b", 2.0, 1.0, 400)]
    circles = ElementTree.fromstring(pareto_svg(points, latency_name="x", loss_name="y")).findall(
        "{http://www.w3.org/2000/svg}circle"
    )
    # Area is memory: four times the bytes, twice the radius; further right and further down.
    large, small = circles
    assert float(large.attrib["r"]) == pytest.approx(2 * float(small.attrib["r"]))
    assert float(large.attrib["cx"]) > float(small.attrib["cx"])
    assert float(large.attrib["cy"]) > float(small.attrib["cy"])


def test_accuracies_have_a_ratio_with_an_interval() -> None:
    a, b, c = Subject((), (), (50, 100)), Subject((), (), (60, 100)), Subject((), (), (0, 100))
    metric = comparison._accuracy([a, b, c])
    assert metric.values == (0.5, 0.6, 0.0)
    ratio = metric.ratios[1]
    assert ratio is not None
    # ln 1.2 +- 1.96 sqrt(1/50 - 1/100 + 1/60 - 1/100)
    assert ratio == pytest.approx((1.2, 1.2 * math.exp(-0.253035), 1.2 * math.exp(0.253035)), rel=1e-4)
    assert metric.ratios[2] is None
    assert comparison._accuracy([Subject((), ())]).values == (None,)
