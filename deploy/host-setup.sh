#!/usr/bin/env bash
# Makes a Debian host ready for Ghost: installs what is missing, starts libvirt's
# daemons and proves that they answer. Safe to run again: what is right stays as it is.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: deploy/host-setup.sh [--check] [--build-deps | --runtime] [--suite release|backports]

  (none)         everything: hypervisor, build tools, what the guest images are made with
  --check        only report; changes nothing; exit 1 if something is missing
  --build-deps   only what `cargo build` needs (libvirt headers, compiler, pkg-config)
  --runtime      only what a host that runs VMs needs, without compilers
  --suite NAME   take QEMU and libvirt from the release or from its backports
                 (default: backports if any of them is installed from there, else the release)
USAGE
}

LOG=/var/log/ghost-host-setup.log
# virtlogd keeps each guest's console log within this; a guest that prints for ever fills 8 MiB, not the disk.
CONSOLE_MAX_SIZE=$((2 * 1024 * 1024))
CONSOLE_MAX_BACKUPS=3

# QEMU and libvirt are built against each other and share strict version dependencies:
# these come from one suite or not at all.
VIRT_RUNTIME=(qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients)
VIRT_BUILD=(libvirt-dev)
# dnsmasq serves DHCP on the NAT network, iptables/nft carry its rules, iproute2 is read by people.
RUNTIME=(dnsmasq-base iptables nftables iproute2 ca-certificates curl)
BUILD=(gcc g++ libc6-dev make pkg-config git)
# The image builds make file systems, boot loaders and archives from plain packages, without loop devices.
IMAGES=(busybox-static cpio kmod xz-utils zstd e2fsprogs dosfstools mtools fdisk python3
    grub-pc-bin grub-common debootstrap)
# Several replicas of Core keep their records in etcd; the tests start members of their own, and step
# the wall clock of single processes by libfaketime.
FLEET=(etcd-server libfaketime)

say() { printf 'host-setup: %s\n' "$*"; }
die() {
    printf 'host-setup: error: %s\n' "$*" >&2
    exit 1
}

MODE=all
CHECK=
SUITE=
while [ $# -gt 0 ]; do
    case $1 in
    --check) CHECK=1 ;;
    --build-deps) MODE=build ;;
    --runtime) MODE=runtime ;;
    --suite)
        SUITE=${2:-}
        [ "$SUITE" = release ] || [ "$SUITE" = backports ] || die "--suite takes release or backports"
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
    shift
done

command -v apt-get >/dev/null || die "this host has no apt-get; Ghost is set up by Debian packages (see the list in this script)"
if [ -z "$CHECK" ] && [ "$(id -u)" != 0 ]; then
    die "run it as root: sudo $0"
fi
# shellcheck source=/dev/null
CODENAME=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$CODENAME" ] || die "cannot read the release's code name from /etc/os-release"
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 hosts are supported so far, this one is $(dpkg --print-architecture)"

VIRT=()
PLAIN=()
case $MODE in
build) VIRT+=("${VIRT_BUILD[@]}") PLAIN+=("${BUILD[@]}") ;;
runtime) VIRT+=("${VIRT_RUNTIME[@]}") PLAIN+=("${RUNTIME[@]}") ;;
all)
    VIRT+=("${VIRT_RUNTIME[@]}" "${VIRT_BUILD[@]}")
    PLAIN+=("${RUNTIME[@]}" "${BUILD[@]}" "${IMAGES[@]}" "${FLEET[@]}")
    ;;
