//! Read the audit log.

use std::sync::Arc;

use ghost_domain::guest::{AuditEntry, AuditVerdict};
use ghost_domain::{Principal, Result, Role, Timestamp, VmId};

use crate::application::Ports;
use crate::fleet::check_own;
use crate::registry::Registry;

/// Which entries.
#[derive(Clone, Debug, Default)]
pub struct ListAuditCommand {
    /// Only those about this VM: a name, an id or a prefix; the full id of one that is gone.
    pub vm: Option<String>,
    /// Only those since then.
    pub since: Option<Timestamp>,
    /// The newest so many; 0: 1,000. At most 10,000.
    pub limit: u32,
}

/// Lists the audit log.
pub struct ListAudit {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl ListAudit {
    /// Entries, oldest first.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmAmbiguous`, `IoFailed`.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: &ListAuditCommand,
    ) -> Result<Vec<AuditEntry>> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        let vm = match &command.vm {
            None => None,
            Some(selector) => Some(
                self.registry
                    .read(|model| model.find_vm(selector).map(|entry| entry.vm.id))
                    // The log outlives VMs.
                    .or_else(|error| selector.parse::<VmId>().map_err(|_| error))?,
            ),
        };
        let limit = match command.limit {
            0 => 1_000,
            limit => limit.min(10_000),
        };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.ports.audit.list(vm, command.since, limit).await
    }
}

/// Checks the audit log.
pub struct VerifyAudit {
    pub(crate) ports: Ports,
}

impl VerifyAudit {
    /// Reads all of it and follows its chain.
    ///
    /// # Errors
    /// `PermissionDenied`, `IoFailed`.
    pub async fn execute(&self, principal: &Principal) -> Result<AuditVerdict> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        self.ports.audit.verify().await
    }
}
