//! The service files, for wherever the program lies. The ones in `deploy/packages/` are what these
//! make for `/usr/sbin`.

use std::path::Path;

/// A unit of systemd.
pub fn systemd(program: &Path) -> String {
    format!(
        "[Unit]
Description=Ghost guest agent
Documentation=man:systemd.service(5)
# As early as its own file and devices are there: who waits for a guest waits for this, and
# cloud-init's network stage, which the usual order puts first, may take half a minute.
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup-dev.service
Conflicts=shutdown.target
Before=shutdown.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={program} run --supervised
Restart=always
RestartSec=1
# A program that was executed through it and runs out of memory does not take the agent with it.
OOMPolicy=continue
TasksMax=infinity

[Install]
WantedBy=multi-user.target
",
        program = program.display()
    )
}

/// A service of OpenRC.
pub fn openrc(program: &Path) -> String {
    format!(
        "#!/sbin/openrc-run
name=\"ghost-guest\"
description=\"Ghost guest agent\"
supervisor=\"supervise-daemon\"
command=\"{program}\"
command_args=\"run --supervised\"
respawn_delay=1
respawn_max=0
output_log=\"/var/log/ghost-guest.log\"
error_log=\"/var/log/ghost-guest.log\"

depend() {{
	# Not needed: Debian's OpenRC has no service of that name, and would not start this one.
	after localmount dev modules
}}
",
        program = program.display()
    )
}

/// A script of SysV's init.
pub fn sysv(program: &Path) -> String {
    format!(
        "#!/bin/sh
### BEGIN INIT INFO
# Provides:          ghost-guest
# Required-Start:    $local_fs
# Required-Stop:     $local_fs
# Default-Start:     2 3 4 5
# Default-Stop:
# Short-Description: Ghost guest agent
### END INIT INFO
# chkconfig: 2345 20 80
# description: Ghost guest agent

PROGRAM={program}
PIDFILE=/var/run/ghost-guest.pid
LOG=/var/log/ghost-guest.log

running() {{
    [ -s \"$PIDFILE\" ] && [ \"$(cat \"/proc/$(cat \"$PIDFILE\")/comm\" 2>/dev/null)\" = ghost-guest ]
}}

start() {{
    running && return 0
    \"$PROGRAM\" run </dev/null >>\"$LOG\" 2>&1 &
    echo $! >\"$PIDFILE\"
}}

stop() {{
    if running; then
        kill \"$(cat \"$PIDFILE\")\"
        # Whoever starts it next finds the channel free.
        n=0
        while running && [ $n -lt 10 ]; do
            sleep 1
            n=$((n + 1))
        done
    fi
    rm -f \"$PIDFILE\"
}}

case \"$1\" in
start) start ;;
stop) stop ;;
restart | force-reload)
    stop
    start
    ;;
status)
    if running; then echo \"ghost-guest is running\"; else
        echo \"ghost-guest is not running\"
        exit 3
    fi
    ;;
*)
    echo \"usage: $0 start|stop|restart|status\" >&2
    exit 2
    ;;
esac
",
        program = program.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The packages ship these files; `GHOST_GUEST_WRITE=1` writes them anew.
    #[test]
    fn the_packages_ship_what_is_rendered() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/packages");
        let program = Path::new("/usr/sbin/ghost-guest");
        for (name, text) in [
            ("ghost-guest.service", systemd(program)),
            ("ghost-guest.openrc", openrc(program)),
            ("ghost-guest.sysv", sysv(program)),
        ] {
            let path = directory.join(name);
            if std::env::var_os("GHOST_GUEST_WRITE").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            let golden = std::fs::read_to_string(&path).unwrap();
            assert_eq!(golden, text, "{}", path.display());
        }
    }
}
