#!/usr/bin/env bash
# Shows a Core of two replicas on this host: three members of etcd, two ghost-core, one host (on the
# simulated hypervisor, so that no VM has to boot). A call is forwarded to the replica with the host's
# link, that one is killed, and the fleet goes on; so it does without one member of etcd. Needs no
# root. Leaves nothing behind, also when it fails or is interrupted.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."

fail() {
    echo "demo-replicas: error: $*" >&2
    exit 1
}
command -v etcd >/dev/null || fail "etcd is missing: apt-get install etcd-server"

step() { printf '\n==> %s\n' "$*"; }
# Every command is shown as a person would type it.
show() {
    printf '    $ %s\n' "$*"
    "$@"
}

STARTED=$SECONDS
DIR=
declare -A PIDS=()
# GHOST_BIN names a folder with programs that are built already.
BIN=${GHOST_BIN:-${CARGO_TARGET_DIR:-$PWD/target}/release}

# shellcheck disable=SC2317,SC2329 # called by the trap
cleanup() {
    local code=$? name log
    trap - EXIT INT TERM
    set +e
    [ -n "$DIR" ] || exit $code
    if [ $code -ne 0 ]; then
        for log in "$DIR"/*.log; do
            printf '\ndemo-replicas: failed (exit %s); the end of %s:\n' $code "${log##*/}" >&2
            tail -n 20 "$log" >&2
        done
    fi
    # The records go last.
    for name in agent core-a core-b etcd-1 etcd-2 etcd-3; do
        stop "$name"
    done
    rm -rf --one-file-system "$DIR"
    exit $code
}

# stop NAME: as systemd does.
stop() {
    local pid=${PIDS[$1]:-}
    [ -n "$pid" ] || return 0
    unset "PIDS[$1]"
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 400); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

# crash NAME: as a power cut does.
crash() {
    local pid=${PIDS[$1]}
    unset "PIDS[$1]"
    printf '    $ kill -9 %s  # %s\n' "$pid" "$1"
    kill -KILL "$pid"
    wait "$pid" 2>/dev/null || true
}

# begin NAME COMMAND…: in the background, with a log.
begin() {
    local name=$1
    shift
    "$@" >>"$DIR/$name.log" 2>&1 &
    PIDS[$name]=$!
}

until_ok() {
    for _ in $(seq 300); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    fail "not within a minute: $*"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -z "${GHOST_BIN:-}" ]; then
    step "Building Ghost (release; several minutes the first time)"
    make --no-print-directory build
fi

