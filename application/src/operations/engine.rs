//! The engine itself: submit, run, unwind, resume, cancel.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Change;
use ghost_domain::{
    Error, ErrorCode, EventKind, JournalEntry, JournalEvent, Operation, OperationId, OperationKind,
    OperationStatus, Principal, PrincipalSource, Progress, RequestId, Result, VmId,
};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::failpoint::{FailAction, FailMoment, FailSite, Failpoints};
use super::plan::{self, Plan, Weight};
use super::step::{Step, StepContext};
use crate::application::Ports;
use crate::registry::{Decision, Model, OperationView, Registry};

/// Finished operations are forgotten (with their idempotency keys) past this number …
const KEPT_OPERATIONS: usize = 1_000;
/// … but never before this age, so that a retry after a lost answer still finds its operation.
const KEPT_AT_LEAST: Duration = Duration::from_secs(3600);
/// How long an undo is tried while libvirt or the store is out of reach.
const UNDO_PATIENCE: Duration = Duration::from_secs(600);
/// How often an undo that fails for another reason is tried.
const UNDO_ATTEMPTS: u32 = 3;

/// Downloads and imports at once: more of them only take the line from each other.
const TRANSFERS: usize = 4;
/// Steps at once that start QEMU's tools or QEMU itself.
const DISK_WORK: usize = 8;
/// Operations that may be open at once; past it callers are asked to come back.
const OPEN_OPERATIONS: usize = 2_000;

/// A change that somebody asks for.
pub(crate) struct Submission {
    pub(crate) kind: OperationKind,
    pub(crate) vm: Option<VmId>,
    pub(crate) subject: String,
    pub(crate) request_id: Option<RequestId>,
    pub(crate) request_hash: u64,
}

impl Submission {
    /// Hashes what makes a request the same request. Stable within a build, which is enough: a
    /// retry across an upgrade of the agent is answered as a reuse of the key, never carried out twice.
    pub(crate) fn hash(parts: &impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        parts.hash(&mut hasher);
        hasher.finish()
    }
}

enum Submitted {
    New(Box<Operation>),
    Known(OperationId),
}

/// See the module's documentation.
pub(crate) struct Engine {
    registry: Arc<Registry>,
    ports: Ports,
    failpoints: Option<Failpoints>,
    running: Mutex<HashMap<OperationId, CancellationToken>>,
    tasks: TaskTracker,
    draining: CancellationToken,
    transfers: Semaphore,
    disk_work: Semaphore,
}

enum Ended {
    Done,
    Failed(Error),
    /// The agent drains: the journal stands, the next start goes on.
    Checkpointed,
}

impl Engine {
    pub(crate) fn new(
        registry: Arc<Registry>,
        ports: Ports,
        failpoints: Option<Failpoints>,
    ) -> Arc<Self> {
        Arc::new(Self {
            registry,
            ports,
            failpoints,
            running: Mutex::new(HashMap::new()),
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            transfers: Semaphore::new(TRANSFERS),
            disk_work: Semaphore::new(DISK_WORK),
        })
    }

