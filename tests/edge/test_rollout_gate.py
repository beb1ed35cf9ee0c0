"""The gate of a rollout: its grammar, and what meets it."""

import math

import pytest

from fedspine_edge.errors import UsageError
from fedspine_edge.rollout_gate import Condition, from_json, parse, to_json, unmet


def test_a_gate_is_conditions_joined_by_and():
    found = parse("ppl<=1.05*base and tokens_per_second >= 8 and prompt_tokens_per_second>base")
    assert found == (
        Condition("ppl", "<=", 1.05, of_base=True),
        Condition("tokens_per_second", ">=", 8.0, of_base=False),
        Condition("prompt_tokens_per_second", ">", 1.0, of_base=True),
    )
    assert [str(condition) for condition in found] == [
        "ppl<=1.05*base", "tokens_per_second>=8", "prompt_tokens_per_second>1*base",
    ]  # fmt: skip
    assert parse("  ") == ()
    assert from_json(to_json(found)) == found
    assert parse(" and ".join(map(str, found))) == found


@pytest.mark.parametrize(
    "text",
    ["ppl", "ppl<=", "ppl==3", "ppl<=nan", "ppl<=0", "ppl<=-1", "size<3", "ppl<3 or ppl>2", "ppl<3 and", "and ppl<3",
     "ppl<1e5", "ppl<2*bases", "__import__('os')", "ppl<3" * 100, " and ".join(["ppl<3"] * 9), "ppl<١"],
)  # fmt: skip
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(UsageError, match="expected"):
        parse(text)


@pytest.mark.parametrize(
    "document",
    [None, {}, ["ppl"], [{"figure": "ppl"}], [{"figure": "ppl", "sign": "<=", "limit": "1", "of_base": False}],
     [{"figure": "ppl", "sign": "<=", "limit": float("nan"), "of_base": False}],
     [{"figure": "os", "sign": "<=", "limit": 1.0, "of_base": False}],
     [{"figure": "ppl", "sign": "<=", "limit": 1.0, "of_base": 1, "x": 2}]],
)  # fmt: skip
def test_a_document_that_is_no_gate_is_refused(document):
    with pytest.raises(UsageError, match="expected"):
        from_json(document)


def test_what_does_not_hold_is_said_with_both_figures():
    gate = parse("ppl<=1.05*base and tokens_per_second>=8")
    assert unmet(gate, {"ppl": 10.5, "tokens_per_second": 8.0}, {"ppl": 10.0}) is None
    assert unmet(gate, {"ppl": 10.6, "tokens_per_second": 8.0}, {"ppl": 10.0}) == "ppl<=1.05*base: 10.6, limit 10.5"
    assert unmet(gate, {"ppl": 10.0, "tokens_per_second": 7.9}, {"ppl": 10.0}) == "tokens_per_second>=8: 7.9, limit 8"
    assert unmet((), {}, None) is None


def test_what_cannot_be_judged_does_not_pass():
    gate = parse("ppl<=1.05*base")
    assert "no model to compare with" in unmet(gate, {"ppl": 10.0}, None)
    assert "no model to compare with" in unmet(gate, {"ppl": 10.0}, {"ppl": None})
    assert "ppl was not measured" in unmet(gate, {"ppl": None}, {"ppl": 10.0})
    assert unmet(gate, {"ppl": math.nan}, {"ppl": 10.0})
