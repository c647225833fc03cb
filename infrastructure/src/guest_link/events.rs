//! Telling what links see to all who listen. Greetings and losses reach everybody; of reports a
//! subscriber who is slow keeps the newest two of each VM.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use ghost_domain::VmId;
use ghost_domain::ports::{GuestEvent, GuestEvents};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Reports of one VM that wait for a subscriber.
const MOST_REPORTS: usize = 2;

#[derive(Debug, Default)]
pub(super) struct Broadcast {
    subscribers: Mutex<Vec<Weak<Subscriber>>>,
}

#[derive(Debug, Default)]
struct Subscriber {
    queue: Mutex<Queue>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<GuestEvent>,
    reports: HashMap<VmId, usize>,
    closed: bool,
}

impl Broadcast {
    pub(super) fn subscribe(&self) -> Box<dyn GuestEvents> {
        let subscriber = Arc::new(Subscriber::default());
        self.subscribers.lock().push(Arc::downgrade(&subscriber));
        Box::new(Events(subscriber))
    }

    pub(super) fn tell(&self, event: &GuestEvent) {
        self.subscribers.lock().retain(|subscriber| {
            let Some(subscriber) = subscriber.upgrade() else {
                return false;
            };
            subscriber.queue.lock().push(event.clone());
            subscriber.more.notify_one();
            true
        });
    }
}

impl Drop for Broadcast {
    fn drop(&mut self) {
        for subscriber in self.subscribers.get_mut() {
            if let Some(subscriber) = subscriber.upgrade() {
                subscriber.queue.lock().closed = true;
                subscriber.more.notify_one();
            }
        }
    }
}

impl Queue {
    fn push(&mut self, event: GuestEvent) {
        if let GuestEvent::Telemetry { vm, .. } = &event {
            let waiting = self.reports.entry(*vm).or_default();
            if *waiting >= MOST_REPORTS {
                let oldest = self.events.iter().position(
                    |known| matches!(known, GuestEvent::Telemetry { vm: other, .. } if other == vm),
                );
                if let Some(oldest) = oldest {
                    self.events.remove(oldest);
                }
            } else {
                *waiting += 1;
            }
        }
        self.events.push_back(event);
    }

    fn pop(&mut self) -> Option<GuestEvent> {
        let event = self.events.pop_front()?;
        if let GuestEvent::Telemetry { vm, .. } = &event
            && let Some(waiting) = self.reports.get_mut(vm)
        {
            *waiting -= 1;
            if *waiting == 0 {
                self.reports.remove(vm);
            }
        }
        Some(event)
    }
}

struct Events(Arc<Subscriber>);

#[async_trait]
impl GuestEvents for Events {
    async fn next(&mut self) -> Option<GuestEvent> {
        loop {
            {
                let mut queue = self.0.queue.lock();
                if let Some(event) = queue.pop() {
                    return Some(event);
                }
                if queue.closed {
                    return None;
                }
            }
            self.0.more.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ghost_domain::guest::{GuestHello, GuestTelemetry};

    #[tokio::test]
    async fn the_slow_lose_old_reports_and_nothing_else() {
        let broadcast = Broadcast::default();
        let mut events = broadcast.subscribe();
        let vm = VmId::random();
        let report = |cpus| GuestEvent::Telemetry {
            vm,
            report: Box::new(GuestTelemetry {
                cpus,
                ..Default::default()
            }),
        };
        let connected = GuestEvent::Connected {
            vm,
            hello: GuestHello::default(),
            rebooted: false,
        };
        let lost = GuestEvent::Disconnected {
            vm,
            reason: "x".into(),
        };
        for round in 0..100 {
            broadcast.tell(&connected);
            broadcast.tell(&report(round));
            broadcast.tell(&lost);
        }
        drop(broadcast);
        let (mut links, mut reports) = (0, Vec::new());
        while let Some(event) = events.next().await {
            match event {
                GuestEvent::Telemetry { report, .. } => reports.push(report.cpus),
                _ => links += 1,
            }
        }
        assert_eq!((links, reports), (200, vec![98, 99]));
    }
}
