"""Proof that an exported file says what its model says: logits through llama.cpp against a reference.

In: a GGUF file and token ids, or two logit arrays [T, V]. Out: `Parity`, or `VerificationError` where it is too small.
A wrong permutation of q/k rows loads and runs, slightly wrong: hence a check on every export.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspine_edge.errors import VerificationError
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.llama_session import LlamaSession, open_session

BATCH_TOKENS = 512
"""llama.cpp's own physical batch; more tokens at once are no faster."""

MAX_SEQUENCES = 64


@dataclass(frozen=True)
class Parity:
    """How near two logit arrays are.

    Attributes:
        num_positions: Positions compared.
        max_abs_dlogit: Largest difference of a logit.
        top1_agreement: Share of positions with the same most likely token.
        mean_kl: Mean Kullback-Leibler divergence from the reference's distribution, nats.
    """

    num_positions: int
    max_abs_dlogit: float
    top1_agreement: float
    mean_kl: float


@dataclass(frozen=True)
class Tolerance:
    """What a format may lose; a bound of None is not judged."""

    min_top1: float
    max_kl: float
    max_dlogit: float | None = None


TOLERANCES = {
    "F32": Tolerance(min_top1=0.995, max_kl=1e-5, max_dlogit=0.02),
    "F16": Tolerance(min_top1=0.98, max_kl=1e-3, max_dlogit=0.5),
    "Q8_0": Tolerance(min_top1=0.85, max_kl=0.05),
    "Q6_K": Tolerance(min_top1=0.85, max_kl=0.06),
    "Q5_K_M": Tolerance(min_top1=0.65, max_kl=0.3),
    "Q4_K_M": Tolerance(min_top1=0.65, max_kl=0.3),
    "Q4_0": Tolerance(min_top1=0.4, max_kl=1.2),
}
"""By quantisation. SmolLM2-135M, dense and 30 % pruned by activations: largest logit difference at F32 2e-4, F16 0.2;
KL at F16 3e-5, Q8_0 0.005 to 0.015, Q5_K_M and Q4_K_M 0.07 to 0.2, Q4_0 0.3 to 0.7. One layer's q rows in a wrong
order: KL 0.16 to 0.24, so formats below Q8_0 can hide such a fault and `prove_structure` is the judge of it."""


def llama_logits(
    path: Path, token_ids: Sequence[int], *, num_threads: int = 1, exact_attention: bool = True
) -> np.ndarray:
    """Returns the logits llama.cpp gives after each token of one sequence.

    Args:
        path: GGUF file.
        token_ids: The sequence, [T].
        num_threads: Threads.
        exact_attention: Attention in float32, so that only the weights' format is judged.

    Returns:
        float32 [T, V].
    """
    with open_session(
        path, num_context=len(token_ids), num_threads=num_threads, exact_attention=exact_attention
    ) as session:
        logits = np.empty((len(token_ids), session.num_vocab), dtype=np.float32)
        for start in range(0, len(token_ids), BATCH_TOKENS):
            chunk = token_ids[start : start + BATCH_TOKENS]
            positions = range(start, start + len(chunk))
            session.decode(chunk, positions=positions, sequences=[0] * len(chunk), wanted=[True] * len(chunk))
            for index, position in enumerate(positions):
                logits[position] = session.logits(index)
    return logits


def compare_logits(reference: np.ndarray, found: np.ndarray) -> Parity:
    """Returns how near two logit arrays are.

    Args:
        reference: float [T, V], what the model says.
        found: float [T, V], what the file says.

    Raises:
        ValueError: The shapes differ or are empty.
    """
    if reference.shape != found.shape or reference.ndim != 2 or reference.size == 0:
        raise ValueError(f"expected two arrays of one shape [T, V], found {reference.shape} and {found.shape}")
    differences, divergences, agreements = [], [], []
    for wanted, got in zip(reference, found, strict=True):
        differences.append(np.abs(wanted - got).max())
        agreements.append(wanted.argmax() == got.argmax())
        wanted_log, got_log = _log_softmax(wanted), _log_softmax(got)
        divergences.append((np.exp(wanted_log) * (wanted_log - got_log)).sum())
    return Parity(
        num_positions=len(reference),
        max_abs_dlogit=float(np.max(differences)),
        top1_agreement=float(np.mean(agreements)),
        mean_kl=float(np.mean(divergences)),
    )


