//! Guests of the fake world, and its audit log.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_application::guest::GuestOptions;
use ghost_domain::guest::{
    AuditEntry, AuditRecord, AuditVerdict, DirectoryMake, ExecExit, ExecRequest, FileSum,
    FileWrite, FreezeOutcome, GuestDirectory, GuestFile, GuestFileKind, GuestHello,
    GuestLinkStatus, GuestRequest, GuestTelemetry, LinkMake,
};
use ghost_domain::ports::{
    AuditLog, AuditReceipt, ExecEvent, ExecInput, ExecOutput, ExecSession, GuestEvent, GuestEvents,
    GuestFileReader, GuestFileWriter, GuestLinks, GuestProgramFile,
};
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};

/// What tests see and turn.
pub(crate) struct State {
    /// VMs that a link is kept to.
    pub(crate) attached: BTreeMap<VmId, std::path::PathBuf>,
    /// Connections without a word, one after the other, to every guest that has not greeted.
    pub(crate) mute: u32,
    /// Why the others were let go.
    pub(crate) detached: Vec<(VmId, String)>,
    /// Guests whose agent has greeted.
    pub(crate) greeted: BTreeMap<VmId, GuestHello>,
    /// All calls into guests, in order.
    pub(crate) calls: Vec<String>,
    /// Requests without an answer of their own fail with this.
    pub(crate) fails: Option<Error>,
    pub(crate) locked: bool,
    /// `lock` and `attach`, as they came.
    pub(crate) order: Vec<&'static str>,
    pub(crate) cuts: Vec<VmId>,
    pub(crate) audit: Vec<AuditRecord>,
    pub(crate) audit_full: bool,
    /// Lines come into the log, but not onto the disk.
    pub(crate) audit_unsynced: bool,
    pub(crate) program: Option<[u8; 32]>,
    /// How updates end, in order; then they succeed.
    pub(crate) updates: VecDeque<Error>,
    /// Updates take until this is false.
    pub(crate) hold_update: bool,
    pub(crate) options: GuestOptions,
    /// What programs do: events, then the end of the link, or nothing more.
    pub(crate) script: Vec<ExecEvent>,
    /// Programs end with an error rather than wait for ever.
    pub(crate) breaks: bool,
}

/// The guests. Cloning shares them.
#[derive(Clone)]
pub(crate) struct Guests {
    pub(crate) state: Arc<Mutex<State>>,
    events: broadcast::Sender<GuestEvent>,
    /// How often calls were cut.
    cut: watch::Sender<u64>,
}

impl Guests {
    pub(crate) fn new() -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                attached: BTreeMap::new(),
                mute: 0,
                detached: Vec::new(),
                greeted: BTreeMap::new(),
                calls: Vec::new(),
                fails: None,
                locked: false,
                order: Vec::new(),
                cuts: Vec::new(),
                audit: Vec::new(),
                audit_full: false,
                audit_unsynced: false,
                program: None,
                updates: VecDeque::new(),
                hold_update: false,
                options: GuestOptions::default(),
                script: vec![
                    ExecEvent::Started(1),
                    ExecEvent::Stdout(b"out".to_vec()),
                    ExecEvent::Stderr(b"error".to_vec()),
                    ExecEvent::Exited(exit(0)),
                ],
                breaks: false,
            })),
            events: broadcast::Sender::new(64),
            cut: watch::Sender::new(0),
        }
    }

    pub(crate) fn options(&self) -> GuestOptions {
        self.state.lock().options.clone()
    }

    /// The agent in a guest greets.
    pub(crate) fn greet(&self, vm: VmId, hello: GuestHello) {
        self.state.lock().greeted.insert(vm, hello.clone());
        drop(self.events.send(GuestEvent::Connected {
            vm,
            hello,
            rebooted: true,
        }));
    }

    /// The agent in a guest goes away.
    pub(crate) fn leave(&self, vm: VmId, reason: &str) {
        self.state.lock().greeted.remove(&vm);
        drop(self.events.send(GuestEvent::Disconnected {
            vm,
            reason: reason.to_owned(),
        }));
    }

    pub(crate) fn report(&self, vm: VmId, report: GuestTelemetry) {
        drop(self.events.send(GuestEvent::Telemetry {
            vm,
            report: Box::new(report),
        }));
    }

    pub(crate) fn misbehave(&self, vm: VmId, detail: &str) {
        drop(self.events.send(GuestEvent::Misbehaved {
            vm,
            detail: detail.to_owned(),
        }));
    }

    /// `action outcome` of each audit line.
    pub(crate) fn lines(&self) -> Vec<String> {
        let state = self.state.lock();
        state
            .audit
            .iter()
            .map(|record| format!("{} {}", record.action, record.outcome))
            .collect()
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.state.lock().calls.clone()
    }

    fn call<T>(&self, what: String, value: T) -> Result<T> {
        let mut state = self.state.lock();
        if state.locked {
            return Err(Error::new(ErrorCode::Lockdown, "locked down"));
        }
        state.calls.push(what);
        match &state.fails {
            Some(error) => Err(error.clone()),
            None => Ok(value),
        }
    }
}

