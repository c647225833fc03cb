//! This replica among the others: that it is known, and what it does where its lease is lost.
//!
//! A lease is lost where the store was away for longer than the lease's time. Then another replica
//! may have this one's hosts, so that this one gives all of them up: their links are ended, no new
//! one is let in, and nothing is sent to a host until there is a lease again. What is in memory is
//! still told, with its age. Hosts come back by themselves, here or elsewhere.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ghost_domain::Result;

use super::Desk;
use super::messages::Goodbye;
use crate::application::fleet::Fleet;
use crate::domain::{Record, RecordKey, Replica};

/// Waits between attempts to be known again.
const RETRY: Duration = Duration::from_secs(1);
/// Hosts that may come back in one second after their links were given up.
const COMING_BACK: u32 = 500;

/// Makes a replica known to the others, for as long as its lease lives.
pub(super) async fn announce(fleet: &Fleet, replica: &Replica) -> Result<()> {
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            let key = RecordKey::Replica(replica.name.clone());
            draft.put(key, Record::Replica(replica.clone()));
            Ok(draft.done(()))
        })
        .await
}

/// What a host is told that this replica cannot have.
pub(super) fn leaseless(retry_after: Duration) -> Goodbye {
    Goodbye::new(
        "not_the_owner",
        "this replica lost its lease in the store and may have no hosts",
    )
    .retry_after(retry_after)
}

impl Desk {
    /// Gives all hosts up as often as the store says that this replica's lease was lost, and takes
    /// hosts again once it has one. Ends with the desk.
    pub async fn hold_lease(self: &Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.fleet.store().lease_lost() => {}
            }
            self.give_up().await;
            loop {
                let announced = tokio::select! {
                    () = self.stop.cancelled() => return,
                    announced = announce(&self.fleet, &self.options.replica) => announced,
                };
                match announced {
                    Ok(()) => break,
                    Err(error) => {
                        tracing::warn!(%error, "this replica has no lease and takes no hosts");
                    }
                }
                tokio::select! {
                    () = self.stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
            self.leaseless.store(false, Ordering::SeqCst);
            tracing::info!("this replica has a lease again and takes hosts");
        }
    }

    /// Ends all links. Whoever is on the way in meets a store that takes nothing leased of this
    /// replica, or has a lease of later than the loss.
    async fn give_up(&self) {
        self.leaseless.store(true, Ordering::SeqCst);
        let links = self.links.all();
        tracing::warn!(
            links = links.len(),
            "this replica's lease was lost: its hosts are given up"
        );
        let count = u32::try_from(links.len()).unwrap_or(u32::MAX);
        let spread = Duration::from_secs(1) + Duration::from_secs(1) * (count / COMING_BACK);
        let spread = spread.min(Duration::from_secs(60));
        for link in &links {
            let wait = spread.mul_f64(rand::random_range(0.05..=1.0));
            link.cut.tell(leaseless(wait));
        }
        self.gone(links, "the lease was lost").await;
    }
}
