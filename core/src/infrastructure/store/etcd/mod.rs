//! Records in etcd, for several replicas of one Core.
//!
//! | here | in etcd |
//! |---|---|
//! | a record | a key below the prefix; its version is the key's `mod_revision` |
//! | a commit | one transaction that compares `mod_revision`s |
//! | what a replica leases | keys bound to the process's lease |
//! | the watch | a watch of the prefix from a revision on |
//!
//! Reads are linearizable (etcd's default), pages of one load are of one revision.
//!
//! What cannot be known is said: a commit whose answer was lost ends in `StoreUnavailable`, and is
//! not sent a second time.

mod api;
mod client;
mod lease;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use ghost_domain::{Error, ErrorCode, Result};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status, Streaming};

pub use client::EtcdTls;

use self::api::{
    Compare, CompareWith, DELETED, DeleteRangeRequest, EQUAL, Empty, Event, KeyValue, MOD,
    Operation, Outcome, PutRequest, RangeRequest, RangeResponse, RequestOp, TxnRequest,
    TxnResponse, WatchAsk, WatchCreateRequest, WatchRequest, WatchResponse,
};
use self::client::{Again, Members, unavailable};
use self::lease::Lease;
use super::rows;
use crate::domain::ports::{
    Committed, Condition, FleetStore, FleetStoreHealth, RecordChange, Write,
};
use crate::domain::{RecordKey, Stored};

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
const WATCH: &str = "/etcdserverpb.Watch/Watch";

/// Records of one page of a load.
const PAGE: i64 = 500;
/// How often a watch is asked whether it still goes on; it ends where it does not say so until the
/// next time. Otherwise a stream that a member forgot would show yesterday's fleet for ever.
const ASK: Duration = Duration::from_secs(5);

/// How etcd is reached.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Its members, `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoints: Vec<String>,
    /// What all keys begin with, such as `/ghost/`.
    pub prefix: String,
    /// TLS, for members with `https`.
    pub tls: Option<EtcdTls>,
    /// How long what this replica leased outlives its last word. Whole seconds; etcd has a least
    /// time of its own (twice its election timeout).
    pub lease: Duration,
    /// How long one call to one member may take.
    pub deadline: Duration,
}

impl EtcdOptions {
    /// With a lease of 10 s and a deadline of 5 s.
    pub fn new(endpoints: Vec<String>, prefix: impl Into<String>) -> Self {
        Self {
            endpoints,
            prefix: prefix.into(),
            tls: None,
            lease: Duration::from_secs(10),
            deadline: Duration::from_secs(5),
        }
    }
}

/// Records in etcd.
#[derive(Debug)]
pub struct EtcdStore {
    members: Arc<Members>,
    prefix: Vec<u8>,
    lease: Arc<Lease>,
    stop: CancellationToken,
    _guard: DropGuard,
}

impl EtcdStore {
    /// Reaches etcd and takes a lease.
    ///
    /// # Errors
    /// `InvalidArgument` for options that cannot be used, `StoreUnavailable` where etcd does not
    /// answer.
    pub async fn open(options: EtcdOptions) -> Result<Arc<Self>> {
        if options.prefix.is_empty() || !options.prefix.ends_with('/') {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "the prefix of the keys in etcd does not end with '/'",
            )
            .field("store.etcd.prefix", "such as /ghost/"));
        }
        let tls = options.tls.as_ref();
        let members = Arc::new(Members::new(&options.endpoints, tls, options.deadline)?);
        let lease = Lease::new();
        let stop = CancellationToken::new();
        lease::begin(&lease, &members, options.lease, stop.clone())
            .await
            .map_err(|status| unavailable(&status))?;
        Ok(Arc::new(Self {
            members,
            prefix: options.prefix.into_bytes(),
            lease,
            _guard: stop.clone().drop_guard(),
            stop,
        }))
    }

    fn key(&self, key: &RecordKey) -> Vec<u8> {
        let mut bytes = self.prefix.clone();
        bytes.extend_from_slice(rows::name(key).as_bytes());
        bytes
    }

    fn compare(&self, condition: &Condition) -> Result<Compare> {
        let (key, version) = match condition {
            Condition::Absent(key) => (key, 0),
            Condition::Unchanged(key, version) => (key, *version),
        };
        let revision = i64::try_from(version)
            .map_err(|_| Error::internal(format!("{version} is no revision of etcd")))?;
        Ok(Compare {
            result: EQUAL,
            target: MOD,
            key: self.key(key),
            with: Some(CompareWith::ModRevision(revision)),
        })
    }

    fn operation(&self, write: &Write, lease: Option<i64>) -> Result<RequestOp> {
        let operation = match write {
            Write::Put(key, record) => Operation::Put(PutRequest {
                key: self.key(key),
                value: rows::encode(record)?,
                lease: match lease {
                    Some(lease) if key.is_leased() => lease,
                    None if key.is_leased() => return Err(leaseless()),
                    _ => 0,
                },
            }),
            Write::Delete(key) => Operation::Delete(DeleteRangeRequest { key: self.key(key) }),
        };
        Ok(RequestOp {
            operation: Some(operation),
        })
    }
}

