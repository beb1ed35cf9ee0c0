"""A decoder on our elementwise kernels against the same one as transformers builds it."""

import numpy as np
import pytest
import torch
from test_elementwise import saved_by
from tiny import CONFIGS, DECODERS, VOCABULARY
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge import kernels
from fedspine_edge.fused import FusedMLP, FusedRMSNorm, computed_again, fuse
from fedspine_edge.lora import LoRALinear, fresh_factors, replace_module
from fedspine_edge.structure import layout_of
from fedspine_edge.workbench import open_workbench

BATCH, TOKENS = 3, 11


def decoder(family: str, **changes):
    """A random decoder with norms that are not all ones, frozen, with LoRA on its matrices."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    generator = torch.Generator().manual_seed(1)
    for matrix in layout_of(config, base_sha256="0" * 64).matrices:
        linear = model.get_submodule(matrix.name)
        lora_a, _ = fresh_factors(matrix.out_features, matrix.in_features, 3, generator)
        lora_b = torch.randn(matrix.out_features, 3, generator=generator) * 0.1
        packed = kernels.pack(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach()
        replace_module(model, matrix.name, LoRALinear(packed, bias=bias, lora_a=lora_a, lora_b=lora_b, scaling=2.0))
    return model


def loss_of(model) -> Tensor:
    ids = torch.randint(0, len(VOCABULARY), (BATCH, TOKENS), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_fused_model_has_the_same_loss_and_the_same_gradients(family, backend):
    plain, fused = decoder(family), decoder(family)
    fuse(fused)
    loss = loss_of(plain)
    loss.backward()
    with kernels.use_backend(backend):
        found = loss_of(fused)
        found.backward()
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = gradients(plain)
    assert list(gradients(fused)) == list(expected)
    assert len(expected) == 2 * 2 * 7  # A and B of seven matrices in two layers
    for name, gradient in gradients(fused).items():
        largest = float(expected[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("family", DECODERS)
def test_every_norm_and_mlp_is_replaced_and_no_name_changes(family):
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    before = dict(model.named_parameters())
    paths = {name for name, _ in model.named_modules()}
    fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == 2 * 2 + 1
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    assert not {type(module).__name__ for module in model.modules()} & {"SiLU", "SiLUActivation"}
    assert {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")} <= paths & {
        name for name, _ in model.named_modules()
    }


def test_epsilon_is_the_models_own():
    plain, fused = decoder("llama", rms_norm_eps=0.5), decoder("llama", rms_norm_eps=0.5)
    fuse(fused)
    assert float(loss_of(fused).detach()) == pytest.approx(float(loss_of(plain).detach()), rel=1e-5)
    assert float(loss_of(fused).detach()) != pytest.approx(float(loss_of(decoder("llama")).detach()), rel=1e-4)


def test_an_mlp_of_another_activation_stays():
    model = decoder("llama", hidden_act="gelu")
    expected = loss_of(model)
    fuse(model)
    assert not any(isinstance(module, FusedMLP) for module in model.modules())
    assert any(isinstance(module, FusedRMSNorm) for module in model.modules())
    assert float(loss_of(model).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(DECODERS)))
def test_an_encoder_stays_as_it_is(family):
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family]())
    before = [id(module) for module in model.modules()]
    fuse(model)
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_opened_decoder_is_fused(tiny_models, family):
    model = open_workbench(tiny_models[family], sha256=None, num_labels=2, choices=None).model
    assert any(isinstance(module, FusedMLP) for module in model.modules()) == (family == "llama")


@pytest.mark.skipif(kernels.backend() != "native", reason="the reference leaves saving to autograd")
def test_less_is_saved_for_the_backward():
    plain, fused = decoder("llama"), decoder("llama")
    fuse(fused)
    saved, less = saved_by(lambda: loss_of(plain)), saved_by(lambda: loss_of(fused))
    # Of each layer's 96 channels: silu(gate), and the product (hidden in the MLP's own hooks with 3 floats beside it).
    assert saved - less >= 2 * 2 * 96 * BATCH * TOKENS * 4
    assert less < 0.8 * saved


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_product_before_the_last_linear_is_not_held(backend):
    """Once the forward is through, the product's memory is overwritten: the gradients do not notice."""
    model, twin = decoder("llama"), decoder("llama")
    fuse(model)
    fuse(twin)
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].detach()))
    with kernels.use_backend(backend):
        loss = loss_of(model)
        for product in seen:
            product.fill_(np.nan)
        loss.backward()
        loss_of(twin).backward()
    assert len(seen) == 2
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(twin)[name]), name


def test_what_is_computed_again_is_computed_only_when_needed():
    calls = []
    leaf = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    double = (2 * leaf).detach().requires_grad_()

    def compute() -> Tensor:
        calls.append(1)
        return 2 * leaf.detach()

    other = torch.tensor([5.0, 5.0], requires_grad=True)
    with computed_again(double, compute):
        y = double.view(2, 2).square().sum() + other.square().sum()
    assert calls == []
    y.backward()
    assert calls == [1]
    assert double.grad.tolist() == [4.0, 8.0, 12.0, 16.0]
    assert other.grad.tolist() == [10.0, 10.0]


def test_a_part_of_what_is_computed_again_is_saved_as_it_is():
    whole = torch.arange(1.0, 5.0, requires_grad=True)
    part = nn.Parameter(torch.ones(2))
    with computed_again(whole, lambda: torch.full((4,), np.nan)):
        y = (whole[:2] * part).sum()
    y.backward()
    assert part.grad.tolist() == [1.0, 2.0]
