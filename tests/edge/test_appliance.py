"""The slots of a board and its Wi-Fi, on files in the place of partitions."""

import contextlib
import hashlib

import pytest

from fedspine_edge.appliance import check, slots, wifi
from fedspine_edge.errors import CheckpointError, UsageError

ENTRY = (
    "title x\nsort-key fedspine\nversion 1\nlinux /slot-a/linux\ninitrd /slot-a/initrd\n"
    "options fedspine.slot=a fedspine.release=1 quiet\n"
)
ROOT = b"hsqs" + bytes(36) + (5000).to_bytes(8, "little") + bytes(48) + b"r" * 5000


@pytest.fixture
def board(tmp_path):
    efi = tmp_path / "efi"
    (efi / "loader/entries").mkdir(parents=True)
    (efi / "slot-a").mkdir()
    for name in ("linux", "initrd"):
        (efi / "slot-a" / name).write_bytes(name.encode())
    (efi / "loader/entries/slot-a.conf").write_text(ENTRY)
    devices = {slot: tmp_path / f"root_{slot}" for slot in "ab"}
    for device in devices.values():
        device.write_bytes(bytes(8192))
    devices["a"].write_bytes(ROOT)
    return slots.Board("a", efi, devices, refused_file=tmp_path / "state" / "refused")


def names(board):
    return sorted(path.name for path in (board.efi / "loader/entries").iterdir())


def test_a_spare_is_the_running_slot_with_a_lower_version_and_three_tries(board):
    slots.keep_spare(board)
    assert names(board) == ["slot-a.conf", "slot-b+3.conf"]
    text = (board.efi / "loader/entries/slot-b+3.conf").read_text()
    assert "version 0\n" in text
    assert "options fedspine.slot=b fedspine.release=1 quiet\n" in text
    assert board.devices["b"].read_bytes()[:5000] == ROOT[:5000]
    assert (board.efi / "slot-b/linux").read_bytes() == b"linux"


def test_a_copy_of_a_copy_is_still_the_same_release(board):
    (board.efi / "loader/entries/slot-a.conf").write_text(ENTRY.replace("version 1\n", "version 0\n"))
    slots.keep_spare(board)
    text = (board.efi / "loader/entries/slot-b+3.conf").read_text()
    assert "version -1\n" in text
    assert "fedspine.release=1 quiet\n" in text


def test_a_spare_that_is_there_is_left_alone(board):
    (board.efi / "loader/entries/slot-b+2-1.conf").write_text("version 7\n")
    slots.keep_spare(board)
    assert names(board) == ["slot-a.conf", "slot-b+2-1.conf"]
    assert board.devices["b"].read_bytes() == bytes(8192)


@pytest.mark.parametrize("cut", range(8))
def test_a_power_cut_at_any_write_leaves_the_running_slot_and_no_half_written_one(board, monkeypatch, cut):
    old = board.efi / "loader/entries/slot-b.conf"
    old.write_text("version 0\n")
    sync, left = slots.os.fsync, [cut]

    def fsync(descriptor):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        sync(descriptor)

    monkeypatch.setattr(slots.os, "fsync", fsync)
    source = board.efi / "slot-a"
    parts = [slots.file_source(path) for path in (source / "linux", source / "initrd")]
    with contextlib.suppress(KeyboardInterrupt):
        slots.fill(board, slots.Content(slots.file_source(board.devices["a"], len(ROOT)), *parts, 2, 2))
    assert "slot-a.conf" in names(board)
    bootable = [name for name in names(board) if name.startswith("slot-b") and name.endswith(".conf")]
    if bootable == ["slot-b+3.conf"]:
        found = hashlib.sha256(board.devices["b"].read_bytes()[:5000]).digest()
        assert found == hashlib.sha256(ROOT[:5000]).digest()
        assert (board.efi / "slot-b/initrd").read_bytes() == b"initrd"
    else:
        assert bootable == []


def test_a_slot_whose_tries_are_used_up_is_filled_anew_and_a_newer_release_in_it_is_remembered(board):
    (board.efi / "loader/entries/slot-b+0-3.conf").write_text("version 7\n")
    slots.keep_spare(board)
    assert names(board) == ["slot-a.conf", "slot-b+3.conf"]
    assert slots.refused(board) == {7}
    (board.efi / "loader/entries/slot-b+3.conf").rename(board.efi / "loader/entries/slot-b+0-3.conf")
    slots.keep_spare(board)
    assert names(board) == ["slot-a.conf", "slot-b+3.conf"]
    assert slots.refused(board) == {7}


def test_a_good_slot_is_put_on_trial_again_only_where_there_is_another(board):
    slots.distrust(board)
    assert names(board) == ["slot-a.conf"]
    slots.keep_spare(board)
    slots.distrust(board)
    assert names(board) == ["slot-a+2-1.conf", "slot-b+3.conf"]
    slots.distrust(board)
    assert names(board) == ["slot-a+2-1.conf", "slot-b+3.conf"]


@pytest.mark.parametrize(
    ("own", "other", "found"),
    [
        ("slot-a+2-1.conf", "slot-b.conf", True),
        ("slot-a.conf", "slot-b.conf", False),
        ("slot-a+2-1.conf", "slot-b+3.conf", False),
        ("slot-a+2-1.conf", None, False),
    ],
)
def test_a_slot_is_on_trial_while_the_other_one_is_good(board, own, other, found):
    entries = board.efi / "loader/entries"
    (entries / "slot-a.conf").rename(entries / own)
    if other is not None:
        (entries / other).write_text("version 0\n")
    assert slots.on_trial(board) is found


def test_a_partition_that_reads_back_otherwise_gets_no_boot_entry(board, monkeypatch):
    monkeypatch.setattr(slots, "digest", lambda path, num_bytes: "other")
    with pytest.raises(CheckpointError, match="read something else back"):
        slots.keep_spare(board)
    assert names(board) == ["slot-a.conf"]


def test_what_is_no_root_file_system_is_refused(board):
    board.devices["a"].write_bytes(bytes(8192))
    with pytest.raises(CheckpointError, match="expected a squashfs"):
        slots.keep_spare(board)


def test_wifi_names_and_keys_are_hex_so_that_no_character_has_a_meaning():
    # IEEE 802.11i, annex H.4: the key of "password" for "IEEE".
    text = wifi.settings_text("IEEE", "password")
    assert "ssid=49454545\n" in text
    assert "psk=f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e\n" in text
    assert "key_mgmt=NONE" in wifi.settings_text('a"\n}', "")


def test_a_file_without_wifi_says_so(tmp_path):
    (tmp_path / "fedspine.toml").write_text("[server]\n")
    with pytest.raises(UsageError, match=r"expected \[wifi\]"):
        wifi.write_settings(tmp_path / "fedspine.toml", tmp_path / "wpa.conf")


def test_a_try_out_imports_every_extension_module_of_every_package():
    found = check.compiled()
    assert "numpy._core._multiarray_umath" in found["numpy"]
    assert "safetensors._safetensors_rust" in found["safetensors"]
    assert "rich" not in found
