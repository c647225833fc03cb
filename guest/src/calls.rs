//! Calls that run in a thread of their own, and the mailbox through which they speak.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use ghost_proto::guest;
use ghost_proto::guest::frame::Envelope;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{self, Stream, StreamData, Telemetry, WindowUpdate};
use rustix::event::EventfdFlags;

use crate::Failure;
use crate::engine::End;
use crate::outbox::CallId;

/// What other threads tell the loop.
pub(crate) enum Mail {
    /// An answer that is not the last.
    Message(u32, Payload),
    /// A frame with contents of a file for a call.
    Frame(u32, Bytes),
    /// The last answer of a call.
    Final(u32, Payload),
    /// All that an execution has started is dead.
    Swept(u32),
    /// A report is ready.
    Telemetry(Box<Telemetry>),
    /// Leave the loop once this call's last answer was sent.
    Leave(u32, End),
}

/// A queue into the loop that wakes it.
#[derive(Clone)]
pub(crate) struct Mailbox {
    inner: Arc<(Mutex<Vec<Mail>>, OwnedFd)>,
}

impl Mailbox {
    pub(crate) fn new() -> rustix::io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            inner: Arc::new((Mutex::new(Vec::new()), fd)),
        })
    }

    pub(crate) fn put(&self, mail: Mail) {
        let mut mails = lock(&self.inner.0);
        mails.push(mail);
        if mails.len() == 1 {
            // Full at 2^64-1 unread wakes: it is readable then anyway.
            let _ = rustix::io::write(&self.inner.1, &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn take(&self) -> Vec<Mail> {
        let mut mails = lock(&self.inner.0);
        let _ = rustix::io::read(&self.inner.1, &mut [0u8; 8]);
        std::mem::take(&mut *mails)
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.1.as_fd()
    }
}

/// A poisoned lock is no reason to give a guest up: all that is held is plain data.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Flow {
    data: VecDeque<Bytes>,
    end: bool,
    cancelled: bool,
    /// What the host may still send.
    credit: u64,
    /// What we may still send.
    window: u64,
}

#[derive(Default)]
struct Shared {
    flow: Mutex<Flow>,
    wake: Condvar,
}

/// What the contents of a call's file go by.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) flow: guest::Flow,
    /// The ids of session and call, where the host knows bulk frames.
    pub(crate) bulk: Option<([u8; 16], CallId)>,
}

/// The loop's side of a call in a thread.
pub(crate) struct Task {
    shared: Arc<Shared>,
    flow: guest::Flow,
}

