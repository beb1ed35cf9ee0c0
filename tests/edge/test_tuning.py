import numpy as np
import pytest
import torch
from tiny import questions, tiny_tokenizer

from fedspine_edge.batches import Encoding, training_batches
from fedspine_edge.data import Example
from fedspine_edge.importance import ImportanceMeter, member_scores
from fedspine_edge.lora import fresh_factors, trainable_parameters
from fedspine_edge.masks import keep_all, kept_counts
from fedspine_edge.tuning import loss_of, narrow, tune
from fedspine_edge.workbench import open_workbench


def fitted(path, rank=3, decoder=True):
    bench = open_workbench(path, sha256=None, num_labels=2, choices=[10, 11] if decoder else None)
    generator = torch.Generator().manual_seed(2)
    factors = {m.name: fresh_factors(m.out_features, m.in_features, rank, generator) for m in bench.layout.matrices}
    shrunk = bench.fit(keep_all(bench.layout), factors, scaling=2.0, mean_inputs={})
    prompt = "{text} Label:" if decoder else None
    encoding = Encoding(tiny_tokenizer(decoder=decoder), ("human", "number"), prompt)
    tokens = encoding.encode([Example(*pair) for pair in questions()])
    return shrunk, list(training_batches(tokens, batch_size=6, num_batches=10, seed=0))


def never(_done, _meter):
    return None


