"""What is left of each layer, as cells of a heat map.

Comes in: a coordinator's state. Goes out: one `Group` a layer and kind. A head is a cell; channels are drawn in at most
`MOST_CELLS` cells of equal numbers.
"""

from __future__ import annotations

import numpy as np

from fedspine_server.page.views import Group
from fedspine_server.state import RunState

MOST_CELLS = 64


def groups_of(state: RunState) -> tuple[Group, ...]:
    """Returns for each group the share of devices that keep each of its members; empty before anybody answered."""
    devices = [device for device in state.devices.values() if device.kept]
    if not devices:
        return ()
    found = []
    for group in state.layout.groups:
        kept = np.zeros(group.num_members)
        for device in devices:
            kept[device.kept[group.name]] += 1.0 / len(devices)
        cells = np.array_split(kept, min(MOST_CELLS, group.num_members))
        layer = next((int(part) for part in group.name.split(".") if part.isdigit()), 0)
        shares = tuple(round(float(cell.mean()), 3) for cell in cells)
        found.append(Group(layer, group.kind, group.num_members, float(kept.mean()), shares))
    return tuple(sorted(found, key=lambda group: (group.kind != "heads", group.layer)))
