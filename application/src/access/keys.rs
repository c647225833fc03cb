//! Keys for the HTTP API, `ghost_<id>_<secret>`.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Change;
use ghost_domain::{
    ApiKey, CredentialId, Error, ErrorCode, Principal, PrincipalSource, Result, Role, Secret,
};

use super::secrets;
use crate::fleet::check_own;
use crate::registry::{Decision, Registry};

/// What key to make.
#[derive(Clone, Debug)]
pub struct CreateKeyCommand {
    /// A name for people.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Whether its holder may enter guests, where the role is enough.
    pub guest_access: bool,
    /// How long it is good; `None` for a key without end.
    pub lifetime: Option<Duration>,
}

/// Makes a key.
pub struct CreateKey {
    pub(crate) registry: Arc<Registry>,
}

impl CreateKey {
    /// The key as one string, told this once, and its record.
    ///
    /// # Errors
    /// `PermissionDenied`, `InvalidArgument`, `StoreUnavailable`.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: CreateKeyCommand,
    ) -> Result<(Secret, ApiKey)> {
        check_own(principal)?;
        principal.require_issuing(command.guest_access)?;
        let name = secrets::holder_name(&command.name)?;
        let secret = secrets::random()?;
        let now = self.registry.clock().now();
        let key = ApiKey {
            id: CredentialId::random(),
            name,
            role: command.role,
            guest_access: command.guest_access,
            secret_hash: secrets::hash(secret.expose()),
            created_at: now,
            expires_at: command.lifetime.map(|lifetime| now.after(lifetime)),
            revoked_at: None,
        };
        let record = key.clone();
        self.registry
            .transact(move |_| Ok(Decision::of((), vec![Change::PutApiKey(record)])))
            .await?;
        tracing::info!(key = %key.id, name = %key.name, role = %key.role, guest_access = key.guest_access, principal = %principal.name, "key made");
        Ok((
            Secret::new(format!("ghost_{}_{}", key.id, secret.expose())),
            key,
        ))
    }
}

/// Lists keys.
pub struct ListKeys {
    pub(crate) registry: Arc<Registry>,
}

impl ListKeys {
    /// All keys, oldest first, without secrets: those are not kept.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(&self, principal: &Principal) -> Result<Vec<ApiKey>> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        let mut keys: Vec<ApiKey> = self
            .registry
            .read(|model| model.api_keys.values().cloned().collect());
        keys.sort_by_key(|key| key.created_at);
        Ok(keys)
    }
}

/// Revokes a key; it counts from the next request on.
pub struct RevokeKey {
    pub(crate) registry: Arc<Registry>,
}

impl RevokeKey {
    /// By id or unique prefix; revoking twice changes nothing. The state is exported at once, so
    /// that a rebuilt store knows of it too.
    ///
    /// # Errors
    /// `CredentialNotFound`, `StoreUnavailable`.
    pub async fn execute(&self, principal: &Principal, selector: &str) -> Result<ApiKey> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        let selector = selector.to_owned();
        let now = self.registry.clock().now();
        let revoked = self
            .registry
            .transact(move |model| {
                let mut key =
                    secrets::find(&model.api_keys, &selector, "key", "ghostctl key list")?.clone();
                key.revoked_at.get_or_insert(now);
                Ok(Decision::of(key.clone(), vec![Change::PutApiKey(key)]))
            })
            .await?;
        self.registry.export_withdrawal().await;
        tracing::warn!(key = %revoked.id, name = %revoked.name, principal = %principal.name, "key revoked");
        Ok(revoked)
    }
}

/// Turns a key into a principal.
pub struct AuthenticateKey {
    pub(crate) registry: Arc<Registry>,
}

impl AuthenticateKey {
    /// Checks a key.
    ///
    /// # Errors
    /// `Unauthenticated`, with one message for all reasons, so that nothing can be probed.
    pub async fn execute(&self, key: &Secret) -> Result<Principal> {
        let refused = || {
            Error::new(ErrorCode::Unauthenticated, "the key is not accepted")
                .because("it is wrong, expired or revoked")
                .hint("make one on the host: ghostctl key create NAME --role ROLE")
        };
        let mut parts = key.expose().splitn(3, '_');
        let (Some("ghost"), Some(id), Some(secret)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(refused());
        };
        let id: CredentialId = id.parse().map_err(|_| refused())?;
        let now = self.registry.clock().now();
        let found = self
            .registry
            .read(|model| model.api_keys.get(&id).cloned())
            .ok_or_else(refused)?;
        let good = secrets::equal(&found.secret_hash, &secrets::hash(secret))
            && found.revoked_at.is_none()
            && found.expires_at.is_none_or(|end| end > now);
        if !good {
            return Err(refused());
        }
        Ok(Principal {
            name: found.name,
            role: found.role,
            source: PrincipalSource::Key { credential: id },
            guest_access: found.guest_access,
        })
    }
}
