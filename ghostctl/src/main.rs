//! `ghostctl`, the command line of Ghost.
//!
//! One process is one request: parse, connect, ask, print, exit. Start reading at
//! [`commands::run`]; what a person sees is in [`printer`], what went wrong in [`errors`].

mod arguments;
mod commands;
mod connect;
mod errors;
mod identity;
mod printer;
mod progress;
mod table;
mod terminal;
mod text;
mod tracing;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use clap_complete::CompleteEnv;

use arguments::{Cli, Format};
use connect::Session;
use errors::{ErrorCode, Exit, Failure};
use printer::Printer;

fn main() -> ExitCode {
    // Answers a shell's Tab and exits, where the completion script asks.
    CompleteEnv::with_factory(Cli::command)
        .var(commands::COMPLETION_VARIABLE)
        .complete();
    let span = tracing::Span::begin();
    let (cli, command) = match parse() {
        Ok(parsed) => parsed,
        Err(error) => return refuse(&error),
    };
    let session = Session::new(cli.global);
    let outcome = run(cli.command, &session, span.map(|span| span.of(command)));
    outcome
        .unwrap_or_else(|failure| {
            session.failed(&failure);
            failure.exit()
        })
        .into()
}

/// The command line, and the names of the command on it (`vm create`).
fn parse() -> Result<(Cli, String), clap::Error> {
    let mut matches = Cli::command().try_get_matches()?;
    let mut names = Vec::new();
    let mut at = &matches;
    while let Some((name, below)) = at.subcommand() {
        names.push(name.to_owned());
        at = below;
    }
    let cli = Cli::from_arg_matches_mut(&mut matches)
        .map_err(|error| error.format(&mut Cli::command()))?;
    Ok((cli, names.join(" ")))
}

fn run(
    command: arguments::Command,
    session: &Session,
    span: Option<tracing::Span>,
) -> Result<Exit, Failure> {
    // One thread: the work is to wait for an agent, and a pool would cost more than it gives.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("the runtime cannot start", &error))?;
    let mut outcome = runtime.block_on(commands::run(command, session));
    if let Some(span) = span {
        let code = outcome
            .as_ref()
            .err()
            .map(|failure| failure.code().to_owned());
        // Told before the span is delivered: nobody waits for a collector.
        let exit = outcome.unwrap_or_else(|failure| {
            session.failed(&failure);
            failure.exit()
        });
        runtime.block_on(span.deliver(session, exit, code));
        outcome = Ok(exit);
    }
    // A read of stdin that cannot be called off must not hold up the exit.
    runtime.shutdown_background();
    outcome
}

/// A command line that clap does not take, or a call for help.
fn refuse(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && wants_json(std::env::args()) {
        let text = error.render().to_string();
        let mut lines = text.lines();
        let message = lines.next().unwrap_or_default();
        let failure = Failure::new(
            ErrorCode::InvalidArgument,
            message.strip_prefix("error: ").unwrap_or(message),
        )
        .hint("the same with --help");
        Printer::new(Format::Json, false).failure(&failure);
    } else {
        // Nobody is left to tell where the output is closed.
        drop(error.print());
    }
    if error.use_stderr() {
        Exit::Usage.into()
    } else {
        Exit::Done.into()
    }
}

/// Whether `-o json` stands on a line that could not be parsed.
fn wants_json(arguments: impl Iterator<Item = String>) -> bool {
    let words: Vec<String> = arguments.collect();
    words
        .iter()
        .any(|word| word == "-ojson" || word == "-o=json" || word == "--output=json")
        || words
            .windows(2)
            .any(|pair| (pair[0] == "-o" || pair[0] == "--output") && pair[1] == "json")
}
