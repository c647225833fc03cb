//! Chance with a seed, which is printed: a failure can be had again.

use std::time::{Duration, SystemTime};

/// xorshift64*, good enough to choose moments.
pub(crate) struct Random(u64);

impl Random {
    /// Seeded by `GHOST_E2E_SEED`, or by the clock; says by what.
    pub(crate) fn seeded(what: &str) -> Self {
        let seed = std::env::var("GHOST_E2E_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(|| {
                let now = SystemTime::now()
                    .duration_since(SystemTime::UNIX_EPOCH)
                    .unwrap();
                now.as_secs() ^ u64::from(now.subsec_nanos())
            });
        println!("{what}: GHOST_E2E_SEED={seed}");
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % most
    }

    pub(crate) fn pick<'a, T>(&mut self, among: &'a [T]) -> &'a T {
        let most = u64::try_from(among.len()).unwrap();
        &among[usize::try_from(self.below(most)).unwrap()]
    }

    pub(crate) fn moment(&mut self, most: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(most.as_micros()).unwrap()))
    }
}
