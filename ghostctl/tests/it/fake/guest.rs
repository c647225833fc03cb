//! `GuestService`: programs that do as their names say, and a guest's files in a folder.
//!
//! - `echo`, `cat`, `exit N`, `signal N`, `binary`, `flood N` (bytes): as they say;
//! - `obedient` ends at a signal, with that signal; `stubborn` never ends;
//! - `late`, `cut`, `cancelled`: end as having timed out, with output cut, as called off;
//! - `lost`: the stream ends without an outcome;
//! - a login shell answers in capitals and tells the size of its terminal; `bye` ends it with 7.

use std::collections::BTreeMap;
use std::hash::Hasher as _;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use ghost_proto::agent::v1::exec_input::Input;
use ghost_proto::agent::v1::exec_output::Output;
use ghost_proto::agent::v1::guest_service_server::GuestService;
use ghost_proto::agent::v1::*;
use prost_types::Timestamp;
use tempfile::TempDir;
use tokio::sync::mpsc::Sender;
use tonic::{Request, Response, Status, Streaming};
use twox_hash::XxHash64;

use super::{Fake, Stream, error, id_of, moment, refuse, seconds, stream};

type Answer<T> = Result<Response<T>, Status>;

/// What the guest is like.
pub(crate) struct Memory {
    /// Its root directory.
    pub(crate) root: TempDir,
    /// What happened in it, as words.
    pub(crate) happened: Mutex<Vec<String>>,
    /// Owners of what was written, by path.
    pub(crate) owners: Mutex<BTreeMap<String, (u32, u32)>>,
    /// Transfers of this path break after so many bytes, once each.
    pub(crate) breaks: Mutex<BTreeMap<String, Vec<u64>>>,
    /// What listing this path gives, whatever is there.
    pub(crate) lies: Mutex<BTreeMap<String, Vec<GuestFile>>>,
    /// Where transfers began, in order: `read PATH OFFSET`, `write PATH OFFSET`.
    pub(crate) transfers: Mutex<Vec<String>>,
    /// How many transfers ran at once, and the most that did.
    pub(crate) running: Mutex<(usize, usize)>,
    /// Reports that `WatchTelemetry` sends at once.
    pub(crate) telemetry: Mutex<Vec<GuestTelemetry>>,
    /// Points of the history.
    pub(crate) history: Mutex<Vec<GuestSample>>,
    lockdown: Mutex<Lockdown>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
            happened: Mutex::default(),
            owners: Mutex::default(),
            breaks: Mutex::default(),
            lies: Mutex::default(),
            transfers: Mutex::default(),
            running: Mutex::default(),
            telemetry: Mutex::new(vec![telemetry("web-1"), silent("db-1")]),
            history: Mutex::default(),
            lockdown: Mutex::default(),
        }
    }

    /// A file of the guest.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    /// Makes the next transfers of a path break, after so many bytes each.
    pub(crate) fn break_off(&self, path: &str, after: &[u64]) {
        let after = after.iter().rev().copied().collect();
        self.breaks.lock().unwrap().insert(path.to_owned(), after);
    }

    fn next_break(&self, path: &str) -> Option<u64> {
        self.breaks.lock().unwrap().get_mut(path)?.pop()
    }

    fn begin(&self, what: String) {
        self.transfers.lock().unwrap().push(what);
        let mut running = self.running.lock().unwrap();
        running.0 += 1;
        running.1 = running.1.max(running.0);
    }

    fn end(&self) {
        self.running.lock().unwrap().0 -= 1;
    }
}

