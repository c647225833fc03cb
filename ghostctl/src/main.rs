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
mod text;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
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
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let session = Session::new(cli.global);
    let exit = run(cli.command, &session).unwrap_or_else(|failure| {
        session.printer.failure(&failure);
        failure.exit()
    });
    exit.into()
}

fn run(command: arguments::Command, session: &Session) -> Result<Exit, Failure> {
    // One thread: the work is to wait for an agent, and a pool would cost more than it gives.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("the runtime cannot start", &error))?;
    let exit = runtime.block_on(commands::run(command, session));
    // A read of stdin that cannot be called off must not hold up the exit.
    runtime.shutdown_background();
    exit
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
