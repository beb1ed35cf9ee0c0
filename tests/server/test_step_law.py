import json

import pytest

from fedspine_edge.errors import UsageError
from fedspine_server import step_law
from fedspine_server.step_law import StepLaw, StepTime

LAW = StepLaw(0.2, 0.7, 0.1)


def times(law, *arms):
    return [StepTime(ratio, rank, law.work(ratio, rank)) for ratio, rank in arms]


def test_a_law_by_hand():
    assert LAW.work(0.0, 16) == pytest.approx(1.0)
    assert LAW.work(0.5, 32) == pytest.approx(0.2 + 0.35 + 0.2)
    relative = StepLaw(0.4, 1.4, 0.2).relative()
    assert (relative.constant, relative.kept, relative.lora) == pytest.approx((0.2, 0.7, 0.1))


def test_a_fit_finds_the_law_that_made_the_times():
    law = StepLaw(0.02, 0.07, 0.01)
    found = step_law.fit(times(law, (0.0, 4), (0.0, 32), (0.5, 4), (0.5, 32)))
    assert (found.constant, found.kept, found.lora) == pytest.approx((0.02, 0.07, 0.01))
    assert step_law.median_error(found, times(law, (0.25, 8), (0.7, 64))) == pytest.approx(0.0, abs=1e-9)


def test_no_part_of_a_fit_is_negative():
    # Rank costs less than nothing here: the fit gives it nothing.
    found = step_law.fit([StepTime(0.0, 4, 1.0), StepTime(0.0, 32, 0.9), StepTime(0.5, 4, 0.6), StepTime(0.5, 32, 0.5)])
    assert found.lora == 0.0
    assert 0.4 < found.work(0.5, 16) / found.work(0.0, 16) < 0.7


def test_errors_are_shares_of_what_was_measured():
    assert LAW.errors([StepTime(0.0, 16, 0.8), StepTime(0.0, 16, 2.0)]) == pytest.approx([0.25, 0.5])
    assert step_law.median_error(LAW, []) is None


@pytest.mark.parametrize(
    "arms", [[(0.0, 4), (0.5, 4), (0.7, 4)], [(0.0, 4), (0.0, 8), (0.0, 16)], [(0.0, 4), (0.5, 8)]]
)
def test_a_fit_needs_two_ratios_two_ranks_and_three_times(arms):
    with pytest.raises(ValueError, match="two pruning ratios and two ranks"):
        step_law.fit(times(LAW, *arms))


@pytest.mark.parametrize("parts", [(-0.1, 0.7, 0.1), (0.0, 0.0, 0.0), (float("nan"), 0.7, 0.1), (float("inf"), 0, 0)])
def test_parts_that_make_no_time_are_refused(parts):
    with pytest.raises(ValueError, match="not negative"):
        StepLaw(*parts)


def test_a_file_holds_the_law_relative_to_an_unpruned_step(tmp_path):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(step_law.document(StepLaw(0.4, 1.4, 0.2), {"model": "m"})))
    document = json.loads(path.read_text())
    assert document["step_seconds"] == pytest.approx(2.0)
    assert document["model"] == "m"
    assert step_law.read(path).work(0.0, 16) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found No such file"),
        ("no json", "expected JSON"),
        ("[]", "format 1"),
        ('{"format": 2, "law": {}}', "format 1"),
        ('{"format": 1}', "constant, kept and lora"),
        ('{"format": 1, "law": {"constant": 1, "kept": -2, "lora": 0}}', "not negative"),
        ('{"format": 1, "law": {"constant": "x", "kept": 1, "lora": 0}}', "constant, kept and lora"),
    ],
)
def test_a_file_without_a_law_is_a_usage_error_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "law.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        step_law.read(path)
    assert "profile MODEL --train" in caught.value.hint
