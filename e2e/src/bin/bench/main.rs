//! `make bench`: the figures that Ghost promises, each beside its floor or its peer, measured in
//! one run so that the ratio means something on any machine. Budgets are told, never enforced: a
//! figure that misses its budget says so.
//!
//! Pairs are measured alternately (A B A B …) and told as medians. The run is done by a child, so
//! that the parent cleans up also after an interruption.

mod figures;
mod fleet;
mod hostile;
mod inside;
mod report;
mod thousand;

use std::io::Write as _;
use std::process::ExitCode;

use ghost_e2e::{agent, core, swarm};

/// Set for the child.
const INNER: &str = "GHOST_BENCH_INNER";

fn main() -> ExitCode {
    if std::env::var_os(INNER).is_some() {
        return match figures::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                say_to_stderr(&format!("error: {error}"));
                ExitCode::FAILURE
            }
        };
    }
    match supervise() {
        Ok(code) => code,
        Err(error) => {
            say_to_stderr(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn say_to_stderr(text: &str) {
    // Nobody may be there to read it.
    drop(writeln!(std::io::stderr(), "{text}"));
}

/// Runs the child to its end, or ends it when told to; either way what it left is removed.
fn supervise() -> std::io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut child = tokio::process::Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(INNER, "1")
            .spawn()?;
        let pid = child.id().unwrap_or_default();
        let code = tokio::select! {
            ended = child.wait() => match ended?.success() {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            },
            _ = interrupt.recv() => ExitCode::from(130),
            _ = terminate.recv() => ExitCode::from(143),
        };
        // It may be gone already.
        drop(child.kill().await);
        agent::sweep_of(|known| known == pid);
        core::sweep_of(|known| known == pid);
        swarm::sweep_of(|known| known == pid);
        Ok(code)
    })
}
