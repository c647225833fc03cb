//! A wall clock for some processes alone, which a test can step while they run: libfaketime of
//! Debian's packages, preloaded. The real machine's clock stays as it is, and so do the clocks that
//! only go forward: what is stepped is what `settimeofday` would step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;

/// Where Debian's package `libfaketime` puts it; the one for programs with threads.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// A clock that runs as the real one does, and so many seconds beside it.
pub struct FakeClock {
    folder: TempDir,
    seconds: i64,
    steps: AtomicU32,
}

impl Default for FakeClock {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeClock {
    /// One that shows the real time so far.
    ///
    /// # Panics
    /// Where libfaketime is not installed.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn new() -> Self {
        assert!(
            Path::new(LIBRARY).is_file(),
            "{LIBRARY} is missing; run: deploy/host-setup.sh"
        );
        let clock = Self {
            folder: tempfile::Builder::new()
                .prefix(&format!("ghost-e2e-clock-{}-", std::process::id()))
                .tempdir()
                .expect("a folder for the clock"),
            seconds: 0,
            steps: AtomicU32::new(0),
        };
        clock.write();
        clock
    }

    /// What has to stand in the environment of a process that goes by this clock.
    pub fn environment(&self) -> [(&'static str, String); 5] {
        [
            ("LD_PRELOAD", LIBRARY.to_owned()),
            ("FAKETIME_TIMESTAMP_FILE", self.file().display().to_string()),
            // Each look at the clock reads the file: a step is seen at once.
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("NO_FAKE_STAT", "1".to_owned()),
        ]
    }

    /// Steps it forward.
    pub fn forward(&mut self, step: Duration) {
        self.seconds += seconds(step);
        self.write();
    }

    /// Steps it back.
    pub fn back(&mut self, step: Duration) {
        self.seconds -= seconds(step);
        self.write();
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("offset")
    }

    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    fn write(&self) {
        let step = self.steps.fetch_add(1, Ordering::Relaxed);
        let new = self.folder.path().join(format!("offset.{step}"));
        fs::write(&new, format!("{:+}\n", self.seconds)).expect("the clock's file");
        // Nobody ever reads half of it.
        fs::rename(&new, self.file()).expect("the clock's file");
    }
}

#[expect(clippy::expect_used, reason = "the test cannot go on")]
fn seconds(step: Duration) -> i64 {
    i64::try_from(step.as_secs()).expect("a step within this world's time")
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn a_step_is_seen_by_the_processes_of_the_clock_alone() {
        let mut clock = FakeClock::new();
        let shown = |clock: &FakeClock| {
            let output = Command::new("date")
                .arg("+%s")
                .envs(clock.environment())
                .output()
                .unwrap();
            let shown: i64 = String::from_utf8_lossy(&output.stdout)
                .trim()
                .parse()
                .unwrap();
            let real = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap()
                .as_secs();
            shown - i64::try_from(real).unwrap()
        };
        assert!(shown(&clock).abs() < 60);
        clock.forward(Duration::from_secs(3600));
        assert!((shown(&clock) - 3600).abs() < 60);
        clock.back(Duration::from_secs(7200));
        assert!((shown(&clock) + 3600).abs() < 60);
    }
}
