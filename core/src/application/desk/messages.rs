//! What is said on a control stream, as the desk sees it: whole, bounded and clean. The wire is the
//! listener's business.

use std::time::Duration;

use ghost_domain::fleet::{CommandOutcome, CorePermissions, FleetCommand, FleetFacts, VmSummary};
use ghost_domain::{ByteSize, Demand, HostResources, Result, Timestamp, VmId};

use crate::domain::{HostHealth, MachineHash};

/// A host says.
#[derive(Clone, Debug, PartialEq)]
pub enum FromHost {
    /// First of all.
    Hello(Box<HostHello>),
    /// Are you there?
    Ping(u64),
    /// I am.
    Pong(u64),
    /// How it is.
    Heartbeat(Box<HostHeartbeat>),
    /// What became of a command.
    Outcome(Box<CommandOutcome>),
    /// It ends the link on purpose.
    Goodbye {
        /// Why, as a code.
        code: String,
        /// Why, for people.
        message: String,
    },
}

/// A host's first message.
#[derive(Clone, Debug, PartialEq)]
pub struct HostHello {
    /// The newest version of the control stream that it speaks.
    pub protocol_version: u32,
    /// Its agent's version.
    pub agent_version: String,
    /// Random for each start of the agent.
    pub instance: String,
    /// The newest generation of a command that it knows.
    pub command_generation: u64,
    /// What its owner lets Core do.
    pub permissions: CorePermissions,
    /// How the link came to be.
    pub carrier: String,
    /// Addresses by which Core could dial it: the provider and `ip:port`.
    pub direct_addresses: Vec<(String, String)>,
    /// What seldom changes.
    pub facts: FleetFacts,
    /// The machine that it runs on, as a hash of its own.
    pub machine: Option<MachineHash>,
    /// Its present link stays until the streams over it have ended.
    pub follows: bool,
}

/// How a host is.
#[derive(Clone, Debug, PartialEq)]
pub struct HostHeartbeat {
    /// Its number within the link.
    pub sequence: u64,
    /// `vms` are all; otherwise those that changed.
    pub full: bool,
    /// VMs.
    pub vms: Vec<VmSummary>,
    /// Those that are gone.
    pub removed: Vec<VmId>,
    /// The digest over all VMs.
    pub digest: u64,
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
    /// Its health.
    pub health: HostHealth,
    /// How the link fares, as the host sees it.
    pub link: HostLinkFacts,
    /// Present where they changed.
    pub facts: Option<FleetFacts>,
    /// Addresses by which Core could dial it, present where they changed.
    pub direct_addresses: Option<Vec<(String, String)>>,
}

/// How the link fares, as the host sees it.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct HostLinkFacts {
    /// The round trip of its last ping.
    pub round_trip: Duration,
    /// Links since its agent started.
    pub connects: u64,
    /// Why the one before this ended.
    pub last_loss: String,
}

/// Core says.
#[derive(Clone, Debug, PartialEq)]
pub enum ToHost {
    /// First of all.
    Welcome(Welcome),
    /// Are you there?
    Ping(u64),
    /// I am.
    Pong(u64),
    /// To a heartbeat.
    HeartbeatReply {
        /// Its number.
        sequence: u64,
        /// The next must be a full one.
        want_full: bool,
        /// When it came.
        received_at: Timestamp,
    },
    /// Do this.
    Command {
        /// What.
        command: Box<FleetCommand>,
        /// When it was asked for.
        issued_at: Timestamp,
    },
    /// The outcome of this generation is kept.
    CommandKept(u64),
    /// The link ends on purpose.
    Goodbye(Goodbye),
}

/// Core's first message.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The version of the control stream from here on.
    pub protocol_version: u32,
    /// Core's version.
    pub core_version: String,
    /// Which Core.
    pub core_id: String,
    /// Which replica.
    pub replica: String,
    /// The epoch of the records.
    pub epoch: u64,
    /// How often the host should report.
    pub heartbeat_interval: Duration,
    /// How often each side sends a ping.
    pub ping_interval: Duration,
}

/// Why Core ends a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goodbye {
    /// A code of the protocol.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// Where to connect instead; empty: anywhere.
    pub address: String,
    /// Not before so long.
    pub retry_after: Duration,
}

impl Goodbye {
    /// With a code and a text.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            address: String::new(),
            retry_after: Duration::ZERO,
        }
    }

    /// Not before `delay`.
    #[must_use]
    pub const fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = delay;
        self
    }
}

/// The half of a control stream that is read.
pub trait ControlReader: Send {
    /// The next message; `None` at the end. The future may be dropped, and nothing is lost.
    ///
    /// # Errors
    /// `InvalidArgument` for what the protocol does not know; `CoreUnreachable` where the stream
    /// broke.
    fn next(&mut self) -> impl Future<Output = Result<Option<FromHost>>> + Send;
}

/// The half of a control stream that is written.
pub trait ControlWriter: Send {
    /// Adds a message to what is sent.
    ///
    /// # Errors
    /// Where the host leaves too much unread, or the message is too long.
    fn queue(&mut self, message: ToHost) -> Result<()>;

    /// Whether something waits to be sent.
    fn is_waiting(&self) -> bool;

    /// Sends what waits. The future may be dropped; the next one sends the rest.
    ///
    /// # Errors
    /// Where the stream broke.
    fn flush(&mut self) -> impl Future<Output = Result<()>> + Send;
}