    /// Records an operation and sets it going. `admit` is the check that belongs to the kind, made
    /// in the same transaction; it may add records and answers with the changes to make.
    ///
    /// # Errors
    /// `RequestIdReused`, `ShuttingDown`, `VmBusy`, `StoreUnavailable`, or what `admit` says.
    pub(crate) async fn submit<F>(
        self: &Arc<Self>,
        principal: &Principal,
        submission: Submission,
        admit: F,
    ) -> Result<OperationView>
    where
        F: FnOnce(&Model) -> Result<Vec<Change>> + Send + 'static,
    {
        let id = OperationId::random();
        let now = self.registry.clock().now();
        let requested_by = principal.name.clone();
        let through_core = matches!(principal.source, PrincipalSource::Core { .. });
        let submitted = self
            .registry
            .transact(move |model| {
                if let Some(known) = known_request(model, &submission)? {
                    return Ok(Decision::nothing(Submitted::Known(known)));
                }
                model.check_accepting()?;
                if model.open_operations().count() >= OPEN_OPERATIONS {
                    return Err(Error::new(
                        ErrorCode::TooManyRequests,
                        "too many operations are under way",
                    )
                    .hint("wait until some have ended: ghostctl operation list")
                    .retry_after(Duration::from_secs(5)));
                }
                if let Some(vm) = submission.vm
                    && let Some(entry) = model.vms.get(&vm)
                    && let Some(holder) = model.running(entry)
                {
                    return Err(busy(&submission.subject, holder));
                }
                let mut changes = admit(model)?;
                let deadline = plan::deadline_for(&submission.kind);
                let operation = Operation {
                    id,
                    kind: submission.kind,
                    vm: submission.vm,
                    subject: submission.subject,
                    request_id: submission.request_id,
                    request_hash: submission.request_hash,
                    requested_by,
                    through_core,
                    status: OperationStatus::Pending,
                    error: None,
                    created_at: now,
                    finished_at: None,
                    deadline: now.after(deadline),
                    cancel_requested: false,
                    journal: Vec::new(),
                };
                changes.push(Change::PutOperation(Box::new(operation.clone())));
                // A command of Core: taken and begun in one commit.
                if let Some(taking) = &model.taking
                    && operation.request_id.as_ref() == Some(&taking.request)
                {
                    let ledger = taking.accepted(&model.fleet_ledger, id, now)?;
                    changes.push(Change::PutFleetLedger(ledger));
                }
                changes.extend(forgotten(model, now));
                let notice = notice(&operation);
                let (vm, subject) = (operation.vm, operation.subject.clone());
                Ok(Decision::of(Submitted::New(Box::new(operation)), changes)
                    .notice(notice, vm, subject))
            })
            .await?;
        let id = match submitted {
            Submitted::New(operation) => {
                let id = operation.id;
                self.launch(*operation);
                id
            }
            Submitted::Known(id) => id,
        };
        self.view(id)
    }

    /// Takes up every operation that an earlier run of the agent left open.
    pub(crate) fn resume_all(self: &Arc<Self>) {
        let open: Vec<Operation> = self.registry.read(|model| {
            model
                .open_operations()
                .map(|operation| Operation::clone(operation))
                .collect()
        });
        for operation in open {
            tracing::info!(operation_id = %operation.id, kind = operation.kind.name(), subject = %operation.subject, "taking up an operation of an earlier run");
            self.launch(operation);
        }
    }

    /// Asks an operation to stop and undo what it did.
    pub(crate) async fn cancel(&self, id: OperationId) -> Result<()> {
        self.registry
            .transact(move |model| {
                let entry = model.operations.get(&id).ok_or_else(|| {
                    Error::new(
                        ErrorCode::OperationNotFound,
                        format!("there is no operation {id}"),
                    )
                })?;
                if entry.operation.status.is_finished() {
                    return Err(Error::new(
                        ErrorCode::OperationFinished,
                        format!(
                            "operation {id} has already ended: {}",
                            entry.operation.status
                        ),
                    )
                    .hint(format!("see it: ghostctl operation show {id}")));
                }
                if matches!(entry.operation.kind, OperationKind::DeleteVm { .. })
                    && !entry.operation.journal.is_empty()
                {
                    return Err(Error::new(
                        ErrorCode::OperationFinished,
                        "a delete that has begun cannot be taken back",
                    ));
                }
                let mut operation = Operation::clone(&entry.operation);
                operation.cancel_requested = true;
                Ok(Decision::of(
                    (),
                    vec![Change::PutOperation(Box::new(operation))],
                ))
            })
            .await?;
        if let Some(token) = self.running.lock().get(&id) {
            token.cancel();
        }
        Ok(())
    }

