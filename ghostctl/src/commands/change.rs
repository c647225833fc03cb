//! The shape of every change: ask for it, wait for its operation, tell the outcome.

use std::future::Future;

use ghost_proto::agent::v1 as message;
use ghost_proto::view::{Operation, OperationStatus};
use tonic::{Response, Status};
use uuid::Uuid;

use super::settle;
use super::waiting::{CtrlC, finish};
use crate::arguments::Change;
use crate::connect::{Agent, Session};
use crate::errors::{ErrorCode, Exit, Failure};
use crate::text::printable;

/// What an agent answers to a change.
pub(super) type Answer = Result<Response<message::Operation>, Status>;

/// Asks for one change a name, side by side, and waits for them. `done` is the verb in the past.
pub(super) async fn each<F>(
    names: &[String],
    change: &Change,
    done: &str,
    session: &Session,
    ask: impl Fn(Agent, String, String) -> F,
) -> Result<Exit, Failure>
where
    F: Future<Output = Answer>,
{
    if names.len() > 1 && change.request_id.is_some() {
        return Err(Failure::usage("--request-id needs exactly one NAME")
            .because("one key stands for one operation"));
    }
    let agent = session.agent().await?;
    let outcomes = futures::future::join_all(names.iter().map(|name| {
        let request_id = request_id(change);
        let asked = ask(agent.clone(), name.clone(), request_id.clone());
        follow(&agent, change, session, request_id, asked)
    }))
    .await;
    let (operations, exit) = settle(outcomes, session);
    tell(&operations, names.len(), change, done, session)?;
    Ok(exit)
}

/// Asks for one change and waits for it.
pub(super) async fn one<F>(
    change: &Change,
    done: &str,
    session: &Session,
    agent: &Agent,
    ask: impl FnOnce(Agent, String) -> F,
) -> Result<Operation, Failure>
where
    F: Future<Output = Answer>,
{
    let request_id = request_id(change);
    let asked = ask(agent.clone(), request_id.clone());
    let operation = follow(agent, change, session, request_id, asked).await?;
    tell(std::slice::from_ref(&operation), 1, change, done, session)?;
    Ok(operation)
}

/// The caller's key, or one of ours: with it a lost answer can be asked for again.
fn request_id(change: &Change) -> String {
    change
        .request_id
        .clone()
        .unwrap_or_else(|| Uuid::new_v4().to_string())
}

async fn follow(
    agent: &Agent,
    change: &Change,
    session: &Session,
    request_id: String,
    asked: impl Future<Output = Answer>,
) -> Result<Operation, Failure> {
    let mut ctrl_c = CtrlC::listen()?;
    let answered = async {
        asked
            .await
            .map_err(|status| agent.change_failure(&status, &request_id))
    };
    let operation = ctrl_c
        .or(answered, || {
            Failure::new(
                ErrorCode::Interrupted,
                "interrupted before the agent had answered",
            )
            .hint(format!(
                "the same again with --request-id {request_id}: it gives the operation if there is one"
            ))
        })
        .await?;
    if let Some((host, why)) = agent.route().learn(operation.metadata()) {
        session.printer.note(&format!(
            "placed on {}: {}",
            printable(&host),
            printable(&why)
        ));
    }
    let operation = operation.into_inner();
    if change.detach {
        return Ok(operation.into());
    }
    finish(agent, &session.printer, operation, &mut ctrl_c, None).await
}

fn tell(
    operations: &[Operation],
    asked: usize,
    change: &Change,
    done: &str,
    session: &Session,
) -> Result<(), Failure> {
    session.printer.several(
        operations,
        asked,
        |operation| {
            if change.detach {
                &operation.id
            } else {
                &operation.subject
            }
        },
        |operation, _| {
            if change.detach {
                format!("{}\n", printable(&operation.id))
            } else {
                format!("{done} {}\n", printable(&operation.subject))
            }
        },
    )?;
    if change.detach
        && let [operation] = operations
        && operation.status == OperationStatus::Pending
    {
        session.printer.note(&format!(
            "follow it with: {} operation wait {}",
            session.ghostctl(),
            operation.id
        ));
    }
    Ok(())
}