/// A report of a guest, some of it meant to harm.
pub(crate) fn telemetry(name: &str) -> GuestTelemetry {
    GuestTelemetry {
        vm_id: id_of("vm", name),
        vm_name: name.to_owned(),
        sample: Some(GuestSample {
            at: moment(-3),
            source: "guest".to_owned(),
            cpu_percent: Some(12.5),
            memory_used_bytes: Some(512 << 20),
            memory_total_bytes: Some(2 << 30),
            disk_read_bytes_per_second: 1024.0 * 1024.0,
            disk_write_bytes_per_second: 0.0,
            network_receive_bytes_per_second: 2048.0,
            network_transmit_bytes_per_second: 100.0,
        }),
        age: seconds(3),
        cpus: 2,
        load_1: 0.25,
        processes: 91,
        users: vec!["\x1b[31mroot".to_owned()],
        cloud_init: Some(GuestCloudInit {
            status: "done".to_owned(),
            stage: "modules-final".to_owned(),
            errors: Vec::new(),
        }),
        operating_system: "Debian GNU/Linux 12".to_owned(),
        kernel: "6.1.0".to_owned(),
        uptime_seconds: 99.0,
        ..GuestTelemetry::default()
    }
}

/// What the host knows of a guest that says nothing.
fn silent(name: &str) -> GuestTelemetry {
    GuestTelemetry {
        vm_id: id_of("vm", name),
        vm_name: name.to_owned(),
        sample: Some(GuestSample {
            at: moment(-3),
            source: "host".to_owned(),
            cpu_percent: Some(99.0),
            memory_used_bytes: Some(1 << 30),
            ..GuestSample::default()
        }),
        age: seconds(3),
        ..GuestTelemetry::default()
    }
}

fn layer(name: &str, ok: bool, detail: &str, hint: &str) -> GuestLayer {
    GuestLayer {
        name: name.to_owned(),
        ok,
        detail: detail.to_owned(),
        hint: hint.to_owned(),
    }
}

fn refused(code: &str, text: &str) -> Status {
    error(code, text, "the guest said so", "")
}

fn io(path: &str, failed: &std::io::Error) -> Status {
    if failed.kind() == std::io::ErrorKind::NotFound {
        refused("guest_file_not_found", &format!("there is no {path}"))
    } else {
        refused("guest_failed", &format!("{path}: {failed}"))
    }
}

fn describe(name: &str, path: &Path, follow: bool) -> std::io::Result<GuestFile> {
    let known = if follow {
        std::fs::metadata(path)?
    } else {
        std::fs::symlink_metadata(path)?
    };
    let kind = if known.is_dir() {
        GuestFileKind::Directory
    } else if known.is_file() {
        GuestFileKind::File
    } else if known.is_symlink() {
        GuestFileKind::Symlink
    } else {
        GuestFileKind::Other
    };
    Ok(GuestFile {
        name: name.to_owned(),
        kind: kind.into(),
        size_bytes: known.len(),
        mode: known.mode() & 0o7777,
        uid: known.uid(),
        gid: known.gid(),
        modified_at: Some(Timestamp {
            seconds: known.mtime(),
            nanos: i32::try_from(known.mtime_nsec()).unwrap(),
        }),
        symlink_target: std::fs::read_link(path)
            .map(|to| to.to_string_lossy().into_owned())
            .unwrap_or_default(),
    })
}

async fn say(sender: &Sender<Result<ExecOutput, Status>>, output: Output) {
    let _ = sender
        .send(Ok(ExecOutput {
            output: Some(output),
        }))
        .await;
}

fn exit(code: u32) -> Output {
    Output::Exited(ExecExited {
        code,
        ..ExecExited::default()
    })
}

impl Fake {
    fn happened(&self, what: impl Into<String>) {
        self.0.guest.happened.lock().unwrap().push(what.into());
    }

