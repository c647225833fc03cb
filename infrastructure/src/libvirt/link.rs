//! The one connection to libvirt and its supervision.
//!
//! A supervisor thread opens the connection, watches it and opens it anew. Three things tell that
//! it is lost: libvirt's close callback (the peer went away, or keep-alive got no answer), a worker
//! that met a dead connection, and our own probe. The probe is a real call on a thread of its own:
//! keep-alive is answered by the daemon's main loop even when all of its workers are stuck.
//!
//! Timing, with the defaults: keep-alive gives up after 6 s, the probe after at most 7.5 s; after
//! the daemon is back, the next attempt comes within 2 s.

use std::ffi::c_int;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ghost_domain::{Error, ErrorCode, Result};
use tokio::sync::watch;
use uuid::Uuid;
use virt::connect::Connect;

use super::ffi::{self, Callbacks, EventSink, Guarded, RawEvent};
use super::wire;

/// Seconds between keep-alive messages.
const KEEPALIVE_INTERVAL: i32 = 2;
/// How many may stay unanswered.
const KEEPALIVE_COUNT: u32 = 2;
/// Pause between two probes.
const PROBE_INTERVAL: Duration = Duration::from_millis(1500);
/// A probe that takes longer proves that the peer is gone.
const PROBE_DEADLINE: Duration = Duration::from_secs(6);
/// How long the daemon may take to answer before a connection is opened.
const GREETING_DEADLINE: Duration = Duration::from_secs(3);
/// How long opening may take before its thread is given up.
const OPEN_DEADLINE: Duration = Duration::from_secs(8);
/// Most opening threads that may hang at one time.
const MAX_HANGING_OPENERS: usize = 4;
/// First and longest pause between attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// An open connection, shared by the workers.
pub(crate) struct Connection {
    handle: Guarded<Connect>,
    /// Set as soon as it is known to be of no use.
    dead: AtomicBool,
    /// Rises with each connection.
    pub(crate) generation: u64,
}

impl Connection {
    /// The handle, for a worker thread.
    pub(crate) fn handle(&self) -> &Connect {
        &self.handle
    }

    /// Whether calls still make sense. Looks at our own end only.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst) || matches!(self.handle.is_alive(), Ok(false))
    }
}

/// What listens to the link.
pub(crate) trait LinkObserver: Send + Sync {
    /// A connection stands, and nobody can use it yet.
    fn connecting(&self);
    /// It can be used.
    fn connected(&self);
    /// It is lost.
    fn disconnected(&self, reason: &str);
    /// A domain event.
    fn domain_event(&self, domain: Uuid, event: RawEvent);
    /// Called about every second.
    fn tick(&self);
}

/// What the link is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkState {
    /// No attempt has ended yet.
    Starting,
    /// There.
    Up {
        /// Which connection.
        generation: u64,
    },
    /// Lost.
    Down {
        /// Why.
        reason: String,
    },
}

/// The connection and its supervisor.
pub(crate) struct Link {
    uri: String,
    socket: Option<PathBuf>,
    inner: Mutex<Inner>,
    wake: Condvar,
    state: watch::Sender<LinkState>,
    hanging_openers: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    connection: Option<Arc<Connection>>,
    /// Why the present connection is lost, until the supervisor has seen it.
    lost: Option<(u64, String)>,
    stopping: bool,
}

/// Receives libvirt's callbacks of one connection.
struct Sink {
    link: Weak<Link>,
    observer: Weak<dyn LinkObserver>,
    generation: u64,
    /// Set once this connection is given up: its late events would be told twice.
    retired: AtomicBool,
}

impl EventSink for Sink {
    fn domain_event(&self, domain: Uuid, event: RawEvent) {
        if self.retired.load(Ordering::SeqCst) {
            return;
        }
        if let Some(observer) = self.observer.upgrade() {
            observer.domain_event(domain, event);
        }
    }

    fn closed(&self, reason: c_int) {
        let reason = match reason {
            0 => "libvirt closed the connection with an error",
            1 => "libvirt closed the connection",
            2 => "libvirt does not answer (keep-alive)",
            _ => "the connection to libvirt was closed",
        };
        if let Some(link) = self.link.upgrade() {
            link.report_lost(self.generation, reason);
        }
    }
}

impl Link {
    /// A link that is not yet supervised.
    pub(crate) fn new(uri: String) -> Arc<Self> {
        Arc::new(Self {
            socket: wire::socket_of(&uri),
            uri,
            inner: Mutex::default(),
            wake: Condvar::new(),
            state: watch::Sender::new(LinkState::Starting),
            hanging_openers: AtomicUsize::new(0),
        })
    }

