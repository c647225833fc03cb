#!/usr/bin/env bash
# Shows Ghost at work on this host: one VM's whole life under an agent of its own, in a folder of its
# own, beside whatever else runs here. Leaves nothing behind, also when it fails or is interrupted.
# IMAGE=tiny (seconds) or debian-12 (a real Debian; under software emulation about a minute to boot)
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."

IMAGE=${IMAGE:-tiny}
case $IMAGE in
tiny) VM_FLAGS=(--cpus 1 --memory 256MiB --disk 1GiB) BOOT_TIMEOUT=120s ;;
debian-12) VM_FLAGS=(--cpus 1 --memory 1GiB --disk 4GiB) BOOT_TIMEOUT=300s ;;
*)
    echo "demo: error: IMAGE is tiny or debian-12, not '$IMAGE'" >&2
    exit 2
    ;;
esac
[ "$(id -u)" = 0 ] || {
    echo "demo: error: run it as root: sudo env PATH=\"\$PATH\" make demo" >&2
    exit 1
}

step() { printf '\n==> %s\n' "$*"; }
# Every command is shown as a person would type it.
show() {
    printf '    $ %s\n' "$*"
    "$@"
}

STARTED=$SECONDS
AGENT_PID=
DIR=
NETWORKS_BEFORE=
ACTIVE_BEFORE=

BIN=${CARGO_TARGET_DIR:-$PWD/target}/release
ghostctl() { "$BIN/ghostctl" --endpoint "unix:$DIR/run/agent.sock" "$@"; }

agent_lives() { [ -n "$AGENT_PID" ] && kill -0 "$AGENT_PID" 2>/dev/null; }