    async fn program(
        self,
        start: ExecStart,
        mut input: Streaming<ExecInput>,
        sender: Sender<Result<ExecOutput, Status>>,
    ) {
        let program = if start.login_shell {
            "a login shell"
        } else {
            start.program.as_str()
        };
        let number = |at: usize| {
            start
                .arguments
                .get(at)
                .map_or(0, |text| text.parse().unwrap())
        };
        say(&sender, Output::Started(ExecStarted { pid: 77 })).await;
        let end = match program {
            "echo" => {
                let text = start.arguments.join(" ") + "\n";
                say(&sender, Output::Stdout(text.into_bytes().into())).await;
                exit(0)
            }
            "exit" => exit(number(0)),
            "signal" => Output::Exited(ExecExited {
                signal: number(0),
                ..ExecExited::default()
            }),
            "binary" => {
                say(&sender, Output::Stdout(vec![0, 255, b'\n'].into())).await;
                say(&sender, Output::Stderr(b"\x1b[31mno\n".to_vec().into())).await;
                exit(3)
            }
            "flood" => {
                let mut left = number(0) as usize;
                while left > 0 && !sender.is_closed() {
                    let piece = left.min(64 << 10);
                    left -= piece;
                    say(&sender, Output::Stdout(vec![b'x'; piece].into())).await;
                }
                if sender.is_closed() {
                    self.happened("nobody reads");
                }
                exit(0)
            }
            "late" => Output::Exited(ExecExited {
                signal: 9,
                timed_out: true,
                ..ExecExited::default()
            }),
            "cut" => {
                say(&sender, Output::Stdout(b"begin".to_vec().into())).await;
                Output::Exited(ExecExited {
                    truncated_bytes: 3 << 20,
                    ..ExecExited::default()
                })
            }
            "cancelled" => Output::Exited(ExecExited {
                signal: 9,
                cancelled: true,
                ..ExecExited::default()
            }),
            "lost" => return,
            "cat" => {
                while let Ok(Some(message)) = input.message().await {
                    match message.input {
                        Some(Input::Stdin(bytes)) => say(&sender, Output::Stdout(bytes)).await,
                        Some(Input::StdinEnd(_)) => break,
                        other => self.happened(format!("{other:?}")),
                    }
                }
                exit(0)
            }
            "obedient" | "stubborn" => {
                say(&sender, Output::Stdout(b"ready\n".to_vec().into())).await;
                loop {
                    match input.message().await {
                        Ok(Some(ExecInput {
                            input: Some(Input::Signal(signal)),
                        })) => {
                            self.happened(format!("signal {signal}"));
                            let text = format!("got {signal}\n");
                            say(&sender, Output::Stderr(text.into_bytes().into())).await;
                            if program == "obedient" {
                                break Output::Exited(ExecExited {
                                    signal,
                                    ..ExecExited::default()
                                });
                            }
                        }
                        Ok(Some(_)) => {}
                        Ok(None) | Err(_) => {
                            self.happened("gone");
                            return;
                        }
                    }
                }
            }
            _ => {
                let text = match &start.terminal {
                    Some(terminal) => {
                        format!("{} {} {}$ ", terminal.kind, terminal.rows, terminal.columns)
                    }
                    None => String::new(),
                };
                say(&sender, Output::Stdout(text.into_bytes().into())).await;
                loop {
                    match input
                        .message()
                        .await
                        .ok()
                        .flatten()
                        .and_then(|message| message.input)
                    {
                        Some(Input::Stdin(bytes)) => {
                            let text = String::from_utf8_lossy(&bytes).to_uppercase();
                            let over = text.contains("BYE");
                            say(&sender, Output::Stdout(text.into_bytes().into())).await;
                            if over {
                                break exit(7);
                            }
                        }
                        Some(Input::Resize(size)) => {
                            let text = format!("now {}x{}", size.rows, size.columns);
                            say(&sender, Output::Stdout(text.into_bytes().into())).await;
                        }
                        Some(Input::StdinEnd(_)) => break exit(0),
                        Some(_) => {}
                        None => {
                            self.happened("gone");
                            return;
                        }
                    }
                }
            }
        };
        say(&sender, end).await;
    }

