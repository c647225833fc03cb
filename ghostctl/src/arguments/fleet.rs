//! `host`, `command`, `tenant` and `user`: the fleet, where Ghost Core is spoken to; and `core`, what
//! a host's owner says to its link.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::access::Role;
use super::{completers, values};

/// Leaves a change with Core instead of asking the host.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Queue {
    /// Leave it with Core, for a host that may be away: it is done once, within this time [default:
    /// 1h], or expires with a reason
    #[arg(long, value_name = "TIME", value_parser = values::duration,
          num_args = 0..=1, default_missing_value = "1h", require_equals = true)]
    pub(crate) queue: Option<Duration>,
}

/// This host's link to Ghost Core.
#[derive(Debug, Subcommand)]
pub(crate) enum CoreCommand {
    /// How the link fares, and what Core may do here
    Status,
    /// End a wait and connect at once
    Reconnect,
    /// Let Core delete more than a fifth of the VMs for a while
    AllowDeletes {
        /// For how long, at most 24h; 0s takes it back
        #[arg(long = "for", value_name = "TIME", default_value = "10m",
              value_parser = values::duration)]
        duration: Duration,
    },
}

/// Hosts of the fleet. HOST is a name, a full id, or a unique prefix of an id; who is bound to no
/// tenant may write tenant/name.
#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// List the hosts
    #[command(visible_alias = "ls")]
    List(HostList),
    /// Show all that is known of hosts
    Show(Hosts),
    /// Print a single-use token with which a host joins
    Token(HostToken),
    /// Place nothing new on a host
    Cordon(HostCordon),
    /// Place VMs on a host again
    Uncordon(OneHost),
    /// Set or remove a host's labels
    Label(HostLabel),
    /// Give a host another name in the fleet
    Rename(HostRename),
    /// Let a host back in whose identity was used by two machines
    Unlock(OneHost),
    /// Revoke a host's identity and forget it; its VMs go on where they are
    #[command(visible_alias = "rm")]
    Remove(HostRemove),
}

/// One host.
#[derive(Debug, Args)]
pub(crate) struct OneHost {
    /// Name, id, or unique prefix of an id
    #[arg(value_name = "HOST", add = completers::hosts())]
    pub(crate) name: String,
}

/// One or several hosts.
#[derive(Debug, Args)]
pub(crate) struct Hosts {
    /// Names, ids, or unique prefixes of ids
    #[arg(required = true, value_name = "HOST", add = completers::hosts())]
    pub(crate) names: Vec<String>,
}

/// `host list`.
#[derive(Debug, Args)]
pub(crate) struct HostList {
    /// Only hosts with this label; again for hosts with all of them
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) labels: Vec<(String, String)>,

    /// Only in this state: online, degraded, offline, locked, never_seen
    #[arg(long, value_name = "STATE")]
    pub(crate) state: Option<String>,

    /// Only of this tenant
    #[arg(long, value_name = "NAME")]
    pub(crate) tenant: Option<String>,
}

/// `host token`.
#[derive(Debug, Args)]
pub(crate) struct HostToken {
    /// The tenant that the host will belong to [default: yours]
    #[arg(long, value_name = "NAME")]
    pub(crate) tenant: Option<String>,

    /// How long it may be used, at most 1h
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = values::duration)]
    pub(crate) ttl: Duration,

    /// A label that the host begins with; again for more
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) labels: Vec<(String, String)>,

    /// For a person with this role instead of a host
    #[arg(long, value_enum)]
    pub(crate) role: Option<Role>,
}

/// `host cordon`.
#[derive(Debug, Args)]
pub(crate) struct HostCordon {
    #[command(flatten)]
    pub(crate) host: OneHost,

    /// Why, for those who ask later
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) reason: String,
}

/// `host label`.
#[derive(Debug, Args)]
pub(crate) struct HostLabel {
    #[command(flatten)]
    pub(crate) host: OneHost,

    /// Labels to set
    #[arg(value_name = "KEY=VALUE", value_parser = values::tag)]
    pub(crate) set: Vec<(String, String)>,

