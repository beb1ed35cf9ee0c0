import json

import pytest

from fedspine_server import controllers
from fedspine_server.aggregation import AGGREGATIONS
from fedspine_server.settings import AGGREGATION_NAMES, CONTROLLER_NAMES, RunSettings, learning_rate_of


def test_settings_survive_json():
    settings = RunSettings(ranks=(3, 9), controller="sucb", controller_options={"mode": "paper"})
    assert RunSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_the_names_are_those_of_the_registries():
    assert set(CONTROLLER_NAMES) == set(controllers.CONTROLLERS)
    assert set(AGGREGATION_NAMES) == set(AGGREGATIONS)


def test_the_learning_rate_falls_linearly_to_its_final_fraction():
    settings = RunSettings(rounds=5, learning_rate=1.0, final_learning_rate_fraction=0.2)
    assert [learning_rate_of(settings, t, 8) for t in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_run_of_one_round_has_the_first_learning_rate():
    assert learning_rate_of(RunSettings(rounds=1, learning_rate=0.5), 0, 8) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, found 0"),
        ({"ranks": (4, 2)}, r"ranks must be ascending and positive, found \[4, 2\]"),
        ({"ranks": ()}, "ranks must be ascending"),
        ({"controller": "fixed", "fixed_rank": 3}, "fixed_rank 3 is not one of ranks"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"deadline_slack": 0.9}, "deadline_slack must be at least 1, found 0.9"),
        ({"mask_agreement": 1.5}, "mask_agreement must be in 0..1, found 1.5"),
        ({"max_pruning_ratio": 1.0}, "max_pruning_ratio must be below 1"),
        ({"target_sparsity": 0.8}, "target_sparsity 0.8 is above max_pruning_ratio 0.7"),
        ({"warmup_fraction": 0.6, "cooldown_fraction": 0.6}, "leave no rounds to prune in"),
        ({"controller": "lucky"}, "controller must be one of structured, sucb, hoo, grid-ucb, fixed, found lucky"),
        (
            {"aggregation": "sum"},
            "aggregation must be one of spine, hetlora, flexlora, flora, fedavg, trimmed-mean, median, found sum",
        ),
        ({"mask_mode": "random"}, "mask_mode must be one of uniform, per-layer, layers, found random"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, found 1.0"),
        ({"base_dtype": "int4"}, "base_dtype must be one of float32, bfloat16, int8, found int4"),
        ({"schedule": "slow"}, "schedule must be one of cubic, one-shot, found slow"),
        ({"importance": "luck"}, "importance must be one of lora-guided, salience"),
        ({"participants": -1}, "participants must not be negative, found -1"),
        ({"aggregation": "fedavg"}, "fedavg averages equal ranks only: use controller fixed"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**changes)


def test_an_unknown_option_of_a_controller_is_refused():
    settings = RunSettings(controller="sucb", controller_options={"luck": 7})
    with pytest.raises(ValueError, match="controller sucb has no option luck; it knows: mode"):
        controllers.CONTROLLERS["sucb"].init(settings)


def test_an_unknown_mode_of_sucb_is_refused():
    settings = RunSettings(controller="sucb", controller_options={"mode": "wild"})
    with pytest.raises(ValueError, match="sucb mode must be one of paper, capped, found wild"):
        controllers.CONTROLLERS["sucb"].init(settings)


def test_the_step_size_falls_with_the_rank_where_it_is_meant_for_one():
    settings = RunSettings(rounds=1, learning_rate=0.4, learning_rate_rank=8)
    assert [learning_rate_of(settings, 0, rank) for rank in (4, 8, 32)] == pytest.approx([0.8, 0.4, 0.1])