    async fn send_file(
        self,
        request: ReadGuestFileRequest,
        sender: Sender<Result<ReadGuestFileResponse, Status>>,
    ) {
        use read_guest_file_response::Event;
        let memory = &self.0.guest;
        memory.begin(format!("read {} {}", request.path, request.offset));
        let breaks = memory.next_break(&request.path).unwrap_or(u64::MAX);
        let sending = async {
            let path = memory.path(&request.path);
            let failed = |failed: std::io::Error| io(&request.path, &failed);
            let opened = describe("", &path, true).map_err(failed)?;
            let mut file = std::fs::File::open(&path).map_err(failed)?;
            file.seek(SeekFrom::Start(request.offset)).map_err(failed)?;
            let length = match request.length {
                0 => u64::MAX,
                length => length,
            };
            let mut content = Vec::new();
            file.take(length)
                .read_to_end(&mut content)
                .map_err(failed)?;
            let send = |event| sender.send(Ok(ReadGuestFileResponse { event: Some(event) }));
            let _ = send(Event::Opened(opened)).await;
            let mut hash = XxHash64::with_seed(0);
            let mut sent = 0;
            for piece in content.chunks(100_000) {
                hash.write(piece);
                let _ = send(Event::Data(piece.to_vec().into())).await;
                sent += piece.len() as u64;
                if sent >= breaks && request.path.contains("hang") {
                    self.happened("hangs");
                    sender.closed().await;
                }
                if sent >= breaks {
                    return Err(refused("guest_unreachable", "the guest went away"));
                }
                tokio::task::yield_now().await;
            }
            let mut checksum = hash.finish().to_be_bytes();
            if request.path.contains("corrupt") {
                checksum[0] ^= 1;
            }
            let _ = send(Event::Finished(GuestFileSum {
                size_bytes: content.len() as u64,
                checksum: checksum.to_vec(),
            }))
            .await;
            Ok(())
        };
        // So that files that are asked for at once are seen to be.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let sent = sending.await;
        memory.end();
        if let Err(status) = sent {
            let _ = sender.send(Err(status)).await;
        }
    }

    async fn take_file(
        self,
        start: WriteGuestFileStart,
        mut input: Streaming<WriteGuestFileRequest>,
        sender: Sender<Result<WriteGuestFileResponse, Status>>,
    ) {
        let memory = &self.0.guest;
        let taking = self.taking(&start, &mut input, &sender);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let taken = taking.await;
        memory.end();
        if let Err(status) = taken {
            let _ = sender.send(Err(status)).await;
        }
    }

    async fn taking(
        &self,
        start: &WriteGuestFileStart,
        input: &mut Streaming<WriteGuestFileRequest>,
        sender: &Sender<Result<WriteGuestFileResponse, Status>>,
    ) -> Result<(), Status> {
        use write_guest_file_request::Event as In;
        use write_guest_file_response::Event as Out;
        let memory = &self.0.guest;
        let failed = |failed: std::io::Error| io(&start.path, &failed);
        let send = |event| sender.send(Ok(WriteGuestFileResponse { event: Some(event) }));
        let target = memory.path(&start.path);
        let partial = target.with_extension("partial");
        let mut content = Vec::new();
        if start.resume {
            content = std::fs::read(&partial).unwrap_or_default();
        }
        memory.begin(format!("write {} {}", start.path, content.len()));
        if start.path.contains("full") {
            return Err(refused("disk_full", "the guest's disk is full"));
        }
        let breaks = memory.next_break(&start.path).unwrap_or(u64::MAX);
        let _ = send(Out::Accepted(content.len() as u64)).await;
        let mut taken = 0;
        loop {
            match input.message().await?.and_then(|message| message.event) {
                Some(In::Data(data)) => {
                    taken += data.len() as u64;
                    content.extend_from_slice(&data);
                    if taken >= breaks {
                        std::fs::write(&partial, &content).map_err(failed)?;
                        return Err(refused("guest_unreachable", "the guest went away"));
                    }
                }
                Some(In::End(_)) => break,
                Some(In::Start(_)) | None => {
                    std::fs::write(&partial, &content).map_err(failed)?;
                    self.happened(format!("{} was given up", start.path));
                    return Ok(());
                }
            }
        }
        let mut hash = XxHash64::with_seed(0);
        hash.write(&content);
        let checksum = hash.finish().to_be_bytes().to_vec();
        let same = start.checksum.is_empty() || start.checksum == checksum;
        if !same || content.len() as u64 != start.size_bytes {
            let _ = std::fs::remove_file(&partial);
            return Err(refused(
                "checksum_mismatch",
                "what came is not what was sent",
            ));
        }
        let mut file = std::fs::File::create(&partial).map_err(failed)?;
        file.write_all(&content).map_err(failed)?;
        file.set_permissions(std::fs::Permissions::from_mode(start.mode))
            .map_err(failed)?;
        if let Some(at) = &start.modified_at {
            let at = SystemTime::UNIX_EPOCH
                + Duration::new(
                    u64::try_from(at.seconds).unwrap(),
                    u32::try_from(at.nanos).unwrap(),
                );
            file.set_modified(at).map_err(failed)?;
        }
        std::fs::rename(&partial, &target).map_err(failed)?;
        if start.keep_owner {
            let owner = (start.uid, start.gid);
            let mut owners = memory.owners.lock().unwrap();
            owners.insert(start.path.clone(), owner);
        }
        let _ = send(Out::Written(GuestFileSum {
            size_bytes: content.len() as u64,
            checksum,
        }))
        .await;
        Ok(())
    }
}

