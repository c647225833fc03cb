//! The link of this host to Ghost Core: one connection that the host opens, over which Core sees and
//! reaches it, behind whatever NAT.
//!
//! [`enrol`] makes this host one of a fleet. From then on [`CoreLinkService::run`] keeps a link up:
//! it dials ([`tls`] says whom it trusts), greets ([`control`]), tells how the host fares
//! ([`heartbeat`]), hands commands to the application ([`convert`] reads them), and gives out the
//! streams that Core opens ([`CoreLinkService::incoming`]). Certificates renew themselves
//! ([`enrol`]), and where they ended while the host was away the old key gets a new one.
//!
//! What holds here:
//! - Core is hostile too: what it sends is bounded and of a closed set, and it cannot make this host
//!   wait for longer than ten minutes or hurry more often than once a second;
//! - a link counts as up only while something comes from Core: after one and a half intervals of
//!   its pings of silence it is shown as silent, after three it is given up;
//! - whatever the link does, the host's own ways in work on.

mod control;
pub mod convert;
pub mod direct;
mod enrol;
mod heartbeat;
mod identity;
mod inbound;
pub mod piko;
#[doc(hidden)]
pub mod reading;
mod signals;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tls;
mod token;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::fleet::{CarrierState, CorePermissions, FleetIdentity, LinkState};
use ghost_domain::ports::{Clock, CoreLink, CoreLinkHandler};
use ghost_domain::{Error, ErrorCode, HostId, Result};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use enrol::{EnrolOptions, enrol};
pub use ghost_proto::core::DIRECT_PROTOCOL;
pub use tls::core_uri;

use crate::tunnel::{Backoff, BackoffOptions, Dialled, Limits, Side, Tunnel, TunnelStream, begin};
use control::{Context, End, Redial, Redialled, Shown};
use direct::DirectOptions;
use enrol::{MACHINE_ID, blocking, machine_hash, recover, renew, renew_at};
use identity::{Enrolled, IdentityFolder};
use inbound::Inbound;
use piko::{PikoService, PikoState};
use signals::Signal;
use tls::{Setup, Trust};

/// A link that was up for so long was a good one: the next try begins with the shortest wait.
const GOOD: Duration = Duration::from_secs(60);
/// Least time between two tries that something hurries.
const HURRY: Duration = Duration::from_secs(1);
/// The carrier's name.
const LINK: &str = "link";
/// Streams of Core's that nobody has taken yet.
const STREAMS_WAITING: usize = 256;

/// What the link needs.
#[derive(Clone, Debug)]
pub struct CoreLinkOptions {
    /// The agent's `agent.data_dir`; the identity lies in `core/` of it.
    pub data_dir: PathBuf,
    /// The agent's release.
    pub agent_version: String,
    /// By which addresses Core may dial this host itself.
    pub direct: DirectOptions,
}

/// How long things take; tests shorten them.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Waits between tries.
    backoff: BackoffOptions,
    /// Until a host that Core refused asks again.
    refused: Duration,
    /// How often a host that has not joined looks whether it has.
    look_for_identity: Duration,
    /// How often it is looked whether a certificate is due. Often, and by the wall clock: a timer
    /// does not run while the host sleeps.
    look_for_renewal: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            backoff: BackoffOptions::default(),
            refused: Duration::from_secs(600),
            look_for_identity: Duration::from_secs(5),
            look_for_renewal: Duration::from_secs(20),
        }
    }
}

/// Keeps the link to Core.
pub struct CoreLinkService {
    options: CoreLinkOptions,
    pace: Pace,
    folder: IdentityFolder,
    handler: Arc<dyn CoreLinkHandler>,
    clock: Arc<dyn Clock>,
    shown: Arc<Shown>,
    identity: Arc<Mutex<Option<Arc<Enrolled>>>>,
    /// The number of the newest certificate; a link that was made with an older one gets a successor.
    newest: watch::Sender<u64>,
    /// One request for a certificate at a time.
    requests: tokio::sync::Mutex<()>,
    instance: String,
    signals: mpsc::Sender<Signal>,
    signalled: Mutex<Option<mpsc::Receiver<Signal>>>,
    streams: mpsc::Sender<TunnelStream>,
    incoming: Mutex<Option<mpsc::Receiver<TunnelStream>>>,
    inbound: Inbound,
    piko: OnceLock<Arc<PikoService>>,
    standing: Mutex<Standing>,
}

