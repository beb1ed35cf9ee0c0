"""LoRA-guided importance: how much the loss would feel the loss of each member.

Comes in: a model whose LoRA factors have gradients. Goes out: one score a member, averaged over iterations. The score
of an entry is |estimated gradient x merged weight|, where the gradient of the frozen weight is estimated from the LoRA
factors' gradients alone; it is summed over the member's rows or columns, normalised within each matrix, and added over
the matrices that the member couples. A sum runs over a sixteenth of the other side's features, the next measurement's
over another: what that leaves out is far less than what a measurement changes from one batch to the next.

Other kinds, for comparison: `salience` (the same with APT's slower average), `magnitude` (|weight| alone), `gradient`
(the weight's true gradient instead of the estimate) and `random` (the same draw on every device).

Source: LoRAPrune (arXiv 2305.18403), equations for LoRA-guided importance, re-implemented from the formulas.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedspine_edge import kernels
from fedspine_edge.lora import LoRALinear
from fedspine_edge.protocol import Layout
from fedspine_edge.structure import matrices_of

DECAY = 0.9
SHARE = 16  # a measurement sums over every 16th block of features, or one of those there are
# Share of the running average that stays at a measurement; APT (arXiv 2401.12200) takes .85.
KINDS: Mapping[str, float] = MappingProxyType(
    {"lora-guided": DECAY, "salience": 0.85, "magnitude": DECAY, "gradient": DECAY, "random": DECAY}
)


Axis = Literal["out", "in"]


@dataclass
class Flow:
    """What went through a matrix in one iteration, in parts of [tokens, features]."""

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook: keeps the input, and the output's gradient when it comes back."""
        self.inputs.append(inputs[0].detach().flatten(0, -2))
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self.gradients.append(gradient.detach().flatten(0, -2))
        )


@dataclass
class ImportanceMeter:
    """The running importance of the members a device keeps.

    Attributes:
        scores: Group name -> score of each kept member, float32 [kept]; empty before the first measurement.
        num_skipped: Measurements that were not finite and did not count.
        kind: A key of `KINDS`.
        flows: For `gradient`: matrix name -> what went through in the iteration that is being watched.
        phase: Which sixteenth of the features the next measurement sums over, modulo `SHARE`.
    """

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    num_skipped: int = 0
    kind: str = "lora-guided"
    flows: dict[str, Flow] = field(default_factory=dict)
    phase: int = 0

    def measure(self, layout: Layout, linears: Mapping[str, LoRALinear], keep: Mapping[str, np.ndarray]) -> None:
        """Takes one iteration's gradients in; one that is not finite is skipped and counted."""
        fresh = {group.name: self._fresh(layout, group.name, linears, keep[group.name]) for group in layout.groups}
        self.phase += 1
        if not all(np.isfinite(scores).all() for scores in fresh.values()):
            self.num_skipped += 1
            return
        decay = KINDS[self.kind]
        for name, scores in fresh.items():
            last = self.scores.get(name)
            self.scores[name] = scores if last is None else decay * last + (1 - decay) * scores

    def _fresh(
        self, layout: Layout, group_name: str, linears: Mapping[str, LoRALinear], kept: np.ndarray
    ) -> np.ndarray:
        if self.kind == "random":
            members = layout.group(group_name).num_members
            drawn = np.random.default_rng(zlib.crc32(group_name.encode())).random(members, dtype=np.float32)
            return np.asarray(drawn[kept])
        if self.kind == "magnitude":
            return member_scores(layout, group_name, linears, len(kept), _magnitude)
        if self.kind == "gradient":
            return member_scores(layout, group_name, linears, len(kept), self._gradient)
        return member_scores(layout, group_name, linears, len(kept), self._guided)

    def _guided(self, name: str, linear: LoRALinear, axis: Axis) -> Tensor:
        return linear.importance(axis, (SHARE, self.phase))

    def _gradient(self, name: str, linear: LoRALinear, axis: Axis) -> Tensor:
        flow = self.flows[name]
        return _estimate(linear, axis, torch.cat(flow.inputs), torch.cat(flow.gradients))

    @contextmanager
    def watching(self, linears: Mapping[str, LoRALinear]) -> Iterator[None]:
        """Notes what goes through every layer while it is open, where the kind needs that."""
        self.flows = {name: Flow() for name in linears} if self.kind == "gradient" else {}
        hooks = [linears[name].register_forward_hook(flow.note) for name, flow in self.flows.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def select(self, positions: Mapping[str, np.ndarray]) -> None:
        """Keeps the scores at the given positions of each group (after a pruning)."""
        self.scores = {name: scores[positions[name]] for name, scores in self.scores.items()}


def _guided(name: str, linear: LoRALinear, axis: Axis) -> Tensor:
    return linear.importance(axis)


def _magnitude(name: str, linear: LoRALinear, axis: Axis) -> Tensor:
    """Sums of |W|: the estimate of a gradient that is 1 everywhere, times the weight."""
    return _estimate(linear, axis, torch.ones(1, linear.lora_a.shape[1]), torch.ones(1, linear.lora_b.shape[0]))


def _estimate(linear: LoRALinear, axis: Axis, lora_a: Tensor, transposed_grad_b: Tensor) -> Tensor:
    """Sums of |G W| for the gradient G = grad_b A, by the kernel that streams it; W without the adapter."""
    nothing = torch.zeros(linear.lora_b.shape[0], len(lora_a))
    return kernels.importance(
        linear.packed,
        lora_a=lora_a,
        lora_b=nothing,
        grad_a=torch.zeros_like(lora_a),
        grad_b=transposed_grad_b.t().contiguous(),
        scaling=linear.scaling,
        axis=axis,
    )


def member_scores(
    layout: Layout,
    group_name: str,
    linears: Mapping[str, LoRALinear],
    kept: int,
    score: Callable[[str, LoRALinear, Axis], Tensor] = _guided,
) -> np.ndarray:
    """Returns this iteration's score of each kept member of a group, float32 [kept].

    Args:
        layout: The unpruned model's layout.
        group_name: Which group.
        linears: Matrix name -> layer with gradients.
        kept: Members kept now.
        score: (name, layer, axis) -> score of each output or input.
    """
    total = torch.zeros(kept)
    for matrix in matrices_of(layout, group_name):
        linear = linears[matrix.name]
        scores = score(matrix.name, linear, "out" if matrix.out_group == group_name else "in")
        by_member = scores.view(kept, -1).sum(dim=1)
        total += by_member / by_member.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return total.numpy()
