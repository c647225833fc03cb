//! A guest that runs a few made-up programs and keeps files in memory, and an audit log in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::guest::{
    AuditEntry, AuditRecord, AuditVerdict, DirectoryMake, ExecExit, ExecRequest, FileSum,
    FileWrite, FreezeOutcome, GuestDirectory, GuestFile, GuestFileKind, GuestHello,
    GuestLinkStatus, GuestProgram, GuestRequest, LinkMake,
};
use ghost_domain::ports::{
    AuditLog, AuditReceipt, ExecEvent, ExecInput, ExecOutput, ExecSession, GuestEvent, GuestEvents,
    GuestFileReader, GuestFileWriter, GuestLinks, GuestProgramFile,
};
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;
use twox_hash::XxHash64;

/// What a name of a file holds that would break a header or a terminal.
pub(crate) const HOSTILE: &str = "a\r\nSet-Cookie: x=1\u{1b}[2J";

pub(crate) fn sum_of(data: &[u8]) -> FileSum {
    FileSum {
        size: data.len() as u64,
        checksum: XxHash64::oneshot(0, data).to_be_bytes(),
    }
}

/// What tests turn and look at.
pub(crate) struct Guest {
    pub(crate) away: AtomicBool,
    pub(crate) sessions: AtomicU32,
    pub(crate) cancelled: AtomicUsize,
    /// Pieces of `flood` that were taken.
    pub(crate) flooded: AtomicUsize,
    pub(crate) ran: Mutex<Vec<ExecRequest>>,
    pub(crate) controls: Mutex<Vec<String>>,
    pub(crate) requests: Mutex<Vec<GuestRequest>>,
    pub(crate) files: Mutex<BTreeMap<String, (FileWrite, Vec<u8>)>>,
    /// What an upload that broke off left.
    pub(crate) left: Mutex<Vec<u8>>,
    /// Reading breaks off after so many bytes.
    pub(crate) breaks_after: AtomicUsize,
    pub(crate) audit: Mutex<Vec<AuditRecord>>,
    closed: Mutex<CancellationToken>,
    events: broadcast::Sender<GuestEvent>,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            away: AtomicBool::new(false),
            sessions: AtomicU32::new(0),
            cancelled: AtomicUsize::new(0),
            flooded: AtomicUsize::new(0),
            ran: Mutex::default(),
            controls: Mutex::default(),
            requests: Mutex::default(),
            files: Mutex::default(),
            left: Mutex::default(),
            breaks_after: AtomicUsize::new(usize::MAX),
            audit: Mutex::default(),
            closed: Mutex::default(),
            events: broadcast::channel(64).0,
        }
    }
}

impl Guest {
    pub(crate) fn tell(&self, event: GuestEvent) {
        self.events.send(event).unwrap();
    }

    pub(crate) fn put(&self, path: &str, data: &[u8]) {
        let file = FileWrite {
            path: path.into(),
            size: data.len() as u64,
            mode: 0o640,
            owner: Some((7, 8)),
            modified_at: Some(Timestamp::from_unix_millis(1_700_000_000_000)),
            checksum: None,
            resume: false,
            make_parents: false,
            no_replace: false,
        };
        let mut files = self.files.lock().unwrap();
        files.insert(path.into(), (file, data.to_vec()));
    }

    pub(crate) fn content(&self, path: &str) -> Option<Vec<u8>> {
        let files = self.files.lock().unwrap();
        files.get(path).map(|(_, data)| data.clone())
    }

    fn look(&self, path: &str) -> Result<(GuestFile, Vec<u8>)> {
        let files = self.files.lock().unwrap();
        let (file, data) = files
            .get(path)
            .ok_or_else(|| Error::new(ErrorCode::GuestFileNotFound, "there is no such file"))?;
        let (uid, gid) = file.owner.unwrap_or_default();
        let found = GuestFile {
            kind: GuestFileKind::File,
            size: data.len() as u64,
            mode: file.mode,
            uid,
            gid,
            modified_at: file.modified_at,
            symlink_target: None,
        };
        Ok((found, data.clone()))
    }
}

pub(crate) fn hello() -> GuestHello {
    GuestHello {
        agent_version: "1.2.3".into(),
        protocol_version: 1,
        capabilities: vec!["exec".into(), "files".into()],
        operating_system: "Debian".into(),
        kernel: "6.1".into(),
        hostname: "web".into(),
        ..GuestHello::default()
    }
}

