import dataclasses

import numpy as np
import pytest

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.protocol import Assignment, tensors_nbytes
from fedspine_edge.wire_format import assignment_from_bytes, to_bytes, update_from_bytes

ASSIGNMENT = Assignment(
    run_id="run-1", device_id="device-00", round_index=3, base_sha256="a" * 64, pruning_ratio=0.25, rank=4,
    scaling=2.0, num_steps=8, prune_interval=4, batch_size=2, learning_rate=1e-3, seed=9, mask_agreement=0.7,
    mask_mode="uniform", revive=False, tensors={"lora_a/x": np.ones((2, 3), dtype=np.float16)},
)  # fmt: skip


def test_an_assignment_survives_the_wire_with_its_arrays():
    back = assignment_from_bytes(to_bytes(ASSIGNMENT))
    assert back == ASSIGNMENT
    assert back.tensors["lora_a/x"].dtype == np.float16
    assert tensors_nbytes(back) == 12


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_a_truncated_message_is_refused(cut):
    with pytest.raises(IncompatibleError, match="expected one whole assignment as safetensors"):
        assignment_from_bytes(to_bytes(ASSIGNMENT)[:cut])


def test_a_message_of_another_kind_is_refused():
    with pytest.raises(IncompatibleError, match="expected a message of kind Update, found Assignment"):
        update_from_bytes(to_bytes(ASSIGNMENT))


def test_another_protocol_version_is_refused(monkeypatch):
    monkeypatch.setattr("fedspine_edge.wire_format.PROTOCOL_VERSION", 4)
    blob = to_bytes(ASSIGNMENT)
    monkeypatch.undo()
    with pytest.raises(IncompatibleError, match="assignment is protocol 4, this side speaks 3") as caught:
        assignment_from_bytes(blob)
    assert caught.value.hint == "upgrade the older side"


def test_a_message_with_an_unknown_field_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Longer(Assignment):
        surprise: int = 1

    scalars = {f.name: getattr(ASSIGNMENT, f.name) for f in dataclasses.fields(ASSIGNMENT)}
    blob = to_bytes(Longer(**scalars)).replace(b'kind\\": \\"Longer\\"', b'kind\\":\\"Assignment')
    with pytest.raises(IncompatibleError):
        assignment_from_bytes(blob)
