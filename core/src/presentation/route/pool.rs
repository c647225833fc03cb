//! HTTP/2 connections to hosts: one for each host that calls run to, more only where one is full,
//! none to a host that nobody has called for a minute.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::http::{Request, Response};
use ghost_domain::{Error, ErrorCode, Result};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::body::Body;

use super::relay::{broken_off, causes};
use super::{Onward, ReplicaLinks, Target};
use crate::application::links::{ByteStream, HostLinks};
use crate::domain::Replica;

/// Most calls on one connection to another replica, which takes 256.
const MOST_REPLICA_CALLS: usize = 200;
/// Most connections to one replica.
const MOST_REPLICA_CONNECTIONS: usize = 16;
/// How often a connection to a replica is tried while calls run on it, and how long that may take.
const REPLICA_KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How the connections are.
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    /// A connection without calls is dropped after this.
    pub idle: Duration,
    /// Most bytes of one call that Core takes ahead of its caller.
    pub stream_window: u32,
    /// Most bytes of all calls of one connection together: so many that readers who stand still
    /// leave room for the others.
    pub connection_window: u32,
    /// Most calls on one connection: below the number that an agent takes, because one more would
    /// wait without a word until another ends.
    pub most_calls: usize,
    /// Most connections to one host.
    pub most_connections: usize,
    /// How long opening one may take.
    pub opening: Duration,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(60),
            stream_window: 256 * 1024,
            connection_window: 32 * 1024 * 1024,
            most_calls: 100,
            most_connections: 4,
            opening: Duration::from_secs(10),
        }
    }
}

/// All connections.
pub(super) struct Pool {
    hosts: Arc<dyn HostLinks>,
    replicas: Option<Arc<dyn ReplicaLinks>>,
    options: PoolOptions,
    slots: Mutex<HashMap<Target, Arc<Slot>>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("options", &self.options)
            .field("targets", &self.slots.lock().len())
            .finish_non_exhaustive()
    }
}

/// The connections to one target.
#[derive(Default)]
struct Slot {
    /// One opens, the others wait for it.
    opening: tokio::sync::Mutex<()>,
    connections: Mutex<Vec<Arc<Connection>>>,
}

struct Connection {
    sender: SendRequest<Body>,
    /// The way to the host that it was opened on; see [`HostLinks::way`].
    way: u64,
    calls: AtomicUsize,
    idle_since: Mutex<Instant>,
}

/// A call's place on a connection.
pub(super) struct Lease(Arc<Connection>);

impl Lease {
    /// The connection, for calls that the lease is held for.
    pub(super) fn sender(&self) -> SendRequest<Body> {
        self.0.sender.clone()
    }

