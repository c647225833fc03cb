//! One life of the link: from the hello to its end.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use ghost_domain::fleet::{
    CommandOutcome, CommandStatus, HeartbeatReport, LinkState, RefusedCommand,
};
use ghost_domain::ports::{Clock, CoreLinkHandler};
use ghost_domain::{ErrorCode, Result, Timestamp};
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use ghost_proto::core::{NEWEST_LINK_VERSION, OLDEST_LINK_VERSION};
use parking_lot::Mutex;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::convert::{self, ReadCommand};
use super::enrol::blocking;
use super::heartbeat::Heartbeats;
use super::identity::{Enrolled, IdentityFolder};
use super::signals::Signal;
use super::tls::CLOCK_SKEW;
use crate::tunnel::messages::{MessageReader, MessageWriter};
use crate::tunnel::{Closed, Dialled, TunnelHandle, TunnelStream};

/// What Core may take to greet.
const WELCOME_TIME: Duration = Duration::from_secs(30);
/// What the application may take to say how the host fares.
const REPORT_TIME: Duration = Duration::from_secs(10);
/// Changes within this time are told together.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// A full heartbeat that Core asks for comes no sooner after the last one.
const FULL_AGAIN: Duration = Duration::from_secs(1);
/// Commands that wait to be taken. Core sends the next ones when these are done.
const MOST_COMMANDS: usize = 64;
/// After this many intervals without anything from Core the link is given up.
const SILENT_INTERVALS: u32 = 3;
/// After this many without an answer to a ping, though bytes come: a Core that does not think.
const DEAF_INTERVALS: u32 = 12;
/// What is waited for where Core does not want this host, or another version.
const SLOW_RETRY: Duration = Duration::from_secs(600);
/// Between two tries to follow a link that works.
const REDIAL: Duration = Duration::from_secs(30);
const BROKE: &str = "the control stream broke";
const SILENT_END: &str = "Core ended the link without a word";
/// Longest text of Core's that is shown.
const MOST_TEXT: usize = 200;

/// How a life of the link ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The agent stops.
    Stopped,
    /// Try again, after the usual wait and not before `after`.
    Again {
        reason: String,
        after: Duration,
        address: Option<String>,
    },
    /// Try again now: this side saw why.
    AtOnce(String),
    /// Core does not want this host.
    Refused(String),
    /// Core says that our certificate ended.
    Expired(String),
    /// A link with this host's new certificate stands, and takes this one's place.
    Followed,
}

impl End {
    fn again(reason: impl Into<String>) -> Self {
        Self::Again {
            reason: reason.into(),
            after: Duration::ZERO,
            address: None,
        }
    }

    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Stopped => "the agent stops",
            Self::Followed => "a link with the new certificate takes its place",
            Self::Again { reason, .. }
            | Self::AtOnce(reason)
            | Self::Refused(reason)
            | Self::Expired(reason) => reason,
        }
    }
}

/// Where the link's state is seen.
pub(super) struct Shown {
    state: Mutex<LinkState>,
    handler: Arc<dyn CoreLinkHandler>,
}

impl Shown {
    pub(super) fn new(handler: Arc<dyn CoreLinkHandler>) -> Self {
        Self {
            state: Mutex::new(LinkState::Off),
            handler,
        }
    }

    pub(super) fn get(&self) -> LinkState {
        self.state.lock().clone()
    }

    /// Shows a state. The handler is told of each that is another one, not of each round trip.
    pub(super) fn set(&self, state: LinkState) {
        let is_news = {
            let mut shown = self.state.lock();
            let is_news = match (&*shown, &state) {
                (
                    LinkState::Up {
                        carrier, replica, ..
                    },
                    LinkState::Up {
                        carrier: other,
                        replica: another,
                        ..
                    },
                ) => (carrier, replica) != (other, another),
                (LinkState::Silent { .. }, LinkState::Silent { .. }) => false,
                (old, new) => old != new,
            };
            shown.clone_from(&state);
            is_news
        };
        if is_news {
            self.handler.link_changed(state);
        }
    }
}

