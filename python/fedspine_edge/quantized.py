"""Messages in 8 or 4 bits: block-wise integers for LoRA factors, one bit a member for masks, what was lost made up for.

Comes in: factors as arrays. Goes out: codes and scales, and back. Each component of A and of B (rows of A, columns of
B) is cut into blocks of 64 values that share a float16 scale. numpy and the standard library only: the server reads
updates and writes assignments with it. An assignment has 8 bits even where its answer has 4: what a device begins with
nobody makes up for.

What rounding lost is not lost for good: the device keeps the product's residual and adds it before it rounds again.
Factors of two rounds have nothing in common (the server turns their basis), products have, so the residual is one, kept
as a pair of the update's rank. Rows and columns of members that are gone count for nothing.

Source: error feedback as in Seide et al. (Interspeech 2014) and Karimireddy et al. (ICML 2019); the residual of the
product is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import Assignment, Layout, Update, expand_members

LEVELS = {"int8": 127, "int4": 7}
ASSIGNMENT_DTYPE = "int8"  # of the factors in an assignment whose answer is not float16
BLOCK = 64
PARAMETER_BYTES = {"float16": 2.0, "int8": 1 + 2 / BLOCK, "int4": 1 / 2 + 2 / BLOCK}
RIDGE = 1e-6  # of the mean energy of A's rows
DAMPING = 1e-2  # of B's columns: a component that has hardly begun must not be bent far
SMALLEST_SCALE = 2.0**-24  # float16 knows nothing smaller

Pair = tuple[np.ndarray, np.ndarray]
Message = TypeVar("Message", Assignment, Update)


def encoded(values: np.ndarray, dtype: str) -> Pair:
    """Returns codes and scales of a matrix; each row in blocks of its own.

    Args:
        values: float [rows, columns].
        dtype: `int8` or `int4`.

    Returns:
        int8 [rows, columns], or uint8 [rows, ceil(columns / 2)] with two codes a byte; scales float16 [rows, blocks].
    """
    levels, (rows, columns) = LEVELS[dtype], values.shape
    blocks = np.zeros((rows, -(-columns // BLOCK) * BLOCK))
    blocks[:, :columns] = values
    blocks = blocks.reshape(rows, -1, BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=2) / levels, SMALLEST_SCALE).astype(np.float16)
    steps = np.rint(blocks / scales[..., None].astype(np.float64))
    codes = np.nan_to_num(np.clip(steps, -levels, levels)).astype(np.int8)  # what is no number has a scale that is none
    codes = codes.reshape(rows, -1)
    if dtype == "int8":
        return np.ascontiguousarray(codes[:, :columns]), scales
    nibbles = (codes + 8).astype(np.uint8)[:, : columns + columns % 2]
    return nibbles[:, ::2] << 4 | nibbles[:, 1::2], scales


def decoded(codes: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    """Returns the float16 matrix [rows, columns] of what `encoded` made.

    Raises:
        IncompatibleError: Codes and scales are not of that many columns.
    """
    rows, packed = len(codes), codes.dtype == np.uint8
    shape, blocks = (rows, -(-columns // 2) if packed else columns), -(-columns // BLOCK)
    fit = codes.dtype in (np.int8, np.uint8) and codes.shape == shape
    if not fit or scales.dtype != np.float16 or scales.shape != (rows, blocks):
        raise IncompatibleError(
            f"expected codes {list(shape)} and float16 scales {[rows, blocks]}, found {codes.dtype} {list(codes.shape)}"
            f" and {scales.dtype} {list(scales.shape)}"
        )
    if packed:
        codes = np.stack([codes >> 4, codes & 15], axis=2).reshape(rows, -1)[:, :columns].astype(np.int8) - 8
    values = codes.astype(np.float32) * np.repeat(scales.astype(np.float32), BLOCK, axis=1)[:, :columns]
    with np.errstate(over="ignore"):
        return np.asarray(values.astype(np.float16))


def rounded(lora_a: np.ndarray, lora_b: np.ndarray, residual: Pair | None, dtype: str) -> tuple[Pair, Pair, Pair]:
    """Returns codes and scales of A and of B transposed, and the new residual.

    B is fitted anew to the rounded A, so that it takes up what A lost as well.

    Args:
        lora_a: float [r, in].
        lora_b: float [out, r].
        residual: (V [k, in], U [out, k]) with U V to be added to B A; None for nothing.
        dtype: `int8` or `int4`.
    """
    a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
    if residual is not None:
        a, b = (
            np.concatenate([a, residual[0].astype(np.float64)]),
            np.concatenate([b, residual[1].astype(np.float64)], axis=1),
        )
    own_b = lora_b.astype(np.float64)
    bent_a = a[: len(lora_a)] + _fitted(own_b.T, DAMPING, b[:, len(lora_a) :].T) @ a[len(lora_a) :]
    sent_a = encoded(bent_a, dtype)
    new_a = decoded(*sent_a, lora_a.shape[1]).astype(np.float64)
    sent_b = encoded(_fitted(new_a, RIDGE, a) @ b.T, dtype)
    new_b = decoded(*sent_b, lora_b.shape[0]).astype(np.float64).T
    lost = (np.concatenate([a, new_a]), np.concatenate([b, -new_b], axis=1))
    return sent_a, sent_b, _shortened(*lost, len(lora_a))


def _fitted(rows: np.ndarray, ridge: float, wanted: np.ndarray) -> np.ndarray:
    """Returns X, [r, k], for which X^T rows is nearest to `wanted` [k, features], a little drawn to zero."""
    gram = rows @ rows.T
    shift = ridge * float(np.trace(gram)) / len(gram) + np.finfo(np.float64).tiny
    return np.asarray(np.linalg.solve(gram + shift * np.eye(len(gram)), rows @ wanted.T))


def _shortened(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    """The best pair of a rank for B A, float16."""
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b)
    u, sigma, vt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(sigma[:rank])
    return (
        ((vt[:rank] @ q_a.T) * root[:, None]).astype(np.float16),
        ((q_b @ u[:, :rank]) * root).astype(np.float16),
    )


def packed(
    tensors: Mapping[str, np.ndarray], layout: Layout, dtype: str, residuals: Mapping[str, Pair]
) -> tuple[dict[str, np.ndarray], dict[str, Pair]]:
    """Returns an update's arrays in few bits, and what to remember for the next ones.

    Args:
        tensors: The arrays of an update of float16.
        layout: The base model's layout.
        dtype: `int8` or `int4`.
        residuals: Matrix name -> what the last rounding lost, (V [k, in], U [out, k]) of the unpruned matrix.
    """
    sent, remembered = dict(tensors), {}
    for matrix in layout.matrices:
        columns = _features(layout, tensors, matrix.in_group, matrix.in_features)
        rows = _features(layout, tensors, matrix.out_group, matrix.out_features)
        name_a, name_b, old = f"lora_a/{matrix.name}", f"lora_b/{matrix.name}", residuals.get(matrix.name)
        here = None if old is None else (old[0][:, columns], old[1][rows])
        sent_a, sent_b, lost = rounded(tensors[name_a], tensors[name_b], here, dtype)
        sent[name_a], sent[f"scale_a/{matrix.name}"] = sent_a
        sent[name_b], sent[f"scale_b/{matrix.name}"] = sent_b
        whole_a = np.zeros((len(lost[0]), matrix.in_features), dtype=np.float16)
        whole_b = np.zeros((matrix.out_features, lost[1].shape[1]), dtype=np.float16)
        whole_a[:, columns], whole_b[rows] = lost
        remembered[matrix.name] = (whole_a, whole_b)
    return sent | packed_masks(tensors, layout), remembered


def packed_once(tensors: Mapping[str, np.ndarray], layout: Layout, dtype: str) -> dict[str, np.ndarray]:
    """Returns an assignment's arrays in few bits; B is fitted anew to the rounded A, and what is lost is lost.

    Args:
        tensors: The arrays of an assignment of float16.
        layout: The base model's layout.
        dtype: `int8` or `int4`.
    """
    sent = dict(tensors)
    for matrix in layout.matrices:
        name_a, name_b = f"lora_a/{matrix.name}", f"lora_b/{matrix.name}"
        a, b = tensors[name_a].astype(np.float64), tensors[name_b].astype(np.float64)
        sent[name_a], sent[f"scale_a/{matrix.name}"] = encoded(a, dtype)
        new_a = decoded(sent[name_a], sent[f"scale_a/{matrix.name}"], a.shape[1]).astype(np.float64)
        sent[name_b], sent[f"scale_b/{matrix.name}"] = encoded(_fitted(new_a, RIDGE, a) @ b.T, dtype)
    return sent | packed_masks(tensors, layout)


def packed_masks(tensors: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """Returns the masks of an update as bits."""
    names = {f"keep/{group.name}": group.num_members for group in layout.groups}
    return {name: mask_bits(tensors[name], num_members) for name, num_members in names.items()}


def _features(layout: Layout, tensors: Mapping[str, np.ndarray], group: str | None, features: int) -> np.ndarray:
    if group is None:
        return np.arange(features)
    return expand_members(tensors[f"keep/{group}"], layout.group(group).num_members, features)


def as_float16(message: Message, dtype: str, layout: Layout) -> Message:
    """Returns a message as one whose arrays are of float16, whatever it was sent as.

    Args:
        message: An update, or an assignment.
        dtype: What updates are sent as.
        layout: The base model's layout.

    Raises:
        IncompatibleError: It does not fit the layout.
    """
    if dtype == "float16" or isinstance(message.tensors, DecodedArrays):
        return message
    return dataclasses.replace(message, tensors=DecodedArrays(message.tensors, layout, message.rank))


def mask_bits(members: np.ndarray, num_members: int) -> np.ndarray:
    """Returns kept members as one bit each, uint8 [ceil(num_members / 8)]."""
    mask = np.zeros(num_members, dtype=bool)
    mask[members] = True
    return np.packbits(mask)


class DecodedArrays(Mapping[str, np.ndarray]):
    """The arrays of a message of integers as those of one of float16; each is decoded when it is asked for.

    Args:
        arrays: What travels.
        layout: The base model's layout.
        rank: The message's rank.

    Attributes:
        sent: What travels.

    Raises:
        IncompatibleError: They are no such message's.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], layout: Layout, rank: int) -> None:
        self.sent = arrays
        self._rank = rank
        self._columns: dict[str, tuple[str, int]] = {}  # lora_*/<matrix> -> its scales' name, columns as it was coded
        self._keep: dict[str, np.ndarray] = {}
        for group in layout.groups:
            bits = self._found(f"keep/{group.name}")
            if bits.dtype != np.uint8 or bits.shape != (-(-group.num_members // 8),):
                raise IncompatibleError(
                    f"expected a bit for each of {group.num_members} members of {group.name},"
                    f" found {bits.dtype} {list(bits.shape)}"
                )
            mask = np.unpackbits(bits)
            if mask[group.num_members :].any():
                raise IncompatibleError(f"expected no members above {group.num_members} in {group.name}")
            self._keep[f"keep/{group.name}"] = np.flatnonzero(mask).astype(np.int32)
        widths = {group.name: len(self._keep[f"keep/{group.name}"]) / group.num_members for group in layout.groups}
        for matrix in layout.matrices:
            self._add(matrix.name, "a", round(matrix.in_features * widths.get(matrix.in_group or "", 1.0)))
            self._add(matrix.name, "b", round(matrix.out_features * widths.get(matrix.out_group or "", 1.0)))

    def _found(self, name: str) -> np.ndarray:
        if name not in self.sent:
            raise IncompatibleError(f"expected an array {name}, found none")
        return self.sent[name]

    def _add(self, matrix: str, side: str, columns: int) -> None:
        name = f"lora_{side}/{matrix}"
        self._columns[name] = (f"scale_{side}/{matrix}", columns)
        found = self._decoded(name)
        if side == "a" and len(found) != self._rank:
            raise IncompatibleError(f"expected {self._rank} components in {name}, found {len(found)}")

    def _decoded(self, name: str) -> np.ndarray:
        scales, columns = self._columns[name]
        values = decoded(self._found(name), self._found(scales), columns)
        return values if name.startswith("lora_a/") else values.T

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._keep:
            return self._keep[name]
        return self._decoded(name) if name in self._columns else self.sent[name]

    def __iter__(self) -> Iterator[str]:
        scales = {scale for scale, _ in self._columns.values()}
        return (name for name in self.sent if name not in scales)

    def __len__(self) -> int:
        return len(self.sent) - len(self._columns)
