//! `GuestService`: sessions, files, requests, lockdown and audit.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::StreamExt;
use ghost_domain::Principal;
use ghost_domain::guest::GuestTelemetry;
use ghost_domain::ports::GuestEvent;
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::guest_service_client::GuestServiceClient;
use message::exec_input::{Input, StdinEnd};
use message::exec_output::Output;
use message::write_guest_file_request::{End, Event as Sent};
use message::{read_guest_file_response as reading, write_guest_file_response as writing};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use super::*;
use crate::guests::{HOSTILE, hello, sum_of};

type Client = GuestServiceClient<Channel>;
type Inputs = mpsc::Sender<message::ExecInput>;

fn start(program: &str) -> message::ExecStart {
    message::ExecStart {
        vm: "web".into(),
        program: program.into(),
        stdin: true,
        ..Default::default()
    }
}

async fn exec(
    client: &mut Client,
    start: message::ExecStart,
) -> Result<(Inputs, Streaming<message::ExecOutput>), Status> {
    let (sender, receiver) = mpsc::channel(16);
    send(&sender, Input::Start(start)).await;
    let answer = client.exec(ReceiverStream::new(receiver)).await?;
    Ok((sender, answer.into_inner()))
}

async fn send(to: &Inputs, input: Input) {
    let message = message::ExecInput { input: Some(input) };
    to.send(message).await.unwrap();
}

async fn next(from: &mut Streaming<message::ExecOutput>) -> Output {
    from.message().await.unwrap().unwrap().output.unwrap()
}

fn exited(code: u32) -> Output {
    Output::Exited(message::ExecExited {
        code,
        ..Default::default()
    })
}

async fn client(served: &Served) -> Client {
    GuestServiceClient::new(served.local().await)
}

#[tokio::test]
async fn a_program_gets_stdin_and_the_end_of_messages_is_not_its_end() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let (to, mut from) = exec(&mut client, start("cat")).await.unwrap();
    send(&to, Input::Stdin(Bytes::from_static(b"hello"))).await;
    assert!(matches!(next(&mut from).await, Output::Started(one) if one.pid == 4711));
    assert_eq!(next(&mut from).await, Output::Stdout("hello".into()));
    send(&to, Input::StdinEnd(StdinEnd {})).await;
    assert_eq!(next(&mut from).await, exited(0));
    assert!(from.message().await.unwrap().is_none());

    let (to, mut from) = exec(&mut client, start("cat")).await.unwrap();
    send(&to, Input::Stdin(Bytes::from_static(b"x"))).await;
    drop(to);
    next(&mut from).await;
    assert_eq!(next(&mut from).await, Output::Stdout("x".into()));
    let guest = &served.world.knobs.guest;
    assert_eq!(guest.sessions.load(Ordering::SeqCst), 1, "it still runs");
    drop(from);
    until("hanging up cancels the program", || {
        guest.cancelled.load(Ordering::SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn sizes_and_signals_reach_the_program_and_impossible_ones_do_not() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let terminal = message::GuestTerminal {
        rows: 24,
        columns: 80,
        kind: "vt100".into(),
    };
    let shell = message::ExecStart {
        vm: "web".into(),
        login_shell: true,
        stdin: true,
        terminal: Some(terminal.clone()),
        ..Default::default()
    };
    let (to, mut from) = exec(&mut client, shell).await.unwrap();
    send(&to, Input::Signal(0)).await;
    send(&to, Input::Signal(300)).await;
    send(&to, Input::Resize(message::GuestTerminal::default())).await;
    send(&to, Input::Start(start("cat"))).await;
    to.send(message::ExecInput::default()).await.unwrap();
    send(&to, Input::Resize(terminal)).await;
    send(&to, Input::Signal(15)).await;
    next(&mut from).await;
    let Output::Exited(exit) = next(&mut from).await else {
        panic!("no exit");
    };
    assert_eq!(exit.signal, 15);
    let guest = &served.world.knobs.guest;
    assert_eq!(
        *guest.controls.lock().unwrap(),
        ["resize 24 80", "signal 15"]
    );
    let ran = guest.ran.lock().unwrap();
    assert_eq!(ran[0].terminal.as_ref().unwrap().kind, "vt100");
    assert_eq!(
        served.world.audit_actions(),
        ["shell begun", "shell signal 15"]
    );
}

#[tokio::test]
async fn output_comes_in_pieces_that_every_client_takes() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let (_to, mut from) = exec(&mut client, start("large")).await.unwrap();
    let (mut stdout, mut stderr) = (0, 0);
    loop {
        match next(&mut from).await {
            Output::Started(_) => {}
            Output::Stdout(data) => {
                assert!(data.len() <= 256 * 1024);
                stdout += data.len();
            }
            Output::Stderr(data) => {
                assert!(data.len() <= 256 * 1024);
                stderr += data.len();
            }
            Output::Exited(exit) => {
                assert!(exit.timed_out);
                assert_eq!(exit.truncated_bytes, 5);
                break;
            }
        }
    }
    assert_eq!((stdout, stderr), (2 << 20, 1 << 20));
}

#[tokio::test]
async fn a_caller_who_does_not_read_holds_up_only_its_own_program() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let (flood, stalled) = exec(&mut client, start("flood")).await.unwrap();
    let (deaf, mut unread) = exec(&mut client, start("deaf")).await.unwrap();
    next(&mut unread).await;
    // A program that does not read its stdin: what is sent to it waits, too.
    for _ in 0..2 {
        send(&deaf, Input::Stdin(Bytes::from(vec![b'y'; 64 * 1024]))).await;
    }
    let guest = &served.world.knobs.guest;
    for _ in 0..50 {
        let (_to, mut from) = exec(&mut client, start("true")).await.unwrap();
        next(&mut from).await;
        assert_eq!(next(&mut from).await, exited(0));
    }
    let taken = guest.flooded.load(Ordering::SeqCst) * 64 * 1024;
    assert!(
        taken < 16 << 20,
        "{taken} bytes are held for a caller who does not read"
    );
    // Both halves: HTTP/2 keeps a call open as long as the caller may still send.
    drop((stalled, unread, flood, deaf));
    until("both are cancelled", || {
        guest.cancelled.load(Ordering::SeqCst) == 2
    })
    .await;
}