/// What a life of the link needs.
pub(super) struct Context {
    pub(super) handler: Arc<dyn CoreLinkHandler>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) shown: Arc<Shown>,
    pub(super) carrier: &'static str,
    pub(super) agent_version: String,
    pub(super) instance: String,
    pub(super) certificate_generation: u64,
    /// By what Core knows this machine again; empty where it cannot.
    pub(super) machine_hash: String,
    /// Where the identity lies.
    pub(super) folder: IdentityFolder,
    /// The Core that greeted first, where one has.
    pub(super) core_id: Option<String>,
    pub(super) direct: Vec<proto::DirectAddress>,
    /// What those are now.
    pub(super) named: Named,
    pub(super) connects: u64,
    pub(super) last_loss: String,
    /// Where streams that Core opens go.
    pub(super) streams: mpsc::Sender<TunnelStream>,
    /// Whether the link before this one stays until the streams over it have ended.
    pub(super) follows: bool,
    /// When the certificate of this link ends.
    pub(super) expires_at: Timestamp,
    /// The number of this host's newest certificate.
    pub(super) newest: watch::Receiver<u64>,
    /// Dials with the newest certificate.
    pub(super) redial: Redial,
    /// Cancelled when what stands on this host's identity has to end.
    pub(super) standing: CancellationToken,
}

/// A connection that stands, and the identity that it was made with.
pub(super) type Redialled = (Dialled, Arc<Enrolled>);

/// By which addresses Core could dial this host now.
pub(super) type Named =
    Arc<dyn Fn() -> BoxFuture<'static, io::Result<Vec<proto::DirectAddress>>> + Send + Sync>;

/// Dials with the newest certificate.
pub(super) type Redial = Arc<dyn Fn() -> BoxFuture<'static, Result<Redialled>> + Send + Sync>;

/// What became of a life of the link.
pub(super) struct Lived {
    pub(super) end: End,
    /// For how long it was up.
    pub(super) up: Duration,
    /// Of one that is followed: the connection for the next.
    pub(super) next: Option<Redialled>,
}

/// Lives one life of the link.
pub(super) async fn live(
    dialled: Dialled,
    context: &Context,
    signals: &mut mpsc::Receiver<Signal>,
    stop: &CancellationToken,
) -> Lived {
    let Dialled { session, local } = dialled;
    let handle = session.handle.clone();
    let mut incoming = session.incoming;
    let begun = Instant::now();
    let greeted = tokio::select! {
        greeted = tokio::time::timeout(WELCOME_TIME, greet(&handle, context)) => {
            greeted.unwrap_or_else(|_| Err(End::again("Core does not greet")))
        }
        () = stop.cancelled() => Err(End::Stopped),
    };
    let (mut writer, greeted) = match greeted {
        Ok((reader, writer, welcome, facts)) => (writer, (reader, welcome, facts)),
        Err(end) => {
            let end = explain(end, &handle).await;
            handle.close(end.reason());
            return Lived {
                end,
                up: Duration::ZERO,
                next: None,
            };
        }
    };
    let (mut reader, welcome, facts) = greeted;
    let up = Instant::now();
    let mut next = None;
    let end = match accept(context, &welcome).await {
        Ok(()) => {
            let life = Life::new(context, &handle, &welcome, facts, local, begun.elapsed());
            let ping_interval = life.ping_interval;
            let parts = (&mut reader, &mut writer, &mut incoming);
            let end = life.run(parts, &mut next, signals, stop).await;
            if end == End::Followed {
                let (streams, standing) = (context.streams.clone(), context.standing.clone());
                let ends = context.expires_at.after(CLOCK_SKEW);
                let clock = Arc::clone(&context.clock);
                tokio::spawn(async move {
                    let draining = Draining {
                        handle,
                        reader,
                        writer,
                        incoming,
                        streams,
                        ping_interval,
                    };
                    tokio::select! {
                        () = draining.drain(&*clock, ends) => {}
                        () = standing.cancelled() => {}
                    }
                });
                return Lived {
                    end,
                    up: up.elapsed(),
                    next,
                };
            }
            end
        }
        Err(end) => end,
    };
    let end = explain(end, &handle).await;
    let code = match &end {
        End::Stopped => "shutting_down",
        _ => "protocol_error",
    };
    let goodbye = Kind::Goodbye(proto::Goodbye {
        code: code.into(),
        message: end.reason().chars().take(MOST_TEXT).collect(),
        ..proto::Goodbye::default()
    });
    // Core learns why where it still listens.
    let _ = tokio::time::timeout(Duration::from_secs(1), writer.send(goodbye)).await;
    handle.close(end.reason());
    if end == End::Stopped {
        handle.closed().await;
    }
    Lived {
        end,
        up: up.elapsed(),
        next: None,
    }
}

