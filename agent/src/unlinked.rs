//! No audit log: nothing can be written, so nothing enters a guest. Stands in until the log is
//! composed.

use async_trait::async_trait;
use ghost_domain::guest::{AuditEntry, AuditRecord, AuditVerdict};
use ghost_domain::ports::AuditLog;
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};

/// See the module's documentation.
pub(crate) struct Unlinked;

fn unreachable<T>() -> Result<T> {
    Err(Error::new(
        ErrorCode::IoFailed,
        "this build of the agent has no audit log",
    ))
}

#[async_trait]
impl AuditLog for Unlinked {
    async fn append(&self, _: AuditRecord) -> Result<AuditEntry> {
        unreachable()
    }
    async fn list(
        &self,
        _: Option<VmId>,
        _: Option<Timestamp>,
        _: usize,
    ) -> Result<Vec<AuditEntry>> {
        unreachable()
    }
    async fn verify(&self) -> Result<AuditVerdict> {
        unreachable()
    }
}