#[tonic::async_trait]
impl GuestService for Fake {
    async fn get_status(&self, request: Request<GetGuestStatusRequest>) -> Answer<GuestStatus> {
        let vm = self.note(request).vm;
        refuse(&vm)?;
        let ready = !vm.starts_with("deaf");
        let mut layers = vec![
            layer("domain", true, "running", ""),
            layer("access", true, "on", ""),
            layer("channel", true, "connected", ""),
        ];
        if ready {
            layers.push(layer("agent", true, "0.1.0", ""));
            layers.push(layer("version", true, "1, outdated", ""));
            layers.push(layer("telemetry", true, "3 s ago", ""));
        } else {
            layers.push(layer(
                "agent",
                false,
                "it has not greeted",
                "ghostctl vm logs deaf-1",
            ));
        }
        let known = |text: &str| {
            if ready {
                text.to_owned()
            } else {
                String::new()
            }
        };
        Ok(Response::new(GuestStatus {
            vm_id: id_of("vm", &vm),
            vm_name: vm,
            layers,
            ready,
            agent_version: known("0.1.0"),
            protocol_version: ready.into(),
            capabilities: if ready {
                vec!["exec".to_owned(), "\x1b[2Jpty".to_owned()]
            } else {
                Vec::new()
            },
            operating_system: known("Debian GNU/Linux 12"),
            kernel: known("Linux 6.1.0"),
            hostname: known("evil\x07name"),
            connected_at: ready.then(|| moment(-60)).flatten(),
            last_seen_age: ready.then(|| seconds(1)).flatten(),
            outdated: ready,
        }))
    }

