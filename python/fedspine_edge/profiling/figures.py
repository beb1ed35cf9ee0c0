"""A row's figures by name: what JSON, CSV and the gates know, with llama-bench's names where it has one.

Comes in: a `Row`. Goes out: plain values; what was not measured is None.

Source: llama.cpp's tools/llama-bench, fields of its JSON.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedspine_edge.hardware import Machine
from fedspine_edge.profiling.bench import Row
from fedspine_edge.profiling.board import Board
from fedspine_edge.profiling.intervals import Estimate, percentile_interval, speed_interval
from fedspine_edge.profiling.runtimes import LLAMA_BENCH_NAMES

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
GATE_FIGURES = (
    *("pp_ts", "tg_ts", "pg_ts"),
    *("ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p95_ms", "itl_p99_ms"),
    *("rss_peak_mib", "pss_peak_mib", "anonymous_peak_mib", "size_mib"),
    *("energy_j_per_token", "energy_net_j_per_token", "power_avg_w", "temp_max_c", "freq_min_ratio"),
)
"""What `gate_figures` returns and `--fail-if` may name."""

MEBIBYTE = 1 << 20
_PACKAGES = {"llama.cpp": "llama-cpp-python", "onnxruntime": "onnxruntime", "torch": "torch"}


def record(row: Row, board: Board, machine: Machine, *, energy_source: str) -> dict[str, Any]:
    """Returns a row as a JSON document.

    Args:
        row: What was measured.
        board: Facts of the board.
        machine: Facts of its CPU and memory.
        energy_source: `ina3221`, `rapl`, `hwmon` or `none`.
    """
    return {
        **_what(row, machine),
        **_speed(row),
        **_memory(row),
        **_energy(row, energy_source),
        **_conditions(row, board),
    }


def gate_figures(row: Row) -> dict[str, float | None]:
    """Returns the figures that a gate may name; None for what this row does not have or nothing measured."""
    ttft, itl = percentiles(row.ttft_seconds), percentiles(row.itl_seconds)
    speed = statistics.fmean(row.tokens_per_second)
    peak = row.memory.peak
    both = row.test.num_prompt and row.test.num_generate
    return {
        "pp_ts": speed if row.test.num_prompt and not both else None,
        "tg_ts": speed if row.test.num_generate and not both else None,
        "pg_ts": speed if both else None,
        **{f"ttft_{name}_ms": _thousandfold(found) for name, found in ttft.items()},
        **{f"itl_{name}_ms": _thousandfold(found) for name, found in itl.items()},
        "rss_peak_mib": _mebibytes(peak.rss_bytes),
        "pss_peak_mib": _mebibytes(peak.pss_bytes),
        "anonymous_peak_mib": _mebibytes(peak.anonymous_bytes),
        "size_mib": _mebibytes(row.child.facts.model_bytes),
        "energy_j_per_token": row.joules_per_token,
        "energy_net_j_per_token": row.net_joules_per_token,
        "power_avg_w": row.energy.watts,
        "temp_max_c": row.seen.celsius_max,
        "freq_min_ratio": row.seen.clock_ratio_min,
    }


def percentiles(samples: Sequence[float]) -> dict[str, Estimate | None]:
    """Returns the three percentiles with their intervals, None each without samples."""
    return {name: percentile_interval(samples, share) if samples else None for name, share in PERCENTILES.items()}


def backend_version(backend: str) -> str | None:
    """Returns the version of a backend's package; None where it cannot be told."""
    try:
        return importlib.metadata.version(_PACKAGES[backend])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None


def model_bytes_on_disk(path: Path) -> int:
    """Returns the size of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _what(row: Row, machine: Machine) -> dict[str, Any]:
    backend, facts = row.child.backend, row.child.facts
    return {
        "backends": LLAMA_BENCH_NAMES.get(backend, backend),
        "runtime": backend,
        "runtime_version": backend_version(backend),
        "cpu_info": machine.cpu,
        "model_filename": str(row.path),
        "model_type": facts.model_type,
        "model_size": facts.model_bytes,
        "model_n_params": facts.num_parameters,
        "file_size": model_bytes_on_disk(row.path),
        "n_batch": row.options.num_batch,
        "n_threads": row.options.num_threads,
        "n_prompt": row.test.num_prompt,
        "n_gen": row.test.num_generate,
        "test": row.test.name,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(row.test_time)),
        "warm_up_runs": row.warm_ups,
    }


def _speed(row: Row) -> dict[str, Any]:
    nanoseconds, rates = [round(1e9 * seconds) for seconds in row.seconds], row.tokens_per_second
    mean = speed_interval(rates)
    return {
        "avg_ns": round(statistics.fmean(nanoseconds)),
        "stddev_ns": round(_deviation(nanoseconds)),
        "avg_ts": mean.value,
        "stddev_ts": _deviation(rates),
        "avg_ts_low": mean.low,
        "avg_ts_high": mean.high,
        "samples_ns": nanoseconds,
        "samples_ts": list(rates),
        "ttft_ns": _nanosecond_percentiles(row.ttft_seconds),
        "itl_ns": _nanosecond_percentiles(row.itl_seconds),
    }


def _memory(row: Row) -> dict[str, Any]:
    peak, phases = row.memory.peak, row.memory
    return {
        "rss_peak_bytes": peak.rss_bytes,
        "pss_peak_bytes": peak.pss_bytes,
        "anonymous_peak_bytes": peak.anonymous_bytes,
        "memory": {
            "base": phases.base._asdict(),
            "load": phases.load._asdict(),
            "prompt": phases.prompt._asdict(),
            "generation": phases.generation._asdict(),
        },
    }


def _energy(row: Row, source: str) -> dict[str, Any]:
    phase = "prefill" if not row.test.num_generate else "decode" if not row.test.num_prompt else "both"
    return {
        "energy_source": source,
        "energy_phase": phase,
        "energy_j": row.energy.joules,
        "energy_net_j": row.energy.net_joules,
        "energy_j_per_token": row.joules_per_token,
        "energy_net_j_per_token": row.net_joules_per_token,
        "power_avg_w": row.energy.watts,
        "power_idle_w": row.energy.idle_watts,
    }


def _conditions(row: Row, board: Board) -> dict[str, Any]:
    held, reasons = row.seen.held_back, row.quiet.reasons()
    return {
        "trusted": not reasons,
        "noise": list(reasons),
        "others_cores": row.quiet.others_cores,
        "steal_share": row.quiet.steal_share,
        "freq_min_ratio": row.seen.clock_ratio_min,
        "temp_max_c": row.seen.celsius_max,
        "throttled": None if held is None else bool(held),
        "throttled_by": None if held is None else list(held),
        "power_mode": board.power_mode,
        "board": board.model,
        "l4t": board.l4t,
    }


def _nanosecond_percentiles(samples: Sequence[float]) -> dict[str, int | None]:
    values: dict[str, int | None] = {}
    for name, found in percentiles([1e9 * seconds for seconds in samples]).items():
        for suffix, value in zip(("", "_low", "_high"), found or (None, None, None), strict=True):
            values[name + suffix] = None if value is None else round(value)
    return values


def _deviation(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def _thousandfold(found: Estimate | None) -> float | None:
    return None if found is None else 1e3 * found.value


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / MEBIBYTE
