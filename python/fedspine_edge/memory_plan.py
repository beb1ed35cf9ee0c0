"""What a training step will take of the memory, before anything is loaded.

Comes in: a model's config and layout, what is kept of it, the shape of a batch. Goes out: bytes by class, and a refusal
when they are more than there is, naming the pruning ratio that would fit.

Source: docs/algorithm.md, the local round; activations.py has what each operation saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fedspine_edge.activations import DECODER, ENCODER, NODES_BYTES, LayerWidths, saved_floats
from fedspine_edge.embeddings import PackedEmbedding, PackedHead
from fedspine_edge.errors import MemoryLimitError
from fedspine_edge.lora import LoRALinear
from fedspine_edge.masks import choose, kept_counts
from fedspine_edge.protocol import Layout, Matrix
from fedspine_edge.reference import PANEL_WIDTH
from fedspine_edge.structure import Family, family_of
from fedspine_edge.tuning import MAX_PART_TOKENS

FLOAT = 4
ELEMENT = {"float32": FLOAT, "bfloat16": 2, "int8": 1}  # of a frozen weight
ANSWER_TOKENS = 2  # of a decoder's row: the class as a word, and the end of the sequence
SCRATCH_BYTES = 3 << 20  # a thread: packed blocks of x and dy, and the rows of A and B in panels
HEAP_SLACK = {"decoder": (1.1, 1.7), "classifier": (0.35, 0.35)}
"""What glibc's heap leaves unused between blocks, of what is saved, when a step goes in one part and in several.

Measured on SmolLM2-135M, where it was 0.9 to 1.4 and 1.3 to 2.3, and on MiniLM-L6."""

PACKED = (LoRALinear, PackedEmbedding, PackedHead)
RATIOS = tuple(round(0.05 * step, 2) for step in range(1, 19))


@dataclass(frozen=True)
class StepShape:
    """The shape of a step.

    Attributes:
        batch_size: Texts a step.
        tokens: Tokens of the longest text.
        rank: LoRA rank.
        base_dtype: How the frozen weights are held.
    """

    batch_size: int
    tokens: int
    rank: int
    base_dtype: str = "float32"

    @property
    def part_rows(self) -> int:
        """Texts that are in memory at once: a step goes part by part."""
        return min(self.batch_size, max(1, MAX_PART_TOKENS // self.tokens))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by class.

    Attributes:
        base: Frozen weights: packed matrices with their biases, embeddings, norms.
        lora: LoRA factors, densely trained parameters and the gradients of both.
        optimizer: AdamW's two moments.
        activations: What a forward leaves until the backward.
        workspace: What comes and goes (gradients of activations, logits, kernels' scratch) and holes in the heap.
    """

    base: int
    lora: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Their sum: all but the program itself."""
        return self.base + self.lora + self.optimizer + self.activations + self.workspace


def plan_step(
    config: Any, layout: Layout, kept: Mapping[str, int], shape: StepShape, *, other_parameters: int
) -> MemoryPlan:
    """Returns what one step takes.

    Args:
        config: The model's transformers config.
        layout: The layout of that model.
        kept: Group name -> members that stay.
        shape: The step's batch, tokens and rank.
        other_parameters: Parameters outside the layout's matrices: embeddings, norms, heads.
    """
    family = family_of(config)
    sizes = [_kept_shape(layout, matrix, kept) for matrix in layout.matrices]
    factors = sum(shape.rank * (rows + columns) for rows, columns in sizes)
    trained = factors + sum(int(np.prod(dims)) for _, dims in layout.task_head)
    packed = sum(_packed_bytes(rows, columns, shape.base_dtype) for rows, columns in sizes)
    layers = _layers(config, family, layout, kept, shape)
    part_tokens = shape.part_rows * shape.tokens
    table = DECODER if family.task == "decoder" else ENCODER
    logits = shape.part_rows * ANSWER_TOKENS * int(config.vocab_size) if family.task == "decoder" else 0
    saved = int(part_tokens * sum(saved_floats(widths, table) for widths in layers))
    activations = FLOAT * saved + NODES_BYTES[family.task] * len(layers)
    slack = int(HEAP_SLACK[family.task][shape.batch_size > shape.part_rows] * activations)
    widest = max(max(3 * w.channels, 2 * w.query + 2 * w.key) + 3 * w.hidden for w in layers)
    return MemoryPlan(
        base=packed + FLOAT * other_parameters - _saved_by_embeddings(config, family, shape.base_dtype),
        lora=FLOAT * 2 * trained,
        optimizer=FLOAT * 2 * trained,
        activations=activations,
        workspace=FLOAT * max(2 * logits, part_tokens * widest) + SCRATCH_BYTES + slack,
    )


def other_parameters(model: nn.Module, layout: Layout) -> int:
    """Returns the parameters outside the layout's matrices, of a model that may be empty."""
    inside = tuple(f"{matrix.name}." for matrix in layout.matrices)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(inside) and not (tied and name == "lm_head.weight")
    )


