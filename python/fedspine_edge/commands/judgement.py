"""The exported files of a run on trial: parity with PyTorch, accuracy and speed in the runtime that will serve them.

Comes in: merged model directories. Goes out: the part of `summary.json` that speaks of files. A decoder is judged as
GGUF in llama.cpp, an encoder as its own directory, loaded back.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspine_edge.base_model import base_facts
from fedspine_edge.batches import TokenSet
from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.commands.experiment import Scene
from fedspine_edge.errors import VerificationError
from fedspine_edge.export.gguf import GgufFile, write_gguf
from fedspine_edge.export.verify import Parity, check_parity, classify, compare_logits, llama_logits
from fedspine_edge.hardware import usable_cores
from fedspine_edge.live import LiveView
from fedspine_edge.profiling.latency import Speed, compare_speed, speed_ratios
from fedspine_edge.tuning import predict

PARITY_POSITIONS = 320
SPEED_REPETITIONS = 5
NUM_EXAMPLES = 6


@dataclass(frozen=True)
class ModelFiles:
    """A merged model directory.

    Attributes:
        path: The directory.
        dense: Whether it is the unpruned reference.
        sparsity: Share of its prunable weights that is gone.
    """

    path: Path
    dense: bool
    sparsity: float


@dataclass(frozen=True)
class _Judged:
    """An exported file with what llama.cpp makes of it; held-out rows are answered by the last format of a model."""

    file: GgufFile
    dense: bool
    parity: Parity
    predictions: np.ndarray | None


def judge_files(scene: Scene, models: Sequence[ModelFiles], live: LiveView) -> dict[str, Any]:
    """Returns `accuracy`, `accuracy_dense_tuned`, `exports`, `speed`, `speedup`, `examples` and `llama_cli`.

    Args:
        scene: The run.
        models: The pruned model's directory, and the unpruned reference's if there is one; the latter is removed once
            its file is written.
        live: Where progress is shown.

    Raises:
        VerificationError: A file does not say what its model says; the file is set aside as `.rejected`.
    """
    tokens = scene.setup.judged["held_out"]
    if scene.setup.choices is None:
        pruned = next(model for model in models if not model.dense)
        return _judge_encoder(scene, pruned, tokens)
    judged: list[_Judged] = []
    for model in models:
        formats = scene.experiment.quantizations
        judged += _judge_decoder(scene, model, formats[-1:] if model.dense else formats, tokens, live)
        if model.dense:
            shutil.rmtree(model.path)
    best = next(entry for entry in reversed(judged) if not entry.dense)
    rivals = [entry for entry in judged if entry.dense]
    speeds, speedup = _speeds([*rivals, best], live)
    return {
        "accuracy": _accuracy(best, tokens),
        "accuracy_dense_tuned": _accuracy(rivals[0], tokens) if rivals else None,
        "exports": [_export_record(entry, tokens) for entry in judged],
        "speed": speeds,
        "speedup": speedup,
        "examples": _examples(scene, best.predictions),
        "llama_cli": _command_line(scene, best.file.path),
    }


def _judge_encoder(scene: Scene, pruned: ModelFiles, tokens: TokenSet) -> dict[str, Any]:
    predictions = predict(load_pruned(pruned.path), tokens, choices=None)
    return {
        "accuracy": float((predictions == tokens.labels).mean()),
        "exports": [],
        "speed": [],
        "speedup": None,
        "examples": _examples(scene, predictions),
        "llama_cli": None,
    }


def _judge_decoder(
    scene: Scene, model: ModelFiles, formats: Sequence[str], tokens: TokenSet, live: LiveView
) -> list[_Judged]:
    text = _parity_text(tokens)
    reference = _torch_logits(model.path, text)
    facts = base_facts(scene.base.path)
    name = f"{facts.get('name', scene.base.path.name)}-" + (
        "tuned" if model.dense else f"pruned{100 * scene.settings.target_sparsity:.0f}"
    )
    assert scene.setup.choices is not None
    judged = []
    for quantization in formats:
        live.handle(
            {"kind": "phase", "text": f"exporting and checking {name} {quantization}", "total": None, "done": 0}
        )
        file = write_gguf(
            model.path,
            model.path.parent / f"{name}-{quantization}.gguf",
            quantization=quantization,
            name=name,
            tokenizer_gguf=Path(facts["tokenizer_gguf"]) if "tokenizer_gguf" in facts else None,
            overwrite=True,
        )
        parity = compare_logits(reference, llama_logits(file.path, text, num_threads=usable_cores()))
        _reject_unless_equal(file, parity)
        predictions = None
        if quantization == formats[-1]:
            classes = classify(file.path, tokens.prompts(), scene.setup.choices, num_threads=usable_cores())
            predictions = np.asarray(classes)
        judged.append(_Judged(file, model.dense, parity, predictions))
    return judged


def _parity_text(tokens: TokenSet) -> list[int]:
    """Held-out prompts and answers, end to end."""
    ids = np.concatenate(tokens.rows)
    return [int(token) for token in np.resize(ids, PARITY_POSITIONS)]


@torch.no_grad()
def _torch_logits(path: Path, token_ids: list[int]) -> np.ndarray:
    logits: np.ndarray = load_pruned(path)(torch.tensor([token_ids])).logits[0].numpy()
    return logits


def _reject_unless_equal(file: GgufFile, parity: Parity) -> None:
    try:
        check_parity(parity, file.quantization)
    except VerificationError:
        file.path.replace(file.path.with_suffix(".gguf.rejected"))
        raise


def _accuracy(entry: _Judged, tokens: TokenSet) -> float | None:
    return None if entry.predictions is None else float((entry.predictions == tokens.labels).mean())


def _export_record(entry: _Judged, tokens: TokenSet) -> dict[str, Any]:
    return {
        "path": str(entry.file.path),
        "format": "gguf",
        "architecture": entry.file.format,
        "quant": entry.file.quantization,
        "size_bytes": entry.file.size_bytes,
        "max_abs_dlogit": entry.parity.max_abs_dlogit,
        "top1_agreement": entry.parity.top1_agreement,
        "mean_kl": entry.parity.mean_kl,
        "num_positions": entry.parity.num_positions,
        "accuracy": _accuracy(entry, tokens),
        "dense": entry.dense,
    }


def _speeds(entries: Sequence[_Judged], live: LiveView) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Interleaved speeds of the files, and the last one's advantage over the first."""
    live.handle({"kind": "phase", "text": "measuring speed in llama.cpp, in turn", "total": None, "done": 0})
    paths = [entry.file.path for entry in entries]
    speeds = compare_speed(paths, repetitions=SPEED_REPETITIONS, num_threads=usable_cores())
    records = [_speed_record(speed, entry) for speed, entry in zip(speeds, entries, strict=True)]
    if len(entries) == 1:
        return records, None
    ratio = speed_ratios(speeds)[-1]
    return records, {
        "prompt": ratio.prompt.median,
        "generation": ratio.generate.median,
        "prompt_spread": [ratio.prompt.low, ratio.prompt.high],
        "generation_spread": [ratio.generate.low, ratio.generate.high],
    }


