//! Calls: answers, windows, bounds, ends.

use std::time::Duration;

use ghost_domain::ErrorCode;
use ghost_domain::guest::{ExecRequest, FileWrite};
use ghost_domain::ports::{ExecEvent, GuestLinks};
use ghost_proto::guest::Flow;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    Done, Error as GuestError, FileAttributes, FileListResponse, FileReadResponse,
    FileWriteResponse, Stream, file_list_response, file_read_response, file_write_response,
};

use super::fake::{data_of, eventually};
use super::{collect, connected, links, links_with, served, within};

fn program(name: &str) -> ExecRequest {
    ExecRequest::command(name, Vec::<String>::new())
}

#[tokio::test]
async fn a_program_runs_with_input_and_output() {
    let links = links();
    let (vm, _channel) = served(&links).await;
    let mut request = program("cat");
    request.stdin = true;
    let session = links.execute(vm, request).await.unwrap();
    let sent: Vec<u8> = (0..3_000_000u32).map(|at| (at % 251) as u8).collect();
    let (mut output, input) = (session.output, session.input);
    let writer = {
        let sent = sent.clone();
        tokio::spawn(async move {
            for piece in sent.chunks(100_000) {
                input.write(piece.to_vec()).await.unwrap();
            }
            input.end().await.unwrap();
        })
    };
    let (out, err, exit) = collect(&mut *output).await.unwrap();
    writer.await.unwrap();
    assert!(out == sent && err.is_empty());
    assert_eq!((exit.code, exit.signal), (0, None));
    // Nothing follows the end, and asking again does not hang.
    assert!(matches!(output.next().await.unwrap(), ExecEvent::Exited(_)));
    drop(output);
    assert_eq!(links.status(vm).running_calls, 0);
    assert!(links.ping(vm).await.unwrap() < Duration::from_secs(60));
}

#[tokio::test]
async fn who_does_not_read_stalls_only_itself() {
    let links = links();
    let (vm, _channel) = served(&links).await;
    let mut request = ExecRequest::command("spew", ["10000000"]);
    request.stdin = false;
    let mut slow = links.execute(vm, request.clone()).await.unwrap();
    // The other comes to its end although the first holds a full window.
    let mut quick = links.execute(vm, request).await.unwrap();
    let (out, ..) = collect(&mut *quick.output).await.unwrap();
    assert_eq!(out.len(), 10_000_000);
    let (out, ..) = collect(&mut *slow.output).await.unwrap();
    assert_eq!(out.len(), 10_000_000);
}

#[tokio::test]
async fn dropping_the_output_cancels_the_program() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("sleep")).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    let session = within(running).await.unwrap().unwrap();
    assert_eq!(links.status(vm).running_calls, 1);
    drop(session.output);
    assert_eq!(links.status(vm).running_calls, 0);
    let message = guest.receive().await;
    assert_eq!(message.message_id, id);
    assert!(matches!(message.payload, Some(Payload::Cancel(_))));
    assert_eq!(
        session.input.write(vec![1]).await.unwrap_err().code(),
        ErrorCode::WrongState
    );
    // What was under way for it is no broken rule.
    for _ in 0..3 {
        guest.output(&id, Stream::Stdout, b"late").await;
    }
    guest.exited(&id, 0).await;
    let ping = tokio::spawn({
        let links = links.clone();
        async move { links.ping(vm).await }
    });
    let message = guest.receive().await;
    let Some(Payload::Ping(ping_message)) = message.payload else {
        panic!("{message:?}");
    };
    guest
        .send(
            message.message_id,
            Payload::Pong(ghost_proto::guest::v1::Pong {
                payload: ping_message.payload,
            }),
        )
        .await;
    within(ping).await.unwrap().unwrap();
    assert_eq!(links.status(vm).violations, 0);
}

#[tokio::test]
async fn a_call_begun_and_given_up_leaves_nothing() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("sleep")).await }
    });
    let id = guest.receive_execute().await;
    running.abort();
    let _ = running.await;
    let message = guest.receive().await;
    assert_eq!(message.message_id, id);
    assert!(matches!(message.payload, Some(Payload::Cancel(_))));
    assert_eq!(links.status(vm).running_calls, 0);
}

