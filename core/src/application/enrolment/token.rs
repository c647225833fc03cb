//! A token as somebody shows it.

use std::sync::Arc;

use ghost_domain::{CredentialId, Error, ErrorCode, Result, Secret, Timestamp};

use crate::application::accounts::secrets;
use crate::application::fleet::FleetState;
use crate::domain::JoinToken;

pub(super) const HOST_PREFIX: &str = "ghost-host-v1";
pub(super) const PERSON_PREFIX: &str = "ghost-join-v1";

/// A token as somebody shows it.
pub(super) struct ShownToken {
    pub(super) id: CredentialId,
    secret_hash: [u8; 32],
}

fn refused(cause: &str) -> Error {
    Error::new(ErrorCode::TokenInvalid, "the token is not accepted")
        .because(cause)
        .hint("ask an administrator of the fleet for a new one: ghost-core token create")
}

impl ShownToken {
    /// Reads a token for hosts (`HOST_PREFIX`) or people.
    pub(super) fn parse(text: &Secret, prefix: &str) -> Result<Self> {
        let mut parts = text.expose().trim().split('.');
        let first = parts.next();
        if first != Some(prefix) {
            return Err(refused(match (first, prefix) {
                (Some(PERSON_PREFIX), HOST_PREFIX) => "it is for a person, and a host showed it",
                (Some(HOST_PREFIX), PERSON_PREFIX) => "it is for a host, and a person showed it",
                _ => "it does not look like a token",
            }));
        }
        if prefix == HOST_PREFIX {
            parts.next();
        }
        let odd = || refused("it does not look like a token");
        let id = parts.next().and_then(|id| id.parse().ok());
        let (Some(id), Some(secret)) = (id, parts.next()) else {
            return Err(odd());
        };
        Ok(Self {
            id,
            secret_hash: secrets::hash(secret),
        })
    }

    /// The record, where the token can be used now.
    pub(super) fn check<'a>(
        &self,
        state: &'a FleetState,
        now: Timestamp,
    ) -> Result<&'a Arc<JoinToken>> {
        let token = state
            .token(self.id)
            .filter(|token| secrets::equal(&token.secret_hash, &self.secret_hash))
            .ok_or_else(|| refused("it is unknown, or ended some time ago"))?;
        if token.used_at.is_some() {
            return Err(refused("it has been used; each token lets one in"));
        }
        if token.expires_at <= now {
            return Err(refused("its time is over"));
        }
        Ok(token)
    }
}
