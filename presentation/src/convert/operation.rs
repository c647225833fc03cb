//! Operations.

use ghost_application::OperationView;
use ghost_domain::{OperationStatus, Progress};
use ghost_proto::agent::v1 as message;

use super::{duration, timestamp};

/// An operation as a message.
pub fn operation(view: &OperationView) -> message::Operation {
    let operation = &view.operation;
    message::Operation {
        id: operation.id.to_string(),
        kind: operation.kind.name().to_owned(),
        vm: operation.vm.map(|vm| vm.to_string()).unwrap_or_default(),
        subject: operation.subject.clone(),
        status: status(operation.status).into(),
        phase: view.progress.phase.clone(),
        progress: progress(&view.progress),
        waiting_for: view.progress.waiting_for.clone().unwrap_or_default(),
        error: operation
            .error
            .as_ref()
            .map(|error| message::OperationError {
                code: error.code().as_str().to_owned(),
                message: error.message().to_owned(),
                cause: error.cause().unwrap_or_default().to_owned(),
                hint: error.hint_text().unwrap_or_default().to_owned(),
            }),
        request_id: operation
            .request_id
            .as_ref()
            .map(|id| id.as_str().to_owned())
            .unwrap_or_default(),
        requested_by: operation.requested_by.clone(),
        created_at: Some(timestamp(operation.created_at)),
        finished_at: operation.finished_at.map(timestamp),
        deadline: Some(timestamp(operation.deadline)),
    }
}

const fn status(status: OperationStatus) -> message::OperationStatus {
    match status {
        OperationStatus::Pending => message::OperationStatus::Pending,
        OperationStatus::Running => message::OperationStatus::Running,
        OperationStatus::Succeeded => message::OperationStatus::Succeeded,
        OperationStatus::Failed => message::OperationStatus::Failed,
        OperationStatus::Cancelled => message::OperationStatus::Cancelled,
        OperationStatus::RolledBack => message::OperationStatus::RolledBack,
        OperationStatus::NeedsAttention => message::OperationStatus::NeedsAttention,
    }
}

/// Only where bytes are counted: a bar of nothing would say something false.
fn progress(progress: &Progress) -> Option<message::Progress> {
    if progress.bytes_done == 0 && progress.bytes_total.is_none() {
        return None;
    }
    Some(message::Progress {
        bytes_done: progress.bytes_done,
        bytes_total: progress.bytes_total.unwrap_or(0),
        bytes_per_second: progress.bytes_per_second.unwrap_or(0),
        remaining: progress.remaining().map(duration),
    })
}
