//! `ghost-swarm`: many simulated hosts in one process, for the load that a fleet is.
//!
//! Each host joined Core by a token of its own, has its own key and certificate, and keeps its link
//! up by the very code of the agent (`ghost_infrastructure::core_link`): TLS 1.3, yamux, pings,
//! heartbeats, back-off. Only what it tells of itself is made up.
//!
//! Who starts it speaks with it by lines: a command on its standard input, one line as the answer.
//! It ends with its standard input, so that nothing outlives a benchmark that is killed.
//!
//! ```text
//! enrol 1000   -> enrolled 1000             hosts that have an identity
//! link 1000    -> started 1000              hosts that keep a link up from now on
//! status       -> up 998 waiting 2 refused 0 ever-refused 0 heartbeats 1423 lost 0 links 1000
//! ```

mod bare;
mod handler;
mod hosts;
mod streams;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use ghost_infrastructure::process::raise_open_files;
use tokio::io::{AsyncBufReadExt, BufReader};

/// Anything that ends it.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Plays many hosts at once.
#[derive(Debug, Parser)]
#[command(name = "ghost-swarm", arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Hosts of one Core.
    Hosts {
        /// Where the identities are kept; one folder a host.
        #[arg(long)]
        folder: PathBuf,
        /// Core's local socket, where the tokens come from.
        #[arg(long)]
        socket: PathBuf,
        /// VMs of each host.
        #[arg(long, default_value_t = 2)]
        vms: u32,
    },
    /// The floor of what a link costs: a server that accepts TLS connections with client
    /// certificates and does nothing else. Commands: `resident`.
    BareServer {
        /// Where the client finds its certificate.
        #[arg(long)]
        folder: PathBuf,
    },
    /// Its client. Commands: `open N`.
    BareClient {
        /// Where its certificate is.
        #[arg(long)]
        folder: PathBuf,
        /// The server.
        #[arg(long)]
        address: SocketAddr,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be there to read it.
            drop(writeln!(std::io::stderr(), "ghost-swarm: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    // A socket for each host, and some while one is replaced by the next.
    raise_open_files(65_536);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        match command {
            Command::Hosts {
                folder,
                socket,
                vms,
            } => {
                let mut hosts = hosts::Hosts::new(folder, socket, vms);
                each_line(async |words| match words {
                    ["enrol", count] => {
                        let enrolled = hosts.enrol(count.parse()?).await?;
                        Ok(format!("enrolled {enrolled}"))
                    }
                    ["link", count] => {
                        let started = hosts.link(count.parse()?).await?;
                        Ok(format!("started {started}"))
                    }
                    ["status"] => Ok(hosts.status()),
                    other => Err(format!("no such command: {other:?}").into()),
                })
                .await
            }
            Command::BareServer { folder } => bare::serve(&folder).await,
            Command::BareClient { folder, address } => bare::dial(&folder, address).await,
        }
    });
    // Ten thousand links that say goodbye would take their time, and nobody waits for it.
    runtime.shutdown_background();
    served
}

/// Answers each line of the standard input by one on the standard output, to its end.
async fn each_line(
    mut answer: impl AsyncFnMut(&[&str]) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match answer(&words).await {
            Ok(answer) => answer,
            Err(error) => format!("error {error}"),
        };
        say(&answer)?;
    }
    Ok(())
}

fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}