#[tokio::test]
async fn a_lockdown_cuts_sessions_and_lets_nobody_in_until_it_is_lifted() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let (_to, mut from) = exec(&mut client, start("sleep")).await.unwrap();
    next(&mut from).await;
    let on = message::SetLockdownRequest {
        active: true,
        reason: "an incident".into(),
    };
    let answer = client.set_lockdown(on).await.unwrap().into_inner();
    assert!(answer.active && answer.sessions_cut == 1);
    let status = from.message().await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::PermissionDenied, "lockdown")
    );
    let status = exec(&mut client, start("true")).await.unwrap_err();
    assert_eq!(reason(&status), "lockdown");
    let get = message::GetLockdownRequest {};
    let told = client.get_lockdown(get).await.unwrap().into_inner();
    assert_eq!(told.reason, "an incident");
    assert!(told.since.is_some());
    client
        .set_lockdown(message::SetLockdownRequest::default())
        .await
        .unwrap();
    exec(&mut client, start("true")).await.unwrap();
}

#[tokio::test]
async fn what_keeps_a_caller_out_has_a_code() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let refused = async |client: &mut Client, vm: &str| {
        let start = message::ExecStart {
            vm: vm.into(),
            ..start("true")
        };
        exec(client, start)
            .await
            .map_or_else(|status| reason(&status), |_| "let in".to_owned())
    };
    assert_eq!(refused(&mut client, "nobody").await, "vm_not_found");
    let guest = &served.world.knobs.guest;
    guest.away.store(true, Ordering::SeqCst);
    assert_eq!(refused(&mut client, "web").await, "guest_unreachable");
    let ping = message::PingGuestRequest { vm: "web".into() };
    let status = client.ping(ping.clone()).await.unwrap_err();
    assert_eq!(reason(&status), "guest_unreachable");
    let get = message::GetGuestStatusRequest { vm: "web".into() };
    let told = client.get_status(get.clone()).await.unwrap().into_inner();
    assert!(!told.ready);
    guest.away.store(false, Ordering::SeqCst);
    let told = client.get_status(get).await.unwrap().into_inner();
    assert!(told.ready, "{told:?}");
    assert_eq!(told.agent_version, "1.2.3");
    let answer = client.ping(ping).await.unwrap().into_inner();
    assert_eq!(answer.round_trip.unwrap().nanos, 1_500_000);

    let closed = Served::of(World::closed().await, |_| {}).await;
    let mut client = GuestServiceClient::new(closed.local().await);
    assert_eq!(refused(&mut client, "web").await, "guest_access_off");

    let stopped = Served::new().await;
    let mut client = GuestServiceClient::new(stopped.local().await);
    assert_eq!(refused(&mut client, "web").await, "vm_not_running");
}

