//! Greeting, sessions, garbage.

use std::io::Write;
use std::time::Duration;

use bytes::BytesMut;
use ghost_guest::{Capability, Options};
use ghost_proto::guest::frame;
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{AgentMessage, Hello, Ping};

use crate::host::{Host, code, sh, unique};

#[test]
fn the_agent_presents_itself() {
    let mut host = Host::silent(Options::default());
    let ready = host.hello(None);
    assert_eq!(ready.protocol_version, ghost_proto::guest::NEWEST_VERSION);
    assert_eq!(ready.agent_version, ghost_guest::VERSION);
    assert_eq!((ready.instance.len(), ready.boot_id.len()), (16, 36));
    assert!(ready.capabilities.contains(&"exec".into()));
    assert!(!ready.capabilities.contains(&"update".into()));
    assert_eq!(ready.architecture, "x86_64");
    let again = host.hello(None);
    assert_eq!(again.instance, ready.instance);
}

#[test]
fn a_host_of_another_age_is_told_so_and_served_nothing() {
    let mut host = Host::silent(Options::default());
    host.session = unique();
    host.send(
        &[],
        Payload::Hello(Hello {
            oldest_version: 7,
            newest_version: 9,
            ..Hello::default()
        }),
    );
    let session = host.session.clone();
    let answer = host.take(|message| message.session == session);
    let Some(Payload::AgentReady(ready)) = answer.payload else {
        panic!("{answer:?}");
    };
    assert_eq!((ready.protocol_version, ready.oldest_version), (0, 1));
    assert_eq!(
        code(host.ask(Payload::Execute(sh("true")))),
        "permission_denied"
    );
}

#[test]
fn what_is_not_offered_is_refused() {
    let mut host = Host::greeted(Options {
        capabilities: vec![Capability::Files],
        ..Options::default()
    });
    assert_eq!(
        code(host.ask(Payload::Execute(sh("true")))),
        "permission_denied"
    );
    assert_eq!(
        code(host.ask(Payload::Shutdown(Default::default()))),
        "permission_denied"
    );
    assert_eq!(
        code(host.ask(Payload::Update(Default::default()))),
        "permission_denied"
    );
}

#[test]
fn a_stale_session_is_not_served() {
    let mut host = Host::greeted(Options::default());
    let old = host.session.clone();
    host.hello(None);
    let stale = unique();
    host.send_as(&old, &stale, Payload::Execute(sh("echo stale")));
    host.send_as(&[], &stale, Payload::Execute(sh("echo none")));
    let fresh = host.ask(Payload::Ping(Ping {
        payload: b"x".to_vec(),
    }));
    assert!(matches!(fresh, Payload::Pong(pong) if pong.payload == b"x"));
    // Nothing of the stale ones came before the pong, nor comes after a further call.
    let output = host.run(sh("echo fresh"));
    assert_eq!(output.text(), "fresh\n");
}

#[test]
fn a_new_greeting_ends_what_the_old_session_started() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pid");
    let mut host = Host::greeted(Options::default());
    let script = format!(
        "echo $$ > {0}.new; mv {0}.new {0}; sleep 1000",
        file.display()
    );
    host.call(Payload::Execute(sh(&script)));
    crate::host::until("it runs", || file.exists());
    let pid = std::fs::read_to_string(&file).unwrap();
    host.hello(None);
    crate::host::until("it is gone", || {
        !std::path::Path::new(&format!("/proc/{}", pid.trim())).exists()
    });
}

#[test]
fn garbage_and_lying_lengths_cost_nothing_but_themselves() {
    let mut host = Host::greeted(Options::default());
    host.stream
        .write_all(b"login: \xf7GH\x01\xff\xff\xff\xff\0\0\0\0 \xf7G \xf7")
        .unwrap();
    // A length of nearly a frame, that is not there, and a frame that is no message.
    let mut lying = frame::MAGIC.to_vec();
    lying.extend_from_slice(&100u32.to_be_bytes());
    lying.extend_from_slice(&[0; 4]);
    lying.extend_from_slice(&[7; 100]);
    host.stream.write_all(&lying).unwrap();
    let mut empty = BytesMut::new();
    frame::encode(&AgentMessage::default(), &mut empty).unwrap();
    host.stream.write_all(&empty).unwrap();
    let pong = host.ask(Payload::Ping(Ping { payload: vec![1] }));
    assert!(matches!(pong, Payload::Pong(_)));
    host.session = Vec::new();
    let ready = host.hello(Some(Duration::from_millis(200)));
    assert_eq!(ready.protocol_version, host.version);
    let report = host.take(|message| matches!(message.payload, Some(Payload::Telemetry(_))));
    let Some(Payload::Telemetry(report)) = report.payload else {
        panic!("no report");
    };
    assert!(report.health.unwrap().frames_dropped >= 3);
}

#[test]
fn reports_come_as_often_as_asked_for() {
    let mut host = Host::silent(Options::default());
    host.hello(Some(Duration::from_millis(250)));
    for _ in 0..3 {
        let report = host.take(|message| matches!(message.payload, Some(Payload::Telemetry(_))));
        let Some(Payload::Telemetry(report)) = report.payload else {
            panic!("no report");
        };
        assert!(report.memory_total_bytes > 0);
    }
    host.hello(None);
    host.ask(Payload::Ping(Ping::default()));
}

#[test]
fn calls_are_bounded_and_each_is_answered() {
    let mut host = Host::greeted(Options::default());
    let ids: Vec<_> = (0..80)
        .map(|_| {
            let mut request = sh("read line; echo done");
            request.stdin = true;
            host.call(Payload::Execute(request))
        })
        .collect();
    for id in &ids[64..] {
        assert_eq!(code(host.next(id)), "busy");
    }
    for id in &ids[..64] {
        host.data(id, ghost_proto::guest::v1::Stream::Stdin, b"\n", true);
    }
    for id in &ids[..64] {
        assert_eq!(host.output(id).text(), "done\n");
    }
}
