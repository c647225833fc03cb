//! The host's side: what a link makes of any bytes of a guest that has greeted, whichever call is under
//! way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use ghost_domain::VmId;
use ghost_domain::guest::{DirectoryMake, ExecRequest, FileWrite, GuestRequest, LinkMake};
use ghost_domain::ports::{ExecEvent, GuestLinks};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::guest_link::{GuestLinkOptions, GuestProgram, VirtioGuestLinks};
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    AgentMessage, AgentReady, ExecuteResponse, FileAttributes, FileReadResponse, FileWriteResponse,
    execute_response, file_read_response, file_write_response,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// The kinds of calls that a host makes.
pub const CALLS: u8 = 12;

/// A guest that greets, is asked for something, and then sends `data`: as a message of that call where
/// it is one, as it is otherwise. The call must come to an end, and the link must still be one
/// afterwards. The first byte says what the guest is asked for, twice its number, and with one more the
/// guest has said before that it has begun.
pub fn host(data: &[u8]) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return;
    };
    runtime.block_on(async {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ghost-{}-{number}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let work = tokio::time::timeout(Duration::from_secs(60), one(data, &path, &listener));
        let done = work.await;
        let _ = std::fs::remove_file(&path);
        assert!(done.is_ok(), "the link hangs");
    });
}

async fn one(data: &[u8], path: &std::path::Path, listener: &UnixListener) {
    let mut options = GuestLinkOptions::new(Arc::new(SystemClock::new()));
    options.program = GuestProgram::none();
    options.limits.reconnect.0 = Duration::from_millis(1);
    let links = Arc::new(VirtioGuestLinks::new(options));
    let vm = VmId::random();
    links.attach(vm, path);
    let (mut stream, _) = listener.accept().await.expect("the host connects");
    let mut decoder = Decoder::new();
    let Some(hello) = receive(&mut stream, &mut decoder).await else {
        return;
    };
    let ready = AgentReady {
        protocol_version: 1,
        capabilities: [
            "exec",
            "pty",
            "files",
            "links",
            "power",
            "password",
            "ssh_keys",
            "clock",
            "freeze",
            "telemetry",
        ]
        .map(str::to_owned)
        .to_vec(),
        ..AgentReady::default()
    };
    send(
        &mut stream,
        &message(&hello.session, &[], Payload::AgentReady(ready)),
    )
    .await;
    while links.status(vm).hello.is_none() {
        tokio::task::yield_now().await;
    }
    let first = data.first().copied().unwrap_or_default();
    let call = tokio::spawn({
        let links = Arc::clone(&links);
        async move { ask(&links, vm, (first >> 1) % CALLS).await }
    });
    let Some(asked) = receive(&mut stream, &mut decoder).await else {
        return;
    };
    if first % 2 == 1
        && let Some(begun) = begun(&asked)
    {
        let begun = message(&hello.session, &asked.message_id, begun);
        send(&mut stream, &begun).await;
    }
    match AgentMessage::decode(data.get(1..).unwrap_or_default()) {
        Ok(mut any) => {
            any.session.clone_from(&hello.session);
            any.message_id.clone_from(&asked.message_id);
            send(&mut stream, &any).await;
            any.message_id.clear();
            send(&mut stream, &any).await;
        }
        Err(_) => drop(stream.write_all(data).await),
    }
    drop(stream);
    // The channel is gone: whatever was said, nobody waits for more.
    let _ = call.await.expect("the call does not panic");
    assert_eq!(links.status(vm).running_calls, 0);
    // The host comes back.
    let _again = listener.accept().await.expect("the host connects again");
    links.detach(vm, "done");
}

/// Makes a call, and hears and says all of it that there is.
async fn ask(links: &VirtioGuestLinks, vm: VmId, which: u8) -> ghost_domain::Result<()> {
    let path = || "/x".to_owned();
    let short = match which {
        0 => {
            let mut request = ExecRequest::command("x", Vec::<String>::new());
            request.stdin = true;
            let mut session = links.execute(vm, request).await?;
            while !matches!(session.output.next().await?, ExecEvent::Exited(_)) {}
            return Ok(());
        }
        1 => {
            let (_, mut file) = links.read_file(vm, "/x", 0, None).await?;
            while !file.read().await?.is_empty() {}
            return Ok(());
        }
        2 => {
            let file = FileWrite {
                path: path(),
                size: 100_000,
                mode: 0o644,
                owner: None,
                modified_at: None,
                checksum: Some([1; 8]),
                resume: true,
                make_parents: false,
                no_replace: false,
            };
            let mut writer = links.write_file(vm, file).await?;
            let left = 100_000_u64.saturating_sub(writer.offset());
            writer
                .write(vec![1; usize::try_from(left).unwrap_or_default()])
                .await?;
            return writer.finish().await.map(drop);
        }
        3 => return links.stat(vm, "/x", true).await.map(drop),
        4 => return links.list(vm, "/", "", 0).await.map(drop),
        5 => {
            let directory = DirectoryMake {
                path: path(),
                mode: 0o755,
                owner: None,
                make_parents: true,
            };
            return links.make_directory(vm, directory).await;
        }
        6 => {
            let link = LinkMake {
                path: path(),
                target: "y".into(),
                owner: None,
                modified_at: None,
            };
            return links.make_link(vm, link).await;
        }
        7 => {
            let frozen = links.freeze(vm, Duration::from_secs(1), Vec::new());
            return frozen.await.map(drop);
        }
        8 => return links.thaw(vm).await.map(drop),
        9 => return links.ping(vm).await.map(drop),
        10 => GuestRequest::Shutdown {
            reboot: true,
            delay: Duration::ZERO,
        },
        _ => GuestRequest::SshKeys {
            user: "root".into(),
            add: vec!["ssh-ed25519 AAAA x".into()],
            remove: Vec::new(),
        },
    };
    links.request(vm, short).await
}

/// What a guest says first of a call that takes a while.
fn begun(asked: &AgentMessage) -> Option<Payload> {
    Some(match asked.payload.as_ref()? {
        Payload::Execute(_) => Payload::ExecuteResponse(ExecuteResponse {
            event: Some(execute_response::Event::Started(Default::default())),
        }),
        Payload::FileRead(_) => Payload::FileReadResponse(FileReadResponse {
            event: Some(file_read_response::Event::Opened(FileAttributes {
                kind: 1,
                size_bytes: 100,
                ..FileAttributes::default()
            })),
        }),
        Payload::FileWrite(_) => Payload::FileWriteResponse(FileWriteResponse {
            event: Some(file_write_response::Event::Accepted(Default::default())),
        }),
        _ => return None,
    })
}

fn message(session: &[u8], id: &[u8], payload: Payload) -> AgentMessage {
    AgentMessage {
        message_id: id.to_vec(),
        session: session.to_vec(),
        timestamp: None,
        payload: Some(payload),
    }
}

async fn send(stream: &mut UnixStream, message: &AgentMessage) {
    let mut out = BytesMut::new();
    if frame::encode(message, &mut out).is_ok() {
        let _ = stream.write_all(&out).await;
    }
}

async fn receive(stream: &mut UnixStream, decoder: &mut Decoder) -> Option<AgentMessage> {
    let mut piece = [0; 4096];
    loop {
        if let Some(Found::Message(message)) = decoder.next() {
            return Some(*message);
        }
        match stream.read(&mut piece).await {
            Ok(0) | Err(_) => return None,
            Ok(count) => decoder.push(&piece[..count]),
        }
    }
}
