//! Operations: every change that somebody asked for, with its journal.
//!
//! ```text
//! pending ──> running ──> succeeded
//!    │           │
//!    │           ├─ error or cancel ─> undo ─> failed | cancelled     (nothing is left behind)
//!    │           │                       └───> needs_attention        (an undo failed: what is left is named)
//!    │           └─ agent died ─> at start: resumed (running) or undone (rolled_back)
//!    └─ cancelled before its first step
//! ```

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::{
    ByteSize, Checksum, Error, ImageName, OperationId, RequestId, Timestamp, VmId,
    vm::{Autostart, RestartPolicy},
};

/// Where an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// A change to a VM's record; `None` leaves a field as it is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VmChange {
    /// New number of vCPUs; the VM must be stopped.
    pub vcpus: Option<u32>,
    /// New memory; the VM must be stopped.
    pub memory: Option<ByteSize>,
    /// Delete protection on or off.
    pub delete_protection: Option<bool>,
    /// Guest access on or off: a matter of the record alone, in force once it is asked for.
    pub guest_access: Option<bool>,
    /// Autostart: `Some(None)` switches it off.
    pub autostart: Option<Option<Autostart>>,
    /// What happens after a crash.
    pub restart_policy: Option<RestartPolicy>,
    /// Tags to set (value) or remove (`None`).
    pub tags: Vec<(String, Option<String>)>,
}

impl VmChange {
    /// Whether the domain in libvirt has to follow: guest access is none of its business.
    pub fn concerns_domain(&self) -> bool {
        let Self {
            vcpus,
            memory,
            delete_protection,
            guest_access: _,
            autostart,
            restart_policy,
            tags,
        } = self;
        vcpus.is_some()
            || memory.is_some()
            || delete_protection.is_some()
            || autostart.is_some()
            || restart_policy.is_some()
            || !tags.is_empty()
    }
}

/// What an operation does, with all it needs to be resumed. Kinds are only ever added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// Make the VM of this operation's record; `start` it then.
    CreateVm {
        /// Whether to start it.
        start: bool,
    },
    /// Start a VM.
    StartVm,
    /// Stop a VM.
    StopVm {
        /// Cut the power: at once, or after `timeout` where one is given.
        force: bool,
        /// How long the guest may take to follow the ACPI request.
        timeout: Option<Duration>,
    },
    /// Stop, then start.
    RestartVm {
        /// As in `StopVm`.
        force: bool,
        /// As in `StopVm`.
        timeout: Option<Duration>,
    },
    /// Halt the vCPUs, keep the memory.
    PauseVm,
    /// Let the vCPUs run on.
    ResumeVm,
    /// Remove a VM and its disks.
    DeleteVm {
        /// Cut the power first where it runs.
        force: bool,
    },
    /// Change a VM's record and domain.
    UpdateVm {
        /// What to change.
        change: VmChange,
    },
    /// Download an image.
    PullImage {
        /// The name it gets.
        name: ImageName,
        /// From where; `None` asks the catalogue.
        url: Option<String>,
        /// The expected checksum, needed with `url`.
        checksum: Option<Checksum>,
    },
    /// Take an uploaded file into the cache.
    ImportImage {
        /// The name it gets.
        name: ImageName,
        /// The file in the cache's staging folder, without its folder.
        staged: PathBuf,
        /// The name it had where it came from.
        file_name: String,
    },
    /// Remove an image.
    DeleteImage {
        /// Its name.
        name: ImageName,
    },
}

impl OperationKind {
    /// The stable name of the kind, in snake case.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::CreateVm { .. } => "create_vm",
            Self::StartVm => "start_vm",
            Self::StopVm { .. } => "stop_vm",
            Self::RestartVm { .. } => "restart_vm",
            Self::PauseVm => "pause_vm",
            Self::ResumeVm => "resume_vm",
            Self::DeleteVm { .. } => "delete_vm",
            Self::UpdateVm { .. } => "update_vm",
            Self::PullImage { .. } => "pull_image",
            Self::ImportImage { .. } => "import_image",
            Self::DeleteImage { .. } => "delete_image",
        }
    }
}

/// What the journal says of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalEvent {
    /// About to do it: from here on its effect may exist.
    Started,
    /// Done.
    Done,
    /// It failed; its effect may exist in part.
    Failed,
    /// About to undo it.
    UndoStarted,
    /// Undone.
    Undone,
    /// The undo failed.
    UndoFailed,
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    /// The step, by its stable name.
    pub step: String,
    /// What happened to it.
    pub event: JournalEvent,
    /// When.
    pub at: Timestamp,
}

/// How far the running step is. Lives in memory only; the journal is what is kept.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Progress {
    /// What is being done, such as `downloading`.
    pub phase: String,
    /// Bytes done so far, where bytes are what is counted.
    pub bytes_done: u64,
    /// Bytes in all, where that is known.
    pub bytes_total: Option<u64>,
    /// Bytes per second over the last seconds.
    pub bytes_per_second: Option<u64>,
    /// What is waited for, such as `the guest to shut down`.
    pub waiting_for: Option<String>,
}

impl Progress {
    /// A phase without a count.
    pub fn phase(phase: impl Into<String>) -> Self {
        Self {
            phase: phase.into(),
            ..Self::default()
        }
    }

    /// A phase that waits for something.
    pub fn waiting(phase: impl Into<String>, waiting_for: impl Into<String>) -> Self {
        Self {
            phase: phase.into(),
            waiting_for: Some(waiting_for.into()),
            ..Self::default()
        }
    }

    /// From 0 to 1, where the total is known.
    #[expect(clippy::cast_precision_loss, reason = "a fraction for people")]
    pub fn fraction(&self) -> Option<f64> {
        self.bytes_total
            .filter(|total| *total > 0)
            .map(|total| (self.bytes_done as f64 / total as f64).min(1.0))
    }

    /// The time left at the present rate.
    pub fn remaining(&self) -> Option<Duration> {
        let rate = self.bytes_per_second.filter(|rate| *rate > 0)?;
        Some(Duration::from_secs(
            self.bytes_total?.saturating_sub(self.bytes_done) / rate,
        ))
    }
}

/// One change that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// The VM it holds; one unfinished operation at a time per VM.
    pub vm: Option<VmId>,
    /// The name of the VM or image, for people; stays when the VM is gone.
    pub subject: String,
    /// The caller's idempotency key.
    pub request_id: Option<RequestId>,
    /// Hash of the request, to tell a retry from another request under the same key.
    pub request_hash: u64,
    /// Who asked.
    pub requested_by: String,
    /// Whether it was asked for through Ghost Core.
    pub through_core: bool,
    /// Where it stands.
    pub status: OperationStatus,
    /// Why it failed, was cancelled or needs attention.
    pub error: Option<Error>,
    /// When it was recorded.
    pub created_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// When it is given up and undone.
    pub deadline: Timestamp,
    /// Whether somebody asked to cancel it.
    pub cancel_requested: bool,
    /// What happened to its steps, oldest first.
    pub journal: Vec<JournalEntry>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_divides_by_zero() {
        let mut progress = Progress {
            bytes_done: 5,
            bytes_total: Some(0),
            bytes_per_second: Some(0),
            ..Progress::default()
        };
        assert_eq!(progress.fraction(), None);
        assert_eq!(progress.remaining(), None);
        progress.bytes_total = Some(10);
        progress.bytes_per_second = Some(1);
        assert_eq!(progress.fraction(), Some(0.5));
        assert_eq!(progress.remaining(), Some(Duration::from_secs(5)));
    }
}
