//! `ghost-agent`: turns a Linux host into a host of VMs.

mod compose;
mod config;
mod doctor;
mod failpoints;
mod report;
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
    /// Say whether this host is fit to run VMs; every finding comes with its fix.
    ///
    /// Looks and changes nothing. Exit codes: 0 nothing is fatal, 1 something is, 78 the
    /// configuration cannot be used.
    Doctor {
        /// The configuration; /etc/ghost/agent.yaml where that exists, else the defaults.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// As what the findings are written.
        #[arg(short, long, value_enum, default_value = "text")]
        output: doctor::Output,
    },
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
        Command::Run { config } => report::with_config(config.as_deref(), |loaded| {
            run::run(loaded).map(|()| ExitCode::SUCCESS)
        }),
        Command::Doctor { config, output } => report::with_config(config.as_deref(), |loaded| {
            let fatal = doctor::doctor(&loaded, output, &mut std::io::stdout().lock())?;
            Ok(if fatal {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            })
        }),
        Command::Config(command) => {
            let (mut out, mut errors) = (std::io::stdout().lock(), std::io::stderr().lock());
            config::execute(&command, &mut out, &mut errors)
                .map_or(ExitCode::FAILURE, ExitCode::from)
        }
        Command::Version => report::say(&format!("ghost-agent {}", env!("CARGO_PKG_VERSION"))),
        Command::StoreProbe { directory } => ghost_infrastructure::store::probe_main(&directory),
    }
}