def check_parity(parity: Parity, quantization: str) -> None:
    """Raises VerificationError where a parity is below what the format allows.

    Raises:
        ValueError: The quantisation is unknown.
        VerificationError: A bound is missed; NaN misses every bound.
    """
    if quantization not in TOLERANCES:
        raise ValueError(f"expected a quantisation of {', '.join(TOLERANCES)}, found {quantization!r}")
    tolerance = TOLERANCES[quantization]
    hint = "do not ship this file: take a finer format, or report a fault of the export if F32 fails too"
    if not parity.top1_agreement >= tolerance.min_top1:
        message = (
            f"expected top-1 agreement >= {tolerance.min_top1} at {quantization}, found {parity.top1_agreement:.4f}"
        )
        raise VerificationError(message, hint=hint)
    if not parity.mean_kl <= tolerance.max_kl:
        message = f"expected a mean KL <= {tolerance.max_kl} at {quantization}, found {parity.mean_kl:.3g}"
        raise VerificationError(message, hint=hint)
    if tolerance.max_dlogit is not None and not parity.max_abs_dlogit <= tolerance.max_dlogit:
        message = f"expected logits within {tolerance.max_dlogit} at {quantization}, found {parity.max_abs_dlogit:.3g}"
        raise VerificationError(message, hint=hint)


def prove_structure(
    model_dir: Path,
    reference: np.ndarray,
    token_ids: Sequence[int],
    *,
    tokenizer_gguf: Path | None = None,
    num_threads: int = 1,
) -> Parity:
    """Returns the parity of a model directory exported as F32 into a temporary folder and removed again.

    At F32 nothing is rounded, so a fault of the export stands out that a coarse format's own loss would hide, and a
    fragile model that quantises badly is told apart from a wrong file.

    Args:
        model_dir: The model directory.
        reference: What the model says after each token, float [T, V].
        token_ids: The tokens, [T].
        tokenizer_gguf: As for `write_gguf`.
        num_threads: Threads.

    Raises:
        VerificationError: llama.cpp computes something else than the model does.
    """
    with tempfile.TemporaryDirectory(prefix=".fedspine-parity-", dir=model_dir.parent) as folder:
        file = write_gguf(
            model_dir, Path(folder) / "model.gguf", quantization="F32", name="parity", tokenizer_gguf=tokenizer_gguf
        )
        parity = compare_logits(reference, llama_logits(file.path, token_ids, num_threads=num_threads))
    check_parity(parity, "F32")
    return parity


def classify(
    path: Path, prompts: Sequence[Sequence[int]], choices: Sequence[int], *, num_threads: int = 1
) -> list[int]:
    """Returns the class llama.cpp gives each prompt: the choice whose token is the most likely next one.

    Prompts are decoded several at a time, each a sequence of its own.

    Args:
        path: GGUF file.
        prompts: Token ids of each prompt.
        choices: Token id of each class.
        num_threads: Threads.

    Returns:
        Index into `choices`, one a prompt.

    Raises:
        ValueError: A prompt or `choices` is empty.
    """
    if not choices or not all(prompts):
        raise ValueError("expected choices and prompts of at least one token, found an empty one")
    longest = max((len(prompt) for prompt in prompts), default=0)
    num_context = max(BATCH_TOKENS, longest)
    answers: list[int] = []
    with open_session(path, num_context=num_context, num_sequences=MAX_SEQUENCES, num_threads=num_threads) as session:
        for batch in _batches(prompts, num_context):
            answers.extend(_classify_batch(session, batch, choices))
    return answers


def _classify_batch(session: LlamaSession, prompts: Sequence[Sequence[int]], choices: Sequence[int]) -> list[int]:
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[int] = []
    last_indices: list[int] = []
    for sequence, prompt in enumerate(prompts):
        tokens.extend(prompt)
        positions.extend(range(len(prompt)))
        sequences.extend([sequence] * len(prompt))
        last_indices.append(len(tokens) - 1)
    lasts = set(last_indices)
    session.clear()
    session.decode(
        tokens, positions=positions, sequences=sequences, wanted=[index in lasts for index in range(len(tokens))]
    )
    return [int(np.argmax(session.logits(index)[list(choices)])) for index in last_indices]


def _batches(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    used = 0
    for prompt in prompts:
        if batch and (used + len(prompt) > max_tokens or len(batch) == MAX_SEQUENCES):
            yield batch
            batch, used = [], 0
        batch.append(prompt)
        used += len(prompt)
    if batch:
        yield batch


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return result
