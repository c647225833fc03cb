//! Programs and shells in guests, and what else their agents do.

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{LocalModes, Winsize, tcsetwinsize};
use serde_json::Value;

use crate::console::{Terminal, until_raw};
use crate::run::{Person, finish, words};

#[test]
fn a_command_ends_as_it_does_in_the_guest() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "exec web-1 -- echo hello world",
        "exec web-1 -- exit 0",
        "exec web-1 -- exit 3",
        "exec web-1 -- exit 255",
        "exec web-1 -- signal 15",
        "exec web-1 --timeout 2s -- late",
        "exec web-1 --max-output 5 -- cut",
        "exec web-1 -- cancelled",
        "exec web-1 -- lost",
        "exec absent-1 -- true",
        "exec code.guest_unreachable -- true",
        "exec code.guest_access_off -- true",
        "exec code.lockdown -- true -o json",
        "exec code.lockdown -o json -- true",
    ]));
}

#[test]
fn output_is_passed_on_byte_by_byte_and_apart() {
    let person = Person::new();
    let output = person.run(&mut person.ghostctl(&words("exec web-1 -- binary")));
    assert_eq!(output.stdout, [0, 255, b'\n']);
    assert_eq!(output.stderr, b"\x1b[31mno\n");
    assert_eq!(output.status.code(), Some(3));
    let output = person.run(&mut person.ghostctl(&words("exec web-1 -- flood 9000000")));
    assert_eq!(output.stdout.len(), 9_000_000);
}

#[test]
fn a_document_holds_what_a_command_did() {
    let person = Person::new();
    let json = |line: &str, code: i32| -> Value {
        let output = person.run(&mut person.ghostctl(&words(line)));
        assert_eq!(output.status.code(), Some(code), "{line}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{line}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(
        json("exec web-1 -o json -- binary", 3),
        serde_json::json!({
            "vm": "web-1", "exit_code": 3, "signal": null, "timed_out": false, "cancelled": false,
            "truncated_bytes": 0, "stdout": "\0\u{fffd}\n", "stderr": "\x1b[31mno\n",
            "stdout_base64": "AP8K", "stderr_base64": null,
        })
    );
    let killed = json("exec web-1 -o json -- signal 9", 137);
    assert_eq!(killed["signal"], 9);
    assert_eq!(killed["exit_code"], Value::Null);
    assert_eq!(json("exec web-1 -o json -- late", 124)["timed_out"], true);
    assert_eq!(
        json("exec web-1 -o json -- cut", 0)["truncated_bytes"],
        3 << 20
    );
    // What fills a document is bounded where nobody said how.
    let request = person.agent.requests().remove(0);
    assert!(request.contains("max_output_bytes: 16777216"), "{request}");
}

#[test]
fn flags_of_exec_become_the_request() {
    let person = Person::new();
    let mut command = person.ghostctl(&words(
        "exec web-1 -n -u www:adm -w /srv -e A=1 -e HANDED -e MISSING --timeout 90s \
         --max-output 1MiB -- echo -x --y",
    ));
    person.run(command.env("HANDED", "on"));
    person.run(&mut person.ghostctl(&words("shell web-1 --user debian")));
    let mut requests = person.agent.requests();
    // A map has no order.
    requests[0] = requests[0].replace(r#""HANDED": "on", "A": "1""#, r#""A": "1", "HANDED": "on""#);
    insta::assert_snapshot!(requests.join("\n"));
}

#[test]
fn a_null_stdin_is_not_handed_on_unless_asked_for() {
    let person = Person::new();
    for line in ["exec web-1 -- echo a", "exec web-1 -i -- cat"] {
        person.run(person.ghostctl(&words(line)).stdin(Stdio::null()));
    }
    let requests = person.agent.requests();
    assert!(requests[0].contains("stdin: false"), "{}", requests[0]);
    assert!(requests[1].contains("stdin: true"), "{}", requests[1]);
}

#[test]
fn stdin_is_handed_on_to_its_end() {
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("exec web-1 -- cat"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let content: Vec<u8> = (0..3_000_000u32)
        .map(|number| (number % 253) as u8)
        .collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = content.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = finish(child);
    writer.join().unwrap();
    assert!(output.stdout == content, "{} bytes", output.stdout.len());
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_reader_that_leaves_ends_the_command() {
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("exec web-1 -- flood 4000000000"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut few = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut few).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    person.until_happened("nobody reads");
}

#[test]
fn the_first_ctrl_c_is_the_commands_and_the_second_leaves() {
    let person = Person::new();
    let start = |program: &str| {
        let mut child = person
            .ghostctl(&["exec", "web-1", "--", program])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut ready)
            .unwrap();
        child
    };
    let child = start("obedient");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(output.stderr, b"got 2\n");

    let mut child = start("stubborn");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let mut got = [0; 7];
    child.stderr.as_mut().unwrap().read_exact(&mut got).unwrap();
    assert_eq!(&got, b"got 15\n");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("left web-1 before its command had ended"),
        "{stderr}"
    );
    person.until_happened("gone");
}

#[test]
fn a_shell_has_the_terminal_and_gives_it_back() {
    let person = Person::new();
    let mut terminal = Terminal::start(&person, "shell web-1");
    terminal.shows("xterm 24 80$ ");
    until_raw(&terminal);
    // Ctrl-C is the guest's.
    terminal.types(b"ls\x03");
    terminal.shows("LS\x03");
    terminal.resize(50, 132);
    terminal.shows("now 50x132");
    terminal.types(b"bye");
    let (code, raw, _) = terminal.exit("BYE");
    assert_eq!(code, Some(7), "the shell's own");
    assert!(!raw, "the terminal is as it was");
}

#[test]
fn a_shell_that_hangs_can_be_left_and_a_signal_restores_the_terminal() {
    let person = Person::new();
    let mut terminal = Terminal::start(&person, "exec web-1 -t -- sh");
    terminal.shows("$ ");
    until_raw(&terminal);
    terminal.types(b"x\r~.");
    let (code, raw, _) = terminal.exit("left web-1; what ran there is killed");
    assert_eq!(code, Some(0));
    assert!(!raw);

    let mut terminal = Terminal::start(&person, "exec web-1 -t -- sh");
    terminal.shows("$ ");
    until_raw(&terminal);
    terminal.signal(Signal::TERM);
    let (code, raw, _) = terminal.exit("$ ");
    assert_eq!(code, Some(143));
    assert!(!raw);
}

#[test]
fn a_refused_shell_never_touches_the_terminal() {
    let person = Person::new();
    let terminal = Terminal::start(&person, "shell code.guest_unreachable");
    let (code, raw, _) = terminal.exit("refused with guest_unreachable");
    assert_eq!(code, Some(5));
    assert!(!raw);
}

#[test]
fn a_shell_without_a_terminal_reads_a_script() {
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("shell web-1"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"uname").unwrap();
    let output = finish(child);
    assert_eq!(output.stdout, b"UNAME");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn status_explains_each_layer() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "guest status web-1",
        "guest status web-1 deaf-1 absent-1",
        "guest status deaf-1 -o json",
        "guest ping web-1",
        "guest ping web-1 -o json",
        "guest ping code.guest_unreachable",
    ]));
}

