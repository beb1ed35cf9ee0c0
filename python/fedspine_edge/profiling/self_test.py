"""Do the kernels compute what they mean, and do the runtimes load a model: each on something tiny, made on the spot.

Comes in: nothing. Goes out: the largest error of each instruction set, or a file for a runtime to load.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspine_edge import kernels, reference
from fedspine_edge.profiling.child import open_child

TOLERANCE = 1e-4
"""Of the largest value; float32 sums in another order differ by 1e-6."""

TOKENS, IN, OUT, RANK = 37, 71, 83, 5
"""No multiple of any kernel's block, so that every tail is run."""

SCALING = 0.5
_VOCABULARY, _WIDTH, _CHANNELS, _HEADS = 32, 64, 64, 2


def kernel_errors() -> dict[str, float]:
    """Returns, of each instruction set this CPU has, the largest error of forward, backward and importance.

    Relative to the largest value of each result; the reference is computed in float64.
    """
    values = _inputs()
    wanted = _by_reference({name: value.double() for name, value in values.items()})
    found = {}
    for isa in kernels.available_isas():
        with kernels.use_backend("native"), kernels.use_isa(isa):
            got = _by_kernels(values)
        pairs = zip(got, wanted, strict=True)
        errors = [(one.double() - other).abs().max() / other.abs().max() for one, other in pairs]
        # torch's maximum of NaN is NaN, Python's depends on the order.
        found[isa] = float(torch.stack(errors).max())
    return found


def run_llama() -> str:
    """Runs a tiny GGUF file in llama.cpp, in a process of its own, and returns what it calls the model.

    Raises:
        FedSpineError: llama.cpp is not installed, does not load the file, or crashes.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        write_tiny_gguf(path)
        return _run(path, 2)


def run_onnx() -> str:
    """Runs a tiny ONNX file in onnxruntime, in a process of its own, and returns what the model is called.

    Raises:
        FedSpineError: onnxruntime is not installed, does not load the file, or crashes.
        ImportError: The package onnx, which writes the file, is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        write_tiny_onnx(path)
        return _run(path, 0)


def write_tiny_gguf(path: Path) -> None:
    """Writes a random llama of one layer, without a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_CHANNELS)
    writer.add_head_count(_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("none")
    shapes = {"token_embd": (_VOCABULARY, _WIDTH), "output_norm": (_WIDTH,), "output": (_VOCABULARY, _WIDTH)}
    shapes |= {f"blk.0.attn_{name}": (_WIDTH, _WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{name}_norm": (_WIDTH,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.ffn_{name}": (_CHANNELS, _WIDTH) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (_WIDTH, _CHANNELS)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tiny_onnx(path: Path) -> None:
    """Writes a classifier that adds up one row of weights a token."""
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.random.default_rng(0).normal(size=(_VOCABULARY, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["weights", "input_ids"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axes"], ["logits"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1]), "axes")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def _run(path: Path, num_generate: int) -> str:
    with contextlib.ExitStack() as stack:
        child = open_child(stack, path, num_context=8, num_threads=1, num_batch=8)
        child.run(4, num_generate)
        return child.facts.model_type


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (TOKENS, IN),
        "weight": (OUT, IN),
        "bias": (OUT,),
        "lora_a": (RANK, IN),
        "lora_b": (OUT, RANK),
        "dy": (TOKENS, OUT),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def _by_reference(values: dict[str, Tensor]) -> list[Tensor]:
    return _results(values, lambda x, **pair: reference.lora_linear(x, values["weight"], **pair), _reference_scores)


def _by_kernels(values: dict[str, Tensor]) -> list[Tensor]:
    packed = kernels.pack(values["weight"])

    def scores(values: dict[str, Tensor], **factors: Any) -> Tensor:
        return kernels.importance(packed, **factors)

    return _results(values, lambda x, **pair: kernels.lora_linear(x, packed, **pair), scores)


def _reference_scores(values: dict[str, Tensor], **factors: Any) -> Tensor:
    return reference.importance(values["weight"], **factors)


def _results(values: dict[str, Tensor], linear: Any, scores: Any) -> list[Tensor]:
    """Returns the output, the gradients of x, bias and both factors, and the importance along both axes."""
    names = ("x", "bias", "lora_a", "lora_b")
    leaves = {name: values[name].clone().requires_grad_() for name in names}
    y = linear(leaves["x"], **{name: leaves[name] for name in names[1:]}, scaling=SCALING)
    gradients = torch.autograd.grad(y, list(leaves.values()), values["dy"])
    factors = {name: values[name] for name in ("lora_a", "lora_b")}
    factors |= {"grad_a": gradients[2], "grad_b": gradients[3]}
    both = [scores(values, **factors, scaling=SCALING, axis=axis) for axis in ("out", "in")]
    return [y.detach(), *gradients, *both]
