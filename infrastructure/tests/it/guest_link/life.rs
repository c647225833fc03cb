//! Connecting, greeting, losing, coming back.

use std::io::{ErrorKind, Read as _, Write as _};
use std::time::Duration;

use ghost_domain::guest::ExecRequest;
use ghost_domain::ports::{ExecEvent, GuestEvent, GuestLinks};
use ghost_domain::{ErrorCode, VmId};
use ghost_proto::guest::v1::Stream;
use ghost_proto::guest::v1::agent_message::Payload;

use super::fake::{Channel, encode, eventually};
use super::{connected, links, links_with, next, served, wait_connected, wait_lost, within};

fn program(name: &str) -> ExecRequest {
    ExecRequest::command(name, Vec::<String>::new())
}

#[tokio::test]
async fn a_link_is_attached_before_its_socket_is_there_and_comes_back_after_a_loss() {
    let links = links();
    let vm = VmId::random();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.sock");
    links.attach(vm, &path);
    eventually("the cause is told", || {
        links.status(vm).channel_error.is_some()
    })
    .await;
    let error = links.execute(vm, program("true")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnreachable);

    let channel = Channel::new();
    links.detach(vm, "test");
    assert_eq!(links.status(vm), Default::default());
    links.attach(vm, channel.path());
    let mut events = links.subscribe();
    let mut guest = channel.accept().await;
    eventually("the channel", || links.status(vm).channel).await;
    let error = links.execute(vm, program("true")).await.unwrap_err();
    assert!(error.to_string().contains("hello"), "{error}");
    guest.greet().await;
    assert!(!wait_connected(&mut *events, vm).await);
    let status = links.status(vm);
    assert_eq!(status.hello.unwrap().operating_system, "Fake 1");
    assert!(status.connected_at.is_some() && status.last_seen.is_some());

    // QEMU goes, and comes back with a guest that was restarted meanwhile.
    drop(guest);
    wait_lost(&mut *events, vm).await;
    assert!(links.status(vm).hello.is_none());
    let mut guest = channel.accept().await;
    guest.boot_id = "boot-2".into();
    guest.greet().await;
    assert!(wait_connected(&mut *events, vm).await);
}

#[tokio::test]
async fn calls_end_when_the_channel_breaks_after_what_had_come() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("x")).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    let mut session = within(running).await.unwrap().unwrap();
    guest.output(&id, Stream::Stdout, b"last words").await;
    drop(guest);
    let mut got = Vec::new();
    let error = loop {
        match within(session.output.next()).await {
            Ok(event) => got.push(event),
            Err(error) => break error,
        }
    };
    assert_eq!(got[1..], [ExecEvent::Stdout(b"last words".to_vec())]);
    assert_eq!(error.code(), ErrorCode::GuestUnreachable);
    assert_eq!(
        within(session.input.write(vec![0; 1_000_000]))
            .await
            .unwrap_err()
            .code(),
        ErrorCode::WrongState
    );
}

#[tokio::test]
async fn an_agent_that_starts_anew_is_greeted_anew_and_its_old_words_are_dropped() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let mut events = links.subscribe();
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("x")).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    let mut session = within(running).await.unwrap().unwrap();
    session.output.next().await.unwrap();
    let old = guest.session.clone();
    // The new process has no session yet.
    guest.instance = b"another".to_vec();
    guest.session = Vec::new();
    let ready = guest.ready();
    guest.send(Vec::new(), Payload::AgentReady(ready)).await;
    assert!(wait_lost(&mut *events, vm).await.contains("agent"));
    let error = within(session.output.next()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnreachable);
    guest.greet().await;
    assert_ne!(guest.session, old);
    assert!(!wait_connected(&mut *events, vm).await);
    // A late answer of the old life is nobody's, even with the id of a call that runs.
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("y")).await }
    });
    let id = guest.receive_execute().await;
    let mut stale = guest.message(id.clone(), super::fake::exited(99));
    stale.session = old;
    guest.send_raw(&encode(&stale)).await;
    guest.started(&id).await;
    guest.exited(&id, 3).await;
    let mut session = within(running).await.unwrap().unwrap();
    let (.., exit) = super::collect(&mut *session.output).await.unwrap();
    assert_eq!(exit.code, 3);
    assert_eq!(links.status(vm).violations, 0);
}

