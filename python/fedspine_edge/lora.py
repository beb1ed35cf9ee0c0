"""A linear layer with a frozen, packed base weight and a trainable LoRA pair.

Comes in: a base weight (or the kept rows and columns of one). Goes out: `LoRALinear`, a drop-in for `nn.Linear` whose
only trainable parameters are `lora_a` and `lora_b`; the arithmetic is in `kernels.py`.

Source: LoRA (arXiv 2106.09685); the scaling alpha / rank is constant across ranks, so that factors of different ranks
can be truncated and merged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fedspine_edge import kernels
from fedspine_edge.dropout import DropoutStream
from fedspine_edge.recomputed import not_held


class LoRALinear(nn.Module):
    """y = x W^T + bias + scaling * D(x A^T) B^T with W frozen and packed; D drops what `dropout` says.

    Args:
        packed: The base weight [O, I], from `kernels.pack`.
        bias: [O] float32, frozen, or None.
        lora_a: [R, I] float32.
        lora_b: [O, R] float32.
        scaling: alpha / rank.

    Attributes:
        dropout: Where D of each call comes from; None, as at the beginning, for no dropout.
    """

    def __init__(
        self, packed: kernels.PackedWeight, *, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> None:
        super().__init__()
        self.packed = packed
        self.bias: Tensor | None
        self.register_buffer("bias", bias, persistent=False)
        self.lora_a = nn.Parameter(lora_a)
        self.lora_b = nn.Parameter(lora_b)
        self.scaling = scaling
        self.dropout: DropoutStream | None = None

    @property
    def rank(self) -> int:
        """LoRA rank."""
        return self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Returns y [..., O] for x [..., I]."""
        with not_held(x):
            return kernels.lora_linear(
                x,
                self.packed,
                bias=self.bias,
                lora_a=self.lora_a,
                lora_b=self.lora_b,
                scaling=self.scaling,
                dropout=None if self.dropout is None else self.dropout.next(),
            )

    def importance(self, axis: Literal["out", "in"], sample: tuple[int, int] = (1, 0)) -> Tensor:
        """Returns the LoRA-guided importance of each row (`axis="out"`) or column (`"in"`); needs gradients.

        Args:
            axis: Which.
            sample: Which of the features on the other side are summed over (`kernels.importance`).

        Raises:
            ValueError: No backward pass has run since the gradients were cleared.
        """
        if self.lora_a.grad is None or self.lora_b.grad is None:
            raise ValueError("importance needs the gradients of lora_a and lora_b: call backward first")
        return kernels.importance(
            self.packed,
            lora_a=self.lora_a.detach(),
            lora_b=self.lora_b.detach(),
            grad_a=self.lora_a.grad,
            grad_b=self.lora_b.grad,
            scaling=self.scaling,
            axis=axis,
            sample=sample,
        )


def merged_weight(base_weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Returns W + scaling * B A [O, I], summed in float32."""
    return base_weight.float() + scaling * (lora_b.float() @ lora_a.float())


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a dotted path of a model, in the place of the one that is there."""
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, module)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that take a gradient, in the model's own order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def freeze(model: nn.Module) -> None:
    """Turns the gradient of every parameter off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def fresh_factors(out_features: int, in_features: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns new factors whose product is zero: A uniform as peft draws it, B zero.

    Returns:
        lora_a [R, I] and lora_b [O, R], float32.
    """
    bound = in_features**-0.5
    lora_a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return lora_a, torch.zeros(out_features, rank)
