//! Records in memory, for tests: several replicas on one set of records, and faults on request.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use ghost_domain::{Error, ErrorCode, Result};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::domain::ports::{
    Committed, Condition, FleetStore, FleetStoreHealth, RecordChange, Write,
};
use crate::domain::{Record, RecordKey, Stored};

/// What the replicas share.
#[derive(Debug, Default)]
pub struct SharedMemory(Mutex<Shared>);

#[derive(Debug, Default)]
struct Shared {
    revision: u64,
    records: BTreeMap<RecordKey, Kept>,
    /// All changes since the beginning, or since they were compacted.
    history: Vec<(u64, Vec<RecordChange>)>,
    compacted: u64,
    watchers: Vec<mpsc::UnboundedSender<Vec<RecordChange>>>,
    leases: u64,
}

#[derive(Clone, Debug)]
struct Kept {
    record: Record,
    version: u64,
    lease: Option<u64>,
}

/// One replica's way to the records.
#[derive(Debug)]
pub struct MemoryStore {
    shared: Arc<SharedMemory>,
    lease: AtomicU64,
    alone: bool,
    faults: Mutex<Faults>,
    lost: AtomicBool,
    losses: watch::Sender<u64>,
    told: AtomicU64,
}

#[derive(Debug, Default)]
struct Faults {
    refused: u32,
    unanswered: u32,
    unreachable: bool,
}

impl MemoryStore {
    /// Empty, for one replica.
    pub fn new() -> Arc<Self> {
        Self::on(Arc::default(), true)
    }

    /// One of several replicas on the same records.
    pub fn shared(shared: &Arc<SharedMemory>) -> Arc<Self> {
        Self::on(Arc::clone(shared), false)
    }

    fn on(shared: Arc<SharedMemory>, alone: bool) -> Arc<Self> {
        let lease = shared.lease();
        Arc::new(Self {
            shared,
            lease: AtomicU64::new(lease),
            alone,
            faults: Mutex::default(),
            lost: AtomicBool::new(false),
            losses: watch::Sender::new(0),
            told: AtomicU64::new(0),
        })
    }

    /// The records, for a store opened on them later.
    pub fn records(&self) -> Arc<SharedMemory> {
        Arc::clone(&self.shared)
    }

    /// The next `count` commits fail and take no effect.
    pub fn refuse(&self, count: u32) {
        self.faults.lock().refused = count;
    }

    /// The next `count` commits take effect, and yet an error is returned.
    pub fn lose_answers(&self, count: u32) {
        self.faults.lock().unanswered = count;
    }

    /// Nothing can be read or written any more, or again.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.faults.lock().unreachable = unreachable;
    }

    /// Ends all watches, those of other replicas too, and forgets the history, so that all have to
    /// be loaded anew.
    pub fn compact(&self) {
        let mut shared = self.shared.0.lock();
        shared.compacted = shared.revision;
        shared.history.clear();
        shared.watchers.clear();
    }

    /// The replica's lease ends: what it leased is gone.
    pub fn lose_lease(&self) {
        let lease = self.lease.load(Ordering::SeqCst);
        self.lost.store(true, Ordering::SeqCst);
        self.shared.0.lock().end_lease(lease);
        self.losses.send_modify(|losses| *losses += 1);
    }

    /// The replica has another lease.
    pub fn gain_lease(&self) {
        self.lease.store(self.shared.lease(), Ordering::SeqCst);
        self.lost.store(false, Ordering::SeqCst);
    }

    fn reachable(&self) -> Result<()> {
        if self.faults.lock().unreachable {
            return Err(unavailable());
        }
        Ok(())
    }
}

fn unavailable() -> Error {
    Error::new(
        ErrorCode::StoreUnavailable,
        "the fleet's records cannot be reached",
    )
    .because("a test made it so")
}

impl SharedMemory {
    /// A lease that nobody had.
    fn lease(&self) -> u64 {
        let mut inside = self.0.lock();
        inside.leases += 1;
        inside.leases
    }
}

