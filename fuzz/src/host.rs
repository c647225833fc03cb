//! The host's side: what a link makes of any bytes of a guest that has greeted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use ghost_domain::VmId;
use ghost_domain::guest::ExecRequest;
use ghost_domain::ports::GuestLinks;
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::guest_link::{GuestLinkOptions, GuestProgram, VirtioGuestLinks};
use ghost_proto::guest::frame::{self, Decoder, Found};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{AgentMessage, AgentReady};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A guest that greets, is asked to run a program, and then sends `data`: as a message of that call
/// where it is one, as it is otherwise. The call must come to an end, and the link must still be
/// one afterwards.
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
        capabilities: vec!["exec".into()],
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
    let call = tokio::spawn({
        let links = Arc::clone(&links);
        async move {
            let mut request = ExecRequest::command("x", Vec::<String>::new());
            request.stdin = true;
            let mut session = links.execute(vm, request).await?;
            loop {
                if let ghost_domain::ports::ExecEvent::Exited(exit) = session.output.next().await? {
                    return Ok::<_, ghost_domain::Error>(exit);
                }
            }
        }
    });
    let Some(execute) = receive(&mut stream, &mut decoder).await else {
        return;
    };
    let started = ghost_proto::guest::v1::ExecuteResponse {
        event: Some(ghost_proto::guest::v1::execute_response::Event::Started(
            Default::default(),
        )),
    };
    // With an odd first byte the program has started before.
    if data.first().is_some_and(|first| first % 2 == 1) {
        let started = message(
            &hello.session,
            &execute.message_id,
            Payload::ExecuteResponse(started),
        );
        send(&mut stream, &started).await;
    }
    match AgentMessage::decode(data.get(1..).unwrap_or_default()) {
        Ok(mut any) => {
            any.session.clone_from(&hello.session);
            any.message_id.clone_from(&execute.message_id);
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
