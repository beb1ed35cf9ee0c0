"""An AArch64 machine in qemu that starts from an image's copy and reaches one port of this machine, nothing else."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from fedspine_edge.images import disk

FIRMWARE = Path("/usr/share/AAVMF/AAVMF_CODE.fd")
VARIABLES = Path("/usr/share/AAVMF/AAVMF_VARS.fd")
SERVER_ADDRESS, SERVER_PORT = "10.0.2.100", 8443
FORWARD = Path(__file__).with_name("forward.py")


class Machine:
    """One board.

    Args:
        folder: Where its disk, its firmware's variables and its console are kept.
        image: The image; copied.
        port: The port of this machine that it reaches.
        memory_mib: Its memory.
    """

    def __init__(self, folder: Path, image: Path, port: int, *, memory_mib: int = 1024) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.disk, self.variables, self.console = folder / "disk.img", folder / "variables.fd", folder / "console.log"
        subprocess.run(["cp", "--sparse=always", image, self.disk], check=True)
        with self.disk.open("r+b") as file:
            file.truncate(image.stat().st_size + (256 << 20))  # a disk is larger than its image
        shutil.copy(VARIABLES, self.variables)
        self._port, self._memory = port, memory_mib
        self._process: subprocess.Popen[bytes] | None = None

    def try_out_at_start(self, slot: str = "a") -> None:
        """Has the next starts try the board out, tell the console and power off."""
        entry = next(name for name in self.boot_entries() if name.startswith(f"slot-{slot}"))
        text = self._tool(["mtype"], f"::loader/entries/{entry}").decode().rstrip("\n")
        file = self.disk.with_name("entry")
        file.write_text(f"{text} systemd.wants=fedspine-check.service console=ttyAMA0\n")
        self._tool(["mcopy", "-o"], file, f"::loader/entries/{entry}")

    def boot_entries(self) -> list[str]:
        """Returns the names of the boot entries."""
        names = self._tool(["mdir", "-b"], "::loader/entries").decode().split()
        return sorted(name.rpartition("/")[2] for name in names)

    def _tool(self, command: list[str], *names: str | Path) -> bytes:
        drive = f"{self.disk}@@{disk.partition(self.disk, 'esp').start}"
        return subprocess.run([*command, "-i", drive, *names], capture_output=True, check=True).stdout

    def start(self) -> None:
        """Switches it on."""
        forward = f"cmd:{sys.executable} {FORWARD} {self._port}"
        network = f"user,id=n,restrict=on,guestfwd=tcp:{SERVER_ADDRESS}:{SERVER_PORT}-{forward}"
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
        """Waits until it has switched itself off."""
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.cut_power()
            raise AssertionError(f"still on after {seconds:.0f} s: {self.said()[-3000:]}") from None
        assert code == 0, self.said()[-3000:]

    def cut_power(self) -> None:
        """Ends it as a power cut does."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def said(self) -> str:
        """Returns what its console showed so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def wait_for(self, words: str, seconds: float) -> None:
        """Waits until its console shows some words."""
        limit = time.monotonic() + seconds
        while words not in self.said():
            assert time.monotonic() < limit, self.said()[-3000:]
            time.sleep(0.5)
