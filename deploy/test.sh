#!/usr/bin/env bash
# Sets this host up, makes the guest images and runs every tier of the tests, the system tier on real
# libvirt and QEMU included. Extra arguments go to cargo test.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
[ "$(id -u)" = 0 ] || {
    echo "test: error: run it as root (the system tier starts VMs): sudo env PATH=\"\$PATH\" make test" >&2
    exit 1
}

STARTED=$SECONDS
LAST=$SECONDS
lap() {
    printf 'test: %s: %s s\n' "$1" $((SECONDS - LAST))
    LAST=$SECONDS
}
# shellcheck disable=SC2317,SC2329 # called by the trap
total() {
    local code=$?
    if [ $code -eq 0 ]; then printf 'test: all tiers passed in %s s\n' $((SECONDS - STARTED)); else printf 'test: FAILED (exit %s) after %s s\n' $code $((SECONDS - STARTED)); fi
}
trap total EXIT

deploy/host-setup.sh
make --no-print-directory cargo-there
lap "host set-up"

# The tiny image has it built in, the Debian gets it by its seed.
make --no-print-directory guest hostile
export GHOST_GUEST_PROGRAM=$PWD/build/guest/ghost-guest
export GHOST_HOSTILE_PROGRAM=$PWD/build/guest/hostile-guest
lap "guest agent"

deploy/images/build-tiny.sh build/images/tiny.qcow2
deploy/images/build-debian-12.sh build/images/debian-12.qcow2
# Where the system tier finds them.
export GHOST_TINY_IMAGE=$PWD/build/images/tiny.qcow2
export GHOST_DEBIAN_IMAGE=$PWD/build/images/debian-12.qcow2
lap "guest images"

# The system tier runs the programs themselves, which cargo test alone would not build.
cargo build --workspace --bins --locked
cargo test --workspace --no-run --locked
lap "build"

# One run over the whole workspace, so that no second set of features has to be compiled.
cargo test --workspace --no-fail-fast --locked "$@"
lap "tests"
