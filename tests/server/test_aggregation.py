import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_server.aggregation import AGGREGATIONS, Contribution, Factors, RoundFacts, fedavg, hetlora, spine
from fedspine_server.aggregation.low_rank import ROW_NORM_FLOOR, LongSum, best_factors
from fedspine_server.aggregation.robust import clipped


def facts(*, drop_uncovered=False):
    return RoundFacts(drop_uncovered, np.random.default_rng(0))


def zeros(out, inn, rank):
    return Factors(np.ones((rank, inn), dtype=np.float32), np.zeros((out, rank), dtype=np.float32))


def product(factors):
    return factors.lora_b.astype(np.float64) @ factors.lora_a.astype(np.float64)


def part_of(name, weight, lora_a, lora_b, keep_out=None, keep_in=None):
    return Contribution(name, weight, len(lora_a), lambda: (lora_a, lora_b), keep_out, keep_in)


def random_part(generator, name, *, out=7, inn=5, rank=2, weight=1.0, keep_out=None, keep_in=None):
    lora_a, lora_b = generator.standard_normal((rank, inn)), generator.standard_normal((out, rank))
    if keep_out is not None:
        lora_b *= keep_out[:, None]
    if keep_in is not None:
        lora_a *= keep_in
    return part_of(name, weight, lora_a, lora_b, keep_out, keep_in)


def by_the_formula(old, parts):
    """The definition, entry by entry and component by component."""
    rank, (out, inn) = old.lora_a.shape[0], (old.lora_b.shape[0], old.lora_a.shape[1])
    result = np.zeros((out, inn))
    for j in range(out):
        for l in range(inn):  # noqa: E741 - the letter of the formula
            for h in range(rank):
                here = [
                    part
                    for part in parts
                    if h < part.rank
                    and (part.keep_out is None or part.keep_out[j])
                    and (part.keep_in is None or part.keep_in[l])
                ]
                if here:
                    total = sum(part.weight * part.read()[1][j, h] * part.read()[0][h, l] for part in here)
                    result[j, l] += total / sum(part.weight for part in here)
                else:
                    result[j, l] += old.lora_b[j, h] * old.lora_a[h, l]
    return result


def test_two_devices_of_unequal_masks_and_ranks_by_hand():
    # Device a: rank 1, keeps row 0 only. Device b: rank 2, keeps both rows.
    a = part_of("a", 1.0, np.array([[1.0, 2.0]]), np.array([[4.0], [0.0]]), np.array([True, False]))
    b = part_of(
        "b", 3.0, np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[8.0, 4.0], [2.0, 6.0]]), np.array([True, True])
    )
    merged = spine.aggregate(zeros(2, 2, 2), [a, b], facts())
    # Row 0: component 0 is (1*4*[1,2] + 3*8*[1,0]) / 4 = [7, 2], component 1 by b alone [0, 4]. Row 1 by b alone.
    np.testing.assert_allclose(product(merged), [[7.0, 6.0], [2.0, 6.0]], atol=1e-5)


def test_equal_ranks_and_full_masks_give_the_weighted_mean_of_the_products():
    generator = np.random.default_rng(1)
    parts = [random_part(generator, name, out=9, inn=9, weight=w) for name, w in (("a", 1.0), ("b", 3.0))]
    old = Factors(generator.standard_normal((4, 9)).astype(np.float32), np.zeros((9, 4), dtype=np.float32))
    mean = (parts[0].read()[1] @ parts[0].read()[0] + 3 * parts[1].read()[1] @ parts[1].read()[0]) / 4
    for rule in (spine.aggregate, AGGREGATIONS["flexlora"], AGGREGATIONS["flora"]):
        np.testing.assert_allclose(product(rule(old, parts, facts())), mean, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), side=st.sampled_from(["out", "in", "both"]), num=st.integers(1, 4))
def test_spine_is_its_formula_for_any_masks_and_ranks(seed, side, num):
    generator = np.random.default_rng(seed)
    parts = []
    for index in range(num):
        keep_out = generator.random(7) < 0.6 if side in ("out", "both") else None
        keep_in = generator.random(5) < 0.6 if side in ("in", "both") else None
        rank, weight = int(generator.integers(1, 6)), float(generator.uniform(0.5, 3))
        parts.append(random_part(generator, f"d{index}", rank=rank, weight=weight, keep_out=keep_out, keep_in=keep_in))
    old = Factors(
        generator.standard_normal((5, 5)).astype(np.float32), generator.standard_normal((7, 5)).astype(np.float32)
    )
    np.testing.assert_allclose(product(spine.aggregate(old, parts, facts())), by_the_formula(old, parts), atol=2e-4)


