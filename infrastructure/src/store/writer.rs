//! The one thread that writes.
//!
//! Commits that wait together share one transaction, so that one fsync serves them all. A commit is
//! answered after: the engine's transaction, the engine's file being durable, the sidecar noting
//! the batch, and the sidecar being durable.
//!
//! After any error the engine's handle and files are given up: what a failed fsync left behind
//! cannot be known (the kernel may have thrown the pages away and call the next fsync a success).
//! All that was acknowledged is in memory, and is written anew into fresh files, which then take
//! the place of the old. Only after that, or when it fails too, the caller is told that the commit
//! did not take place.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ghost_domain::Result;
use ghost_domain::ports::StoreHealth;
use tokio::sync::oneshot;

use super::StoreOptions;
use super::ballast::Ballast;
use super::engine::{Engine, KeyValueEngine, guard};
use super::export;
use super::fault::{Fault, unavailable};
use super::files::{self, Layout};
use super::key::Key;
use super::lock::Lock;
use super::opening::{self, Opened, Previous};
use super::probe;
use super::records::{Batch, Effect, Manifest, Records};
use super::rows::Write;
use super::sidecar::{Mark, Sidecar};
use super::steps::{Step, Steps};

/// How long closing an engine is waited for.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// How often the reserve and the size on disk are looked at.
const UPKEEP: Duration = Duration::from_secs(5);

/// A group takes no further commit once it has this many bytes.
const GROUP_BYTES: usize = 1 << 20;

/// What the writer is asked.
pub(super) enum Command {
    Commit(Pending),
    Snapshot(oneshot::Sender<Snapshot>),
    Heal(oneshot::Sender<()>),
    Close(oneshot::Sender<Result<()>>),
}

/// What must be true of a key for a commit to take effect: the batch that wrote its record, or that
/// there is none.
pub(super) type Condition = (Key, Option<u64>);

/// What became of a commit that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is durable, as of this batch.
    Done(u64),
    /// A condition does not hold; it took no effect.
    Conflict,
}

/// Is told of every batch after it is durable, before those who wait for it are, in order.
pub(super) type Observer = Box<dyn Fn(u64, &[Effect]) + Send>;

/// A commit that waits.
pub(super) struct Pending {
    pub(super) conditions: Vec<Condition>,
    pub(super) writes: Vec<Write>,
    pub(super) reply: oneshot::Sender<Result<Outcome>>,
    /// Taken by whoever comes first: the writer, to carry it out, or the caller, to withdraw it.
    pub(super) claim: Arc<AtomicBool>,
    pub(super) submitted: Instant,
}

impl Pending {
    fn bytes(&self) -> usize {
        self.writes
            .iter()
            .filter_map(|(_, row)| row.as_ref().map(Vec::len))
            .sum()
    }

    /// Whether it looks at or writes a key that is among `writes`.
    fn touches(&self, writes: &BTreeMap<Key, Option<Vec<u8>>>) -> bool {
        let looks = self.conditions.iter().map(|(key, _)| key);
        let puts = self.writes.iter().map(|(key, _)| key);
        looks.chain(puts).any(|key| writes.contains_key(key))
    }
}

/// All acknowledged records at one moment.
pub(super) struct Snapshot {
    pub(super) records: Records,
    pub(super) mark: Mark,
}

/// What the writer tells about itself. Read without asking it, because it may hang.
#[derive(Debug, Default)]
pub(super) struct Status(Mutex<StatusParts>);

#[derive(Debug, Default)]
struct StatusParts {
    broken: Option<String>,
    no_room: Option<String>,
    on_reserve: bool,
    closed: bool,
    busy_since: Option<Instant>,
    disk_bytes: u64,
    commits: u64,
    commit_seconds: f64,
}

impl Status {
    fn lock(&self) -> MutexGuard<'_, StatusParts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_broken(&self) -> bool {
        let parts = self.lock();
        (parts.broken.is_some() || parts.no_room.is_some()) && !parts.closed
    }

    pub(super) fn health(&self, engine: Engine, limit: Duration) -> StoreHealth {
        let parts = self.lock();
        let hangs = parts
            .busy_since
            .map(|since| since.elapsed())
            .filter(|elapsed| *elapsed > limit);
        let problem = if parts.closed {
            Some("it is closed".to_owned())
        } else if let Some(elapsed) = hangs {
            Some(format!(
                "a commit has been under way for {} s",
                elapsed.as_secs()
            ))
        } else {
            parts.broken.clone().or_else(|| parts.no_room.clone())
        };
        StoreHealth {
            engine: engine.as_str().to_owned(),
            writable: problem.is_none(),
            problem: problem.or_else(|| {
                parts
                    .on_reserve
                    .then(|| "there is no room for the store's reserve; free space".to_owned())
            }),
            disk_bytes: parts.disk_bytes,
            commits: parts.commits,
            commit_seconds: parts.commit_seconds,
        }
    }
}

