"""The loss of a language model's head in blocks against torch's in one."""

import math

import pytest
import torch
from test_elementwise import assert_finite_differences, draw, each_backend, saved_by
from torch.nn import functional

from fedspine_edge import cross_entropy as module
from fedspine_edge import kernels
from fedspine_edge.cross_entropy import cross_entropy

__all__ = ["each_backend"]  # a fixture


def targets_of(tokens: int, classes: int) -> torch.Tensor:
    return torch.randint(0, classes, (tokens,), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("tokens", "classes", "features"), [(1, 1, 1), (7, 97, 7), (97, 1003, 16), (33, 7, 97)])
@pytest.mark.parametrize("block_bytes", [1, 40_000, 1 << 20])
def test_the_loss_and_its_gradient_match_float64(each_backend, monkeypatch, tokens, classes, features, block_bytes):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    hidden, weight = draw(tokens, features, seed=1).requires_grad_(), draw(classes, features, seed=2)
    targets = targets_of(tokens, classes)
    loss = cross_entropy(hidden, weight, targets)
    exact = hidden.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact @ weight.double().T, targets)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    (found,), (gradient,) = torch.autograd.grad(3 * loss, hidden), torch.autograd.grad(3 * expected, exact)
    largest = float(gradient.abs().max())
    torch.testing.assert_close(found.double(), gradient, rtol=0, atol=1e-5 * largest + 1e-6)


@pytest.mark.parametrize("dtype", kernels.BASE_DTYPES)
def test_a_packed_weight_is_the_float32_weight_it_stands_for(each_backend, monkeypatch, dtype):
    monkeypatch.setattr(module, "BLOCK_BYTES", 40_000)
    hidden, packed = draw(97, 16, seed=1).requires_grad_(), kernels.pack(draw(1003, 16, seed=2), dtype=dtype)
    targets = targets_of(97, 1003)
    losses = [cross_entropy(hidden, weight, targets) for weight in (packed, kernels.unpack(packed))]
    (found,), (expected,) = (torch.autograd.grad(loss, hidden) for loss in losses)
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_by_hand(each_backend):
    # Logits 0 and ln 3: the second word has probability 3/4
    loss = cross_entropy(torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]]), torch.tensor([1]))
    assert float(loss) == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_the_gradient_matches_finite_differences(each_backend):
    weight, targets = draw(11, 5, seed=2), targets_of(3, 11)
    assert_finite_differences(lambda x: cross_entropy(x, weight, targets), draw(3, 5), torch.tensor(1.0))


def test_nan_reaches_the_loss(each_backend):
    hidden = draw(3, 5)
    hidden[1, 2] = math.nan
    assert cross_entropy(hidden, draw(7, 5, seed=2), targets_of(3, 7)).isnan()


@pytest.mark.skipif(kernels.backend() != "native", reason="the reference leaves saving to torch")
def test_nothing_is_saved_but_one_gradient():
    hidden, weight = draw(64, 16).requires_grad_(), draw(1000, 16, seed=2)
    assert saved_by(lambda: cross_entropy(hidden, weight, targets_of(64, 1000))) == 4 * 64 * 16


def test_wrong_arguments_are_refused():
    hidden, weight = draw(3, 5), draw(7, 5)
    for targets, message in (
        (torch.tensor([0, 1, 7]), r"targets within \[0, 7\), found 0\.\.7"),
        (torch.tensor([0, 1, -100]), r"targets within \[0, 7\), found -100\.\.1"),
        (torch.tensor([0, 1]), r"int64 on cpu of shape \[3\], found int64 of shape \[2\]"),
        (torch.ones(3), r"int64 on cpu of shape \[3\], found float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(hidden, weight, targets)
    with pytest.raises(ValueError, match=r"hidden of shape \[any, 5\], found \[3, 4\]"):
        cross_entropy(hidden[:, :4], weight, targets_of(3, 7))
    with pytest.raises(ValueError, match="at least one token and one class, found 0 and 7"):
        cross_entropy(hidden[:0], weight, targets_of(0, 7))
