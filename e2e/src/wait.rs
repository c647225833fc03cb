//! Waiting for a condition, with a deadline: no test sleeps for a guessed time.

use std::time::{Duration, Instant};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Looks until `look` gives something; `None` when the time is up.
pub fn poll<T>(within: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Looks until `look` gives something.
///
/// # Panics
/// When the time is up, naming `what`.
#[track_caller]
#[expect(clippy::panic, reason = "the test cannot go on")]
pub fn until<T>(what: &str, within: Duration, look: impl FnMut() -> Option<T>) -> T {
    match poll(within, look) {
        Some(found) => found,
        None => panic!("{what}: not within {} s", within.as_secs_f32()),
    }
}

/// Looks until `look` says `Ok`; the last `Err` stands in the panic.
///
/// # Panics
/// When the time is up, naming `what` and the last error.
#[track_caller]
#[expect(clippy::panic, reason = "the test cannot go on")]
pub fn until_ok<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let mut last = String::new();
    let found = poll(within, || match look() {
        Ok(found) => Some(found),
        Err(error) => {
            last = error;
            None
        }
    });
    match found {
        Some(found) => found,
        None => panic!(
            "{what}: not within {} s; last: {last}",
            within.as_secs_f32()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_found_and_what_does_not_is_reported() {
        let mut looks = 0;
        let found = poll(Duration::from_secs(60), || {
            looks += 1;
            (looks == 3).then_some("there")
        });
        assert_eq!(found, Some("there"));
        assert_eq!(poll(Duration::ZERO, || None::<()>), None);
        let panicked = std::panic::catch_unwind(|| {
            until_ok("the thing", Duration::ZERO, || {
                Err::<(), _>("no such thing".into())
            })
        });
        let text = *panicked.unwrap_err().downcast::<String>().unwrap();
        assert!(
            text.contains("the thing") && text.contains("no such thing"),
            "{text}"
        );
    }
}