/// A link that another one followed: it stays for the streams over it, until Core ends it.
struct Draining {
    handle: TunnelHandle,
    reader: Reader,
    writer: Writer,
    incoming: mpsc::Receiver<TunnelStream>,
    streams: mpsc::Sender<TunnelStream>,
    ping_interval: Duration,
}

impl Draining {
    async fn drain(mut self, clock: &dyn Clock, ends: Timestamp) {
        let mut tick = tokio::time::interval(self.ping_interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let reason = loop {
            tokio::select! {
                message = self.reader.next() => match message {
                    Ok(Some(Kind::Ping(ping))) => {
                        let number = ping.number;
                        if self.writer.queue(Kind::Pong(proto::Pong { number })).is_err() {
                            break "Core reads nothing";
                        }
                    }
                    // What it says beside that belongs on the newer link, and is said there again.
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break "Core ended it",
                },
                flushed = self.writer.flush(), if self.writer.is_waiting() => if flushed.is_err() {
                    break "Core ended it";
                },
                // Some may have been on their way when the newer link came.
                Some(stream) = self.incoming.recv() => {
                    if self.streams.try_send(stream).is_err() {
                        tracing::debug!("nobody takes a stream of Core's; it was reset");
                    }
                }
                _ = tick.tick() => {
                    if self.handle.silence() >= self.ping_interval * SILENT_INTERVALS {
                        break "nothing came from Core";
                    }
                    if clock.now() >= ends {
                        break "its certificate ended";
                    }
                }
            }
        };
        tracing::info!(reason, "the link before the present one ended");
        self.handle.close(reason);
    }
}

/// Why the session ended says more than that a stream of it broke.
async fn explain(end: End, handle: &TunnelHandle) -> End {
    let End::Again { reason, .. } = &end else {
        return end;
    };
    if !reason.starts_with(BROKE) && !reason.starts_with(SILENT_END) {
        return end;
    }
    // The stream's end is seen a moment before the session's.
    let Ok(closed) = tokio::time::timeout(Duration::from_millis(200), handle.closed()).await else {
        return end;
    };
    match closed {
        // How rustls writes the alert of that name (RFC 8446, section 6.2).
        Closed::Lost(cause) if cause.contains("CertificateExpired") => End::Expired(cause),
        Closed::Lost(cause) if cause.contains("received fatal alert") => End::again(format!(
            "Core does not take this host's certificate: {cause}"
        )),
        Closed::Lost(_) | Closed::Protocol(_) => End::again(closed.to_string()),
        Closed::Ours(_) | Closed::Peer => end,
    }
}

type Reader = MessageReader<ReadHalf<TunnelStream>>;
type Writer = MessageWriter<WriteHalf<TunnelStream>>;
type Greeted = (
    Reader,
    Writer,
    proto::CoreWelcome,
    ghost_domain::fleet::FleetFacts,
);

/// Says hello, waits for the welcome.
async fn greet(handle: &TunnelHandle, context: &Context) -> Result<Greeted, End> {
    let lost = |error: io::Error| End::again(format!("{BROKE}: {error}"));
    let facts = match report(&context.handler).await {
        Ok(report) => report.facts,
        Err(error) => {
            tracing::warn!(%error, "this host cannot say how it fares yet");
            ghost_domain::fleet::FleetFacts::default()
        }
    };
    let stream = handle.open().await.map_err(lost)?;
    let (read, write) = tokio::io::split(stream);
    let (mut reader, mut writer) = (MessageReader::new(read), MessageWriter::new(write));
    let (epoch, command_generation) = context
        .core_id
        .as_deref()
        .map_or((0, 0), |id| context.handler.ledger(id));
    let hello = proto::AgentHello {
        protocol_version: NEWEST_LINK_VERSION,
        agent_version: context.agent_version.clone(),
        instance_id: context.instance.clone(),
        certificate_generation: context.certificate_generation,
        epoch,
        command_generation,
        permissions: context.handler.permissions().as_str().into(),
        carrier: context.carrier.into(),
        direct_addresses: context.direct.clone(),
        facts: Some(convert::facts(&facts)),
        machine_hash: context.machine_hash.clone(),
        follows: context.follows,
    };
    writer.send(Kind::Hello(hello)).await.map_err(lost)?;
    loop {
        match reader.next().await.map_err(lost)? {
            Some(Kind::Welcome(welcome)) => return Ok((reader, writer, welcome, facts)),
            Some(Kind::Ping(ping)) => {
                let pong = Kind::Pong(proto::Pong {
                    number: ping.number,
                });
                writer.send(pong).await.map_err(lost)?;
            }
            Some(Kind::Goodbye(goodbye)) => return Err(farewell(goodbye)),
            Some(_) => return Err(End::again("Core's first message is not a welcome")),
            None => return Err(End::again(SILENT_END)),
        }
    }
}

/// Whether this is the Core that this host obeys.
async fn accept(context: &Context, welcome: &proto::CoreWelcome) -> Result<(), End> {
    let version = welcome.protocol_version;
    if !(OLDEST_LINK_VERSION..=NEWEST_LINK_VERSION).contains(&version) {
        return Err(End::Again {
            reason: format!("Core speaks version {version} of the link, which this agent does not"),
            after: SLOW_RETRY,
            address: None,
        });
    }
    if welcome.core_id.is_empty() || welcome.core_id.len() > 64 {
        return Err(End::again("Core does not say which it is"));
    }
    if context
        .core_id
        .as_ref()
        .is_some_and(|known| *known != welcome.core_id)
    {
        return Err(End::Refused(format!(
            "this is the Core {}, and this host joined another one",
            shown(&welcome.core_id)
        )));
    }
    if context.core_id.is_none() {
        let (folder, id) = (context.folder.clone(), welcome.core_id.clone());
        let kept = blocking(move || folder.keep_core_id(&id)).await;
        kept.map_err(|error| End::again(error.to_string()))?;
    }
    let welcomed = context.handler.welcomed(&welcome.core_id, welcome.epoch);
    welcomed.await.map_err(|error| {
        let after = match error.code() {
            // Its records went back; another replica, or time, may have newer ones.
            ErrorCode::StaleCommand => Duration::from_secs(10),
            _ => Duration::ZERO,
        };
        End::Again {
            reason: error.to_string(),
            after,
            address: None,
        }
    })
}

/// What Core's goodbye means for us.
pub(super) fn farewell(goodbye: proto::Goodbye) -> End {
    let reason = format!("{}: {}", shown(&goodbye.code), shown(&goodbye.message));
    match goodbye.code.as_str() {
        "revoked" | "unknown_host" | "cloned_identity" => End::Refused(reason),
        "certificate_expired" => End::Expired(reason),
        code => {
            let wanted = convert::from_duration(goodbye.retry_after).unwrap_or_default();
            let least = match code {
                "unsupported_version" => SLOW_RETRY,
                _ => Duration::ZERO,
            };
            End::Again {
                reason,
                // Core cannot send us away for longer than one that refuses us.
                after: wanted.max(least).min(SLOW_RETRY),
                address: Some(goodbye.address).filter(|one| super::token::is_address(one)),
            }
        }
    }
}

/// How often Core wants pings and heartbeats, within what does neither side harm, whatever it says.
pub(super) fn intervals(welcome: &proto::CoreWelcome) -> (Duration, Duration) {
    let interval = |wanted, default, most| {
        convert::from_duration(wanted)
            .filter(|duration| !duration.is_zero())
            .unwrap_or(Duration::from_secs(default))
            .clamp(Duration::from_millis(100), Duration::from_secs(most))
    };
    (
        interval(welcome.ping_interval, 5, 60),
        interval(welcome.heartbeat_interval, 30, 3600),
    )
}

/// Text of Core's, fit to be shown.
fn shown(text: &str) -> String {
    text.chars()
        .filter(|character| !character.is_control())
        .take(MOST_TEXT)
        .collect()
}

async fn report(handler: &Arc<dyn CoreLinkHandler>) -> Result<HeartbeatReport> {
    match tokio::time::timeout(REPORT_TIME, handler.report()).await {
        Ok(report) => report,
        Err(_) => Err(ghost_domain::Error::internal(
            "the state of this host was not put together in time",
        )),
    }
}

/// Whether this host lost the address that a connection goes out from: nothing comes to it any more,
/// and TCP would take minutes to notice.
fn lost_address(local: Option<SocketAddr>) -> bool {
    local.is_some_and(|local| {
        UdpSocket::bind((local.ip(), 0))
            .is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
    })
}

/// What a heartbeat is made of: how this host fares, and by which addresses Core could dial it, where
/// that is known.
type Told = (HeartbeatReport, Option<Vec<proto::DirectAddress>>);

/// Something that the application does, one after the other in the order of the commands.
enum Work {
    Command(Box<ReadCommand>),
    Kept(u64),
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        if self.beats.is_under_way() {
            self.context.handler.heartbeat_ended(false);
        }
    }
}

