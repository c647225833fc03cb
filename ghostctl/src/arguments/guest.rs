//! What reaches into VMs: `exec`, `shell`, `cp`, `guest …`, and what watches over it: `lockdown`
//! and `audit …`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

use super::{completers, values};

/// As whom and where a program runs in a guest.
#[derive(Debug, Args)]
pub(crate) struct Surroundings {
    /// The user in the guest, by name or number, and a group [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = values::user_and_group)]
    pub(crate) user: Option<(String, String)>,

    /// The directory to start in [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,

    /// Set a variable; without a value it is handed on from here; again for more
    #[arg(short, long = "env", value_name = "KEY[=VALUE]", value_parser = values::variable)]
    pub(crate) environment: Vec<(String, Option<String>)>,
}

/// `exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: the command's own; 128 and its number where a signal ended the command; 124 where
--timeout did. Where ghostctl itself fails it says `error: …` on stderr and ends as everywhere
(3 no such VM, 5 agent or guest unreachable, 6 denied, …); with -o json the error is a document on
stderr, and stdout is empty.

Ctrl-C goes to the command; pressed again, ghostctl leaves and the command is killed.
With --tty every key goes to the command; Enter ~ . leaves.

Examples:
  ghostctl exec web -- uname -a
  ghostctl exec web -u postgres -- psql -c 'select 1'
  ghostctl exec web -t -- top
  tar c . | ghostctl exec web -w /srv -- tar x
  ghostctl exec web -o json --timeout 10s -- systemctl is-system-running")]
pub(crate) struct ExecArgs {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// Give the command a terminal, as for an editor
    #[arg(short, long)]
    pub(crate) tty: bool,

    /// Hand stdin on also where it is a terminal; elsewhere that is so anyway
    #[arg(short = 'i', long = "stdin", conflicts_with = "no_stdin")]
    pub(crate) stdin: bool,

    /// Do not hand stdin on: the command finds its own at the end
    #[arg(short, long)]
    pub(crate) no_stdin: bool,

    #[command(flatten)]
    pub(crate) surroundings: Surroundings,

    /// Kill the command and all that it started after this, such as 30s [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) timeout: Option<Duration>,

    /// Throw away output beyond this, such as 1MiB [default: no limit; 16MiB with -o json|yaml]
    #[arg(long, value_name = "SIZE", value_parser = values::positive_size)]
    pub(crate) max_output: Option<u64>,

    /// The command, behind --
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// `shell`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every key goes to the shell; Enter ~ . leaves it where it hangs. The exit code is the shell's.
Without a terminal the shell reads its commands from stdin.

Examples:
  ghostctl shell web
  ghostctl shell web -u debian
  ghostctl shell web < script.sh")]
pub(crate) struct ShellArgs {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) surroundings: Surroundings,
}

/// `cp`.
#[derive(Debug, Args)]
#[command(after_help = "\
One side is in a VM, as NAME:/ABSOLUTE/PATH; a local path with a colon is written ./a:b. Where DST
is a directory the copy goes into it, under its own name; `DIR/.` stands for what is in DIR.

A file is written under a temporary name, checked end to end, and then renamed: DST is the old one
or the new one and nothing between. What breaks off goes on where it was, also when the same line is
run again. Directories are copied whole. Mode, time and owner are kept; the owner here only where you
are root, and never the set-user-id bits of a guest's file.

Symbolic links below SRC are copied as links: what they say is kept as it is, also where it leads to
something else here, and nothing is ever written through a link below DST. -L copies what links lead
to. Devices, pipes and sockets are named and left out, and the exit code is 1 then.

Examples:
  ghostctl cp site.tar web:/srv/            one file into a directory
  ghostctl cp -L ./site web:/srv/site       a directory
  ghostctl cp web:/var/log/syslog .         out of the VM
  ghostctl cp web:/etc/. ./etc-of-web       the contents of a directory
  pg_dump | ghostctl cp - web:/srv/db.sql   from stdin
  ghostctl cp a:/srv/x - | ghostctl cp - b:/srv/x")]
pub(crate) struct CpArgs {
    /// What to copy: local paths, NAME:PATH, or - for stdin
    #[arg(required = true, value_name = "SRC", value_hint = ValueHint::AnyPath, add = completers::vm_paths())]
    pub(crate) sources: Vec<String>,

    /// Where to: a local path, NAME:PATH, or - for stdout
    #[arg(value_name = "DST", value_hint = ValueHint::AnyPath, add = completers::vm_paths())]
    pub(crate) destination: String,

    /// Copy what symbolic links lead to
    #[arg(short = 'L', long, visible_alias = "follow")]
    pub(crate) dereference: bool,

    /// Do not keep the owner: what is written belongs to root in a VM, and to you here
    #[arg(long)]
    pub(crate) no_owner: bool,

    /// Taken for cp's sake: directories are copied whole without it
    #[arg(short, long, hide = true)]
    pub(crate) recursive: bool,
}

