//! A tenant: whom hosts and people belong to.

use ghost_domain::{TenantName, Timestamp};

use super::Quota;

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its name, which is its identity.
    pub name: TenantName,
    /// What it may have in all.
    pub quota: Quota,
    /// What each of its users may have who has no quota of its own.
    pub user_quota: Quota,
    /// When it was made.
    pub created_at: Timestamp,
}
