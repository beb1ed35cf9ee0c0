"""How hot the board is, and whether it holds itself back: thermal zones, cooling devices, the Raspberry Pi's bits.

Comes in: a sysfs ROOT. Goes out: plain values; what cannot be read is None.

Source: Linux Documentation/driver-api/thermal/sysfs-api; Raspberry Pi documentation of get_throttled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.profiling.sysfs import found, read_count, read_int, read_text

PLAUSIBLE_CELSIUS = (-55.0, 150.0)
"""Jetsons show -256 for a zone that is powered down."""

FIXED_ZONES = ("PMIC-Die",)
"""A TX2's power chip tells only whether it is above a threshold, and always reads 100 degrees."""

FANS = ("fan", "pwm")
"""A fan at work cools; it holds nothing back."""

RASPBERRY_BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
    16: "under-voltage since boot",
    17: "frequency capped since boot",
    18: "throttled since boot",
    19: "soft temperature limit since boot",
}
FIRST_PAST_BIT = 16


@dataclass(frozen=True)
class Zone:
    """A thermal zone; degrees Celsius, None where they cannot be read or believed."""

    name: str
    celsius: float | None


@dataclass(frozen=True)
class Cooler:
    """A cooling device: 0 is at rest, `maximum` holds back most; None where unreadable."""

    name: str
    state: int | None
    maximum: int | None

    @property
    def is_fan(self) -> bool:
        """Whether it cools by air instead of by slowing something."""
        return any(word in self.name.lower() for word in FANS)


def zones(root: Path = Path("/")) -> tuple[Zone, ...]:
    """Returns every thermal zone."""
    return tuple(
        Zone(read_text(zone / "type") or zone.name, _celsius(read_int(zone / "temp")))
        for zone in found(root, "sys/class/thermal/thermal_zone*")
    )


def hottest(root: Path = Path("/")) -> float | None:
    """Returns the highest temperature of all zones, degrees Celsius; None without one."""
    moving = [zone.celsius for zone in zones(root) if zone.name not in FIXED_ZONES]
    return max((celsius for celsius in moving if celsius is not None), default=None)


def coolers(root: Path = Path("/")) -> tuple[Cooler, ...]:
    """Returns every cooling device, fans included."""
    return tuple(
        Cooler(
            read_text(device / "type") or device.name,
            read_count(device / "cur_state"),
            read_count(device / "max_state"),
        )
        for device in found(root, "sys/class/thermal/cooling_device*")
    )


def raspberry_bits(root: Path = Path("/")) -> int | None:
    """Returns a Raspberry Pi's throttle bits; None on another board."""
    for pattern in (
        "sys/devices/platform/soc*/*firmware*/get_throttled",
        "sys/devices/platform/*firmware*/get_throttled",
    ):
        for file in found(root, pattern):
            bits = read_int(file, base=16)
            if bits is not None and bits >= 0:
                return bits
    return None


def raspberry_words(bits: int, *, past: bool = True) -> tuple[str, ...]:
    """Returns what throttle bits say; without `past` only what holds now."""
    return tuple(words for bit, words in RASPBERRY_BITS.items() if bits >> bit & 1 and (past or bit < FIRST_PAST_BIT))


def held_back_by(root: Path = Path("/")) -> tuple[str, ...] | None:
    """Returns what slows the board just now; empty when nothing does, None when nothing here could tell."""
    slowing = [cooler for cooler in coolers(root) if not cooler.is_fan and cooler.state is not None]
    bits = raspberry_bits(root)
    if not slowing and bits is None:
        return None
    return tuple(cooler.name for cooler in slowing if cooler.state) + raspberry_words(bits or 0, past=False)


def _celsius(millidegrees: int | None) -> float | None:
    if millidegrees is None:
        return None
    celsius = millidegrees / 1000
    return celsius if PLAUSIBLE_CELSIUS[0] < celsius < PLAUSIBLE_CELSIUS[1] else None