/// How long what was built on an identity may stand.
struct Standing {
    host: Option<HostId>,
    /// Cancelled when this host is another one, or none any more, or the agent stops.
    token: CancellationToken,
}

impl CoreLinkService {
    /// Reads this host's identity; nothing is dialled before [`Self::run`]. Reads files: call it
    /// where blocking is allowed.
    ///
    /// # Errors
    /// `IoFailed` where there is an identity that cannot be used.
    pub fn open(
        options: CoreLinkOptions,
        handler: Arc<dyn CoreLinkHandler>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let folder = IdentityFolder::new(&options.data_dir);
        let identity = folder.load()?.map(Arc::new);
        let (signals, signalled) = mpsc::channel(8);
        let (streams, incoming) = mpsc::channel(STREAMS_WAITING);
        let standing = Standing {
            host: identity.as_ref().map(|one| one.identity.host),
            token: CancellationToken::new(),
        };
        Ok(Self {
            options,
            pace: Pace::default(),
            folder,
            shown: Arc::new(Shown::new(Arc::clone(&handler))),
            handler,
            clock,
            newest: watch::Sender::new(0),
            identity: Arc::new(Mutex::new(identity)),
            requests: tokio::sync::Mutex::new(()),
            instance: uuid::Uuid::new_v4().to_string(),
            signals,
            signalled: Mutex::new(Some(signalled)),
            streams,
            incoming: Mutex::new(Some(incoming)),
            inbound: Inbound::default(),
            piko: OnceLock::new(),
            standing: Mutex::new(standing),
        })
    }

    /// The streams that Core opens, of all links one after the other. HTTP/2 is spoken on some,
    /// HTTP/1.1 on others; the first bytes tell. `None` where they were given out already.
    pub fn incoming(&self) -> Option<mpsc::Receiver<TunnelStream>> {
        self.incoming.lock().take()
    }

    /// Shows this connection to Piko among the ways to this host. To be called once.
    pub fn show_piko(&self, piko: Arc<PikoService>) {
        if self.piko.set(piko).is_err() {
            tracing::error!("a connection to Piko is shown already");
        }
    }

    /// Keeps the link up until `stop`. A host that has not joined a fleet waits until it does. To be
    /// called once.
    pub async fn run(&self, stop: CancellationToken) {
        // Ends the watchers with this call, also where it is dropped.
        let watching = stop.child_token();
        let _ended = watching.clone().drop_guard();
        tokio::spawn(signals::watch_sleep(self.signals.clone(), watching.clone()));
        tokio::spawn(signals::watch_network(self.signals.clone(), watching));
        self.run_unwatched(stop).await;
    }

    /// Like [`Self::run`], but nothing hurries a try when this machine wakes up or its network
    /// changes: for a process that plays many hosts at once.
    pub async fn run_unwatched(&self, stop: CancellationToken) {
        let Some(mut signalled) = self.signalled.lock().take() else {
            tracing::error!("the link to Core runs already");
            return;
        };
        tokio::select! {
            () = self.keep_linked(&mut signalled, &stop) => {}
            () = self.keep_certified(&stop) => {}
        }
        self.standing.lock().token.cancel();
        self.shown.set(LinkState::Off);
    }

