//! The hostile guest: what the agent of a VM's owner would have to endure if that owner were an
//! attacker, one [`Behaviour`] at a time, over any byte channel. It plays both in real guests, on
//! their virtio-serial port, and outside of them, on a socket as QEMU offers it.
//!
//! It knows the protocol and greets properly where that lets it do more harm.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use ghost_proto::guest::frame::{self, Decoder, Found, MAGIC, MOST_PAYLOAD};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, AgentReady, ExecuteResponse, Stream, StreamData, Telemetry, WindowUpdate,
    execute_response, telemetry,
};

/// What it does. All but the last few go on at line rate until the host hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Bytes that are no frames.
    Garbage,
    /// Frames whose checksum is wrong, each claiming to be as long as one may be: the host is made
    /// to sum up a megabyte for every twelve bytes.
    FalseFrames,
    /// Lengths of 4 GiB.
    Oversize,
    /// Whole frames that hold no message.
    Malformed,
    /// Messages that hold nothing.
    Empty,
    /// Reports without end.
    Telemetry,
    /// Answers to calls that never were.
    Unknown,
    /// Messages of sessions that never were.
    Stale,
    /// An agent that starts anew all the time.
    Restarts,
    /// Output of every program far beyond the window.
    Overrun,
    /// Answers that belong to other requests.
    WrongAnswer,
    /// Grants of 2⁶⁴ bytes, again and again, for every call.
    Grants,
    /// Output in pieces of one byte, within the window, as fast as it is read.
    OneByte,
    /// A frame of which a byte comes now and then.
    Drip,
    /// Reads everything and answers nothing.
    NeverAnswer,
    /// Reads nothing after its greeting.
    NeverRead,
    /// NaN, 2⁶⁴, escape sequences and endless lists, in reports at the pace that is asked for.
    Lies,
}

impl Behaviour {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Garbage,
        Self::FalseFrames,
        Self::Oversize,
        Self::Malformed,
        Self::Empty,
        Self::Telemetry,
        Self::Unknown,
        Self::Stale,
        Self::Restarts,
        Self::Overrun,
        Self::WrongAnswer,
        Self::Grants,
        Self::OneByte,
        Self::Drip,
        Self::NeverAnswer,
        Self::NeverRead,
        Self::Lies,
    ];

    /// Its name on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Garbage => "garbage",
            Self::FalseFrames => "false-frames",
            Self::Oversize => "oversize",
            Self::Malformed => "malformed",
            Self::Empty => "empty",
            Self::Telemetry => "telemetry",
            Self::Unknown => "unknown",
            Self::Stale => "stale",
            Self::Restarts => "restarts",
            Self::Overrun => "overrun",
            Self::WrongAnswer => "wrong-answer",
            Self::Grants => "grants",
            Self::OneByte => "one-byte",
            Self::Drip => "drip",
            Self::NeverAnswer => "never-answer",
            Self::NeverRead => "never-read",
            Self::Lies => "lies",
        }
    }

    /// The one of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == name)
    }
}

/// In a plan: the processor is used and the channel left alone. What such a guest costs the others is
/// no fault of the host's agent, and what the behaviours are compared with.
pub const BURN: &str = "burn";

/// What drives a terminal, breaks a line, turns text around, or is longer than anything.
pub const NASTY: &str =
    "\x1b[2J\x1b]0;owned\x07\r\n\u{202e}%n%s'; DROP TABLE vms; --\u{9b}31m<script>\0\u{fffd}";

/// What is known of the host's side.
#[derive(Default)]
struct Heard {
    session: Vec<u8>,
    /// Calls that run, each answered as having started.
    running: Vec<Vec<u8>>,
    /// What the host has granted for the first of them.
    granted: u64,
}