#[tokio::test]
async fn the_guests_refusals_have_their_codes_and_its_words_are_harmless() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    for (code, expected) in [
        ("not_found", ErrorCode::GuestFileNotFound),
        ("outside_roots", ErrorCode::GuestPathDenied),
        ("unsupported", ErrorCode::GuestUnsupported),
        ("frozen", ErrorCode::GuestFrozen),
        ("checksum_mismatch", ErrorCode::ChecksumMismatch),
        ("permission_denied", ErrorCode::GuestFailed),
        ("io", ErrorCode::GuestFailed),
        ("\x1b[2J", ErrorCode::GuestFailed),
    ] {
        let running = tokio::spawn({
            let links = links.clone();
            async move { links.stat(vm, "/x", true).await }
        });
        let message = guest.receive().await;
        guest
            .send(
                message.message_id,
                Payload::Error(GuestError {
                    code: code.into(),
                    message: format!("\x1b]0;gotcha\x07{}", "long\n".repeat(100_000)),
                }),
            )
            .await;
        let error = within(running).await.unwrap().unwrap_err();
        assert_eq!(error.code(), expected, "{code:?}");
        let text = error.to_string();
        assert!(text.len() < 1000, "{}", text.len());
        assert!(!text.contains('\x1b') && !text.contains('\n'), "{text:?}");
    }
}

#[tokio::test]
async fn what_an_agent_does_not_offer_is_not_asked_of_it() {
    let links = links();
    let vm = ghost_domain::VmId::random();
    let channel = super::Channel::new();
    links.attach(vm, channel.path());
    let mut guest = channel.accept().await;
    let message = guest.receive().await;
    guest.session = message.session;
    let mut ready = guest.ready();
    ready.capabilities = vec!["exec".into()];
    guest.send(Vec::new(), Payload::AgentReady(ready)).await;
    eventually("the greeting", || links.status(vm).hello.is_some()).await;
    assert_eq!(
        links.stat(vm, "/", false).await.unwrap_err().code(),
        ErrorCode::GuestUnsupported
    );
    let mut shell = program("sh");
    shell.terminal = Some(ghost_domain::guest::Terminal {
        rows: 24,
        columns: 80,
        kind: "xterm".into(),
    });
    assert_eq!(
        links.execute(vm, shell).await.unwrap_err().code(),
        ErrorCode::GuestUnsupported
    );
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_a_deadline() {
    let links = links_with(|limits| limits.answer = Duration::from_millis(50));
    let (vm, _channel, mut guest) = connected(&links).await;
    let error = links.execute(vm, program("true")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DeadlineExceeded);
    let id = guest.receive_execute().await;
    let message = guest.receive().await;
    assert!(matches!(message.payload, Some(Payload::Cancel(_))));
    assert_eq!(message.message_id, id);
    assert_eq!(links.status(vm).running_calls, 0);
}

#[tokio::test]
async fn calls_of_one_guest_are_bounded() {
    let links = links();
    let (vm, _channel) = served(&links).await;
    let mut held = Vec::new();
    for _ in 0..64 {
        held.push(links.execute(vm, program("sleep")).await.unwrap());
    }
    assert_eq!(links.status(vm).running_calls, 64);
    let error = links.execute(vm, program("sleep")).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TooManyRequests);
    held.pop();
    links.execute(vm, program("true")).await.unwrap();
}

#[tokio::test]
async fn a_file_is_read_and_its_checksum_compared() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    for damaged in [false, true] {
        let reading = tokio::spawn({
            let links = links.clone();
            async move {
                let (file, mut reader) = links.read_file(vm, "/f", 0, None).await?;
                let mut all = Vec::new();
                loop {
                    let piece = reader.read().await?;
                    if piece.is_empty() {
                        return Ok::<_, ghost_domain::Error>((file, all, reader.sum()));
                    }
                    all.extend(piece);
                }
            }
        });
        let message = guest.receive().await;
        let id = message.message_id;
        let opened = FileReadResponse {
            event: Some(file_read_response::Event::Opened(FileAttributes {
                kind: 1,
                size_bytes: 5,
                mode: 0o100644,
                ..Default::default()
            })),
        };
        guest
            .send(id.clone(), Payload::FileReadResponse(opened))
            .await;
        guest.output(&id, Stream::File, b"hel").await;
        guest.output(&id, Stream::File, b"lo").await;
        let sum = twox_hash::XxHash64::oneshot(0, if damaged { b"other" } else { b"hello" });
        let finished = FileReadResponse {
            event: Some(file_read_response::Event::Finished(
                file_read_response::Finished {
                    size_bytes: 5,
                    checksum: sum.to_be_bytes().to_vec(),
                },
            )),
        };
        guest.send(id, Payload::FileReadResponse(finished)).await;
        let result = within(reading).await.unwrap();
        if damaged {
            assert_eq!(result.unwrap_err().code(), ErrorCode::ChecksumMismatch);
        } else {
            let (file, all, got) = result.unwrap();
            assert_eq!((file.mode, file.size), (0o644, 5));
            assert_eq!(all, b"hello");
            assert_eq!(got.unwrap().checksum, sum.to_be_bytes());
        }
    }
}

