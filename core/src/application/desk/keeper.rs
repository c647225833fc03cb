//! What is written and looked at from time to time, for all hosts together.

use std::collections::HashSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use ghost_domain::HostId;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::Desk;
use super::replica::stay_known;
use crate::application::fleet::Fleet;

/// How often what hosts said of themselves is stored, where it changed.
const KEEP: Duration = Duration::from_secs(3);
/// Inventories that are written at once.
const TOGETHER: usize = 16;
/// How often queues are looked through for what waited too long.
const SWEEP: Duration = Duration::from_secs(2);

/// How often it is looked whether this replica has to say again that it is there.
const KNOWN: Duration = Duration::from_secs(3600);

/// Which hosts said something new of themselves.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    dirty: Mutex<HashSet<HostId>>,
}

impl Keeper {
    pub(super) fn dirty(&self, host: HostId) {
        self.dirty.lock().insert(host);
    }

    /// Stores what is new. A host that changes all the time costs one write for each call.
    pub(super) async fn keep(&self, fleet: &Fleet) {
        let hosts = std::mem::take(&mut *self.dirty.lock());
        futures::stream::iter(hosts)
            .for_each_concurrent(TOGETHER, async |host| {
                if let Err(error) = fleet.keep_inventory(host).await {
                    tracing::warn!(%host, %error, "what a host said of itself cannot be stored");
                    self.dirty(host);
                }
            })
            .await;
    }
}

/// Keeps and sweeps until the desk ends.
pub(super) fn start(desk: &Arc<Desk>, stop: CancellationToken) {
    tokio::spawn(repeat(
        Arc::downgrade(desk),
        KEEP,
        stop.clone(),
        async |desk| desk.keeper.keep(&desk.fleet).await,
    ));
    tokio::spawn(repeat(
        Arc::downgrade(desk),
        KNOWN,
        stop.clone(),
        async |desk| {
            if let Err(error) = stay_known(&desk.fleet, &desk.options.replica).await {
                tracing::warn!(%error, "this replica cannot say that it is there");
            }
        },
    ));
    tokio::spawn(repeat(Arc::downgrade(desk), SWEEP, stop, async |desk| {
        if let Err(error) = desk.commands().sweep().await {
            tracing::warn!(%error, "the queues of commands cannot be looked through");
        }
    }));
}

async fn repeat<F>(desk: Weak<Desk>, every: Duration, stop: CancellationToken, act: F)
where
    F: AsyncFn(Arc<Desk>),
{
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let Some(desk) = desk.upgrade() else {
            return;
        };
        act(desk).await;
    }
}
