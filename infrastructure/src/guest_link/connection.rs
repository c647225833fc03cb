//! One connection to a VM's channel: reading, sorting, timing, and holding the guest to the rules.
//!
//! # What one guest can cost
//! - memory: a frame and a piece of the next (at most 2.5 MiB with the buffer's growth), 0.5 MiB
//!   that wait to be sent, 6 MiB of output that nobody has read yet (12 with their buffers' slack),
//!   and two reports: below 16 MiB;
//! - time: [`FRAMES`] and [`GARBAGE`] are what is looked at in a second; beyond it the link pauses,
//!   the socket fills and QEMU stops reading the guest. After every few frames other tasks run;
//! - nothing of what it sends is kept or told without a bound of its own: messages that belong to
//!   no call ([`CONTROL`]), reports, late answers, answers to nobody. What goes beyond is dropped
//!   and counts as broken rules; with the third the guest is disconnected and held off.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use ghost_domain::ports::GuestEvent;
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{AgentMessage, AgentReady, Hello, Ping};
use ghost_proto::guest::{NEWEST_VERSION, OLDEST_VERSION};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::call::{CallId, Violation, Worth};
use super::clean;
use super::link::Link;
use super::pace::Bucket;
use super::session::{Recipient, Session, random_id, unreachable};
use super::wire::Wire;

/// Frames: so many at once and in a second.
const FRAMES: (f64, f64) = (4_000.0, 20_000.0);
/// Bytes of no frame.
const GARBAGE: (f64, f64) = (2_097_152.0, 65_536.0);
/// Frames that were none: their checksum was computed for nothing.
const FALSE_FRAMES: (f64, f64) = (8.0, 1.0);
/// Messages that belong to no call.
const CONTROL: (f64, f64) = (100.0, 50.0);
/// Reports.
const REPORTS: (f64, f64) = (4.0, 1.0);
/// Messages for calls or sessions that have ended. What fills the buffers on the way when a call is
/// cut is no offence, even where a program has written byte by byte.
const STALE: (f64, f64) = (16_000.0, 500.0);
/// Messages for calls that never were.
const UNKNOWN: (f64, f64) = (8.0, 0.2);
/// Broken rules: the third within a short time ends the connection.
const VIOLATIONS: (f64, f64) = (2.0, 1.0 / 60.0);

/// Frames after which others have their turn.
const BATCH: usize = 32;
/// Room for the first read; it doubles while reads fill it, up to the second.
const CHUNK: (usize, usize) = (4 * 1024, 256 * 1024);
/// Greetings without a byte in return, at growing distances (50 s in all): the connection is made
/// anew. A port that was disconnected in the midst of a flood can be left without a voice, and QEMU
/// resets it with the next disconnection only. Where that does not help either, as with a guest that
/// is paused, it is tried less and less often: twice as many greetings each time, up to the second.
const UNHEARD: (u32, u32) = (4, 64);
/// The same after a flood, where that is likely (15 s).
const UNHEARD_AFTER_FLOOD: u32 = 2;
/// An empty buffer larger than the smallest read is given back after this.
const IDLE: Duration = Duration::from_secs(1);

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum Ended {
    Lost(String),
    /// Not a byte has come for a long time.
    Mute,
    Misbehaved(String),
}

#[derive(Debug)]
pub(super) struct Connection {
    link: Arc<Link>,
    wire: Arc<Wire>,
    decoder: Decoder,
    chunk: usize,
    /// The session of the greeting that was sent last.
    greeting: [u8; 16],
    greeted_at: Instant,
    /// Greetings since anything came.
    unheard: u32,
    session: Option<Arc<Session>>,
    has_greeted: bool,
    /// When anything sound came last.
    heard: Instant,
    ping: Option<Instant>,
    ping_id: CallId,
    /// Since when a frame waits for its rest.
    partial: Option<Instant>,
    read_at: Instant,
    /// Whoever took it keeps the channel: it is not closed with this.
    kept: bool,
    /// Nothing is read before this.
    paused: Option<Instant>,
    /// The decoder may hold whole frames.
    unfinished: bool,
    frames: Bucket,
    garbage: Bucket,
    false_frames: Bucket,
    control: Bucket,
    reports: Bucket,
    stale: Bucket,
    unknown: Bucket,
    violations: Bucket,
}

