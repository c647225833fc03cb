//! The hostile guest as a program. In a guest it takes the place of the agent:
//!
//! ```text
//! hostile-guest --device /dev/virtio-ports/org.ghost.agent.0 garbage
//! hostile-guest --device /dev/virtio-ports/org.ghost.agent.0 --plan burn:1000,garbage:2000
//! ```
//!
//! and outside of one it takes QEMU's place too: `hostile-guest --listen guest.sock garbage`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use ghost_hostile::{BURN, Behaviour, attack};

/// Longer it never goes on.
const MOST: Duration = Duration::from_secs(600);

#[derive(Debug, Parser)]
#[command(about = "Plays a guest that means harm")]
struct Arguments {
    /// What it does.
    #[arg(value_parser = parse, required_unless_present = "plan")]
    behaviour: Option<Behaviour>,
    /// The virtio-serial port of the guest.
    #[arg(long, conflicts_with = "listen", required_unless_present = "listen")]
    device: Option<PathBuf>,
    /// A socket to make, as QEMU does.
    #[arg(long)]
    listen: Option<PathBuf>,
    /// One behaviour after the other, each for so many milliseconds: garbage:2000,empty:500. `burn`
    /// uses the processor and leaves the channel alone. Each is told on stdout as it begins.
    #[arg(long, value_parser = parse_step, value_delimiter = ',', requires = "device", conflicts_with = "behaviour")]
    plan: Vec<Step>,
    /// After so many seconds it ends; at most ten minutes.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
}

/// A part of a plan; no behaviour: it only burns.
#[derive(Clone, Copy, Debug)]
struct Step(Option<Behaviour>, Duration);

fn parse(name: &str) -> Result<Behaviour, String> {
    Behaviour::parse(name).ok_or_else(|| {
        let all: Vec<&str> = Behaviour::ALL.iter().map(|one| one.as_str()).collect();
        format!("one of: {}", all.join(", "))
    })
}

fn parse_step(text: &str) -> Result<Step, String> {
    let (name, time) = text.split_once(':').ok_or("NAME:MILLISECONDS")?;
    let behaviour = match name {
        BURN => None,
        name => Some(parse(name)?),
    };
    let time: u64 = time
        .parse()
        .map_err(|_| format!("{time:?} is no number of milliseconds"))?;
    Ok(Step(behaviour, Duration::from_millis(time)))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match (&arguments.device, arguments.behaviour) {
        (Some(device), None) => follow(device, &arguments.plan),
        (_, Some(behaviour)) => {
            let stop = Arc::new(AtomicBool::new(false));
            {
                let stop = Arc::clone(&stop);
                let time = Duration::from_secs(arguments.seconds);
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    stop.store(true, Ordering::Relaxed);
                    // A write that blocks ends with the process.
                    std::thread::sleep(Duration::from_secs(2));
                    std::process::exit(0);
                });
            }
            run(&arguments, behaviour, &stop)
        }
        (None, None) => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be there to read it.
            drop(writeln!(io::stderr(), "error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Each step is a process of its own: whatever of it blocks ends when its time is up.
fn follow(device: &std::path::Path, plan: &[Step]) -> io::Result<()> {
    let over = Instant::now() + MOST;
    let say = |what: &str| writeln!(io::stdout(), "hostile-guest: now {what}");
    for Step(behaviour, time) in plan {
        let until = over.min(Instant::now() + *time);
        let Some(behaviour) = behaviour else {
            say(BURN)?;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            continue;
        };
        say(behaviour.as_str())?;
        let mut child = Command::new("/proc/self/exe")
            .arg("--device")
            .arg(device)
            .arg(behaviour.as_str())
            .stdout(std::process::Stdio::null())
            .spawn()?;
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        child.kill()?;
        child.wait()?;
    }
    say("over")
}

fn run(arguments: &Arguments, behaviour: Behaviour, stop: &AtomicBool) -> io::Result<()> {
    let listener = match &arguments.listen {
        Some(path) => Some(UnixListener::bind(path)?),
        None => None,
    };
    while !stop.load(Ordering::Relaxed) {
        let channel = match (&listener, &arguments.device) {
            (Some(listener), _) => File::from(OwnedFd::from(listener.accept()?.0)),
            (None, Some(device)) => match OpenOptions::new().read(true).write(true).open(device) {
                // A port has one owner at a time: the thread of the attack before is about to let
                // go of it.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                other => other?,
            },
            (None, None) => return Ok(()),
        };
        match attack(channel, behaviour, stop) {
            Ok(sent) => drop(writeln!(io::stdout(), "sent {sent} bytes")),
            Err(error) => drop(writeln!(io::stderr(), "the channel: {error}")),
        }
        // The host has hung up: it holds this guest off.
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
