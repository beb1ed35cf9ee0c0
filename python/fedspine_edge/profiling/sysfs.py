"""Values out of sysfs and procfs, which lie, vanish and forbid: every reader here gives None instead of an error.

Comes in: paths below a ROOT (`/` on a board, a fixture tree in tests). Goes out: text, whole numbers, or None.
"""

from __future__ import annotations

import re
from pathlib import Path

MAX_CHARACTERS = 4096
MAX_DIGITS = 18
_WRITTEN = {10: re.compile(r"-?[0-9]+"), 16: re.compile(r"(0x)?[0-9a-fA-F]+")}
"""By base. Python's own `int` also takes `1_000` and digits of other scripts."""


def read_text(path: Path) -> str | None:
    """Returns a file's text without white space and NUL bytes around it; None where it cannot be read or is empty."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CHARACTERS)
    except (OSError, ValueError):
        return None
    return content.decode("utf-8", "replace").strip("\0 \t\r\n") or None


def read_int(path: Path, *, base: int = 10) -> int | None:
    """Returns the whole number a file holds, by base 10 or 16; None where it holds anything else."""
    text = read_text(path)
    if text is None or len(text) > MAX_DIGITS or not _WRITTEN[base].fullmatch(text):
        return None
    return int(text, base)


def read_count(path: Path) -> int | None:
    """Returns the whole number of at least 0 a file holds; a negative reading of a quantity that cannot be is None."""
    value = read_int(path)
    return None if value is None or value < 0 else value


def found(root: Path, pattern: str) -> list[Path]:
    """Returns the paths below a root that match a glob pattern, sorted with numbers in their order."""
    try:
        return sorted(root.glob(pattern), key=_natural)
    except OSError:
        return []


def _natural(path: Path) -> tuple[str | int, ...]:
    """Text and numbers alternate, so that two keys compare: thermal_zone2 before thermal_zone10."""
    parts: list[str | int] = [""]
    for character in str(path):
        number, before = character.isascii() and character.isdigit(), parts[-1]
        if isinstance(before, int):
            if number:
                parts[-1] = 10 * before + int(character)
            else:
                parts.append(character)
        elif number:
            parts.append(int(character))
        else:
            parts[-1] = before + character
    return tuple(parts)
