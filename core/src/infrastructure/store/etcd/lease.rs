//! This process's lease: what is bound to it is gone when the process is, a lease's time later.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::api::{
    Empty, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseRevokeRequest,
};
use super::client::{Again, Members};

const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const REVOKE: &str = "/etcdserverpb.Lease/LeaseRevoke";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

/// Waits between attempts.
const RETRY: Duration = Duration::from_millis(200);

/// The lease of now.
#[derive(Debug)]
pub(super) struct Lease {
    /// 0: none.
    id: AtomicI64,
    losses: watch::Sender<u64>,
    told: AtomicU64,
}

impl Lease {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            id: AtomicI64::new(0),
            losses: watch::Sender::new(0),
            told: AtomicU64::new(0),
        })
    }

    /// Its number; `None` while there is none.
    pub(super) fn id(&self) -> Option<i64> {
        Some(self.id.load(Ordering::SeqCst)).filter(|id| *id != 0)
    }

    /// etcd does not know the lease any more.
    pub(super) fn is_gone(&self, id: i64) {
        if self
            .id
            .compare_exchange(id, 0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            tracing::error!("the lease in etcd was lost");
            self.losses.send_modify(|losses| *losses += 1);
        }
    }

    /// Resolves once for each loss.
    pub(super) async fn lost(&self) {
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
}

async fn grant(members: &Members, time: Duration) -> Result<i64, Status> {
    let ttl = i64::try_from(time.as_secs().max(1)).unwrap_or(i64::MAX);
    let granted: LeaseGrantResponse = members
        .call(GRANT, LeaseGrantRequest { ttl }, Again::Always)
        .await?;
    if granted.error.is_empty() && granted.id != 0 {
        Ok(granted.id)
    } else {
        Err(Status::internal(granted.error))
    }
}

/// Takes a lease and keeps it until `stop`; takes another one after it was lost.
///
/// # Errors
/// Where the first one cannot be had.
pub(super) async fn begin(
    lease: &Arc<Lease>,
    members: &Arc<Members>,
    time: Duration,
    stop: CancellationToken,
) -> Result<(), Status> {
    let asked = Instant::now();
    let id = grant(members, time).await?;
    lease.id.store(id, Ordering::SeqCst);
    let (lease, members) = (Arc::clone(lease), Arc::clone(members));
    tokio::spawn(async move {
        let mut until = asked + time;
        loop {
            let former = lease.id();
            keep(&lease, &members, time, until, &stop).await;
            if stop.is_cancelled() {
                return;
            }
            until = loop {
                let asked = Instant::now();
                match grant(&members, time).await {
                    Ok(id) => {
                        // A cluster that was away gives all leases their full time anew: what is
                        // bound to this one would tell for as long that we have what we gave up.
                        if let Some(former) = former {
                            let ask = LeaseRevokeRequest { id: former };
                            let _ = members.call::<_, Empty>(REVOKE, ask, Again::Always).await;
                        }
                        lease.id.store(id, Ordering::SeqCst);
                        break asked + time;
                    }
                    Err(error) => tracing::warn!(%error, "no lease can be had from etcd"),
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY * 5) => {}
                }
            };
        }
    });
    Ok(())
}

/// Keeps the lease alive until it is lost or `stop`. It counts as lost a lease's time after the
/// last *question* that was answered, by our own clock: etcd, which counts from later on, then still
/// holds it, and nobody else has what it protects.
async fn keep(
    lease: &Lease,
    members: &Members,
    time: Duration,
    mut until: Instant,
    stop: &CancellationToken,
) {
    while let Some(id) = lease.id() {
        let (asks, asked) = mpsc::channel(4);
        let ask = LeaseKeepAliveRequest { id };
        let mut at = Instant::now();
        // The first question goes with the call: etcd says nothing before it has one. There is room.
        let _ = asks.try_send(ask);
        let opened =
            members.stream::<_, LeaseKeepAliveResponse>(KEEP_ALIVE, ReceiverStream::new(asked));
        let opened = tokio::select! {
            () = stop.cancelled() => return,
            opened = tokio::time::timeout_at(until, opened) => opened,
        };
        if let Ok(Ok(mut answers)) = opened {
            loop {
                let patience = until.min(Instant::now() + time / 3);
                let answer = tokio::select! {
                    () = stop.cancelled() => return,
                    answer = tokio::time::timeout_at(patience, answers.next()) => answer,
                };
                match answer {
                    Ok(Some(Ok(answer))) if answer.id == id && answer.ttl > 0 => until = at + time,
                    Ok(Some(Ok(answer))) if answer.id == id => {
                        lease.is_gone(id);
                        return;
                    }
                    _ => break,
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep_until(at + time / 3) => {}
                }
                at = Instant::now();
                if asks.try_send(ask).is_err() {
                    break;
                }
            }
            members.broke();
        }
        if Instant::now() >= until {
            lease.is_gone(id);
            return;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Gives the lease back: what is bound to it is gone at once.
pub(super) async fn end(lease: &Lease, members: &Members) -> Result<(), Status> {
    let id = lease.id.swap(0, Ordering::SeqCst);
    if id == 0 {
        return Ok(());
    }
    let _: Empty = members
        .call(REVOKE, LeaseRevokeRequest { id }, Again::Always)
        .await?;
    Ok(())
}
