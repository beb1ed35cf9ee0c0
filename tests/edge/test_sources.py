"""Directories of unpacked models, found again in the cache."""

import hashlib
import json

import pytest

from fedspine_edge.sources import unpack_gguf


@pytest.fixture
def unpacked(tmp_path):
    """A GGUF file, and the directory it was unpacked to by an environment whose own copy may be gone."""
    file, elsewhere = tmp_path / "here" / "m.gguf", tmp_path / "there" / "m.gguf"
    for path in (file, elsewhere):
        path.parent.mkdir()
        path.write_bytes(b"GGUF of a model")
    target = tmp_path / "cache" / f"m-{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    target.mkdir(parents=True)
    (target / "fedspine_base.json").write_text(json.dumps({"name": "M", "tokenizer_gguf": str(elsewhere)}))
    return file, elsewhere, target


def named_by(target):
    return json.loads((target / "fedspine_base.json").read_text())


def test_a_cached_model_names_the_present_file_when_the_one_it_came_from_is_gone(unpacked):
    file, elsewhere, target = unpacked
    elsewhere.unlink()
    assert unpack_gguf(file, target.parent, facts={}) == target
    assert named_by(target) == {"name": "M", "tokenizer_gguf": str(file)}


def test_a_cached_model_keeps_the_file_it_came_from_while_that_is_there(unpacked):
    file, elsewhere, target = unpacked
    assert unpack_gguf(file, target.parent, facts={}) == target
    assert named_by(target)["tokenizer_gguf"] == str(elsewhere)
