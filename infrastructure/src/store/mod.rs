//! Durable state: the [`StateStore`] port on two engines, sled and redb.
//!
//! Start reading at [`open`]. Everything but the two thin engines in `engine/` is shared:
//!
//! - `rows/` turns domain types into bytes, `envelope` makes each value prove itself,
//!   `records` adds the manifest and the undo entries that make a batch provable and revocable;
//! - `writer` is the one thread that commits: group by group, engine first, then the sidecar,
//!   then the answer; it also heals the store after an error;
//! - `opening` decides at the start what can be believed and recovers what cannot; `probe` lets a
//!   helper process open the files first;
//! - `sidecar`, `export`, `ballast` and `lock` are the files beside the engine.
//!
//! Invariants held by tests, on both engines:
//! - what was acknowledged survives `kill -9`, a power cut and a full disk;
//! - a commit that returned an error is never seen, neither now nor after a restart;
//! - damaged, missing and older files are noticed, set aside and replaced by the newest export;
//!   the agent is told ([`StoreContents::damage`]) until it says that it dealt with it;
//! - no panic of an engine leaves this module.

mod ballast;
pub mod documents;
mod engine;
mod envelope;
mod export;
mod fault;
mod files;
mod key;
mod lock;
mod opening;
mod probe;
mod records;
mod rows;
mod sidecar;
mod steps;
mod writer;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ghost_domain::ports::{Change, StateStore, StoreContents, StoreHealth};
use ghost_domain::{Error, ErrorCode, Result};
use tokio::sync::oneshot;

pub use engine::Engine;
pub use probe::{Helper, ProbeResult, probe, probe_main};

use fault::unavailable;
use files::Layout;
use records::Records;
use steps::{Steps, Unwatched};
use writer::{Command, Condition, Observer, Outcome, Pending, Snapshot, Status, Writer};

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The directory of the store; made at the first start, with mode 0700.
    pub directory: PathBuf,
    /// The engine. A store that another engine wrote is moved over when it is opened.
    pub engine: Engine,
    /// Room kept in reserve for a full disk, in bytes; 0 for none.
    pub ballast_bytes: u64,
    /// The program that opens the files on trial, before this process does. Without one they are
    /// opened directly, with panics caught, but an absurd allocation then ends the process.
    pub helper: Option<Helper>,
    /// Limits.
    pub limits: StoreLimits,
}

impl StoreOptions {
    /// sled, a reserve of 32 MiB, no helper, and the usual limits.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            engine: Engine::default(),
            ballast_bytes: 32 << 20,
            helper: None,
            limits: StoreLimits::default(),
        }
    }
}

/// Limits of a store.
#[derive(Clone, Debug)]
pub struct StoreLimits {
    /// A commit that takes longer makes the store count as not writable.
    pub commit: Duration,
    /// Opening the files, by the helper or directly, may take so long.
    pub open: Duration,
    /// After a failed attempt to heal, the next one waits so long.
    pub heal_interval: Duration,
    /// At most so many commits share one transaction.
    pub group: usize,
    /// At most so many commits wait.
    pub queue: usize,
    /// The engine is not touched while fewer bytes are free on its file system; first the reserve
    /// is given up for them. An engine that runs into the end of the disk has to be reopened, and
    /// sled then keeps its lock and some memory until the process ends.
    pub room: u64,
    /// Files below this many bytes are not compacted at opening.
    pub compact_floor: u64,
    /// Files above this many bytes are compacted at opening, as are those above four times the
    /// size of the records.
    pub compact_bytes: u64,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self {
            commit: Duration::from_secs(10),
            open: Duration::from_secs(20),
            heal_interval: Duration::from_millis(500),
            group: 64,
            queue: 1024,
            room: 4 << 20,
            compact_floor: 8 << 20,
            compact_bytes: 256 << 20,
        }
    }
}

/// Opens a store, making it at the first start. Blocks, usually for some tens of milliseconds, at
/// most for a few times [`StoreLimits::open`]: call it outside async code.
///
/// # Errors
/// [`ErrorCode::StoreUnavailable`] when another process has it open, the system fails (no
/// permission, no room, I/O error) or a newer agent wrote it. Damage is no error: it is recovered
/// from, and told in [`StoreContents::damage`].
pub fn open(options: StoreOptions) -> Result<Arc<dyn StateStore>> {
    Ok(Arc::new(Store::open(options, Arc::new(Unwatched))?))
}

/// An open store: the async face of the writer thread.
struct Store {
    engine: Engine,
    limits: StoreLimits,
    layout: Layout,
    commands: Option<mpsc::Sender<Command>>,
    queued: Arc<AtomicUsize>,
    status: Arc<Status>,
    damage: Mutex<Option<String>>,
    exporting: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    fn open(options: StoreOptions, steps: Arc<dyn Steps>) -> Result<Self> {
        Self::observed(options, steps, |_, _| None)
    }

