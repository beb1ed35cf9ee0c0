"""Which stock loaders take what was just written: tried, not guessed.

Comes in: a model directory, a GGUF file or an ONNX model. Goes out: one line a loader, with the reason of a refusal.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from fedspine_edge.base_model import base_facts, open_base
from fedspine_edge.commands.targets import Target
from fedspine_edge.errors import FedSpineError
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.export.llama_session import open_session
from fedspine_edge.export.onnx_session import open_onnx
from fedspine_edge.hf.directory import MODELING_FILE
from fedspine_edge.structure import Family

REASON_LENGTH = 90
NO_STOCK = "no stock class has these widths"


@dataclass(frozen=True)
class Loader:
    """What became of one attempt; `reason` is empty where it worked."""

    name: str
    works: bool
    reason: str = ""


def try_loaders(target: Target) -> list[Loader]:
    """Returns what happened with each loader that a user might reach for."""
    if target.kind == "gguf":
        return [_attempt("llama.cpp", lambda: _load_gguf(target.path))]
    if target.kind == "onnx":
        return [_attempt("onnxruntime", lambda: open_onnx(target.path / "model.onnx"))]
    family = open_base(target.path, sha256="").family
    loaders = [_attempt("transformers", lambda: _from_pretrained(target.path, family, trusted=False))]
    if (target.path / MODELING_FILE).is_file():
        loaders = [loader if loader.works else Loader(loader.name, works=False, reason=NO_STOCK) for loader in loaders]
        loaders.append(
            _attempt("transformers, trust_remote_code", lambda: _from_pretrained(target.path, family, trusted=True))
        )
    if importlib.util.find_spec("peft") is not None:
        loaders.append(_attempt("peft", lambda: _attach(target.path, family)))
    if family.task == "decoder":
        loaders.append(_attempt("llama.cpp, as GGUF", lambda: _load_as_gguf(target.path)))
    return loaders


def _attempt(name: str, load: Callable[[], object]) -> Loader:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            load()
    except (FedSpineError, OSError, RuntimeError, ValueError, TypeError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Loader(name, works=False, reason=first[:REASON_LENGTH])
    finally:
        transformers_logging.set_verbosity(level)
    return Loader(name, works=True)


def _from_pretrained(path: Path, family: Family, *, trusted: bool) -> object:
    auto_class = AutoModelForCausalLM if family.task == "decoder" else AutoModelForSequenceClassification
    model, info = auto_class.from_pretrained(
        path, trust_remote_code=trusted, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise ValueError(f"loads with {len(info[kind])} {kind.replace('_', ' ')}")
    return model


def _attach(path: Path, family: Family) -> object:
    from peft import LoraConfig, get_peft_model  # a user's own choice, not a dependency

    model = _from_pretrained(path, family, trusted=(path / MODELING_FILE).is_file())
    names = [name.rpartition(".")[2] for name in (*family.attention_in, family.attention_out)]
    return get_peft_model(model, LoraConfig(r=4, target_modules=names))


def _load_gguf(path: Path) -> None:
    with open_session(path, num_context=8) as session:
        session.decode([1, 1], positions=[0, 1], sequences=[0, 0], wanted=[False, True])


def _load_as_gguf(path: Path) -> None:
    facts = base_facts(path)
    source = facts.get("tokenizer_gguf")
    with tempfile.TemporaryDirectory(prefix="fedspine-") as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(path, file, quantization="F16", name="trial", tokenizer_gguf=Path(source) if source else None)
        _load_gguf(file)


def loads_in(loaders: list[Loader]) -> str:
    """Returns the line a user reads: `loads in  transformers ✗ (why), llama.cpp ✓`."""
    return ", ".join(
        f"{loader.name} {'✓' if loader.works else '✗'}" + (f" ({loader.reason})" if loader.reason else "")
        for loader in loaders
    )
