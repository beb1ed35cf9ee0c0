"""Two builds, in different directories, with nothing shared but Debian's packages: `make test-images-nightly`."""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from fedspine_edge.commands.image import cache_folder, default_key
from fedspine_edge.images import manifest

pytestmark = pytest.mark.images_nightly

ROOT = Path(__file__).parents[2]
# Without `site`, so that the copy is imported and not the checkout that this environment has installed.
BUILD = """
import sys
from pathlib import Path
sys.path[:0] = [*sys.argv[1:3], sys.argv[3]]
from fedspine_edge.commands.image import build
build("generic-arm64", sys.argv[4], out=Path(sys.argv[5]), key=Path(sys.argv[6]), tell=print)
import fedspine_edge
print(fedspine_edge.__file__)
"""


def test_a_second_build_elsewhere_is_the_same_to_the_bit(tmp_path, image):
    said = json.loads((image.parent / "manifest.json").read_text())
    copy, cache, out = tmp_path / "another/place", tmp_path / "cache/fedspine-edge/images", tmp_path / "out"
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
        (copy / name).chmod((copy / name).stat().st_mode & 0o700)
    shutil.copytree(cache_folder() / "apt", cache / "apt")
    environment = {
        **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "SOURCE_DATE_EPOCH": str(said["source_date_epoch"])
    }  # fmt: skip
    places = [copy / "python", copy / "server", site.getsitepackages()[0], said["variant"], out, default_key()]
    done = subprocess.run(
        [sys.executable, "-S", "-c", BUILD, *map(str, places)],
        cwd=copy, env=environment, umask=0o077, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(copy) in done.stdout
    other = json.loads((out / "manifest.json").read_text())
    assert other["partitions"] == said["partitions"]
    assert other["image"]["sha256"] == said["image"]["sha256"] == manifest.file_sha256(image)
    for name in (manifest.SUMS, manifest.SIGNATURE, "sbom.cdx.json"):
        assert (out / name).read_bytes() == (image.parent / name).read_bytes()
