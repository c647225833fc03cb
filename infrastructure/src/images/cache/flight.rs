//! One download for all who ask for one source at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use ghost_domain::ports::{CachedContent, ImageSource, ProgressSink};
use ghost_domain::{Progress, Result};

use super::DirectoryImageCache;

pub(super) type Flight = Shared<BoxFuture<'static, Result<CachedContent>>>;
type WeakFlight = WeakShared<BoxFuture<'static, Result<CachedContent>>>;

/// The downloads under way, by source.
pub(super) type Flights = Mutex<HashMap<String, (WeakFlight, Arc<FanOut>)>>;

/// Passes progress on to everybody who waits for one download.
#[derive(Default)]
pub(super) struct FanOut(Mutex<FanOutState>);

#[derive(Default)]
struct FanOutState {
    last: Option<Progress>,
    next: u64,
    sinks: HashMap<u64, Arc<dyn ProgressSink>>,
}

pub(super) struct Listening {
    fan_out: Arc<FanOut>,
    id: u64,
}

impl FanOut {
    fn state(&self) -> MutexGuard<'_, FanOutState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn join(self: &Arc<Self>, sink: Arc<dyn ProgressSink>) -> Listening {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        if let Some(last) = &state.last {
            sink.report(last.clone());
        }
        state.sinks.insert(id, sink);
        drop(state);
        Listening {
            fan_out: Arc::clone(self),
            id,
        }
    }
}

impl ProgressSink for FanOut {
    fn report(&self, progress: Progress) {
        let mut state = self.state();
        for sink in state.sinks.values() {
            sink.report(progress.clone());
        }
        state.last = Some(progress);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.fan_out.state().sinks.remove(&self.id);
    }
}

impl DirectoryImageCache {
    /// Joins the download of this source that is under way, or starts one.
    pub(super) fn flight(&self, source: &ImageSource) -> (Flight, Arc<FanOut>) {
        let key = format!("{source:?}");
        let mut flights = self
            .inner
            .flights
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((weak, fan_out)) = flights.get(&key)
            && let Some(flight) = weak.upgrade()
            // A finished one would hand on an old failure.
            && flight.peek().is_none()
        {
            return (flight, Arc::clone(fan_out));
        }
        flights.retain(|_, (weak, _)| weak.upgrade().is_some());
        let fan_out = Arc::new(FanOut::default());
        let (inner, source, sink) = (
            Arc::clone(&self.inner),
            source.clone(),
            Arc::clone(&fan_out) as Arc<dyn ProgressSink>,
        );
        let flight = async move { inner.pull(&source, sink).await }
            .boxed()
            .shared();
        if let Some(weak) = flight.downgrade() {
            flights.insert(key, (weak, Arc::clone(&fan_out)));
        }
        (flight, fan_out)
    }
}