    async fn keep_linked(&self, signals: &mut mpsc::Receiver<Signal>, stop: &CancellationToken) {
        let mut backoff = Backoff::new(self.pace.backoff);
        let mut next = Addresses::default();
        let mut connects = 0;
        let mut last_loss = String::new();
        let mut expired = false;
        let mut address = String::new();
        // The connection that follows the link that was, which stays for what it carries.
        let mut followed: Option<Redialled> = None;
        while !stop.is_cancelled() {
            let tried = Instant::now();
            let Some(enrolled) = self.present().await else {
                self.shown.set(LinkState::Off);
                self.pause(self.pace.look_for_identity, signals, stop).await;
                continue;
            };
            // Whose host it is may have changed since it was dialled.
            let following = followed
                .take()
                .filter(|(_, made)| made.identity.host == enrolled.identity.host);
            let follows = following.is_some();
            let dialled = match following {
                Some(redialled) => Ok(redialled),
                None => {
                    self.shown.set(LinkState::Connecting);
                    address = next.take(&enrolled.identity.addresses);
                    let tunnel = LinkTunnel {
                        enrolled: Arc::clone(&enrolled),
                        address: address.clone(),
                    };
                    tokio::select! {
                        dialled = self.certified_dial(&tunnel, expired) => dialled,
                        () = stop.cancelled() => break,
                    }
                }
            };
            expired = false;
            let (end, up) = match dialled {
                Ok((dialled, enrolled)) => {
                    let made = self.context(&enrolled, &address, follows, connects, &last_loss);
                    let context = match made.await {
                        Ok(context) => context,
                        Err(error) => {
                            tracing::error!(%error, "the link cannot begin");
                            let wait = backoff.next(&mut rand::rng());
                            self.wait(wait, error.to_string(), tried, signals, stop)
                                .await;
                            continue;
                        }
                    };
                    connects += 1;
                    let lived = control::live(dialled, &context, signals, stop).await;
                    followed = lived.next;
                    (lived.end, lived.up)
                }
                Err(end) => (end, Duration::ZERO),
            };
            if up >= GOOD {
                backoff.reset();
            }
            if end != End::Followed {
                end.reason().clone_into(&mut last_loss);
            }
            match end {
                End::Stopped => break,
                End::Followed => tracing::info!("a link with the new certificate is made"),
                End::AtOnce(reason) => {
                    tracing::info!(reason, "the link is made anew");
                }
                End::Expired(reason) => {
                    tracing::warn!(reason, "this host's certificate ended");
                    expired = true;
                    let wait = backoff.next(&mut rand::rng());
                    self.wait(wait, reason, tried, signals, stop).await;
                }
                End::Again {
                    reason,
                    after,
                    address,
                } => {
                    next.prefer(address);
                    let wait = backoff.next(&mut rand::rng()).max(after);
                    tracing::warn!(
                        reason,
                        wait_seconds = wait.as_secs_f64(),
                        "there is no link to Core"
                    );
                    self.wait(wait, reason, tried, signals, stop).await;
                }
                End::Refused(reason) => {
                    tracing::error!(reason, "Core refuses this host");
                    self.shown.set(LinkState::Refused { reason });
                    self.pause(self.pace.refused, signals, stop).await;
                }
            }
        }
    }

    /// The identity as it is on disk now, where Core may do anything at all.
    async fn present(&self) -> Option<Arc<Enrolled>> {
        if self.handler.permissions() == CorePermissions::Off {
            return None;
        }
        let folder = self.folder.clone();
        match blocking(move || folder.load()).await {
            Ok(found) => {
                let found = found.map(Arc::new);
                self.identity.lock().clone_from(&found);
                self.stand(found.as_ref().map(|one| one.identity.host));
                found
            }
            Err(error) => {
                tracing::error!(%error, "this host's identity in its fleet cannot be read");
                None
            }
        }
    }

    /// Ends what was built on the identity of another host than this.
    fn stand(&self, host: Option<HostId>) {
        let mut standing = self.standing.lock();
        if standing.host != host {
            standing.token.cancel();
            // Another host's certificates have numbers of their own.
            self.newest.send_replace(0);
            *standing = Standing {
                host,
                token: CancellationToken::new(),
            };
        }
    }

    /// Dials, with a certificate that is valid.
    async fn certified_dial(
        &self,
        tunnel: &LinkTunnel,
        expired: bool,
    ) -> Result<(Dialled, Arc<Enrolled>), End> {
        let mut enrolled = Arc::clone(&tunnel.enrolled);
        if expired || enrolled.identity.expires_at <= self.clock.now() {
            let _one = self.requests.lock().await;
            tracing::info!("asking Core for a new certificate instead of the ended one");
            let recovered = recover(&enrolled, &self.folder).await;
            enrolled = Arc::new(recovered.map_err(|error| match error.code() {
                ErrorCode::CoreUnreachable | ErrorCode::IoFailed | ErrorCode::Internal => {
                    again(&error)
                }
                // Nothing comes of waiting here: whoever reads it has to know what to do.
                _ => End::Refused(match error.hint_text() {
                    Some(hint) => format!("{error}; {hint}"),
                    None => error.to_string(),
                }),
            })?);
            *self.identity.lock() = Some(Arc::clone(&enrolled));
        }
        let tunnel = LinkTunnel {
            enrolled: Arc::clone(&enrolled),
            address: tunnel.address.clone(),
        };
        match tunnel.connect().await {
            Ok(dialled) => Ok((dialled, enrolled)),
            Err(error) => Err(again(&error)),
        }
    }

