//! One link of one host: its control stream from hello to goodbye.
//!
//! The host may be hostile. What it says is bounded before it comes here; here it is bounded how
//! often it may speak (beyond that it is not read, and its own window fills up) and how long it may
//! leave unread what we say. Writes to the store go on beside the stream: a store that is slow must
//! not make a link look dead.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ghost_domain::fleet::{CommandOutcome, CommandStatus, FleetCommand, VmSummary};
use ghost_domain::{CommandId, Error, ErrorCode, HostId, Result, TenantName, VmId};
use tokio::time::{Instant, Sleep};

use super::links::Link;
use super::messages::{ControlReader, ControlWriter, FromHost, Goodbye, HostHeartbeat, ToHost};
use super::{CLOCK_SKEW, Desk, MISSED_PINGS};
use crate::application::fleet::LiveHost;
use crate::domain::{HostLife, Inventory, QueuedCommand, ToldVms};

/// Messages that a host may send at once, and how many more each second. A heartbeat, two pings and
/// their answers are some in 30 s; a burst of results after a night offline is a few hundred.
const BURST: f64 = 300.0;
const MESSAGES_A_SECOND: f64 = 50.0;
/// Commands that are on their way to a host and that it has not taken.
const MOST_UNTAKEN: usize = 8;
/// Outcomes that wait to be kept; with more, the host is not read.
const MOST_OUTCOMES: usize = 64;
/// VMs of one host. A heartbeat has no room for so many; changes could heap them up.
const MOST_VMS: usize = 10_000;
/// A command that the host says nothing of is sent again after so many pings.
const RESEND_AFTER_PINGS: u32 = 6;

/// Why a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// We say goodbye.
    Goodbye(Goodbye),
    /// The host did, or its stream ended.
    Host(String),
    /// Nothing was heard.
    Silent(Duration),
    /// The stream broke, or the host broke the rules.
    Broken(Error),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Goodbye(goodbye) => write!(f, "{}: {}", goodbye.code, goodbye.message),
            Self::Host(why) => write!(f, "the host ended it: {why}"),
            Self::Silent(length) => write!(f, "nothing was heard for {} s", length.as_secs()),
            Self::Broken(error) => write!(f, "{error}"),
        }
    }
}

/// What the store is asked for beside the stream.
enum Done {
    /// Commands that may go out now.
    Marked(Result<Vec<QueuedCommand>>),
    /// An outcome that is kept.
    Kept(CommandOutcome, Result<()>),
}

type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

pub(super) struct Session<R, W> {
    desk: Arc<Desk>,
    link: Arc<Link>,
    live: Arc<LiveHost>,
    host: HostId,
    tenant: TenantName,
    reader: R,
    writer: W,
    /// Messages that may still come at once.
    tokens: f64,
    tokens_at: Instant,
    heard: Instant,
    /// Since when something waits to be sent.
    unsent: Option<Instant>,
    ping: u64,
    pinged: Option<(u64, Instant)>,
    work: Option<Work>,
    outcomes: VecDeque<CommandOutcome>,
    /// The newest generation that was sent on this link.
    sent: u64,
    sent_at: Instant,
    /// Whether a full heartbeat came on this link.
    based: bool,
    /// The digest that the host gave for the VMs as they stand here. Where ours is another one for a
    /// full heartbeat too, its words were cleaned, and asking again would help nobody.
    digest: u64,
    trusts_digest: bool,
}

impl<R: ControlReader, W: ControlWriter> Session<R, W> {
    pub(super) fn new(
        desk: Arc<Desk>,
        link: Arc<Link>,
        live: Arc<LiveHost>,
        tenant: TenantName,
        reader: R,
        writer: W,
    ) -> Self {
        let now = Instant::now();
        Self {
            host: link.host,
            tenant,
            desk,
            link,
            live,
            reader,
            writer,
            tokens: BURST,
            tokens_at: now,
            heard: now,
            unsent: None,
            ping: 0,
            pinged: None,
            work: None,
            outcomes: VecDeque::new(),
            sent: 0,
            sent_at: now,
            based: false,
            digest: 0,
            trusts_digest: true,
        }
    }

