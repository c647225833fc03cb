//! A host as part of a fleet: what it tells Ghost Core, what Core may tell it, and what its owner
//! lets Core do.
//!
//! Core's word is hostile input: it is one of a closed set of [`CommandAction`]s, checked like a
//! stranger's request, each taken once and in order ([`FleetLedger::judge`]).

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::{
    ByteSize, CommandId, Demand, Error, ErrorCode, HostId, HostName, HostResources, OperationId,
    Role, TenantName, Timestamp, VmId,
    vm::{DesiredPower, VmState},
};

/// Who this host is in its fleet; what enrolment gave it. The private key is not here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetIdentity {
    /// The host.
    pub host: HostId,
    /// Its name in the fleet.
    pub name: HostName,
    /// Its tenant.
    pub tenant: TenantName,
    /// The trust domain of its SPIFFE id.
    pub trust_domain: String,
    /// Where Core's replicas are, `host:port`.
    pub addresses: Vec<String>,
    /// SHA-256 of the CA certificate of Core, 64 hexadecimal digits.
    pub authority_fingerprint: String,
    /// When the present certificate began.
    pub issued_at: Timestamp,
    /// When it ends.
    pub expires_at: Timestamp,
    /// Rises by one with each certificate.
    pub generation: u64,
}

impl FleetIdentity {
    /// `spiffe://<trust domain>/tenant/<tenant>/host/<id>` (SPIFFE-ID specification, section 2).
    pub fn spiffe_id(&self) -> String {
        spiffe_host(&self.trust_domain, &self.tenant, self.host)
    }
}

/// The SPIFFE id of a host.
pub fn spiffe_host(trust_domain: &str, tenant: &TenantName, host: HostId) -> String {
    format!("spiffe://{trust_domain}/tenant/{tenant}/host/{host}")
}

/// What the owner of a host lets Core's principals do on it. Each allows all that the ones before it
/// do. Whatever it says, nobody manages this host's own credentials through Core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum CorePermissions {
    /// Nothing, not even to look: there is no link.
    Off,
    /// Look.
    Read,
    /// Run VMs, as the role `operator`.
    Operate,
    /// Enter guests and consoles too.
    #[default]
    OperateAndEnter,
}

impl CorePermissions {
    /// As the configuration writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Read => "read",
            Self::Operate => "operate",
            Self::OperateAndEnter => "operate_and_enter",
        }
    }

    /// The most that a principal of Core is here.
    pub const fn most_role(self) -> Option<Role> {
        match self {
            Self::Off => None,
            Self::Read => Some(Role::Viewer),
            Self::Operate | Self::OperateAndEnter => Some(Role::Operator),
        }
    }
}

impl fmt::Display for CorePermissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for CorePermissions {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        [Self::Off, Self::Read, Self::Operate, Self::OperateAndEnter]
            .into_iter()
            .find(|one| one.as_str() == text)
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::InvalidArgument,
                    format!("{text:?} is not what Core may be let do"),
                )
                .because("off, read, operate and operate_and_enter are")
            })
    }
}

/// What a fleet's list shows of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSummary {
    /// Its id.
    pub id: VmId,
    /// Its name on its host.
    pub name: String,
    /// The state that is shown.
    pub state: VmState,
    /// Why.
    pub state_reason: String,
    /// What is wanted.
    pub desired: DesiredPower,
    /// What it holds.
    pub demand: Demand,
    /// The image it was made of.
    pub image: String,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The record's generation.
    pub generation: u64,
    /// When it was created.
    pub created_at: Timestamp,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
    /// `<tenant>/<user>` where it was created through Core.
    pub owner: Option<String>,
}

/// What seldom changes of a host.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FleetFacts {
    /// Its host name.
    pub hostname: String,
    /// Operating system.
    pub operating_system: String,
    /// Kernel release.
    pub kernel: String,
    /// The CPU's model.
    pub cpu_model: String,
    /// Changes with every boot.
    pub boot_id: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// QEMU's version.
    pub hypervisor_version: String,
    /// libvirt's.
    pub libvirt_version: String,
}

