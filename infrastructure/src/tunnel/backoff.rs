//! When to try again.

use std::time::Duration;

use rand::Rng;

/// How waits grow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackoffOptions {
    /// The first wait.
    pub initial: Duration,
    /// The longest.
    pub most: Duration,
    /// Each is this many times the one before.
    pub multiplier: f64,
}

impl Default for BackoffOptions {
    /// One second, doubling to a minute.
    fn default() -> Self {
        Self {
            initial: Duration::from_secs(1),
            most: Duration::from_secs(60),
            multiplier: 2.0,
        }
    }
}

/// Waits between tries. Each is drawn from the upper half of what is due, so that hosts that lost
/// the same Core in one moment do not all come back in one moment.
#[derive(Clone, Debug)]
pub struct Backoff {
    options: BackoffOptions,
    due: Duration,
}

impl Backoff {
    /// Begins with the first wait.
    pub fn new(options: BackoffOptions) -> Self {
        Self {
            options,
            due: options.initial.min(options.most),
        }
    }

    /// The next wait.
    pub fn next(&mut self, rng: &mut impl Rng) -> Duration {
        let due = self.due;
        let multiplier = self.options.multiplier;
        // A multiplier that is not a number above one would make the wait shrink, or panic.
        let longer = if multiplier.is_finite() && multiplier > 1.0 {
            Duration::try_from_secs_f64(due.as_secs_f64() * multiplier).unwrap_or(self.options.most)
        } else {
            due
        };
        self.due = longer.min(self.options.most);
        due.mul_f64(rng.random_range(0.5..=1.0))
    }

    /// Begins anew: what was tried worked.
    pub fn reset(&mut self) {
        self.due = self.options.initial.min(self.options.most);
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn it_doubles_to_a_minute_and_is_jittered() {
        let mut backoff = Backoff::new(BackoffOptions::default());
        let mut rng = StdRng::seed_from_u64(7);
        for due in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
            let wait = backoff.next(&mut rng).as_secs_f64();
            let due = f64::from(due);
            assert!((due / 2.0..=due).contains(&wait), "{wait} of {due}");
        }
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_secs(1));

        let first =
            |seed| Backoff::new(BackoffOptions::default()).next(&mut StdRng::seed_from_u64(seed));
        let mut firsts: Vec<Duration> = (0..100).map(first).collect();
        firsts.sort();
        firsts.dedup();
        assert!(firsts.len() > 90, "hosts wait for different times");
    }

    #[test]
    fn absurd_options_do_no_harm() {
        for multiplier in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300] {
            let mut backoff = Backoff::new(BackoffOptions {
                initial: Duration::from_secs(5),
                most: Duration::from_secs(60),
                multiplier,
            });
            let mut rng = StdRng::seed_from_u64(1);
            for _ in 0..50 {
                let wait = backoff.next(&mut rng);
                assert!(wait >= Duration::from_millis(2500) && wait <= Duration::from_secs(60));
            }
        }
    }
}
