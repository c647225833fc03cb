#!/usr/bin/env bash
# Builds the tiny guest image: Debian's cloud kernel, busybox, a few scripts. It boots in seconds even in
# software emulation and does what a test or a demonstration asks of a guest. Needs no root and no loop device.
set -euo pipefail
# shellcheck source=deploy/images/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"

[ $# = 1 ] || die "usage: build-tiny.sh OUT.qcow2"
OUT=$(realpath -m "$1")
VIRTUAL_MIB=128
MODULES=(virtio_pci virtio_blk virtio_scsi sd_mod sr_mod virtio_net virtio_console virtio_balloon virtio-rng
    button evdev pvpanic-mmio pvpanic-pci isofs vfat nls_cp437 nls_utf8 nls_ascii)

need apt-get dpkg-deb busybox cpio zstd depmod mke2fs sfdisk grub-mkimage qemu-img python3 flock
[ -f /usr/lib/grub/i386-pc/boot.img ] || die "grub-pc-bin is not installed; run deploy/host-setup.sh"

# The agent is part of this guest; a program built elsewhere may be named.
ROOT=$(realpath "$HERE/../..")
GUEST=${GHOST_GUEST_PROGRAM:-$ROOT/build/guest/ghost-guest}
if [ ! -f "$GUEST" ]; then
    say "building ghost-guest"
    make --no-print-directory -C "$ROOT" guest >&2
fi
[ -f "$GUEST" ] || die "there is no $GUEST"

KERNEL=$(newest_dependency linux-image-cloud-amd64)
if [ -z "$KERNEL" ]; then
    # A fresh host or container has no package lists yet.
    [ "$(id -u)" = 0 ] || die "apt knows no linux-image-cloud-amd64; run apt-get update"
    apt-get update -qq
    KERNEL=$(newest_dependency linux-image-cloud-amd64)
    [ -n "$KERNEL" ] || die "apt knows no linux-image-cloud-amd64"
fi
# --no-all-versions alone would name the installed one; the candidate is what apt-get download brings.
KERNEL_VERSION=$(apt-cache policy "$KERNEL" | awk '$1 == "Candidate:" { print $2 }')
# What the benchmark compares our agent with.
PEER_VERSION=$(apt-cache policy qemu-guest-agent | awk '$1 == "Candidate:" { print $2 }')
KEY=$(content_key "$0" "$HERE/common.sh" "$HERE"/tiny/* "$GUEST" -- "$KERNEL" "$KERNEL_VERSION" "$(dpkg-query -W busybox-static)" "$PEER_VERSION")

CACHE=$(cache_dir)
mkdir -p "$CACHE"
exec 9>"$CACHE/tiny.lock"
flock 9
CACHED=$CACHE/tiny-$KEY.qcow2
if [ -f "$CACHED" ]; then
    say "taken from the cache ($KEY)"
    hand_out "$CACHED" "$OUT"
    exit 0
fi

W=$(mktemp -d)
trap 'rm -rf "$W"' EXIT
say "building with $KERNEL $KERNEL_VERSION"

# apt drops to its own user for the download, which may then not write here.
mkdir -m 0777 "$W/deb" && chmod 0755 "$W"
(cd "$W/deb" && apt-get download -qq "$KERNEL" 2>"$W/apt.log") || {
    cat "$W/apt.log" >&2
    die "cannot download $KERNEL"
}
dpkg-deb -x "$W"/deb/*.deb "$W/kernel"
VERSION=$(basename "$W"/kernel/lib/modules/*)
depmod -b "$W/kernel" "$VERSION"

# ---- the initramfs ----
R=$W/root
mkdir -p "$R"/{dev,proc,sys,tmp,run,mnt,data,root,etc/acpi/PWRF,bin,sbin,usr/bin,usr/sbin,usr/share/udhcpc} "$R/lib/modules/$VERSION"
install -m 0755 "$(command -v busybox)" "$R/bin/busybox"
# Every applet by name; the binary itself says where each belongs.
busybox --list-full | while read -r applet; do
    [ "$applet" = bin/busybox ] || ln -sf /bin/busybox "$R/$applet"
done
# Scripts that people write for a cloud begin with bash; ash runs most of them.
printf '#!/bin/sh\nexec /bin/sh "$@"\n' >"$R/bin/bash" && chmod 0755 "$R/bin/bash"
install -m 0755 "$HERE/tiny/init" "$R/init"
install -m 0755 "$HERE"/tiny/{rc,rc.down,dhcp,seed,user-data} "$R/etc/"
install -m 0644 "$HERE"/tiny/{inittab,profile} "$R/etc/"
install -m 0755 "$GUEST" "$R/sbin/ghost-guest"
install -m 0755 "$HERE/tiny/qemu-ga" "$R/sbin/qemu-ga"
# busybox acpid calls the power button this.
install -m 0755 "$HERE/tiny/power-button" "$R/etc/acpi/PWRF/00000080"
echo 'root::0:0:root:/root:/bin/sh' >"$R/etc/passwd"
echo 'root:x:0:' >"$R/etc/group"
echo '127.0.0.1 localhost' >"$R/etc/hosts"
printf 'NAME="Ghost tiny"\nID=ghost-tiny\nPRETTY_NAME="Ghost tiny guest"\n' >"$R/etc/os-release"

# The wanted modules, and with them what modules.dep says they need.
for m in "${MODULES[@]}"; do
    line=$(grep -E "/$m\.ko:" "$W/kernel/lib/modules/$VERSION/modules.dep") || die "$KERNEL has no module $m"
    for f in ${line/:/ }; do
        install -D -m 0644 "$W/kernel/lib/modules/$VERSION/$f" "$R/lib/modules/$VERSION/$f"
    done
done
cp "$W/kernel/lib/modules/$VERSION"/modules.{builtin,builtin.modinfo,order} "$R/lib/modules/$VERSION/"
depmod -b "$R" "$VERSION"
(cd "$R/lib/modules/$VERSION" && rm -f modules.*.bin modules.builtin* modules.order modules.devname modules.softdep)

# ---- the boot disk ----
B=$W/boot
mkdir -p "$B/boot"
(cd "$R" && find . -print0 | LC_ALL=C sort -z | cpio --null -o -H newc -R 0:0 --reproducible --quiet | zstd -q -19 -T0) >"$B/boot/initrd"
cp "$W/kernel/boot/vmlinuz-$VERSION" "$B/boot/vmlinuz"

# qemu-guest-agent with its libraries, for /sbin/qemu-ga. On the disk: in the initramfs every boot would have to
# unpack it. Nothing starts it.
mkdir -m 0777 "$W/peer"
(cd "$W/peer" && apt-get download -qq qemu-guest-agent 2>>"$W/apt.log") || {
    cat "$W/apt.log" >&2
    die "cannot download qemu-guest-agent"
}
dpkg-deb -x "$W"/peer/*.deb "$W/peer/root"
LIBRARIES=$(ldd "$W/peer/root/usr/sbin/qemu-ga")
if grep -q 'not found' <<<"$LIBRARIES"; then
    say "without qemu-guest-agent, for want of libraries here: $(grep 'not found' <<<"$LIBRARIES" | awk '{ print $1 }' | tr '\n' ' ')"
else
    mkdir -p "$B/qemu-ga"
    cp "$W/peer/root/usr/sbin/qemu-ga" "$B/qemu-ga/"
    awk '$2 == "=>" { print $3 } $1 ~ /^\/.*ld-linux/ { print $1 }' <<<"$LIBRARIES" | while read -r library; do
        cp -L "$library" "$B/qemu-ga/"
    done
fi

# Measured under software emulation: the 16-bit entry and no address randomisation save 2.5 of 6 seconds.
# panic=1: a crashed guest without a pvpanic device starts anew instead of standing still for ever.
cat >"$W/early.cfg" <<'G'
serial --unit=0 --speed=115200
terminal_output serial console
linux16 $prefix/vmlinuz console=ttyS0,115200 panic=1 quiet nokaslr
initrd16 $prefix/initrd
boot
G
RAW=$W/tiny.raw
START=2048
truncate -s ${VIRTUAL_MIB}M "$RAW"
printf 'label: dos\nlabel-id: 0x67686f73\nstart=%s, type=83, bootable\n' $START | sfdisk -q "$RAW"
mke2fs -q -F -t ext4 -b 4096 -m 0 -L ghost-tiny -O ^metadata_csum_seed,^orphan_file -J size=4 -d "$B" \
    -E "offset=$((START * 512)),root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0" "$RAW" $((VIRTUAL_MIB * 1024 - START / 2))k
# shellcheck disable=SC2016 # (,msdos1) is a partition of whichever disk the BIOS booted from
embed_grub "$RAW" '(,msdos1)/boot' 1 $((START - 1)) "$W/early.cfg" biosdisk part_msdos ext2 linux16 serial terminal

qemu-img convert -c -O qcow2 "$RAW" "$CACHED.tmp"
mv "$CACHED.tmp" "$CACHED"
# Older builds of the same image are of no use to anyone.
find "$CACHE" -maxdepth 1 -name 'tiny-*.qcow2' ! -name "tiny-$KEY.qcow2" -delete
hand_out "$CACHED" "$OUT"
