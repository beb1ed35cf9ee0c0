"""What an image says of itself: manifest, bill of materials, checksums and a signature over them.

Comes in: files and what they were made of. Goes out: JSON and text files beside the image, the same every time.

Source: CycloneDX 1.5; Ed25519 (RFC 8032) in PEM (RFC 8410), which `openssl pkeyutl -verify -rawin` checks too.
"""

from __future__ import annotations

import hashlib
import json
import urllib.parse
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedspine_edge.atomic import write_bytes
from fedspine_edge.errors import ImageError, VerificationError
from fedspine_edge.images.debian import Deb

SUMS, SIGNATURE, PUBLIC_KEY = "SHA256SUMS", "SHA256SUMS.sig", "signing-key.pem"


def file_sha256(path: Path) -> str:
    """Returns a file's hash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bill_of_materials(name: str, version: str, debs: Iterable[Deb], site: Path) -> dict[str, Any]:
    """Returns a CycloneDX document of the Debian and Python packages in an image."""
    components = [
        {
            "type": "library",
            "name": deb.name,
            "version": deb.version,
            "purl": f"pkg:deb/debian/{deb.name}@{urllib.parse.quote(deb.version)}?arch={deb.architecture}",
            "hashes": [{"alg": "SHA-256", "content": deb.sha256}],
        }
        for deb in debs
    ]
    for metadata in sorted(site.glob("*.dist-info/METADATA")):
        head = HeaderParser().parsestr(metadata.read_text(errors="replace"))
        component: dict[str, Any] = {"type": "library", "name": head["Name"], "version": head["Version"]}
        component["purl"] = f"pkg:pypi/{head['Name'].lower()}@{head['Version']}"
        said = head["License-Expression"] or head["License"] or ""
        if said and "\n" not in said and len(said) < 80:
            component["licenses"] = [{"license": {"name": said}}]
        components.append(component)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "firmware", "name": name, "version": version}},
        "components": components,
    }


def write_json(path: Path, document: Any) -> None:
    """Writes a document."""
    write_bytes(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def seal(folder: Path, names: Sequence[str], key_file: Path) -> None:
    """Writes the checksums of files, their signature and the public key; the key is made where there is none."""
    key = _key(key_file)
    sums = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in sorted(names)).encode()
    write_bytes(folder / SUMS, sums)
    write_bytes(folder / SIGNATURE, key.sign(sums))
    write_bytes(folder / PUBLIC_KEY, _public(key))


def sign(content: bytes, key_file: Path) -> bytes:
    """Returns a key's signature of some bytes.

    Raises:
        ImageError: There is no such key.
    """
    if not key_file.exists():
        raise ImageError(f"expected a private key in {key_file}, found none", hint="the one the image was built with")
    return _key(key_file).sign(content)


def public_key(key_file: Path) -> bytes:
    """Returns the public half of a key as PEM; the key is made where there is none."""
    return _public(_key(key_file))


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _key(file: Path) -> Ed25519PrivateKey:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        write_bytes(file, Ed25519PrivateKey.generate().private_bytes(*kinds), private=True)
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ImageError(
            f"expected a private key in {file}, found: {error}", hint="openssl genpkey -algorithm ed25519"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ImageError(
            f"expected an Ed25519 key in {file}, found another kind", hint="openssl genpkey -algorithm ed25519"
        )
    return key


def check_seal(folder: Path, public_key: Path) -> list[str]:
    """Checks signature and checksums of a folder; returns the names that they cover.

    Raises:
        VerificationError: Another key signed it, a file is damaged or missing.
    """
    try:
        sums, signature = (folder / SUMS).read_bytes(), (folder / SIGNATURE).read_bytes()
        key = serialization.load_pem_public_key(public_key.read_bytes())
        if not isinstance(key, Ed25519PublicKey):
            raise TypeError("another kind of key")
        key.verify(signature, sums)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise VerificationError(
            f"expected a signature of {public_key} over {folder / SUMS}, found: {error or 'another signature'}",
            hint="do not use this image; fetch it anew",
        ) from error
    names = []
    for line in sums.decode().splitlines():
        expected, _, name = line.partition("  ")
        path = folder / Path(name).name
        found = file_sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise VerificationError(
                f"expected SHA-256 {expected[:16]} of {path}, found {found[:16]}", hint="fetch it anew"
            )
        names.append(name)
    return names
