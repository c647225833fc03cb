//! `ghost-auditor`: compares what libvirt, the kernel and the disk have with an agent's records.
//! Exit codes: 0 nothing is wrong, 1 something is, 2 it could not look.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use ghost_e2e::auditor::{Hypervisor, Subject, audit_settled};
use ghost_e2e::ctl::Ctl;

/// Names every orphan and every dangling thing of an agent
#[derive(Debug, Parser)]
#[command(name = "ghost-auditor", version)]
struct Arguments {
    /// agent.data_dir of the agent's configuration
    #[arg(long, default_value = "/var/lib/ghost")]
    data_dir: PathBuf,
    /// Where the agent listens: unix:PATH or https://HOST:PORT [default: ghostctl's]
    #[arg(long)]
    endpoint: Option<String>,
    /// libvirt.uri of the agent's configuration
    #[arg(long, default_value = "qemu:///system")]
    uri: String,
    /// The ghostctl to ask with
    #[arg(long, default_value = "ghostctl")]
    ghostctl: PathBuf,
    /// How long what is under way may take to settle, in seconds
    #[arg(long, default_value_t = 5)]
    settle: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let subject = Subject {
        data_dir: arguments.data_dir,
        hypervisor: Hypervisor::parse(&arguments.uri),
        ctl: Ctl::new(arguments.ghostctl, arguments.endpoint),
        partial_downloads: true,
    };
    match audit_settled(&subject, Duration::from_secs(arguments.settle)) {
        Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
        Ok(findings) => {
            let mut out = std::io::stdout().lock();
            for finding in findings {
                // A reader that went away does not change the outcome.
                drop(writeln!(out, "{finding}"));
            }
            ExitCode::from(1)
        }
        Err(error) => {
            drop(writeln!(std::io::stderr(), "error: {error}"));
            ExitCode::from(2)
        }
    }
}
