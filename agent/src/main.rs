//! `ghost-agent`: turns a Linux host into a host of VMs.

mod compose;
mod config;
mod failpoints;
mod notify;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Turns this host into a host of VMs, through libvirt and KVM.
#[derive(Debug, Parser)]
#[command(name = "ghost-agent", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT; VMs outlive the agent.
    Run {
        /// The configuration; /etc/ghost/agent.yaml where that exists, else the defaults.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check or show the configuration.
    #[command(subcommand)]
    Config(config::Command),
    /// Print the version.
    Version,
    /// Opens a state store on trial, for the agent itself.
    #[command(hide = true)]
    StoreProbe {
        /// The store's folder.
        directory: PathBuf,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run { config } => start(config.as_deref()),
        Command::Config(command) => {
            let (mut out, mut errors) = (std::io::stdout().lock(), std::io::stderr().lock());
            config::execute(&command, &mut out, &mut errors)
                .map_or(ExitCode::FAILURE, ExitCode::from)
        }
        Command::Version => say(&format!("ghost-agent {}", env!("CARGO_PKG_VERSION"))),
        Command::StoreProbe { directory } => ghost_infrastructure::store::probe_main(&directory),
    }
}

fn start(file: Option<&std::path::Path>) -> ExitCode {
    let loaded = match config::load(file) {
        Ok(loaded) => loaded,
        Err(faults) => {
            complain(&faults.to_string());
            return ExitCode::from(config::EXIT_CONFIG);
        }
    };
    match run::run(loaded.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("error: {}", error.message()));
            if let Some(cause) = error.cause() {
                complain(&format!("  cause: {cause}"));
            }
            if let Some(hint) = error.hint_text() {
                complain(&format!("  try: {hint}"));
            }
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) -> ExitCode {
    use std::io::Write;
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Where even this cannot be written nobody is there to read it.
fn complain(text: &str) {
    use std::io::Write;
    drop(writeln!(std::io::stderr(), "{text}"));
}