    async fn context(
        &self,
        enrolled: &Arc<Enrolled>,
        address: &str,
        follows: bool,
        connects: u64,
        last_loss: &str,
    ) -> Result<Context> {
        let (folder, host) = (self.folder.clone(), enrolled.identity.host);
        let (core_id, machine_hash) = blocking(move || {
            Ok((
                folder.core_id()?,
                machine_hash(host.uuid().as_bytes(), Path::new(MACHINE_ID)),
            ))
        })
        .await?;
        let core = enrolled.identity.addresses.first().map(String::as_str);
        Ok(Context {
            handler: Arc::clone(&self.handler),
            clock: Arc::clone(&self.clock),
            shown: Arc::clone(&self.shown),
            carrier: LINK,
            agent_version: self.options.agent_version.clone(),
            instance: self.instance.clone(),
            certificate_generation: enrolled.identity.generation,
            machine_hash,
            folder: self.folder.clone(),
            core_id,
            direct: self
                .options
                .direct
                .addresses(core.unwrap_or_default())
                .await,
            connects,
            last_loss: last_loss.chars().take(200).collect(),
            streams: self.streams.clone(),
            follows,
            expires_at: enrolled.identity.expires_at,
            newest: self.newest.subscribe(),
            named: {
                let (direct, core) = (
                    self.options.direct.clone(),
                    core.unwrap_or_default().to_owned(),
                );
                Arc::new(move || {
                    let (direct, core) = (direct.clone(), core.clone());
                    Box::pin(async move { direct.look(&core).await })
                })
            },
            redial: self.redial(address),
            standing: self.standing.lock().token.clone(),
        })
    }

    /// How a link to this address gets its successor, to the same replica.
    fn redial(&self, address: &str) -> Redial {
        let (identity, address) = (Arc::clone(&self.identity), address.to_owned());
        Arc::new(move || {
            let (enrolled, address) = (identity.lock().clone(), address.clone());
            Box::pin(async move {
                let enrolled = enrolled.ok_or_else(|| {
                    Error::new(ErrorCode::NotEnrolled, "this host left its fleet meanwhile")
                })?;
                let tunnel = LinkTunnel {
                    enrolled: Arc::clone(&enrolled),
                    address,
                };
                Ok((tunnel.connect().await?, enrolled))
            })
        })
    }

