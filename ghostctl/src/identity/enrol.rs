//! From a token to a context: we speak only to the agent whose CA the token names, make a key
//! here, and let the agent sign a certificate for it.

use ghost_proto::agent::v1::EnrollRequest;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::{Context, Contexts, Credentials, Settings, Token, certificate};
use crate::connect::tls::{Setup, Trust};
use crate::connect::{Agent, Endpoint, Trace, ask};
use crate::errors::{ErrorCode, Failure};

/// Enrols with the agent at `endpoint` and keeps the context.
pub(crate) async fn enrol(
    contexts: &Contexts,
    name: &str,
    endpoint: &Endpoint,
    token: &Token,
    identity: &str,
    trace: &Trace,
) -> Result<Context, Failure> {
    let setup = Setup::new(Trust::Fingerprint(token.authority), None)?;
    let agent = Agent::connect(endpoint, Some(setup), Some(name.to_owned()), trace).await?;
    let key = certificate::new_key()?;
    let issued = agent
        .access()
        .enroll(ask(EnrollRequest {
            token: token.text.clone(),
            request_pem: certificate::request(&key, identity)?,
            name: identity.to_owned(),
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let wrong = |cause: &dyn std::fmt::Display| {
        Failure::new(
            ErrorCode::Unauthenticated,
            "the agent's answer is not the identity that was asked for",
        )
        .because(cause)
    };
    let authority = CertificateDer::from_pem_slice(issued.authority_pem.as_bytes())
        .map_err(|error| wrong(&error))?;
    // The handshake has proved that the peer's CA is the token's; the file that all later
    // handshakes trust must be that very one.
    if !token.authority.matches(&authority) {
        return Err(wrong(&"its CA is not the one that the token names"));
    }
    CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes())
        .map_err(|error| wrong(&error))?;
    contexts.save(
        name,
        Settings {
            endpoint: endpoint.to_string(),
            identity: Some(issued.id),
            role: Some(issued.role),
        },
        Some(&Credentials {
            key: key.serialize_pem(),
            certificate: issued.certificate_pem,
            authority: issued.authority_pem,
        }),
    )
}
