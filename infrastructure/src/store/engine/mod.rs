//! What the store needs of an engine: an ordered map of bytes with one atomic, durable batch.

mod redb;
mod sled;

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use ghost_domain::{Error, ErrorCode};
use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::steps::{Step, Steps};

/// Which engine keeps the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// sled 0.34, a log-structured tree.
    #[default]
    Sled,
    /// redb 4, a copy-on-write B-tree in one file.
    Redb,
}

impl Engine {
    /// Both engines, for tests and tables.
    pub const ALL: [Self; 2] = [Self::Sled, Self::Redb];

    /// `sled` or `redb`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sled => "sled",
            Self::Redb => "redb",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Engine {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|engine| engine.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::InvalidArgument,
                    format!("{text:?} is not a store engine"),
                )
                .because("sled and redb are the engines")
            })
    }
}

/// What a batch does to one key: `None` removes it.
pub(super) type Pair = (Vec<u8>, Option<Vec<u8>>);

/// An ordered map of bytes on disk. Any call may panic on damage; the callers guard.
pub(super) trait KeyValueEngine: Send {
    /// Shows every pair, in the order of the keys.
    fn scan(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Fault>;

    /// Applies `batch` as one transaction and returns when it is durable: not before an fsync of
    /// the file it lies in has succeeded. `steps` is told of each part as it begins.
    ///
    /// After an error the handle must be dropped; what the disk then holds is either the whole
    /// batch or nothing of it.
    fn commit(&mut self, batch: &[Pair], steps: &dyn Steps) -> Result<(), Fault>;

    /// Gives the handle up after an error, without closing what cannot be closed any more.
    fn abandon(self: Box<Self>);

    /// The engine's own check of its structures.
    fn check(&mut self) -> Result<(), Fault>;
}

/// Opens the engine in `directory`, making it where `create`.
pub(super) fn open(
    engine: Engine,
    directory: &Path,
    create: bool,
) -> Result<Box<dyn KeyValueEngine>, Fault> {
    Ok(match engine {
        Engine::Sled => Box::new(sled::Sled::open(directory, create)?),
        Engine::Redb => Box::new(redb::Redb::open(directory, create)?),
    })
}

/// Like [`open`] for an engine that was closed a moment ago: sled's threads may hold its lock for
/// a while after the last handle is gone (spacejam/sled issue 1289).
pub(super) fn open_patiently(
    engine: Engine,
    directory: &Path,
    patience: Duration,
) -> Result<Box<dyn KeyValueEngine>, Fault> {
    let give_up = Instant::now() + patience;
    loop {
        match open(engine, directory, false) {
            Err(Fault::Busy(_)) if Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// The engine whose files lie in `directory`.
pub(super) fn detect(directory: &Path) -> Option<Engine> {
    Engine::ALL.into_iter().find(|engine| {
        directory
            .join(match engine {
                Engine::Sled => sled::FILE,
                Engine::Redb => redb::FILE,
            })
            .exists()
    })
}

/// Runs `work`, turning a panic into an error. The engines panic on damage and on I/O errors that
/// they did not expect; whatever they held is dropped by the unwinding and never used again.
pub(super) fn guard<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Fault::Damaged(panic_text(&*panic))))
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let first = text.lines().next().unwrap_or_default();
    let short: String = first.chars().take(200).collect();
    format!("the engine panicked: {short}")
}

/// Marks the begin of a step; an injected error counts as the engine's.
fn step(steps: &dyn Steps, step: Step) -> Result<(), Fault> {
    steps.begin(step).map_err(Fault::from)
}