    /// Speaks until the link ends, and says goodbye where that is ours to say.
    pub(super) async fn run(mut self) -> End {
        let end = match self.speak().await {
            Ok(end) => end,
            Err(error) if error.code() == ErrorCode::InvalidArgument => {
                End::Goodbye(Goodbye::new("protocol_error", error.to_string()))
            }
            Err(error) => End::Broken(error),
        };
        // From here on the next link of the host may take its changes.
        self.link.left();
        if let End::Goodbye(goodbye) = &end
            && self.writer.queue(ToHost::Goodbye(goodbye.clone())).is_ok()
        {
            let flushed = self.writer.flush();
            // A host that does not read is left without it.
            let _ = tokio::time::timeout(Duration::from_secs(2), flushed).await;
        }
        if self.link.is_followed() {
            self.drain().await;
        }
        end
    }

    /// Keeps the link while calls go on over it that were begun before a newer one took its place.
    async fn drain(&mut self) {
        let interval = self.desk.options.ping_interval;
        let mut tick = tokio::time::interval(interval);
        loop {
            let waiting = self.writer.is_waiting();
            tokio::select! {
                _ = tick.tick() => {
                    let unheard = self.heard.elapsed() >= interval * MISSED_PINGS;
                    let host = self.host;
                    let admitted = self.desk.fleet.read(|state| {
                        state.host(host).is_some_and(|record| record.life == HostLife::Active)
                    });
                    if self.link.transport.streams() == 0
                        || unheard
                        || !admitted
                        || self.has_expired()
                    {
                        return;
                    }
                    self.ping += 1;
                    if self.writer.queue(ToHost::Ping(self.ping)).is_err() {
                        return;
                    }
                }
                flushed = self.writer.flush(), if waiting => if flushed.is_err() {
                    return;
                },
                // What it says belongs on the newer link; that it says something is enough.
                message = self.reader.next() => match message {
                    Ok(Some(_)) => self.heard = Instant::now(),
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    /// Whether the certificate that the link was made with is over, by any clock.
    fn has_expired(&self) -> bool {
        self.desk.fleet.clock().now() >= self.link.expires_at.after(CLOCK_SKEW)
    }

    async fn speak(&mut self) -> Result<End> {
        let interval = self.desk.options.ping_interval;
        // Not all links at once.
        let first = interval.mul_f64(rand::random_range(0.1..=1.0));
        let timer = tokio::time::sleep(first);
        tokio::pin!(timer);
        if let Some(end) = self.look()? {
            return Ok(end);
        }
        loop {
            let waiting = self.writer.is_waiting();
            self.unsent = match (waiting, self.unsent) {
                (false, _) => None,
                (true, since) => since.or_else(|| Some(Instant::now())),
            };
            let reads = self.outcomes.len() < MOST_OUTCOMES;
            let allowed = self.allowed_at();
            tokio::select! {
                biased;
                goodbye = self.link.cut.wait() => return Ok(End::Goodbye(goodbye)),
                flushed = self.writer.flush(), if waiting => flushed?,
                () = &mut timer => {
                    if let Some(end) = self.tick(&mut timer)? {
                        return Ok(end);
                    }
                }
                done = poll_work(&mut self.work), if self.work.is_some() => {
                    self.work = None;
                    self.done(done)?;
                }
                () = self.live.changed() => {
                    if let Some(end) = self.look()? {
                        return Ok(end);
                    }
                }
                () = tokio::time::sleep_until(allowed.unwrap_or(self.tokens_at)),
                    if reads && allowed.is_some() => {}
                message = self.reader.next(), if reads && allowed.is_none() => {
                    match message? {
                        None => return Ok(End::Host("it closed the control stream".into())),
                        Some(message) => {
                            if let Some(end) = self.take(message)? {
                                return Ok(end);
                            }
                        }
                    }
                }
            }
        }
    }

    /// When the next message may be read; `None`: now.
    fn allowed_at(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let earned = (now - self.tokens_at).as_secs_f64() * MESSAGES_A_SECOND;
        self.tokens = (self.tokens + earned).min(BURST);
        self.tokens_at = now;
        (self.tokens < 1.0).then(|| now + Duration::from_secs_f64(1.0 / MESSAGES_A_SECOND))
    }

    /// Sends a ping and looks whether the host still speaks and reads.
    fn tick(&mut self, timer: &mut Pin<&mut Sleep>) -> Result<Option<End>> {
        let (now, interval) = (Instant::now(), self.desk.options.ping_interval);
        // Where this process itself stood still, the host had no chance to be heard.
        let late = now.saturating_duration_since(timer.deadline()) > interval;
        timer.as_mut().reset(now + interval);
        if late {
            self.heard = self.heard.max(now - interval.min(now - self.heard));
            self.unsent = self.unsent.map(|_| now);
        }
        if self.has_expired() {
            let message = "the certificate of this link ended; a link with the renewed one is due";
            return Ok(Some(End::Goodbye(Goodbye::new(
                "certificate_expired",
                message,
            ))));
        }
        let longest = interval * MISSED_PINGS;
        let silent = now - self.heard;
        if silent >= longest {
            return Ok(Some(End::Silent(silent)));
        }
        if self.unsent.is_some_and(|since| now - since >= longest) {
            return Ok(Some(End::Broken(
                Error::new(ErrorCode::HostOffline, "the host reads nothing")
                    .because(format!("for {} s", longest.as_secs())),
            )));
        }
        self.ping += 1;
        self.pinged = Some((self.ping, now));
        self.writer.queue(ToHost::Ping(self.ping))?;
        self.keep_next();
        if now - self.sent_at >= interval * RESEND_AFTER_PINGS {
            // What the host has taken is not among what is sent again.
            self.sent = 0;
            self.sent_at = now;
        }
        self.look()
    }

    /// What changed about this host that concerns its link: its life, its owner, its queue.
    fn look(&mut self) -> Result<Option<End>> {
        enum Seen {
            Goodbye(Goodbye),
            Commands(Vec<QueuedCommand>),
            Unmarked(Vec<CommandId>),
        }
        let (host, link) = (self.host, &self.link);
        let (idle, sent) = (self.work.is_none(), self.sent);
        let seen = self.desk.fleet.read(|state| {
            let Some(record) = state.host(host) else {
                return Seen::Goodbye(Goodbye::new("revoked", "this host was removed"));
            };
            match &record.life {
                HostLife::Active => {}
                HostLife::Revoked { .. } => {
                    return Seen::Goodbye(Goodbye::new("revoked", "this host was revoked"));
                }
                HostLife::Locked { reason, .. } => {
                    return Seen::Goodbye(Goodbye::new("cloned_identity", reason));
                }
            }
            match state.owner(host) {
                Some(owner) if owner.link == link.number => {}
                Some(owner) => {
                    let message = format!("a newer link leads to the replica {}", owner.replica);
                    return Seen::Goodbye(Goodbye::new("replaced", message));
                }
                // Kept while nobody may have it ([`super::replica`]); what is queued waits for the
                // owner to be written again, whose revision is part of each command's epoch.
                None if self.desk.leaseless.load(Ordering::SeqCst) => {
                    return Seen::Commands(Vec::new());
                }
                None => {
                    let message = "this replica lost the host";
                    return Seen::Goodbye(Goodbye::new("not_the_owner", message));
                }
            }
            let queued = |command: &&Arc<QueuedCommand>| command.status == CommandStatus::Queued;
            let untaken = state
                .open_commands(host)
                .filter(queued)
                .filter(|command| command.generation <= sent)
                .count();
            let next: Vec<&Arc<QueuedCommand>> = state
                .open_commands(host)
                .filter(queued)
                .filter(|command| command.generation > sent)
                .take(MOST_UNTAKEN.saturating_sub(untaken))
                .collect();
            if next.iter().all(|command| command.sent_at.is_some()) {
                Seen::Commands(
                    next.into_iter()
                        .map(|one| QueuedCommand::clone(one))
                        .collect(),
                )
            } else if idle {
                Seen::Unmarked(next.into_iter().map(|command| command.id).collect())
            } else {
                Seen::Commands(Vec::new())
            }
        });
        match seen {
            Seen::Goodbye(goodbye) => return Ok(Some(End::Goodbye(goodbye))),
            Seen::Commands(commands) => {
                for command in commands {
                    self.send(command)?;
                }
            }
            Seen::Unmarked(ids) => {
                let (commands, host) = (self.desk.commands().clone(), self.host);
                self.work = Some(Box::pin(async move {
                    Done::Marked(commands.mark(host, ids).await)
                }));
            }
        }
        Ok(None)
    }

    fn send(&mut self, command: QueuedCommand) -> Result<()> {
        let (host, generation) = (self.host, command.generation);
        let (epoch, previous) = self.desk.fleet.read(|state| {
            // What the host has taken needs no more waiting for; what it never had (cancelled,
            // expired) never comes.
            let previous = state
                .open_commands(host)
                .filter(|one| one.status == CommandStatus::Queued && one.generation < generation)
                .map(|one| one.generation)
                .max();
            (state.link_epoch(host), previous.unwrap_or(0))
        });
        let message = ToHost::Command {
            issued_at: command.issued_at,
            command: Box::new(FleetCommand {
                id: command.id,
                epoch,
                generation,
                previous,
                deadline: command.deadline,
                issuer: command.issuer,
                action: command.action,
            }),
        };
        self.writer.queue(message)?;
        self.sent = generation;
        self.sent_at = Instant::now();
        Ok(())
    }

    fn done(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Marked(Ok(commands)) => {
                // Without an owner there is no epoch for them: they go out once there is one.
                let owned = self
                    .desk
                    .fleet
                    .read(|state| state.owner(self.host).is_some());
                for command in commands {
                    if owned && command.generation > self.sent {
                        self.send(command)?;
                    }
                }
                // There may be more of them than go out at once.
                self.keep_next();
                if self.work.is_none() {
                    self.look()?;
                }
            }
            // The next tick looks at the queue again.
            Done::Marked(Err(error)) => {
                tracing::warn!(host = %self.host, %error, "commands cannot be marked as sent");
                self.keep_next();
            }
            Done::Kept(outcome, Ok(())) => {
                // Told by its number alone: for one that merely began, the word could meet the end
                // of it on the host, which would then forget what nobody has.
                if outcome.status.is_finished() {
                    self.writer.queue(ToHost::CommandKept(outcome.generation))?;
                }
                self.keep_next();
                if self.work.is_none() {
                    self.look()?;
                }
            }
            Done::Kept(outcome, Err(error)) => {
                // Unacknowledged, the host tells it again on its next link; until then it is kept
                // here and tried with the next outcome or ping.
                tracing::warn!(host = %self.host, %error, "a command's outcome cannot be kept");
                self.outcomes.push_front(outcome);
            }
        }
        Ok(())
    }

    /// Begins to keep the next outcome, where nothing else is under way.
    fn keep_next(&mut self) {
        if self.work.is_none()
            && let Some(outcome) = self.outcomes.pop_front()
        {
            let (commands, host) = (self.desk.commands().clone(), self.host);
            self.work = Some(Box::pin(async move {
                let kept = commands.keep(host, outcome.clone()).await;
                Done::Kept(outcome, kept)
            }));
        }
    }

    fn take(&mut self, message: FromHost) -> Result<Option<End>> {
        self.tokens -= 1.0;
        self.heard = Instant::now();
        let clock = self.desk.fleet.clock();
        self.live.heard(clock.monotonic(), clock.now());
        match message {
            FromHost::Ping(number) => self.writer.queue(ToHost::Pong(number))?,
            FromHost::Pong(number) => {
                if let Some((_, at)) = self.pinged.take_if(|(sent, _)| *sent == number) {
                    self.live.set_round_trip(at.elapsed());
                }
            }
            FromHost::Heartbeat(beat) => {
                self.desk.counters.heartbeat();
                let (sequence, received_at) = (beat.sequence, self.desk.fleet.clock().now());
                let want_full = self.report(*beat);
                self.writer.queue(ToHost::HeartbeatReply {
                    sequence,
                    want_full,
                    received_at,
                })?;
            }
            FromHost::Outcome(outcome) => {
                self.outcomes.push_back(*outcome);
                self.keep_next();
            }
            FromHost::Goodbye { code, message } => {
                return Ok(Some(End::Host(format!("{code}: {message}"))));
            }
            FromHost::Hello(_) => {
                return Ok(Some(End::Goodbye(Goodbye::new(
                    "protocol_error",
                    "there is one hello in a link",
                ))));
            }
        }
        Ok(None)
    }

    /// Takes a heartbeat in; says whether the next one has to be full.
    fn report(&mut self, beat: HostHeartbeat) -> bool {
        let same = self.based && !beat.full && beat.vms.is_empty() && beat.removed.is_empty();
        let known = self.desk.fleet.inventory(self.host);
        let mut vms = match &known {
            // Of a link that began with a change nobody knows what it changed.
            Some(known) if !beat.full => known.vms.clone(),
            _ => ToldVms::default(),
        };
        let mut want_full = !beat.full && !self.based;
        if !want_full && !same {
            for id in &beat.removed {
                vms.remove(id);
            }
            for vm in beat.vms {
                if vms.len() >= MOST_VMS && !vms.contains_key(&vm.id) {
                    break;
                }
                let vm = self.own(vm);
                vms.insert(vm.id, vm);
            }
        }
        if same {
            want_full = self.trusts_digest && beat.digest != self.digest;
        } else if !want_full {
            let agrees = (self.desk.options.digest)(&vms) == beat.digest;
            if beat.full {
                self.based = true;
                self.trusts_digest = agrees;
                if !agrees {
                    tracing::debug!(host = %self.host, "what the host says was cleaned; its digest is not looked at");
                }
            } else if self.trusts_digest && !agrees {
                want_full = true;
            }
            self.digest = beat.digest;
        }
        if want_full {
            self.based = false;
        }
        self.link.set_facts(beat.link);
        if let Some(addresses) = beat.direct_addresses {
            self.readdressed(addresses);
        }
        if let Some(facts) = beat.facts {
            self.desk.facts_changed(self.host, facts);
        }
        let at = self.desk.fleet.clock().now();
        let inventory = Inventory {
            vms,
            total: beat.total,
            allocatable: beat.allocatable,
            committed: beat.committed,
            memory_available: beat.memory_available,
            load_one_minute: beat.load_one_minute,
            health: beat.health,
            at,
        };
        self.desk.fleet.set_inventory(self.host, inventory);
        self.desk.keeper.dirty(self.host);
        want_full
    }

    /// The host can be dialled at other addresses than before. Calls that are under way over the
    /// direct way that there is go on as long as it bears them.
    fn readdressed(&self, addresses: Vec<(String, String)>) {
        self.link.set_direct_addresses(addresses.clone());
        // A newer link said so itself.
        if let (Some(directs), false) = (self.desk.directs.get(), self.link.is_followed()) {
            directs.linked(&self.tenant, self.host, addresses);
        }
    }

    /// A host says who owns its VMs; of another tenant's people it has nothing to say, whose quota
    /// that would count for.
    fn own(&self, mut vm: VmSummary) -> VmSummary {
        let foreign = vm.owner.as_deref().is_some_and(|owner| {
            owner
                .split_once('/')
                .is_some_and(|(tenant, _)| tenant != self.tenant.as_str())
        });
        if foreign {
            vm.owner = None;
        }
        vm
    }
}

async fn poll_work(work: &mut Option<Work>) -> Done {
    match work {
        Some(work) => work.as_mut().await,
        None => std::future::pending().await,
    }
}

/// The digest over a host's VMs, by the wire's rules.
pub type Digest = fn(&BTreeMap<VmId, VmSummary>) -> u64;
