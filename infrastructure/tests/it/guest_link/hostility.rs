//! Guests that mean harm: each kind is told, held off, and costs the others nothing.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ghost_domain::guest::ExecRequest;
use ghost_domain::ports::{ExecEvent, GuestEvent, GuestLinks};
use ghost_domain::{ErrorCode, VmId};
use ghost_infrastructure::guest_link::VirtioGuestLinks;
use ghost_proto::guest::v1::Stream;
use ghost_proto::guest::v1::agent_message::Payload;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;

use super::fake::eventually;
use super::hostile::{Behaviour, attack};
use super::{collect, connected, links_with, next, served, within};

/// A VM whose guest attacks whenever the host connects.
pub(super) struct Enemy {
    pub(super) vm: VmId,
    stop: Arc<AtomicBool>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Enemy {
    pub(super) fn new(behaviour: Behaviour) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let _ = attack(File::from(OwnedFd::from(stream)), behaviour, &ended);
            }
        });
        Self {
            vm: VmId::random(),
            stop,
            path,
            _folder: folder,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Enemy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for the next connection.
        drop(std::os::unix::net::UnixStream::connect(&self.path));
    }
}

fn program(name: &str) -> ExecRequest {
    ExecRequest::command(name, Vec::<String>::new())
}

fn quick() -> Arc<VirtioGuestLinks> {
    links_with(|limits| {
        limits.hold_off = (Duration::from_millis(50), Duration::from_millis(400));
        limits.partial_frame = Duration::from_millis(30);
        limits.answer = Duration::from_secs(2);
    })
}

/// The other VM answers while one attacks.
async fn others_work(links: &VirtioGuestLinks, good: VmId) {
    for _ in 0..20 {
        let mut session = within(links.execute(good, program("true"))).await.unwrap();
        let (.., exit) = collect(&mut *session.output).await.unwrap();
        assert_eq!(exit.code, 0);
    }
}

