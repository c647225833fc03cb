//! The last events, for replay, and a broadcast of new ones.

use std::collections::VecDeque;

use ghost_domain::{Event, Timestamp};
use parking_lot::Mutex;
use tokio::sync::broadcast;

use super::Notice;

/// How many events are remembered. A watcher that falls further behind sees a gap in the
/// sequence and lists anew.
const REMEMBERED: usize = 1_000;

pub(crate) struct EventLog {
    inner: Mutex<Inner>,
}

struct Inner {
    recent: VecDeque<Event>,
    sequence: u64,
    sender: broadcast::Sender<Event>,
}

/// Events as they come; see [`crate::event::WatchEvents`].
#[derive(Debug)]
pub struct EventStream {
    replay: VecDeque<Event>,
    receiver: broadcast::Receiver<Event>,
}

impl EventLog {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                recent: VecDeque::new(),
                sequence: 0,
                sender: broadcast::Sender::new(REMEMBERED),
            }),
        }
    }

    pub(crate) fn publish(&self, at: Timestamp, notice: Notice) {
        let mut inner = self.inner.lock();
        inner.sequence += 1;
        let event = Event {
            sequence: inner.sequence,
            at,
            kind: notice.kind,
            vm: notice.vm,
            subject: notice.subject,
        };
        tracing::info!(
            event = event.kind.name(),
            vm = event.vm.map(tracing::field::display),
            subject = %event.subject,
            "{}",
            event.kind.describe()
        );
        if inner.recent.len() == REMEMBERED {
            inner.recent.pop_front();
        }
        inner.recent.push_back(event.clone());
        // Nobody listening is no fault.
        drop(inner.sender.send(event));
    }

    pub(crate) fn recent(&self) -> Vec<Event> {
        self.inner.lock().recent.iter().cloned().collect()
    }

    pub(crate) fn subscribe(&self, replay: bool) -> EventStream {
        // Under one lock, so that no event falls between the replay and the subscription.
        let inner = self.inner.lock();
        EventStream {
            replay: if replay {
                inner.recent.clone()
            } else {
                VecDeque::new()
            },
            receiver: inner.sender.subscribe(),
        }
    }
}

impl EventStream {
    /// What is left of the replay, without waiting.
    pub fn replayed(&mut self) -> Option<Event> {
        self.replay.pop_front()
    }

    /// The next event: first the replay, then what comes. `None` when the agent ends.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(event) = self.replay.pop_front() {
            return Some(event);
        }
        loop {
            match self.receiver.recv().await {
                Ok(event) => return Some(event),
                // The gap shows in the sequence numbers.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}