def _speed_record(speed: Speed, entry: _Judged) -> dict[str, Any]:
    return {
        "path": str(entry.file.path),
        "dense": entry.dense,
        "quant": entry.file.quantization,
        "size_bytes": speed.size_bytes,
        "prompt_tokens_per_second": _median_and_range(speed.prompt_tokens_per_second),
        "generation_tokens_per_second": _median_and_range(speed.generate_tokens_per_second),
        "ttft_seconds": float(np.median(speed.ttft_seconds)),
        "peak_memory_bytes": speed.peak_memory_bytes,
    }


def _median_and_range(samples: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(samples)), "min": min(samples), "max": max(samples)}


def _examples(scene: Scene, predictions: np.ndarray | None) -> list[dict[str, str]]:
    if predictions is None:
        return []
    shown = scene.split.held_out[:NUM_EXAMPLES]
    return [
        {"prompt": example.text, "expected": example.label, "answer": scene.encoding.classes[int(prediction)]}
        for example, prediction in zip(shown, predictions, strict=False)
    ]


def _command_line(scene: Scene, path: Path) -> str:
    assert scene.encoding.prompt is not None
    prompt = scene.encoding.prompt.replace("{text}", scene.split.held_out[0].text)
    escaped = (
        prompt.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`")
    )
    return f'llama-cli -m {path} -no-cnv --temp 0 -n 4 -p "{escaped}"'
