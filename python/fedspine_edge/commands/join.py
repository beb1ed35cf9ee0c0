"""`fedspine join` and `fedspine agent`: the agent takes the place of this program.

Comes in: a state directory. Goes out: the agent, which stays.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def run_agent(state: Path) -> None:
    """Becomes the agent: the program's own libraries would take twice its memory."""
    os.execv(sys.executable, [sys.executable, "-m", "fedspine_edge.agent", str(state)])