#[test]
fn what_an_agent_does_is_told() {
    let person = Person::new();
    std::fs::write(
        person.home.path().join("id.pub"),
        "ssh-ed25519 AAAA alice\n",
    )
    .unwrap();
    insta::assert_snapshot!(person.says_all(&[
        "guest ssh-key add web-1 debian id.pub",
        "guest ssh-key remove web-1 debian id.pub -o json",
        "guest sync-clock web-1 db-1 absent-1",
        "guest freeze web-1 --timeout 20s --mount /srv",
        "guest freeze web-1 -o json",
        "guest thaw web-1",
        "guest update web-1 web-2 absent-1",
        "guest update web-1 -o json",
        "guest access web-1 off",
        "guest access web-1 on -o json",
        "guest access web-1 maybe",
        "guest address web-1 10.113.0.9",
        "guest address web-1 none",
        "guest address web-1 nonsense",
        "guest shutdown web-1",
        "guest shutdown web-1 --reboot -q -o name",
    ]));
    let requests = person.agent.requests().join("\n");
    assert!(
        requests.contains(r#"add: ["ssh-ed25519 AAAA alice"], remove: []"#),
        "{requests}"
    );
    assert!(requests.contains(r#"mount_points: ["/srv"]"#), "{requests}");
    assert!(requests.contains("reboot: true"), "{requests}");
}

#[test]
fn a_password_comes_from_stdin_or_is_asked_for_without_echo() {
    let person = Person::new();
    let give = |text: &str, line: &str| {
        let mut child = person
            .ghostctl(&words(line))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // One that is refused does not read it.
        let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
        finish(child).status.code()
    };
    assert_eq!(give("s3cret pw\n", "guest password web-1 root"), Some(0));
    assert_eq!(
        give("$6$x$y", "guest password web-1 root --hashed"),
        Some(0)
    );
    assert_eq!(give("", "guest password web-1 root"), Some(2));
    assert_eq!(give("a\nb\n", "guest password web-1 root"), Some(2));
    let requests = person.agent.requests();
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(
        requests[0].contains(r#"password: "s3cret pw", hashed: false"#),
        "{}",
        requests[0]
    );
    assert!(
        requests[1].contains(r#"password: "$6$x$y", hashed: true"#),
        "{}",
        requests[1]
    );

    let mut terminal = Terminal::start(&person, "guest password web-1 root");
    terminal.shows("New password of root in web-1: ");
    terminal.types(b"hidden\n");
    terminal.shows("The same again: ");
    terminal.types(b"hidden\n");
    terminal.shows("Set the password of root in web-1");
    let echo = terminal.modes().local_modes.contains(LocalModes::ECHO);
    let (code, _, seen) = terminal.exit("Set the password");
    assert_eq!(code, Some(0));
    assert!(echo, "the terminal is as it was");
    assert!(!seen.contains("hidden"), "{seen}");

    let mut terminal = Terminal::start(&person, "guest password web-1 root");
    terminal.shows("New password");
    terminal.signal(Signal::INT);
    terminal.shows("interrupted");
    let echo = terminal.modes().local_modes.contains(LocalModes::ECHO);
    assert!(echo, "the terminal is as it was");
    let (code, _, _) = terminal.exit("interrupted");
    assert_eq!(code, Some(130));
}

#[test]
fn lockdown_and_audit() {
    let person = Person::new();
    insta::assert_snapshot!(person.says_all(&[
        "lockdown status",
        "lockdown --reason leak",
        "lockdown status",
        "lockdown status -o json",
        "lockdown --lift",
        "audit list",
        "audit list --vm db-1",
        "audit list --since 1h --limit 5 -o json",
        "audit verify",
    ]));
    person
        .agent
        .state
        .guest
        .happened
        .lock()
        .unwrap()
        .push("tampered".to_owned());
    insta::assert_snapshot!(
        "tampered",
        person.says_all(&["audit verify", "audit verify -o json"])
    );
}

/// The size of a terminal, and signals to who sits at it.
impl Terminal {
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).unwrap();
        // It is not the controlling terminal of ghostctl, so the kernel tells nobody.
        self.signal(Signal::WINCH);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}
