"""Pictures of the page for docs/images, of a made-up fleet: python benchmarks/page_pictures.py [docs/images]

Needs Debian's chromium. Every board in them is invented (page_fleet.py); the server, the page and the browser are real.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import page_fleet
from playwright.sync_api import Page, sync_playwright
from sqlalchemy import select

from fedspine_edge.commands import serve
from fedspine_server.link.hub import Hub, open_hub
from fedspine_server.link.tables import ACCEPTED, DeviceRow

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
RUN = f"/runs/{page_fleet.RUN_ID}"
PAGES = {"fleet": ("/", 1080), "run": (RUN, 1350), "model": (f"{RUN}/model", 900), "device": ("/devices/tx2-03", 1080)}
ROLLOUT_PAGES = {"rollouts": ("/rollouts", 1000)}
MOST_BYTES = 300_000


def main() -> None:
    """Takes the pictures."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        url, directory = f"https://127.0.0.1:{port}", Path(folder) / "server"
        told = serve.init(directory, serve.ServerSettings(url, "127.0.0.1", port), ["127.0.0.1"], claim_hours=1)
        hub = open_hub(directory)
        page_fleet.fill(hub)
        over = threading.Event()
        threading.Thread(target=_alive, args=(hub, over), daemon=True).start()
        process = subprocess.Popen([sys.executable, "-m", "fedspine_edge.commands.serve", str(directory)])
        try:
            _take(url, told["page_password"], out, PAGES)
            page_fleet.roll_out(hub)
            _take(url, told["page_password"], out, ROLLOUT_PAGES)
        finally:
            over.set()
            process.terminate()
            process.wait(20)


def _alive(hub: Hub, over: threading.Event) -> None:
    """All devices but the silent one are heard of, each at its own moment."""
    while not over.wait(2.0):
        with hub.database.write() as session:
            devices = session.scalars(select(DeviceRow).where(DeviceRow.status == ACCEPTED)).all()
            for i, device in enumerate(devices):
                if hub.clock() - device.last_seen_at < 2 * 60:
                    device.last_seen_at = hub.clock() - i % 7


def _take(url: str, password: str, out: Path, pages: Mapping[str, tuple[str, int]]) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        for scheme in ("light", "dark"):
            context = browser.new_context(ignore_https_errors=True, color_scheme=scheme, reduced_motion="reduce")
            page = context.new_page()
            _sign_in(page, url, password)
            for name, (path, tall) in pages.items():
                for wide, high in ((1440, tall), (390, 1000)):
                    page.set_viewport_size({"width": wide, "height": high})
                    page.goto(url + path)
                    page.wait_for_selector(".link.live", state="attached")
                    page.wait_for_timeout(800)
                    file = out / f"{name}-{wide}-{scheme}.png"
                    page.screenshot(path=file)
                    if file.stat().st_size > MOST_BYTES:
                        raise SystemExit(f"expected {file} of at most {MOST_BYTES} bytes")
        browser.close()


def _sign_in(page: Page, url: str, password: str) -> None:
    for _ in range(100):
        try:
            page.goto(f"{url}/login")
            break
        except Exception:  # noqa: BLE001 - the server is still starting
            page.wait_for_timeout(200)
    page.fill("#password", password)
    page.click("button.do")
    page.wait_for_url(f"{url}/")


if __name__ == "__main__":
    main()
