"""ONNX files through onnxruntime itself, against the torch model they came from."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruned_models import mixed_keep, save_world
from safetensors.torch import load_file, save_file
from tiny import DECODERS, VOCABULARY

from fedspine_edge.checkpoint import load_pruned
from fedspine_edge.errors import CheckpointError, IncompatibleError, VerificationError
from fedspine_edge.export import onnx as export_onnx
from fedspine_edge.export.onnx import OnnxModel, write_onnx
from fedspine_edge.export.onnx_parity import ONNX_TOLERANCES, check_onnx_parity
from fedspine_edge.export.onnx_session import OnnxSession, onnx_class_logits, onnx_logits, open_onnx
from fedspine_edge.export.verify import Parity, compare_logits
from fedspine_edge.structure import FAMILIES

onnx = pytest.importorskip("onnx", reason="needs the extra fedspine-edge[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra fedspine-edge[onnx]")

Export = Callable[..., OnnxModel]
CLASSIFIERS = sorted(set(FAMILIES) - set(DECODERS))
# Shorter than the sequences below, so that a window left out shows.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
TOKENS = [3, 7, 4, 4, 18, 9, 12, 5, 6, 17, 8, 10, 11]
ROWS = [[3, 4, 5, 6], [3, 18, 7, 9, 12, 13, 4, 16], [3, 10]]


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each family, pruned and compensated, its layers of different widths."""
    folder = tmp_path_factory.mktemp("onnx-models")
    found = {}
    for family, base in tiny_models.items():
        wide = shutil.copytree(base, folder / f"{family}-wide")
        edit_config(wide, WINDOWS.get(family, {}))
        (wide / "fedspine_base.json").write_text(json.dumps({"name": "Tiny", "license": "apache-2.0"}))
        found[family] = save_world(folder / family, wide, mixed_keep, compensated=True)
    return found


@pytest.fixture(scope="module")
def export(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Writes a family at a precision the first time it is asked for."""
    folder = tmp_path_factory.mktemp("onnx-files")
    written: dict[tuple[str, str], OnnxModel] = {}

    def exported(family: str, precision: str = "fp32") -> OnnxModel:
        if (family, precision) not in written:
            target = folder / f"{family}-{precision}"
            written[family, precision] = write_onnx(models[family], target, precision=precision)
        return written[family, precision]

    return exported


@pytest.fixture
def traced_once(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets float32 models be written again without the seconds of tracing: their graphs are read from their files."""
    ir = importlib.import_module("onnx_ir")
    paths = {family: export(family).path for family in ("bert", "distilbert")}
    monkeypatch.setattr(export_onnx, "trace", lambda model, task: ir.load(paths[model.config.model_type]))


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def torch_logits(folder: Path, tokens: list[int] = TOKENS) -> np.ndarray:
    logits: np.ndarray = load_pruned(folder)(torch.tensor([tokens])).logits.numpy()
    return logits.reshape(-1, logits.shape[-1])


def torch_class_logits(folder: Path) -> np.ndarray:
    return np.concatenate([torch_logits(folder, row) for row in ROWS])


def largest_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max())


# --- what the files say ---


@pytest.mark.parametrize("family", DECODERS)
def test_a_pruned_decoder_says_through_its_cache_what_torch_says(family: str, models: Any, export: Export) -> None:
    wanted, path = torch_logits(models[family]), export(family).path
    for num_threads in (1, 2):
        assert largest_difference(onnx_logits(path, TOKENS, num_threads=num_threads), wanted) < 1e-5


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_pruned_classifier_says_what_torch_says(family: str, models: Any, export: Export) -> None:
    wanted, path = torch_class_logits(models[family]), export(family).path
    assert np.ptp(wanted) > 0.05
    for num_threads in (1, 2):
        assert largest_difference(onnx_class_logits(path, ROWS, num_threads=num_threads), wanted) < 1e-5
    alone = np.concatenate([onnx_class_logits(path, [row]) for row in ROWS])
    assert largest_difference(alone, wanted) < 1e-5


def test_the_tests_would_notice_a_window_left_out(models: Any, tmp_path: Path) -> None:
    for family in WINDOWS:
        endless = shutil.copytree(models[family], tmp_path / family)
        edit_config(endless, {"sliding_window": 100})
        assert largest_difference(torch_logits(endless), torch_logits(models[family])) > 1e-3