impl Task {
    /// Starts a thread for a call.
    pub(crate) fn start(
        serial: u32,
        mailbox: Mailbox,
        rules: Rules,
        work: impl FnOnce(&mut Port) -> Result<Payload, Failure> + Send + 'static,
    ) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        {
            let mut flow = lock(&shared.flow);
            flow.credit = rules.flow.window;
            flow.window = rules.flow.window;
        }
        let mut port = Port {
            serial,
            mailbox,
            shared: Arc::clone(&shared),
            rules,
            ungranted: 0,
            later: None,
        };
        std::thread::Builder::new()
            .name("call".into())
            // Hashing and directory lists need little; the default of 2 MiB is only address space,
            // but the guest may have limits on that.
            .stack_size(256 * 1024)
            .spawn(move || {
                let payload = match work(&mut port) {
                    Ok(payload) => payload,
                    Err(failure) => Payload::Error(failure.into()),
                };
                port.mailbox.put(Mail::Final(port.serial, payload));
            })
            .map_err(|error| Failure::io("a thread for the call", &error))?;
        Ok(Self {
            shared,
            flow: rules.flow,
        })
    }

    /// Takes bytes of the host.
    pub(crate) fn data(&self, data: StreamData) -> Result<(), Failure> {
        let mut flow = lock(&self.shared.flow);
        if flow.end {
            return Err(Failure::invalid("data after its end"));
        }
        let size = data.data.len() as u64;
        if size > flow.credit {
            return Err(Failure::invalid("more data than was granted"));
        }
        flow.credit -= size;
        flow.end = data.end;
        if size > 0 {
            flow.data.push_back(data.data);
        }
        self.shared.wake.notify_all();
        Ok(())
    }

    pub(crate) fn grant(&self, bytes: u64) {
        let mut flow = lock(&self.shared.flow);
        // A host that grants the world gets no more than a few windows at once of our memory.
        flow.window = flow.window.saturating_add(bytes).min(4 * self.flow.window);
        self.shared.wake.notify_all();
    }

    pub(crate) fn cancel(&self) {
        lock(&self.shared.flow).cancelled = true;
        self.shared.wake.notify_all();
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// The thread's side.
pub(crate) struct Port {
    serial: u32,
    mailbox: Mailbox,
    shared: Arc<Shared>,
    rules: Rules,
    ungranted: u64,
    /// Closed once the answer is on its way.
    later: Option<OwnedFd>,
}

impl Port {
    /// Closes it after this call's answer.
    pub(crate) fn close_later(&mut self, descriptor: Option<OwnedFd>) {
        self.later = descriptor;
    }

    pub(crate) fn send(&self, payload: Payload) {
        self.mailbox.put(Mail::Message(self.serial, payload));
    }

    /// Has the loop end once the last answer of this call was sent.
    pub(crate) fn leave(&self, end: End) {
        self.mailbox.put(Mail::Leave(self.serial, end));
    }

    /// The next bytes, or `None` at the end.
    pub(crate) fn receive(&mut self) -> Result<Option<Bytes>, Failure> {
        let mut flow = lock(&self.shared.flow);
        loop {
            if flow.cancelled {
                return Err(cancelled());
            }
            if let Some(data) = flow.data.pop_front() {
                return Ok(Some(data));
            }
            if flow.end {
                return Ok(None);
            }
            flow = self
                .shared
                .wake
                .wait(flow)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// So much of what was received is done with.
    pub(crate) fn consumed(&mut self, bytes: u64) {
        self.ungranted += bytes;
        if self.ungranted >= self.rules.flow.grant {
            {
                let mut flow = lock(&self.shared.flow);
                flow.credit = flow.credit.saturating_add(self.ungranted);
            }
            self.send(Payload::WindowUpdate(WindowUpdate {
                stream: Stream::File.into(),
                bytes: self.ungranted,
            }));
            self.ungranted = 0;
        }
    }

    /// Waits until a whole piece may be sent; says how much that is.
    pub(crate) fn room(&self) -> Result<usize, Failure> {
        let most = self.rules.flow.most;
        let mut flow = lock(&self.shared.flow);
        loop {
            if flow.cancelled {
                return Err(cancelled());
            }
            // What is left of a window goes into no small piece of its own: the host grants before
            // less than a piece is left of what it has not granted (see `guest::Flow`).
            if flow.window >= most as u64 {
                return Ok(most);
            }
            flow = self
                .shared
                .wake
                .wait(flow)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Where the host knows bulk frames, one to be filled with at most so many bytes.
    pub(crate) fn envelope(&self, most: usize) -> Option<Envelope> {
        let (session, id) = self.rules.bulk?;
        Envelope::new(&id, &session, most).ok()
    }

    /// Sends what was put in an envelope, at most what [`Port::room`] allowed.
    pub(crate) fn send_envelope(&self, envelope: Envelope) -> Result<(), Failure> {
        self.used(envelope.written().len());
        let frame = envelope
            .seal()
            .map_err(|error| Failure::new("internal", error.to_string()))?;
        self.mailbox.put(Mail::Frame(self.serial, frame));
        Ok(())
    }

    /// Sends bytes that [`Port::room`] allowed.
    pub(crate) fn send_data(&self, data: Bytes, end: bool) {
        self.used(data.len());
        self.send(Payload::StreamData(StreamData {
            stream: Stream::File.into(),
            data,
            end,
        }));
    }

    fn used(&self, bytes: usize) {
        let mut flow = lock(&self.shared.flow);
        flow.window = flow.window.saturating_sub(bytes as u64);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        lock(&self.shared.flow).cancelled
    }
}

pub(crate) fn cancelled() -> Failure {
    Failure::new("cancelled", "the call was cancelled")
}

/// The final answer of what has none of its own.
pub(crate) fn done() -> Payload {
    Payload::Done(v1::Done {})
}
