"""LoRA-guided importance: how much the loss would feel the loss of each member.

Comes in: a model whose LoRA factors have gradients. Goes out: one score a member, averaged over iterations. The score
of an entry is |estimated gradient x merged weight|, where the gradient of the frozen weight is estimated from the LoRA
factors' gradients alone; it is summed over the member's rows or columns, normalised within each matrix, and added over
the matrices that the member couples.

Source: LoRAPrune (arXiv 2305.18403), equations for LoRA-guided importance, re-implemented from the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fedspine_edge.lora import LoRALinear
from fedspine_edge.protocol import Layout
from fedspine_edge.structure import matrices_of

DECAY = 0.9


@dataclass
class ImportanceMeter:
    """The running importance of the members a device keeps.

    Attributes:
        scores: Group name -> score of each kept member, float32 [kept]; empty before the first measurement.
        num_skipped: Measurements that were not finite and did not count.
    """

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    num_skipped: int = 0

    def measure(self, layout: Layout, linears: Mapping[str, LoRALinear], kept_counts: Mapping[str, int]) -> None:
        """Takes one iteration's gradients in; one that is not finite is skipped and counted."""
        fresh = {group.name: member_scores(layout, group.name, linears, kept_counts) for group in layout.groups}
        if not all(np.isfinite(scores).all() for scores in fresh.values()):
            self.num_skipped += 1
            return
        for name, scores in fresh.items():
            last = self.scores.get(name)
            self.scores[name] = scores if last is None else DECAY * last + (1 - DECAY) * scores

    def select(self, positions: Mapping[str, np.ndarray]) -> None:
        """Keeps the scores at the given positions of each group (after a pruning)."""
        self.scores = {name: scores[positions[name]] for name, scores in self.scores.items()}


def member_scores(
    layout: Layout, group_name: str, linears: Mapping[str, LoRALinear], kept_counts: Mapping[str, int]
) -> np.ndarray:
    """Returns this iteration's score of each kept member of a group, float32 [kept].

    Args:
        layout: The unpruned model's layout.
        group_name: Which group.
        linears: Matrix name -> layer with gradients.
        kept_counts: Group name -> members kept now.
    """
    kept = kept_counts[group_name]
    total = torch.zeros(kept)
    for matrix in matrices_of(layout, group_name):
        linear = linears[matrix.name]
        scores = linear.importance("out" if matrix.out_group == group_name else "in")
        by_member = scores.view(kept, -1).sum(dim=1)
        total += by_member / by_member.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return total.numpy()