#[tokio::test]
async fn the_door_of_one_vm_is_shut_and_opened_by_those_who_may() {
    let served = Served::running().await;
    let mut operator = client(&served).await;
    let switch = |access| message::SetGuestAccessRequest {
        vm: "web".into(),
        access,
    };
    let confined = served.ca.client(served.world.confined[0]);
    let mut confined = GuestServiceClient::new(served.remote(Some(confined)).await);
    let answer = confined.set_access(switch(false)).await.unwrap();
    assert!(!answer.into_inner().access);
    let stat = || message::StatGuestFileRequest {
        vm: "web".into(),
        path: "/f".into(),
        follow: false,
    };
    let status = operator.stat_file(stat()).await.unwrap_err();
    assert_eq!(reason(&status), "guest_access_off");
    let status = confined.set_access(switch(true)).await.unwrap_err();
    assert_eq!(reason(&status), "permission_denied");
    let answer = operator.set_access(switch(true)).await.unwrap();
    assert!(answer.into_inner().access);
    let status = confined.stat_file(stat()).await.unwrap_err();
    assert_eq!(reason(&status), "permission_denied");
    // This host has no program to give.
    let update = message::UpdateGuestRequest { vm: "web".into() };
    let status = operator.update_guest(update).await.unwrap_err();
    assert_eq!(reason(&status), "guest_unsupported");
    let actions = served.world.audit_actions();
    assert!(
        actions.iter().any(|line| line.starts_with("access ok")),
        "{actions:?}"
    );
}

#[tokio::test]
async fn a_stream_that_does_not_say_what_it_is_about_is_refused() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let inputs = [
        vec![],
        vec![message::ExecInput::default()],
        vec![message::ExecInput {
            input: Some(Input::Stdin(Bytes::from_static(b"x"))),
        }],
        vec![message::ExecInput {
            input: Some(Input::Start(message::ExecStart {
                program: String::new(),
                ..start("")
            })),
        }],
        vec![message::ExecInput {
            input: Some(Input::Start(message::ExecStart {
                arguments: vec!["a\0b".into()],
                ..start("x")
            })),
        }],
    ];
    for input in inputs {
        let status = client.exec(tokio_stream::iter(input)).await.unwrap_err();
        assert_eq!(reason(&status), "invalid_argument", "{status:?}");
    }
    let status = client
        .write_file(tokio_stream::iter([message::WriteGuestFileRequest {
            event: Some(Sent::Data(Bytes::from_static(b"x"))),
        }]))
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "invalid_argument");
    assert!(served.world.knobs.guest.ran.lock().unwrap().is_empty());
}

async fn read(client: &mut Client, offset: u64, length: u64) -> Result<(Vec<u8>, Vec<u8>), Status> {
    let request = message::ReadGuestFileRequest {
        vm: "web".into(),
        path: "/f".into(),
        offset,
        length,
    };
    let mut from = client.read_file(request).await?.into_inner();
    let (mut data, mut sum) = (Vec::new(), Vec::new());
    let mut opened = false;
    while let Some(message) = from.message().await? {
        match message.event.unwrap() {
            reading::Event::Opened(file) => {
                assert_eq!((file.mode, file.uid, file.gid), (0o640, 7, 8));
                opened = true;
            }
            reading::Event::Data(piece) => {
                assert!(opened && piece.len() <= 256 * 1024 && !piece.is_empty());
                data.extend(piece);
            }
            reading::Event::Finished(end) => sum = end.checksum,
        }
    }
    Ok((data, sum))
}

async fn write(
    client: &mut Client,
    start: message::WriteGuestFileStart,
    rest: Vec<Sent>,
) -> Result<Vec<writing::Event>, Status> {
    let messages: Vec<_> = [Sent::Start(start)]
        .into_iter()
        .chain(rest)
        .map(|event| message::WriteGuestFileRequest { event: Some(event) })
        .collect();
    let answer = client.write_file(tokio_stream::iter(messages)).await?;
    let events: Vec<_> = answer.into_inner().collect().await;
    events
        .into_iter()
        .map(|one| one.map(|one| one.event.unwrap()))
        .collect()
}

