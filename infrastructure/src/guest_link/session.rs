//! One life of a guest's agent, from its greeting on, with the calls that run in it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ghost_domain::guest::GuestHello;
use ghost_domain::{Error, ErrorCode, Result};
use parking_lot::Mutex;

use super::call::{Call, CallHandle, CallId, Kind, MOST_UNREAD};
use super::wire::Wire;

/// Calls of one guest at a time.
pub(super) const MOST_CALLS: usize = 64;
/// Ended calls whose late messages are no surprise.
const MOST_REMEMBERED: usize = 256;

#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: [u8; 16],
    pub(super) instance: Vec<u8>,
    pub(super) hello: GuestHello,
    pub(super) wire: Arc<Wire>,
    /// The owner closed all ways into guests; shared by all links.
    locked: Arc<AtomicBool>,
    calls: Mutex<Calls>,
    unread: AtomicUsize,
}

#[derive(Debug, Default)]
struct Calls {
    running: HashMap<CallId, Arc<Call>>,
    ended: VecDeque<CallId>,
    /// Why none may begin any more.
    closed: Option<Error>,
}

/// To whom a message of the guest goes.
#[derive(Debug)]
pub(super) enum Recipient {
    Call(Arc<Call>),
    /// A call that has ended lately.
    Ended,
    Unknown,
}

/// Sixteen random bytes.
pub(super) fn random_id() -> [u8; 16] {
    rand::random()
}

pub(super) fn lockdown() -> Error {
    Error::new(
        ErrorCode::Lockdown,
        "all ways into guests are closed by the owner of this host",
    )
}

/// The error of all calls that need an agent that is not there.
pub(super) fn unreachable(cause: &str) -> Error {
    Error::new(
        ErrorCode::GuestUnreachable,
        "the agent in the guest cannot be reached",
    )
    .because(cause)
    .hint("see which part is missing: ghostctl guest status NAME")
}

impl Session {
    pub(super) fn new(
        id: [u8; 16],
        instance: Vec<u8>,
        hello: GuestHello,
        wire: Arc<Wire>,
        locked: Arc<AtomicBool>,
    ) -> Self {
        Self {
            id,
            instance,
            hello,
            wire,
            locked,
            calls: Mutex::default(),
            unread: AtomicUsize::new(0),
        }
    }

    /// Begins a call that needs `capability`, where one is named.
    ///
    /// # Errors
    /// `GuestUnsupported`, `Lockdown`, `TooManyRequests`, `GuestUnreachable`.
    pub(super) fn begin(
        self: &Arc<Self>,
        kind: Kind,
        capability: Option<&str>,
    ) -> Result<CallHandle> {
        self.supports(capability)?;
        let mut calls = self.calls.lock();
        // Read under the lock: whoever closes sets it first and then ends what is in here.
        if self.locked.load(Ordering::SeqCst) {
            return Err(lockdown());
        }
        if let Some(error) = &calls.closed {
            return Err(error.clone());
        }
        if calls.running.len() >= MOST_CALLS {
            return Err(Error::new(
                ErrorCode::TooManyRequests,
                "too many calls run in this guest",
            )
            .because(format!("at most {MOST_CALLS} at a time"))
            .retry_after(Duration::from_secs(1)));
        }
        let id = random_id();
        let call = Arc::new(Call::new(id, kind, Arc::clone(self)));
        calls.running.insert(id, Arc::clone(&call));
        Ok(CallHandle(call))
    }

    fn supports(&self, capability: Option<&str>) -> Result<()> {
        if self.hello.protocol_version == 0 {
            return Err(Error::new(
                ErrorCode::GuestUnsupported,
                "the agent in the guest speaks no version of the protocol that this host knows",
            )
            .because(format!("it is release {}", self.hello.agent_version))
            .hint("update it in the guest, or this host's agent"));
        }
        let Some(capability) = capability else {
            return Ok(());
        };
        if self.hello.capabilities.iter().any(|own| own == capability) {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::GuestUnsupported,
            "the agent in the guest cannot or may not do this",
        )
        .because(format!("it does not offer {capability}"))
        .hint("see what it offers: ghostctl guest status NAME"))
    }

    /// How a call of this session ends that finds the connection closed.
    pub(super) fn lost(&self) -> Error {
        self.calls
            .lock()
            .closed
            .clone()
            .unwrap_or_else(|| unreachable("the connection was lost"))
    }

    pub(super) fn remove(&self, id: CallId) {
        let mut calls = self.calls.lock();
        if calls.running.remove(&id).is_some() {
            calls.remember(id);
        }
    }

    pub(super) fn recipient(&self, id: &[u8]) -> Recipient {
        let Ok(id) = CallId::try_from(id) else {
            return Recipient::Unknown;
        };
        let calls = self.calls.lock();
        match calls.running.get(&id) {
            Some(call) => Recipient::Call(Arc::clone(call)),
            None if calls.ended.contains(&id) => Recipient::Ended,
            None => Recipient::Unknown,
        }
    }

    pub(super) fn running(&self) -> usize {
        self.calls.lock().running.len()
    }

    /// The link is gone; how many calls it took along.
    pub(super) fn lose(&self, error: &Error) -> usize {
        let mut calls = self.calls.lock();
        calls.closed = Some(error.clone());
        let running = calls.take_running();
        drop(calls);
        for call in &running {
            call.lose(error);
            // Frames that wait would otherwise go to the next life of the agent.
            self.wire.forget(call.id);
        }
        running.len()
    }

    /// Ends all calls that run, not those to come.
    pub(super) fn cut(&self, error: &Error) -> usize {
        let running = self.calls.lock().take_running();
        for call in &running {
            call.cut(error);
        }
        running.len()
    }

    pub(super) fn count_unread(&self, bytes: usize) {
        self.unread.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn forget_unread(&self, bytes: usize) {
        self.unread.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Ends the call that holds most while all hold too much.
    pub(super) fn relieve(&self) {
        while self.unread.load(Ordering::Relaxed) > MOST_UNREAD {
            let mut calls = self.calls.lock();
            let largest = calls
                .running
                .values()
                .max_by_key(|call| call.unread())
                .map(Arc::clone);
            let Some(call) = largest.filter(|call| call.unread() > 0) else {
                return;
            };
            calls.running.remove(&call.id);
            calls.remember(call.id);
            drop(calls);
            call.cut(
                &Error::new(
                    ErrorCode::TooManyRequests,
                    "the output of this guest's calls is not read fast enough",
                )
                .because(format!("more than {} MiB of it wait", MOST_UNREAD >> 20)),
            );
        }
    }
}

impl Calls {
    fn remember(&mut self, id: CallId) {
        if self.ended.len() >= MOST_REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
    }

    fn take_running(&mut self) -> Vec<Arc<Call>> {
        let running: Vec<Arc<Call>> = self.running.drain().map(|(_, call)| call).collect();
        for call in &running {
            self.remember(call.id);
        }
        running
    }
}
