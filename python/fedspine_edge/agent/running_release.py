"""Which release of an image runs here, and from which slot: facts for the server.

Comes in: a filesystem ROOT. Goes out: a part of the facts; nothing where no image of ours runs.

The boot entry names both on the kernel's line (`appliance/slots.py`). A runtime that was unpacked on a Jetson was
started from no slot; it knows the number it was built with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fedspine_edge.profiling.sysfs import read_text

IMAGE = "usr/lib/fedspine/image.json"


def running_release(root: Path = Path("/")) -> dict[str, Any]:
    """Returns `image_release` and `image_slot`, each where it is known."""
    line = read_text(root / "proc/cmdline") or ""
    slot, release = re.search(r"\bfedspine\.slot=([ab])\b", line), re.search(r"\bfedspine\.release=(\d{1,15})\b", line)
    number = int(release[1]) if release else _built_as(root)
    return ({} if number is None else {"image_release": number}) | ({"image_slot": slot[1]} if slot else {})


def _built_as(root: Path) -> int | None:
    try:
        said = json.loads((root / IMAGE).read_text())
    except (OSError, ValueError):
        return None
    number = said.get("release") if isinstance(said, dict) else None
    return number if isinstance(number, int) else None
