//! What a fleet is: hosts, tenants, people, commands, and what is known of each host's VMs.
//!
//! Nothing here knows of transport, storage or runtime. The VM states, names, errors and roles are
//! those of `ghost-domain`.

mod caller;
mod command;
mod direct;
mod event;
mod host;
mod identity;
mod inventory;
mod peer;
pub mod ports;
mod quota;
mod record;
mod tenant;
mod told;

pub use caller::{Caller, CallerSource};
pub use command::QueuedCommand;
pub use direct::{AddressRange, DirectPolicy};
pub use event::{FleetEvent, FleetEventKind};
pub use host::{
    CertificateUse, HostLife, HostRecord, HostState, Labels, LinkTruth, MISSED_HEARTBEATS,
    Ownership, check_label, shown_state,
};
pub use identity::{FleetKey, JoinToken, MachineHash, TokenKind, User, UserSource};
pub use inventory::{HostHealth, Inventory};
pub use peer::PeerIdentity;
pub use quota::{HeldRoom, Quota, SentCreate, Usage};
pub use record::{Record, RecordKey, Replica, Stored};
pub use tenant::Tenant;
pub use told::{Form, ToldVms, Written};