    /// Shows that the next try waits, and waits. What hurries the try ends the wait.
    async fn wait(
        &self,
        wait: Duration,
        reason: String,
        tried: Instant,
        signals: &mut mpsc::Receiver<Signal>,
        stop: &CancellationToken,
    ) {
        self.shown.set(LinkState::Waiting {
            reason,
            retry_in: wait,
        });
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => {}
            Some(_) = signals.recv() => tokio::select! {
                // A network that changes all the time does not make a storm of tries.
                () = tokio::time::sleep_until(tried + HURRY) => {}
                () = stop.cancelled() => {}
            },
        }
    }

    /// Waits for a time that only somebody who asks can shorten.
    async fn pause(
        &self,
        wait: Duration,
        signals: &mut mpsc::Receiver<Signal>,
        stop: &CancellationToken,
    ) {
        let asked = async {
            while let Some(signal) = signals.recv().await {
                if signal == Signal::Reconnect {
                    return;
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = asked => {}
            () = stop.cancelled() => {}
        }
    }

    /// Renews certificates in time; where that fails, again and again until it works or the link
    /// itself recovers.
    async fn keep_certified(&self, stop: &CancellationToken) {
        let mut backoff = Backoff::new(BackoffOptions {
            initial: Duration::from_secs(60),
            most: Duration::from_secs(1800),
            multiplier: 2.0,
        });
        let mut due = None;
        loop {
            tokio::select! {
                () = tokio::time::sleep(self.pace.look_for_renewal) => {}
                () = stop.cancelled() => std::future::pending().await,
            }
            let Some(enrolled) = self.identity.lock().clone() else {
                continue;
            };
            let identity = &enrolled.identity;
            let key = (identity.host, identity.generation);
            let at = match due {
                Some((of, at)) if of == key => at,
                _ => renew_at(identity, &mut rand::rng()),
            };
            due = Some((key, at));
            let now = self.clock.now();
            // An ended one is for the link to recover: Core takes it for no request.
            if now < at || now >= identity.expires_at {
                continue;
            }
            let _one = self.requests.lock().await;
            match renew(&enrolled, &self.folder).await {
                Ok(renewed) => {
                    tracing::info!(
                        generation = renewed.identity.generation,
                        "renewed this host's certificate"
                    );
                    let number = renewed.identity.generation;
                    *self.identity.lock() = Some(Arc::new(renewed));
                    self.newest.send_replace(number);
                    backoff.reset();
                }
                Err(error) => {
                    tracing::warn!(%error, "this host's certificate could not be renewed");
                    due = Some((key, now.after(backoff.next(&mut rand::rng()))));
                }
            }
        }
    }
}

/// The host that stands in the identity of a data folder, whether or not the rest of it can be used.
/// Reads the disk.
pub fn enrolled_host(data_dir: &Path) -> Option<HostId> {
    IdentityFolder::new(data_dir).host()
}

/// Leaves the fleet, as far as this host is concerned: removes its key, its certificate and all else
/// of its identity. `None` where that could not be read.
///
/// # Errors
/// `NotEnrolled`; `IoFailed` where it cannot be removed.
pub fn unenrol(data_dir: &Path) -> Result<Option<FleetIdentity>> {
    IdentityFolder::new(data_dir).leave()
}

impl CoreLink for CoreLinkService {
    fn identity(&self) -> Option<FleetIdentity> {
        self.identity
            .lock()
            .as_ref()
            .map(|one| one.identity.clone())
    }

    fn state(&self) -> LinkState {
        self.shown.get()
    }

    fn carriers(&self) -> Vec<CarrierState> {
        let carrier = |name, state, reason, peer| CarrierState {
            name,
            state,
            reason,
            peer,
        };
        let state = self.shown.get();
        let (reason, replica) = match &state {
            LinkState::Up { replica, .. } => (String::new(), replica.clone()),
            LinkState::Waiting { reason, .. } | LinkState::Refused { reason } => {
                (reason.clone(), String::new())
            }
            LinkState::Silent { since } => {
                let reason = format!("nothing was heard for {} s", since.as_secs());
                (reason, String::new())
            }
            LinkState::Off | LinkState::Connecting => Default::default(),
        };
        let mut all = vec![carrier(LINK, state.as_str(), reason, replica)];
        let replicas = self.inbound.replicas();
        let direct = if replicas.is_empty() { "off" } else { "up" };
        all.push(carrier(
            "direct",
            direct,
            String::new(),
            replicas.join(", "),
        ));
        if let Some(piko) = self.piko.get() {
            let (state, reason) = match piko.state() {
                PikoState::Off => ("off", String::new()),
                PikoState::Connecting => ("connecting", String::new()),
                PikoState::Up => ("up", String::new()),
                PikoState::Waiting { reason, .. } => ("waiting", reason),
                PikoState::Refused { reason } => ("refused", reason),
            };
            all.push(carrier("piko", state, reason, piko.peer()));
        }
        all
    }

    fn reconnect(&self) {
        // A full queue holds signals enough.
        let _ = self.signals.try_send(Signal::Reconnect);
    }
}

impl std::fmt::Debug for CoreLinkService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoreLinkService")
            .field("options", &self.options)
            .field("state", &self.shown.get())
            .field("direct", &self.inbound.replicas())
            .finish_non_exhaustive()
    }
}

fn again(error: &ghost_domain::Error) -> End {
    let reason = match error.cause() {
        Some(cause) => format!("{}: {cause}", error.message()),
        None => error.message().to_owned(),
    };
    End::Again {
        reason,
        after: Duration::ZERO,
        address: None,
    }
}

/// Which address comes next: the one that Core named, else one after the other.
#[derive(Debug, Default)]
struct Addresses {
    turn: usize,
    preferred: Option<String>,
}

impl Addresses {
    fn take(&mut self, known: &[String]) -> String {
        if let Some(address) = self.preferred.take() {
            return address;
        }
        let address = known.get(self.turn % known.len().max(1));
        self.turn = self.turn.wrapping_add(1);
        address.cloned().unwrap_or_default()
    }

    fn prefer(&mut self, address: Option<String>) {
        self.preferred = address;
    }
}

/// The link's own carrier: TLS with this host's certificate.
struct LinkTunnel {
    enrolled: Arc<Enrolled>,
    address: String,
}

#[async_trait]
impl Tunnel for LinkTunnel {
    fn name(&self) -> &'static str {
        LINK
    }

    async fn connect(&self) -> Result<Dialled> {
        let trust = Trust::Authority {
            certificate: self.enrolled.authority.clone(),
            trust_domain: self.enrolled.identity.trust_domain.clone(),
        };
        let setup = Setup::new(
            trust,
            Some(self.enrolled.shown()?),
            ghost_proto::core::LINK_PROTOCOL,
        )?;
        let (stream, local) = setup.dial(&self.address).await?;
        Ok(Dialled {
            session: begin(stream, Side::Client, Limits::HOST),
            local: Some(local),
        })
    }
}