struct Life<'a> {
    context: &'a Context,
    handle: &'a TunnelHandle,
    replica: String,
    local: Option<SocketAddr>,
    ping_interval: Duration,
    heartbeat_interval: Duration,
    beats: Heartbeats,
    /// When the next heartbeat is due, if none is under way.
    due: Instant,
    last_beat: Instant,
    round_trip: Duration,
    /// The last ping, and when the last one was answered.
    ping: (u64, Instant),
    answered: Instant,
    work: VecDeque<Work>,
    /// What Core was told of outcomes on this link.
    told: HashMap<u64, CommandStatus>,
}

impl<'a> Life<'a> {
    fn new(
        context: &'a Context,
        handle: &'a TunnelHandle,
        welcome: &proto::CoreWelcome,
        facts: ghost_domain::fleet::FleetFacts,
        local: Option<SocketAddr>,
        greeting: Duration,
    ) -> Self {
        let now = Instant::now();
        let (ping_interval, heartbeat_interval) = intervals(welcome);
        Self {
            context,
            handle,
            replica: shown(&welcome.replica),
            local,
            ping_interval,
            heartbeat_interval,
            beats: Heartbeats::new(facts, context.direct.clone()),
            due: now,
            last_beat: now,
            round_trip: greeting,
            ping: (0, now),
            answered: now,
            work: VecDeque::new(),
            told: HashMap::new(),
        }
    }

