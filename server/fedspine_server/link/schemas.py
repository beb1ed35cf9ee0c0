"""What may be said over the link, checked field by field: the source of the published OpenAPI document.

Comes in: JSON from outside. Goes out: typed, bounded values; anything else is answered with 422 before it is used.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, StringConstraints, model_validator

LINK_OLDEST, LINK_NEWEST = 1, 1
"""Versions of the link this server speaks; it keeps the two before its newest."""

MAX_COUNT = 1 << 53
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
TASK_ID = r"^[0-9a-f]{32}$"
HASH = r"^[0-9a-f]{64}$"
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"

Name = Annotated[str, StringConstraints(pattern=NAME)]
Sha256 = Annotated[str, StringConstraints(pattern=HASH)]
TaskId = Annotated[str, StringConstraints(pattern=TASK_ID)]
Words = Annotated[str, StringConstraints(max_length=500, pattern=PRINTABLE)]
Secret = Annotated[str, StringConstraints(min_length=43, max_length=128, pattern=r"^[A-Za-z0-9_-]+$")]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Message(BaseModel):
    """What all messages share: no field that is not known."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Facts(Message):
    """What a board says of itself; empty or null where it does not tell."""

    board: Words | None = None
    l4t: Words | None = None
    power_mode: Words | None = None
    cpu: Words = ""
    cpu_features: Annotated[list[Words], Field(max_length=64)] = []
    cores: Count = 0
    memory_bytes: Count = 0
    disk_free_bytes: Count = 0
    power_source: Words | None = None
    machine: Words = ""
    kernel: Words = ""
    python: Words = ""
    version: Words = ""
    image_release: Count | None = None
    image_slot: Words | None = None


class Sample(Message):
    """What the board's sensors say now; null where there is none or it cannot be read."""

    temperature_celsius: Number | None = None
    power_watts: Number | None = None
    energy_joules: Number | None = None
    power_mode: Words | None = None
    clock_ratio: Number | None = None
    throttled_by: Annotated[list[Words], Field(max_length=32)] | None = None
    memory_available_bytes: Count | None = None
    worker_rss_bytes: Count | None = None
    disk_free_bytes: Count | None = None


class Enrollment(Message):
    """A device that wants in, with a secret it made itself, so that asking twice changes nothing."""

    claim: Annotated[str, StringConstraints(max_length=128, pattern=PRINTABLE)]
    device_id: Name
    secret: Secret
    facts: Facts = Facts()


class Enrolled(Message):
    """Where the device stands: it may work once its status is `accepted`."""

    device_id: str
    status: str


class TaskInHand(Message):
    """A task that a device began before it was interrupted."""

    task_id: TaskId
    attempt: Count


class Hello(Message):
    """A device that begins (again): its boot owns the device's identity from now on."""

    boot_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    link_oldest: Count
    link_newest: Count
    facts: Facts
    num_examples: Count
    memory_bytes: Count
    base_sha256: Sha256
    task: TaskInHand | None = None


class Welcome(Message):
    """The server's answer: what both speak, and what becomes of the task in hand."""

    link_version: int
    status: str
    wait_seconds: float
    progress_seconds: float
    task: Literal["continue", "drop"] | None = None


class Recipe(Message):
    """How examples become what the model sees; the same on every device of a run."""

    classes: Annotated[list[Words], Field(min_length=2, max_length=10_000)]
    prompt: Annotated[str, StringConstraints(max_length=10_000)] | None = None


class BlobRef(Message):
    """A zstd frame of `message_bytes` bytes once unpacked: here, in base64, when it is small, else a blob to fetch."""

    sha256: Sha256
    num_bytes: int
    message_bytes: int
    content: str | None = None


class Task(Message):
    """One assignment: what is the device's own here, the rest in a blob that devices share.

    An update of at most `inline_bytes` may come within its result, without an upload.
    """

    task_id: TaskId
    attempt: int
    run_id: str
    round_index: int
    device_id: str
    pruning_ratio: float
    rank: int
    num_steps: int
    seed: int
    budget_seconds: float | None
    min_steps: int
    base_sha256: Sha256
    recipe: Recipe
    blob: BlobRef
    lease_seconds: float
    deadline_seconds: float | None
    chunk_bytes: int
    inline_bytes: int
    max_update_bytes: int


class Progress(Message):
    """How far a device is; renews its lease."""

    attempt: Count
    step: Count = 0
    num_steps: Count = 0
    loss: Number | None = None
    tokens_per_second: Number | None = None
    paused: Words | None = None
    sample: Sample = Sample()


class ProgressReply(Message):
    """Whether to go on."""

    cancel: bool
    detail: Words = ""
    lease_seconds: float


class TaskResult(Message):
    """The end of a task: its update, in base64 or uploaded before, or the reason why there is none."""

    attempt: Count
    sha256: Sha256 | None = None
    num_bytes: Count = 0
    content: Base64Bytes | None = None
    download_seconds: Seconds = 0.0
    upload_seconds: Seconds = 0.0
    failure: Words | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TaskResult:
        if (self.sha256 is None) == (self.failure is None):
            raise ValueError("expected either sha256 or failure")
        if self.content is not None and self._announced() != (self.sha256, self.num_bytes):
            raise ValueError("expected content of the announced hash and length")
        return self

    def _announced(self) -> tuple[str, int]:
        assert self.content is not None
        return hashlib.sha256(self.content).hexdigest(), len(self.content)


class ResultReply(Message):
    """What became of it: `kept`, `late`, `refused` or `failed`; final, and the same when asked again."""

    fate: str
    detail: str | None = None


class Health(Message):
    """That the server is there, what it speaks, and the CA to pin once its fingerprint is checked."""

    status: Literal["ok"] = "ok"
    link_oldest: int = LINK_OLDEST
    link_newest: int = LINK_NEWEST
    ca: str = ""
