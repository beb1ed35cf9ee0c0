"""export, verify, prune, tune and eval, as a user types them, on tiny models in the real runtimes."""

import json
import shutil
import sys

import pytest
from export_models import save_decoder
from tiny import questions

from fedspine_edge import cli
from fedspine_edge.export import gguf

STEPS = ("--steps", 24, "--batch-size", 4, "--learning-rate", 1e-2, "--rank", 4)
PROMPT = "{text}\\nIs:"


@pytest.fixture
def fedspine(monkeypatch, capsys, tmp_path):
    """Returns a function that runs the program here and returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["fedspine", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        return out, err

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data file; its classes begin with tokens that the tiny decoders tell apart."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": "far" if label == "number" else "is"}) for text, label in questions()]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("models") / "llama", "llama")


def test_a_classifier_is_pruned_then_tuned_then_judged(fedspine, rows, tiny_models):
    out, _ = fedspine("prune", tiny_models["bert"], "--ratio", 0.5, "--data", rows, *STEPS, "--out", "half", "--json")
    pruned = json.loads(out)
    assert pruned["sparsity"] >= 0.5
    assert "transformers, trust_remote_code ✓" in pruned["loads_in"]
    out, _ = fedspine("tune", "half", "--data", rows, *STEPS, "--out", "tuned", "--json")
    tuned = json.loads(out)
    assert tuned["sparsity"] == 0
    assert tuned["loss_after"] < tuned["loss_before"]
    score = json.loads(fedspine("eval", "tuned", "--data", rows, "--json")[0])
    assert (score["runtime"], score["rows"]) == ("torch", 24)
    assert score["low"] < score["accuracy"] < score["high"] or score["accuracy"] == 1
    assert sum(one["right"] for one in score["classes"]) == round(24 * score["accuracy"])


def test_pruning_twice_remembers_the_first_model(fedspine, rows, tiny_models, tmp_path):
    fedspine(
        "prune", tiny_models["llama"], "--ratio", 0.3, "--data", rows_of_words(tmp_path), *STEPS, "--out", "one", "-q"
    )
    fedspine("prune", "one", "--ratio", 0.3, "--data", tmp_path / "words.jsonl", *STEPS, "--out", "two", "-q")
    one, two = (json.loads((tmp_path / name / "fedspine_prune.json").read_text()) for name in ("one", "two"))
    assert two["unpruned"] == one["unpruned"]
    assert two["sparsity"] > one["sparsity"]
    for name, group in two["groups"].items():
        assert group["num_members"] == one["groups"][name]["num_members"]
        assert set(group["kept"]) <= set(one["groups"][name]["kept"])


def rows_of_words(folder):
    path = folder / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in questions()))
    return path


def test_a_uniform_decoder_goes_to_every_runtime(fedspine, rows, decoder):
    out, _ = fedspine("prune", decoder, "--ratio", 0.3, "--mode", "uniform", "--data", rows, "--prompt", PROMPT,
                      *STEPS, "--out", "lean", "--json")  # fmt: skip
    loads_in = json.loads(out)["loads_in"]
    assert loads_in.startswith("transformers ✓")
    assert "llama.cpp, as GGUF ✓" in loads_in
    exported = json.loads(fedspine("export", "gguf", "lean", "--quant", "F32,Q8_0", "--data", rows, "--json")[0])
    assert [one["format"] for one in exported] == ["F32", "Q8_0"]
    assert all(one["loads_in"] == "llama.cpp ✓" and one["num_positions"] >= 256 for one in exported)
    onnx = json.loads(fedspine("export", "onnx", "lean", "--data", rows, "--json")[0])[0]
    assert onnx["max_abs_dlogit"] < 1e-3
    out, _ = fedspine("verify", "lean", exported[0]["path"], "--data", rows)
    assert out.startswith("F32: 320 positions, max |dlogit|")
    fedspine("verify", exported[0]["path"], onnx["path"], "--data", rows)
    accuracies = []
    for target in ("lean", exported[0]["path"], onnx["path"]):
        if target.endswith(".gguf"):
            shutil.copy(target, "lean/model.gguf")
            target = "lean/model.gguf"
        score = json.loads(fedspine("eval", target, "--data", rows, "--prompt", PROMPT, "--json")[0])
        accuracies.append(score["accuracy"])
    assert len(set(accuracies)) == 1


def test_a_file_that_exists_is_replaced_only_when_asked(fedspine, rows, decoder, tmp_path):
    fedspine("export", "gguf", decoder, "--quant", "F32", "--data", rows, "--out", "files", "-q")
    (file,) = (tmp_path / "files").iterdir()
    before = file.read_bytes()
    _, err = fedspine("export", "gguf", decoder, "--quant", "F32", "--data", rows, "--out", "files", code=2)
    assert "exists" in err
    assert "hint: pass --force to replace it" in err
    fedspine("export", "gguf", decoder, "--quant", "F32", "--data", rows, "--out", "files", "--force", "-q")
    assert file.read_bytes() == before


def test_a_wrong_export_is_kept_aside_with_the_reason(fedspine, rows, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "permute_rows", lambda tensor, num_heads: tensor)
    _, err = fedspine("export", "gguf", decoder, "--quant", "F32", "--data", rows, "--out", "files", "-q", code=3)
    assert "does not say what its model says" in err
    names = sorted(path.name for path in (tmp_path / "files").iterdir())
    assert [name.rsplit(".gguf", 1)[1] for name in names] == [".rejected", ".rejected.txt"]
    assert "missed: " in (tmp_path / "files" / names[1]).read_text()


def test_another_model_is_told_apart(fedspine, rows, decoder, tmp_path):
    other = save_decoder(tmp_path / "other", "llama", rms_norm_eps=0.1)
    out, err = fedspine("verify", decoder, other, "--data", rows, code=3)
    assert out.startswith("directory: 320 positions")
    assert "is not" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("export", "gguf", "{bert}"), 6, "fedspine export onnx"),
        (("export", "gguf", "{llama}", "--quant", "Q9"), 2, "found 'Q9'"),
        (("export", "onnx", "{decoder}", "--quant", "int8"), 6, "fp32, fp16"),
        (("export", "hf", "nowhere"), 6, "found 'nowhere'"),
        (("export", "adapter", "{bert}"), 2, "give the run's directory"),
        (("prune", "{bert}", "--ratio", "1.5"), 2, "[0, 0.9]"),
        (("prune", "{bert}", "--ratio", "0"), 2, "fedspine tune"),
        (("prune", "{bert}", "--steps", "3"), 2, "to prune in, found 3"),
        (("prune", "{bert}", "--mode", "odd"), 2, "found 'odd'"),
        (("tune", "{bert}", "--rank", "0"), 2, "rank of at least 1"),
        (("tune", "{decoder}", "--prompt", "no place"), 2, "{text}"),
        (("eval", "{bert}"), 6, "expected --data"),
        (("verify", "{bert}", "nowhere.gguf"), 6, "nowhere.gguf"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, code, said, fedspine, rows, decoder, tiny_models):
    places = {"{bert}": tiny_models["bert"], "{llama}": tiny_models["llama"], "{decoder}": decoder}
    data = () if arguments[0] == "eval" else ("--data", rows)
    _, err = fedspine(*(places.get(word, word) for word in arguments), *data, code=code)
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert said in err


def test_a_truncated_gguf_is_one_clear_error(fedspine, rows, decoder, tmp_path):
    fedspine("export", "gguf", decoder, "--quant", "F32", "--data", rows, "--out", "files", "-q")
    (file,) = (tmp_path / "files").iterdir()
    file.write_bytes(file.read_bytes()[:2000])
    _, err = fedspine("verify", decoder, file, "--data", rows, code=6)
    assert err.count("error: ") == 1


TOML = """
model = "{model}"
data = "{data}"
held_out = 6
validation = 2
prompt = "{{text}}\\nIs:"
dense_reference = false
quantizations = ["F16"]
[run]
rounds = 2
steps_per_round = 4
prune_interval = 2
batch_size = 4
learning_rate = 5e-3
ranks = [2, 4]
target_sparsity = 0.3
[fleet]
tx2 = 1
agx_xavier = 1
"""


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers so
def test_the_adapter_of_a_run_says_what_the_merged_model_says(fedspine, rows, decoder, tmp_path):
    (tmp_path / "mine.toml").write_text(TOML.format(model=decoder, data=rows))
    fedspine("simulate", "mine.toml", "--quiet", "--workers", 1, "--out", "run")
    fedspine("export", "adapter", "run", "--data", rows, "-q")
    folder = tmp_path / "run" / "models" / "adapter-peft"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    fedspine("export", "adapter", "run", "--quant", "gguf", "--data", rows, "-q")
    assert (tmp_path / "run" / "models" / "adapter-gguf" / "adapter-F16.gguf").is_file()
    score = json.loads(fedspine("eval", "run", "--json")[0])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert score["rows"] == summary["num_held_out"]
    file = json.loads(fedspine("eval", summary["exports"][-1]["path"], "--json")[0])
    assert (file["runtime"], file["accuracy"]) == ("llama.cpp", summary["accuracy"])
