//! A real Debian whose root is frozen under running programs.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use ghost_e2e::agent::Builder;
use ghost_e2e::binaries::debian_image;
use ghost_e2e::guest;
use ghost_e2e::wait;

use crate::support::{show, text};

/// How long a short call may take in emulation on a busy machine.
const CALL: Duration = Duration::from_secs(60);

#[test]
fn a_frozen_root_refuses_what_is_new_and_thaws_whatever_is_stuck() {
    let _room = guest::room(2);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    let image = debian_image().to_str().unwrap();
    ctl.ok(&["image", "import", image, "--name", "debian-12"]);
    let vm = agent.name("frozen");
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
    ]);
    for what in ["agent", "cloud-init"] {
        ctl.ok(&["vm", "wait", &vm, "--for", what, "--timeout", "600s"]);
    }

    // A program that writes all the time, and says so each time that it has.
    let writes = "n=0; while :; do n=$((n+1)); echo $n >/var/tmp/n; sync /var/tmp/n; echo $n; done";
    let mut writer = ctl
        .command(&["exec", &vm, "--", "sh", "-c", writes])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let said = BufReader::new(writer.stdout.take().unwrap());
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for line in said.lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                break;
            }
        }
    });
    told.recv_timeout(CALL).expect("it writes");

    // It gets stuck in the kernel; what is new is refused with the reason, and hangs nowhere.
    ctl.ok(&["guest", "freeze", &vm, "--timeout", "45s"]);
    let there = format!("{vm}:/var/tmp/new");
    let here = agent.folder().join("new");
    std::fs::write(&here, "new").unwrap();
    let refused = ctl.run(&["-o", "json", "exec", &vm, "--", "true"]);
    ghost_e2e::ctl::failed(&refused, 4, "guest_frozen", "exec")
        .unwrap_or_else(|why| panic!("{why}"));
    ctl.fails(&["cp", here.to_str().unwrap(), &there], 4, "guest_frozen");
    ctl.fails(&["guest", "freeze", &vm], 1, "guest_failed");
    // Its agent is well all the while, and what only reads goes on.
    let back = agent.folder().join("back");
    ctl.ok(&["cp", &format!("{vm}:/etc/hostname"), back.to_str().unwrap()]);
    assert_eq!(ctl.json(&["guest", "status", &vm])["ready"], true);

    // Nobody thaws: the deadline does, although a program hangs in the file system. The writer is
    // silent once its pipe is drained, and goes on.
    wait::until_ok("the writer is stuck", CALL, || {
        match told.recv_timeout(Duration::from_secs(3)) {
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    told.recv_timeout(CALL).expect("it goes on");
    wait::until_ok("programs start again", CALL, || {
        match ctl.run(&["exec", &vm, "--", "true"]) {
            output if output.code == 0 => Ok(()),
            output => Err(output.stderr),
        }
    });
    ctl.fails(&["guest", "thaw", &vm], 1, "guest_failed");

    // Shut down while frozen: its service is told to end, and thaws first.
    ctl.ok(&["guest", "freeze", &vm, "--timeout", "60s"]);
    ctl.ok(&["vm", "stop", &vm, "--timeout", "180s"]);
    assert_eq!(text(&show(&agent, &vm)["state"]), "stopped");
    drop(writer.kill());
    drop(writer.wait());
    ctl.ok(&["vm", "delete", &vm]);
    agent.audit();
}
