//! `ghost-guest`, the agent inside a VM. See the library for what it does.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ghost_guest::{Channel, End, Options, channel, freeze, log, serve, update};

const USAGE: &str = "\
usage: ghost-guest run [--device PATH | --socket PATH] [--supervised]
       ghost-guest version
";

/// While there is no channel, and after one that went.
const RETRY: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match command(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Usage(what)) => {
            log::line(&what);
            let _ = std::io::stderr().write_all(USAGE.as_bytes());
            ExitCode::from(2)
        }
        Err(Stop::Failed(what)) => {
            log::line(&what);
            ExitCode::FAILURE
        }
    }
}

enum Stop {
    Usage(String),
    Failed(String),
}

fn command(arguments: &[OsString]) -> Result<(), Stop> {
    let words: Vec<&str> = arguments
        .iter()
        .map(|word| word.to_str().unwrap_or("\u{fffd}"))
        .collect();
    match words.as_slice() {
        ["run", rest @ ..] => run(rest, arguments),
        ["version" | "--version" | "-V"] => {
            let text = format!("ghost-guest {}\n", ghost_guest::VERSION);
            std::io::stdout()
                .write_all(text.as_bytes())
                .map_err(|error| Stop::Failed(error.to_string()))
        }
        ["watch-update", program, run, process, supervised, rest @ ..] => {
            let process = process
                .parse()
                .map_err(|_| Stop::Usage("no such process".into()))?;
            let rest: Vec<OsString> = rest.iter().map(OsString::from).collect();
            update::watch(
                program.as_ref(),
                run.as_ref(),
                process,
                *supervised == "supervised",
                &rest,
                update::DEADLINE,
            )
            .map_err(|error| Stop::Failed(error.to_string()))
        }
        [] => Err(Stop::Usage("what to do?".into())),
        [other, ..] => Err(Stop::Usage(format!("unknown command {other:?}"))),
    }
}

#[derive(Default)]
struct Run {
    device: Option<PathBuf>,
    socket: Option<PathBuf>,
    supervised: bool,
}

fn parse_run(words: &[&str]) -> Result<Run, Stop> {
    let mut run = Run::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .map(PathBuf::from)
                .ok_or_else(|| Stop::Usage(format!("{word} needs a value")))
        };
        match *word {
            "--device" => run.device = Some(value()?),
            "--socket" => run.socket = Some(value()?),
            "--supervised" => run.supervised = true,
            other => return Err(Stop::Usage(format!("unknown option {other:?}"))),
        }
    }
    Ok(run)
}

fn run(words: &[&str], arguments: &[OsString]) -> Result<(), Stop> {
    let run = parse_run(words)?;
    let program = std::env::current_exe().ok();
    let mut options = Options {
        adopt_orphans: true,
        program_sha256: program
            .as_ref()
            .and_then(|path| update::sha256(path).ok())
            .map(Vec::from)
            .unwrap_or_default(),
        program: program.clone(),
        ..Options::default()
    };
    let trial = std::env::var_os(update::TRIAL).map(PathBuf::from);
    if let (Some(program), Some(mark)) = (program.clone(), trial) {
        options.on_greeted = Some(Arc::new(move || update::passed(&program, &mark)));
    }
    // Whoever loses its parent comes to this process, so that all of a call can be found and buried.
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        log::line(&format!("orphans go to process 1: {error}"));
    }
    freeze::Freezer::new(&options).thaw_leftovers();
    log::line(&format!("version {}", ghost_guest::VERSION));
    let mut told = false;
    loop {
        let opened = match (&run.socket, &run.device) {
            (Some(socket), _) => Channel::connect(socket),
            (None, Some(device)) => Channel::open_port(device),
            (None, None) => channel::find_port(&options.sysroot).map_or_else(
                || {
                    Err(std::io::Error::new(
                        std::io::ErrorKind::NotFound,
                        "this machine has no port org.ghost.agent.0",
                    ))
                },
                |path| Channel::open_port(&path),
            ),
        };
        match opened {
            Ok(channel) => {
                told = false;
                match serve(&channel, &options) {
                    Ok(End::Closed) => log::line("the channel is closed"),
                    Ok(End::Updated) => {
                        drop(channel);
                        if let Some(program) = &program {
                            let error = update::become_new(
                                program,
                                arguments,
                                "/run".as_ref(),
                                run.supervised,
                            );
                            log::line(&format!("the new program does not run: {error}"));
                        }
                    }
                    Err(error) => log::line(&format!("the channel failed: {error}")),
                }
            }
            // Said once, not every second.
            Err(error) if !told => {
                told = true;
                log::line(&format!("no channel, looking on: {error}"));
            }
            Err(_) => {}
        }
        std::thread::sleep(RETRY);
    }
}
