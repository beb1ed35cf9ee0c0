"""LoRA factors on a pruned base -> a directory that `peft.PeftModel.from_pretrained` loads on that base.

In: factors at the kept rows and columns, and the base's directory. Out: `adapter_config.json`,
`adapter_model.safetensors`, and `fedspine_adapter.json`, which names the base with its hash. Ranks may differ:
`rank_pattern` and `alpha_pattern` name the matrices of other ranks than the commonest.

Source: LoRA (arXiv 2106.09685); peft's adapter format, whose patterns are regular expressions anchored at the end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from fedspine_edge.atomic import write_directory
from fedspine_edge.base_model import BaseModel, base_facts, open_base
from fedspine_edge.errors import CheckpointError, IncompatibleError
from fedspine_edge.export.adapter_factors import check_factors
from fedspine_edge.export.gguf import refuse_existing
from fedspine_edge.export.model_directory import read_json
from fedspine_edge.shrink import Factors

ADAPTER_FORMAT = 1
ADAPTER_FILE = "fedspine_adapter.json"


def write_peft_adapter(
    output: Path, base_dir: Path, factors: Factors, *, scaling: float, overwrite: bool = False
) -> None:
    """Writes LoRA factors as a PEFT adapter, whole or not at all.

    Args:
        output: Directory to write.
        base_dir: Directory of the pruned, unmerged base; a classifier's trained head is in there.
        factors: Matrix name -> (lora_a [R, I kept], lora_b [O kept, R]).
        scaling: alpha / rank.
        overwrite: Whether a directory of that name is replaced.

    Raises:
        UsageError: There is something of that name, and it is not to be replaced.
        CheckpointError: The base is damaged or the disk is full; nothing half-written stays.
        IncompatibleError: The factors do not fit the base.
    """
    refuse_existing(output, overwrite=overwrite)
    base = open_base(base_dir)
    check_factors(factors, _shapes(base))
    tensors = {}
    for name, (lora_a, lora_b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a.detach().float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.detach().float().contiguous()
    name = _base_name(base_dir)
    record = {"format": ADAPTER_FORMAT, "base": name, "base_sha256": base.sha256}

    def fill(partial: Path) -> None:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _config(base, name, factors, scaling)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (partial / ADAPTER_FILE).write_text(json.dumps(record) + "\n")

    write_directory(output, fill)


def check_peft_adapter(adapter: Path, base_dir: Path) -> None:
    """Checks that a PEFT adapter was written for a base.

    Raises:
        CheckpointError: The adapter or the base is missing or damaged.
        IncompatibleError: It is of another format, or names a base of another hash.
    """
    record = read_json(adapter / ADAPTER_FILE)
    if record.get("format") != ADAPTER_FORMAT:
        raise IncompatibleError(
            f"{adapter / ADAPTER_FILE} is format {record.get('format')}, this program reads {ADAPTER_FORMAT}",
            hint="use the fedspine version that wrote it",
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"expected adapter_model.safetensors in {adapter}, found none")
    found = open_base(base_dir).sha256
    if record.get("base_sha256") != found:
        raise IncompatibleError(
            f"expected the base {str(record.get('base_sha256'))[:12]} ({record.get('base')}), found {found[:12]}",
            hint="load the adapter on the directory of the model it was tuned on",
        )


def _config(base: BaseModel, name: str, factors: Factors, scaling: float) -> dict[str, Any]:
    ranks = {matrix: len(lora_a) for matrix, (lora_a, _) in factors.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(matrix): rank for matrix, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        # A classifier's head is the base's own: under SEQ_CLS peft would look for one in the adapter.
        "task_type": "CAUSAL_LM" if base.family.task == "decoder" else None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "bias": "none",
        "r": common,
        "lora_alpha": scaling * common,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": {matrix: scaling * rank for matrix, rank in others.items()},
        "target_modules": sorted(factors),
    }


def _shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(base.files.values())):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _base_name(base_dir: Path) -> str:
    record = base_dir / "fedspine_prune.json"
    facts = read_json(record).get("base", {}) if record.is_file() else base_facts(base_dir)
    return str(facts.get("name") or base_dir.name)