fn leaseless() -> Error {
    Error::new(
        ErrorCode::StoreUnavailable,
        "this replica has no lease in etcd at the moment",
    )
    .retry_after(Duration::from_secs(1))
}

/// The end of the range of all keys with a prefix: the prefix with its last byte raised.
fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(raised) = last.checked_add(1) {
            end.push(raised);
            return end;
        }
    }
    // All bytes were 0xff: to the end of everything, which etcd writes as a zero byte.
    vec![0]
}

fn revision(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

fn parse(prefix: &[u8], kv: &KeyValue) -> Result<RecordKey> {
    kv.key
        .strip_prefix(prefix)
        .and_then(|name| std::str::from_utf8(name).ok())
        .map_or_else(
            || {
                Err(Error::new(
                    ErrorCode::StoreUnavailable,
                    "there is a key in etcd that is not ours",
                )
                .because(String::from_utf8_lossy(&kv.key)))
            },
            rows::key,
        )
}

fn change(prefix: &[u8], event: Event) -> Result<Option<RecordChange>> {
    let Some(kv) = event.kv else {
        return Ok(None);
    };
    let key = parse(prefix, &kv)?;
    let record = if event.kind == DELETED {
        None
    } else {
        Some(rows::decode(&key, &kv.value)?)
    };
    Ok(Some(RecordChange {
        key,
        record,
        version: revision(kv.mod_revision),
    }))
}

#[async_trait]
impl FleetStore for EtcdStore {
    async fn load(&self) -> Result<(u64, Vec<Stored>)> {
        let end = range_end(&self.prefix);
        let mut records = Vec::new();
        let (mut from, mut at) = (self.prefix.clone(), 0);
        loop {
            let ask = RangeRequest {
                key: from,
                range_end: end.clone(),
                limit: PAGE,
                revision: at,
            };
            let page: RangeResponse = self
                .members
                .call(RANGE, ask, Again::Always)
                .await
                .map_err(|status| unavailable(&status))?;
            if at == 0 {
                at = page.header.unwrap_or_default().revision;
            }
            let last = page.kvs.last().map(|kv| kv.key.clone());
            for kv in page.kvs {
                let key = parse(&self.prefix, &kv)?;
                let record = rows::decode(&key, &kv.value)?;
                records.push(Stored {
                    key,
                    record,
                    version: revision(kv.mod_revision),
                });
            }
            match last {
                Some(mut next) if page.more => {
                    // The least key after the last one.
                    next.push(0);
                    from = next;
                }
                _ => return Ok((revision(at), records)),
            }
        }
    }

    async fn watch(&self, after: u64) -> Result<BoxStream<'static, Vec<RecordChange>>> {
        let start = i64::try_from(after)
            .ok()
            .and_then(|after| after.checked_add(1))
            .ok_or_else(|| Error::internal(format!("{after} is no revision of etcd")))?;
        let (asks, asked) = mpsc::channel(4);
        let create = WatchCreateRequest {
            key: self.prefix.clone(),
            range_end: range_end(&self.prefix),
            start_revision: start,
        };
        let create = WatchRequest {
            ask: Some(WatchAsk::Create(create)),
        };
        // There is room for it.
        let _ = asks.send(create).await;
        let mut answers: Streaming<WatchResponse> = self
            .members
            .stream(WATCH, ReceiverStream::new(asked))
            .await
            .map_err(|status| unavailable(&status))?;
        let first = tokio::time::timeout(self.members.deadline(), answers.message()).await;
        match first {
            Ok(Ok(Some(first))) if first.created && !first.canceled => {}
            Ok(Ok(_)) => {
                return Err(unavailable(&Status::unavailable("etcd refused to watch")));
            }
            Ok(Err(status)) => {
                self.members.broke();
                return Err(unavailable(&status));
            }
            Err(_) => {
                self.members.broke();
                return Err(unavailable(&Status::deadline_exceeded(
                    "etcd did not begin to watch in time",
                )));
            }
        }
        let watch = Watching {
            asks,
            answers,
            prefix: self.prefix.clone(),
            members: Arc::clone(&self.members),
            stop: self.stop.clone(),
        };
        let stream = futures::stream::unfold(watch, |mut watch| async move {
            Some((watch.next().await?, watch))
        });
        Ok(stream.boxed())
    }

    async fn commit(&self, conditions: Vec<Condition>, writes: Vec<Write>) -> Result<Committed> {
        if self.stop.is_cancelled() {
            return Err(Error::new(
                ErrorCode::StoreUnavailable,
                "the fleet's records are closed",
            ));
        }
        let lease = self.lease.id();
        let ask = TxnRequest {
            compare: conditions
                .iter()
                .map(|one| self.compare(one))
                .collect::<Result<_>>()?,
            success: writes
                .iter()
                .map(|one| self.operation(one, lease))
                .collect::<Result<_>>()?,
        };
        let answer: TxnResponse = match self.members.call(TXN, ask, Again::Unsent).await {
            Ok(answer) => answer,
            Err(status) => {
                let leaseless =
                    status.code() == Code::NotFound && status.message().contains("lease not found");
                if let Some(lease) = lease.filter(|_| leaseless) {
                    self.lease.is_gone(lease);
                }
                return Err(unavailable(&status));
            }
        };
        if !answer.succeeded {
            return Ok(Committed::Conflict);
        }
        let changed = answer.responses.iter().any(|one| match &one.outcome {
            Some(Outcome::Delete(delete)) => delete.deleted > 0,
            Some(Outcome::Put(_)) => true,
            None => false,
        });
        // Where nothing changed the revision is somebody else's, perhaps of a key that is not ours
        // and that no watch of ours will ever tell.
        Ok(Committed::Done(if changed {
            revision(answer.header.unwrap_or_default().revision)
        } else {
            0
        }))
    }

    fn is_shared(&self) -> bool {
        true
    }

    async fn lease_lost(&self) {
        self.lease.lost().await;
    }

    async fn health(&self) -> FleetStoreHealth {
        // A linearizable read goes through the leader, as a write would.
        let ask = RangeRequest {
            key: self.key(&RecordKey::CoreId),
            limit: 1,
            ..RangeRequest::default()
        };
        let asked = self
            .members
            .call::<_, RangeResponse>(RANGE, ask, Again::Always)
            .await;
        let problem = match asked {
            Ok(_) if self.lease.id().is_none() => Some("this replica has no lease".to_owned()),
            Ok(_) => None,
            Err(status) => Some(unavailable(&status).to_string()),
        };
        FleetStoreHealth {
            engine: "etcd".into(),
            writable: problem.is_none(),
            problem,
        }
    }

    async fn close(&self) -> Result<()> {
        self.stop.cancel();
        lease::end(&self.lease, &self.members)
            .await
            .map_err(|status| unavailable(&status))
    }
}

