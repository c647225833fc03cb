//! Progress with a rate: bytes over the last seconds, not since the start.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ghost_domain::Progress;
use ghost_domain::ports::ProgressSink;

const WINDOW: Duration = Duration::from_secs(5);
/// People cannot read faster, and a report may wake watchers.
const INTERVAL: Duration = Duration::from_millis(100);

/// Counts bytes of one phase and reports them.
pub(crate) struct Meter {
    sink: Arc<dyn ProgressSink>,
    phase: &'static str,
    done: u64,
    total: Option<u64>,
    marks: VecDeque<(Instant, u64)>,
    reported: Option<Instant>,
}

impl Meter {
    /// Starts a phase at `done` bytes and reports it.
    pub(crate) fn start(
        sink: Arc<dyn ProgressSink>,
        phase: &'static str,
        done: u64,
        total: Option<u64>,
    ) -> Self {
        let now = Instant::now();
        let mut meter = Self {
            sink,
            phase,
            done,
            total,
            marks: VecDeque::from([(now, done)]),
            reported: None,
        };
        meter.report(now);
        meter
    }

    /// Counts `bytes` more.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.advance(bytes, Instant::now());
    }

    fn advance(&mut self, bytes: u64, now: Instant) {
        self.done = self.done.saturating_add(bytes);
        let finished = self.total == Some(self.done);
        let due = self
            .reported
            .is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL);
        if due || finished {
            self.marks.push_back((now, self.done));
            while self.marks.len() > 2
                && self
                    .marks
                    .front()
                    .is_some_and(|(at, _)| now.saturating_duration_since(*at) > WINDOW)
            {
                self.marks.pop_front();
            }
            self.report(now);
        }
    }

    fn rate(&self, now: Instant) -> Option<u64> {
        let (since, done) = self.marks.front()?;
        let millis = now.saturating_duration_since(*since).as_millis();
        if millis == 0 {
            return None;
        }
        let bytes = u128::from(self.done.saturating_sub(*done));
        u64::try_from(bytes * 1000 / millis).ok()
    }

    fn report(&mut self, now: Instant) {
        self.reported = Some(now);
        self.sink.report(Progress {
            bytes_done: self.done,
            bytes_total: self.total,
            bytes_per_second: self.rate(now),
            ..Progress::phase(self.phase)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<Progress>>);
    impl ProgressSink for Log {
        fn report(&self, progress: Progress) {
            self.0.lock().unwrap().push(progress);
        }
    }

    #[test]
    fn the_rate_is_that_of_the_window() {
        let log = Arc::new(Log::default());
        let mut meter = Meter::start(log.clone(), "downloading", 0, Some(4_000_000));
        let start = meter.marks[0].0;
        for second in 1..=10u64 {
            // 100 kB/s at first, then ten times that.
            let bytes = if second <= 5 { 100_000 } else { 700_000 };
            meter.advance(bytes, start + Duration::from_secs(second));
        }
        let reports = log.0.lock().unwrap();
        assert_eq!(reports[0].bytes_done, 0);
        assert_eq!(reports[5].bytes_per_second, Some(100_000));
        assert_eq!(reports.last().unwrap().bytes_per_second, Some(700_000));
        assert_eq!(reports.last().unwrap().bytes_done, 4_000_000);
    }
}
