"""Tries a board out: is it heard, does the model on its config partition run, did any unit fail.

Comes in: the running system. Goes out: one line `FEDSPINE-CHECK {json}` on the console. `[check] rounds` in
`fedspine.toml` says how many tasks it waits for.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedspine_edge.appliance.slots import refused, running_version, this_board

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROGRAM = "/opt/fedspine/runtime/bin/fedspine"
UNIT = "fedspine-agent.service"
POLL_SECONDS = 2.0
PROFILE = ("-p", "32", "-n", "8", "-r", "2", "-t", "1", "--quiet", "--json")
MODULES = (
    "fedspine_edge._native",
    "llama_cpp",
    "numpy",
    "psutil",
    "safetensors",
    "zstandard",
    "torch",
    "transformers",
    "tokenizers",
)


def try_out(config: Path, heard: Path) -> None:
    """Waits for the server and the rounds that are wanted, looks at the board, and tells the console."""
    wanted = tomllib.loads(config.read_text()).get("check", {}).get("rounds", 0)
    while not heard.exists() or _tasks_done() < wanted:
        time.sleep(POLL_SECONDS)
    board = this_board()
    entry = board.entry(board.running)
    report = {
        "slot": board.running,
        "entry": entry.name if entry else None,
        "spare": entry.name if (entry := board.entry(board.spare)) else None,
        "release": running_version(board),
        "refused_releases": sorted(refused(board)),
        "tasks_done": _tasks_done(),
        "agent_rss_mib": _agent_rss_mib(),
        "imports": imports(),
        "profile": _profile(config.with_name("model.gguf")),
        "data_mib": _words(["df", "--output=size", "-BM", "/var/lib/private"])[-1],
        "failed_units": _words(["systemctl", "list-units", "--failed", "--plain", "--no-legend"])[:1],
        "kernel": _words(["uname", "-r"])[0],
        "uptime_seconds": float(Path("/proc/uptime").read_text().split()[0]),
    }
    print("\nFEDSPINE-CHECK " + json.dumps(report), flush=True)  # noqa: T201 - the console is where it goes


def imports() -> dict[str, str]:
    """Returns what becomes of each package that has code of its own for this processor: `ok`, or its end."""
    found = {}
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        # In a process of its own: an illegal instruction ends it.
        code = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode
        found[name] = "ok" if code == 0 else f"exit code {code}"
    return found


def _tasks_done() -> int:
    words = subprocess.run(["journalctl", "-u", UNIT, "-o", "cat"], capture_output=True, text=True, check=False).stdout
    return words.count("task over")


def _agent_rss_mib() -> float:
    pid = _words(["systemctl", "show", "-P", "MainPID", UNIT])[0]
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) / 1024


def _profile(model: Path) -> Any:
    if not model.is_file():
        return None
    done = subprocess.run([PROGRAM, "profile", str(model), *PROFILE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"exit code {done.returncode}: {done.stderr[-600:]}"
    return json.loads(done.stdout)


def _words(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
