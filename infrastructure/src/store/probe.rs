//! Opening an engine where it can do no harm.
//!
//! A damaged file makes the engines panic, loop, or ask for absurd amounts of memory; the last
//! cannot be caught within a process. So a helper process (the agent's own program under its hidden
//! command `store-probe DIR`) opens the engine first, under a limit of memory and time, reads and
//! verifies everything, and says how it went. Only then does the agent open it too, with panics
//! caught and a time limit.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::engine::{self, KeyValueEngine, guard};
use super::fault::Fault;
use super::records::Contents;

/// The address space that the helper may use. State is a few MiB; what needs more is damaged.
const HELPER_MEMORY: u64 = 512 * 1024 * 1024;

/// How long an engine closed a moment ago may hold its lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// How long a killed helper may take to be gone. One that is not hangs in the kernel: then the
/// storage does not answer, and the store is not to blame.
const KILL_PATIENCE: Duration = Duration::from_secs(2);

/// What stands before the helper's report, so that nothing else it prints is taken for it.
const REPORT: &str = "ghost-store-probe: ";

/// The program that opens a store on trial: `program arguments… DIRECTORY`.
#[derive(Clone, Debug)]
pub struct Helper {
    /// The program.
    pub program: PathBuf,
    /// What it is called with, before the directory.
    pub arguments: Vec<OsString>,
}

