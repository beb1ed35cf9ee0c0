#!/bin/sh
# What the kernel starts: loads modules, finds the slot that the boot entry names, lays memory over it, goes there.
# Whatever fails here starts the machine again, so that after three times the boot loader takes the other slot.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

die() {
  echo "fedspine: $1; starting again in 5 seconds" >/dev/kmsg
  distrust
  sleep 5
  reboot -f
}

# The boot loader counts only what was not good yet. A good slot that dies is put on trial again, if there is another one.
distrust() {
  [ -n "$slot" ] || return
  find_partition esp
  [ -n "$device" ] && mount -t vfat "$device" /efi || return
  entries=/efi/loader/entries
  case $slot in a) other=b ;; *) other=a ;; esac
  for entry in "$entries/slot-$other".conf "$entries/slot-$other"+*.conf; do
    if [ -e "$entry" ] && [ -e "$entries/slot-$slot.conf" ]; then
      mv "$entries/slot-$slot.conf" "$entries/slot-$slot+2-1.conf"
    fi
  done
  umount /efi
}

find_partition() {
  device=
  for event in /sys/class/block/*/uevent; do
    if grep -qx "PARTNAME=$1" "$event"; then
      device=/dev/$(sed -n s/^DEVNAME=//p "$event")
    fi
  done
}

while read -r module; do
  insmod "/lib/modules/$module" 2>/dev/null
done </etc/modules

slot=
for word in $(cat /proc/cmdline); do
  case $word in fedspine.slot=*) slot=${word#fedspine.slot=} ;; esac
done
[ -n "$slot" ] || die "the kernel's line names no slot"

for wait in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  find_partition "root_$slot"
  [ -z "$device" ] || break
  sleep 1
done
[ -n "$device" ] || die "no partition root_$slot"

mount -t squashfs -o ro "$device" /slot || die "root_$slot holds no root file system"
mount -t tmpfs -o mode=0755,size=25% cow /cow || die "no memory for the upper layer"
mkdir /cow/upper /cow/work
mount -t overlay -o lowerdir=/slot,upperdir=/cow/upper,workdir=/cow/work root /root || die "no overlay"
mkdir -p /root/run /root/proc /root/sys /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev
exec switch_root /root /lib/systemd/systemd
die "root_$slot has no systemd"
