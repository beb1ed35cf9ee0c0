"""Tries a board out: is it heard, does the model on its config partition run, did any unit fail.

Comes in: the running system. Goes out: one line `FEDSPINE-CHECK {json}` on the console. `[check] rounds` in
`fedspine.toml` says how many tasks it waits for.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
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
# A module for a package that is not there (zstandard's for cffi) is left out; one that cannot be loaded is told.
IMPORT = """
import contextlib, importlib, sys
importlib.import_module(sys.argv[1])
for name in sys.argv[2:]:
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(name)
"""
EXTENSION = re.compile(r"(.+?)\.(?:cpython-.+|abi3)\.so")
PROFILE = ("-p", "32", "-n", "8", "-r", "2", "-t", "1", "--quiet", "--json")


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


def compiled() -> dict[str, list[str]]:
    """Returns the installed packages that have code of their own for this processor, and their extension modules."""
    found: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            package = file.parts[0].split(".")[0]
            if (
                file.suffix != ".so"
                or ".libs" in file.parts[0]
                or not Path(str(distribution.locate_file(file))).exists()
            ):
                continue
            modules = found.setdefault(package, [])
            if (module := EXTENSION.fullmatch(str(file))) is not None and "test" not in module[1]:
                modules.append(module[1].replace("/", "."))
    return found


def imports() -> dict[str, str]:
    """Returns what becomes of each such package when all of it is imported: `ok`, or its end."""
    found = {}
    for package, modules in sorted(compiled().items()):
        # In a process of its own: an illegal instruction ends it.
        command = [sys.executable, "-c", IMPORT, package, *sorted(modules)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found[package] = "ok" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-200:]}"
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
