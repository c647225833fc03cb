//! Where hosts come in: their links, their queues of commands, and what they say of themselves.
//!
//! ```text
//! listener ──stream of a host's link──> Desk::serve ─> admission ─> Session ──hello … goodbye
//!                                          │                           │
//!                  Links (one a host) <────┘        HostWriter, Keeper ┴──> Fleet ─> FleetStore
//! ```
//!
//! - One link a host: the newest one counts, on whichever replica ([`Ownership`]).
//! - An identity that is used by two machines is noticed and locked: where an agent that was
//!   replaced by another start of the agent comes back, both of them run.
//! - Writes are gathered ([`writer`]), so that all hosts can come at once.

mod commands;
mod keeper;
mod links;
mod messages;
mod replica;
mod session;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::fleet::FleetFacts;
use ghost_domain::{Error, ErrorCode, HostId, Result, TenantName, Timestamp};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

pub use commands::{CommandRequest, Commands};
pub use links::{LinkInfo, LinkTransport};
pub use messages::{
    ControlReader, ControlWriter, FromHost, Goodbye, HostHeartbeat, HostHello, HostLinkFacts,
    ToHost, Welcome,
};
pub use replica::{MISSED_FOR, OtherReplicas};
pub use session::Digest;

use self::keeper::Keeper;
use self::links::{Link, Links};
use self::session::{End, Session};
use self::writer::HostWriter;
use crate::application::direct::{DirectInfo, Directs};
use crate::application::fleet::Fleet;
use crate::application::links::{ByteStream, HostLinks};
use crate::domain::{CertificateUse, HostLife, HostRecord, Ownership, Record, RecordKey, Replica};

/// A side that hears nothing for so many pings gives the link up.
const MISSED_PINGS: u32 = 3;
/// How long a host may take to say hello.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// How long a stream to a host may take to be opened.
const OPEN_TIME: Duration = Duration::from_secs(10);
/// How far the clocks of a host and of Core may be apart where a link ends with its certificate.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// Starts of an agent that are remembered of each host.
const KNOWN_INSTANCES: usize = 4;

/// What the composition root decides.
#[derive(Clone, Debug)]
pub struct DeskOptions {
    /// This replica.
    pub replica: Replica,
    /// Core's version.
    pub version: String,
    /// The oldest and newest versions of the control stream.
    pub protocol: (u32, u32),
    /// How often hosts report.
    pub heartbeat_interval: Duration,
    /// How often each side sends a ping.
    pub ping_interval: Duration,
    /// The digest over a host's VMs.
    pub digest: Digest,
}

/// Whom a link's certificate named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPeer {
    /// The tenant.
    pub tenant: TenantName,
    /// The host.
    pub host: HostId,
    /// The certificate's generation.
    pub generation: u64,
    /// SHA-256 of its public key.
    pub key_hash: [u8; 32],
    /// When the certificate ends.
    pub expires_at: Timestamp,
}

/// What the desk has counted since it began.
#[derive(Debug, Default)]
pub struct Counters {
    heartbeats: AtomicU64,
    links: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    fn heartbeat(&self) {
        self.heartbeats.fetch_add(1, Ordering::Relaxed);
    }

    /// Heartbeats that came.
    pub fn heartbeats(&self) -> u64 {
        self.heartbeats.load(Ordering::Relaxed)
    }

    /// Links that came to be.
    pub fn links(&self) -> u64 {
        self.links.load(Ordering::Relaxed)
    }

