//! The queue of commands of each host.
//!
//! ```text
//! queue ──> queued ──marked as sent, durably──> on its way ──the host's word──> accepted ──> ended
//!              │ ├──operator──> cancelled          (only the host knows now: neither time nor
//!              │ └──deadline──> expired             operator end it, it may have been begun)
//! ```
//! A command is marked before its first byte goes out. So whatever is not marked was never seen by
//! its host, and may be cancelled or expire without asking; whatever is marked is sent again on the
//! next link, to whichever replica that leads, until the host says what became of it. The host takes
//! each generation once, and none after its deadline.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, CorePermissions, FleetPrincipal,
};
use ghost_domain::{CommandId, Error, ErrorCode, HostId, RequestId, Result, Timestamp};

use super::writer::HostWriter;
use crate::application::fleet::{Draft, Fleet, FleetState};
use crate::domain::{HostLife, HostRecord, QueuedCommand, RecordKey};

/// How long a command waits where nobody says.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);
/// The longest that one may wait.
pub(super) const LONGEST_LIFETIME: Duration = Duration::from_secs(30 * 86_400);
/// Most commands of a host that have not ended.
pub(super) const MOST_OPEN: usize = 256;
/// Most commands of a host that are kept once they ended.
const MOST_ENDED: usize = 256;
/// How long one that ended is kept.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(7 * 86_400);
/// Most bytes of texts in a command.
const MOST_BYTES: usize = 512 * 1024;
/// Commands that are looked at in one change.
const MOST_AT_ONCE: usize = 3;

/// What to queue.
#[derive(Clone, Debug, PartialEq)]
pub struct CommandRequest {
    /// For which host.
    pub host: HostId,
    /// The idempotency key; `None`: one is made.
    pub request_id: Option<RequestId>,
    /// How long it may wait; `None`: an hour.
    pub lifetime: Option<Duration>,
    /// Who asks.
    pub issuer: FleetPrincipal,
    /// What to do.
    pub action: CommandAction,
}

/// The queues of all hosts.
#[derive(Clone, Debug)]
pub struct Commands {
    fleet: Arc<Fleet>,
    writer: HostWriter,
}

impl Commands {
    pub(super) const fn new(fleet: Arc<Fleet>, writer: HostWriter) -> Self {
        Self { fleet, writer }
    }