fn bucket((burst, per_second): (f64, f64)) -> Bucket {
    Bucket::new(burst, per_second)
}

impl Connection {
    pub(super) fn new(link: Arc<Link>, stream: UnixStream) -> Self {
        let now = Instant::now();
        Self {
            link,
            wire: Arc::new(Wire::new(stream)),
            decoder: Decoder::new(),
            chunk: CHUNK.0,
            greeting: [0; 16],
            greeted_at: now,
            unheard: 0,
            session: None,
            has_greeted: false,
            heard: now,
            ping: None,
            ping_id: random_id(),
            partial: None,
            read_at: now,
            kept: false,
            paused: None,
            unfinished: false,
            frames: bucket(FRAMES),
            garbage: bucket(GARBAGE),
            false_frames: bucket(FALSE_FRAMES),
            control: bucket(CONTROL),
            reports: bucket(REPORTS),
            stale: bucket(STALE),
            unknown: bucket(UNKNOWN),
            violations: bucket(VIOLATIONS),
        }
    }

    /// Whether an agent greeted on it.
    pub(super) fn has_greeted(&self) -> bool {
        self.has_greeted
    }

    /// Ends it and keeps the channel as it is: nothing is sent any more, and nothing read.
    pub(super) fn keep(mut self) -> Arc<Wire> {
        self.kept = true;
        self.wire.end();
        Arc::clone(&self.wire)
    }

    /// Serves it to its end.
    pub(super) async fn run(&mut self) -> Ended {
        self.greet(Instant::now());
        loop {
            match self.turn().await {
                Ok(()) => {}
                Err(ended) => return ended,
            }
        }
    }

