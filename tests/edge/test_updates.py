"""An update on its way: made and signed at the desk, fetched from a web server, taken or refused by a board."""

import contextlib
import functools
import http.server
import json
import shutil
import threading

import pytest

from fedspine_edge.appliance import slots, updates
from fedspine_edge.errors import CheckpointError, ImageError, LinkError, VerificationError
from fedspine_edge.images import manifest, update

ENTRY = "title x\nsort-key fedspine\nversion 10\nlinux /slot-a/linux\noptions fedspine.slot=a quiet\n"
ROOT = b"hsqs" + bytes(36) + (3000).to_bytes(8, "little") + bytes(2952)
NEW = b"hsqs" + bytes(36) + (4000).to_bytes(8, "little") + b"n" * 3952
FACTS = {"board": "generic-arm64", "variant": "agent", "version": "0.1", "release": 20}


@pytest.fixture
def board(tmp_path):
    efi = tmp_path / "efi"
    (efi / "loader/entries").mkdir(parents=True)
    (efi / "slot-a").mkdir()
    for name in ("linux", "initrd"):
        (efi / "slot-a" / name).write_bytes(f"old {name}".encode())
    (efi / "loader/entries/slot-a.conf").write_text(ENTRY)
    devices = {slot: tmp_path / f"root_{slot}" for slot in "ab"}
    devices["a"].write_bytes(ROOT)
    devices["b"].write_bytes(bytes(8192))
    board = slots.Board("a", efi, devices, refused_file=tmp_path / "state" / "refused")
    slots.keep_spare(board)
    return board


@pytest.fixture
def key(tmp_path):
    return tmp_path / "key.private.pem"


@pytest.fixture
def own(tmp_path, key):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / updates.IMAGE_FILE).write_text(json.dumps({"board": "generic-arm64", "variant": "agent"}))
    (folder / updates.KEY_FILE).write_bytes(manifest.public_key(key))
    return folder


@pytest.fixture
def offer(tmp_path, key, own):
    """The folder of a release on a web server."""
    folder = tmp_path / "offer"
    folder.mkdir()
    (folder / "root.squashfs").write_bytes(NEW)
    for name in ("linux", "initrd"):
        (folder / name).write_bytes(f"new {name}".encode())
    update.sign(folder, FACTS, key)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def config(tmp_path, offer):
    handler = functools.partial(Quiet, directory=str(offer))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        file = tmp_path / "fedspine.toml"
        file.write_text(f'[update]\nurl = "http://127.0.0.1:{server.server_port}/"\n')
        yield file
        server.shutdown()
        thread.join()


def names(board):
    return sorted(path.name for path in (board.efi / "loader/entries").iterdir())


def taken(config, board, own):
    restarts = []
    found = updates.update(config, board, own=own, restart=lambda: restarts.append(1))
    assert bool(restarts) is found
    return found


def assert_nothing_but_the_running_slot_and_its_spare(board):
    assert names(board) == ["slot-a.conf", "slot-b+3.conf"]
    assert "version 9\n" in (board.efi / "loader/entries/slot-b+3.conf").read_text()
    assert board.devices["b"].read_bytes()[: len(ROOT)] == ROOT
    assert (board.efi / "slot-b/linux").read_bytes() == b"old linux"


def test_a_newer_release_fills_the_other_slot_and_starts(config, board, own):
    assert taken(config, board, own)
    assert names(board) == ["slot-a.conf", "slot-b+3.conf"]
    text = (board.efi / "loader/entries/slot-b+3.conf").read_text()
    assert "version 20\n" in text
    assert "options fedspine.slot=b fedspine.release=20 quiet\n" in text
    assert board.devices["b"].read_bytes()[: len(NEW)] == NEW
    assert (board.efi / "slot-b/initrd").read_bytes() == b"new initrd"
    assert not taken(config, board, own), "it is there and starts next"


def test_a_board_that_is_told_of_no_updates_asks_for_none(tmp_path, board, own):
    (tmp_path / "fedspine.toml").write_text("[server]\n")
    assert not taken(tmp_path / "fedspine.toml", board, own)


@pytest.mark.parametrize("number", [10, 9, -1])
def test_a_release_that_is_not_newer_is_left_alone(config, board, own, offer, key, number):
    update.sign(offer, {**FACTS, "release": number}, key)
    assert not taken(config, board, own)
    assert_nothing_but_the_running_slot_and_its_spare(board)