    /// Starts the supervisor. It ends when the link is stopped or the observer is gone.
    ///
    /// # Errors
    /// `Internal` when a thread cannot be started.
    pub(crate) fn start(self: &Arc<Self>, observer: Weak<dyn LinkObserver>) -> Result<()> {
        let no_thread = |error| Error::internal("cannot start a thread for libvirt").because(error);
        ffi::initialise().map_err(no_thread)?;
        let supervised = Arc::clone(self);
        thread::Builder::new()
            .name("ghost-lv-link".into())
            .spawn(move || supervised.supervise(&observer))
            .map_err(no_thread)?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the supervisor and closes the connection, in the background.
    pub(crate) fn stop(&self) {
        self.lock().stopping = true;
        self.wake.notify_all();
    }

    /// Follows the link's state.
    pub(crate) fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// The address that it connects to.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// The present connection.
    ///
    /// # Errors
    /// `HypervisorUnavailable` at once while there is none.
    pub(crate) fn connection(&self) -> Result<Arc<Connection>> {
        if let Some(connection) = &self.lock().connection
            && !connection.dead.load(Ordering::SeqCst)
        {
            return Ok(Arc::clone(connection));
        }
        let reason = match &*self.state.borrow() {
            LinkState::Down { reason } => reason.clone(),
            LinkState::Starting => "the first connection is still being made".to_owned(),
            LinkState::Up { .. } => "the connection was just lost".to_owned(),
        };
        Err(unavailable(&reason))
    }

    /// Tells the supervisor that a connection is of no use any more.
    pub(crate) fn report_lost(&self, generation: u64, reason: &str) {
        let mut inner = self.lock();
        if let Some(connection) = &inner.connection
            && connection.generation == generation
        {
            connection.dead.store(true, Ordering::SeqCst);
        }
        // Also while the connection is being made: the supervisor looks before it publishes.
        inner.lost = Some((generation, reason.to_owned()));
        drop(inner);
        self.wake.notify_all();
    }

    fn supervise(self: Arc<Self>, observer: &Weak<dyn LinkObserver>) {
        let mut generation = 0;
        let mut pause = BACKOFF.0;
        loop {
            if self.lock().stopping {
                return;
            }
            generation += 1;
            match self.open(generation, observer) {
                Ok((connection, callbacks, sink)) => {
                    pause = BACKOFF.0;
                    let reason = self.keep(&connection, observer);
                    sink.retired.store(true, Ordering::SeqCst);
                    connection.dead.store(true, Ordering::SeqCst);
                    self.lock().connection = None;
                    dispose(connection, callbacks);
                    let Some(reason) = reason else { return };
                    self.down(observer, &reason);
                }
                Err(reason) => {
                    self.down(observer, &reason);
                    self.wait(pause);
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }

    fn down(&self, observer: &Weak<dyn LinkObserver>, reason: &str) {
        let first = self.state.send_if_modified(|state| {
            let first = !matches!(state, LinkState::Down { .. });
            *state = LinkState::Down {
                reason: reason.to_owned(),
            };
            first
        });
        if let Some(observer) = observer.upgrade() {
            if first {
                tracing::warn!(uri = %self.uri, reason, "libvirt is out of reach");
                observer.disconnected(reason);
            }
            observer.tick();
        }
    }

    /// Waits, unless the link is stopped meanwhile.
    fn wait(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut inner = self.lock();
        while !inner.stopping {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner = self
                .wake
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn open(
        self: &Arc<Self>,
        generation: u64,
        observer: &Weak<dyn LinkObserver>,
    ) -> Result<(Arc<Connection>, Callbacks, Arc<Sink>), String> {
        if let Some(socket) = &self.socket {
            wire::answers(socket, GREETING_DEADLINE)?;
        }
        let handle = self.open_handle()?;
        // A driver without a peer (the test driver) has no keep-alive, and needs none.
        if let Err(error) = handle.set_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT) {
            tracing::debug!(%error, "no keep-alive on this connection");
        }
        let connection = Arc::new(Connection {
            handle,
            dead: AtomicBool::new(false),
            generation,
        });
        let sink = Arc::new(Sink {
            link: Arc::downgrade(self),
            observer: observer.clone(),
            generation,
            retired: AtomicBool::new(false),
        });
        let as_sink: Arc<dyn EventSink> = Arc::clone(&sink) as Arc<dyn EventSink>;
        let callbacks = ffi::register(connection.handle(), &as_sink)
            .map_err(|error| format!("libvirt tells no events: {}", error.message()))?;
        Ok((connection, callbacks, sink))
    }

    /// Opens on a thread of its own, which is given up when it hangs.
    fn open_handle(self: &Arc<Self>) -> Result<Guarded<Connect>, String> {
        if self.hanging_openers.load(Ordering::SeqCst) >= MAX_HANGING_OPENERS {
            return Err("libvirt takes connections but does not answer".into());
        }
        let (send, result) = mpsc::channel();
        let link = Arc::clone(self);
        self.hanging_openers.fetch_add(1, Ordering::SeqCst);
        let started = thread::Builder::new()
            .name("ghost-lv-open".into())
            .spawn(move || {
                let opened = Connect::open(Some(&link.uri)).map(Guarded::new);
                link.hanging_openers.fetch_sub(1, Ordering::SeqCst);
                // Where nobody waits any more the handle comes back and is closed here.
                drop(send.send(opened));
            });
        if let Err(error) = started {
            self.hanging_openers.fetch_sub(1, Ordering::SeqCst);
            return Err(format!("cannot start a thread: {error}"));
        }
        match result.recv_timeout(OPEN_DEADLINE) {
            Ok(Ok(handle)) => Ok(handle),
            Ok(Err(error)) => Err(error.message().to_owned()),
            Err(_) => Err("libvirt takes connections but does not answer".into()),
        }
    }

    /// Publishes the connection and watches it until it is lost (why) or the link is stopped
    /// (`None`).
    fn keep(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        observer: &Weak<dyn LinkObserver>,
    ) -> Option<String> {
        let generation = connection.generation;
        if let Some(observer) = observer.upgrade() {
            observer.connecting();
        }
        {
            let mut inner = self.lock();
            if inner
                .lost
                .as_ref()
                .is_some_and(|(lost, _)| *lost < generation)
            {
                inner.lost = None;
            }
            inner.connection = Some(Arc::clone(connection));
        }
        tracing::info!(uri = %self.uri, "connected to libvirt");
        // The state goes first: whoever hears that libvirt is there calls at once, and a call ends
        // when the state says that it is not.
        self.state.send_replace(LinkState::Up { generation });
        if let Some(observer) = observer.upgrade() {
            observer.connected();
        }

        let (beat, beats) = mpsc::channel();
        let probed = Arc::clone(connection);
        let probe = thread::Builder::new()
            .name("ghost-lv-probe".into())
            .spawn(move || probe(&probed, &beat));
        if probe.is_err() {
            tracing::error!("cannot start the thread that probes libvirt");
        }
        let mut last_beat = Instant::now();
        loop {
            let mut inner = self.lock();
            if !inner.stopping && inner.lost.is_none() {
                inner = self
                    .wake
                    .wait_timeout(inner, Duration::from_millis(500))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            if inner.stopping {
                return None;
            }
            if let Some((lost, reason)) = inner.lost.take()
                && lost == generation
            {
                return Some(reason);
            }
            drop(inner);
            while beats.try_recv().is_ok() {
                last_beat = Instant::now();
            }
            if last_beat.elapsed() > PROBE_INTERVAL + PROBE_DEADLINE {
                return Some("libvirt does not answer (probe)".into());
            }
            if connection.is_dead() {
                return Some("the connection to libvirt was closed".into());
            }
            match observer.upgrade() {
                Some(observer) => observer.tick(),
                None => return None,
            }
        }
    }
}

/// Asks libvirt for its version again and again and tells of each answer.
fn probe(connection: &Connection, beat: &mpsc::Sender<()>) {
    loop {
        let answered = connection.handle().lib_version().is_ok();
        // A refusal is an answer too, as long as the connection stands.
        if connection.dead.load(Ordering::SeqCst) || (!answered && connection.is_dead()) {
            return;
        }
        if beat.send(()).is_err() {
            return;
        }
        thread::sleep(PROBE_INTERVAL);
    }
}

/// Takes callbacks back and lets go of the connection on a thread that may wait: both talk to the
/// daemon once more, which may hang until keep-alive ends it.
fn dispose(connection: Arc<Connection>, mut callbacks: Callbacks) {
    let started = thread::Builder::new()
        .name("ghost-lv-close".into())
        .spawn(move || {
            callbacks.deregister(connection.handle());
            drop(connection);
        });
    if let Err(error) = started {
        tracing::error!(%error, "cannot start the thread that closes a libvirt connection");
    }
}

/// The error of every call while libvirt is out of reach.
pub(crate) fn unavailable(reason: &str) -> Error {
    Error::new(
        ErrorCode::HypervisorUnavailable,
        "libvirt cannot be reached",
    )
    .because(reason)
    .hint("look at libvirt on the host: ghost-agent doctor")
    .retry_after(Duration::from_secs(5))
}
