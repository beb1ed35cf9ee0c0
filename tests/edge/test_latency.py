"""Speeds of GGUF files: samples, spreads and ratios; no assertion depends on how fast the machine is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from export_models import PER_LAYER, save_decoder

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.export.gguf import write_gguf
from fedspine_edge.profiling.latency import Speed, Spread, compare_speed, speed_ratios, spread


def speed(name: str, prompt: tuple[float, ...], generate: tuple[float, ...], size: int, peak: int | None) -> Speed:
    return Speed(
        path=Path(name),
        model_type="llama",
        size_bytes=size,
        num_parameters=1,
        num_threads=1,
        num_prompt=100,
        num_generate=10,
        prompt_tokens_per_second=prompt,
        generate_tokens_per_second=generate,
        ttft_seconds=tuple(100 / rate for rate in prompt),
        itl_seconds=(0.1, 0.1, 0.1),
        peak_memory_bytes=peak,
        base_memory_bytes=None if peak is None else 20,
        pss_bytes=None,
        cpu_share=1.0,
    )


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratios_pair_neighbours_in_time() -> None:
    # The machine halves its speed in the second repetition: the ratio does not notice.
    dense = speed("dense", (100.0, 50.0, 100.0), (10.0, 5.0, 10.0), size=300, peak=220)
    pruned = speed("pruned", (150.0, 75.0, 150.0), (12.0, 6.0, 12.0), size=200, peak=120)
    itself, ratio = speed_ratios([dense, pruned])
    assert itself.prompt == itself.generate == Spread(1.0, 1.0, 1.0)
    assert ratio.prompt == ratio.ttft == Spread(1.5, 1.5, 1.5)
    assert ratio.generate == Spread(1.2, 1.2, 1.2)
    assert (ratio.size, ratio.memory) == (1.5, 2.0)


def test_memory_that_was_not_measured_has_no_ratio() -> None:
    dense = speed("dense", (1.0,), (1.0,), size=1, peak=None)
    assert speed_ratios([dense])[0].memory is None


@pytest.mark.parametrize("counts", [{"num_prompt": 0}, {"num_generate": 0}, {"repetitions": 0}])
def test_counts_start_at_one(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected counts of at least 1"):
        compare_speed([], num_threads=1, **counts)


@pytest.mark.parametrize(("clock", "num_threads"), [("cpu", 2), ("sun", 1)])
def test_a_clock_that_does_not_suit_is_refused(clock: str, num_threads: int) -> None:
    with pytest.raises(ValueError, match="expected clock wall, or cpu with 1 thread"):
        compare_speed([], num_threads=num_threads, clock=clock)


@pytest.mark.slow
@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_two_files_are_measured_side_by_side(tmp_path: Path, clock: str) -> None:
    paths = []
    for name, widths in (("dense", ((2, 96),) * 3), ("pruned", PER_LAYER)):
        folder = save_decoder(tmp_path / name, "llama", widths)
        paths.append(write_gguf(folder, tmp_path / f"{name}.gguf", quantization="F16", name=name).path)
    speeds = compare_speed(paths, num_prompt=33, num_generate=7, repetitions=3, num_threads=1, clock=clock)
    assert [each.path for each in speeds] == paths
    for each, path in zip(speeds, paths, strict=True):
        assert len(each.prompt_tokens_per_second) == len(each.generate_tokens_per_second) == 3
        assert each.ttft_seconds[0] == pytest.approx(33 / each.prompt_tokens_per_second[0])
        assert each.size_bytes == path.stat().st_size
        assert 0.0 < each.cpu_share <= 1.0
        assert each.itl_seconds[0] <= each.itl_seconds[1] <= each.itl_seconds[2]
        assert each.peak_memory_bytes is not None
        assert each.base_memory_bytes is not None
        assert each.peak_memory_bytes >= each.base_memory_bytes
    assert speeds[1].num_parameters < speeds[0].num_parameters
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    assert not children.exists() or children.read_text().split() == []


@pytest.mark.slow
def test_a_file_that_does_not_load_is_named(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"noise" * 100)
    with pytest.raises(IncompatibleError, match=r"found noise\.gguf"):
        compare_speed([path], num_threads=1)
