"""The unpruned model on disk, read one matrix at a time.

Comes in: a directory with `config.json` and safetensors weights. Goes out: a model whose prunable linears are empty
shells, and a reader that slices them from the memory-mapped file. The base weights are never all in memory at once.

Source: safetensors format description; transformers' model directory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers import AutoTokenizer as Tokenizer

from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.fused import fuse
from fedspine_edge.protocol import Layout
from fedspine_edge.shrink import BaseReader
from fedspine_edge.sources import packaged_facts
from fedspine_edge.structure import Family, family_of, layout_of

TASK_HEAD_STD = 0.02


@dataclass(frozen=True)
class BaseModel:
    """An opened model directory.

    Attributes:
        path: The directory.
        config: Its transformers config.
        files: Tensor name -> the safetensors file that holds it.
        sha256: Hash over the weight files, in the order of their names.
    """

    path: Path
    config: Any
    files: dict[str, Path]
    sha256: str

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.config)

    def stored_name(self, name: str) -> str | None:
        """Returns the name a parameter has in the files (backbones are stored without their prefix), None if absent."""
        prefix = self.family.layers.split(".")[0] + "."
        for candidate in (name, name.removeprefix(prefix)):
            if candidate in self.files:
                return candidate
        return None

    def read(self, name: str) -> Tensor:
        """Returns a tensor as float32.

        Raises:
            CheckpointError: The files hold no such tensor.
        """
        stored = self.stored_name(name)
        if stored is None:
            raise CheckpointError(f"expected tensor {name} in {self.path}, found none of that name")
        with safe_open(self.files[stored], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor.float()

    def reader(self, dtype: str = "float32") -> BaseReader:
        """Returns what `shrink.install` reads from; the weights are then held in that dtype."""

        def bias(name: str) -> Tensor | None:
            return self.read(f"{name}.bias") if self.stored_name(f"{name}.bias") else None

        return BaseReader(weight=lambda name: self.read(f"{name}.weight"), bias=bias, dtype=dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer stored beside the weights."""
        return load_tokenizer(self.path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in a directory; raises CheckpointError when there is none."""
    try:
        return Tokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"expected a tokenizer in {path}: {error}") from error


def open_base(path: Path, *, sha256: str | None = None) -> BaseModel:
    """Opens a model directory and checks every weight file's header.

    Args:
        path: Directory with `config.json` and `*.safetensors`.
        sha256: Its hash when already known, to save reading the weights.

    Raises:
        CheckpointError: No config, no safetensors, or a truncated file.
        IncompatibleError: A family this program does not know.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"expected a model directory with config.json, found {path}")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise IncompatibleError(f"cannot read {path / 'config.json'}: {error}") from error
    family_of(config)
    weight_files = sorted(path.glob("*.safetensors"))
    if not weight_files:
        raise CheckpointError(
            f"expected *.safetensors in {path}, found none",
            hint="convert the weights with transformers: model.save_pretrained(dir); pickled files are never read",
        )
    files = {name: file for file in weight_files for name in _tensor_names(file)}
    return BaseModel(path, config, files, sha256 or _hash_files(weight_files))


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"expected a whole safetensors file, found {file} damaged: {error}", hint="copy the file again"
        ) from error


def _hash_files(files: list[Path]) -> str:
    """SHA-256 over the files' own digests, read a MiB at a time."""
    total = hashlib.sha256()
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
        total.update(digest.digest())
    return total.hexdigest()


def skeleton(base: BaseModel, *, num_labels: int | None) -> Any:
    """Returns the model with no weight loaded: its parameters are on the meta device.

    Args:
        base: The opened directory.
        num_labels: Classes of the task head; None for a decoder, which has none.
    """
    config, decoder = base.config, base.family.task == "decoder"
    if not decoder:
        config.num_labels = num_labels
    auto_class = AutoModelForCausalLM if decoder else AutoModelForSequenceClassification
    with init_empty_weights(include_buffers=False):
        return auto_class.from_config(config, dtype=torch.float32)


def skeleton_layout(base: BaseModel, model: nn.Module) -> Layout:
    """Returns the layout of a base model and the task head of its model, loaded or not."""
    heads = base.family.task_head
    task_head = tuple((name, tuple(p.shape)) for name, p in model.named_parameters() if name.startswith(heads))
    return layout_of(base.config, base_sha256=base.sha256, task_head=task_head)


def instantiate(base: BaseModel, *, num_labels: int | None, seed: int) -> tuple[nn.Module, Layout]:
    """Builds the model with everything loaded but the prunable linears, which stay empty shells.

    Args:
        base: The opened directory.
        num_labels: Classes of the task head; None for a decoder, which has none.
        seed: Seed of a task head that the files lack.

    Returns:
        The model, in evaluation mode and without dropout, and its layout.
    """
    model, config = skeleton(base, num_labels=num_labels), base.config
    bare = layout_of(config, base_sha256=base.sha256)
    shells = {f"{matrix.name}.{part}" for matrix in bare.matrices for part in ("weight", "bias")}
    _load_parameters(model, base, shells, seed)
    model.tie_weights()
    model.requires_grad_(False)
    fuse(model)
    layout = skeleton_layout(base, model)
    parameters = dict(model.named_parameters())
    for name, _ in layout.task_head:
        parameters[name].requires_grad_(True)
    return model.eval(), layout


def _load_parameters(model: Any, base: BaseModel, shells: set[str], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tied = {name for name, p in model.named_parameters(remove_duplicate=False)} - {
        name for name, p in model.named_parameters()
    }
    if getattr(base.config, "tie_word_embeddings", False):
        tied.add("lm_head.weight")
    for name, parameter in list(model.named_parameters()):
        if name in shells or name in tied:
            continue
        module_path, _, leaf = name.rpartition(".")
        value = base.read(name) if base.stored_name(name) else _fresh_parameter(base, name, parameter, generator)
        if value.shape != parameter.shape:
            raise CheckpointError(
                f"expected {name} of shape {list(parameter.shape)}, found {list(value.shape)} in {base.path}"
            )
        setattr(model.get_submodule(module_path), leaf, nn.Parameter(value, requires_grad=False))


def _fresh_parameter(base: BaseModel, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if not name.startswith(base.family.task_head or ("\0",)):
        raise CheckpointError(f"expected tensor {name} in {base.path}, found none of that name")
    if parameter.ndim < 2:
        return torch.zeros(parameter.shape)
    return torch.empty(parameter.shape).normal_(0.0, TASK_HEAD_STD, generator=generator)


def base_facts(path: Path) -> dict[str, Any]:
    """Returns what is known of a base's origin (`fedspine_base.json`, or the package it rides in); empty otherwise."""
    file = path / "fedspine_base.json"
    return dict(json.loads(file.read_text())) if file.is_file() else packaged_facts(path)
