"""The parts of an image: initial file system, partition table, what a device is told, seal."""

import gzip
import json
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_image import NAMES, save_tiny_image

from fedspine_edge.agent.enrolment import load_claim
from fedspine_edge.errors import ImageError, UsageError, VerificationError
from fedspine_edge.images import debian, disk, initrd, manifest, root_tree
from fedspine_edge.images.board import boards, load_board, source_tree
from fedspine_edge.images.provision import Belonging, claim_and_pin, config_text
from fedspine_edge.images.verify import verify

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLAIM, PIN = "c" * 43, "ab" * 32


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes]]:
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = fields[1], archive[start : start + fields[6]]
        at = (start + fields[6] + 3) & ~3


@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}(/[a-z]{1,9})?", fullmatch=True), st.binary(max_size=40), max_size=6))
def test_every_archive_holds_what_was_put_in_whatever_the_order(contents):
    entries = {name: initrd.Entry(initrd.FILE | 0o644, content) for name, content in contents.items()}
    archive = initrd.newc(entries)
    assert unpacked(archive) == {name: (0o100644, content) for name, content in contents.items()}
    assert archive == initrd.newc(dict(reversed(entries.items())))
    assert len(archive) % 512 == 0


def test_the_initial_file_system_has_every_applet_that_its_script_calls():
    script = (source_tree() / "device_images" / "init.sh").read_bytes()
    found = unpacked(gzip.decompress(initrd.initrd(b"elf", script, {"00-a.ko": b"a"})))
    words = {word for line in script.decode().splitlines() if not line.startswith("#") for word in line.split()}
    called = words & {
        "cat",
        "grep",
        "insmod",
        "mkdir",
        "mount",
        "reboot",
        "sed",
        "sleep",
        "switch_root",
        "cut",
        "awk",
        "ls",
    }
    assert {f"bin/{name}" for name in called} <= set(found)
    assert found["etc/modules"][1] == b"00-a.ko\n"
    assert found["init"] == (0o100755, script)


def test_a_wheels_record_names_only_what_is_kept(tmp_path):
    # What is left out may hold the directory a wheel was built in, and so would its checksum.
    packages, wheel, site = tmp_path / "packages", tmp_path / "some-1-py3-none-any.whl", root_tree.SITE
    packages.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("some/__init__.py", "lib/pkgconfig/some.pc"):
            archive.writestr(name, "")
        archive.writestr("some-1.dist-info/RECORD", "some/__init__.py,sha256=a,0\nlib/pkgconfig/some.pc,sha256=b,0\n")
    root_tree.add_python(tmp_path / "root", packages, [wheel])
    assert (tmp_path / "root" / site / "some-1.dist-info/RECORD").read_text() == "some/__init__.py,sha256=a,0\n"
    assert not (tmp_path / "root" / site / "lib").exists()


def test_modules_load_after_what_they_need_and_built_in_ones_not_at_all():
    dependencies = "fs/ext4.ko: fs/jbd2.ko fs/mbcache.ko\nfs/jbd2.ko:\nfs/mbcache.ko:\nx/sd_mod.ko: x/scsi-core.ko\n"
    dependencies += "x/scsi-core.ko:\n"
    order = initrd.module_order(dependencies, "kernel/mmc_block.ko\n", ["sd-mod", "mmc_block", "ext4", "sd_mod"])
    assert order == ["x/scsi-core.ko", "x/sd_mod.ko", "fs/mbcache.ko", "fs/jbd2.ko", "fs/ext4.ko"]
    with pytest.raises(ImageError, match="expected the module nvme"):
        initrd.module_order(dependencies, "", ["nvme"])


def test_partitions_are_read_from_the_table(tmp_path):
    image = save_tiny_image(tmp_path / "x.img")
    assert [part.name for part in disk.partitions(image)] == list(NAMES)
    assert disk.partition(image, "root_b") == disk.Partition("root_b", (64 + 128) * 512, 64 * 512)
    with pytest.raises(ImageError, match="expected a partition swap"):
        disk.partition(image, "swap")
    (tmp_path / "y.img").write_bytes(b"no" * 4096)
    with pytest.raises(ImageError, match="expected a disk image"):
        disk.partitions(tmp_path / "y.img")


def test_every_board_says_where_it_is_from_and_what_it_was_seen_on():
    for name in boards(source_tree()):
        board = load_board(name, source_tree())
        assert board.name == name
        assert board.source
        assert board.verified
    with pytest.raises(UsageError, match="expected a board among"):
        load_board("toaster", source_tree())


