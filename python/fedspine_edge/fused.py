"""A transformers decoder whose norms and gated feed-forward blocks run on our elementwise kernels.

Comes in: a model of the Llama family as transformers builds it. Goes out: the same model, its RMSNorms and its MLPs
replaced; parameters keep their names and are not copied, and the linears stay at their paths. Encoders are left as they
are: torch's LayerNorm and GELU are single passes already. RoPE stays torch's: transformers calls it as a global
function of the family's module, so no one model can be given another.

To add a family, add the names of its classes to `PARTS`.

Source: RMSNorm (arXiv 1910.07467); SwiGLU (arXiv 2002.05202); recomputation, Chen et al. (arXiv 1604.06174).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedspine_edge import elementwise
from fedspine_edge.lora import replace_module


@dataclass(frozen=True)
class Parts:
    """The classes of a family that are replaced.

    Attributes:
        module: The module of transformers that defines them.
        norm: RMSNorm: a `weight`, and a `variance_epsilon`.
        mlp: down_proj(act(gate_proj(x)) * up_proj(x)).
    """

    module: str
    norm: str
    mlp: str


PARTS: dict[str, Parts] = {
    "llama": Parts("transformers.models.llama.modeling_llama", "LlamaRMSNorm", "LlamaMLP"),
    "mistral": Parts("transformers.models.mistral.modeling_mistral", "MistralRMSNorm", "MistralMLP"),
    "qwen2": Parts("transformers.models.qwen2.modeling_qwen2", "Qwen2RMSNorm", "Qwen2MLP"),
}
SILU = ("silu", "swish")  # transformers' two names of one activation


def fuse(model: Any) -> None:
    """Replaces the norms and the gated MLPs of a decoder, in place; any other model stays as it is.

    The parameters, their names and their order do not change. An MLP of another activation than SiLU stays.

    Args:
        model: A transformers model.
    """
    parts = PARTS.get(model.config.model_type)
    if parts is None:
        return
    module = importlib.import_module(parts.module)
    norm_class, mlp_class = getattr(module, parts.norm), getattr(module, parts.mlp)
    gated_by_silu = model.config.hidden_act in SILU
    for path, old in list(model.named_modules()):
        if type(old) is norm_class:
            replace_module(model, path, FusedRMSNorm(old.weight, epsilon=old.variance_epsilon))
        elif type(old) is mlp_class and gated_by_silu:
            replace_module(model, path, FusedMLP(old.gate_proj, old.up_proj, old.down_proj))


class FusedRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * weight.

    Args:
        weight: [I], float32; used as it is, not copied.
        epsilon: What keeps the root above zero.
    """

    def __init__(self, weight: nn.Parameter, *, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [..., I] for x [..., I]."""
        return elementwise.rms_norm(x, self.weight, epsilon=self.epsilon)


class FusedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)); the product is not saved for the backward but computed again.

    Args:
        gate_proj: Residual width to channels.
        up_proj: The same.
        down_proj: Channels to residual width.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [..., I] for x [..., I]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = elementwise.swiglu(gate, up)
        frozen_gate, frozen_up = gate.detach(), up.detach()
        with computed_again(product, lambda: elementwise.swiglu(frozen_gate, frozen_up)):
            y: Tensor = self.down_proj(product)
        return y


def computed_again(tensor: Tensor, compute: Callable[[], Tensor]) -> saved_tensors_hooks:
    """Returns a context in which a tensor that is saved for the backward is not held but computed again when needed.

    Args:
        tensor: What need not be held; contiguous.
        compute: Gives the same values; called once for each time the tensor was saved.
    """
    address, size = tensor.data_ptr(), tensor.numel()  # not the tensor: the hooks would hold it

    def pack(saved: Tensor) -> Tensor | torch.Size:
        whole = saved.data_ptr() == address and saved.numel() == size and saved.is_contiguous()
        return saved.shape if whole else saved

    def unpack(held: Tensor | torch.Size) -> Tensor:
        return held if isinstance(held, Tensor) else compute().view(held)

    return saved_tensors_hooks(pack, unpack)
