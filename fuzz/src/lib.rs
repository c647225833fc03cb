//! What is fuzzed. The ordinary tests of `ghost-guest` run these over the corpus and its mutations.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use ghost_guest::power::{PowerMode, System};
use ghost_guest::{Capability, Channel, End, Options, serve};
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, ExecuteRequest, FileAttributes, FileReadRequest, FileWriteRequest, Hello, Ping,
    Terminal,
};
use prost::Message;

/// The frame decoder: the same is found however the bytes are cut, and none is lost or made up.
pub fn frame(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let whole = decode(rest, rest.len().max(1));
    let pieces = decode(rest, usize::from(*first).max(1));
    assert_eq!(whole, pieces);
}

fn decode(data: &[u8], piece: usize) -> (Vec<AgentMessage>, usize, usize) {
    let mut decoder = Decoder::new();
    let (mut messages, mut malformed, mut garbage) = (Vec::new(), 0, 0);
    for piece in data.chunks(piece) {
        decoder.push(piece);
        while let Some(found) = decoder.next() {
            match found {
                Found::Message(message) => messages.push(*message),
                Found::Malformed => malformed += 1,
                Found::Garbage(bytes) => garbage += bytes,
            }
        }
    }
    assert!(garbage + (messages.len() + malformed) * frame::HEADER <= data.len());
    (messages, malformed, garbage)
}

/// Nothing here reaches the machine that fuzzes.
struct Nowhere;

impl System for Nowhere {
    fn power(&self, _: PowerMode) -> std::io::Result<()> {
        Ok(())
    }

    fn set_clock(&self, _: Duration) -> std::io::Result<()> {
        Ok(())
    }
}

const SESSION: [u8; 16] = [7; 16];
const LAST: [u8; 16] = [9; 16];

/// A whole agent that is sent one message, made to fit its session where it can be, while calls are
/// under way that it may belong to: it must answer the ping that follows. Nothing of the machine is
/// reached: the only programs that run are `true` and `cat`, nothing that is named to be frozen is
/// there, and no update can be what it claims to be.
pub fn message_in(directory: &Path, data: &[u8]) {
    let (mut host, guest) = UnixStream::pair().expect("a socket pair");
    host.set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    let options = Options {
        capabilities: Capability::ALL.to_vec(),
        program: Some(directory.join("root/ghost-guest")),
        roots: vec![directory.join("root")],
        hooks: directory.join("hooks"),
        sysroot: directory.to_path_buf(),
        system: Arc::new(Nowhere),
        ..Options::default()
    };
    let agent = std::thread::spawn(move || {
        let channel = Channel::try_from(guest).expect("a channel");
        serve(&channel, &options)
    });
    let mut out = BytesMut::new();
    let mut send = |id: &[u8], payload: Option<Payload>| {
        let message = AgentMessage {
            message_id: id.to_vec(),
            session: SESSION.to_vec(),
            payload,
            timestamp: None,
        };
        let _ = frame::encode(&message, &mut out);
    };
    send(
        &[],
        Some(Payload::Hello(Hello {
            oldest_version: 1,
            newest_version: 1,
            ..Hello::default()
        })),
    );
    if let Ok(mut message) = AgentMessage::decode(data) {
        let root = directory.join("root").display().to_string();
        match &mut message.payload {
            Some(Payload::FileWrite(request)) => request.path.insert_str(0, &root),
            Some(Payload::FileRead(request)) => request.path.insert_str(0, &root),
            Some(Payload::FileStat(request)) => request.path.insert_str(0, &root),
            Some(Payload::FileList(request)) => request.path.insert_str(0, &root),
            Some(Payload::MakeDirectory(request)) => request.path.insert_str(0, &root),
            Some(Payload::MakeLink(request)) => request.path.insert_str(0, &root),
            Some(Payload::Execute(request)) => {
                request.program = "/bin/true".into();
                // A library of the machine's would be another program.
                request
                    .environment
                    .retain(|name, _| !name.starts_with("LD_"));
            }
            Some(Payload::Freeze(request)) => {
                for point in &mut request.mount_points {
                    point.insert_str(0, "/no/such/place/");
                }
                request.mount_points.push("/no/such/place".into());
            }
            _ => {}
        }
        // A greeting of its own would end the session that the ping belongs to.
        if !matches!(message.payload, Some(Payload::Hello(_))) {
            let under_way = matches!(
                message.payload,
                Some(
                    Payload::StreamData(_)
                        | Payload::WindowUpdate(_)
                        | Payload::Signal(_)
                        | Payload::Resize(_)
                        | Payload::Cancel(_)
                )
            );
            let calls = if under_way { calls(&root) } else { Vec::new() };
            for (id, call) in calls {
                send(&id, Some(call));
                send(&id, message.payload.clone());
            }
            send(&[1; 16], message.payload.clone());
            send(&message.message_id, message.payload);
        }
    }
    send(&LAST, Some(Payload::Ping(Ping { payload: vec![1] })));
    host.write_all(data).expect("sent");
    host.write_all(&out).expect("sent");
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; 64 * 1024];
    'alive: loop {
        let read = match host.read(&mut buffer) {
            Ok(read @ 1..) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            other => {
                drop(host);
                let agent = agent.join();
                panic!("no answer: {other:?}; the agent: {agent:?}; sent: {data:02x?}");
            }
        };
        decoder.push(&buffer[..read]);
        while let Some(found) = decoder.next() {
            let Found::Message(message) = found else {
                panic!("the agent sent what is no message: {found:?}");
            };
            if message.message_id == LAST && matches!(message.payload, Some(Payload::Pong(_))) {
                break 'alive;
            }
        }
    }
    drop(host);
    assert_eq!(
        agent.join().expect("no panic").expect("no failure"),
        End::Closed
    );
}

/// Calls that go on for a while: a program, one in a terminal, and a file either way.
fn calls(root: &str) -> Vec<([u8; 16], Payload)> {
    let program = |terminal| {
        Payload::Execute(ExecuteRequest {
            program: "/bin/cat".into(),
            stdin: true,
            terminal,
            ..ExecuteRequest::default()
        })
    };
    vec![
        ([2; 16], program(None)),
        (
            [3; 16],
            program(Some(Terminal {
                rows: 24,
                columns: 80,
                kind: "dumb".into(),
            })),
        ),
        (
            [4; 16],
            Payload::FileWrite(FileWriteRequest {
                path: format!("{root}/taken"),
                attributes: Some(FileAttributes {
                    size_bytes: 100,
                    mode: 0o644,
                    ..FileAttributes::default()
                }),
                ..FileWriteRequest::default()
            }),
        ),
        (
            [5; 16],
            Payload::FileRead(FileReadRequest {
                path: format!("{root}/given"),
                ..FileReadRequest::default()
            }),
        ),
    ]
}

/// [`message_in`] a directory of its own, made once.
pub fn message(data: &[u8]) {
    let directory = std::env::temp_dir().join(format!("ghost-fuzz-{}", std::process::id()));
    for part in ["root", "etc", "run", "home"] {
        std::fs::create_dir_all(directory.join(part)).expect("a directory");
    }
    let passwd = directory.join("etc/passwd");
    if !passwd.exists() {
        std::fs::write(passwd, "root:x:0:0::/home:/bin/true\n").expect("a file");
        std::fs::write(directory.join("etc/group"), "root:x:0:\n").expect("a file");
        std::fs::write(directory.join("root/given"), [b'x'; 100_000]).expect("a file");
    }
    message_in(&directory, data);
}