    /// Links that were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// The links of this replica, and the queues of commands.
pub struct Desk {
    fleet: Arc<Fleet>,
    options: DeskOptions,
    links: Links,
    writer: HostWriter,
    commands: Commands,
    keeper: Keeper,
    counters: Counters,
    instances: Mutex<HashMap<HostId, Vec<String>>>,
    /// Ways to hosts beside their links, where Core's owner wants them.
    directs: OnceLock<Arc<Directs>>,
    /// Set once no link is taken any more: what those that come are told.
    closing: Mutex<Option<Goodbye>>,
    /// Whether this replica has no lease in the store, so that no host can be its own.
    leaseless: AtomicBool,
    stop: CancellationToken,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk")
            .field("replica", &self.options.replica.name)
            .field("links", &self.links.len())
            .finish_non_exhaustive()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Desk {
    /// Makes this replica known and begins to look after the queues.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn start(fleet: Arc<Fleet>, options: DeskOptions) -> Result<Arc<Self>> {
        fleet.set_intervals(options.ping_interval, options.heartbeat_interval);
        replica::announce(&fleet, &options.replica).await?;
        let writer = HostWriter::start(Arc::clone(&fleet));
        let stop = CancellationToken::new();
        let desk = Arc::new(Self {
            commands: Commands::new(Arc::clone(&fleet), writer.clone()),
            fleet,
            options,
            links: Links::default(),
            writer,
            keeper: Keeper::default(),
            counters: Counters::default(),
            instances: Mutex::default(),
            directs: OnceLock::new(),
            closing: Mutex::new(None),
            leaseless: AtomicBool::new(false),
            stop: stop.clone(),
        });
        keeper::start(&desk, stop);
        Ok(desk)
    }

    /// The queues of commands.
    pub const fn commands(&self) -> &Commands {
        &self.commands
    }

    /// What was counted.
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many links there are.
    pub fn link_count(&self) -> usize {
        self.links.len()
    }

    /// Lets calls go to hosts directly where that is possible. To be called once, before the first
    /// host comes.
    pub fn use_directs(&self, directs: Arc<Directs>) {
        if self.directs.set(directs).is_err() {
            tracing::error!("direct ways were set up already");
        }
    }

    /// What is known of a host's link, where it is here.
    pub fn link_info(&self, host: HostId) -> Option<LinkInfo> {
        let mut info = self.links.get(host)?.info();
        info.direct = match self.directs.get() {
            Some(directs) => directs.info(host),
            None => DirectInfo {
                used: None,
                problem: "Core dials no hosts (direct.enabled there)".into(),
            },
        };
        Some(info)
    }

    /// Speaks with a host on the control stream of its link, until the link ends.
    pub async fn serve<R: ControlReader, W: ControlWriter>(
        self: &Arc<Self>,
        peer: HostPeer,
        transport: Arc<dyn LinkTransport>,
        mut reader: R,
        mut writer: W,
    ) {
        let host = peer.host;
        let begun = self.begin(&peer, &transport, &mut reader).await;
        let (link, welcome) = match begun {
            Ok(begun) => begun,
            Err(goodbye) => {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                tracing::info!(%host, code = goodbye.code, message = goodbye.message, "a link was refused");
                if writer.queue(ToHost::Goodbye(goodbye)).is_ok() {
                    let _ = tokio::time::timeout(HELLO_TIME, writer.flush()).await;
                }
                transport.close("the host was refused");
                return;
            }
        };
        let live = self.fleet.live(host);
        let clock = self.fleet.clock();
        live.set_linked(true);
        live.heard(clock.monotonic(), clock.now());
        self.counters.links.fetch_add(1, Ordering::Relaxed);
        if let Some(directs) = self.directs.get() {
            directs.linked(&peer.tenant, host, link.info().direct_addresses);
        }
        tracing::info!(%host, carrier = link.info().carrier, "a host is linked");
        let end = match writer.queue(ToHost::Welcome(welcome)) {
            Ok(()) => {
                let session = Session::new(
                    Arc::clone(self),
                    Arc::clone(&link),
                    live,
                    peer.tenant,
                    reader,
                    writer,
                );
                // Its parts are as large as a heartbeat; idle, it should take no more than it needs.
                Box::pin(session.run()).await
            }
            Err(error) => End::Broken(error),
        };
        link.left();
        transport.close(&end.to_string());
        tracing::info!(%host, reason = %end, "a link ended");
        self.ended(&link).await;
    }

