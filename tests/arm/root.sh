#!/bin/sh
# Prints the path of an arm64 Debian 12 with Python 3.11, torch and what the kernel tests import; makes it when the cache
# has none of this recipe. Nothing of it ever runs here but in qemu.
#   sh tests/arm/root.sh    needs tools.sh and .venv; CACHE is where it is kept, 900 MB
set -eu
cd "$(dirname "$0")/../.."
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fedspine-edge}
packages=python3-minimal,python3,libpython3.11-dev,libstdc++6,libgomp1,libopenblas0-pthread
root=$cache/arm64-$(cat tests/arm/root.sh requirements/arm.txt | sha256sum | cut -c1-12)
if [ ! -f "$root/.complete" ]; then
  echo "making $root: an arm64 Debian, then 250 MB of wheels" >&2
  mkdir -p "$cache"
  rm -rf "$root"
  mmdebstrap --quiet --arch=arm64 --variant=extract --include="$packages" bookworm "$root" >&2
  # By its lock alone: pip would read the markers of this machine, not of the board.
  .venv/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --require-hashes --only-binary :all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
    --target "$root/opt/wheels" -r requirements/arm.txt >&2
  # Headers that a compiler for another C library than Debian's can be given.
  mkdir -p "$root/opt/include/aarch64-linux-gnu"
  cp -r "$root/usr/include/python3.11" "$root/opt/include/"
  cp -r "$root/usr/include/aarch64-linux-gnu/python3.11" "$root/opt/include/aarch64-linux-gnu/"
  touch "$root/.complete"
fi
echo "$root"
