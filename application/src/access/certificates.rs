//! Client certificates: who has one, renewing, revoking.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Change;
use ghost_domain::{
    Certificate, CredentialId, Error, ErrorCode, Principal, PrincipalSource, Result, Role,
};

use super::secrets;
use super::tokens::IssuedIdentity;
use crate::application::Ports;
use crate::fleet::check_own;
use crate::registry::{Decision, Registry};

/// A certificate that ended this long ago, unrenewed, is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);

/// Turns the identity in a verified client certificate into a principal.
pub struct AuthenticateCertificate {
    pub(crate) registry: Arc<Registry>,
}

impl AuthenticateCertificate {
    /// `id` comes from a certificate that TLS has verified against our CA.
    ///
    /// # Errors
    /// `Unauthenticated` for an identity that is unknown or revoked.
    pub async fn execute(&self, id: CredentialId) -> Result<Principal> {
        let found = self
            .registry
            .read(|model| model.certificates.get(&id).cloned());
        match found {
            Some(certificate) if certificate.revoked_at.is_none() => Ok(Principal {
                name: certificate.name,
                role: certificate.role,
                source: PrincipalSource::Certificate { credential: id },
                guest_access: certificate.guest_access,
            }),
            Some(_) => Err(
                Error::new(ErrorCode::Unauthenticated, "this certificate was revoked")
                    .hint("ask the host's owner for a token: ghostctl trust token --role ROLE"),
            ),
            None => Err(Error::new(
                ErrorCode::Unauthenticated,
                "this certificate's identity is not known to the agent",
            )
            .because("the agent's state was made anew, or the identity was removed")
            .hint("join again: ghostctl context add NAME --endpoint https://… --token …")),
        }
    }
}

/// Lists client identities.
pub struct ListCertificates {
    pub(crate) registry: Arc<Registry>,
}

impl ListCertificates {
    /// All that are known, oldest first.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub async fn execute(&self, principal: &Principal) -> Result<Vec<Certificate>> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        let mut certificates: Vec<Certificate> = self
            .registry
            .read(|model| model.certificates.values().cloned().collect());
        certificates.sort_by_key(|certificate| certificate.created_at);
        Ok(certificates)
    }
}

/// Revokes a client identity; it counts from the next request on.
pub struct RevokeCertificate {
    pub(crate) registry: Arc<Registry>,
}

impl RevokeCertificate {
    /// By id or unique prefix; revoking twice changes nothing. The state is exported at once, so
    /// that a rebuilt store knows of it too.
    ///
    /// # Errors
    /// `CredentialNotFound`, `StoreUnavailable`.
    pub async fn execute(&self, principal: &Principal, selector: &str) -> Result<Certificate> {
        check_own(principal)?;
        principal.require(Role::Admin)?;
        let selector = selector.to_owned();
        let now = self.registry.clock().now();
        let revoked = self
            .registry
            .transact(move |model| {
                let found = secrets::find(
                    &model.certificates,
                    &selector,
                    "certificate",
                    "ghostctl trust list",
                )?;
                let mut certificate = found.clone();
                certificate.revoked_at.get_or_insert(now);
                let mut changes = vec![Change::PutCertificate(certificate.clone())];
                changes.extend(
                    model
                        .certificates
                        .values()
                        .filter(|old| {
                            old.id != certificate.id && now.since(old.expires_at) > FORGOTTEN_AFTER
                        })
                        .map(|old| Change::DeleteCertificate(old.id)),
                );
                Ok(Decision::of(certificate, changes))
            })
            .await?;
        self.registry.export_withdrawal().await;
        tracing::warn!(certificate = %revoked.id, name = %revoked.name, principal = %principal.name, "certificate revoked");
        Ok(revoked)
    }
}

/// Renews the caller's certificate.
pub struct Renew {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl Renew {
    /// A new certificate for the identity that calls, on a new key if the request has one.
    ///
    /// # Errors
    /// `PermissionDenied` for callers without a certificate, `InvalidArgument` for a malformed
    /// request, `StoreUnavailable`.
    pub async fn execute(
        &self,
        principal: &Principal,
        request_pem: &str,
    ) -> Result<IssuedIdentity> {
        let PrincipalSource::Certificate { credential } = principal.source else {
            return Err(Error::new(
                ErrorCode::PermissionDenied,
                "only a client certificate can be renewed",
            )
            .hint("join with a token: ghostctl context add NAME --endpoint https://… --token …"));
        };
        let issued = self
            .ports
            .authority
            .sign_client(request_pem, credential, &principal.name, principal.role)
            .await?;
        let expires_at = issued.expires_at;
        self.registry
            .transact(move |model| {
                let mut certificate = model
                    .certificates
                    .get(&credential)
                    .filter(|certificate| certificate.revoked_at.is_none())
                    .cloned()
                    .ok_or_else(|| {
                        Error::new(ErrorCode::Unauthenticated, "this certificate was revoked")
                    })?;
                certificate.expires_at = expires_at;
                Ok(Decision::of((), vec![Change::PutCertificate(certificate)]))
            })
            .await?;
        Ok(IssuedIdentity {
            issued,
            id: credential,
            role: principal.role,
        })
    }
}
