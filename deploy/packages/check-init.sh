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

root_of() {
    local kind=$1 include=sysvinit-core,initscripts,procps exclude=systemd,systemd-sysv
    case $kind in
    sysv) include=$include,sysv-rc ;;
    # Of those that run the scripts only one can be there, and debootstrap takes the first.
    openrc) include=$include,openrc exclude=$exclude,sysv-rc ;;
    *) die "there is no such kind: $kind" ;;
    esac
    [ -f "$CACHE/init-$kind.tar" ] || {
        say "making a root with $kind"
        local W
        W=$(mktemp -d "$CACHE/init-$kind.XXXXXX")
        debootstrap --variant=minbase --include="$include" --exclude="$exclude" \
            bookworm "$W/root" "$MIRROR" >"$W/log" 2>&1 || {
            tail -n 20 "$W/log" >&2
            rm -rf --one-file-system "$W"
            die "debootstrap failed"
        }
        tar -C "$W/root" -cf "$W/tar" .
        mv "$W/tar" "$CACHE/init-$kind.tar"
        rm -rf --one-file-system "$W"
    }
}

for kind in ${1:-sysv openrc}; do
    root_of "$kind"
    PROGRAM=$PROGRAM INSTALL=$PWD/deploy/guest/install-agent.sh TAR=$CACHE/init-$kind.tar \
        python3 deploy/packages/check-init.py "$kind"
    say "$kind: passed"
done
