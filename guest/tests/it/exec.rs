//! Programs.

use std::path::Path;
use std::time::Duration;

use ghost_guest::Options;
use ghost_proto::guest::Flow;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::execute_response::Event;
use ghost_proto::guest::v1::{Cancel, ExecuteRequest, Resize, Signal, Stream, Terminal};

use crate::host::{Host, code, sh, until};

fn host() -> Host {
    Host::greeted(Options::default())
}

fn wire(time: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(time.as_secs()).unwrap(),
        nanos: i32::try_from(time.subsec_nanos()).unwrap(),
    }
}

#[test]
fn codes_signals_and_both_streams_come_back() {
    let mut host = host();
    let output = host.run(sh("echo out; echo err >&2; exit 7"));
    assert!(output.started);
    assert_eq!(
        (output.text().as_str(), output.stderr.as_slice()),
        ("out\n", &b"err\n"[..])
    );
    assert_eq!((output.exited.code, output.exited.signal), (7, 0));
    let output = host.run(sh("kill -TERM $$"));
    assert_eq!(output.exited.signal, 15);
    assert!(!output.exited.timed_out && !output.exited.cancelled);
}

#[test]
fn large_output_on_both_streams_at_once() {
    let mut host = host();
    let output = host.run(sh(
        "head -c 3000000 /dev/zero & head -c 3000000 /dev/zero >&2; wait",
    ));
    assert_eq!(
        (output.stdout.len(), output.stderr.len()),
        (3_000_000, 3_000_000)
    );
    assert_eq!(output.exited.code, 0);
}

#[test]
fn stdin_of_any_size_arrives_whole() {
    let mut host = host();
    let mut request = sh("sha256sum; echo over");
    request.stdin = true;
    let id = host.call(Payload::Execute(request));
    let chunk = vec![b'x'; Flow::STREAM.most];
    let mut left = 5_000_000usize;
    let mut credit = usize::try_from(Flow::STREAM.window).unwrap();
    while left > 0 {
        let now = left.min(chunk.len());
        while credit < now {
            match host.next(&id) {
                Payload::WindowUpdate(update) => credit += usize::try_from(update.bytes).unwrap(),
                Payload::ExecuteResponse(_) => {}
                other => panic!("{other:?}"),
            }
        }
        credit -= now;
        left -= now;
        host.data(&id, Stream::Stdin, &chunk[..now], left == 0);
    }
    let output = host.output(&id);
    assert_eq!(
        output.text(),
        // Of five million times `x`.
        "d28ef5a2c6cbdbf7d52ca39e4bb2d8d79b3a9e5cd1e1b8f3f3e1f6f5c8f9d6c1  -\nover\n".replace(
            "d28ef5a2c6cbdbf7d52ca39e4bb2d8d79b3a9e5cd1e1b8f3f3e1f6f5c8f9d6c1",
            &expected()
        )
    );
}

fn expected() -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(vec![b'x'; 5_000_000]))
}

#[test]
fn a_program_that_reads_no_stdin_takes_it_all_the_same() {
    let mut host = host();
    let mut request = sh("exec <&-; sleep 0.2; echo ok");
    request.stdin = true;
    let id = host.call(Payload::Execute(request));
    for _ in 0..4 {
        host.data(&id, Stream::Stdin, &[0; Flow::STREAM.most], false);
    }
    assert_eq!(host.output(&id).text(), "ok\n");
    // Without any stdin it is empty.
    assert_eq!(host.run(sh("cat; echo end")).text(), "end\n");
}

#[test]
fn more_than_was_granted_ends_the_call() {
    let mut host = host();
    let mut request = sh("sleep 1000");
    request.stdin = true;
    let id = host.call(Payload::Execute(request));
    for _ in 0..6 {
        host.data(&id, Stream::Stdin, &[0; Flow::STREAM.most], false);
    }
    let answer = loop {
        match host.next(&id) {
            Payload::ExecuteResponse(_) | Payload::WindowUpdate(_) => {}
            other => break other,
        }
    };
    assert_eq!(code(answer), "invalid_argument");
}

#[test]
fn an_unread_stream_stalls_no_other_call() {
    let mut host = host();
    let flood = host.call(Payload::Execute(sh("cat /dev/zero")));
    let mut seen = 0;
    while seen < Flow::STREAM.window {
        if let Payload::StreamData(data) = host.next(&flood) {
            seen += data.data.len() as u64;
        }
    }
    // Not granted any more. Others run as before.
    for _ in 0..3 {
        assert_eq!(host.run(sh("echo here")).text(), "here\n");
    }
    assert_eq!(seen, Flow::STREAM.window);
    host.send(&flood, Payload::Cancel(Cancel {}));
    let output = host.output(&flood);
    assert!(output.exited.cancelled && output.exited.signal == 9);
}

#[test]
fn output_beyond_the_cap_is_counted() {
    let mut host = host();
    let mut request = sh("head -c 1000000 /dev/zero; echo more >&2");
    request.max_output_bytes = 1000;
    let output = host.run(request);
    assert_eq!(output.stdout.len() + output.stderr.len(), 1000);
    assert_eq!(output.exited.truncated_bytes, 1_000_005 - 1000);
    assert_eq!(output.exited.code, 0);
}

