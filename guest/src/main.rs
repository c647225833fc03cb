//! `ghost-guest`, the agent inside a VM. See the library for what it does.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ghost_guest::config::Config;
use ghost_guest::install::{Install, Outcome, Service};
use ghost_guest::{Channel, End, Options, channel, config, freeze, http, log, serve, update};

const USAGE: &str = "\
usage: ghost-guest run [--device PATH | --socket PATH] [--config PATH] [--supervised]
       ghost-guest install [--service auto|systemd|openrc|sysv|none] [--prefix PATH] [--root PATH] [--force]
       ghost-guest status [--config PATH]
       ghost-guest version
";

/// How often a channel is looked for: often while the guest boots and its drivers come, then now and
/// then, as in a machine that has none.
const RETRY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];
/// How many times often.
const SOON: u32 = 100;

fn main() -> ExitCode {
    keep_freed_memory();
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

/// The buffers of a copy come and go by the hundred. By default glibc gives freed memory back to the
/// kernel above 128 KiB, and every page of the next buffer is a fault and a clearing again: a tenth of
/// what a copy costs an emulated guest. What is kept is bounded; the rest goes back as before.
fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        const KEPT: libc::c_int = 2 << 20;
        // SAFETY: plain numbers, before any other thread runs; where it fails all stays as it was.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
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
        ["install", rest @ ..] => install(rest),
        ["status", rest @ ..] => status(rest),
        ["version" | "--version" | "-V"] => {
            print(&format!("ghost-guest {}\n", ghost_guest::VERSION))
        }
        ["help" | "--help" | "-h"] => print(USAGE),
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
    config: Option<PathBuf>,
    /// Where the state of a trial is noted; memory, in a guest.
    run_directory: Option<PathBuf>,
    supervised: bool,
}

fn print(text: &str) -> Result<(), Stop> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Stop::Failed(error.to_string()))
}

fn install(words: &[&str]) -> Result<(), Stop> {
    let mut install = Install::default();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .copied()
                .ok_or_else(|| Stop::Usage(format!("{word} needs a value")))
        };
        match *word {
            "--service" => {
                let name = value()?;
                install.service = match name {
                    "auto" => None,
                    name => Some(
                        Service::parse(name)
                            .ok_or_else(|| Stop::Usage(format!("unknown service {name:?}")))?,
                    ),
                };
            }
            "--prefix" => install.prefix = value()?.into(),
            "--root" => install.root = value()?.into(),
            "--force" => install.force = true,
            other => return Err(Stop::Usage(format!("unknown option {other:?}"))),
        }
    }
    let failed = |error: std::io::Error| Stop::Failed(format!("not installed: {error}"));
    let source = std::env::current_exe().map_err(failed)?;
    let said = match install.run(&source, ghost_guest::VERSION).map_err(failed)? {
        Outcome::Installed => format!("installed version {}\n", ghost_guest::VERSION),
        Outcome::Unchanged => format!("version {} is installed already\n", ghost_guest::VERSION),
        Outcome::NewerKept(version) => format!("version {version} is newer and was kept\n"),
    };
    print(&said)
}

/// What stands between this guest and its host, layer by layer.
fn status(words: &[&str]) -> Result<(), Stop> {
    let path = match words {
        [] => config::PATH,
        ["--config", path] => path,
        _ => return Err(Stop::Usage("status takes --config only".into())),
    };
    let mut text = format!("version: {}\n", ghost_guest::VERSION);
    let mut well = true;
    match Config::read(path.as_ref()) {
        Ok(config) => {
            let names: Vec<&str> = config.capabilities.iter().map(|one| one.as_str()).collect();
            text += &format!("configuration: good\nallowed: {}\n", names.join(" "));
        }
        Err(why) => {
            well = false;
            text += &format!("configuration: {why}\nallowed: telemetry\n");
        }
    }
    match channel::find_port("/".as_ref()) {
        None => {
            well = false;
            text += "port: none named org.ghost.agent.0\nagent: cannot run\n";
        }
        Some(port) => {
            text += &format!("port: {}\n", port.display());
            match Channel::open_port(&port) {
                Err(error) if error.raw_os_error() == Some(16) => {
                    text += "agent: running (it holds the port)\n";
                }
                Err(error) => {
                    well = false;
                    text += &format!("agent: unknown: {error}\n");
                }
                Ok(_) => {
                    well = false;
                    text += "agent: not running (nobody holds the port)\n";
                }
            }
        }
    }
    print(&text)?;
    if well {
        Ok(())
    } else {
        Err(Stop::Failed(
            "the host cannot use this guest's agent".into(),
        ))
    }
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
            "--config" => run.config = Some(value()?),
            "--run-directory" => run.run_directory = Some(value()?),
            "--supervised" => run.supervised = true,
            other => return Err(Stop::Usage(format!("unknown option {other:?}"))),
        }
    }
    Ok(run)
}

fn run(words: &[&str], arguments: &[OsString]) -> Result<(), Stop> {
    let run = parse_run(words)?;
    let program = std::env::current_exe().ok();
    let path = run.config.as_deref().unwrap_or(config::PATH.as_ref());
    let config = Config::read(path).unwrap_or_else(|why| {
        log::line(&format!(
            "{why}; nothing but reports until that is put right"
        ));
        Config::restricted()
    });
    let mut options = Options {
        capabilities: config.capabilities,
        roots: config.roots,
        hooks: config.hooks,
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
    yield_to_programs();
    let freezer = freeze::Freezer::new(&options);
    freezer.thaw_leftovers();
    freeze::thaw_when_told_to_end();
    options.freezer = Some(freezer);
    if let Some(listen) = config.http
        && let Err(error) = http::start(listen, &options.sysroot)
    {
        log::line(&format!("no HTTP on {listen}: {error}"));
    }
    log::line(&format!("version {}", ghost_guest::VERSION));
    let mut told = false;
    let mut tries = 0u32;
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
                tries = 0;
                match serve(&channel, &options) {
                    Ok(End::Closed) => log::line("the channel is closed"),
                    Ok(End::Updated) => {
                        drop(channel);
                        if let Some(program) = &program {
                            let error = update::become_new(
                                program,
                                arguments,
                                run.run_directory.as_deref().unwrap_or("/run".as_ref()),
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
        tries = tries.saturating_add(1);
        std::thread::sleep(RETRY[usize::from(tries > SOON)]);
    }
}

/// On one CPU every pipe that an ending program closes would wake the loop at once, in the middle of
/// that program's end, and each such change of address space costs an emulated guest half a
/// millisecond. A batch task is woken without taking the CPU away; what it starts is ordinary again.
fn yield_to_programs() {
    let parameters = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK;
    // SAFETY: a plain call on the calling thread with a record that lives through it. Where it is
    // not allowed, all is as before.
    unsafe {
        libc::sched_setscheduler(0, policy, &raw const parameters);
    }
}