@pytest.mark.parametrize("rule", sorted(set(AGGREGATIONS) - {"fedavg"}))
def test_the_order_of_devices_changes_nothing(rule):
    generator = np.random.default_rng(2)
    keep = np.array([True, False, True, True, False, True, True])
    parts = [random_part(generator, f"d{rank}", rank=rank, keep_out=keep if rank == 2 else None) for rank in (3, 1, 2)]
    old = Factors(
        generator.standard_normal((4, 5)).astype(np.float32), generator.standard_normal((7, 4)).astype(np.float32)
    )
    one, other = AGGREGATIONS[rule](old, parts, facts()), AGGREGATIONS[rule](old, parts[::-1], facts())
    np.testing.assert_array_equal(one.lora_a, other.lora_a)
    np.testing.assert_array_equal(one.lora_b, other.lora_b)


@pytest.mark.parametrize("rule", sorted(AGGREGATIONS))
def test_devices_that_return_what_they_were_given_leave_the_adapter_as_it_is(rule):
    generator = np.random.default_rng(3)
    old = best_factors(generator.standard_normal((97, 4)), generator.standard_normal((4, 7)), 4, generator)
    ranks = (1, 2, 4) if rule == "spine" else (2, 2, 2)  # zero-padding shrinks what only some devices have
    keep = np.arange(97) % 3 > 0
    parts = [
        part_of(f"d{i}", 1.0 + i, old.lora_a[:r].astype(np.float64), old.lora_b[:, :r].astype(np.float64), None, None)
        for i, r in enumerate(ranks)
    ]
    masked = part_of("m", 2.0, parts[0].read()[0], parts[0].read()[1] * keep[:, None], keep, None)
    new = AGGREGATIONS[rule](old, [*parts, masked], facts())
    np.testing.assert_allclose(new.lora_a, old.lora_a, atol=1e-5)
    np.testing.assert_allclose(new.lora_b, old.lora_b, atol=1e-5)


def test_a_row_that_no_device_kept_stays_until_it_is_gone_for_good():
    old = Factors(np.eye(2, dtype=np.float32), np.array([[1, 2], [3, 4]], dtype=np.float32))
    part = part_of("a", 1.0, np.eye(2), np.array([[5.0, 6.0], [0.0, 0.0]]), np.array([True, False]))
    np.testing.assert_allclose(product(spine.aggregate(old, [part], facts())), [[5, 6], [3, 4]], atol=1e-5)
    gone = spine.aggregate(old, [part], facts(drop_uncovered=True))
    np.testing.assert_allclose(product(gone), [[5, 6], [0, 0]], atol=1e-5)


def test_truncation_keeps_the_largest_components_first():
    a_stack, b_stack = np.diag([1.0, 1.0, 1.0]), np.diag([1.0, 9.0, 4.0])
    factors = best_factors(b_stack, a_stack, 2, np.random.default_rng(0))
    np.testing.assert_allclose(product(factors), np.diag([0.0, 9.0, 4.0]), atol=1e-6)
    np.testing.assert_allclose(factors.lora_b[:, :1] @ factors.lora_a[:1], np.diag([0.0, 9.0, 0.0]), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(factors.lora_a, axis=1), [3.0, 2.0], rtol=1e-6)  # balanced: sqrt of sigma


def test_the_short_and_the_dense_way_agree():
    generator = np.random.default_rng(4)
    b_stack, a_stack = generator.standard_normal((40, 30)), generator.standard_normal((30, 97))
    short = best_factors(b_stack, a_stack, 8, np.random.default_rng(0))
    longer_b = np.concatenate([b_stack, np.zeros((40, 20))], axis=1)
    longer_a = np.concatenate([a_stack, np.ones((20, 97))], axis=0)
    dense = best_factors(longer_b, longer_a, 8, np.random.default_rng(0))
    np.testing.assert_allclose(short.lora_a, dense.lora_a, atol=1e-4)
    np.testing.assert_allclose(short.lora_b, dense.lora_b, atol=1e-4)


def test_a_component_that_has_died_is_drawn_anew_and_adds_nothing():
    factors = best_factors(np.array([[2.0], [0.0]]), np.array([[3.0, 4.0]]), 2, np.random.default_rng(0))
    np.testing.assert_allclose(product(factors), [[6.0, 8.0], [0.0, 0.0]], atol=1e-6)
    assert np.linalg.norm(factors.lora_a[1]) > 0
    np.testing.assert_array_equal(factors.lora_b[:, 1], [0.0, 0.0])


