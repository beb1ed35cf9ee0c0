"""One local round of tuning: a shrunk model and batches -> trained factors and what was measured on the way.

Comes in: a model with `LoRALinear`s, batches, and what to prune after every H iterations. Goes out: the same model,
tuned and narrower, with the importance of its members and the mean inputs of its matrices.

Source: FedSpine (arXiv 2501.02438), local fine-tuning with pruning every H iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedspine_edge.batches import Batch, TokenSet, prompt_batches
from fedspine_edge.compensation import MeanInputMeter
from fedspine_edge.cross_entropy import cross_entropy
from fedspine_edge.dropout import DropoutStream
from fedspine_edge.errors import TuningError
from fedspine_edge.importance import ImportanceMeter
from fedspine_edge.lora import LoRALinear, trainable_parameters
from fedspine_edge.masks import Keep
from fedspine_edge.protocol import Layout
from fedspine_edge.shrink import BaseReader, Factors, install, positions_of, slice_factors

GRADIENT_CLIP = 1.0
LOSS_WINDOW = 4
MEAN_INPUT_EVERY = 4
MAX_PART_TOKENS = (
    256  # of a batch at once: bounds what is saved for the backward pass, whatever the batch and its texts
)
IMPORTANCE_EVERY = 2  # every other step ranks members alike


@dataclass
class ShrunkModel:
    """A model in the middle of a round: what it keeps, and its LoRA layers.

    Attributes:
        model: The transformers model.
        layout: The unpruned model's layout.
        keep: Members it has now.
        linears: Matrix name -> LoRA layer.
        base: Where the base weights come from.
        scaling: alpha / rank.
        mean_inputs: Matrix name -> mean input [I], for the compensation.
        dropout: Of the LoRA layers, while it is tuned; None for none.
    """

    model: Any
    layout: Layout
    keep: Keep
    base: BaseReader
    scaling: float
    mean_inputs: dict[str, np.ndarray]
    linears: dict[str, LoRALinear] = field(default_factory=dict)
    dropout: DropoutStream | None = None

    def load(self, factors: Factors) -> None:
        """Installs LoRA layers of the kept rows and columns with the given factors; each takes its predecessor's place.

        Two models' packed weights are never in memory at once, so nothing else may hold on to the old layers.
        """
        self.linears = {}
        self.linears = install(
            self.model,
            self.layout,
            self.keep,
            factors,
            base=self.base,
            scaling=self.scaling,
            mean_inputs=self.mean_inputs,
        )
        self.drop(self.dropout)

    def drop(self, dropout: DropoutStream | None) -> None:
        """Turns dropout on or off in all LoRA layers."""
        self.dropout = dropout
        for linear in self.linears.values():
            linear.dropout = dropout

    def factors(self) -> Factors:
        """Returns the LoRA factors at the kept rows and columns."""
        return {name: (linear.lora_a.detach(), linear.lora_b.detach()) for name, linear in self.linears.items()}


@dataclass(frozen=True)
class Tuned:
    """What a round measured.

    Attributes:
        loss_before: Mean training loss of the first iterations.
        loss_after: Mean training loss of the last iterations.
        importance: Group name -> score of each kept member; empty where it was not measured.
        mean_inputs: Matrix name -> mean input in the original numbering, NaN where not measured.
        num_steps: Iterations done.
    """

    loss_before: float
    loss_after: float
    importance: dict[str, np.ndarray]
    mean_inputs: dict[str, np.ndarray]
    num_steps: int


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Returns the mean cross-entropy of a batch; a decoder's logits are computed at the learnt tokens alone."""
    if len(batch.answer_ids):
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        learnt = hidden[batch.answer_rows, batch.answer_columns]
        return cross_entropy(learnt, model.get_output_embeddings().weight, batch.answer_ids)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.valid).logits
    return functional.cross_entropy(logits, batch.labels)


