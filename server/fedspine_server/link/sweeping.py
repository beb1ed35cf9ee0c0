"""What nobody needs any more is removed from the disk: messages of rounds that are over, states of earlier rounds.

Comes in: the tables. Goes out: a smaller blob directory. What is young stays, for a blob is written before the
transaction that names it.
"""

from __future__ import annotations

from sqlalchemy import and_, or_, select

from fedspine_server.link.hub import Hub
from fedspine_server.link.tables import LATE, LEASED, OFFERED, STOPPED, ModelRow, ResultRow, RunRow, TaskRow


def sweep(hub: Hub) -> int:
    """Removes unneeded blobs; returns how many."""
    with hub.database.read() as session:
        wanted = set(session.scalars(select(RunRow.state_sha256)))
        wanted |= set(session.scalars(select(TaskRow.blob_sha256).where(TaskRow.status.in_((OFFERED, LEASED)))))
        wanted |= set(session.scalars(select(ModelRow.sha256)))
        late = (ResultRow.fate == LATE, ResultRow.closed_with.is_(None))
        asked = select(TaskRow.blob_sha256).join(ResultRow, ResultRow.task_id == TaskRow.task_id).where(*late)
        wanted |= set(session.scalars(asked))
        unmerged = or_(ResultRow.round_index >= RunRow.round_index - 1, and_(*late))
        kept = select(ResultRow.blob_sha256).join(RunRow, RunRow.run_id == ResultRow.run_id).where(unmerged)
        wanted |= {sha256 for sha256 in session.scalars(kept) if sha256 is not None}
        paused = select(TaskRow.blob_sha256).join(RunRow, RunRow.run_id == TaskRow.run_id)
        resumable = (RunRow.status == STOPPED, TaskRow.round_index == RunRow.round_index)
        wanted |= set(session.scalars(paused.where(*resumable)))
    return hub.blobs.sweep(wanted, older_than_seconds=hub.settings.sweep_seconds)
