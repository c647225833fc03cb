//! Thousands of simulated hosts: a `ghost-swarm` with its identities in a folder of its own, and its
//! other halves ([`Process`]). They end with whoever started them, as their standard input does.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::binaries::program;
use crate::core::Core;
use crate::{http, wait};

const PREFIX: &str = "ghost-e2e-swarm-";
/// Thousands of small files that nobody needs after a crash: on a disk each would be flushed.
const MEMORY: &str = "/dev/shm";

/// A `ghost-swarm` that answers each line by one.
#[derive(Debug)]
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts it with these arguments.
    ///
    /// # Errors
    /// Those of the system.
    pub fn start(arguments: &[&str]) -> io::Result<Self> {
        let mut child = Command::new(program("ghost-swarm"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let missing = || io::Error::other("ghost-swarm has no pipes");
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        Ok(Self {
            child,
            input: Some(input),
            output,
        })
    }

    /// The next line that it says, which begins with `word`; what stands after that.
    ///
    /// # Errors
    /// Those of the pipe; what it says instead.
    pub fn told(&mut self, word: &str) -> io::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match line.trim().strip_prefix(word) {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => Err(io::Error::other(format!("ghost-swarm: {}", line.trim()))),
        }
    }

    /// Says a line and gives back the answer, without the `word` that it begins with.
    ///
    /// # Errors
    /// As [`Self::told`].
    pub fn ask(&mut self, line: &str, word: &str) -> io::Result<String> {
        let input = self
            .input
            .as_mut()
            .ok_or_else(|| io::Error::other("ghost-swarm was told to end"))?;
        writeln!(input, "{line}")?;
        input.flush()?;
        self.told(word)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.input.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// How all hosts fare, as they see it themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Data goes both ways.
    pub up: usize,
    /// On their way, or before the next try.
    pub waiting: usize,
    /// Told that Core does not want them.
    pub refused: usize,
    /// How often a host was told so.
    pub ever_refused: usize,
    /// Links that Core has welcomed.
    pub links: usize,
}

/// Simulated hosts of one Core.
#[derive(Debug)]
pub struct Swarm {
    process: Process,
    folder: TempDir,
}

/// Where folders of swarms lie.
fn parent() -> PathBuf {
    let memory = Path::new(MEMORY);
    if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

/// A folder that goes away with its guard, and with the next sweep where this process is killed.
///
/// # Errors
/// Those of the file system.
pub fn folder() -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir_in(parent())
}

impl Swarm {
    /// With no hosts yet; each will have so many VMs.
    ///
    /// # Errors
    /// Those of the system.
    pub fn start(core: &Core, vms: u32) -> io::Result<Self> {
        let folder = folder()?;
        let process = Process::start(&[
            "hosts",
            "--folder",
            &folder.path().display().to_string(),
            "--socket",
            &core.socket().display().to_string(),
            "--vms",
            &vms.to_string(),
        ])?;
        Ok(Self { process, folder })
    }

    /// Has hosts join until there are so many: `host-0`, `host-1`, and so on.
    ///
    /// # Errors
    /// What kept one from joining.
    pub fn enrol(&mut self, count: usize) -> io::Result<()> {
        self.process
            .ask(&format!("enrol {count}"), "enrolled")
            .map(drop)
    }

    /// Has so many of them keep their links up from now on.
    ///
    /// # Errors
    /// Those of the process.
    pub fn link(&mut self, count: usize) -> io::Result<()> {
        self.process
            .ask(&format!("link {count}"), "started")
            .map(drop)
    }

    /// How they fare.
    ///
    /// # Errors
    /// Those of the process.
    pub fn status(&mut self) -> io::Result<Status> {
        let line = self.process.ask("status", "")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let value = |name: &str| {
            words
                .chunks_exact(2)
                .find(|pair| pair.first() == Some(&name))
                .and_then(|pair| pair.get(1)?.parse().ok())
                .unwrap_or_default()
        };
        Ok(Status {
            up: value("up"),
            waiting: value("waiting"),
            refused: value("refused"),
            ever_refused: value("ever-refused"),
            links: value("links"),
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Where the hosts' identities are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A metric of Core's, by its name with its labels: `ghost_core_hosts{state="online"}`.
///
/// # Errors
/// Those of the connection; where there is no such metric.
pub fn metric(core: &Core, name: &str) -> io::Result<f64> {
    let text = http::get(core.metrics_port(), "/metrics")?.body;
    text.lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
        .ok_or_else(|| io::Error::other(format!("Core has no metric {name}")))
}

/// How many hosts Core shows as online.
///
/// # Errors
/// As [`metric`].
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count of hosts"
)]
pub fn online(core: &Core) -> io::Result<usize> {
    metric(core, "ghost_core_hosts{state=\"online\"}").map(|count| count as usize)
}

/// Waits until Core shows so many hosts as online; it may be starting.
///
/// # Panics
/// When the time is up.
#[track_caller]
pub fn wait_online(core: &Core, count: usize, within: Duration) {
    wait::until_ok(
        &format!("{count} hosts are online"),
        within,
        || match online(core) {
            Ok(online) if online >= count => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
}

/// Removes the folders that processes which `chosen` names left behind.
pub fn sweep_of(chosen: impl Fn(u32) -> bool) {
    for entry in fs::read_dir(parent()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(&chosen) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}