    async fn run(
        mut self,
        (reader, writer, incoming): (&mut Reader, &mut Writer, &mut mpsc::Receiver<TunnelStream>),
        next: &mut Option<Redialled>,
        signals: &mut mpsc::Receiver<Signal>,
        stop: &CancellationToken,
    ) -> End {
        let handler = Arc::clone(&self.context.handler);
        tracing::info!(
            replica = self.replica,
            carrier = self.context.carrier,
            "the link to Core is up"
        );
        self.show_up();
        // Pings, and a look at the silence between two of them.
        let mut tick = tokio::time::interval(self.ping_interval / 5);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticks = 0_u32;
        let mut report_changed = handler.report_changed();
        let mut outcomes_changed = handler.outcomes_changed();
        let mut reporting: Option<BoxFuture<'static, Result<Told>>> = None;
        let mut working: Option<BoxFuture<'static, Option<CommandOutcome>>> = None;
        self.tell_outcomes(writer);
        let (mut newest, present) = (
            self.context.newest.clone(),
            self.context.certificate_generation,
        );
        let mut redialling: Option<BoxFuture<'static, Result<Redialled>>> = None;
        let mut redial_at = Instant::now();
        loop {
            if working.is_none()
                && let Some(work) = self.work.pop_front()
            {
                working = Some(self.begin(work));
            }
            let next_beat = if self.beats.is_under_way() {
                self.due.max(self.last_beat + self.heartbeat_interval)
            } else {
                self.due
            };
            tokio::select! {
                message = reader.next() => match message {
                    Ok(Some(kind)) => {
                        if let Err(end) = self.take(kind, writer) {
                            return end;
                        }
                    }
                    Ok(None) => return End::again(SILENT_END),
                    Err(error) => return End::again(format!("{BROKE}: {error}")),
                },
                flushed = writer.flush(), if writer.is_waiting() => {
                    if let Err(error) = flushed {
                        // Why Core ended it may lie unread.
                        while let Some(Ok(Some(kind))) = reader.next().now_or_never() {
                            if let Kind::Goodbye(goodbye) = kind {
                                return farewell(goodbye);
                            }
                        }
                        return End::again(format!("{BROKE}: {error}"));
                    }
                }
                due = tick.tick() => {
                    let pings = ticks.is_multiple_of(5);
                    ticks = ticks.wrapping_add(1);
                    // Where this process itself stood still, what Core said lies unread. The next
                    // tick judges.
                    if due.elapsed() >= self.ping_interval {
                        self.answered = self.answered.max(due);
                    } else if let Err(end) = self.watch(pings, writer) {
                        return end;
                    }
                }
                () = tokio::time::sleep_until(next_beat), if reporting.is_none() => {
                    let handler = Arc::clone(&handler);
                    let named = (self.context.named)();
                    reporting = Some(Box::pin(async move {
                        let (report, named) = tokio::join!(report(&handler), named);
                        // One that does not answer for a moment takes no way away.
                        let named = named.inspect_err(|error| {
                            tracing::debug!(%error, "direct addresses are not known now");
                        });
                        Ok((report?, named.ok()))
                    }));
                }
                report = ready(&mut reporting) => {
                    if let Err(end) = self.tell(report, writer) {
                        return end;
                    }
                }
                outcome = ready(&mut working) => {
                    if let Some(outcome) = outcome
                        && let Err(end) = self.tell_outcome(&outcome, writer)
                    {
                        return end;
                    }
                }
                () = &mut report_changed => {
                    report_changed = handler.report_changed();
                    self.due = self.due.min(Instant::now() + DEBOUNCE);
                }
                () = &mut outcomes_changed => {
                    outcomes_changed = handler.outcomes_changed();
                    self.tell_outcomes(writer);
                }
                Some(stream) = incoming.recv() => {
                    if self.context.streams.try_send(stream).is_err() {
                        tracing::debug!("nobody takes a stream of Core's; it was reset");
                    }
                }
                () = newer(&mut newest, present, redial_at), if redialling.is_none() => {
                    redialling = Some((self.context.redial)());
                }
                redialled = ready(&mut redialling) => match redialled {
                    Ok(redialled) => {
                        *next = Some(redialled);
                        return End::Followed;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a link with the new certificate could not be made yet");
                        redial_at = Instant::now() + REDIAL;
                    }
                },
                Some(signal) = signals.recv() => match signal {
                    Signal::Reconnect => return End::AtOnce("asked to connect anew".into()),
                    Signal::Wake => return End::AtOnce("this host was asleep".into()),
                    Signal::Network if lost_address(self.local) => {
                        return End::AtOnce("this host lost the address of the link".into());
                    }
                    // It may have another address now, by which Core can dial it.
                    Signal::Network => {
                        let soon = Instant::now() + DEBOUNCE;
                        self.due = self.due.min(soon.max(self.last_beat + FULL_AGAIN));
                    }
                },
                () = stop.cancelled() => return End::Stopped,
            }
        }
    }

