"""The Wi-Fi that `fedspine.toml` names, as wpa_supplicant takes it.

Comes in: `[wifi]` with ssid and psk. Goes out: a settings file that only root can read.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write_settings(config: Path, target: Path) -> None:
    """Writes wpa_supplicant's settings.

    Raises:
        UsageError: There is no Wi-Fi in the file.
    """
    wifi = tomllib.loads(config.read_text()).get("wifi")
    if not wifi:
        raise UsageError(f"expected [wifi] in {config}, found none", hint="fedspine image provision --wifi SSID")
    write_bytes(target, settings_text(str(wifi["ssid"]), str(wifi.get("psk", ""))).encode(), private=True)


def settings_text(ssid: str, passphrase: str) -> str:
    """Returns the settings for a network; names and passphrases as hex, so that no character has a meaning."""
    network = f"ssid={ssid.encode().hex()}\n"
    if passphrase:
        key = hashlib.pbkdf2_hmac("sha1", passphrase.encode(), ssid.encode(), 4096, 32).hex()
        network += f"  psk={key}\n  key_mgmt=WPA-PSK WPA-PSK-SHA256\n"
    else:
        network += "  key_mgmt=NONE\n"
    return f"network={{\n  {network}}}\n"
