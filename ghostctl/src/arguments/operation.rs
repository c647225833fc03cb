//! `ghostctl operation …`

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{completers, values};

/// Changes: running ones, and those of the past. ID is a full id or a unique prefix.
#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations that have not finished
    #[command(visible_alias = "ls")]
    List(OperationList),
    /// Show all that is known of operations
    Show(OperationIds),
    /// Wait until operations have finished
    Wait(OperationWait),
    /// Stop operations and undo what they did
    Cancel(OperationIds),
}

/// `operation list`.
#[derive(Debug, Args)]
pub(crate) struct OperationList {
    /// Only those of this VM
    #[arg(long, value_name = "NAME", add = completers::vms())]
    pub(crate) vm: Option<String>,

    /// Also those that have finished
    #[arg(short, long)]
    pub(crate) all: bool,
}

/// One or several operations.
#[derive(Debug, Args)]
pub(crate) struct OperationIds {
    /// Ids, or unique prefixes of ids
    #[arg(required = true, value_name = "ID", add = completers::operations())]
    pub(crate) ids: Vec<String>,
}

/// `operation wait`.
#[derive(Debug, Args)]
pub(crate) struct OperationWait {
    #[command(flatten)]
    pub(crate) operations: OperationIds,

    /// How long [default: until they have finished]
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) timeout: Option<Duration>,
}
