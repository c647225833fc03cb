//! The host's side of the channel, as simple as it can be.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use ghost_guest::{Channel, End, Options, serve};
use ghost_proto::guest::NEWEST_VERSION;
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::execute_response::{Event, Exited};
use ghost_proto::guest::v1::{
    AgentMessage, AgentReady, ExecuteRequest, Hello, Stream, StreamData, WindowUpdate,
};

pub(crate) type Id = Vec<u8>;

static COUNTER: AtomicU64 = AtomicU64::new(1);

/// 16 bytes that no other has, also of another test process: programs are swept by the mark that they
/// bear, and those of two calls with one id would be swept together.
pub(crate) fn unique() -> Id {
    let process = u128::from(std::process::id()) << 64;
    let number = u128::from(COUNTER.fetch_add(1, Ordering::SeqCst));
    (process | number).to_be_bytes().to_vec()
}

pub(crate) struct Host {
    pub(crate) stream: UnixStream,
    decoder: Decoder,
    pub(crate) session: Vec<u8>,
    /// The newest version of the protocol that this host speaks.
    pub(crate) version: u32,
    /// Bulk frames that the agent has sent.
    pub(crate) bulk: usize,
    inbox: VecDeque<AgentMessage>,
    agent: Option<JoinHandle<std::io::Result<End>>>,
}

impl Host {
    /// An agent that has greeted.
    pub(crate) fn greeted(options: Options) -> Self {
        let mut host = Self::silent(options);
        host.hello(None);
        host
    }

    /// An agent that has only announced itself.
    pub(crate) fn silent(options: Options) -> Self {
        more_descriptors();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = std::thread::spawn(move || {
            let channel = Channel::try_from(theirs).unwrap();
            serve(&channel, &options)
        });
        let mut host = Self::over(ours);
        host.agent = Some(agent);
        let first = host.take(|_| true);
        assert!(matches!(first.payload, Some(Payload::AgentReady(_))));
        assert!(first.session.is_empty());
        host
    }

    /// An agent that runs elsewhere.
    pub(crate) fn over(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Self {
            stream,
            decoder: Decoder::new(),
            session: Vec::new(),
            version: NEWEST_VERSION,
            bulk: 0,
            inbox: VecDeque::new(),
            agent: None,
        }
    }

    pub(crate) fn hello(&mut self, interval: Option<Duration>) -> AgentReady {
        self.session = unique();
        let hello = Payload::Hello(Hello {
            oldest_version: 1,
            newest_version: self.version,
            host_version: "test".into(),
            telemetry_interval: interval.map(|time| prost_types::Duration {
                seconds: i64::try_from(time.as_secs()).unwrap(),
                nanos: i32::try_from(time.subsec_nanos()).unwrap(),
            }),
            capabilities: Vec::new(),
        });
        self.send(&[], hello.clone());
        // One that comes before the guest has seen its port open is lost: it is repeated, as the
        // host's links do.
        let mut bytes = BytesMut::new();
        let message = AgentMessage {
            session: self.session.clone(),
            payload: Some(hello),
            ..AgentMessage::default()
        };
        frame::encode(&message, &mut bytes).unwrap();
        let mut stream = self.stream.try_clone().unwrap();
        let (greeted, waiting) = std::sync::mpsc::channel::<()>();
        let repeating = std::thread::spawn(move || {
            while waiting.recv_timeout(Duration::from_secs(10))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                stream.write_all(&bytes).unwrap();
            }
        });
        let session = self.session.clone();
        let ready = self.take(|message| message.session == session);
        drop(greeted);
        repeating.join().unwrap();
        match ready.payload {
            Some(Payload::AgentReady(ready)) => ready,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn send(&mut self, id: &[u8], payload: Payload) {
        let session = self.session.clone();
        self.send_as(&session, id, payload);
    }

    pub(crate) fn send_as(&mut self, session: &[u8], id: &[u8], payload: Payload) {
        let mut out = BytesMut::new();
        let message = AgentMessage {
            message_id: id.to_vec(),
            session: session.to_vec(),
            payload: Some(payload),
            timestamp: None,
        };
        if self.version >= frame::BULK_VERSION {
            frame::encode_bulk(message, &mut out).unwrap();
        } else {
            frame::encode(&message, &mut out).unwrap();
        }
        self.stream.write_all(&out).unwrap();
    }

    /// Begins a call.
    pub(crate) fn call(&mut self, payload: Payload) -> Id {
        let id = unique();
        self.send(&id, payload);
        id
    }

    /// The next message that fits, others kept.
    pub(crate) fn take(&mut self, fits: impl Fn(&AgentMessage) -> bool) -> AgentMessage {
        if let Some(at) = self.inbox.iter().position(&fits) {
            return self.inbox.remove(at).unwrap();
        }
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let before = self.inbox.len();
            loop {
                let bulk = self.decoder.buffer().starts_with(&frame::BULK_MAGIC);
                let Some(found) = self.decoder.next() else {
                    break;
                };
                self.bulk += usize::from(bulk);
                match found {
                    Found::Message(message) => self.inbox.push_back(*message),
                    other => panic!("the agent sends what is no message: {other:?}"),
                }
            }
            if let Some(at) = self.inbox.iter().skip(before).position(&fits) {
                return self.inbox.remove(before + at).unwrap();
            }
            let read = match self.stream.read(&mut buffer) {
                // A read with a timeout is not taken up again after a signal, as one is sent by others.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                read => read.expect("an answer in time"),
            };
            assert!(read > 0, "the agent has ended the stream");
            self.decoder.push(&buffer[..read]);
        }
    }

