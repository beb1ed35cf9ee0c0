"""An AArch64 machine in qemu that starts from an image's copy and reaches one port of this machine, nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from fedspine_edge.images import disk

FIRMWARE = Path("/usr/share/AAVMF/AAVMF_CODE.fd")
VARIABLES = Path("/usr/share/AAVMF/AAVMF_VARS.fd")
SERVER_ADDRESS, SERVER_PORT, UPDATES_PORT = "10.0.2.100", 8443, 8080
BUSY_FACTOR = 8.0
FORWARD = Path(__file__).with_name("forward.py")


class Machine:
    """One board.

    Args:
        folder: Where its disk, its firmware's variables and its console are kept.
        image: The image; copied.
        port: The port of this machine that it reaches.
        updates_port: Another one, of a web server with updates.
        memory_mib: Its memory.
    """

    def __init__(self, folder: Path, image: Path, port: int, *, updates_port: int = 0, memory_mib: int = 1024) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.disk, self.variables, self.console = folder / "disk.img", folder / "variables.fd", folder / "console.log"
        subprocess.run(["cp", "--sparse=always", image, self.disk], check=True)
        with self.disk.open("r+b") as file:
            file.truncate(image.stat().st_size + (256 << 20))  # a disk is larger than its image
        shutil.copy(VARIABLES, self.variables)
        self._ports = {SERVER_PORT: port} | ({UPDATES_PORT: updates_port} if updates_port else {})
        self._memory = memory_mib
        self._process: subprocess.Popen[bytes] | None = None

    def try_out_at_start(self, *, update: bool = False) -> None:
        """Has the next starts try the board out, tell the console and power off; or update it first."""
        units = ["fedspine-check.service", *(["fedspine-update.service"] if update else [])]
        self.add_to_line([*(f"systemd.wants={unit}" for unit in units), "console=ttyAMA0"])

    def add_to_line(self, words: list[str]) -> None:
        """Adds words to the kernel's line of every slot."""
        file = self.disk.with_name("entry")
        for entry in self.boot_entries():
            file.write_text(f"{self.entry(entry).rstrip()} {' '.join(words)}\n")
            self._tool(["mcopy", "-o"], file, f"::loader/entries/{entry}")

    def entry(self, name: str) -> str:
        """Returns the text of a boot entry."""
        return self._tool(["mtype"], f"::loader/entries/{name}").decode()

    def file(self, name: str) -> bytes:
        """Returns a file of the boot partition."""
        return self._tool(["mtype"], f"::{name}")

    def wipe(self, name: str) -> None:
        """Writes zeros over the beginning of a partition."""
        with self.disk.open("r+b") as file:
            file.seek(disk.partition(self.disk, name).start)
            file.write(bytes(1 << 20))

    def kept(self, path: str) -> bytes:
        """Returns a file of the data partition."""
        where = f"{self.disk}?offset={disk.partition(self.disk, 'data').start}"
        return subprocess.run(["debugfs", "-R", f"cat {path}", where], capture_output=True, check=True).stdout

    def boot_entries(self) -> list[str]:
        """Returns the names of the boot entries."""
        names = self._tool(["mdir", "-b"], "::loader/entries").decode().split()
        return sorted(name.rpartition("/")[2] for name in names)

    def _tool(self, command: list[str], *names: str | Path) -> bytes:
        drive = f"{self.disk}@@{disk.partition(self.disk, 'esp').start}"
        return subprocess.run([*command, "-i", drive, *names], capture_output=True, check=True).stdout

    def start(self) -> None:
        """Switches it on."""
        network = "user,id=n,restrict=on" + "".join(
            f",guestfwd=tcp:{SERVER_ADDRESS}:{inside}-cmd:{sys.executable} {FORWARD} {outside}"
            for inside, outside in self._ports.items()
        )
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57", "-smp", "2", "-m", str(self._memory),
                 "-nographic", "-nodefaults", "-serial", "stdio",
                 "-drive", f"if=pflash,format=raw,readonly=on,file={FIRMWARE}",
                 "-drive", f"if=pflash,format=raw,file={self.variables}",
                 "-drive", f"if=none,id=d,format=raw,file={self.disk}", "-device", "virtio-blk-pci,drive=d",
                 "-netdev", network, "-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci"],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            )  # fmt: skip

    def wait_for_power_off(self, seconds: float) -> None:
        """Waits until it has switched itself off; for so many seconds of work, however busy this machine is."""
        assert self._process is not None
        limit, watched = time.monotonic() + BUSY_FACTOR * seconds, psutil.Process(self._process.pid)
        while (code := self._process.poll()) is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() > limit or sum(watched.cpu_times()[:2]) > 2 * seconds:
                    self.cut_power()
                    raise AssertionError(f"still on after {seconds:.0f} s of work: {self.said()[-3000:]}")
            time.sleep(0.2)
        assert code == 0, self.said()[-3000:]

    def report(self) -> dict[str, Any]:
        """Returns what the last try-out found."""
        _, found, rest = self.said().rpartition("FEDSPINE-CHECK ")
        assert found, self.said()[-3000:]
        return dict(json.loads(rest.splitlines()[0]))

    def is_on(self) -> bool:
        """Says whether it runs."""
        return self._process is not None and self._process.poll() is None

    def cut_power(self) -> bool:
        """Ends it as a power cut does; says whether it was still on."""
        if self._process is None or not self.is_on():
            return False
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return True

    def said(self) -> str:
        """Returns what its console showed so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def wait_for(self, words: str, seconds: float, *, times: int = 1) -> None:
        """Waits until its console has shown some words so often."""
        limit = time.monotonic() + seconds
        while self.said().count(words) < times:
            assert time.monotonic() < limit, self.said()[-3000:]
            time.sleep(0.5)
