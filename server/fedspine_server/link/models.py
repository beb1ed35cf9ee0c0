"""Model files that can be rolled out: sent in chunks by the operator, kept as blobs, forgotten when he says so.

Comes in: chunks and a hash. Goes out: rows, each naming a whole blob that begins as a GGUF file does. What stands in it
is judged on the devices, where it must run.
"""

from __future__ import annotations

import hashlib

from fastapi import HTTPException
from sqlalchemy import select

from fedspine_edge.errors import IncompatibleError
from fedspine_server.link.hub import Hub
from fedspine_server.link.rollout_schemas import MAX_MODEL_BYTES, ModelRequest, ModelView, UploadView
from fedspine_server.link.tables import ModelRow, RolloutRow

GGUF_MAGIC = b"GGUF"


def upload_of(sha256: str) -> str:
    """Returns what a model's upload is called."""
    return f"model.{sha256}"


def upload_view(hub: Hub, sha256: str) -> UploadView:
    """Returns how much of a model is there."""
    with hub.database.read() as session:
        row = session.get(ModelRow, sha256)
    return UploadView(
        complete=row is not None and hub.blobs.is_whole(sha256, row.num_bytes),
        num_chunks=hub.blobs.num_chunks(upload_of(sha256)),
        chunk_bytes=hub.settings.chunk_bytes,
    )


def put_chunk(hub: Hub, sha256: str, index: int, content: bytes, chunk_sha256: str) -> None:
    """Keeps one chunk of a model.

    Raises:
        HTTPException: 413 for one that is too large, 422 for one that is not what was announced.
    """
    if len(content) > hub.settings.chunk_bytes or index * hub.settings.chunk_bytes >= MAX_MODEL_BYTES:
        raise HTTPException(413, f"expected chunks of at most {hub.settings.chunk_bytes} bytes")
    if hashlib.sha256(content).hexdigest() != chunk_sha256:
        raise HTTPException(422, "expected a chunk of the announced hash: send it again")
    hub.blobs.put_chunk(upload_of(sha256), index, content)


def add(hub: Hub, sha256: str, message: ModelRequest) -> ModelView:
    """Makes a model of what was sent; one that is there already only gets the new name.

    Raises:
        HTTPException: 425 for an upload that is not what was announced, 422 for bytes that are no GGUF file.
    """
    try:
        hub.blobs.finish_upload(upload_of(sha256), sha256, message.num_bytes)
    except IncompatibleError as error:
        raise HTTPException(425, f"{error}: send the model again") from error
    with hub.blobs.path(sha256).open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise HTTPException(422, f"expected a GGUF file, found another content in {message.name}")
    with hub.database.write() as session:
        row = session.get(ModelRow, sha256)
        if row is None:
            row = ModelRow(sha256=sha256, name=message.name, num_bytes=message.num_bytes, added_at=hub.clock())
            session.add(row)
            hub.record(session, "model_added", name=message.name, num_bytes=message.num_bytes, sha256=sha256)
        row.name = message.name
        return _view(row)


def views(hub: Hub) -> list[ModelView]:
    """Returns every model, newest first."""
    with hub.database.read() as session:
        return [_view(row) for row in session.scalars(select(ModelRow).order_by(ModelRow.added_at.desc()))]


def forget(hub: Hub, sha256: str) -> None:
    """Forgets a model; its bytes go at the next sweep.

    Raises:
        HTTPException: 404 for an unknown one, 409 for the one that devices are to have now.
    """
    with hub.database.write() as session:
        row = session.get(ModelRow, sha256)
        if row is None:
            raise HTTPException(404, f"expected a model, found none of hash {sha256[:12]}")
        newest = session.scalars(select(RolloutRow).order_by(RolloutRow.rollout_id.desc()).limit(1)).first()
        if newest is not None and newest.model_sha256 == sha256:
            raise HTTPException(409, f"model {row.name} is the one of rollout {newest.rollout_id}: begin another first")
        session.delete(row)
        hub.record(session, "model_forgotten", name=row.name, sha256=sha256)


def _view(row: ModelRow) -> ModelView:
    return ModelView(sha256=row.sha256, name=row.name, num_bytes=row.num_bytes, added_at=row.added_at)
