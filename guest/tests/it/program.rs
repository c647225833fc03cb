//! The program itself: its size, what it needs, and how it is exchanged while it runs.

use std::fs;
use std::io::ErrorKind;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ghost_proto::guest::Flow;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{AgentReady, Stream, UpdateRequest};
use sha2::{Digest, Sha256};

use crate::host::{Host, code, until};

/// A running program, killed at the end with what took its place.
struct Agent {
    child: Child,
    directory: tempfile::TempDir,
    listener: UnixListener,
}

impl Agent {
    fn start(program: &Path, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("ghost-guest");
        fs::copy(program, &copy).unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = Command::new(&copy);
        command
            .args(["run", "--config", "/no/such", "--socket"])
            .arg(&socket)
            .args(more)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut child = None;
        until("no program of another test holds the copy open", || {
            child = match command.spawn() {
                // Started while the copy was written, and not executed yet.
                Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => None,
                other => Some(other.unwrap()),
            };
            child.is_some()
        });
        let child = child.unwrap();
        Self {
            child,
            directory,
            listener,
        }
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("ghost-guest")
    }

    fn accept(&self) -> (Host, AgentReady) {
        self.listener.set_nonblocking(true).unwrap();
        let mut stream: Option<UnixStream> = None;
        until("the agent connects", || {
            stream = self.listener.accept().ok().map(|(stream, _)| stream);
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_nonblocking(false).unwrap();
        let mut host = Host::over(stream);
        let ready = host.hello(None);
        (host, ready)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A program that came back in another process has this directory in its arguments.
        let own = self.directory.path().to_str().unwrap().to_owned();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&own) {
                let pid = rustix::process::Pid::from_raw(pid).unwrap();
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn sha(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

fn update(host: &mut Host, bytes: &[u8], sha256: Vec<u8>, version: &str) -> Payload {
    let id = host.call(Payload::Update(UpdateRequest {
        size_bytes: bytes.len() as u64,
        sha256,
        version: version.into(),
    }));
    let mut credit = Flow::FILE.window;
    let mut chunks = bytes.chunks(Flow::FILE.most).peekable();
    while let Some(chunk) = chunks.next() {
        while credit < chunk.len() as u64 {
            match host.next(&id) {
                Payload::WindowUpdate(update) => credit += update.bytes,
                other => return other,
            }
        }
        credit -= chunk.len() as u64;
        host.data(&id, Stream::File, chunk, chunks.peek().is_none());
    }
    loop {
        match host.next(&id) {
            Payload::WindowUpdate(_) => {}
            other => return other,
        }
    }
}

#[test]
fn an_update_takes_over_and_a_bad_one_gives_way() {
    let agent = Agent::start(
        Path::new(env!("CARGO_BIN_EXE_ghost-guest")),
        &["--run-directory", "."],
    );
    let (mut host, first) = agent.accept();
    let old = fs::read(agent.program()).unwrap();
    assert_eq!(first.program_sha256, sha(&old));
    assert!(first.capabilities.contains(&"update".into()));

    // What is not what was announced, and what is no agent, changes nothing.
    let mut new = old.clone();
    new.extend_from_slice(b"a later build");
    let refused = update(&mut host, &new, sha(b"another"), "");
    assert_eq!(code(refused), "checksum_mismatch");
    let refused = update(
        &mut host,
        b"#!/bin/sh\nexit 1\n",
        sha(b"#!/bin/sh\nexit 1\n"),
        "",
    );
    assert_eq!(code(refused), "invalid_argument");
    let refused = update(&mut host, &new, sha(&new), "99.0.0");
    assert_eq!(code(refused), "invalid_argument");
    assert_eq!(fs::read(agent.program()).unwrap(), old);
    assert!(!agent.directory.path().join("ghost-guest.new").exists());

    // A good one comes up in the same process and is accepted with the greeting.
    let pid = agent.child.id();
    let done = update(&mut host, &new, sha(&new), ghost_guest::VERSION);
    assert!(matches!(done, Payload::Done(_)), "{done:?}");
    drop(host);
    let (mut host, second) = agent.accept();
    assert_eq!(second.program_sha256, sha(&new));
    assert_ne!(second.instance, first.instance);
    let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(exe, agent.program());
    let kept = agent.directory.path().join("ghost-guest.old");
    until("the old one is given up", || !kept.exists());

    // One that starts and dies is replaced by the one before.
    let broken = b"#!/bin/sh\n[ \"$1\" = version ] && echo ghost-guest 9.9.9 && exit\nexit 1\n";
    let done = update(&mut host, broken, sha(broken), "9.9.9");
    assert!(matches!(done, Payload::Done(_)), "{done:?}");
    drop(host);
    let (host, third) = agent.accept();
    assert_eq!(third.program_sha256, sha(&new));
    assert_eq!(fs::read(agent.program()).unwrap(), new);
    assert!(!kept.exists());
    drop(host);
}

#[test]
fn an_agent_that_is_killed_takes_its_programs_with_it() {
    let mut agent = Agent::start(Path::new(env!("CARGO_BIN_EXE_ghost-guest")), &[]);
    let (mut host, _) = agent.accept();
    let id = host.call(Payload::Execute(crate::host::sh(
        "echo $$; exec sleep 1000",
    )));
    let pid = loop {
        if let Payload::StreamData(data) = host.next(&id) {
            break String::from_utf8_lossy(&data.data).trim().to_owned();
        }
    };
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    until("it is gone with the agent", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
}

#[test]
fn a_configuration_that_is_wrong_leaves_reports_only() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("guest.yaml");
    fs::write(&config, "disable: [exec]\n").unwrap();
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ghost-guest"))
        .args(["run", "--config"])
        .arg(&config)
        .arg("--socket")
        .arg(&socket)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut host = Host::over(stream);
    let ready = host.hello(None);
    assert_eq!(ready.capabilities, ["telemetry"]);
    let refused = host.ask(Payload::Execute(crate::host::sh("true")));
    assert_eq!(code(refused), "permission_denied");
    child.kill().unwrap();
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    child.wait().unwrap();
    assert!(said.contains("guest.yaml"), "{said}");
}

/// The program as it is shipped; made where it is not there.
fn shipped() -> PathBuf {
    if let Some(path) = std::env::var_os("GHOST_GUEST_PROGRAM") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = root.join("build/guest/ghost-guest");
    if !path.exists() {
        let output = Command::new("make")
            .arg("-C")
            .arg(&root)
            .arg("guest")
            .output()
            .expect("make");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    path
}

#[test]
fn what_is_shipped_is_small_and_needs_nothing() {
    let program = shipped();
    let bytes = fs::read(&program).unwrap();
    assert!(bytes.len() <= 4 << 20, "{} bytes", bytes.len());
    // ELF64: no program header may name an interpreter (PT_INTERP, 3).
    assert_eq!(&bytes[..5], b"\x7fELF\x02");
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let start = usize::try_from(u64::from_le_bytes(bytes[32..40].try_into().unwrap())).unwrap();
    let (size, count) = (u16_at(54), u16_at(56));
    for at in 0..count {
        let header = start + at * size;
        assert_ne!(u16_at(header), 3, "it wants a dynamic loader");
    }
    // In an empty root it still runs.
    let root = tempfile::tempdir().unwrap();
    if rustix::process::geteuid().is_root() {
        let copy = root.path().join("ghost-guest");
        fs::copy(&program, &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
        let output = Command::new("chroot")
            .arg(root.path())
            .args(["/ghost-guest", "version"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    } else {
        eprintln!("skipped: only root tries it in an empty root");
    }
    let agent = Agent::start(&program, &[]);
    let (mut host, _) = agent.accept();
    let report = {
        host.hello(Some(Duration::from_millis(200)));
        host.take(|message| matches!(message.payload, Some(Payload::Telemetry(_))));
        host.take(|message| matches!(message.payload, Some(Payload::Telemetry(_))))
    };
    let Some(Payload::Telemetry(report)) = report.payload else {
        panic!("no report");
    };
    let resident = report.health.unwrap().resident_bytes;
    assert!(
        resident > 0 && resident <= 8 << 20,
        "{resident} bytes resident"
    );
    std::io::stdout()
        .write_all(format!("{} bytes, {resident} resident\n", bytes.len()).as_bytes())
        .unwrap();
}
