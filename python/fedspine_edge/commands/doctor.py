"""`fedspine doctor`: what this board is, what works on it and what does not, and how to repair that.

Comes in: a filesystem ROOT (`/`, or a fixture tree in tests) and the time. Goes out: findings, as text or JSON. No
other host is contacted.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fedspine_edge.errors import FedSpineError
from fedspine_edge.hardware import this_machine
from fedspine_edge.profiling import thermal
from fedspine_edge.profiling.board import this_board
from fedspine_edge.profiling.clocks import Clock, cpu_clocks, device_clocks
from fedspine_edge.profiling.power import find_meter, hwmon_rails, ina3221_rails, why_no_meter
from fedspine_edge.progress import printable

GOOD, BAD, UNKNOWN = "good", "bad", "n/a"
MARKS = {GOOD: "✓", BAD: "✗", UNKNOWN: "·"}
PLAIN_MARKS = {GOOD: "ok", BAD: "NO", UNKNOWN: "--"}

BUILD_YEAR = 2026
LOW_BYTES = 1 << 30
HOT_CELSIUS = 85.0
FULL_SPEED = 0.99


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: `good`, `bad`, or `n/a` where this machine has no such thing or does not tell.
        detail: What was found.
        fix: What to do about it; empty when nothing is to be done.
        essential: Whether nothing works while it is bad.
    """

    name: str
    state: str
    detail: str
    fix: str = ""
    essential: bool = False


def examine(root: Path = Path("/"), *, now: Callable[[], float] = time.time) -> list[Finding]:
    """Returns everything there is to say of this machine; takes a few seconds."""
    return [*examine_board(root), _memory(), _disk(), *examine_software(), _network(), examine_time(now())]


def examine_board(root: Path = Path("/")) -> list[Finding]:
    """Returns what the board is and what its sensors say."""
    return [*_facts(root), _clocks(root), _temperature(root), _throttling(root), _power(root)]


def examine_software() -> list[Finding]:
    """Returns whether the kernels are right and the runtimes run a tiny model, each in a process of its own."""
    return [
        *_kernels(),
        _runtime("llama.cpp", "llama_cpp_python", "fedspine-edge[llama]", _run_llama),
        _runtime("onnxruntime", "onnxruntime", "fedspine-edge[onnx]", _run_onnx),
    ]


def examine_time(now: float) -> Finding:
    """Returns whether a time, seconds since 1970, can be now; certificates fail when the clock is wrong."""
    moment = time.gmtime(now)
    detail = time.strftime("%Y-%m-%d %H:%M UTC", moment)
    if moment.tm_year >= BUILD_YEAR:
        return Finding("clock", GOOD, detail, essential=True)
    fix = "set it, or let it be set: sudo timedatectl set-ntp true"
    return Finding("clock", BAD, f"{detail}, before this program was made ({BUILD_YEAR})", fix, essential=True)


def healthy(findings: Sequence[Finding]) -> bool:
    """Returns whether nothing essential is bad."""
    return not any(finding.state == BAD and finding.essential for finding in findings)


def as_text(findings: Sequence[Finding], *, plain: bool = False) -> str:
    """Returns a line for each finding, the fix below it; `plain` for terminals without the signs."""
    marks = PLAIN_MARKS if plain else MARKS
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]} {finding.name:<{width}}  {printable(finding.detail)}")
        if finding.fix:
            lines.append(f"{' ' * len(marks[finding.state])} {'':<{width}}  fix: {finding.fix}")
    broken = [finding.name for finding in findings if finding.state == BAD and finding.essential]
    lesser = sum(finding.state == BAD and not finding.essential for finding in findings)
    verdict = f"not ready: {', '.join(broken)}" if broken else "ready"
    return "\n".join([*lines, "", verdict + (f"; {lesser} to improve" if lesser else "")])


