import numpy as np
import pytest

from fedspine_edge.protocol import Group, Layout, Matrix, expand_members


def test_members_own_equal_consecutive_shares():
    assert expand_members(np.array([0, 2]), 3, 6).tolist() == [0, 1, 4, 5]
    assert expand_members(np.array([], dtype=int), 3, 6).tolist() == []


def test_a_layout_survives_json():
    layout = Layout(
        "b" * 64,
        (Group("layers.0.heads", "heads", 4, 1, 10),),
        (Matrix("q", 8, 4, "layers.0.heads", None),),
        (("classifier.weight", (2, 4)),),
    )
    assert Layout.from_json(layout.to_json()) == layout
    with pytest.raises(KeyError, match="9"):
        layout.group("layers.9")
