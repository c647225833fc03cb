//! The stored form of an operation with its journal.

use std::path::PathBuf;
use std::time::Duration;

use ghost_domain::{
    ByteSize, Error, ErrorCode, ImageName, JournalEntry, JournalEvent, Operation, OperationId,
    OperationKind, OperationStatus, RequestId, Result, Timestamp, VmChange, VmId,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::TryFromRow;
use super::vm::{AutostartRow, RestartPolicyRow};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OperationRow {
    id: Uuid,
    kind: KindRow,
    vm: Option<Uuid>,
    subject: String,
    request_id: Option<String>,
    request_hash: u64,
    requested_by: String,
    /// Since hosts can join a fleet; not written where it is false, as for a VM's owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    through_core: bool,
    status: StatusRow,
    error: Option<ErrorRow>,
    created_at: i64,
    finished_at: Option<i64>,
    deadline: i64,
    cancel_requested: bool,
    journal: Vec<JournalRow>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum KindRow {
    CreateVm {
        start: bool,
    },
    StartVm,
    StopVm {
        force: bool,
        timeout: Option<Duration>,
    },
    RestartVm {
        force: bool,
        timeout: Option<Duration>,
    },
    PauseVm,
    ResumeVm,
    DeleteVm {
        force: bool,
    },
    UpdateVm {
        change: ChangeRow,
    },
    PullImage {
        name: String,
        url: Option<String>,
        checksum: Option<String>,
    },
    ImportImage {
        name: String,
        staged: PathBuf,
        file_name: String,
    },
    DeleteImage {
        name: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChangeRow {
    vcpus: Option<u32>,
    memory: Option<u64>,
    delete_protection: Option<bool>,
    #[serde(default)]
    guest_access: Option<bool>,
    autostart: AutostartChangeRow,
    restart_policy: Option<RestartPolicyRow>,
    tags: Vec<(String, Option<String>)>,
}

/// `Option<Option<_>>` in words: CBOR has one null only, so that `Some(None)` would come back as
/// `None`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AutostartChangeRow {
    Keep,
    Off,
    On(AutostartRow),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StatusRow {
    Pending,
    Running,
    Succeeded,
    Failed,
    Cancelled,
    RolledBack,
    NeedsAttention,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ErrorRow {
    code: String,
    message: String,
    cause: Option<String>,
    hint: Option<String>,
    retry_after: Option<Duration>,
    violations: Vec<(String, String)>,
    operation: Option<Uuid>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JournalRow {
    step: String,
    event: EventRow,
    at: i64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EventRow {
    Started,
    Done,
    Failed,
    UndoStarted,
    Undone,
    UndoFailed,
}

impl From<&Operation> for OperationRow {
    fn from(operation: &Operation) -> Self {
        let Operation {
            id,
            kind,
            vm,
            subject,
            request_id,
            request_hash,
            requested_by,
            through_core,
            status,
            error,
            created_at,
            finished_at,
            deadline,
            cancel_requested,
            journal,
        } = operation;
        Self {
            id: id.uuid(),
            kind: kind.into(),
            vm: vm.map(VmId::uuid),
            subject: subject.clone(),
            request_id: request_id.as_ref().map(|id| id.as_str().to_owned()),
            request_hash: *request_hash,
            requested_by: requested_by.clone(),
            through_core: *through_core,
            status: match status {
                OperationStatus::Pending => StatusRow::Pending,
                OperationStatus::Running => StatusRow::Running,
                OperationStatus::Succeeded => StatusRow::Succeeded,
                OperationStatus::Failed => StatusRow::Failed,
                OperationStatus::Cancelled => StatusRow::Cancelled,
                OperationStatus::RolledBack => StatusRow::RolledBack,
                OperationStatus::NeedsAttention => StatusRow::NeedsAttention,
            },
            error: error.as_ref().map(Into::into),
            created_at: created_at.unix_millis(),
            finished_at: finished_at.map(Timestamp::unix_millis),
            deadline: deadline.unix_millis(),
            cancel_requested: *cancel_requested,
            journal: journal
                .iter()
                .map(|JournalEntry { step, event, at }| JournalRow {
                    step: step.clone(),
                    event: match event {
                        JournalEvent::Started => EventRow::Started,
                        JournalEvent::Done => EventRow::Done,
                        JournalEvent::Failed => EventRow::Failed,
                        JournalEvent::UndoStarted => EventRow::UndoStarted,
                        JournalEvent::Undone => EventRow::Undone,
                        JournalEvent::UndoFailed => EventRow::UndoFailed,
                    },
                    at: at.unix_millis(),
                })
                .collect(),
        }
    }
}

impl TryFromRow<OperationRow> for Operation {
    fn try_from_row(row: OperationRow) -> Result<Self> {
        Ok(Self {
            id: OperationId::from_uuid(row.id),
            kind: OperationKind::try_from_row(row.kind)?,
            vm: row.vm.map(VmId::from_uuid),
            subject: row.subject,
            request_id: row.request_id.map(RequestId::new).transpose()?,
            request_hash: row.request_hash,
            requested_by: row.requested_by,
            through_core: row.through_core,
            status: match row.status {
                StatusRow::Pending => OperationStatus::Pending,
                StatusRow::Running => OperationStatus::Running,
                StatusRow::Succeeded => OperationStatus::Succeeded,
                StatusRow::Failed => OperationStatus::Failed,
                StatusRow::Cancelled => OperationStatus::Cancelled,
                StatusRow::RolledBack => OperationStatus::RolledBack,
                StatusRow::NeedsAttention => OperationStatus::NeedsAttention,
            },
            error: row.error.map(Error::try_from_row).transpose()?,
            created_at: Timestamp::from_unix_millis(row.created_at),
            finished_at: row.finished_at.map(Timestamp::from_unix_millis),
            deadline: Timestamp::from_unix_millis(row.deadline),
            cancel_requested: row.cancel_requested,
            journal: row
                .journal
                .into_iter()
                .map(|row| JournalEntry {
                    step: row.step,
                    event: match row.event {
                        EventRow::Started => JournalEvent::Started,
                        EventRow::Done => JournalEvent::Done,
                        EventRow::Failed => JournalEvent::Failed,
                        EventRow::UndoStarted => JournalEvent::UndoStarted,
                        EventRow::Undone => JournalEvent::Undone,
                        EventRow::UndoFailed => JournalEvent::UndoFailed,
                    },
                    at: Timestamp::from_unix_millis(row.at),
                })
                .collect(),
        })
    }
}

impl From<&OperationKind> for KindRow {
    fn from(kind: &OperationKind) -> Self {
        match kind {
            OperationKind::CreateVm { start } => Self::CreateVm { start: *start },
            OperationKind::StartVm => Self::StartVm,
            OperationKind::StopVm { force, timeout } => Self::StopVm {
                force: *force,
                timeout: *timeout,
            },
            OperationKind::RestartVm { force, timeout } => Self::RestartVm {
                force: *force,
                timeout: *timeout,
            },
            OperationKind::PauseVm => Self::PauseVm,
            OperationKind::ResumeVm => Self::ResumeVm,
            OperationKind::DeleteVm { force } => Self::DeleteVm { force: *force },
            OperationKind::UpdateVm { change } => Self::UpdateVm {
                change: change.into(),
            },
            OperationKind::PullImage {
                name,
                url,
                checksum,
            } => Self::PullImage {
                name: name.as_str().to_owned(),
                url: url.clone(),
                checksum: checksum.as_ref().map(ToString::to_string),
            },
            OperationKind::ImportImage {
                name,
                staged,
                file_name,
            } => Self::ImportImage {
                name: name.as_str().to_owned(),
                staged: staged.clone(),
                file_name: file_name.clone(),
            },
            OperationKind::DeleteImage { name } => Self::DeleteImage {
                name: name.as_str().to_owned(),
            },
        }
    }
}

impl TryFromRow<KindRow> for OperationKind {
    fn try_from_row(row: KindRow) -> Result<Self> {
        Ok(match row {
            KindRow::CreateVm { start } => Self::CreateVm { start },
            KindRow::StartVm => Self::StartVm,
            KindRow::StopVm { force, timeout } => Self::StopVm { force, timeout },
            KindRow::RestartVm { force, timeout } => Self::RestartVm { force, timeout },
            KindRow::PauseVm => Self::PauseVm,
            KindRow::ResumeVm => Self::ResumeVm,
            KindRow::DeleteVm { force } => Self::DeleteVm { force },
            KindRow::UpdateVm { change } => Self::UpdateVm {
                change: change.into(),
            },
            KindRow::PullImage {
                name,
                url,
                checksum,
            } => Self::PullImage {
                name: ImageName::new(name)?,
                url,
                checksum: checksum.map(|text| text.parse()).transpose()?,
            },
            KindRow::ImportImage {
                name,
                staged,
                file_name,
            } => Self::ImportImage {
                name: ImageName::new(name)?,
                staged,
                file_name,
            },
            KindRow::DeleteImage { name } => Self::DeleteImage {
                name: ImageName::new(name)?,
            },
        })
    }
}

impl From<&VmChange> for ChangeRow {
    fn from(change: &VmChange) -> Self {
        let VmChange {
            vcpus,
            memory,
            delete_protection,
            guest_access,
            autostart,
            restart_policy,
            tags,
        } = change;
        Self {
            vcpus: *vcpus,
            memory: memory.map(ByteSize::bytes),
            delete_protection: *delete_protection,
            guest_access: *guest_access,
            autostart: match autostart {
                None => AutostartChangeRow::Keep,
                Some(None) => AutostartChangeRow::Off,
                Some(Some(autostart)) => AutostartChangeRow::On((*autostart).into()),
            },
            restart_policy: restart_policy.map(Into::into),
            tags: tags.clone(),
        }
    }
}

impl From<ChangeRow> for VmChange {
    fn from(row: ChangeRow) -> Self {
        Self {
            vcpus: row.vcpus,
            memory: row.memory.map(ByteSize::from_bytes),
            delete_protection: row.delete_protection,
            guest_access: row.guest_access,
            autostart: match row.autostart {
                AutostartChangeRow::Keep => None,
                AutostartChangeRow::Off => Some(None),
                AutostartChangeRow::On(row) => Some(Some(row.into())),
            },
            restart_policy: row.restart_policy.map(Into::into),
            tags: row.tags,
        }
    }
}

impl From<&Error> for ErrorRow {
    fn from(error: &Error) -> Self {
        Self {
            code: error.code().as_str().to_owned(),
            message: error.message().to_owned(),
            cause: error.cause().map(str::to_owned),
            hint: error.hint_text().map(str::to_owned),
            retry_after: error.retry_delay(),
            violations: error
                .violations()
                .iter()
                .map(|violation| (violation.field.clone(), violation.description.clone()))
                .collect(),
            operation: error.operation().map(OperationId::uuid),
        }
    }
}

impl TryFromRow<ErrorRow> for Error {
    fn try_from_row(row: ErrorRow) -> Result<Self> {
        let code = ErrorCode::parse(&row.code).ok_or_else(|| {
            Self::new(
                ErrorCode::InvalidArgument,
                format!("{:?} is not an error code of this version", row.code),
            )
        })?;
        let mut error = Self::new(code, row.message);
        if let Some(cause) = row.cause {
            error = error.because(cause);
        }
        if let Some(hint) = row.hint {
            error = error.hint(hint);
        }
        if let Some(delay) = row.retry_after {
            error = error.retry_after(delay);
        }
        for (field, description) in row.violations {
            error = error.field(field, description);
        }
        if let Some(operation) = row.operation {
            error = error.of_operation(OperationId::from_uuid(operation));
        }
        Ok(error)
    }
}
