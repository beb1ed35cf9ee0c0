"""Sums of features on tiny models, against the same written out."""

import numpy as np
import pytest
import torch
from test_device import assignment_for, opened
from tiny import DECODERS

from fedspine_edge.batches import TokenSet, collate
from fedspine_edge.device import DeviceState, run_round
from fedspine_edge.errors import IncompatibleError
from fedspine_edge.head_statistics import no_factors
from fedspine_edge.masks import keep_all
from fedspine_edge.protocol import MAX_HEAD_EXAMPLES, head_linear
from fedspine_edge.structure import FAMILIES

CLASSIFIERS = sorted(set(FAMILIES) - set(DECODERS))


def asked_to_sum(bench, **changes):
    return assignment_for(bench, work="head-statistics", num_steps=100, **changes)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_sums_are_those_of_the_inputs_of_the_last_layer(family, tiny_models):
    bench, tokens = opened(tiny_models[family], family)
    few = tokens.take(np.arange(7))
    update, state = run_round(bench, asked_to_sum(bench), few, DeviceState(pruning_ratio=0.3))
    assert state == DeviceState(pruning_ratio=0.3)
    head = head_linear(bench.layout)
    bench.fit(keep_all(bench.layout), no_factors(bench.layout), scaling=1.0, mean_inputs={})
    seen = []
    bench.model.get_submodule(head.name).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    batch = collate(few, np.arange(7))
    with torch.no_grad():
        bench.model(input_ids=batch.input_ids, attention_mask=batch.valid)
    inputs, one_hot = seen[0].numpy(), np.eye(head.num_classes)[few.labels]
    np.testing.assert_array_equal(update.tensors["head_statistics/counts"], one_hot.sum(0))
    near = {"rtol": 2e-3, "atol": 2e-4}
    np.testing.assert_allclose(update.tensors["head_statistics/sums"], one_hot.T @ inputs / 7, **near)
    products = (inputs.T @ inputs / 7)[np.tril_indices(head.width)]
    np.testing.assert_allclose(update.tensors["head_statistics/products"], products, **near)
    assert (update.report.num_examples, update.report.num_steps) == (7, 2)
    assert update.report.loss_before == update.report.loss_after > 0


def test_a_large_shard_is_sampled_by_the_seed(tiny_models):
    bench, tokens = opened(tiny_models["bert"], "bert")
    rows = np.arange(3 * MAX_HEAD_EXAMPLES) % len(tokens)
    many = TokenSet.take(tokens, rows)
    sums = [run_round(bench, asked_to_sum(bench, seed=seed), many, DeviceState())[0] for seed in (1, 1, 2)]
    assert [int(update.tensors["head_statistics/counts"].sum()) for update in sums] == [MAX_HEAD_EXAMPLES] * 3
    first, again, other = (update.tensors["head_statistics/sums"] for update in sums)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_base_of_another_hash_is_refused(tiny_models):
    bench, tokens = opened(tiny_models["bert"], "bert")
    with pytest.raises(IncompatibleError, match="assignment is for base 0ther"):
        run_round(bench, asked_to_sum(bench, base_sha256="0ther"), tokens, DeviceState())


def test_a_decoder_has_no_head_to_sum_for(tiny_models):
    bench, tokens = opened(tiny_models["llama"], "llama")
    with pytest.raises(IncompatibleError, match="expected a base model with a task head, found a decoder"):
        run_round(bench, asked_to_sum(bench), tokens, DeviceState())
