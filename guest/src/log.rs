//! What the agent has to say to whoever runs the guest: a line on stderr, which the service manager
//! keeps.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// While file systems are frozen a log line may block on one of them for ever, and with it the thaw.
static SILENT: AtomicBool = AtomicBool::new(false);

/// Says nothing until told otherwise.
pub fn set_silent(silent: bool) {
    SILENT.store(silent, Ordering::SeqCst);
}

/// Writes one line. Control characters of it are escaped: much of what is logged came from elsewhere.
pub fn line(text: &str) {
    if SILENT.load(Ordering::SeqCst) {
        return;
    }
    let mut out = String::with_capacity(text.len() + 16);
    out.push_str("ghost-guest: ");
    for character in text.chars().take(2000) {
        if character.is_control() {
            out.extend(character.escape_default());
        } else {
            out.push(character);
        }
    }
    out.push('\n');
    // There is nobody left to tell where stderr is gone.
    let _ = std::io::stderr().write_all(out.as_bytes());
}

/// Logs a formatted line.
macro_rules! say {
    ($($part:tt)*) => { $crate::log::line(&format!($($part)*)) };
}
pub(crate) use say;
