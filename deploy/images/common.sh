# shellcheck shell=bash
# What both image builds share: the cache, the boot loader, errors. Sourced, not run.

# shellcheck disable=SC2034 # read by the builds
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
ME=$(basename "$0" .sh)

say() { printf '%s: %s\n' "$ME" "$*" >&2; }
die() {
    printf '%s: error: %s\n' "$ME" "$*" >&2
    exit 1
}

need() { # COMMANDS...
    local c
    PATH=$PATH:/usr/sbin:/sbin
    for c in "$@"; do
        command -v "$c" >/dev/null || die "$c is not installed; run deploy/host-setup.sh"
    done
}

# Images outlive a checkout: a fresh clone on the same host finds them here.
cache_dir() {
    if [ -n "${GHOST_IMAGE_CACHE:-}" ]; then
        echo "$GHOST_IMAGE_CACHE"
    elif [ "$(id -u)" = 0 ]; then
        echo /var/cache/ghost/images
    else
        echo "${XDG_CACHE_HOME:-$HOME/.cache}/ghost/images"
    fi
}

# content_key FILES... [-- WORDS...]: an image is made anew when a file that makes it changes, or a word (a package's version)
content_key() {
    {
        while [ $# -gt 0 ] && [ "$1" != -- ]; do
            cat "$1"
            shift
        done
        echo "$@"
    } | sha256sum | cut -c1-16
}

# hand_out CACHED OUT: a copy, so that whoever uses OUT cannot damage the cached one
hand_out() {
    mkdir -p "$(dirname "$2")"
    # The name appears only once the file is whole.
    cp --reflink=auto --sparse=always "$1" "$2.tmp.$$"
    mv -f "$2.tmp.$$" "$2"
    say "wrote $2 ($(($(stat -c %s "$2") / 1048576)) MiB, $(qemu-img info -U --output=json "$2" |
        python3 -c 'import json,sys; print(json.load(sys.stdin)["virtual-size"] // 1048576)') MiB virtual)"
}

# mirror_of SUITE: where this host's own apt takes that suite from, empty if it does not know it
mirror_of() {
    # shellcheck disable=SC2016 # these are apt's own placeholders
    apt-get indextargets --format '$(CODENAME)|$(REPO_URI)' 'Created-By: Packages' |
        awk -F'|' -v suite="$1" '$1 == suite { print $2; exit }'
}

# newest_dependency META: the package that META stands for, such as linux-image-cloud-amd64
newest_dependency() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$1" 2>/dev/null |
        awk '$1 == "Depends:" { print $2; exit }'
}

# embed_grub RAW PARTITION-SCHEME START-SECTOR SECTORS EARLY-CONFIG MODULES...
# Does what grub-install does on a mounted disk, on a plain file instead: the first stage goes
# into the boot sector, the core with its modules where the partition table leaves room for it.
embed_grub() {
    local raw=$1 prefix=$2 start=$3 room=$4 config=$5 core
    shift 5
    core=$(mktemp)
    grub-mkimage -O i386-pc -o "$core" -p "$prefix" -c "$config" "$@"
    python3 - "$raw" "$core" "$start" "$room" <<'PY'
import struct, sys
raw, core_file, start, room = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
boot = bytearray(open('/usr/lib/grub/i386-pc/boot.img', 'rb').read())
core = bytearray(open(core_file, 'rb').read())
if len(core) > room * 512:
    sys.exit('the boot loader does not fit before the first partition')
# GRUB_BOOT_MACHINE_KERNEL_SECTOR: where the first stage finds the core.
boot[0x5c:0x64] = struct.pack('<Q', start)
# GRUB_BOOT_MACHINE_DRIVE_CHECK: believe the BIOS about the boot drive, as for every hard disk.
boot[0x66:0x68] = b'\x90\x90'
# The core's own first sector lists where the rest of it lies.
core[0x1f4:0x1fc] = struct.pack('<Q', start + 1)
with open(raw, 'r+b') as disk:
    # The partition table in the last 72 bytes of the sector stays.
    disk.write(boot[:440])
    disk.seek(start * 512)
    disk.write(core)
PY
    rm -f "$core"
}