/// The writer's state.
pub(super) struct Writer {
    options: StoreOptions,
    layout: Layout,
    steps: Arc<dyn Steps>,
    /// `None` after an error, until it is healed.
    engine: Option<Box<dyn KeyValueEngine>>,
    sidecar: Sidecar,
    /// What was acknowledged: the truth that the engine is compared with.
    records: Records,
    manifest: Manifest,
    ballast: Ballast,
    status: Arc<Status>,
    exporting: Arc<Mutex<()>>,
    queued: Arc<AtomicUsize>,
    observer: Option<Observer>,
    healed_at: Option<Instant>,
    upkeep_at: Instant,
    // Last, so that the lock outlives the engine when the writer is dropped.
    _lock: Lock,
}

impl Writer {
    pub(super) fn new(
        options: StoreOptions,
        layout: Layout,
        steps: Arc<dyn Steps>,
        opened: Opened,
        status: Arc<Status>,
        exporting: Arc<Mutex<()>>,
        queued: Arc<AtomicUsize>,
    ) -> Self {
        let mut writer = Self {
            options,
            layout,
            steps,
            engine: Some(opened.engine),
            sidecar: opened.sidecar,
            records: opened.records,
            manifest: opened.manifest,
            ballast: opened.ballast,
            status,
            exporting,
            queued,
            observer: None,
            healed_at: None,
            upkeep_at: Instant::now(),
            _lock: opened.lock,
        };
        writer.upkeep();
        writer
    }

    /// Has somebody told of every batch.
    pub(super) fn observed(mut self, observer: Option<Observer>) -> Self {
        self.observer = observer;
        self
    }

