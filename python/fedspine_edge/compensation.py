"""What removed members contributed on average, kept as a bias.

Comes in: activations that pass through a model. Goes out: the mean input of each matrix that loses columns, and the
bias that stands in for the columns removed.

Some channels are huge on one token of a text and nothing on the others (massive activations: a channel of MiniLM is 20
on one token in fourteen and 0 elsewhere). Their mean fits no token: the bias of one such channel took a classifier from
86 % to 19 %. So a value counts for at most so many times the layer's mean size; ordinary channels never get there.

Source: FLAP (arXiv 2312.11983), baseline bias compensation, here with running means over a federated run; massive
activations: Sun et al. (arXiv 2402.17762); the bound is ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedspine_edge.protocol import Layout, expand_members

MOST_TIMES_MEAN = 8.0  # of the mean absolute input of the layer; 4 and 16 did as well (docs/log.md)


def compensation(base_weight: Tensor, columns: Tensor | None, mean_input: np.ndarray | None) -> Tensor | None:
    """Returns what the removed columns contribute on average, [O] float32; None when nothing is known or removed.

    Args:
        base_weight: The whole base weight [O, I].
        columns: Kept columns, int64, or None when all stay.
        mean_input: Mean of each input feature [I], NaN where it was not measured.
    """
    if columns is None or mean_input is None:
        return None
    mean = torch.from_numpy(np.nan_to_num(np.asarray(mean_input, dtype=np.float32)))
    mean[columns] = 0.0
    return base_weight @ mean


class MeanInputMeter:
    """Running means of what enters the matrices that lose columns; no value counts for more than a bound.

    Args:
        linears: Matrix name -> layer; the ones with an `in_group` are watched while the meter is open.
        layout: The unpruned model's layout.
    """

    def __init__(self, layout: Layout, linears: Mapping[str, nn.Module]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._valid: Tensor | None = None
        self._layout = layout
        self._hooks = [
            linears[m.name].register_forward_pre_hook(self._watch(m.name)) for m in layout.matrices if m.in_group
        ]

    def expect(self, valid: Tensor | None) -> None:
        """Says which tokens of the next forward pass count: bool [B, T]; None watches nothing."""
        self._valid = valid
        if valid is not None:
            self._count += int(valid.sum())

    def close(self, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Stops watching.

        Args:
            keep: The members the model had while it was watched.

        Returns:
            Matrix name -> mean input in the original numbering, float16 [I], NaN where it was not measured.
        """
        for hook in self._hooks:
            hook.remove()
        return {name: self._scattered(name, total / self._count, keep) for name, total in self._sums.items()}

    def _watch(self, name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self._valid is None:
                return
            features = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            valid = self._valid.reshape(-1).to(features.dtype)
            limit = MOST_TIMES_MEAN * float((valid @ features.abs()).mean() / valid.sum())
            total = valid @ features.clamp(-limit, limit)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

        return hook

    def _scattered(self, name: str, mean: Tensor, keep: Mapping[str, np.ndarray]) -> np.ndarray:
        matrix = self._layout.matrix(name)
        assert matrix.in_group is not None
        num_members = self._layout.group(matrix.in_group).num_members
        whole = np.full(matrix.in_features, np.nan, dtype=np.float16)
        whole[expand_members(keep[matrix.in_group], num_members, matrix.in_features)] = mean.numpy()
        return whole