impl Helper {
    /// An agent's program with its hidden command.
    pub fn agent(program: PathBuf) -> Self {
        Self {
            program,
            arguments: vec!["store-probe".into()],
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Report {
    outcome: Outcome,
    detail: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Sound,
    Busy,
    Full,
    Io,
    Damaged,
    Newer,
}

/// What was found in an engine's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeResult {
    /// All records are whole; so many there are, as of this batch.
    Sound {
        /// Number of records.
        records: u64,
        /// The newest batch.
        sequence: u64,
    },
    /// They are not, or nothing can be said; why, for people.
    Unusable(String),
}

/// Opens the engine in `directory` (the `state` directory of a store that no process has open),
/// reads and verifies everything. May panic, hang or allocate without bound on damage: for that
/// there is [`probe_main`].
pub fn probe(directory: &Path) -> ProbeResult {
    match examine(directory) {
        Ok(contents) => ProbeResult::Sound {
            records: contents.manifest.mark.count,
            sequence: contents.manifest.mark.sequence,
        },
        Err(fault) => ProbeResult::Unusable(fault.to_string()),
    }
}

fn examine(directory: &Path) -> Result<Contents, Fault> {
    let (engine, contents) = open_and_read(directory)?;
    drop(engine);
    Ok(contents)
}

fn open_and_read(directory: &Path) -> Result<(Box<dyn KeyValueEngine>, Contents), Fault> {
    let kind = engine::detect(directory)
        .ok_or_else(|| Fault::Damaged("the engine's files are missing".into()))?;
    let mut engine = engine::open_patiently(kind, directory, LOCK_PATIENCE)?;
    engine.check()?;
    let contents = Contents::read(&*engine)?;
    contents.records.decode()?;
    Ok((engine, contents))
}

/// The helper's `main`: limits its own memory, examines the store in `directory` and reports on
/// standard output. Call it before any other thread or runtime is started.
pub fn probe_main(directory: &Path) -> ExitCode {
    let limit = Rlimit {
        current: Some(HELPER_MEMORY),
        maximum: Some(HELPER_MEMORY),
    };
    let outcome = setrlimit(Resource::As, limit)
        .map_err(|error| Fault::Io(format!("cannot limit the memory: {error}")))
        .and_then(|()| guard(|| examine(directory)));
    let (outcome, detail) = match outcome {
        Ok(_) => (Outcome::Sound, String::new()),
        Err(fault) => {
            let outcome = match &fault {
                Fault::Busy(_) => Outcome::Busy,
                Fault::Full(_) => Outcome::Full,
                Fault::Io(_) => Outcome::Io,
                Fault::Damaged(_) => Outcome::Damaged,
                Fault::Newer(_) => Outcome::Newer,
            };
            (outcome, fault.to_string())
        }
    };
    let Ok(line) = serde_json::to_string(&Report { outcome, detail }) else {
        return ExitCode::FAILURE;
    };
    match writeln!(io::stdout(), "{REPORT}{line}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Opens the engine in `directory` and reads everything, after the helper found it sound.
///
/// # Errors
/// [`Fault::Damaged`] also for a helper that panicked, was killed, hung or ran out of memory.
pub(super) fn open_verified(
    directory: &Path,
    helper: Option<&Helper>,
    limit: Duration,
) -> Result<(Box<dyn KeyValueEngine>, Contents), Fault> {
    if let Some(helper) = helper {
        run_helper(helper, directory, limit)?;
    }
    let directory = directory.to_owned();
    bounded(limit, move || open_and_read(&directory))
}

/// Runs `work` in a thread, with panics caught, for at most `limit`. Beyond it the thread is left
/// behind: it cannot be ended from outside.
///
/// # Errors
/// Those of `work`; [`Fault::Io`] when it took too long, because within the process nothing tells
/// damage from storage that does not answer.
pub(super) fn bounded<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("ghost-store-io".into())
        .spawn(move || {
            // Nobody may be listening any more; then the result is dropped, and with it the engine.
            let _ = sender.send(guard(work));
        })
        .map_err(|error| Fault::Io(format!("no thread can be started: {error}")))?;
    receiver.recv_timeout(limit).unwrap_or_else(|_| {
        Err(Fault::Io(format!(
            "the engine did not answer within {} s",
            limit.as_secs()
        )))
    })
}

fn run_helper(helper: &Helper, directory: &Path, limit: Duration) -> Result<(), Fault> {
    let spawned = Command::new(&helper.program)
        .args(&helper.arguments)
        .arg(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            // It says nothing about the store. Without the helper a panic is still caught; only
            // an absurd allocation is not.
            tracing::warn!(program = %helper.program.display(), %error, "cannot start the store's helper; opening directly");
            return Ok(());
        }
    };
    let Some(mut stdout) = child.stdout.take() else {
        return Err(Fault::Io("the helper has no standard output".into()));
    };
    // Read beside waiting: a full pipe would keep the helper from ending.
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("ghost-store-probe".into())
        .spawn(move || {
            let mut text = Vec::new();
            let _ = stdout.by_ref().take(1 << 16).read_to_end(&mut text);
            let _ = sender.send(text);
        })
        .map_err(|error| Fault::Io(format!("no thread can be started: {error}")))?;
    let status = wait(&mut child, limit)?;
    let output = receiver.recv_timeout(KILL_PATIENCE).unwrap_or_default();
    let output = String::from_utf8_lossy(&output);
    let report = output
        .lines()
        .find_map(|line| serde_json::from_str::<Report>(line.strip_prefix(REPORT)?).ok());
    match (status, report) {
        (Some(status), Some(report)) if status.success() => match report.outcome {
            Outcome::Sound => Ok(()),
            Outcome::Busy => Err(Fault::Busy(report.detail)),
            Outcome::Full => Err(Fault::Full(report.detail)),
            Outcome::Io => Err(Fault::Io(report.detail)),
            Outcome::Damaged => Err(Fault::Damaged(report.detail)),
            Outcome::Newer => Err(Fault::Newer(report.detail)),
        },
        (Some(status), _) if status.success() => {
            tracing::warn!(program = %helper.program.display(), "the store's helper said nothing; opening directly");
            Ok(())
        }
        (Some(status), _) => Err(Fault::Damaged(format!(
            "opening it on trial ended with {status}"
        ))),
        (None, _) => Err(Fault::Damaged(format!(
            "opening it on trial took more than {} s",
            limit.as_secs()
        ))),
    }
}

/// Waits for the helper; `None` when it had to be killed.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>, Fault> {
    let exited = |child: &mut Child, until: Instant| loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(Some(status)),
            Ok(None) if Instant::now() >= until => return Ok(None),
            Ok(None) => thread::sleep(Duration::from_millis(2)),
            Err(error) => return Err(Fault::Io(format!("cannot wait for the helper: {error}"))),
        }
    };
    if let Some(status) = exited(child, Instant::now() + limit)? {
        return Ok(Some(status));
    }
    let _ = child.kill();
    match exited(child, Instant::now() + KILL_PATIENCE)? {
        Some(_) => Ok(None),
        None => Err(Fault::Io(
            "the helper cannot be killed: the storage does not answer".into(),
        )),
    }
}