def tune(
    shrunk: ShrunkModel,
    batches: Iterable[Batch],
    *,
    learning_rate: float,
    prune_interval: int,
    narrower: Callable[[int, ImportanceMeter], Keep | None],
    measure: bool = True,
    importance: str = "lora-guided",
    own_mean_inputs: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    enough: Callable[[int], bool] = lambda steps: False,
) -> Tuned:
    """Tunes a model in place.

    Args:
        shrunk: The model with its LoRA layers loaded.
        batches: One a step.
        learning_rate: AdamW step size.
        prune_interval: Iterations between two prunings (H).
        narrower: Called after every H iterations with how many prunings came before and the importance so far; returns
            what to keep from then on, or None to leave the model as it is.
        measure: Whether importance and mean inputs are measured.
        importance: What members are ranked by; a key of `importance.KINDS`.
        own_mean_inputs: Whether removed members are stood in for by the mean inputs measured here, rather than by those
            the model came with.
        dropout: Share of the low-rank values that is dropped, in [0, 1).
        seed: Of dropout; and which part of the features the first measurement of importance looks at.
        on_step: Called after each step with how many are done and the loss of this one; changes nothing, but may wait,
            or end the round by an exception.
        enough: Called after each step with how many are done; True ends the round.

    Raises:
        TuningError: The loss is not finite.
    """
    meter, losses = ImportanceMeter(kind=importance, phase=seed), list[float]()
    inputs = MeanInputMeter(shrunk.layout, shrunk.linears)
    optimizer = _optimizer(shrunk.model, learning_rate)
    shrunk.drop(DropoutStream(dropout, seed) if dropout else None)
    for step, batch in enumerate(batches):
        if step and step % prune_interval == 0:
            keep = narrower(step // prune_interval - 1, meter)
            if keep is not None:
                measured = inputs.close(shrunk.keep)
                if own_mean_inputs:
                    shrunk.mean_inputs = updated_means(shrunk.mean_inputs, measured)
                optimizer = narrow(shrunk, keep, meter, optimizer, learning_rate)
                inputs = MeanInputMeter(shrunk.layout, shrunk.linears)
        watching = inputs if measure and step % MEAN_INPUT_EVERY == 0 else None
        ranking = measure and step % IMPORTANCE_EVERY == 1
        with meter.watching(shrunk.linears) if ranking else nullcontext():
            losses.append(_accumulate(shrunk.model, batch, optimizer, watching))
        if ranking:
            meter.measure(shrunk.layout, shrunk.linears, shrunk.keep)
        nn.utils.clip_grad_norm_(trainable_parameters(shrunk.model), GRADIENT_CLIP)
        optimizer.step()
        on_step(step + 1, losses[-1])
        if enough(step + 1):
            break
    shrunk.drop(None)
    window = max(1, min(LOSS_WINDOW, len(losses) // 2))
    return Tuned(
        loss_before=float(np.mean(losses[:window])),
        loss_after=float(np.mean(losses[-window:])),
        importance=meter.scores,
        mean_inputs=inputs.close(shrunk.keep),
        num_steps=len(losses),
    )


def updated_means(old: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns mean inputs with the fresh ones in place of the old, except where these are NaN."""
    return {
        **old,
        **{name: np.where(np.isnan(mean), old[name], mean) if name in old else mean for name, mean in fresh.items()},
    }


def _accumulate(model: Any, batch: Batch, optimizer: torch.optim.Optimizer, inputs: MeanInputMeter | None) -> float:
    """Leaves the gradient of a batch's mean loss in the parameters, and returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in batch.parts(MAX_PART_TOKENS):
        if inputs is not None:
            inputs.expect(part.valid)
        loss = loss_of(model, part) * (part.num_targets / batch.num_targets)
        total += float(loss.detach())
        if not math.isfinite(total):
            raise TuningError(f"expected a finite loss, found {total}", hint="lower the learning rate")
        torch.autograd.backward(loss)
        if inputs is not None:
            inputs.expect(None)
    return total


def _optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable_parameters(model), lr=learning_rate, weight_decay=0.0, fused=True)


def narrow(
    shrunk: ShrunkModel, keep: Keep, meter: ImportanceMeter, optimizer: torch.optim.Optimizer, learning_rate: float
) -> torch.optim.Optimizer:
    """Prunes a model in the middle of a round: weights, LoRA factors, importance and AdamW's moments.

    Returns:
        An optimiser over the narrower parameters that goes on where the old one was.
    """
    layout, last = shrunk.layout, shrunk.keep
    moments = {
        name: (optimizer.state[linear.lora_a], optimizer.state[linear.lora_b])
        for name, linear in shrunk.linears.items()
    }
    factors = slice_factors(layout, shrunk.factors(), last, keep)
    shrunk.keep = keep
    shrunk.load(factors)
    meter.select({name: np.searchsorted(last[name], members) for name, members in keep.items()})
    successor = _optimizer(shrunk.model, learning_rate)
    for parameter in trainable_parameters(shrunk.model):
        if parameter in optimizer.state:
            successor.state[parameter] = optimizer.state[parameter]
    for matrix in layout.matrices:
        rows, columns = positions_of(layout, matrix, last, keep)
        state_a, state_b = moments[matrix.name]
        linear = shrunk.linears[matrix.name]
        successor.state[linear.lora_a] = _selected(state_a, 1, columns)
        successor.state[linear.lora_b] = _selected(state_b, 0, rows)
    return successor


def _selected(state: dict[str, Tensor], dim: int, positions: Tensor | None) -> dict[str, Tensor]:
    if positions is None:
        return dict(state)
    return {name: t.index_select(dim, positions) if t.ndim == 2 else t for name, t in state.items()}


@torch.no_grad()
def predict(model: Any, tokens: TokenSet, *, choices: list[int] | None, batch_size: int = 32) -> np.ndarray:
    """Returns the class a model gives each row, int64 [N].

    Args:
        model: A classifier, or a decoder.
        tokens: The rows; without their answers.
        choices: First token of each class's word for a decoder; None for a classifier.
        batch_size: Rows at a time.
    """
    predictions = np.zeros(len(tokens), dtype=np.int64)
    for indices, input_ids, valid in prompt_batches(tokens, batch_size):
        if choices is None:
            logits = model(input_ids=input_ids, attention_mask=valid).logits
        else:
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[torch.arange(len(valid)), valid.sum(1) - 1])[:, choices]
        predictions[indices] = logits.argmax(dim=1).numpy()
    return predictions
