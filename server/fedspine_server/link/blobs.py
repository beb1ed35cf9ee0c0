"""Messages and states on disk, each under the SHA-256 of its bytes; uploads that go on where they broke off.

Comes in: bytes, or an upload chunk by chunk. Goes out: files that are there whole or not at all, and whose name proves
their content. Every size is checked before anything is kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedspine_edge.errors import CheckpointError, IncompatibleError

SHA256 = re.compile(r"[0-9a-f]{64}")
COPY_BYTES = 1 << 20


class BlobStore:
    """A directory of blobs and of unfinished uploads.

    Args:
        directory: Made when missing; shared by every server process of a fleet.
    """

    def __init__(self, directory: Path) -> None:
        self._blobs = directory / "blobs"
        self._uploads = directory / "uploads"
        for folder in (self._blobs, self._uploads):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def scratch(self) -> Path:
        """Where temporary folders may be made; what a killed process leaves there is swept."""
        return self._uploads

    def path(self, sha256: str) -> Path:
        """Returns where a blob lies; raises KeyError for a name that is no SHA-256 or that nothing has."""
        if not SHA256.fullmatch(sha256):
            raise KeyError(sha256)
        path = self._blobs / sha256[:2] / sha256
        if not path.is_file():
            raise KeyError(sha256)
        return path

    def read(self, sha256: str) -> bytes:
        """Returns a blob's bytes.

        Raises:
            KeyError: There is none of that name.
            CheckpointError: The file is not what its name says.
        """
        content = self.path(sha256).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CheckpointError(f"blob {sha256[:12]} is damaged on disk", hint="restore it from a backup")
        return content

    def is_whole(self, sha256: str, num_bytes: int) -> bool:
        """Returns whether a blob is there and is what its name says; one that is not is removed, to be sent again."""
        try:
            path = self.path(sha256)
        except KeyError:
            return False
        whole = path.stat().st_size == num_bytes and _sha256(path) == sha256
        if not whole:
            path.unlink(missing_ok=True)
        return whole

    def put(self, content: bytes) -> str:
        """Keeps a blob and returns its SHA-256; one that is there already costs nothing.

        Raises:
            CheckpointError: The disk is full.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        if not self._has(sha256, len(content)):
            with self._new_file() as file:
                file.write(content)
                self._keep(file, sha256)
        return sha256

    def put_chunk(self, upload: str, index: int, content: bytes) -> None:
        """Keeps one chunk of an upload; a second delivery replaces the first.

        Raises:
            CheckpointError: The disk is full.
        """
        folder = self._uploads / upload
        folder.mkdir(exist_ok=True)
        with self._new_file() as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the device will not send it again
            Path(file.name).replace(folder / f"{index:06d}")

    def num_chunks(self, upload: str) -> int:
        """Returns how many chunks of an upload are there, counted from its beginning without a gap."""
        folder, count = self._uploads / upload, 0
        while (folder / f"{count:06d}").is_file():
            count += 1
        return count

    def finish_upload(self, upload: str, sha256: str, num_bytes: int) -> None:
        """Makes a blob of an upload's chunks; nothing happens where the blob is there already.

        Args:
            upload: Which upload.
            sha256: What the whole must be.
            num_bytes: And how long.

        Raises:
            IncompatibleError: Chunks are missing or the whole is something else; the upload begins anew.
            CheckpointError: The disk is full.
        """
        if self._has(sha256, num_bytes):
            self.drop_upload(upload)
            return
        first = self._uploads / upload / f"{0:06d}"
        if self.num_chunks(upload) == 1 and first.stat().st_size == num_bytes and _sha256(first) == sha256:
            self._name(first, sha256)
            self.drop_upload(upload)
            return
        digest, total = hashlib.sha256(), 0
        with self._new_file() as whole:
            for index in range(self.num_chunks(upload)):
                with (self._uploads / upload / f"{index:06d}").open("rb") as chunk:
                    while part := chunk.read(COPY_BYTES):
                        total += len(part)
                        digest.update(part)
                        whole.write(part)
            if total != num_bytes or digest.hexdigest() != sha256:
                self.drop_upload(upload)
                raise IncompatibleError(
                    f"expected {num_bytes} bytes of hash {sha256[:12]}, found {total} of {digest.hexdigest()[:12]}",
                    hint="send the upload again",
                )
            self._keep(whole, sha256)
        self.drop_upload(upload)

    def drop_upload(self, upload: str) -> None:
        """Forgets an upload."""
        shutil.rmtree(self._uploads / upload, ignore_errors=True)

    def sweep(self, wanted: set[str], *, older_than_seconds: float) -> int:
        """Removes every blob and upload that is not wanted and was not touched for so long; returns how many."""
        before = time.time() - older_than_seconds
        unwanted = [path for path in self._blobs.glob("??/*") if path.name not in wanted]
        gone = [path for path in (*unwanted, *self._uploads.iterdir()) if path.stat().st_mtime < before]
        for path in gone:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return len(gone)

    def _has(self, sha256: str, num_bytes: int) -> bool:
        """Whether a blob is there; marks it as in use, so that no sweep takes it before a transaction names it.

        One that a failing disk cut short is not: it is written again.
        """
        path = self._blobs / sha256[:2] / sha256
        try:
            os.utime(path)
            return path.stat().st_size == num_bytes
        except FileNotFoundError:
            return False

    def _keep(self, file: tempfile._TemporaryFileWrapper[bytes], sha256: str) -> None:
        file.flush()
        os.fsync(file.fileno())
        self._name(Path(file.name), sha256)

    def _name(self, file: Path, sha256: str) -> None:
        """Gives a file that is on the disk its place and name."""
        folder = self._blobs / sha256[:2]
        folder.mkdir(exist_ok=True)
        file.replace(folder / sha256)
        descriptor = os.open(folder, os.O_RDONLY)  # the rename itself must survive a power cut
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _new_file(self) -> Iterator[tempfile._TemporaryFileWrapper[bytes]]:
        try:
            with tempfile.NamedTemporaryFile(dir=self._uploads, prefix=".", suffix=".partial", delete=False) as file:
                try:
                    yield file
                finally:
                    Path(file.name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot write below {self._blobs.parent}: {error.strerror or error}",
                hint="free some space; nothing that was acknowledged is lost",
            ) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(COPY_BYTES):
            digest.update(part)
    return digest.hexdigest()