def tensor_bytes(model: nn.Module) -> int:
    """Returns what a model's tensors take, packed weights and gradients included, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors += [tensor for module in model.modules() if isinstance(module, PACKED) for tensor in module.packed.tensors]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if not tensor.is_meta}
    return sum(held.values())


def check_memory(
    model: Any, layout: Layout, kept: Mapping[str, int], shape: StepShape, *, available_bytes: int
) -> MemoryPlan:
    """Returns the plan of a step on an opened model, when it fits.

    Args:
        model: The opened transformers model; what it holds already is not asked for again.
        layout: Its layout.
        kept: Group name -> members that stay.
        shape: The step's batch, tokens and rank.
        available_bytes: What this process can still get.

    Raises:
        MemoryLimitError: It does not fit.
    """
    others, held = other_parameters(model, layout), tensor_bytes(model)

    def needed(counts: Mapping[str, int]) -> MemoryPlan:
        return plan_step(model.config, layout, counts, shape, other_parameters=others)

    plan = needed(kept)
    if plan.total - held <= available_bytes:
        return plan
    fitting = next((r for r in RATIOS if needed(counts_at(layout, r)).total - held <= available_bytes), None)
    found = f"found {max(0, available_bytes) / 2**20:.0f} MiB"
    raise MemoryLimitError(
        f"expected {(plan.total - held) / 2**20:.0f} MiB of free memory for a step, {found}",
        hint=f"a model pruned to ratio {fitting} would fit"
        if fitting is not None
        else "not even a model pruned to ratio 0.9 would fit: stop other programs, or take a smaller model",
    )


def counts_at(layout: Layout, pruning_ratio: float) -> dict[str, int]:
    """Returns how many members of each group stay at a ratio, the same share of every group."""
    scores = {group.name: np.arange(group.num_members, dtype=np.float32) for group in layout.groups}
    return kept_counts(choose(layout, scores, pruning_ratio=pruning_ratio, mode="uniform"))


def _kept_shape(layout: Layout, matrix: Matrix, kept: Mapping[str, int]) -> tuple[int, int]:
    def features(group: str | None, whole: int) -> int:
        return whole if group is None else whole // layout.group(group).num_members * kept[group]

    return features(matrix.out_group, matrix.out_features), features(matrix.in_group, matrix.in_features)


def _packed_bytes(rows: int, columns: int, dtype: str) -> int:
    """Of a packed matrix with its bias."""
    padded = -(-rows // PANEL_WIDTH) * PANEL_WIDTH
    return ELEMENT[dtype] * padded * columns + (FLOAT * padded if dtype == "int8" else 0) + FLOAT * rows


def _saved_by_embeddings(config: Any, family: Family, dtype: str) -> int:
    """What embedding and head take less than in float32."""
    if dtype == "float32":
        return 0
    rows, columns = int(config.vocab_size), int(getattr(config, family.hidden_size))
    apart = family.task == "decoder" and not getattr(config, "tie_word_embeddings", False)
    return (1 + apart) * (FLOAT * rows * (columns + 1) - _packed_bytes(rows, columns, dtype))


def _layers(
    config: Any, family: Family, layout: Layout, kept: Mapping[str, int], shape: StepShape
) -> list[LayerWidths]:
    num_heads = int(getattr(config, family.num_heads))
    hidden = int(getattr(config, family.hidden_size))
    head_dim = int(getattr(config, "head_dim", None) or hidden // num_heads)
    layers = []
    for index in range(int(getattr(config, family.num_layers))):
        path = family.layers.format(index)
        query, key, _ = (_kept_shape(layout, layout.matrix(f"{path}.{name}"), kept)[0] for name in family.attention_in)
        channels, _ = _kept_shape(layout, layout.matrix(f"{path}.{family.ffn_in[0]}"), kept)
        layers.append(LayerWidths(hidden, query, key, query // head_dim, channels, shape.rank, shape.tokens))
    return layers
