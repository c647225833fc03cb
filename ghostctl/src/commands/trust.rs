//! `trust token|list|revoke`.

use ghost_proto::agent::v1::{
    CreateTokenRequest, ListCertificatesRequest, RevokeCertificateRequest,
};
use ghost_proto::core::v1::GetCoreStatusRequest;
use ghost_proto::view::{Certificate, JoinToken};

use super::{describe, each};
use crate::arguments::{Role, TrustCommand};
use crate::connect::{Agent, Endpoint, Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::{printable, time_until};

pub(super) async fn run(command: TrustCommand, session: &Session) -> Result<Exit, Failure> {
    match command {
        TrustCommand::Token {
            role,
            no_guest_access,
        } => token(role, no_guest_access, session).await,
        TrustCommand::List => list(session).await,
        TrustCommand::Revoke { ids } => revoke(ids, session).await,
    }
}

async fn token(role: Role, no_guest_access: bool, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let token: JoinToken = agent
        .access()
        .create_token(ask(CreateTokenRequest {
            role: role.as_str().to_owned(),
            guest_access: no_guest_access.then_some(false),
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .into();
    session.printer.several(
        std::slice::from_ref(&token),
        1,
        |token| &token.token,
        |token, _| format!("{}\n", printable(&token.token)),
    )?;
    session.printer.note(&format!(
        "good for one {}{} and ends {}; on the other machine:\n  ghostctl context add NAME --endpoint {} --token TOKEN",
        printable(&token.role),
        describe::without_guests(token.guest_access),
        time_until(token.expires_at.as_deref()),
        endpoint_elsewhere(&agent).await
    ));
    Ok(Exit::Done)
}

/// How another machine reaches who made the token: as this one did, or at the usual port of it.
async fn endpoint_elsewhere(agent: &Agent) -> String {
    if let endpoint @ Endpoint::Tls { .. } = agent.endpoint() {
        return endpoint.to_string();
    }
    let core = agent.fleet().get_status(ask(GetCoreStatusRequest {})).await;
    let port = if core.is_ok() { 7443 } else { 9090 };
    format!("https://THIS-HOST:{port}")
}

async fn list(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let certificates: Vec<Certificate> = agent
        .access()
        .list_certificates(ask(ListCertificatesRequest {}))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .certificates
        .into_iter()
        .map(Certificate::from)
        .collect();
    session.printer.list(
        &certificates,
        |certificate| &certificate.id,
        describe::certificate_table,
    )?;
    if certificates.is_empty() {
        session
            .printer
            .note("nobody has a certificate; the first step: ghostctl trust token --role operator");
    }
    Ok(Exit::Done)
}

async fn revoke(ids: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (revoked, exit) = each(&ids, session, |id| async {
        agent
            .access()
            .revoke_certificate(ask(RevokeCertificateRequest { id }))
            .await
            .map(|answer| Certificate::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session.printer.several(
        &revoked,
        ids.len(),
        |certificate| &certificate.id,
        |certificate, _| {
            format!(
                "Revoked {} of {}\n",
                printable(&certificate.id),
                printable(&certificate.name)
            )
        },
    )?;
    Ok(exit)
}
