//! One file a command, or a family of the same shape. A command asks, and hands what it got to the
//! printer; how things look to people is in `describe`.

mod audit;
mod change;
mod completion;
mod context;
mod core;
mod cp;
mod describe;
mod describe_fleet;
mod events;
mod exec;
mod guest;
mod guest_wait;
mod history;
mod hosts;
mod image_import;
mod images;
mod key;
mod lockdown;
mod man;
mod networks;
mod operations;
mod queue;
mod stages;
mod status;
mod tenants;
mod top;
mod trust;
mod version;
mod vm_console;
mod vm_create;
mod vm_logs;
mod vm_power;
mod vm_show;
mod vm_update;
mod vm_wait;
mod waiting;

pub(crate) use completion::VARIABLE as COMPLETION_VARIABLE;

use std::future::Future;

use crate::arguments::{Command, ImageCommand, NetworkCommand, OperationCommand, VmCommand};
use crate::connect::Session;
use crate::errors::{Exit, Failure, worst};

/// Runs a command; a failure that concerns it as a whole is returned, those of single VMs of
/// several are already told.
pub(crate) async fn run(command: Command, session: &Session) -> Result<Exit, Failure> {
    match command {
        Command::Vm(command) => vm(command, session).await,
        Command::Launch(args) => vm_create::launch(*args, session).await,
        Command::List(args) => vm_show::list(args, session).await,
        Command::Exec(args) => exec::exec(*args, session).await,
        Command::Shell(args) => exec::shell(args, session).await,
        Command::Cp(args) => cp::run(args, session).await,
        Command::Guest(command) => guest::run(command, session).await,
        Command::Lockdown(args) => lockdown::run(args, session).await,
        Command::Audit(command) => audit::run(command, session).await,
        Command::Image(command) => match command {
            ImageCommand::List => images::list(session).await,
            ImageCommand::Catalogue => images::catalogue(session).await,
            ImageCommand::Pull(args) => images::pull(args, session).await,
            ImageCommand::Import(args) => image_import::run(args, session).await,
            ImageCommand::Show(args) => images::show(args.names, session).await,
            ImageCommand::Delete(args) => {
                images::delete(args.images.names, args.change, session).await
            }
        },
        Command::Operation(command) => match command {
            OperationCommand::List(args) => operations::list(args, session).await,
            OperationCommand::Show(args) => operations::show(args.ids, session).await,
            OperationCommand::Wait(args) => operations::wait(args, session).await,
            OperationCommand::Cancel(args) => operations::cancel(args.ids, session).await,
        },
        Command::Network(command) => match command {
            NetworkCommand::List => networks::list(session).await,
            NetworkCommand::Show(args) => networks::show(args.names, session).await,
        },
        Command::Events(args) => events::run(args, session).await,
        Command::Status => status::run(session).await,
        Command::Core(command) => core::run(command, session).await,
        Command::Host(command) => hosts::run(command, session).await,
        Command::Queue(command) => queue::run(command, session).await,
        Command::Tenant(command) => tenants::tenant(command, session).await,
        Command::User(command) => tenants::user(command, session).await,
        Command::Context(command) => context::run(command, session).await,
        Command::Trust(command) => trust::run(command, session).await,
        Command::Key(command) => key::run(command, session).await,
        Command::Version(args) => version::run(args, session).await,
        Command::Completion(args) => completion::run(args, session),
        Command::Man(args) => man::run(args, session),
    }
}

async fn vm(command: VmCommand, session: &Session) -> Result<Exit, Failure> {
    match command {
        VmCommand::Create(args) => vm_create::create(*args, session).await,
        VmCommand::List(args) => vm_show::list(args, session).await,
        VmCommand::Show(args) => vm_show::show(args, session).await,
        VmCommand::Top(args) => top::run(args, session).await,
        VmCommand::Start(args) => vm_power::start(args, session).await,
        VmCommand::Stop(args) => vm_power::stop(args, session).await,
        VmCommand::Restart(args) => vm_power::restart(args, session).await,
        VmCommand::Pause(args) => vm_power::pause(args, session).await,
        VmCommand::Resume(args) => vm_power::resume(args, session).await,
        VmCommand::Delete(args) => vm_power::delete(args, session).await,
        VmCommand::Update(args) => vm_update::run(*args, session).await,
        VmCommand::Wait(args) => vm_wait::run(args, session).await,
        VmCommand::Console(args) => vm_console::run(&args.name, session).await,
        VmCommand::Logs(args) => vm_logs::run(args, session).await,
    }
}

/// Asks for several things side by side, tells of each failure, and hands back what was found with
/// the worst exit code.
async fn each<T, F>(
    names: &[String],
    session: &Session,
    ask: impl Fn(String) -> F,
) -> (Vec<T>, Exit)
where
    F: Future<Output = Result<T, Failure>>,
{
    let outcomes = futures::future::join_all(names.iter().cloned().map(ask)).await;
    settle(outcomes, session)
}

/// Tells of each failure; the rest, with the worst exit code.
fn settle<T>(outcomes: Vec<Result<T, Failure>>, session: &Session) -> (Vec<T>, Exit) {
    let mut found = Vec::with_capacity(outcomes.len());
    let mut exits = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(item) => found.push(item),
            Err(failure) => {
                session.failed(&failure);
                exits.push(failure.exit());
            }
        }
    }
    (found, worst(exits))
}

/// A proto map of what the person wrote as pairs.
fn pairs<M: FromIterator<(String, String)>>(tags: Vec<(String, String)>) -> M {
    tags.into_iter().collect()
}

/// A duration on the wire.
fn wire(duration: std::time::Duration) -> prost_types::Duration {
    prost_types::Duration {
        // The argument parser has bounded it far below the limit.
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}
