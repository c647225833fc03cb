//! A terminal for programs that behave differently on one, by `script` of util-linux.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ghost_e2e::wait;

/// A program on a terminal of its own.
pub(crate) struct Terminal {
    child: Child,
    seen: Arc<Mutex<String>>,
}

impl Terminal {
    /// Runs `command` on it.
    pub(crate) fn run(command: &Command) -> Self {
        let line: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| {
                let word = word.to_str().unwrap();
                assert!(
                    word.chars()
                        .all(|c| c.is_ascii_alphanumeric() || "/-_.:=@".contains(c)),
                    "{word:?} would need quoting"
                );
                word.to_owned()
            })
            .collect();
        let mut child = Command::new("script")
            .args([
                "--quiet",
                "--return",
                "--flush",
                "--command",
                &line.join(" "),
                "/dev/null",
            ])
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .env("TERM", "dumb")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let seen = Arc::new(Mutex::new(String::new()));
        let (mut source, into) = (child.stdout.take().unwrap(), Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = source.read(&mut buffer) {
                into.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
        });
        Self { child, seen }
    }

    /// Types.
    pub(crate) fn send(&mut self, keys: &str) {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(keys.as_bytes()).unwrap();
        input.flush().unwrap();
    }

    /// Gives the terminal another size, which whoever runs on it is told of by a signal.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let script = self.child.id();
        let children = format!("/proc/{script}/task/{script}/children");
        let on_it = std::fs::read_to_string(children).unwrap();
        let first = on_it.split_whitespace().next().unwrap();
        let device = std::fs::read_link(format!("/proc/{first}/fd/0")).unwrap();
        assert!(device.starts_with("/dev/pts"), "{}", device.display());
        let done = Command::new("stty")
            .arg("-F")
            .arg(&device)
            .args(["rows", &rows.to_string(), "cols", &columns.to_string()])
            .status()
            .unwrap();
        assert!(done.success());
    }

    /// Waits until `text` has been shown.
    #[track_caller]
    pub(crate) fn expect(&self, text: &str, within: Duration) {
        wait::until_ok(&format!("{text:?} on the terminal"), within, || {
            let seen = self.seen.lock().unwrap();
            if seen.contains(text) {
                Ok(())
            } else {
                Err(seen
                    .chars()
                    .rev()
                    .take(400)
                    .collect::<String>()
                    .chars()
                    .rev()
                    .collect())
            }
        });
    }

    /// Waits for its end.
    pub(crate) fn end(mut self, within: Duration) -> i32 {
        ghost_e2e::ctl::wait(&mut self.child, within)
            .unwrap_or_else(|| panic!("it goes on; shown: {}", self.seen.lock().unwrap()))
            .code()
            .unwrap()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