/// A watch that goes on.
struct Watching {
    asks: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
    prefix: Vec<u8>,
    members: Arc<Members>,
    stop: CancellationToken,
}

impl Watching {
    /// The next changes; `None` where it cannot go on.
    async fn next(&mut self) -> Option<Vec<RecordChange>> {
        let mut waiting_for_word = false;
        loop {
            let heard = tokio::select! {
                () = self.stop.cancelled() => return None,
                heard = tokio::time::timeout(ASK, self.answers.message()) => heard,
            };
            let answer = match heard {
                Ok(Ok(Some(answer))) => answer,
                Ok(Ok(None)) => return self.ends("etcd ended the watch"),
                Ok(Err(status)) => return self.ends(status.message()),
                Err(_) if waiting_for_word => {
                    return self.ends("etcd does not say that it goes on");
                }
                Err(_) => {
                    waiting_for_word = true;
                    let ask = WatchRequest {
                        ask: Some(WatchAsk::Progress(Empty {})),
                    };
                    if self.asks.try_send(ask).is_err() {
                        return self.ends("etcd takes no questions");
                    }
                    continue;
                }
            };
            waiting_for_word = false;
            if answer.canceled || answer.compact_revision != 0 {
                return self.ends(&answer.cancel_reason);
            }
            let changes = answer
                .events
                .into_iter()
                .filter_map(|event| change(&self.prefix, event).transpose())
                .collect::<Result<Vec<_>>>();
            match changes {
                // A word that it goes on.
                Ok(changes) if changes.is_empty() => {}
                Ok(changes) => return Some(changes),
                Err(error) => {
                    tracing::error!(%error, "a change of the fleet's records cannot be read");
                    return None;
                }
            }
        }
    }

    fn ends(&self, why: &str) -> Option<Vec<RecordChange>> {
        tracing::warn!(why, "the watch of the fleet's records ended");
        self.members.broke();
        None
    }
}