    /// From the hello to the records: whether the host comes in.
    async fn begin<R: ControlReader>(
        &self,
        peer: &HostPeer,
        transport: &Arc<dyn LinkTransport>,
        reader: &mut R,
    ) -> Result<(Arc<Link>, Welcome), Goodbye> {
        let refused = |message: String| Goodbye::new("protocol_error", message);
        let hello = match tokio::time::timeout(HELLO_TIME, reader.next()).await {
            Err(_) => return Err(refused("no hello came".into())),
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Ok(Ok(Some(FromHost::Hello(hello)))) => hello,
            Ok(Ok(_)) => return Err(refused("a link begins with a hello".into())),
        };
        if let Some(goodbye) = self.closing.lock().clone() {
            return Err(goodbye);
        }
        if self.leaseless.load(Ordering::SeqCst) {
            return Err(replica::leaseless(jittered(Duration::from_secs(2))));
        }
        let (oldest, newest) = self.options.protocol;
        if hello.protocol_version < oldest {
            return Err(Goodbye::new(
                "unsupported_version",
                format!(
                    "this Core speaks versions {oldest} to {newest} of the control stream, the host {}",
                    hello.protocol_version
                ),
            )
            .retry_after(Duration::from_secs(300)));
        }
        // Before anything is replaced or written.
        let admitted = self
            .fleet
            .read(|state| admission(state.host(peer.host).map(AsRef::as_ref), peer, &hello));
        match admitted {
            Ok(_) => {}
            Err(Refusal::Known(goodbye)) => return Err(goodbye),
            Err(Refusal::Cloned(reason)) => {
                self.lock(peer.host, &reason).await;
                return Err(Goodbye::new("cloned_identity", reason));
            }
        }
        if self.was_cloned(peer.host, &hello.instance) {
            let reason = "two machines use this host's identity at the same time";
            self.lock(peer.host, reason).await;
            return Err(Goodbye::new("cloned_identity", reason));
        }
        let link = Arc::new(Link::new(
            peer.host,
            Arc::clone(transport),
            (hello.instance.clone(), peer.expires_at),
            LinkInfo {
                carrier: hello.carrier.clone(),
                direct_addresses: hello.direct_addresses.clone(),
                facts: HostLinkFacts::default(),
                direct: DirectInfo::default(),
            },
        ));
        self.links.enter(&link, hello.follows).await;
        if let Err(goodbye) = self.attach(peer, &hello, &link).await {
            link.left();
            self.links.leave(&link);
            return Err(goodbye);
        }
        let (core_id, epoch) = self
            .fleet
            .read(|state| (state.core_id().to_owned(), state.link_epoch(peer.host)));
        let welcome = Welcome {
            protocol_version: hello.protocol_version.min(newest),
            core_version: self.options.version.clone(),
            core_id,
            replica: self.options.replica.name.clone(),
            epoch,
            heartbeat_interval: self.options.heartbeat_interval,
            ping_interval: self.options.ping_interval,
        };
        Ok((link, welcome))
    }

    /// Records whose link the host has, and what it said in its hello.
    async fn attach(&self, peer: &HostPeer, hello: &HostHello, link: &Link) -> Result<(), Goodbye> {
        let now = self.fleet.clock().now();
        let ownership = Ownership {
            host: peer.host,
            replica: self.options.replica.name.clone(),
            link: link.number,
            since: now,
        };
        let (peer, hello) = (peer.clone(), hello.clone());
        let attached = self
            .writer
            .change(peer.host, move |state, draft| {
                let record = state.host(peer.host);
                let used = match admission(record.map(AsRef::as_ref), &peer, &hello) {
                    Ok(used) => used,
                    Err(Refusal::Known(goodbye)) => return Ok(Err(goodbye)),
                    // The next attempt locks it.
                    Err(Refusal::Cloned(why)) => {
                        return Ok(Err(Goodbye::new("replaced", why)));
                    }
                };
                if let Some(record) = record {
                    let mut record = HostRecord::clone(record);
                    match used {
                        // From now on the one before is a copy's.
                        CertificateUse::Newest => record.previous_key_hash = None,
                        CertificateUse::Forgotten => {
                            record.certificate_generation = peer.generation;
                            record.key_hash = peer.key_hash;
                            record.previous_key_hash = None;
                        }
                        CertificateUse::AnswerLost | CertificateUse::Cloned(_) => {}
                    }
                    // Core's records may have gone back behind what the host has taken. What a host
                    // makes up here can use up nothing but its own numbers.
                    let taken = hello.command_generation.min(u64::MAX / 2);
                    draft.put_host(HostRecord {
                        agent_version: hello.agent_version.clone(),
                        permissions: hello.permissions,
                        facts: hello.facts.clone(),
                        machine: record.machine.or(hello.machine),
                        last_heard_at: Some(now),
                        command_generation: record.command_generation.max(taken),
                        ..record
                    });
                }
                draft.put(
                    RecordKey::Owner(peer.host),
                    Record::Owner(ownership.clone()),
                );
                Ok(Ok(()))
            })
            .await;
        attached.unwrap_or_else(|error| {
            tracing::warn!(host = %link.host, %error, "a link cannot be recorded");
            Err(
                Goodbye::new("shutting_down", "Core cannot keep records at the moment")
                    .retry_after(jittered(Duration::from_secs(4))),
            )
        })
    }

