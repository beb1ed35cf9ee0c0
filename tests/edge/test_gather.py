"""A packed weight in every format, and the kernels on it, against float64; test_kernels has the rest."""

import copy

import pytest
import torch
from test_kernels import SCALING, assert_close, draw, each_backend
from torch import Tensor

from fedspine_edge import kernels, reference

__all__ = ["each_backend"]  # a fixture
NARROW = [name for name in kernels.BASE_DTYPES if name != "float32"]


def both(dtype: str, tokens: int, out_features: int, in_features: int, rank: int) -> list[list[Tensor]]:
    """Output and gradients by the kernels, then in float64 with the weight that the panels stand for."""
    packed = kernels.pack(draw(out_features, in_features, seed=1), dtype=dtype)
    weight = kernels.unpack(packed).double()
    leaves = [draw(tokens, in_features, seed=2), draw(rank, in_features, seed=4), draw(out_features, rank, seed=5)]
    bias, dy, results = draw(out_features, seed=3), draw(tokens, out_features, seed=6), []
    for kind in (torch.float32, torch.float64):
        x, lora_a, lora_b = given = [leaf.to(kind).requires_grad_() for leaf in leaves]
        arguments = {"bias": bias.to(kind), "lora_a": lora_a, "lora_b": lora_b, "scaling": SCALING}
        call = kernels.lora_linear if kind == torch.float32 else reference.lora_linear
        y = call(x, packed if kind == torch.float32 else weight, **arguments)
        results.append([y, *torch.autograd.grad(y, given, dy.to(kind))])
    return results


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 97, 7, 3), (97, 7, 97, 16), (300, 33, 1030, 4), (19, 1030, 33, 17)])
def test_a_layer_on_a_narrow_weight_is_one_on_the_numbers_it_stands_for(each_backend, dtype, size):
    for found, expected in zip(*both(dtype, *size), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_importance_on_a_narrow_weight_is_one_on_the_numbers_it_stands_for(each_backend, dtype, axis):
    packed = kernels.pack(draw(70, 97), dtype=dtype)
    names = {"lora_a": (3, 97), "lora_b": (70, 3), "grad_a": (3, 97), "grad_b": (70, 3)}
    factors = {name: draw(*shape, seed=index) for index, (name, shape) in enumerate(names.items())}
    wide = {name: factor.double() for name, factor in factors.items()}
    expected = reference.importance(kernels.unpack(packed).double(), **wide, scaling=SCALING, axis=axis)
    assert_close(kernels.importance(packed, **factors, scaling=SCALING, axis=axis), expected)


def test_bfloat16_loses_nothing_of_a_model_published_in_it(each_backend):
    published = draw(70, 97).bfloat16()
    packed, whole = (kernels.pack(published.float(), dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert torch.equal(kernels.unpack(packed), published.float())
    assert 2 * packed.nbytes == whole.nbytes
    arguments = {"bias": None, "lora_a": draw(4, 97), "lora_b": draw(70, 4), "scaling": SCALING}
    x = draw(33, 97)
    assert torch.equal(kernels.lora_linear(x, packed, **arguments), kernels.lora_linear(x, whole, **arguments))


def test_bfloat16_is_rounded_as_torch_rounds(each_backend):
    weight = draw(70, 97)
    weight[0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.nan, torch.inf])  # two ties first
    found = kernels.unpack(kernels.pack(weight, dtype="bfloat16"))
    assert torch.equal(found.nan_to_num(7.0), weight.bfloat16().float().nan_to_num(7.0))


def test_int8_is_within_half_a_step_of_each_output(each_backend):
    weight = draw(70, 97) * torch.logspace(-4, 4, 70)[:, None]
    weight[5] = 0
    packed = kernels.pack(weight, dtype="int8")
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((kernels.unpack(packed) - weight).abs() <= 0.5001 * step).all())
    assert packed.nbytes == 96 * 97 + 96 * 4


def test_int8_scales_are_of_what_is_kept(each_backend):
    weight = torch.tensor([[1000.0, 1.0, -0.5], [3.0, 2.0, 1.0]])
    packed = kernels.pack(weight, keep_in=torch.tensor([1, 2]), dtype="int8")
    assert kernels.unpack(packed)[0].tolist() == pytest.approx([1.0, -64 / 127])


@pytest.mark.parametrize("dtype", kernels.BASE_DTYPES)
def test_native_and_reference_pack_alike_in_every_format(each_backend, dtype):
    weight = draw(70, 35)
    weight[3, 2], weight[9] = torch.nan, 0
    with kernels.use_backend("reference"):
        expected = kernels.pack(weight, dtype=dtype)
    found = kernels.pack(weight, dtype=dtype)
    assert found.dtype == dtype
    for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", kernels.BASE_DTYPES)
def test_a_nan_of_the_weight_reaches_its_output(each_backend, dtype):
    weight = draw(40, 8)
    weight[33, 5] = torch.nan
    arguments = {"bias": None, "lora_a": None, "lora_b": None, "scaling": 1.0}
    y = kernels.lora_linear(draw(3, 8), kernels.pack(weight, dtype=dtype), **arguments)
    assert y.isnan().any(dim=0).nonzero().flatten().tolist() == [33]


def test_copies_of_a_model_share_a_narrow_weight():
    packed = kernels.pack(draw(5, 3), dtype="int8")
    assert copy.deepcopy(packed) is packed


def test_pack_refuses_a_format_it_does_not_know(each_backend):
    with pytest.raises(ValueError, match="expected a dtype of float32, bfloat16, int8, found float16"):
        kernels.pack(draw(5, 3), dtype="float16")