#[tokio::test]
async fn files_go_both_ways_with_their_checksums() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let data: Vec<u8> = (0..700_000u32)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    let sum = sum_of(&data);
    let start = message::WriteGuestFileStart {
        vm: "web".into(),
        path: "/f".into(),
        size_bytes: sum.size,
        mode: 0o640,
        uid: 7,
        gid: 8,
        keep_owner: true,
        checksum: sum.checksum.to_vec(),
        ..Default::default()
    };
    // Breaks off: the target is not there, what came is kept.
    let half = Bytes::copy_from_slice(&data[..300_000]);
    let status = write(&mut client, start.clone(), vec![Sent::Data(half)])
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "invalid_argument");
    let guest = &served.world.knobs.guest;
    assert_eq!(guest.content("/f"), None);
    until("what came is kept", || {
        guest.left.lock().unwrap().len() == 300_000
    })
    .await;

    let resumed = message::WriteGuestFileStart {
        resume: true,
        ..start.clone()
    };
    let rest = Bytes::copy_from_slice(&data[300_000..]);
    let events = write(
        &mut client,
        resumed,
        vec![Sent::Data(rest), Sent::End(End {})],
    )
    .await
    .unwrap();
    assert_eq!(events[0], writing::Event::Accepted(300_000));
    let written = message::GuestFileSum {
        size_bytes: sum.size,
        checksum: sum.checksum.to_vec(),
    };
    assert_eq!(events[1], writing::Event::Written(written));
    assert_eq!(guest.content("/f").as_deref(), Some(&data[..]));

    let (back, checksum) = read(&mut client, 0, 0).await.unwrap();
    assert!(back == data && checksum == sum.checksum);
    let (part, _) = read(&mut client, 10, 5).await.unwrap();
    assert_eq!(part, &data[10..15]);

    guest.breaks_after.store(1, Ordering::SeqCst);
    let status = read(&mut client, 0, 0).await.unwrap_err();
    assert_eq!(reason(&status), "guest_unreachable");
    guest.breaks_after.store(usize::MAX, Ordering::SeqCst);

    let damaged = vec![Sent::Data(Bytes::from_static(b"other")), Sent::End(End {})];
    let status = write(&mut client, start.clone(), damaged)
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "checksum_mismatch");
    let outside = message::WriteGuestFileStart {
        path: "/proc/self/root/f".into(),
        ..start.clone()
    };
    let status = write(&mut client, outside, vec![]).await.unwrap_err();
    assert_eq!(reason(&status), "guest_path_denied");
    let status = write(&mut client, start.clone(), vec![Sent::Start(start)])
        .await
        .unwrap_err();
    assert_eq!(reason(&status), "invalid_argument");
    assert_eq!(guest.content("/f").as_deref(), Some(&data[..]));
}

#[tokio::test]
async fn directories_are_listed_made_and_looked_at() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let list = message::ListGuestFilesRequest {
        vm: "web".into(),
        path: "/".into(),
        after: String::new(),
        limit: 2,
    };
    let page = client.list_files(list).await.unwrap().into_inner();
    assert!(page.more);
    assert_eq!(page.files[1].name, HOSTILE, "names come as they are");
    assert_eq!(page.files[0].kind(), message::GuestFileKind::Symlink);
    let make = message::MakeGuestDirectoryRequest {
        vm: "web".into(),
        path: "/d".into(),
        mode: 0o755,
        ..Default::default()
    };
    client.make_directory(make).await.unwrap();
    let link = |target: &str| message::MakeGuestLinkRequest {
        vm: "web".into(),
        path: "/d/l".into(),
        target: target.into(),
        ..Default::default()
    };
    client.make_link(link("../elsewhere")).await.unwrap();
    for bad in ["", "a\0b", &"x".repeat(4096)] {
        let status = client.make_link(link(bad)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{bad:?}");
    }
    let guest = &served.world.knobs.guest;
    assert_eq!(
        *guest.controls.lock().unwrap(),
        ["mkdir /d 755", "link /d/l -> ../elsewhere"]
    );
    guest.put("/f", b"abc");
    let stat = |path: &str| message::StatGuestFileRequest {
        vm: "web".into(),
        path: path.into(),
        follow: true,
    };
    let file = client.stat_file(stat("/f")).await.unwrap().into_inner();
    assert_eq!((file.size_bytes, file.mode), (3, 0o640));
    let status = client.stat_file(stat("/none")).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::NotFound, "guest_file_not_found")
    );
    let status = client.stat_file(stat("relative")).await.unwrap_err();
    assert_eq!(reason(&status), "invalid_argument");
}