    /// Opens a store whose batches are watched: `observer` makes the one who is told, after it got
    /// the number of the newest batch and the records of then.
    fn observed(
        options: StoreOptions,
        steps: Arc<dyn Steps>,
        observer: impl FnOnce(u64, &Records) -> Option<Observer>,
    ) -> Result<Self> {
        let layout = Layout::new(options.directory.clone());
        let opened = opening::open(&options, &layout)?;
        let damage = Mutex::new(opened.damage.clone());
        let status = Arc::new(Status::default());
        let exporting = Arc::new(Mutex::new(()));
        let queued = Arc::new(AtomicUsize::new(0));
        let (commands, receiver) = mpsc::channel();
        let (engine, limits) = (options.engine, options.limits.clone());
        let observer = observer(opened.manifest.mark.sequence, &opened.records);
        let writer = Writer::new(
            options,
            layout.clone(),
            steps,
            opened,
            Arc::clone(&status),
            Arc::clone(&exporting),
            Arc::clone(&queued),
        )
        .observed(observer);
        let thread = thread::Builder::new()
            .name("ghost-store".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|error| unavailable(format!("no thread can be started: {error}")))?;
        Ok(Self {
            engine,
            limits,
            layout,
            commands: Some(commands),
            queued,
            status,
            damage,
            exporting,
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands
            .as_ref()
            .and_then(|commands| commands.send(command).ok())
            .ok_or_else(closed)
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.send(question(reply))?;
        answer.await.map_err(|_| closed())
    }

    /// Commits where the conditions hold.
    async fn submit(
        &self,
        conditions: Vec<Condition>,
        writes: Vec<rows::Write>,
    ) -> Result<Outcome> {
        if self.queued.fetch_add(1, Ordering::Relaxed) >= self.limits.queue {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::new(
                ErrorCode::TooManyRequests,
                "too many changes wait for the state store",
            )
            .because(format!("{} of them are queued", self.limits.queue))
            .retry_after(Duration::from_secs(1)));
        }
        let (reply, mut answer) = oneshot::channel();
        let claim = Arc::new(AtomicBool::new(false));
        self.send(Command::Commit(Pending {
            conditions,
            writes,
            reply,
            claim: Arc::clone(&claim),
            submitted: Instant::now(),
        }))?;
        let answered = match tokio::time::timeout(self.limits.commit, &mut answer).await {
            Ok(answered) => answered,
            // Nobody else may have the last word on it: either it is withdrawn before the writer
            // takes it, or its outcome is waited for, however long that takes.
            Err(_) if !claim.swap(true, Ordering::AcqRel) => {
                return Err(unavailable(format!(
                    "an earlier change has been under way for more than {} s",
                    self.limits.commit.as_secs()
                )));
            }
            Err(_) => answer.await,
        };
        answered.unwrap_or_else(|_| Err(closed()))
    }

    async fn snapshot(&self) -> Result<Snapshot> {
        self.ask(Command::Snapshot).await
    }
}

fn closed() -> Error {
    Error::new(ErrorCode::StoreUnavailable, "the state store is closed")
        .because("the agent is shutting down")
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::internal("a task of the store failed").because(error)))
}

#[async_trait]
impl StateStore for Store {
    async fn load(&self) -> Result<StoreContents> {
        let snapshot = self.snapshot().await?;
        let damage = self
            .damage
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let root = self.layout.root.clone();
        blocking(move || {
            let mut contents = snapshot
                .records
                .decode()
                .map_err(|fault| fault.into_open_error(&root))?;
            contents.damage = damage;
            Ok(contents)
        })
        .await
    }

    async fn commit(&self, changes: Vec<Change>) -> Result<()> {
        let writes = changes
            .iter()
            .map(rows::encode_change)
            .collect::<Result<Vec<_>>>()?;
        self.submit(Vec::new(), writes).await.map(drop)
    }

    async fn health(&self) -> StoreHealth {
        if self.status.is_broken() {
            // An attempt to heal, or the refusal of one so soon after the last. The writer may be
            // busy with just that; a health check does not wait for it.
            let attempt = self.ask(Command::Heal);
            let _ = tokio::time::timeout(Duration::from_secs(1), attempt).await;
        }
        self.status.health(self.engine, self.limits.commit)
    }

    async fn damage_resolved(&self) -> Result<()> {
        let path = self.layout.damage();
        blocking(move || {
            files::remove(&path)
                .and_then(|()| files::sync_parent(&path))
                .map_err(unavailable)
        })
        .await?;
        *self.damage.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    async fn export(&self) -> Result<()> {
        let snapshot = self.snapshot().await?;
        let directory = self.layout.exports();
        let exporting = Arc::clone(&self.exporting);
        blocking(move || writer::export(&exporting, &directory, &snapshot)).await
    }

    async fn close(&self) -> Result<()> {
        self.ask(Command::Close).await?
    }
}

impl Drop for Store {
    /// Waits for the writer, so that whoever opens the store next finds it unlocked; not forever,
    /// because storage that does not answer must not keep the process from ending.
    fn drop(&mut self) {
        self.commands = None;
        let Some(thread) = self.thread.take() else {
            return;
        };
        let give_up = Instant::now() + Duration::from_secs(2);
        while !thread.is_finished() && Instant::now() < give_up {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