    /// Queues a command. Durable when this returns. A repeat of a request gives the same command.
    ///
    /// # Errors
    /// `HostNotFound`, `HostLocked`; `CorePermissionDenied` where the host's owner lets Core only
    /// look; `InvalidArgument` for a lifetime beyond 30 days; `RequestIdReused`;
    /// `TooManyRequests` where 256 commands wait; `PayloadTooLarge`; `StoreUnavailable`.
    pub async fn queue(&self, request: CommandRequest) -> Result<QueuedCommand> {
        let lifetime = request.lifetime.unwrap_or(DEFAULT_LIFETIME);
        if lifetime.is_zero() || lifetime > LONGEST_LIFETIME {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "a command waits for at most 30 days",
            )
            .field("lifetime", "more than nothing and at most 720h"));
        }
        fits(&request.action)?;
        let id = CommandId::random();
        let request_id = match &request.request_id {
            Some(given) => given.clone(),
            None => RequestId::new(id.to_string())?,
        };
        let issued_at = self.fleet.clock().now();
        let CommandRequest {
            host,
            issuer,
            action,
            ..
        } = request;
        self.writer
            .change(host, move |state, draft| {
                let record = state.require_host(host)?;
                if let Some(known) = state.command_by_request(host, &request_id) {
                    let same = known.action == action
                        && known.issuer.tenant == issuer.tenant
                        && known.issuer.name == issuer.name;
                    return if same {
                        Ok(QueuedCommand::clone(known))
                    } else {
                        Err(reused(&request_id))
                    };
                }
                admits(state, record)?;
                let generation = record
                    .command_generation
                    .checked_add(1)
                    .ok_or_else(|| Error::internal("the host's commands are used up"))?;
                let command = QueuedCommand {
                    id,
                    request_id: request_id.clone(),
                    host,
                    tenant: record.tenant.clone(),
                    generation,
                    issuer: issuer.clone(),
                    action: action.clone(),
                    issued_at,
                    deadline: issued_at.after(lifetime),
                    sent_at: None,
                    status: CommandStatus::Queued,
                    outcome: None,
                    finished_at: None,
                };
                draft.put_host(HostRecord {
                    command_generation: generation,
                    ..HostRecord::clone(record)
                });
                draft.put_command(command.clone());
                Ok(command)
            })
            .await
    }

    /// Takes a command back, as long as it did not go out.
    ///
    /// # Errors
    /// `CommandNotFound`; `CommandTaken` where its host may have it; `StoreUnavailable`.
    pub async fn cancel(&self, id: CommandId) -> Result<QueuedCommand> {
        let unknown = move || {
            Error::new(
                ErrorCode::CommandNotFound,
                format!("there is no command {id}"),
            )
            .hint("see which there are: ghostctl command list --all")
        };
        let host = self
            .fleet
            .read(|state| state.command(id).map(|command| command.host))
            .ok_or_else(unknown)?;
        let now = self.fleet.clock().now();
        self.writer
            .change(host, move |state, draft| {
                let command = state.command(id).ok_or_else(unknown)?;
                let taken = |what: &str| {
                    Err(Error::new(
                        ErrorCode::CommandTaken,
                        format!("the command {id} cannot be taken back"),
                    )
                    .because(what)
                    .hint("what it began is cancelled like any other operation on its host"))
                };
                match command.status {
                    CommandStatus::Cancelled => return Ok(QueuedCommand::clone(command)),
                    CommandStatus::Queued if command.sent_at.is_none() => {}
                    CommandStatus::Queued => return taken("it was sent to its host already"),
                    CommandStatus::Accepted => return taken("its host has begun it"),
                    _ => return taken("it has ended"),
                }
                let cancelled = ended(
                    command,
                    CommandStatus::Cancelled,
                    ErrorCode::Cancelled,
                    "it was taken back before its host had it",
                    now,
                );
                draft.put_command(cancelled.clone());
                Ok(cancelled)
            })
            .await
    }

    /// Marks commands as sent, before they are; gives those back that may go out, in their order.
    /// Those whose time is over end here.
    pub(super) async fn mark(
        &self,
        host: HostId,
        ids: Vec<CommandId>,
    ) -> Result<Vec<QueuedCommand>> {
        let clock = Arc::clone(self.fleet.clock());
        let mut sendable = Vec::new();
        for some in ids.chunks(MOST_AT_ONCE) {
            let (some, clock) = (some.to_vec(), Arc::clone(&clock));
            let marked = self
                .writer
                .change(host, move |state, draft| {
                    let now = clock.now();
                    let mut marked = Vec::new();
                    for id in &some {
                        let Some(command) = state.command(*id) else {
                            continue;
                        };
                        if command.status != CommandStatus::Queued {
                            continue;
                        }
                        if command.sent_at.is_some() {
                            marked.push(QueuedCommand::clone(command));
                        } else if now > command.deadline {
                            draft.put_command(expired(command, now));
                        } else {
                            let sent = QueuedCommand {
                                sent_at: Some(now),
                                ..QueuedCommand::clone(command)
                            };
                            draft.put_command(sent.clone());
                            marked.push(sent);
                        }
                    }
                    Ok(marked)
                })
                .await?;
            sendable.extend(marked);
        }
        Ok(sendable)
    }

    /// Keeps what a host says of a command; durable when this returns. What is unknown, of another
    /// host or older than what is known changes nothing.
    pub(super) async fn keep(&self, host: HostId, outcome: CommandOutcome) -> Result<()> {
        // By our clock: the host's may stand anywhere, and what ended long ago is forgotten.
        let now = self.fleet.clock().now();
        self.writer
            .change(host, move |state, draft| {
                let Some(command) = state.command(outcome.id) else {
                    return Ok(());
                };
                let ours = command.host == host && command.generation == outcome.generation;
                if ours && follows(command.status, outcome.status) {
                    let finished_at = outcome.status.is_finished().then_some(now);
                    draft.put_command(QueuedCommand {
                        status: outcome.status,
                        outcome: Some(outcome.clone()),
                        finished_at,
                        ..QueuedCommand::clone(command)
                    });
                }
                Ok(())
            })
            .await
    }

    /// Ends what waited too long without going out, and forgets what ended long ago, what is too
    /// much of it, and what is left of hosts that are gone. Says how many records it changed.
    ///
    /// # Errors
    /// `StoreUnavailable`; the rest is done the next time.
    pub async fn sweep(&self) -> Result<usize> {
        let now = self.fleet.clock().now();
        let mut due: BTreeMap<HostId, Vec<CommandId>> = BTreeMap::new();
        self.fleet.read(|state| {
            let mut kept: BTreeMap<HostId, Vec<(Timestamp, CommandId)>> = BTreeMap::new();
            for command in state.commands() {
                if verdict(state, command, now).is_some() {
                    due.entry(command.host).or_default().push(command.id);
                } else if let Some(at) = command.finished_at {
                    kept.entry(command.host).or_default().push((at, command.id));
                }
            }
            for (host, mut ended) in kept {
                if ended.len() > MOST_ENDED {
                    ended.sort_unstable();
                    let excess = ended.len() - MOST_ENDED;
                    let oldest = ended.into_iter().take(excess).map(|(_, id)| id);
                    due.entry(host).or_default().extend(oldest);
                }
            }
        });
        let mut changed = 0;
        for (host, ids) in due {
            for some in ids.chunks(MOST_AT_ONCE) {
                let some = some.to_vec();
                changed += self
                    .writer
                    .change(host, move |state, draft| {
                        let mut changed = 0;
                        for id in &some {
                            if let Some(command) = state.command(*id) {
                                changed += usize::from(dispose(state, command, now, draft));
                            }
                        }
                        Ok(changed)
                    })
                    .await?;
            }
        }
        Ok(changed)
    }
}

