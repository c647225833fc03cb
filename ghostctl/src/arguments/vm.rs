//! `ghostctl vm …`, `launch` and `list`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Subcommand, ValueEnum, ValueHint};

use super::fleet::Queue;
use super::{Change, completers, values};

/// Virtual machines. NAME is a name, a full id, or a unique prefix of an id.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM from an image
    Create(Box<VmCreate>),
    /// List the VMs
    #[command(visible_alias = "ls")]
    List(VmList),
    /// Show all that is known of VMs
    Show(VmShow),
    /// Show what VMs use, live
    Top(super::guest::TopArgs),
    /// Start VMs
    Start(VmPower),
    /// Stop VMs by asking the guest (ACPI)
    Stop(VmStop),
    /// Stop VMs and start them again
    Restart(VmStop),
    /// Halt VMs and keep their memory
    Pause(VmPower),
    /// Let paused VMs run on
    Resume(VmPower),
    /// Remove VMs and their disks
    #[command(visible_alias = "rm")]
    Delete(VmDelete),
    /// Change a VM's size, tags, protection or start
    Update(Box<VmUpdate>),
    /// Wait until a VM is in a state
    Wait(VmWait),
    /// Attach to a VM's serial console; Ctrl-] detaches
    Console(OneName),
    /// Show what a VM wrote to its serial console
    Logs(VmLogs),
}

/// One VM.
#[derive(Debug, Args)]
pub(crate) struct OneName {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,
}

/// One or several VMs.
#[derive(Debug, Args)]
pub(crate) struct Names {
    /// Names, ids, or unique prefixes of ids
    #[arg(required = true, value_name = "NAME", add = completers::vms())]
    pub(crate) names: Vec<String>,
}

/// `vm show`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ghostctl vm show web
  ghostctl vm show web --history 1h")]
pub(crate) struct VmShow {
    #[command(flatten)]
    pub(crate) vms: Names,

    /// Show what it used in the last so long instead, at most 24h
    #[arg(long, value_name = "TIME", value_parser = values::history,
          num_args = 0..=1, default_missing_value = "1h")]
    pub(crate) history: Option<Duration>,
}

/// How far a start is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum WaitStage {
    /// Not at all, as --detach.
    None,
    /// Until it runs.
    Running,
    /// Until an address of it is known.
    Address,
    /// Until the agent in it answers.
    Agent,
    /// Until cloud-init in it has finished.
    CloudInit,
}

/// How far the start of a new VM is followed.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Following {
    /// How far to wait for the guest [default: cloud-init on a terminal, where the VM has our
    /// agent; running elsewhere]
    #[arg(long, value_enum, value_name = "STAGE")]
    pub(crate) wait: Option<WaitStage>,

    /// How long to wait for the guest once the VM runs; the VM goes on after it
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = values::duration)]
    pub(crate) wait_timeout: Duration,
}

/// How the agent comes into a VM, and what it may do there.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Guest {
    /// How our agent comes into the VM: with the seed unless the image has it, always with the
    /// seed, or never [default: auto]
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) guest_inject: Option<Inject>,

    /// Let nobody in through our agent: no exec, shell, copy or accounts
    #[arg(long)]
    pub(crate) no_guest_access: bool,
}

/// How the agent comes into a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Inject {
    /// With the seed, unless the image has it.
    Auto,
    /// With the seed.
    Always,
    /// Not at all.
    Never,
}

impl Inject {
    /// As the agent knows it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// What a VM is made of.
#[derive(Debug, Args)]
pub(crate) struct VmSpec {
    /// Virtual CPUs [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: Option<u32>,

    /// Memory, such as 2GiB [default: 2GiB]
    #[arg(long, value_name = "SIZE", value_parser = values::positive_size)]
    pub(crate) memory: Option<u64>,

    /// Disk, such as 10GiB [default: 10GiB, or the image's size where that is larger]
    #[arg(long, value_name = "SIZE", value_parser = values::positive_size)]
    pub(crate) disk: Option<u64>,

    /// Network to attach to; again for another card [default: default]
    #[arg(long = "network", value_name = "NETWORK", add = completers::networks())]
    pub(crate) networks: Vec<String>,

    /// Name of the user that cloud-init makes [default: the image's own]
    #[arg(long)]
    pub(crate) user: Option<String>,

    /// File with public SSH keys for that user; again for more
    #[arg(long = "ssh-key", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ssh_keys: Vec<PathBuf>,

    /// cloud-init user-data, or - for stdin
    #[arg(long, value_name = "FILE|-", value_hint = ValueHint::FilePath)]
    pub(crate) user_data: Option<PathBuf>,

    /// cloud-init network config, or - for stdin
    #[arg(long, value_name = "FILE|-", value_hint = ValueHint::FilePath)]
    pub(crate) network_config: Option<PathBuf>,

    /// Label it; again for more
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) tags: Vec<(String, String)>,

    /// At Ghost Core, where no --host is named: place it on a host with this label; again for hosts
    /// with all of them
    #[arg(long = "host-label", value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) host_labels: Vec<(String, String)>,

    #[command(flatten)]
    pub(crate) guest: Guest,

    #[command(flatten)]
    pub(crate) life: Life,

    /// Refuse to delete it until `vm update --unprotect`
    #[arg(long)]
    pub(crate) protect: bool,

    /// Check everything, change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,

    #[command(flatten)]
    pub(crate) change: Change,
}

/// When a VM starts by itself.
#[derive(Debug, Args)]
pub(crate) struct Life {
    /// Start it with the host
    #[arg(long)]
    pub(crate) autostart: bool,

