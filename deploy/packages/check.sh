#!/usr/bin/env bash
# Builds both packages in two versions, looks into them, and installs, upgrades and removes the .rpm in a
# root of its own. With --guest the .deb then lives its life in a real Debian 12 (e2e: packages), which
# needs what the system tier needs. Needs root, cargo-deb, cargo-generate-rpm and Debian's rpm.
#   deploy/packages/check.sh [--guest]
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$(realpath "$0")")/../.."
die() {
    echo "check: error: $*" >&2
    exit 1
}
same() { [ "$2" = "$3" ] || die "$1: not $(printf '%q' "$3") but $(printf '%q' "$2")"; }

[ "$(id -u)" = 0 ] || die "run it as root: a package is installed in a root of its own"
for tool in cargo-deb cargo-generate-rpm; do
    command -v $tool >/dev/null || die "$tool is missing: cargo install --locked cargo-deb cargo-generate-rpm"
done
for tool in rpm dpkg-deb busybox; do
    command -v $tool >/dev/null || die "$tool is missing: apt-get install rpm dpkg busybox-static"
done
[ -x build/guest/ghost-guest ] || make --no-print-directory guest

W=$(mktemp -d)
trap 'rm -rf --one-file-system "$W"' EXIT
(cd guest && cargo deb -q --no-build --no-strip --deb-version 0.1.0-1 --output "$W/old.deb" >/dev/null)
(cd guest && cargo deb -q --no-build --no-strip --deb-version 0.1.1-1 --output "$W/new.deb" >/dev/null)
cargo generate-rpm -p guest --output "$W/old.rpm"
cargo generate-rpm -p guest --set-metadata 'version="0.1.1"' --output "$W/new.rpm"

# ---- .deb: what is in it
same "files of the .deb" "$(dpkg-deb -c "$W/old.deb" | awk '$1 !~ /^d/ { print $1, $2, $6 }' | sort -k3)" \
    "-rw-r--r-- 0/0 ./etc/ghost/guest.yaml
-rwxr-xr-x 0/0 ./etc/init.d/ghost-guest
-rw-r--r-- 0/0 ./lib/systemd/system/ghost-guest.service
-rwxr-xr-x 0/0 ./usr/sbin/ghost-guest
-rw-r--r-- 0/0 ./usr/share/doc/ghost-guest/copyright"
same "its configuration" "$(dpkg-deb -I "$W/old.deb" conffiles | sort)" "/etc/ghost/guest.yaml
/etc/init.d/ghost-guest"
same "what it needs" "$(dpkg-deb -f "$W/old.deb" Depends)" ""
mkdir "$W/deb"
dpkg-deb -x "$W/old.deb" "$W/deb"
cmp build/guest/ghost-guest "$W/deb/usr/sbin/ghost-guest"
echo "check: the .deb holds what it should"

# ---- .rpm: what is in it, and its life in a root with nothing but a shell
same "files of the .rpm" "$(rpm -qp --qf '[%{FILEMODES:perms} %{FILEUSERNAME} %{FILENAMES}\n]' "$W/old.rpm" | sort -k3)" \
    "-rw-r--r-- root /etc/ghost/guest.yaml
-rw-r--r-- root /usr/lib/systemd/system/ghost-guest.service
-rwxr-xr-x root /usr/sbin/ghost-guest"
same "its configuration" "$(rpm -qp --configfiles "$W/old.rpm")" /etc/ghost/guest.yaml
same "what it needs" "$(rpm -qp --requires "$W/old.rpm" | grep -v '^rpmlib\|^config(' | sort -u)" /bin/sh
R=$W/root
mkdir -p "$R/bin" "$R/dev" "$R/var/lib/rpm" "$R/etc"
mknod -m 666 "$R/dev/null" c 1 3
cp "$(command -v busybox)" "$R/bin/busybox"
for name in sh rm; do ln -s busybox "$R/bin/$name"; done
# A systemctl that writes down what it is asked for: no systemd runs here.
# shellcheck disable=SC2016 # it is expanded there
printf '#!/bin/sh\necho "$*" >>/systemctl.log\n' >"$R/bin/systemctl"
chmod 755 "$R/bin/systemctl"
# Debian's rpm wants to be told that somebody knows what they do.
in_root() { rpm --force-debian --root "$R" --define '_dbpath /var/lib/rpm' "$@"; }
said() {
    same "$1" "$(cat "$R/systemctl.log" 2>/dev/null || true)" "$2"
    : >"$R/systemctl.log"
}
in_root --nodeps -i "$W/old.rpm"
said "systemctl at the installation" "enable ghost-guest.service"
same "the program in the root" "$(chroot "$R" /usr/sbin/ghost-guest version)" "$(build/guest/ghost-guest version)"
# Without a channel it waits for one, and ends when it is told to.
timeout --preserve-status -s TERM 2 chroot "$R" /usr/sbin/ghost-guest run >"$W/run.log" 2>&1 || [ $? = 143 ] ||
    die "the program does not run: $(cat "$W/run.log")"
echo "disabled: [ssh_keys]" >>"$R/etc/ghost/guest.yaml"
touch "$R/usr/sbin/ghost-guest.old"
in_root --nodeps -U "$W/new.rpm"
said "systemctl at the upgrade" ""
same "the version" "$(in_root -q --qf '%{VERSION}' ghost-guest)" 0.1.1
grep -q ssh_keys "$R/etc/ghost/guest.yaml" || die "the upgrade took the owner's configuration"
mkdir -p "$R/run/systemd/system"
in_root --nodeps -U --oldpackage "$W/old.rpm"
said "systemctl at an upgrade under systemd" "daemon-reload
--no-block try-restart ghost-guest.service
daemon-reload"
in_root --nodeps -e ghost-guest
said "systemctl at the removal" "disable ghost-guest.service
stop ghost-guest.service
daemon-reload"
same "what a removal leaves" "$(cd "$R" && find usr etc ! -type d | sort)" "etc/ghost/guest.yaml.rpmsave"
echo "check: the .rpm is installed, upgraded and removed as it should"

if [ "${1:-}" = --guest ]; then
    GHOST_GUEST_PACKAGES=$W cargo test --locked -p ghost-e2e --test it -- packages:: --nocapture
fi
echo "check: passed"
