"""Sensors of boards, from fixture trees: what each board shows, and that garbage is never a number or a crash."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from boards import BOARDS, plant, write
from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.profiling import clocks, thermal
from fedspine_edge.profiling.board import this_board
from fedspine_edge.profiling.energy import Energy, PowerTrace, energy_of
from fedspine_edge.profiling.power import (
    RailMeter,
    RaplMeter,
    counter_step,
    find_meter,
    hwmon_rails,
    ina3221_rails,
    why_no_meter,
)
from fedspine_edge.profiling.sysfs import found, read_count, read_int, read_text
from fedspine_edge.profiling.watch import BoardWatch

GARBAGE = ["", "NC", "-1", "0x12", "1e3", "nan", "12 34", "9" * 40, "\0\0", "ü", "1.5", "--5", "٣"]
RAIL = "/sys/bus/i2c/devices/7-0040/hwmon/hwmon3"


@pytest.mark.parametrize(
    ("board", "model", "l4t", "mode"),
    [
        ("tx2", "NVIDIA Jetson TX2 Developer Kit", "32.7.1", "MAXP_CORE_ARM"),
        ("xavier_nx", "NVIDIA Jetson Xavier NX Developer Kit", "35.4.1", "MODE_20W_6CORE"),
        ("agx_orin", "NVIDIA Jetson AGX Orin Developer Kit", "36.3.0", "MAXN"),
        ("orin_nano", "NVIDIA Jetson Orin Nano Developer Kit", "36.4.3", "7W"),
        ("rpi5", "Raspberry Pi 5 Model B Rev 1.0", None, "ondemand governor"),
        ("laptop", "LENOVO 21CB", None, "balanced"),
    ],
)
def test_a_board_says_what_it_is(tmp_path: Path, board: str, model: str, l4t: str | None, mode: str) -> None:
    facts = this_board(plant(board, tmp_path))
    assert (facts.model, facts.l4t, facts.power_mode) == (model, l4t, mode)
    assert "asimd" in facts.cpu_features or "avx2" in facts.cpu_features


@pytest.mark.parametrize(
    ("board", "source", "watts"),
    [
        ("tx2", "ina3221", 5.219),
        ("xavier_nx", "ina3221", 4.904),
        ("agx_orin", "ina3221", 3.0 + 1.0 + 4.0),
        ("orin_nano", "ina3221", 4.5),
    ],
)
def test_a_jetson_has_the_power_of_its_input_or_the_sum_of_its_rails(
    tmp_path: Path, board: str, source: str, watts: float
) -> None:
    meter = find_meter(plant(board, tmp_path))
    assert meter is not None
    assert (meter.source, meter.counts_joules) == (source, False)
    assert meter.read() == pytest.approx(watts)


def test_channels_that_are_not_connected_and_sums_of_shunts_are_no_rails(tmp_path: Path) -> None:
    assert [rail.name for rail in ina3221_rails(plant("agx_orin", tmp_path / "a"))] == [
        *("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    ]
    names = [rail.name for rail in ina3221_rails(plant("xavier_nx", tmp_path / "b"))]
    assert names == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]


def test_a_rail_that_cannot_be_read_makes_the_total_unknown_not_smaller(tmp_path: Path) -> None:
    root = plant("agx_orin", tmp_path)
    (root / "sys/bus/i2c/devices/1-0040/hwmon/hwmon3/curr2_input").unlink()
    assert RailMeter("ina3221", ina3221_rails(root)).read() is None
    assert find_meter(root) is None
    assert "cannot be read" in why_no_meter(root)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_a_rail_is_no_reading(tmp_path: Path, garbage: str) -> None:
    root = plant("xavier_nx", tmp_path)
    write(root, f"{RAIL}/curr1_input", garbage)
    assert RailMeter("ina3221", ina3221_rails(root)).read() is None


def test_a_laptop_counts_joules_of_package_and_memory_once(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    meter = find_meter(root)
    assert isinstance(meter, RaplMeter)
    assert sorted(domain.name for domain in meter.domains) == ["intel-rapl:0", "intel-rapl:0:1"]
    assert meter.read() == 0.0
    write(root, "/sys/class/powercap/intel-rapl:0/energy_uj", "3500000")
    write(root, "/sys/class/powercap/intel-rapl:0:1/energy_uj", "1000000")
    assert meter.read() == pytest.approx(2.5 + 0.5)


def test_a_full_rapl_counter_starts_again_at_zero(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    counter = "/sys/class/powercap/intel-rapl:0/energy_uj"
    write(root, counter, "262143000000")
    meter = find_meter(root)
    assert meter is not None
    meter.read()
    write(root, counter, "671149")
    # 328850 up to the maximum, one to pass it, 671149 beyond: one joule.
    assert meter.read() == pytest.approx(1.0)
    assert counter_step(9, 2, 9) == 3
    assert counter_step(2, 9, 9) == 7


def test_rapl_that_only_root_may_read_is_told(tmp_path: Path) -> None:
    root = plant("laptop", tmp_path)
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert find_meter(root) is None
    assert "only root" in why_no_meter(root)


def test_a_supply_monitor_under_hwmon_counts_but_not_a_graphics_card(tmp_path: Path) -> None:
    assert hwmon_rails(plant("laptop", tmp_path)) == ()
    write(tmp_path, "/sys/class/hwmon/hwmon6/name", "ina226")
    write(tmp_path, "/sys/class/hwmon/hwmon6/power1_input", "7250000")
    assert RailMeter("hwmon", hwmon_rails(tmp_path)).read() == pytest.approx(7.25)


def test_a_board_without_sensors_has_nothing_but_no_zero(tmp_path: Path) -> None:
    assert find_meter(tmp_path) is None
    assert why_no_meter(tmp_path).startswith("this machine shows no power sensor")
    assert thermal.hottest(tmp_path) is thermal.held_back_by(tmp_path) is clocks.cpu_clock_ratio(tmp_path) is None
    assert this_board(tmp_path).power_mode is this_board(tmp_path).model is None


@pytest.mark.parametrize(
    ("board", "celsius", "held_back", "ratio"),
    [
        ("tx2", 41.5, (), 1113600 / 2035200),
        ("xavier_nx", 92.0, ("cpufreq-cpu0",), 0.5),
        ("agx_orin", 48.812, (), 1.0),
        ("orin_nano", 51.0, (), 1.0),
        ("rpi5", 60.9, ("under-voltage",), 1.0),
        ("laptop", 55.0, (), 2.1 / 4.7),
    ],
)
def test_heat_throttling_and_clocks(
    tmp_path: Path, board: str, celsius: float, held_back: tuple[str, ...], ratio: float
) -> None:
    # A powered-down zone at -256 degrees, a power chip that always reads 100, and a running fan all mean nothing.
    root = plant(board, tmp_path)
    assert thermal.hottest(root) == pytest.approx(celsius)
    assert thermal.held_back_by(root) == held_back
    assert clocks.cpu_clock_ratio(root) == pytest.approx(ratio)


def test_throttle_bits_of_now_and_of_the_past() -> None:
    assert thermal.raspberry_words(0x50001) == (
        "under-voltage",
        "under-voltage since boot",
        "throttled since boot",
    )
    assert thermal.raspberry_words(0x50008, past=False) == ("soft temperature limit",)
    assert thermal.raspberry_words(0) == ()


def test_devices_beside_the_cpu_have_clocks(tmp_path: Path) -> None:
    (clock,) = clocks.device_clocks(plant("tx2", tmp_path))
    assert (clock.name, clock.current_hertz, clock.maximum_hertz) == ("17000000.gp10b", 114750000, 1300500000)


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("garbage", ["", "NC", "-12", "\0", "9" * 30, "pmode:x", "# R (release)"])
def test_no_garbage_in_any_file_crashes_a_reader(tmp_path: Path, board: str, garbage: str) -> None:
    root = plant(board, tmp_path)
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        file.write_text(garbage)
    meter = find_meter(root)
    assert meter is None or meter.read() is not None
    this_board(root), thermal.coolers(root), clocks.device_clocks(root), thermal.raspberry_bits(root)
    celsius, ratio = thermal.hottest(root), clocks.cpu_clock_ratio(root)
    assert celsius is None or -55 < celsius < 150
    assert ratio is None or 0 < ratio <= 1


@pytest.mark.parametrize("board", BOARDS)
def test_a_directory_where_a_file_is_expected_crashes_no_reader(tmp_path: Path, board: str) -> None:
    root = plant(board, tmp_path)
    for file in [path for path in root.rglob("*") if path.is_file()]:
        file.unlink()
        file.mkdir()
    assert find_meter(root) is None
    assert thermal.hottest(root) is clocks.cpu_clock_ratio(root) is this_board(root).model is None


def test_numbers_are_whole_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "value"
    for garbage in [*GARBAGE, "-7"]:
        file.write_text(garbage)
        assert read_count(file) is None, garbage
    file.write_text(" -7\n")
    assert read_int(file) == -7
    file.write_text("12\0\n")
    assert (read_text(file), read_count(file)) == ("12", 12)
    assert read_text(tmp_path / "nothing") is None


@given(st.text(max_size=30))
def test_any_text_is_a_number_or_none(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("any") / "value"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    value = read_count(file)
    assert value is None or (value >= 0 and text.strip("\0 \t\r\n").isdecimal())


def test_zone_ten_comes_after_zone_two(tmp_path: Path) -> None:
    names = [path.name for path in found(plant("laptop", tmp_path), "sys/class/thermal/thermal_zone*")]
    assert names == ["thermal_zone2", "thermal_zone10"]


def test_a_trace_has_the_energy_of_the_analytic_integral() -> None:
    # P = 5 + 2 sin(2 pi t / 3) watts, read every 50 ms and a bit, from 0.333 to 7.777 s.
    trace = PowerTrace(counts_joules=False)
    for step in range(200):
        seconds = 0.0497 * step
        trace.add(seconds, 5 + 2 * math.sin(2 * math.pi * seconds / 3))
    start, end, rate = 0.333, 7.777, 2 * math.pi / 3
    exact = 5 * (end - start) - 2 / rate * (math.cos(rate * end) - math.cos(rate * start))
    assert trace.joules(start, end) == pytest.approx(exact, rel=1e-3)
    assert trace.watts(start, end) == pytest.approx(exact / (end - start), rel=1e-3)


def test_a_counter_s_energy_is_its_difference() -> None:
    trace = PowerTrace(counts_joules=True)
    for seconds, joules in ((0.0, 0.0), (0.5, 10.0), (1.0, 14.0)):
        trace.add(seconds, joules)
    assert trace.joules(0.25, 0.75) == pytest.approx(12.0 - 5.0)


@pytest.mark.parametrize("window", [(-0.1, 0.5), (0.5, 9.0), (0.5, 3.0)])
def test_a_stretch_that_the_samples_do_not_cover_has_no_energy(window: tuple[float, float]) -> None:
    trace = PowerTrace(counts_joules=False)
    for seconds in (0.0, 0.5, 1.0, 2.5, 3.0):
        trace.add(seconds, 5.0)
    trace.add(1.7, None)
    assert trace.joules(*window) is None
    assert trace.joules(0.2, 0.9) == pytest.approx(3.5)
    assert energy_of(trace, [(0.2, 0.9), window], 1.0).joules is None


def test_the_idle_draw_is_taken_off_but_not_below_nothing() -> None:
    assert Energy(joules=30.0, idle_watts=2.0, seconds=10.0).net_joules == 10.0
    assert Energy(joules=30.0, idle_watts=2.0, seconds=10.0).watts == 3.0
    assert Energy(joules=30.0, idle_watts=9.0, seconds=10.0).net_joules == 0.0
    assert Energy(joules=30.0, idle_watts=None, seconds=10.0).net_joules is None
    assert energy_of(None, [(0.0, 1.0)], None) == Energy(None, None, 1.0)


def test_a_watch_sees_what_happened_within_its_windows(tmp_path: Path) -> None:
    root, now = plant("xavier_nx", tmp_path), 0.0
    watch = BoardWatch(find_meter(root), root=root, clock=lambda: now)
    watch.sample()
    now = 0.5
    write(root, "/sys/class/thermal/thermal_zone0/temp", "60000")
    write(root, "/sys/class/thermal/cooling_device0/cur_state", "0")
    write(root, "/sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1900000")
    write(root, f"{RAIL}/curr1_input", "2000")
    watch.sample()
    assert watch.trace is not None
    assert watch.trace.joules(0.0, 0.5) == pytest.approx(0.5 * (4.904 + 9.808) / 2)
    late, both = watch.seen([(0.4, 0.6)]), watch.seen([(0.0, 0.6)])
    assert (late.celsius_max, late.held_back, late.clock_kept) == (60.0, (), 1.0)
    assert (both.celsius_max, both.held_back, both.clock_kept) == (92.0, ("cpufreq-cpu0",), 0.5)
    assert watch.seen([(2.0, 3.0)]).celsius_max is None