/// A command goes to its host as one message of at most 1 MiB; one that does not fit would end each
/// of the host's links.
fn fits(action: &CommandAction) -> Result<()> {
    let tags = |tags: &BTreeMap<String, String>| -> usize {
        tags.iter()
            .map(|(key, value)| key.len() + value.len() + 16)
            .sum()
    };
    let texts = |texts: &[String]| -> usize { texts.iter().map(|text| text.len() + 8).sum() };
    let bytes = match action {
        CommandAction::CreateVm(create) => {
            create.user_data.len()
                + create.name.len()
                + create.image.len()
                + create.user.len()
                + texts(&create.networks)
                + texts(&create.ssh_authorized_keys)
                + tags(&create.tags)
        }
        CommandAction::UpdateVm {
            vm,
            set_tags,
            remove_tags,
            ..
        } => vm.len() + tags(set_tags) + texts(remove_tags),
        CommandAction::StartVm { vm }
        | CommandAction::StopVm { vm, .. }
        | CommandAction::RestartVm { vm, .. }
        | CommandAction::PauseVm { vm }
        | CommandAction::ResumeVm { vm }
        | CommandAction::DeleteVm { vm, .. } => vm.len(),
    };
    if bytes > MOST_BYTES {
        return Err(Error::new(
            ErrorCode::PayloadTooLarge,
            format!("a command of {bytes} bytes is too large"),
        )
        .because(format!("{MOST_BYTES} are the most")));
    }
    Ok(())
}

/// What time does to a command.
enum Verdict {
    Expire,
    Forget,
}

fn verdict(state: &FleetState, command: &QueuedCommand, now: Timestamp) -> Option<Verdict> {
    if state.host(command.host).is_none() {
        return Some(Verdict::Forget);
    }
    match command.status {
        CommandStatus::Queued if command.sent_at.is_none() && now > command.deadline => {
            Some(Verdict::Expire)
        }
        status if status.is_finished() => {
            let at = command.finished_at.unwrap_or(command.deadline);
            (now.since(at) > KEPT_FOR).then_some(Verdict::Forget)
        }
        _ => None,
    }
}

/// Carries a verdict out; one of those too many is forgotten, whatever its age.
fn dispose(
    state: &FleetState,
    command: &QueuedCommand,
    now: Timestamp,
    draft: &mut Draft<'_>,
) -> bool {
    match verdict(state, command, now) {
        Some(Verdict::Expire) => {
            draft.put_command(expired(command, now));
            true
        }
        None if !command.status.is_finished() => false,
        Some(Verdict::Forget) | None => {
            draft.delete(RecordKey::Command(command.host, command.id));
            true
        }
    }
}

/// Whether a status may come after another: what ended stays as it is.
fn follows(now: CommandStatus, next: CommandStatus) -> bool {
    match now {
        CommandStatus::Queued => next != CommandStatus::Queued,
        CommandStatus::Accepted => next.is_finished(),
        _ => false,
    }
}

fn expired(command: &QueuedCommand, now: Timestamp) -> QueuedCommand {
    ended(
        command,
        CommandStatus::Expired,
        ErrorCode::DeadlineExceeded,
        "its deadline passed while the host was away",
        now,
    )
}

/// A command that ended without its host.
fn ended(
    command: &QueuedCommand,
    status: CommandStatus,
    code: ErrorCode,
    message: &str,
    now: Timestamp,
) -> QueuedCommand {
    QueuedCommand {
        status,
        outcome: Some(CommandOutcome {
            id: command.id,
            generation: command.generation,
            status,
            operation: None,
            code: Some(code),
            message: message.into(),
            at: now,
        }),
        finished_at: Some(now),
        ..command.clone()
    }
}

fn reused(request: &RequestId) -> Error {
    Error::new(
        ErrorCode::RequestIdReused,
        format!(
            "the request id {:?} was used for something else",
            request.as_str()
        ),
    )
    .hint("make a new one for each thing to do")
}

/// Whether a host takes commands at all.
fn admits(state: &FleetState, record: &HostRecord) -> Result<()> {
    match &record.life {
        HostLife::Active => {}
        HostLife::Locked { reason, .. } => {
            return Err(Error::new(
                ErrorCode::HostLocked,
                format!("the host {} is locked", record.name),
            )
            .because(reason)
            .hint(format!(
                "once you know which machine is the right one: ghostctl host unlock {}",
                record.name
            )));
        }
        HostLife::Revoked { .. } => {
            return Err(Error::new(
                ErrorCode::HostNotFound,
                format!("the host {} was removed", record.name),
            ));
        }
    }
    if record.permissions < CorePermissions::Operate {
        return Err(Error::new(
            ErrorCode::CorePermissionDenied,
            format!("the owner of {} lets Core only look", record.name),
        )
        .because(format!("core.permissions is {} there", record.permissions)));
    }
    if state.open_commands(record.id).count() >= MOST_OPEN {
        return Err(Error::new(
            ErrorCode::TooManyRequests,
            format!("{MOST_OPEN} commands wait for {} already", record.name),
        )
        .hint("wait for the host, or cancel some of them")
        .retry_after(Duration::from_secs(30)));
    }
    Ok(())
}
