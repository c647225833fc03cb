//! Runs the binary and writes down what a person would have seen.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::fake::FakeAgent;

/// No command of a test takes longer, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A person with a home folder of their own, and an agent.
pub(crate) struct Person {
    pub(crate) home: TempDir,
    pub(crate) agent: FakeAgent,
}

impl Person {
    pub(crate) fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
            agent: FakeAgent::start(),
        }
    }

    /// With a Ghost Core instead of a host's agent.
    pub(crate) fn of_core() -> Self {
        let person = Self::new();
        person
            .agent
            .state
            .is_core
            .store(true, std::sync::atomic::Ordering::Relaxed);
        person
    }

    /// The binary with an environment that holds nothing of the machine's, asking the fake agent.
    pub(crate) fn ghostctl<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = bare(self.home.path(), args);
        command.env("GHOST_ENDPOINT", self.agent.endpoint());
        command
    }

    /// Runs a line and returns what it gave, as a transcript.
    pub(crate) fn says(&self, line: &str) -> String {
        let args = words(line);
        transcript(line, &self.run(&mut self.ghostctl(&args)), &self.secrets())
    }

    /// Several lines, one transcript.
    pub(crate) fn says_all(&self, lines: &[&str]) -> String {
        lines
            .iter()
            .map(|line| self.says(line))
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub(crate) fn run(&self, command: &mut Command) -> Output {
        finish(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    /// Returns when something has happened in a guest.
    pub(crate) fn until_happened(&self, what: &str) {
        let begun = std::time::Instant::now();
        loop {
            let happened = self.agent.state.guest.happened.lock().unwrap().clone();
            if happened.iter().any(|word| word == what) {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{what} never happened: {happened:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn secrets(&self) -> Vec<(String, &'static str)> {
        vec![
            (self.agent.socket().display().to_string(), "[SOCKET]"),
            (self.home.path().display().to_string(), "[HOME]"),
        ]
    }
}

/// The binary, with nothing of this machine's environment.
pub(crate) fn bare<S: AsRef<str>>(home: &Path, args: &[S]) -> Command {
    let mut command = Command::new(binary());
    command
        .args(args.iter().map(AsRef::as_ref))
        .env_clear()
        .env("HOME", home)
        .env("USER", "alice")
        .env("PATH", "/usr/bin:/bin")
        .current_dir(home);
    command
}

pub(crate) fn binary() -> PathBuf {
    assert_cmd::cargo::cargo_bin!("ghostctl").to_path_buf()
}

/// Waits for a process; one that hangs is killed and fails the test.
pub(crate) fn finish(child: Child) -> Output {
    let pid = rustix::process::Pid::from_child(&child);
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || drop(done.send(child.wait_with_output())));
    if let Ok(output) = waiting.recv_timeout(PATIENCE) {
        return output.unwrap();
    }
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    let output = waiting.recv().unwrap().unwrap();
    panic!(
        "ghostctl hung\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Splits at blanks; quotes are not needed by these tests.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// The line, what it wrote where, and how it ended.
pub(crate) fn transcript(
    line: &str,
    output: &Output,
    secrets: &[(String, &'static str)],
) -> String {
    let mut text = format!("$ ghostctl {line}\n");
    text.push_str(&String::from_utf8_lossy(&output.stdout));
    if !output.stderr.is_empty() {
        text.push_str("[stderr]\n");
        text.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    match output.status.code() {
        Some(code) => text.push_str(&format!("[exit {code}]\n")),
        None => text.push_str(&format!("[{}]\n", output.status)),
    }
    for (secret, name) in secrets {
        text = text.replace(secret, name);
    }
    redact(&text)
}

/// Puts names of the same width in the place of what differs between runs.
pub(crate) fn redact(text: &str) -> String {
    let mut out = text.to_owned();
    for (find, width, name) in [
        (is_time as fn(&str) -> bool, 24, "[TIME..................]"),
        (is_random_uuid, 36, "[UUID..............................]"),
        (is_elapsed, 6, "(0.0s)"),
        (is_elapsed, 7, "(0.0s)"),
    ] {
        let mut at = 0;
        while at + width <= out.len() {
            if out.is_char_boundary(at)
                && out.is_char_boundary(at + width)
                && find(&out[at..at + width])
            {
                out.replace_range(at..at + width, name);
            }
            at += 1;
        }
    }
    out
}

fn shaped(text: &str, shape: &str) -> bool {
    text.len() == shape.len()
        && text
            .bytes()
            .zip(shape.bytes())
            .all(|(byte, shape)| match shape {
                b'0' => byte.is_ascii_digit(),
                b'x' => byte.is_ascii_hexdigit(),
                shape => byte == shape,
            })
}

fn is_time(text: &str) -> bool {
    shaped(text, "0000-00-00T00:00:00.000Z")
}

/// Ids of the fake agent begin with zeros and are the same in every run.
fn is_random_uuid(text: &str) -> bool {
    shaped(text, "xxxxxxxx-xxxx-4xxx-xxxx-xxxxxxxxxxxx") && !text.starts_with("00000000")
}

fn is_elapsed(text: &str) -> bool {
    shaped(text, "(0.0s)") || shaped(text, "(00.0s)")
}
