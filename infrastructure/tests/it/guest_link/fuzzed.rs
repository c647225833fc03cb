//! What is fuzzed of the host's side, over a corpus and its mutations in an ordinary run.

#[path = "../../../../fuzz/src/host.rs"]
#[expect(unreachable_pub, reason = "part of the fuzzing crate")]
mod host;

use std::path::Path;

use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, AgentReady, Done, Error, ExecuteResponse, FileAttributes, FileListResponse,
    FileReadResponse, FileStatResponse, FileWriteResponse, FreezeResponse, Pong, Stream,
    StreamData, Telemetry, WindowUpdate, execute_response, file_read_response, file_write_response,
};
use prost::Message;

/// One message of every kind that a guest sends.
fn corpus() -> Vec<(&'static str, Vec<u8>)> {
    let data = |stream: Stream| {
        Payload::StreamData(StreamData {
            stream: stream.into(),
            data: vec![b'x'; 100].into(),
            end: true,
        })
    };
    let payloads = [
        ("stdout", data(Stream::Stdout)),
        ("stderr", data(Stream::Stderr)),
        ("file", data(Stream::File)),
        (
            "window",
            Payload::WindowUpdate(WindowUpdate {
                stream: 1,
                bytes: u64::MAX,
            }),
        ),
        ("pong", Payload::Pong(Pong::default())),
        (
            "exited",
            Payload::ExecuteResponse(ExecuteResponse {
                event: Some(execute_response::Event::Exited(Default::default())),
            }),
        ),
        (
            "written",
            Payload::FileWriteResponse(FileWriteResponse::default()),
        ),
        (
            "read",
            Payload::FileReadResponse(FileReadResponse::default()),
        ),
        (
            "started",
            Payload::ExecuteResponse(ExecuteResponse {
                event: Some(execute_response::Event::Started(Default::default())),
            }),
        ),
        (
            "opened",
            Payload::FileReadResponse(FileReadResponse {
                event: Some(file_read_response::Event::Opened(FileAttributes {
                    kind: 1,
                    size_bytes: u64::MAX,
                    symlink_target: "/\u{1b}[2J".into(),
                    modified_at: Some(prost_types::Timestamp {
                        seconds: i64::MIN,
                        nanos: i32::MIN,
                    }),
                    ..FileAttributes::default()
                })),
            }),
        ),
        (
            "finished",
            Payload::FileReadResponse(FileReadResponse {
                event: Some(file_read_response::Event::Finished(
                    file_read_response::Finished {
                        size_bytes: u64::MAX,
                        checksum: vec![0; 9],
                    },
                )),
            }),
        ),
        (
            "accepted",
            Payload::FileWriteResponse(FileWriteResponse {
                event: Some(file_write_response::Event::Accepted(
                    file_write_response::Accepted { offset: u64::MAX },
                )),
            }),
        ),
        (
            "kept",
            Payload::FileWriteResponse(FileWriteResponse {
                event: Some(file_write_response::Event::Written(
                    file_write_response::Written {
                        size_bytes: 100_000,
                        checksum: vec![0; 8],
                    },
                )),
            }),
        ),
        (
            "listed",
            Payload::FileListResponse(FileListResponse::default()),
        ),
        (
            "stat",
            Payload::FileStatResponse(FileStatResponse::default()),
        ),
        ("frozen", Payload::FreezeResponse(FreezeResponse::default())),
        ("done", Payload::Done(Done {})),
        (
            "error",
            Payload::Error(Error {
                code: "io".into(),
                message: "\u{1b}[2J".into(),
            }),
        ),
        (
            "telemetry",
            Payload::Telemetry(Telemetry {
                cpu_percent: f64::NAN,
                ..Default::default()
            }),
        ),
        ("ready", Payload::AgentReady(AgentReady::default())),
    ];
    payloads
        .into_iter()
        .map(|(name, payload)| {
            let message = AgentMessage {
                payload: Some(payload),
                ..Default::default()
            };
            let mut bytes = vec![1];
            bytes.extend(message.encode_to_vec());
            (name, bytes)
        })
        .collect()
}

#[test]
fn the_corpus_of_the_host_and_its_mutations() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/host_link");
    let write = std::env::var_os("GHOST_FUZZ_WRITE").is_some();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for (name, bytes) in corpus() {
        let path = folder.join(name);
        if write {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(
            std::fs::read(&path).unwrap(),
            bytes,
            "make it with GHOST_FUZZ_WRITE=1"
        );
        // As it is in every call, then with bits turned over, the call's number among them.
        for first in 0..2 * host::CALLS {
            let mut of_call = bytes.clone();
            of_call[0] = first;
            host::host(&of_call);
        }
        for _ in 0..12 {
            let mut mutated = bytes.clone();
            for _ in 0..3 {
                // xorshift: the same inputs in every run.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let at = usize::try_from(state).unwrap() % mutated.len();
                mutated[at] ^= 1 << (state >> 61);
            }
            host::host(&mutated);
        }
    }
}
