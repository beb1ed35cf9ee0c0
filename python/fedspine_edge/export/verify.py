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
        reference_perplexity: Of each next token of the text, by the reference; None where the text is not known.
        perplexity: The same by what is judged.
    """

    num_positions: int
    max_abs_dlogit: float
    top1_agreement: float
    mean_kl: float
    reference_perplexity: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Tolerance:
    """What a format may lose; a bound of None is not judged."""

    min_top1: float
    max_kl: float
    max_dlogit: float | None = None


TOLERANCES = {
    "F32": Tolerance(min_top1=0.995, max_kl=1e-5, max_dlogit=0.02),
    "F16": Tolerance(min_top1=0.99, max_kl=1e-4, max_dlogit=0.5),
    "BF16": Tolerance(min_top1=0.97, max_kl=1e-2),
    "Q8_0": Tolerance(min_top1=0.85, max_kl=0.05),
    "Q6_K": Tolerance(min_top1=0.85, max_kl=0.06),
    "Q5_K_M": Tolerance(min_top1=0.65, max_kl=0.3),
    "Q4_K_M": Tolerance(min_top1=0.65, max_kl=0.3),
    "Q4_0": Tolerance(min_top1=0.4, max_kl=1.2),
}
"""By quantisation; beyond it a file is not shipped. SmolLM2-135M, dense and pruned: largest logit difference at F32
2e-4, F16 0.03 to 0.3 (llama.cpp rounds activations to the matrices' type; the largest is at the first two tokens, whose
activations are massive, and 99 % of the positions stay below 0.05), BF16 0.6; KL at F16 2e-6, BF16 8e-5, Q8_0 0.005 to
0.015, Q5_K_M and Q4_K_M 0.07 to 0.2, Q4_0 0.3 to 0.7. One layer's q rows in a wrong order: KL 0.16 to 0.24, so formats
below Q8_0 can hide such a fault and `prove_structure` is the judge of it."""


def llama_logits(
    path: Path,
    token_ids: Sequence[int],
    *,
    num_threads: int = 1,
    exact_attention: bool = True,
    adapter: Path | None = None,
) -> np.ndarray:
    """Returns the logits llama.cpp gives after each token of one sequence.

    Args:
        path: GGUF file.
        token_ids: The sequence, [T].
        num_threads: Threads.
        exact_attention: Attention in float32, so that only the weights' format is judged.
        adapter: GGUF LoRA adapter to add to the model.

    Returns:
        float32 [T, V].
    """
    with open_session(
        path, num_context=len(token_ids), num_threads=num_threads, exact_attention=exact_attention, adapter=adapter
    ) as session:
        logits = np.empty((len(token_ids), session.num_vocab), dtype=np.float32)
        for start in range(0, len(token_ids), BATCH_TOKENS):
            chunk = token_ids[start : start + BATCH_TOKENS]
            positions = range(start, start + len(chunk))
            session.decode(chunk, positions=positions, sequences=[0] * len(chunk), wanted=[True] * len(chunk))
            for index, position in enumerate(positions):
                logits[position] = session.logits(index)
    return logits


def compare_logits(reference: np.ndarray, found: np.ndarray, *, token_ids: Sequence[int] | None = None) -> Parity:
    """Returns how near two logit arrays are.

    Args:
        reference: float [T, V], what the model says.
        found: float [T, V], what the file says.
        token_ids: The text, [T], for its perplexity by both; None judges none.

    Raises:
        ValueError: The shapes differ or are empty.
    """
    if reference.shape != found.shape or reference.ndim != 2 or reference.size == 0:
        raise ValueError(f"expected two arrays of one shape [T, V], found {reference.shape} and {found.shape}")
    if token_ids is not None and len(token_ids) != len(reference):
        raise ValueError(f"expected {len(reference)} tokens, one a position, found {len(token_ids)}")
    differences, divergences, agreements, surprises = [], [], [], []
    for position, (wanted, got) in enumerate(zip(reference, found, strict=True)):
        differences.append(np.abs(wanted - got).max())
        agreements.append(wanted.argmax() == got.argmax())
        wanted_log, got_log = _log_softmax(wanted), _log_softmax(got)
        divergences.append((np.exp(wanted_log) * (wanted_log - got_log)).sum())
        if token_ids is not None and position + 1 < len(token_ids):
            following = token_ids[position + 1]
            surprises.append((-wanted_log[following], -got_log[following]))
    perplexities = np.exp(np.mean(surprises, axis=0)) if surprises else (None, None)
    return Parity(
        num_positions=len(reference),
        max_abs_dlogit=float(np.max(differences)),
        top1_agreement=float(np.mean(agreements)),
        mean_kl=float(np.mean(divergences)),
        reference_perplexity=None if perplexities[0] is None else float(perplexities[0]),
        perplexity=None if perplexities[1] is None else float(perplexities[1]),
    )


def check_parity(parity: Parity, quantization: str) -> None:
    """Raises VerificationError where a parity is below what the format allows.

    Raises:
        ValueError: The quantisation is unknown.
        VerificationError: A bound is missed; NaN misses every bound.
    """
    missed = missed_bound(parity, tolerance_of(quantization), quantization)
    if missed:
        hint = "do not ship this file: take a finer format, or report a fault of the export if F32 fails too"
        raise VerificationError(missed, hint=hint)


def parity_line(parity: Parity, name: str, tolerance: Tolerance) -> str:
    """Returns a parity in one line, each figure beside what the format allows."""
    bound = "" if tolerance.max_dlogit is None else f" (<= {tolerance.max_dlogit:g})"
    line = (
        f"{name}: {parity.num_positions} positions, max |dlogit| {parity.max_abs_dlogit:.2g}{bound}, "
        f"top-1 {parity.top1_agreement:.4f} (>= {tolerance.min_top1:g}), "
        f"KL {parity.mean_kl:.2g} (<= {tolerance.max_kl:g})"
    )
    if parity.perplexity is None:
        return line
    return f"{line}, perplexity {parity.perplexity:.4g} against {parity.reference_perplexity:.4g}"


def tolerance_of(quantization: str) -> Tolerance:
    """Returns what a format may lose; raises ValueError for an unknown one."""
    if quantization not in TOLERANCES:
        raise ValueError(f"expected a quantisation of {', '.join(TOLERANCES)}, found {quantization!r}")
    return TOLERANCES[quantization]


def missed_bound(parity: Parity, tolerance: Tolerance, name: str) -> str | None:
    """Returns the first bound that is missed; NaN misses every bound."""
    if not parity.top1_agreement >= tolerance.min_top1:
        return f"expected top-1 agreement >= {tolerance.min_top1} at {name}, found {parity.top1_agreement:.4f}"
    if not parity.mean_kl <= tolerance.max_kl:
        return f"expected a mean KL <= {tolerance.max_kl} at {name}, found {parity.mean_kl:.3g}"
    if tolerance.max_dlogit is not None and not parity.max_abs_dlogit <= tolerance.max_dlogit:
        return f"expected logits within {tolerance.max_dlogit} at {name}, found {parity.max_abs_dlogit:.3g}"
    return None


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