    fn show_up(&self) {
        self.context.shown.set(LinkState::Up {
            carrier: self.context.carrier.into(),
            replica: self.replica.clone(),
            round_trip: self.round_trip,
        });
    }

    /// Sends a ping where one is due, and looks whether Core is still there.
    fn watch(&mut self, pings: bool, writer: &mut Writer) -> Result<(), End> {
        let silence = self.handle.silence();
        if silence >= self.ping_interval * SILENT_INTERVALS {
            return Err(End::again(format!(
                "nothing came from Core for {:.0} s",
                silence.as_secs_f64()
            )));
        }
        if self.answered.elapsed() >= self.ping_interval * DEAF_INTERVALS {
            return Err(End::again(
                "Core does not answer, though its connection stands",
            ));
        }
        // Half way to giving up it is said already: what stands in the status must not be green
        // while the link is dead.
        if silence >= self.ping_interval * SILENT_INTERVALS / 2 {
            self.context.shown.set(LinkState::Silent { since: silence });
        } else {
            self.show_up();
        }
        if pings {
            self.ping = (self.ping.0 + 1, Instant::now());
            let number = self.ping.0;
            queue(writer, Kind::Ping(proto::Ping { number }))?;
        }
        Ok(())
    }

    fn take(&mut self, kind: Kind, writer: &mut Writer) -> Result<(), End> {
        match kind {
            Kind::Ping(ping) => {
                let number = ping.number;
                queue(writer, Kind::Pong(proto::Pong { number }))?;
            }
            Kind::Pong(pong) => {
                self.answered = Instant::now();
                if pong.number == self.ping.0 {
                    self.round_trip = self.ping.1.elapsed();
                    self.show_up();
                }
            }
            Kind::HeartbeatReply(reply) => {
                if self.beats.answered(reply.sequence, reply.want_full) {
                    self.context.handler.heartbeat_ended(true);
                }
                if reply.want_full {
                    self.due = self.due.min(self.last_beat + FULL_AGAIN);
                }
            }
            Kind::Command(message) => {
                let read = convert::command(message).map_err(|error| {
                    End::again(format!("Core sent a command without an id: {error}"))
                })?;
                self.add(Work::Command(Box::new(read)))?;
            }
            Kind::CommandKept(kept) => self.add(Work::Kept(kept.generation))?,
            Kind::Goodbye(goodbye) => return Err(farewell(goodbye)),
            Kind::Hello(_) | Kind::Welcome(_) | Kind::Heartbeat(_) | Kind::CommandResult(_) => {
                return Err(End::again(
                    "Core sent what only a host sends, or greeted twice",
                ));
            }
        }
        Ok(())
    }

