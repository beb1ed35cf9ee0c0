"""What operator and devices say of models and rollouts, checked field by field.

Comes in: JSON from outside. Goes out: typed, bounded values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from fedspine_server.link.schemas import PRINTABLE, Count, Message, Name, Sha256, Words

MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}$"
MAX_MODEL_BYTES = 1 << 40
MAX_ROLLOUT = 1 << 53
MOST_PASSAGE = 32_768
DONE = r"^(none|[0-9]{1,16}:(install|restore))$"

ModelName = Annotated[str, StringConstraints(pattern=MODEL_NAME)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


class UploadView(Message):
    """How much of a model file is there: go on with chunk `num_chunks`, each of `chunk_bytes` but the last."""

    complete: bool
    num_chunks: int
    chunk_bytes: int


class ModelRequest(Message):
    """The end of an upload: its chunks become a model that can be rolled out."""

    name: ModelName
    num_bytes: Annotated[int, Field(ge=24, le=MAX_MODEL_BYTES)]


class ModelView(Message):
    """A model that can be rolled out."""

    sha256: str
    name: str
    num_bytes: int
    added_at: float


class RolloutRequest(Message):
    """A rollout to begin.

    Attributes:
        model_sha256: A model that was uploaded.
        gate: What must hold on a device; see `rollout_gate`.
        num_canaries: How many devices go first, chosen by the server.
        canaries: Or which.
        devices: Whom it is for; null for every device, those that join later too.
        passage: Text whose perplexity devices measure; empty for the built-in one.
        replace: Whether it may take the place of one that is under way.
    """

    model_sha256: Sha256
    gate: Annotated[str, StringConstraints(max_length=400, pattern=PRINTABLE)] = ""
    num_canaries: Annotated[int, Field(ge=1, le=100_000)] = 1
    canaries: Annotated[list[Name], Field(min_length=1, max_length=100_000)] | None = None
    devices: Annotated[list[Name], Field(min_length=1, max_length=100_000)] | None = None
    passage: Annotated[str, StringConstraints(max_length=MOST_PASSAGE, pattern=r"^[^\x00]*$")] = ""
    replace: bool = False


class Figures(Message):
    """What a model does on a board; null where it was not measured."""

    ppl: Positive | None = None
    tokens_per_second: Positive | None = None
    prompt_tokens_per_second: Positive | None = None
    peak_memory_bytes: Count | None = None


class RolloutReport(Message):
    """Where a device is with a rollout; it decides by itself whether it keeps the model, and says why not.

    Attributes:
        state: What it does or did.
        sha256: The rollout's model.
        current: The model it now serves; null for none.
        received_bytes: Bytes of the model that are there, while it downloads.
        figures: What the model does on this board.
        base: What the model before it does.
        reason: Why it failed.
    """

    state: Literal["downloading", "installed", "checking", "committed", "failed", "rolled_back"]
    sha256: Sha256
    current: Sha256 | None = None
    received_bytes: Count = 0
    figures: Figures | None = None
    base: Figures | None = None
    reason: Words = ""

    @model_validator(mode="after")
    def _whole(self) -> RolloutReport:
        if self.state == "committed" and (self.figures is None or self.current != self.sha256):
            raise ValueError("expected figures of a committed model, and that it is served")
        if self.state == "failed" and not self.reason:
            raise ValueError("expected why it failed")
        return self


class RolloutReply(Message):
    """Whether the device is to go on with this rollout."""

    go_on: bool
    detail: Words = ""


class ModelOrder(Message):
    """The model of a rollout: a blob to fetch."""

    sha256: Sha256
    num_bytes: int
    name: str


class RolloutOrder(Message):
    """What a device is to do: `install` a model if it meets the gate, or `restore` the one before it."""

    rollout_id: int
    kind: Literal["install", "restore"]
    model: ModelOrder
    gate: list[dict[str, Any]]
    passage: str


class OrderReply(Message):
    """What comes instead of a task while a rollout asks something of the device."""

    rollout: RolloutOrder


class RolloutDevice(Message):
    """One device in a rollout, as the operator sees it."""

    device_id: str
    canary: bool
    state: str
    reason: str
    received_bytes: int
    figures: dict[str, Any] | None
    base: dict[str, Any] | None
    reported_at: float | None
    last_seen_seconds: float


class RolloutView(Message):
    """A rollout, as the operator sees it."""

    rollout_id: int
    status: str
    detail: str
    model: ModelOrder
    gate: str
    own_passage: bool
    canaries: list[str]
    for_devices: list[str] | None
    created_at: float
    counts: dict[str, int]
    devices: list[RolloutDevice]
