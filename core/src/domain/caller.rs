//! Somebody who calls Core, and what it may see.

use std::collections::BTreeSet;

use ghost_domain::{CredentialId, Error, ErrorCode, HostId, Result, Role, TenantName};

/// How a caller proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallerSource {
    /// Root or a member of the group `ghost` on Core's machine, over the local socket.
    Socket {
        /// The peer's user id.
        uid: u32,
    },
    /// An operator's client certificate.
    Certificate,
    /// An API key.
    Key {
        /// Which.
        id: CredentialId,
    },
    /// A token of the configured OpenID Connect issuer.
    OpenIdConnect,
}

/// Somebody who calls, as the records have it at this moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// A name for logs and records.
    pub name: String,
    /// The user, where there is a record of one.
    pub user: Option<CredentialId>,
    /// The tenant that the caller is bound to; `None`: bound to none, sees all.
    pub tenant: Option<TenantName>,
    /// What it may do.
    pub role: Role,
    /// The only hosts that it may touch, where its key is scoped.
    pub hosts: Option<BTreeSet<HostId>>,
    /// How we know.
    pub source: CallerSource,
}

impl Caller {
    /// `<tenant>/<name>`, or the bare name of one who is bound to no tenant.
    pub fn full_name(&self) -> String {
        match &self.tenant {
            Some(tenant) => format!("{tenant}/{}", self.name),
            None => self.name.clone(),
        }
    }

    /// Whether objects of `tenant` exist for this caller.
    pub fn sees_tenant(&self, tenant: &TenantName) -> bool {
        self.tenant.as_ref().is_none_or(|own| own == tenant)
    }

    /// Whether the host exists for this caller. A host of another tenant is *not found*, never
    /// *denied*: its existence is nobody else's business.
    pub fn sees_host(&self, host: HostId, tenant: &TenantName) -> bool {
        self.sees_tenant(tenant) && self.hosts.as_ref().is_none_or(|only| only.contains(&host))
    }

    /// Checks for at least `role`.
    ///
    /// # Errors
    /// [`ErrorCode::PermissionDenied`].
    pub fn require(&self, role: Role) -> Result<()> {
        if self.role >= role {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::PermissionDenied,
            format!(
                "{} has the role {}, and this needs {role}",
                self.full_name(),
                self.role
            ),
        )
        .hint(format!(
            "ask an administrator of the fleet for a token: ghost-core token create --role {role}"
        )))
    }

    /// Checks that the caller may act on Core as a whole: an administrator of no tenant.
    ///
    /// # Errors
    /// [`ErrorCode::PermissionDenied`].
    pub fn require_fleet_admin(&self) -> Result<()> {
        self.require(Role::Admin)?;
        match &self.tenant {
            None => Ok(()),
            Some(tenant) => Err(Error::new(
                ErrorCode::PermissionDenied,
                format!("{} administers the tenant {tenant} only", self.full_name()),
            )
            .because("this concerns all tenants")),
        }
    }
}
