"""Attention without stored probabilities against its meaning in float64, for every instruction set this CPU has."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_elementwise import assert_finite_differences, draw, each_backend, saved_by
from torch import Tensor

from fedspine_edge import attention as door
from fedspine_edge import kernels, reference
from fedspine_edge.attention import Pattern, attention

__all__ = ["each_backend"]  # a fixture

SHAPES = [(1, 1, 1, 1, 1), (2, 7, 2, 1, 7), (2, 97, 4, 2, 33), (1, 33, 3, 3, 32), (1, 130, 4, 2, 64), (3, 20, 3, 1, 10)]


def heads(shape) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    batch, tokens, num_heads, kv_heads, dim = shape
    counts = (num_heads, kv_heads, kv_heads, num_heads)
    return [draw(batch, tokens, count, dim, seed=seed) for seed, count in enumerate(counts)]


def pattern_of(shape, *, causal: bool, padded: bool, biased: bool, rotated: bool) -> Pattern:
    batch, tokens, num_heads, _, dim = shape
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0] = False  # a row that is padding altogether
    valid[1:, tokens // 2 :: 2] = False
    return Pattern(
        causal=causal,
        valid=valid if padded else None,
        bias=draw(num_heads, tokens, tokens, seed=9) if biased else None,
        rotation=(draw(1, tokens, dim, seed=7), draw(1, tokens, dim, seed=8)) if rotated else None,
    )


def in_float64(pattern: Pattern) -> Pattern:
    rotation = None if pattern.rotation is None else tuple(part.double() for part in pattern.rotation)
    bias = None if pattern.bias is None else pattern.bias.double()
    return Pattern(causal=pattern.causal, valid=pattern.valid, bias=bias, rotation=rotation)


def outcome(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pattern: Pattern, *, function=attention) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, pattern)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradients_match_float64(each_backend, shape):
    for causal, padded, biased, rotated in itertools.product([False, True], repeat=4):
        if rotated and shape[-1] % 2:
            continue
        pattern = pattern_of(shape, causal=causal, padded=padded, biased=biased, rotated=rotated)
        found = outcome(*heads(shape), pattern)
        doubles = [x.double() for x in heads(shape)]
        expected = outcome(*doubles, in_float64(pattern), function=reference.attention)
        for one, other in zip(found, expected, strict=True):
            # About 100 roundings of the largest: scores of rotated heads are as large as 30.
            assert float((one - other).abs().max()) <= 1.2e-5 * float(other.abs().max()) + 2e-6


def test_attention_by_hand(each_backend):
    # Scores 0 and ln 3 after division by sqrt(4): weights 1/4 and 3/4
    q = torch.zeros(1, 2, 1, 4)
    q[0, 1, 0, 0] = 2.0
    k = torch.zeros(1, 2, 1, 4)
    k[0, 1, 0, 0] = math.log(3.0)
    v = torch.tensor([8.0, 16.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
    out = attention(q, k, v, Pattern())
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([12.0, 14.0]), rtol=1e-6, atol=0)
    out = attention(q, k, v, Pattern(causal=True))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([8.0, 14.0]), rtol=1e-6, atol=0)


def test_each_group_of_query_heads_reads_its_own_kv_head(each_backend):
    q, k, v, _ = heads((1, 5, 4, 2, 8))
    whole = attention(q, k, v, Pattern())
    for head in range(4):
        alone = attention(q[:, :, head : head + 1], k[:, :, head // 2, None], v[:, :, head // 2, None], Pattern())
        torch.testing.assert_close(whole[:, :, head], alone[:, :, 0], rtol=1e-6, atol=1e-6)


def test_gradients_match_finite_differences(each_backend):
    q, k, v, dout = heads((1, 5, 2, 1, 4))
    pattern = Pattern(causal=True, rotation=(draw(1, 5, 4, seed=7), draw(1, 5, 4, seed=8)))
    assert_finite_differences(lambda x: attention(x, k, v, pattern), q, dout, tolerance=5e-3)
    assert_finite_differences(lambda x: attention(q, x, v, pattern), k, dout, tolerance=5e-3)
    assert_finite_differences(lambda x: attention(q, k, x, pattern), v, dout, tolerance=5e-3)


def test_padding_costs_nothing_and_reaches_nothing(each_backend):
    q, k, v, dout = heads((2, 9, 2, 1, 8))
    valid = torch.arange(9) < torch.tensor([[5], [0]])
    k[~valid] = math.nan
    v[~valid] = math.nan
    if kernels.backend() == "reference":
        k = torch.where(valid[..., None, None], k, 0)  # plain torch multiplies what it then hides
    out, dq, dk, dv = outcome(q, k, v, dout, Pattern(valid=valid))
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    assert not dk[~valid].any()
    assert not dv[~valid].any()
    assert not out[1].any()
    assert not dq[1].any()
    torch.testing.assert_close(out[:1, :5], attention(q[:1, :5], k[:1, :5], v[:1, :5], Pattern()), rtol=1e-5, atol=1e-6)


def test_nan_reaches_what_it_enters(each_backend):
    q, k, v, dout = heads((1, 40, 2, 2, 8))
    q[0, 3, 0, 5] = math.nan
    out, dq, dk, dv = outcome(q, k, v, dout, Pattern())
    assert out[0, 3, 0].isnan().all()
    assert out[0, [2, 4], 0].isfinite().all()
    assert dq[0, 3, 0].isnan().all()
    assert dk[0, :, 0].isnan().all()
    assert dv[0, :, 0].isnan().all()
    for x in (out, dq, dk, dv):
        assert x[0, :, 1].isfinite().all()


def test_scores_far_apart_do_not_overflow(each_backend):
    q, k, v, dout = heads((1, 7, 1, 1, 4))
    for x in outcome(1e3 * q, 1e3 * k, v, dout, Pattern(causal=True)):
        assert x.isfinite().all()


def test_any_number_of_threads_gives_the_same_bits():
    shape = (3, 150, 6, 3, 32)
    pattern = pattern_of(shape, causal=True, padded=False, biased=False, rotated=True)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(*heads(shape), pattern))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_two_threads_at_once_do_not_disturb_each_other():
    shape = (2, 40, 4, 2, 16)
    pattern = pattern_of(shape, causal=True, padded=False, biased=True, rotated=True)
    expected = outcome(*heads(shape), pattern)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: outcome(*heads(shape), pattern), range(16)))
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, expected, strict=True))


@pytest.mark.skipif(kernels.backend() != "native", reason="the reference leaves saving to torch")
def test_no_probabilities_are_saved():
    shape = (2, 64, 4, 2, 16)
    q, k, v, _ = (x.requires_grad_() for x in heads(shape))
    floats = 2 * 64 * 16 * (4 + 2 + 2 + 4) + 2 * 4 * 64  # q, k, v, out and the log-sum-exps
    assert saved_by(lambda: attention(q, k, v, Pattern(causal=True))) == 4 * floats


def test_a_view_of_a_wider_tensor_is_taken_as_it_is(each_backend):
    q, k, v, _ = heads((2, 9, 2, 1, 8))
    wide = torch.cat([q, q + 1], dim=1)[:, :9]
    assert torch.equal(attention(wide, k, v, Pattern()), attention(q, k, v, Pattern()))


def test_wrong_arguments_are_refused():
    q, k, v, _ = heads((2, 9, 4, 2, 8))
    ones = torch.ones(2, 9)
    for arguments, message in (
        ((q.double(), k, v, Pattern()), "q as float32 on cpu, found float64"),
        ((q[0], k, v, Pattern()), r"q of shape \[any, any, any, any\], found \[9, 4, 8\]"),
        ((q, k[:, :8], v, Pattern()), r"k of shape \[2, 9, any, 8\], found \[2, 8, 2, 8\]"),
        ((q, k, v[..., :7], Pattern()), r"v of shape \[2, 9, 2, 8\], found \[2, 9, 2, 7\]"),
        ((q[:, :, :3], k, v, Pattern()), "query heads in equal groups of KV heads, found 3 over 2"),
        ((q[:0], k[:0], v[:0], Pattern()), "at least one element in q and k"),
        ((q, k, v, Pattern(valid=ones)), r"valid as bool on cpu of shape \[2, 9\], found float32"),
        ((q, k, v, Pattern(bias=torch.ones(4, 9, 8))), r"bias of shape \[4, 9, 9\], found \[4, 9, 8\]"),
        ((q, k, v, Pattern(bias=torch.ones(4, 9, 9, requires_grad=True))), "bias without a gradient"),
        ((q, k, v, Pattern(rotation=(torch.ones(1, 9, 8), torch.ones(1, 9, 7)))), r"sin of shape \[1, 9, 8\]"),
        ((q, k, v, Pattern(rotation=(torch.ones(3, 9, 8), torch.ones(3, 9, 8)))), "cos for 1 or 2 rows, found 3"),
    ):
        with pytest.raises(ValueError, match=message):
            door.attention(*arguments)
    odd = [x[..., :7] for x in (q, k, v)]
    with pytest.raises(ValueError, match="an even head size to rotate, found 7"):
        attention(*odd, Pattern(rotation=(torch.ones(1, 9, 7), torch.ones(1, 9, 7))))


@pytest.mark.slow
def test_ten_thousand_calls_leave_no_memory_behind():
    from fedspine_edge.hardware import peak_memory_bytes, reset_peak_memory

    shape = (1, 8, 2, 1, 8)
    q, k, v, dout = heads(shape)
    pattern = Pattern(causal=True)
    for _ in range(200):
        outcome(q, k, v, dout, pattern)
    reset_peak_memory()
    before = peak_memory_bytes()
    for _ in range(10_000):
        outcome(q, k, v, dout, pattern)
    assert peak_memory_bytes() - before < 4 << 20
