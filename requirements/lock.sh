#!/bin/sh
# Compiles the pinned, hashed .txt files from the .in files: sh requirements/lock.sh   (needs `pip install uv`).
# torch is kept out: its CPU build differs by index, so it is pinned, unhashed, in torch.txt.
set -eu
cd "$(dirname "$0")"
never=$(mktemp)
trap 'rm -f "$never"' EXIT
lock() {
  name=$1
  shift
  uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
    --no-emit-package torch --override "$never" "$@" "$name.in" -o "$name.txt"
}
echo "torch ; sys_platform == 'never'" >"$never"
lock build
lock run -c build.txt
lock dev -c build.txt -c run.txt
lock llama -c run.txt
# In an environment of its own (see flower.in); Flower needs Python 3.11.
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header flower.in -o flower.txt
uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header wheels.in -o wheels.txt
# For one machine alone, an emulated board: nothing in it depends on where it is read.
uv pip compile --quiet --python-version 3.11 --python-platform aarch64-manylinux_2_28 --generate-hashes --no-annotate \
  --no-header -c dev.txt arm.in -o arm.txt
# llama.txt holds the one package that is compiled; what it imports stands in run.txt.
awk '/^[a-z]/ { keep = /^llama-cpp-python/ } keep' llama.txt >"$never" && cat "$never" >llama.txt
for image in image-agent image-full; do
  uv pip compile --quiet --python-version 3.11 --python-platform aarch64-manylinux_2_28 --generate-hashes --no-annotate \
    --no-header -c arm.txt -c run.txt "$image.in" -o "$image.txt"
done