    /// A label to remove; again for more
    #[arg(long, value_name = "KEY")]
    pub(crate) remove: Vec<String>,
}

/// `host rename`.
#[derive(Debug, Args)]
pub(crate) struct HostRename {
    #[command(flatten)]
    pub(crate) host: OneHost,

    /// The new name, unique in the tenant
    pub(crate) new: String,
}

/// `host remove`.
#[derive(Debug, Args)]
pub(crate) struct HostRemove {
    #[command(flatten)]
    pub(crate) hosts: Hosts,

    /// Also where it is online, or commands wait for it
    #[arg(long)]
    pub(crate) force: bool,
}

/// Commands that were left with Core for hosts that may be away (`--queue`).
#[derive(Debug, Subcommand)]
pub(crate) enum QueueCommand {
    /// List the commands that have not ended
    #[command(visible_alias = "ls")]
    List(QueueList),
    /// Show commands
    Show(CommandIds),
    /// Take commands back that no host has taken
    Cancel(CommandIds),
}

/// `command list`.
#[derive(Debug, Args)]
pub(crate) struct QueueList {
    /// Only those of this host
    #[arg(long, value_name = "HOST", add = completers::hosts())]
    pub(crate) of: Option<String>,

    /// Also those that ended, for a week
    #[arg(long)]
    pub(crate) all: bool,
}

/// One or several commands.
#[derive(Debug, Args)]
pub(crate) struct CommandIds {
    /// Ids of commands
    #[arg(required = true, value_name = "ID")]
    pub(crate) ids: Vec<String>,
}

/// Tenants of the fleet and their quotas.
#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// List the tenants
    #[command(visible_alias = "ls")]
    List,
    /// Make a tenant
    Create(TenantSet),
    /// Change a tenant's quotas; those that are not named stay
    Set(TenantSet),
    /// Remove a tenant that has neither hosts nor users
    #[command(visible_alias = "rm")]
    Delete {
        /// Its name
        name: String,
    },
}

/// A quota; 0 is no limit.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct QuotaArgs {
    /// Most VMs; 0: no limit
    #[arg(long, value_name = "N")]
    pub(crate) vms: Option<u32>,

    /// Most virtual CPUs of all VMs together; 0: no limit
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,

    /// Most memory of all VMs together; 0: no limit
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub(crate) memory: Option<u64>,

    /// Most disk of all VMs together; 0: no limit
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub(crate) disk: Option<u64>,
}

/// `tenant create|set`.
#[derive(Debug, Args)]
pub(crate) struct TenantSet {
    /// Its name
    pub(crate) name: String,

    #[command(flatten)]
    pub(crate) quota: QuotaArgs,

    /// Most VMs of each of its users; 0: no limit
    #[arg(long, value_name = "N")]
    pub(crate) user_vms: Option<u32>,

    /// Most virtual CPUs of each of its users; 0: no limit
    #[arg(long, value_name = "N")]
    pub(crate) user_cpus: Option<u32>,

    /// Most memory of all VMs of each of its users; 0: no limit
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub(crate) user_memory: Option<u64>,

    /// Most disk of all VMs of each of its users; 0: no limit
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    pub(crate) user_disk: Option<u64>,
}

/// People of the fleet.
#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// List the users
    #[command(visible_alias = "ls")]
    List {
        /// Only of this tenant
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
    },
    /// Change a user's role or quota
    Set(UserSet),
    /// Revoke all that users prove themselves with
    Revoke {
        /// Names, ids, or unique prefixes of ids
        #[arg(required = true, value_name = "USER")]
        users: Vec<String>,
    },
}

/// `user set`.
#[derive(Debug, Args)]
pub(crate) struct UserSet {
    /// Name, id, or unique prefix of an id
    pub(crate) user: String,

    /// The new role
    #[arg(long, value_enum)]
    pub(crate) role: Option<Role>,

    #[command(flatten)]
    pub(crate) quota: QuotaArgs,
}
