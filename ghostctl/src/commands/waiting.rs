//! Waiting for an operation: follows its stream, survives a restart of the agent, and leaves at
//! Ctrl-C without touching the operation.

use std::future::Future;
use std::time::Duration;

use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::{GetOperationRequest, WatchOperationRequest};
use ghost_proto::view::Operation;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

use crate::connect::{Agent, ask};
use crate::errors::{Exit, Failure, timed_out};
use crate::printer::Printer;
use crate::progress::Tracker;

/// How long a wait tries to find an agent again that went away: longer than its restart takes.
const RECONNECT: Duration = Duration::from_secs(30);

/// Ctrl-C from now on. Made before a change is asked for, so that none slips between the two.
pub(super) struct CtrlC(Signal);

impl CtrlC {
    pub(super) fn listen() -> Result<Self, Failure> {
        signal(SignalKind::interrupt())
            .map(Self)
            .map_err(|error| Failure::io("Ctrl-C cannot be watched for", &error))
    }

    /// Returns at the next Ctrl-C.
    pub(super) async fn pressed(&mut self) {
        // There is no end to signals: what `recv` says is that one came.
        let _ = self.0.recv().await;
    }

    /// Runs a future to its end, or until Ctrl-C.
    pub(super) async fn or<T>(
        &mut self,
        work: impl Future<Output = Result<T, Failure>>,
        interrupted: impl FnOnce() -> Failure,
    ) -> Result<T, Failure> {
        tokio::select! {
            // What has ended has ended, also where Ctrl-C came at the same moment.
            biased;
            done = work => done,
            _ = self.0.recv() => Err(interrupted()),
        }
    }
}

/// Waits until an operation has finished; one that did not succeed is a failure.
pub(super) async fn finish(
    agent: &Agent,
    printer: &Printer,
    operation: message::Operation,
    ctrl_c: &mut CtrlC,
    limit: Option<Duration>,
) -> Result<Operation, Failure> {
    let id = operation.id.clone();
    let operation = Operation::from(operation);
    let mut tracker = printer.progress().track(&operation.subject);
    tracker.show(&operation);
    let watch = async {
        let watch = watch_to_end(agent, printer, operation, &mut tracker);
        match limit {
            None => watch.await,
            Some(limit) => tokio::time::timeout(limit, watch)
                .await
                .unwrap_or_else(|_| {
                    Err(timed_out("the operation has not finished", limit)
                        .hint(format!("ghostctl operation wait {id}"))
                        .of_operation(&id))
                }),
        }
    };
    let operation = ctrl_c.or(watch, || Failure::interrupted(&id)).await?;
    match Failure::from_operation(&operation) {
        Some(failure) => Err(failure),
        None => Ok(operation),
    }
}

async fn watch_to_end(
    agent: &Agent,
    printer: &Printer,
    mut operation: Operation,
    tracker: &mut Tracker,
) -> Result<Operation, Failure> {
    let mut lost_since = None;
    while !operation.status.is_finished() {
        let Err(failure) = watch_once(agent, &mut operation, tracker, &mut lost_since).await else {
            continue;
        };
        let lost = *lost_since.get_or_insert_with(|| {
            printer.note("the agent was lost; trying to reach it again");
            Instant::now()
        });
        // An agent that stops or recovers says so, and comes back as one that was cut off does.
        let away = failure.is_transport() || failure.exit() == Exit::Unreachable;
        if !away {
            return Err(failure.of_operation(&operation.id));
        }
        if lost.elapsed() > RECONNECT {
            return Err(failure
                .hint(format!("ghostctl operation wait {}", operation.id))
                .of_operation(&operation.id));
        }
        sleep((lost.elapsed() / 4).clamp(Duration::from_millis(100), Duration::from_secs(2))).await;
    }
    Ok(operation)
}

/// Follows the operation until its stream ends.
async fn watch_once(
    agent: &Agent,
    operation: &mut Operation,
    tracker: &mut Tracker,
    lost_since: &mut Option<Instant>,
) -> Result<(), Failure> {
    let failed = |status| agent.failure(&status);
    let mut stream = agent
        .operations()
        .watch(WatchOperationRequest {
            id: operation.id.clone(),
        })
        .await
        .map_err(failed)?
        .into_inner();
    while let Some(next) = stream.message().await.map_err(failed)? {
        *lost_since = None;
        *operation = next.into();
        tracker.show(operation);
    }
    if operation.status.is_finished() {
        return Ok(());
    }
    // The stream of an unfinished operation ended: an agent that drains does that. Its answer to a
    // plain question tells whether it is still there.
    let now = agent
        .operations()
        .get(ask(GetOperationRequest {
            id: operation.id.clone(),
        }))
        .await
        .map_err(failed)?
        .into_inner();
    *operation = now.into();
    tracker.show(operation);
    if operation.status.is_finished() {
        return Ok(());
    }
    Err(Failure::new(
        crate::errors::ErrorCode::AgentUnreachable,
        "the agent ended the wait before the operation had finished",
    )
    .transport())
}
