//! The command line as clap types, and nothing else. What a flag means is in `commands/`.

mod access;
mod completers;
mod fleet;
mod guest;
mod host;
mod image;
#[cfg(test)]
mod named;
mod operation;
pub(crate) mod values;
mod vm;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use access::{ContextAdd, ContextCommand, KeyCommand, KeyCreate, Role, TrustCommand};
pub(crate) use fleet::{
    CoreCommand, HostCommand, HostList, HostToken, QueueCommand, QueueList, QuotaArgs,
    TenantCommand, TenantSet, UserCommand, UserSet,
};
pub(crate) use guest::{
    AuditCommand, AuditList, CpArgs, ExecArgs, GuestAccess, GuestAddress, GuestCommand,
    GuestFreeze, GuestPassword, GuestShutdown, LockdownArgs, LockdownCommand, ShellArgs,
    SshKeyCommand, Surroundings, TopArgs,
};
pub(crate) use host::{CompletionArgs, EventsArgs, ManArgs, NetworkCommand, Shell, VersionArgs};
pub(crate) use image::{ImageCommand, ImageImport, ImagePull};
pub(crate) use operation::{OperationCommand, OperationList, OperationWait};
pub(crate) use vm::{
    Following, Guest, LaunchArgs, Life, Switch, VmCommand, VmCreate, VmDelete, VmList, VmLogs,
    VmPower, VmShow, VmSpec, VmStop, VmUpdate, VmWait, WaitFor, WaitStage,
};

/// Virtual machines on ordinary machines.
///
/// Speaks to the agent of this host, or with a context to that of another one, or to Ghost Core and
/// with --host through it to any host of a fleet.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict (exists, busy, wrong state),
/// 5 agent unreachable, 6 denied, 7 timed out, 8 not enough resources, 130 interrupted.
/// Where several VMs are named it is the highest of theirs. `exec` and `shell` end with the code of
/// what they ran.
#[derive(Debug, Parser)]
#[command(
    name = "ghostctl",
    version,
    propagate_version = false,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How data is written to stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// The stable document; errors too, on stderr.
    Json,
    /// The same document as YAML.
    Yaml,
    /// One name (or id, where there is no name) a line, for scripts.
    Name,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// How data is written to stdout
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value = "table",
        value_name = "FORMAT",
        help_heading = "Global options"
    )]
    pub(crate) output: Format,

    /// Data and errors only: no progress, no notes
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,

    /// The agent: unix:PATH or https://HOST:PORT [env: GHOST_ENDPOINT] [default: this host's
    /// agent]
    #[arg(
        long,
        global = true,
        value_name = "ENDPOINT",
        help_heading = "Global options"
    )]
    pub(crate) endpoint: Option<String>,

    /// A context made with `ghostctl context add` [env: GHOST_CONTEXT]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Global options",
          add = completers::contexts())]
    pub(crate) context: Option<String>,

    /// Which host of the fleet, where Ghost Core is spoken to: a name, an id, or a unique prefix of
    /// an id [env: GHOST_HOST]
    #[arg(
        long,
        global = true,
        value_name = "HOST",
        help_heading = "Global options"
    )]
    pub(crate) host: Option<String>,

    /// Show on stderr where requests go and the ids that find them in the agent's log and traces
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) debug: bool,
}

/// How a change is waited for, and how it is made only once.
#[derive(Clone, Debug, Args)]
pub(crate) struct Change {
    /// Print the operation's id and do not wait for it
    #[arg(long)]
    pub(crate) detach: bool,

    /// A key of your choice: the same key gives the same operation, however often it is sent
    #[arg(long, value_name = "ID")]
    pub(crate) request_id: Option<String>,
}

/// What ghostctl does.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Virtual machines
    #[command(subcommand, visible_alias = "vms")]
    Vm(VmCommand),
    /// Create and start a VM
    Launch(Box<LaunchArgs>),
    /// List the VMs (short for `vm list`)
    #[command(visible_alias = "ls")]
    List(VmList),
    /// Run a command in a VM, with no network and no SSH
    Exec(Box<ExecArgs>),
    /// Open a login shell in a VM
    Shell(ShellArgs),
    /// Copy files and directories into a VM or out of it
    Cp(CpArgs),
    /// What the agent in a VM can do: status, passwords, keys, clock, freeze
    #[command(subcommand)]
    Guest(GuestCommand),
    /// The image cache, and what can be pulled into it
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// Changes: running ones, and those of the past
    #[command(subcommand, visible_alias = "op")]
    Operation(OperationCommand),
    /// Networks and their leases
    #[command(subcommand)]
    Network(NetworkCommand),
    /// What happened on the host, and what happens
    Events(EventsArgs),
    /// The host, its resources, and what does not work
    Status,
    /// This host's link to Ghost Core
    #[command(subcommand)]
    Core(CoreCommand),
    /// Hosts of the fleet
    #[command(subcommand, visible_alias = "hosts")]
    Host(HostCommand),
    /// Commands left with Core for hosts that are away
    #[command(subcommand, name = "command", visible_alias = "commands")]
    Queue(QueueCommand),
    /// Tenants of the fleet and their quotas
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// People of the fleet
    #[command(subcommand)]
    User(UserCommand),
    /// Agents that this ghostctl knows
    #[command(subcommand)]
    Context(ContextCommand),
    /// Who may speak to the agent: tokens and certificates
    #[command(subcommand)]
    Trust(TrustCommand),
    /// Keys for the HTTP API
    #[command(subcommand)]
    Key(KeyCommand),
    /// Cut all sessions into VMs at once and refuse new ones
    Lockdown(LockdownArgs),
    /// Who did what in VMs
    #[command(subcommand)]
    Audit(AuditCommand),
    /// The versions of ghostctl and of the agent
    Version(VersionArgs),
    /// Print the completion script of a shell
    ///
    /// For bash: `source <(ghostctl completion bash)` in ~/.bashrc. Names of VMs, images,
    /// operations, networks and contexts are completed live.
    Completion(CompletionArgs),
    /// Write the manual pages (for packages)
    #[command(hide = true)]
    Man(ManArgs),
}