def as_json(findings: Sequence[Finding]) -> str:
    """Returns the findings as one JSON document."""
    return json.dumps({"healthy": healthy(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def _facts(root: Path) -> list[Finding]:
    board, machine = this_board(root), this_machine(root / "proc")
    features = ", ".join(board.cpu_features)
    return [
        _told("board", board.model),
        _told("L4T", board.l4t),
        _told("power mode", board.power_mode),
        _told("CPU", f"{machine.cpu}, {machine.cores} cores"),
        _told("CPU features", features),
    ]


def _told(name: str, text: str | None) -> Finding:
    return Finding(name, GOOD, text) if text else Finding(name, UNKNOWN, "n/a")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{_gibibytes(memory.available)} of {_gibibytes(memory.total)} free"
    if memory.available >= LOW_BYTES:
        return Finding("memory", GOOD, detail)
    return Finding("memory", BAD, detail, "end other programs; a desktop session alone takes about 1 GiB")


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    detail = f"{_gibibytes(usage.free)} of {_gibibytes(usage.total)} free in {Path.cwd()}"
    if usage.free >= LOW_BYTES:
        return Finding("disk", GOOD, detail)
    return Finding("disk", BAD, detail, "free some space, or work in a directory on a larger disk")


def _clocks(root: Path) -> Finding:
    clocks = [*cpu_clocks(root), *device_clocks(root)]
    if not clocks:
        return Finding("clocks", UNKNOWN, "n/a, no cpufreq and no devfreq: normal in a virtual machine")
    detail = ", ".join(map(_clock, clocks))
    held = [clock.name for clock in cpu_clocks(root) if _limited(clock)]
    if not held:
        return Finding("clocks", GOOD, detail)
    return Finding("clocks", BAD, f"{detail}; held below their maximum: {', '.join(held)}", _faster(root))


def _clock(clock: Clock) -> str:
    now, most = (
        "n/a" if hertz is None else f"{hertz / 1e6:.0f}" for hertz in (clock.current_hertz, clock.maximum_hertz)
    )
    return f"{clock.name} {now} of {most} MHz"


def _limited(clock: Clock) -> bool:
    return bool(clock.limit_hertz and clock.maximum_hertz and clock.limit_hertz < FULL_SPEED * clock.maximum_hertz)


def _faster(root: Path) -> str:
    if this_board(root).l4t:
        return "choose a faster power mode: sudo nvpmodel -q, then sudo nvpmodel -m MODE and sudo jetson_clocks"
    return "raise scaling_max_freq, or choose the governor performance"


def _temperature(root: Path) -> Finding:
    hottest = thermal.hottest(root)
    if hottest is None:
        return Finding("temperature", UNKNOWN, "n/a, no thermal zone")
    named = [zone for zone in thermal.zones(root) if zone.celsius == hottest]
    detail = f"{hottest:.1f} °C at most ({named[0].name})"
    if hottest < HOT_CELSIUS:
        return Finding("temperature", GOOD, detail)
    return Finding("temperature", BAD, detail, "let it cool down; check the fan and the heat sink")


def _throttling(root: Path) -> Finding:
    held = thermal.held_back_by(root)
    if held is None:
        return Finding("throttling", UNKNOWN, "n/a, nothing here tells")
    if held:
        fix = "better cooling, or a stronger power supply where it says under-voltage"
        return Finding("throttling", BAD, f"held back by {', '.join(held)}", fix)
    past = thermal.raspberry_words(thermal.raspberry_bits(root) or 0)
    if past:
        return Finding("throttling", BAD, f"not now, but: {', '.join(past)}", "check power supply and cooling, reboot")
    return Finding("throttling", GOOD, "none")


def _power(root: Path) -> Finding:
    meter = find_meter(root)
    if meter is None:
        why = why_no_meter(root)
        fix = why.partition(": ")[2] if "found" in why else ""
        return Finding("power rails", BAD if fix else UNKNOWN, why.partition(": ")[0] if fix else f"n/a, {why}", fix)
    if meter.counts_joules:
        return Finding("power rails", GOOD, f"{meter.source}, counts joules of the processor packages and memory")
    rails = [
        f"{rail.name} {'n/a' if (watts := rail.watts()) is None else f'{watts:.2f} W'}"
        for rail in (ina3221_rails(root) if meter.source == "ina3221" else hwmon_rails(root))
    ]
    return Finding("power rails", GOOD, f"{meter.source}, board {meter.read() or 0:.2f} W: {', '.join(rails)}")


def _kernels() -> list[Finding]:
    # Loading torch takes seconds; `--help` of this command must not.
    from fedspine_edge.kernels import isa
    from fedspine_edge.profiling.self_test import TOLERANCE, kernel_errors

    errors = kernel_errors()
    if not errors:
        fix = "install a wheel for this machine, or build: pip install . ; until then plain torch is used, slower"
        return [Finding("kernels", BAD, "the native extension is not built", fix)]
    findings = []
    for name, error in errors.items():
        used = ", in use" if name == isa() else ""
        detail = f"forward, backward and importance agree with the reference to {error:.1e}{used}"
        if error <= TOLERANCE:
            findings.append(Finding(f"kernels {name}", GOOD, detail, essential=True))
        else:
            wrong = f"expected an error of at most {TOLERANCE:g}, found {error:.2g}{used}"
            findings.append(Finding(f"kernels {name}", BAD, wrong, "reinstall; report it with this output", True))
    return findings


def _runtime(name: str, package: str, extra: str, run: Callable[[], str]) -> Finding:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, UNKNOWN, "not installed", f"pip install '{extra}'")
    try:
        return Finding(name, GOOD, f"{version}, ran {run()}")
    except ImportError as error:
        return Finding(name, UNKNOWN, f"{version}, not tried: {error}", f"pip install '{extra}'")
    except FedSpineError as error:
        fix = error.hint or "reinstall it; a wheel built for another CPU ends by SIGILL"
        return Finding(name, BAD, f"{version}: {error}", fix, essential=True)


def _run_llama() -> str:
    from fedspine_edge.profiling.self_test import run_llama

    return run_llama()


def _run_onnx() -> str:
    from fedspine_edge.profiling.self_test import run_onnx

    return run_onnx()


def _network() -> Finding:
    states = psutil.net_if_stats()
    addresses = [
        f"{name} {address.address}"
        for name, known in psutil.net_if_addrs().items()
        for address in known
        if address.family == socket.AF_INET and not address.address.startswith("127.") and states[name].isup
    ]
    if addresses:
        return Finding("network", GOOD, ", ".join(addresses))
    return Finding("network", BAD, "no interface is up with an address", "connect the cable or Wi-Fi; see: ip addr")


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
