"""What the board draws: INA3221 rails of Jetsons, RAPL counters of PCs, power monitors under hwmon.

Comes in: a sysfs ROOT. Goes out: one meter, the best there is, whose `read` gives watts or joules. What cannot be read
is None, never 0.

Source: Linux Documentation/hwmon/ina3221 and sysfs-class-powercap; NVIDIA's Jetson Linux guide, names of the rails.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedspine_edge.profiling.sysfs import found, read_count, read_text

INPUT_RAILS = ("VDD_IN", "POM_5V_IN")
"""Rails that feed the whole module; the others lie behind them."""

BEHIND = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
"""AGX Orin measures its memory behind the 5 V rail that it measures too: adding both would count it twice."""

UNCONNECTED = ("NC", "N/C")
CHANNELS = (1, 2, 3)
"""An INA3221 has three; the hwmon driver's higher numbers are shunt voltages and sums."""

HWMON_MONITORS = ("ina2", "ina3221", "power_meter")
"""Chips that measure a supply. A graphics card's own figure, say, is not the board's."""


class Meter(Protocol):
    """Something that tells power or energy.

    Attributes:
        source: `ina3221`, `rapl` or `hwmon`.
        counts_joules: Whether `read` gives joules since its first call; else watts now.
    """

    @property
    def source(self) -> str:
        """Kind of sensor."""

    @property
    def counts_joules(self) -> bool:
        """Whether `read` gives joules; else watts."""

    def read(self) -> float | None:
        """Returns the present value; None where it cannot be read."""


@dataclass(frozen=True)
class Rail:
    """One measured supply: milliwatts in one file, or millivolts and milliamperes in two, or microwatts.

    Attributes:
        name: As the board calls it.
        power: File of the power; None where voltage and current are measured.
        voltage: File of the voltage, mV.
        current: File of the current, mA.
        watts_per_unit: What one unit of `power` is.
    """

    name: str
    power: Path | None = None
    voltage: Path | None = None
    current: Path | None = None
    watts_per_unit: float = 1e-3

    def watts(self) -> float | None:
        """Returns the power now; None where it cannot be read."""
        if self.power is not None:
            reading = read_count(self.power)
            return None if reading is None else reading * self.watts_per_unit
        if self.voltage is None or self.current is None:
            return None
        millivolts, milliamperes = read_count(self.voltage), read_count(self.current)
        return None if millivolts is None or milliamperes is None else 1e-6 * millivolts * milliamperes


@dataclass(frozen=True)
class RailMeter:
    """Watts of a whole board from its rails.

    Attributes:
        source: `ina3221` or `hwmon`.
        rails: Every rail that is connected.
    """

    source: str
    rails: tuple[Rail, ...]
    counts_joules: bool = False

    def counted(self) -> tuple[Rail, ...]:
        """Returns the rails that make up the total: the module's input where it is measured, else the sum of all."""
        inputs = [rail for rail in self.rails if rail.name in INPUT_RAILS]
        names = {rail.name for rail in self.rails}
        return tuple(inputs[:1] or [rail for rail in self.rails if BEHIND.get(rail.name) not in names])

    def read(self) -> float | None:
        """Returns the watts of all counted rails; None as soon as one cannot be read, for a part is no total."""
        values = [rail.watts() for rail in self.counted()]
        whole = [value for value in values if value is not None]
        return sum(whole) if whole and len(whole) == len(values) else None


@dataclass
class RaplMeter:
    """Joules of packages and memory from RAPL's counters, which start again at 0 when they are full.

    Attributes:
        domains: Directory of each counted domain, with its `max_energy_range_uj`.
    """

    domains: dict[Path, int]
    source: str = "rapl"
    counts_joules: bool = True
    _last: dict[Path, int] = field(default_factory=dict)
    _total_uj: int = 0

    def read(self) -> float | None:
        """Returns the joules since the first reading; None where a counter cannot be read (it takes root)."""
        now = {domain: read_count(domain / "energy_uj") for domain in self.domains}
        counts = {domain: count for domain, count in now.items() if count is not None}
        if len(counts) < len(now):
            return None
        for domain, count in counts.items():
            self._total_uj += counter_step(self._last.get(domain, count), count, self.domains[domain])
        self._last = counts
        return 1e-6 * self._total_uj


def counter_step(before: int, after: int, maximum: int) -> int:
    """Returns how far a counter went that holds 0 to `maximum` and started again at most once."""
    return after - before if after >= before else after + maximum + 1 - before


def ina3221_rails(root: Path) -> tuple[Rail, ...]:
    """Returns the connected rails of every INA3221, by the paths of JetPack 5 and later and those of JetPack 4."""
    rails = [
        Rail(name, voltage=chip / f"in{channel}_input", current=chip / f"curr{channel}_input")
        for chip in found(root, "sys/bus/i2c/devices/*/hwmon/hwmon*")
        if read_text(chip / "name") in (None, "ina3221")
        for channel in CHANNELS
        if (name := read_text(chip / f"in{channel}_label"))
    ]
    rails += [
        Rail(name, power=file.with_name(f"in_power{file.name.rpartition('_')[2]}_input"))
        for file in found(root, "sys/bus/i2c/devices/*/iio:device*/rail_name_*")
        if (name := read_text(file))
    ]
    return tuple(rail for rail in rails if rail.name.upper() not in UNCONNECTED)


def hwmon_rails(root: Path) -> tuple[Rail, ...]:
    """Returns the supplies that power monitors under hwmon measure."""
    return tuple(
        Rail(read_text(file.with_name(f"{stem}_label")) or name, power=file, watts_per_unit=1e-6)
        for chip in found(root, "sys/class/hwmon/hwmon*")
        if (name := read_text(chip / "name") or "").startswith(HWMON_MONITORS)
        for stem in ("power1", "power2", "power3")
        for file in (chip / f"{stem}_input", chip / f"{stem}_average")
        if read_count(file) is not None
    )


def rapl_meter(root: Path) -> RaplMeter | None:
    """Returns a meter of all processor packages and their memory; None without RAPL.

    Cores and graphics lie within the package, and `psys` would count it a second time.
    """
    domains = {}
    for domain in found(root, "sys/class/powercap/intel-rapl:*"):
        name, maximum = read_text(domain / "name") or "", read_count(domain / "max_energy_range_uj")
        if name.startswith(("package", "dram")) and maximum:
            domains[domain] = maximum
    return RaplMeter(domains) if domains else None


def find_meter(root: Path = Path("/")) -> Meter | None:
    """Returns the meter of this board that can be read, the most complete first; None where there is none."""
    meters: list[Meter | None] = [
        RailMeter("ina3221", ina3221_rails(root)),
        rapl_meter(root),
        RailMeter("hwmon", hwmon_rails(root)),
    ]
    return next((meter for meter in meters if meter is not None and meter.read() is not None), None)


def why_no_meter(root: Path = Path("/")) -> str:
    """Returns, for a board without a meter, what there is and what would help."""
    if ina3221_rails(root):
        return "power rails found, but they cannot be read: run as root"
    if rapl_meter(root) is not None:
        return "RAPL found, but only root may read its counters: chmod a+r /sys/class/powercap/*/energy_uj, or use sudo"
    return "this machine shows no power sensor (INA3221, RAPL or a hwmon power monitor)"
