"""LoRA factors on a pruned base -> a GGUF adapter that llama.cpp loads on the base's file.

In: factors at the kept rows and columns, and the base as directory and as GGUF file. Out: one small file. Ranks may
differ: alpha / rank is folded into B and the file's one alpha is 0, which llama.cpp takes as a factor of 1.

Source: LoRA (arXiv 2106.09685); GGUF specification (ggml-org/ggml, docs/gguf.md), adapter keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.export.adapter_check import BASE_KEY, WEIGHTS_KEY, check_gguf_adapter, read_facts
from fedspine_edge.export.adapter_factors import check_factors
from fedspine_edge.export.gguf import channel_axis, fill_channels, gguf_name, permute_rows, refuse_existing, replacing
from fedspine_edge.export.gguf_metadata import weights_sha256
from fedspine_edge.export.model_directory import ModelDirectory, read_model_directory
from fedspine_edge.shrink import Factors

NUMBER_TYPES = {"F32": np.float32, "F16": np.float16}


def write_gguf_adapter(
    output: Path,
    base_dir: Path,
    base_gguf: Path,
    factors: Factors,
    *,
    scaling: float,
    number_type: str = "F16",
    overwrite: bool = False,
) -> None:
    """Writes LoRA factors as a GGUF adapter, whole or not at all.

    Args:
        output: File to write.
        base_dir: Directory of the pruned, unmerged base.
        base_gguf: The base's file, of any quantisation, written by `write_gguf`.
        factors: Matrix name -> (lora_a [R, I kept], lora_b [O kept, R]).
        scaling: alpha / rank.
        number_type: `F32` or `F16`.
        overwrite: Whether a file of that name is replaced.

    Raises:
        ValueError: The number type is unknown.
        UsageError: There is a file of that name, and it is not to be replaced.
        CheckpointError: A base is damaged or the disk is full; nothing half-written stays.
        IncompatibleError: The factors do not fit the base, or the file is not that base's.
    """
    if number_type not in NUMBER_TYPES:
        raise ValueError(f"expected a number type of {', '.join(NUMBER_TYPES)}, found {number_type!r}")
    refuse_existing(output, overwrite=overwrite)
    model = read_model_directory(base_dir)
    check_factors(factors, model.shapes)
    sha256 = weights_sha256(base_dir)
    facts = read_facts(base_gguf, ("general.architecture", "general.name", WEIGHTS_KEY))
    if facts[WEIGHTS_KEY] != sha256:
        raise IncompatibleError(
            f"expected a file of base {sha256[:12]}, found {base_gguf.name} of {str(facts[WEIGHTS_KEY])[:12]}",
            hint="export the base's directory as GGUF first",
        )
    writer = GGUFWriter(None, facts["general.architecture"])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_name(f"{facts['general.name']} adapter")
    writer.add_string(BASE_KEY, sha256)
    for name, tensor in _tensors(model, factors, scaling, number_type):
        writer.add_tensor(name, tensor)
    with replacing(output) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        check_gguf_adapter(partial, base_gguf)


def _tensors(
    model: ModelDirectory, factors: Factors, scaling: float, number_type: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each factor under its GGUF name; rows of B follow the rows of q and k into neighbouring pairs."""
    for name, (lora_a, lora_b) in factors.items():
        scaled = scaling * lora_b.detach().float().numpy()
        if name.endswith((".q_proj", ".k_proj")):
            layer = model.layers[int(name.split(".")[2])]
            scaled = permute_rows(scaled, layer.num_heads if name.endswith(".q_proj") else layer.num_key_value_heads)
        plain = lora_a.detach().float().numpy()
        axis = channel_axis(f"{name}.weight")
        if axis == 0:
            scaled = fill_channels(model, name, scaled, axis=0)
        elif axis == 1:
            plain = fill_channels(model, name, plain, axis=1)
        matrix = gguf_name(f"{name}.weight")
        for letter, factor in (("a", plain), ("b", scaled)):
            if number_type == "F16" and np.abs(factor).max() > np.finfo(np.float16).max:
                raise IncompatibleError(
                    f"expected factors within float16, found larger ones for {name}", hint="write the adapter as F32"
                )
            yield f"{matrix}.lora_{letter}", np.ascontiguousarray(factor, dtype=NUMBER_TYPES[number_type])