    /// Stops taking new steps and waits for the running ones, at most for `patience`. What does
    /// not finish in time stays journalled for the next start.
    pub(crate) async fn drain(&self, patience: Duration) {
        self.registry.observe(|model| model.draining = true);
        self.draining.cancel();
        self.tasks.close();
        if tokio::time::timeout(patience, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                operations = self.tasks.len(),
                "leaving operations to the next start"
            );
        }
    }

    fn view(&self, id: OperationId) -> Result<OperationView> {
        self.registry.read(|model| {
            model
                .operations
                .get(&id)
                .map(OperationView::of)
                .ok_or_else(|| {
                    Error::new(
                        ErrorCode::OperationNotFound,
                        format!("there is no operation {id}"),
                    )
                })
        })
    }

    fn launch(self: &Arc<Self>, operation: Operation) {
        let token = CancellationToken::new();
        if operation.cancel_requested {
            token.cancel();
        }
        self.running.lock().insert(operation.id, token.clone());
        let span = tracing::info_span!(
            "operation",
            operation_id = %operation.id,
            kind = operation.kind.name(),
            subject = %operation.subject,
        );
        let engine = Arc::clone(self);
        self.tasks.spawn(
            async move {
                let id = operation.id;
                if let Err(error) = engine.run(operation, token).await {
                    // Only the store can fail here: the journal stands, the next start goes on.
                    tracing::error!(%error, "cannot record the operation; it is taken up at the next start");
                }
                engine.running.lock().remove(&id);
            }
            .instrument(span),
        );
    }

    async fn run(&self, operation: Operation, cancel: CancellationToken) -> Result<()> {
        let plan = plan::plan(&operation);
        let ended = if operation.error.is_some() || was_unwinding(&operation) {
            // An earlier run was already undoing it.
            Ended::Failed(operation.error.clone().unwrap_or_else(interrupted))
        } else if operation.journal.is_empty() && operation.cancel_requested {
            Ended::Failed(cancelled())
        } else {
            self.forward(&operation, &plan, &cancel).await?
        };
        match ended {
            Ended::Done => {
                self.fail_here(&operation, "finish", FailMoment::BeforeFinish)
                    .await
                    .ok();
                self.finish(operation.id, OperationStatus::Succeeded, None)
                    .await
            }
            Ended::Checkpointed => Ok(()),
            Ended::Failed(error) => self.unwind(operation.id, &plan, error).await,
        }
    }

    async fn forward(
        &self,
        operation: &Operation,
        plan: &Plan,
        cancel: &CancellationToken,
    ) -> Result<Ended> {
        let clock = self.registry.clock();
        // The wall-clock deadline of the record becomes a monotonic one here, so that a step of
        // the wall clock while it runs neither ends nor prolongs it.
        let left = operation.deadline.since(clock.now());
        let deadline = tokio::time::Instant::now() + left;
        let mut done: Option<&'static str> = None;
        for step in &plan.steps {
            let name = step.name();
            if journal_says(operation, name, JournalEvent::Done) {
                continue;
            }
            if self.draining.is_cancelled() {
                if let Some(done) = done {
                    self.journal(operation.id, &[(done, JournalEvent::Done)], None)
                        .await?;
                }
                return Ok(Ended::Checkpointed);
            }
            let mut entries = Vec::new();
            entries.extend(done.take().map(|done| (done, JournalEvent::Done)));
            entries.push((name, JournalEvent::Started));
            let context = self.context(
                self.journal(operation.id, &entries, Some(OperationStatus::Running))
                    .await?,
            );
            context.report(Progress::phase(step.phase()));
            let span = tracing::info_span!("step", step = name);
            let outcome = {
                let effect = async {
                    let _turn = self.turn(&context, step.as_ref()).await;
                    self.fail_here(operation, name, FailMoment::BeforePerform)
                        .await?;
                    step.perform(&context).await?;
                    self.fail_here(operation, name, FailMoment::AfterPerform)
                        .await
                }
                .instrument(span);
                tokio::select! {
                    // A step that is done counts as done, also where a cancel came at the same time.
                    biased;
                    outcome = effect => outcome,
                    () = cancel.cancelled() => Err(cancelled()),
                    () = tokio::time::sleep_until(deadline) => Err(late(&context, step.as_ref())),
                    () = self.drained(step.as_ref()) => return Ok(Ended::Checkpointed),
                }
            };
            match outcome {
                Ok(()) => done = Some(name),
                Err(error) => {
                    let error = error.of_operation(operation.id);
                    tracing::warn!(step = name, code = %error.code(), %error, "a step failed");
                    self.journal_failure(operation.id, name, error.clone())
                        .await?;
                    return Ok(Ended::Failed(error));
                }
            }
        }
        if let Some(done) = done {
            self.journal(operation.id, &[(done, JournalEvent::Done)], None)
                .await?;
        }
        Ok(Ended::Done)
    }

    /// Waits for a turn where the step's kind of work is bounded.
    async fn turn(&self, context: &StepContext, step: &dyn Step) -> Option<SemaphorePermit<'_>> {
        let gate = match plan::weight(step.name()) {
            Weight::Light => return None,
            Weight::Transfer => &self.transfers,
            Weight::DiskWork => &self.disk_work,
        };
        if let Ok(turn) = gate.try_acquire() {
            return Some(turn);
        }
        context.report(Progress::waiting(
            step.phase(),
            "other operations to finish",
        ));
        // Never closed, so there is always a turn in the end.
        let turn = gate.acquire().await.ok();
        context.report(Progress::phase(step.phase()));
        turn
    }

    /// Becomes ready when the agent drains and the step is one that may take long: short steps
    /// are let finish.
    async fn drained(&self, step: &dyn Step) {
        if plan::may_take_long(step.name()) {
            self.draining.cancelled().await;
        } else {
            std::future::pending::<()>().await;
        }
    }

    async fn unwind(&self, id: OperationId, plan: &Plan, error: Error) -> Result<()> {
        let mut broken: Option<Error> = None;
        for step in plan.steps.iter().rev() {
            let operation = self.registry.read(|model| {
                model
                    .operations
                    .get(&id)
                    .map(|entry| Arc::clone(&entry.operation))
            });
            let Some(operation) = operation else {
                return Ok(());
            };
            let name = step.name();
            if !journal_says(&operation, name, JournalEvent::Started)
                || journal_says(&operation, name, JournalEvent::Undone)
            {
                continue;
            }
            let operation = self
                .journal(
                    id,
                    &[(name, JournalEvent::UndoStarted)],
                    Some(OperationStatus::Running),
                )
                .await?;
            let context = self.context(operation);
            context.report(Progress::phase(format!("undoing: {}", step.phase())));
            match self.undo(&context, step.as_ref()).await {
                Ok(()) => {
                    self.journal(id, &[(name, JournalEvent::Undone)], None)
                        .await?;
                }
                Err(failure) => {
                    tracing::error!(step = name, error = %failure, "an undo failed");
                    self.journal(id, &[(name, JournalEvent::UndoFailed)], None)
                        .await?;
                    broken.get_or_insert(failure);
                }
            }
        }
        let status = match (&broken, error.code()) {
            (Some(_), _) => OperationStatus::NeedsAttention,
            (None, ErrorCode::Cancelled) => OperationStatus::Cancelled,
            (None, _) if is_interruption(&error) => OperationStatus::RolledBack,
            (None, _) => OperationStatus::Failed,
        };
        let error = match broken {
            None => error,
            Some(failure) => error.hint(format!(
                "undoing it failed too ({failure}); see what is left: ghostctl operation show {id}"
            )),
        };
        self.finish(id, status, Some(error)).await
    }

    async fn undo(&self, context: &StepContext, step: &dyn Step) -> Result<()> {
        let name = step.name();
        let started = tokio::time::Instant::now();
        let mut delay = Duration::from_millis(200);
        let mut attempts = 0;
        loop {
            let outcome = async {
                self.fail_here(&context.operation, name, FailMoment::BeforeUndo)
                    .await?;
                step.undo(context).await?;
                self.fail_here(&context.operation, name, FailMoment::AfterUndo)
                    .await
            }
            .await;
            let Err(error) = outcome else { return Ok(()) };
            attempts += 1;
            let passing = matches!(
                error.code(),
                ErrorCode::HypervisorUnavailable
                    | ErrorCode::StoreUnavailable
                    | ErrorCode::DeadlineExceeded
            );
            let again = if passing {
                started.elapsed() < UNDO_PATIENCE
            } else {
                attempts < UNDO_ATTEMPTS
            };
            if !again {
                return Err(error);
            }
            if passing {
                context.report(Progress::waiting(
                    format!("undoing: {}", step.phase()),
                    "libvirt to answer",
                ));
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(Duration::from_secs(5));
        }
    }

    async fn fail_here(
        &self,
        operation: &Operation,
        step: &'static str,
        moment: FailMoment,
    ) -> Result<()> {
        let Some(failpoints) = &self.failpoints else {
            return Ok(());
        };
        let site = FailSite {
            operation: operation.kind.name(),
            step,
            moment,
        };
        match failpoints(&site) {
            FailAction::Continue => Ok(()),
            FailAction::Fail(error) => Err(error),
            FailAction::Hang => std::future::pending().await,
            FailAction::Abort => std::process::abort(),
        }
    }

    fn context(&self, operation: Arc<Operation>) -> StepContext {
        StepContext {
            operation,
            ports: self.ports.clone(),
            registry: Arc::clone(&self.registry),
        }
    }

    /// Appends to the journal; durable when it returns.
    async fn journal(
        &self,
        id: OperationId,
        entries: &[(&'static str, JournalEvent)],
        status: Option<OperationStatus>,
    ) -> Result<Arc<Operation>> {
        let entries = entries.to_vec();
        let now = self.registry.clock().now();
        self.registry
            .transact(move |model| {
                let mut operation = open_operation(model, id)?;
                operation
                    .journal
                    .extend(entries.into_iter().map(|(step, event)| JournalEntry {
                        step: step.to_owned(),
                        event,
                        at: now,
                    }));
                let begun = status.is_some_and(|status| operation.status != status);
                operation.status = status.unwrap_or(operation.status);
                let decision = Decision::of(
                    Arc::new(operation.clone()),
                    vec![Change::PutOperation(Box::new(operation.clone()))],
                );
                Ok(if begun {
                    decision.notice(notice(&operation), operation.vm, operation.subject.clone())
                } else {
                    decision
                })
            })
            .await
    }

    async fn journal_failure(
        &self,
        id: OperationId,
        step: &'static str,
        error: Error,
    ) -> Result<()> {
        let now = self.registry.clock().now();
        self.registry
            .transact(move |model| {
                let mut operation = open_operation(model, id)?;
                operation.journal.push(JournalEntry {
                    step: step.to_owned(),
                    event: JournalEvent::Failed,
                    at: now,
                });
                operation.error = Some(error);
                Ok(Decision::of(
                    (),
                    vec![Change::PutOperation(Box::new(operation))],
                ))
            })
            .await
    }

    /// The end, in one transaction with the records that follow from it. Tried until the store
    /// takes it: an operation that did its work must not be forgotten for a full disk.
    async fn finish(
        &self,
        id: OperationId,
        status: OperationStatus,
        error: Option<Error>,
    ) -> Result<()> {
        let mut delay = Duration::from_millis(200);
        loop {
            let error = error.clone();
            let now = self.registry.clock().now();
            let outcome = self
                .registry
                .transact(move |model| {
                    let mut operation = open_operation(model, id)?;
                    operation.status = status;
                    operation.finished_at = Some(now);
                    operation.error = error.map(|error| error.of_operation(id));
                    let (mut changes, notices) = plan::completion(model, &operation, now);
                    changes.push(Change::PutOperation(Box::new(operation.clone())));
                    let ledger = crate::fleet::ended(&model.fleet_ledger, &operation);
                    changes.extend(ledger.map(Change::PutFleetLedger));
                    let mut decision = Decision::of((), changes).notice(
                        notice(&operation),
                        operation.vm,
                        operation.subject.clone(),
                    );
                    decision.notices.extend(notices);
                    Ok(decision)
                })
                .await;
            match outcome {
                Err(error)
                    if error.code() == ErrorCode::StoreUnavailable
                        && !self.draining.is_cancelled() =>
                {
                    tracing::warn!(%error, "the store cannot record the end of an operation yet");
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(Duration::from_secs(5));
                }
                outcome => return outcome,
            }
        }
    }
}

fn open_operation(model: &Model, id: OperationId) -> Result<Operation> {
    let entry = model
        .operations
        .get(&id)
        .ok_or_else(|| Error::internal("the operation's record is gone"))?;
    Ok(Operation::clone(&entry.operation))
}

fn known_request(model: &Model, submission: &Submission) -> Result<Option<OperationId>> {
    let Some(key) = &submission.request_id else {
        return Ok(None);
    };
    let Some(id) = model.requests.get(key) else {
        return Ok(None);
    };
    let same = model.operations.get(id).is_some_and(|entry| {
        entry.operation.request_hash == submission.request_hash
            && entry.operation.kind.name() == submission.kind.name()
    });
    if same {
        return Ok(Some(*id));
    }
    Err(Error::new(
        ErrorCode::RequestIdReused,
        format!(
            "the request id {:?} was used for another request",
            key.as_str()
        ),
    )
    .hint("use a new request id for a new request")
    .of_operation(*id))
}

fn busy(subject: &str, holder: &Operation) -> Error {
    Error::new(
        ErrorCode::VmBusy,
        format!(
            "{subject} is held by another operation ({}, {})",
            holder.kind.name(),
            holder.id
        ),
    )
    .hint(format!(
        "wait for it: ghostctl operation wait {0}, or cancel it: ghostctl operation cancel {0}",
        holder.id
    ))
    .retry_after(Duration::from_secs(2))
    .of_operation(holder.id)
}

fn forgotten(model: &Model, now: ghost_domain::Timestamp) -> Vec<Change> {
    let over = model.operations.len().saturating_sub(KEPT_OPERATIONS);
    if over == 0 {
        return Vec::new();
    }
    let mut finished: Vec<_> = model
        .operations
        .values()
        .filter_map(|entry| {
            entry
                .operation
                .finished_at
                .map(|at| (at, entry.operation.id))
        })
        .filter(|(at, _)| now.since(*at) > KEPT_AT_LEAST)
        .collect();
    finished.sort_unstable();
    finished
        .into_iter()
        .take(over)
        .map(|(_, id)| Change::DeleteOperation(id))
        .collect()
}

fn journal_says(operation: &Operation, step: &str, event: JournalEvent) -> bool {
    operation
        .journal
        .iter()
        .any(|entry| entry.step == step && entry.event == event)
}

fn was_unwinding(operation: &Operation) -> bool {
    operation.journal.iter().any(|entry| {
        matches!(
            entry.event,
            JournalEvent::Failed
                | JournalEvent::UndoStarted
                | JournalEvent::Undone
                | JournalEvent::UndoFailed
        )
    })
}

fn notice(operation: &Operation) -> EventKind {
    EventKind::Operation {
        operation: operation.id,
        status: operation.status,
        code: operation.error.as_ref().map(Error::code),
    }
}

fn cancelled() -> Error {
    Error::new(ErrorCode::Cancelled, "the operation was cancelled")
}

const INTERRUPTED: &str = "the agent ended in the middle of the operation";

fn interrupted() -> Error {
    Error::new(ErrorCode::Cancelled, INTERRUPTED).hint("ask for it again")
}

fn is_interruption(error: &Error) -> bool {
    error.message() == INTERRUPTED
}

fn late(context: &StepContext, step: &dyn Step) -> Error {
    let waiting_for = context.registry.read(|model| {
        model
            .operations
            .get(&context.operation.id)
            .and_then(|entry| entry.progress.waiting_for.clone())
    });
    let error = Error::new(
        ErrorCode::DeadlineExceeded,
        format!(
            "the operation did not finish in time; it was {}",
            step.phase()
        ),
    );
    match waiting_for {
        Some(waiting_for) => error.because(format!("it waited for {waiting_for}")),
        None => error,
    }
}