    /// The end of a link in memory and in the records, as far as no newer one took its place.
    async fn ended(&self, link: &Link) {
        let host = link.host;
        let live = self.fleet.live(host);
        if self.links.leave(link) {
            live.set_linked(false);
            if let Some(directs) = self.directs.get() {
                directs.left(host);
            }
        }
        self.keeper.dirty(host);
        let (number, heard_at) = (link.number, live.heard_at());
        let written = self
            .writer
            .change(host, move |state, draft| {
                if state.owner(host).is_some_and(|owner| owner.link == number) {
                    draft.delete(RecordKey::Owner(host));
                }
                if let Some(record) = state.host(host)
                    && record.last_heard_at < heard_at
                {
                    draft.put_host(HostRecord {
                        last_heard_at: heard_at,
                        ..HostRecord::clone(record)
                    });
                }
                Ok(())
            })
            .await;
        if let Err(error) = written {
            tracing::warn!(%host, %error, "the end of a link cannot be recorded");
        }
    }

    /// Facts that changed within a link.
    fn facts_changed(self: &Arc<Self>, host: HostId, facts: FleetFacts) {
        let known = self
            .fleet
            .read(|state| state.host(host).is_some_and(|record| record.facts == facts));
        if known {
            return;
        }
        let desk = Arc::clone(self);
        tokio::spawn(async move {
            let written = desk
                .writer
                .change(host, move |state, draft| {
                    if let Some(record) = state.host(host) {
                        draft.put_host(HostRecord {
                            facts: facts.clone(),
                            ..HostRecord::clone(record)
                        });
                    }
                    Ok(())
                })
                .await;
            if let Err(error) = written {
                tracing::warn!(%host, %error, "a host's facts cannot be stored");
            }
        });
    }

    /// Whether an agent comes back that another start of the agent had replaced: then both run. A
    /// restart is a new start, and one that only lost its connection is still the newest.
    fn was_cloned(&self, host: HostId, instance: &str) -> bool {
        let mut all = self.instances.lock();
        let known = all.entry(host).or_default();
        match known.iter().position(|one| one == instance) {
            Some(at) => at + 1 != known.len(),
            None => {
                if known.len() >= KNOWN_INSTANCES {
                    known.remove(0);
                }
                known.push(instance.to_owned());
                false
            }
        }
    }

    async fn lock(&self, host: HostId, reason: &str) {
        tracing::warn!(%host, reason, "a host is locked");
        // After its owner decided, both machines are strangers again.
        self.instances.lock().remove(&host);
        let (now, reason) = (self.fleet.clock().now(), reason.to_owned());
        let written = self
            .writer
            .change(host, move |state, draft| {
                if let Some(record) = state.host(host)
                    && record.life == HostLife::Active
                {
                    draft.put_host(HostRecord {
                        life: HostLife::Locked {
                            since: now,
                            reason: reason.clone(),
                        },
                        ..HostRecord::clone(record)
                    });
                }
                Ok(())
            })
            .await;
        if let Err(error) = written {
            tracing::error!(%host, %error, "a host that should be locked cannot be");
        }
    }