    /// The next message of a call.
    pub(crate) fn next(&mut self, id: &[u8]) -> Payload {
        self.take(|message| message.message_id == id)
            .payload
            .unwrap()
    }

    /// The final answer of a call that has no others.
    pub(crate) fn ask(&mut self, payload: Payload) -> Payload {
        let id = self.call(payload);
        self.next(&id)
    }

    pub(crate) fn data(&mut self, id: &[u8], stream: Stream, data: &[u8], end: bool) {
        self.send(
            id,
            Payload::StreamData(StreamData {
                stream: stream.into(),
                data: data.to_vec().into(),
                end,
            }),
        );
    }

    pub(crate) fn grant(&mut self, id: &[u8], stream: i32, bytes: u64) {
        self.send(id, Payload::WindowUpdate(WindowUpdate { stream, bytes }));
    }

    /// Reads an execution to its end, granting what comes.
    pub(crate) fn output(&mut self, id: &[u8]) -> Output {
        let mut output = Output::default();
        loop {
            match self.next(id) {
                Payload::ExecuteResponse(response) => match response.event.unwrap() {
                    Event::Started(started) => {
                        assert!(started.pid > 0);
                        output.started = true;
                    }
                    Event::Exited(exited) => {
                        output.exited = exited;
                        return output;
                    }
                },
                Payload::StreamData(data) => {
                    self.grant(id, data.stream, data.data.len() as u64);
                    match data.stream() {
                        Stream::Stdout => output.stdout.extend_from_slice(&data.data),
                        Stream::Stderr => output.stderr.extend_from_slice(&data.data),
                        other => panic!("{other:?}"),
                    }
                }
                Payload::WindowUpdate(_) => {}
                Payload::Error(error) => panic!("{error:?}"),
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn run(&mut self, request: ExecuteRequest) -> Output {
        let id = self.call(Payload::Execute(request));
        self.output(&id)
    }

    /// Hangs up; the agent comes to its end.
    pub(crate) fn hang_up(mut self) -> End {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
        self.agent.take().unwrap().join().unwrap().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(agent) = self.agent.take() {
            let ended = agent.join();
            if !std::thread::panicking() {
                assert_eq!(ended.unwrap().unwrap(), End::Closed);
            }
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) started: bool,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exited: Exited,
}

impl Output {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// Many agents with many calls share the descriptors of the tests' one process.
pub(crate) fn more_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

/// `sh -c SCRIPT`.
pub(crate) fn sh(script: &str) -> ExecuteRequest {
    ExecuteRequest {
        program: "sh".into(),
        arguments: vec!["-c".into(), script.into()],
        ..ExecuteRequest::default()
    }
}

/// The code of an error.
pub(crate) fn code(payload: Payload) -> String {
    match payload {
        Payload::Error(error) => error.code,
        other => panic!("{other:?}"),
    }
}

/// Waits until something holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never came true: {what}");
}
