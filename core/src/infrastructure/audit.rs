//! The fleet's audit log, in the files and the chain of hashes that hosts use too. Each replica has
//! its own: what somebody did stands where it was asked.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::guest::{AuditEntry, AuditRecord, FleetAuditPart};
use ghost_domain::ports::{AuditLog, Clock};
use ghost_domain::{Result, TenantName};
use ghost_infrastructure::audit::{AuditOptions, FileAuditLog};

use crate::application::audit::{FleetAudit, FleetAuditEntry, FleetAuditQuery, FleetAuditRecord};

/// [`FleetAudit`] in files.
#[derive(Debug)]
pub struct FileFleetAudit(FileAuditLog);

impl FileFleetAudit {
    /// Opens the log in `<data_dir>/audit`.
    ///
    /// # Errors
    /// `IoFailed`, `DiskFull`.
    pub fn open(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<Self> {
        FileAuditLog::open(AuditOptions::new(data_dir, clock)).map(Self)
    }
}

fn text<T: ToString>(value: Option<&T>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}

fn written(record: FleetAuditRecord) -> AuditRecord {
    AuditRecord {
        fleet: Some(FleetAuditPart {
            tenant: text(record.tenant.as_ref()),
            source: record.source,
            host: text(record.host.as_ref()),
            host_tenant: text(record.host_tenant.as_ref()),
        }),
        principal: record.principal,
        vm_name: record.subject,
        action: record.action,
        detail: record.detail,
        outcome: record.outcome,
        request_id: record.request_id,
        ..AuditRecord::default()
    }
}

fn read(entry: &AuditEntry) -> FleetAuditEntry {
    let record = entry.record.clone();
    let fleet = record.fleet.unwrap_or_default();
    let tenant = |name: String| TenantName::new(name).ok();
    FleetAuditEntry {
        sequence: entry.sequence,
        at: entry.at,
        record: FleetAuditRecord {
            principal: record.principal,
            tenant: tenant(fleet.tenant),
            source: fleet.source,
            action: record.action,
            host: fleet.host.parse().ok(),
            host_tenant: tenant(fleet.host_tenant),
            subject: record.vm_name,
            outcome: record.outcome,
            request_id: record.request_id,
            detail: record.detail,
        },
    }
}

#[async_trait]
impl FleetAudit for FileFleetAudit {
    async fn append(&self, record: FleetAuditRecord) -> Result<()> {
        self.0.append(written(record)).await.map(drop)
    }

    async fn list(&self, query: FleetAuditQuery) -> Result<Vec<FleetAuditEntry>> {
        let limit = query.limit;
        let found = self
            .0
            .find(limit, move |entry| {
                let entry = read(entry);
                query.wants(entry.at, &entry.record)
            })
            .await?;
        Ok(found.iter().map(read).collect())
    }
}

#[cfg(test)]
mod tests {
    use ghost_domain::HostId;
    use ghost_infrastructure::clock::SystemClock;

    use super::*;

    #[tokio::test]
    async fn what_is_written_is_found_again_and_the_chain_holds() {
        let folder = tempfile::tempdir().unwrap();
        let open = || FileFleetAudit::open(folder.path(), Arc::new(SystemClock::new())).unwrap();
        let log = open();
        let host = HostId::random();
        let tenant = |name: &str| TenantName::new(name).unwrap();
        let record = |name: &str| FleetAuditRecord {
            principal: format!("{name}/alice"),
            tenant: Some(tenant(name)),
            source: "key".into(),
            action: "ghost.agent.v1.VmService/Delete".into(),
            host: Some(host),
            host_tenant: Some(tenant("acme")),
            subject: "web".into(),
            outcome: "ok".into(),
            request_id: "r-1".into(),
            detail: "\u{1b}".into(),
        };
        log.append(record("acme")).await.unwrap();
        log.append(record("other")).await.unwrap();
        drop(log);
        let log = open();
        let query = |user: &str| FleetAuditQuery {
            user: Some(user.into()),
            host: Some(host),
            limit: 10,
            ..FleetAuditQuery::default()
        };
        let found = log.list(query("other/alice")).await.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].record, record("other"));
        assert_eq!(found[0].sequence, 2);
        assert_eq!(log.list(query("alice")).await.unwrap().len(), 2);
        let verdict = log.0.verify().await.unwrap();
        assert_eq!((verdict.entries, verdict.broken), (2, None));
    }
}
