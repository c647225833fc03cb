//! Taking Core's commands, each once.
//!
//! A command that is taken becomes an operation whose request id is the command's id. The
//! operation's record and the command's line in the ledger are one commit ([`Taking`]), and so are
//! the operation's end and the outcome's: whatever the agent is cut off in, either both are there
//! or neither, and a command that comes again meets the one or begins the other.
//!
//! A command that cannot begin *now* (its VM is held by another operation, libvirt is away) waits
//! here, with those that come after it, until it can or its deadline has passed. What waits is in
//! memory only: for Core it is still in the queue, and is sent again after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, CreateVmCommand as CreateAction, FleetCommand,
    FleetPrincipal, RefusedCommand, Verdict,
};
use ghost_domain::ports::Change;
use ghost_domain::{
    ByteSize, Error, ErrorCode, Operation, Principal, RequestId, Result, Role, VmChange,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::ledger::{self, Taking};
use super::rights::{self, CoreReach};
use crate::application::UseCases;
use crate::registry::{Decision, OperationView, Registry};
use crate::vm::{CreateVmCommand, DeleteVmCommand, PowerCommand, StopCommand, UpdateVmCommand};

/// Commands that wait at most; those after them are sent again by Core.
const MOST_WAITING: usize = 64;
/// A command that waits is tried when something changed, and this often.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// See the module's documentation.
pub(super) struct Commands {
    pub(super) registry: Arc<Registry>,
    pub(super) use_cases: Arc<UseCases>,
    pub(super) one_at_a_time: tokio::sync::Mutex<()>,
    pub(super) waiting: Mutex<BTreeMap<u64, FleetCommand>>,
    pub(super) woken: Notify,
}

/// What came of a try.
enum Tried {
    Outcome(CommandOutcome),
    /// It cannot begin now, and perhaps soon.
    Later(FleetCommand),
    /// One that has to be taken before it has not come.
    Early(FleetCommand),
}

impl Commands {
    pub(super) fn new(registry: Arc<Registry>, use_cases: Arc<UseCases>) -> Self {
        Self {
            registry,
            use_cases,
            one_at_a_time: tokio::sync::Mutex::new(()),
            waiting: Mutex::new(BTreeMap::new()),
            woken: Notify::new(),
        }
    }

    /// Takes a command, or says what became of it; `None` where it has to wait.
    pub(super) async fn take(&self, command: FleetCommand) -> Option<CommandOutcome> {
        let _one = self.one_at_a_time.lock().await;
        match self.attempt(command).await {
            Tried::Outcome(outcome) => {
                self.waiting.lock().remove(&outcome.generation);
                self.woken.notify_one();
                Some(outcome)
            }
            Tried::Later(command) => {
                self.wait_with(command);
                None
            }
            Tried::Early(command) => {
                let follows = self.waiting.lock().contains_key(&command.previous);
                if follows {
                    self.wait_with(command);
                }
                None
            }
        }
    }

    /// Refuses a command whose contents cannot be read. It takes its place in the order like another
    /// one, or those after it would wait for it for ever.
    pub(super) async fn refuse(&self, refused: RefusedCommand) -> Option<CommandOutcome> {
        let _one = self.one_at_a_time.lock().await;
        let outcome = refused.outcome();
        // Only its place is looked at.
        let place = FleetCommand {
            id: refused.id,
            epoch: refused.epoch,
            generation: refused.generation,
            previous: refused.previous,
            deadline: refused.at,
            issuer: FleetPrincipal {
                name: String::new(),
                tenant: None,
                role: Role::Viewer,
            },
            action: CommandAction::StartVm { vm: String::new() },
        };
        let (verdict, epoch) = self.registry.read(|model| {
            let ledger = &model.fleet_ledger;
            (ledger.judge(&place, refused.at), ledger.epoch)
        });
        match verdict {
            Verdict::Take | Verdict::Expired => {}
            Verdict::Known(known) => return known.or(Some(outcome)),
            Verdict::Stale(_) if refused.epoch < epoch => return Some(outcome),
            Verdict::Stale(_) => return None,
        }
        let kept = outcome.clone();
        let kept = self
            .registry
            .transact(move |model| {
                let next = ledger::taken(&model.fleet_ledger, &place, kept)?;
                Ok(Decision::of((), vec![Change::PutFleetLedger(next)]))
            })
            .await;
        match kept {
            Ok(()) => {
                tracing::warn!(command = %refused.id, error = %refused.error, "a command of Core cannot be read");
                self.woken.notify_one();
                Some(outcome)
            }
            Err(error) => {
                tracing::warn!(command = %refused.id, %error, "the refusal of a command of Core cannot be kept");
                None
            }
        }
    }

    fn wait_with(&self, command: FleetCommand) {
        let mut waiting = self.waiting.lock();
        if waiting.len() < MOST_WAITING || waiting.contains_key(&command.generation) {
            waiting.insert(command.generation, command);
        }
        drop(waiting);
        self.woken.notify_one();
    }

    /// Tries the commands that wait, the first one first, for as long as it is polled.
    pub(super) async fn try_waiting(&self) {
        let mut changed = self.registry.watch();
        loop {
            if self.waiting.lock().is_empty() {
                self.woken.notified().await;
                continue;
            }
            changed.borrow_and_update();
            let first = self.waiting.lock().values().next().cloned();
            if let Some(first) = first {
                let generation = first.generation;
                let _one = self.one_at_a_time.lock().await;
                let gone = !matches!(self.attempt(first).await, Tried::Later(_));
                if gone {
                    self.waiting.lock().remove(&generation);
                    continue;
                }
            }
            let woken = async {
                tokio::select! {
                    _ = changed.changed() => {}
                    () = self.woken.notified() => {}
                }
            };
            drop(tokio::time::timeout(TRY_AGAIN, woken).await);
        }
    }

    async fn attempt(&self, command: FleetCommand) -> Tried {
        let now = self.registry.clock().now();
        let (verdict, epoch, known_core) = self.registry.read(|model| {
            let ledger = &model.fleet_ledger;
            let known_core = !ledger.core_id.is_empty();
            (ledger.judge(&command, now), ledger.epoch, known_core)
        });
        if !known_core {
            return Tried::Early(command);
        }
        match verdict {
            Verdict::Take => self.begin(command).await,
            Verdict::Known(Some(outcome)) => Tried::Outcome(outcome),
            Verdict::Known(None) => Tried::Outcome(self.forgotten(&command)),
            Verdict::Stale(why) if command.epoch < epoch => {
                let error = Error::new(ErrorCode::StaleCommand, "the command is out of date");
                Tried::Outcome(refused(&command, &error.because(why), now))
            }
            Verdict::Stale(_) => Tried::Early(command),
            Verdict::Expired => {
                let error = Error::new(
                    ErrorCode::DeadlineExceeded,
                    "the command could not be begun before its deadline",
                );
                let expired = ledger::failure(&command, CommandStatus::Expired, &error, now);
                self.record(command, expired).await
            }
        }
    }

    /// A command that was taken, and whose outcome is no longer here: Core said that it keeps it,
    /// or its records went back to before it made this number.
    fn forgotten(&self, command: &FleetCommand) -> CommandOutcome {
        let now = self.registry.clock().now();
        if let Some(operation) = self.operation_of(command) {
            let mut outcome = ledger::outcome(command, CommandStatus::Accepted, now);
            ledger::settle(&mut outcome, &operation);
            return outcome;
        }
        let error = Error::new(
            ErrorCode::StaleCommand,
            format!(
                "number {} was taken before, for a command that is no longer known",
                command.generation
            ),
        );
        refused(command, &error, now)
    }

    fn operation_of(&self, command: &FleetCommand) -> Option<Arc<Operation>> {
        let request = ledger::request_of(command.id).ok()?;
        self.registry.read(|model| {
            let id = model.requests.get(&request)?;
            let entry = model.operations.get(id)?;
            Some(Arc::clone(&entry.operation))
        })
    }

    async fn begin(&self, command: FleetCommand) -> Tried {
        let now = self.registry.clock().now();
        // Begun by an agent that then lost its newest records: met, and not begun again.
        if let Some(operation) = self.operation_of(&command) {
            let mut outcome = ledger::outcome(&command, CommandStatus::Accepted, now);
            ledger::settle(&mut outcome, &operation);
            return self.record(command, outcome).await;
        }
        let error = match self.execute(&command).await {
            Ok(view) => {
                let taken = self.registry.read(|model| {
                    let all = &model.fleet_ledger.unreported;
                    all.iter().find(|one| one.id == command.id).cloned()
                });
                if let Some(outcome) = taken {
                    return Tried::Outcome(outcome);
                }
                let mut outcome = ledger::outcome(&command, CommandStatus::Accepted, now);
                ledger::settle(&mut outcome, &view.operation);
                return self.record(command, outcome).await;
            }
            Err(error) => error,
        };
        if passes(&error) {
            tracing::debug!(command = %command.id, %error, "a command of Core has to wait");
            return Tried::Later(command);
        }
        let outcome = refused(&command, &error, now);
        self.record(command, outcome).await
    }

    /// Keeps an outcome; what could not be kept was not taken.
    async fn record(&self, command: FleetCommand, outcome: CommandOutcome) -> Tried {
        let row = (command.clone(), outcome.clone());
        let kept = self
            .registry
            .transact(move |model| {
                let (command, outcome) = row;
                let next = ledger::taken(&model.fleet_ledger, &command, outcome)?;
                Ok(Decision::of((), vec![Change::PutFleetLedger(next)]))
            })
            .await;
        match kept {
            Ok(()) => {
                tracing::info!(
                    command = %outcome.id,
                    kind = command.action.kind(),
                    issuer = %command.issuer.name,
                    status = %outcome.status,
                    code = outcome.code.map(tracing::field::display),
                    "a command of Core was answered: {}",
                    outcome.message
                );
                Tried::Outcome(outcome)
            }
            Err(error) => {
                tracing::warn!(command = %outcome.id, %error, "a command of Core cannot be kept");
                Tried::Later(command)
            }
        }
    }

    async fn execute(&self, command: &FleetCommand) -> Result<OperationView> {
        let permissions = self.registry.read(|model| model.core_permissions);
        let reach = CoreReach::Plain;
        let principal = rights::admit(permissions, &command.issuer, reach, Role::Operator)?;
        let request = ledger::request_of(command.id)?;
        let taking = Taking {
            request: request.clone(),
            command: command.clone(),
        };
        self.registry.quietly(|model| model.taking = Some(taking));
        let outcome = self.act(&principal, &command.action, request).await;
        self.registry.quietly(|model| model.taking = None);
        outcome
    }

    async fn act(
        &self,
        principal: &Principal,
        action: &CommandAction,
        request: RequestId,
    ) -> Result<OperationView> {
        let request_id = Some(request);
        let power = |vm: &String| PowerCommand {
            vm: vm.clone(),
            request_id: request_id.clone(),
        };
        let stop = |vm: &String, force: &bool, timeout: &Option<Duration>| StopCommand {
            vm: vm.clone(),
            force: *force,
            timeout: *timeout,
            request_id: request_id.clone(),
        };
        let all = &self.use_cases;
        match action {
            CommandAction::CreateVm(wanted) => {
                let command = create(wanted, request_id);
                all.create_vm.execute(principal, command).await
            }
            CommandAction::StartVm { vm } => all.start_vm.execute(principal, power(vm)).await,
            CommandAction::StopVm { vm, force, timeout } => {
                let command = stop(vm, force, timeout);
                all.stop_vm.execute(principal, command).await
            }
            CommandAction::RestartVm { vm, force, timeout } => {
                let command = stop(vm, force, timeout);
                all.restart_vm.execute(principal, command).await
            }
            CommandAction::PauseVm { vm } => all.pause_vm.execute(principal, power(vm)).await,
            CommandAction::ResumeVm { vm } => all.resume_vm.execute(principal, power(vm)).await,
            CommandAction::DeleteVm { vm, force } => {
                let command = DeleteVmCommand {
                    vm: vm.clone(),
                    force: *force,
                    expected_generation: None,
                    request_id,
                };
                all.delete_vm.execute(principal, command).await
            }
            CommandAction::UpdateVm {
                vm,
                vcpus,
                memory,
                delete_protection,
                set_tags,
                remove_tags,
            } => {
                let set = set_tags
                    .iter()
                    .map(|(key, value)| (key.clone(), Some(value.clone())));
                let removed = remove_tags.iter().map(|key| (key.clone(), None));
                let command = UpdateVmCommand {
                    vm: vm.clone(),
                    change: VmChange {
                        vcpus: *vcpus,
                        memory: *memory,
                        delete_protection: *delete_protection,
                        tags: set.chain(removed).collect(),
                        ..VmChange::default()
                    },
                    expected_generation: None,
                    request_id,
                };
                all.update_vm.execute(principal, command).await
            }
        }
    }
}

fn create(wanted: &CreateAction, request_id: Option<RequestId>) -> CreateVmCommand {
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    CreateVmCommand {
        name: given(&wanted.name),
        image: wanted.image.clone(),
        vcpus: wanted.vcpus,
        memory_bytes: wanted.memory.map(ByteSize::bytes),
        disk_bytes: wanted.disk.map(ByteSize::bytes),
        networks: wanted.networks.clone(),
        user: given(&wanted.user),
        ssh_authorized_keys: wanted.ssh_authorized_keys.clone(),
        user_data: given(&wanted.user_data),
        tags: wanted.tags.clone(),
        start: wanted.start,
        request_id,
        ..CreateVmCommand::default()
    }
}

fn refused(command: &FleetCommand, error: &Error, now: ghost_domain::Timestamp) -> CommandOutcome {
    ledger::failure(command, CommandStatus::Refused, error, now)
}

/// Whether the same command may be possible in a while without anybody changing it.
fn passes(error: &Error) -> bool {
    matches!(
        error.code(),
        ErrorCode::VmBusy
            | ErrorCode::HypervisorUnavailable
            | ErrorCode::StoreUnavailable
            | ErrorCode::Recovering
            | ErrorCode::ShuttingDown
            | ErrorCode::TooManyRequests
            | ErrorCode::StaleCommand
    )
}
