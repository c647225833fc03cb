//! The system's clocks behind the [`Clock`] port.

use std::time::{Instant, SystemTime};

use ghost_domain::ports::Clock;
use ghost_domain::{Monotonic, Timestamp};

/// The wall clock and the monotonic clock of this machine; marks count from its making.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    started: Instant,
}

impl SystemClock {
    /// A clock whose monotonic marks begin now. A process makes one and shares it: marks of two
    /// clocks cannot be compared.
    #[expect(
        clippy::new_without_default,
        reason = "`default()` would hide that now matters"
    )]
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        SystemTime::now().into()
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(self.started.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn both_clocks_go_forward_from_the_right_place() {
        let clock = SystemClock::new();
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now = clock.now();
        let first = clock.monotonic();
        let later = clock.monotonic();
        assert!(now.unix_millis() >= i64::try_from(before.as_millis()).unwrap());
        assert!(later >= first);
        // Counted from the clock's making and not from the host's boot.
        assert!(first.since(Monotonic::default()) <= clock.started.elapsed());
    }
}
