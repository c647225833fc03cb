//! The package for Debian in a real Debian 12 that got no agent by its seed.
//!
//! It needs the package in two versions, which `deploy/packages/check.sh` builds: `GHOST_GUEST_PACKAGES`
//! names the folder with `old.deb` and `new.deb`.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_e2e::agent::Builder;
use ghost_e2e::binaries::debian_image;
use ghost_e2e::guest;
use ghost_e2e::wait;

use crate::support::wait_console;

const PACKAGES: &str = "GHOST_GUEST_PACKAGES";
/// Under software emulation on a busy machine the boot takes a minute and more.
const BOOT: Duration = Duration::from_secs(420);
const STEP: Duration = Duration::from_secs(180);

/// Gives one file to whoever asks for anything, until the test ends.
fn serve(file: &Path) -> u16 {
    let bytes = std::fs::read(file).unwrap();
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n", bytes.len());
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&bytes);
        }
    });
    port
}

#[test]
fn the_debian_package_lives_its_life_in_a_guest() {
    let Some(packages) = std::env::var_os(PACKAGES).map(PathBuf::from) else {
        println!(
            "skipped: {PACKAGES} is not set; deploy/packages/check.sh --guest builds and runs"
        );
        return;
    };
    let _room = guest::room(2);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    let image = debian_image().to_str().unwrap();
    ctl.ok(&["image", "import", image, "--name", "debian-12"]);
    let port = serve(&packages.join("old.deb"));
    // The host is the guest's way out.
    let user_data = agent.folder().join("user-data");
    std::fs::write(
        &user_data,
        format!(
            "#!/bin/sh\n\
             host=$(ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p' | head -n 1)\n\
             python3 -c 'import sys,urllib.request as u; u.urlretrieve(sys.argv[1], \"/root/old.deb\")' http://$host:{port}/\n\
             dpkg -i /root/old.deb && echo \"e2e: installed $(systemctl is-enabled ghost-guest)\" >/dev/ttyS0\n"
        ),
    )
    .unwrap();
    let vm = agent.name("package");
    ctl.ok(&[
        "launch",
        "debian-12",
        &vm,
        "--cpus",
        "1",
        "--memory",
        "768MiB",
        "--disk",
        "4GiB",
        "--guest-inject",
        "never",
        "--user-data",
        user_data.to_str().unwrap(),
    ]);
    wait_console(&agent, &vm, "e2e: installed enabled", BOOT);
    ctl.ok(&["vm", "wait", &vm, "--for", "agent", "--timeout", "300s"]);
    let sh = |script: &str| ctl.ok(&["exec", &vm, "--", "sh", "-c", script]);
    // What replaces or ends the agent runs beside it, and what comes of it is on the console.
    let beside = |script: &str| {
        let file = agent.folder().join("beside.sh");
        std::fs::write(&file, script).unwrap();
        let there = format!("{vm}:/root/beside.sh");
        ctl.ok(&["cp", file.to_str().unwrap(), &there]);
        sh("systemd-run --quiet --collect sh /root/beside.sh");
    };
    assert_eq!(
        sh("readlink /proc/$(pidof -s ghost-guest)/exe"),
        "/usr/sbin/ghost-guest\n"
    );
    assert_eq!(
        sh("test -e /usr/local/sbin/ghost-guest || echo none"),
        "none\n"
    );

    // Upgrade: what the owner wrote stays, and the program runs anew by it.
    sh(
        "printf \"disabled: [ssh_keys]\\n\" >>/etc/ghost/guest.yaml; cp /usr/sbin/ghost-guest /usr/sbin/ghost-guest.old",
    );
    let new = packages.join("new.deb");
    ctl.ok(&["cp", new.to_str().unwrap(), &format!("{vm}:/root/new.deb")]);
    let before = sh("pidof -s ghost-guest");
    beside(
        "dpkg --force-confold -i /root/new.deb >/root/upgrade.log 2>&1; echo \"e2e: upgraded $?\" >/dev/ttyS0",
    );
    wait_console(&agent, &vm, "e2e: upgraded 0", STEP);
    wait::until_ok("the new agent obeys the old configuration", STEP, || {
        let status = ctl.json(&["guest", "status", &vm]);
        let has = |name: &str| {
            let capabilities = status["capabilities"].as_array();
            capabilities.is_some_and(|all| all.iter().any(|one| one == name))
        };
        if has("exec") && !has("ssh_keys") {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    assert_ne!(sh("pidof -s ghost-guest"), before);
    assert_eq!(
        sh("dpkg-query -W -f '${Version} ${Status}' ghost-guest"),
        "0.1.1-1 install ok installed"
    );

    // Whoever disables it keeps it so over an upgrade, and it goes on running until it is stopped.
    sh("systemctl disable ghost-guest 2>/dev/null");
    beside(
        "dpkg --force-confold -i /root/old.deb >/dev/null 2>&1; echo \"e2e: again $? $(systemctl is-enabled ghost-guest)\" >/dev/ttyS0",
    );
    wait_console(&agent, &vm, "e2e: again 0 disabled", STEP);
    wait::until_ok("it runs", STEP, || {
        match ctl.run(&["exec", &vm, "--", "systemctl", "enable", "ghost-guest"]) {
            output if output.code == 0 => Ok(()),
            output => Err(output.stderr),
        }
    });

    // Removed: stopped, its program gone, its configuration kept; installed again it is what it was;
    // purged, nothing is left.
    beside(
        "dpkg -r ghost-guest >/dev/null 2>&1; \
         echo \"e2e: removed $? $(systemctl is-active ghost-guest) $(ls /usr/sbin | grep -c ghost-guest) $(grep -c ^disabled /etc/ghost/guest.yaml)\" >/dev/ttyS0; \
         sleep 10; dpkg -i /root/new.deb >/dev/null 2>&1; \
         echo \"e2e: back $? $(systemctl is-enabled ghost-guest) $(grep -c ^disabled /etc/ghost/guest.yaml)\" >/dev/ttyS0",
    );
    wait_console(&agent, &vm, "e2e: removed 0 inactive 0 1", STEP);
    wait_console(&agent, &vm, "e2e: back 0 enabled 1", STEP);
    wait::until_ok("it answers again", STEP, || {
        match ctl.run(&["exec", &vm, "--", "true"]) {
            output if output.code == 0 => Ok(()),
            output => Err(output.stderr),
        }
    });
    beside(
        "dpkg -P ghost-guest >/dev/null 2>&1; \
         echo \"e2e: purged $? $(systemctl is-active ghost-guest) $(find / -xdev -name \"*ghost-guest*\" -not -path \"/proc/*\" -not -path \"/var/log/journal/*\" | tr \"\\n\" \" \")$(ls -d /etc/ghost 2>/dev/null).\" >/dev/ttyS0",
    );
    wait_console(&agent, &vm, "e2e: purged 0 inactive .", STEP);
    agent.audit();
}