    async fn ping(&self, request: Request<PingGuestRequest>) -> Answer<PingGuestResponse> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(PingGuestResponse {
            round_trip: Some(prost_types::Duration {
                seconds: 0,
                nanos: 1_250_000,
            }),
            agent_version: "0.1.0".to_owned(),
        }))
    }

    type ExecStream = Stream<ExecOutput>;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Answer<Self::ExecStream> {
        let mut input = request.into_inner();
        let Some(Input::Start(start)) = input.message().await?.and_then(|first| first.input) else {
            return Err(refused("invalid_argument", "no start"));
        };
        refuse(&start.vm)?;
        self.note(Request::new(start.clone()));
        let fake = self.clone();
        Ok(Response::new(stream(|sender| {
            fake.program(start, input, sender)
        })))
    }

    async fn stat_file(&self, request: Request<StatGuestFileRequest>) -> Answer<GuestFile> {
        let request = self.note(request);
        refuse(&request.vm)?;
        describe("", &self.0.guest.path(&request.path), request.follow)
            .map(Response::new)
            .map_err(|failed| io(&request.path, &failed))
    }

    /// Three a page, so that pages are turned.
    async fn list_files(
        &self,
        request: Request<ListGuestFilesRequest>,
    ) -> Answer<ListGuestFilesResponse> {
        let request = self.note(request);
        refuse(&request.vm)?;
        if let Some(files) = self.0.guest.lies.lock().unwrap().get(&request.path) {
            let files = files.clone();
            return Ok(Response::new(ListGuestFilesResponse { files, more: false }));
        }
        let path = self.0.guest.path(&request.path);
        let failed = |failed: std::io::Error| io(&request.path, &failed);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name > request.after {
                files.push(describe(&name, &entry.path(), false).map_err(failed)?);
            }
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let more = files.len() > 3;
        files.truncate(3);
        Ok(Response::new(ListGuestFilesResponse { files, more }))
    }

    async fn make_directory(
        &self,
        request: Request<MakeGuestDirectoryRequest>,
    ) -> Answer<MakeGuestDirectoryResponse> {
        let request = self.note(request);
        refuse(&request.vm)?;
        let path = self.0.guest.path(&request.path);
        if !path.is_dir() {
            std::fs::DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .map_err(|failed| io(&request.path, &failed))?;
        }
        let mode = std::fs::Permissions::from_mode(request.mode);
        std::fs::set_permissions(&path, mode).unwrap();
        if request.keep_owner {
            let owner = (request.uid, request.gid);
            let mut owners = self.0.guest.owners.lock().unwrap();
            owners.insert(request.path, owner);
        }
        Ok(Response::new(MakeGuestDirectoryResponse {}))
    }

    async fn make_link(
        &self,
        request: Request<MakeGuestLinkRequest>,
    ) -> Answer<MakeGuestLinkResponse> {
        let request = self.note(request);
        refuse(&request.vm)?;
        if request.path.contains("oldlinks") {
            return Err(refused("guest_unsupported", "it does not offer links"));
        }
        let path = self.0.guest.path(&request.path);
        let failed = |failed: std::io::Error| io(&request.path, &failed);
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(&path).map_err(failed)?;
        }
        std::os::unix::fs::symlink(&request.target, &path).map_err(failed)?;
        Ok(Response::new(MakeGuestLinkResponse {}))
    }

    type ReadFileStream = Stream<ReadGuestFileResponse>;

    async fn read_file(
        &self,
        request: Request<ReadGuestFileRequest>,
    ) -> Answer<Self::ReadFileStream> {
        let request = self.note(request);
        refuse(&request.vm)?;
        let fake = self.clone();
        Ok(Response::new(stream(|sender| {
            fake.send_file(request, sender)
        })))
    }

    type WriteFileStream = Stream<WriteGuestFileResponse>;

    async fn write_file(
        &self,
        request: Request<Streaming<WriteGuestFileRequest>>,
    ) -> Answer<Self::WriteFileStream> {
        let mut input = request.into_inner();
        let Some(write_guest_file_request::Event::Start(start)) =
            input.message().await?.and_then(|first| first.event)
        else {
            return Err(refused("invalid_argument", "no start"));
        };
        refuse(&start.vm)?;
        self.note(Request::new(start.clone()));
        let fake = self.clone();
        Ok(Response::new(stream(|sender| {
            fake.take_file(start, input, sender)
        })))
    }

    async fn shutdown(&self, request: Request<ShutdownGuestRequest>) -> Answer<GuestDone> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(GuestDone {}))
    }

    async fn set_password(&self, request: Request<SetGuestPasswordRequest>) -> Answer<GuestDone> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(GuestDone {}))
    }

    async fn update_ssh_keys(
        &self,
        request: Request<UpdateGuestSshKeysRequest>,
    ) -> Answer<GuestDone> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(GuestDone {}))
    }

    async fn sync_clock(&self, request: Request<SyncGuestClockRequest>) -> Answer<GuestDone> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(GuestDone {}))
    }

    async fn freeze(&self, request: Request<FreezeGuestRequest>) -> Answer<FreezeGuestResponse> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(FreezeGuestResponse {
            count: 2,
            warnings: vec!["10-postgres: \x1b[31mfailed".to_owned()],
        }))
    }

    async fn thaw(&self, request: Request<ThawGuestRequest>) -> Answer<FreezeGuestResponse> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(FreezeGuestResponse {
            count: 1,
            warnings: Vec::new(),
        }))
    }

    async fn get_history(&self, request: Request<GetGuestHistoryRequest>) -> Answer<GuestHistory> {
        let vm = self.note(request).vm;
        refuse(&vm)?;
        Ok(Response::new(GuestHistory {
            vm_id: id_of("vm", &vm),
            vm_name: vm,
            samples: self.0.guest.history.lock().unwrap().clone(),
        }))
    }

    type WatchTelemetryStream = Stream<GuestTelemetry>;

    async fn watch_telemetry(
        &self,
        request: Request<WatchTelemetryRequest>,
    ) -> Answer<Self::WatchTelemetryStream> {
        let vm = self.note(request).vm;
        refuse(&vm)?;
        let mut known = self.0.guest.telemetry.lock().unwrap().clone();
        known.retain(|known| vm.is_empty() || known.vm_name == vm);
        Ok(Response::new(stream(|sender| async move {
            for telemetry in known {
                let _ = sender.send(Ok(telemetry)).await;
            }
            sender.closed().await;
        })))
    }

    async fn update_guest(
        &self,
        request: Request<UpdateGuestRequest>,
    ) -> Answer<UpdateGuestResponse> {
        let vm = self.note(request).vm;
        refuse(&vm)?;
        Ok(Response::new(UpdateGuestResponse {
            from_version: if vm == "web-2" {
                "0.2.0"
            } else {
                "0.1.0\x1b[31m"
            }
            .to_owned(),
            to_version: "0.2.0".to_owned(),
            replaced: vm != "web-2",
        }))
    }

    async fn set_access(&self, request: Request<SetGuestAccessRequest>) -> Answer<GuestAccess> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(Response::new(GuestAccess {
            vm_id: id_of("vm", &request.vm),
            access: request.access,
            sessions_cut: if request.access { 0 } else { 3 },
        }))
    }

    async fn register_address(
        &self,
        request: Request<RegisterGuestAddressRequest>,
    ) -> Answer<GuestDone> {
        refuse(&self.note(request).vm)?;
        Ok(Response::new(GuestDone {}))
    }

    async fn set_lockdown(&self, request: Request<SetLockdownRequest>) -> Answer<Lockdown> {
        let request = self.note(request);
        let lockdown = Lockdown {
            active: request.active,
            reason: request.reason,
            set_by: "root".to_owned(),
            since: moment(-120),
            sessions_cut: if request.active { 2 } else { 0 },
        };
        *self.0.guest.lockdown.lock().unwrap() = Lockdown {
            sessions_cut: 0,
            ..lockdown.clone()
        };
        Ok(Response::new(lockdown))
    }

    async fn get_lockdown(&self, request: Request<GetLockdownRequest>) -> Answer<Lockdown> {
        self.note(request);
        Ok(Response::new(self.0.guest.lockdown.lock().unwrap().clone()))
    }

    type ListAuditStream = Stream<AuditEntry>;

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Answer<Self::ListAuditStream> {
        self.needs_host(&request)?;
        let request = self.note(request);
        refuse(&request.vm)?;
        let entries = (1..=2).map(|sequence| AuditEntry {
            sequence,
            at: moment(-60),
            principal: "root".to_owned(),
            vm_id: id_of("vm", "web-1"),
            vm_name: "web-1".to_owned(),
            action: "exec".to_owned(),
            detail: "printf \x1b[2J".to_owned(),
            outcome: if sequence == 1 { "begun" } else { "ok" }.to_owned(),
            bytes_in: 0,
            bytes_out: 2048 * (sequence - 1),
            duration: (sequence == 2).then(|| seconds(1)).flatten(),
            request_id: id_of("request", "1"),
            hash: format!("{sequence:064x}"),
        });
        let entries: Vec<AuditEntry> = entries.filter(|_| !request.vm.starts_with("db")).collect();
        Ok(Response::new(stream(|sender| async move {
            for entry in entries {
                let _ = sender.send(Ok(entry)).await;
            }
        })))
    }

    async fn verify_audit(
        &self,
        request: Request<VerifyAuditRequest>,
    ) -> Answer<VerifyAuditResponse> {
        self.note(request);
        let broken = self
            .0
            .guest
            .happened
            .lock()
            .unwrap()
            .contains(&"tampered".to_owned());
        Ok(Response::new(if broken {
            VerifyAuditResponse {
                intact: false,
                entries: 12,
                broken_at: 7,
                detail: "entry 7 does not follow entry 6".to_owned(),
                head: String::new(),
            }
        } else {
            VerifyAuditResponse {
                intact: true,
                entries: 12,
                broken_at: 0,
                detail: String::new(),
                head: format!("{:064x}", 12),
            }
        }))
    }
}