#[tokio::test]
async fn a_guest_that_falls_silent_is_lost_and_found_again() {
    let links = links_with(|limits| {
        limits.ping_after = Duration::from_millis(30);
        limits.silence = Duration::from_millis(300);
        limits.greet_again = Duration::from_millis(50);
    });
    let (vm, _channel, mut guest) = connected(&links).await;
    let mut events = links.subscribe();
    assert!(wait_lost(&mut *events, vm).await.contains("silent"));
    let status = links.status(vm);
    assert!(status.channel && status.hello.is_none() && status.silent_since.is_some());
    let error = links.ping(vm).await.unwrap_err();
    assert!(error.to_string().contains("silent"), "{error}");
    // The guest goes on, as after a pause: it finds the pings of the old session, then a greeting.
    guest.greet().await;
    tokio::spawn(guest.serve());
    wait_connected(&mut *events, vm).await;
    within(async {
        while links.ping(vm).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(links.status(vm).silent_since, None);
}

#[tokio::test]
async fn a_connection_over_which_nothing_ever_comes_is_made_anew() {
    let links = links_with(|limits| limits.greet_again = Duration::from_millis(20));
    let vm = VmId::random();
    let channel = Channel::new();
    links.attach(vm, channel.path());
    let mut events = links.subscribe();
    let mute = channel.accept().await;
    let silent = within(channel.accept()).await;
    assert!(links.status(vm).channel);
    let mut guest = within(channel.accept()).await;
    assert!(links.status(vm).mute_connections >= 2);
    guest.greet().await;
    wait_connected(&mut *events, vm).await;
    assert_eq!(links.status(vm).mute_connections, 0);
    drop((mute, silent));
}

#[tokio::test]
async fn a_connection_that_falls_silent_for_good_is_made_anew() {
    let links = links_with(|limits| {
        limits.greet_again = Duration::from_millis(5);
        limits.ping_after = Duration::from_millis(5);
        limits.silence = Duration::from_millis(20);
    });
    let vm = VmId::random();
    let channel = Channel::new();
    links.attach(vm, channel.path());
    let mut events = links.subscribe();
    // Its agent has greeted, and then nothing comes of the port any more.
    let mute = within(channel.greeted()).await;
    wait_connected(&mut *events, vm).await;
    let mut guest = within(channel.accept()).await;
    guest.greet().await;
    wait_connected(&mut *events, vm).await;
    drop(mute);
}

#[tokio::test]
async fn a_guest_that_answers_pings_is_never_lost() {
    let links = links_with(|limits| {
        limits.ping_after = Duration::from_millis(5);
        limits.silence = Duration::from_secs(30);
    });
    let (vm, _channel) = served(&links).await;
    let seen = links.status(vm).last_seen;
    eventually("answers to pings", || links.status(vm).last_seen > seen).await;
    let seen = links.status(vm).last_seen;
    eventually("more of them", || links.status(vm).last_seen > seen).await;
    assert_eq!(links.status(vm).violations, 0);
}

#[tokio::test]
async fn garbage_before_the_greeting_is_passed_over() {
    let links = links();
    let vm = VmId::random();
    let channel = Channel::new();
    links.attach(vm, channel.path());
    let mut guest = channel.accept().await;
    // Half a frame of an earlier life.
    let whole = encode(&guest.message(
        vec![1; 16],
        super::fake::data_of(Stream::File, &[3; 60_000]),
    ));
    guest.send_raw(&whole[30_000..]).await;
    guest.greet().await;
    eventually("the greeting", || links.status(vm).hello.is_some()).await;
    assert_eq!(links.status(vm).violations, 0);
}

#[tokio::test]
async fn an_agent_of_no_common_version_is_shown_and_not_used() {
    let links = links();
    let vm = VmId::random();
    let channel = Channel::new();
    links.attach(vm, channel.path());
    let mut guest = channel.accept().await;
    guest.session = guest.receive().await.session;
    let mut ready = guest.ready();
    ready.protocol_version = 0;
    ready.oldest_version = 9;
    guest.send(Vec::new(), Payload::AgentReady(ready)).await;
    eventually("the greeting", || links.status(vm).hello.is_some()).await;
    assert_eq!(links.status(vm).hello.unwrap().protocol_version, 0);
    let error = links.execute(vm, program("true")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnsupported);
}

#[tokio::test]
async fn a_link_in_the_place_of_the_socket_is_not_followed() {
    let links = links();
    let vm = VmId::random();
    let channel = Channel::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest.sock");
    std::os::unix::fs::symlink(channel.path(), &path).unwrap();
    links.attach(vm, &path);
    eventually("the refusal", || {
        links
            .status(vm)
            .channel_error
            .is_some_and(|error| error.contains("none"))
    })
    .await;
}

#[tokio::test]
async fn detaching_ends_all_before_it_returns() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("x")).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    let mut session = within(running).await.unwrap().unwrap();
    session.output.next().await.unwrap();
    links.detach(vm, "the VM stopped");
    let error = session.output.next().await.unwrap_err();
    assert!(error.to_string().contains("the VM stopped"), "{error}");
    assert_eq!(links.status(vm), Default::default());
    assert!(within(guest.try_receive()).await.is_none());
}

