"""What this board is: model, L4T release, CPU features, power mode.

Comes in: a filesystem ROOT. Goes out: `Board`; what the board does not tell is None.

Source: NVIDIA's Jetson Linux guide, nvpmodel and nv_tegra_release.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedspine_edge.profiling.clocks import cpu_clocks
from fedspine_edge.profiling.sysfs import read_text

FEATURES_THAT_MATTER = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
_SHORT_LINE = 200


@dataclass(frozen=True)
class Board:
    """The board's own words about itself.

    Attributes:
        model: Name in the device tree or DMI.
        l4t: Release of Jetson Linux, e.g. `35.4.1`.
        power_mode: nvpmodel's mode on a Jetson, else the platform profile, else the CPU governor.
        cpu_features: Instruction sets that matter for the kernels and for llama.cpp, in order.
    """

    model: str | None
    l4t: str | None
    power_mode: str | None
    cpu_features: tuple[str, ...]


def this_board(root: Path = Path("/")) -> Board:
    """Returns the facts of a board."""
    return Board(_model(root), _l4t(root), power_mode(root), _features(root))


def power_mode(root: Path = Path("/")) -> str | None:
    """Returns the power mode that is set now; None where the board has no such thing."""
    status = re.fullmatch(r"pmode:\s*0*(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if status:
        return mode_names(root).get(int(status[1]), f"mode {status[1]}")
    governors = sorted({clock.governor for clock in cpu_clocks(root) if clock.governor})
    profile = read_text(root / "sys/firmware/acpi/platform_profile")
    return profile or (f"{'/'.join(governors)} governor" if governors else None)


def mode_names(root: Path = Path("/")) -> dict[int, str]:
    """Returns nvpmodel's power modes by their number; empty where there is no nvpmodel."""
    try:
        text = (root / "etc/nvpmodel.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {
        int(number): name for number, name in re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", text, re.M)
    }


def _model(root: Path) -> str | None:
    tree = read_text(root / "proc/device-tree/model")
    words = [read_text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    return tree or " ".join(word for word in words if word) or None


def _l4t(root: Path) -> str | None:
    text = (read_text(root / "etc/nv_tegra_release") or "")[:_SHORT_LINE]
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def _features(root: Path) -> tuple[str, ...]:
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return tuple(name for name in FEATURES_THAT_MATTER if name in present)