fn file(size: u64) -> FileWrite {
    FileWrite {
        path: "/f".into(),
        size,
        mode: 0o600,
        owner: None,
        modified_at: None,
        checksum: None,
        resume: false,
        make_parents: false,
        no_replace: false,
    }
}

#[tokio::test]
async fn a_file_is_written_within_the_window() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let content: Vec<u8> = (0..1_000_000u32).map(|at| (at % 253) as u8).collect();
    let writing = tokio::spawn({
        let (links, content) = (links.clone(), content.clone());
        async move {
            let mut writer = links.write_file(vm, file(1_000_000)).await?;
            writer.write(content).await?;
            writer.finish().await
        }
    });
    let message = guest.receive().await;
    let id = message.message_id;
    let accepted = FileWriteResponse {
        event: Some(file_write_response::Event::Accepted(
            file_write_response::Accepted { offset: 0 },
        )),
    };
    guest
        .send(id.clone(), Payload::FileWriteResponse(accepted))
        .await;
    let mut got = Vec::new();
    let mut window = Flow::FILE.window;
    loop {
        let Some(Payload::StreamData(data)) = guest.receive().await.payload else {
            panic!("no data");
        };
        assert!(data.data.len() <= Flow::FILE.most);
        window = window
            .checked_sub(data.data.len() as u64)
            .expect("the window is kept");
        got.extend_from_slice(&data.data);
        if window == 0 {
            // Only when nothing may come any more is it granted again: no sender waits for more.
            window = Flow::FILE.window;
            let update = ghost_proto::guest::v1::WindowUpdate {
                stream: Stream::File.into(),
                bytes: Flow::FILE.window,
            };
            guest.send(id.clone(), Payload::WindowUpdate(update)).await;
        }
        if data.end {
            break;
        }
    }
    assert!(got == content);
    let sum = twox_hash::XxHash64::oneshot(0, &content).to_be_bytes();
    let written = FileWriteResponse {
        event: Some(file_write_response::Event::Written(
            file_write_response::Written {
                size_bytes: 1_000_000,
                checksum: sum.to_vec(),
            },
        )),
    };
    guest.send(id, Payload::FileWriteResponse(written)).await;
    let result = within(writing).await.unwrap().unwrap();
    assert_eq!((result.size, result.checksum), (1_000_000, sum));
}

#[tokio::test]
async fn a_write_that_the_guest_ends_says_why() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let writing = tokio::spawn({
        let links = links.clone();
        async move {
            let mut writer = links.write_file(vm, file(10_000_000)).await?;
            loop {
                writer.write(vec![0; 100_000]).await?;
            }
            #[expect(unreachable_code, reason = "gives the block its type")]
            Ok::<(), ghost_domain::Error>(())
        }
    });
    let id = guest.receive().await.message_id;
    let accepted = FileWriteResponse {
        event: Some(file_write_response::Event::Accepted(
            file_write_response::Accepted { offset: 0 },
        )),
    };
    guest
        .send(id.clone(), Payload::FileWriteResponse(accepted))
        .await;
    guest
        .send(
            id,
            Payload::Error(GuestError {
                code: "no_space".into(),
                message: "the disk is full".into(),
            }),
        )
        .await;
    let error = within(writing).await.unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestFailed);
    assert!(error.to_string().contains("the disk is full"), "{error}");
}

#[tokio::test]
async fn a_listing_holds_names_and_nothing_else() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    for (names, good) in [
        (vec!["a", "b", "ä"], true),
        (vec!["a", "../../etc/passwd"], false),
        (vec!["a", ".."], false),
        (vec![""], false),
        (vec!["b", "a"], false),
        (vec!["a", "a"], false),
        (vec!["a\0b"], false),
    ] {
        let listing = tokio::spawn({
            let links = links.clone();
            async move { links.list(vm, "/", "", 10).await }
        });
        let id = guest.receive().await.message_id;
        let response = FileListResponse {
            entries: names
                .iter()
                .map(|name| file_list_response::Entry {
                    name: (*name).to_owned(),
                    attributes: None,
                })
                .collect(),
            more: false,
        };
        guest.send(id, Payload::FileListResponse(response)).await;
        let result = within(listing).await.unwrap();
        assert_eq!(result.is_ok(), good, "{names:?}: {result:?}");
    }
}

