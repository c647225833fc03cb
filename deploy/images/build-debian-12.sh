#!/usr/bin/env bash
# Builds a Debian 12 cloud image from Debian's packages alone: cloud kernel, systemd, cloud-init (NoCloud),
# SSH. BIOS and GPT; the root grows with the disk. Needs root for the chroot, but no loop device.
set -euo pipefail
# shellcheck source=deploy/images/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"

[ $# = 1 ] || die "usage: build-debian-12.sh OUT.qcow2"
OUT=$(realpath -m "$1")
SUITE=bookworm
VIRTUAL_MIB=2048
PACKAGES=(systemd-sysv systemd-resolved libpam-systemd dbus udev kmod procps
    iproute2 iputils-ping netbase ca-certificates openssh-server sudo
    cloud-init cloud-guest-utils fdisk e2fsprogs qemu-guest-agent
    linux-image-cloud-amd64 initramfs-tools zstd)

[ "$(id -u)" = 0 ] || die "run it as root: a chroot cannot be made without"
need debootstrap chroot unshare mke2fs sfdisk grub-mkimage qemu-img python3 flock
[ -f /usr/lib/grub/i386-pc/boot.img ] || die "grub-pc-bin is not installed; run deploy/host-setup.sh"

MIRROR=$(mirror_of $SUITE)
if [ -z "$MIRROR" ]; then
    apt-get update -qq
    MIRROR=$(mirror_of $SUITE)
    [ -n "$MIRROR" ] || MIRROR=$(mirror_of "$(. /etc/os-release && echo "$VERSION_CODENAME")")
    [ -n "$MIRROR" ] || die "apt knows no Debian mirror on this host"
fi
KERNEL=$(newest_dependency linux-image-cloud-amd64)
KEY=$(content_key "$0" "$HERE/common.sh" -- "$KERNEL")
CACHE=$(cache_dir)
mkdir -p "$CACHE"
CACHED=$CACHE/debian-12-$KEY.qcow2

# The build runs in its own mount and process namespace: whatever happens, even kill -9, no mount of
# ours stays on the host and no daemon that a package's script started lives on.
if [ -z "${GHOST_IN_NAMESPACE:-}" ]; then
    exec 9>"$CACHE/debian-12.lock"
    flock 9
    if [ ! -f "$CACHED" ]; then
        GHOST_IN_NAMESPACE=1 unshare --mount --propagation private --pid --fork --kill-child "$0" "$OUT" 9>&-
    else
        say "taken from the cache ($KEY)"
    fi
    hand_out "$CACHED" "$OUT"
    exit 0
fi

# A fixed place, so that what a killed build left is swept by the next one; the lock above guards it.
W=$CACHE/debian-12.work
R=$W/root
cleanup() {
    umount -R "$R/proc" 2>/dev/null || true
    umount -R "$W" 2>/dev/null || true
    # Never across a mount, should one of the above have failed.
    rm -rf --one-file-system "$W"
}
trap cleanup EXIT
rm -rf --one-file-system "$W"
mkdir -p "$W"
# In memory where there is plenty: dpkg syncs every file it writes.
if [ "$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo)" -gt $((6 * 1024 * 1024)) ]; then
    mount -t tmpfs -o size=4g,mode=0755 tmpfs "$W"
fi
LOG=$W/build.log
run() {
    if ! "$@" >>"$LOG" 2>&1; then
        tail -n 30 "$LOG" >&2
        die "failed: $*"
    fi
}

say "installing the base system (a few minutes)"
run debootstrap --variant=minbase $SUITE "$R" "$MIRROR"

mount -t proc proc "$R/proc"
# No service starts inside the chroot.
printf '#!/bin/sh\nexit 101\n' >"$R/usr/sbin/policy-rc.d"
chmod 0755 "$R/usr/sbin/policy-rc.d"
# For the build only: nothing here has to survive a power cut.
echo force-unsafe-io >"$R/etc/dpkg/dpkg.cfg.d/build-unsafe-io"
# Like Debian's own slim images: without manuals and translations, with every licence.
cat >"$R/etc/dpkg/dpkg.cfg.d/slim" <<'F'
path-exclude /usr/share/man/*
path-exclude /usr/share/locale/*
path-include /usr/share/locale/locale.alias
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
F
echo 'Acquire::Languages "none";' >"$R/etc/apt/apt.conf.d/90languages"
cp /etc/resolv.conf "$R/etc/resolv.conf"
{
    echo "deb $MIRROR $SUITE main"
    for s in $SUITE-updates $SUITE-security; do
        m=$(mirror_of "$s")
        [ -z "$m" ] || echo "deb $m $s main"
    done
} >"$R/etc/apt/sources.list"

# The virtio drivers that a root disk can need, and no others.
mkdir -p "$R/etc/initramfs-tools/conf.d"
printf 'MODULES=list\nCOMPRESS=zstd\n' >"$R/etc/initramfs-tools/conf.d/ghost"
printf 'virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\n' >"$W/modules"
mkdir -p "$R/etc/kernel"
printf 'do_symlinks = yes\nrelative_links = yes\n' >"$R/etc/kernel-img.conf"

inside() { run env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive chroot "$R" "$@"; }
say "installing ${PACKAGES[*]}"
inside apt-get update
inside apt-get upgrade -y
inside apt-get install -y --no-install-recommends "${PACKAGES[@]}"
cat "$W/modules" >>"$R/etc/initramfs-tools/modules"
inside update-initramfs -u -k all

# ---- what makes it a cloud image ----
echo 'LABEL=ghost-root / ext4 defaults,noatime,errors=remount-ro 0 1' >"$R/etc/fstab"
cat >"$R/etc/cloud/cloud.cfg.d/90_ghost.cfg" <<'F'
# The seed disk that Ghost attaches is the only source.
datasource_list: [ NoCloud, None ]
apt:
  preserve_sources_list: true
# What the image speaks already; anything else would have to be generated first.
locale: C.UTF-8
# RSA keys take seconds to find under software emulation, and every client in use knows these two.
ssh_genkeytypes: [ ed25519, ecdsa ]
ssh_quiet_keygen: true
system_info:
  network:
    renderers: [ networkd ]
F
inside systemctl enable systemd-networkd.service systemd-resolved.service serial-getty@ttyS0.service
inside systemctl set-default multi-user.target
# Timers that would make work in the first minutes of a short life.
inside systemctl disable apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
# ifupdown is not there, and cloud-init says all that there is to say about the network.
ln -sf /run/systemd/resolve/stub-resolv.conf "$R/etc/resolv.conf"
echo localhost >"$R/etc/hostname"
echo LANG=C.UTF-8 >"$R/etc/default/locale"
# Identity is made at the first start.
: >"$R/etc/machine-id"
rm -f "$R"/etc/ssh/ssh_host_*_key* "$R/var/lib/dbus/machine-id" "$R/usr/sbin/policy-rc.d" "$R/etc/dpkg/dpkg.cfg.d/build-unsafe-io"

# The boot loader reads this; /vmlinuz and /initrd.img are links that kernel packages keep current.
mkdir -p "$R/boot/grub"
cat >"$R/boot/grub/grub.cfg" <<'G'
linux16 /vmlinuz root=LABEL=ghost-root ro console=tty0 console=ttyS0,115200 net.ifnames=0 quiet
initrd16 /initrd.img
boot
G

inside apt-get clean
rm -rf "$R"/var/lib/apt/lists/* "$R"/var/cache/apt/*.bin "$R"/var/log/*.log "$R"/var/log/apt/* "$R"/tmp/* \
    "$R"/usr/share/man/* "$R"/boot/*.old
find "$R/usr/share/locale" -mindepth 1 -maxdepth 1 ! -name locale.alias -exec rm -rf {} +
find "$R/usr/share/doc" -type f ! -name copyright -delete
find "$R/usr/share/doc" -type l -delete
find "$R/usr/share/doc" -type d -empty -delete
umount -R "$R/proc"

# ---- the disk ----
say "writing the disk"
RAW=$W/disk.raw
truncate -s ${VIRTUAL_MIB}M "$RAW"
# A BIOS boot partition for the loader, then the root, which growpart can lengthen because it comes last.
run sfdisk -q "$RAW" <<'S'
label: gpt
start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649, name=bios
start=4096, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=root
S
SECTORS=$(sfdisk -J "$RAW" | python3 -c 'import json,sys; print(json.load(sys.stdin)["partitiontable"]["partitions"][1]["size"])')
run mke2fs -q -F -t ext4 -L ghost-root -O ^metadata_csum_seed,^orphan_file -d "$R" -E "offset=$((4096 * 512))" "$RAW" $((SECTORS / 2))k
echo "normal \$prefix/grub.cfg" >"$W/early.cfg"
# shellcheck disable=SC2016
embed_grub "$RAW" '(,gpt2)/boot/grub' 2048 2048 "$W/early.cfg" biosdisk part_gpt ext2 normal configfile linux16 echo
qemu-img convert -c -m 4 -W -O qcow2 "$RAW" "$CACHED.tmp"
mv "$CACHED.tmp" "$CACHED"
# Older builds of the same image are of no use to anyone.
find "$CACHE" -maxdepth 1 -name 'debian-12-*.qcow2' ! -name "$(basename "$CACHED")" -delete