/// What a host tells Core of itself. The link sends the whole of it first, then what changed.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct HeartbeatReport {
    /// All VMs, in the order of their ids.
    pub vms: Vec<VmSummary>,
    /// What the host has.
    pub total: HostResources,
    /// What VMs may have together.
    pub allocatable: Demand,
    /// What they hold.
    pub committed: Demand,
    /// Memory that could be given out without swapping.
    pub memory_available: ByteSize,
    /// Load over one minute.
    pub load_one_minute: f64,
    /// `running`, `recovering`, `draining`.
    pub agent_state: String,
    /// Whether libvirt answers.
    pub hypervisor_connected: bool,
    /// Whether the store takes writes.
    pub store_writable: bool,
    /// What does not work now.
    pub warnings: Vec<String>,
    /// All ways into guests are closed.
    pub lockdown: bool,
    /// The facts.
    pub facts: FleetFacts,
}

/// What Core can ask for through its queue. A closed set: what is not here cannot be asked.
#[derive(Clone, Debug, PartialEq)]
pub enum CommandAction {
    /// Create a VM.
    CreateVm(Box<CreateVmCommand>),
    /// Start one.
    StartVm {
        /// A name, id or unique prefix, as in every request.
        vm: String,
    },
    /// Stop one.
    StopVm {
        /// Which.
        vm: String,
        /// Cut the power: at once, or after `timeout` where one is given.
        force: bool,
        /// How long the guest may take.
        timeout: Option<Duration>,
    },
    /// Restart one.
    RestartVm {
        /// Which.
        vm: String,
        /// See [`Self::StopVm`].
        force: bool,
        /// See [`Self::StopVm`].
        timeout: Option<Duration>,
    },
    /// Pause one.
    PauseVm {
        /// Which.
        vm: String,
    },
    /// Resume one.
    ResumeVm {
        /// Which.
        vm: String,
    },
    /// Delete one.
    DeleteVm {
        /// Which.
        vm: String,
        /// Also a running one.
        force: bool,
    },
    /// Change the tags or the protection of one.
    UpdateVm {
        /// Which.
        vm: String,
        /// Virtual CPUs.
        vcpus: Option<u32>,
        /// Memory.
        memory: Option<ByteSize>,
        /// Protection against deletion.
        delete_protection: Option<bool>,
        /// Tags to set.
        set_tags: BTreeMap<String, String>,
        /// Tags to remove.
        remove_tags: Vec<String>,
    },
}

impl CommandAction {
    /// The stable name, in snake case.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::CreateVm(_) => "create_vm",
            Self::StartVm { .. } => "start_vm",
            Self::StopVm { .. } => "stop_vm",
            Self::RestartVm { .. } => "restart_vm",
            Self::PauseVm { .. } => "pause_vm",
            Self::ResumeVm { .. } => "resume_vm",
            Self::DeleteVm { .. } => "delete_vm",
            Self::UpdateVm { .. } => "update_vm",
        }
    }

    /// The VM that it is about, as it was named; empty where one is made and its name made up.
    pub fn subject(&self) -> &str {
        match self {
            Self::CreateVm(create) => &create.name,
            Self::StartVm { vm }
            | Self::StopVm { vm, .. }
            | Self::RestartVm { vm, .. }
            | Self::PauseVm { vm }
            | Self::ResumeVm { vm }
            | Self::DeleteVm { vm, .. }
            | Self::UpdateVm { vm, .. } => vm,
        }
    }
}

/// The parts of a VM that Core may ask for. No path, address or markup is among them but the guest's
/// own user-data, which only the guest reads.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct CreateVmCommand {
    /// Empty: a name is made up.
    pub name: String,
    /// The name of a cached image or of the catalogue's.
    pub image: String,
    /// Virtual CPUs; `None`: the default.
    pub vcpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// Disk.
    pub disk: Option<ByteSize>,
    /// Networks.
    pub networks: Vec<String>,
    /// The login.
    pub user: String,
    /// Its keys.
    pub ssh_authorized_keys: Vec<String>,
    /// cloud-init's user-data.
    pub user_data: String,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Start it.
    pub start: bool,
}

/// A command as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct FleetCommand {
    /// Its id, which is the request id of its operation.
    pub id: CommandId,
    /// The epoch of Core's records that it came from.
    pub epoch: u64,
    /// Its place among the commands of this host.
    pub generation: u64,
    /// The generation of the one that has to be taken before it; 0: none.
    pub previous: u64,
    /// It is not begun after this.
    pub deadline: Timestamp,
    /// Who asked Core.
    pub issuer: FleetPrincipal,
    /// What to do.
    pub action: CommandAction,
}