/// One connection's worth of it; returns how many bytes were sent when the host hung up, or `stop`
/// was set.
///
/// # Errors
/// What the channel says, a host that hung up aside.
pub fn attack(channel: File, behaviour: Behaviour, stop: &AtomicBool) -> io::Result<u64> {
    let heard = Arc::new(Mutex::new(Heard::default()));
    let gone = Arc::new(AtomicBool::new(false));
    let instance = u64::from(std::process::id());
    let mut attacker = Attacker {
        channel: channel.try_clone()?,
        behaviour,
        heard: Arc::clone(&heard),
        instance,
        sent: 0,
    };
    let mut reader = Listener {
        channel,
        behaviour,
        heard,
        instance,
        gone: Arc::clone(&gone),
    };
    std::thread::spawn(move || reader.run());
    let ended = |gone: &AtomicBool| gone.load(Ordering::Relaxed) || stop.load(Ordering::Relaxed);
    let opened = Instant::now();
    let mut announced = false;
    while !ended(&gone) && attacker.session().is_empty() && behaviour != Behaviour::Garbage {
        // A host that has greeted somebody before us on this connection does so again for who says
        // that it is new.
        if !announced && opened.elapsed() > Duration::from_millis(200) {
            announced = true;
            let ready = Payload::AgentReady(ready(attacker.instance));
            attacker.write(&encode(&message(&[], &[], ready)))?;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    attacker.sent = 0;
    while !ended(&gone) {
        match attacker.turn() {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(attacker.sent)
}

fn lock(heard: &Mutex<Heard>) -> std::sync::MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn encode(message: &AgentMessage) -> Vec<u8> {
    let mut out = BytesMut::new();
    // Too long for a frame is what this program would send otherwise.
    let _ = frame::encode(message, &mut out);
    out.to_vec()
}

fn message(session: &[u8], id: &[u8], payload: Payload) -> AgentMessage {
    AgentMessage {
        message_id: id.to_vec(),
        session: session.to_vec(),
        timestamp: None,
        payload: Some(payload),
    }
}

fn ready(instance: u64) -> AgentReady {
    AgentReady {
        protocol_version: 1,
        oldest_version: 1,
        newest_version: 1,
        agent_version: NASTY.repeat(100),
        capabilities: ["exec", "files", "telemetry", NASTY]
            .repeat(50)
            .into_iter()
            .map(str::to_owned)
            .collect(),
        boot_id: "boot".to_owned(),
        instance: instance.to_be_bytes().to_vec(),
        operating_system: NASTY.repeat(1000),
        kernel: NASTY.to_owned(),
        hostname: NASTY.to_owned(),
        architecture: NASTY.to_owned(),
        program_sha256: vec![0; 100_000],
    }
}

fn data(bytes: Vec<u8>) -> Payload {
    Payload::StreamData(StreamData {
        stream: Stream::Stdout.into(),
        data: bytes.into(),
        end: false,
    })
}

fn event(event: execute_response::Event) -> Payload {
    Payload::ExecuteResponse(ExecuteResponse { event: Some(event) })
}

fn lies() -> Telemetry {
    let nasty = NASTY.repeat(5);
    Telemetry {
        cpu: Some(telemetry::CpuTimes {
            user: f64::NAN,
            system: f64::INFINITY,
            idle: f64::NEG_INFINITY,
            ..Default::default()
        }),
        cpu_percent: f64::NAN,
        cpus: u32::MAX,
        memory_total_bytes: u64::MAX,
        memory_available_bytes: u64::MAX,
        load_1: f64::MAX,
        load_5: f64::NAN,
        filesystems: vec![
            telemetry::Filesystem {
                mount_point: nasty.clone(),
                kind: nasty.clone(),
                total_bytes: u64::MAX,
                available_bytes: u64::MAX,
            };
            100
        ],
        interfaces: vec![
            telemetry::Interface {
                name: nasty.clone(),
                mac: nasty.clone(),
                addresses: vec![nasty.clone(); 20],
                receive_bytes: u64::MAX,
                transmit_bytes: u64::MAX,
            };
            20
        ],
        users: vec![nasty.clone(); 50],
        cloud_init: Some(telemetry::CloudInit {
            status: nasty.clone(),
            stage: nasty.clone(),
            errors: vec![nasty; 20],
        }),
        uptime_seconds: f64::NAN,
        ..Default::default()
    }
}

struct Attacker {
    channel: File,
    behaviour: Behaviour,
    heard: Arc<Mutex<Heard>>,
    /// Tells one process from another.
    instance: u64,
    sent: u64,
}

impl Attacker {
    fn session(&self) -> Vec<u8> {
        lock(&self.heard).session.clone()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.channel.write_all(bytes)?;
        self.sent += bytes.len() as u64;
        Ok(())
    }

    /// Sends a message so often at once that the channel is kept full.
    fn flood(&mut self, id: &[u8], session: &[u8], payload: Payload) -> io::Result<()> {
        let one = encode(&message(session, id, payload));
        let many = one.repeat((64 * 1024 / one.len()).max(1));
        self.write(&many)
    }

    /// One piece of the attack.
    fn turn(&mut self) -> io::Result<()> {
        let session = self.session();
        let call = lock(&self.heard).running.first().cloned();
        let pause = Duration::from_millis(5);
        match self.behaviour {
            Behaviour::Garbage => self.write(&[b'A'; 64 * 1024]),
            Behaviour::FalseFrames => {
                let length = u32::try_from(MOST_PAYLOAD).unwrap_or(u32::MAX);
                let mut one = MAGIC.to_vec();
                one.extend_from_slice(&length.to_be_bytes());
                one.extend_from_slice(&[0; 4]);
                self.write(&one.repeat(5000))
            }
            Behaviour::Oversize => {
                let mut one = MAGIC.to_vec();
                one.extend_from_slice(&u32::MAX.to_be_bytes());
                one.extend_from_slice(&[0; 4]);
                self.write(&one.repeat(5000))
            }
            Behaviour::Malformed => {
                // Field 1 claims more bytes than there are.
                let frame = raw_frame(&[0x0a, 0xff, 0xff, 0x03, 0x00]);
                self.write(&frame.repeat(1000))
            }
            Behaviour::Empty => {
                let one = encode(&AgentMessage {
                    session,
                    ..AgentMessage::default()
                });
                self.write(&one.repeat(1000))
            }
            Behaviour::Telemetry => self.flood(&[], &session, Payload::Telemetry(lies())),
            Behaviour::Unknown => {
                let exited = event(execute_response::Event::Exited(Default::default()));
                self.flood(&[9; 16], &session, exited)
            }
            Behaviour::Stale => {
                let exited = event(execute_response::Event::Exited(Default::default()));
                self.flood(&[9; 16], &[8; 16], exited)
            }
            Behaviour::Restarts => {
                let one = encode(&message(
                    &[],
                    &[],
                    Payload::AgentReady(AgentReady {
                        instance: self.sent.to_be_bytes().to_vec(),
                        ..AgentReady::default()
                    }),
                ));
                self.write(&one)
            }
            Behaviour::Overrun => match call {
                Some(call) => self.flood(&call, &session, data(vec![b'x'; 64 * 1024])),
                None => rest(pause),
            },
            Behaviour::WrongAnswer => match call {
                Some(call) => {
                    let telemetry = Payload::Telemetry(Telemetry::default());
                    self.flood(&call, &session, telemetry)
                }
                None => rest(pause),
            },
            Behaviour::Grants => match call {
                Some(call) => self.flood(
                    &call,
                    &session,
                    Payload::WindowUpdate(WindowUpdate {
                        stream: Stream::Stdin.into(),
                        bytes: u64::MAX,
                    }),
                ),
                None => rest(pause),
            },
            Behaviour::OneByte => match call {
                Some(call) => {
                    let one = encode(&message(&session, &call, data(vec![b'x'])));
                    let allowed = lock(&self.heard).granted.min(1000);
                    if allowed == 0 {
                        return rest(Duration::from_millis(1));
                    }
                    lock(&self.heard).granted -= allowed;
                    let count = usize::try_from(allowed).unwrap_or(0);
                    self.write(&one.repeat(count))
                }
                None => rest(pause),
            },
            Behaviour::Drip => {
                if self.sent == 0 {
                    let mut begin = MAGIC.to_vec();
                    begin.extend_from_slice(&1_000_000u32.to_be_bytes());
                    begin.extend_from_slice(&[0; 4]);
                    return self.write(&begin);
                }
                self.write(b"x")?;
                rest(pause)
            }
            Behaviour::NeverAnswer | Behaviour::NeverRead => rest(pause),
            Behaviour::Lies => {
                let frame = encode(&message(&session, &[], Payload::Telemetry(lies())));
                self.write(&frame)?;
                rest(Duration::from_millis(1100))
            }
        }
    }
}

#[expect(clippy::unnecessary_wraps, reason = "stands among turns that can fail")]
fn rest(duration: Duration) -> io::Result<()> {
    std::thread::sleep(duration);
    Ok(())
}

/// A frame of any bytes.
pub fn raw_frame(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    let sum = crc32c::crc32c_append(crc32c::crc32c(&length), payload);
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&sum.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Hears the host and answers what lets the attack go on.
struct Listener {
    channel: File,
    behaviour: Behaviour,
    heard: Arc<Mutex<Heard>>,
    instance: u64,
    gone: Arc<AtomicBool>,
}

impl Listener {
    fn run(&mut self) {
        let mut decoder = Decoder::new();
        let mut piece = vec![0; 64 * 1024];
        let greeted = Instant::now();
        loop {
            match self.channel.read(&mut piece) {
                Ok(0) | Err(_) => break,
                Ok(count) => decoder.push(&piece[..count]),
            }
            while let Some(found) = decoder.next() {
                if let Found::Message(message) = found
                    && self.take(*message).is_err()
                {
                    self.gone.store(true, Ordering::Relaxed);
                    return;
                }
            }
            if self.behaviour == Behaviour::NeverRead && !lock(&self.heard).session.is_empty() {
                // The thread stays, and with it the channel.
                while greeted.elapsed() < Duration::from_secs(600) {
                    std::thread::sleep(Duration::from_millis(100));
                    if self.gone.load(Ordering::Relaxed) {
                        break;
                    }
                }
            }
        }
        self.gone.store(true, Ordering::Relaxed);
    }

    fn take(&mut self, received: AgentMessage) -> io::Result<()> {
        match received.payload {
            Some(Payload::Hello(_)) => {
                let bytes = encode(&message(
                    &received.session,
                    &[],
                    Payload::AgentReady(ready(self.instance)),
                ));
                self.channel.write_all(&bytes)?;
                let mut heard = lock(&self.heard);
                heard.session = received.session;
                heard.running.clear();
            }
            Some(Payload::Execute(_)) if self.behaviour != Behaviour::NeverAnswer => {
                let started = event(execute_response::Event::Started(Default::default()));
                let bytes = encode(&message(&received.session, &received.message_id, started));
                self.channel.write_all(&bytes)?;
                let mut heard = lock(&self.heard);
                heard.granted = ghost_proto::guest::Flow::STREAM.window;
                heard.running.insert(0, received.message_id);
            }
            Some(Payload::WindowUpdate(update)) => {
                lock(&self.heard).granted += update.bytes;
            }
            Some(Payload::Cancel(_)) if self.behaviour != Behaviour::NeverAnswer => {
                lock(&self.heard)
                    .running
                    .retain(|call| *call != received.message_id);
            }
            _ => {}
        }
        Ok(())
    }
}
