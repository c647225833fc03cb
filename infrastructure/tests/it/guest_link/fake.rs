//! QEMU and a guest's agent in one: a socket that listens as QEMU's does, and what a test has the
//! guest say on it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::BytesMut;
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, AgentReady, ExecuteResponse, Pong, Stream, StreamData, WindowUpdate,
    execute_response,
};
use ghost_proto::guest::{Flow, NEWEST_VERSION};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// The socket of a VM's channel.
pub(super) struct Channel {
    listener: UnixListener,
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Channel {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest.sock");
        Self {
            listener: UnixListener::bind(&path).unwrap(),
            _folder: folder,
            path,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the host's connection.
    pub(super) async fn accept(&self) -> Guest {
        let (stream, _) = self.listener.accept().await.unwrap();
        Guest {
            stream,
            decoder: Decoder::new(),
            session: Vec::new(),
            instance: b"instance".to_vec(),
            boot_id: "boot-1".to_owned(),
            version: "0.1.0".to_owned(),
            program_sha256: vec![7; 32],
        }
    }

    /// The same, with an agent that has greeted.
    pub(super) async fn greeted(&self) -> Guest {
        let mut guest = self.accept().await;
        guest.greet().await;
        guest
    }
}

/// A guest whose words a test chooses.
pub(super) struct Guest {
    pub(super) stream: UnixStream,
    decoder: Decoder,
    pub(super) session: Vec<u8>,
    pub(super) instance: Vec<u8>,
    pub(super) boot_id: String,
    pub(super) version: String,
    pub(super) program_sha256: Vec<u8>,
}

impl Guest {
    pub(super) fn ready(&self) -> AgentReady {
        AgentReady {
            protocol_version: NEWEST_VERSION,
            oldest_version: 1,
            newest_version: NEWEST_VERSION,
            agent_version: self.version.clone(),
            capabilities: [
                "exec",
                "pty",
                "files",
                "power",
                "password",
                "ssh_keys",
                "clock",
                "freeze",
                "telemetry",
                "update",
            ]
            .map(str::to_owned)
            .to_vec(),
            boot_id: self.boot_id.clone(),
            instance: self.instance.clone(),
            operating_system: "Fake 1".into(),
            kernel: "6.1".into(),
            hostname: "web".into(),
            architecture: "x86_64".into(),
            program_sha256: self.program_sha256.clone(),
        }
    }

    /// Waits for a greeting and answers it.
    pub(super) async fn greet(&mut self) {
        loop {
            let message = self.receive().await;
            if let Some(Payload::Hello(_)) = message.payload {
                self.session = message.session;
                let ready = self.ready();
                self.send(Vec::new(), Payload::AgentReady(ready)).await;
                return;
            }
        }
    }

    pub(super) fn message(&self, id: Vec<u8>, payload: Payload) -> AgentMessage {
        AgentMessage {
            message_id: id,
            session: self.session.clone(),
            timestamp: None,
            payload: Some(payload),
        }
    }

    pub(super) async fn send(&mut self, id: Vec<u8>, payload: Payload) {
        let message = self.message(id, payload);
        self.send_raw(&encode(&message)).await;
    }

    /// Sends bytes; a host that has hung up is no fault of the guest.
    pub(super) async fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next message of the host; pings of its own accord are answered on the way.
    pub(super) async fn receive(&mut self) -> AgentMessage {
        self.try_receive().await.expect("the host hung up")
    }

    pub(super) async fn try_receive(&mut self) -> Option<AgentMessage> {
        loop {
            match self.decoder.next() {
                Some(Found::Message(message)) => return Some(*message),
                Some(other) => panic!("the host sent {other:?}"),
                None => {
                    let mut piece = [0; 65536];
                    match self.stream.read(&mut piece).await {
                        Ok(0) | Err(_) => return None,
                        Ok(count) => self.decoder.push(&piece[..count]),
                    }
                }
            }
        }
    }

    /// The next execution: its id.
    pub(super) async fn receive_execute(&mut self) -> Vec<u8> {
        loop {
            let message = self.receive().await;
            if let Some(Payload::Execute(_)) = message.payload {
                return message.message_id;
            }
        }
    }

    pub(super) async fn started(&mut self, id: &[u8]) {
        self.send(id.to_vec(), started()).await;
    }

    pub(super) async fn output(&mut self, id: &[u8], stream: Stream, data: &[u8]) {
        self.send(id.to_vec(), data_of(stream, data)).await;
    }

    pub(super) async fn exited(&mut self, id: &[u8], code: u32) {
        self.send(id.to_vec(), exited(code)).await;
    }

    /// Answers programs: `true` exits, `cat` gives stdin back, `spew N` writes N bytes, all within
    /// the windows; and pings. Until the host hangs up.
    pub(super) async fn serve(mut self) {
        let mut programs: HashMap<Vec<u8>, Program> = HashMap::new();
        while let Some(message) = self.try_receive().await {
            let id = message.message_id.clone();
            match message.payload {
                Some(Payload::Hello(_)) => {
                    self.session = message.session;
                    let ready = self.ready();
                    self.send(Vec::new(), Payload::AgentReady(ready)).await;
                }
                Some(Payload::Ping(ping)) => {
                    let payload = ping.payload;
                    self.send(id, Payload::Pong(Pong { payload })).await;
                }
                Some(Payload::Execute(request)) => {
                    self.started(&id).await;
                    let mut program = Program::default();
                    match request.program.as_str() {
                        "true" => program.ended = true,
                        "spew" => {
                            program.output = vec![b'x'; request.arguments[0].parse().unwrap()];
                            program.ended = true;
                        }
                        _ => {}
                    }
                    programs.insert(id, program);
                }
                Some(Payload::StreamData(data)) => {
                    if let Some(program) = programs.get_mut(&id) {
                        program.output.extend_from_slice(&data.data);
                        program.ended |= data.end;
                        program.stdin = true;
                    }
                }
                Some(Payload::WindowUpdate(update)) => {
                    if let Some(program) = programs.get_mut(&id) {
                        program.sent -= update.bytes;
                    }
                }
                Some(Payload::Cancel(_)) if programs.remove(&id).is_some() => {
                    self.exited(&id, 1).await;
                }
                _ => {}
            }
            let mut done = Vec::new();
            for (id, program) in &mut programs {
                while !program.output.is_empty() && program.sent < Flow::STREAM.window {
                    let window = usize::try_from(Flow::STREAM.window - program.sent).unwrap();
                    let count = program.output.len().min(window).min(Flow::STREAM.most);
                    let piece: Vec<u8> = program.output.drain(..count).collect();
                    program.sent += count as u64;
                    self.send(id.clone(), data_of(Stream::Stdout, &piece)).await;
                    if program.stdin {
                        let update = WindowUpdate {
                            stream: Stream::Stdin.into(),
                            bytes: count as u64,
                        };
                        self.send(id.clone(), Payload::WindowUpdate(update)).await;
                    }
                }
                if program.output.is_empty() && program.ended {
                    done.push(id.clone());
                }
            }
            for id in done {
                programs.remove(&id);
                self.exited(&id, 0).await;
            }
        }
    }
}

/// A program in the guest.
#[derive(Default)]
struct Program {
    output: Vec<u8>,
    /// Bytes beyond what was granted.
    sent: u64,
    stdin: bool,
    ended: bool,
}

pub(super) fn encode(message: &AgentMessage) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame::encode(message, &mut out).unwrap();
    out.to_vec()
}

pub(super) fn started() -> Payload {
    Payload::ExecuteResponse(ExecuteResponse {
        event: Some(execute_response::Event::Started(
            execute_response::Started { pid: 42 },
        )),
    })
}

pub(super) fn exited(code: u32) -> Payload {
    Payload::ExecuteResponse(ExecuteResponse {
        event: Some(execute_response::Event::Exited(execute_response::Exited {
            code,
            ..Default::default()
        })),
    })
}

pub(super) fn data_of(stream: Stream, data: &[u8]) -> Payload {
    Payload::StreamData(StreamData {
        stream: stream.into(),
        data: data.to_vec().into(),
        end: false,
    })
}

/// Waits for something that will come true; a test that waits in vain fails here.
pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    assert!(waited.is_ok(), "in vain: {what}");
}
