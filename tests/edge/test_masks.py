import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.masks import blend, choose, keep_all, kept_counts
from fedspine_edge.protocol import Group, Layout


def layout(heads: int = 4, ffn: int = 8, block: int = 2, layers: int = 2) -> Layout:
    groups = [
        group
        for layer in range(layers)
        for group in (
            Group(f"layers.{layer}.heads", "heads", heads, 1, 10),
            Group(f"layers.{layer}.ffn", "ffn", ffn, block, 3),
        )
    ]
    return Layout("0" * 64, tuple(groups), ())


def scores_of(plan: Layout, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.num_members) for group in plan.groups}


def test_ratio_zero_keeps_every_member():
    plan = layout()
    keep = choose(plan, scores_of(plan, 0), pruning_ratio=0.0, mode="per-layer")
    assert kept_counts(keep) == kept_counts(keep_all(plan))


def test_uniform_keeps_the_best_members_in_their_own_numbering():
    plan = layout(layers=1)
    scores = {"layers.0.heads": np.array([0.1, 0.9, 0.5, 0.2]), "layers.0.ffn": np.array([8, 1, 7, 2, 6, 3, 5, 4.0])}
    keep = choose(plan, scores, pruning_ratio=0.5, mode="uniform")
    assert keep["layers.0.heads"].tolist() == [1, 2]
    assert keep["layers.0.ffn"].tolist() == [0, 2, 4, 6]


def test_per_layer_lets_the_layers_compete():
    plan = layout(heads=2, ffn=4, block=2)
    scores = {
        "layers.0.heads": np.array([0.9, 0.8]),
        "layers.1.heads": np.array([0.2, 0.1]),
        "layers.0.ffn": np.array([1, 1, 0, 0.0]),
        "layers.1.ffn": np.array([9, 9, 8, 8.0]),
    }
    keep = choose(plan, scores, pruning_ratio=0.25, mode="per-layer")
    assert keep["layers.0.heads"].tolist() == [0, 1]
    assert keep["layers.1.heads"].tolist() == [0]
    assert keep["layers.0.ffn"].tolist() == [0, 1]
    assert keep["layers.1.ffn"].tolist() == [0, 1, 2, 3]


def test_a_member_nobody_measured_goes_first():
    plan = layout(layers=1)
    scores = scores_of(plan, 0)
    scores["layers.0.heads"] = np.array([np.nan, 0.1, 0.2, 0.3])
    assert 0 not in choose(plan, scores, pruning_ratio=0.25, mode="uniform")["layers.0.heads"]


def test_candidates_bound_what_stays():
    plan = layout(layers=1)
    candidates = {"layers.0.heads": np.array([0, 3]), "layers.0.ffn": np.arange(8)}
    keep = choose(plan, scores_of(plan, 1), pruning_ratio=0.25, mode="uniform", candidates=candidates)
    assert keep["layers.0.heads"].tolist() == [0, 3]


@given(
    ratio=st.floats(0, 0.99),
    mode=st.sampled_from(["uniform", "per-layer"]),
    seed=st.integers(0, 99),
    layers=st.integers(1, 4),
)
def test_at_least_the_ratio_goes_and_every_layer_keeps_a_block(ratio, mode, seed, layers):
    plan = layout(heads=3, ffn=12, block=4, layers=layers)
    keep = choose(plan, scores_of(plan, seed), pruning_ratio=ratio, mode=mode)
    for kind in ("heads", "ffn"):
        groups = [group for group in plan.groups if group.kind == kind]
        counts = [len(keep[group.name]) for group in groups]
        assert all(n >= g.block and n % g.block == 0 for n, g in zip(counts, groups, strict=True))
        floor = sum(group.block for group in groups)
        assert sum(counts) <= max(floor, (1 - ratio) * sum(g.num_members for g in groups) + 1e-4)


@given(
    seed=st.integers(0, 99),
    low=st.floats(0, 0.9),
    more=st.floats(0, 0.09),
    mode=st.sampled_from(["uniform", "per-layer"]),
)
def test_masks_of_the_same_scores_are_nested(seed, low, more, mode):
    plan = layout(heads=5, ffn=24, block=2, layers=3)
    scores = scores_of(plan, seed)
    wide = choose(plan, scores, pruning_ratio=low, mode=mode)
    narrow = choose(plan, scores, pruning_ratio=low + more, mode=mode)
    assert all(set(narrow[name]) <= set(wide[name]) for name in wide)


def test_blend_takes_what_is_known_where_one_side_is_not():
    nan = np.nan
    mixed = blend(np.array([1.0, nan, 2.0, nan]), np.array([3.0, 4.0, nan, nan]), 0.75)
    np.testing.assert_allclose(mixed, [1.5, 4.0, 2.0, nan])


def test_a_ratio_out_of_range_is_refused():
    plan = layout()
    with pytest.raises(ValueError, match=r"expected a pruning ratio in \[0, 1\), found 1"):
        choose(plan, scores_of(plan, 0), pruning_ratio=1.0, mode="uniform")


def test_an_unknown_mode_is_refused():
    plan = layout()
    with pytest.raises(ValueError, match="expected mask mode uniform or per-layer or layers, found 'sideways'"):
        choose(plan, scores_of(plan, 0), pruning_ratio=0.1, mode="sideways")


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.8])
def test_whole_layers_go_least_important_first_and_one_in_between(ratio):
    plan = layout()
    scores = {g.name: np.full(g.num_members, float(g.name.split(".")[1]) + 1) for g in plan.groups}  # later = better
    keep = choose(plan, scores, pruning_ratio=ratio, mode="layers")
    for kind in {group.kind for group in plan.groups}:
        groups = [group for group in plan.groups if group.kind == kind]
        kept = [len(keep[group.name]) for group in groups]
        assert sum(kept) <= sum(group.num_members for group in groups) * (1 - ratio) + groups[0].block * len(groups)
        assert kept == sorted(kept)
        partial = [k for k, g in zip(kept, groups, strict=True) if g.block < k < g.num_members]
        assert len(partial) <= 1
        assert all(k % g.block == 0 and k >= g.block for k, g in zip(kept, groups, strict=True))