def test_a_weak_component_keeps_a_row_of_a_as_long_as_at_the_start():
    factors = best_factors(np.array([[1e-4]]), np.array([[1.0, 0.0, 0.0]]), 1, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(factors.lora_a[0]), ROW_NORM_FLOOR, rtol=1e-6)
    np.testing.assert_allclose(product(factors), [[1e-4, 0.0, 0.0]], rtol=1e-5)


def test_signs_do_not_depend_on_the_signs_that_came_in():
    one = best_factors(np.array([[2.0], [1.0]]), np.array([[3.0, 4.0]]), 1, np.random.default_rng(0))
    other = best_factors(np.array([[-2.0], [-1.0]]), np.array([[-3.0, -4.0]]), 1, np.random.default_rng(0))
    np.testing.assert_allclose(one.lora_a, other.lora_a, rtol=1e-6)
    assert one.lora_a[0, 1] > 0


def test_hetlora_weighs_devices_by_the_norm_of_their_product():
    strong = part_of("a", 1.0, np.array([[1.0, 0.0]]), np.array([[3.0]]))
    weak = part_of("b", 100.0, np.array([[0.0, 1.0]]), np.array([[1.0]]))
    merged = hetlora.aggregate(zeros(1, 2, 1), [strong, weak], facts())
    np.testing.assert_allclose(merged.lora_a, [[0.75, 0.25]])
    np.testing.assert_allclose(merged.lora_b, [[2.5]])


def test_hetlora_leaves_components_above_every_rank_alone():
    old = Factors(np.array([[1, 1], [2, 2]], dtype=np.float32), np.array([[1, 5]], dtype=np.float32))
    merged = hetlora.aggregate(old, [part_of("a", 1.0, np.array([[3.0, 3.0]]), np.array([[4.0]]))], facts())
    np.testing.assert_allclose(merged.lora_a, [[3, 3], [2, 2]])
    np.testing.assert_allclose(merged.lora_b, [[4, 5]])


def test_fedavg_fills_pruned_rows_with_the_old_values_and_averages():
    old = Factors(np.array([[1.0]], dtype=np.float32), np.array([[10.0], [20.0]], dtype=np.float32))
    a = part_of("a", 1.0, np.array([[3.0]]), np.array([[0.0], [4.0]]), np.array([False, True]))
    b = part_of("b", 3.0, np.array([[1.0]]), np.array([[2.0], [8.0]]))
    merged = fedavg.aggregate(old, [a, b], facts())
    np.testing.assert_allclose(merged.lora_a, [[1.5]])
    np.testing.assert_allclose(merged.lora_b, [[4.0], [7.0]])


def test_fedavg_refuses_unequal_ranks():
    generator = np.random.default_rng(5)
    parts = [random_part(generator, "a", rank=1), random_part(generator, "b", rank=2)]
    with pytest.raises(ValueError, match=r"fedavg takes one rank, found ranks \[1, 2\]"):
        fedavg.aggregate(zeros(7, 5, 2), parts, facts())


def energy_above(rule, *, rounds=20, smallest=2):
    """Share of the first round's energy above the smallest rank that is left when nobody trains, round by round."""
    generator = np.random.default_rng(6)
    factors = best_factors(generator.standard_normal((24, 8)), generator.standard_normal((8, 20)), 8, generator)
    energies = []
    for _ in range(rounds + 1):
        energies.append(np.linalg.norm(product(factors) - product(cut(factors, smallest))) ** 2)
        a, b = factors.wide()
        parts = [part_of(f"d{i}", 1.0, a[:r], b[:, :r]) for i, r in enumerate((2, 2, 4, 8))]
        factors = AGGREGATIONS[rule](factors, parts, facts())
    return energies[-1] / energies[0]


def cut(factors, rank):
    return Factors(factors.lora_a[:rank], factors.lora_b[:, :rank])


def test_energy_above_the_smallest_rank_lasts_with_spine_and_fades_with_flexlora():
    assert energy_above("spine") == pytest.approx(1.0, rel=1e-4)
    assert energy_above("flora") == pytest.approx(1.0, rel=1e-4)
    assert energy_above("flexlora") < 1e-3
    assert energy_above("hetlora") < 1e-3


