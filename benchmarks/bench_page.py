"""What people who look at the page cost the server: forty devices that report, over TLS, 0 and 50 viewers in turn.

    python benchmarks/bench_page.py [--viewers 50] [--seconds 20] [--json FILE]

The server is a process of its own; CPU seconds are its own, from the kernel. The fleet is made up (page_fleet.py), each
device reports every ten seconds; what it costs to take reports over the link is not in it, they are written directly.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import page_fleet
import psutil
import urllib3

from fedspine_edge.commands import serve
from fedspine_edge.hardware import this_machine
from fedspine_server.link.hub import open_hub

DEVICES, REPORT_SECONDS, REPEATS = 40, 10.0, 3


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), given.viewers, given.seconds)
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps({"machine": vars(this_machine()), **found}, indent=2) + "\n")


def run(folder: Path, viewers: int, seconds: float) -> dict[str, Any]:
    """Measures with and without viewers in turn."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = serve.init(
        folder / "s", serve.ServerSettings(f"https://127.0.0.1:{port}", "127.0.0.1", port), ["127.0.0.1"], claim_hours=1
    )
    hub = open_hub(folder / "s")
    page_fleet.fill(hub, DEVICES)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedspine_edge.commands.serve", str(folder / "s")], stderr=subprocess.DEVNULL
    )
    over, turns = threading.Event(), iter(range(1 << 30))
    threading.Thread(
        target=lambda: [
            page_fleet.go_on(hub, 4, next(turns)) for _ in iter(lambda: over.wait(REPORT_SECONDS * 4 / DEVICES), True)
        ],
        daemon=True,
    ).start()
    try:
        cookie = _cookie(port, told["page_password"])
        watched = psutil.Process(process.pid)
        alone, looked, received = [], [], []
        for _ in range(REPEATS):
            alone.append(_share(watched, seconds))
            sockets = [_viewer(port, cookie) for _ in range(viewers)]
            time.sleep(3)
            _drain(sockets)
            looked.append(_share(watched, seconds))
            received.append(sum(_drain(sockets)) / viewers / seconds)
            for viewer in sockets:
                viewer.close()
            time.sleep(1)
    finally:
        over.set()
        process.terminate()
        process.wait(20)
    extra = [b - a for a, b in zip(alone, looked, strict=True)]
    return {
        "viewers": viewers, "devices": DEVICES, "core_percent_alone": alone, "core_percent_with_viewers": looked,
        "core_percent_of_viewers": statistics.median(extra), "bytes_a_viewer_and_second": statistics.median(received),
    }  # fmt: skip


def _cookie(port: int, password: str) -> str:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    pool = urllib3.PoolManager(ssl_context=context)
    body = urllib.parse.urlencode({"password": password})
    urllib3.disable_warnings()
    for _ in range(200):
        try:
            reply = pool.request("POST", f"https://127.0.0.1:{port}/login", body=body, redirect=False, retries=False)
            return str(reply.headers["set-cookie"]).split(";")[0]
        except urllib3.exceptions.HTTPError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _viewer(port: int, cookie: str) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    viewer = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
    viewer.sendall(f"GET /stream?page=fleet HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n\r\n".encode())
    viewer.settimeout(0.05)
    return viewer


def _drain(viewers: list[ssl.SSLSocket]) -> list[int]:
    return [_read(viewer) for viewer in viewers]


def _read(viewer: ssl.SSLSocket) -> int:
    total = 0
    try:
        while part := viewer.recv(1 << 20):
            total += len(part)
    except TimeoutError:
        pass
    return total


def _share(process: psutil.Process, seconds: float) -> float:
    """CPU time in per cent of a core."""
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    return 100 * (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