@given(st.text(min_size=1, max_size=16), st.text(min_size=8, max_size=40).filter(lambda t: t.isprintable()))
def test_any_wifi_name_and_passphrase_come_out_as_they_went_in(ssid, passphrase):
    if not 1 <= len(ssid.encode("utf-8", "ignore")) <= 32 or any(0xD800 <= ord(c) < 0xE000 for c in ssid + passphrase):
        return
    told = tomllib.loads(config_text(Belonging("https://s:1", CLAIM, PIN, ssid=ssid, passphrase=passphrase)))
    assert told["wifi"] == {"ssid": ssid, "psk": passphrase}


def test_a_device_reads_what_the_desk_wrote(tmp_path):
    model, data = tmp_path / "m", tmp_path / "rows.jsonl"
    model.mkdir()
    file = tmp_path / "fedspine.toml"
    file.write_text(config_text(Belonging("https://s:1/", f"{CLAIM}.{PIN}", name="b-1", model=model, data=data)))
    claim = load_claim(file)
    assert (claim.url, claim.token, claim.name) == ("https://s:1", f"{CLAIM}.{PIN}", "b-1")
    assert (claim.settings.model, claim.settings.data) == ("/config/model", "/config/examples.jsonl")
    file.write_text("[server]\n")
    with pytest.raises(UsageError, match="expected server and device"):
        load_claim(file)


@pytest.mark.parametrize(
    ("token", "ca", "words"),
    [
        ("short", PIN, "expected a token"),
        (CLAIM, None, "expected the fingerprint"),
        (CLAIM, "zz", "expected the fingerprint"),
        (f"{CLAIM}.{PIN}", "cd" * 32, "expected the CA"),
    ],
)
def test_tokens_and_pins_that_do_not_belong_together_are_refused(token, ca, words):
    with pytest.raises(UsageError, match=words):
        claim_and_pin(token, ca)


def test_a_pin_may_have_colons():
    assert claim_and_pin(CLAIM, ":".join(["AB"] * 32)) == (CLAIM, PIN)


@pytest.mark.parametrize(
    "wrong", [{"server": "http://s"}, {"name": "a b"}, {"ssid": "x" * 33}, {"ssid": "x", "passphrase": "short"}]
)
def test_what_cannot_be_is_refused_before_the_image_is_touched(wrong):
    with pytest.raises(UsageError):
        config_text(Belonging(**{"server": "https://s:1", "token": f"{CLAIM}.{PIN}", **wrong}))


@pytest.fixture
def sealed(tmp_path):
    image = save_tiny_image(tmp_path / "x.img")
    (tmp_path / "x.img.zst").write_bytes(b"packed")
    parts = {part.name: disk.partition_sha256(image, part) for part in disk.partitions(image)}
    said = {"image": {"sha256": manifest.file_sha256(image)}, "partitions": parts}
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    manifest.seal(tmp_path, ["x.img.zst", "manifest.json"], tmp_path / "private.pem")
    return tmp_path


def change(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_an_untouched_image_is_as_built_and_a_provisioned_one_differs_in_its_config_partition_only(sealed):
    image = sealed / "x.img"
    assert verify(image, sealed / manifest.PUBLIC_KEY)["found"]["provisioned"] is False
    change(image, disk.partition(image, "config").start)
    assert verify(image, None)["found"] | {"sealed": []} == {"sealed": [], "trusted_key": False, "provisioned": True}
    change(image, disk.partition(image, "root_a").start + 90)
    with pytest.raises(VerificationError, match="expected partition root_a"):
        verify(image, None)


@pytest.mark.parametrize("name", ["x.img.zst", "manifest.json", manifest.SUMS, manifest.SIGNATURE])
def test_any_changed_byte_breaks_the_seal(sealed, name):
    change(sealed / name, 3)
    with pytest.raises(VerificationError):
        verify(sealed / "x.img.zst", sealed / manifest.PUBLIC_KEY)


def test_another_keys_seal_is_not_taken(sealed, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    manifest.seal(other, [], other / "private.pem")
    with pytest.raises(VerificationError, match="expected a signature"):
        verify(sealed / "x.img.zst", other / manifest.PUBLIC_KEY)
    assert (other / "private.pem").stat().st_mode & 0o777 == 0o600


def test_debians_suites_come_from_where_this_machines_apt_takes_them(monkeypatch):
    told = ("mirror/debian bookworm main", "mirror/debian bookworm contrib", "safe/debian bookworm-security main")
    monkeypatch.setattr(debian, "run", lambda _: "".join(f"http://{line}\n" for line in told).encode())
    assert debian.sources_of(["bookworm", "bookworm-security"]) == [
        "http://mirror/debian bookworm main",
        "http://safe/debian bookworm-security main",
    ]
    with pytest.raises(ImageError, match="expected apt to know Debian's bookworm-updates"):
        debian.sources_of(["bookworm", "bookworm-updates"])
