//! `key create|list|revoke`.

use ghost_proto::agent::v1::{CreateKeyRequest, ListKeysRequest, RevokeKeyRequest};
use ghost_proto::view::{ApiKey, CreatedKey};

use super::{describe, each, wire};
use crate::arguments::{KeyCommand, KeyCreate};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::{printable, time_until};

pub(super) async fn run(command: KeyCommand, session: &Session) -> Result<Exit, Failure> {
    match command {
        KeyCommand::Create(args) => create(args, session).await,
        KeyCommand::List => list(session).await,
        KeyCommand::Revoke { ids } => revoke(ids, session).await,
    }
}

async fn create(args: KeyCreate, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let created: CreatedKey = agent
        .access()
        .create_key(ask(CreateKeyRequest {
            name: args.name,
            role: args.role.as_str().to_owned(),
            lifetime: args.lifetime.map(wire),
            guest_access: args.no_guest_access.then_some(false),
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .into();
    session.printer.several(
        std::slice::from_ref(&created),
        1,
        |created| &created.secret,
        |created, _| format!("{}\n", printable(&created.secret)),
    )?;
    session.printer.note(&format!(
        "this is shown once; the key {} has the role {}{} and ends {}",
        printable(&created.key.id),
        printable(&created.key.role),
        describe::without_guests(created.key.guest_access),
        time_until(created.key.expires_at.as_deref())
    ));
    Ok(Exit::Done)
}

async fn list(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let keys: Vec<ApiKey> = agent
        .access()
        .list_keys(ask(ListKeysRequest {}))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .keys
        .into_iter()
        .map(ApiKey::from)
        .collect();
    session
        .printer
        .list(&keys, |key| &key.id, describe::key_table)?;
    if keys.is_empty() {
        session
            .printer
            .note("there are no keys; make one with: ghostctl key create NAME --role viewer");
    }
    Ok(Exit::Done)
}

async fn revoke(ids: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (revoked, exit) = each(&ids, session, |id| async {
        agent
            .access()
            .revoke_key(ask(RevokeKeyRequest { id }))
            .await
            .map(|answer| ApiKey::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session.printer.several(
        &revoked,
        ids.len(),
        |key| &key.id,
        |key, _| {
            format!(
                "Revoked {} ({})\n",
                printable(&key.id),
                printable(&key.name)
            )
        },
    )?;
    Ok(exit)
}
