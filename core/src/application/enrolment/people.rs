//! How people get their certificates. Who somebody is, is asked of the records on each call: the
//! certificate only names the user.

use std::sync::Arc;

use ghost_domain::ports::IssuedCertificate;
use ghost_domain::{CredentialId, Error, ErrorCode, Result, Secret};

use super::token::{PERSON_PREFIX, ShownToken};
use crate::application::accounts::shown_name;
use crate::application::fleet::{Fleet, FleetState};
use crate::domain::ports::FleetAuthority;
use crate::domain::{
    Caller, CallerSource, JoinToken, Record, RecordKey, TokenKind, User, UserSource,
};

/// A person's new certificate.
#[derive(Clone, Debug)]
pub struct PersonIdentity {
    /// The certificate.
    pub issued: IssuedCertificate,
    /// The user.
    pub user: User,
}

/// Enrols people and renews their certificates.
pub struct PersonEnrolment {
    fleet: Arc<Fleet>,
    authority: Arc<dyn FleetAuthority>,
}

impl std::fmt::Debug for PersonEnrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PersonEnrolment").finish_non_exhaustive()
    }
}

impl PersonEnrolment {
    /// On the records of a fleet.
    pub fn new(fleet: Arc<Fleet>, authority: Arc<dyn FleetAuthority>) -> Self {
        Self { fleet, authority }
    }

    /// Turns a token and a certificate request into a user. The token is good for one.
    ///
    /// # Errors
    /// `TokenInvalid`, `InvalidArgument` (the token stays good), `TenantNotFound`,
    /// `StoreUnavailable`.
    pub async fn enroll(
        &self,
        token: &Secret,
        request_pem: &str,
        name: &str,
    ) -> Result<PersonIdentity> {
        let shown = ShownToken::parse(token, PERSON_PREFIX)?;
        let name = shown_name(name)?;
        let now = self.fleet.clock().now();
        self.fleet
            .read(|state| of_person(shown.check(state, now)?).map(drop))?;
        let id = CredentialId::random();
        let issued = self.authority.sign_user(request_pem, id, &name).await?;
        let expires_at = issued.expires_at;
        let user = self
            .fleet
            .transact(|state| {
                let token = shown.check(state, now)?;
                let (tenant, role) = of_person(token)?;
                let mut draft = state.draft();
                if let Some(tenant) = tenant {
                    state.require_tenant(tenant)?;
                    draft.unchanged(&RecordKey::Tenant(tenant.clone()));
                }
                let user = User {
                    id,
                    name: name.clone(),
                    tenant: tenant.cloned(),
                    role,
                    source: UserSource::Certificate { expires_at },
                    quota: None,
                    created_at: now,
                    revoked_at: None,
                };
                draft.put(
                    RecordKey::Token(token.id),
                    Record::Token(JoinToken {
                        used_at: Some(now),
                        ..JoinToken::clone(token)
                    }),
                );
                draft.put(RecordKey::User(id), Record::User(user.clone()));
                Ok(draft.done(user))
            })
            .await?;
        tracing::info!(user = %id, role = %user.role, token = %shown.id, "a person joined");
        Ok(PersonIdentity { issued, user })
    }

    /// A new certificate for the caller, who showed one.
    ///
    /// # Errors
    /// `PermissionDenied` for a caller without a certificate, `Unauthenticated` for one that was
    /// revoked meanwhile, `InvalidArgument`, `StoreUnavailable`.
    pub async fn renew(&self, caller: &Caller, request_pem: &str) -> Result<PersonIdentity> {
        let (CallerSource::Certificate, Some(id)) = (&caller.source, caller.user) else {
            return Err(Error::new(
                ErrorCode::PermissionDenied,
                "only a client certificate can be renewed",
            )
            .hint("join with a token: ghostctl context add NAME --endpoint https://… --token …"));
        };
        self.fleet.read(|state| active(state, id).map(drop))?;
        let issued = self
            .authority
            .sign_user(request_pem, id, &caller.name)
            .await?;
        let expires_at = issued.expires_at;
        let user = self
            .fleet
            .transact(|state| {
                let mut user = User::clone(active(state, id)?);
                user.source = UserSource::Certificate { expires_at };
                let mut draft = state.draft();
                draft.put(RecordKey::User(id), Record::User(user.clone()));
                Ok(draft.done(user))
            })
            .await?;
        Ok(PersonIdentity { issued, user })
    }
}

fn of_person(token: &JoinToken) -> Result<(Option<&ghost_domain::TenantName>, ghost_domain::Role)> {
    match &token.kind {
        TokenKind::Operator { tenant, role } => Ok((tenant.as_ref(), *role)),
        TokenKind::Host { .. } => Err(Error::new(
            ErrorCode::TokenInvalid,
            "the token is not accepted",
        )
        .because("it is for a host")),
    }
}

fn active(state: &FleetState, id: CredentialId) -> Result<&Arc<User>> {
    state
        .user(id)
        .filter(|user| user.revoked_at.is_none())
        .ok_or_else(|| {
            Error::new(ErrorCode::Unauthenticated, "this certificate was revoked")
                .hint("ask an administrator of the fleet for a new token")
        })
}
