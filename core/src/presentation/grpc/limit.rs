//! How much one caller may ask.

use std::num::NonZeroU32;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ghost_domain::{Error, ErrorCode, Result};
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

/// What one identity may ask.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Calls a second, over time.
    pub per_second: NonZeroU32,
    /// Calls at once, above that.
    pub burst: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_second: NonZeroU32::new(50).unwrap_or(NonZeroU32::MIN),
            burst: NonZeroU32::new(200).unwrap_or(NonZeroU32::MIN),
        }
    }
}

/// Those who have not been heard for this long are forgotten.
const FORGET: Duration = Duration::from_secs(60);

/// A limit for each identity by itself.
pub(super) struct Limiter {
    all: DefaultKeyedRateLimiter<String>,
    clock: DefaultClock,
}

impl Limiter {
    /// Call it within a Tokio runtime.
    pub(super) fn start(limits: Limits) -> Arc<Self> {
        let quota = Quota::per_second(limits.per_second).allow_burst(limits.burst);
        let limiter = Arc::new(Self {
            all: RateLimiter::keyed(quota),
            clock: DefaultClock::default(),
        });
        tokio::spawn(forget(Arc::downgrade(&limiter)));
        limiter
    }

    /// Counts a call of `who`.
    ///
    /// # Errors
    /// `TooManyRequests`, saying when to come again.
    pub(super) fn take(&self, who: &str) -> Result<()> {
        self.all.check_key(&who.to_owned()).map_err(|not_until| {
            let wait = not_until.wait_time_from(self.clock.now());
            Error::new(
                ErrorCode::TooManyRequests,
                format!("{who} asks too much in too short a time"),
            )
            .hint("ask more slowly, or have limits.requests_per_second of Core raised")
            .retry_after(wait)
        })
    }
}

async fn forget(limiter: Weak<Limiter>) {
    loop {
        tokio::time::sleep(FORGET).await;
        let Some(limiter) = limiter.upgrade() else {
            return;
        };
        limiter.all.retain_recent();
        limiter.all.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_has_a_limit_by_itself() {
        let limiter = Limiter::start(Limits {
            per_second: NonZeroU32::MIN,
            burst: NonZeroU32::new(3).unwrap(),
        });
        for _ in 0..3 {
            limiter.take("alice").unwrap();
        }
        let error = limiter.take("alice").unwrap_err();
        assert_eq!(error.code(), ErrorCode::TooManyRequests);
        assert!(error.retry_delay().is_some());
        limiter.take("bob").unwrap();
    }
}
