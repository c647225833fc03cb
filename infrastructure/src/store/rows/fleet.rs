//! The stored form of what was taken of Core's commands.

use ghost_domain::fleet::{CommandOutcome, CommandStatus, FleetLedger};
use ghost_domain::{CommandId, Error, ErrorCode, OperationId, Result, Timestamp};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::TryFromRow;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LedgerRow {
    core_id: String,
    epoch: u64,
    generation: u64,
    unreported: Vec<OutcomeRow>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OutcomeRow {
    id: Uuid,
    generation: u64,
    status: StatusRow,
    operation: Option<Uuid>,
    code: Option<String>,
    message: String,
    at: i64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StatusRow {
    Queued,
    Accepted,
    Succeeded,
    Failed,
    Refused,
    Expired,
    Cancelled,
}

impl From<&FleetLedger> for LedgerRow {
    fn from(ledger: &FleetLedger) -> Self {
        let FleetLedger {
            core_id,
            epoch,
            generation,
            unreported,
        } = ledger;
        Self {
            core_id: core_id.clone(),
            epoch: *epoch,
            generation: *generation,
            unreported: unreported.iter().map(OutcomeRow::from).collect(),
        }
    }
}

impl TryFromRow<LedgerRow> for FleetLedger {
    fn try_from_row(row: LedgerRow) -> Result<Self> {
        let LedgerRow {
            core_id,
            epoch,
            generation,
            unreported,
        } = row;
        Ok(Self {
            core_id,
            epoch,
            generation,
            unreported: unreported.into_iter().map(outcome).collect::<Result<_>>()?,
        })
    }
}

impl From<&CommandOutcome> for OutcomeRow {
    fn from(outcome: &CommandOutcome) -> Self {
        let CommandOutcome {
            id,
            generation,
            status,
            operation,
            code,
            message,
            at,
        } = outcome;
        Self {
            id: id.uuid(),
            generation: *generation,
            status: match status {
                CommandStatus::Queued => StatusRow::Queued,
                CommandStatus::Accepted => StatusRow::Accepted,
                CommandStatus::Succeeded => StatusRow::Succeeded,
                CommandStatus::Failed => StatusRow::Failed,
                CommandStatus::Refused => StatusRow::Refused,
                CommandStatus::Expired => StatusRow::Expired,
                CommandStatus::Cancelled => StatusRow::Cancelled,
            },
            operation: operation.map(OperationId::uuid),
            code: code.map(|code| code.as_str().to_owned()),
            message: message.clone(),
            at: at.unix_millis(),
        }
    }
}

fn outcome(row: OutcomeRow) -> Result<CommandOutcome> {
    let OutcomeRow {
        id,
        generation,
        status,
        operation,
        code,
        message,
        at,
    } = row;
    let code = code
        .map(|text| {
            ErrorCode::parse(&text).ok_or_else(|| {
                Error::new(
                    ErrorCode::InvalidArgument,
                    format!("{text:?} is not an error code of this version"),
                )
            })
        })
        .transpose()?;
    Ok(CommandOutcome {
        id: CommandId::from_uuid(id),
        generation,
        status: match status {
            StatusRow::Queued => CommandStatus::Queued,
            StatusRow::Accepted => CommandStatus::Accepted,
            StatusRow::Succeeded => CommandStatus::Succeeded,
            StatusRow::Failed => CommandStatus::Failed,
            StatusRow::Refused => CommandStatus::Refused,
            StatusRow::Expired => CommandStatus::Expired,
            StatusRow::Cancelled => CommandStatus::Cancelled,
        },
        operation: operation.map(OperationId::from_uuid),
        code,
        message,
        at: Timestamp::from_unix_millis(at),
    })
}
