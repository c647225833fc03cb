#!/bin/sh
# Installs ghost-guest in a running VM. Run it as root in the guest, with the program beside it or named:
#   sh install-agent.sh [PROGRAM] [options of `ghost-guest install`]
set -eu
[ "$(id -u)" = 0 ] || {
    echo "install-agent: run it as root" >&2
    exit 1
}
program=$(dirname "$0")/ghost-guest
case ${1:-} in
'' | -*) ;;
*)
    program=$1
    shift
    ;;
esac
[ -f "$program" ] || {
    echo "install-agent: no program at $program" >&2
    exit 1
}
# It may lie on a file system that programs are not started from.
copy=$(mktemp)
trap 'rm -f "$copy"' EXIT
cp "$program" "$copy"
chmod 0700 "$copy"
"$copy" install "$@"
"$copy" status || true
