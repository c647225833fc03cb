//! Join tokens: made on the host, used once, ten minutes long.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::{Change, IssuedCertificate};
use ghost_domain::{
    Certificate, CredentialId, Error, ErrorCode, JoinToken, Principal, Result, Role, Secret,
    Timestamp,
};

use super::secrets;
use crate::application::Ports;
use crate::fleet::check_own;
use crate::registry::{Decision, Registry};

/// How long a token can be used.
const LIFETIME: Duration = Duration::from_secs(600);
const PREFIX: &str = "ghost-join-v1";

/// Makes a join token.
pub struct CreateToken {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl CreateToken {
    /// The token as one string, `ghost-join-v1.<id>.<secret>.<CA fingerprint>`, and its record.
    ///
    /// # Errors
    /// `PermissionDenied`, `StoreUnavailable`.
    pub async fn execute(
        &self,
        principal: &Principal,
        role: Role,
        guest_access: bool,
    ) -> Result<(Secret, JoinToken)> {
        check_own(principal)?;
        principal.require_issuing(guest_access)?;
        let secret = secrets::random()?;
        let now = self.registry.clock().now();
        let token = JoinToken {
            id: CredentialId::random(),
            secret_hash: secrets::hash(secret.expose()),
            role,
            guest_access,
            created_at: now,
            expires_at: now.after(LIFETIME),
        };
        let text = Secret::new(format!(
            "{PREFIX}.{}.{}.{}",
            token.id,
            secret.expose(),
            self.ports.authority.fingerprint()
        ));
        let record = token.clone();
        self.registry
            .transact(move |model| {
                // Tokens that nobody used in time go now.
                let mut changes: Vec<Change> = model
                    .join_tokens
                    .values()
                    .filter(|token| token.expires_at <= now)
                    .map(|token| Change::DeleteJoinToken(token.id))
                    .collect();
                changes.push(Change::PutJoinToken(record));
                Ok(Decision::of((), changes))
            })
            .await?;
        tracing::info!(token = %token.id, %role, guest_access, principal = %principal.name, "join token made");
        Ok((text, token))
    }
}

/// A token and a certificate request.
#[derive(Clone, Debug)]
pub struct EnrollCommand {
    /// The token.
    pub token: Secret,
    /// PKCS #10, PEM.
    pub request_pem: String,
    /// A name for the holder.
    pub name: String,
}

/// A certificate and whose it is.
#[derive(Clone, Debug)]
pub struct IssuedIdentity {
    /// The certificate.
    pub issued: IssuedCertificate,
    /// The identity's id.
    pub id: CredentialId,
    /// Its role.
    pub role: Role,
}

/// Turns a token into a certificate. The only use case that needs no principal.
pub struct Enroll {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

fn refused(cause: &str) -> Error {
    Error::new(ErrorCode::TokenInvalid, "the token is not accepted")
        .because(cause)
        .hint("make a new one on the host: ghostctl trust token --role ROLE")
}

/// What its certificate will be: the role, and whether it enters guests.
fn check(token: Option<&JoinToken>, secret: &str, now: Timestamp) -> Result<(Role, bool)> {
    let token = token.ok_or_else(|| refused("it is unknown, or has been used"))?;
    if !secrets::equal(&token.secret_hash, &secrets::hash(secret)) {
        return Err(refused("it is unknown, or has been used"));
    }
    if token.expires_at <= now {
        return Err(refused(
            "it has expired; a token can be used for ten minutes",
        ));
    }
    Ok((token.role, token.guest_access))
}

impl Enroll {
    /// Signs the request and uses the token up; of two callers with one token exactly one wins.
    ///
    /// # Errors
    /// `TokenInvalid`, `InvalidArgument` for a malformed request (the token stays good),
    /// `StoreUnavailable`.
    pub async fn execute(&self, command: EnrollCommand) -> Result<IssuedIdentity> {
        let name = secrets::holder_name(&command.name)?;
        let mut parts = command.token.expose().split('.');
        let (Some(PREFIX), Some(id), Some(secret)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(refused("it does not look like a token"));
        };
        let id: CredentialId = id
            .parse()
            .map_err(|_| refused("it does not look like a token"))?;
        let now = self.registry.clock().now();
        // Checked before the CA works for the caller, and again when the token is used up.
        let (role, guest_access) = self
            .registry
            .read(|model| check(model.join_tokens.get(&id), secret, now))?;
        let credential = CredentialId::random();
        let issued = self
            .ports
            .authority
            .sign_client(&command.request_pem, credential, &name, role)
            .await?;
        let secret = Secret::new(secret);
        let certificate = Certificate {
            id: credential,
            name,
            role,
            guest_access,
            created_at: now,
            expires_at: issued.expires_at,
            revoked_at: None,
        };
        self.registry
            .transact(move |model| {
                check(model.join_tokens.get(&id), secret.expose(), now)?;
                Ok(Decision::of(
                    (),
                    vec![
                        Change::DeleteJoinToken(id),
                        Change::PutCertificate(certificate),
                    ],
                ))
            })
            .await?;
        // A token that is used up must not come back either.
        self.registry.export_withdrawal().await;
        tracing::info!(token = %id, certificate = %credential, %role, guest_access, "join token used");
        Ok(IssuedIdentity {
            issued,
            id: credential,
            role,
        })
    }
}
