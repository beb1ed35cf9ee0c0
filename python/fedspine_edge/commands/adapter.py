"""`fedspine export adapter`: what the fleet learned as a LoRA adapter, on the pruned base it belongs to.

Comes in: a finished run. Goes out: a folder with the pruned, unmerged base and the adapter for it, as a PEFT directory
or as GGUF files, checked against the merged model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedspine_edge.atomic import write_directory
from fedspine_edge.base_model import open_base
from fedspine_edge.checkpoint import read_prune_file, save_pruned
from fedspine_edge.commands.experiment import read_experiment
from fedspine_edge.commands.export import Announce
from fedspine_edge.commands.parity import DEFAULT_POSITIONS, Text, Verdict, logits_of, require, text_for
from fedspine_edge.commands.run_state import global_model
from fedspine_edge.commands.targets import model_target
from fedspine_edge.config import cache_directory, settings_from
from fedspine_edge.errors import IncompatibleError, UsageError
from fedspine_edge.export.adapter_gguf import write_gguf_adapter
from fedspine_edge.export.adapter_peft import check_peft_adapter, write_peft_adapter
from fedspine_edge.export.gguf import refuse_existing, write_gguf
from fedspine_edge.export.verify import TOLERANCES, compare_logits, llama_logits, missed_bound
from fedspine_edge.hardware import usable_cores
from fedspine_edge.hf.directory import MODELING_FILE
from fedspine_edge.sources import model_directory
from fedspine_edge.workbench import GlobalModel
from fedspine_server import store
from fedspine_server.settings import RunSettings

KINDS = ("peft", "gguf")


def export_adapter(source: str, kind: str, *, out: Path | None, data: str, force: bool, announce: Announce) -> Path:
    """Writes a run's adapter and its base.

    Args:
        source: A finished run.
        kind: `peft` (base/ and adapter/) or `gguf` (base-F16.gguf and adapter-F16.gguf beside base/).
        out: The folder; `models/adapter-KIND` of the run when None.
        data: Real text for the check.
        force: Whether a folder of that name is replaced.
        announce: Told what is going on.

    Returns:
        The folder.

    Raises:
        UsageError: An unknown kind, not a run, or the folder exists.
        VerificationError: Base and adapter together do not say what the merged model says.
    """
    if kind not in KINDS:
        raise UsageError(f"expected an adapter as {' or '.join(KINDS)}, found {kind!r}")
    merged = model_target(source)
    if merged.run_dir is None:
        raise UsageError(
            f"expected a run, found the model {source!r}",
            hint="a merged model has no adapter: give the run's directory",
        )
    folder = out or merged.run_dir / "models" / f"adapter-{kind}"
    refuse_existing(folder, overwrite=force)
    text = text_for([merged], data, positions=DEFAULT_POSITIONS)
    reference = logits_of(merged, text)

    def fill(partial: Path) -> None:
        announce("writing the pruned base and its adapter")
        factors, scaling = _write_base(merged.run_dir, partial / "base")  # type: ignore[arg-type]
        if kind == "peft":
            write_peft_adapter(partial / "adapter", partial / "base", factors, scaling=scaling)
            check_peft_adapter(partial / "adapter", partial / "base")
            announce("checking them in peft")
            found = _peft_logits(partial, text)
        else:
            if not text.token_ids:
                raise IncompatibleError("expected a decoder, found a classifier", hint="take --kind peft")
            base_gguf = partial / "base-F16.gguf"
            facts = read_prune_file(partial / "base").get("base", {})
            source_gguf = Path(facts.get("tokenizer_gguf", ""))
            tokenizer = source_gguf if source_gguf.is_file() else None
            write_gguf(partial / "base", base_gguf, quantization="F16", name="base", tokenizer_gguf=tokenizer)
            write_gguf_adapter(partial / "adapter-F16.gguf", partial / "base", base_gguf, factors, scaling=scaling)
            announce("checking them in llama.cpp")
            found = llama_logits(
                base_gguf, text.token_ids, adapter=partial / "adapter-F16.gguf", num_threads=usable_cores()
            )
        _require_near(reference, found, text)

    write_directory(folder, fill)
    return folder


def _write_base(run_dir: Path, path: Path) -> tuple[Any, float]:
    """Writes the pruned base without what was learned, and returns the factors that go onto it."""
    _, experiment = read_experiment(run_dir)
    settings = settings_from(RunSettings, {**experiment.run, "seed": experiment.seed}, where="[run]")
    state = store.load(run_dir / "state")
    base = open_base(model_directory(experiment.model, cache_directory()))
    world = global_model(state, pruning_ratio=settings.target_sparsity)
    save_pruned(path, base, state.layout, _without_adapter(world), mode=settings.mask_mode)
    return world.kept_factors(state.layout), world.scaling


def _without_adapter(world: GlobalModel) -> GlobalModel:
    zeros = {name: (lora_a, np.zeros_like(lora_b)) for name, (lora_a, lora_b) in world.factors.items()}
    return dataclasses.replace(world, factors=zeros)


@torch.no_grad()
def _peft_logits(folder: Path, text: Text) -> np.ndarray:
    try:
        from peft import PeftModel  # a user's own choice, not a dependency
    except ImportError as error:
        raise UsageError("expected peft, found it not installed", hint="pip install peft") from error
    base = folder / "base"
    auto_class = AutoModelForCausalLM if text.token_ids else AutoModelForSequenceClassification
    trusted = (base / MODELING_FILE).is_file()
    model = auto_class.from_pretrained(base, trust_remote_code=trusted, local_files_only=True)
    tuned = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
    if text.token_ids:
        logits: np.ndarray = tuned(torch.tensor([text.token_ids])).logits[0].numpy()
        return logits
    return np.concatenate([tuned(torch.tensor([row])).logits.numpy() for row in text.rows])


def _require_near(reference: np.ndarray, found: np.ndarray, text: Text) -> None:
    """The merged model's matrices are float16, so the two differ as an F16 file may."""
    parity = compare_logits(reference, found, token_ids=text.token_ids or None)
    missed = missed_bound(parity, TOLERANCES["F16"], "F16")
    require(Verdict("F16", parity, TOLERANCES["F16"], missed), "the base with its adapter")
