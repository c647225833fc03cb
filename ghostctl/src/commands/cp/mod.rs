//! `cp`: files and directories into a VM and out of it, over the agent's channel.
//!
//! Several files are under way at once, so that small ones do not wait for each other's answers. A
//! file that breaks off goes on where it was, in this run and in the next. Of what cannot be copied
//! (devices, names that cannot be written) each is named, and the exit code says so.
//!
//! Symbolic links are made last, once all else is written, and what they say is never followed: so
//! none of them can turn what is written here, or in the guest, aside.

mod download;
mod local;
mod place;
mod tally;
mod upload;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tokio::time::sleep;

use self::place::{GuestPath, Place};
use self::tally::Tally;
use super::waiting::CtrlC;
use crate::arguments::CpArgs;
use crate::connect::{Agent, Session};
use crate::errors::{ErrorCode, Exit, Failure, worst};
use crate::text::{count, human_size, printable};

/// How many files are under way at once.
const AT_ONCE: usize = 8;

/// What travels in one message: large enough to cost little, small enough to be fair to others.
const PIECE: usize = 256 << 10;

/// How often a broken transfer tries to go on without getting any further. With the pauses between
/// them that is half a minute: longer than an agent, in a guest or on a host, needs to come back.
const TRIES: u32 = 20;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What was copied, as `-o json` shows it.
#[derive(Debug, Default, Serialize)]
struct Copied {
    destination: String,
    files: u64,
    directories: u64,
    links: u64,
    size_bytes: u64,
    /// What was left out, and why.
    skipped: Vec<String>,
}

/// One copy while it runs.
struct Copy<'a> {
    agent: Agent,
    session: &'a Session,
    tally: Tally,
    keep_owner: bool,
    dereference: bool,
}

pub(super) async fn run(args: CpArgs, session: &Session) -> Result<Exit, Failure> {
    let sources: Vec<Place> = args
        .sources
        .iter()
        .map(|text| Place::parse(text))
        .collect::<Result<_, _>>()?;
    let destination = Place::parse(&args.destination)?;
    let task = Task::of(sources, destination)?;
    let agent = session.agent().await?;
    let mut ctrl_c = CtrlC::listen()?;
    let copy = Copy {
        agent,
        session,
        tally: Tally::new(&session.printer, &args.destination),
        keep_owner: !args.no_owner,
        dereference: args.dereference,
    };
    let into_stdout = matches!(task, Task::FileOut(_));
    let work = async {
        match task {
            Task::Stdin(target) => upload::stdin(&copy, target).await,
            Task::Into(sources, target) => upload::run(&copy, sources, target).await,
            Task::FileOut(source) => download::stdout(&copy, source).await,
            Task::OutOf(sources, target) => download::run(&copy, sources, target).await,
        }
    };
    let outcome = ctrl_c
        .or(work, || {
            Failure::new(ErrorCode::Interrupted, "interrupted")
                .because("what was copied whole is there, and nothing is there by halves")
                .hint("the same line again: large files go on where they were")
        })
        .await;
    let (counts, exits) = copy.tally.end();
    outcome?;
    let exit = worst(exits);
    if !into_stdout {
        let copied = Copied {
            destination: args.destination,
            ..counts
        };
        session.printer.several(
            std::slice::from_ref(&copied),
            1,
            |copied| &copied.destination,
            |copied, _| said(copied),
        )?;
    }
    Ok(exit)
}

fn said(copied: &Copied) -> String {
    let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let files = count(number(copied.files), "file", "files");
    let others: Vec<String> = [
        (copied.directories, "directory", "directories"),
        (copied.links, "link", "links"),
    ]
    .into_iter()
    .filter(|(some, ..)| *some > 0)
    .map(|(some, one, more)| count(number(some), one, more))
    .collect();
    let others = match others.as_slice() {
        [] => String::new(),
        [one] => format!(" and {one}"),
        [first, second, ..] => format!(", {first} and {second}"),
    };
    let skipped = match copied.skipped.len() {
        0 => String::new(),
        some => format!("; {some} left out"),
    };
    format!(
        "Copied {files}{others} ({}) to {}{skipped}\n",
        human_size(copied.size_bytes),
        printable(&copied.destination)
    )
}

/// What is asked for.
enum Task {
    Stdin(GuestPath),
    Into(Vec<PathBuf>, GuestPath),
    FileOut(GuestPath),
    OutOf(Vec<GuestPath>, PathBuf),
}