def test_only_lora_factors_change(tiny_models):
    shrunk, batches = fitted(tiny_models["llama"])
    before = {name: p.clone() for name, p in shrunk.model.named_parameters()}
    tune(shrunk, batches, learning_rate=1e-2, prune_interval=99, narrower=never)
    changed = {name for name, p in shrunk.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_pruning_in_mid_round_keeps_the_moments_of_what_stays(tiny_models):
    shrunk, batches = fitted(tiny_models["llama"])
    tune(shrunk, batches[:3], learning_rate=1e-2, prune_interval=99, narrower=never)
    optimizer = torch.optim.AdamW(trainable_parameters(shrunk.model), lr=1e-2)
    loss_of(shrunk.model, batches[3]).backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj"
    old = shrunk.linears[name]
    moments = optimizer.state[old.lora_b]["exp_avg"].clone()
    rows = old.lora_b.detach().clone()
    keep = {**shrunk.keep, "layers.0.ffn": np.arange(32, 96, dtype=np.int32)}
    successor = narrow(shrunk, keep, ImportanceMeter(), optimizer, 1e-2)
    new = shrunk.linears[name]
    assert torch.equal(new.lora_b, rows[32:])
    assert torch.equal(successor.state[new.lora_b]["exp_avg"], moments[32:])
    assert torch.equal(successor.state[new.lora_a]["exp_avg"], optimizer.state[old.lora_a]["exp_avg"])


def test_a_round_prunes_where_it_is_told_to(tiny_models):
    shrunk, batches = fitted(tiny_models["llama"])
    asked = []

    def halve(done, meter):
        asked.append(done)
        assert set(meter.scores) == set(shrunk.keep)
        return {**shrunk.keep, "layers.1.heads": shrunk.keep["layers.1.heads"][: 2 - done]} if done < 2 else None

    tuned = tune(shrunk, batches, learning_rate=1e-3, prune_interval=3, narrower=halve)
    assert asked == [0, 1, 2]
    assert kept_counts(shrunk.keep)["layers.1.heads"] == 1
    assert len(tuned.importance["layers.1.heads"]) == 1
    gone = tuned.mean_inputs["model.layers.1.self_attn.o_proj"]
    assert np.isnan(gone[16:]).all()
    assert np.isfinite(gone[:16]).all()


def test_importance_is_the_definition(tiny_models):
    shrunk, batches = fitted(tiny_models["llama"])
    tune(shrunk, batches[:4], learning_rate=1e-2, prune_interval=99, narrower=never)
    shrunk.model.zero_grad()
    loss_of(shrunk.model, batches[5]).backward()
    expected = torch.zeros(96)
    for matrix, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        linear = shrunk.linears[f"model.layers.0.mlp.{matrix}"]
        weight = shrunk.base.weight(f"model.layers.0.mlp.{matrix}")
        a, b = linear.lora_a.detach(), linear.lora_b.detach()
        estimate = linear.lora_b.grad @ a + b @ linear.lora_a.grad - linear.lora_b.grad @ linear.lora_a.grad
        sums = (estimate * (weight + 2.0 * b @ a)).abs().sum(axis)
        expected += sums / sums.norm()
    found = member_scores(shrunk.layout, "layers.0.ffn", shrunk.linears, len(shrunk.keep["layers.0.ffn"]))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_a_measurement_that_is_not_finite_is_skipped_and_counted(tiny_models):
    shrunk, batches = fitted(tiny_models["llama"])
    loss_of(shrunk.model, batches[0]).backward()
    meter = ImportanceMeter()
    meter.measure(shrunk.layout, shrunk.linears, shrunk.keep)
    before = {name: scores.copy() for name, scores in meter.scores.items()}
    shrunk.linears["model.layers.0.mlp.up_proj"].lora_b.grad[0, 0] = torch.nan
    meter.measure(shrunk.layout, shrunk.linears, shrunk.keep)
    assert meter.num_skipped == 1
    assert all(np.array_equal(before[name], meter.scores[name]) for name in before)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_batch_in_parts_leaves_the_gradient_of_the_whole(family, tiny_models, monkeypatch):
    def gradients(max_part_tokens):
        monkeypatch.setattr("fedspine_edge.tuning.MAX_PART_TOKENS", max_part_tokens)
        shrunk, batches = fitted(tiny_models[family], decoder=family == "llama")
        tuned = tune(shrunk, batches[:1], learning_rate=0.0, prune_interval=99, narrower=never)
        return tuned.loss_before, tuned.mean_inputs, [p.grad for p in trainable_parameters(shrunk.model)]

    whole_loss, whole_inputs, whole = gradients(10_000)
    loss, inputs, parts = gradients(20)
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    for name, mean in whole_inputs.items():
        np.testing.assert_allclose(inputs[name], mean, atol=1e-3)
    for part, of_whole in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, of_whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_importance_is_that_of_the_true_gradient(family, tiny_models):
    shrunk, batches = fitted(tiny_models[family], decoder=family == "llama")
    meter = ImportanceMeter(kind="gradient")
    seen, hooks = {}, []
    for name, linear in shrunk.linears.items():

        def note(module, inputs, output, name=name):
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda g: seen.__setitem__(name, g.flatten(0, -2).t() @ x))

        hooks.append(linear.register_forward_hook(note))
    with meter.watching(shrunk.linears):
        loss_of(shrunk.model, batches[0]).backward()
    meter.measure(shrunk.layout, shrunk.linears, shrunk.keep)
    group = shrunk.layout.groups[-1].name
    members, expected = len(shrunk.keep[group]), 0.0
    for matrix in shrunk.layout.matrices:
        if group in (matrix.out_group, matrix.in_group):
            product = (seen[matrix.name] * shrunk.base.weight(matrix.name)).abs()
            sums = product.sum(1 if matrix.out_group == group else 0).view(members, -1).sum(1)
            expected = expected + sums / sums.norm()
    np.testing.assert_allclose(meter.scores[group], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_magnitude_importance_is_the_weights_and_random_the_same_on_every_device(tiny_models):
    shrunk, _ = fitted(tiny_models["llama"])
    meters = {kind: ImportanceMeter(kind=kind) for kind in ("magnitude", "random")}
    for meter in meters.values():
        meter.measure(shrunk.layout, shrunk.linears, shrunk.keep)
    sums = [
        shrunk.base.weight(f"model.layers.0.mlp.{name}").abs().sum(axis)
        for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0))
    ]
    expected = sum(values / values.norm() for values in sums)
    np.testing.assert_allclose(meters["magnitude"].scores["layers.0.ffn"], expected.numpy(), rtol=1e-4)
    fewer = {name: members[1:] for name, members in shrunk.keep.items()}
    again = ImportanceMeter(kind="random")
    again.measure(shrunk.layout, shrunk.linears, fewer)
    for name, scores in meters["random"].scores.items():
        assert np.array_equal(again.scores[name], scores[1:])
        assert len(set(scores.tolist())) == len(scores)


def test_a_round_ends_when_it_is_enough(tiny_models):
    shrunk, batches = fitted(tiny_models["llama"])
    enough = [False, True]
    tuned = tune(
        shrunk, batches, learning_rate=0.0, prune_interval=99, narrower=never, enough=lambda steps: enough[steps - 1]
    )
    assert tuned.num_steps == 2
