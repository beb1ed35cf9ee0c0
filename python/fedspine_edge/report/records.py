"""The files of a run directory, read and checked in full before anything is drawn from them.

In: `summary.json`, `rounds.jsonl` and, when there is an unpruned reference run, `rounds_dense.jsonl`. Out: one `Run`.
Unknown keys are ignored, so that an older report reads a newer run; a missing or impossible value is an error that
names the file, the line and the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedspine_edge.errors import CheckpointError

State = Literal["merged", "late", "dropped", "rejected", "away"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=20_000)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, protected_namespaces=())


class DeviceRecord(_Record):
    """One device in one round; losses and reward are None where the device returned nothing."""

    device_id: Text
    board: Text
    power_mode: int | Text
    pruning_ratio: Share
    rank: Count
    num_steps: Count
    reason: Text | None
    compute_seconds: Seconds
    download_seconds: Seconds
    upload_seconds: Seconds
    waiting_seconds: Seconds
    download_bytes: Count
    upload_bytes: Count
    state: State
    detail: Text | None
    loss_before: float | None
    loss_after: float | None
    num_examples: Count
    reward: float | None

    @property
    def busy_seconds(self) -> float:
        """Seconds from the start of the round until the device's update has arrived."""
        return self.download_seconds + self.compute_seconds + self.upload_seconds


class RoundRecord(_Record):
    """One synchronous round; virtual seconds count from the start of the run."""

    round_index: Count
    virtual_start_seconds: Seconds
    virtual_end_seconds: Seconds
    deadline_seconds: Seconds | None
    schedule_ratio: Share
    loss_before: float | None
    loss_after: float | None
    accuracy: Share | None
    num_merged: Count
    devices: tuple[DeviceRecord, ...]


class Spread(_Record):
    """A repeated measurement."""

    median: Finite
    min: Finite
    max: Finite


class Speed(_Record):
    """What one exported file measured on the machine of the run."""

    path: Text
    dense: bool
    quant: Text
    size_bytes: Count
    prompt_tokens_per_second: Spread
    generation_tokens_per_second: Spread
    ttft_seconds: Seconds | None
    peak_memory_bytes: Count | None


class Export(_Record):
    """One exported file and its agreement with the model in memory that it came from."""

    path: Text
    format: Text
    quant: Text
    size_bytes: Count
    max_abs_dlogit: float | None
    top1_agreement: Share | None
    mean_kl: float | None
    accuracy: Share | None
    dense: bool


class Speedup(_Record):
    """Pruned over unpruned tokens per second."""

    prompt: Finite | None
    generation: Finite | None


class Layer(_Record):
    """What is left of one layer."""

    layer: Count
    heads_kept: Count
    heads: Annotated[int, Field(ge=1)]
    ffn_kept: Count
    ffn: Annotated[int, Field(ge=1)]


class Example(_Record):
    """One held-out example, answered by the pruned model."""

    prompt: Text
    expected: Text
    answer: Text


class Transfer(_Record):
    """Bytes of the whole run, all devices."""

    down: Count
    up: Count


class Machine(_Record):
    """The machine that trained and measured."""

    cpu: Text
    cores: Count
    memory_bytes: Count


class Summary(_Record):
    """The outcome of a run; `exports`, `speed` and `llama_cli` are empty for a model without a GGUF form."""

    format: Literal[1]
    name: Text
    preset: Text | None
    model: Text
    model_parameters: Count
    data: Text
    num_examples: Count
    num_classes: Count | None
    num_held_out: Count
    num_devices: Count
    rounds: Count
    seed: int
    controller: Text
    aggregation: Text
    accuracy: Share | None
    accuracy_torch: Share | None
    accuracy_dense_tuned: Share | None
    accuracy_untuned: Share | None
    sparsity: Share
    target_sparsity: Share
    parameters_dense: Annotated[int, Field(ge=1)]
    parameters_pruned: Annotated[int, Field(ge=1)]
    virtual_seconds: Seconds
    virtual_seconds_dense: Seconds | None
    wall_seconds: Seconds
    peak_rss_bytes: Count
    adapter_sha256: Text | None
    transfer_bytes: Transfer
    exports: tuple[Export, ...] | None
    speedup: Speedup | None
    speed: tuple[Speed, ...] | None
    layers: tuple[Layer, ...]
    examples: tuple[Example, ...] | None
    llama_cli: Text | None
    machine: Machine


class Run(_Record):
    """Everything a report is drawn from.

    Attributes:
        summary: The outcome.
        rounds: The pruned run, at least one round, in order.
        dense_rounds: The unpruned reference run; empty when there was none.
    """

    summary: Summary
    rounds: tuple[RoundRecord, ...]
    dense_rounds: tuple[RoundRecord, ...]


def read_run(run_dir: Path) -> Run:
    """Returns the run in a directory.

    Raises:
        CheckpointError: A file is missing or unreadable, or a line of it is not what the format says.
    """
    dense_path = run_dir / "rounds_dense.jsonl"
    return Run(
        summary=_parse(Summary, _read(run_dir / "summary.json"), "summary.json"),
        rounds=_read_rounds(run_dir / "rounds.jsonl"),
        dense_rounds=_read_rounds(dense_path) if dense_path.exists() else (),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"expected a readable {path.name} in {path.parent}: {error.strerror}",
            hint="give the directory that a finished run has written",
        ) from error


def _read_rounds(path: Path) -> tuple[RoundRecord, ...]:
    rounds: list[RoundRecord] = []
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        record = _parse(RoundRecord, line, f"{path.name} line {number}")
        if rounds and record.round_index <= rounds[-1].round_index:
            raise CheckpointError(
                f"{path.name} line {number}: round_index {record.round_index} follows {rounds[-1].round_index}"
            )
        rounds.append(record)
    if not rounds:
        raise CheckpointError(f"{path.name} line 1: expected at least one round, found an empty file")
    return tuple(rounds)


Record = TypeVar("Record", bound=_Record)


def _parse(record_type: type[Record], blob: bytes, place: str) -> Record:
    try:
        return record_type.model_validate_json(blob)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{place}: {key + ': ' if key else ''}{first['msg'][:1].lower()}{first['msg'][1:]}",
            hint="the file was cut short or written by another version: run again with this one",
        ) from error