/// A command that cannot be taken whatever the state of this host: it is malformed, or of a kind
/// that this version does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedCommand {
    /// Its id.
    pub id: CommandId,
    /// See [`FleetCommand::epoch`].
    pub epoch: u64,
    /// See [`FleetCommand::generation`].
    pub generation: u64,
    /// See [`FleetCommand::previous`].
    pub previous: u64,
    /// Why.
    pub error: Error,
    /// When it came.
    pub at: Timestamp,
}

impl RefusedCommand {
    /// The outcome to tell Core.
    pub fn outcome(&self) -> CommandOutcome {
        let mut message = self.error.message().to_owned();
        if let Some(cause) = self.error.cause() {
            message.push_str(": ");
            message.push_str(cause);
        }
        CommandOutcome {
            id: self.id,
            generation: self.generation,
            status: CommandStatus::Refused,
            operation: None,
            code: Some(self.error.code()),
            message: message
                .chars()
                .take(FleetLedger::MOST_MESSAGE_CHARACTERS)
                .collect(),
            at: self.at,
        }
    }
}

/// Somebody whom Core vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetPrincipal {
    /// `<tenant>/<name>`, for logs and records.
    pub name: String,
    /// The tenant; `None` for Core's own administrators.
    pub tenant: Option<TenantName>,
    /// The role that Core says; the owner's [`CorePermissions`] bound it.
    pub role: Role,
}

/// How far a command has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommandStatus {
    /// In Core's queue.
    Queued,
    /// Its operation runs.
    Accepted,
    /// Its operation succeeded.
    Succeeded,
    /// Its operation failed.
    Failed,
    /// It took no effect and never will.
    Refused,
    /// Its deadline passed before it was begun.
    Expired,
    /// Taken back before the host took it.
    Cancelled,
}

impl CommandStatus {
    /// The stable name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Accepted => "accepted",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether it stays so.
    pub const fn is_finished(self) -> bool {
        !matches!(self, Self::Queued | Self::Accepted)
    }
}

impl fmt::Display for CommandStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandOutcome {
    /// Which.
    pub id: CommandId,
    /// Its generation.
    pub generation: u64,
    /// How far it is.
    pub status: CommandStatus,
    /// Its operation, where one was begun.
    pub operation: Option<OperationId>,
    /// The code, where it was refused or failed.
    pub code: Option<ErrorCode>,
    /// Text for people.
    pub message: String,
    /// When.
    pub at: Timestamp,
}

/// What a host remembers of Core's commands, durably: without it a restart would forget which were
/// taken.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FleetLedger {
    /// The Core that the numbers belong to.
    pub core_id: String,
    /// The newest epoch seen.
    pub epoch: u64,
    /// The newest generation taken or refused for good.
    pub generation: u64,
    /// Outcomes that Core has not said it keeps, oldest first.
    pub unreported: VecDeque<CommandOutcome>,
}

/// What to do with a command that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Take it: write the ledger, then begin.
    Take,
    /// It was taken before; this is what became of it, where that is still known.
    Known(Option<CommandOutcome>),
    /// It is older than what Core sent before, or came before one that is missing.
    Stale(String),
    /// Its deadline passed.
    Expired,
}

impl FleetLedger {
    /// Most outcomes that are kept for a Core that does not acknowledge them.
    pub const MOST_UNREPORTED: usize = 128;
    /// Most characters of an outcome's message; with the number above this keeps the record small.
    pub const MOST_MESSAGE_CHARACTERS: usize = 200;

    /// Judges a command by what was taken before: an older epoch is refused, a generation that was
    /// taken is not taken again, one that came too early waits for what is missing.
    pub fn judge(&self, command: &FleetCommand, now: Timestamp) -> Verdict {
        if command.epoch < self.epoch {
            return Verdict::Stale(format!(
                "it is of epoch {}, and Core is at {}",
                command.epoch, self.epoch
            ));
        }
        if command.generation <= self.generation {
            let known = self.unreported.iter().find(|one| one.id == command.id);
            return Verdict::Known(known.cloned());
        }
        if command.previous > self.generation {
            return Verdict::Stale(format!(
                "number {} has to be taken before number {}, and has not come",
                command.previous, command.generation
            ));
        }
        if now > command.deadline {
            return Verdict::Expired;
        }
        Verdict::Take
    }
}

