//! A change that somebody asked for.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{filled, optional_seconds, optional_time, time_of};
use crate::agent::v1 as message;

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationStatus {
    /// Recorded, not begun.
    Pending,
    /// Its steps run, or are being undone.
    Running,
    /// Done.
    Succeeded,
    /// It failed, and all its steps were undone.
    Failed,
    /// It was cancelled, and all its steps were undone.
    Cancelled,
    /// The agent ended in the middle and undid it at the next start.
    RolledBack,
    /// It failed, and so did an undo: a person has to look.
    NeedsAttention,
}

impl OperationStatus {
    /// The status in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::RolledBack => "rolled_back",
            Self::NeedsAttention => "needs_attention",
        }
    }

    /// Whether it will not change any more.
    pub const fn is_finished(self) -> bool {
        !matches!(self, Self::Pending | Self::Running)
    }
}

impl fmt::Display for OperationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl From<message::OperationStatus> for OperationStatus {
    /// A status that this version does not know counts as running: nobody may take it for an end.
    fn from(status: message::OperationStatus) -> Self {
        match status {
            message::OperationStatus::Pending => Self::Pending,
            message::OperationStatus::Unspecified | message::OperationStatus::Running => {
                Self::Running
            }
            message::OperationStatus::Succeeded => Self::Succeeded,
            message::OperationStatus::Failed => Self::Failed,
            message::OperationStatus::Cancelled => Self::Cancelled,
            message::OperationStatus::RolledBack => Self::RolledBack,
            message::OperationStatus::NeedsAttention => Self::NeedsAttention,
        }
    }
}

/// How far the running step is, where bytes are what is counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Bytes done so far.
    pub bytes_done: u64,
    /// Bytes in all; null while that is unknown.
    pub bytes_total: Option<u64>,
    /// The rate over the last seconds; null before there is one.
    pub bytes_per_second: Option<u64>,
    /// The time left at that rate; null where it cannot be told.
    pub remaining_seconds: Option<f64>,
    /// From 0 to 1; null while `bytes_total` is.
    pub fraction: Option<f64>,
}

impl From<message::Progress> for Progress {
    #[expect(clippy::cast_precision_loss, reason = "a fraction for people")]
    fn from(progress: message::Progress) -> Self {
        let total = Some(progress.bytes_total).filter(|total| *total > 0);
        Self {
            bytes_done: progress.bytes_done,
            bytes_total: total,
            bytes_per_second: Some(progress.bytes_per_second).filter(|rate| *rate > 0),
            remaining_seconds: optional_seconds(progress.remaining.as_ref()),
            fraction: total.map(|total| (progress.bytes_done as f64 / total as f64).min(1.0)),
        }
    }
}

/// Why an operation failed: the same parts as an error of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationError {
    /// The stable code.
    pub code: String,
    /// What happened.
    pub message: String,
    /// Why, if that is known.
    pub cause: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
}

impl From<message::OperationError> for OperationError {
    fn from(error: message::OperationError) -> Self {
        Self {
            code: error.code,
            message: error.message,
            cause: filled(error.cause),
            hint: filled(error.hint),
        }
    }
}

/// A change that somebody asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// UUID.
    #[schema(format = Uuid)]
    pub id: String,
    /// What it does, such as `create_vm`.
    pub kind: String,
    /// The VM's id; null for an operation on an image.
    #[schema(format = Uuid)]
    pub vm: Option<String>,
    /// The name of the VM or image; stays when that is gone.
    pub subject: String,
    /// Where it stands.
    pub status: OperationStatus,
    /// What it is doing now, or did last.
    pub phase: Option<String>,
    /// How far that is; null where bytes are not what is counted.
    pub progress: Option<Progress>,
    /// What it waits for, such as `the guest to shut down`.
    pub waiting_for: Option<String>,
    /// Why it failed, was cancelled or needs attention.
    pub error: Option<OperationError>,
    /// The caller's idempotency key.
    pub request_id: Option<String>,
    /// Who asked.
    pub requested_by: Option<String>,
    /// When it was recorded, RFC 3339.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When it ended, RFC 3339; null while it has not.
    #[schema(format = DateTime)]
    pub finished_at: Option<String>,
    /// When it is given up and undone, RFC 3339.
    #[schema(format = DateTime)]
    pub deadline: Option<String>,
}

impl From<message::Operation> for Operation {
    fn from(operation: message::Operation) -> Self {
        Self {
            status: operation.status().into(),
            id: operation.id,
            kind: operation.kind,
            vm: filled(operation.vm),
            subject: operation.subject,
            phase: filled(operation.phase),
            progress: operation.progress.map(Progress::from),
            waiting_for: filled(operation.waiting_for),
            error: operation.error.map(OperationError::from),
            request_id: filled(operation.request_id),
            requested_by: filled(operation.requested_by),
            created_at: time_of(operation.created_at.as_ref()),
            finished_at: optional_time(operation.finished_at.as_ref()),
            deadline: optional_time(operation.deadline.as_ref()),
        }
    }
}
