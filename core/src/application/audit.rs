//! Who did what in the fleet.

use async_trait::async_trait;
use ghost_domain::{HostId, Result, TenantName, Timestamp};

/// Something that somebody did, or tried to.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FleetAuditRecord {
    /// Who, `<tenant>/<name>`; empty: nobody whom we know.
    pub principal: String,
    /// The tenant of the caller.
    pub tenant: Option<TenantName>,
    /// How it was proved: `socket`, `certificate`, `key`, `oidc`.
    pub source: String,
    /// The RPC, or the method and route.
    pub action: String,
    /// The host concerned.
    pub host: Option<HostId>,
    /// Its tenant: whose business it is.
    pub host_tenant: Option<TenantName>,
    /// The VM, user, key or tenant concerned.
    pub subject: String,
    /// `begun`, `ok`, or the stable code.
    pub outcome: String,
    /// The request, as logs and traces have it.
    pub request_id: String,
    /// What was asked, without secrets.
    pub detail: String,
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetAuditEntry {
    /// Its number.
    pub sequence: u64,
    /// When.
    pub at: Timestamp,
    /// What.
    pub record: FleetAuditRecord,
}

/// Which entries to list.
#[derive(Clone, Debug, Default)]
pub struct FleetAuditQuery {
    /// Only what somebody of this tenant did, or what was done to its hosts.
    pub tenant: Option<TenantName>,
    /// Only what concerns this host.
    pub host: Option<HostId>,
    /// Only what this user did: `<tenant>/<name>`, or the name alone.
    pub user: Option<String>,
    /// Only since then.
    pub since: Option<Timestamp>,
    /// Only the newest so many.
    pub limit: usize,
}

impl FleetAuditQuery {
    /// Whether an entry is asked for.
    pub fn wants(&self, at: Timestamp, record: &FleetAuditRecord) -> bool {
        let by = |user: &String| {
            record.principal == *user
                || record
                    .principal
                    .rsplit_once('/')
                    .is_some_and(|(_, name)| name == user)
        };
        self.tenant.as_ref().is_none_or(|tenant| {
            record.tenant.as_ref() == Some(tenant) || record.host_tenant.as_ref() == Some(tenant)
        }) && self.host.is_none_or(|host| record.host == Some(host))
            && self.user.as_ref().is_none_or(by)
            && self.since.is_none_or(|since| at >= since)
    }
}

/// The log: appended to, never changed, each entry chained to the one before.
#[async_trait]
pub trait FleetAudit: Send + Sync {
    /// Writes an entry; durable when it returns.
    ///
    /// # Errors
    /// `IoFailed`, `DiskFull`, `TooManyRequests`.
    async fn append(&self, record: FleetAuditRecord) -> Result<()>;

    /// The newest entries that are wanted, oldest first.
    ///
    /// # Errors
    /// `IoFailed`.
    async fn list(&self, query: FleetAuditQuery) -> Result<Vec<FleetAuditEntry>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_sees_what_it_did_and_what_was_done_to_it() {
        let tenant = |name: &str| TenantName::new(name).unwrap();
        let record = FleetAuditRecord {
            principal: "acme/alice".into(),
            tenant: Some(tenant("acme")),
            host_tenant: Some(tenant("other")),
            ..FleetAuditRecord::default()
        };
        let query = |name: &str| FleetAuditQuery {
            tenant: Some(tenant(name)),
            ..FleetAuditQuery::default()
        };
        let at = Timestamp::from_unix_millis(5);
        assert!(query("acme").wants(at, &record));
        assert!(query("other").wants(at, &record));
        assert!(!query("third").wants(at, &record));
        for (user, wanted) in [("alice", true), ("acme/alice", true), ("acme", false)] {
            let query = FleetAuditQuery {
                user: Some(user.into()),
                since: Some(at),
                ..FleetAuditQuery::default()
            };
            assert_eq!(query.wants(at, &record), wanted, "{user}");
            assert!(!query.wants(Timestamp::from_unix_millis(4), &record));
        }
    }
}