# shellcheck disable=SC2317,SC2329 # called by the trap
cleanup() {
    local code=$? domain network
    trap - EXIT INT TERM
    set +e
    [ -n "$DIR" ] || exit $code
    if [ $code -ne 0 ] && [ -s "$DIR/agent.log" ]; then
        printf '\ndemo: failed (exit %s); the end of the agent'\''s log:\n' $code >&2
        tail -n 30 "$DIR/agent.log" >&2
    fi
    if agent_lives; then
        kill -TERM "$AGENT_PID"
        # Its own drain takes at most 30 s.
        for _ in $(seq 400); do
            agent_lives || break
            sleep 0.1
        done
        agent_lives && kill -KILL "$AGENT_PID"
        wait "$AGENT_PID" 2>/dev/null
    fi
    # What the agent could not take away itself: domains whose disks lie in our folder, and only those.
    for domain in $(virsh -c qemu:///system list --all --uuid 2>/dev/null); do
        if virsh -c qemu:///system dumpxml "$domain" 2>/dev/null | grep -qF "$DIR/"; then
            virsh -c qemu:///system destroy "$domain" >/dev/null 2>&1
            virsh -c qemu:///system undefine "$domain" --nvram --snapshots-metadata --managed-save --checkpoints-metadata >/dev/null 2>&1
        fi
    done
    # A network that was not there, or not active, goes back to that, unless someone else uses it by now.
    for network in $(virsh -c qemu:///system net-list --name 2>/dev/null); do
        grep -qxF "$network" <<<"$ACTIVE_BEFORE" && continue
        [ -z "$(virsh -c qemu:///system net-port-list "$network" --uuid 2>/dev/null | tr -d '[:space:]')" ] || continue
        virsh -c qemu:///system net-destroy "$network" >/dev/null 2>&1
        grep -qxF "$network" <<<"$NETWORKS_BEFORE" || virsh -c qemu:///system net-undefine "$network" >/dev/null 2>&1
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

step "Making the guest image $IMAGE (from Debian's packages; kept for the next time)"
IMAGE_FILE=$PWD/build/images/$IMAGE.qcow2
"deploy/images/build-$IMAGE.sh" "$IMAGE_FILE"

step "Starting an agent with its own folder, sockets and ports"
# In /var/lib, because the qemu user must be able to pass through to the disks.
DIR=$(mktemp -d /var/lib/ghost-demo.XXXXXX)
chmod 0711 "$DIR"
mkdir -m 0711 "$DIR/run" "$DIR/data"
NETWORKS_BEFORE=$(virsh -c qemu:///system net-list --all --name)
ACTIVE_BEFORE=$(virsh -c qemu:///system net-list --name)
# Ports that are free now, so that the demo runs beside an installed agent.
read -r GRPC_PORT HTTP_PORT METRICS_PORT < <(python3 -c '
import socket
s = [socket.socket() for _ in range(3)]
for x in s: x.bind(("127.0.0.1", 0))
print(*(x.getsockname()[1] for x in s))')
cat >"$DIR/agent.yaml" <<YAML
agent:
  name: demo
  data_dir: $DIR/data
libvirt:
  uri: qemu:///system
  accelerator: auto
grpc:
  listen: 127.0.0.1:$GRPC_PORT
  socket: $DIR/run/agent.sock
guest:
  program: $PWD/build/guest/ghost-guest
http:
  listen: 127.0.0.1:$HTTP_PORT
metrics:
  listen: 127.0.0.1:$METRICS_PORT
YAML
sed 's/^/    /' "$DIR/agent.yaml"
"$BIN/ghost-agent" run --config "$DIR/agent.yaml" >"$DIR/agent.log" 2>&1 &
AGENT_PID=$!
for _ in $(seq 150); do
    if ghostctl status >/dev/null 2>&1; then break; fi
    agent_lives || {
        echo "demo: error: the agent ended by itself" >&2
        exit 1
    }
    sleep 0.2
done
show ghostctl status

step "Importing the image"
show ghostctl image import "$IMAGE_FILE" --name "$IMAGE"
show ghostctl image list

step "Launching a VM"
show ghostctl launch "$IMAGE" demo "${VM_FLAGS[@]}"

step "Waiting for its address"
show ghostctl vm wait demo --for address --timeout "$BOOT_TIMEOUT"
show ghostctl list

step "Inside it: no network, no SSH"
show ghostctl vm wait demo --for agent --timeout "$BOOT_TIMEOUT"
show ghostctl guest status demo
show ghostctl exec demo -- uname -a
head -c 4M /dev/urandom >"$DIR/there"
show ghostctl cp "$DIR/there" demo:/tmp/here
show ghostctl exec demo -- ls -l /tmp/here
show ghostctl cp demo:/tmp/here "$DIR/back"
cmp "$DIR/there" "$DIR/back" && echo "    what came back is what went"
show ghostctl vm top demo --once
show ghostctl audit list --vm demo

step "What it printed on its console"
# The address is known a moment before the last lines are there. Into a file first: a reader that stops
# early, like head, would look like a failure of the program before it.
for _ in $(seq 120); do
    ghostctl vm logs demo >"$DIR/console.txt"
    if grep -qE 'ghost-tiny: ready|login:' "$DIR/console.txt"; then break; fi
    sleep 1
done
grep -qE 'ghost-tiny: ready|login:' "$DIR/console.txt" || {
    echo "demo: error: the guest never said that it is ready" >&2
    exit 1
}
printf '    $ ghostctl vm logs demo | tail -n 12\n'
tail -n 12 "$DIR/console.txt"

step "Metrics, as Prometheus reads them"
printf '    $ curl -s http://127.0.0.1:%s/metrics | grep ^ghost_ | head -n 12\n' "$METRICS_PORT"
curl -fsS "http://127.0.0.1:$METRICS_PORT/metrics" >"$DIR/metrics.txt"
grep -m 12 '^ghost_' "$DIR/metrics.txt"

step "What happened, in order"
show ghostctl events
show ghostctl operation list

step "Stopping it as its power button would, and deleting all"
show ghostctl vm stop demo --timeout 60s --force
show ghostctl vm delete demo
show ghostctl image delete "$IMAGE"
show ghostctl list

step "Stopping the agent"
kill -TERM "$AGENT_PID"
wait "$AGENT_PID"
AGENT_PID=
LEFT=$(virsh -c qemu:///system list --all --name | grep -cx demo || true)
printf '\ndemo: done in %s s, domains left behind: %s\n' $((SECONDS - STARTED)) "$LEFT"
