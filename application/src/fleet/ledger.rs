//! The ledger's arithmetic: pure functions from one [`FleetLedger`] to the next.

use ghost_domain::fleet::{CommandOutcome, CommandStatus, FleetCommand, FleetLedger, Verdict};
use ghost_domain::{
    CommandId, Error, ErrorCode, Operation, OperationId, OperationStatus, RequestId, Result,
    Timestamp,
};

use crate::guest::escape;
use ghost_domain::ports::Change;

/// The command that is being taken now. While it stands in the model, the operation that is
/// submitted with its request id brings its line in the ledger along, in the same commit: there is
/// no moment at which one is there without the other.
#[derive(Clone, Debug)]
pub(crate) struct Taking {
    pub(crate) request: RequestId,
    pub(crate) command: FleetCommand,
}

/// What has to be written for this ledger to become the next: nothing where they are the same.
pub(crate) fn changed(ledger: &FleetLedger, next: FleetLedger) -> Vec<Change> {
    if next == *ledger {
        Vec::new()
    } else {
        vec![Change::PutFleetLedger(next)]
    }
}

/// The request id of a command's operation.
pub(crate) fn request_of(id: CommandId) -> Result<RequestId> {
    RequestId::new(id.to_string())
}

impl Taking {
    /// The ledger with the command taken and its operation begun.
    ///
    /// # Errors
    /// `StaleCommand` where the ledger went on in between, `TooManyRequests` where it has no room.
    pub(crate) fn accepted(
        &self,
        ledger: &FleetLedger,
        operation: OperationId,
        now: Timestamp,
    ) -> Result<FleetLedger> {
        let outcome = CommandOutcome {
            operation: Some(operation),
            ..outcome(&self.command, CommandStatus::Accepted, now)
        };
        taken(ledger, &self.command, outcome)
    }
}

/// An outcome without operation, code or text.
pub(crate) fn outcome(
    command: &FleetCommand,
    status: CommandStatus,
    now: Timestamp,
) -> CommandOutcome {
    CommandOutcome {
        id: command.id,
        generation: command.generation,
        status,
        operation: None,
        code: None,
        message: String::new(),
        at: now,
    }
}

/// An outcome that says what went wrong.
pub(crate) fn failure(
    command: &FleetCommand,
    status: CommandStatus,
    error: &Error,
    now: Timestamp,
) -> CommandOutcome {
    CommandOutcome {
        code: Some(error.code()),
        message: message(error),
        ..outcome(command, status, now)
    }
}

/// Most bytes of a message: with [`FleetLedger::MOST_UNREPORTED`] of them the record still is one
/// that the store takes, whatever script they are written in.
const MOST_MESSAGE_BYTES: usize = 280;

/// An error as one bounded line: what, why, and what to do.
fn message(error: &Error) -> String {
    let mut text = error.to_string();
    if let Some(hint) = error.hint_text() {
        text = format!("{text}; {hint}");
    }
    let mut line = String::new();
    let escaped = escape(&text, 4 * MOST_MESSAGE_BYTES);
    for character in escaped.chars().take(FleetLedger::MOST_MESSAGE_CHARACTERS) {
        if line.len() + character.len_utf8() > MOST_MESSAGE_BYTES {
            break;
        }
        line.push(character);
    }
    line
}

/// The ledger with one more command taken. Room is made by forgetting the oldest outcomes that
/// will not change any more.
///
/// # Errors
/// `StaleCommand` where the ledger went on in between, `TooManyRequests` where it has no room.
pub(crate) fn taken(
    ledger: &FleetLedger,
    command: &FleetCommand,
    outcome: CommandOutcome,
) -> Result<FleetLedger> {
    match ledger.judge(command, outcome.at) {
        Verdict::Take | Verdict::Expired => {}
        Verdict::Known(_) => {
            return Err(Error::new(
                ErrorCode::StaleCommand,
                "the command was taken in the meantime",
            ));
        }
        Verdict::Stale(why) => {
            return Err(
                Error::new(ErrorCode::StaleCommand, "the command is out of date").because(why),
            );
        }
    }
    let mut next = ledger.clone();
    while next.unreported.len() >= FleetLedger::MOST_UNREPORTED {
        let oldest = next
            .unreported
            .iter()
            .position(|one| one.status.is_finished());
        match oldest {
            Some(at) => drop(next.unreported.remove(at)),
            None => {
                return Err(Error::new(
                    ErrorCode::TooManyRequests,
                    "too many commands of Core are under way",
                ));
            }
        }
    }
    next.epoch = next.epoch.max(command.epoch);
    next.generation = command.generation;
    next.unreported.push_back(outcome);
    Ok(next)
}

