"""How fast the board's clocks run against how fast they can: cpufreq policies and devfreq devices.

Comes in: a sysfs ROOT. Goes out: hertz and ratios; what cannot be read is None.

Source: Linux Documentation/admin-guide/pm/cpufreq; Documentation/ABI/testing/sysfs-class-devfreq.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.profiling.sysfs import found, read_count, read_text


@dataclass(frozen=True)
class Clock:
    """One clock domain.

    Attributes:
        name: `policy0` of the CPU, or a devfreq device.
        current_hertz: Now.
        maximum_hertz: The most the hardware does.
        limit_hertz: The most that is allowed at present, by the power mode or by heat.
        governor: Who chooses.
    """

    name: str
    current_hertz: int | None
    maximum_hertz: int | None
    limit_hertz: int | None
    governor: str | None

    @property
    def ratio(self) -> float | None:
        """Current over maximum, 0 to 1; None where either is unknown."""
        if not self.current_hertz or not self.maximum_hertz:
            return None
        return min(1.0, self.current_hertz / self.maximum_hertz)


def cpu_clocks(root: Path = Path("/")) -> tuple[Clock, ...]:
    """Returns the CPU's clock domains."""
    folders = found(root, "sys/devices/system/cpu/cpufreq/policy*") or found(
        root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq"
    )
    return tuple(
        Clock(
            folder.name if folder.name.startswith("policy") else folder.parent.name,
            _kilohertz(folder / "scaling_cur_freq"),
            _kilohertz(folder / "cpuinfo_max_freq") or _kilohertz(folder / "scaling_max_freq"),
            _kilohertz(folder / "scaling_max_freq"),
            read_text(folder / "scaling_governor"),
        )
        for folder in folders
    )


def device_clocks(root: Path = Path("/")) -> tuple[Clock, ...]:
    """Returns the clock domains beside the CPU: graphics, memory."""
    return tuple(
        Clock(
            folder.name,
            read_count(folder / "cur_freq"),
            _highest(folder / "available_frequencies") or read_count(folder / "max_freq"),
            read_count(folder / "max_freq"),
            read_text(folder / "governor"),
        )
        for folder in found(root, "sys/class/devfreq/*")
    )


def cpu_clock_ratio(root: Path = Path("/")) -> float | None:
    """Returns the fastest CPU domain's current frequency over its maximum; None without cpufreq.

    Work runs on the fastest domain when it can; idle cores of the others clock down and mean nothing.
    """
    return max((ratio for clock in cpu_clocks(root) if (ratio := clock.ratio) is not None), default=None)


def _kilohertz(path: Path) -> int | None:
    value = read_count(path)
    return None if value is None else 1000 * value


def _highest(path: Path) -> int | None:
    words = (read_text(path) or "").split()
    return max((int(word) for word in words if word.isascii() and word.isdigit()), default=None)