impl Shared {
    fn commit(&mut self, conditions: &[Condition], writes: Vec<Write>, lease: u64) -> Committed {
        let holds = conditions.iter().all(|condition| match condition {
            Condition::Absent(key) => !self.records.contains_key(key),
            Condition::Unchanged(key, version) => self
                .records
                .get(key)
                .is_some_and(|kept| kept.version == *version),
        });
        if !holds {
            return Committed::Conflict;
        }
        let version = self.revision + 1;
        let mut changes = Vec::new();
        for write in writes {
            match write {
                Write::Put(key, record) => {
                    let kept = Kept {
                        record: record.clone(),
                        version,
                        lease: key.is_leased().then_some(lease),
                    };
                    self.records.insert(key.clone(), kept);
                    changes.push(RecordChange {
                        key,
                        record: Some(record),
                        version,
                    });
                }
                Write::Delete(key) => {
                    if self.records.remove(&key).is_some() {
                        changes.push(RecordChange {
                            key,
                            record: None,
                            version,
                        });
                    }
                }
            }
        }
        if !changes.is_empty() {
            self.revision = version;
            self.watchers
                .retain(|watcher| watcher.send(changes.clone()).is_ok());
            self.history.push((version, changes));
        }
        Committed::Done(self.revision)
    }

    fn end_lease(&mut self, lease: u64) {
        let leased = self
            .records
            .iter()
            .filter(|(_, kept)| kept.lease == Some(lease))
            .map(|(key, _)| Write::Delete(key.clone()))
            .collect();
        self.commit(&[], leased, lease);
    }
}

#[async_trait]
impl FleetStore for MemoryStore {
    async fn load(&self) -> Result<(u64, Vec<Stored>)> {
        self.reachable()?;
        let shared = self.shared.0.lock();
        let records = shared
            .records
            .iter()
            .map(|(key, kept)| Stored {
                key: key.clone(),
                record: kept.record.clone(),
                version: kept.version,
            })
            .collect();
        Ok((shared.revision, records))
    }

    async fn watch(&self, revision: u64) -> Result<BoxStream<'static, Vec<RecordChange>>> {
        self.reachable()?;
        let mut shared = self.shared.0.lock();
        if revision < shared.compacted {
            return Ok(futures::stream::empty().boxed());
        }
        let past: Vec<_> = shared
            .history
            .iter()
            .filter(|(at, _)| *at > revision)
            .map(|(_, changes)| changes.clone())
            .collect();
        let (sender, receiver) = mpsc::unbounded_channel();
        shared.watchers.push(sender);
        let future = UnboundedReceiverStream::new(receiver);
        Ok(futures::stream::iter(past).chain(future).boxed())
    }

    async fn commit(&self, conditions: Vec<Condition>, writes: Vec<Write>) -> Result<Committed> {
        self.reachable()?;
        let lost = self.lost.load(Ordering::SeqCst);
        let leases = |write: &Write| matches!(write, Write::Put(key, _) if key.is_leased());
        if lost && writes.iter().any(leases) {
            return Err(unavailable());
        }
        let unanswered = {
            let mut faults = self.faults.lock();
            if faults.refused > 0 {
                faults.refused -= 1;
                return Err(unavailable());
            }
            let unanswered = faults.unanswered > 0;
            faults.unanswered = faults.unanswered.saturating_sub(1);
            unanswered
        };
        // Where a real store waits; races between tasks need it.
        tokio::task::yield_now().await;
        let lease = self.lease.load(Ordering::SeqCst);
        let committed = self.shared.0.lock().commit(&conditions, writes, lease);
        if unanswered {
            return Err(unavailable());
        }
        Ok(committed)
    }

    fn is_shared(&self) -> bool {
        !self.alone
    }

    async fn lease_lost(&self) {
        let mut losses = self.losses.subscribe();
        loop {
            let lost = *losses.borrow_and_update();
            if self.told.fetch_max(lost, Ordering::SeqCst) < lost {
                return;
            }
            if losses.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    async fn health(&self) -> FleetStoreHealth {
        let problem = self.reachable().err().map(|error| error.to_string());
        FleetStoreHealth {
            engine: "memory".into(),
            writable: problem.is_none(),
            problem,
        }
    }

    async fn close(&self) -> Result<()> {
        let lease = self.lease.load(Ordering::SeqCst);
        self.shared.0.lock().end_lease(lease);
        Ok(())
    }
}
