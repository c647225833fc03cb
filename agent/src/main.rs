//! `ghost-agent`: turns a Linux host into a host of VMs.

mod compose;
mod config;
mod doctor;
mod failpoints;
mod fleet;
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
    /// Join a fleet: one outbound link to Ghost Core, and this host is one of its hosts.
    ///
    /// Makes this host's key and gets a certificate for it, by a single-use token from
    /// `ghost-core token create`. No port is opened. A running agent connects by itself; what Core
    /// may do then is core.permissions of the configuration.
    Enroll(fleet::EnrollArguments),
    /// Leave the fleet: removes this host's key and certificate. A running agent ends its link.
    Unenroll {
        /// The configuration; /etc/ghost/agent.yaml where that exists, else the defaults.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
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
        Command::Enroll(arguments) => report::with_config(arguments.config.as_deref(), |loaded| {
            fleet::enroll(&loaded, &arguments)
        }),
        Command::Unenroll { config } => {
            report::with_config(config.as_deref(), |loaded| fleet::unenroll(&loaded))
        }
        Command::Version => report::say(&format!("ghost-agent {}", env!("CARGO_PKG_VERSION"))),
        Command::StoreProbe { directory } => ghost_infrastructure::store::probe_main(&directory),
    }
}
