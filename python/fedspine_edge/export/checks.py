"""The last word on an export: each format against the model it came from, on real text.

In: a file or directory and what its model says. Out: `Parity`, or VerificationError where the format's bound is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge import hf
from fedspine_edge.base_model import open_base
from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.errors import IncompatibleError, VerificationError
from fedspine_edge.export.verify import Parity, check_parity, compare_logits, llama_logits
from fedspine_edge.hf.directory import MODELING_FILE

MIN_POSITIONS = 256
"""Fewer positions say too little of top-1 agreement."""


@torch.no_grad()
def reference_logits(model_dir: Path, token_ids: Sequence[int]) -> np.ndarray:
    """Returns what a model directory says: a decoder after each token [T, V], a classifier of the text [1, L]."""
    logits: np.ndarray = load_pruned(model_dir)(torch.tensor([list(token_ids)])).logits.numpy()
    return logits.reshape(-1, logits.shape[-1])


def check_gguf(
    path: Path,
    reference: np.ndarray,
    token_ids: Sequence[int],
    *,
    quantization: str,
    adapter: Path | None = None,
    num_threads: int = 1,
) -> Parity:
    """Returns the parity of a GGUF file, which the format allows.

    Args:
        path: The file.
        reference: What the model says after each token, float [T, V].
        token_ids: Real text, [T], of `MIN_POSITIONS` tokens or more.
        quantization: A key of `TOLERANCES`.
        adapter: GGUF LoRA adapter to add to the file's model.
        num_threads: Threads.

    Raises:
        ValueError: The text is too short.
        VerificationError: A bound of the format is missed.
    """
    _refuse_short(token_ids)
    found = llama_logits(path, token_ids, adapter=adapter, num_threads=num_threads)
    parity = compare_logits(reference, found, token_ids=token_ids)
    check_parity(parity, quantization)
    return parity


@torch.no_grad()
def check_directory(model_dir: Path, token_ids: Sequence[int]) -> Parity:
    """Returns the parity of a directory that transformers loads itself; nothing may differ.

    Args:
        model_dir: Written by `save_pruned`.
        token_ids: Real text, [T]; of `MIN_POSITIONS` tokens or more for a decoder.

    Raises:
        ValueError: The text is too short.
        CheckpointError: The directory is damaged.
        IncompatibleError: The model class in it is not the one this program ships.
        VerificationError: transformers' model says something else than ours.
    """
    decoder = open_base(model_dir).family.task == "decoder"
    if decoder:
        _refuse_short(token_ids)
    own_code = model_dir / MODELING_FILE
    shipped = Path(hf.__file__).with_name(MODELING_FILE)
    if own_code.is_file() and own_code.read_bytes() != shipped.read_bytes():
        raise IncompatibleError(f"expected this program's {MODELING_FILE} in {model_dir}, found another")
    auto_class = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    model = auto_class.from_pretrained(model_dir, trust_remote_code=own_code.is_file(), local_files_only=True).eval()
    logits = model(torch.tensor([list(token_ids)])).logits.numpy()
    reference = reference_logits(model_dir, token_ids)
    parity = compare_logits(reference, logits.reshape(-1, logits.shape[-1]), token_ids=token_ids if decoder else None)
    if parity.max_abs_dlogit != 0:
        raise VerificationError(
            f"expected equal logits from transformers, found them {parity.max_abs_dlogit:.3g} apart",
            hint="do not ship this directory: report a fault of the export",
        )
    return parity


def _refuse_short(token_ids: Sequence[int]) -> None:
    if len(token_ids) < MIN_POSITIONS:
        raise ValueError(f"expected a text of {MIN_POSITIONS} tokens or more, found {len(token_ids)}")
