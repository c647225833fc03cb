#!/usr/bin/env bash
# Boots a real SysV init and a real OpenRC as process 1, in namespaces of their own and a root of
# Debian's packages, and has ghost-guest installed, started, stopped, restarted and killed there. A
# terminal of the kernel takes the place of the virtio-serial port. Needs root, debootstrap, python3 and
# a mirror of Debian; no virtual machine, and nothing of the host is touched.
#   deploy/packages/check-init.sh [sysv|openrc]
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$(realpath "$0")")/../.."
# shellcheck source=deploy/images/common.sh
. deploy/images/common.sh

[ "$(id -u)" = 0 ] || die "run it as root: namespaces and a root of its own cannot be made without"
need debootstrap python3 unshare nsenter
PROGRAM=$(realpath "${GHOST_GUEST_PROGRAM:-build/guest/ghost-guest}")
[ -x "$PROGRAM" ] || die "there is no $PROGRAM; run: make guest"
MIRROR=$(mirror_of bookworm)
[ -n "$MIRROR" ] || die "apt knows no Debian mirror on this host"
CACHE=$(cache_dir)
mkdir -p "$CACHE"

# The folder that a root is made in; gone with this script.
W=$(mktemp -d "$CACHE/init.XXXXXX")
trap 'rm -rf --one-file-system "$W"' EXIT

root_of() {
    local kind=$1
    [ ! -f "$CACHE/init-$kind.tar" ] || return 0
    say "making a root with $kind"
    case $kind in
    sysv)
        debootstrap --variant=minbase --include=sysvinit-core,sysv-rc,initscripts,procps \
            --exclude=systemd,systemd-sysv bookworm "$W/sysv" "$MIRROR" >"$W/log" 2>&1
        ;;
    openrc)
        # In the place of the scripts' other runner, which debootstrap would take with it.
        root_of sysv
        mkdir "$W/openrc"
        tar -C "$W/openrc" -xf "$CACHE/init-sysv.tar"
        cp --remove-destination /etc/resolv.conf "$W/openrc/etc/resolv.conf"
        printf '#!/bin/sh\nexit 101\n' >"$W/openrc/usr/sbin/policy-rc.d"
        chmod 755 "$W/openrc/usr/sbin/policy-rc.d"
        inside apt-get update -qq && inside apt-get install -y --no-install-recommends openrc
        ;;
    *) die "there is no such kind: $kind" ;;
    esac || {
        tail -n 20 "$W/log" >&2
        die "the root cannot be made"
    }
    tar -C "$W/$kind" -cf "$W/tar" .
    mv "$W/tar" "$CACHE/init-$kind.tar"
}

inside() {
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive \
        chroot "$W/openrc" "$@" >>"$W/log" 2>&1
}

for kind in ${1:-sysv openrc}; do
    root_of "$kind"
    PROGRAM=$PROGRAM INSTALL=$PWD/deploy/guest/install-agent.sh TAR=$CACHE/init-$kind.tar \
        python3 deploy/packages/check-init.py "$kind"
    say "$kind: passed"
done
