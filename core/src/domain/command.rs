//! A command in a host's queue.
//!
//! ```text
//! queued ──sent, host takes it──> accepted ──> succeeded | failed
//!    ├──deadline──> expired           (once it was sent, the host tells)
//!    ├──operator──> cancelled         (only where it was never sent)
//!    └──sent, host refuses──> refused
//! ```

use ghost_domain::fleet::{CommandAction, CommandOutcome, CommandStatus, FleetPrincipal};
use ghost_domain::{CommandId, HostId, RequestId, TenantName, Timestamp};

/// A command for a host, which may be away.
#[derive(Clone, Debug, PartialEq)]
pub struct QueuedCommand {
    /// Its id, the request id of its operation on the host.
    pub id: CommandId,
    /// The caller's idempotency key, unique for a host.
    pub request_id: RequestId,
    /// The host.
    pub host: HostId,
    /// The host's tenant.
    pub tenant: TenantName,
    /// Its place in the host's queue.
    pub generation: u64,
    /// Who asked.
    pub issuer: FleetPrincipal,
    /// What to do.
    pub action: CommandAction,
    /// When it was queued.
    pub issued_at: Timestamp,
    /// It is not begun after this.
    pub deadline: Timestamp,
    /// When it first went out to the host, marked before it did. From then on only the host knows
    /// what becomes of it: it neither expires in the queue nor can be cancelled.
    pub sent_at: Option<Timestamp>,
    /// How far it is.
    pub status: CommandStatus,
    /// What the host said last.
    pub outcome: Option<CommandOutcome>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}