#[test]
fn a_timeout_ends_grandchildren_too() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("pids");
    let mut host = host();
    // One in the group, one in a session of its own, one that lost its parent as well.
    let mut request = sh(&format!(
        "note() {{ echo $1 >> {0}; }}
         sleep 1000 & note $!
         setsid sleep 1001 & note $!
         (setsid sleep 1002 & echo $! >> {0})
         wait; sleep 1003",
        list.display()
    ));
    request.timeout = Some(wire(Duration::from_millis(700)));
    let output = host.run(request);
    assert!(
        output.exited.timed_out && output.exited.signal == 9,
        "{output:?}"
    );
    let pids = std::fs::read_to_string(&list).unwrap();
    assert_eq!(pids.lines().count(), 3);
    for pid in pids.lines() {
        until("it is dead", || {
            std::fs::read_to_string(format!("/proc/{pid}/stat"))
                .map_or(true, |stat| stat.contains(") Z "))
        });
    }
}

#[test]
fn cancel_ends_a_program_that_ignores_signals() {
    let mut host = host();
    let id = host.call(Payload::Execute(sh(
        "trap '' TERM INT HUP; echo ready; while :; do sleep 1; done",
    )));
    loop {
        if let Payload::StreamData(_) = host.next(&id) {
            break;
        }
    }
    host.send(&id, Payload::Signal(Signal { number: 15 }));
    host.send(&id, Payload::Cancel(Cancel {}));
    let output = host.output(&id);
    assert!(output.exited.cancelled && !output.exited.timed_out);
}

/// Its start is said with the first that comes of it; of this one nothing ever does.
#[test]
fn a_silent_program_is_said_to_run() {
    let mut host = host();
    for stdin in [false, true] {
        let mut request = sh("exec sleep 1000");
        request.stdin = stdin;
        let id = host.call(Payload::Execute(request));
        match host.next(&id) {
            Payload::ExecuteResponse(response) => {
                assert!(matches!(response.event, Some(Event::Started(_))));
            }
            other => panic!("{other:?}"),
        }
        host.send(&id, Payload::Cancel(Cancel {}));
        assert!(host.output(&id).exited.cancelled);
    }
}

/// With nothing held open behind it, the end of its output is no reason to wait.
#[test]
fn the_last_words_of_a_program_and_its_end_are_one_answer() {
    let mut host = host();
    let output = host.run(sh("exec printf over"));
    assert!(output.started);
    assert_eq!((output.text().as_str(), output.exited.code), ("over", 0));
    // Who leaves its streams early is not over with them.
    let output = host.run(sh("exec >&- 2>&-; sleep 0.2; exit 4"));
    assert!(output.started);
    assert_eq!((output.text().as_str(), output.exited.code), ("", 4));
}

#[test]
fn signals_reach_the_group() {
    let mut host = host();
    let id = host.call(Payload::Execute(sh(
        "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.05; done",
    )));
    loop {
        if let Payload::StreamData(_) = host.next(&id) {
            break;
        }
    }
    host.send(&id, Payload::Signal(Signal { number: 10 }));
    let output = host.output(&id);
    assert_eq!(
        (output.text().contains("caught"), output.exited.code),
        (true, 3)
    );
}

#[test]
fn what_a_daemon_holds_open_does_not_hold_the_call() {
    let mut host = host();
    let output = host.run(sh("sleep 3 & echo started"));
    assert_eq!(output.text(), "started\n");
    assert_eq!(output.exited.code, 0);
}

#[test]
fn users_groups_and_directories() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root becomes others");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    std::fs::write(
        root.path().join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nada:x:4711:4712::/nowhere:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(
        root.path().join("etc/group"),
        "root:x:0:root\nada:x:4712:\nwheel:x:4713:ada\ndisk:x:6:root\nmail:x:4714:root,ada\n",
    )
    .unwrap();
    let mut host = Host::greeted(Options {
        sysroot: root.path().to_path_buf(),
        ..Options::default()
    });
    let mut request =
        sh("id -u; id -g; id -G; pwd; echo $HOME $USER $LOGNAME $SHELL $LANG $TERM $X; umask");
    request.user = "ada".into();
    request.environment.insert("X".into(), "1 2".into());
    let output = host.run(request.clone());
    assert_eq!(
        output.text(),
        "4711\n4712\n4712 4713 4714\n/\n/nowhere ada ada /bin/sh C.UTF-8 dumb 1 2\n0022\n",
        "{output:?}"
    );
    request.user = "4711".into();
    request.group = "wheel".into();
    request.working_directory = "/usr".into();
    let output = host.run(request.clone());
    assert!(
        output.text().starts_with("4711\n4713\n4713 4714\n/usr\n"),
        "{output:?}"
    );
    // Root's own groups are not handed on to a number that no file knows.
    request.user = "4999".into();
    request.group = String::new();
    assert!(
        host.run(request.clone())
            .text()
            .starts_with("4999\n4999\n4999\n")
    );
    request.user = "eve".into();
    assert_eq!(
        code(host.ask(Payload::Execute(request.clone()))),
        "not_found"
    );
    request.user = "ada".into();
    request.working_directory = "/root/no/such".into();
    assert_eq!(
        code(host.ask(Payload::Execute(request))),
        "permission_denied"
    );
}

