//! How much a guest may ask of the host in a time.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket. Starts full.
#[derive(Debug)]
pub(super) struct Bucket {
    tokens: f64,
    burst: f64,
    per_second: f64,
    at: Instant,
}

impl Bucket {
    /// `burst` at once, `per_second` in the long run.
    pub(super) fn new(burst: f64, per_second: f64) -> Self {
        Self {
            tokens: burst,
            burst,
            per_second,
            at: Instant::now(),
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * self.per_second).min(self.burst);
    }

    /// Takes `count` tokens where they are there.
    pub(super) fn take(&mut self, now: Instant, count: f64) -> bool {
        self.refill(now);
        let enough = self.tokens >= count;
        if enough {
            self.tokens -= count;
        }
        enough
    }

    /// Takes `count` tokens, into debt where they are not there, and says how long to pause until
    /// the debt is paid.
    pub(super) fn spend(&mut self, now: Instant, count: f64) -> Option<Duration> {
        self.refill(now);
        self.tokens -= count;
        (self.tokens < 0.0).then(|| {
            // At least the timer's own resolution, so that a flood costs few wake-ups.
            Duration::from_secs_f64((-self.tokens / self.per_second).clamp(0.002, 5.0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let mut bucket = Bucket::new(3.0, 10.0);
        let start = bucket.at;
        for _ in 0..3 {
            assert!(bucket.take(start, 1.0));
        }
        assert!(!bucket.take(start, 1.0));
        let later = start + Duration::from_millis(100);
        assert!(bucket.take(later, 1.0) && !bucket.take(later, 1.0));
        // Never more than the burst, however long nothing came.
        let much_later = later + Duration::from_secs(3600);
        assert!(bucket.take(much_later, 3.0) && !bucket.take(much_later, 1.0));
        // A clock that seems to go back gives nothing away and does not panic.
        assert!(!bucket.take(start, 1.0));
    }

    #[test]
    fn debts_are_paid_by_pausing() {
        let mut bucket = Bucket::new(1.0, 10.0);
        let start = bucket.at;
        assert_eq!(bucket.spend(start, 1.0), None);
        assert_eq!(bucket.spend(start, 5.0), Some(Duration::from_millis(500)));
        assert_eq!(bucket.spend(start + Duration::from_secs(1), 1.0), None);
    }
}