/// The links to the one guest.
pub(crate) struct FakeLinks(pub(crate) Arc<Guest>);

struct Told(broadcast::Receiver<GuestEvent>);

#[async_trait]
impl GuestEvents for Told {
    async fn next(&mut self) -> Option<GuestEvent> {
        self.0.recv().await.ok()
    }
}

/// A program that runs.
struct Program {
    guest: Arc<Guest>,
    events: mpsc::Receiver<ExecEvent>,
    closed: CancellationToken,
    flood: bool,
    ended: bool,
}

#[async_trait]
impl ExecOutput for Program {
    async fn next(&mut self) -> Result<ExecEvent> {
        let cut = || Error::new(ErrorCode::Lockdown, "all sessions were cut");
        if self.closed.is_cancelled() {
            return Err(cut());
        }
        if self.flood {
            // Never pauses: only its reader can hold it up.
            tokio::task::yield_now().await;
            self.guest.flooded.fetch_add(1, Ordering::SeqCst);
            return Ok(ExecEvent::Stdout(vec![b'x'; 64 * 1024]));
        }
        tokio::select! {
            event = self.events.recv() => {
                let event = event.ok_or_else(|| Error::internal("read past the exit"))?;
                self.ended |= matches!(event, ExecEvent::Exited(_));
                Ok(event)
            }
            () = self.closed.cancelled() => Err(cut()),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.guest.sessions.fetch_sub(1, Ordering::SeqCst);
        if !self.ended {
            self.guest.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

struct Stdin {
    guest: Arc<Guest>,
    to: mpsc::Sender<ExecEvent>,
    echo: bool,
    deaf: bool,
}

pub(crate) fn exited(code: u8) -> ExecEvent {
    ExecEvent::Exited(ExecExit {
        code,
        signal: None,
        timed_out: false,
        cancelled: false,
        truncated_bytes: 0,
    })
}

#[async_trait]
impl ExecInput for Stdin {
    async fn write(&self, data: Vec<u8>) -> Result<()> {
        if self.deaf {
            std::future::pending::<()>().await;
        }
        if self.echo {
            drop(self.to.send(ExecEvent::Stdout(data)).await);
        }
        Ok(())
    }

    async fn end(&self) -> Result<()> {
        drop(self.to.send(exited(0)).await);
        Ok(())
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let mut controls = self.guest.controls.lock().unwrap();
        controls.push(format!("resize {rows} {columns}"));
        Ok(())
    }

    async fn signal(&self, number: u8) -> Result<()> {
        let text = format!("signal {number}");
        self.guest.controls.lock().unwrap().push(text);
        let exit = ExecExit {
            code: 0,
            signal: Some(number),
            timed_out: false,
            cancelled: false,
            truncated_bytes: 0,
        };
        drop(self.to.send(ExecEvent::Exited(exit)).await);
        Ok(())
    }
}

struct Reader {
    data: Vec<u8>,
    at: usize,
    breaks_after: usize,
}

#[async_trait]
impl GuestFileReader for Reader {
    async fn read(&mut self) -> Result<Vec<u8>> {
        if self.at >= self.breaks_after {
            return Err(Error::new(
                ErrorCode::GuestUnreachable,
                "the agent went away",
            ));
        }
        // Larger than a piece of ours: whoever passes it on cuts it.
        let end = self.data.len().min(self.at + 300 * 1024);
        let piece = self.data[self.at..end].to_vec();
        self.at = end;
        Ok(piece)
    }

    fn sum(&self) -> Option<FileSum> {
        (self.at == self.data.len()).then(|| sum_of(&self.data))
    }
}

struct Writer {
    guest: Arc<Guest>,
    file: FileWrite,
    data: Vec<u8>,
    offset: u64,
    finished: bool,
}

#[async_trait]
impl GuestFileWriter for Writer {
    fn offset(&self) -> u64 {
        self.offset
    }

    async fn write(&mut self, data: Vec<u8>) -> Result<()> {
        self.data.extend(data);
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<FileSum> {
        let sum = sum_of(&self.data);
        if self
            .file
            .checksum
            .is_some_and(|wanted| wanted != sum.checksum)
        {
            return Err(Error::new(ErrorCode::ChecksumMismatch, "other bytes came"));
        }
        self.finished = true;
        let mut files = self.guest.files.lock().unwrap();
        files.insert(
            self.file.path.clone(),
            (self.file.clone(), std::mem::take(&mut self.data)),
        );
        Ok(sum)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            *self.guest.left.lock().unwrap() = std::mem::take(&mut self.data);
        }
    }
}

#[async_trait]
impl GuestLinks for FakeLinks {
    fn attach(&self, _: VmId, _: &Path) {}

    fn detach(&self, _: VmId, _: &str) {}

    fn status(&self, _: VmId) -> GuestLinkStatus {
        if self.0.away.load(Ordering::SeqCst) {
            return GuestLinkStatus {
                channel_error: Some("connection refused".into()),
                ..GuestLinkStatus::default()
            };
        }
        GuestLinkStatus {
            channel: true,
            hello: Some(hello()),
            connected_at: Some(Timestamp::from_unix_millis(1_700_000_000_000)),
            running_calls: self.0.sessions.load(Ordering::SeqCst),
            ..GuestLinkStatus::default()
        }
    }

    fn subscribe(&self) -> Box<dyn GuestEvents> {
        Box::new(Told(self.0.events.subscribe()))
    }

    fn lock_down(&self, closed: bool) -> u32 {
        let mut token = self.0.closed.lock().unwrap();
        if !closed {
            *token = CancellationToken::new();
            return 0;
        }
        token.cancel();
        self.0.sessions.load(Ordering::SeqCst)
    }

    fn cut(&self, _: VmId, _: &str) -> u32 {
        0
    }

    async fn ping(&self, _: VmId) -> Result<Duration> {
        Ok(Duration::from_micros(1500))
    }

    async fn execute(&self, _: VmId, request: ExecRequest) -> Result<ExecSession> {
        let guest = &self.0;
        let name = match &request.program {
            GuestProgram::LoginShell => "cat".to_owned(),
            GuestProgram::Command { program, .. } => program.clone(),
        };
        guest.ran.lock().unwrap().push(request);
        let (to, events) = mpsc::channel(64);
        let mut first = vec![ExecEvent::Started(4711)];
        match name.as_str() {
            "/nonexistent" => {
                return Err(Error::new(
                    ErrorCode::GuestFailed,
                    "the guest has no such program",
                ));
            }
            "true" => first.push(exited(0)),
            "false" => first.push(exited(1)),
            "/bin/sh" | "both" => first.extend([
                ExecEvent::Stdout(b"Linux web 6.1\n".to_vec()),
                ExecEvent::Stderr(b"oops\n".to_vec()),
                exited(3),
            ]),
            "binary" => first.extend([ExecEvent::Stdout(vec![0xff, 0, 0xfe]), exited(0)]),
            "large" => first.extend([
                ExecEvent::Stdout(vec![b'o'; 1 << 20]),
                ExecEvent::Stderr(vec![b'e'; 1 << 20]),
                ExecEvent::Stdout("é".repeat(1 << 19).into_bytes()),
                ExecEvent::Exited(ExecExit {
                    code: 0,
                    signal: None,
                    timed_out: true,
                    cancelled: false,
                    truncated_bytes: 5,
                }),
            ]),
            // `cat`, `sleep`, `deaf` and `flood` wait.
            _ => {}
        }
        for event in first {
            to.send(event).await.unwrap();
        }
        guest.sessions.fetch_add(1, Ordering::SeqCst);
        Ok(ExecSession {
            output: Box::new(Program {
                guest: Arc::clone(guest),
                events,
                closed: guest.closed.lock().unwrap().clone(),
                flood: name == "flood",
                ended: false,
            }),
            input: Box::new(Stdin {
                guest: Arc::clone(guest),
                to,
                echo: name == "cat",
                deaf: name == "deaf",
            }),
        })
    }

    async fn stat(&self, _: VmId, path: &str, _: bool) -> Result<GuestFile> {
        Ok(self.0.look(path)?.0)
    }

    async fn list(&self, _: VmId, _: &str, after: &str, limit: u32) -> Result<GuestDirectory> {
        let names = ["a", HOSTILE, "z"];
        let mut entries: Vec<_> = names
            .iter()
            .filter(|name| **name > after)
            .map(|name| {
                let file = GuestFile {
                    kind: GuestFileKind::Symlink,
                    size: 1,
                    mode: 0o777,
                    uid: 0,
                    gid: 0,
                    modified_at: None,
                    symlink_target: Some(HOSTILE.into()),
                };
                ((*name).to_owned(), file)
            })
            .collect();
        let more = entries.len() > limit as usize;
        entries.truncate(limit as usize);
        Ok(GuestDirectory { entries, more })
    }

    async fn make_directory(&self, _: VmId, directory: DirectoryMake) -> Result<()> {
        let text = format!("mkdir {} {:o}", directory.path, directory.mode);
        self.0.controls.lock().unwrap().push(text);
        Ok(())
    }

    async fn make_link(&self, _: VmId, link: LinkMake) -> Result<()> {
        let text = format!("link {} -> {}", link.path, link.target);
        self.0.controls.lock().unwrap().push(text);
        Ok(())
    }

    async fn read_file(
        &self,
        _: VmId,
        path: &str,
        offset: u64,
        length: Option<u64>,
    ) -> Result<(GuestFile, Box<dyn GuestFileReader>)> {
        let (file, data) = self.0.look(path)?;
        let from = data.len().min(usize::try_from(offset).unwrap());
        let most = length.map_or(usize::MAX, |length| usize::try_from(length).unwrap());
        let to = data.len().min(from.saturating_add(most));
        let reader = Reader {
            data: data[from..to].to_vec(),
            at: 0,
            breaks_after: self.0.breaks_after.load(Ordering::SeqCst),
        };
        Ok((file, Box::new(reader)))
    }

    async fn write_file(&self, _: VmId, file: FileWrite) -> Result<Box<dyn GuestFileWriter>> {
        if file.path.starts_with("/proc") {
            return Err(Error::new(
                ErrorCode::GuestPathDenied,
                "outside the guest's roots",
            ));
        }
        let data = if file.resume {
            std::mem::take(&mut *self.0.left.lock().unwrap())
        } else {
            Vec::new()
        };
        Ok(Box::new(Writer {
            guest: Arc::clone(&self.0),
            file,
            offset: data.len() as u64,
            data,
            finished: false,
        }))
    }

    async fn request(&self, _: VmId, request: GuestRequest) -> Result<()> {
        self.0.requests.lock().unwrap().push(request);
        Ok(())
    }

    async fn freeze(
        &self,
        _: VmId,
        timeout: Duration,
        mount_points: Vec<String>,
    ) -> Result<FreezeOutcome> {
        let text = format!("freeze {timeout:?} {mount_points:?}");
        self.0.controls.lock().unwrap().push(text);
        Ok(FreezeOutcome {
            count: 2,
            warnings: vec![HOSTILE.into()],
        })
    }

    async fn thaw(&self, _: VmId) -> Result<FreezeOutcome> {
        Ok(FreezeOutcome::default())
    }

    async fn update(&self, _: VmId) -> Result<()> {
        Ok(())
    }

    fn program(&self) -> Option<GuestProgramFile> {
        None
    }
}

/// An audit log in memory.
pub(crate) struct FakeAudit(pub(crate) Arc<Guest>);

fn entry(at: usize, record: &AuditRecord) -> AuditEntry {
    AuditEntry {
        sequence: at as u64 + 1,
        at: Timestamp::from_unix_millis(1_700_000_000_000),
        record: record.clone(),
        hash: [u8::try_from(at % 256).unwrap(); 32],
    }
}

#[async_trait]
impl AuditLog for FakeAudit {
    async fn append(&self, record: AuditRecord) -> Result<AuditEntry> {
        let mut records = self.0.audit.lock().unwrap();
        records.push(record);
        Ok(entry(records.len() - 1, records.last().unwrap()))
    }

    async fn begin(&self, record: AuditRecord) -> Result<AuditReceipt> {
        let entry = self.append(record).await?;
        Ok(Box::pin(async move { Ok(entry) }))
    }

    async fn list(
        &self,
        vm: Option<VmId>,
        _: Option<Timestamp>,
        limit: usize,
    ) -> Result<Vec<AuditEntry>> {
        let records = self.0.audit.lock().unwrap();
        let wanted = vm.map(|vm| vm.to_string());
        let mut found: Vec<_> = records
            .iter()
            .enumerate()
            .filter(|(_, record)| wanted.as_ref().is_none_or(|vm| *vm == record.vm_id))
            .map(|(at, record)| entry(at, record))
            .collect();
        let skip = found.len().saturating_sub(limit);
        Ok(found.split_off(skip))
    }

    async fn verify(&self) -> Result<AuditVerdict> {
        Ok(AuditVerdict {
            entries: 3,
            broken: Some((2, "the hash does not fit".into())),
            head: [0xab; 32],
        })
    }
}
