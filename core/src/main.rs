//! `ghost-core`: joins hosts behind NAT into a fleet.

mod compose;
mod config;
mod replicas;
mod report;
mod run;
mod token;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Joins hosts into a fleet: each dials Core, and all are reached through it.
#[derive(Debug, Parser)]
#[command(name = "ghost-core", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT; hosts and their VMs outlive Core.
    Run {
        /// The configuration; /etc/ghost/core.yaml where that exists, else the defaults.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Check or show the configuration.
    #[command(subcommand)]
    Config(config::Command),
    /// Make tokens by which hosts and people join.
    #[command(subcommand)]
    Token(token::Command),
    /// Print the version.
    Version,
    /// Opens a store on trial, for Core itself.
    #[command(hide = true)]
    StoreProbe {
        /// The store's folder.
        directory: PathBuf,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run { config } => report::with_config(config.as_deref(), |loaded| {
            run::run(loaded).map(|()| ExitCode::SUCCESS)
        }),
        Command::Config(command) => {
            let (mut out, mut errors) = (std::io::stdout().lock(), std::io::stderr().lock());
            config::execute(&command, &mut out, &mut errors)
                .map_or(ExitCode::FAILURE, ExitCode::from)
        }
        Command::Token(command) => report::outcome(token::execute(&command)),
        Command::Version => report::say(&format!("ghost-core {}", env!("CARGO_PKG_VERSION"))),
        Command::StoreProbe { directory } => ghost_infrastructure::store::probe_main(&directory),
    }
}
