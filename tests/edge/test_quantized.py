import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import Group, Layout, Matrix
from fedspine_edge.quantized import BLOCK, LEVELS, DecodedArrays, decoded, encoded, mask_bits, rounded

LAYOUT = Layout("ba5e", (Group("ffn", "ffn", 20, 2, 8),), (Matrix("up", 40, 9, "ffn", None),))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    dtype=st.sampled_from(sorted(LEVELS)),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(rows, columns, dtype, scale, seed):
    values = scale * np.random.default_rng(seed).standard_normal((rows, columns))
    codes, scales = encoded(values, dtype)
    back = decoded(codes, scales, columns).astype(np.float64)
    steps = np.repeat(scales.astype(np.float64), BLOCK, axis=1)[:, :columns]
    assert (np.abs(back - values) <= 0.5 * steps + 2e-3 * np.abs(values) + 1e-7).all()
    assert codes.nbytes == rows * (columns if dtype == "int8" else -(-columns // 2))


@pytest.mark.parametrize("dtype", sorted(LEVELS))
def test_zeros_stay_zeros(dtype):
    np.testing.assert_array_equal(decoded(*encoded(np.zeros((2, 5)), dtype), 5), np.zeros((2, 5)))


def test_not_a_number_is_still_none_after_the_wire():
    codes, scales = encoded(np.ones((1, 5)), "int8")
    assert np.isnan(decoded(codes, np.full_like(scales, np.nan), 5)).all()


def product_of(sent_a, sent_b, num_in, num_out):
    return decoded(*sent_b, num_out).astype(np.float64).T @ decoded(*sent_a, num_in).astype(np.float64)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.02), ("int4", 0.2)])
def test_what_is_sent_is_near_what_was_trained(dtype, most):
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((4, 96)), generator.standard_normal((64, 4))
    sent_a, sent_b, _ = rounded(a, b, None, dtype)
    error = np.linalg.norm(product_of(sent_a, sent_b, 96, 64) - b @ a) / np.linalg.norm(b @ a)
    assert 0 < error < most


def mean_of_rounds(feedback):
    """The same product sent 24 times in ever new factors: how far the mean of what came is from it."""
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((4, 96)), generator.standard_normal((64, 4))
    whole, total, residual = b @ a, 0.0, None
    for _ in range(24):
        turn = np.linalg.qr(generator.standard_normal((4, 4)))[0]
        sent_a, sent_b, left = rounded(turn.T @ a, b @ turn, residual, "int4")
        residual = left if feedback else None
        total = total + product_of(sent_a, sent_b, 96, 64) / 24
    return np.linalg.norm(total - whole) / np.linalg.norm(whole)


def test_what_rounding_lost_in_one_round_is_made_up_for_in_the_next():
    assert mean_of_rounds(feedback=True) < 0.7 * mean_of_rounds(feedback=False)


def update_arrays(dtype="int4", members=(0, 3, 19)):
    generator = np.random.default_rng(2)
    sent_a = encoded(generator.standard_normal((2, 9)), dtype)
    sent_b = encoded(generator.standard_normal((2, 2 * len(members))), dtype)
    return {
        "keep/ffn": mask_bits(np.asarray(members), 20),
        "lora_a/up": sent_a[0],
        "scale_a/up": sent_a[1],
        "lora_b/up": sent_b[0],
        "scale_b/up": sent_b[1],
        "importance/ffn": np.zeros(20, dtype=np.float16),
    }


@pytest.mark.parametrize("dtype", sorted(LEVELS))
def test_an_update_of_integers_reads_like_one_of_half_precision(dtype):
    arrays = DecodedArrays(update_arrays(dtype), LAYOUT, 2)
    assert sorted(arrays) == ["importance/ffn", "keep/ffn", "lora_a/up", "lora_b/up"]
    np.testing.assert_array_equal(arrays["keep/ffn"], np.array([0, 3, 19], dtype=np.int32))
    assert arrays["keep/ffn"].dtype == np.int32
    assert (arrays["lora_a/up"].shape, arrays["lora_b/up"].shape) == ((2, 9), (6, 2))
    assert {arrays["lora_a/up"].dtype, arrays["lora_b/up"].dtype} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"keep/ffn": None}, "expected an array keep/ffn, found none"),
        ({"scale_b/up": None}, "expected an array scale_b/up, found none"),
        ({"keep/ffn": np.zeros(2, dtype=np.uint8)}, "a bit for each of 20 members"),
        ({"keep/ffn": np.full(3, 255, dtype=np.uint8)}, "no members above 20"),
        ({"lora_a/up": np.zeros((2, 4), dtype=np.uint8)}, r"expected codes \[2, 5\]"),
        ({"lora_b/up": np.zeros((2, 3), dtype=np.float32)}, "found float32"),
        ({"scale_a/up": np.zeros((2, 2), dtype=np.float16)}, r"float16 scales \[2, 1\]"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_with_a_reason(change, reason):
    arrays = {name: array for name, array in {**update_arrays(), **change}.items() if array is not None}
    with pytest.raises(IncompatibleError, match=reason):
        DecodedArrays(arrays, LAYOUT, 2)


def test_another_rank_is_refused():
    with pytest.raises(IncompatibleError, match="expected 3 components in lora_a/up, found 2"):
        DecodedArrays(update_arrays(), LAYOUT, 3)
