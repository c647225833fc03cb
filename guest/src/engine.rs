//! The loop: reads frames, starts calls, moves their bytes, writes frames.
//!
//! One thread waits in `epoll_wait`, edge triggered throughout: a virtio port without a host has
//! `EPOLLHUP` set all the time, which would keep a level-triggered loop awake, while its edges come
//! when a host attaches, detaches or sends.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, AgentReady, Hello, Pong, Stream, Telemetry, shutdown_request,
};
use ghost_proto::guest::{Flow, NEWEST_VERSION, OLDEST_VERSION};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::accounts::Accounts;
use crate::calls::{Mail, Mailbox, Rules, Task, done};
use crate::exec::{Dying, Exec, Source};
use crate::freeze::Freezer;
use crate::log::say;
use crate::outbox::{CallId, Outbox, Parcel};
use crate::power::PowerMode;
use crate::telemetry::Reporter;
use crate::util::{clip, duration, random, read_bounded};
use crate::{Capability, Channel, Failure, Options, files};

/// Calls at a time, those included whose last answers were not taken yet.
pub const MOST_CALLS: usize = 64;
/// Both sides understand what the two versions before theirs said (N-2).
const _: () = assert!(NEWEST_VERSION <= OLDEST_VERSION + 2);
/// How often a port without a host is looked at, besides its edges.
const PORT_LOOK: Duration = Duration::from_secs(1);
/// Room for one read. The port gives a page at a time, a socket as much as there is.
const ROOM: usize = 64 * 1024;
/// With less room in an empty buffer a new one is had; within a frame, room for its rest is there.
const LEAST_ROOM: usize = 4096;
/// Bytes taken from the channel before calls get their turn.
const MOST_READ: usize = 512 * 1024;

const CHANNEL: u64 = u64::MAX;
const MAILBOX: u64 = u64::MAX - 1;

/// Why [`serve`] came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The stream ended, or the port went.
    Closed,
    /// An update is in place: execute the program anew.
    Updated,
}

/// The version that both sides know best: the newest common one, if there is any.
pub fn negotiate(ours: (u32, u32), theirs: (u32, u32)) -> Option<u32> {
    let newest = ours.1.min(theirs.1);
    (newest >= ours.0.max(theirs.0) && theirs.0 <= theirs.1 && newest > 0).then_some(newest)
}

/// Runs the agent over a channel until that ends. All that was started for the host is ended too.
///
/// # Errors
/// What keeps the loop itself from working: no memory or descriptors for it.
pub fn serve(channel: &Channel, options: &Options) -> io::Result<End> {
    Engine::new(channel, options)?.run()
}

enum Call {
    Exec(Box<Exec>),
    Task(Task),
}

struct Running {
    id: CallId,
    call: Call,
}

struct Engine<'a> {
    channel: &'a Channel,
    options: &'a Options,
    epoll: std::os::fd::OwnedFd,
    mailbox: Mailbox,
    decoder: Decoder,
    outbox: Outbox,
    accounts: Accounts,
    presented: AgentReady,
    offered: Vec<Capability>,

    session: Option<[u8; 16]>,
    /// How contents of files flow in this session.
    flow: Flow,
    /// Its host knows bulk frames.
    bulk: bool,
    allowed: Vec<Capability>,
    calls: BTreeMap<u32, Running>,
    serials: HashMap<CallId, u32>,
    next_serial: u32,
    dying: Vec<Dying>,
    reporter: Reporter,
    freezer: Arc<Freezer>,
    power: Option<(Instant, PowerMode)>,
    greeted: bool,

    readable: bool,
    writable: bool,
    /// A host is attached to the port.
    attached: bool,
    leaving: Option<(u32, End)>,
    /// The mailbox has something.
    mail: bool,
    dropped: u64,
    scratch: Vec<u8>,
}

