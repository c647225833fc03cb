//! The hostile guest as a program. In a guest it takes the place of the agent:
//!
//! ```text
//! hostile-guest --device /dev/virtio-ports/org.ghost.agent.0 garbage
//! ```
//!
//! and outside of one it takes QEMU's place too: `hostile-guest --listen guest.sock garbage`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use ghost_e2e::hostile::{Behaviour, attack};

#[derive(Debug, Parser)]
#[command(about = "Plays a guest that means harm")]
struct Arguments {
    /// What it does.
    #[arg(value_parser = parse)]
    behaviour: Behaviour,
    /// The virtio-serial port of the guest.
    #[arg(long, conflicts_with = "listen", required_unless_present = "listen")]
    device: Option<PathBuf>,
    /// A socket to make, as QEMU does.
    #[arg(long)]
    listen: Option<PathBuf>,
    /// After so many seconds it ends; at most ten minutes.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
}

fn parse(name: &str) -> Result<Behaviour, String> {
    Behaviour::parse(name).ok_or_else(|| {
        let all: Vec<&str> = Behaviour::ALL.iter().map(|one| one.as_str()).collect();
        format!("one of: {}", all.join(", "))
    })
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let stop = Arc::new(AtomicBool::new(false));
    let timer = {
        let stop = Arc::clone(&stop);
        let seconds = arguments.seconds;
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(seconds));
            stop.store(true, Ordering::Relaxed);
            // A write that blocks ends with the process.
            std::thread::sleep(Duration::from_secs(2));
            std::process::exit(0);
        })
    };
    let result = run(&arguments, &stop);
    drop(timer);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be there to read it.
            drop(writeln!(io::stderr(), "error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, stop: &AtomicBool) -> io::Result<()> {
    let listener = match &arguments.listen {
        Some(path) => Some(UnixListener::bind(path)?),
        None => None,
    };
    while !stop.load(Ordering::Relaxed) {
        let channel = match (&listener, &arguments.device) {
            (Some(listener), _) => File::from(OwnedFd::from(listener.accept()?.0)),
            (None, Some(device)) => OpenOptions::new().read(true).write(true).open(device)?,
            (None, None) => return Ok(()),
        };
        match attack(channel, arguments.behaviour, stop) {
            Ok(sent) => drop(writeln!(io::stdout(), "sent {sent} bytes")),
            Err(error) => drop(writeln!(io::stderr(), "the channel: {error}")),
        }
        // The host has hung up: it holds this guest off.
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
