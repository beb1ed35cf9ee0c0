"""Boards whose slots die and whose power is cut at random: `make test-images-nightly`; FEDSPINE_CUTS says how often."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from test_agent_image import powered_off

from fedspine_edge.appliance.slots import num_bytes_of
from fedspine_edge.commands.image import default_key
from fedspine_edge.images import disk, update

pytestmark = pytest.mark.images_nightly

CUTS = int(os.environ.get("FEDSPINE_CUTS", "20"))
START_CUTS = UPDATE_CUTS = max(1, 2 * CUTS // 5)
ROUND_CUTS = max(1, CUTS // 5)  # in test_full_image.py
CUTS_A_BOARD = 2
FACTS = ("board", "variant", "version", "release")
SEED = int(os.environ.get("FEDSPINE_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
FALL_BACK_SECONDS = 1800.0


def part_hashes(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in update.PARTS}


def assert_nothing_half_written(board, expected):
    """Every slot that the boot loader knows holds a whole release, and one of them was good."""
    entries = [name for name in board.boot_entries() if name.endswith(".conf")]
    for slot in {name[5] for name in entries}:
        where = disk.partition(board.disk, f"root_{slot}").start
        with board.disk.open("rb") as file:
            file.seek(where)
            root = file.read(num_bytes_of(file))
        found = {name: board.file(f"slot-{slot}/{name}") for name in ("linux", "initrd")} | {"root.squashfs": root}
        assert {name: hashlib.sha256(content).hexdigest() for name, content in found.items()} == expected, entries
    return entries


def cut_at_random(board, chance, seconds):
    """Starts a board and cuts its power at some moment; says whether it was still on."""
    moment = chance.uniform(0.0, seconds)
    board.start()
    time.sleep(moment)
    return board.cut_power(), moment


def updated(world, board, release):
    """Has a board bring itself to a release; returns how long it was on and, if it wrote a slot, for how long."""
    start = time.monotonic()
    assert powered_off(board, FALL_BACK_SECONDS)["release"] == release
    first, last = world.fetched["/root.squashfs"], world.fetched["/initrd"]
    return time.monotonic() - start, last - first if last > first > start else None


def wait_until_writing(world, board):
    """Waits until a board that was just started fetches a release, or has switched itself off without."""
    start = time.monotonic()
    while world.fetched["/root.squashfs"] < start and board.is_on():
        time.sleep(0.1)


def test_a_dead_slot_falls_back_to_the_other_one_and_is_filled_again(world):
    board = world.board()
    board.try_out_at_start()
    assert powered_off(board)["slot"] == "a"
    board.try_out_at_start()  # the spare has got an entry of its own
    for dead, other in ("ab", "ba"):
        board.wipe(f"root_{dead}")
        report = powered_off(board, FALL_BACK_SECONDS)
        assert report["slot"] == other
        assert board.said().count(f"root_{dead} holds no root file system") >= 3
        assert board.boot_entries() == sorted([f"slot-{other}.conf", f"slot-{dead}+3.conf"])


def test_a_good_slot_stays_good_when_its_power_is_cut_again_and_again(world):
    board = world.board()
    board.try_out_at_start()
    powered_off(board)
    for _ in range(4):
        board.start()
        board.wait_for("Welcome to", 120, times=board.said().count("Welcome to") + 1)
        board.cut_power()
    assert board.boot_entries() == ["slot-a.conf", "slot-b+3.conf"]
    assert powered_off(board)["slot"] == "a"


def test_an_update_that_does_not_come_up_is_left_after_three_times_and_never_taken_again(world, image, tmp_path):
    board = world.board()
    board.try_out_at_start(update=True)
    release = powered_off(board)["release"] + 100
    offered = update.make(image, world.updates, default_key(), release=release)
    (tmp_path / "nothing").mkdir()
    empty = ["mksquashfs", tmp_path / "nothing", world.updates / "root.squashfs", "-noappend", "-quiet"]
    subprocess.run(empty, check=True, capture_output=True)
    update.sign(world.updates, {name: offered[name] for name in FACTS}, default_key())
    report = powered_off(board, FALL_BACK_SECONDS)
    assert (report["slot"], report["refused_releases"]) == ("a", [release])
    assert board.boot_entries() == ["slot-a.conf", "slot-b+3.conf"]
    assert "version " + str(release - 101) in board.entry("slot-b+3.conf")
    tried = board.said().count("Kernel panic")
    assert tried >= 3
    report = powered_off(board)
    assert (report["slot"], board.said().count("Kernel panic")) == ("a", tried)


def test_an_update_without_an_agent_is_left_after_three_times(world, image, tmp_path):
    board = world.board()
    board.try_out_at_start(update=True)
    release = powered_off(board)["release"] + 100
    offered = update.make(image, world.updates, default_key(), release=release)
    root, packed = tmp_path / "root", world.updates / "root.squashfs"
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-d", root, packed], check=True, capture_output=True)
    shutil.rmtree(root / "opt/fedspine")
    pack = ["mksquashfs", root, packed, "-noappend", "-quiet", "-all-root", "-comp", "zstd", "-Xcompression-level", "1"]
    subprocess.run(pack, check=True, capture_output=True)
    update.sign(world.updates, {name: offered[name] for name in FACTS}, default_key())
    report = powered_off(board, FALL_BACK_SECONDS)
    assert (report["slot"], report["refused_releases"]) == ("a", [release])
    assert board.said().count("slot b is not good, slot a was; starting again") == 3
    assert board.boot_entries() == ["slot-a.conf", "slot-b+3.conf"]


def test_a_board_whose_power_is_cut_during_its_first_start_comes_back_as_one_device(world):
    chance, done, seconds = random.Random(SEED), 0, 45.0
    while done < START_CUTS:
        name = f"board-{done}"
        board = world.board(name)
        board.try_out_at_start()
        moments = []
        for _ in range(CUTS_A_BOARD):
            was_on, moment = cut_at_random(board, chance, seconds)
            done += was_on
            moments.append(round(moment, 1))
        start = time.monotonic()
        report = powered_off(board)
        seconds = time.monotonic() - start
        sys.stdout.write(f"\nseed {SEED}: {name} cut after {moments} s, then {seconds:.0f} s\n")
        assert report["slot"] == "a"
        assert board.boot_entries() == ["slot-a.conf", "slot-b+3.conf"]
        identity = json.loads(board.kept("fedspine/identity.json"))
        assert (identity["device_id"], identity["enrolled"]) == (name, True)
        assert [d["device_id"] for d in world.operator.get("devices")].count(name) == 1
        shutil.rmtree(world.folder / name)


def test_a_board_whose_power_is_cut_during_updates_always_holds_a_whole_release(world, image):
    chance, done = random.Random(SEED + 1), 0
    board = world.board()
    board.try_out_at_start(update=True)
    release = powered_off(board)["release"]
    identity = board.kept("fedspine/identity.json")
    update.make(image, world.updates, default_key(), release=(release := release + 100))
    expected = part_hashes(world.updates)
    whole, writing = updated(world, board, release)
    while done < UPDATE_CUTS:
        update.make(image, world.updates, default_key(), release=(release := release + 100))
        for during in ("writing", "writing", "whole"):  # the last one may come when the release is in place
            board.start()
            if during == "writing":
                wait_until_writing(world, board)
            moment = chance.uniform(0.0, writing if during == "writing" else whole)
            time.sleep(moment)
            done += (was_on := board.cut_power())
            entries = assert_nothing_half_written(board, expected)
            span = f"the {during}, {writing if during == 'writing' else whole:.0f} s"
            sys.stdout.write(f"\nseed {SEED}: cut {moment:.1f} s into {span}, on {was_on}: {entries}\n")
        whole, written = updated(world, board, release)
        writing = written or writing
        assert_nothing_half_written(board, expected)
        assert board.kept("fedspine/identity.json") == identity
