//! A certificate lives a day; whoever uses a context after half of it gets a new one on the way.
//!
//! The key stays: then the certificate is the only file that changes, one rename swaps it, and two
//! ghostctl that renew at the same moment cannot leave a key beside another key's certificate. A
//! new key comes with `context add --replace`.

use ghost_proto::agent::v1::RenewRequest;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::{Context, certificate};
use crate::connect::{Agent, ask};
use crate::errors::{ErrorCode, Failure};

/// Renews the certificate of a context where more than half of its life is gone.
pub(crate) async fn if_due(context: &Context, agent: &Agent) -> Result<(), Failure> {
    let due = context
        .validity()
        .is_some_and(certificate::Validity::is_half_gone);
    if !due {
        return Ok(());
    }
    let key = certificate::read_key(&context.key_pem()?)?;
    let issued = agent
        .access()
        .renew(ask(RenewRequest {
            request_pem: certificate::request(&key, &context.name)?,
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner();
    let leaf = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes())
        .map_err(|error| not_usable(&error))?;
    let validity = certificate::validity(&leaf).map_err(|error| not_usable(&error))?;
    if validity.has_ended() {
        return Err(not_usable(&"it has already expired"));
    }
    context.replace_certificate(&issued.certificate_pem)
}

fn not_usable(cause: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        ErrorCode::Unauthenticated,
        "the agent sent a certificate that is of no use",
    )
    .because(cause)
}
