//! Who is told of changes.

use std::collections::HashSet;
use std::sync::Arc;

use ghost_domain::HostId;
use tokio::sync::broadcast;

/// What changed of hosts since the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostChanges {
    /// These hosts: their record, inventory, owner, queue or shown state.
    Some(HashSet<HostId>),
    /// More than was kept in mind: look at all of them.
    All,
}

/// A subscription to changes of hosts. One who is slow loses no change: it is told to look at all.
#[derive(Debug)]
pub struct HostWatch {
    pub(super) receiver: broadcast::Receiver<Arc<HashSet<HostId>>>,
}

impl HostWatch {
    /// What changed since the last call; `None` once the fleet is closed.
    pub async fn next(&mut self) -> Option<HostChanges> {
        use broadcast::error::{RecvError, TryRecvError};
        let mut changed = match self.receiver.recv().await {
            Ok(first) => HashSet::clone(&first),
            Err(RecvError::Lagged(_)) => return Some(self.all()),
            Err(RecvError::Closed) => return None,
        };
        loop {
            match self.receiver.try_recv() {
                Ok(more) => changed.extend(more.iter()),
                Err(TryRecvError::Lagged(_)) => return Some(self.all()),
                Err(TryRecvError::Empty | TryRecvError::Closed) => {
                    return Some(HostChanges::Some(changed));
                }
            }
        }
    }

    /// Whoever looks at all needs nothing of what is still kept.
    fn all(&mut self) -> HostChanges {
        self.receiver = self.receiver.resubscribe();
        HostChanges::All
    }
}
