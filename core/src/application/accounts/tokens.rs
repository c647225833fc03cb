//! Tokens by which hosts and people join, each once.
//!
//! - for a host: `ghost-host-v1.<base64url(addresses, comma separated)>.<id>.<secret>.<fingerprint>`
//! - for a person: `ghost-join-v1.<id>.<secret>.<fingerprint>`, as a host's own agent gives them out
//!
//! The fingerprint is that of Core's CA: whoever joins speaks to nobody else.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ghost_domain::{CredentialId, Error, ErrorCode, Result, Role, Secret, TenantName};

use super::{may_give, secrets};
use crate::application::fleet::Fleet;
use crate::domain::ports::FleetAuthority;
use crate::domain::{Caller, JoinToken, Labels, Record, RecordKey, TokenKind, check_label};

/// How long a token can be used where nobody says.
const USUAL: Duration = Duration::from_secs(600);
/// The longest that one can.
const LONGEST: Duration = Duration::from_secs(3600);
/// Tokens that can be used at once, for each tenant: more is a mistake in a loop.
const MOST_OPEN: usize = 1000;
/// Records that are removed in one change.
const SWEPT_AT_ONCE: usize = 100;

/// Who joins with a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhoJoins {
    /// A host, with these labels to begin with.
    Host(Labels),
    /// A person with this role.
    Person(Role),
}

/// What token to make.
#[derive(Clone, Debug)]
pub struct CreateTokenCommand {
    /// Of which tenant; `None`: a person of no tenant.
    pub tenant: Option<TenantName>,
    /// For whom.
    pub who: WhoJoins,
    /// How long it can be used; `None`: ten minutes.
    pub lifetime: Option<Duration>,
}

/// A fresh token.
#[derive(Clone, Debug)]
pub struct CreatedToken {
    /// All of it as one string, told this once.
    pub text: Secret,
    /// Its record.
    pub token: JoinToken,
    /// The command that uses it.
    pub hint: String,
}

/// Makes tokens.
pub struct Tokens {
    /// The records.
    pub fleet: Arc<Fleet>,
    /// Whose fingerprint goes into each.
    pub authority: Arc<dyn FleetAuthority>,
    /// Where hosts and people reach this Core, `host:port`.
    pub addresses: Vec<String>,
}

impl Tokens {
    /// Makes a token.
    ///
    /// # Errors
    /// `PermissionDenied`, `InvalidArgument`, `TenantNotFound`, `TooManyRequests`,
    /// `StoreUnavailable`.
    pub async fn create(
        &self,
        caller: &Caller,
        command: CreateTokenCommand,
    ) -> Result<CreatedToken> {
        let lifetime = command.lifetime.unwrap_or(USUAL);
        if lifetime.is_zero() || lifetime > LONGEST {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "a token can be used for at most an hour",
            )
            .field("lifetime", "more than nothing and at most 1h"));
        }
        let kind = match command.who {
            WhoJoins::Person(role) => {
                may_give(caller, role, command.tenant.as_ref())?;
                if command.tenant.is_none() && role != Role::Admin {
                    return Err(Error::new(
                        ErrorCode::InvalidArgument,
                        "whoever is of no tenant is an administrator",
                    )
                    .field("role", "admin, or name a tenant"));
                }
                TokenKind::Operator {
                    tenant: command.tenant.clone(),
                    role,
                }
            }
            WhoJoins::Host(labels) => {
                caller.require(Role::Admin)?;
                for (key, value) in &labels {
                    check_label(key, value)?;
                }
                if labels.len() > crate::application::hosts::MOST_LABELS {
                    return Err(Error::new(
                        ErrorCode::InvalidArgument,
                        "a host has at most 64 labels",
                    ));
                }
                let tenant = command.tenant.clone().ok_or_else(|| {
                    Error::new(ErrorCode::InvalidArgument, "a host belongs to a tenant")
                        .field("tenant", "the name of one; * is for administrators only")
                })?;
                TokenKind::Host { tenant, labels }
            }
        };
        let secret = secrets::random()?;
        let now = self.fleet.clock().now();
        let token = JoinToken {
            id: CredentialId::random(),
            secret_hash: secrets::hash(secret.expose()),
            kind,
            created_by: caller.full_name(),
            created_at: now,
            expires_at: now.after(lifetime),
            used_at: None,
        };
        self.fleet
            .transact(|state| {
                if let Some(tenant) = token.kind.tenant() {
                    super::tenant_of(caller, Some(tenant.clone()))?;
                    state.require_tenant(tenant)?;
                }
                let open = state
                    .tokens()
                    .filter(|one| one.kind.tenant() == token.kind.tenant())
                    .filter(|one| one.used_at.is_none() && one.expires_at > now)
                    .count();
                if open >= MOST_OPEN {
                    return Err(Error::new(
                        ErrorCode::TooManyRequests,
                        format!("{open} tokens wait to be used"),
                    )
                    .hint("wait until some of them end"));
                }
                let mut draft = state.draft();
                if let Some(tenant) = token.kind.tenant() {
                    // Against its removal in the same moment.
                    draft.unchanged(&RecordKey::Tenant(tenant.clone()));
                }
                // Those that have ended tell nobody anything any more.
                let ended = state.tokens().filter(|one| one.expires_at <= now);
                for one in ended.take(SWEPT_AT_ONCE) {
                    draft.delete(RecordKey::Token(one.id));
                }
                draft.put(RecordKey::Token(token.id), Record::Token(token.clone()));
                Ok(draft.done(()))
            })
            .await?;
        let (id, fingerprint) = (token.id, self.authority.fingerprint());
        let secret = secret.expose();
        let (text, hint) = match &token.kind {
            TokenKind::Host { .. } => {
                let addresses = URL_SAFE_NO_PAD.encode(self.addresses.join(","));
                (
                    format!("ghost-host-v1.{addresses}.{id}.{secret}.{fingerprint}"),
                    "on the host: ghost-agent enroll --token …".to_owned(),
                )
            }
            TokenKind::Operator { .. } => {
                let address = self.addresses.first().map_or("CORE:7443", String::as_str);
                (
                    format!("ghost-join-v1.{id}.{secret}.{fingerprint}"),
                    format!("ghostctl context add fleet --endpoint https://{address} --token …"),
                )
            }
        };
        tracing::info!(token = %id, principal = caller.full_name(), "token made");
        Ok(CreatedToken {
            text: Secret::new(text),
            token,
            hint,
        })
    }
}
