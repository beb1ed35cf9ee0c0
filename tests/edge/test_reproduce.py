"""The comparison of methods: methods as settings, the grid, one run of it, and the figures from its results."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedspine_edge.cli import app
from fedspine_edge.commands import reproduce_grid as grid
from fedspine_edge.commands.engines import Engine
from fedspine_edge.commands.reproduce_run import FORMAT, read_result, result_path, run_cell
from fedspine_edge.config import Experiment, method, methods, settings_from
from fedspine_edge.errors import CheckpointError, UsageError
from fedspine_edge.live import LiveView
from fedspine_edge.report.grid_figures import NOT_RUN, summarise
from fedspine_edge.report.grid_page import render
from fedspine_edge.report.grid_text import as_text, told
from fedspine_server.settings import AGGREGATION_NAMES, RunSettings
from fedspine_server.step_law import StepLaw, document


@pytest.fixture
def laws(tmp_path):
    for model in ("minilm", "smollm2"):
        (tmp_path / f"step-law-{model}.json").write_text(json.dumps(document(StepLaw(0.3, 0.6, 0.1), {})))
    return tmp_path


def test_every_method_names_its_paper_and_what_was_simplified():
    assert set(methods()) == set(grid.METHODS)
    assert all(len(found.paper) > 20 and found.simplified for found in methods().values())


@pytest.mark.parametrize("name", grid.METHODS)
def test_every_method_is_settings_that_can_run_once_its_rule_is_there(name, laws):
    cell = grid.Cell("trec6", name, 0.5 if method(name).prunes else 0.0, 0)
    table = grid.table_of(cell, laws)
    rule = table["run"].get("aggregation", "spine")
    assert (grid.missing(cell) is None) == (rule in AGGREGATION_NAMES)
    known = {**table["run"], "aggregation": rule if rule in AGGREGATION_NAMES else "hetlora"}
    settings = settings_from(RunSettings, known, where=name)
    assert settings.target_sparsity == cell.sparsity
    assert (settings.rounds, settings.participants) == (24, 10)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="expected a method, found 'hetlra'") as refusal:
        method("hetlra")
    assert refusal.value.hint == "did you mean hetlora?"


def test_a_method_that_does_not_prune_overrides_the_target():
    table = method("fedlora").applied_to({"run": {"rounds": 3, "target_sparsity": 0.5}, "seed": 1})
    assert table["run"]["target_sparsity"] == 0.0
    assert (table["run"]["rounds"], table["seed"]) == (3, 1)


def test_cells_are_named_apart_and_the_first_eleven_compare_all_methods():
    cells = grid.full_grid()
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.method for cell in cells[:11]] == list(grid.METHODS)
    assert {(cell.task, cell.seed, cell.variant) for cell in cells[:11]} == {("trec6", 0, "plain")}
    seeds = {name: {c.seed for c in cells if c.method == name and c.variant == "plain"} for name in grid.METHODS}
    assert all(found >= {0, 1} for found in seeds.values())
    assert [name for name in grid.METHODS if 2 in seeds[name]] == [
        "spine",
        "fedlora",
        "fedspine-paper",
        "fed-loraprune",
    ]


def test_every_cell_that_can_be_run_is_an_experiment(laws):
    for cell in grid.full_grid():
        if grid.missing(cell) is None:
            table = grid.table_of(cell, laws)
            settings_from(Experiment, table, where=cell.name)
            settings_from(RunSettings, table["run"], where=cell.name)


def test_a_cell_without_its_parts_says_so(monkeypatch):
    assert "no variant storms" in grid.missing(grid.Cell("trec6", "spine", 0.5, 0, "storms"))
    monkeypatch.setattr(grid, "AGGREGATION_NAMES", ("spine",))
    assert grid.missing(grid.Cell("trec6", "hetlora", 0.0, 0)) == "no aggregation hetlora in this version"


def test_a_missing_law_and_a_name_nobody_has_are_refused(tmp_path):
    with pytest.raises(UsageError, match="expected a step-time law at"):
        grid.table_of(grid.Cell("trec6", "spine", 0.5, 0), tmp_path)
    with pytest.raises(UsageError, match="expected a run whose name holds 'trec7', found none"):
        grid.chosen(grid.full_grid(), "trec7")


def result(
    method, seconds, accuracies, *, task="trec6", seed=0, sparsity=0.0, variant="plain", held_out=0.9, waiting=0.5
):
    curve = [[(i + 1) * seconds, (i + 1) * 1000, accuracy] for i, accuracy in enumerate(accuracies)]
    return {
        "format": FORMAT, "task": task, "method": method, "sparsity": sparsity, "seed": seed, "variant": variant,
        "curve": curve, "accuracy": held_out, "waiting_share": waiting, "virtual_seconds": curve[-1][0],
        "transfer_bytes": curve[-1][1],
    }  # fmt: skip


RESULTS = [
    result("fedlora", 10, [0.5, 0.9, 0.9, 0.9]),
    result("spine", 5, [0.5, 0.9, 0.95], sparsity=0.5, held_out=0.92, waiting=0.1),
    result("fedspine-paper", 20, [0.5, 0.6, 0.7], sparsity=0.5, held_out=0.85),
    result("hetlora", 10, [0.5, 0.6, 0.7, 0.9]),
    result("spine", 5, [0.5, 0.9, 0.9], sparsity=0.5, held_out=0.91, variant="dropouts"),
]


def test_cost_to_target_by_hand():
    # The target is .99 x .9: ours is there after 10 s, fedlora after 20, hetlora after 40, the paper's never in its 60.
    cost = summarise(RESULTS)["cost_to_target"]
    assert cost["min_ratio"] == {"value": 2.0, "sd": None, "n": 1, "bounded": 0, "rival": "fedlora"}
    assert cost["vs_slowest"] == {"value": 6.0, "sd": None, "n": 1, "bounded": 1, "rival": "fedspine-paper"}
    assert cost["ours_not_reached"] == 0
    assert "at least: 1 never got there" in told(cost["vs_slowest"])


def test_quality_waiting_traffic_and_trouble_by_hand():
    found = summarise(RESULTS)
    assert found["quality"]["0.5"]["vs_best"]["value"] == pytest.approx(7.0)
    assert found["quality"]["0.5"]["vs_dense"]["value"] == pytest.approx(2.0)
    assert found["quality"]["0.7"] == {"vs_best": NOT_RUN, "vs_weakest": NOT_RUN, "vs_dense": NOT_RUN, "by_rival": {}}
    assert found["waiting_share"]["value"] == 0.1
    assert found["traffic_ratio"]["value"] == 0.5
    assert found["dropouts_drop"]["value"] == pytest.approx(1.0)
    assert found["attackers_drop"] == NOT_RUN


def test_a_run_of_ours_that_misses_the_target_is_counted_and_not_hidden():
    missed = [RESULTS[0], result("spine", 5, [0.5, 0.6], sparsity=0.5)]
    cost = summarise(missed)["cost_to_target"]
    assert cost["ours_not_reached"] == 1
    assert cost["min_ratio"] == NOT_RUN
    assert "ours never got there in 1 runs" in as_text(summarise(missed))


def test_the_spread_is_over_pairs_of_task_and_seed():
    more = [
        *RESULTS,
        result("fedlora", 20, [0.5, 0.9, 0.9, 0.9], seed=1),
        result("spine", 5, [0.9], sparsity=0.5, seed=1),
    ]
    found = summarise(more)["cost_to_target"]["by_rival"]["fedlora"]
    assert (found["n"], found["value"]) == (2, (2.0 + 8.0) / 2)
    assert found["sd"] == pytest.approx(np.std([2.0, 8.0], ddof=1))


def test_the_page_is_one_file_that_asks_for_nothing():
    page = render(RESULTS)
    assert not [text for text in ("://", "src=", "@import") if text in page]
    assert "spine 95.0 %" in page
    assert NOT_RUN in page
    assert page == render(RESULTS[::-1])


def test_a_damaged_result_is_refused(tmp_path):
    cell = grid.Cell("trec6", "spine", 0.5, 0)
    assert read_result(tmp_path, cell) is None
    result_path(tmp_path, cell).write_text("{")
    with pytest.raises(CheckpointError, match="expected a result of the grid in"):
        read_result(tmp_path, cell)
    result_path(tmp_path, cell).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="expected a result of format 1"):
        read_result(tmp_path, cell)


def test_the_command_wants_one_thing_and_says_when_nothing_is_there(tmp_path):
    found = CliRunner().invoke(app, ["reproduce"])
    assert isinstance(found.exception, UsageError)
    assert "expected one of --quick, --full and --summary" in str(found.exception)
    empty = CliRunner().invoke(app, ["reproduce", "--summary", "--results", str(tmp_path)])
    assert isinstance(empty.exception, CheckpointError)
    assert "expected results in" in str(empty.exception)


def run_small_cell(tiny_models, folder, engine):
    rows = [{"text": f"{word} {i}", "label": word} for word in ("how", "who") for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cell = grid.Cell("trec6", "spine", 0.5, 0)
    table = {
        "model": str(tiny_models["bert"]), "data": str(folder / "rows.jsonl"), "held_out": 10, "validation": 8,
        "run": {"rounds": 3, "steps_per_round": 2, "participants": 2, "ranks": [2, 4], "fixed_rank": 2},
        "fleet": {"tx2": 2, "xavier_nx": 1},
    }  # fmt: skip
    with LiveView(quiet=True) as live:
        found = run_cell(
            cell, table, work=folder / "work", results=folder / engine.name, engine=engine, live=live
        )  # fmt: skip
    stored = read_result(folder / engine.name, cell)
    assert stored == json.loads(json.dumps(found))
    assert not (folder / "work" / cell.name).exists()
    return stored, table


@pytest.mark.slow
def test_a_cell_runs_is_stored_and_leaves_nothing_else_behind(tiny_models, tmp_path):
    stored, table = run_small_cell(tiny_models, tmp_path, Engine("processes", 1))
    assert stored["digest"] == grid.digest(table)
    assert len(stored["curve"]) == 3
    assert 0 <= stored["waiting_share"] < 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_cell_on_ray_stores_the_same_result(tiny_models, tmp_path):
    in_processes, _ = run_small_cell(tiny_models, tmp_path, Engine("processes", 1))
    on_ray, _ = run_small_cell(tiny_models, tmp_path, Engine("ray", 2))
    measured = ("wall_seconds", "server_cpu_seconds")
    assert {k: v for k, v in on_ray.items() if k not in measured} == {
        k: v for k, v in in_processes.items() if k not in measured
    }


def test_an_unknown_engine_is_refused(tmp_path):
    found = CliRunner().invoke(app, ["reproduce", "--quick", "--engine", "spark", "--results", str(tmp_path)])
    assert isinstance(found.exception, UsageError)
    assert "expected an engine among processes, ray, found 'spark'" in str(found.exception)