async fn is_held_off(behaviour: Behaviour) {
    let links = quick();
    let (good, _channel) = served(&links).await;
    let enemy = Enemy::new(behaviour);
    let mut events = links.subscribe();
    links.attach(enemy.vm, enemy.path());
    // Programs give those who wait for one something to answer.
    let calling = tokio::spawn({
        let (links, vm) = (links.clone(), enemy.vm);
        async move {
            loop {
                if let Ok(mut session) = links.execute(vm, program("x")).await {
                    let _ = collect(&mut *session.output).await;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    });
    // Twice: it comes back, and is held off again.
    let mut times = 0;
    while times < 2 {
        match next(&mut *events).await {
            GuestEvent::Misbehaved { vm, detail } => {
                assert_eq!(vm, enemy.vm);
                assert!(!detail.is_empty() && detail.is_ascii());
                let status = links.status(vm);
                assert!(status.hello.is_none());
                times += 1;
            }
            GuestEvent::Disconnected { vm, reason } => assert_eq!(vm, enemy.vm, "{reason}"),
            _ => {}
        }
        others_work(&links, good).await;
    }
    calling.abort();
    let _ = calling.await;
    assert_eq!(links.status(enemy.vm).running_calls, 0);
    assert_eq!(links.status(good).violations, 0);
}

#[tokio::test]
async fn garbage() {
    is_held_off(Behaviour::Garbage).await;
}

#[tokio::test]
async fn frames_whose_checksum_is_wrong() {
    is_held_off(Behaviour::FalseFrames).await;
}

#[tokio::test]
async fn lengths_that_lie() {
    is_held_off(Behaviour::Oversize).await;
}

#[tokio::test]
async fn frames_without_a_message() {
    is_held_off(Behaviour::Malformed).await;
}

#[tokio::test]
async fn messages_without_content() {
    is_held_off(Behaviour::Empty).await;
}

#[tokio::test]
async fn a_flood_of_reports() {
    is_held_off(Behaviour::Telemetry).await;
}

#[tokio::test]
async fn answers_to_calls_that_never_were() {
    is_held_off(Behaviour::Unknown).await;
}

#[tokio::test]
async fn messages_of_other_sessions() {
    is_held_off(Behaviour::Stale).await;
}

#[tokio::test]
async fn an_agent_that_starts_all_the_time() {
    is_held_off(Behaviour::Restarts).await;
}

#[tokio::test]
async fn output_beyond_the_window() {
    is_held_off(Behaviour::Overrun).await;
}

#[tokio::test]
async fn answers_of_the_wrong_kind() {
    is_held_off(Behaviour::WrongAnswer).await;
}

#[tokio::test]
async fn grants_of_what_was_never_sent() {
    is_held_off(Behaviour::Grants).await;
}

#[tokio::test]
async fn a_frame_that_never_ends() {
    is_held_off(Behaviour::Drip).await;
}

/// What is within the rules is not punished, and neither does it hurt.
#[tokio::test]
async fn a_flood_within_the_rules_costs_the_others_nothing() {
    // Its frames may take their time: on a busy machine the enemy is in the middle of one for long.
    let links = links_with(|limits| limits.answer = Duration::from_secs(10));
    let (good, _channel) = served(&links).await;
    let enemy = Enemy::new(Behaviour::OneByte);
    links.attach(enemy.vm, enemy.path());
    eventually("the greeting", || links.status(enemy.vm).hello.is_some()).await;
    let mut session = links.execute(enemy.vm, program("x")).await.unwrap();
    let reading = tokio::spawn(async move {
        let mut read = 0;
        while read < 100_000 {
            if let ExecEvent::Stdout(data) = session.output.next().await.unwrap() {
                read += data.len();
            }
        }
    });
    others_work(&links, good).await;
    within(reading).await.unwrap();
    assert_eq!(links.status(enemy.vm).violations, 0);
}

#[tokio::test]
async fn a_guest_that_never_answers_is_a_deadline_and_a_lockdown_does_not_wait_for_it() {
    for behaviour in [Behaviour::NeverAnswer, Behaviour::NeverRead] {
        let links = links_with(|limits| limits.answer = Duration::from_millis(100));
        let (good, _channel) = served(&links).await;
        let enemy = Enemy::new(behaviour);
        links.attach(enemy.vm, enemy.path());
        eventually("the greeting", || links.status(enemy.vm).hello.is_some()).await;
        // So much that a guest which does not read fills every buffer.
        for _ in 0..30 {
            let request = ExecRequest::command("x", vec!["y".repeat(100_000)]);
            let error = within(links.execute(enemy.vm, request))
                .await
                .map(drop)
                .unwrap_err();
            assert_eq!(error.code(), ErrorCode::DeadlineExceeded);
        }
        others_work(&links, good).await;
        let waiting = tokio::spawn({
            let (links, vm) = (links.clone(), enemy.vm);
            async move { links.execute(vm, program("x")).await.map(drop) }
        });
        eventually("the call", || links.status(enemy.vm).running_calls == 1).await;
        assert_eq!(links.lock_down(true), 1);
        assert_eq!(
            within(waiting).await.unwrap().unwrap_err().code(),
            ErrorCode::Lockdown
        );
    }
}

#[tokio::test]
async fn lies_are_told_clamped_and_clean() {
    let links = quick();
    let enemy = Enemy::new(Behaviour::Lies);
    let mut events = links.subscribe();
    links.attach(enemy.vm, enemy.path());
    let clean = |text: &str| !text.chars().any(|c| c.is_control() || c == '\u{202e}');
    loop {
        match next(&mut *events).await {
            GuestEvent::Connected { hello, .. } => {
                assert!(hello.agent_version.len() <= 64 && clean(&hello.agent_version));
                assert!(hello.operating_system.len() <= 128 && clean(&hello.operating_system));
                assert!(clean(&hello.kernel) && clean(&hello.hostname));
                assert!(hello.capabilities.len() <= 32);
                assert!(
                    hello
                        .capabilities
                        .iter()
                        .all(|name| name.is_ascii() && clean(name))
                );
                assert!(hello.program_sha256.is_empty());
            }
            GuestEvent::Telemetry { report, .. } => {
                assert_eq!(report.cpu.user, 0.0);
                assert_eq!(report.cpu_percent, 0.0);
                assert!(report.load.iter().all(|load| load.is_finite()));
                assert!(i64::try_from(report.memory_total_bytes).is_ok());
                assert_eq!(
                    (report.filesystems.len(), report.interfaces.len()),
                    (32, 16)
                );
                assert!(report.filesystems.iter().all(|fs| clean(&fs.mount_point)));
                assert!(report.interfaces.iter().all(|i| i.addresses.is_empty()));
                assert!(
                    report
                        .users
                        .iter()
                        .all(|user| clean(user) && user.len() <= 64)
                );
                assert!(report.cloud_init.errors.iter().all(|error| clean(error)));
                assert_eq!(report.cloud_init.status, "");
                assert!(!report.cloud_init.is_finished());
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(links.status(enemy.vm).violations, 0);
}

/// Everything a guest could learn to answer another guest's call with is 128 random bits; and
/// within one guest, an answer counts for the call it names alone.
#[tokio::test]
async fn an_answer_to_another_call_reaches_nobody_else() {
    let links = quick();
    let (one, _first, mut guest) = connected(&links).await;
    let (two, _second, mut other) = connected(&links).await;
    let begin = |vm| {
        let links = links.clone();
        tokio::spawn(async move { links.execute(vm, program("x")).await })
    };
    let first = begin(one);
    let id = guest.receive_execute().await;
    let second = begin(two);
    let stolen = other.receive_execute().await;
    assert_ne!(id, stolen);
    // The first guest answers the second's call, with the right session of its own.
    guest.started(&stolen).await;
    guest.output(&stolen, Stream::Stdout, b"forged").await;
    guest.started(&id).await;
    within(first).await.unwrap().unwrap();
    assert!(!second.is_finished());
    other.started(&stolen).await;
    other.output(&stolen, Stream::Stdout, b"true").await;
    other.exited(&stolen, 0).await;
    let mut session = within(second).await.unwrap().unwrap();
    let (out, ..) = collect(&mut *session.output).await.unwrap();
    assert_eq!(out, b"true");
    // Not even with the session of the other.
    let forged = ghost_proto::guest::v1::AgentMessage {
        session: other.session.clone(),
        ..guest.message(id.clone(), Payload::Done(Default::default()))
    };
    guest.send_raw(&super::fake::encode(&forged)).await;
    assert!(links.status(one).hello.is_some());
}

/// QEMU loses a buffer of the guest's port whenever it is hung up on in the midst of a flood; so a
/// flood is waited out, and the port let go when it is quiet.
#[tokio::test]
async fn nobody_hangs_up_on_a_flood() {
    let links = quick();
    let vm = VmId::random();
    let channel = super::fake::Channel::new();
    links.attach(vm, channel.path());
    let mut events = links.subscribe();
    let guest = within(channel.accept()).await;
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let flood = tokio::spawn(async move {
        let noise = vec![b'A'; 256 * 1024];
        let mut stream = guest.stream;
        loop {
            tokio::select! {
                _ = &mut stopped => return Ok(stream),
                written = stream.write_all(&noise) => written?,
            }
        }
    });
    let mut details = Vec::new();
    while details.len() < 3 {
        if let GuestEvent::Misbehaved { detail, .. } = next(&mut *events).await {
            details.push(detail);
        }
        assert!(!flood.is_finished(), "hung up after {details:?}");
    }
    assert_eq!(details[0], "bytes that belong to no frame");
    assert!(details[2].contains("goes on"), "{details:?}");
    assert!(links.status(vm).held_off_until.is_some());
    stop.send(()).unwrap();
    let flooded: std::io::Result<UnixStream> = flood.await.unwrap();
    let _still_there = flooded.unwrap();
    // Quiet, and still there: now it is let go, and met anew.
    let mut guest = within(channel.accept()).await;
    guest.greet().await;
    loop {
        if let GuestEvent::Connected { .. } = next(&mut *events).await {
            break;
        }
    }
    assert_eq!(links.status(vm).held_off_until, None);
}