esac

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null || true)" = installed ]; }
missing_of() {
    local p
    for p in "$@"; do
        installed "$p" || printf '%s\n' "$p"
    done
}
systemd_runs() { [ -d /run/systemd/system ]; }
libvirt_answers() {
    command -v virsh >/dev/null && timeout 20 virsh -c qemu:///system version >/dev/null 2>&1
}
# A pid file may outlive its process and the number may belong to another program by now.
daemon_runs() {
    local pid
    pid=$(cat "/run/$1.pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}
virtlogd_runs() {
    if systemd_runs; then systemctl is-active --quiet virtlogd.socket virtlogd.service; else daemon_runs virtlogd; fi
}

# ---- which suite ---------------------------------------------------------------------------------

# Any installed package built from the qemu or libvirt sources binds the choice, also one that we do not ask for.
installed_from_backports() {
    dpkg-query -W -f='${db:Status-Status} ${source:Package} ${Version}\n' 2>/dev/null |
        awk '$1 == "installed" && ($2 == "qemu" || $2 == "libvirt") && $3 ~ /~bpo/ { found = 1 } END { exit !found }'
}
if [ -z "$SUITE" ]; then
    SUITE=release
    if installed_from_backports; then SUITE=backports; fi
elif [ "$SUITE" = release ] && installed_from_backports; then
    die "some QEMU or libvirt packages are installed from backports; mixing suites breaks them: use --suite backports"
fi

# Installed packages of the two sources that come from another suite than the rest.
mixed() {
    [ "$SUITE" = backports ] || return 0
    local p
    for p in "${VIRT[@]}"; do
        if installed "$p" && ! dpkg-query -W -f='${Version}' "$p" | grep -q '~bpo'; then printf '%s\n' "$p"; fi
    done
}

# ---- console log bound ---------------------------------------------------------------------------

virtlogd_value() { # KEY DEFAULT: what virtlogd would use
    local v=
    v=$(sed -n "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*\([0-9]\+\).*/\1/p" /etc/libvirt/virtlogd.conf 2>/dev/null | tail -n 1) || true
    echo "${v:-$2}"
}
# libvirt's own defaults are the bound that we want. An owner's tighter one stays; none at all (0) does not.
console_bounded() {
    local size backups
    size=$(virtlogd_value max_size $CONSOLE_MAX_SIZE)
    backups=$(virtlogd_value max_backups $CONSOLE_MAX_BACKUPS)
    [ "$size" -gt 0 ] && [ "$size" -le $CONSOLE_MAX_SIZE ] && [ "$backups" -le $CONSOLE_MAX_BACKUPS ]
}

# ---- report --------------------------------------------------------------------------------------

if [ -n "$CHECK" ]; then
    bad=0
    report() { # OK? TEXT
        if [ "$1" = ok ]; then say "ok: $2"; else
            say "not ok: $2"
            bad=1
        fi
    }
    for p in "${VIRT[@]}" "${PLAIN[@]}"; do
        if installed "$p"; then report ok "package $p $(dpkg-query -W -f='${Version}' "$p")"; else report no "package $p is missing"; fi
    done
    for p in $(mixed); do report no "package $p is not from backports like the rest of QEMU and libvirt"; done
    if [ "$MODE" != build ]; then
        if getent group ghost >/dev/null; then report ok "group ghost"; else report no "no group ghost"; fi
        if console_bounded; then report ok "console logs are bounded"; else report no "no bound on console logs in /etc/libvirt/virtlogd.conf"; fi
        if virtlogd_runs; then report ok "virtlogd runs"; else report no "virtlogd does not run"; fi
        if libvirt_answers; then report ok "libvirt answers at qemu:///system"; else report no "libvirt does not answer at qemu:///system"; fi
    fi
    if [ "$MODE" != runtime ]; then
        if command -v cargo >/dev/null; then report ok "$(cargo --version)"; else report no "no cargo (see: make deps)"; fi
    fi
    exit $bad
fi

# ---- install -------------------------------------------------------------------------------------

# Two runs at once would fight over dpkg and start daemons twice.
exec 9>/run/ghost-host-setup.lock
flock -w 900 9 || die "another host-setup has been running for 15 minutes"

quietly() { # what apt prints matters only when it fails
    if ! "$@" >>"$LOG" 2>&1 9>&-; then
        tail -n 25 "$LOG" >&2
        die "failed: $* (whole log: $LOG)"
    fi
}
export DEBIAN_FRONTEND=noninteractive
# Another apt at work is waited for; an owner's changed configuration files stay.
APT_OPTIONS=(-o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold)
suite_known() { apt-cache policy | grep -q "n=$CODENAME-backports"; }

# Only these, with the BIOS that QEMU wants at the same age: `-t` would draw in newer libraries wherever there are any.
pin_backports() {
    cat >/etc/apt/preferences.d/ghost-backports.pref <<PIN
# Written by deploy/host-setup.sh: QEMU with its BIOS and libvirt, and nothing else, come from the backports.
Package: src:qemu src:libvirt src:seabios
Pin: release n=$CODENAME-backports
Pin-Priority: 990
PIN
}

# The backports lie on the mirror that this host uses for the release itself.
add_backports() {
    suite_known && return 0
    local line uri key file=/etc/apt/sources.list.d/ghost-backports.sources
    # shellcheck disable=SC2016 # these are apt's own placeholders
    line=$(apt-get indextargets --format '$(CODENAME)|$(REPO_URI)|$(SIGNED_BY)' 'Created-By: Packages' |
        awk -F'|' -v c="$CODENAME" '$1 == c { print; exit }')
    [ -n "$line" ] || die "apt knows no mirror for $CODENAME; add a source for $CODENAME-backports by hand"
    uri=$(cut -d'|' -f2 <<<"$line")
    key=$(cut -d'|' -f3 <<<"$line")
    # apt leaves the placeholder as it is for a source that names no key; a key written into the source
    # itself cannot be carried over by name. Debian's own keyring, trusted anyway, then does.
    [[ $key =~ ^(/|[0-9A-F]{16,}) ]] || key=
    {
        echo '# Written by deploy/host-setup.sh: QEMU and libvirt on this host come from the backports.'
        echo 'Types: deb'
        echo "URIs: $uri"
        echo "Suites: $CODENAME-backports"
        echo "Components: main"
        if [ -n "$key" ]; then echo "Signed-By: $key"; fi
    } >"$file"
    # A source that apt cannot use would break every later apt call of the owner.
    if ! apt-get update >>"$LOG" 2>&1 9>&- || ! suite_known; then
        rm -f "$file"
        tail -n 10 "$LOG" >&2
        die "no usable $CODENAME-backports on $uri (whole log: $LOG)"
    fi
    say "added $CODENAME-backports to apt, from the mirror of $CODENAME"
}

: >>"$LOG"
mapfile -t need_virt < <(missing_of "${VIRT[@]}"; mixed)
mapfile -t need_plain < <(missing_of "${PLAIN[@]}")
if [ ${#need_virt[@]} -gt 0 ] || [ ${#need_plain[@]} -gt 0 ]; then
    say "reading the package lists"
    quietly apt-get update
    say "installing (QEMU and libvirt from $SUITE): ${need_virt[*]} ${need_plain[*]}"
    if [ "$SUITE" = backports ]; then
        add_backports
        pin_backports
        # The whole set, not only what is missing: apt may have to bring present ones to the same version.
        # In one call with the rest, so that apt finds versions of the libraries that suit all of them. Should
        # they need newer libraries than the release has, everything is taken from the backports.
        if ! apt-get install -y --no-install-recommends "${APT_OPTIONS[@]}" "${VIRT[@]}" "${need_plain[@]}" >>"$LOG" 2>&1 9>&-; then
            quietly apt-get install -y --no-install-recommends "${APT_OPTIONS[@]}" -t "$CODENAME-backports" "${VIRT[@]}" "${need_plain[@]}"
        fi
    else
        quietly apt-get install -y --no-install-recommends "${APT_OPTIONS[@]}" "${need_virt[@]}" "${need_plain[@]}"
    fi
else
    say "all packages are there"
fi
mapfile -t need_virt < <(missing_of "${VIRT[@]}" "${PLAIN[@]}")
[ ${#need_virt[@]} -eq 0 ] || die "still not installed: ${need_virt[*]} (log: $LOG)"

if [ "$MODE" = build ]; then
    say "done: build dependencies are there, libvirt headers $(pkg-config --modversion libvirt)"
    exit 0
fi

# ---- group, console bound ------------------------------------------------------------------------

# Members may talk to the agent's local socket without root.
if ! getent group ghost >/dev/null; then
    groupadd --system ghost
    say "created group ghost (add yourself: usermod -aG ghost NAME)"
fi

if ! console_bounded; then
    conf=/etc/libvirt/virtlogd.conf
    sed -i -E 's/^([[:space:]]*(max_size|max_backups)[[:space:]]*=)/#\1/' "$conf"
    printf '\n# Set by deploy/host-setup.sh: a console log may not fill the disk.\nmax_size = %s\nmax_backups = %s\n' \
        $CONSOLE_MAX_SIZE $CONSOLE_MAX_BACKUPS >>"$conf"
    say "bounded console logs in $conf to $CONSOLE_MAX_SIZE bytes and $CONSOLE_MAX_BACKUPS old files"
    # SIGUSR1 makes virtlogd start anew in place, with the logs of running guests still open.
    if systemd_runs; then systemctl reload virtlogd.service 2>/dev/null || true; elif daemon_runs virtlogd; then kill -USR1 "$(cat /run/virtlogd.pid)"; fi
fi

# ---- daemons -------------------------------------------------------------------------------------

start_by_hand() { # NAME
    if daemon_runs "$1"; then return 0; fi
    say "starting $1 (no systemd here; its log: /var/log/libvirt/$1.log)"
    # Without a journal the daemon's own messages would be lost. The lock's descriptor must not live on in it.
    LIBVIRT_LOG_OUTPUTS="3:file:/var/log/libvirt/$1.log" quietly "$1" -d
}

if libvirt_answers && virtlogd_runs; then
    say "libvirt already answers"
elif systemd_runs; then
    say "starting virtlogd and libvirtd through systemd"
    quietly systemctl enable --now virtlogd.socket
    quietly systemctl enable --now libvirtd.service
else
    # Packages leave these to systemd-tmpfiles, and /run is empty after a restart.
    mkdir -p /run/libvirt /run/lock /var/log/libvirt
    start_by_hand virtlogd
    start_by_hand libvirtd
fi
for _ in $(seq 40); do
    if libvirt_answers; then break; fi
    sleep 0.5
done
libvirt_answers || die "libvirt does not answer at qemu:///system (see /var/log/libvirt/libvirtd.log or journalctl -u libvirtd)"
virtlogd_runs || die "virtlogd does not run, guests would have no console log"

timeout 20 virsh -c qemu:///system version | sed -n 's/^\(Using\|Running\)/host-setup: &/p'
say "done"
