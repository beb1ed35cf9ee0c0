"""Boards as their files: `NAME.txt` lists the paths below / with what each holds."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
BOARDS = sorted(file.stem for file in FOLDER.glob("*.txt"))


def plant(board: str, root: Path) -> Path:
    """Writes a board's files below a root and returns the root."""
    for line in (FOLDER / f"{board}.txt").read_text().splitlines():
        if line.startswith("/"):
            path, _, content = line.partition(" = ")
            write(root, path, content.replace("\\n", "\n").replace("\\t", "\t").replace("\\0", "\0"))
    return root


def write(root: Path, path: str, content: str) -> None:
    """Writes one file below a root, its folders with it."""
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n")