def test_any_split_into_prompt_and_steps_gives_the_same(export: Export) -> None:
    session = open_onnx(export("llama").path)
    whole = session.decode(TOKENS)
    for num_prompt in (1, 5):
        session.clear()
        parts = [session.decode(TOKENS[:num_prompt]), session.decode(TOKENS[num_prompt:])]
        assert session.num_cached == len(TOKENS)
        assert largest_difference(np.concatenate(parts), whole) < 1e-5


def test_rows_padded_at_the_left_say_what_each_says_alone(models: Any, export: Export) -> None:
    session = onnxruntime.InferenceSession(str(export("qwen2").path), providers=["CPUExecutionProvider"])
    feeds = {
        entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in session.get_inputs()[3:]
    }
    feeds["input_ids"] = np.array([TOKENS[:6], [0, 0, *TOKENS[6:10]]])
    feeds["attention_mask"] = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    feeds["position_ids"] = np.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    logits = session.run(["logits"], feeds)[0]
    assert np.isfinite(logits).all()
    assert largest_difference(logits[0], torch_logits(models["qwen2"], TOKENS[:6])) < 1e-5
    assert largest_difference(logits[1, 2:], torch_logits(models["qwen2"], TOKENS[6:10])) < 1e-5


def test_a_float16_decoder_keeps_its_cache_in_float16_and_stays_within_its_tolerance(
    models: Any, export: Export
) -> None:
    half = export("llama", "fp16")
    session = onnxruntime.InferenceSession(str(half.path), providers=["CPUExecutionProvider"])
    assert {entry.type for entry in session.get_inputs()[3:]} == {"tensor(float16)"}
    assert all(weight.dtype == np.float16 for weight in matrices(half.path))
    parity = compare_logits(torch_logits(models["llama"]), onnx_logits(half.path, TOKENS))
    check_onnx_parity(parity, "fp16")
    assert parity.max_abs_dlogit > 0


@pytest.mark.usefixtures("traced_once")
def test_an_int8_classifier_has_no_float_matrix_and_stays_within_its_tolerance(models: Any, export: Export) -> None:
    small = export("bert", "int8")
    assert not [weight.shape for weight in matrices(small.path) if weight.dtype.kind == "f"]
    assert small.size_bytes < export("bert").size_bytes
    operations = {node.op_type for node in onnx.load(small.path).graph.node}
    assert {"MatMulInteger", "DynamicQuantizeLinear", "DequantizeLinear"} <= operations
    wanted = torch_class_logits(models["bert"])
    parity = compare_logits(wanted, onnx_class_logits(small.path, ROWS))
    assert 0 < parity.max_abs_dlogit < 0.2 * np.ptp(wanted)
    check_onnx_parity(parity, "int8")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.usefixtures("traced_once")
def test_onnxruntime_makes_no_slow_skip_layer_normalization(precision: str, export: Export, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine
    path = str(export("bert", precision).path)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    operations = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "LayerNormalization" in operations
    assert "SkipLayerNormalization" not in operations


def matrices(path: Path) -> list[np.ndarray]:
    """Every weight of a file with two axes or more and a hundred entries or more."""
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    found = [tensor for tensor in tensors if tensor.ndim > 1 and tensor.size >= 100]
    assert found
    return found


# --- what the directories hold ---


def test_a_decoder_has_the_names_and_axes_of_optimum_and_a_cache_as_wide_as_each_layer(export: Export) -> None:
    session = onnxruntime.InferenceSession(str(export("llama").path), providers=["CPUExecutionProvider"])
    total = "past_sequence_length + sequence_length"
    cached = {
        f"{layer}.{kind}": ["batch_size", num_heads, "past_sequence_length", 8]
        for layer, num_heads in ((0, 1), (1, 2))
        for kind in ("key", "value")
    }
    assert {entry.name: entry.shape for entry in session.get_inputs()} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", total],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{name}": shape for name, shape in cached.items()},
    }
    assert {entry.name: entry.shape for entry in session.get_outputs()} == {
        "logits": ["batch_size", "sequence_length", len(VOCABULARY)],
        **{f"present.{name}": [*shape[:2], total, 8] for name, shape in cached.items()},
    }


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_has_the_names_of_optimum(family: str, export: Export) -> None:
    session = onnxruntime.InferenceSession(str(export(family).path), providers=["CPUExecutionProvider"])
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (family == "bert")
    axes = ["batch_size", "sequence_length"]
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [(name, axes) for name in names]
    assert [(entry.name, entry.shape) for entry in session.get_outputs()] == [("logits", ["batch_size", 2])]