    async fn turn(&mut self) -> Result<(), Ended> {
        let now = Instant::now();
        let next = self.keep_time(now)?;
        if self.paused.is_some_and(|until| until <= now) {
            self.paused = None;
        }
        if self.paused.is_none() && self.unfinished {
            self.sort(now)?;
            tokio::task::yield_now().await;
            return Ok(());
        }
        if self.wire.is_broken() {
            return Err(Ended::Lost("QEMU closed the channel".to_owned()));
        }
        let reading = self.paused.is_none();
        let writing = self.wire.is_blocked();
        let interest = match (reading, writing) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        };
        let wire = Arc::clone(&self.wire);
        let ready = async {
            match interest {
                Some(interest) => wire.stream.ready(interest).await,
                None => std::future::pending().await,
            }
        };
        let until = self.paused.map_or(next, |paused| paused.min(next));
        tokio::select! {
            ready = ready => {
                let ready = ready.map_err(|error| lost(&error))?;
                if ready.is_writable() || ready.is_write_closed() {
                    self.wire.resume();
                }
                if reading && (ready.is_readable() || ready.is_read_closed()) {
                    self.read()?;
                    self.sort(Instant::now())?;
                }
            }
            () = self.wire.blocked.notified() => {}
            () = tokio::time::sleep_until(until) => {}
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), Ended> {
        let chunk = self.chunk;
        let buffer = self.decoder.buffer();
        if buffer.capacity() - buffer.len() < chunk {
            buffer.reserve(chunk);
        }
        let room = buffer.capacity() - buffer.len();
        match self.wire.stream.try_read_buf(buffer) {
            Ok(0) => Err(Ended::Lost("QEMU closed the channel".to_owned())),
            Ok(count) => {
                if count >= room.min(chunk) {
                    self.chunk = (chunk * 2).min(CHUNK.1);
                }
                self.read_at = Instant::now();
                if self.unheard > 0 {
                    self.unheard = 0;
                    let mut memory = self.link.memory.lock();
                    memory.mutes = 0;
                    memory.flooded = false;
                    drop(memory);
                    self.link.status.lock().mute_connections = 0;
                }
                self.unfinished = true;
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(lost(&error)),
        }
    }

    /// Takes a batch of what was read.
    fn sort(&mut self, now: Instant) -> Result<(), Ended> {
        for _ in 0..BATCH {
            let at_magic = frame::begins(self.decoder.buffer());
            let Some(found) = self.decoder.next() else {
                self.unfinished = false;
                break;
            };
            match found {
                Found::Message(message) => {
                    self.partial = None;
                    self.spend(now, 1.0);
                    self.take(now, *message)?;
                }
                Found::Malformed => {
                    self.partial = None;
                    self.spend(now, 1.0);
                    self.violation(now, Violation::new("a frame that holds no message"))?;
                }
                Found::Garbage(bytes) => self.garbage(now, bytes, at_magic)?,
            }
            if self.paused.is_some() {
                break;
            }
        }
        if self.decoder.is_waiting() {
            self.partial.get_or_insert(now);
        } else {
            self.partial = None;
        }
        Ok(())
    }

    fn spend(&mut self, now: Instant, count: f64) {
        if let Some(pause) = self.frames.spend(now, count) {
            self.paused = Some(now + pause);
        }
    }

    fn garbage(&mut self, now: Instant, bytes: usize, false_frame: bool) -> Result<(), Ended> {
        #[expect(clippy::cast_precision_loss, reason = "at most the size of a buffer")]
        let count = bytes as f64;
        // A checksum over a megabyte that leads to nothing is what costs.
        self.spend(now, if false_frame { 100.0 } else { 1.0 });
        if let Some(session) = &self.session
            && session.running() > 0
        {
            // The channel itself loses nothing: what is cut here may be part of some output, and
            // a reader must not take the rest for all of it.
            session.cut(&unreachable("bytes were lost on the way from the guest"));
        }
        if false_frame && !self.false_frames.take(now, 1.0) {
            return self.violation(now, Violation::new("frames whose checksum is wrong"));
        }
        if !self.garbage.take(now, count) {
            return self.violation(now, Violation::new("bytes that belong to no frame"));
        }
        Ok(())
    }

    fn violation(&mut self, now: Instant, violation: Violation) -> Result<(), Ended> {
        let Violation(what) = violation;
        {
            let mut status = self.link.status.lock();
            status.violations = status.violations.saturating_add(1);
        }
        tracing::debug!(vm_id = %self.link.vm, what, "a guest broke a rule of the protocol");
        if self.violations.take(now, 1.0) {
            Ok(())
        } else {
            Err(Ended::Misbehaved(what))
        }
    }

    /// Drops a message, which is a broken rule where there are too many of its kind.
    fn drop_unless(&mut self, now: Instant, within: bool, what: &str) -> Result<(), Ended> {
        if within {
            Ok(())
        } else {
            self.violation(now, Violation::new(what))
        }
    }

    fn take(&mut self, now: Instant, message: AgentMessage) -> Result<(), Ended> {
        let AgentMessage {
            message_id,
            session,
            payload,
            timestamp: _,
        } = message;
        let Some(payload) = payload else {
            // A newer agent may send what this host does not know.
            let within = self.control.take(now, 1.0);
            return self.drop_unless(now, within, "a flood of messages that hold nothing");
        };
        if let Payload::AgentReady(ready) = payload {
            let within = self.control.take(now, 1.0);
            self.drop_unless(now, within, "a flood of greetings")?;
            return if within {
                self.ready(now, &session, &ready)
            } else {
                Ok(())
            };
        }
        let current = match &self.session {
            Some(current) if session == current.id => Arc::clone(current),
            _ => {
                let within = self.stale.take(now, 1.0);
                return self.drop_unless(now, within, "a flood of messages of another session");
            }
        };
        self.heard(now);
        if message_id.is_empty() {
            return self.unasked(now, payload);
        }
        if message_id == self.ping_id {
            self.ping = None;
            let within = self.control.take(now, 1.0);
            return self.drop_unless(now, within, "a flood of answers to a ping");
        }
        match current.recipient(&message_id) {
            Recipient::Call(call) => match call.deliver(payload) {
                Ok(Worth::Good) => {
                    current.relieve();
                    Ok(())
                }
                Ok(Worth::Idle) => {
                    let within = self.control.take(now, 1.0);
                    self.drop_unless(now, within, "a flood of messages that carry nothing")
                }
                Ok(Worth::Stale) => {
                    let within = self.stale.take(now, 1.0);
                    self.drop_unless(now, within, "a flood of late answers")
                }
                Err(violation) => {
                    // What it says of this call cannot be trusted any more.
                    current.remove(call.id);
                    call.cut(&super::call::nonsense().because(&violation.0));
                    self.violation(now, violation)
                }
            },
            Recipient::Ended => {
                let within = self.stale.take(now, 1.0);
                self.drop_unless(now, within, "a flood of late answers")
            }
            Recipient::Unknown => {
                let within = self.unknown.take(now, 1.0);
                self.drop_unless(now, within, "answers to calls that never were")
            }
        }
    }

    /// A message of the session that belongs to no call.
    fn unasked(&mut self, now: Instant, payload: Payload) -> Result<(), Ended> {
        let within = self.control.take(now, 1.0);
        self.drop_unless(now, within, "a flood of messages that nobody asked for")?;
        if let Payload::Telemetry(report) = payload
            && within
            && self.reports.take(now, 1.0)
        {
            self.link.shared.events.tell(&GuestEvent::Telemetry {
                vm: self.link.vm,
                report: Box::new(clean::telemetry(&report)),
            });
        }
        Ok(())
    }

    fn heard(&mut self, now: Instant) {
        self.heard = now;
        let mut status = self.link.status.lock();
        status.last_seen = Some(self.link.shared.clock.monotonic());
        status.silent_since = None;
    }

    /// Greets, in a session of its own: what is of an earlier one is told apart by that.
    fn greet(&mut self, now: Instant) {
        self.greeting = random_id();
        self.send_greeting(now);
    }

    fn send_greeting(&mut self, now: Instant) {
        let shared = &self.link.shared;
        self.greeted_at = now;
        self.unheard = self.unheard.saturating_add(1);
        self.wire.send_short(&AgentMessage {
            message_id: Vec::new(),
            session: self.greeting.to_vec(),
            timestamp: None,
            payload: Some(Payload::Hello(Hello {
                oldest_version: OLDEST_VERSION,
                newest_version: NEWEST_VERSION,
                host_version: shared.host_version.clone(),
                telemetry_interval: shared
                    .telemetry_interval
                    .and_then(|interval| interval.try_into().ok()),
                capabilities: Vec::new(),
            })),
        });
    }

    fn ready(&mut self, now: Instant, session: &[u8], ready: &AgentReady) -> Result<(), Ended> {
        if session == self.greeting {
            match &self.session {
                // A repeated greeting was answered too.
                Some(current) if current.instance == instance(ready) => {
                    self.heard(now);
                    return Ok(());
                }
                // Another process answers: the one before is gone.
                Some(_) => {}
                None => {
                    self.connected(now, ready);
                    return Ok(());
                }
            }
        } else if !session.is_empty() {
            let within = self.stale.take(now, 1.0);
            return self.drop_unless(now, within, "a flood of greetings of other sessions");
        }
        // The port was opened anew.
        let within = self.link.memory.lock().restarts.take(now, 1.0);
        self.drop_unless(now, within, "an agent that starts again and again")?;
        if within {
            let known = self.link.memory.lock().boot_id.clone();
            let rebooted = known.is_some_and(|known| known != clean::text(&ready.boot_id, 64));
            self.end_session(if rebooted {
                "the guest was restarted"
            } else {
                "the agent in the guest was restarted"
            });
            self.greet(now);
        }
        Ok(())
    }

    fn connected(&mut self, now: Instant, ready: &AgentReady) {
        let link = Arc::clone(&self.link);
        let hello = clean::hello(ready);
        let before = link.memory.lock().boot_id.replace(hello.boot_id.clone());
        let rebooted = before.is_some_and(|before| before != hello.boot_id);
        let session = Arc::new(Session::new(
            self.greeting,
            instance(ready).to_vec(),
            hello.clone(),
            Arc::clone(&self.wire),
            Arc::clone(&link.shared.locked),
        ));
        self.ping = None;
        self.has_greeted = true;
        self.heard(now);
        link.status.lock().connected_at = Some(link.shared.clock.now());
        tracing::info!(vm_id = %link.vm, agent_version = hello.agent_version, rebooted, "the guest's agent said hello");
        self.session = Some(Arc::clone(&session));
        link.session.send_replace(Some(session));
        // A link that was stopped in between has no session that could outlive it.
        if link.stop.is_cancelled() {
            link.end_session("the link was ended");
        }
        link.shared.events.tell(&GuestEvent::Connected {
            vm: link.vm,
            hello,
            rebooted,
        });
    }

    fn end_session(&mut self, reason: &str) {
        self.session = None;
        self.ping = None;
        self.link.end_session(reason);
    }

    /// Does what is due and says when something is due again.
    fn keep_time(&mut self, now: Instant) -> Result<Instant, Ended> {
        let limits = self.link.shared.limits.clone();
        if let Some(since) = self.partial
            && now >= since + limits.partial_frame
        {
            self.partial = Some(now);
            self.violation(now, Violation::new("a frame that does not come to its end"))?;
        }
        let mut next = match &self.session {
            Some(_) => self.listen(now, &limits),
            None => {
                let again = self.greeted_at + limits.greet_again * self.unheard.clamp(1, 6);
                if now >= again && self.is_mute() {
                    return Err(Ended::Mute);
                }
                if now >= again && !self.wire.is_blocked() {
                    self.send_greeting(now);
                    now + limits.greet_again
                } else {
                    again.max(now + limits.greet_again / 4)
                }
            }
        };
        if let Some(since) = self.partial {
            next = next.min(since + limits.partial_frame);
        }
        if self.chunk > CHUNK.0 && !self.decoder.is_waiting() {
            if now >= self.read_at + IDLE {
                *self.decoder.buffer() = BytesMut::new();
                self.chunk = CHUNK.0;
            } else {
                next = next.min(self.read_at + IDLE);
            }
        }
        Ok(next)
    }

    fn is_mute(&self) -> bool {
        if self.unheard < UNHEARD_AFTER_FLOOD {
            return false;
        }
        let mut memory = self.link.memory.lock();
        let (usual, most) = UNHEARD;
        let first = if memory.flooded {
            UNHEARD_AFTER_FLOOD
        } else {
            usual
        };
        if self.unheard < first.saturating_mul(1 << memory.mutes.min(16)).min(most) {
            return false;
        }
        memory.mutes += 1;
        self.link.status.lock().mute_connections = memory.mutes;
        true
    }

    /// Asks a guest that says nothing whether it is there.
    fn listen(&mut self, now: Instant, limits: &super::LinkLimits) -> Instant {
        match self.ping {
            Some(sent) if self.heard > sent => {
                // It said something else: it is there.
                self.ping = None;
                self.heard + limits.ping_after
            }
            Some(sent) if now >= sent + limits.silence => {
                {
                    let mut status = self.link.status.lock();
                    status.silent_since = status.last_seen;
                }
                self.end_session("the guest fell silent");
                self.greet(now);
                now + limits.greet_again
            }
            Some(sent) => sent + limits.silence,
            None if now >= self.heard + limits.ping_after => {
                self.ping = Some(now);
                self.ping_id = random_id();
                self.wire.send_short(&AgentMessage {
                    message_id: self.ping_id.to_vec(),
                    session: self.greeting.to_vec(),
                    timestamp: None,
                    payload: Some(Payload::Ping(Ping {
                        payload: Vec::new(),
                    })),
                });
                now + limits.silence
            }
            None => self.heard + limits.ping_after,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.kept {
            self.wire.close();
        }
    }
}

/// What tells one life of the agent from another.
fn instance(ready: &AgentReady) -> &[u8] {
    &ready.instance[..ready.instance.len().min(32)]
}

fn lost(error: &std::io::Error) -> Ended {
    Ended::Lost(format!("the channel broke: {error}"))
}