/// How the link to Core fares.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum LinkState {
    /// This host has not joined a fleet, or its owner lets Core do nothing.
    #[default]
    Off,
    /// A connection is being made.
    Connecting,
    /// Data frames went both ways lately.
    Up {
        /// The carrier: `link`, `piko`, `direct`.
        carrier: String,
        /// The replica at the other end.
        replica: String,
        /// The round trip of the last ping.
        round_trip: Duration,
    },
    /// Nothing was heard for a while; the link is being given up.
    Silent {
        /// For how long.
        since: Duration,
    },
    /// The next attempt comes.
    Waiting {
        /// Why the last one ended.
        reason: String,
        /// When it comes.
        retry_in: Duration,
    },
    /// Core does not want this host any more; only its owner can change that.
    Refused {
        /// The code and why.
        reason: String,
    },
}

impl LinkState {
    /// The stable name.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Connecting => "connecting",
            Self::Up { .. } => "up",
            Self::Silent { .. } => "silent",
            Self::Waiting { .. } => "waiting",
            Self::Refused { .. } => "refused",
        }
    }
}

/// One way by which Core can reach this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CarrierState {
    /// `link`, `piko` or `direct`.
    pub name: &'static str,
    /// The name of a state, as [`LinkState::as_str`] has them.
    pub state: &'static str,
    /// Why it is not up; empty where it is, or where nobody wants it.
    pub reason: String,
    /// The other end, for people.
    pub peer: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(epoch: u64, generation: u64) -> FleetCommand {
        FleetCommand {
            id: CommandId::random(),
            epoch,
            generation,
            previous: generation - 1,
            deadline: Timestamp::from_unix_millis(1_000),
            issuer: FleetPrincipal {
                name: "acme/alice".into(),
                tenant: None,
                role: Role::Operator,
            },
            action: CommandAction::StartVm { vm: "web".into() },
        }
    }

    #[test]
    fn a_command_is_taken_once_in_order_and_in_time() {
        let ledger = FleetLedger {
            epoch: 3,
            generation: 7,
            ..FleetLedger::default()
        };
        let now = Timestamp::from_unix_millis(1_000);
        assert_eq!(ledger.judge(&command(3, 8), now), Verdict::Take);
        assert_eq!(ledger.judge(&command(4, 8), now), Verdict::Take);
        assert_eq!(ledger.judge(&command(3, 7), now), Verdict::Known(None));
        assert!(matches!(
            ledger.judge(&command(2, 8), now),
            Verdict::Stale(_)
        ));
        assert!(matches!(
            ledger.judge(&command(3, 9), now),
            Verdict::Stale(_)
        ));
        let late = Timestamp::from_unix_millis(1_001);
        assert_eq!(ledger.judge(&command(3, 8), late), Verdict::Expired);
    }

    #[test]
    fn a_repeated_command_gets_its_first_outcome() {
        let repeated = command(1, 1);
        let outcome = CommandOutcome {
            id: repeated.id,
            generation: 1,
            status: CommandStatus::Refused,
            operation: None,
            code: Some(ErrorCode::VmNotFound),
            message: "no VM is called web".into(),
            at: Timestamp::from_unix_millis(5),
        };
        let ledger = FleetLedger {
            epoch: 1,
            generation: 1,
            unreported: VecDeque::from([outcome.clone()]),
            ..FleetLedger::default()
        };
        let now = Timestamp::from_unix_millis(10);
        assert_eq!(ledger.judge(&repeated, now), Verdict::Known(Some(outcome)));
    }

    #[test]
    fn permissions_bound_the_role() {
        assert_eq!(CorePermissions::Off.most_role(), None);
        assert_eq!(CorePermissions::Read.most_role(), Some(Role::Viewer));
        for one in [
            CorePermissions::Off,
            CorePermissions::Read,
            CorePermissions::Operate,
            CorePermissions::OperateAndEnter,
        ] {
            assert_eq!(one.as_str().parse::<CorePermissions>().unwrap(), one);
        }
    }
}