impl<'a> Engine<'a> {
    fn new(channel: &'a Channel, options: &'a Options) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mailbox = Mailbox::new()?;
        let mut offered = options.capabilities.clone();
        offered.retain(|one| match one {
            Capability::Files | Capability::Links => files::is_supported(),
            Capability::Update => options.program.is_some(),
            _ => true,
        });
        let edges = epoll::EventFlags::ET | epoll::EventFlags::IN;
        epoll::add(
            &epoll,
            channel,
            epoll::EventData::new_u64(CHANNEL),
            edges | epoll::EventFlags::OUT,
        )?;
        epoll::add(&epoll, &mailbox, epoll::EventData::new_u64(MAILBOX), edges)?;
        Ok(Self {
            channel,
            options,
            epoll,
            reporter: Reporter::new(options, mailbox.clone()),
            mailbox,
            decoder: Decoder::new(),
            outbox: Outbox::default(),
            accounts: Accounts::new(&options.sysroot),
            presented: present(options, &offered)?,
            offered,
            session: None,
            flow: Flow::STREAM,
            bulk: false,
            allowed: Vec::new(),
            calls: BTreeMap::new(),
            serials: HashMap::new(),
            next_serial: 0,
            dying: Vec::new(),
            freezer: options
                .freezer
                .clone()
                .unwrap_or_else(|| Freezer::new(options)),
            power: None,
            greeted: false,
            readable: true,
            writable: true,
            attached: !channel.is_port(),
            leaving: None,
            mail: false,
            dropped: 0,
            scratch: vec![0; 64 * 1024],
        })
    }

    fn run(mut self) -> io::Result<End> {
        if self.attached {
            self.announce();
        }
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut again = false;
        loop {
            let timeout = if again {
                Some(Timespec::default())
            } else {
                self.timeout()
            };
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                self.note(event);
            }
            if !self.read()? {
                self.end_session();
                self.wait_for_dying();
                return Ok(End::Closed);
            }
            again = self.take_mail();
            again |= self.turn();
            self.tick();
            if !self.write()? {
                self.end_session();
                self.wait_for_dying();
                return Ok(End::Closed);
            }
            // What was held back by a flood or a bound is gone on with at once.
            again |= self.readable && self.attached && !self.outbox.is_flooded();
            if let Some((serial, end)) = &self.leaving
                && !self.calls.contains_key(serial)
                && self.outbox.is_empty()
            {
                let end = end.clone();
                self.end_session();
                self.wait_for_dying();
                return Ok(end);
            }
        }
    }

    fn note(&mut self, event: epoll::Event) {
        let flags = event.flags;
        let hung_up = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        let readable = flags.contains(epoll::EventFlags::IN);
        let writable = flags.contains(epoll::EventFlags::OUT);
        match event.data.u64() {
            CHANNEL => {
                self.readable |= readable || hung_up;
                self.writable |= writable;
            }
            MAILBOX => self.mail = true,
            token => {
                let Ok(serial) = u32::try_from(token >> 3) else {
                    return;
                };
                let source = usize::try_from(token & 7)
                    .ok()
                    .and_then(|at| Source::ALL.get(at));
                if let Some(Running {
                    call: Call::Exec(exec),
                    ..
                }) = self.calls.get_mut(&serial)
                    && let Some(source) = source
                {
                    exec.ready(*source, readable, writable, hung_up);
                }
            }
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        let mut wake: Option<Instant> = None;
        let mut sooner = |at: Instant| {
            wake = Some(wake.map_or(at, |known| known.min(at)));
        };
        for running in self.calls.values() {
            if let Call::Exec(exec) = &running.call {
                if let Some(at) = exec.wake_at() {
                    sooner(at);
                }
                if exec.needs_polling() {
                    sooner(now + Duration::from_millis(20));
                }
            }
        }
        if !self.dying.is_empty() {
            sooner(now + Duration::from_millis(50));
        }
        if let Some((at, _)) = self.power {
            sooner(at);
        }
        if self.session.is_some()
            && let Some(at) = self.reporter.due_at()
        {
            sooner(at);
        }
        if !self.attached {
            sooner(now + PORT_LOOK);
        }
        wake.map(|at| {
            // epoll_wait(2) counts milliseconds in 32 bits; a delay of weeks is come back to.
            let left = at
                .saturating_duration_since(now)
                .min(Duration::from_secs(3600));
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        })
    }

    /// Reads what is there; false where the channel is gone for good.
    fn read(&mut self) -> io::Result<bool> {
        if !self.attached {
            self.readable = true;
        }
        let mut taken = 0;
        while self.readable && taken < MOST_READ && !self.outbox.is_flooded() {
            match self.receive() {
                Ok(0) if self.channel.is_port() => {
                    self.readable = false;
                    if self.attached {
                        // No session outlives its host: whoever attaches next greets anew.
                        self.attached = false;
                        self.end_session();
                        self.decoder = Decoder::new();
                    }
                }
                Ok(0) => return Ok(false),
                Ok(read) => {
                    self.attach();
                    taken += read;
                    self.frames();
                }
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    self.attach();
                }
                Err(Errno::INTR) => {}
                Err(Errno::NODEV | Errno::IO | Errno::CONNRESET | Errno::NXIO) => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Reads into the decoder itself: a copy of every byte less.
    fn receive(&mut self) -> Result<usize, Errno> {
        let buffer = self.decoder.buffer();
        let room = buffer.capacity() - buffer.len();
        if room == 0 || (buffer.is_empty() && room < LEAST_ROOM) {
            buffer.reserve(ROOM);
        }
        let read = rustix::io::read(self.channel, buffer.spare_capacity_mut())?
            .0
            .len();
        // SAFETY: the kernel has filled so many bytes behind the buffer's end, within its capacity.
        unsafe { buffer.set_len(buffer.len() + read) };
        Ok(read)
    }

    fn attach(&mut self) {
        if !self.attached {
            self.attached = true;
            self.writable = true;
            self.announce();
        }
    }

    /// Says that somebody is here, before any session.
    fn announce(&mut self) {
        let presented = self.presented.clone();
        self.outbox
            .control(Vec::new(), Payload::AgentReady(presented));
    }

    fn frames(&mut self) {
        while let Some(found) = self.decoder.next() {
            match found {
                Found::Message(message) => self.message(*message),
                Found::Malformed => self.dropped += 1,
                Found::Garbage(_) => self.dropped += 1,
            }
        }
    }

    fn message(&mut self, message: AgentMessage) {
        let Some(payload) = message.payload else {
            self.dropped += 1;
            return;
        };
        if let Payload::Hello(hello) = payload {
            match <[u8; 16]>::try_from(message.session.as_slice()) {
                Ok(session) => self.hello(session, &hello),
                Err(_) => self.dropped += 1,
            }
            return;
        }
        // Of an earlier life, or before any greeting.
        if self
            .session
            .is_none_or(|session| session[..] != message.session[..])
        {
            self.dropped += 1;
            return;
        }
        if let Payload::Ping(ping) = payload {
            let id = message.message_id.get(..16).unwrap_or_default().to_vec();
            self.outbox.control(
                id,
                Payload::Pong(Pong {
                    payload: ping.payload,
                }),
            );
            return;
        }
        let Ok(id) = CallId::try_from(message.message_id.as_slice()) else {
            self.dropped += 1;
            return;
        };
        match payload {
            Payload::StreamData(_)
            | Payload::WindowUpdate(_)
            | Payload::Cancel(_)
            | Payload::Signal(_)
            | Payload::Resize(_) => {
                // What is not there has ended, and its answer is on its way.
                if let Some(serial) = self.serials.get(&id).copied() {
                    self.continued(serial, id, payload);
                }
            }
            request => self.request(id, request),
        }
    }

    fn hello(&mut self, session: [u8; 16], hello: &Hello) {
        self.end_session();
        let version = negotiate(
            (OLDEST_VERSION, NEWEST_VERSION),
            (hello.oldest_version, hello.newest_version),
        );
        self.allowed = self
            .offered
            .iter()
            .copied()
            .filter(|one| {
                hello.capabilities.is_empty()
                    || hello.capabilities.iter().any(|name| name == one.as_str())
            })
            .collect();
        let mut ready = self.presented.clone();
        ready.protocol_version = version.unwrap_or(0);
        ready.capabilities = names(&self.allowed);
        ready.hostname = hostname();
        if version.is_none() {
            say!(
                "the host speaks versions {} to {}, this agent {OLDEST_VERSION} to {NEWEST_VERSION}",
                hello.oldest_version,
                hello.newest_version
            );
            self.allowed.clear();
        }
        self.session = Some(session);
        self.flow = Flow::of(Stream::File, version.unwrap_or(0));
        self.bulk = version.is_some_and(|version| version >= frame::BULK_VERSION);
        self.outbox.control(Vec::new(), Payload::AgentReady(ready));
        let interval = hello
            .telemetry_interval
            .as_ref()
            .and_then(duration)
            .filter(|_| self.allowed.contains(&Capability::Telemetry));
        self.reporter.every(interval);
        if version.is_some() && !self.greeted {
            self.greeted = true;
            if let Some(tell) = &self.options.on_greeted {
                tell();
            }
        }
    }

    /// Ends all calls of the session that is over.
    fn end_session(&mut self) {
        for (_, running) in std::mem::take(&mut self.calls) {
            match running.call {
                Call::Exec(exec) => self.dying.push(exec.abandon()),
                Call::Task(task) => task.cancel(),
            }
        }
        self.serials.clear();
        self.outbox.clear();
        self.session = None;
        self.allowed.clear();
        self.reporter.every(None);
    }

    fn request(&mut self, id: CallId, payload: Payload) {
        if self.serials.contains_key(&id) {
            // A second request under the id of a running call: which of the two would an answer be for?
            self.dropped += 1;
            return;
        }
        self.next_serial = self.next_serial.wrapping_add(1);
        let serial = self.next_serial;
        let outcome = if self.calls.len() + self.outbox.ended() >= MOST_CALLS {
            Err(Failure::new(
                "busy",
                format!("{MOST_CALLS} calls are running already"),
            ))
        } else {
            self.start(serial, id, payload)
        };
        match outcome {
            Ok(Some(call)) => {
                self.calls.insert(serial, Running { id, call });
                self.serials.insert(id, serial);
            }
            Ok(None) => {}
            Err(failure) => self
                .outbox
                .control(id.to_vec(), Payload::Error(failure.into())),
        }
    }

    fn permit(&self, capability: Capability) -> Result<(), Failure> {
        if self.allowed.contains(&capability) {
            return Ok(());
        }
        let name = capability.as_str();
        Err(Failure::new(
            "permission_denied",
            format!("this guest does not allow {name:?}"),
        ))
    }

    fn permit_writing(&self, capability: Capability) -> Result<(), Failure> {
        self.permit(capability)?;
        if self.freezer.is_frozen() {
            // It would hang until the thaw, with whatever it holds.
            return Err(Failure::new(
                "frozen",
                "nothing new may write before they are thawed",
            ));
        }
        Ok(())
    }

    /// Starts a call; `None` where it is answered already.
    fn start(
        &mut self,
        serial: u32,
        id: CallId,
        payload: Payload,
    ) -> Result<Option<Call>, Failure> {
        let options = self.options;
        let mailbox = self.mailbox.clone();
        let rules = Rules {
            flow: self.flow,
            bulk: self
                .session
                .filter(|_| self.bulk)
                .map(|session| (session, id)),
        };
        let task = match payload {
            Payload::Execute(request) => {
                self.permit_writing(Capability::Exec)?;
                if request.terminal.is_some() {
                    self.permit(Capability::Pty)?;
                }
                let exec = Exec::start(serial, &id, request, &self.accounts, mailbox)?;
                self.watch(serial, &exec)?;
                return Ok(Some(Call::Exec(Box::new(exec))));
            }
            Payload::FileWrite(request) => {
                self.permit_writing(Capability::Files)?;
                let roots = options.roots.clone();
                Task::start(serial, mailbox, rules, move |port| {
                    files::write(&roots, request, port)
                })
            }
            Payload::FileRead(request) => {
                self.permit(Capability::Files)?;
                let roots = options.roots.clone();
                Task::start(serial, mailbox, rules, move |port| {
                    files::read(&roots, &request, port)
                })
            }
            Payload::FileStat(request) => {
                self.permit(Capability::Files)?;
                let roots = options.roots.clone();
                Task::start(serial, mailbox, rules, move |_| {
                    files::stat(&roots, &request)
                })
            }
            Payload::FileList(request) => {
                self.permit(Capability::Files)?;
                let roots = options.roots.clone();
                Task::start(serial, mailbox, rules, move |port| {
                    files::list(&roots, &request, port)
                })
            }
            Payload::MakeDirectory(request) => {
                self.permit_writing(Capability::Files)?;
                let roots = options.roots.clone();
                Task::start(serial, mailbox, rules, move |_| {
                    files::make_directory(&roots, &request)
                })
            }
            Payload::MakeLink(request) => {
                self.permit_writing(Capability::Files)?;
                self.permit(Capability::Links)?;
                let roots = options.roots.clone();
                Task::start(serial, mailbox, rules, move |_| {
                    files::make_link(&roots, &request)
                })
            }
            Payload::Shutdown(request) => {
                self.permit(Capability::Power)?;
                let mode = match request.mode() {
                    shutdown_request::Mode::PowerOff => PowerMode::PowerOff,
                    shutdown_request::Mode::Reboot => PowerMode::Reboot,
                    shutdown_request::Mode::Unspecified => {
                        return Err(Failure::invalid("power off or reboot?"));
                    }
                };
                let delay = match &request.delay {
                    None => Duration::ZERO,
                    Some(wire) => {
                        duration(wire).ok_or_else(|| Failure::invalid("no such delay"))?
                    }
                };
                // The answer goes out before the guest goes down.
                self.power = Some((Instant::now() + delay, mode));
                self.outbox.control(id.to_vec(), done());
                return Ok(None);
            }
            Payload::SetPassword(request) => {
                self.permit_writing(Capability::Password)?;
                let sysroot = options.sysroot.clone();
                Task::start(serial, mailbox, rules, move |_| {
                    crate::accounts::set_password(&sysroot, &request).map(|()| done())
                })
            }
            Payload::SshKeys(request) => {
                self.permit_writing(Capability::SshKeys)?;
                let sysroot = options.sysroot.clone();
                Task::start(serial, mailbox, rules, move |_| {
                    crate::accounts::change_keys(&sysroot, &request).map(|()| done())
                })
            }
            Payload::SetClock(request) => {
                self.permit(Capability::Clock)?;
                let system = Arc::clone(&options.system);
                Task::start(serial, mailbox, rules, move |_| {
                    crate::clock::set(system.as_ref(), &request).map(|()| done())
                })
            }
            Payload::Freeze(request) => {
                self.permit(Capability::Freeze)?;
                let freezer = Arc::clone(&self.freezer);
                Task::start(serial, mailbox, rules, move |_| freezer.freeze(&request))
            }
            Payload::Thaw(_) => {
                self.permit(Capability::Freeze)?;
                let freezer = Arc::clone(&self.freezer);
                Task::start(serial, mailbox, rules, move |_| freezer.thaw())
            }
            Payload::Update(request) => {
                self.permit_writing(Capability::Update)?;
                let program = options.program.clone().ok_or_else(|| {
                    Failure::new("unsupported", "this agent is not a program of its own")
                })?;
                Task::start(serial, mailbox, rules, move |port| {
                    crate::update::receive(&program, &request, port)
                })
            }
            _ => {
                return Err(Failure::new(
                    "unsupported",
                    "this agent knows no such request",
                ));
            }
        };
        task.map(|task| Some(Call::Task(task)))
    }

    fn watch(&self, serial: u32, exec: &Exec) -> Result<(), Failure> {
        for (source, fd) in exec.sources() {
            let mut flags = epoll::EventFlags::ET | epoll::EventFlags::IN;
            match source {
                Source::Stdin => flags = epoll::EventFlags::ET | epoll::EventFlags::OUT,
                Source::Terminal => flags |= epoll::EventFlags::OUT,
                _ => {}
            }
            let kind = Source::ALL
                .iter()
                .position(|one| *one == source)
                .unwrap_or(0) as u64;
            let token = (u64::from(serial) << 3) | kind;
            epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)
                .map_err(|error| Failure::errno("watch the program", error))?;
        }
        Ok(())
    }

    /// What belongs to a call that runs.
    fn continued(&mut self, serial: u32, id: CallId, payload: Payload) {
        let Some(running) = self.calls.get_mut(&serial) else {
            return;
        };
        let outcome = match (&mut running.call, payload) {
            (Call::Exec(exec), Payload::StreamData(data)) => exec.data(data),
            (Call::Exec(exec), Payload::WindowUpdate(update)) => {
                exec.grant(update.stream(), update.bytes);
                Ok(())
            }
            (Call::Exec(exec), Payload::Cancel(_)) => {
                exec.cancel();
                Ok(())
            }
            (Call::Exec(exec), Payload::Signal(signal)) => {
                exec.signal(signal.number);
                Ok(())
            }
            (Call::Exec(exec), Payload::Resize(size)) => {
                exec.resize(size.rows, size.columns);
                Ok(())
            }
            (Call::Task(task), Payload::StreamData(data)) => task.data(data),
            (Call::Task(task), Payload::WindowUpdate(update)) => {
                task.grant(update.bytes);
                Ok(())
            }
            (Call::Task(task), Payload::Cancel(_)) => {
                task.cancel();
                Ok(())
            }
            (Call::Task(_), _) => Err(Failure::invalid("this call has no process")),
            (Call::Exec(_), _) => Ok(()),
        };
        if let Err(failure) = outcome {
            self.finish(serial, id, Payload::Error(failure.into()));
        }
    }

    /// Sends the last answer of a call and forgets it.
    fn finish(&mut self, serial: u32, id: CallId, payload: Payload) {
        self.outbox.push_final(serial, id, payload);
        self.serials.remove(&id);
        if let Some(running) = self.calls.remove(&serial) {
            match running.call {
                // Where it runs still, this ends it.
                Call::Exec(exec) => self.dying.push(exec.abandon()),
                Call::Task(task) => task.cancel(),
            }
        }
    }

    /// What other threads have to say.
    fn take_mail(&mut self) -> bool {
        if !std::mem::take(&mut self.mail) {
            return false;
        }
        let mails = self.mailbox.take();
        let any = !mails.is_empty();
        for mail in mails {
            match mail {
                Mail::Message(serial, payload) => {
                    if let Some(running) = self.calls.get(&serial) {
                        self.outbox.push(serial, running.id, payload);
                    }
                }
                Mail::Frame(serial, frame) => {
                    if let Some(running) = self.calls.get(&serial) {
                        self.outbox.push(serial, running.id, Parcel::Frame(frame));
                    }
                }
                Mail::Final(serial, payload) => {
                    if let Some(id) = self.calls.get(&serial).map(|running| running.id) {
                        self.finish(serial, id, payload);
                    }
                }
                Mail::Swept(serial) => {
                    if let Some(Running {
                        call: Call::Exec(exec),
                        ..
                    }) = self.calls.get_mut(&serial)
                    {
                        exec.swept();
                    }
                    for dying in &mut self.dying {
                        if dying.serial == serial {
                            dying.swept();
                        }
                    }
                }
                Mail::Telemetry(report) => self.telemetry(*report),
                Mail::Leave(serial, end) => self.leaving = Some((serial, end)),
            }
        }
        any && !self.outbox.is_empty()
    }

    fn telemetry(&mut self, mut report: Telemetry) {
        self.reporter.arrived();
        if self.session.is_none() || !self.allowed.contains(&Capability::Telemetry) {
            return;
        }
        // One that nobody takes is not followed by another.
        if self.outbox.is_flooded() {
            return;
        }
        let health = report.health.get_or_insert_default();
        health.frames_dropped = self.dropped;
        health.running_calls = u32::try_from(self.calls.len()).unwrap_or(u32::MAX);
        health.frozen = self.freezer.is_frozen();
        self.outbox.control(Vec::new(), Payload::Telemetry(report));
    }

    /// Gives every execution its turn.
    fn turn(&mut self) -> bool {
        let mut again = false;
        let mut over = Vec::new();
        for (serial, running) in &mut self.calls {
            let Call::Exec(exec) = &mut running.call else {
                continue;
            };
            let turn = exec.turn(&mut self.scratch, self.outbox.waiting(*serial));
            again |= turn.again;
            for payload in turn.messages {
                self.outbox.push(*serial, running.id, payload);
            }
            if let Some(last) = turn.last {
                over.push((*serial, running.id, last));
            }
        }
        let finished = !over.is_empty();
        for (serial, id, last) in over {
            self.finish(serial, id, last);
        }
        self.dying.retain_mut(|dying| !dying.is_gone());
        if self.options.adopt_orphans && finished {
            self.bury();
        }
        again
    }

    /// What is due.
    fn tick(&mut self) {
        let now = Instant::now();
        if self.session.is_some() && self.reporter.due_at().is_some_and(|at| at <= now) {
            self.reporter.start();
            if self.options.adopt_orphans {
                self.bury();
            }
        }
        if let Some((_, mode)) = self.power.take_if(|(at, _)| *at <= now) {
            let system = Arc::clone(&self.options.system);
            // A command of the init system may take its time.
            let started = std::thread::Builder::new()
                .name("power".into())
                .spawn(move || {
                    if let Err(error) = system.power(mode) {
                        say!("cannot {}: {error}", mode.as_str());
                    }
                });
            if let Err(error) = started {
                say!("cannot {}: {error}", mode.as_str());
            }
        }
    }

    /// Takes the exit statuses of processes whose parents died before them.
    fn bury(&mut self) {
        let own = |pid: rustix::process::Pid, engine: &Self| {
            engine.dying.iter().any(|dying| dying.pid() == pid)
                || engine
                    .calls
                    .values()
                    .any(|running| matches!(&running.call, Call::Exec(exec) if exec.pid() == pid))
        };
        let mut most = 1024;
        while most > 0 && crate::exec::bury_dead_child(|pid| own(pid, self)) {
            most -= 1;
        }
    }

    /// Writes what the channel takes; false where it is gone.
    fn write(&mut self) -> io::Result<bool> {
        if !self.attached {
            return Ok(true);
        }
        let session = self.session.map(Vec::from).unwrap_or_default();
        while self.writable {
            let bytes = self.outbox.wire(&session);
            if bytes.is_empty() {
                return Ok(true);
            }
            match rustix::io::write(self.channel, bytes) {
                Ok(0) | Err(Errno::AGAIN) => self.writable = false,
                Ok(written) => self.outbox.sent(written),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NODEV | Errno::IO | Errno::NXIO) => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Waits a moment for what was killed, so that nothing is left behind without a parent.
    fn wait_for_dying(&mut self) {
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until {
            self.mail = true;
            self.take_mail();
            self.dying.retain_mut(|dying| !dying.is_gone());
            if self.dying.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn names(capabilities: &[Capability]) -> Vec<String> {
    capabilities
        .iter()
        .map(|one| one.as_str().to_owned())
        .collect()
}

fn hostname() -> String {
    clip(&rustix::system::uname().nodename().to_string_lossy(), 255)
}

fn present(options: &Options, offered: &[Capability]) -> io::Result<AgentReady> {
    let uname = rustix::system::uname();
    Ok(AgentReady {
        protocol_version: NEWEST_VERSION,
        oldest_version: OLDEST_VERSION,
        newest_version: NEWEST_VERSION,
        agent_version: crate::VERSION.into(),
        capabilities: names(offered),
        boot_id: clip(
            read_bounded("/proc/sys/kernel/random/boot_id", 64)
                .unwrap_or_default()
                .trim(),
            64,
        ),
        instance: random::<16>()?.to_vec(),
        operating_system: operating_system(&options.sysroot),
        kernel: clip(&uname.release().to_string_lossy(), 255),
        hostname: hostname(),
        architecture: clip(&uname.machine().to_string_lossy(), 64),
        program_sha256: options.program_sha256.clone(),
    })
}

/// `PRETTY_NAME` of `os-release(5)`.
fn operating_system(sysroot: &std::path::Path) -> String {
    for file in ["etc/os-release", "usr/lib/os-release"] {
        let Ok(text) = read_bounded(sysroot.join(file), 64 * 1024) else {
            continue;
        };
        if let Some(name) = text
            .lines()
            .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        {
            return clip(name.trim().trim_matches(['"', '\'']), 255);
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_spoken() {
        assert_eq!(negotiate((1, 1), (1, 1)), Some(1));
        // A host two versions ahead still speaks ours, and one behind is met.
        assert_eq!(negotiate((1, 1), (1, 3)), Some(1));
        assert_eq!(negotiate((3, 5), (1, 3)), Some(3));
        assert_eq!(negotiate((3, 5), (4, 9)), Some(5));
        // Three versions apart is too far.
        assert_eq!(negotiate((3, 5), (1, 2)), None);
        assert_eq!(negotiate((1, 1), (2, 4)), None);
        for senseless in [(0, 0), (2, 1), (u32::MAX, 0)] {
            assert_eq!(negotiate((1, 1), senseless), None, "{senseless:?}");
        }
        assert_eq!(negotiate((1, 1), (0, u32::MAX)), Some(1));
    }
}
