//! Keys for gRPC and HTTP: `ghost_<id>_<secret>`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::{CredentialId, Error, ErrorCode, Result, Role, Secret, TenantName};

use super::{may_give, secrets, shown_name};
use crate::application::callers::KEY_PREFIX;
use crate::application::fleet::{Fleet, FleetState};
use crate::domain::{Caller, FleetKey, Record, RecordKey};

/// How long a key is good where nobody says.
const USUAL: Duration = Duration::from_secs(90 * 86_400);
/// The longest that one is good.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);
/// Most hosts that a key is bound to.
const MOST_HOSTS: usize = 256;

/// What key to make.
#[derive(Clone, Debug)]
pub struct CreateKeyCommand {
    /// A name for people.
    pub name: String,
    /// The tenant that it is bound to; `None`: to none.
    pub tenant: Option<TenantName>,
    /// What it may do.
    pub role: Role,
    /// How long it is good; `None`: 90 days.
    pub lifetime: Option<Duration>,
    /// The only hosts that it may touch; empty: all.
    pub hosts: Vec<String>,
}

/// Makes, lists and revokes keys.
#[derive(Debug)]
pub struct Keys {
    /// The records.
    pub fleet: Arc<Fleet>,
}

/// Whether a key exists for a caller.
fn seen(caller: &Caller, key: &FleetKey) -> bool {
    match &key.tenant {
        Some(tenant) => caller.sees_tenant(tenant),
        None => caller.tenant.is_none(),
    }
}

fn find<'a>(state: &'a FleetState, caller: &Caller, selector: &str) -> Result<&'a Arc<FleetKey>> {
    let prefix = selector.to_ascii_lowercase();
    let mut found = state
        .keys()
        .filter(|key| seen(caller, key))
        .filter(|key| !prefix.is_empty() && key.id.to_string().starts_with(&prefix));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => Err(Error::new(
            ErrorCode::InvalidArgument,
            "more than one key's id begins so",
        )
        .hint("give more of the id: ghostctl key list")),
        (None, _) => Err(Error::new(
            ErrorCode::CredentialNotFound,
            format!(
                "there is no key {:?}",
                selector.chars().take(100).collect::<String>()
            ),
        )
        .hint("see which there are: ghostctl key list")),
    }
}

impl Keys {
    /// Makes a key and tells its secret, this once.
    ///
    /// # Errors
    /// `PermissionDenied`, `InvalidArgument`, `HostNotFound`, `TenantNotFound`, `StoreUnavailable`.
    pub async fn create(
        &self,
        caller: &Caller,
        command: CreateKeyCommand,
    ) -> Result<(Secret, FleetKey)> {
        may_give(caller, command.role, command.tenant.as_ref())?;
        let name = shown_name(&command.name)?;
        let lifetime = command.lifetime.unwrap_or(USUAL);
        if lifetime.is_zero() || lifetime > LONGEST {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "a key is good for at most a year",
            )
            .field("lifetime", "more than nothing and at most a year"));
        }
        if command.hosts.len() > MOST_HOSTS {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("a key is bound to at most {MOST_HOSTS} hosts"),
            ));
        }
        let secret = secrets::random()?;
        let now = self.fleet.clock().now();
        let id = CredentialId::random();
        let key = self
            .fleet
            .transact(|state| {
                if let Some(tenant) = &command.tenant {
                    super::tenant_of(caller, Some(tenant.clone()))?;
                    state.require_tenant(tenant)?;
                }
                let mut hosts = BTreeSet::new();
                for selector in &command.hosts {
                    let host = state.find_host(caller, selector)?;
                    if command
                        .tenant
                        .as_ref()
                        .is_some_and(|own| *own != host.tenant)
                    {
                        return Err(Error::new(
                            ErrorCode::InvalidArgument,
                            format!("the host {} is not one of the key's tenant", host.name),
                        ));
                    }
                    hosts.insert(host.id);
                }
                let key = FleetKey {
                    id,
                    secret_hash: secrets::hash(secret.expose()),
                    name: name.clone(),
                    tenant: command.tenant.clone(),
                    role: command.role,
                    hosts: Some(hosts).filter(|hosts| !hosts.is_empty()),
                    created_at: now,
                    expires_at: now.after(lifetime),
                    revoked_at: None,
                };
                let mut draft = state.draft();
                draft.put(RecordKey::Key(id), Record::Key(key.clone()));
                Ok(draft.done(key))
            })
            .await?;
        tracing::info!(key = %id, name = %key.name, role = %key.role, principal = caller.full_name(), "key made");
        let text = Secret::new(format!("{KEY_PREFIX}{id}_{}", secret.expose()));
        Ok((text, key))
    }

    /// Those that the caller sees, oldest first, without secrets: those are not kept.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub fn list(&self, caller: &Caller, tenant: Option<&TenantName>) -> Result<Vec<Arc<FleetKey>>> {
        caller.require(Role::Admin)?;
        let mut keys: Vec<Arc<FleetKey>> = self.fleet.read(|state| {
            state
                .keys()
                .filter(|key| seen(caller, key))
                .filter(|key| tenant.is_none() || key.tenant.as_ref() == tenant)
                .cloned()
                .collect()
        });
        keys.sort_by_key(|key| (key.created_at, key.id));
        Ok(keys)
    }

    /// Revokes a key; it counts from the next call on. Revoking twice changes nothing.
    ///
    /// # Errors
    /// `PermissionDenied`, `CredentialNotFound`, `StoreUnavailable`.
    pub async fn revoke(&self, caller: &Caller, selector: &str) -> Result<FleetKey> {
        caller.require(Role::Admin)?;
        let now = self.fleet.clock().now();
        let key = self
            .fleet
            .transact(|state| {
                let mut key = FleetKey::clone(find(state, caller, selector)?);
                let mut draft = state.draft();
                if key.revoked_at.is_none() {
                    key.revoked_at = Some(now);
                    draft.put(RecordKey::Key(key.id), Record::Key(key.clone()));
                }
                Ok(draft.done(key))
            })
            .await?;
        tracing::warn!(key = %key.id, name = %key.name, principal = caller.full_name(), "key revoked");
        Ok(key)
    }
}
