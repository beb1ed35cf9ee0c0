#!/bin/sh
# Installs what images are made with and tried out in, or names what is missing. Each is checked by its command.
set -eu
missing=
PATH="$PATH:/usr/sbin:/sbin"
while read -r command package; do
  command -v "$command" >/dev/null || [ -e "$command" ] || missing="$missing $package"
done <<TOOLS
clang++-19 clang-19
aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
depmod kmod
mke2fs e2fsprogs
mkfs.vfat dosfstools
mcopy mtools
mksquashfs squashfs-tools
sfdisk fdisk
zstd zstd
qemu-system-aarch64 qemu-system-arm
/usr/share/AAVMF/AAVMF_CODE.fd qemu-efi-aarch64
TOOLS
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: expected the programs that make images, missing:$missing" >&2
  echo "hint: on Debian 12: sudo apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
echo "installing$missing" >&2
apt-get update -qq >&2
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >&2
