"""The program itself, as a user runs it, on a tiny model: whole runs, kills, bad input. Real processes throughout."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny import questions

PROGRAM = [sys.executable, "-W", "error::ResourceWarning", "-c", "from fedspine_edge.cli import main; main()"]

TOML = """
model = "{model}"
data = "{data}"
held_out = 6
validation = 2
{top}

[run]
rounds = 4
steps_per_round = 4
prune_interval = 2
batch_size = 4
learning_rate = 5e-3
ranks = [2, 4]
target_sparsity = 0.5
{run}

[fleet]
tx2 = 1
xavier_nx = 1
agx_xavier = 1
"""


def fedspine(*arguments, cwd, check=True, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False, **more
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def experiment(tmp_path, tiny_models):
    """Writes the data and a TOML file; returns a function that writes it with other settings."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions()))

    def write(*, model=tiny_models["bert"], rows=data, top="", run=""):
        path = tmp_path / "mine.toml"
        path.write_text(TOML.format(model=model, data=rows, top=top, run=run))
        return path

    return write


@pytest.mark.slow
def test_a_run_ends_with_a_summary_a_report_and_a_pruned_model(experiment, tmp_path):
    done = fedspine("simulate", experiment(), "--json", "--workers", "1", cwd=tmp_path)
    summary = json.loads(done.stdout)
    run_dir = tmp_path / "runs" / "mine"
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert summary["sparsity"] >= 0.5
    assert summary["accuracy"] == summary["accuracy_torch"]
    assert summary["virtual_seconds"] > 0
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert (run_dir / "models" / "pruned" / "model.safetensors").is_file()
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    assert [record["round_index"] for record in records] == [0, 1, 2, 3]
    assert not list(run_dir.rglob("*.partial"))


@pytest.mark.slow
def test_the_result_does_not_depend_on_workers_nor_on_a_second_try(experiment, tmp_path):
    path = experiment(top="dense_reference = false")
    hashes = {
        json.loads(fedspine("simulate", path, "--json", "--workers", n, "--out", f"run{k}", cwd=tmp_path).stdout)[
            "adapter_sha256"
        ]
        for k, n in enumerate((1, 2, 3))
    }
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(experiment, tmp_path):
    path = experiment(top="dense_reference = false")
    whole = json.loads(fedspine("simulate", path, "--json", "--workers", 1, "--out", "whole", cwd=tmp_path).stdout)
    seconds = whole["wall_seconds"]
    generator = random.Random(4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments: list[object] = ["simulate", path, "--out", "cut", "--workers", 1, "--quiet"]
    for _ in range(3):
        process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)], cwd=tmp_path, env=environment, start_new_session=True
        )
        try:
            process.wait(timeout=generator.uniform(0.5, 0.95) * seconds + 4)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if (tmp_path / "cut" / "experiment.json").exists():
            arguments = ["simulate", "--resume", "cut", "--workers", 1, "--quiet"]
    resumed = json.loads(fedspine("simulate", "--resume", "cut", "--json", "--workers", 1, cwd=tmp_path).stdout)
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    assert resumed["accuracy"] == whole["accuracy"]
    assert (tmp_path / "cut" / "rounds.jsonl").read_bytes() == (tmp_path / "whole" / "rounds.jsonl").read_bytes()


@pytest.mark.slow
def test_a_killed_program_leaves_no_workers_behind(experiment, tmp_path):
    path = experiment(top="dense_reference = false", run="")
    process = subprocess.Popen(
        [*PROGRAM, "simulate", str(path), "--rounds", "200", "--out", "cut", "--workers", "2", "--quiet"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    state = tmp_path / "cut" / "state"
    limit = time.monotonic() + 60
    while not (state.is_dir() and list(state.glob("round-*.safetensors"))):
        assert time.monotonic() < limit
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores Ctrl-C, and so does all that it starts in turn."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_the_last_round_and_says_how_to_go_on(experiment, tmp_path):
    path = experiment(top="dense_reference = false", run="")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*PROGRAM, "simulate", str(path), "--rounds", "200", "--out", "cut", "--workers", "1"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    state = tmp_path / "cut" / "state"
    limit = time.monotonic() + 60
    while not (state.is_dir() and list(state.glob("round-*.safetensors"))):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted; the last finished round is saved" in stderr
    assert "hint: go on with: fedspine simulate --resume cut" in stderr
    assert "Traceback" not in stderr
    assert list(state.glob("round-*.safetensors"))


def refused(*arguments, cwd, code, error, hint=None):
    done = fedspine(*arguments, cwd=cwd, check=False)
    assert done.returncode == code, done.stderr
    assert f"error: {error}" in done.stderr
    assert "Traceback" not in done.stderr
    if hint:
        assert f"hint: {hint}" in done.stderr
    return done


@pytest.mark.slow
def test_bad_usage_is_one_clear_error_with_exit_code_2(experiment, tmp_path):
    refused("simulate", "quickstrat", cwd=tmp_path, code=2, error="expected a preset or a .toml file",
            hint="did you mean quickstart?")  # fmt: skip
    refused("simulate", experiment(run="rouns = 3"), cwd=tmp_path, code=2, error="unknown key 'rouns'",
            hint="did you mean rounds?")  # fmt: skip
    refused("simulate", experiment(), "--sparsity", "1.5", cwd=tmp_path, code=2, error="")
    refused("simulate", experiment(run='controller = "sucbb"'), cwd=tmp_path, code=2, error="")
    assert fedspine("simulate", "--no-such-flag", cwd=tmp_path, check=False).returncode == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_bad_data_and_models_are_one_clear_error(experiment, tmp_path, tiny_models):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "who ?", "label": "human"}\n{"text": "how ?"\n')
    refused("simulate", experiment(rows=bad), cwd=tmp_path, code=1, error=f"{bad} line 2: expected one JSON object")
    cut = shutil.copytree(tiny_models["bert"], tmp_path / "cut-model")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("simulate", experiment(model=cut), cwd=tmp_path, code=1, error="expected a whole safetensors file")
    refused("simulate", experiment(model="no/such/dir"), cwd=tmp_path, code=6, error="expected a model directory")


@pytest.mark.slow
def test_a_run_of_another_version_is_refused(experiment, tmp_path):
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    (run_dir / "experiment.json").write_text('{"format": 0}')
    refused("simulate", "--resume", run_dir, cwd=tmp_path, code=1, error=f"{run_dir} is a run of format 0")
    refused("simulate", "--resume", tmp_path / "none", cwd=tmp_path, code=1, error="expected a run directory")


@pytest.mark.slow
def test_help_does_not_load_torch(tmp_path):
    code = "import sys, fedspine_edge.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_importing_the_server_does_not_load_torch():
    code = (
        "import sys, fedspine_server.fleet, fedspine_server.store, fedspine_server.coordinator;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
