"""`fedspine flower`: what a fleet on Flower needs beside Flower's own programs.

Comes in: a run's TOML file, a device's model and data, or options of Flower's programs. Goes out: the request that the
ServerApp reads, an agent that serves this device's ClientApp until it is stopped, or Flower's program in the place of
this one, told to keep what it does to itself.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedspine_edge.agent.local import SOCKET_FILE, LocalAgent
from fedspine_edge.agent.settings import AgentSettings
from fedspine_edge.agent.tasks import NAME
from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import UsageError

# By default Flower tells its makers of each start of each of its programs, and asks them for news. What it starts
# inherits this; who wants either sets the variable otherwise.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def write_request(config: str, out: Path, *, timings: Path | None) -> Path:
    """Writes the request of a run and returns its file.

    Args:
        config: A preset or a TOML file.
        out: The file.
        timings: `rounds.jsonl` of another run, whose seconds the coordinator is given instead of measured ones.

    Raises:
        FedSpineError: Settings, model or data are not as they must be.
    """
    from fedspine_edge.commands.start_run import run_request  # loads torch; a device's agent must not

    request = run_request(config, name=None, timings=timings)
    write_bytes(out, (json.dumps(request) + "\n").encode())
    return out


def serve_device(state: Path, device_id: str, settings: AgentSettings, socket_path: Path | None) -> None:
    """Serves this device's ClientApp until SIGTERM or Ctrl-C.

    Raises:
        FedSpineError: No such model or data, a name that is none, or the socket cannot be made.
    """
    if not NAME.fullmatch(device_id):
        raise UsageError(f"expected a device's name as {NAME.pattern}, found {device_id!r}", hint="give --name")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with LocalAgent(state, device_id, settings, socket_path) as agent:
        logging.getLogger(__name__).info("device=%s listens socket=%s", device_id, agent.path)
        agent.serve()


def socket_of(state: Path) -> Path:
    """Returns where the agent of a directory listens unless it was told otherwise."""
    return state / SOCKET_FILE


def become(program: str, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by one of Flower's programs: the one installed beside us, or the first on the path.

    Raises:
        UsageError: It is not installed.
    """
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    path = shutil.which(program, path=places)
    if path is None:
        raise UsageError(f"expected Flower's {program}, found none", hint="pip install 'fedspine-edge[flower]'")
    os.execve(path, [program, *arguments], {**QUIET, **os.environ})
