//! What is known of hosts at this moment and worth no record: when each was last heard, what it
//! said last, how its link fares.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ghost_domain::{HostId, Monotonic, Timestamp};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::domain::{HostState, Inventory};

/// One host, as long as this replica knows it. Cheap: a link writes it with every frame.
#[derive(Debug)]
pub struct LiveHost {
    host: HostId,
    /// Milliseconds on the monotonic clock, plus one; 0: never.
    heard: AtomicU64,
    /// Wall clock of the same, Unix milliseconds.
    heard_at: AtomicU64,
    linked: AtomicBool,
    /// Microseconds, plus one; 0: unknown.
    round_trip: AtomicU32,
    woken: Notify,
    inventory: Mutex<Option<Arc<Inventory>>>,
    shown: Mutex<Option<(HostState, Timestamp)>>,
}

impl LiveHost {
    pub(super) fn new(host: HostId) -> Self {
        Self {
            host,
            heard: AtomicU64::new(0),
            heard_at: AtomicU64::new(0),
            linked: AtomicBool::new(false),
            round_trip: AtomicU32::new(0),
            woken: Notify::new(),
            inventory: Mutex::new(None),
            shown: Mutex::new(None),
        }
    }

    /// The host.
    pub fn host(&self) -> HostId {
        self.host
    }

    /// A data frame of the host came.
    pub fn heard(&self, now: Monotonic, at: Timestamp) {
        let millis = now.since(Monotonic::default()).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX - 1);
        self.heard.store(millis + 1, Ordering::Relaxed);
        let at = u64::try_from(at.unix_millis()).unwrap_or(0);
        self.heard_at.store(at, Ordering::Relaxed);
    }

    /// Since when nothing came; `None` where nothing ever did, to this process.
    pub fn silent_for(&self, now: Monotonic) -> Option<Duration> {
        let millis = self.heard.load(Ordering::Relaxed).checked_sub(1)?;
        let heard = Monotonic::from_duration(Duration::from_millis(millis));
        Some(now.since(heard))
    }

    /// When the last frame came, on the wall clock.
    pub fn heard_at(&self) -> Option<Timestamp> {
        let at = self.heard_at.load(Ordering::Relaxed);
        let at = i64::try_from(at).ok().filter(|at| *at > 0)?;
        Some(Timestamp::from_unix_millis(at))
    }

    /// Whether this replica has its link.
    pub fn is_linked(&self) -> bool {
        self.linked.load(Ordering::Relaxed)
    }

    /// This replica has its link now, or not any more.
    pub fn set_linked(&self, linked: bool) {
        self.linked.store(linked, Ordering::Relaxed);
        if !linked {
            self.round_trip.store(0, Ordering::Relaxed);
        }
    }

    /// The round trip of the last ping.
    pub fn round_trip(&self) -> Option<Duration> {
        let micros = self.round_trip.load(Ordering::Relaxed).checked_sub(1)?;
        Some(Duration::from_micros(micros.into()))
    }

    /// A ping was answered.
    pub fn set_round_trip(&self, round_trip: Duration) {
        let micros = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX - 1);
        self.round_trip
            .store(micros.saturating_add(1), Ordering::Relaxed);
    }

    /// Resolves when the host's record, owner or queue may have changed since the last call. No
    /// change is missed between two calls; several become one. For one waiter: the link's session.
    pub async fn changed(&self) {
        self.woken.notified().await;
    }

    pub(super) fn wake(&self) {
        self.woken.notify_one();
    }

    pub(super) fn inventory(&self) -> Option<Arc<Inventory>> {
        self.inventory.lock().clone()
    }

    pub(super) fn set_inventory(&self, inventory: Option<Arc<Inventory>>) {
        *self.inventory.lock() = inventory;
    }

    /// Notes which state is shown; says whether it is another one.
    pub(super) fn show(&self, state: HostState, now: Timestamp) -> bool {
        let mut shown = self.shown.lock();
        match *shown {
            Some((before, _)) if before == state => false,
            _ => {
                *shown = Some((state, now));
                true
            }
        }
    }

    pub(super) fn shown_since(&self, state: HostState) -> Option<Timestamp> {
        self.shown
            .lock()
            .filter(|(shown, _)| *shown == state)
            .map(|(_, since)| since)
    }
}
