//! Many small changes of hosts as few commits: when all hosts come back after a restart of Core,
//! each wants two records written, and a disk takes some hundred commits a second.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use ghost_domain::{Error, ErrorCode, HostId, Result};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::application::fleet::{Draft, Fleet, FleetState};

/// Changes in one commit. Each writes at most three records, and etcd takes 128 of them at once
/// (`--max-txn-ops`).
const MOST_TOGETHER: usize = 40;
/// Changes that wait. Whoever finds no room waits for it.
const MOST_WAITING: usize = 1024;

type Decide = Box<dyn FnMut(&FleetState, &mut Draft<'_>) -> Result<()> + Send>;

struct Change {
    host: HostId,
    decide: Decide,
    answer: oneshot::Sender<Result<()>>,
}

/// Writes changes of hosts, together where several wait.
#[derive(Clone, Debug)]
pub(super) struct HostWriter {
    changes: mpsc::Sender<Change>,
}

impl HostWriter {
    /// Starts the task that writes; it ends with the last writer.
    pub(super) fn start(fleet: Arc<Fleet>) -> Self {
        let (changes, waiting) = mpsc::channel(MOST_WAITING);
        tokio::spawn(write(fleet, waiting));
        Self { changes }
    }

    /// Decides on a change of one host's records and writes it, at most three of them. `decide` is
    /// called again where another change came between; where it refuses it must not have drafted
    /// anything. Dropping the future may leave the change to be made.
    ///
    /// # Errors
    /// What `decide` says; `StoreUnavailable`.
    pub(super) async fn change<T: Send + 'static>(
        &self,
        host: HostId,
        mut decide: impl FnMut(&FleetState, &mut Draft<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let decided = Arc::new(Mutex::new(None));
        let told = Arc::clone(&decided);
        let (answer, answered) = oneshot::channel();
        let change = Change {
            host,
            decide: Box::new(move |state, draft| {
                *told.lock() = Some(decide(state, draft)?);
                Ok(())
            }),
            answer,
        };
        let stopping = || Error::new(ErrorCode::ShuttingDown, "Core is shutting down");
        self.changes.send(change).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())??;
        let value = decided.lock().take();
        value.ok_or_else(|| Error::internal("a change was written that nobody decided"))
    }
}

async fn write(fleet: Arc<Fleet>, mut waiting: mpsc::Receiver<Change>) {
    let mut later: VecDeque<Change> = VecDeque::new();
    loop {
        if later.is_empty() {
            match waiting.recv().await {
                Some(change) => later.push_back(change),
                None => return,
            }
        }
        while later.len() < MOST_TOGETHER
            && let Ok(change) = waiting.try_recv()
        {
            later.push_back(change);
        }
        // A draft does not show what it already writes, so each host has one change in it; the
        // second waits for the next.
        let mut hosts = HashSet::new();
        let (batch, rest): (Vec<_>, Vec<_>) = later
            .into_iter()
            .partition(|change| hosts.insert(change.host));
        later = rest.into();
        commit(&fleet, batch).await;
    }
}

async fn commit(fleet: &Fleet, mut batch: Vec<Change>) {
    let mut verdicts: Vec<Result<()>> = Vec::new();
    let written = fleet
        .transact(|state| {
            let mut draft = state.draft();
            verdicts = batch
                .iter_mut()
                .map(|change| (change.decide)(state, &mut draft))
                .collect();
            Ok(draft.done(()))
        })
        .await;
    for (change, verdict) in batch.into_iter().zip(verdicts) {
        let outcome = match &written {
            Ok(()) => verdict,
            Err(error) => Err(error.clone()),
        };
        // One who went away does not mind.
        let _ = change.answer.send(outcome);
    }
}
