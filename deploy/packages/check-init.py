"""What check-init.sh does with one kind of init."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tty

KIND = sys.argv[1]
MAGIC = b"\xf7GH\x01"
PATIENCE = 120
INITTAB = {
    # The scripts of rcS, which set clocks and check disks, are for machines.
    "sysv": "id:2:initdefault:\nl2:2:wait:/etc/init.d/rc 2\n"
    "b2:2:wait:/bin/sh -c 'echo yes >/run/booted'\n",
    "openrc": "id:2:initdefault:\nsi::sysinit:/sbin/openrc sysinit\nl1:2:wait:/sbin/openrc boot\n"
    "l2:2:wait:/sbin/openrc default\n",
}
# Its own mounts, and /dev with nothing of the host's but what programs cannot do without.
BOOT = r"""
set -e
cd "$1"
mount --make-rprivate /
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for row in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "dev/${row%:*}" c 1 "${row#*:}"; done
: >dev/console
mkdir dev/virtio-ports
: >dev/virtio-ports/org.ghost.agent.0
mount --bind "$2" dev/virtio-ports/org.ghost.agent.0
hostname guest
exec chroot . /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb /sbin/init
"""


class Guest:
    def __init__(self, root):
        self.root = root
        self.init = None
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)

    def boot(self):
        command = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child"]
        script = ["sh", "-c", BOOT, "boot", self.root, os.ttyname(self.slave)]
        self.unshare = subprocess.Popen(
            command + script, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.init = until("process 1", lambda: self.process_one())

    def process_one(self):
        assert self.unshare.poll() is None, "it does not boot"
        children = f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children"
        for pid in open(children).read().split():
            try:
                if os.readlink(f"/proc/{pid}/exe").endswith("/init"):
                    return pid
            except OSError:
                pass
        return None

    def end(self):
        if self.init:
            os.kill(int(self.init), signal.SIGKILL)
            self.unshare.wait()
            self.init = None

    def run(self, script):
        """Code and output of a script in the guest."""
        command = ["nsenter", "-t", self.init, "-m", "-u", "-i", "-n", "-p", "--root", "--wd"]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", script]
        done = subprocess.run(
            command + clean, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE
        )
        return done.returncode, done.stdout + done.stderr

    def ok(self, script):
        code, said = self.run(script)
        assert code == 0, f"{script}: {code}: {said}"
        return said

    def hello(self):
        """Waits until an agent presents itself on the channel."""
        seen = b""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self.master], [], [], 1)[0]:
                seen += os.read(self.master, 65536)
                if MAGIC in seen and b"telemetry" in seen and b"freeze" in seen:
                    return
        raise AssertionError(f"no agent says hello: {seen!r}; {self.run('cat /var/log/ghost-guest.log')}")

    def drain(self):
        while select.select([self.master], [], [], 0)[0]:
            os.read(self.master, 65536)

    def pid(self):
        """Of the agent itself, and not of who watches it; empty where none runs."""
        found = self.run("for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = ghost-guest ] && echo ${p#/proc/}; done")[1]
        pids = found.split()
        assert len(pids) <= 1, f"several agents: {pids}"
        return pids[0] if pids else ""


def until(what, ask):
    """Waits for something; what runs in the guest may say why it is not there yet."""
    end = time.monotonic() + PATIENCE
    while True:
        answer = ask()
        ready = answer[0] == 0 if isinstance(answer, tuple) else answer
        if ready:
            return answer
        assert time.monotonic() < end, f"{what}: not within {PATIENCE} s: {answer}"
        time.sleep(0.1)


def step(what):
    print(f"check-init: {KIND}: {what}", flush=True)


def life(guest):
    root = guest.root
    service = "/etc/init.d/ghost-guest"
    guest.boot()
    marker = "/run/openrc/softlevel" if KIND == "openrc" else "/run/booted"
    booted = f"test -s {marker} || {{ ls -la {marker}; cat /dev/console; ps ax; exit 1; }}"
    until("booted", lambda: guest.run(booted))
    init = os.readlink(f"/proc/{guest.init}/exe")
    step(f"booted: process 1 is {init}, {guest.run('/sbin/init --version')[1].strip()}")

    said = guest.ok("sh /root/install-agent.sh")
    guest.hello()
    assert os.path.exists(root + service), said
    enabled = "/etc/runlevels/default" if KIND == "openrc" else "/etc/rc2.d"
    assert any("ghost-guest" in name for name in os.listdir(root + enabled))
    step("installed, started, and it said hello")

    first = guest.pid()
    assert first
    guest.ok(f"{service} status")
    guest.ok("sh /root/install-agent.sh")
    assert guest.pid() == first, "installing the same again disturbs it"

    guest.drain()
    guest.ok(f"{service} restart")
    guest.hello()
    second = guest.pid()
    assert second and second != first
    step("restarted")

    guest.ok(f"{service} stop")
    assert guest.pid() == ""
    code, said = guest.run(f"{service} status")
    assert code == 3, f"status of what is stopped: {code}: {said}"
    guest.ok(f"{service} stop")
    guest.drain()
    guest.ok(f"{service} start")
    guest.hello()
    guest.ok(f"{service} start")
    step("stopped and started; its status says so")

    third = guest.pid()
    guest.drain()
    guest.ok(f"kill -9 {third}")
    if KIND == "openrc":
        guest.hello()
        assert guest.pid() not in ("", third)
        guest.ok(f"{service} status")
        step("killed, and started again by its supervisor")
    else:
        until("gone", lambda: guest.pid() == "")
        assert guest.run(f"{service} status")[0] == 3
        guest.ok(f"{service} start")
        guest.hello()
        step("killed: SysV's init starts nothing again, and it can be started")

    guest.end()
    guest.drain()
    guest.boot()
    guest.hello()
    step("booted anew: it comes by itself")


def main():
    folder = tempfile.mkdtemp(prefix="ghost-init.", dir="/var/tmp")
    root = folder + "/root"
    guest = None
    try:
        os.mkdir(root)
        subprocess.run(["tar", "-C", root, "-xf", os.environ["TAR"]], check=True)
        open(root + "/etc/inittab", "w").write(INITTAB[KIND])
        open(root + "/etc/fstab", "w").close()
        if KIND == "openrc":
            # As in a container: what is for machines is left out.
            with open(root + "/etc/rc.conf", "a") as conf:
                conf.write('\nrc_sys="lxc"\n')
            for level in ("sysinit", "boot", "default"):
                os.makedirs(f"{root}/etc/runlevels/{level}", exist_ok=True)
                for name in os.listdir(f"{root}/etc/runlevels/{level}"):
                    os.remove(f"{root}/etc/runlevels/{level}/{name}")
        else:
            for name in os.listdir(root + "/etc/rc2.d"):
                os.remove(f"{root}/etc/rc2.d/{name}")
        shutil.copy(os.environ["PROGRAM"], root + "/root/ghost-guest")
        shutil.copy(os.environ["INSTALL"], root + "/root/install-agent.sh")
        guest = Guest(root)
        life(guest)
    finally:
        if guest:
            guest.end()
        shutil.rmtree(folder, ignore_errors=True)


main()