    fn add(&mut self, work: Work) -> Result<(), End> {
        if self.work.len() >= MOST_COMMANDS {
            return Err(End::again(
                "Core sends commands faster than they can be taken",
            ));
        }
        self.work.push_back(work);
        Ok(())
    }

    fn begin(&self, work: Work) -> BoxFuture<'static, Option<CommandOutcome>> {
        let handler = Arc::clone(&self.context.handler);
        let at = self.context.clock.now();
        Box::pin(async move {
            match work {
                Work::Kept(generation) => {
                    handler.outcome_kept(generation).await;
                    None
                }
                Work::Command(read) => match read.command {
                    Ok(command) => handler.command(command).await,
                    Err(error) => {
                        tracing::warn!(id = %read.id, %error, "a command of Core's was refused");
                        let refused = RefusedCommand {
                            id: read.id,
                            epoch: read.epoch,
                            generation: read.generation,
                            previous: read.previous,
                            error,
                            at,
                        };
                        handler.refuse(refused).await
                    }
                },
            }
        })
    }

    fn tell(&mut self, told: Result<Told>, writer: &mut Writer) -> Result<(), End> {
        let now = Instant::now();
        self.last_beat = now;
        self.due = now + self.heartbeat_interval;
        match told {
            Ok((report, direct)) => {
                let link = proto::LinkFacts {
                    round_trip_seconds: self.round_trip.as_secs_f64(),
                    connects: self.context.connects,
                    last_loss: self.context.last_loss.clone(),
                };
                if self.beats.is_under_way() {
                    self.context.handler.heartbeat_ended(false);
                }
                let now = self.context.clock.now();
                let beat = self.beats.next(&report, direct, link, now);
                queue(writer, Kind::Heartbeat(beat))
            }
            Err(error) => {
                tracing::warn!(%error, "a heartbeat was left out");
                Ok(())
            }
        }
    }

    fn tell_outcome(&mut self, outcome: &CommandOutcome, writer: &mut Writer) -> Result<(), End> {
        self.told.insert(outcome.generation, outcome.status);
        queue(writer, Kind::CommandResult(convert::outcome(outcome)))
    }

    /// Tells what Core has not been told on this link. Where it does not fit now, it is told with
    /// the next change or on the next link: outcomes stay until Core keeps them.
    fn tell_outcomes(&mut self, writer: &mut Writer) {
        let outcomes = self.context.handler.outcomes();
        self.told
            .retain(|generation, _| outcomes.iter().any(|one| one.generation == *generation));
        for outcome in &outcomes {
            if self.told.get(&outcome.generation) != Some(&outcome.status)
                && self.tell_outcome(outcome, writer).is_err()
            {
                self.told.remove(&outcome.generation);
            }
        }
    }
}

