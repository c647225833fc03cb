//! This replica among the others: that it is known, and what it does where its lease is lost.
//!
//! A lease is lost where the store was away for longer than the lease's time. From the inside that
//! looks the same whether the store is away for everybody or for this replica alone; the other
//! replicas know which. So they are asked:
//!
//! | the others | then | because |
//! |---|---|---|
//! | none of them has a lease either | hosts are kept | nobody can have taken them, and nobody can have changed a record: whom memory lets in is whom the store would |
//! | one of them has one, and the store answers it | hosts are given up | they go to it; here nobody could say whose rights were taken meanwhile |
//! | one of them does not answer | hosts are given up | it may have one |
//!
//! Kept hosts are reached by calls that need no store, from here and, forwarded, from the others.
//! Nothing is sent to them from their queues, and no other host is let in. With a lease again their
//! owners are written anew; where another replica took one meanwhile its link here ends. A host takes
//! part in one link at a time whatever Core believes, because it is the one that dials.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt};
use ghost_domain::{Result, Timestamp};

use super::Desk;
use super::links::Link;
use super::messages::Goodbye;
use crate::application::fleet::{Draft, Fleet};
use crate::domain::{Ownership, Record, RecordKey, Replica};

/// Waits between attempts to be known again.
const RETRY: Duration = Duration::from_millis(500);
/// How often the others are asked while there is no lease, and how long after the loss for the first
/// time: one that slept has a new lease by then.
const ASK: Duration = Duration::from_secs(1);
/// After so many rounds in a row in which another replica may have had them, or did not answer, the
/// hosts are given up: where the store just came back the others may have their leases a moment
/// earlier, and one lost packet is no reason to cut ten thousand hosts.
const MOST_DOUBTS: u32 = 3;
/// A replica that runs says so of itself that often, …
const SAY_AGAIN: Duration = Duration::from_secs(24 * 3600);
/// … and is missed for so long after it last did.
pub const MISSED_FOR: Duration = Duration::from_secs(30 * 24 * 3600);
/// Hosts that may come back in one second after their links were given up.
const COMING_BACK: u32 = 500;
/// Owners that are written at once after a loss.
const TOGETHER: usize = 512;

/// What a replica asks the others once its lease is lost.
#[async_trait]
pub trait OtherReplicas: Send + Sync {
    /// Whether another replica may have hosts: it has a lease, and the store answers it.
    ///
    /// # Errors
    /// `CoreUnreachable` where it does not answer.
    async fn may_have_hosts(&self, replica: &Replica) -> Result<bool>;
}

/// Makes a replica known to the others: as one that runs, for as long as its lease lives, and as one
/// that there is, so that its part of the audit log is missed while it does not run.
pub(super) async fn announce(fleet: &Fleet, replica: &Replica) -> Result<()> {
    let shared = fleet.store().is_shared();
    let now = fleet.clock().now();
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            let key = RecordKey::Replica(replica.name.clone());
            draft.put(key, Record::Replica(replica.clone()));
            if shared {
                put_known(&mut draft, replica, now);
            }
            Ok(draft.done(()))
        })
        .await
}

fn put_known(draft: &mut Draft<'_>, replica: &Replica, now: Timestamp) {
    let known = Replica {
        since: now,
        ..replica.clone()
    };
    let key = RecordKey::KnownReplica(replica.name.clone());
    draft.put(key, Record::KnownReplica(known));
}

/// Says again that this replica is there, where that was said long ago.
pub(super) async fn stay_known(fleet: &Fleet, replica: &Replica) -> Result<()> {
    if !fleet.store().is_shared() {
        return Ok(());
    }
    let now = fleet.clock().now();
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            let known = state.known_replicas().find(|one| one.name == replica.name);
            if known.is_none_or(|known| now.since(known.since) >= SAY_AGAIN) {
                put_known(&mut draft, replica, now);
            }
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
    /// Whether this replica may have hosts: it has its lease, and the store answers.
    pub async fn may_have_hosts(&self) -> bool {
        !self.leaseless.load(Ordering::SeqCst) && self.fleet.store().health().await.writable
    }

    /// Keeps the hosts or gives them up as often as the store says that this replica's lease was lost
    /// (see the module), and takes hosts again once it has one. Ends with the desk.
    pub async fn hold_lease(self: &Arc<Self>, others: Arc<dyn OtherReplicas>) {
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.fleet.store().lease_lost() => {}
            }
            self.leaseless.store(true, Ordering::SeqCst);
            tracing::warn!(
                links = self.links.len(),
                "this replica's lease was lost: its hosts are kept while no other replica may have them"
            );
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.yield_to(others.as_ref()) => {}
                () = self.regain() => {}
            }
            self.leaseless.store(false, Ordering::SeqCst);
            tracing::info!(
                links = self.links.len(),
                "this replica has a lease again and takes hosts"
            );
        }
    }

    /// Ends once this replica is known again and the links that it kept are its own again.
    async fn regain(&self) {
        loop {
            let regained = async {
                announce(&self.fleet, &self.options.replica).await?;
                futures::stream::iter(self.links.all())
                    .map(|link| self.reclaim(link))
                    .buffer_unordered(TOGETHER)
                    .try_collect::<()>()
                    .await
            };
            match regained.await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(%error, "this replica has no lease and takes no hosts");
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Writes that this replica has the host of a link that it kept, unless another one took it.
    async fn reclaim(&self, link: Arc<Link>) -> Result<()> {
        let host = link.host;
        if !self.fleet.live(host).is_linked() {
            // On its way in, or out: it writes for itself.
            return Ok(());
        }
        let ownership = Ownership {
            host,
            replica: self.options.replica.name.clone(),
            link: link.number,
            since: self.fleet.clock().now(),
        };
        self.writer
            .change(host, move |state, draft| {
                let free = state
                    .owner(host)
                    .is_none_or(|owner| owner.link == ownership.link);
                // Also where the records still say so: by the lease that was lost.
                if free && state.host(host).is_some() {
                    draft.put(RecordKey::Owner(host), Record::Owner(ownership.clone()));
                }
                Ok(())
            })
            .await
    }

    /// Gives the hosts up as soon as another replica may have them, and then waits for ever.
    async fn yield_to(&self, others: &dyn OtherReplicas) {
        let mut doubts = 0;
        let why = loop {
            tokio::time::sleep(ASK).await;
            let all: Vec<Replica> = self.fleet.read(|state| {
                let all = state.replicas();
                all.filter(|one| one.name != self.options.replica.name)
                    .cloned()
                    .collect()
            });
            let asked = all.iter().map(|one| others.may_have_hosts(one));
            let answers = futures::future::join_all(asked).await;
            let doubt = all
                .iter()
                .zip(answers)
                .find_map(|(one, answer)| match answer {
                    Ok(false) => None,
                    Ok(true) => Some(format!("the replica {} may have them", one.name)),
                    Err(error) => Some(error.to_string()),
                });
            let Some(why) = doubt else {
                doubts = 0;
                continue;
            };
            doubts += 1;
            if doubts >= MOST_DOUBTS {
                break why;
            }
        };
        self.give_up(&why).await;
        std::future::pending().await
    }

    /// Ends all links. Whoever is on the way in meets a store that takes nothing leased of this
    /// replica, or has a lease of later than the loss.
    async fn give_up(&self, why: &str) {
        let links = self.links.all();
        tracing::warn!(
            links = links.len(),
            why,
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
