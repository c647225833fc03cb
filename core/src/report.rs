//! How a command of the program ends: what goes wrong is told on standard error as what, why and
//! what to do, and the exit code says which kind it was.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use ghost_domain::Result;

use crate::config::{self, Loaded};

/// Loads the configuration and acts on it; what goes wrong is told on standard error.
pub(crate) fn with_config(
    file: Option<&Path>,
    act: impl FnOnce(Loaded) -> Result<ExitCode>,
) -> ExitCode {
    match config::load(file) {
        Ok(loaded) => outcome(act(loaded)),
        Err(faults) => {
            complain(&faults.to_string());
            ExitCode::from(config::EXIT_CONFIG)
        }
    }
}

/// Tells how it went.
pub(crate) fn outcome(outcome: Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        complain(&format!("error: {}", error.message()));
        if let Some(cause) = error.cause() {
            complain(&format!("  cause: {cause}"));
        }
        if let Some(hint) = error.hint_text() {
            complain(&format!("  try: {hint}"));
        }
        ExitCode::FAILURE
    })
}

/// Writes a line of data.
pub(crate) fn say(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Writes a line for people, beside the data.
pub(crate) fn note(text: &str) {
    complain(text);
}

/// Where even this cannot be written nobody is there to read it.
fn complain(text: &str) {
    drop(writeln!(std::io::stderr(), "{text}"));
}