impl Task {
    fn of(sources: Vec<Place>, destination: Place) -> Result<Self, Failure> {
        if sources.contains(&Place::Stream) && sources.len() > 1 {
            return Err(Failure::usage("stdin is copied alone"));
        }
        match destination {
            Place::Guest(target) => {
                if sources == [Place::Stream] {
                    return Ok(Self::Stdin(target));
                }
                let mut paths = Vec::new();
                for source in sources {
                    match source {
                        Place::Local(path) => paths.push(path),
                        Place::Stream => {}
                        Place::Guest(source) => {
                            return Err(Failure::usage("both sides are in VMs")
                                .because("a copy has one side here")
                                .hint(format!(
                                    "ghostctl cp {} - | ghostctl cp - {}",
                                    source.shown(),
                                    target.shown()
                                )));
                        }
                    }
                }
                Ok(Self::Into(paths, target))
            }
            here @ (Place::Local(_) | Place::Stream) => {
                let mut paths = Vec::new();
                for source in sources {
                    match source {
                        Place::Guest(path) => paths.push(path),
                        Place::Local(_) | Place::Stream => {
                            return Err(Failure::usage("neither side is in a VM")
                                .because("a path in a VM is written NAME:/PATH")
                                .hint("cp, or ghostctl cp SRC NAME:/PATH"));
                        }
                    }
                }
                match (here, paths.as_slice()) {
                    (Place::Local(target), _) => Ok(Self::OutOf(paths, target)),
                    (_, [_]) => Ok(paths
                        .pop()
                        .map_or_else(|| Self::OutOf(Vec::new(), PathBuf::new()), Self::FileOut)),
                    _ => Err(Failure::usage("only one file goes to stdout")),
                }
            }
        }
    }
}

/// What a destination that is a directory or nothing means for each source.
enum Target<T> {
    /// Into this directory, under its own name.
    Inside(T),
    /// As this.
    As(T),
}

/// Whether several sources, or a path that ends in a slash, want a directory.
fn wants_directory(path: &str) -> bool {
    path.ends_with('/') || path.ends_with("/.") || path == "."
}

fn no_directory(shown: &str) -> Failure {
    Failure::usage(format!("{shown} is no directory"))
        .because("several sources, or a name that ends in a slash, need one")
}

/// Whether the contents of a directory are meant, and not it itself.
fn contents_of(path: &Path) -> bool {
    let bytes = path.as_os_str().as_encoded_bytes();
    matches!(bytes, b"." | b"..")
        || bytes.ends_with(b"/.")
        || bytes.ends_with(b"/..")
        || path.file_name().is_none()
}

impl Copy<'_> {
    /// Says that something is left out.
    fn skip(&self, what: &str, why: &str) {
        self.session
            .printer
            .warning(&format!("{what}: {why}; left out"));
        self.tally.skip(format!("{what}: {why}"));
    }

    /// Takes note of what became of one file. What concerns it alone does not end the copy.
    fn settle(&self, outcome: Result<(), Failure>) -> Result<(), Failure> {
        let Err(failure) = outcome else { return Ok(()) };
        let alone = matches!(
            failure.exit(),
            Exit::Failed | Exit::Usage | Exit::NotFound | Exit::Conflict
        );
        if !alone {
            return Err(failure);
        }
        self.session.failed(&failure);
        self.tally.failed(failure.exit());
        Ok(())
    }
}

/// What a symbolic link cannot say on the other side, if so: what is not UTF-8 arrives changed.
fn odd_link(target: &str) -> Option<&'static str> {
    match target.len() {
        0 | 4096.. => Some("a symbolic link, and what it says cannot be known"),
        _ if target.contains(char::REPLACEMENT_CHARACTER) => {
            Some("a symbolic link, and what it says is not valid UTF-8")
        }
        _ => None,
    }
}

/// Whether a transfer may go on after this.
fn broke(failure: &Failure) -> bool {
    failure.is_transport() || failure.exit() == Exit::Unreachable
}

/// The patience with one transfer.
struct Retry {
    /// How far it has come.
    reached: u64,
    /// How often it has broken since it last came further.
    tries: u32,
    pause: Duration,
    /// Something went across: until then a failure is an answer, and not a break.
    begun: bool,
}

impl Retry {
    fn new() -> Self {
        Self {
            reached: 0,
            tries: 0,
            pause: FIRST_PAUSE,
            begun: false,
        }
    }

    /// Takes note of how far it has come.
    fn reached(&mut self, offset: u64) {
        self.begun = true;
        if offset > self.reached {
            self.reached = offset;
            self.tries = 0;
            self.pause = FIRST_PAUSE;
        }
    }

    /// Waits before the next try, or hands the failure back where there is none.
    async fn again(&mut self, failure: Failure, copy: &Copy<'_>) -> Result<(), Failure> {
        self.tries += 1;
        // A guest takes only so many calls at once: those of other people end, too.
        let crowded = failure.code() == ErrorCode::TooManyRequests.as_str();
        let goes_on = crowded || (self.begun && broke(&failure));
        if !goes_on || self.tries > TRIES {
            return Err(failure);
        }
        copy.tally.broke();
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// A checksum did not fit.
fn mismatch(shown: &str) -> Failure {
    Failure::new(
        ErrorCode::ChecksumMismatch,
        format!("{shown} arrived damaged, or changed while it was copied"),
    )
    .because("the checksums of both sides differ")
    .hint("the same line again")
}

/// The stream of a transfer ended without its last word.
fn cut_short(shown: &str) -> Failure {
    Failure::new(
        ErrorCode::GuestUnreachable,
        format!("the transfer of {shown} was cut short"),
    )
    .hint("the same line again: it goes on where it was")
}