/// What the agent in a VM can do.
#[derive(Debug, Subcommand)]
pub(crate) enum GuestCommand {
    /// Show each layer between here and the VM's agent; exit code 1 unless all that is needed is there
    Status(super::vm::Names),
    /// Measure the way to the VM's agent and back
    Ping(super::vm::OneName),
    /// Set a user's password; it is asked for, or read from stdin
    Password(GuestPassword),
    /// Let SSH keys in, or no longer
    #[command(subcommand)]
    SshKey(SshKeyCommand),
    /// Set the guest's clock to the host's
    SyncClock(super::vm::Names),
    /// Hold the guest's file systems still, for a backup; they thaw by themselves in the end
    Freeze(GuestFreeze),
    /// Let frozen file systems go on
    Thaw(super::vm::OneName),
    /// Replace the VM's agent by the host's program; the old one comes back where the new one is not heard
    Update(super::vm::Names),
    /// Let exec, shell, cp and the like into a VM, or keep them out; off cuts what goes on, at once
    Access(GuestAccess),
    /// Register an address of a VM by hand, for guests without agent and DHCP; `none` forgets it
    Address(GuestAddress),
    /// Ask the guest's agent to shut the guest down
    Shutdown(GuestShutdown),
}

/// `guest password`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ghostctl guest password web root
  openssl passwd -6 | ghostctl guest password web root --hashed")]
pub(crate) struct GuestPassword {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// The user in the guest
    pub(crate) user: String,

    /// What is given is hashed already, as crypt(3) writes it
    #[arg(long)]
    pub(crate) hashed: bool,
}

/// `guest ssh-key …`.
#[derive(Debug, Subcommand)]
pub(crate) enum SshKeyCommand {
    /// Let the keys of files in
    Add(SshKeyArgs),
    /// No longer let the keys of files in
    Remove(SshKeyArgs),
}

/// Whose keys.
#[derive(Debug, Args)]
pub(crate) struct SshKeyArgs {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// The user in the guest
    pub(crate) user: String,

    /// Files with public keys, or - for stdin
    #[arg(required = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) files: Vec<PathBuf>,
}

/// `guest freeze`.
#[derive(Debug, Args)]
pub(crate) struct GuestFreeze {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// When they thaw by themselves, at most 1m [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) timeout: Option<Duration>,

    /// Only this mount point; again for more [default: all]
    #[arg(long = "mount", value_name = "PATH")]
    pub(crate) mounts: Vec<String>,
}

/// `guest access`.
#[derive(Debug, Args)]
#[command(after_help = "\
A change of the agent's record alone: it works at once, also while libvirt is away or the VM is busy.
Telemetry is shown either way; the console is not the agent's. `ghostctl lockdown` closes all VMs.

Examples:
  ghostctl guest access web off
  ghostctl guest access web on")]
pub(crate) struct GuestAccess {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// Whether the VM may be entered
    #[arg(value_enum)]
    pub(crate) access: super::vm::Switch,
}

/// An address, or `none`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddressOrNone(pub(crate) Option<IpAddr>);

impl FromStr for AddressOrNone {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        text.parse()
            .map(|address| Self(Some(address)))
            .map_err(|_| format!("{text:?} is neither an IP address nor none"))
    }
}

/// `guest address`.
#[derive(Debug, Args)]
pub(crate) struct GuestAddress {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// An address in the subnet of one of the VM's networks, or none
    #[arg(value_name = "ADDRESS|none")]
    pub(crate) address: AddressOrNone,
}

/// `guest shutdown`.
#[derive(Debug, Args)]
pub(crate) struct GuestShutdown {
    /// Name, id, or unique prefix of an id
    #[arg(add = completers::vms())]
    pub(crate) name: String,

    /// And start again
    #[arg(long)]
    pub(crate) reboot: bool,

    /// Not at once, but after this
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) delay: Option<Duration>,
}

/// `vm top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Only this VM
    #[arg(add = completers::vms())]
    pub(crate) name: Option<String>,

    /// Show it once and end
    #[arg(long)]
    pub(crate) once: bool,
}

/// `lockdown`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Examples:
  ghostctl lockdown --reason 'a leaked key'   cuts every exec, shell and copy at once
  ghostctl lockdown status
  ghostctl lockdown --lift"
)]
pub(crate) struct LockdownArgs {
    #[command(subcommand)]
    pub(crate) command: Option<LockdownCommand>,

    /// End it
    #[arg(long)]
    pub(crate) lift: bool,

    /// Why, for the audit log and for those who are refused
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

/// `lockdown …`.
#[derive(Debug, Subcommand)]
pub(crate) enum LockdownCommand {
    /// Say whether it is on
    Status,
}

/// Who did what in VMs.
#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// List what was done, newest last
    #[command(visible_alias = "ls")]
    List(AuditList),
    /// Check that no line of the log was changed or removed; exit code 1 where one was
    Verify,
}

/// `audit list`.
#[derive(Debug, Args)]
pub(crate) struct AuditList {
    /// Only what concerns this VM
    #[arg(long, value_name = "NAME", add = completers::vms())]
    pub(crate) vm: Option<String>,

    /// Only the last, such as 1h
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) since: Option<Duration>,

    /// Only the newest so many [default: 1000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: Option<u32>,
}
