"""The plan of a step against what the allocator gives out; the refusal of what does not fit."""

import json

import pytest
from tiny import CONFIGS
from typer.testing import CliRunner

from fedspine_edge import hardware, kernels, solo
from fedspine_edge.cli import app
from fedspine_edge.commands.plan import forecast, measured_step
from fedspine_edge.config import cache_directory
from fedspine_edge.errors import MemoryLimitError, UsageError
from fedspine_edge.masks import keep_all, kept_counts
from fedspine_edge.memory_plan import StepShape, check_memory, tensor_bytes
from fedspine_edge.sources import model_directory
from fedspine_edge.workbench import open_workbench

CLASSES = ("base", "lora", "optimizer", "activations")
native_only = pytest.mark.skipif(kernels.backend() != "native", reason="the reference saves what autograd saves")


def assert_planned(path, shape, ratio):
    foreseen, found = forecast(path, shape, ratio), measured_step(path, shape, ratio)
    for name in CLASSES:
        assert getattr(foreseen, name) == pytest.approx(found[name], rel=0.1), name


@native_only
@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_a_tiny_step_takes_what_was_planned(family, tiny_models):
    assert_planned(tiny_models[family], StepShape(batch_size=5, tokens=120, rank=8), 0.0)


@native_only
@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "dtype"), [(0.0, "float32"), (0.5, "float32"), (0.0, "bfloat16"), (0.5, "int8")])
def test_a_step_of_minilm_takes_what_was_planned(ratio, dtype):
    path = model_directory("minilm-l6", cache_directory())
    assert_planned(path, StepShape(batch_size=8, tokens=64, rank=16, base_dtype=dtype), ratio)


def test_only_one_part_of_a_batch_is_planned_for(tiny_models):
    one, many = (forecast(tiny_models["llama"], StepShape(rows, 128, 4), 0.0) for rows in (2, 64))
    assert [getattr(one, name) for name in CLASSES] == [getattr(many, name) for name in CLASSES]


def test_a_step_that_does_not_fit_is_refused_with_the_ratio_that_would(tiny_models):
    bench = open_workbench(tiny_models["llama"], sha256=None, num_labels=2, choices=[0])
    shape, held = StepShape(8, 128, 4), tensor_bytes(bench.model)
    whole, half = (forecast(tiny_models["llama"], shape, ratio).total - held for ratio in (0.0, 0.5))
    kept = kept_counts(keep_all(bench.layout))
    with pytest.raises(MemoryLimitError, match="MiB of free memory for a step, found") as refused:
        check_memory(bench.model, bench.layout, kept, shape, available_bytes=half)
    assert refused.value.exit_code == 4
    named = float(refused.value.hint.split("ratio ")[1].split()[0])
    assert 0 < named <= 0.5
    check_memory(bench.model, bench.layout, kept, shape, available_bytes=whole)
    with pytest.raises(MemoryLimitError) as hopeless:
        check_memory(bench.model, bench.layout, kept, shape, available_bytes=0)
    assert "not even" in hopeless.value.hint


def test_tune_is_refused_before_it_starts(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(solo, "available_memory_bytes", lambda: 1 << 10)
    monkeypatch.setattr(solo, "tune", lambda *_, **__: pytest.fail("it started"))
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"how many is {n} ?", "label": "ab"[n % 2]} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(
        app, ["tune", str(tiny_models["bert"]), "--data", str(data), "--out", str(tmp_path / "o")]
    )
    assert isinstance(done.exception, MemoryLimitError)


def test_a_narrower_base_is_planned_for(tiny_models):
    def base_of(dtype):
        arguments = ["plan", str(tiny_models["bert"]), "--seq", "16", "--base-dtype", dtype, "--json"]
        done = CliRunner().invoke(app, arguments)
        return done, json.loads(done.stdout)["predicted"]["base"] if not done.exception else 0

    whole, half, quarter = (base_of(dtype)[1] for dtype in kernels.BASE_DTYPES)
    assert whole > half > quarter > 0
    refused, _ = base_of("int4")
    assert isinstance(refused.exception, UsageError)


def test_plan_prints_every_class(tiny_models):
    done = CliRunner().invoke(app, ["plan", str(tiny_models["bert"]), "--seq", "16", "--json"])
    predicted = json.loads(done.stdout)["predicted"]
    assert predicted["total"] == sum(bytes_ for name, bytes_ in predicted.items() if name != "total")


def test_a_control_groups_limit_counts(tmp_path):
    machine = hardware.available_memory_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert hardware.available_memory_bytes(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available_memory_bytes(tmp_path) == pytest.approx(machine, rel=0.2)