DIR=$(mktemp -d "${TMPDIR:-/tmp}/ghost-replicas.XXXXXX")
# Ports that are free now, so that the demo runs beside installed programs.
read -r -a PORTS < <(python3 -c '
import socket
s = [socket.socket() for _ in range(12)]
for x in s: x.bind(("127.0.0.1", 0))
print(*(x.getsockname()[1] for x in s))')

step "Three members of etcd"
CLUSTER=
ENDPOINTS=
for number in 1 2 3; do
    CLUSTER+=${CLUSTER:+,}etcd-$number=http://127.0.0.1:${PORTS[$((number + 2))]}
    ENDPOINTS+=${ENDPOINTS:+, }http://127.0.0.1:${PORTS[$((number - 1))]}
done
etcd_member() {
    local client=http://127.0.0.1:${PORTS[$(($1 - 1))]} peer=http://127.0.0.1:${PORTS[$(($1 + 2))]}
    begin "etcd-$1" etcd --name "etcd-$1" --data-dir "$DIR/etcd-$1" \
        --listen-client-urls "$client" --advertise-client-urls "$client" \
        --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
        --initial-cluster "$CLUSTER" --initial-cluster-token ghost
}
for number in 1 2 3; do etcd_member "$number"; done

step "Two replicas of ghost-core; the CA is copied to the second"
A=127.0.0.1:${PORTS[6]}
B=127.0.0.1:${PORTS[7]}
for name in a b; do
    address=$A http=${PORTS[8]} metrics=${PORTS[9]}
    [ "$name" = a ] || address=$B http=${PORTS[10]} metrics=${PORTS[11]}
    cat >"$DIR/core-$name.yaml" <<YAML
core:
  data_dir: $DIR/core-$name
  addresses: ["$A", "$B"]
grpc:
  listen: $address
  socket: $DIR/core-$name.sock
http:
  listen: 127.0.0.1:$http
metrics:
  listen: 127.0.0.1:$metrics
link:
  heartbeat_interval: 5s
  ping_interval: 1s
store:
  engine: etcd
  etcd:
    endpoints: [$ENDPOINTS]
    lease: 5s
replica:
  name: $name
  address: $address
YAML
done
sed 's/^/    /' "$DIR/core-a.yaml"

# A person with contexts of their own.
export XDG_CONFIG_HOME=$DIR/config
ghostctl() { "$BIN/ghostctl" "$@"; }
ghost-core() { "$BIN/ghost-core" "$@"; }
ghost-agent() { "$BIN/ghost-agent" "$@"; }
at() {
    local replica=$1
    shift
    ghostctl --endpoint "unix:$DIR/core-$replica.sock" "$@"
}
core() {
    begin "core-$1" "$BIN/ghost-core" run --config "$DIR/core-$1.yaml"
    until_ok at "$1" status
}
core a
mkdir -m 0700 "$DIR/core-b"
show cp -a "$DIR/core-a/identity" "$DIR/core-b/"
core b
both() { [ "$(at a status -o json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)["replicas"]))')" = 2 ]; }
until_ok both
show at b status

step "A host joins"
mkdir -m 0711 "$DIR/agent" "$DIR/world"
cat >"$DIR/agent.yaml" <<YAML
agent:
  name: pc
  data_dir: $DIR/agent
libvirt:
  uri: simulated:$DIR/world
grpc:
  listen: off
  socket: $DIR/agent.sock
http:
  listen: off
metrics:
  listen: off
YAML
begin agent "$BIN/ghost-agent" run --config "$DIR/agent.yaml"
until_ok ghostctl --endpoint "unix:$DIR/agent.sock" status
TOKEN=$(ghost-core token create --socket "$DIR/core-a.sock" --tenant acme)
show ghost-agent enroll --config "$DIR/agent.yaml" --name pc --token "$TOKEN"
online() { [ "$(at "$1" host list --state online -o name)" = pc ]; }
until_ok online a
OWNER=$(at a host show pc -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)["link"]["replica"])')
OTHER=a
[ "$OWNER" = b ] || OTHER=b

step "Its link is at $OWNER; a call that reaches $OTHER is forwarded"
show at "$OTHER" --host pc status
show at "$OWNER" host label pc site=attic

step "The replica with the link is killed"
at "$OTHER" --host pc events --follow >"$DIR/events.out" 2>"$DIR/events.err" &
PIDS[events]=$!
sleep 1
crash "core-$OWNER"
if wait "${PIDS[events]}"; then fail "a stream through a dead replica ended well"; fi
unset "PIDS[events]"
printf '    the stream that went through it: %s\n' "$(head -n 1 "$DIR/events.err")"
here() {
    [ "$(at "$OTHER" host show pc -o json | python3 -c 'import json, sys; h = json.load(sys.stdin); print(h["state"], h["link"]["replica"], h["labels"]["site"])')" = "online $OTHER attic" ]
}
until_ok here
show at "$OTHER" host list
show at "$OTHER" --host pc status

step "It starts again, and reaches the host through the other one"
core "$OWNER"
until_ok both
show at "$OWNER" --host pc list
show at "$OWNER" host list

step "One member of etcd is killed: changes go on"
crash etcd-1
until_ok at a host label pc without=one
show at b host show pc

printf '\ndemo-replicas: done in %s s; everything it made is removed\n' $((SECONDS - STARTED))
