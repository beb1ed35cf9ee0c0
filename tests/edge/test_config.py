from dataclasses import dataclass

import pytest

from fedspine_edge.config import Experiment, load_table, presets, settings_from
from fedspine_edge.errors import UsageError


@dataclass(frozen=True)
class Oven:
    heat: float = 180.0
    shelf: int = 2

    def __post_init__(self):
        if self.heat < 0:
            raise ValueError(f"heat must not be negative, found {self.heat}")


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"unknown key 'haet' in \[oven\]") as caught:
        settings_from(Oven, {"haet": 200}, where="[oven]")
    assert caught.value.hint == "did you mean heat?"


def test_a_value_of_the_wrong_type_is_refused_with_its_place():
    with pytest.raises(UsageError, match=r"\[oven\]: shelf: Input should be a valid integer"):
        settings_from(Oven, {"shelf": "top"}, where="[oven]")


def test_a_value_out_of_range_is_refused():
    with pytest.raises(UsageError, match=r"\[oven\]: heat must not be negative, found -1"):
        settings_from(Oven, {"heat": -1}, where="[oven]")


def test_an_unknown_preset_names_the_nearest_one():
    with pytest.raises(UsageError, match=r"expected a preset or a .toml file, found 'quikstart'") as caught:
        load_table("quikstart")
    assert caught.value.hint == "did you mean quickstart?"


def test_the_shipped_presets_are_valid():
    assert presets() == ["encoder", "quickstart"]
    for name in presets():
        settings_from(Experiment, load_table(name), where=name)


def test_a_file_that_is_no_toml_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("model = ")
    with pytest.raises(UsageError, match=r"expected TOML in .*mine.toml"):
        load_table(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*none.toml"):
        load_table(str(tmp_path / "none.toml"))


def test_a_prompt_without_a_place_for_the_text_is_refused():
    with pytest.raises(UsageError, match=r"prompt must hold {text} once"):
        settings_from(Experiment, {"model": "m", "data": "d", "prompt": "Label:"}, where="mine")
