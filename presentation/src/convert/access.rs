//! Identities and credentials.

use std::time::Duration;

use ghost_application::access::IssuedIdentity;
use ghost_domain::{ApiKey, Certificate, JoinToken, Principal, PrincipalSource, Result, Secret};
use ghost_proto::agent::v1 as message;

use super::{length_of, timestamp};

/// Who a principal is, as a message.
pub fn identity(principal: &Principal) -> message::Identity {
    let (source, id) = match &principal.source {
        PrincipalSource::Socket { .. } => ("socket", String::new()),
        PrincipalSource::Certificate { credential } => ("certificate", credential.to_string()),
        PrincipalSource::Key { credential } => ("key", credential.to_string()),
        PrincipalSource::Core { .. } => ("core", String::new()),
        PrincipalSource::Agent => ("agent", String::new()),
    };
    let tenant = match &principal.source {
        PrincipalSource::Core {
            tenant: Some(tenant),
        } => tenant.to_string(),
        PrincipalSource::Core { tenant: None }
        | PrincipalSource::Socket { .. }
        | PrincipalSource::Certificate { .. }
        | PrincipalSource::Key { .. }
        | PrincipalSource::Agent => String::new(),
    };
    message::Identity {
        name: principal.name.clone(),
        role: principal.role.as_str().to_owned(),
        source: source.to_owned(),
        id,
        server: "agent".to_owned(),
        tenant,
        guest_access: Some(principal.guest_access),
    }
}

/// A fresh token, with its secret: this is the one place where it leaves us.
pub fn join_token(text: &Secret, token: &JoinToken) -> message::JoinToken {
    message::JoinToken {
        token: text.expose().to_owned(),
        expires_at: Some(timestamp(token.expires_at)),
        role: token.role.as_str().to_owned(),
        guest_access: Some(token.guest_access),
    }
}

/// A fresh certificate.
pub fn issued(identity: IssuedIdentity) -> message::IssuedCertificate {
    message::IssuedCertificate {
        certificate_pem: identity.issued.certificate_pem,
        authority_pem: identity.issued.authority_pem,
        expires_at: Some(timestamp(identity.issued.expires_at)),
        id: identity.id.to_string(),
        role: identity.role.as_str().to_owned(),
    }
}

/// A client identity.
pub fn certificate(certificate: &Certificate) -> message::Certificate {
    message::Certificate {
        id: certificate.id.to_string(),
        name: certificate.name.clone(),
        role: certificate.role.as_str().to_owned(),
        created_at: Some(timestamp(certificate.created_at)),
        expires_at: Some(timestamp(certificate.expires_at)),
        revoked_at: certificate.revoked_at.map(timestamp),
        guest_access: Some(certificate.guest_access),
    }
}

/// An HTTP key, without its secret.
pub fn api_key(key: &ApiKey) -> message::ApiKey {
    message::ApiKey {
        id: key.id.to_string(),
        name: key.name.clone(),
        role: key.role.as_str().to_owned(),
        created_at: Some(timestamp(key.created_at)),
        expires_at: key.expires_at.map(timestamp),
        revoked_at: key.revoked_at.map(timestamp),
        guest_access: Some(key.guest_access),
    }
}

/// A fresh key, with its secret: this is the one place where it leaves us.
pub fn created_key(secret: &Secret, key: &ApiKey) -> message::CreatedKey {
    message::CreatedKey {
        key: Some(api_key(key)),
        secret: secret.expose().to_owned(),
    }
}

/// How long a key shall be good; none: without end.
///
/// # Errors
/// `InvalidArgument` for a length that is negative or more than a year.
pub fn lifetime(given: Option<&prost_types::Duration>) -> Result<Option<Duration>> {
    given.map(|given| length_of(given, "lifetime")).transpose()
}
