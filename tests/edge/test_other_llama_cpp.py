"""Another build of llama.cpp than ours reads the same files and says the same.

It runs in a process of its own: two builds in one would share their symbols.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_models import DENSE, PER_LAYER, UNIFORM, VOCAB_SIZE, save_decoder, some_tokens
from pruned_models import SCALING, kept_factors, mixed_keep, save_world

from fedspine_edge.export.adapter_gguf import write_gguf_adapter
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.verify import llama_logits

pytest.importorskip("llama_cpp", reason="needs the extra fedspine-edge[llama]")

LENGTHS = (3, 17, 40)

PROGRAM = """
import json, sys
import xllamacpp

path, adapter, prompts, width = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 256, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    params.lora_adapters = [lora]
server = xllamacpp.Server(params)
answers = []
for prompt in prompts:
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": width, "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    answers.append([[entry["id"], entry["logprob"]] for entry in found])
with open(sys.argv[2], "w") as file:
    json.dump(answers, file)
"""


def prompts_for(folder: Path, path: Path, *, adapter: Path | None = None) -> list[list[int]]:
    """Returns a prompt of each length that is answered with letters: the server hides answers that print nothing."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    letters = {index for token, index in vocabulary.items() if token.isascii() and token.isalpha()}
    prompts = []
    for length in LENGTHS:
        tries = (some_tokens(length, seed=seed) for seed in range(100))
        prompts.append(
            next(prompt for prompt in tries if int(llama_logits(path, prompt, adapter=adapter)[-1].argmax()) in letters)
        )
    return prompts


def other_logprobs(path: Path, prompts: list[list[int]], *, adapter: Path | None = None) -> np.ndarray:
    """Returns what the other llama.cpp gives each token after each prompt, log-probabilities [prompts, V]."""
    request = json.dumps([str(path), str(adapter) if adapter else None, prompts, VOCAB_SIZE])
    output = path.with_suffix(".json")
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, request, str(output)], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr
    result = np.full((len(prompts), VOCAB_SIZE), np.nan)
    for row, answer in enumerate(json.loads(output.read_text())):
        for token, value in answer:
            result[row, token] = value
    return result


def our_logprobs(path: Path, prompts: list[list[int]], *, adapter: Path | None = None) -> np.ndarray:
    rows = [llama_logits(path, prompt, adapter=adapter)[-1].astype(np.float64) for prompt in prompts]
    return np.stack([row - np.log(np.exp(row - row.max()).sum()) - row.max() for row in rows])


@pytest.mark.parametrize(
    ("family", "widths", "architecture", "quantization", "tolerance"),
    [
        ("llama", PER_LAYER, "deci", "F32", 1e-3),
        ("qwen2", PER_LAYER, "deci", "F32", 1e-3),
        ("mistral", UNIFORM, "llama", "F32", 1e-3),
        ("llama", DENSE, "llama", "F16", 0.1),
    ],
)
def test_another_build_says_what_ours_says(
    tmp_path: Path, family: str, widths: Any, architecture: str, quantization: str, tolerance: float
) -> None:
    folder = save_decoder(tmp_path / "model", family, widths, biased=widths is not DENSE)
    file = write_gguf(folder, tmp_path / "out.gguf", quantization=quantization, name="Tiny")
    assert file.format == architecture
    prompts = prompts_for(folder, file.path)
    found, expected = other_logprobs(file.path, prompts), our_logprobs(file.path, prompts)
    assert np.isfinite(found).sum() == found.size
    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_another_build_takes_our_adapter(tmp_path: Path) -> None:
    source = save_decoder(tmp_path / "source", "llama")
    base = save_world(tmp_path / "base", source, mixed_keep, tuned=False)
    path = write_gguf(base, tmp_path / "base.gguf", quantization="F32", name="Tiny").path
    adapter = tmp_path / "adapter.gguf"
    factors = kept_factors(source, mixed_keep)
    write_gguf_adapter(adapter, base, path, factors, scaling=SCALING, number_type="F32")
    prompts = prompts_for(base, path, adapter=adapter)
    found = other_logprobs(path, prompts, adapter=adapter)
    np.testing.assert_allclose(found, our_logprobs(path, prompts, adapter=adapter), atol=1e-3)
    assert np.abs(found - our_logprobs(path, prompts)).max() > 0.1