    /// Serves until the store is closed or dropped.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        let mut next = None;
        loop {
            let command = match next.take() {
                Some(command) => command,
                None => match commands.recv_timeout(UPKEEP) {
                    Ok(command) => command,
                    Err(RecvTimeoutError::Timeout) => {
                        self.upkeep();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => break,
                },
            };
            match command {
                Command::Commit(first) => {
                    let (group, behind) = self.gather(first, commands);
                    next = behind;
                    self.commit(group);
                }
                Command::Snapshot(reply) => {
                    let _ = reply.send(self.snapshot());
                }
                Command::Heal(reply) => {
                    if self.make_room().is_ok() && self.engine.is_none() {
                        let _ = self.heal_when_due();
                    }
                    let _ = reply.send(());
                }
                Command::Close(reply) => {
                    let outcome = self.close();
                    // The lock goes before the answer: whoever was told may open it again.
                    drop(self);
                    let _ = reply.send(outcome);
                    return;
                }
            }
            if self.upkeep_at.elapsed() > UPKEEP {
                self.upkeep();
            }
        }
        self.shut();
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            records: self.records.clone(),
            mark: self.manifest.mark,
        }
    }

    /// The commits that already wait behind `first`, and the first other command behind them.
    fn gather(
        &self,
        first: Pending,
        commands: &Receiver<Command>,
    ) -> (Vec<Pending>, Option<Command>) {
        let mut bytes = first.bytes();
        let mut group = vec![first];
        while group.len() < self.options.limits.group && bytes < GROUP_BYTES {
            match commands.try_recv() {
                Ok(Command::Commit(pending)) => {
                    bytes += pending.bytes();
                    group.push(pending);
                }
                Ok(other) => return (group, Some(other)),
                Err(_) => break,
            }
        }
        (group, None)
    }

    fn commit(&mut self, mut group: Vec<Pending>) {
        self.queued.fetch_sub(group.len(), Ordering::Relaxed);
        group.retain(|pending| !pending.claim.swap(true, Ordering::AcqRel));
        let mut waiting = VecDeque::from(group);
        while !waiting.is_empty() {
            let (together, writes) = self.next_batch(&mut waiting);
            if !together.is_empty() {
                self.commit_together(together, &writes);
            }
        }
    }

    /// Takes the commits off `waiting` that can share a batch, and answers those whose conditions do
    /// not hold. Where versions matter a batch writes no key twice, and no commit is judged by a key
    /// that the same batch writes: it would get a version that two values have.
    fn next_batch(
        &self,
        waiting: &mut VecDeque<Pending>,
    ) -> (Vec<Pending>, BTreeMap<Key, Option<Vec<u8>>>) {
        let mut together = Vec::new();
        let mut writes = BTreeMap::new();
        while let Some(mut pending) = waiting.pop_front() {
            let versions_matter = self.observer.is_some() || !pending.conditions.is_empty();
            if versions_matter && pending.touches(&writes) {
                waiting.push_front(pending);
                break;
            }
            let holds = pending
                .conditions
                .iter()
                .all(|(key, version)| self.records.version(key) == *version);
            if holds {
                // In the order of arrival: of two writes to one key the later stands.
                writes.extend(std::mem::take(&mut pending.writes));
                together.push(pending);
            } else {
                let _ = pending.reply.send(Ok(Outcome::Conflict));
            }
        }
        (together, writes)
    }

    fn commit_together(&mut self, group: Vec<Pending>, writes: &BTreeMap<Key, Option<Vec<u8>>>) {
        self.status.lock().busy_since = Some(Instant::now());
        let outcome = self.write(writes);
        {
            let mut parts = self.status.lock();
            parts.busy_since = None;
            if outcome.is_ok() {
                parts.commits += group.len() as u64;
                parts.commit_seconds += group
                    .iter()
                    .map(|pending| pending.submitted.elapsed().as_secs_f64())
                    .sum::<f64>();
            }
        }
        self.steps.done(Step::Acknowledge);
        for pending in group {
            let answer = match &outcome {
                Ok(sequence) => Ok(Outcome::Done(*sequence)),
                Err(fault) => Err(unavailable(fault)),
            };
            // A caller that went away is no reason to do anything else.
            let _ = pending.reply.send(answer);
        }
    }

    /// Writes a batch; gives the newest batch's number.
    fn write(&mut self, writes: &BTreeMap<Key, Option<Vec<u8>>>) -> Result<u64, Fault> {
        self.make_room()?;
        if self.engine.is_none() {
            self.heal_when_due()?;
        }
        let mut may_try_again = true;
        loop {
            let Some(batch) = Batch::prepare(&self.records, &self.manifest, writes)? else {
                return Ok(self.manifest.mark.sequence);
            };
            let Err(fault) = self.commit_batch(&batch) else {
                let sequence = batch.manifest.mark.sequence;
                if let Some(observer) = &self.observer {
                    observer(sequence, &batch.effects);
                }
                for (key, envelope) in batch.effects {
                    self.records.set(key, envelope);
                }
                return Ok(sequence);
            };
            let full = self.is_full(&fault);
            self.break_off(&fault);
            let healed = self.heal(full);
            // The failed batch is gone with the old files, and the reserve was freed: the same
            // changes are a new batch now, so that a delete works on a full disk.
            if healed.is_ok() && full && may_try_again {
                may_try_again = false;
                continue;
            }
            return Err(fault);
        }
    }

    /// Sees to it that the engine does not run into the end of the disk.
    fn make_room(&mut self) -> Result<(), Fault> {
        let made = self.ballast.make_room(self.options.limits.room);
        let mut parts = self.status.lock();
        parts.on_reserve = self.options.ballast_bytes > 0 && !self.ballast.stands();
        parts.no_room = made.as_ref().err().map(ToString::to_string);
        made
    }

    /// Commits to the engine and notes it in the sidecar.
    fn commit_batch(&mut self, batch: &Batch) -> Result<(), Fault> {
        let engine = self
            .engine
            .as_mut()
            .ok_or_else(|| Fault::Io("the engine is not open".into()))?;
        let steps = &*self.steps;
        guard(|| engine.commit(&batch.pairs, steps))?;
        self.note(batch.manifest)
    }

    fn note(&mut self, manifest: Manifest) -> Result<(), Fault> {
        let noted = (|| {
            self.steps.begin(Step::Mark)?;
            self.sidecar.write(manifest.mark)?;
            self.steps.begin(Step::MarkSync)?;
            self.sidecar.sync()
        })();
        match noted {
            Ok(()) => {
                self.steps.done(Step::MarkSync);
                self.manifest = manifest;
                Ok(())
            }
            Err(error) => {
                // The mark may have reached the disk although we must say that it did not: the
                // one before it is written once more, over it in rank, so that the next start
                // takes the batch back even if nothing heals before.
                let _ = self.sidecar.write(self.manifest.mark);
                let _ = self.sidecar.sync();
                Err(error.into())
            }
        }
    }

    fn is_full(&self, fault: &Fault) -> bool {
        matches!(fault, Fault::Full(_))
            || files::free_bytes(&self.layout.root).is_ok_and(|free| free < opening::NO_ROOM)
    }

    /// Gives the engine's handle up.
    fn break_off(&mut self, fault: &Fault) {
        tracing::error!(%fault, "a commit to the state store failed");
        self.status.lock().broken = Some(fault.to_string());
        if let Some(engine) = self.engine.take() {
            bounded_close(move || engine.abandon());
        }
    }

    /// Closes a sound engine.
    fn shut(&mut self) {
        if let Some(engine) = self.engine.take() {
            bounded_close(move || drop(engine));
        }
    }

    fn heal_when_due(&mut self) -> Result<(), Fault> {
        let pause = self.options.limits.heal_interval;
        if self.healed_at.is_some_and(|at| at.elapsed() < pause) {
            let why = self.status.lock().broken.clone().unwrap_or_default();
            return Err(Fault::Io(why));
        }
        let full = self.is_full(&Fault::Io(String::new()));
        self.heal(full)
    }

    /// Writes what was acknowledged, no more and no less, into fresh files.
    fn heal(&mut self, full: bool) -> Result<(), Fault> {
        if full && self.ballast.release() {
            tracing::warn!("the disk is full; the state store uses its reserve");
        }
        let mut outcome = self.write_anew();
        if matches!(outcome, Err(Fault::Full(_))) && self.ballast.release() {
            outcome = self.write_anew();
        }
        self.healed_at = Some(Instant::now());
        let mut parts = self.status.lock();
        parts.on_reserve = self.options.ballast_bytes > 0 && !self.ballast.stands();
        match &outcome {
            Ok(()) => {
                tracing::info!("the state store takes writes again");
                parts.broken = None;
            }
            Err(fault) => parts.broken = Some(fault.to_string()),
        }
        outcome
    }

    fn write_anew(&mut self) -> Result<(), Fault> {
        let room = opening::OPENING_ROOM + self.records.bytes().saturating_mul(2);
        self.ballast.make_room(room)?;
        let acknowledged = self.manifest.mark;
        let manifest = Manifest {
            mark: Mark {
                // Beyond the batch that failed.
                sequence: acknowledged.sequence + 2,
                ..acknowledged
            },
            base: acknowledged.sequence,
            undo: 0,
        };
        let previous = if self.layout.state().exists() {
            Previous::Replaced
        } else {
            Previous::Absent
        };
        let engine = opening::install(
            &self.options,
            &self.layout,
            &self.records,
            &manifest,
            previous,
        )?;
        let noted = self.note(manifest);
        match noted {
            Ok(()) => self.engine = Some(engine),
            Err(_) => bounded_close(move || drop(engine)),
        }
        noted
    }

    fn upkeep(&mut self) {
        self.upkeep_at = Instant::now();
        self.ballast.restore();
        let disk_bytes = files::disk_usage(&self.layout.state());
        let mut parts = self.status.lock();
        parts.disk_bytes = disk_bytes;
        parts.on_reserve = self.options.ballast_bytes > 0 && !self.ballast.stands();
    }

    fn close(&mut self) -> Result<()> {
        let exported = export(&self.exporting, &self.layout.exports(), &self.snapshot());
        self.shut();
        self.status.lock().closed = true;
        exported
    }
}

/// Closes an engine in a thread of its own, which is left behind where that hangs.
fn bounded_close(close: impl FnOnce() + Send + 'static) {
    let closed = probe::bounded(CLOSE_PATIENCE, move || {
        close();
        Ok(())
    });
    if let Err(fault) = closed {
        tracing::warn!(%fault, "closing the state store's engine failed");
    }
}

/// Writes an export of `snapshot`.
///
/// # Errors
/// `StoreUnavailable` with what the file system said; the exports before it are still there.
pub(super) fn export(one: &Mutex<()>, directory: &Path, snapshot: &Snapshot) -> Result<()> {
    let _one = one.lock().unwrap_or_else(PoisonError::into_inner);
    let mark = snapshot.mark;
    export::write(
        directory,
        mark.store,
        mark.sequence,
        &snapshot.records,
        opening::now(),
    )
    .map_err(|fault| unavailable(format!("its export failed: {fault}")))
}
