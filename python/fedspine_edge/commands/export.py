"""`fedspine export`: a run's pruned model, or any model directory, in the form another runtime loads.

Comes in: a run or a model directory, a format. Goes out: files that were checked against the model before they got
their name. A file that fails is kept aside as `.rejected` with the reason beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedspine_edge.base_model import base_facts
from fedspine_edge.checkpoint import PRUNE_FILE, read_prune_file
from fedspine_edge.commands.loaders import loads_in, try_loaders
from fedspine_edge.commands.parity import DEFAULT_POSITIONS, Verdict, judge, logits_of, require, text_for
from fedspine_edge.commands.targets import Target, is_decoder, model_target
from fedspine_edge.errors import IncompatibleError, UsageError
from fedspine_edge.export.checks import check_directory
from fedspine_edge.export.gguf import FILE_TYPES, refuse_existing, write_gguf
from fedspine_edge.export.onnx import PRECISIONS, write_onnx

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A checked export."""

    path: Path
    size_bytes: int
    verdict: Verdict | None
    loads_in: str
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Returns what `--json` prints."""
        parity = self.verdict.parity if self.verdict else None
        return {
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "format": self.verdict.format if self.verdict else "directory",
            "max_abs_dlogit": parity.max_abs_dlogit if parity else 0.0,
            "top1_agreement": parity.top1_agreement if parity else 1.0,
            "mean_kl": parity.mean_kl if parity else 0.0,
            "perplexity": parity.perplexity if parity else None,
            "num_positions": parity.num_positions if parity else DEFAULT_POSITIONS,
            "loads_in": self.loads_in,
            "note": self.note or None,
        }

    def lines(self) -> str:
        """Returns what a person reads."""
        checked = self.verdict.line() if self.verdict else "transformers says exactly what our model says"
        head = f"{self.path}  {self.size_bytes / 2**20:.1f} MiB" + (f"\n  note       {self.note}" if self.note else "")
        return f"{head}\n  checked    {checked}\n  loads in   {self.loads_in}"


def export_gguf(
    source: str, quantizations: Sequence[str], *, out: Path | None, data: str, force: bool, announce: Announce
) -> list[Exported]:
    """Writes GGUF files, each checked in llama.cpp.

    Args:
        source: A run or a model directory.
        quantizations: Formats, keys of `FILE_TYPES`.
        out: Folder for the files; beside the model when None.
        data: Real text for the check.
        force: Whether files of those names are replaced.
        announce: Told what is going on.

    Raises:
        UsageError: An unknown format, or a file that exists.
        VerificationError: A file does not say what its model says.
    """
    target = model_target(source)
    for quantization in quantizations:
        if quantization not in FILE_TYPES:
            raise UsageError(f"expected a format of {', '.join(FILE_TYPES)}, found {quantization!r}")
    folder = out or target.path.parent
    names = [folder / f"{_file_stem(target)}-{quantization}.gguf" for quantization in quantizations]
    for name in names:
        refuse_existing(name, overwrite=force)
    if not is_decoder(target.path):
        raise IncompatibleError(
            f"expected a decoder, found a classifier in {target.path}", hint="export it with: fedspine export onnx"
        )
    text = text_for([target], data, positions=DEFAULT_POSITIONS)
    announce("asking the model itself")
    reference = logits_of(target, text)
    facts = base_facts(target.path) or read_prune_file(target.path).get("base", {})
    tokenizer = Path(facts["tokenizer_gguf"]) if Path(facts.get("tokenizer_gguf", "")).is_file() else None
    exported = []
    for quantization, name in zip(quantizations, names, strict=True):
        announce(f"writing and checking {name.name}")
        notes: list[str] = []

        def write(path: Path, quantization: str = quantization, notes: list[str] = notes) -> Target:
            file = write_gguf(
                target.path,
                path,
                quantization=quantization,
                name=_file_stem(target),
                tokenizer_gguf=tokenizer,
                overwrite=True,
            )
            notes.append(file.note)
            return Target(path, "gguf", target.run_dir)

        checked = _checked(name, write, lambda candidate: judge(reference, candidate, text))
        exported.append(replace(checked, note=notes[0]))
    return exported


def export_onnx(
    source: str, precisions: Sequence[str], *, out: Path | None, data: str, force: bool, announce: Announce
) -> list[Exported]:
    """Writes ONNX models, each a directory, checked in onnxruntime; arguments and errors as `export_gguf`."""
    target = model_target(source)
    task = "decoder" if is_decoder(target.path) else "classifier"
    precisions = precisions or PRECISIONS[task][:1]
    folder = out or target.path.parent
    names = [folder / f"{_file_stem(target)}-onnx-{precision}" for precision in precisions]
    for name in names:
        refuse_existing(name, overwrite=force)
    text = text_for([target], data, positions=DEFAULT_POSITIONS)
    announce("asking the model itself")
    reference = logits_of(target, text)
    exported = []
    for precision, name in zip(precisions, names, strict=True):
        announce(f"writing and checking {name.name}")

        def write(path: Path, precision: str = precision) -> Target:
            write_onnx(target.path, path, precision=precision)
            if (target.path / PRUNE_FILE).is_file():
                shutil.copyfile(target.path / PRUNE_FILE, path / PRUNE_FILE)
            return Target(path, "onnx", target.run_dir)

        exported.append(_checked(name, write, lambda candidate: judge(reference, candidate, text)))
    return exported


def export_hf(source: str, *, out: Path | None, data: str, force: bool, announce: Announce) -> list[Exported]:
    """Copies a model directory, checked in transformers; arguments and errors as `export_gguf`."""
    target = model_target(source)
    name = out or target.path.parent / f"{_file_stem(target)}-hf"
    refuse_existing(name, overwrite=force)
    text = text_for([target], data, positions=DEFAULT_POSITIONS)
    announce("writing and checking the directory")

    def write(path: Path) -> Target:
        shutil.copytree(target.path, path)
        return Target(path, "directory", target.run_dir)

    def compare(candidate: Target) -> None:
        check_directory(candidate.path, text.token_ids or text.rows[0])

    return [_checked(name, write, compare)]


def _checked(name: Path, write: Callable[[Path], Target], check: Callable[[Target], Verdict | None]) -> Exported:
    """Writes under another name, checks, and only then gives it its own."""
    candidate = name.with_name(f".{name.stem}.checking{name.suffix}")
    _remove(candidate)
    name.parent.mkdir(parents=True, exist_ok=True)
    try:
        target = write(candidate)
        verdict = check(target)
        if verdict is not None and verdict.missed is not None:
            rejected = name.with_name(f"{name.name}.rejected")
            _remove(rejected)
            candidate.replace(rejected)
            rejected.with_name(f"{rejected.name}.txt").write_text(verdict.line() + f"\nmissed: {verdict.missed}\n")
            require(verdict, rejected.name)
        loaders = loads_in(try_loaders(target))
        _remove(name)
        candidate.replace(name)
    finally:
        _remove(candidate)
    return Exported(name, _size(name), verdict, loaders)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return int(np.sum([file.stat().st_size for file in files]))


def _file_stem(target: Target) -> str:
    record = read_prune_file(target.path)
    base = record.get("base") or base_facts(target.path)
    name = str(base.get("name") or target.name)
    sparsity = float(record.get("sparsity", 0.0)) if record else 0.0
    if not record:
        return name
    return f"{name}-pruned{100 * sparsity:.0f}" if sparsity > 0 else f"{name}-tuned"
