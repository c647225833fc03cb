//! `context`, `trust` and `key`.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::{completers, values};

/// What an identity may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Read everything but secrets and consoles
    Viewer,
    /// Create, run and delete VMs and images, attach to consoles
    Operator,
    /// Issue and revoke credentials
    Admin,
}

impl Role {
    /// The role as the agent knows it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

/// Agents that this ghostctl knows.
#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// Remember an agent; for a remote one, get a certificate from it
    Add(ContextAdd),
    /// List the contexts
    #[command(visible_alias = "ls")]
    List,
    /// Make a context the one that is used where none is named
    Use(ContextName),
    /// Show a context and its certificate
    Show(ContextName),
    /// Forget a context and remove its key
    #[command(visible_alias = "rm")]
    Remove(ContextName),
}

/// `context add`.
#[derive(Debug, Args)]
pub(crate) struct ContextAdd {
    /// A name of your choice
    pub(crate) name: String,

    /// What `ghostctl trust token` printed on the agent's host; - reads it from stdin
    #[arg(long)]
    pub(crate) token: Option<String>,

    /// The name that the agent lists this identity under [default: USER@HOST]
    #[arg(long, value_name = "NAME")]
    pub(crate) identity: Option<String>,

    /// Use it from now on where no context is named
    #[arg(long = "use")]
    pub(crate) activate: bool,

    /// Replace a context of that name
    #[arg(long)]
    pub(crate) replace: bool,
}

/// One context.
#[derive(Debug, Args)]
pub(crate) struct ContextName {
    /// The context; `local` is this host's agent
    #[arg(add = completers::contexts())]
    pub(crate) name: String,
}

/// Who may speak to the agent.
#[derive(Debug, Subcommand)]
pub(crate) enum TrustCommand {
    /// Make a single-use token that `ghostctl context add` turns into a certificate
    Token {
        /// What its holder may do
        #[arg(long, value_enum)]
        role: Role,

        /// Its holder enters no guest: no exec, shell, cp, passwords or console
        #[arg(long)]
        no_guest_access: bool,
    },
    /// List the certificates
    #[command(visible_alias = "ls")]
    List,
    /// Revoke certificates, at once
    Revoke {
        /// Ids, or unique prefixes of ids
        #[arg(required = true, value_name = "ID", add = completers::certificates())]
        ids: Vec<String>,
    },
}

/// Keys for the HTTP API.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key; its secret is shown this once
    Create(KeyCreate),
    /// List the keys
    #[command(visible_alias = "ls")]
    List,
    /// Revoke keys, at once
    Revoke {
        /// Ids, or unique prefixes of ids
        #[arg(required = true, value_name = "ID", add = completers::keys())]
        ids: Vec<String>,
    },
}

/// `key create`.
#[derive(Debug, Args)]
pub(crate) struct KeyCreate {
    /// A name for people
    pub(crate) name: String,

    /// What its holder may do
    #[arg(long, value_enum)]
    pub(crate) role: Role,

    /// Its holder enters no guest: no exec, shell, files or passwords
    #[arg(long)]
    pub(crate) no_guest_access: bool,

    /// How long it lives, such as 30d [default: without end; at Ghost Core 90d, and a
    /// year at most]
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) lifetime: Option<Duration>,
}
