//! Inside real guests, through their agent alone: programs, terminals, files, and what becomes of
//! all that when a part of the way dies.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder};
use ghost_e2e::binaries::guest_program;
use ghost_e2e::ctl::{self, Output};
use ghost_e2e::guest::{self, BOOT};
use ghost_e2e::http;
use ghost_e2e::wait;

use crate::random::Random;
use crate::support::{launch, tiny};
use crate::terminal::Terminal;

/// How long a short call may take in emulation on a busy machine.
const CALL: Duration = Duration::from_secs(60);

/// Waits until the guest's agent takes calls.
#[track_caller]
fn wait_agent(agent: &Agent, vm: &str) {
    agent
        .ctl()
        .ok(&["vm", "wait", vm, "--for", "agent", "--timeout", "180s"]);
}

fn exec(agent: &Agent, vm: &str, words: &[&str]) -> Output {
    agent.ctl().run(&[&["exec", vm, "--"], words].concat())
}

/// Runs what must succeed in the guest.
#[track_caller]
fn inside(agent: &Agent, vm: &str, words: &[&str]) -> String {
    agent.ctl().ok(&[&["exec", vm, "--"], words].concat())
}

/// Tries what must be refused.
#[track_caller]
fn refused(agent: &Agent, vm: &str, exit: i32, code: &str) {
    let output = agent.ctl().run(&["-o", "json", "exec", vm, "--", "true"]);
    ctl::failed(&output, exit, code, "exec").unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A program in the guest that goes on until something ends it.
fn long_call(agent: &Agent, vm: &str) -> Child {
    let mut child = agent
        .ctl()
        .command(&[
            "exec",
            vm,
            "--",
            "sh",
            "-c",
            "echo it runs; exec sleep 1000",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 8];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    assert_eq!(&said, b"it runs\n");
    child
}

/// Its exit code and what it said last.
#[track_caller]
fn end(mut child: Child, within: Duration) -> (i32, String) {
    let status = ctl::wait(&mut child, within).expect("the call ends");
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    (status.code().unwrap_or(-1), said)
}

/// Much of both at once: whoever drains one before the other would hang here.
#[track_caller]
pub(crate) fn much_of_both_streams(agent: &Agent, vm: &str) {
    let much =
        "head -c 4194304 /dev/zero | tr '\\0' o & head -c 4194304 /dev/zero | tr '\\0' e >&2; wait";
    let output = exec(agent, vm, &["sh", "-c", much]);
    assert_eq!(output.code, 0, "{:.400}", output.stderr);
    let count = |text: &str, letter: char| text.chars().filter(|c| *c == letter).count();
    assert_eq!(count(&output.stdout, 'o'), 4 << 20);
    assert!(count(&output.stderr, 'e') >= 4 << 20);
}

/// Its time runs out, and its whole group goes.
#[track_caller]
pub(crate) fn a_timeout_ends_the_whole_group(agent: &Agent, vm: &str) {
    let begun = std::time::Instant::now();
    let output = agent.ctl().run(&[
        "exec",
        "--timeout",
        "2s",
        vm,
        "--",
        "sh",
        "-c",
        "sleep 1000 & sleep 1000",
    ]);
    assert_eq!(output.code, 124, "{}", output.stderr);
    assert!(begun.elapsed() < CALL, "the sleep went on");
    no_sleep_is_left(agent, vm);
}

#[track_caller]
fn no_sleep_is_left(agent: &Agent, vm: &str) {
    wait::until_ok("no sleep is left", CALL, || {
        match exec(agent, vm, &["pidof", "sleep"]) {
            Output { code: 1, .. } => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn programs_run_as_asked_and_leave_a_trace() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let vm = agent.name("inside");
    launch(&agent, &vm);
    wait_agent(&agent, &vm);

    // Every layer says that it is there; the first report comes a moment after the hello.
    wait::until_ok("every layer is there", CALL, || {
        let status = ctl.json(&["guest", "status", &vm]);
        // An image with another agent than the host's gets that one right after its first hello.
        let layers = status["layers"].as_array().unwrap();
        if status["ready"] == true && layers.iter().all(|layer| layer["ok"] == true) {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });

    // Exit codes, signals, both streams, stdin, environment, directory.
    assert!(inside(&agent, &vm, &["uname", "-a"]).contains("Linux"));
    let output = exec(&agent, &vm, &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (
            output.code,
            output.stdout.as_str(),
            output.stderr.contains("err")
        ),
        (7, "out\n", true)
    );
    assert_eq!(exec(&agent, &vm, &["sh", "-c", "kill -9 $$"]).code, 137);
    let output = ctl.run_with(&["exec", &vm, "--", "cat"], b"from the host");
    assert_eq!((output.code, output.stdout.as_str()), (0, "from the host"));
    let output = ctl.ok(&[
        "exec",
        "-e",
        "WHERE=guest",
        "-w",
        "/etc",
        &vm,
        "--",
        "sh",
        "-c",
        "echo $WHERE $PWD",
    ]);
    assert_eq!(output, "guest /etc\n");

    much_of_both_streams(&agent, &vm);
    a_timeout_ends_the_whole_group(&agent, &vm);

    // A program that is not there, a VM that is not there.
    assert_ne!(exec(&agent, &vm, &["no-such-program"]).code, 0);
    refused(&agent, "no-such-vm", 3, "vm_not_found");

    // The owner closes the VM, or all of them at once.
    ctl.ok(&["vm", "update", &vm, "--guest-access", "off"]);
    refused(&agent, &vm, 6, "guest_access_off");
    ctl.ok(&["vm", "update", &vm, "--guest-access", "on"]);
    let open = long_call(&agent, &vm);
    ctl.ok(&["guest", "access", &vm, "off"]);
    let (code, said) = end(open, CALL);
    assert!(code != 0 && !said.is_empty(), "{code}: {said}");
    refused(&agent, &vm, 6, "guest_access_off");
    ctl.ok(&["guest", "access", &vm, "on"]);
    // Who has a key without guest access runs VMs and enters none.
    let confined = ctl.ok(&[
        "key",
        "create",
        "runner",
        "--role",
        "operator",
        "--no-guest-access",
        "-o",
        "name",
    ]);
    let key = confined.trim();
    let ask = |method: &str, path: &str, body: &[u8]| {
        let headers = [("X-API-Key", key), ("Content-Type", "application/json")];
        let path = format!("/v1/vms/{vm}{path}");
        let answer = http::request(agent.http_port(), method, &path, &headers, body).unwrap();
        answer.status
    };
    assert_eq!(ask("GET", "/guest", b""), 200);
    assert_eq!(ask("POST", "/exec", br#"{"program":"true"}"#), 403);
    assert_eq!(ask("GET", "/files?path=/etc/hosts", b""), 403);
    assert_eq!(ask("PATCH", "", br#"{"tags":{"by":"runner"}}"#), 202);
    let open = long_call(&agent, &vm);
    ctl.ok(&["lockdown", "--reason", "a test"]);
    let (code, said) = end(open, CALL);
    assert!(code != 0 && !said.is_empty(), "{code}: {said}");
    refused(&agent, &vm, 6, "lockdown");
    ctl.ok(&["lockdown", "--lift"]);
    wait::until_ok("the guest is open again", CALL, || {
        match exec(&agent, &vm, &["true"]) {
            Output { code: 0, .. } => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });

    // All of that was written down, and nobody has changed it since.
    let log = ctl.ok(&["audit", "list", "--vm", &vm]);
    for trace in ["uname", "no-such-program", "exec"] {
        assert!(log.contains(trace), "{trace} is missing in\n{log}");
    }
    assert!(
        !log.contains("from the host"),
        "what was typed is nobody's matter"
    );
    ctl.ok(&["audit", "verify"]);
    ctl.ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

/// A program that differs from the guest's own, and is as good: what follows a program's segments is
/// not loaded.
#[test]
fn an_agent_is_replaced_over_the_channel_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let newer = folder.path().join("ghost-guest");
    let mut bytes = fs::read(guest_program()).unwrap();
    bytes.extend_from_slice(b"another build");
    fs::write(&newer, bytes).unwrap();
    let _room = guest::room(1);
    let agent = Builder::new()
        .set("guest.update", false)
        .set("guest.program", newer.to_str().unwrap())
        .start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let vm = agent.name("updated");
    launch(&agent, &vm);
    wait_agent(&agent, &vm);
    let update = || ctl.json(&["guest", "update", &vm])["replaced"].as_bool();
    assert_eq!(update(), Some(true));
    assert_eq!(inside(&agent, &vm, &["echo", "there"]), "there\n");
    let sum = inside(
        &agent,
        &vm,
        &[
            "sh",
            "-c",
            "sha256sum < /proc/$(pidof ghost-guest | cut -d' ' -f1)/exe",
        ],
    );
    let host = std::process::Command::new("sha256sum")
        .arg(&newer)
        .output()
        .unwrap();
    let host = String::from_utf8(host.stdout).unwrap();
    assert_eq!(sum.split(' ').next(), host.split(' ').next());
    assert_eq!(update(), Some(false));
    let log = ctl.ok(&["audit", "list", "--vm", &vm]);
    assert!(log.contains("update"), "{log}");
    ctl.ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

/// Types into a shell, resizes its window, interrupts it, and leaves it.
#[track_caller]
pub(crate) fn a_shell_is_a_terminal(agent: &Agent, vm: &str) {
    let mut terminal = Terminal::run(&agent.ctl().command(&["shell", vm]));
    terminal.send("echo six times seven is $((6 * 7))\r");
    terminal.expect("six times seven is 42", CALL);
    terminal.send("tty\r");
    terminal.expect("/dev/pts/", CALL);
    // A window that changes its size does so in the guest too.
    terminal.resize(41, 117);
    terminal.send(
        "until [ \"$(stty size)\" = '41 117' ]; do sleep 0.2; done; echo resized $((6 * 7))\r",
    );
    terminal.expect("resized 42", CALL);
    // Ctrl-C is the guest's.
    terminal.send("echo armed $((2 + 1)); sleep 1000\r");
    terminal.expect("armed 3", CALL);
    terminal.send("\x03");
    terminal.send("echo still here $((1 + 1))\r");
    terminal.expect("still here 2", CALL);
    terminal.send("exit 3\r");
    assert_eq!(terminal.end(CALL), 3);
}

#[test]
fn a_shell_in_a_guest_is_a_terminal() {
    let _room = guest::room(1);
    let agent = Builder::new().start();
    agent.import_tiny();
    let vm = agent.name("shell");
    launch(&agent, &vm);
    wait_agent(&agent, &vm);
    a_shell_is_a_terminal(&agent, &vm);
    agent.ctl().ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

/// A file that no part of could be mistaken for another.
fn random_file(path: &Path, bytes: usize) {
    let mut random = Random::seeded("a file to copy");
    let mut contents = Vec::with_capacity(bytes + 8);
    while contents.len() < bytes {
        contents.extend_from_slice(&random.below(u64::MAX).to_le_bytes());
    }
    contents.truncate(bytes);
    fs::write(path, contents).unwrap();
}

fn same(one: &Path, other: &Path) -> bool {
    fs::read(one).unwrap() == fs::read(other).unwrap()
}

/// 256 MiB into `folder` of the guest and back, broken off twice on the way: by the end of ghostctl,
/// and by the end of the agent in the guest.
#[track_caller]
pub(crate) fn a_large_file_goes_both_ways(agent: &Agent, vm: &str, folder: &str) {
    const SIZE: usize = 256 << 20;
    let ctl = agent.ctl();
    let (big, back) = (agent.folder().join("big"), agent.folder().join("back"));
    random_file(&big, SIZE);
    let (local, there) = (big.to_str().unwrap(), format!("{vm}:{folder}/big"));
    let begin = || {
        ctl.command(&["cp", local, &there])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let kept = format!("stat -c %s {folder}/.ghost-*");
    let reaches = |bytes: usize| {
        wait::until_ok("part of the file has come", CALL, || {
            // Cheap for the guest: the copy takes seconds, and must not be over before it is looked at.
            let kept = exec(agent, vm, &["sh", "-c", &kept]).stdout;
            match kept.trim().parse::<usize>() {
                Ok(there) if there > bytes => Ok(there),
                _ => Err(kept),
            }
        })
    };

    // The copy is cut off in the middle, and the next one goes on from there.
    let mut cut = begin();
    let came = reaches(1 << 20);
    drop(cut.kill());
    drop(cut.wait());
    let target = format!("{folder}/big");
    assert_ne!(exec(agent, vm, &["test", "-e", &target]).code, 0);
    // The agent in the guest is killed in the midst of that one; its service starts it again.
    let second = begin();
    reaches(came + (1 << 20));
    exec(agent, vm, &["sh", "-c", "kill -9 $(pidof ghost-guest)"]);
    let (code, said) = end(second, CALL * 5);
    assert!(
        code == 0 || code == 5,
        "it goes on by itself, or says that the guest is away: {code}: {said}"
    );
    if code != 0 {
        wait_agent(agent, vm);
        ctl.ok(&["cp", local, &there]);
    }
    let sum = |text: &str| text.split_whitespace().next().map(str::to_owned);
    let host = std::process::Command::new("sha256sum")
        .arg(&big)
        .output()
        .unwrap();
    assert_eq!(
        sum(&inside(agent, vm, &["sha256sum", &target])),
        sum(&String::from_utf8(host.stdout).unwrap())
    );
    ctl.ok(&["cp", &there, back.to_str().unwrap()]);
    assert!(same(&big, &back), "what came back is not what went");
    let left = format!("ls -A {folder} | grep -c ghost- || true");
    assert_eq!(
        inside(agent, vm, &["sh", "-c", &left]).trim(),
        "0",
        "temporary files are gone"
    );
    inside(agent, vm, &["rm", &target]);
    fs::remove_file(&big).unwrap();
    fs::remove_file(&back).unwrap();
}

#[test]
fn files_go_both_ways_whole() {
    let _room = guest::room(2);
    let agent = Builder::new().start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let vm = agent.name("files");
    ctl.ok(&[
        "launch", "tiny", &vm, "--cpus", "1", "--memory", "1GiB", "--disk", "128MiB",
    ]);
    wait_agent(&agent, &vm);
    a_large_file_goes_both_ways(&agent, &vm, "/tmp");

    // A tree, with modes and owners.
    let tree = agent.folder().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/deep"), "deep").unwrap();
    fs::write(tree.join("run"), "#!/bin/sh\necho ran\n").unwrap();
    let mode = |path: &Path, mode: u32| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&tree.join("run"), 0o750);
    ctl.ok(&["cp", tree.to_str().unwrap(), &format!("{vm}:/tmp/")]);
    assert_eq!(inside(&agent, &vm, &["/tmp/tree/run"]), "ran\n");
    assert_eq!(inside(&agent, &vm, &["cat", "/tmp/tree/a/b/deep"]), "deep");
    assert_eq!(
        inside(&agent, &vm, &["stat", "-c", "%a", "/tmp/tree/run"]).trim(),
        "750"
    );
    let copy = agent.folder().join("copy");
    ctl.ok(&["cp", &format!("{vm}:/tmp/tree"), copy.to_str().unwrap()]);
    assert!(same(&tree.join("a/b/deep"), &copy.join("a/b/deep")));
    ctl.fails(
        &["cp", &format!("{vm}:/no/such/file"), copy.to_str().unwrap()],
        3,
        "guest_file_not_found",
    );
    ctl.ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

#[test]
fn whatever_dies_on_the_way_calls_end_and_the_way_comes_back() {
    let _room = guest::room(1);
    let mut agent = Builder::new().start();
    agent.import_tiny();
    let vm = agent.name("breaks");
    launch(&agent, &vm);
    wait_agent(&agent, &vm);
    whatever_dies(&mut agent, &vm, BOOT);
    agent.ctl().ok(&["audit", "verify"]);
    agent.ctl().ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}

/// Each part of the way dies or stands still with a call open; `boot` is how long a restart of the
/// guest may take.
#[track_caller]
pub(crate) fn whatever_dies(agent: &mut Agent, vm: &str, boot: Duration) {
    let answers = |agent: &Agent| {
        wait::until_ok("the guest answers again", boot, || {
            match exec(agent, vm, &["true"]) {
                Output { code: 0, .. } => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    };

    // The agent in the guest is killed; its service starts it again.
    let open = long_call(agent, vm);
    exec(agent, vm, &["sh", "-c", "kill -9 $(pidof ghost-guest)"]);
    let (code, said) = end(open, CALL);
    assert_eq!(code, 5, "{said}");
    answers(agent);

    // The guest restarts in the middle.
    let open = long_call(agent, vm);
    exec(agent, vm, &["reboot"]);
    let (code, said) = end(open, CALL);
    assert_eq!(code, 5, "{said}");
    answers(agent);

    // A paused guest answers nobody, and goes on afterwards.
    let open = long_call(agent, vm);
    agent.ctl().ok(&["vm", "pause", vm]);
    let paused = exec(agent, vm, &["true"]);
    assert_ne!(paused.code, 0, "{paused:?}");
    agent.ctl().ok(&["vm", "resume", vm]);
    answers(agent);
    let mut open = open;
    drop(open.kill());
    drop(open.wait());

    // The agent of the host dies with a session open.
    let open = long_call(agent, vm);
    agent.kill();
    let (code, said) = end(open, CALL);
    assert_eq!(code, 5, "{said}");
    agent.start();
    answers(agent);
    // What the dead session had started does not go on for ever.
    no_sleep_is_left(agent, vm);
}

#[test]
fn what_a_guest_tells_is_shown_as_told_by_it() {
    let _room = guest::room(1);
    let agent = Builder::new().set("guest.telemetry_interval", "1s").start();
    let ctl = agent.ctl();
    agent.import_tiny();
    let vm = agent.name("tells");
    ctl.ok(&tiny(&["launch", "tiny", &vm], &[]));
    wait_agent(&agent, &vm);
    let top = wait::until_ok("telemetry of the guest", CALL, || {
        let top = ctl.json(&["vm", "top", &vm, "--once"]);
        let one = top.get(0).unwrap_or(&top).clone();
        if one["sample"]["source"] == "guest" && one["processes"].as_u64() > Some(0) {
            Ok(one)
        } else {
            Err(top.to_string())
        }
    });
    assert!(
        top["sample"]["memory_total_bytes"].as_u64() > Some(32 << 20),
        "{top}"
    );
    let metrics = http::get(agent.metrics_port(), "/metrics").unwrap().body;
    assert!(
        metrics
            .lines()
            .any(|line| line.starts_with("ghost_guest_") && line.contains(&vm)),
        "{metrics}"
    );
    ctl.ok(&["vm", "show", &vm, "--history", "1h"]);
    ctl.ok(&["vm", "delete", &vm, "--force"]);
    agent.audit();
}