/// QEMU as it is in the midst of a flood: it writes whenever it can, and looks for our end before.
/// Returns what a write of its failed with, if one did.
fn flooding(stream: std::os::unix::net::UnixStream) -> std::thread::JoinHandle<Option<ErrorKind>> {
    std::thread::spawn(move || {
        let (mut stream, mut heard) = (stream, [0; 4096]);
        let until_heard = |error: &std::io::Error| error.kind() == ErrorKind::WouldBlock;
        loop {
            match stream.read(&mut heard) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if until_heard(&error) => {}
                Err(error) => return Some(error.kind()),
            }
            match stream.write(&[b'A'; 16 * 1024]) {
                Ok(_) => {}
                Err(error) if until_heard(&error) => std::thread::yield_now(),
                Err(error) => return Some(error.kind()),
            }
        }
    })
}

/// What QEMU cannot hand over when a channel is let go it never gives back to the guest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_is_let_go_without_failing_a_write_of_qemu() {
    let links = links_with(|limits| limits.parting = Duration::from_secs(60));
    let mut events = links.subscribe();
    let (vm, _channel, guest) = connected(&links).await;
    let (_, _calm, calm) = connected(&links).await;
    let qemu = flooding(guest.stream.into_std().unwrap());
    let quiet = tokio::spawn(calm.serve());
    // From here on it is left unread, and QEMU waits with what it could not hand over.
    loop {
        if let GuestEvent::Misbehaved { vm: which, .. } = next(&mut *events).await {
            assert_eq!(which, vm);
            break;
        }
    }
    links.let_go(Duration::from_secs(60)).await;
    let failed = tokio::task::spawn_blocking(|| qemu.join().unwrap());
    assert_eq!(within(failed).await.unwrap(), None);
    within(quiet).await.unwrap();
    assert!(!links.status(vm).channel);
}

/// A guest that takes nothing keeps QEMU from seeing that we are going: nobody waits for it for long.
#[tokio::test]
async fn a_channel_whose_other_end_looks_at_nothing_is_let_go_all_the_same() {
    let links = links_with(|limits| limits.parting = Duration::from_millis(20));
    let (_, _channel, guest) = connected(&links).await;
    within(links.let_go(Duration::from_secs(60))).await;
    let mut guest = guest;
    assert!(within(guest.try_receive()).await.is_none());
}
