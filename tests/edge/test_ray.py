"""The simulator's rounds as Ray tasks: the same run, wherever its tasks are done."""

import json
import os
import shutil
import subprocess
import sys
import uuid

import pytest
from flower_fleet import PROGRAM, free_port
from test_link_end_to_end import TOML
from tiny import questions

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # a token of the test's own: nothing is written into the user's home
    "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
}


@pytest.fixture(scope="module")
def toml(tmp_path_factory, tiny_models):
    folder = tmp_path_factory.mktemp("r")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in questions())
    )
    (folder / "mine.toml").write_text(TOML.format(model=tiny_models["bert"], data=folder / "rows.jsonl"))
    return folder / "mine.toml"


def simulate(toml, out, *arguments, status=0):
    command = [*PROGRAM, "simulate", str(toml), "--out", str(out), "--json", "--workers", "2", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr


@pytest.fixture(scope="module")
def in_processes(toml, tmp_path_factory):
    return simulate(toml, tmp_path_factory.mktemp("processes") / "run")


def same_run(one, other):
    names = ("adapter_sha256", "virtual_seconds", "accuracy", "accuracy_untuned", "sparsity", "transfer_bytes")
    return [one[name] for name in names] == [other[name] for name in names]


def test_ray_on_this_machine_makes_the_same_run(toml, in_processes, tmp_path):
    assert same_run(simulate(toml, tmp_path / "run", "--engine", "ray"), in_processes)
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["experiment"]["engine"] == "ray"


@pytest.fixture
def cluster(tmp_path_factory):
    """Two nodes of one processor each, as `ray start` makes them; ended through the marker in their environment."""
    marker = uuid.uuid4().hex
    environment = {**ENVIRONMENT, "FEDSPINE_TEST_CLUSTER": marker}
    environment["FEDSPINE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    port = free_port()
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", "1", "--disable-usage-stats"]
    memory = ["--object-store-memory", str(100 << 20), "--node-ip-address", "127.0.0.1"]
    head = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", f"/tmp/ray-{marker[:8]}"]
    try:
        for options in (head, ["--address", f"127.0.0.1:{port}"]):
            started = subprocess.run(
                [*ray, *memory, *options], env=environment, capture_output=True, text=True, check=False, timeout=200
            )
            assert started.returncode == 0, started.stdout + started.stderr
        yield f"127.0.0.1:{port}", environment["FEDSPINE_CACHE"]
    finally:
        end_all(marker)
        shutil.rmtree(f"/tmp/ray-{marker[:8]}", ignore_errors=True)


def end_all(marker):
    import psutil

    own = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FEDSPINE_TEST_CLUSTER") == marker:
                own.append(process)
        except psutil.Error:
            continue
    for process in own:
        process.kill()
    psutil.wait_procs(own, timeout=30)


def test_a_cluster_of_two_nodes_makes_the_same_run(toml, in_processes, cluster, tmp_path):
    address, cache = cluster
    assert same_run(simulate(toml, tmp_path / "run", "--engine", "ray", "--ray-address", address), in_processes)
    assert os.listdir(os.path.join(cache, "ray")), "the nodes did not take the base model from the object store"  # noqa: PTH118, PTH208


def test_no_cluster_at_the_address_is_an_error_with_a_remedy(toml, tmp_path):
    said = simulate(toml, tmp_path / "run", "--engine", "ray", "--ray-address", f"127.0.0.1:{free_port()}", status=5)
    assert "expected a Ray cluster at" in said
    assert "ray start" in said