#[test]
fn the_environment_is_clean_and_ignored_signals_are_not_inherited() {
    let mut host = host();
    let mut request = ExecuteRequest {
        program: "env".into(),
        ..ExecuteRequest::default()
    };
    let output = host.run(request.clone());
    let mut names: Vec<String> = output
        .text()
        .lines()
        .map(|line| line.split('=').next().unwrap().to_owned())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "GHOST_CALL",
            "HOME",
            "LANG",
            "LOGNAME",
            "PATH",
            "SHELL",
            "TERM",
            "USER"
        ]
    );
    request.environment.insert("PATH".into(), "/nowhere".into());
    assert_eq!(code(host.ask(Payload::Execute(request))), "not_found");
    let output = host.run(sh(
        "grep -E 'SigIgn|SigBlk' /proc/self/status; ls /proc/self/fd | wc -l",
    ));
    assert_eq!(
        output.text(),
        "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n4\n"
    );
}

#[test]
fn what_cannot_be_started_says_why() {
    let mut host = host();
    let program = |program: &str| {
        Payload::Execute(ExecuteRequest {
            program: program.into(),
            ..ExecuteRequest::default()
        })
    };
    assert_eq!(code(host.ask(program("/no/such/program"))), "not_found");
    assert_eq!(code(host.ask(program("no-such-program"))), "not_found");
    assert_eq!(code(host.ask(program("/etc/passwd"))), "permission_denied");
    assert_eq!(code(host.ask(program(""))), "invalid_argument");
    let mut request = sh("true");
    request.arguments.push("a\0b".into());
    assert_eq!(
        code(host.ask(Payload::Execute(request))),
        "invalid_argument"
    );
    let mut request = sh("true");
    request.environment.insert("A=B".into(), "c".into());
    assert_eq!(
        code(host.ask(Payload::Execute(request))),
        "invalid_argument"
    );
}

#[test]
fn a_terminal_has_a_size_that_changes_and_one_stream() {
    let mut host = host();
    let mut request = sh(
        "stty size; trap 'stty size; exit 5' WINCH; echo $TERM; tty >&2; while :; do sleep 0.05; done",
    );
    request.terminal = Some(Terminal {
        rows: 30,
        columns: 100,
        kind: "xterm".into(),
    });
    let id = host.call(Payload::Execute(request));
    let mut seen = String::new();
    while !seen.contains("/dev/pts/") {
        if let Payload::StreamData(data) = host.next(&id) {
            assert_eq!(data.stream(), Stream::Stdout);
            seen.push_str(&String::from_utf8_lossy(&data.data));
        }
    }
    assert!(seen.starts_with("30 100\r\nxterm\r\n"), "{seen:?}");
    host.send(
        &id,
        Payload::Resize(Resize {
            rows: 40,
            columns: 132,
        }),
    );
    let output = host.output(&id);
    assert!(output.text().contains("40 132"), "{output:?}");
    assert_eq!(output.exited.code, 5);
}

#[test]
fn a_login_shell_takes_what_is_typed() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    std::fs::write(root.path().join("etc/group"), "").unwrap();
    let mut host = Host::greeted(Options {
        sysroot: root.path().to_path_buf(),
        ..Options::default()
    });
    let id = host.call(Payload::Execute(ExecuteRequest {
        login_shell: true,
        stdin: true,
        terminal: Some(Terminal {
            rows: 24,
            columns: 80,
            kind: "vt100".into(),
        }),
        ..ExecuteRequest::default()
    }));
    host.data(&id, Stream::Stdin, b"echo name=$0 $((40+2))\n", false);
    let mut seen = String::new();
    while !seen.contains("name=-sh 42") {
        if let Payload::StreamData(data) = host.next(&id) {
            seen.push_str(&String::from_utf8_lossy(&data.data));
        }
    }
    // Control-C at an idle prompt ends nothing; it throws away what was typed, so the next prompt is
    // waited for.
    host.data(&id, Stream::Stdin, b"echo lost\x03", false);
    let mut seen = String::new();
    while !seen
        .split_once("^C")
        .is_some_and(|(_, after)| after.contains("# "))
    {
        if let Payload::StreamData(data) = host.next(&id) {
            seen.push_str(&String::from_utf8_lossy(&data.data));
        }
    }
    host.data(&id, Stream::Stdin, b"exit 9\n", false);
    assert_eq!(host.output(&id).exited.code, 9);
}

#[test]
fn the_agent_leaves_nothing_behind_when_the_host_hangs_up() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pid");
    let mut host = host();
    host.call(Payload::Execute(sh(&format!(
        "echo $$ > {0}.new; mv {0}.new {0}; sleep 1000",
        file.display()
    ))));
    until("it runs", || file.exists());
    let pid = std::fs::read_to_string(&file).unwrap();
    host.hang_up();
    assert!(!Path::new(&format!("/proc/{}", pid.trim())).exists());
}
