//! Tenants.

use std::sync::Arc;

use ghost_domain::{Error, ErrorCode, Result, Role, TenantName};

use crate::application::fleet::Fleet;
use crate::application::quota_check::Admission;
use crate::domain::{Caller, Quota, Record, RecordKey, Tenant, Usage};

/// A tenant and what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantView {
    /// Its record.
    pub tenant: Tenant,
    /// What its VMs use.
    pub used: Usage,
    /// How many hosts it has.
    pub hosts: usize,
}

/// Makes, lists, changes and deletes tenants.
#[derive(Debug)]
pub struct Tenants {
    /// The records.
    pub fleet: Arc<Fleet>,
    /// What is used.
    pub admission: Arc<Admission>,
}

impl Tenants {
    fn view(&self, tenant: Tenant) -> TenantView {
        let used = self.admission.used_by_tenant(&tenant.name);
        let hosts = self.fleet.read(|state| {
            let own = |host: &&Arc<crate::domain::HostRecord>| host.tenant == tenant.name;
            state.hosts().filter(own).count()
        });
        TenantView {
            tenant,
            used,
            hosts,
        }
    }

    /// Makes one.
    ///
    /// # Errors
    /// `PermissionDenied`, `TenantExists`, `StoreUnavailable`.
    pub async fn create(
        &self,
        caller: &Caller,
        name: TenantName,
        quota: Quota,
        user_quota: Quota,
    ) -> Result<TenantView> {
        caller.require_fleet_admin()?;
        let tenant = Tenant {
            name,
            quota,
            user_quota,
            created_at: self.fleet.clock().now(),
        };
        self.fleet
            .transact(|state| {
                if state.tenant(&tenant.name).is_some() {
                    return Err(Error::new(
                        ErrorCode::TenantExists,
                        format!("there is a tenant {} already", tenant.name),
                    ));
                }
                let mut draft = state.draft();
                draft.put(
                    RecordKey::Tenant(tenant.name.clone()),
                    Record::Tenant(tenant.clone()),
                );
                Ok(draft.done(()))
            })
            .await?;
        Ok(self.view(tenant))
    }

    /// Those that the caller sees, by name.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub fn list(&self, caller: &Caller) -> Result<Vec<TenantView>> {
        caller.require(Role::Viewer)?;
        let seen: Vec<Tenant> = self.fleet.read(|state| {
            let seen = |tenant: &&Tenant| caller.sees_tenant(&tenant.name);
            state.tenants().filter(seen).cloned().collect()
        });
        Ok(seen.into_iter().map(|tenant| self.view(tenant)).collect())
    }

    /// Changes quotas; `None`: stays.
    ///
    /// # Errors
    /// `PermissionDenied`, `TenantNotFound`, `StoreUnavailable`.
    pub async fn update(
        &self,
        caller: &Caller,
        name: &TenantName,
        quota: Option<Quota>,
        user_quota: Option<Quota>,
    ) -> Result<TenantView> {
        caller.require_fleet_admin()?;
        let changed = self
            .fleet
            .transact(|state| {
                let mut tenant = state.require_tenant(name)?.clone();
                tenant.quota = quota.unwrap_or(tenant.quota);
                tenant.user_quota = user_quota.unwrap_or(tenant.user_quota);
                let mut draft = state.draft();
                draft.put(
                    RecordKey::Tenant(name.clone()),
                    Record::Tenant(tenant.clone()),
                );
                Ok(draft.done(tenant))
            })
            .await?;
        Ok(self.view(changed))
    }

    /// Deletes one that has no hosts and no people. Its keys and tokens go with it.
    ///
    /// # Errors
    /// `PermissionDenied`, `TenantNotFound`, `TenantInUse`, `StoreUnavailable`.
    pub async fn delete(&self, caller: &Caller, name: &TenantName) -> Result<()> {
        caller.require_fleet_admin()?;
        if name.as_str() == TenantName::DEFAULT {
            return Err(Error::new(
                ErrorCode::TenantInUse,
                "the tenant default is whoever's who names none",
            ));
        }
        self.fleet
            .transact(|state| {
                state.require_tenant(name)?;
                let hosts = state.hosts().filter(|host| host.tenant == *name).count();
                let users = state
                    .users()
                    .filter(|user| user.tenant.as_ref() == Some(name))
                    .filter(|user| user.revoked_at.is_none())
                    .count();
                if hosts + users > 0 {
                    return Err(Error::new(
                        ErrorCode::TenantInUse,
                        format!("the tenant {name} is in use"),
                    )
                    .because(format!("it has {hosts} hosts and {users} users"))
                    .hint("remove its hosts and revoke its users first"));
                }
                let mut draft = state.draft();
                draft.delete(RecordKey::Tenant(name.clone()));
                if !state.room(name).is_empty() {
                    draft.delete(RecordKey::Room(name.clone()));
                }
                for key in state.keys().filter(|key| key.tenant.as_ref() == Some(name)) {
                    draft.delete(RecordKey::Key(key.id));
                }
                for user in state
                    .users()
                    .filter(|user| user.tenant.as_ref() == Some(name))
                {
                    draft.delete(RecordKey::User(user.id));
                }
                for token in state
                    .tokens()
                    .filter(|token| token.kind.tenant() == Some(name))
                {
                    draft.delete(RecordKey::Token(token.id));
                }
                Ok(draft.done(()))
            })
            .await
    }
}