fn queue(writer: &mut Writer, kind: Kind) -> Result<(), End> {
    writer
        .queue(kind)
        .map_err(|error| End::again(format!("a message could not be sent: {error}")))
}

/// Waits until this host has a newer certificate than that of this number, and until `at`.
async fn newer(newest: &mut watch::Receiver<u64>, than: u64, at: Instant) {
    if newest.wait_for(|number| *number > than).await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep_until(at).await;
}

/// Waits for what is in the slot, and empties it; forever where nothing is. May be dropped.
async fn ready<T>(slot: &mut Option<BoxFuture<'static, T>>) -> T {
    match slot {
        Some(future) => {
            let done = future.await;
            *slot = None;
            done
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_address_is_told_from_a_present_one() {
        assert!(!lost_address(None));
        assert!(!lost_address(Some(([127, 0, 0, 1], 4242).into())));
        // TEST-NET-1 (RFC 5737), which no host has.
        assert!(lost_address(Some(([192, 0, 2, 7], 4242).into())));
    }

    #[test]
    fn goodbyes_are_understood_and_bounded() {
        let goodbye = |code: &str, address: &str, seconds| {
            farewell(proto::Goodbye {
                code: code.into(),
                message: "a\u{1b}[2Jb".into(),
                address: address.into(),
                retry_after: Some(prost_types::Duration { seconds, nanos: 0 }),
            })
        };
        for code in ["revoked", "unknown_host", "cloned_identity"] {
            let End::Refused(reason) = goodbye(code, "", 0) else {
                panic!("{code}");
            };
            assert_eq!(reason, format!("{code}: a[2Jb"));
        }
        let again = |end| match end {
            End::Again { after, address, .. } => (after.as_secs(), address),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            again(goodbye("not_the_owner", "core-2:7443", 3)),
            (3, Some("core-2:7443".into()))
        );
        assert_eq!(again(goodbye("replaced", "no address", -5)), (0, None));
        assert_eq!(again(goodbye("shutting_down", "", 1 << 40)), (600, None));
        assert_eq!(again(goodbye("unsupported_version", "", 0)), (600, None));
    }
}