    /// Its place in that: lower starts first [default: 0]; implies --autostart
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) autostart_order: Option<i32>,

    /// How long to wait after it before the next one, such as 10s; implies --autostart
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) autostart_delay: Option<Duration>,

    /// How often it is started again after a crash within --restart-window; 0: never
    #[arg(long, value_name = "N")]
    pub(crate) max_restarts: Option<u32>,

    /// The window of --max-restarts [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = values::duration, requires = "max_restarts")]
    pub(crate) restart_window: Option<Duration>,
}

/// `vm create`.
#[derive(Debug, Args)]
pub(crate) struct VmCreate {
    /// The name that it gets
    // An empty one would be made up by the agent: not what a script with an unset variable wants.
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) name: String,

    /// The image, from the cache or the catalogue
    #[arg(long, add = completers::images_and_catalogue())]
    pub(crate) image: String,

    /// Start it then
    #[arg(long)]
    pub(crate) start: bool,

    #[command(flatten)]
    pub(crate) following: Following,

    #[command(flatten)]
    pub(crate) spec: VmSpec,
}

/// `launch`.
#[derive(Debug, Args)]
pub(crate) struct LaunchArgs {
    /// The image, from the cache or the catalogue
    #[arg(add = completers::images_and_catalogue())]
    pub(crate) image: String,

    /// The name that it gets [default: one is made up]
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) following: Following,

    #[command(flatten)]
    pub(crate) spec: VmSpec,
}

/// `vm list` and `list`.
#[derive(Debug, Args)]
pub(crate) struct VmList {
    /// Only VMs with this tag; again for VMs with all of them
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) tags: Vec<(String, String)>,

    /// Those of all hosts of the fleet, from Core's memory; without --host Core lists them anyway
    #[arg(long)]
    pub(crate) all_hosts: bool,
}

/// `vm start|pause|resume`.
#[derive(Debug, Args)]
pub(crate) struct VmPower {
    #[command(flatten)]
    pub(crate) vms: Names,
    #[command(flatten)]
    pub(crate) queue: Queue,
    #[command(flatten)]
    pub(crate) change: Change,
}

/// `vm stop|restart`.
#[derive(Debug, Args)]
pub(crate) struct VmStop {
    #[command(flatten)]
    pub(crate) vms: Names,

    /// Cut the power: at once, or after --timeout where that is given
    #[arg(long)]
    pub(crate) force: bool,

    /// How long the guest may take, such as 30s
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) timeout: Option<Duration>,

    #[command(flatten)]
    pub(crate) queue: Queue,
    #[command(flatten)]
    pub(crate) change: Change,
}

/// `vm delete`.
#[derive(Debug, Args)]
pub(crate) struct VmDelete {
    #[command(flatten)]
    pub(crate) vms: Names,

    /// Cut the power first where it runs
    #[arg(long)]
    pub(crate) force: bool,

    #[command(flatten)]
    pub(crate) queue: Queue,
    #[command(flatten)]
    pub(crate) change: Change,
}

/// `vm update`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args([
    "cpus", "memory", "tags", "untag", "protect", "unprotect", "autostart", "no_autostart",
    "autostart_order", "autostart_delay", "max_restarts", "guest_access",
]))]
pub(crate) struct VmUpdate {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// New number of virtual CPUs; the VM must be stopped
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: Option<u32>,

    /// New memory; the VM must be stopped
    #[arg(long, value_name = "SIZE", value_parser = values::positive_size)]
    pub(crate) memory: Option<u64>,

    /// Set a tag; again for more
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) tags: Vec<(String, String)>,

    /// Remove a tag; again for more
    #[arg(long, value_name = "KEY")]
    pub(crate) untag: Vec<String>,

    /// Refuse to delete it
    #[arg(long, conflicts_with = "unprotect")]
    pub(crate) protect: bool,

    /// Allow to delete it
    #[arg(long)]
    pub(crate) unprotect: bool,

    /// Do not start it with the host
    #[arg(long, conflicts_with_all = ["autostart", "autostart_order", "autostart_delay"])]
    pub(crate) no_autostart: bool,

    #[command(flatten)]
    pub(crate) life: Life,

    /// Whether exec, shell, copies and accounts of the guest may be reached; off cuts open sessions
    #[arg(long, value_enum, value_name = "ON|OFF")]
    pub(crate) guest_access: Option<Switch>,

    /// Only if the VM's generation is this one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) expected_generation: Option<u64>,

    #[command(flatten)]
    pub(crate) change: Change,
}

/// What `vm wait` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitFor {
    /// It runs.
    Running,
    /// It is off.
    Stopped,
    /// An address of it is known.
    Address,
    /// The guest agent answers.
    Agent,
    /// cloud-init has finished.
    CloudInit,
}

/// `vm wait`.
#[derive(Debug, Args)]
pub(crate) struct VmWait {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// What to wait for
    #[arg(long = "for", value_enum, value_name = "WHAT")]
    pub(crate) what: WaitFor,

    /// How long
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = values::duration)]
    pub(crate) timeout: Duration,
}

/// `vm logs`.
#[derive(Debug, Args)]
pub(crate) struct VmLogs {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// Go on with what comes
    #[arg(short, long)]
    pub(crate) follow: bool,

    /// Only the last bytes, such as 16KiB
    #[arg(long, value_name = "SIZE", value_parser = values::positive_size)]
    pub(crate) tail: Option<u64>,

    /// Write to a terminal what the guest wrote, control sequences too
    #[arg(long, action = ArgAction::SetTrue)]
    pub(crate) raw: bool,
}
