//! `network`, `events`, `version`, `completion` and `man`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

use super::completers;

/// Networks and their leases.
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// List the networks
    #[command(visible_alias = "ls")]
    List,
    /// Show networks with their leases
    Show(NetworkNames),
}

/// One or several networks.
#[derive(Debug, Args)]
pub(crate) struct NetworkNames {
    /// Names of networks
    #[arg(required = true, value_name = "NAME", add = completers::networks())]
    pub(crate) names: Vec<String>,
}

/// `events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what comes
    #[arg(short, long)]
    pub(crate) follow: bool,

    /// Leave out what has already happened; implies --follow
    #[arg(long)]
    pub(crate) new: bool,

    /// Only those of this VM
    #[arg(long, value_name = "NAME", add = completers::vms())]
    pub(crate) vm: Option<String>,
}

/// `version`.
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// Do not ask the agent
    #[arg(long)]
    pub(crate) client: bool,
}

/// Shells with a completion script.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shell {
    /// GNU bash
    Bash,
    /// Elvish
    Elvish,
    /// fish
    Fish,
    /// PowerShell
    Powershell,
    /// zsh
    Zsh,
}

/// `completion`.
#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

/// `man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// The folder that the pages go to, one a command; without it the first page goes to stdout
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) folder: Option<PathBuf>,
}
