"""An assignment as a task that a device can fetch: its row, its message, and how large the answer may be.

Comes in: an assignment. Goes out: a row, not yet committed, and a blob that devices with equal arrays share.
"""

from __future__ import annotations

import dataclasses
import math
import uuid

from fedspine_edge.protocol import Assignment, Layout, head_linear
from fedspine_edge.wire_format import pack, to_bytes
from fedspine_server.link.hub import Hub
from fedspine_server.link.tables import OFFERED, RunRow, TaskRow
from fedspine_server.state import RunState

TENSOR_HEADER_BYTES = 256
MESSAGE_HEADER_BYTES = 64 << 10


def offer(
    hub: Hub, run: RunRow, state: RunState, assignment: Assignment, packed: dict[bytes, tuple[str, int]]
) -> TaskRow:
    """Returns the task that offers an assignment to its device; its message is kept as a blob.

    Args:
        hub: Where blobs are kept.
        run: The run.
        state: Its state with this round's choices.
        assignment: What the device is asked.
        packed: Message -> hash and size of its blob, filled as messages are packed: equal ones are packed once.
    """
    message = to_bytes(shared(assignment))
    if message not in packed:
        frame = pack(message)
        packed[message] = (hub.blobs.put(frame), len(frame))
    sha256, num_bytes = packed[message]
    return TaskRow(
        task_id=uuid.uuid4().hex,
        run_id=run.run_id,
        round_index=run.round_index,
        device_id=assignment.device_id,
        status=OFFERED,
        attempt=0,
        spec={
            "pruning_ratio": assignment.pruning_ratio,
            "rank": assignment.rank,
            "num_steps": assignment.num_steps,
            "seed": assignment.seed,
            "budget_seconds": assignment.budget_seconds,
            "min_steps": assignment.min_steps,
            "deadline_seconds": task_deadline_seconds(state, assignment.device_id),
            "message_bytes": len(message),
        },
        blob_sha256=sha256,
        blob_bytes=num_bytes,
        max_update_bytes=max_update_bytes(state.layout, assignment.rank),
        created_at=hub.clock(),
        lease_until=None,
    )


def task_deadline_seconds(state: RunState, device_id: str) -> float | None:
    """Returns how long after its opening a round waits for a device, None when it waits for all."""
    deadline = state.open_choices[device_id].deadline_seconds
    return None if deadline is None else deadline * state.settings.deadline_slack


def shared(assignment: Assignment) -> Assignment:
    """Returns an assignment without what is one device's own, so that devices with equal arrays share one blob."""
    return dataclasses.replace(
        assignment, device_id="", pruning_ratio=0.0, num_steps=1, seed=0, budget_seconds=None, min_steps=1
    )


def max_update_bytes(layout: Layout, rank: int) -> int:
    """Returns the size of the largest update a layout allows at a rank."""
    arrays = sum(2 * rank * (m.in_features + m.out_features) + 2 * m.in_features for m in layout.matrices)
    arrays += sum(6 * group.num_members for group in layout.groups)
    arrays += sum(4 * math.prod(shape) for _, shape in layout.task_head)
    head = head_linear(layout)
    if head is not None:  # what an opening's answer has instead
        sums = 2 * head.num_classes * head.width + head.width * (head.width + 1) + 4 * head.num_classes
        arrays = max(arrays, sums)
    num_arrays = 3 * len(layout.matrices) + 2 * len(layout.groups) + len(layout.task_head)
    return arrays + TENSOR_HEADER_BYTES * num_arrays + MESSAGE_HEADER_BYTES