    /// Whether a call failed because its connection is gone.
    pub(super) fn is_lost(&self, error: &hyper::Error) -> bool {
        // A keep-alive that nobody answered is a timeout.
        if self.0.sender.is_closed()
            || error.is_closed()
            || error.is_canceled()
            || error.is_timeout()
        {
            return true;
        }
        let mut source = std::error::Error::source(error);
        while let Some(one) = source {
            if let Some(error) = one.downcast_ref::<h2::Error>() {
                return error.is_io() || error.is_go_away();
            }
            if one.is::<std::io::Error>() {
                return true;
            }
            source = one.source();
        }
        false
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        *self.0.idle_since.lock() = Instant::now();
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Slot {
    /// A place on a connection that has one. Connections over another way than the present one end
    /// with the calls that they have.
    fn pick(&self, way: u64, most_calls: usize) -> Option<Lease> {
        let mut connections = self.connections.lock();
        connections.retain(|one| {
            let used = one.way == way || one.calls.load(Ordering::Acquire) > 0;
            used && !one.sender.is_closed()
        });
        let free = connections
            .iter()
            .find(|one| one.way == way && one.calls.load(Ordering::Acquire) < most_calls)?;
        free.calls.fetch_add(1, Ordering::AcqRel);
        Some(Lease(Arc::clone(free)))
    }
}

impl Pool {
    pub(super) fn start(
        hosts: Arc<dyn HostLinks>,
        replicas: Option<Arc<dyn ReplicaLinks>>,
        options: PoolOptions,
    ) -> Arc<Self> {
        let pool = Arc::new(Self {
            hosts,
            replicas,
            options,
            slots: Mutex::default(),
        });
        // One timer for all: a task for each of ten thousand hosts would cost more than it saves.
        tokio::spawn(sweep(Arc::downgrade(&pool), options.idle));
        pool
    }

    /// The links that this replica has.
    pub(super) fn hosts(&self) -> &Arc<dyn HostLinks> {
        &self.hosts
    }

    pub(super) fn connections(&self) -> usize {
        let slots: Vec<_> = self.slots.lock().values().cloned().collect();
        slots
            .iter()
            .map(|slot| {
                let mut connections = slot.connections.lock();
                connections.retain(|one| !one.sender.is_closed());
                connections.len()
            })
            .sum()
    }

    /// Sends a call and waits for the head of its answer. `again` makes it anew, where it may be
    /// sent twice: once, over another way than the one that died.
    pub(super) async fn send(
        &self,
        onward: &Onward<'_>,
        mut request: Request<Body>,
        mut again: Option<&(dyn Fn() -> Request<Body> + Send + Sync)>,
    ) -> Result<(Response<Incoming>, Lease)> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let lease = self.lease(&onward.target, onward.host_name).await?;
            let mut sender = lease.0.sender.clone();
            onward.sent.store(true, Ordering::Relaxed);
            let mut failed = match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, lease)),
                Err(failed) => failed,
            };
            match failed.take_message() {
                // It ended between the look and the call, and nothing was sent.
                Some(unsent) if attempts < 3 => {
                    onward.sent.store(false, Ordering::Relaxed);
                    request = unsent;
                }
                _ => {
                    let error = failed.into_error();
                    let lost = lease.is_lost(&error);
                    if lost
                        && let Target::Host(host) = onward.target
                        && let Some(make) = again.take()
                        && self.hosts.has(host)
                        && self.hosts.way(host).await != lease.0.way
                    {
                        tracing::debug!(%host, error = causes(&error), "a call takes another way");
                        request = make();
                        attempts = 0;
                        continue;
                    }
                    return Err(broken_off(onward.host_name, lost, causes(&error)));
                }
            }
        }
    }

    /// A place for a call to a target, for the host of this name.
    pub(super) async fn lease(&self, target: &Target, host_name: &str) -> Result<Lease> {
        let slot = {
            let mut slots = self.slots.lock();
            Arc::clone(slots.entry(target.clone()).or_default())
        };
        let way = match target {
            Target::Host(host) => self.hosts.way(*host).await,
            Target::Replica { .. } => 0,
        };
        let (most_calls, most_connections) = match target {
            Target::Host(_) => (self.options.most_calls, self.options.most_connections),
            // The calls of many hosts share them.
            Target::Replica { .. } => (MOST_REPLICA_CALLS, MOST_REPLICA_CONNECTIONS),
        };
        if let Some(lease) = slot.pick(way, most_calls) {
            return Ok(lease);
        }
        let _opening = slot.opening.lock().await;
        // Another call may have opened one meanwhile.
        if let Some(lease) = slot.pick(way, most_calls) {
            return Ok(lease);
        }
        let open = |one: &&Arc<Connection>| one.way == way;
        if slot.connections.lock().iter().filter(open).count() >= most_connections {
            return Err(Error::new(
                ErrorCode::TooManyRequests,
                format!("too many calls to the host {host_name} at once"),
            )
            .because(format!("{} run", most_calls * most_connections))
            .hint("try again in a moment")
            .retry_after(Duration::from_secs(1)));
        }
        let opened = tokio::time::timeout(self.options.opening, self.open(target, host_name));
        let sender = opened.await.map_err(|_| {
            Error::new(
                ErrorCode::HostOffline,
                format!("the host {host_name} does not answer"),
            )
            .because("its link takes no new streams")
            .retry_after(Duration::from_secs(5))
        })??;
        let connection = Arc::new(Connection {
            sender,
            way,
            calls: AtomicUsize::new(1),
            idle_since: Mutex::new(Instant::now()),
        });
        slot.connections.lock().push(Arc::clone(&connection));
        Ok(Lease(connection))
    }

    async fn open(&self, target: &Target, host_name: &str) -> Result<SendRequest<Body>> {
        // A link tells by itself when it is dead; a replica whose machine is gone says nothing.
        let keep_alive = match target {
            Target::Host(_) => None,
            Target::Replica { .. } => Some(REPLICA_KEEP_ALIVE),
        };
        let stream: Box<dyn ByteStream> = match target {
            Target::Host(host) => self.hosts.open(*host).await?,
            Target::Replica { name, address } => {
                let replicas = self.replicas.as_ref().ok_or_else(|| {
                    Error::new(
                        ErrorCode::HostOffline,
                        format!("the host {host_name} is linked to another replica"),
                    )
                    .because(format!("this one has no way to {name}"))
                })?;
                let replica = Replica {
                    name: name.clone(),
                    address: address.clone(),
                    since: ghost_domain::Timestamp::default(),
                };
                replicas.open(&replica).await?
            }
        };
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(self.options.stream_window)
            .initial_connection_window_size(self.options.connection_window)
            // What is written to a slow host waits here, beside the window that the host gives.
            .max_send_buf_size(64 * 1024)
            .keep_alive_interval(keep_alive)
            .keep_alive_timeout(REPLICA_KEEP_ALIVE)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken_off(host_name, true, causes(&error)))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = causes(&error), "a connection to a host ended");
            }
        });
        Ok(sender)
    }

    /// Drops what nobody used for a while, and what is broken.
    fn drop_idle(&self) {
        let now = Instant::now();
        self.slots.lock().retain(|_, slot| {
            let mut connections = slot.connections.lock();
            connections.retain(|one| {
                let unused = one.calls.load(Ordering::Acquire) == 0
                    && now.duration_since(*one.idle_since.lock()) >= self.options.idle;
                !unused && !one.sender.is_closed()
            });
            // Somebody who is about to open one holds the slot too.
            !connections.is_empty() || Arc::strong_count(slot) > 1
        });
    }
}

/// Looks for idle connections until the pool is gone.
async fn sweep(pool: Weak<Pool>, idle: Duration) {
    let every = (idle / 4).max(Duration::from_millis(10));
    loop {
        tokio::time::sleep(every).await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        pool.drop_idle();
    }
}
