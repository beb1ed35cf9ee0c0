"""Tensors that are computed again for the backward instead of held."""

import numpy as np
import torch
from torch import Tensor, nn

from fedspine_edge.recomputed import not_held, recomputable


def doubled(leaf: Tensor, calls: list[int]) -> Tensor:
    """2 * leaf, cut off from it, that counts how often it is computed again."""

    def compute() -> Tensor:
        calls.append(1)
        return 2 * leaf.detach()

    return recomputable((2 * leaf).detach().requires_grad_(), compute)


def test_what_is_computed_again_is_computed_only_when_needed():
    calls: list[int] = []
    double = doubled(torch.tensor([1.0, 2.0, 3.0, 4.0]), calls)
    other = torch.tensor([5.0, 5.0], requires_grad=True)
    with not_held(double):
        y = double.view(2, 2).square().sum() + other.square().sum()
    assert calls == []
    y.backward()
    assert calls == [1]
    assert double.grad.tolist() == [4.0, 8.0, 12.0, 16.0]
    assert other.grad.tolist() == [10.0, 10.0]


def test_what_is_computed_again_is_not_held():
    calls: list[int] = []
    double = doubled(torch.tensor([1.0, 2.0]), calls)
    with not_held(double):
        y = double.square().sum()
    with torch.no_grad():
        double.fill_(np.nan)
    y.backward()
    assert double.grad.tolist() == [4.0, 8.0]


def test_a_part_of_it_is_saved_as_it_is():
    whole = recomputable(torch.arange(1.0, 5.0, requires_grad=True), lambda: torch.full((4,), np.nan))
    part = nn.Parameter(torch.ones(2))
    with not_held(whole):
        y = (whole[:2] * part).sum()
    y.backward()
    assert part.grad.tolist() == [1.0, 2.0]


def test_once_written_to_it_is_saved_as_it_is():
    calls: list[int] = []
    double = doubled(torch.tensor([1.0, 2.0]), calls)
    with torch.no_grad():
        double.add_(1)
    with not_held(double):
        y = double.square().sum()
    y.backward()
    assert calls == []
    assert double.grad.tolist() == [6.0, 10.0]


def test_any_other_tensor_is_saved_as_always():
    leaf = torch.tensor([3.0], requires_grad=True)
    with not_held(leaf):
        y = leaf.square().sum()
    y.backward()
    assert leaf.grad.tolist() == [6.0]