def test_the_file_tells_what_it_is_and_where_it_comes_from(models: Any, export: Export) -> None:
    record = json.loads((models["llama"] / "fedspine_prune.json").read_text())
    model = onnx.load(export("llama", "fp16").path)
    assert model.producer_name == "fedspine-edge"
    assert model.producer_version == export_onnx._version()
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties == open_onnx(export("llama", "fp16").path).metadata
    assert properties == {
        "fedspine.version": export_onnx._version(),
        "fedspine.task": "decoder",
        "fedspine.precision": "fp16",
        "fedspine.vocab_size": str(len(VOCABULARY)),
        "fedspine.base_name": "Tiny",
        "fedspine.base_license": "apache-2.0",
        "fedspine.sparsity": str(record["sparsity"]),
        "fedspine.parent_sha256": record["parent_sha256"],
        "fedspine.criterion": record["criterion"],
        "fedspine.mode": "per-layer",
    }


def test_no_path_of_the_machine_that_wrote_it_is_in_a_file(export: Export) -> None:
    for model in (export("llama"), export("bert", "int8")):
        content = model.path.read_bytes()
        assert not [word for word in (b"site-packages", b".py", str(model.path.parent).encode()) if word in content]


def test_the_directory_has_config_and_tokenizer_and_nothing_else(models: Any, export: Export) -> None:
    model = export("llama")
    assert {file.name for file in model.path.parent.iterdir()} == {
        "model.onnx",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((model.path.parent / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "auto_map" in json.loads((models["llama"] / "config.json").read_text())
    assert "auto_map" not in config
    assert model == OnnxModel(model.path, "decoder", "fp32", model.path.stat().st_size)


def test_an_unpruned_directory_is_exported_silently(tiny_models: Any, tmp_path: Path, capfd: Any) -> None:
    before = logging.root.manager.disable
    model = write_onnx(tiny_models["roberta"], tmp_path / "out", precision="int8")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == before
    wanted = torch_class_logits(tiny_models["roberta"])
    assert largest_difference(onnx_class_logits(model.path, ROWS), wanted) < 0.2 * np.ptp(wanted)
    assert "fedspine.parent_sha256" not in open_onnx(model.path).metadata


@pytest.mark.usefixtures("traced_once")
def test_weights_go_into_a_file_of_their_own_when_asked_or_large(
    models: Any, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = onnx_class_logits(export("distilbert").path, ROWS)
    asked = write_onnx(models["distilbert"], tmp_path / "asked", precision="fp32", external_data=True)
    monkeypatch.setattr(export_onnx, "MAX_INLINE_BYTES", 10_000)
    for precision in ("fp32", "int8"):
        large = write_onnx(models["distilbert"], tmp_path / precision, precision=precision)
        names = {file.name for file in large.path.parent.iterdir()}
        assert {"model.onnx", "model.onnx_data"} <= names
        assert not [name for name in names if name.startswith(("whole", "quantized"))]
        data = large.path.with_name("model.onnx_data")
        assert large.size_bytes == large.path.stat().st_size + data.stat().st_size
        moved = shutil.copytree(large.path.parent, tmp_path / f"{precision}-moved")
        found = onnx_class_logits(moved, ROWS)
        assert largest_difference(found, wanted) < (1e-6 if precision == "fp32" else 0.05 * np.ptp(wanted))
    assert largest_difference(onnx_class_logits(asked.path, ROWS), wanted) < 1e-6
    inline = write_onnx(models["distilbert"], tmp_path / "inline", precision="fp32", external_data=False)
    assert not inline.path.with_name("model.onnx_data").exists()


# --- replacing and failing ---


@pytest.mark.usefixtures("traced_once")
def test_an_earlier_export_is_replaced_whole(models: Any, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    write_onnx(models["distilbert"], target, precision="fp32", external_data=True)
    model = write_onnx(models["distilbert"], target, precision="int8")
    assert not (target / "model.onnx_data").exists()
    assert open_onnx(model.path).metadata["fedspine.precision"] == "int8"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("traced_once")
def test_a_full_disk_leaves_the_earlier_export_and_nothing_half_written(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_onnx(models["distilbert"], tmp_path / "out", precision="fp32")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def fill_the_disk(_graph: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importlib.import_module("onnx_ir"), "save", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device"):
        write_onnx(models["distilbert"], tmp_path / "out", precision="fp32")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_of_other_things_is_never_replaced(models: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected an earlier export or nothing in .*, found fedspine_prune\.json"
    ):
        write_onnx(models["bert"], models["bert"], precision="fp32")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"expected a directory or nothing at .*, found a file"):
        write_onnx(models["bert"], tmp_path / "file", precision="fp32")
    assert (models["bert"] / "model.safetensors").is_file()
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_precision_is_refused(models: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a precision of fp16, fp32, int8, found 'q8'"):
        write_onnx(models["bert"], tmp_path / "out", precision="q8")


@pytest.mark.parametrize(
    ("family", "precision", "message"),
    [
        ("llama", "int8", "expected a precision of fp32, fp16 for a decoder, found int8"),
        ("bert", "fp16", "expected a precision of fp32, int8 for a classifier, found fp16"),
    ],
)
def test_a_precision_not_offered_for_a_task_is_refused(
    family: str, precision: str, message: str, models: Any, tmp_path: Path
) -> None:
    with pytest.raises(IncompatibleError, match=message) as caught:
        write_onnx(models[family], tmp_path / "out", precision=precision)
    assert caught.value.hint is not None
    assert not (tmp_path / "out").exists()


def damage(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_damaged_directory_is_refused(models: Any, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    missing = damage(models["bert"], tmp_path / "missing", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"expected .*{name}"):
        write_onnx(missing, tmp_path / "out", precision="fp32")
    cut = shutil.copytree(models["bert"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        write_onnx(cut, tmp_path / "out", precision="fp32")
    with pytest.raises(CheckpointError, match=r"expected a model directory with config\.json"):
        write_onnx(tmp_path / "nowhere", tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_or_too_large_for_float16_are_refused(models: Any, tmp_path: Path) -> None:
    name = "model.norm.weight"
    for value, message in ((float("nan"), "expected finite weights"), (1e6, "expected weights within float16")):
        folder = damage(models["llama"], tmp_path / str(value), lambda tensors, v=value: tensors[name].fill_(v))
        with pytest.raises(IncompatibleError, match=f"{message}, found .* in {name}"):
            write_onnx(folder, tmp_path / "out", precision="fp16")


def test_a_rotary_embedding_that_changes_with_the_length_is_refused(models: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "dynamic")
    edit_config(folder, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}})
    with pytest.raises(
        IncompatibleError, match="expected rope scaling of kind default, linear, llama3, found 'dynamic'"
    ):
        write_onnx(folder, tmp_path / "out", precision="fp32")


def test_a_model_torch_cannot_trace_is_refused(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("no way\nlong story")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(IncompatibleError, match=r"expected a model that torch exports to ONNX, .*: no way$"):
        write_onnx(models["bert"], tmp_path / "out", precision="fp32")


def test_a_missing_package_is_named(models: Any, export: Export, tmp_path: Path, monkeypatch: Any) -> None:
    path = export("distilbert").path
    really = importlib.import_module

    def lacking(name: str) -> Any:
        if name.startswith("onnx"):
            raise ImportError(name)
        return really(name)

    monkeypatch.setattr(importlib, "import_module", lacking)
    with pytest.raises(IncompatibleError, match="expected the package onnxruntime, found none") as caught:
        open_onnx(path)
    assert caught.value.hint == "pip install 'fedspine-edge[onnx]'"
    with pytest.raises(IncompatibleError, match="expected the package onnxscript, found none"):
        write_onnx(models["bert"], tmp_path / "out", precision="fp32")


# --- what the session refuses ---


def test_a_truncated_file_is_refused(export: Export, tmp_path: Path) -> None:
    content = export("distilbert").path.read_bytes()
    for kept in (len(content) - 200, len(content) // 2, 0):
        (tmp_path / "model.onnx").write_bytes(content[:kept])
        with pytest.raises(
            CheckpointError, match=r"expected a whole ONNX file at .*, found one onnxruntime does not load"
        ):
            open_onnx(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"expected an ONNX file at .*, found none"):
        open_onnx(tmp_path)


@pytest.mark.usefixtures("traced_once")
def test_missing_or_truncated_weights_are_refused(models: Any, tmp_path: Path) -> None:
    model = write_onnx(models["distilbert"], tmp_path / "out", precision="fp32", external_data=True)
    data = model.path.with_name("model.onnx_data")
    data.write_bytes(data.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="expected a whole ONNX file"):
        open_onnx(model.path)
    data.unlink()
    with pytest.raises(CheckpointError, match="expected a whole ONNX file") as caught:
        open_onnx(model.path)
    assert "model.onnx_data" in str(caught.value.hint)


def test_a_graph_of_other_names_is_refused(tmp_path: Path) -> None:
    tensor = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("pixels", "probabilities")
    ]
    node = onnx.helper.make_node("Relu", ["pixels"], ["probabilities"])
    graph = onnx.helper.make_graph([node], "g", tensor[:1], tensor[1:])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(IncompatibleError, match="expected input input_ids and output logits, found pixels and prob"):
        open_onnx(tmp_path)


@pytest.mark.parametrize(
    ("family", "call", "message"),
    [
        ("llama", lambda session: session.decode([]), "expected rows of at least one token, found an empty one"),
        ("llama", lambda session: session.decode([3, 19]), "expected tokens from 0 to below 19, found 3 to 19"),
        ("llama", lambda session: session.decode([-1]), "expected tokens from 0 to below 19, found -1 to -1"),
        ("llama", lambda session: session.classify([[3]]), "expected a classifier, found a decoder"),
        ("distilbert", lambda session: session.decode([3]), "expected a decoder, found a classifier"),
        ("distilbert", lambda session: session.classify([]), "expected rows of at least one token"),
        ("distilbert", lambda session: session.classify([[3], []]), "expected rows of at least one token"),
        (
            "distilbert",
            lambda session: session.classify([[3] * 161]),
            "expected at most 160 tokens in a row, found 161",
        ),
        ("roberta", lambda session: session.classify([[3] * 160]), "expected at most 159 tokens in a row, found 160"),
        ("mpnet", lambda session: session.classify([[3] * 159]), "expected at most 158 tokens in a row, found 159"),
    ],
)
def test_tokens_the_model_cannot_take_are_refused(
    family: str, call: Callable[[OnnxSession], Any], message: str, export: Export
) -> None:
    with pytest.raises(ValueError, match=message):
        call(open_onnx(export(family).path))


@pytest.mark.parametrize(("family", "longest"), [("distilbert", 160), ("roberta", 159), ("mpnet", 158)])
def test_the_longest_row_a_classifier_takes_is_taken(family: str, longest: int, export: Export) -> None:
    assert onnx_class_logits(export(family).path, [[3] * longest]).shape == (1, 2)


def test_what_onnxruntime_refuses_is_said_in_one_line(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_onnx(export("distilbert").path)
    monkeypatch.setattr(session, "metadata", {})
    with pytest.raises(IncompatibleError, match=r"expected logits, onnxruntime failed: .*") as caught:
        session.classify([[3, 99]])
    assert "\n" not in str(caught.value)


def test_fewer_threads_than_one_are_refused(export: Export) -> None:
    with pytest.raises(ValueError, match="expected at least one thread, found 0"):
        open_onnx(export("distilbert").path, num_threads=0)


def test_an_empty_token_list_is_refused(export: Export) -> None:
    with pytest.raises(ValueError, match="expected rows of at least one token, found an empty one"):
        onnx_logits(export("llama").path, [])


# --- what a file may lose ---


@pytest.mark.parametrize(
    ("parity", "precision", "message"),
    [
        (Parity(9, 0.0, 0.5, 0.0), "fp16", r"expected top-1 agreement >= 0\.98 at fp16, found 0\.5000"),
        (Parity(9, 0.0, 1.0, 0.5), "int8", r"expected a mean KL <= 0\.02 at int8, found 0\.5"),
        (Parity(9, 0.002, 1.0, 0.0), "fp32", r"expected logits within 0\.001 at fp32, found 0\.002"),
        (Parity(9, float("nan"), 1.0, 0.0), "fp32", "expected logits within"),
        (Parity(9, 0.0, 1.0, float("nan")), "int8", "expected a mean KL"),
    ],
)
def test_each_missed_bound_is_named(parity: Parity, precision: str, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        check_onnx_parity(parity, precision)


def test_every_precision_has_a_tolerance() -> None:
    assert set(ONNX_TOLERANCES) == {name for names in export_onnx.PRECISIONS.values() for name in names}
    with pytest.raises(ValueError, match="expected a precision of fp32, fp16, int8, found 'q8'"):
        check_onnx_parity(Parity(1, 0.0, 1.0, 0.0), "q8")
