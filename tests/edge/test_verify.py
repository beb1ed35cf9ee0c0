"""Parity and accuracy through llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export_models import PER_LAYER, VOCAB_SIZE, load_decoder, save_decoder, some_tokens, torch_logits

from fedspine_edge.errors import CheckpointError, IncompatibleError, VerificationError
from fedspine_edge.export.checks import MIN_POSITIONS, check_gguf
from fedspine_edge.export.gguf import FILE_TYPES, write_gguf
from fedspine_edge.export.llama_session import open_session
from fedspine_edge.export.verify import (
    TOLERANCES,
    Parity,
    check_parity,
    classify,
    compare_logits,
    llama_logits,
    parity_line,
)

pytest.importorskip("llama_cpp", reason="needs the extra fedspine-edge[llama]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("verify") / "model", "llama", PER_LAYER, biased=True)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_gguf(folder, folder.parent / "out.gguf", quantization="F32", name="Tiny").path


def test_equal_logits_have_perfect_parity() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0]], dtype=np.float32)
    assert compare_logits(logits, logits) == Parity(2, 0.0, 1.0, 0.0)


def test_parity_by_hand_on_two_choices() -> None:
    # p = (1/2, 1/2) against q = (1/4, 3/4): KL = ln 2 / 2 - ln(3/2) / 2 ... = ln(2 / sqrt 3).
    reference = np.zeros((1, 2))
    found = np.array([[0.0, np.log(3.0)]])
    parity = compare_logits(reference, found)
    assert parity.mean_kl == pytest.approx(np.log(2 / np.sqrt(3)))
    assert parity.max_abs_dlogit == pytest.approx(np.log(3.0))
    assert parity.top1_agreement == 0.0


def test_a_constant_added_to_all_logits_changes_no_probability() -> None:
    reference = np.array([[1.0, -2.0, 700.0]], dtype=np.float32)
    assert compare_logits(reference, reference + 5).mean_kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("found", [np.zeros((2, 3)), np.zeros((2, 2, 1)), np.zeros(4)])
def test_arrays_of_different_shapes_are_not_compared(found: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        compare_logits(np.zeros((2, 2)), found)


@pytest.mark.parametrize(
    ("parity", "quantization", "message"),
    [
        (Parity(9, 0.0, 0.9, 0.0), "F16", r"expected top-1 agreement >= 0\.99 at F16, found 0\.9000"),
        (Parity(9, 0.0, 1.0, 0.1), "Q8_0", r"expected a mean KL <= 0\.05 at Q8_0, found 0\.1"),
        (Parity(9, 0.7, 1.0, 0.0), "F16", r"expected logits within 0\.5 at F16, found 0\.7"),
        (Parity(9, 0.0, 0.96, 0.0), "BF16", r"expected top-1 agreement >= 0\.97 at BF16, found 0\.9600"),
        (Parity(9, float("nan"), 1.0, 0.0), "F32", "expected logits within"),
        (Parity(9, 0.0, 1.0, float("nan")), "Q4_0", "expected a mean KL"),
    ],
)
def test_each_missed_bound_is_named(parity: Parity, quantization: str, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check_parity(parity, quantization)


def test_quantised_files_are_not_judged_by_single_logits() -> None:
    check_parity(Parity(9, 5.0, 0.95, 0.01), "Q8_0")


def test_an_unknown_format_has_no_tolerance() -> None:
    with pytest.raises(ValueError, match=r"expected a quantisation of F32, .*, found 'Q3'"):
        check_parity(Parity(1, 0.0, 1.0, 0.0), "Q3")


def test_perplexity_by_hand_of_both_sides() -> None:
    # After token 0 comes token 1: the reference gives it 3/4, the file 1/4. What follows token 1 is not known.
    reference, found = np.array([[0.0, np.log(3.0)], [9.0, 0.0]]), np.array([[np.log(3.0), 0.0], [0.0, 9.0]])
    parity = compare_logits(reference, found, token_ids=[0, 1])
    assert parity.reference_perplexity == pytest.approx(4 / 3)
    assert parity.perplexity == pytest.approx(4)
    with pytest.raises(ValueError, match="expected 2 tokens, one a position, found 3"):
        compare_logits(reference, found, token_ids=[0, 1, 0])


def test_one_token_has_no_perplexity() -> None:
    assert compare_logits(np.zeros((1, 2)), np.zeros((1, 2)), token_ids=[1]).perplexity is None


def test_a_parity_is_told_with_what_the_format_allows() -> None:
    assert parity_line(Parity(320, 0.0312, 0.99687, 6.5e-7, 41.02, 41.5), "F16", TOLERANCES["F16"]) == (
        "F16: 320 positions, max |dlogit| 0.031 (<= 0.5), top-1 0.9969 (>= 0.99), KL 6.5e-07 (<= 0.0001), "
        "perplexity 41.5 against 41.02"
    )
    assert parity_line(Parity(320, 2.0, 0.9, 0.01), "Q8_0", TOLERANCES["Q8_0"]) == (
        "Q8_0: 320 positions, max |dlogit| 2, top-1 0.9000 (>= 0.85), KL 0.01 (<= 0.05)"
    )


def test_every_format_that_is_written_has_a_tolerance() -> None:
    assert set(FILE_TYPES) == set(TOLERANCES)


def test_a_file_is_judged_on_enough_text(folder: Path, file: Path) -> None:
    tokens = some_tokens(MIN_POSITIONS)
    reference = torch_logits(folder, tokens)
    parity = check_gguf(file, reference, tokens, quantization="F32")
    assert parity.num_positions == MIN_POSITIONS
    assert parity.perplexity == pytest.approx(parity.reference_perplexity, rel=1e-4)
    with pytest.raises(ValueError, match="expected a text of 256 tokens or more, found 255"):
        check_gguf(file, reference[:-1], tokens[:-1], quantization="F32")
    with pytest.raises(VerificationError, match="at F32"):
        check_gguf(file, reference[::-1], tokens, quantization="F32")


def test_a_sequence_longer_than_a_batch_is_read_whole(folder: Path, file: Path) -> None:
    tokens = some_tokens(601)
    parity = compare_logits(torch_logits(folder, tokens), llama_logits(file, tokens))
    assert parity.num_positions == 601
    assert parity.top1_agreement == 1.0


def test_flash_attention_stays_near_exact_attention(file: Path) -> None:
    tokens = some_tokens(97)
    parity = compare_logits(llama_logits(file, tokens), llama_logits(file, tokens, exact_attention=False))
    assert 0.0 < parity.mean_kl < 1e-3


def test_prompts_classified_together_get_the_class_each_gets_alone(folder: Path, file: Path) -> None:
    # More than one batch by tokens (512) and by sequences (64).
    prompts = [some_tokens(1 + index % 7, seed=index) for index in range(97)]
    prompts += [some_tokens(199, seed=index) for index in range(4)]
    prompts += [some_tokens(530)]
    choices = [5, 9, 31, 77]
    model = load_decoder(folder)
    with torch.no_grad():
        expected = [int(model(torch.tensor([prompt])).logits[0, -1, choices].argmax()) for prompt in prompts]
    found = classify(file, prompts, choices)
    assert len(set(expected)) == len(choices)
    assert sum(a == b for a, b in zip(expected, found, strict=True)) >= len(prompts) - 1  # flash attention rounds


def test_no_prompts_give_no_classes(file: Path) -> None:
    assert classify(file, [], [1, 2]) == []


def test_empty_prompts_and_choices_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="at least one token, found an empty one"):
        classify(file, [[1], []], [1, 2])
    with pytest.raises(ValueError, match="at least one token, found an empty one"):
        classify(file, [[1]], [])


def test_a_token_outside_the_vocabulary_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=f"expected tokens below {VOCAB_SIZE}, found 1 to {VOCAB_SIZE}"):
        llama_logits(file, [1, VOCAB_SIZE])
    with open_session(file, num_context=32) as session, pytest.raises(ValueError, match="1 to 32 tokens, found 33"):
        session.decode([1] * 33, positions=range(33), sequences=[0] * 33, wanted=[True] * 33)


def test_files_llama_cpp_cannot_load_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a GGUF file at .*absent.gguf, found none"):
        llama_logits(tmp_path / "absent.gguf", [1])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(IncompatibleError, match=r"expected a file llama.cpp loads, found cut.gguf: .+"):
        llama_logits(cut, [1])