pub(crate) fn exit(code: u8) -> ExecExit {
    ExecExit {
        code,
        signal: None,
        timed_out: false,
        cancelled: false,
        truncated_bytes: 0,
    }
}

pub(crate) fn hello(version: &str) -> GuestHello {
    GuestHello {
        agent_version: version.to_owned(),
        protocol_version: 1,
        capabilities: ["exec", "files", "clock", "update", "telemetry"]
            .map(str::to_owned)
            .to_vec(),
        boot_id: "boot".into(),
        operating_system: "Debian 12".into(),
        kernel: "6.1".into(),
        hostname: "web".into(),
        program_sha256: vec![1; 32],
    }
}

struct Events(broadcast::Receiver<GuestEvent>);

#[async_trait]
impl GuestEvents for Events {
    async fn next(&mut self) -> Option<GuestEvent> {
        loop {
            match self.0.recv().await {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

struct Output {
    script: VecDeque<ExecEvent>,
    breaks: bool,
    cut: watch::Receiver<u64>,
}

#[async_trait]
impl ExecOutput for Output {
    async fn next(&mut self) -> Result<ExecEvent> {
        tokio::task::yield_now().await;
        if let Some(event) = self.script.pop_front() {
            return Ok(event);
        }
        if !self.breaks {
            drop(self.cut.changed().await);
        }
        Err(Error::new(
            ErrorCode::GuestUnreachable,
            "the guest went away",
        ))
    }
}

struct Input;

#[async_trait]
impl ExecInput for Input {
    async fn write(&self, _: Vec<u8>) -> Result<()> {
        Ok(())
    }
    async fn end(&self) -> Result<()> {
        Ok(())
    }
    async fn resize(&self, _: u16, _: u16) -> Result<()> {
        Ok(())
    }
    async fn signal(&self, _: u8) -> Result<()> {
        Ok(())
    }
}

struct Reader(VecDeque<Vec<u8>>);

#[async_trait]
impl GuestFileReader for Reader {
    async fn read(&mut self) -> Result<Vec<u8>> {
        Ok(self.0.pop_front().unwrap_or_default())
    }
    fn sum(&self) -> Option<FileSum> {
        None
    }
}

struct Writer(u64);

#[async_trait]
impl GuestFileWriter for Writer {
    fn offset(&self) -> u64 {
        0
    }
    async fn write(&mut self, data: Vec<u8>) -> Result<()> {
        self.0 += data.len() as u64;
        Ok(())
    }
    async fn finish(self: Box<Self>) -> Result<FileSum> {
        Ok(FileSum {
            size: self.0,
            checksum: [0; 8],
        })
    }
}

fn file() -> GuestFile {
    GuestFile {
        kind: GuestFileKind::File,
        size: 6,
        mode: 0o644,
        uid: 0,
        gid: 0,
        modified_at: None,
        symlink_target: None,
    }
}

#[async_trait]
impl GuestLinks for Guests {
    fn attach(&self, vm: VmId, socket: &Path) {
        let mut state = self.state.lock();
        state.order.push("attach");
        state.attached.insert(vm, socket.to_owned());
    }

    fn detach(&self, vm: VmId, reason: &str) {
        let mut state = self.state.lock();
        state.attached.remove(&vm);
        state.greeted.remove(&vm);
        state.detached.push((vm, reason.to_owned()));
    }

    fn status(&self, vm: VmId) -> GuestLinkStatus {
        let state = self.state.lock();
        GuestLinkStatus {
            channel: state.attached.contains_key(&vm),
            hello: state.greeted.get(&vm).cloned(),
            mute_connections: state.mute,
            ..GuestLinkStatus::default()
        }
    }

    fn subscribe(&self) -> Box<dyn GuestEvents> {
        Box::new(Events(self.events.subscribe()))
    }

    fn lock_down(&self, closed: bool) -> u32 {
        {
            let mut state = self.state.lock();
            state.locked = closed;
            if closed {
                state.order.push("lock");
            }
        }
        if closed {
            self.cut.send_modify(|cuts| *cuts += 1);
        }
        3
    }

    fn cut(&self, vm: VmId, _: &str) -> u32 {
        self.state.lock().cuts.push(vm);
        self.cut.send_modify(|cuts| *cuts += 1);
        1
    }

    async fn ping(&self, _: VmId) -> Result<Duration> {
        self.call("ping".into(), Duration::from_millis(1))
    }

    async fn execute(&self, _: VmId, _: ExecRequest) -> Result<ExecSession> {
        let (script, breaks) = {
            let state = self.state.lock();
            (state.script.clone(), state.breaks)
        };
        let output = Output {
            script: script.into(),
            breaks,
            cut: self.cut.subscribe(),
        };
        self.call(
            "execute".into(),
            ExecSession {
                output: Box::new(output),
                input: Box::new(Input),
            },
        )
    }

    async fn stat(&self, _: VmId, path: &str, _: bool) -> Result<GuestFile> {
        self.call(format!("stat {path}"), file())
    }

    async fn list(&self, _: VmId, path: &str, after: &str, limit: u32) -> Result<GuestDirectory> {
        self.call(
            format!("list {path} {after} {limit}"),
            GuestDirectory::default(),
        )
    }

    async fn make_directory(&self, _: VmId, directory: DirectoryMake) -> Result<()> {
        self.call(format!("make {}", directory.path), ())
    }

    async fn make_link(&self, _: VmId, link: LinkMake) -> Result<()> {
        self.call(format!("link {} {}", link.path, link.target), ())
    }

    async fn read_file(
        &self,
        _: VmId,
        path: &str,
        _: u64,
        _: Option<u64>,
    ) -> Result<(GuestFile, Box<dyn GuestFileReader>)> {
        let reader = Reader([b"abc".to_vec(), b"def".to_vec()].into());
        self.call(format!("read {path}"), (file(), Box::new(reader) as _))
    }

    async fn write_file(&self, _: VmId, file: FileWrite) -> Result<Box<dyn GuestFileWriter>> {
        self.call(format!("write {}", file.path), Box::new(Writer(0)) as _)
    }

    async fn request(&self, _: VmId, request: GuestRequest) -> Result<()> {
        let name = match request {
            GuestRequest::Shutdown { .. } => "shutdown",
            GuestRequest::SetPassword { .. } => "set_password",
            GuestRequest::SshKeys { .. } => "ssh_keys",
            GuestRequest::SetClock { .. } => "set_clock",
        };
        self.call(name.into(), ())
    }

    async fn freeze(&self, _: VmId, _: Duration, _: Vec<String>) -> Result<FreezeOutcome> {
        self.call("freeze".into(), FreezeOutcome::default())
    }

    async fn thaw(&self, _: VmId) -> Result<FreezeOutcome> {
        self.call("thaw".into(), FreezeOutcome::default())
    }

    async fn update(&self, _: VmId) -> Result<()> {
        self.call("update".into(), ())?;
        while self.state.lock().hold_update {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        match self.state.lock().updates.pop_front() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn program(&self) -> Option<GuestProgramFile> {
        let sha256 = self.state.lock().program?;
        Some(GuestProgramFile {
            path: "/usr/lib/ghost/ghost-guest".into(),
            sha256,
            size: 1,
        })
    }
}

#[async_trait]
impl AuditLog for Guests {
    async fn append(&self, record: AuditRecord) -> Result<AuditEntry> {
        tokio::task::yield_now().await;
        let mut state = self.state.lock();
        if state.audit_full {
            return Err(Error::new(ErrorCode::DiskFull, "no space left on device"));
        }
        state.audit.push(record.clone());
        Ok(entry(state.audit.len() as u64, record))
    }

    async fn begin(&self, record: AuditRecord) -> Result<AuditReceipt> {
        let entry = self.append(record).await?;
        let unsynced = self.state.lock().audit_unsynced;
        Ok(Box::pin(async move {
            match unsynced {
                true => Err(Error::new(ErrorCode::IoFailed, "the disk is gone")),
                false => Ok(entry),
            }
        }))
    }

    async fn list(
        &self,
        vm: Option<VmId>,
        _: Option<Timestamp>,
        limit: usize,
    ) -> Result<Vec<AuditEntry>> {
        let state = self.state.lock();
        let entries = (1..).zip(&state.audit);
        let mut entries: Vec<_> = entries
            .filter(|(_, record)| vm.is_none_or(|vm| record.vm_id == vm.to_string()))
            .map(|(sequence, record)| entry(sequence, record.clone()))
            .collect();
        Ok(entries.split_off(entries.len().saturating_sub(limit)))
    }

    async fn verify(&self) -> Result<AuditVerdict> {
        Ok(AuditVerdict {
            entries: self.state.lock().audit.len() as u64,
            broken: None,
            head: [0; 32],
        })
    }
}

fn entry(sequence: u64, record: AuditRecord) -> AuditEntry {
    AuditEntry {
        sequence,
        at: Timestamp::default(),
        record,
        hash: [0; 32],
    }
}