def test_flora_adds_each_devices_change_by_its_weight():
    old = Factors(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    a = part_of("a", 1.0, np.array([[1.0, 0.0]]), np.array([[5.0], [0.0]]))  # was given diag(1, 0), adds diag(4, 0)
    b = part_of("b", 3.0, np.eye(2), np.eye(2))  # changes nothing
    np.testing.assert_allclose(product(AGGREGATIONS["flora"](old, [a, b], facts())), np.diag([2.0, 1.0]), atol=1e-5)


def test_flexlora_averages_products_not_factors():
    a = part_of("a", 1.0, np.array([[2.0, 0.0]]), np.array([[1.0], [0.0]]))
    b = part_of("b", 1.0, np.array([[0.0, 4.0]]), np.array([[0.0], [1.0]]))
    merged = AGGREGATIONS["flexlora"](zeros(2, 2, 2), [a, b], facts())
    np.testing.assert_allclose(product(merged), np.diag([1.0, 2.0]), atol=1e-5)


def test_a_long_sum_is_the_same_as_one_product():
    generator = np.random.default_rng(7)
    pairs = [(generator.standard_normal((9, r)), generator.standard_normal((r, 12))) for r in (3, 5, 70, 2)]
    total = LongSum((9, 12), 80)
    for b, a in pairs:
        total.add(b, a)
    whole = best_factors(sum(b @ a for b, a in pairs), None, 4, np.random.default_rng(0))
    np.testing.assert_allclose(product(total.best(4, np.random.default_rng(0))), product(whole), atol=1e-4)


def test_a_long_sum_refuses_more_terms_than_were_announced():
    total = LongSum((9, 12), 2)
    with pytest.raises(ValueError, match="at most 2 terms"):
        total.add(np.ones((9, 3)), np.ones((3, 12)))


ATTACKS = {"sign": (-1.0, 1.0), "scaled": (30.0, 30.0)}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
def test_a_fifth_of_attackers_hardly_moves_a_robust_rule(rule, attack):
    generator = np.random.default_rng(8)
    true_b, true_a = generator.standard_normal((12, 2)), generator.standard_normal((2, 10))
    noisy = [(true_b + 0.05 * generator.standard_normal((12, 2)), true_a) for _ in range(10)]
    times_b, times_a = ATTACKS[attack]
    lies = [(b * times_b, a * times_a) if i < 2 else (b, a) for i, (b, a) in enumerate(noisy)]
    old, wanted = zeros(12, 10, 4), true_b @ true_a

    def distance(name, pairs):
        parts = [part_of(f"d{i}", 1.0, a, b) for i, (b, a) in enumerate(pairs)]
        return np.linalg.norm(product(AGGREGATIONS[name](old, parts, facts())) - wanted) / np.linalg.norm(wanted)

    assert distance(rule, noisy) < 0.05
    assert distance(rule, lies) < 0.1
    assert distance("spine", lies) > 0.3


def test_a_trimmed_mean_takes_each_entry_over_those_who_kept_it():
    keep = np.array([True, False])
    values = [1.0, 2.0, 3.0, 100.0]
    parts = [part_of(f"d{i}", 1.0, np.array([[1.0]]), np.array([[v], [v]])) for i, v in enumerate(values)]
    parts.append(part_of("m", 1.0, np.array([[1.0]]), np.array([[4.0], [0.0]]), keep, None))
    merged = AGGREGATIONS["median"](zeros(2, 1, 1), parts, facts())
    np.testing.assert_allclose(product(merged), [[3.0], [2.5]], atol=1e-5)
    trimmed = AGGREGATIONS["trimmed-mean"](zeros(2, 1, 1), parts, facts())
    np.testing.assert_allclose(product(trimmed), [[3.0], [2.5]], atol=1e-5)  # one of 5 and one of 4 at either end


def test_clipping_draws_back_who_moved_too_far_and_nobody_else():
    old = Factors(np.eye(2, dtype=np.float32), np.zeros((2, 2), dtype=np.float32))
    parts = [part_of(f"d{i}", 1.0, np.eye(2), scale * np.eye(2)) for i, scale in enumerate((1.0, 1.5, 50.0))]
    honest, edge, liar = clipped(old, parts, 2.0)
    assert honest is parts[0]
    assert edge is parts[1]
    a, b = liar.read()
    np.testing.assert_allclose(np.linalg.norm(b @ a), 2 * np.linalg.norm(1.5 * np.eye(2)), rtol=0.15)
    assert np.linalg.norm(b @ a) <= 2 * np.linalg.norm(1.5 * np.eye(2)) + 1e-9