    /// Takes no more links, and says goodbye to all there are. Hosts come back spread over `spread`.
    pub async fn drain(&self, code: &'static str, message: &str, spread: Duration) {
        *self.closing.lock() =
            Some(Goodbye::new(code, message).retry_after(jittered(Duration::from_secs(2))));
        let links = self.links.all();
        for link in &links {
            let goodbye = Goodbye::new(code, message)
                .retry_after(spread.mul_f64(rand::random_range(0.05..=1.0)));
            link.cut.tell(goodbye);
        }
        self.gone(links, message).await;
        self.keeper.keep(&self.fleet).await;
    }

    /// Waits until links that were told to go have gone, and ends those that do not.
    async fn gone(&self, links: Vec<Arc<Link>>, message: &str) {
        let left = async {
            for link in &links {
                link.has_left(Duration::from_secs(5)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(5), left).await;
        for link in links {
            link.transport.close(message);
        }
    }
}

fn jittered(length: Duration) -> Duration {
    length.mul_f64(rand::random_range(0.5..=1.5))
}

/// Why a host does not come in.
enum Refusal {
    /// For what the record says.
    Known(Goodbye),
    /// Another machine has a copy of its identity; why. Its record is to be locked.
    Cloned(String),
}

/// Whether a host's certificate lets it in, by its record; what it is to the record.
fn admission(
    record: Option<&HostRecord>,
    peer: &HostPeer,
    hello: &HostHello,
) -> Result<CertificateUse, Refusal> {
    let refused = |code, message: &str| Err(Refusal::Known(Goodbye::new(code, message)));
    let record = match record {
        Some(record) if record.tenant == peer.tenant => record,
        _ => return refused("unknown_host", "this Core does not know this host"),
    };
    match &record.life {
        HostLife::Active => {}
        HostLife::Revoked { .. } => return refused("revoked", "this host was revoked"),
        HostLife::Locked { reason, .. } => return refused("cloned_identity", reason),
    }
    match record.certificate_use(peer.generation, &peer.key_hash) {
        CertificateUse::Cloned(reason) => Err(Refusal::Cloned(reason)),
        // A machine that does not say which it is was let in before it could, or has no id.
        _ if record
            .machine
            .zip(hello.machine)
            .is_some_and(|(known, now)| known != now) =>
        {
            Err(Refusal::Cloned(
                "its files are used on another machine than the one that it came from".into(),
            ))
        }
        other => Ok(other),
    }
}

#[async_trait]
impl HostLinks for Desk {
    async fn open(&self, host: HostId) -> Result<Box<dyn ByteStream>> {
        let Some(link) = self.links.get(host) else {
            return Err(self.offline(host));
        };
        if let Some(directs) = self.directs.get()
            && let Some(stream) = directs.open(host).await
        {
            return Ok(stream);
        }
        match tokio::time::timeout(OPEN_TIME, link.transport.open()).await {
            Ok(opened) => opened,
            Err(_) => Err(self
                .offline(host)
                .because("its link takes no new stream within 10 s")),
        }
    }

    async fn way(&self, host: HostId) -> u64 {
        if let Some(directs) = self.directs.get()
            && let Some(number) = directs.number(host).await
        {
            return number;
        }
        self.links.get(host).map_or(0, |link| link.number)
    }

    fn has(&self, host: HostId) -> bool {
        self.links.get(host).is_some()
    }

    fn round_trip(&self, host: HostId) -> Option<Duration> {
        self.fleet.host_view(host)?.round_trip
    }

    fn cut(&self, host: HostId, code: &'static str, message: &str) {
        if let Some(link) = self.links.get(host) {
            link.cut.tell(Goodbye::new(code, message));
        }
    }
}

impl Desk {
    fn offline(&self, host: HostId) -> Error {
        let view = self.fleet.host_view(host);
        let name = view
            .as_ref()
            .map_or_else(|| host.to_string(), |view| view.record.name.to_string());
        let now = self.fleet.clock().now();
        let since = match view.and_then(|view| view.last_heard_at) {
            Some(at) => format!("it was last heard {} s ago", now.since(at).as_secs()),
            None => "it has never come".into(),
        };
        Error::new(
            ErrorCode::HostOffline,
            format!("the host {name} is offline"),
        )
        .because(since)
        .hint("it comes back by itself; a change of a VM's power can wait for it: --queue")
        .retry_after(Duration::from_secs(5))
    }
}
