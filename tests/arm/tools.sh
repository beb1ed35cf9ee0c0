#!/bin/sh
# Installs the cross compilers and emulators that Debian has, or names what is missing. Each is checked by its command.
set -eu
missing=
while read -r command package; do
  command -v "$command" >/dev/null || missing="$missing $package"
done <<TOOLS
clang++-19 clang-19
llvm-mca-19 llvm-19
aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
qemu-aarch64 qemu-user
mmdebstrap mmdebstrap
TOOLS
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: expected the tools that build for aarch64 and emulate it, missing:$missing" >&2
  echo "hint: on Debian 12: sudo apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
echo "installing$missing" >&2
apt-get update -qq >&2
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >&2
