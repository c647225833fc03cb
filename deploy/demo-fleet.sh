#!/usr/bin/env bash
# Shows a fleet on this host: a Core and two agents that join it with a token each, a VM that Core
# places, and everything about it through the link of its host. Leaves nothing behind, also when it
# fails or is interrupted.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."

[ "$(id -u)" = 0 ] || {
    echo "demo-fleet: error: run it as root: sudo env PATH=\"\$PATH\" make demo-fleet" >&2
    exit 1
}

step() { printf '\n==> %s\n' "$*"; }
# Every command is shown as a person would type it.
show() {
    printf '    $ %s\n' "$*"
    "$@"
}

STARTED=$SECONDS
DIR=
PIDS=()
BIN=${CARGO_TARGET_DIR:-$PWD/target}/release

# shellcheck disable=SC2317,SC2329 # called by the trap
cleanup() {
    local code=$? pid domain name log
    trap - EXIT INT TERM
    set +e
    [ -n "$DIR" ] || exit $code
    if [ $code -ne 0 ]; then
        for log in "$DIR"/*.log; do
            printf '\ndemo-fleet: failed (exit %s); the end of %s:\n' $code "${log##*/}" >&2
            tail -n 20 "$log" >&2
        done
    fi
    for pid in "${PIDS[@]}"; do kill -TERM "$pid" 2>/dev/null; done
    for pid in "${PIDS[@]}"; do
        # A drain takes at most 30 s.
        for _ in $(seq 400); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null
        wait "$pid" 2>/dev/null
    done
    # What an agent could not take away itself: domains whose disks lie in our folder, and only those.
    for domain in $(virsh -c qemu:///system list --all --uuid 2>/dev/null); do
        if virsh -c qemu:///system dumpxml "$domain" 2>/dev/null | grep -qF "$DIR/"; then
            virsh -c qemu:///system destroy "$domain" >/dev/null 2>&1
            virsh -c qemu:///system undefine "$domain" --nvram --snapshots-metadata --managed-save --checkpoints-metadata >/dev/null 2>&1
        fi
    done
    for name in one two; do
        virsh -c qemu:///system net-destroy "${DIR##*.}-$name" >/dev/null 2>&1
        virsh -c qemu:///system net-undefine "${DIR##*.}-$name" >/dev/null 2>&1
    done
    rm -rf --one-file-system "$DIR"
    exit $code
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step "Setting this host up (packages, libvirt; only what is missing)"
deploy/host-setup.sh

step "Building Ghost (release; several minutes the first time)"
make --no-print-directory build guest

step "Making the guest image tiny (from Debian's packages; kept for the next time)"
IMAGE_FILE=$PWD/build/images/tiny.qcow2
deploy/images/build-tiny.sh "$IMAGE_FILE"

# In /var/lib, because the qemu user must be able to pass through to the disks.
DIR=$(mktemp -d /var/lib/ghost-fleet.XXXXXX)
chmod 0711 "$DIR"
# Ports that are free now, so that the demo runs beside installed programs.
read -r CORE_PORT CORE_HTTP CORE_METRICS < <(python3 -c '
import socket
s = [socket.socket() for _ in range(3)]
for x in s: x.bind(("127.0.0.1", 0))
print(*(x.getsockname()[1] for x in s))')

step "Starting Core"
cat >"$DIR/core.yaml" <<YAML
core:
  name: core
  data_dir: $DIR/core
  addresses: ["127.0.0.1:$CORE_PORT"]
grpc:
  listen: 127.0.0.1:$CORE_PORT
  socket: $DIR/core.sock
http:
  listen: 127.0.0.1:$CORE_HTTP
metrics:
  listen: 127.0.0.1:$CORE_METRICS
link:
  heartbeat_interval: 5s
YAML
sed 's/^/    /' "$DIR/core.yaml"
"$BIN/ghost-core" run --config "$DIR/core.yaml" >"$DIR/core.log" 2>&1 &
PIDS+=($!)

# A person with contexts of their own.
export XDG_CONFIG_HOME=$DIR/config
ghostctl() { "$BIN/ghostctl" "$@"; }
ghost-core() { "$BIN/ghost-core" "$@"; }
ghost-agent() { "$BIN/ghost-agent" "$@"; }

until_ok() {
    for _ in $(seq 300); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    echo "demo-fleet: error: not within a minute: $*" >&2
    exit 1
}
until_ok ghostctl --endpoint "unix:$DIR/core.sock" status

step "An operator gets a certificate"
TOKEN=$(ghost-core token create --socket "$DIR/core.sock" --tenant acme --role operator)
show ghostctl context add fleet --endpoint "https://127.0.0.1:$CORE_PORT" --token "$TOKEN" --use

step "Two hosts join, with a token each and no port that Core could dial"
for name in one two; do
    mkdir -m 0711 "$DIR/$name"
    cat >"$DIR/$name.yaml" <<YAML
agent:
  name: $name
  data_dir: $DIR/$name/data
grpc:
  listen: off
  socket: $DIR/$name/agent.sock
http:
  listen: off
metrics:
  listen: off
guest:
  program: $PWD/build/guest/ghost-guest
network:
  name: ${DIR##*.}-$name
YAML
    "$BIN/ghost-agent" run --config "$DIR/$name.yaml" >"$DIR/$name.log" 2>&1 &
    PIDS+=($!)
    until_ok ghostctl --endpoint "unix:$DIR/$name/agent.sock" status
    TOKEN=$(ghost-core token create --socket "$DIR/core.sock" --tenant acme --label "site=$name")
    show ghost-agent enroll --config "$DIR/$name.yaml" --name "$name" --token "$TOKEN"
    "$BIN/ghostctl" --endpoint "unix:$DIR/$name/agent.sock" -q image import "$IMAGE_FILE" --name tiny
done
online() { [ "$(ghostctl host list --state online -o name | wc -l)" = 2 ]; }
until_ok online
show ghostctl host list

step "A VM without a host: Core places it, and says why"
show ghostctl launch tiny web --cpus 1 --memory 256MiB --disk 1GiB --wait agent
HOST=$(ghostctl list -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["host"])')
show ghostctl list

step "Inside it, through Core and the link of $HOST"
show ghostctl --host "$HOST" exec web -- uname -a
head -c 4M /dev/urandom >"$DIR/there"
show ghostctl --host "$HOST" cp "$DIR/there" web:/tmp/here
show ghostctl --host "$HOST" cp web:/tmp/here "$DIR/back"
show cmp "$DIR/there" "$DIR/back"

step "The host goes away; a command waits for it and is done once"
AGENT_PID=${PIDS[1]}
[ "$HOST" = one ] || AGENT_PID=${PIDS[2]}
kill -TERM "$AGENT_PID"
away() { [ "$(ghostctl host list --state offline -o name | wc -l)" = 1 ]; }
until_ok away
show ghostctl host list
show ghostctl list
show ghostctl --host "$HOST" vm stop web --force --queue=10m
"$BIN/ghost-agent" run --config "$DIR/$HOST.yaml" >>"$DIR/$HOST.log" 2>&1 &
PIDS+=($!)
gone() { [ -z "$(ghostctl command list -o name)" ]; }
until_ok gone
show ghostctl command list --all
show ghostctl --host "$HOST" vm delete web
# Core hears of it from the host a moment later.
none() { [ -z "$(ghostctl list -o name)" ]; }
until_ok none

step "The state of it all"
show ghostctl status
printf '\ndemo-fleet: done in %s s; everything it made is removed\n' $((SECONDS - STARTED))
