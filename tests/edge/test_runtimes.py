"""Runtimes of a Jetson: a newer one is checked and unpacked, put in place, and left again when no server answers it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedspine_edge.appliance import runtimes, updates
from fedspine_edge.errors import CheckpointError, UsageError, VerificationError
from fedspine_edge.images import manifest, update
from fedspine_edge.images.board import source_tree
from fedspine_edge.images.root_tree import add_facts

PROGRAM = source_tree() / "device_images/l4t/fedspine-runtime"
FACTS = {"board": "generic-arm64", "variant": "full", "version": "0.1"}
FIRST = "/opt/fedspine/runtime"
# What the board has and this machine has not; each checks what it was called with.
PROGRAMS = {
    "unsquashfs": """
        [ "$1 $2 $3" = "-quiet -no-progress -dest" ] && grep -q hsqs "$5" || { echo "not a squashfs" >&2; exit 1; }
        mkdir -p "$4/usr/lib/fedspine" && cp FOLDER/own/usr/lib/fedspine/* "$4/usr/lib/fedspine"
    """,
    "chroot": """
        [ "$2 $3 $4" = "/opt/fedspine/runtime/bin/python -m fedspine_edge.appliance" ] && [ "$5" = unpack ] || exit 9
        exec PYTHON FOLDER/unpack.py "$1$6" "$1/usr/lib/fedspine"
    """,
    "systemctl": """
        echo "$*" >>FOLDER/called
        [ "$1" != restart ] || grep -qxF -f FOLDER/unanswered "$DROP_IN" || touch FOLDER/board/var/lib/fedspine/heard
    """,
}
UNPACK = """
import sys
from pathlib import Path
from fedspine_edge.appliance import runtimes
from fedspine_edge.errors import FedSpineError
try:
    print(runtimes.unpack(Path(sys.argv[1]), own=Path(sys.argv[2])))
except FedSpineError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class Jetson:
    """A board's directories, and the program run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.top, self.offer = folder, folder / "board", folder / "offer"
        self.key = folder / "key.private.pem"
        self.drop_in = self.top / "etc/systemd/system/fedspine-agent.service.d/runtime.conf"
        for own in (folder / "own", self.top / FIRST[1:]):
            add_facts(own, {**FACTS, "release": 10}, manifest.public_key(self.key))
        (self.top / "var/lib/fedspine").mkdir(parents=True)
        self.offer.mkdir()
        (folder / "unanswered").write_text("nothing\n")
        (folder / "unpack.py").write_text(UNPACK)
        (folder / "bin").mkdir()
        for name, text in PROGRAMS.items():
            program = folder / "bin" / name
            program.write_text("#!/bin/sh\n" + text.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable))
            program.chmod(0o755)

    def release(self, number: int, **facts: str) -> Path:
        """Returns a folder as `fedspine image update` makes it."""
        for name in updates.PARTS:
            (self.offer / name).write_bytes(b"hsqs" + str(number).encode())
        update.sign(self.offer, {**FACTS, **facts, "release": number}, self.key)
        return self.offer

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs the program."""
        told = {
            "FEDSPINE_TOP": str(self.top), "FEDSPINE_PATIENCE_SECONDS": "0", "DROP_IN": str(self.drop_in),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.run(["sh", PROGRAM, *words], env=told, capture_output=True, text=True, check=False)

    def runs(self) -> str:
        """Returns the runtime that the unit names."""
        return self.drop_in.read_text().removeprefix("[Service]\nRootDirectory=").strip()

    def there(self) -> list[str]:
        """Returns the runtimes on the disk."""
        return sorted(path.name for path in (self.top / "opt/fedspine").iterdir() if path.is_dir())


@pytest.fixture
def jetson(tmp_path):
    return Jetson(tmp_path)


def test_a_newer_runtime_is_put_in_place_and_the_one_before_again(jetson):
    done = jetson.run("take", jetson.release(20))
    assert done.returncode == 0, done.stderr
    assert jetson.runs() == "/opt/fedspine/runtime-20"
    new = jetson.top / "opt/fedspine/runtime-20"
    assert json.loads((new / "usr/lib/fedspine/image.json").read_text()) == {**FACTS, "release": 20}
    assert all((new / name).is_dir() for name in runtimes.BOUND)
    assert not (jetson.top / FIRST[1:] / "var/tmp/incoming").exists()
    called = (jetson.folder / "called").read_text().splitlines()
    assert called == ["daemon-reload", "restart fedspine-agent.service"]
    for expected in (FIRST, "/opt/fedspine/runtime-20"):
        assert jetson.run("back").returncode == 0
        assert jetson.runs() == expected


def test_a_runtime_that_no_server_answers_is_left_again_and_removed(jetson):
    (jetson.folder / "unanswered").write_text("RootDirectory=/opt/fedspine/runtime-20\n")
    done = jetson.run("take", jetson.release(20))
    assert (done.returncode, jetson.runs(), jetson.there()) == (1, FIRST, ["runtime"])
    assert "the server did not answer release 20" in done.stderr
    assert jetson.run("take", jetson.release(21)).returncode == 0
    assert jetson.runs() == "/opt/fedspine/runtime-21"


def test_the_first_runtime_and_the_two_last_ones_are_kept(jetson):
    for number in (20, 21, 22):
        done = jetson.run("take", jetson.release(number))
        assert done.returncode == 0, done.stderr
    assert jetson.there() == ["runtime", "runtime-21", "runtime-22"]


def change_nothing(folder):
    pass


def change_document(folder):
    file = folder / updates.UPDATE_FILE
    file.write_text(file.read_text().replace('"release": 20', '"release": 21'))


def change_root(folder):
    (folder / updates.PARTS[0]).write_bytes(b"hsqs21")


def lose_signature(folder):
    (folder / updates.SIGNATURE_FILE).unlink()


REFUSED = [
    (20, {}, change_document, VerificationError, "signature"),
    (20, {}, change_root, CheckpointError, "as it was signed"),
    (20, {}, lose_signature, UsageError, "expected a release"),
    (10, {}, change_nothing, VerificationError, "expected a release after 10, found 10"),
    (20, {"variant": "agent"}, change_nothing, VerificationError, "generic-arm64, full"),
]


@pytest.mark.parametrize(("number", "facts", "change", "error", "words"), REFUSED)
def test_what_was_not_signed_for_this_board_or_is_not_newer_is_refused(jetson, number, facts, change, error, words):
    change(jetson.release(number, **facts))
    with pytest.raises(error, match=words):
        runtimes.unpack(jetson.offer, own=jetson.top / FIRST[1:] / "usr/lib/fedspine")
    assert not (jetson.offer / runtimes.TREE).exists()


def test_a_refused_release_changes_nothing(jetson):
    change_root(jetson.release(20))
    done = jetson.run("take", jetson.offer)
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr
    assert not jetson.drop_in.exists()
    assert not (jetson.folder / "called").exists()
    assert jetson.there() == ["runtime"]


@pytest.mark.parametrize("words", [(), ("take",), ("back", "x"), ("back",)])
def test_words_that_mean_nothing_and_a_way_back_to_nothing_are_refused(jetson, words):
    done = jetson.run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("fedspine-runtime")
    assert not jetson.drop_in.exists()
