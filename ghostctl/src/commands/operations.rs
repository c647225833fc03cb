//! `operation list|show|wait|cancel`.

use ghost_proto::agent::v1::{CancelOperationRequest, GetOperationRequest, ListOperationsRequest};
use ghost_proto::view::Operation;

use super::waiting::{CtrlC, finish};
use super::{describe, each};
use crate::arguments::{OperationList, OperationWait};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::text::printable;

pub(super) async fn list(args: OperationList, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let operations: Vec<Operation> = agent
        .operations()
        .list(ask(ListOperationsRequest {
            vm: args.vm.unwrap_or_default(),
            all: args.all,
        }))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .operations
        .into_iter()
        .map(Operation::from)
        .collect();
    session.printer.list(
        &operations,
        |operation| &operation.id,
        describe::operation_table,
    )?;
    if operations.is_empty() {
        session.printer.note(if args.all {
            "there are no operations"
        } else {
            "no operation is open; finished ones: ghostctl operation list --all"
        });
    }
    Ok(Exit::Done)
}

pub(super) async fn show(ids: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (operations, exit) = each(&ids, session, |id| async {
        agent
            .operations()
            .get(ask(GetOperationRequest { id }))
            .await
            .map(|answer| Operation::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session.printer.several(
        &operations,
        ids.len(),
        |operation| &operation.id,
        describe::operation,
    )?;
    Ok(exit)
}

pub(super) async fn wait(args: OperationWait, session: &Session) -> Result<Exit, Failure> {
    let ids = args.operations.ids;
    let agent = session.agent().await?;
    let (operations, exit) = each(&ids, session, |id| async {
        let mut ctrl_c = CtrlC::listen()?;
        // A prefix is resolved once, so that it cannot come to mean another operation meanwhile.
        let operation = agent
            .operations()
            .get(ask(GetOperationRequest { id }))
            .await
            .map_err(|status| agent.failure(&status))?
            .into_inner();
        finish(
            &agent,
            &session.printer,
            operation,
            &mut ctrl_c,
            args.timeout,
        )
        .await
    })
    .await;
    tell(&operations, ids.len(), session)?;
    Ok(exit)
}

pub(super) async fn cancel(ids: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (operations, exit) = each(&ids, session, |id| async {
        agent
            .operations()
            .cancel(ask(CancelOperationRequest { id }))
            .await
            .map(|answer| Operation::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    tell(&operations, ids.len(), session)?;
    for operation in operations
        .iter()
        .filter(|operation| !operation.status.is_finished())
    {
        session.printer.note(&format!(
            "it undoes what it did; wait for that with: ghostctl operation wait {}",
            operation.id
        ));
    }
    Ok(exit)
}

fn tell(operations: &[Operation], asked: usize, session: &Session) -> Result<(), Failure> {
    session.printer.several(
        operations,
        asked,
        |operation| &operation.id,
        |operation, paint| {
            format!(
                "{} {} {}\n",
                printable(&operation.kind),
                printable(&operation.subject),
                paint.state(operation.status.as_str(), operation.status.as_str())
            )
        },
    )
}
