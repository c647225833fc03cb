//! The console on a real terminal and off it, and the log.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::run::{PATIENCE, Person, finish, transcript, words};

/// A terminal, and ghostctl on it.
pub(crate) struct Terminal {
    pub(crate) master: File,
    slave: OwnedFd,
    pub(crate) child: Child,
    /// What the master end reads, by a thread: a text that never comes must not hang the test.
    output: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Terminal {
    pub(crate) fn start(person: &Person, line: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let size = rustix::termios::Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let open = || -> OwnedFd {
            let path = name.to_str().unwrap();
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .unwrap()
                .into()
        };
        let child = person
            .ghostctl(&words(line))
            .env("TERM", "xterm")
            .stdin(Stdio::from(open()))
            .stdout(Stdio::from(open()))
            .stderr(Stdio::from(open()))
            .spawn()
            .unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            master,
            output,
            slave: open(),
            child,
            seen: Vec::new(),
        }
    }

    pub(crate) fn modes(&self) -> Termios {
        tcgetattr(self.slave.as_fd()).unwrap()
    }

    pub(crate) fn is_raw(&self) -> bool {
        !self.modes().local_modes.contains(LocalModes::ICANON)
    }

    /// Reads until a text has been shown.
    pub(crate) fn shows(&mut self, text: &str) {
        // For all of it: a picture that is drawn again and again is never silent.
        let until = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = until.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(_) => panic!(
                    "{text:?} was never shown: {}",
                    String::from_utf8_lossy(&self.seen)
                ),
            }
        }
    }

    pub(crate) fn types(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).unwrap();
    }

    pub(crate) fn exit(mut self, last: &str) -> (Option<i32>, bool, String) {
        self.shows(last);
        let child = std::mem::replace(
            &mut self.child,
            std::process::Command::new("true").spawn().unwrap(),
        );
        let status = finish(child).status;
        let _ = self.child.wait();
        let raw = self.is_raw();
        (
            status.code(),
            raw,
            String::from_utf8_lossy(&self.seen).into_owned(),
        )
    }
}

/// Raw mode comes a moment after the note that announces the console.
pub(crate) fn until_raw(terminal: &Terminal) {
    let begun = Instant::now();
    while !terminal.is_raw() {
        assert!(begun.elapsed() < Duration::from_secs(30), "never raw");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_console_detaches_at_its_key_and_puts_the_terminal_back() {
    let person = Person::new();
    let mut terminal = Terminal::start(&person, "vm console web-1");
    terminal.shows("login: ");
    until_raw(&terminal);
    // Ctrl-C is the guest's.
    terminal.types(b"hello\x03");
    terminal.shows("HELLO\x03");
    terminal.types(b"\x1d");
    let (code, raw, seen) = terminal.exit("detached from web-1");
    assert_eq!(code, Some(0));
    assert!(!raw, "the terminal is as it was");
    assert!(
        seen.contains("attached to the console of web-1; Ctrl-] detaches"),
        "{seen}"
    );
}

#[test]
fn a_console_that_the_agent_closes_puts_the_terminal_back() {
    let person = Person::new();
    let mut terminal = Terminal::start(&person, "vm console web-1");
    terminal.shows("login: ");
    until_raw(&terminal);
    terminal.types(b"bye");
    let (code, raw, _) = terminal.exit("was closed by the agent");
    assert_eq!(code, Some(0));
    assert!(!raw, "the terminal is as it was");
}

#[test]
fn a_signal_puts_the_terminal_back() {
    let person = Person::new();
    let mut terminal = Terminal::start(&person, "vm console web-1");
    terminal.shows("login: ");
    until_raw(&terminal);
    kill_process(Pid::from_child(&terminal.child), Signal::TERM).unwrap();
    let (code, raw, _) = terminal.exit("login: ");
    assert_eq!(code, Some(1));
    assert!(!raw, "the terminal is as it was");
}

#[test]
fn a_refused_console_never_touches_the_terminal() {
    let person = Person::new();
    let terminal = Terminal::start(&person, "vm console code.vm_not_running");
    let (code, raw, _) = terminal.exit("refused with vm_not_running");
    assert_eq!(code, Some(4));
    assert!(!raw);
}

#[test]
fn a_script_can_talk_to_a_console() {
    let person = Person::new();
    let mut child = person
        .ghostctl(&words("vm console web-1"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Off a terminal the detach key is a byte like any other.
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"a\x1db bye")
        .unwrap();
    let output = finish(child);
    insta::assert_snapshot!(
        transcript("vm console web-1", &output, &person.secrets()).replace('\x1d', "^]")
    );
}

#[test]
fn logs_are_the_guests_bytes_in_a_file_and_safe_on_a_terminal() {
    let person = Person::new();
    let output = person.run(&mut person.ghostctl(&words("vm logs web-1")));
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "boot \x1b[1;32mok\x1b[0m\n\x1b[2Jlogin: \n"
    );
    let (code, _, seen) = Terminal::start(&person, "vm logs web-1").exit("login: ");
    assert_eq!(code, Some(0));
    assert!(seen.contains("\x1b[1;32mok\x1b[0m"), "{seen:?}");
    assert!(seen.contains("^[[2Jlogin: "), "{seen:?}");
    let (_, _, seen) = Terminal::start(&person, "vm logs web-1 --raw").exit("login: ");
    assert!(seen.contains("\x1b[2Jlogin: "), "{seen:?}");
}

#[test]
fn a_terminal_gets_bars_and_colours_and_they_leave_no_trace() {
    let person = Person::new();
    let (code, _, seen) = Terminal::start(&person, "image pull debian-12").exit("Pulled debian-12");
    assert_eq!(code, Some(0));
    assert!(
        seen.ends_with("Pulled debian-12\r\n") || seen.contains("Pulled debian-12\r\n"),
        "{seen:?}"
    );
    let (_, _, seen) = Terminal::start(&person, "list").exit("old-1");
    assert!(seen.contains("\x1b[32mrunning\x1b[0m"), "{seen:?}");
}
