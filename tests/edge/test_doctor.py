"""`fedspine doctor`: what it says of boards, of right and wrong kernels, of runtimes that crash, and its exit code."""

from __future__ import annotations

import calendar
import json
from pathlib import Path
from typing import Any

import pytest
from boards import BOARDS, plant, write
from typer.testing import CliRunner

from fedspine_edge import kernels
from fedspine_edge.cli_profile import commands
from fedspine_edge.commands import doctor
from fedspine_edge.commands.doctor import BAD, GOOD, UNKNOWN, Finding
from fedspine_edge.errors import FedSpineError
from fedspine_edge.profiling import self_test


def examined(board: str, root: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine_board(plant(board, root))}


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_is_described_and_every_fault_has_a_fix(tmp_path: Path, board: str) -> None:
    findings = examined(board, tmp_path)
    assert findings["board"].state == GOOD
    assert all(finding.fix for finding in findings.values() if finding.state == BAD)
    assert doctor.healthy(list(findings.values()))
    assert findings["L4T"].state == (UNKNOWN if board in ("rpi5", "laptop") else GOOD)


def test_a_hot_and_slowed_jetson_is_told_with_its_remedies(tmp_path: Path) -> None:
    findings = examined("xavier_nx", tmp_path)
    assert (findings["temperature"].state, findings["temperature"].detail) == (BAD, "92.0 °C at most (CPU-therm)")
    assert (findings["throttling"].state, findings["throttling"].detail) == (BAD, "held back by cpufreq-cpu0")
    assert findings["clocks"].state == BAD
    assert "policy0 950 of 1900 MHz" in findings["clocks"].detail
    assert "nvpmodel" in findings["clocks"].fix
    assert "board 4.90 W: VDD_IN 4.90 W, VDD_CPU_GPU_CV 0.47 W, VDD_SOC 1.26 W" in findings["power rails"].detail


def test_a_raspberry_s_past_troubles_are_told(tmp_path: Path) -> None:
    root = plant("rpi5", tmp_path)
    bits = "/sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    write(root, bits, "50000")
    (finding,) = [found for found in doctor.examine_board(root) if found.name == "throttling"]
    assert (finding.state, finding.detail) == (BAD, "not now, but: under-voltage since boot, throttled since boot")
    write(root, bits, "0")
    (finding,) = [found for found in doctor.examine_board(root) if found.name == "throttling"]
    assert finding.state == GOOD


def test_power_that_cannot_be_read_is_not_shown_as_nothing(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    (finding,) = [found for found in doctor.examine_board(root) if found.name == "power rails"]
    assert finding.state == BAD
    assert "chmod" in finding.fix
    assert " 0.00" not in finding.detail
    (finding,) = [found for found in doctor.examine_board(tmp_path / "empty") if found.name == "power rails"]
    assert (finding.state, finding.detail[:3]) == (UNKNOWN, "n/a")


@pytest.mark.parametrize(("date", "state"), [((1970, 1, 1), BAD), ((2025, 12, 31), BAD), ((2031, 5, 5), GOOD)])
def test_a_clock_before_the_program_s_own_year_is_wrong(date: tuple[int, int, int], state: str) -> None:
    finding = doctor.examine_time(calendar.timegm((*date, 12, 0, 0)))
    assert (finding.state, finding.essential) == (state, True)
    assert doctor.healthy([finding]) == (state == GOOD)


def test_every_instruction_set_agrees_with_the_reference() -> None:
    errors = self_test.kernel_errors()
    assert tuple(errors) == kernels.available_isas()
    assert all(error < self_test.TOLERANCE for error in errors.values())


def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.lora_linear

    def wrong(*arguments: Any, **more: Any) -> Any:
        return right(*arguments, **more) * 1.001

    monkeypatch.setattr(kernels, "lora_linear", wrong)
    findings = doctor._kernels()
    assert findings
    if kernels.available_isas():
        assert {(finding.state, finding.essential) for finding in findings} == {(BAD, True)}
        assert not doctor.healthy(findings)
        assert "expected an error of at most 0.0001" in findings[0].detail


def test_a_runtime_that_crashes_is_a_fault_and_one_that_is_missing_is_not() -> None:
    def crash() -> str:
        raise FedSpineError("expected a measurement of tiny.gguf, its process ended by SIGILL")

    broken = doctor._runtime("llama.cpp", "numpy", "fedspine-edge[llama]", crash)
    assert (broken.state, broken.essential) == (BAD, True)
    assert "SIGILL" in broken.detail
    assert broken.fix
    missing = doctor._runtime("llama.cpp", "no-such-package", "fedspine-edge[llama]", crash)
    assert (missing.state, missing.fix) == (UNKNOWN, "pip install 'fedspine-edge[llama]'")


@pytest.mark.slow
def test_the_runtimes_run_a_model_made_on_the_spot() -> None:
    assert self_test.run_llama().startswith("llama")


@pytest.mark.slow
def test_onnxruntime_runs_a_model_made_on_the_spot() -> None:
    assert self_test.run_onnx() == "onnx"


@pytest.mark.slow
def test_the_command_prints_a_mark_for_each_or_one_json_document() -> None:
    text = CliRunner().invoke(commands, ["doctor"])
    assert text.exit_code == 0, text.output
    assert "✓ CPU " in text.output
    assert text.output.rstrip().splitlines()[-1].startswith("ready")
    document = json.loads(CliRunner().invoke(commands, ["doctor", "--json"]).output)
    assert document["healthy"]
    assert {"name", "state", "detail", "fix", "essential"} == set(document["findings"][0])


def test_the_command_ends_with_1_when_something_essential_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("clock", BAD, "1970", "set it", essential=True), Finding("disk", BAD, "full", "free some")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    done = CliRunner().invoke(commands, ["doctor"])
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "✗ clock  1970",
        "         fix: set it",
        "✗ disk   full",
        "         fix: free some",
        "",
        "not ready: clock; 1 to improve",
    ]
    monkeypatch.setattr(doctor, "examine", lambda: findings[1:])
    assert CliRunner().invoke(commands, ["doctor"]).exit_code == 0
    assert doctor.as_text(findings, plain=True).startswith("NO clock  1970")
