//! The power verbs.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::vm::{Request, decide};
use ghost_domain::{Error, ErrorCode, OperationKind, Principal, RequestId, Result, Role, VmId};

use super::create::check_link;
use crate::application::Ports;
use crate::operations::{Engine, Submission};
use crate::registry::{Model, OperationView, Registry};

/// A VM, and the caller's idempotency key.
#[derive(Clone, Debug, Default)]
pub struct PowerCommand {
    /// Name, full id or unique prefix.
    pub vm: String,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// How to stop.
#[derive(Clone, Debug, Default)]
pub struct StopCommand {
    /// Name, full id or unique prefix.
    pub vm: String,
    /// Cut the power: at once, or after `timeout` where one is given.
    pub force: bool,
    /// How long the guest may take to follow the ACPI request.
    pub timeout: Option<Duration>,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
}

/// Checks a request against the VM's state, as every mutation of a VM does.
pub(crate) fn check_state(
    model: &Model,
    id: VmId,
    request: Request,
    now: ghost_domain::Monotonic,
) -> Result<()> {
    let entry = model.vm(id)?;
    let shown = model.shown_idle(entry, now);
    decide(shown.state, request)
        .map_err(|denial| denial.into_error(entry.vm.name.as_str(), &shown, request))
}

async fn submit(
    engine: &Arc<Engine>,
    registry: &Arc<Registry>,
    principal: &Principal,
    (selector, request_id): (String, Option<RequestId>),
    request: Request,
    kind: OperationKind,
    check: impl FnOnce(&Model, VmId) -> Result<()> + Send + 'static,
) -> Result<OperationView> {
    principal.require(Role::Operator)?;
    let (id, name) = find(registry, &selector, request_id.as_ref(), kind.name())?;
    let submission = Submission {
        request_hash: Submission::hash(&(kind.name(), id, format!("{kind:?}"))),
        kind,
        vm: Some(id),
        subject: name,
        request_id,
    };
    let clock = Arc::clone(registry);
    engine
        .submit(principal, submission, move |model| {
            check_state(model, id, request, clock.clock().monotonic())?;
            check_link(model)?;
            check(model, id)?;
            Ok(Vec::new())
        })
        .await
}

/// Finds the VM of a request. A retry may come when the VM is gone (deleted by the first try): then
/// the known operation tells which it was.
pub(crate) fn find(
    registry: &Registry,
    selector: &str,
    request_id: Option<&RequestId>,
    kind: &str,
) -> Result<(VmId, String)> {
    registry.read(|model| {
        let found = model
            .find_vm(selector)
            .map(|entry| (entry.vm.id, entry.vm.name.to_string()));
        let Err(error) = found else { return found };
        let known = request_id
            .and_then(|key| model.requests.get(key))
            .and_then(|id| model.operations.get(id))
            .map(|entry| &entry.operation)
            .filter(|operation| operation.kind.name() == kind);
        match known {
            Some(operation)
                if operation.subject == selector
                    || operation.vm.is_some_and(|vm| vm.to_string() == selector) =>
            {
                operation
                    .vm
                    .map(|vm| (vm, operation.subject.clone()))
                    .ok_or_else(|| Error::internal("a VM's operation without a VM"))
            }
            _ => Err(error),
        }
    })
}

/// Powers a VM on.
pub struct StartVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

impl StartVm {
    /// Submits the operation.
    ///
    /// # Errors
    /// `VmNotFound`, `VmRunning`, `WrongState`, `InsufficientResources`, `HypervisorUnavailable`,
    /// and those of every submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: PowerCommand,
    ) -> Result<OperationView> {
        principal.require(Role::Operator)?;
        let host = self.ports.host.resources().await?;
        self.registry.report(|model| model.host = host);
        let target = (command.vm, command.request_id);
        submit(
            &self.engine,
            &self.registry,
            principal,
            target,
            Request::Start,
            OperationKind::StartVm,
            |model, id| {
                let entry = model.vm(id)?;
                // The disk was admitted when the VM was made.
                let demand = ghost_domain::Demand {
                    disk: ghost_domain::ByteSize::ZERO,
                    ..entry.vm.spec.demand()
                };
                model.capacity(Some(id)).admit(demand)
            },
        )
        .await
    }
}

/// Powers a VM off.
pub struct StopVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
}

impl StopVm {
    /// Submits the operation.
    ///
    /// # Errors
    /// `VmNotFound`, `VmNotRunning`, `HypervisorUnavailable`, and those of every submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: StopCommand,
    ) -> Result<OperationView> {
        let timeout = check_timeout(command.timeout)?;
        let kind = OperationKind::StopVm {
            force: command.force,
            timeout,
        };
        let target = (command.vm, command.request_id);
        submit(
            &self.engine,
            &self.registry,
            principal,
            target,
            Request::Stop,
            kind,
            |_, _| Ok(()),
        )
        .await
    }
}

/// Stops and starts a VM.
pub struct RestartVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
}

impl RestartVm {
    /// Submits the operation.
    ///
    /// # Errors
    /// As [`StopVm`].
    pub async fn execute(
        &self,
        principal: &Principal,
        command: StopCommand,
    ) -> Result<OperationView> {
        let timeout = check_timeout(command.timeout)?;
        let kind = OperationKind::RestartVm {
            force: command.force,
            timeout,
        };
        let target = (command.vm, command.request_id);
        submit(
            &self.engine,
            &self.registry,
            principal,
            target,
            Request::Restart,
            kind,
            |_, _| Ok(()),
        )
        .await
    }
}

/// The longest time that a guest may be given to shut down.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

fn check_timeout(timeout: Option<Duration>) -> Result<Option<Duration>> {
    if timeout.is_some_and(|timeout| timeout > LONGEST_TIMEOUT) {
        return Err(
            Error::new(ErrorCode::InvalidArgument, "the timeout is too long")
                .because("at most 24 hours")
                .field("timeout", "at most 24h"),
        );
    }
    Ok(timeout)
}

/// Halts a VM's vCPUs.
pub struct PauseVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
}

impl PauseVm {
    /// Submits the operation.
    ///
    /// # Errors
    /// `VmNotFound`, `VmNotRunning`, `WrongState`, `HypervisorUnavailable`, and those of every
    /// submission.
    pub async fn execute(
        &self,
        principal: &Principal,
        command: PowerCommand,
    ) -> Result<OperationView> {
        let target = (command.vm, command.request_id);
        submit(
            &self.engine,
            &self.registry,
            principal,
            target,
            Request::Pause,
            OperationKind::PauseVm,
            |_, _| Ok(()),
        )
        .await
    }
}

/// Lets a VM's vCPUs run on.
pub struct ResumeVm {
    pub(crate) engine: Arc<Engine>,
    pub(crate) registry: Arc<Registry>,
}

impl ResumeVm {
    /// Submits the operation.
    ///
    /// # Errors
    /// As [`PauseVm`].
    pub async fn execute(
        &self,
        principal: &Principal,
        command: PowerCommand,
    ) -> Result<OperationView> {
        let target = (command.vm, command.request_id);
        submit(
            &self.engine,
            &self.registry,
            principal,
            target,
            Request::Resume,
            OperationKind::ResumeVm,
            |_, _| Ok(()),
        )
        .await
    }
}
