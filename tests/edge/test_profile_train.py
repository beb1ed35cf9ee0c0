"""`fedspine profile --train`: steps of tiny models, the law they give, and the simulator that follows it.

No assertion depends on how fast the machine is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedspine_edge.cli_profile import commands
from fedspine_edge.commands.boards import Fleet
from fedspine_edge.commands.experiment import Overrides, prepare
from fedspine_edge.commands.profile_train import WantedSteps, profile_train
from fedspine_edge.commands.step_table import as_text, fitted_law
from fedspine_edge.errors import IncompatibleError, UsageError, VerificationError
from fedspine_edge.profiling.energy import Energy
from fedspine_edge.profiling.noise import Quiet
from fedspine_edge.profiling.train_steps import StepArm, StepMemory, StepRow, StepShape, measure_steps
from fedspine_edge.profiling.watch import BoardWatch, Seen
from fedspine_server.controllers import structured
from fedspine_server.settings import RunSettings
from fedspine_server.step_law import StepLaw

LAW = StepLaw(0.02, 0.07, 0.01)
SHAPE = StepShape(batch_size=2, num_tokens=6, num_threads=1)
ARMS = [(ratio, rank) for ratio in (0.0, 0.25, 0.5) for rank in (4, 16, 32)]


def row(ratio: float, rank: int, *, off: float = 1.0, calm: bool = True, joules: float | None = None) -> StepRow:
    seconds = off * LAW.work(ratio, rank)
    return StepRow(
        arm=StepArm(ratio, rank),
        shape=SHAPE,
        seconds=(seconds,) * 6,
        energy=Energy(joules, None, 24 * seconds),
        memory=StepMemory(10 << 20, 20 << 20, 3 << 20, 3 << 20, 6 << 20, 8 << 20),
        quiet=Quiet(9.0, 2, 0.0 if calm else 1.5, 0.0, None, (), 0.0),
        seen=Seen(None, None, None, None),
    )


class SteadyMeter:
    """Seven watts, always."""

    source, counts_joules = "ina3221", False

    def read(self) -> float:
        return 7.0


def measured(path: Path, arms: list[StepArm], passes: int = 2, meter: Any = None) -> list[StepRow]:
    with BoardWatch(meter) as watch:
        return measure_steps(path, arms, SHAPE, passes=passes, watch=watch)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_arm_has_a_sample_a_pass_and_memory_that_adds_up(tiny_models: dict[str, Path], family: str) -> None:
    arms = [StepArm(0.0, 2), StepArm(0.5, 2), StepArm(0.5, 8)]
    rows = measured(tiny_models[family], arms, meter=SteadyMeter())
    assert [found.arm for found in rows] == arms
    for found in rows:
        assert len(found.seconds) == 2
        assert min(found.seconds) > 0
        # Four steps a pass, two passes.
        assert found.joules_per_step == pytest.approx(7 * sum(found.seconds) / 2, rel=1e-3)
        assert found.tokens_per_second == pytest.approx(12 / found.median_seconds)
        assert found.memory.gradients == found.memory.adapter
        assert found.memory.moments == 2 * found.memory.adapter
        assert found.memory.peak >= found.memory.runtime > 1 << 20
    # Four times the rank is four times the factors; pruning takes some of them away.
    assert rows[2].memory.adapter > 3 * rows[1].memory.adapter * (1 if family == "llama" else 0.5)
    assert rows[1].memory.adapter < rows[0].memory.adapter


def test_rows_longer_than_the_model_takes_are_refused(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(IncompatibleError, match="expected rows of at most") as caught, BoardWatch(None) as watch:
        measure_steps(tiny_models["bert"], [StepArm(0.0, 2)], StepShape(1, 100_000, 1), passes=1, watch=watch)
    assert "--seq" in str(caught.value.hint)


def test_the_threads_asked_for_are_used(tiny_models: dict[str, Path]) -> None:
    torch.set_num_threads(2)
    measured(tiny_models["bert"], [StepArm(0.0, 2)], passes=1)
    assert torch.get_num_threads() == 1


def test_every_other_arm_judges_the_law_it_was_not_fitted_to() -> None:
    fitted = fitted_law([row(*arm, off=1.2 if arm == (0.0, 16) else 1.0) for arm in ARMS])
    assert fitted is not None
    assert [arm for arm, out in zip(ARMS, fitted.held_out, strict=True) if out] == [
        (0.0, 16), (0.25, 4), (0.25, 32), (0.5, 16)
    ]  # fmt: skip
    # The arm that took 1.2 times as long was held out: the law is the others', and 1 - 1/1.2 off there.
    assert (fitted.law.constant, fitted.law.kept, fitted.law.lora) == pytest.approx((0.02, 0.07, 0.01))
    assert fitted.worst_error == pytest.approx(1 - 1 / 1.2)
    assert fitted.held_out_error == pytest.approx(0.0, abs=1e-9)


def test_four_arms_give_a_law_that_nothing_checks_and_one_gives_none() -> None:
    fitted = fitted_law([row(0.0, 4), row(0.0, 16), row(0.5, 4), row(0.5, 16)])
    assert fitted is not None
    assert fitted.held_out_error is None
    assert fitted_law([row(0.0, 4)]) is None
    assert "no law" in as_text("m", [row(0.0, 4)], None, None)


def test_the_table_shows_the_law_beside_what_was_measured() -> None:
    rows = [row(*arm, joules=48.0, off=1.25 if arm == (0.25, 4) else 1.0) for arm in ARMS[:-1]] + [
        row(*ARMS[-1], calm=False)
    ]
    text = as_text("m", rows, fitted_law(rows), None)
    assert "0.200 + 0.700 (1 - p) + 0.100 r / 16 of the 0.1000 s" in text
    assert "0.0750 (-20.0%, held out)" in text
    assert " 2.00 |" in text  # 48 J over 6 passes of 4 steps
    assert "(!) do not trust ratio 0.5, rank 32: other programs used 1.50 of 2 cores" in text


def run_with(monkeypatch: pytest.MonkeyPatch, rows: list[StepRow], model: Path, **more: Any) -> list[str]:
    monkeypatch.setattr("fedspine_edge.commands.profile_train.measure_steps", lambda *_, **__: rows)
    shown: list[str] = []
    settings = {"law": None, "output": "json", "fail_if": [], "quiet": True, **more}
    try:
        profile_train(str(model), WantedSteps(), show=shown.append, **settings)
    finally:
        assert len(shown) == 1
    return shown


def test_a_law_goes_to_its_file_and_into_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    law = tmp_path / "law.json"
    (shown,) = run_with(monkeypatch, [row(*arm) for arm in ARMS], tiny_models["bert"], law=law)
    assert json.loads(law.read_text()) == json.loads(shown)["law"]
    overrides = Overrides(model=str(tiny_models["bert"]), law=law)
    table = json.loads(
        (prepare("encoder", overrides, out=tmp_path / "run", resume=None) / "experiment.json").read_text()
    )
    parts = pytest.approx([0.2, 0.7, 0.1])
    assert table["experiment"]["fleet"]["step_law"] == parts
    assert table["experiment"]["run"]["controller_options"]["step_law"] == parts
    fleet = Fleet(**table["experiment"]["fleet"])
    assert fleet.world(0).step_law.work(0.5, 16) == pytest.approx(0.65)
    state = structured.init(RunSettings.from_json(table["experiment"]["run"]))
    assert state["timing"]["prior"] == parts


def test_another_controller_is_told_nothing_of_the_law(tmp_path: Path) -> None:
    law = tmp_path / "law.json"
    law.write_text('{"format": 1, "law": {"constant": 0.5, "kept": 0.4, "lora": 0.1}}')
    out = prepare("encoder", Overrides(controller="fixed", law=law), out=tmp_path / "run", resume=None)
    table = json.loads((out / "experiment.json").read_text())["experiment"]
    assert "controller_options" not in table["run"]
    assert table["fleet"]["step_law"] == [0.5, 0.4, 0.1]


def test_a_law_that_is_off_where_held_out_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    rows = [row(*arm, off=1.5 if index % 2 else 1.0, calm=False) for index, arm in enumerate(ARMS)]
    with pytest.raises(VerificationError, match="within 10% of arms it was not fitted to, found 33%") as caught:
        run_with(monkeypatch, rows, tiny_models["bert"], law=tmp_path / "law.json")
    assert "not quiet" in str(caught.value.hint)
    assert not (tmp_path / "law.json").exists()


def test_a_gate_that_is_hit_fails_after_the_steps_are_shown(
    monkeypatch: pytest.MonkeyPatch, tiny_models: dict[str, Path]
) -> None:
    rows = [row(*arm) for arm in ARMS]
    with pytest.raises(VerificationError, match="ratio 0, rank 32: step_ms is 110"):
        run_with(monkeypatch, rows, tiny_models["bert"], fail_if=["step_ms>105"])
    with pytest.raises(VerificationError, match="energy_j_per_step was not measured"):
        run_with(monkeypatch, rows, tiny_models["bert"], fail_if=["energy_j_per_step>1"])
    run_with(monkeypatch, rows, tiny_models["bert"], fail_if=["step_ms>111", "peak_mib>50"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train", "a", "b"],
        ["--train", "a", "-p", "12"],
        ["--train", "a", "--sweep-power-modes"],
        ["a", "--ratio", "0.5"],
        ["a", "--law", "law.json"],
        ["--train", "a", "--ratio", "0.95"],
        ["--train", "a", "--ratio", "half"],
        ["--train", "a", "--rank", "0"],
        ["--train", "a", "-t", "1,2"],
        ["--train", "a", "-o", "csv"],
        ["--train", "a", "--rank", "4", "--law", "law.json"],
        ["--train", "a", "--fail-if", "itl_p95_ms>3"],
    ],
)
def test_wrong_words_are_a_usage_error(arguments: list[str]) -> None:
    done = CliRunner().invoke(commands, ["profile", *arguments])
    assert isinstance(done.exception, UsageError)


@pytest.mark.slow
def test_the_program_prints_one_document(tiny_models: dict[str, Path]) -> None:
    arguments = ["profile", str(tiny_models["bert"]), "--train", "--ratio", "0,0.5", "--rank", "2,4", "-r", "1"]
    done = CliRunner().invoke(commands, [*arguments, "-b", "2", "--seq", "5", "-t", "1", "--json"])
    assert done.exception is None
    document = json.loads(done.stdout)
    assert [(r["pruning_ratio"], r["rank"]) for r in document["rows"]] == [(0.0, 2), (0.0, 4), (0.5, 2), (0.5, 4)]
    assert document["energy_source"] == "none" or document["rows"][0]["energy_j_per_step"] is not None
    assert document["law"]["held_out_error"] is None