#[tokio::test]
async fn a_lockdown_ends_all_at_once_and_lets_nothing_begin() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let mut request = program("cat");
    request.stdin = true;
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, request).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    let mut session = within(running).await.unwrap().unwrap();
    guest.output(&id, Stream::Stdout, b"secret").await;
    // Started is handed out, the output waits.
    session.output.next().await.unwrap();
    assert_eq!(links.lock_down(true), 1);
    // What had come is not given out any more either.
    let error = session.output.next().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Lockdown);
    let error = session
        .input
        .write(b"rm -rf /\n".to_vec())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::Lockdown);
    for error in [
        links.execute(vm, program("true")).await.unwrap_err(),
        links.stat(vm, "/", false).await.unwrap_err(),
        links.ping(vm).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), ErrorCode::Lockdown);
    }
    let message = guest.receive().await;
    assert!(
        matches!(message.payload, Some(Payload::Cancel(_))),
        "{message:?}"
    );
    // The link itself stays: telemetry is still told.
    assert!(links.status(vm).hello.is_some());
    links.lock_down(false);
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, program("true")).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    within(running).await.unwrap().unwrap();
}

/// What waits to be sent when the owner closes the ways is not sent afterwards.
#[tokio::test]
async fn a_cut_takes_back_what_was_not_sent_yet() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let mut request = program("cat");
    request.stdin = true;
    let running = tokio::spawn({
        let links = links.clone();
        async move { links.execute(vm, request).await }
    });
    let id = guest.receive_execute().await;
    guest.started(&id).await;
    let session = within(running).await.unwrap().unwrap();
    // The guest reads nothing: the socket's buffer fills, then the queue.
    let input = std::sync::Arc::new(session.input);
    for _ in 0..4 {
        let _ =
            tokio::time::timeout(Duration::from_millis(20), input.write(vec![b'x'; 65536])).await;
    }
    assert_eq!(links.cut(vm, "guest access was switched off"), 1);
    let error = input.write(vec![1]).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnreachable);
    assert!(error.to_string().contains("switched off"), "{error}");
    let mut data = 0;
    loop {
        let message = guest.receive().await;
        match message.payload {
            Some(Payload::StreamData(piece)) => data += piece.data.len(),
            Some(Payload::Cancel(_)) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(data <= 4 * 65536);
    // And nothing comes behind it.
    guest.send(id, Payload::Done(Done {})).await;
    let ping = tokio::spawn({
        let links = links.clone();
        async move { links.ping(vm).await }
    });
    assert!(matches!(
        guest.receive().await.payload,
        Some(Payload::Ping(_))
    ));
    ping.abort();
}

#[tokio::test]
async fn sixty_four_readers_that_do_not_read_do_not_fill_the_host() {
    let links = links();
    let (vm, _channel, mut guest) = connected(&links).await;
    let mut held = Vec::new();
    for _ in 0..40 {
        let running = tokio::spawn({
            let links = links.clone();
            async move { links.execute(vm, program("yes")).await }
        });
        let id = guest.receive_execute().await;
        guest.started(&id).await;
        held.push((id, within(running).await.unwrap().unwrap()));
    }
    // Each within its window, all together beyond what a guest may make the host keep.
    for (id, _) in &held {
        for _ in 0..4 {
            let message = guest.message(id.clone(), data_of(Stream::Stdout, &[0; 65536]));
            guest.send_raw(&super::fake::encode(&message)).await;
        }
    }
    eventually("some are ended", || links.status(vm).running_calls < 40).await;
    eventually("no more than fit are left", || {
        u64::from(links.status(vm).running_calls) * Flow::STREAM.window <= 6 << 20
    })
    .await;
    let mut ended = 0;
    for (_, session) in &mut held {
        let mut output = Ok(());
        // Started, then the first piece or the end.
        for _ in 0..2 {
            output = within(session.output.next()).await.map(drop);
        }
        if let Err(error) = output {
            assert_eq!(error.code(), ErrorCode::TooManyRequests);
            ended += 1;
        }
    }
    assert!((16..40).contains(&ended), "{ended}");
    assert_eq!(links.status(vm).violations, 0);
}
