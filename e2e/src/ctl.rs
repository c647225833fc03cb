//! A real `ghostctl`, as a script would call it.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longer than any command of a test should take: a hang must end the test, not the run.
const PATIENCE: Duration = Duration::from_secs(300);

/// How `ghostctl` is called.
#[derive(Clone, Debug)]
pub struct Ctl {
    program: PathBuf,
    endpoint: Option<String>,
    environment: Vec<(String, OsString)>,
    wrapper: Vec<String>,
}

/// What a program left.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit code; -1 where a signal ended it.
    pub code: i32,
    /// Its data.
    pub stdout: String,
    /// All else that it said.
    pub stderr: String,
}

impl Ctl {
    /// With the agent at `endpoint`; with none, what `ghostctl` itself chooses.
    pub fn new(program: PathBuf, endpoint: Option<String>) -> Self {
        Self {
            program,
            endpoint,
            environment: Vec::new(),
            wrapper: Vec::new(),
        }
    }

    /// With a variable in its environment.
    #[must_use]
    pub fn with_env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// In a network namespace ([`crate::netlab::NetLab::wrapper`]).
    #[must_use]
    pub fn within(mut self, wrapper: &[String]) -> Self {
        self.wrapper = wrapper.to_vec();
        self
    }

    /// The command, not started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match self.wrapper.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        if let Some(endpoint) = &self.endpoint {
            command.args(["--endpoint", endpoint]);
        }
        command
            .args(arguments)
            .env_remove("GHOST_ENDPOINT")
            .env_remove("GHOST_CONTEXT")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        run(self.command(arguments), &[])
    }

    /// Runs it with something on its stdin.
    pub fn run_with(&self, arguments: &[&str], stdin: &[u8]) -> Output {
        run(self.command(arguments), stdin)
    }

    /// Runs what must succeed.
    ///
    /// # Panics
    /// Where it does not.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(
            output.code,
            0,
            "ghostctl {}\n{}{}",
            arguments.join(" "),
            output.stdout,
            output.stderr
        );
        output.stdout
    }

    /// Runs what must succeed, and reads its JSON.
    ///
    /// # Panics
    /// Where it does not, or that is none.
    #[track_caller]
    #[expect(clippy::panic, reason = "the test cannot go on")]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["-o", "json"]].concat());
        match serde_json::from_str(&text) {
            Ok(value) => value,
            Err(error) => panic!("ghostctl {}: {error}\n{text}", arguments.join(" ")),
        }
    }

    /// Runs what must fail with this exit code and stable code; returns the error document.
    ///
    /// # Panics
    /// Where it does anything else, or the error lacks the sentence that says what happened.
    #[track_caller]
    #[expect(clippy::panic, reason = "the test cannot go on")]
    pub fn fails(&self, arguments: &[&str], exit: i32, code: &str) -> Value {
        let output = self.run(&[arguments, &["-o", "json"]].concat());
        failed(&output, exit, code, &arguments.join(" ")).unwrap_or_else(|wrong| panic!("{wrong}"))
    }
}

/// Checks a failure: exit code, stable code, a message, and a hint where the contract wants one.
///
/// # Errors
/// What differs, with all that the program said.
pub fn failed(output: &Output, exit: i32, code: &str, what: &str) -> Result<Value, String> {
    let told = || {
        format!(
            "ghostctl {what}: exit {}, expected {exit} with {code}\n{}{}",
            output.code, output.stdout, output.stderr
        )
    };
    // The error is the last document on stderr; notes may stand before it.
    let start = output.stderr.find('{').ok_or_else(told)?;
    let document: Value = serde_json::from_str(output.stderr[start..].trim())
        .map_err(|error| format!("{}: {error}", told()))?;
    let error = document.get("error").cloned().unwrap_or_default();
    let said = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
    if output.code != exit || said("code") != code || said("message").is_empty() {
        return Err(told());
    }
    Ok(error)
}

/// Runs a command to its end, within bounds.
///
/// # Panics
/// Where it cannot be started, or does not end.
#[expect(clippy::panic, reason = "the test cannot go on")]
pub fn run(mut command: Command, stdin: &[u8]) -> Output {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(if stdin.is_empty() {
            Stdio::null()
        } else {
            Stdio::piped()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let input = child.stdin.take();
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut input) = input {
                // It may end without reading all.
                drop(input.write_all(stdin));
            }
        });
        let stdout = scope.spawn(move || read(out.as_mut()));
        let stderr = scope.spawn(move || read(err.as_mut()));
        let status = wait(&mut child, PATIENCE);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let stdout = text(stdout.join().unwrap_or_default());
        let stderr = text(stderr.join().unwrap_or_default());
        match status {
            Some(status) => Output {
                code: status.code().unwrap_or(-1),
                stdout,
                stderr,
            },
            None => panic!("{shown} did not end within {PATIENCE:?}\n{stdout}{stderr}"),
        }
    })
}

fn read(source: Option<&mut impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(source) = source {
        drop(source.read_to_end(&mut bytes));
    }
    bytes
}

/// Waits for a child's end; kills it when the time is up.
pub fn wait(child: &mut Child, within: Duration) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + within;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            drop(child.kill());
            drop(child.wait());
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_held_to_the_contract() {
        let output = |code, stderr: &str| Output {
            code,
            stdout: String::new(),
            stderr: stderr.to_owned(),
        };
        let good = r#"{"error":{"code":"vm_not_found","message":"no VM x","hint":"look"}}"#;
        assert!(
            failed(
                &output(3, &format!("a note\n{good}\n")),
                3,
                "vm_not_found",
                "t"
            )
            .is_ok()
        );
        assert!(failed(&output(1, good), 3, "vm_not_found", "t").is_err());
        assert!(failed(&output(3, good), 3, "name_taken", "t").is_err());
        assert!(failed(&output(3, "error: plain"), 3, "vm_not_found", "t").is_err());
    }

    #[test]
    fn a_program_gets_its_stdin_and_its_end_is_seen() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; echo said >&2; exit 7"]);
        let output = run(command, b"given");
        assert_eq!((output.code, output.stdout.as_str()), (7, "given"));
        assert_eq!(output.stderr, "said\n");
    }
}