/// What an operation makes of its command's outcome.
pub(crate) fn settle(outcome: &mut CommandOutcome, operation: &Operation) {
    outcome.operation = Some(operation.id);
    outcome.status = match operation.status {
        OperationStatus::Pending | OperationStatus::Running => CommandStatus::Accepted,
        OperationStatus::Succeeded => CommandStatus::Succeeded,
        OperationStatus::Failed
        | OperationStatus::Cancelled
        | OperationStatus::RolledBack
        | OperationStatus::NeedsAttention => CommandStatus::Failed,
    };
    if let Some(at) = operation.finished_at {
        outcome.at = at;
    }
    if let Some(error) = operation
        .error
        .as_ref()
        .filter(|_| outcome.status.is_finished())
    {
        outcome.code = Some(error.code());
        outcome.message = message(error);
    }
}

/// The ledger after an operation has ended, where the operation is a command's.
pub(crate) fn ended(ledger: &FleetLedger, operation: &Operation) -> Option<FleetLedger> {
    let at = ledger.unreported.iter().position(|one| {
        one.operation == Some(operation.id) && one.status == CommandStatus::Accepted
    })?;
    let mut next = ledger.clone();
    settle(next.unreported.get_mut(at)?, operation);
    Some(next)
}

#[cfg(test)]
mod tests {
    use ghost_domain::Role;
    use ghost_domain::fleet::{CommandAction, FleetPrincipal};

    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    fn command(generation: u64) -> FleetCommand {
        FleetCommand {
            id: CommandId::random(),
            epoch: 1,
            generation,
            previous: generation - 1,
            deadline: at(1_000_000),
            issuer: FleetPrincipal {
                name: "acme/alice".into(),
                tenant: None,
                role: Role::Operator,
            },
            action: CommandAction::StartVm { vm: "web".into() },
        }
    }

    fn take(ledger: &FleetLedger, generation: u64, status: CommandStatus) -> Result<FleetLedger> {
        let command = command(generation);
        taken(ledger, &command, outcome(&command, status, at(1)))
    }

    #[test]
    fn the_ledger_stays_small_and_forgets_nothing_that_is_under_way() {
        let mut ledger = take(&FleetLedger::default(), 1, CommandStatus::Accepted).unwrap();
        for generation in 2..=500 {
            ledger = take(&ledger, generation, CommandStatus::Refused).unwrap();
            assert!(ledger.unreported.len() <= FleetLedger::MOST_UNREPORTED);
        }
        assert_eq!(ledger.generation, 500);
        assert_eq!(ledger.unreported[0].generation, 1);
        let mut busy = FleetLedger::default();
        for generation in 1..=FleetLedger::MOST_UNREPORTED as u64 {
            busy = take(&busy, generation, CommandStatus::Accepted).unwrap();
        }
        let next = busy.generation + 1;
        let full = take(&busy, next, CommandStatus::Accepted).unwrap_err();
        assert_eq!(full.code(), ErrorCode::TooManyRequests);
    }

    #[test]
    fn a_ledger_that_went_on_takes_nothing_twice() {
        let ledger = take(&FleetLedger::default(), 1, CommandStatus::Refused).unwrap();
        let again = take(&ledger, 1, CommandStatus::Accepted).unwrap_err();
        assert_eq!(again.code(), ErrorCode::StaleCommand);
        let early = take(&ledger, 3, CommandStatus::Accepted).unwrap_err();
        assert_eq!(early.code(), ErrorCode::StaleCommand);
    }

    #[test]
    fn what_is_told_is_one_bounded_line() {
        let error = Error::new(ErrorCode::VmNotFound, "no\nVM".repeat(200)).hint("look");
        let told = failure(&command(1), CommandStatus::Refused, &error, at(1));
        assert_eq!(
            told.message.chars().count(),
            FleetLedger::MOST_MESSAGE_CHARACTERS
        );
        assert!(!told.message.contains('\n'));
    }
}
