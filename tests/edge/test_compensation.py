"""Mean inputs, and the bias they become."""

import numpy as np
import pytest
import torch
from torch import nn

from fedspine_edge.compensation import MOST_TIMES_MEAN, MeanInputMeter, compensation
from fedspine_edge.protocol import Group, Layout, Matrix

LAYOUT = Layout("ba5e", (Group("ffn", "ffn", 6, 1, 8),), (Matrix("down", 4, 6, None, "ffn"),))


def measured(inputs, valid, keep=(0, 1, 2, 3, 4, 5)):
    linear = nn.Linear(len(keep), 4)
    meter = MeanInputMeter(LAYOUT, {"down": linear})
    meter.expect(torch.from_numpy(valid))
    linear(torch.from_numpy(inputs))
    meter.expect(None)
    linear(1e6 * torch.from_numpy(inputs))  # nothing is expected, so nothing is measured
    return meter.close({"ffn": np.asarray(keep)})["down"]


def inputs_of(tokens=200, width=6):
    return np.abs(np.random.default_rng(0).standard_normal((1, tokens, width))).astype(np.float32)


def test_the_mean_is_over_the_tokens_that_are_there_and_nan_for_members_that_are_not():
    inputs, valid = inputs_of(width=3), np.arange(200)[None, :] < 150
    found = measured(inputs, valid, keep=(0, 2, 5))
    np.testing.assert_allclose(found[[0, 2, 5]], inputs[0, :150].mean(0), rtol=2e-3)
    assert np.isnan(found[[1, 3, 4]]).all()


def test_a_channel_that_is_huge_on_few_tokens_counts_for_no_more_than_the_bound():
    inputs, valid = inputs_of(), np.ones((1, 200), dtype=bool)
    inputs[0, :, 3] = 0.0
    inputs[0, ::20, 3] = 40.0
    found = measured(inputs, valid)
    size = np.abs(inputs).mean()
    assert found[3] == pytest.approx(MOST_TIMES_MEAN * size / 20, rel=2e-3)
    assert found[3] < 0.25 * inputs[0, :, 3].mean()
    others = [0, 1, 2, 4, 5]
    np.testing.assert_allclose(found[others], inputs[0].mean(0)[others], rtol=2e-3)


def test_the_bias_is_what_the_removed_columns_contribute_on_average():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    mean = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0], dtype=np.float32)
    bias = compensation(weight, torch.tensor([0, 3]), mean)
    torch.testing.assert_close(bias, weight[:, [1, 4, 5]] @ torch.tensor([2.0, 5.0, 6.0]))
    assert compensation(weight, None, mean) is None
    assert compensation(weight, torch.tensor([0]), None) is None
