"""Plans for NVIDIA's tools, against fake trees that hold what their documents name; no BSP was ever seen here."""

import io
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_image import save_tiny_image

from fedspine_edge.commands import image as command
from fedspine_edge.errors import ImageError, IncompatibleError, UsageError
from fedspine_edge.images.board import source_tree
from fedspine_edge.images.l4t import Step, Wish, boards, plan

ROOT = source_tree()
PAIRS = [(name, release) for name, board in boards(ROOT).items() for release in board["release"]]
IDS = [f"{name}-r{release['branch']}" for name, release in PAIRS]
WORTHLESS = r"[A-Za-z0-9_-]{24}"


def tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:bz2") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(text), 0o755
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def bsp_files(release: dict, version: tuple[int, int, int] | None = None) -> dict[str, str]:
    first = [*(int(part) for part in release["first"].split(".")), 0]
    branch, major, minor = version or first
    said = f"BSP_BRANCH={branch}\nBSP_MAJOR={major}\nBSP_MINOR={minor}\n"
    return {"Linux_for_Tegra/nv_tegra/bsp_version": said} | {
        f"Linux_for_Tegra/{name}": "#!/bin/sh\n" for name in release["needs"]
    }


@pytest.fixture
def wish(tmp_path):
    def make(board: str, files: dict[str, str], **more) -> Wish:
        bsp = tarball(tmp_path / "bsp.tbz2", files)
        rootfs = tarball(tmp_path / "rootfs.tbz2", {"etc/passwd": "", "usr/bin/true": ""})
        return Wish(board, bsp, rootfs, save_tiny_image(tmp_path / "x.img"), tmp_path / "work", **more)

    return make


def lines(steps: list[Step]) -> list[str]:
    return [" ".join(step.command) for step in steps]


@pytest.mark.parametrize(("name", "release"), PAIRS, ids=IDS)
def test_each_board_and_release_has_its_steps_in_nvidias_order_and_ends_with_its_own_command(wish, name, release):
    steps = lines(plan(wish(name, bsp_files(release)), ROOT))
    marks = [
        "tar xpf",
        "./apply_binaries.sh",
        "./tools/l4t_create_default_user.sh",
        "chpasswd",
        "unsquashfs",
        "install -D",
    ]
    places = [next(i for i, line in enumerate(steps) if line.startswith(mark)) for mark in marks]
    assert places == sorted(places)
    assert steps[-1] == " ".join(release["command"])
    assert any(line.endswith("rootfs/usr/local/sbin/fedspine-runtime") for line in steps)
    assert ("./tools/l4t_flash_prerequisites.sh" in steps) == ("tools/l4t_flash_prerequisites.sh" in release["needs"])


@pytest.mark.parametrize(("name", "release"), PAIRS, ids=IDS)
def test_every_file_that_a_command_names_is_needed_of_the_bsp(name, release):
    words = [word for line in (release["command"], release["mass"]) for part in line for word in part.split()]
    named = {word.removeprefix("./") for word in words if "/" in word}
    assert named <= set(release["needs"])
    assert f"{release['conf']}.conf" in release["needs"]


@pytest.mark.parametrize(("name", "release"), PAIRS, ids=IDS)
def test_a_bsp_without_any_one_of_the_files_is_refused_by_its_name(wish, name, release):
    for missing in release["needs"]:
        files = bsp_files(release)
        del files[f"Linux_for_Tegra/{missing}"]
        with pytest.raises(IncompatibleError, match=re.escape(missing)):
            plan(wish(name, files), ROOT)


WRONG = [
    ("tx2", (36, 4, 3)),
    ("tx2", (35, 5, 0)),
    ("tx2", (32, 6, 1)),
    ("xavier-nx", (36, 4, 3)),
    ("agx-orin", (32, 7, 4)),
]
WRONG += [("orin-nano", (32, 7, 4)), ("orin-nano", (35, 2, 1)), ("orin-nano", (37, 0, 0))]


@pytest.mark.parametrize(("board", "version"), WRONG, ids=lambda value: str(value))
def test_a_release_that_is_not_for_the_board_is_refused(wish, board, version):
    every = {name: "" for _, release in PAIRS for name in bsp_files(release)}
    files = every | bsp_files(PAIRS[0][1], version)
    with pytest.raises(IncompatibleError, match=f"found L4T {'.'.join(map(str, version))}"):
        plan(wish(board, files), ROOT)


def test_a_tarball_that_was_cut_off_is_refused(wish):
    asked = wish("tx2", bsp_files(PAIRS[IDS.index("tx2-r32")][1]))
    asked.bsp.write_bytes(asked.bsp.read_bytes()[:-40])
    with pytest.raises(IncompatibleError, match="expected a whole tarball"):
        plan(asked, ROOT)


def test_a_tarball_of_something_else_is_refused(wish):
    with pytest.raises(IncompatibleError, match="expected a release in Linux_for_Tegra"):
        plan(wish("tx2", {"README": "hello"}), ROOT)
    asked = wish("tx2", bsp_files(PAIRS[IDS.index("tx2-r32")][1]))
    with pytest.raises(IncompatibleError, match="etc/passwd"):
        plan(replace(asked, rootfs=asked.bsp), ROOT)


def test_the_licence_is_accepted_only_by_the_user(wish):
    files = bsp_files(PAIRS[IDS.index("agx-orin-r36")][1])
    assert "--accept-license" not in "\n".join(lines(plan(wish("agx-orin", files), ROOT)))
    assert "--accept-license" in "\n".join(lines(plan(wish("agx-orin", files, accept_license=True), ROOT)))


def test_the_only_password_on_a_command_line_is_worth_nothing_and_another_each_time(wish):
    asked = wish("agx-orin", bsp_files(PAIRS[IDS.index("agx-orin-r36")][1]))
    found = [re.findall(rf" -p ({WORTHLESS}) ", "\n".join(lines(plan(asked, ROOT)))) for _ in range(2)]
    assert len(found[0]) == len(found[1]) == 1
    assert found[0] != found[1]


@pytest.mark.parametrize(("name", "release"), PAIRS, ids=IDS)
def test_many_boards_are_packed_once_and_written_together_where_nvidia_has_a_tool_for_it(wish, name, release):
    asked = wish(name, bsp_files(release), massflash=3)
    if not release["mass"]:
        with pytest.raises(UsageError, match="l4t_initrd_flash"):
            plan(asked, ROOT)
        return
    pack, write = lines(plan(asked, ROOT))[-2:]
    assert "--no-flash --massflash 3" in pack
    assert "--flash-only --massflash 3" in write


def test_nothing_runs_without_execute_and_a_failing_step_ends_it(wish, monkeypatch):
    asked = wish("tx2", bsp_files(PAIRS[IDS.index("tx2-r32")][1]))
    ran: list[tuple[list[str], bytes | None]] = []

    class Done:
        returncode = 0

    def run(line, *, input, **_):
        ran.append((list(line), input))
        Done.returncode = 7 if line[0] == "unsquashfs" else 0
        return Done

    monkeypatch.setattr(command.subprocess, "run", run)
    told: list[str] = []
    steps = command.flash_jetson(asked, execute=False, password_hash="$y$secret", tell=told.append)
    assert not ran
    assert len(told) == len(steps)
    with pytest.raises(ImageError, match="unsquashfs, failed with exit code 7"):
        command.flash_jetson(asked, execute=True, password_hash="$y$secret", tell=told.append)
    assert ran[-1][0][0] == "unsquashfs"
    assert [given for line, given in ran if line[0] == "chpasswd"] == [b"fedspine:$y$secret\n"]
    assert "$y$secret" not in "\n".join(told)
