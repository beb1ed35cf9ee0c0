"""A transformers model -> an ONNX graph with Optimum's names: one graph of a decoder for prompts and single tokens.

In: a (pruned) model in memory. Out: an onnx_ir model with dynamic batch and length. Each layer's cache has that layer's
own number of heads. Masks are built here, as sums to the attention scores, so that the graph holds a comparison and no
library's way of choosing between masks.

Source: torch.onnx's dynamo exporter; Optimum's names of inputs, caches and outputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.export.onnx_session import optional_library
from fedspine_edge.export.rope import rope_of

# Sizes of the traced example; different ones, and none is 1, so that the tracer takes no two for the same.
_BATCH, _TOKENS, _CACHED = 2, 3, 5


@dataclass(frozen=True)
class _Signature:
    """What a graph takes and gives: example inputs in order, and the names with their axes' names."""

    example: tuple[Any, ...]
    inputs: dict[str, list[str | int]]
    outputs: dict[str, list[str | int]]


def trace(model: Any, *, task: str) -> Any:
    """Returns the ONNX graph of a model.

    Args:
        model: A transformers model in evaluation mode, float32 or float16; its attention is set to `eager`.
        task: `classifier` or `decoder`.

    Returns:
        An `onnx_ir.Model`, its weights shared with `model`.

    Raises:
        IncompatibleError: A rotary embedding that changes with the length, or a model torch cannot trace.
    """
    optional_library("onnxscript")
    model.set_attn_implementation("eager")  # its few plain operations are what onnxruntime fuses
    wrapped = _Decoder(model) if task == "decoder" else _Classifier(model)
    signature = wrapped.signature()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(_map_tensors(part, lambda tensor: _dynamic_axes(tensor, dynamic)) for part in signature.example)
    with quietly(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                wrapped.eval(),
                signature.example,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise IncompatibleError(
                f"expected a model that torch exports to ONNX, found one it cannot: {reason}"
            ) from error
    _tidy(program.model, signature)
    return program.model


class _Classifier(nn.Module):
    """A classifier as the graph sees it: ids and mask -> logits [B, C]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def signature(self) -> _Signature:
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (self.model.config.model_type == "bert")
        example = tuple(torch.ones(_BATCH, _TOKENS, dtype=torch.int64) for _ in names)
        axes: list[str | int] = ["batch_size", "sequence_length"]
        outputs: dict[str, list[str | int]] = {"logits": ["batch_size", self.model.config.num_labels]}
        return _Signature(example, dict.fromkeys(names, axes), outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        mask = _added(attention_mask[:, None, None, :] != 0, self.model.dtype)
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=mask, **extra).logits
        return logits


class _Decoder(nn.Module):
    """A decoder as the graph sees it: ids, mask, positions and cache -> logits [B, T, V] and the new cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        rope_of(model.config.to_dict())  # refuses embeddings that change with the length: one graph holds one

    def signature(self) -> _Signature:
        config = self.model.config
        total = "past_sequence_length + sequence_length"
        ids: list[str | int] = ["batch_size", "sequence_length"]
        inputs: dict[str, list[str | int]] = {
            "input_ids": ids,
            "attention_mask": ["batch_size", total],
            "position_ids": ids,
        }
        outputs: dict[str, list[str | int]] = {"logits": [*ids, config.vocab_size]}
        cache = []
        for index, layer in enumerate(self.model.model.layers):
            width = layer.self_attn.head_dim
            num_heads = layer.self_attn.k_proj.out_features // width
            for kind in ("key", "value"):
                inputs[f"past_key_values.{index}.{kind}"] = ["batch_size", num_heads, "past_sequence_length", width]
                outputs[f"present.{index}.{kind}"] = ["batch_size", num_heads, total, width]
                cache.append(torch.zeros(_BATCH, num_heads, _CACHED, width, dtype=self.model.dtype))
        positions = torch.arange(_CACHED, _CACHED + _TOKENS).expand(_BATCH, _TOKENS)
        tokens = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
        mask = torch.ones(_BATCH, _CACHED + _TOKENS, dtype=torch.int64)
        return _Signature((tokens, mask, positions, cache), inputs, outputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = _Cache(past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, input_ids.shape[1], past[0].shape[2]),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (output.logits, *cache.present)

    def _masks(self, attention_mask: Tensor, num_tokens: int, num_cached: int) -> Tensor | dict[str, Tensor]:
        """Returns [B, 1, T, P + T] in the model's dtype, for Qwen2 one for each kind of layer."""
        config = self.model.config
        queries = torch.arange(num_tokens)[:, None] + num_cached
        keys = torch.arange(attention_mask.shape[1])[None]
        seen = (keys <= queries)[None, None] & (attention_mask[:, None, None, :] != 0)
        window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
        near = seen if window is None else seen & (keys > queries - window)[None, None]
        if config.model_type == "qwen2":
            kinds = {"full_attention": seen, "sliding_attention": near}
            return {kind: _added(kinds[kind], self.model.dtype) for kind in dict.fromkeys(config.layer_types)}
        return _added(near, self.model.dtype)


class _Cache:
    """Keys and values of each layer, in place of transformers' cache, whose own checks of emptiness break the trace."""

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past = past
        self.present: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.past[2 * layer_index], keys], dim=2)
        values = torch.cat([self.past[2 * layer_index + 1], values], dim=2)
        self.present += [keys, values]
        return keys, values

    def get_seq_length(self, _layer_index: int = 0) -> int:
        return self.past[0].shape[2]


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 0 where seen, else the least finite number: with -inf, a row that sees nothing would become NaN."""
    return torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))


def _map_tensors(part: Any, function: Any) -> Any:
    return [function(tensor) for tensor in part] if isinstance(part, list) else function(part)


def _dynamic_axes(tensor: Tensor, dynamic: Any) -> dict[int, Any]:
    """Batch and tokens of ids and masks [B, T]; batch and cached tokens of caches [B, H, P, D]."""
    return {0: dynamic, 2 if tensor.ndim > 2 else 1: dynamic}


def _tidy(model: Any, signature: _Signature) -> None:
    """Gives the axes their names and removes the tracer's notes: stack traces with paths, shapes of inner values."""
    ir = optional_library("onnx_ir")
    graph = model.graph
    for values, names in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
        for value in values:
            value.shape = ir.Shape(names[value.name])
    outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in outer:
                value.shape = value.type = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name, graph.doc_string = "model", None
    _keep_sums_apart(graph)


def _keep_sums_apart(graph: Any) -> None:
    """Makes `Sum` of an `Add` that a LayerNormalization reads: the same, but onnxruntime does not fuse the two.

    Its fused SkipLayerNormalization is a scalar loop on CPUs: six of them took 0.74 of MiniLM's 2.65 ms at int8.
    """
    for node in graph:
        producer = node.inputs[0].producer() if node.op_type == "LayerNormalization" else None
        if producer is not None and producer.op_type == "Add":
            producer.op_type = "Sum"


@contextmanager
def quietly() -> Iterator[None]:
    """Silences what the tracer and the quantiser say of themselves: registrations, deprecations, advice."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
