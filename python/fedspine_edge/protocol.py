"""What the server and the devices say to each other, as frozen dataclasses; `wire_format` makes bytes of them.

The server asks with an `Assignment`, the device answers with an `Update`; both name their arrays after one `Layout`,
which describes the base model once for a run. numpy and the standard library only: the server never loads torch.

Array names in `Assignment.tensors` and `Update.tensors`:

| name                    | shape           | dtype   | meaning                                                  |
|-------------------------|-----------------|---------|----------------------------------------------------------|
| `lora_a/<matrix>`       | [rank, in kept] | float16 | LoRA A at the columns of the kept members                |
| `lora_b/<matrix>`       | [out kept, rank]| float16 | LoRA B at the rows of the kept members                   |
| `keep/<group>`          | [kept]          | int32   | kept members, sorted, in the original numbering          |
| `importance/<group>`    | [num_members]   | float16 | importance of each member, NaN where it was not measured |
| `mean_input/<matrix>`   | [in_features]   | float16 | mean input of an o/down matrix, NaN where not measured   |
| `task_head/<parameter>` | the parameter's | float32 | parameters trained densely (a classifier)                |

An assignment to sum for a new task head has the task head alone, its answer these (d inputs, C classes):

| name                       | shape           | dtype   | meaning                                          |
|----------------------------|-----------------|---------|--------------------------------------------------|
| `head_statistics/counts`   | [C]             | int32   | examples of each class                           |
| `head_statistics/sums`     | [C, d]          | float16 | sums of a class's inputs, over all examples      |
| `head_statistics/products` | [d (d + 1) / 2] | float16 | mean outer product of the inputs, lower triangle |

In an assignment `keep/<group>` are the candidates: the device may keep these only. A matrix's `in_group` has its kept
columns, its `out_group` its kept rows. `quantized` says what is different in messages of integers.
Source: FedSpine (arXiv 2501.02438), the workflow of a round; docs/protocol.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_HEAD_EXAMPLES = 64  # of a device in head statistics: the fleet has enough, and the largest shard is not waited for


@dataclass(frozen=True)
class Group:
    """A group of structures that are pruned member by member: the heads or the FFN channels of one layer.

    Attributes:
        name: Unique, e.g. `layers.3.heads`.
        kind: `heads` (a member is a head, or a KV group with all its query heads) or `ffn` (a member is a channel).
        num_members: Members in the unpruned model.
        block: Kept counts are multiples of this (what fast kernels and quantised formats need).
        parameters_per_member: Base weights that go when one member goes.
    """

    name: str
    kind: str
    num_members: int
    block: int
    parameters_per_member: int


@dataclass(frozen=True)
class Matrix:
    """A linear layer of the base model that carries a LoRA pair.

    Attributes:
        name: Path of the module in the model.
        out_features: Rows of the unpruned weight.
        in_features: Columns of the unpruned weight.
        out_group: The group whose members own the rows, in equal consecutive shares; None when rows are never pruned.
        in_group: The group whose members own the columns; None when columns are never pruned.
    """

    name: str
    out_features: int
    in_features: int
    out_group: str | None
    in_group: str | None


@dataclass(frozen=True)
class Layout:
    """The prunable and trainable parts of one base model; the same on the server and on every device of a run.

    Attributes:
        base_sha256: Hash of the base model's weights.
        groups: Every group, layer by layer.
        matrices: Every LoRA'd matrix.
        task_head: Name and shape of each densely trained parameter.
    """

    base_sha256: str
    groups: tuple[Group, ...]
    matrices: tuple[Matrix, ...]
    task_head: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def group(self, name: str) -> Group:
        """Returns the group of that name; raises KeyError when there is none."""
        return {group.name: group for group in self.groups}[name]

    def matrix(self, name: str) -> Matrix:
        """Returns the matrix of that name; raises KeyError when there is none."""
        return {matrix.name: matrix for matrix in self.matrices}[name]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-ready dict that `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Layout:
        """Returns the layout a `to_json` document describes."""
        return cls(
            base_sha256=document["base_sha256"],
            groups=tuple(Group(**group) for group in document["groups"]),
            matrices=tuple(Matrix(**matrix) for matrix in document["matrices"]),
            task_head=tuple((name, tuple(shape)) for name, shape in document["task_head"]),
        )


@dataclass(frozen=True)
class HeadLinear:
    """The last linear layer of a task head.

    Attributes:
        name: Path of the module in the model.
        num_classes: Its outputs.
        width: Its inputs.
    """

    name: str
    num_classes: int
    width: int


def head_linear(layout: Layout) -> HeadLinear | None:
    """Returns the last linear layer of the task head; None for a model without one."""
    weights = [(name, shape) for name, shape in layout.task_head if name.endswith(".weight") and len(shape) == 2]
    return HeadLinear(weights[-1][0].removesuffix(".weight"), *weights[-1][1]) if weights else None


def expand_members(members: np.ndarray, num_members: int, features: int) -> np.ndarray:
    """Returns the feature indices that the given members own, sorted, int64 [kept * features / num_members].

    Args:
        members: Sorted member indices, int [kept].
        num_members: Members of the unpruned group.
        features: Rows (or columns) of the unpruned matrix; a multiple of `num_members`.
    """
    width = features // num_members
    return (np.asarray(members, dtype=np.int64)[:, None] * width + np.arange(width)).reshape(-1)


@dataclass(frozen=True)
class Assignment:
    """What the server asks of one device in one round.

    Attributes:
        run_id: Which run.
        device_id: Whom it is for.
        round_index: Round, from 0.
        base_sha256: The base model this is about.
        pruning_ratio: Share of the members of each kind to be gone by the end of the round, 0 <= ratio < 1.
        rank: LoRA rank.
        scaling: alpha / rank, the same at every rank.
        num_steps: Local iterations.
        prune_interval: Iterations between two prunings (H).
        batch_size: Examples an iteration.
        learning_rate: AdamW step size of this round.
        seed: Seed of everything random in this round on this device.
        mask_agreement: Share of the server's importance in the ranking of members (rho), 0..1.
        mask_mode: `uniform` (the same counts in each layer), `per-layer`, or `layers` (whole layers go).
        revive: Whether members outside the device's last mask may come back.
        tensors: Arrays, named as above.
        importance: What members are ranked by; a key of `fedspine_edge.importance.KINDS`.
        budget_seconds: Local work after which the device stops by its own clock; None does all `num_steps`.
        min_steps: Iterations that it does all the same.
        base_dtype: How the device holds the frozen weights: `float32`, `bfloat16` or `int8`.
        update_dtype: How the answer's factors travel: `float16`, `int8` or `int4`; those of the assignment itself are
            of int8 unless it is `float16` (`quantized`).
        lora_dropout: Share of the low-rank values of each LoRA layer that is dropped in a step, in [0, 1).
        work: `tune`, or `head-statistics`: sum what a new task head is solved from (`head_statistics`); then the model
            is the base as it is, and what is said of pruning, rank and learning does not matter.
    """

    run_id: str
    device_id: str
    round_index: int
    base_sha256: str
    pruning_ratio: float
    rank: int
    scaling: float
    num_steps: int
    prune_interval: int
    batch_size: int
    learning_rate: float
    seed: int
    mask_agreement: float
    mask_mode: str
    revive: bool
    tensors: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    importance: str = "lora-guided"
    budget_seconds: float | None = None
    min_steps: int = 1
    update_dtype: str = "float16"
    base_dtype: str = "float32"
    work: str = "tune"
    lora_dropout: float = 0.0


@dataclass(frozen=True)
class DeviceReport:
    """What a device measured while it worked on an assignment.

    Attributes:
        num_examples: Examples the device trains on.
        num_steps: Iterations done.
        loss_before: Mean training loss of the first iterations, before any of them took effect on it.
        loss_after: Mean training loss of the last iterations.
        compute_seconds: Wall seconds of the local work.
        peak_memory_bytes: Peak resident memory of the worker process during the round.
        energy_joules: Energy of the round, None where the board has no readable power rail.
    """

    num_examples: int
    num_steps: int
    loss_before: float
    loss_after: float
    compute_seconds: float
    peak_memory_bytes: int
    energy_joules: float | None = None


@dataclass(frozen=True)
class Update:
    """What a device returns for an assignment; fields of the same name as the assignment's say what was really done."""

    run_id: str
    device_id: str
    round_index: int
    base_sha256: str
    pruning_ratio: float
    rank: int
    report: DeviceReport
    tensors: Mapping[str, np.ndarray] = field(repr=False, compare=False)


def sent_tensors(message: Assignment | Update) -> Mapping[str, np.ndarray]:
    """Returns a message's arrays as they travel; those of a message of integers are read as float16 (`quantized`)."""
    return getattr(message.tensors, "sent", message.tensors)


def tensors_nbytes(message: Assignment | Update) -> int:
    """Returns the bytes of a message's arrays on the wire."""
    return sum(array.nbytes for array in sent_tensors(message).values())
