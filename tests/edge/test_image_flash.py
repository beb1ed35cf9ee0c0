"""Writing an image: what is refused, and that a disk which reads back something else is found out."""

import os
from pathlib import Path

import pytest

from fedspine_edge.errors import ImageError, UsageError, VerificationError
from fedspine_edge.images import flash


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "x.img"
    path.write_bytes(os.urandom(3 * 4096 + 17))
    return path


def fake_root(
    tmp_path: Path, *, mounts: str = "", swaps: str = "", holders: bool = False, sectors: int = 1 << 20
) -> Path:
    root = tmp_path / "root"
    for name, number in (("sdz", "8:240"), ("sdz/sdz1", "8:241")):
        folder = root / "sys/class/block" / name
        folder.mkdir(parents=True)
        (folder / "dev").write_text(number + "\n")
    top = root / "sys/class/block"
    (top / "sdz" / "size").write_text(f"{sectors}\n")
    (top / "sdz" / "sdz1" / "partition").write_text("1\n")
    (top / "sdz1").symlink_to("sdz/sdz1")
    if holders:
        (top / "sdz/sdz1/holders/dm-0").mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text(mounts)
    (root / "proc/swaps").write_text("Filename Type Size Used Priority\n" + swaps)
    return root


@pytest.mark.parametrize(
    ("used", "words"),
    [
        ({"mounts": "36 35 8:241 / /boot rw - ext4 /dev/sdz1 rw\n"}, "sdz1 on /boot"),
        ({"mounts": "36 35 8:240 / / rw - ext4 /dev/sdz rw\n"}, "sdz on /"),
        ({"swaps": "/dev/sdz1 partition 1 0 -2\n"}, "sdz1 as swap"),
        ({"holders": True}, "sdz1 by dm-0"),
        ({"mounts": "36 35 8:1 / / rw - ext4 /dev/sda1 rw\n"}, ""),
    ],
)
def test_a_disk_is_in_use_by_mounts_swap_and_volumes_of_its_partitions(tmp_path, used, words):
    assert ", ".join(flash.uses("sdz", fake_root(tmp_path, **used))) == words


def test_a_partition_a_used_disk_and_a_small_one_are_refused(tmp_path, image, monkeypatch):
    monkeypatch.setattr(flash.stat, "S_ISBLK", lambda mode: True)
    for name in ("sdz", "sdz1"):
        (tmp_path / name).touch()
    root = fake_root(tmp_path, sectors=2)
    with pytest.raises(UsageError, match="expected a whole disk, found the partition"):
        flash.plan(image, tmp_path / "sdz1", root=root)
    with pytest.raises(UsageError, match="expected 0 MB on"):
        flash.plan(image, tmp_path / "sdz", root=root)
    (root / "proc/self/mountinfo").write_text("36 35 8:241 / / rw - ext4 /dev/sdz1 rw\n")
    with pytest.raises(UsageError, match="in use: sdz1 on /"):
        flash.plan(image, tmp_path / "sdz", root=root)


def test_a_mistyped_device_and_a_packed_image_are_refused(tmp_path, image):
    with pytest.raises(UsageError, match="expected a disk or a file"):
        flash.plan(image, Path("/dev/no-such-disk"))
    packed = tmp_path / "x.img.zst"
    packed.touch()
    with pytest.raises(ImageError, match="expected an image"):
        flash.plan(packed, tmp_path / "target")


def test_an_image_is_written_and_read_back(tmp_path, image):
    told: list[int] = []
    found = flash.plan(image, tmp_path / "target")
    flash.write(found, tell=told.append)
    assert (tmp_path / "target").read_bytes() == image.read_bytes()
    assert told == sorted(told)
    assert told[-1] == 2 * image.stat().st_size


@pytest.mark.parametrize("offset", [0, 4096, 3 * 4096 + 16])
def test_a_block_that_reads_back_otherwise_fails_loudly_with_its_place(tmp_path, image, monkeypatch, offset):
    monkeypatch.setattr(flash, "BLOCK", 4096)
    sync = os.fsync

    def rot(descriptor):
        sync(descriptor)
        os.pwrite(descriptor, bytes([image.read_bytes()[offset] ^ 1]), offset)

    monkeypatch.setattr(flash.os, "fsync", rot)
    with pytest.raises(VerificationError, match=f"at byte {offset // 4096 * 4096} ") as raised:
        flash.write(flash.plan(image, tmp_path / "target"), tell=lambda done: None)
    assert raised.value.exit_code == 3


def test_a_disk_that_cannot_be_written_is_told(tmp_path, image, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flash.os, "pwrite", full)
    with pytest.raises(ImageError, match="No space left"):
        flash.write(flash.plan(image, tmp_path / "target"), tell=lambda done: None)
