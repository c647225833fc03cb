//! The fuzzing targets over their corpus and mutations of it: what cargo-fuzz does, without its
//! compiler, and the same every time.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use ghost_proto::guest::frame;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, Cancel, ExecuteRequest, FileAttributes, FileListRequest, FileReadRequest,
    FileStatRequest, FileWriteRequest, FreezeRequest, Hello, MakeDirectoryRequest, MakeLinkRequest,
    Ping, Resize, SetClockRequest, SetPasswordRequest, ShutdownRequest, Signal, SshKeysRequest,
    StreamData, ThawRequest, UpdateRequest, WindowUpdate,
};
use prost::Message;

#[path = "../../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, dead_code, reason = "a crate of its own elsewhere")]
mod targets;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target)
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut seeds: Vec<_> = fs::read_dir(corpus(target))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty());
    seeds
}

/// Small and always the same (xorshift64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % most.max(1) as u64).unwrap()
    }
}

fn mutate(seed: &[u8], chance: &mut Chance) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=chance.below(4) {
        let at = chance.below(bytes.len());
        match chance.below(5) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << chance.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 0xff, 0x7f, 0x80][chance.below(4)],
            2 => bytes.truncate(at),
            3 => {
                let copy = bytes[at..].to_vec();
                bytes.extend_from_slice(&copy[..copy.len().min(64)]);
            }
            _ => bytes.insert(at, u8::try_from(chance.below(256)).unwrap()),
        }
    }
    bytes
}

#[test]
fn the_frame_decoder_takes_anything() {
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    for (name, seed) in seeds("guest_frame") {
        eprintln!("{name}");
        targets::frame(&seed);
        for _ in 0..500 {
            targets::frame(&mutate(&seed, &mut chance));
        }
    }
}

#[test]
fn the_agent_takes_any_message() {
    crate::host::more_descriptors();
    let directory = tempfile::tempdir().unwrap();
    for part in ["root", "etc", "run", "home"] {
        fs::create_dir(directory.path().join(part)).unwrap();
    }
    fs::write(
        directory.path().join("etc/passwd"),
        "root:x:0:0::/home:/bin/true\n",
    )
    .unwrap();
    fs::write(directory.path().join("etc/group"), "root:x:0:\n").unwrap();
    fs::write(directory.path().join("root/given"), [b'x'; 100_000]).unwrap();
    let mut chance = Chance(0x2545_f491_4f6c_dd1d);
    for (name, seed) in seeds("guest_message") {
        eprintln!("{name}");
        targets::message_in(directory.path(), &seed);
        for _ in 0..200 {
            targets::message_in(directory.path(), &mutate(&seed, &mut chance));
        }
    }
}

fn messages() -> Vec<(&'static str, Payload)> {
    let path = || "/x".to_owned();
    vec![
        (
            "hello",
            Payload::Hello(Hello {
                newest_version: 1,
                ..Hello::default()
            }),
        ),
        (
            "ping",
            Payload::Ping(Ping {
                payload: vec![1; 40],
            }),
        ),
        ("cancel", Payload::Cancel(Cancel {})),
        ("signal", Payload::Signal(Signal { number: 9 })),
        (
            "resize",
            Payload::Resize(Resize {
                rows: 1,
                columns: u32::MAX,
            }),
        ),
        ("thaw", Payload::Thaw(ThawRequest {})),
        ("freeze", Payload::Freeze(FreezeRequest::default())),
        (
            "execute",
            Payload::Execute(ExecuteRequest {
                program: "true".into(),
                ..ExecuteRequest::default()
            }),
        ),
        (
            "shutdown",
            Payload::Shutdown(ShutdownRequest {
                mode: 1,
                delay: None,
            }),
        ),
        (
            "update",
            Payload::Update(UpdateRequest {
                size_bytes: 1,
                ..UpdateRequest::default()
            }),
        ),
        (
            "clock",
            Payload::SetClock(SetClockRequest {
                now: Some(prost_types::Timestamp {
                    seconds: i64::MIN,
                    nanos: i32::MIN,
                }),
            }),
        ),
        (
            "password",
            Payload::SetPassword(SetPasswordRequest {
                user: "root".into(),
                password: "$6$a$b".into(),
                hashed: true,
            }),
        ),
        (
            "keys",
            Payload::SshKeys(SshKeysRequest {
                user: "root".into(),
                add: vec!["ssh-rsa AAAA x".into()],
                remove: vec![],
            }),
        ),
        (
            "write",
            Payload::FileWrite(FileWriteRequest {
                path: path(),
                attributes: Some(FileAttributes {
                    size_bytes: u64::MAX,
                    mode: u32::MAX,
                    ..FileAttributes::default()
                }),
                checksum: vec![0; 16],
                resume: true,
                make_parents: true,
                ..FileWriteRequest::default()
            }),
        ),
        (
            "read",
            Payload::FileRead(FileReadRequest {
                path: path(),
                offset: u64::MAX,
                length: u64::MAX,
            }),
        ),
        (
            "stat",
            Payload::FileStat(FileStatRequest {
                path: path(),
                follow: true,
            }),
        ),
        (
            "list",
            Payload::FileList(FileListRequest {
                path: "/".into(),
                after: "a".into(),
                limit: u32::MAX,
            }),
        ),
        (
            "mkdir",
            Payload::MakeDirectory(MakeDirectoryRequest {
                path: "/a/b/c".into(),
                make_parents: true,
                ..MakeDirectoryRequest::default()
            }),
        ),
        (
            "link",
            Payload::MakeLink(MakeLinkRequest {
                path: "/a".into(),
                target: "../../etc".into(),
                keep_owner: true,
                uid: u32::MAX,
                ..MakeLinkRequest::default()
            }),
        ),
        (
            "data",
            Payload::StreamData(StreamData {
                stream: 4,
                data: vec![1; 100].into(),
                end: true,
            }),
        ),
        (
            "window",
            Payload::WindowUpdate(WindowUpdate {
                stream: 4,
                bytes: u64::MAX,
            }),
        ),
    ]
}

/// `GHOST_FUZZ_WRITE=1` writes the corpus anew, from every message there is.
#[test]
fn the_corpus_has_every_message() {
    let write = std::env::var_os("GHOST_FUZZ_WRITE").is_some();
    for (name, payload) in messages() {
        let message = AgentMessage {
            message_id: vec![3; 16],
            session: vec![7; 16],
            payload: Some(payload),
            timestamp: None,
        };
        let mut framed = BytesMut::from(&b"\x05login: \xf7G"[..]);
        frame::encode(&message, &mut framed).unwrap();
        frame::encode(&message, &mut framed).unwrap();
        for (target, bytes) in [
            ("guest_message", message.encode_to_vec()),
            ("guest_frame", framed.to_vec()),
        ] {
            let path = corpus(target).join(name);
            if write {
                fs::write(&path, &bytes).unwrap();
            }
            assert_eq!(fs::read(&path).unwrap(), bytes, "{}", path.display());
        }
    }
}