def test_a_release_that_did_not_come_up_is_not_brought_again_but_the_next_one_is(config, board, own, offer, key):
    assert taken(config, board, own)
    entries = board.efi / "loader/entries"
    (entries / "slot-b+3.conf").rename(entries / "slot-b+0-3.conf")
    slots.keep_spare(board)
    assert not taken(config, board, own)
    assert_nothing_but_the_running_slot_and_its_spare(board)
    update.sign(offer, {**FACTS, "release": 21}, key)
    assert taken(config, board, own)


def test_a_slot_that_is_not_good_yet_takes_no_update(config, board, own):
    entries = board.efi / "loader/entries"
    (entries / "slot-a.conf").rename(entries / "slot-a+2-1.conf")
    assert not taken(config, board, own)
    assert names(board) == ["slot-a+2-1.conf", "slot-b+3.conf"]


def test_what_another_key_signed_is_refused(tmp_path, config, board, own, offer):
    other = tmp_path / "other.pem"
    manifest.public_key(other)
    update.sign(offer, FACTS, other)
    with pytest.raises(VerificationError, match="signature"):
        taken(config, board, own)
    assert_nothing_but_the_running_slot_and_its_spare(board)


@pytest.mark.parametrize("damage", ["unsigned", "empty", "changed", "swapped"])
def test_a_document_without_its_signature_is_refused(config, board, own, offer, damage):
    document, signature = offer / updates.UPDATE_FILE, offer / updates.SIGNATURE_FILE
    if damage == "unsigned":
        signature.unlink()
    elif damage == "empty":
        signature.write_bytes(b"")
    elif damage == "changed":
        document.write_text(document.read_text().replace('"release": 20', '"release": 21'))
    else:
        shutil.copy(document, signature)
    with pytest.raises(LinkError if damage == "unsigned" else VerificationError):
        taken(config, board, own)
    assert_nothing_but_the_running_slot_and_its_spare(board)


@pytest.mark.parametrize("change", [{"board": "other"}, {"variant": "full"}])
def test_a_release_for_another_board_is_refused(config, board, own, offer, key, change):
    update.sign(offer, {**FACTS, **change}, key)
    with pytest.raises(VerificationError, match="expected a release for generic-arm64, agent"):
        taken(config, board, own)
    assert_nothing_but_the_running_slot_and_its_spare(board)


@pytest.mark.parametrize("part", updates.PARTS)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_part_is_refused_and_the_spare_is_there_again(config, board, own, offer, part, damage):
    path = offer / part
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()
    with pytest.raises(LinkError if damage == "missing" else CheckpointError):
        taken(config, board, own)
    assert_nothing_but_the_running_slot_and_its_spare(board)


@pytest.mark.parametrize("missing", ["board", "release", "files"])
def test_a_signed_document_that_lacks_something_is_refused(missing):
    part = {"num_bytes": 1, "sha256": "0" * 64}
    document = {**FACTS, "files": dict.fromkeys(updates.PARTS, part)}
    assert updates.parsed(json.dumps(document).encode()).number == 20
    del document[missing]
    with pytest.raises(VerificationError, match=missing):
        updates.parsed(json.dumps(document).encode())


def test_a_server_that_is_away_is_told(tmp_path, board, own):
    (tmp_path / "fedspine.toml").write_text('[update]\nurl = "http://127.0.0.1:9/"\n')
    with pytest.raises(LinkError, match="cannot fetch"):
        taken(tmp_path / "fedspine.toml", board, own)


@pytest.mark.parametrize("cut", range(10))
def test_a_power_cut_at_any_write_of_an_update_leaves_the_running_slot_and_no_half_written_one(
    config, board, own, monkeypatch, cut
):
    sync, left = slots.os.fsync, [cut]

    def fsync(descriptor):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        sync(descriptor)

    monkeypatch.setattr(slots.os, "fsync", fsync)
    with contextlib.suppress(KeyboardInterrupt):
        taken(config, board, own)
    bootable = [name for name in names(board) if name.endswith(".conf")]
    assert bootable in (["slot-a.conf"], ["slot-a.conf", "slot-b+3.conf"])
    assert (board.efi / "loader/entries/slot-a.conf").read_text() == ENTRY
    if len(bootable) == 2 and "version 20\n" in (board.efi / "loader/entries/slot-b+3.conf").read_text():
        assert board.devices["b"].read_bytes()[: len(NEW)] == NEW
        assert (board.efi / "slot-b/initrd").read_bytes() == b"new initrd"
    monkeypatch.undo()
    slots.keep_spare(board)
    assert len(names(board)) >= 2


def test_signing_needs_the_key_that_images_were_built_with(tmp_path, offer):
    with pytest.raises(ImageError, match="expected a private key"):
        update.sign(offer, FACTS, tmp_path / "none.pem")