#[tokio::test]
async fn short_requests_reach_the_guest_and_the_audit_log_without_secrets() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let password = message::SetGuestPasswordRequest {
        vm: "web".into(),
        user: "root".into(),
        password: "geheim-123".into(),
        hashed: false,
    };
    let mut request = Request::new(password);
    request
        .metadata_mut()
        .insert("x-request-id", "ticket-7".parse().unwrap());
    client.set_password(request).await.unwrap();
    client
        .shutdown(message::ShutdownGuestRequest {
            vm: "web".into(),
            reboot: true,
            delay: None,
        })
        .await
        .unwrap();
    client
        .update_ssh_keys(message::UpdateGuestSshKeysRequest {
            vm: "web".into(),
            user: "ghost".into(),
            add: vec!["ssh-ed25519 AAAA me".into()],
            remove: vec![],
        })
        .await
        .unwrap();
    client
        .sync_clock(message::SyncGuestClockRequest { vm: "web".into() })
        .await
        .unwrap();
    let frozen = client
        .freeze(message::FreezeGuestRequest {
            vm: "web".into(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((frozen.count, frozen.warnings), (2, vec![HOSTILE.into()]));
    client
        .thaw(message::ThawGuestRequest { vm: "web".into() })
        .await
        .unwrap();
    let guest = &served.world.knobs.guest;
    assert_eq!(guest.requests.lock().unwrap().len(), 4);

    let list = message::ListAuditRequest {
        vm: "web".into(),
        ..Default::default()
    };
    let mut entries = Vec::new();
    // The second line of a call is written after its answer.
    while entries.len() < 12 {
        let listed = client.list_audit(list.clone()).await.unwrap().into_inner();
        entries = listed.map(Result::unwrap).collect().await;
    }
    assert_eq!(entries.len(), 12);
    let first = &entries[0];
    assert_eq!(
        (first.action.as_str(), first.outcome.as_str()),
        ("password", "begun")
    );
    assert_eq!(first.request_id, "ticket-7");
    assert_eq!(first.vm_name, "web");
    assert_eq!(first.hash.len(), 64);
    assert!(!format!("{entries:?}").contains("geheim"));
    let verdict = client
        .verify_audit(message::VerifyAuditRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(!verdict.intact);
    assert_eq!((verdict.entries, verdict.broken_at), (3, 2));
    assert_eq!(verdict.head, "ab".repeat(32));
}

#[tokio::test]
async fn revoking_somebody_ends_a_program_that_never_pauses() {
    let served = Served::running().await;
    let identity = served.ca.client(served.world.operator);
    let mut client = GuestServiceClient::new(served.remote(Some(identity)).await);
    let (_to, mut from) = exec(&mut client, start("flood")).await.unwrap();
    next(&mut from).await;
    let revoke = &served.world.use_cases().revoke_certificate;
    let id = served.world.operator.to_string();
    revoke.execute(&Principal::agent(), &id).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Err(status) = from.message().await {
                return status;
            }
        }
    });
    assert_eq!(reason(&ended.await.unwrap()), "unauthenticated");
}

#[tokio::test]
async fn telemetry_is_told_as_it_comes() {
    let served = Served::running().await;
    let mut client = client(&served).await;
    let guest = &served.world.knobs.guest;
    let watch = message::WatchTelemetryRequest { vm: "web".into() };
    let mut from = client.watch_telemetry(watch).await.unwrap().into_inner();
    let vm = served.world.vm;
    guest.tell(GuestEvent::Connected {
        vm,
        hello: hello(),
        rebooted: false,
    });
    let report = GuestTelemetry {
        processes: 7,
        memory_total_bytes: 1 << 20,
        memory_available_bytes: 1 << 18,
        swap_total_bytes: 10,
        swap_free_bytes: 11,
        users: vec![HOSTILE.into()],
        ..GuestTelemetry::default()
    };
    guest.tell(GuestEvent::Telemetry {
        vm,
        report: Box::new(report),
    });
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            let told = from.message().await.unwrap().unwrap();
            if told.processes > 0 {
                return told;
            }
        }
    });
    let told = waited.await.unwrap();
    let sample = told.sample.unwrap();
    assert_eq!(
        (told.vm_name.as_str(), sample.source.as_str()),
        ("web", "guest")
    );
    assert_eq!(sample.memory_used_bytes, Some(768 << 10));
    assert_eq!((told.processes, told.swap_used_bytes), (7, 0));
    assert_eq!(told.users, [HOSTILE]);
    assert_eq!(told.kernel, "6.1");
    let history = message::GetGuestHistoryRequest {
        vm: "web".into(),
        span: None,
    };
    let history = client.get_history(history).await.unwrap().into_inner();
    assert_eq!(
        history.samples.last().unwrap().memory_used_bytes,
        Some(768 << 10)
    );
}
