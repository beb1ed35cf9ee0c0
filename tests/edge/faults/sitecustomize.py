"""Python loads this in every process of a fleet under test: the process then fails at exactly the planned points.

Comes in: `FEDSPINE_FAULTS`, a directory with `plan.json`. Goes out: a file a fault that struck. Faults strike in the
order of the plan, each its number of times, so that a restarted process meets the next one. The program knows nothing
of it.
"""

import errno
import functools
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def strike(folder, index, fault):
    with (folder / f"struck-{index}").open("ab") as file:
        file.write(b".")
    if fault["cuts"] is not None:
        newest = max(folder.parents[1].glob(fault["cuts"]), key=lambda path: path.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)
    if fault["does"] == "fill the disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault["does"] == "raise":
        raise RuntimeError("nobody foresaw this")
    if fault["does"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while fault["does"] == "hold" and not (folder / "let-go").exists():
        time.sleep(0.01)


def left(folder, index, fault):
    try:
        return fault["times"] - (folder / f"struck-{index}").stat().st_size
    except FileNotFoundError:
        return fault["times"]


def watch(folder, plan, index):
    fault = plan[index]
    module, _, name = fault["at"].partition(":")
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real = getattr(owner, last)

    def due(moment):
        earlier = any(left(folder, i, plan[i]) > 0 for i in range(index))
        return fault["moment"] == moment and not earlier and left(folder, index, fault) > 0

    @functools.wraps(real)
    def faulty(*args, **kwargs):
        if due("before"):
            strike(folder, index, fault)
        found = real(*args, **kwargs)
        if due("after"):
            strike(folder, index, fault)
        return found

    setattr(owner, last, faulty)


def small_chunks():
    from fedspine_server.link import hub

    sizes = {"chunk_bytes": 4096, "inline_bytes": int(os.environ.get("FEDSPINE_INLINE_BYTES", "0"))}
    settings = hub.LinkSettings(**sizes, progress_seconds=0.02, wait_seconds=5.0, tick_seconds=0.1)
    hub.open_hub = functools.partial(hub.open_hub, settings=settings)


def main():
    if "fedspine_edge.commands.serve" in sys.orig_argv:
        small_chunks()
    folder = Path(os.environ["FEDSPINE_FAULTS"])
    plan = json.loads((folder / "plan.json").read_text())
    for index, fault in enumerate(plan):
        if fault["process"] in sys.orig_argv:
            watch(folder, plan, index)


if "FEDSPINE_FAULTS" in os.environ:
    main()
