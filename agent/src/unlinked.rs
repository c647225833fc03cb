//! No way into guests: every guest is unreachable, and says why. Stands in until the links are
//! composed.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::guest::{
    AuditEntry, AuditRecord, AuditVerdict, DirectoryMake, ExecRequest, FileWrite, FreezeOutcome,
    GuestDirectory, GuestFile, GuestLinkStatus, GuestRequest,
};
use ghost_domain::ports::{
    AuditLog, ExecSession, GuestEvent, GuestEvents, GuestFileReader, GuestFileWriter, GuestLinks,
    GuestProgramFile,
};
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};

/// See the module's documentation.
pub(crate) struct Unlinked;

fn unreachable<T>() -> Result<T> {
    Err(Error::new(
        ErrorCode::GuestUnreachable,
        "this build of the agent has no way into guests",
    ))
}

struct Silence;

#[async_trait]
impl GuestEvents for Silence {
    async fn next(&mut self) -> Option<GuestEvent> {
        None
    }
}

#[async_trait]
impl GuestLinks for Unlinked {
    fn attach(&self, _: VmId, _: &Path) {}
    fn detach(&self, _: VmId, _: &str) {}
    fn status(&self, _: VmId) -> GuestLinkStatus {
        GuestLinkStatus::default()
    }
    fn subscribe(&self) -> Box<dyn GuestEvents> {
        Box::new(Silence)
    }
    fn lock_down(&self, _: bool) -> u32 {
        0
    }
    fn cut(&self, _: VmId, _: &str) -> u32 {
        0
    }
    async fn ping(&self, _: VmId) -> Result<Duration> {
        unreachable()
    }
    async fn execute(&self, _: VmId, _: ExecRequest) -> Result<ExecSession> {
        unreachable()
    }
    async fn stat(&self, _: VmId, _: &str, _: bool) -> Result<GuestFile> {
        unreachable()
    }
    async fn list(&self, _: VmId, _: &str, _: &str, _: u32) -> Result<GuestDirectory> {
        unreachable()
    }
    async fn make_directory(&self, _: VmId, _: DirectoryMake) -> Result<()> {
        unreachable()
    }
    async fn read_file(
        &self,
        _: VmId,
        _: &str,
        _: u64,
        _: Option<u64>,
    ) -> Result<(GuestFile, Box<dyn GuestFileReader>)> {
        unreachable()
    }
    async fn write_file(&self, _: VmId, _: FileWrite) -> Result<Box<dyn GuestFileWriter>> {
        unreachable()
    }
    async fn request(&self, _: VmId, _: GuestRequest) -> Result<()> {
        unreachable()
    }
    async fn freeze(&self, _: VmId, _: Duration, _: Vec<String>) -> Result<FreezeOutcome> {
        unreachable()
    }
    async fn thaw(&self, _: VmId) -> Result<FreezeOutcome> {
        unreachable()
    }
    async fn update(&self, _: VmId) -> Result<()> {
        unreachable()
    }
    fn program(&self) -> Option<GuestProgramFile> {
        None
    }
}

#[async_trait]
impl AuditLog for Unlinked {
    async fn append(&self, _: AuditRecord) -> Result<AuditEntry> {
        unreachable()
    }
    async fn list(
        &self,
        _: Option<VmId>,
        _: Option<Timestamp>,
        _: usize,
    ) -> Result<Vec<AuditEntry>> {
        unreachable()
    }
    async fn verify(&self) -> Result<AuditVerdict> {
        unreachable()
    }
}
