"""A finished image told which fleet it belongs to: the config partition's `fedspine.toml`, written in place.

Comes in: an image, the server's address, a token, Wi-Fi, the device's model and data. Goes out: the same image; nothing
but its config partition has changed. Secrets come by environment or prompt, never on a command line.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspine_edge.agent.enrolment import load_claim
from fedspine_edge.agent.identity import check_name, split_token
from fedspine_edge.errors import ImageError, UsageError
from fedspine_edge.images import disk
from fedspine_edge.images.host_tools import run

CONFIG_FILE = "fedspine.toml"
MODEL_FOLDER, DATA_FILE, CHECK_FILE = "model", "examples", "model.gguf"
PIN = re.compile(r"[0-9a-f]{64}")
CLAIM = re.compile(r"[A-Za-z0-9_-]{43}")
SHORTEST_PASSPHRASE, LONGEST_PASSPHRASE, LONGEST_SSID = 8, 63, 32


@dataclass(frozen=True)
class Belonging:
    """What a device is told.

    Attributes:
        server: `https://HOST:PORT`.
        token: The claim, with or without the CA's fingerprint behind a dot.
        ca: The CA's fingerprint; None takes the token's.
        name: The device's name; None takes one of its own.
        ssid: Wi-Fi's name; None for a cable.
        passphrase: Wi-Fi's secret; empty for an open network.
        model: A directory or file that is copied along; None for a device that is only seen.
        data: The device's examples, copied along.
        updates: A folder on a web server where newer releases lie; None for a device that is never updated.
        check_rounds: Tasks that the try-out waits for.
        check_model: A GGUF file that the try-out profiles.
    """

    server: str
    token: str = field(repr=False)
    ca: str | None = None
    name: str | None = None
    ssid: str | None = None
    passphrase: str = field(default="", repr=False)
    model: Path | None = None
    data: Path | None = None
    updates: str | None = None
    check_rounds: int = 0
    check_model: Path | None = None


def claim_and_pin(token: str, ca: str | None) -> tuple[str, str]:
    """Returns a token's claim and the fingerprint it is bound to.

    Raises:
        UsageError: There is no fingerprint, two that differ, or no token.
    """
    if "." in token:
        claim, pin = split_token(token)
    else:
        claim, pin = token.strip(), (ca or "").replace(":", "").lower()
        if not CLAIM.fullmatch(claim):
            raise UsageError("expected a token as `fedspine devices token` prints it, found another text")
    if ca is not None and ca.replace(":", "").lower() != pin:
        raise UsageError(
            f"expected the CA {ca[:12]} in the token, found {pin[:12]}", hint="make a token on that server"
        )
    if not PIN.fullmatch(pin):
        raise UsageError(
            "expected the fingerprint of the server's CA, found none",
            hint="--ca FINGERPRINT, as `serve --init` prints it",
        )
    return claim, pin


def config_text(belonging: Belonging) -> str:
    """Returns `fedspine.toml`.

    Raises:
        UsageError: Something in it cannot be.
    """
    claim, pin = claim_and_pin(belonging.token, belonging.ca)
    if not re.fullmatch(r"https://[^/\s\"\\]+/?", belonging.server):
        raise UsageError(f"expected https://HOST:PORT, found {belonging.server!r}")
    if (belonging.model is None) != (belonging.data is None):
        raise UsageError("expected --model and --data, or neither, found one", hint="a device that tunes needs both")
    device: dict[str, Any] = {}
    if belonging.name is not None:
        device["name"] = check_name(belonging.name)
    if belonging.model is not None and belonging.data is not None:
        device["model"] = f"/config/{_target(belonging.model, MODEL_FOLDER)}"
        device["data"] = f"/config/{DATA_FILE}{belonging.data.suffix}"
    tables = {"server": {"url": belonging.server.rstrip("/"), "ca": pin, "token": claim}, "device": device}
    if belonging.ssid is not None:
        tables["wifi"] = _wifi(belonging.ssid, belonging.passphrase)
    if belonging.updates is not None:
        if not re.fullmatch(r"https?://[^\s\"\\]+", belonging.updates):
            raise UsageError(f"expected http:// or https://, found {belonging.updates!r}", hint="--updates URL")
        tables["update"] = {"url": belonging.updates}
    if belonging.check_rounds:
        tables["check"] = {"rounds": belonging.check_rounds}
    head = "# Read at every start. Once the device is enrolled, the token is worth nothing.\n"
    return head + "\n".join(_table(name, values) for name, values in tables.items())


def _wifi(ssid: str, passphrase: str) -> dict[str, str]:
    if not 1 <= len(ssid.encode()) <= LONGEST_SSID:
        raise UsageError(f"expected a Wi-Fi name of 1 to {LONGEST_SSID} bytes, found {len(ssid.encode())}")
    if passphrase and not SHORTEST_PASSPHRASE <= len(passphrase) <= LONGEST_PASSPHRASE:
        raise UsageError(
            f"expected {SHORTEST_PASSPHRASE} to {LONGEST_PASSPHRASE} characters of passphrase, found {len(passphrase)}"
        )
    return {"ssid": ssid, "psk": passphrase}


def _table(name: str, values: dict[str, Any]) -> str:
    # JSON's strings and numbers are TOML's too, but for one character.
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False).replace(chr(127), chr(92) + 'u007f')}"
        for key, value in values.items()
    ]
    return "\n".join([f"[{name}]", *lines, ""])


def _target(model: Path, name: str) -> str:
    return name if model.is_dir() else f"{name}{model.suffix}"


def provision(image: Path, belonging: Belonging) -> None:
    """Writes what a device is told into an image.

    Raises:
        UsageError: Something in it cannot be.
        ImageError: It is no image, or what is copied along does not fit.
    """
    text = config_text(belonging)
    where = disk.partition(image, "config")
    drive = f"{image}@@{where.start}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG_FILE
        file.touch(0o600)
        file.write_text(text)
        load_claim(file)
        _copy(drive, file, CONFIG_FILE)
    for source, target in _payload(belonging):
        _copy(drive, source, target)


def _payload(belonging: Belonging) -> list[tuple[Path, str]]:
    found = []
    if belonging.model is not None and belonging.data is not None:
        found += [(belonging.model, _target(belonging.model, MODEL_FOLDER))]
        found += [(belonging.data, f"{DATA_FILE}{belonging.data.suffix}")]
    if belonging.check_model is not None:
        found += [(belonging.check_model, CHECK_FILE)]
    return found


def _copy(drive: str, source: Path, target: str) -> None:
    try:
        run(["mcopy", "-o", "-s", "-i", drive, source, f"::{target}"], variables={"MTOOLS_SKIP_CHECK": "1"})
    except ImageError as error:
        raise ImageError(
            f"cannot copy {source} to the config partition: {error}",
            hint="config_mib in the board's file is its size",
        ) from error
