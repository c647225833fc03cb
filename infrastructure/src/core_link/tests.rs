//! Joining and the link, against a small Core over real TLS.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ghost_domain::fleet::{CommandStatus, HeartbeatReport, VmSummary};
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{CommandId, Demand, HostName, Secret, Timestamp, VmId};
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::link_message::Kind;
use rcgen::{ExtendedKeyUsagePurpose, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::identity::Given;
use super::testing::{
    CORE_ID, DOMAIN, Face, FakeCore, HOST, TestAuthority, TestClock, TestHandler, hours,
};
use super::*;

const PINGS: Duration = Duration::from_millis(200);

fn joining(data_dir: &Path) -> EnrolOptions {
    EnrolOptions {
        data_dir: data_dir.to_owned(),
        name: HostName::new("pc").unwrap(),
        agent_version: "0.1.0".into(),
        replace: false,
    }
}

struct Host {
    handler: Arc<TestHandler>,
    service: Arc<CoreLinkService>,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl Host {
    fn start(data_dir: &Path, clock: Arc<TestClock>) -> Self {
        Self::start_with(data_dir, clock, DirectOptions::default())
    }

    fn start_with(data_dir: &Path, clock: Arc<TestClock>, direct: DirectOptions) -> Self {
        let handler = Arc::new(TestHandler::default());
        let options = CoreLinkOptions {
            data_dir: data_dir.to_owned(),
            agent_version: "0.1.0".into(),
            direct,
        };
        let mut service = CoreLinkService::open(options, Arc::clone(&handler) as _, clock).unwrap();
        service.pace = Pace {
            backoff: BackoffOptions {
                initial: Duration::from_millis(20),
                most: Duration::from_millis(100),
                multiplier: 2.0,
            },
            look_for_identity: Duration::from_millis(20),
            look_for_renewal: Duration::from_millis(20),
            ..Pace::default()
        };
        let service = Arc::new(service);
        let stop = CancellationToken::new();
        let running = tokio::spawn({
            let (service, stop) = (Arc::clone(&service), stop.clone());
            async move { service.run(stop).await }
        });
        Self {
            handler,
            service,
            stop,
            running,
        }
    }

    /// A host that has joined and runs.
    async fn joined(core: &FakeCore) -> (tempfile::TempDir, Self) {
        let folder = tempfile::tempdir().unwrap();
        enrol(&core.token("one"), joining(folder.path()))
            .await
            .unwrap();
        let host = Self::start(folder.path(), TestClock::now());
        (folder, host)
    }

    async fn until_up(&self) {
        self.handler
            .until(|_| matches!(self.service.state(), LinkState::Up { .. }))
            .await;
    }

    async fn end(self) {
        self.stop.cancel();
        self.running.await.unwrap();
    }
}

fn summary(number: u128, state: VmState) -> VmSummary {
    VmSummary {
        id: VmId::from_uuid(uuid::Uuid::from_u128(number)),
        name: format!("vm-{number}"),
        state,
        state_reason: String::new(),
        desired: DesiredPower::Running,
        demand: Demand::default(),
        image: "tiny".into(),
        addresses: Vec::new(),
        generation: 1,
        created_at: Timestamp::default(),
        tags: std::collections::BTreeMap::new(),
        owner: None,
    }
}

#[tokio::test]
async fn a_token_makes_this_host_one_of_a_fleet() {
    let core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    let identity = enrol(&core.token("one"), joining(folder.path()))
        .await
        .unwrap();
    assert_eq!(
        identity.spiffe_id(),
        format!("spiffe://{DOMAIN}/tenant/acme/host/{HOST}")
    );
    assert_eq!(identity.generation, 1);
    assert_eq!(identity.authority_fingerprint, core.authority.fingerprint());
    let current = folder.path().join("core/current");
    let mode = |name: &str| {
        let metadata = std::fs::metadata(current.join(name)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode("key.pem"), 0o600);
    let everything: String = ["certificate.pem", "authority.pem", "identity.json"]
        .map(|name| std::fs::read_to_string(current.join(name)).unwrap())
        .concat();
    assert!(!everything.contains("PRIVATE") && !everything.contains("secret"));
    let loaded = IdentityFolder::new(folder.path()).load().unwrap().unwrap();
    assert_eq!(loaded.identity, identity);

    let again = enrol(&core.token("two"), joining(folder.path())).await;
    assert_eq!(again.unwrap_err().code(), ErrorCode::AlreadyEnrolled);
    let replace = EnrolOptions {
        replace: true,
        ..joining(folder.path())
    };
    let identity = enrol(&core.token("two"), replace).await.unwrap();
    assert_eq!(identity.generation, 2);
    let folders = std::fs::read_dir(folder.path().join("core")).unwrap();
    assert_eq!(folders.count(), 2, "one folder and the link to it");

    let other = tempfile::tempdir().unwrap();
    let used = enrol(&core.token("one"), joining(other.path())).await;
    assert_eq!(used.unwrap_err().code(), ErrorCode::Unauthenticated);
}

#[tokio::test]
async fn only_the_core_of_the_token_gets_to_see_it() {
    let real = FakeCore::start().await;
    let authority = Arc::clone(&real.authority);
    let host_uri = format!("spiffe://{DOMAIN}/tenant/acme/host/{HOST}");
    let faces = [
        // Another Core altogether.
        (Arc::new(TestAuthority::new()), Face::default()),
        // A host of the same Core, which plays it.
        (
            Arc::clone(&authority),
            Face {
                uri: host_uri,
                purpose: ExtendedKeyUsagePurpose::ServerAuth,
                ..Face::default()
            },
        ),
        (
            Arc::clone(&authority),
            Face {
                purpose: ExtendedKeyUsagePurpose::ClientAuth,
                ..Face::default()
            },
        ),
        // Core's, but over for more than clocks may be apart.
        (
            authority,
            Face {
                valid: (hours(-48), hours(-1)),
                ..Face::default()
            },
        ),
    ];
    for (authority, face) in faces {
        let false_core = FakeCore::start_with(authority, face).await;
        let token = real.token("one").replace(
            real.token("one").split('.').nth(1).unwrap(),
            false_core.token("one").split('.').nth(1).unwrap(),
        );
        let folder = tempfile::tempdir().unwrap();
        let error = enrol(&token, joining(folder.path())).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unauthenticated, "{error}");
        assert_eq!(false_core.generation(), 0);
    }
    let folder = tempfile::tempdir().unwrap();
    enrol(&real.token("one"), joining(folder.path()))
        .await
        .unwrap();
}

#[tokio::test]
async fn clocks_may_be_a_little_apart() {
    let minutes = |minutes| hours(0) + time::Duration::minutes(minutes);
    for valid in [(hours(-24), minutes(-4)), (minutes(4), hours(24))] {
        let face = Face {
            valid,
            ..Face::default()
        };
        let core = FakeCore::start_with(Arc::new(TestAuthority::new()), face).await;
        let folder = tempfile::tempdir().unwrap();
        enrol(&core.token("one"), joining(folder.path()))
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_tells_what_changes_and_carries_streams() {
    let mut core = FakeCore::start().await;
    let (_folder, host) = Host::joined(&core).await;
    *host.handler.report.lock() = HeartbeatReport {
        vms: vec![summary(1, VmState::Stopped), summary(2, VmState::Stopped)],
        ..HeartbeatReport::default()
    };
    let mut link = core.welcomed(PINGS).await;
    assert_eq!(link.hello.certificate_generation, 1);
    assert_eq!(link.hello.permissions, "operate");
    assert_eq!((link.hello.epoch, link.hello.command_generation), (0, 0));
    let first = link.heartbeat().await;
    assert!(first.full);
    assert_eq!(first.vms.len(), 2);
    host.until_up().await;

    host.handler.report.lock().vms[0].state = VmState::Running;
    host.handler.changed.notify_one();
    let delta = loop {
        let beat = link.heartbeat().await;
        if !beat.vms.is_empty() {
            break beat;
        }
    };
    assert!(!delta.full);
    assert_eq!(delta.vms.len(), 1);
    assert_eq!(delta.vms[0].state(), agent::VmState::Running);

    let mut streams = host.service.incoming().unwrap();
    assert!(host.service.incoming().is_none());
    let mut near = link.session.handle.open().await.unwrap();
    near.write_all(b"PRI * HTTP/2.0").await.unwrap();
    let mut far = streams.recv().await.unwrap();
    let mut first = [0; 3];
    far.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"PRI");
    host.handler
        .until(|handler| handler.answered.load(std::sync::atomic::Ordering::SeqCst) > 0)
        .await;
    let LinkState::Up {
        replica, carrier, ..
    } = host.service.state()
    else {
        panic!("{:?}", host.service.state());
    };
    assert_eq!((replica.as_str(), carrier.as_str()), ("replica-a", "link"));

    // On the next link this host knows which Core it is, and what it took of it.
    link.goodbye("shutting_down").await;
    let link = core.link().await;
    assert_eq!((link.hello.epoch, link.hello.command_generation), (3, 7));
    host.end().await;
}

/// tailscaled's local API, with whichever address there is.
async fn tailscaled(path: &Path) -> Arc<Mutex<&'static str>> {
    let address = Arc::new(Mutex::new("100.64.0.1"));
    let listener = tokio::net::UnixListener::bind(path).unwrap();
    let answered = Arc::clone(&address);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let _ = stream.read(&mut request).await;
            let address = *answered.lock();
            let answer = format!(
                "HTTP/1.0 200 OK\r\n\r\n{{\"BackendState\":\"Running\",\"Self\":{{\"TailscaleIPs\":[{address:?}]}}}}"
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_address_is_told_on_the_link_that_there_is() {
    let mut core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    enrol(&core.token("one"), joining(folder.path()))
        .await
        .unwrap();
    let socket = folder.path().join("tailscaled.sock");
    let address = tailscaled(&socket).await;
    let direct = DirectOptions {
        provider: direct::Provider::Tailscale(socket),
        port: Some(9090),
    };
    let host = Host::start_with(folder.path(), TestClock::now(), direct);
    let mut link = core.welcomed(PINGS).await;
    let named = |all: &[proto::DirectAddress]| -> Vec<String> {
        all.iter().map(|one| one.address.clone()).collect()
    };
    assert_eq!(named(&link.hello.direct_addresses), ["100.64.0.1:9090"]);
    assert_eq!(link.heartbeat().await.direct, None, "the hello said so");
    *address.lock() = "100.64.0.2";
    // Whatever makes it look: a network that changed, something to tell, the next heartbeat.
    host.handler.changed.notify_one();
    let told = loop {
        if let Some(direct) = link.heartbeat().await.direct {
            break direct.addresses;
        }
    };
    assert_eq!(named(&told), ["100.64.0.2:9090"]);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_are_taken_in_order_and_their_outcomes_told_until_kept() {
    let mut core = FakeCore::start().await;
    let (_folder, host) = Host::joined(&core).await;
    let mut link = core.welcomed(PINGS).await;
    let command = |generation, action| proto::Command {
        id: CommandId::random().to_string(),
        epoch: 3,
        generation,
        previous: generation - 1,
        issued_at: None,
        deadline: Some(prost_types::Timestamp {
            seconds: 9_000_000_000,
            nanos: 0,
        }),
        issuer: Some(proto::CommandIssuer {
            name: "acme/alice".into(),
            tenant: "acme".into(),
            role: "operator".into(),
        }),
        action,
    };
    let start = |vm: &str| {
        Some(proto::command::Action::StartVm(agent::StartVmRequest {
            vm: vm.into(),
            request_id: String::new(),
        }))
    };
    link.say(Kind::Command(command(8, start("web")))).await;
    link.say(Kind::Command(command(9, None))).await;
    link.say(Kind::Command(command(10, start("db")))).await;
    let mut results = Vec::new();
    while results.len() < 3 {
        if let Kind::CommandResult(result) = link.next().await {
            results.push((result.generation, result.status()));
        }
    }
    assert_eq!(
        results,
        [
            (8, proto::CommandStatus::Accepted),
            (9, proto::CommandStatus::Refused),
            (10, proto::CommandStatus::Accepted)
        ]
    );
    link.say(Kind::CommandKept(proto::CommandKept { generation: 8 }))
        .await;
    host.handler
        .until(|handler| *handler.kept.lock() == [8])
        .await;

    // What became of it later is told by itself, and again on the next link.
    host.handler.outcomes.lock()[0].status = CommandStatus::Succeeded;
    host.handler.outcomes_new.notify_one();
    let Kind::CommandResult(result) = link.next().await else {
        panic!("no result");
    };
    assert_eq!(
        (result.generation, result.status()),
        (8, proto::CommandStatus::Succeeded)
    );
    drop(link);
    let mut link = core.welcomed(PINGS).await;
    let mut results = Vec::new();
    while results.len() < 2 {
        if let Kind::CommandResult(result) = link.next().await {
            results.push((result.generation, result.status()));
        }
    }
    assert_eq!(
        results,
        [
            (8, proto::CommandStatus::Succeeded),
            (10, proto::CommandStatus::Accepted)
        ]
    );
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_falls_silent_is_shown_and_given_up() {
    let mut core = FakeCore::start().await;
    let (_folder, host) = Host::joined(&core).await;
    // The connection stands, and nothing comes any more: its end is held and not read. yamux's own
    // answers stop too, as the session's other side is this task's.
    let mut session = core.session().await;
    let (read, write) = tokio::io::split(session.incoming.recv().await.unwrap());
    let mut reader = crate::tunnel::messages::MessageReader::new(read);
    assert!(matches!(reader.next().await.unwrap(), Some(Kind::Hello(_))));
    let mut link = testing::FakeLink {
        session,
        reader,
        writer: crate::tunnel::messages::MessageWriter::new(write),
        hello: proto::AgentHello::default(),
        core: std::collections::BTreeMap::new(),
    };
    link.welcome(CORE_ID, PINGS).await;
    host.until_up().await;
    let again = core.link().await;
    let states = host.handler.states.lock().clone();
    let silent = states
        .iter()
        .position(|state| matches!(state, LinkState::Silent { .. }));
    let waiting = states.iter().position(
        |state| matches!(state, LinkState::Waiting { reason, .. } if reason.contains("nothing came")),
    );
    assert!(silent.is_some() && silent < waiting, "{states:?}");
    let lost = &host.handler.lost;
    assert!(lost.load(std::sync::atomic::Ordering::SeqCst) > 0);
    drop((link, again));
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_stands_until_somebody_asks() {
    let mut core = FakeCore::start().await;
    let (_folder, host) = Host::joined(&core).await;
    core.welcomed(PINGS).await.goodbye("revoked").await;
    host.handler
        .until(|_| matches!(host.service.state(), LinkState::Refused { .. }))
        .await;
    let LinkState::Refused { reason } = host.service.state() else {
        panic!("no refusal");
    };
    assert_eq!(reason, "revoked: because");
    host.service.reconnect();
    let _link = core.welcomed(PINGS).await;
    host.until_up().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_obeys_the_core_that_greeted_first_and_no_other_version() {
    let mut core = FakeCore::start().await;
    let (_folder, host) = Host::joined(&core).await;
    let link = core.welcomed(PINGS).await;
    host.until_up().await;
    drop(link);
    let mut other = core.link().await;
    other.welcome("core-2", PINGS).await;
    host.handler
        .until(|_| matches!(host.service.state(), LinkState::Refused { .. }))
        .await;
    host.service.reconnect();
    let mut newer = core.link().await;
    newer
        .say(Kind::Welcome(proto::CoreWelcome {
            protocol_version: 99,
            core_id: CORE_ID.into(),
            ..proto::CoreWelcome::default()
        }))
        .await;
    host.handler
        .until(|_| {
            matches!(host.service.state(), LinkState::Waiting { reason, retry_in }
                if reason.contains("version 99") && retry_in == Duration::from_secs(600))
        })
        .await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evil_core_ends_its_link_and_nothing_else() {
    let mut core = FakeCore::start().await;
    let (_folder, host) = Host::joined(&core).await;
    for evil in [
        Kind::Hello(proto::AgentHello::default()),
        Kind::Command(proto::Command::default()),
        Kind::Heartbeat(proto::Heartbeat::default()),
    ] {
        let mut link = core.welcomed(PINGS).await;
        host.until_up().await;
        link.say(evil).await;
        link.session.handle.closed().await;
    }
    let mut link = core.welcomed(PINGS).await;
    link.writer.get_mut().write_all(&[0xff; 64]).await.unwrap();
    link.writer.get_mut().flush().await.unwrap();
    link.session.handle.closed().await;
    let _good = core.welcomed(PINGS).await;
    host.until_up().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_renew_themselves_with_a_new_key() {
    let mut core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    enrol(&core.token("one"), joining(folder.path()))
        .await
        .unwrap();
    let key = || std::fs::read_to_string(folder.path().join("core/current/key.pem")).unwrap();
    let first = key();
    let clock = TestClock::now();
    let host = Host::start(folder.path(), Arc::clone(&clock));
    let _link = core.welcomed(Duration::from_secs(60)).await;
    host.until_up().await;
    let later = clock.now().after(Duration::from_secs(17 * 3600));
    *clock.0.lock() = later;
    core.renewed().await;
    host.handler
        .until(|_| {
            // Its file is written after Core's answer; there is no event to wait for but itself.
            host.handler.state_new.notify_one();
            std::thread::yield_now();
            host.service
                .identity()
                .is_some_and(|one| one.generation == 2)
        })
        .await;
    assert_ne!(key(), first);
    assert!(!folder.path().join("core/next.pem").exists());
    host.end().await;
}

#[tokio::test]
async fn a_renewed_certificate_gets_a_link_and_the_one_before_stays_for_its_streams() {
    let mut core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    enrol(&core.token("one"), joining(folder.path()))
        .await
        .unwrap();
    let clock = TestClock::now();
    let host = Host::start(folder.path(), Arc::clone(&clock));
    let mut streams = host.service.incoming().unwrap();
    let mut first = core.welcomed(Duration::from_secs(60)).await;
    assert!(!first.hello.follows);
    host.until_up().await;
    let mut near = first.session.handle.open().await.unwrap();
    near.write_all(b"a").await.unwrap();
    near.flush().await.unwrap();
    let mut far = streams.recv().await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'a');

    let now = clock.now();
    *clock.0.lock() = now.after(Duration::from_secs(17 * 3600));
    core.renewed().await;
    *clock.0.lock() = now;
    let mut second = core.link().await;
    assert!(second.hello.follows);
    assert!(second.hello.certificate_generation > first.hello.certificate_generation);
    // Before it is welcomed as well as afterwards, the first one lives.
    for welcomed in [false, true] {
        if welcomed {
            second.welcome(CORE_ID, Duration::from_secs(60)).await;
            host.until_up().await;
        }
        let ping = Kind::Ping(proto::Ping { number: 77 });
        first.writer.send(ping).await.unwrap();
        loop {
            match first.reader.next().await.unwrap().unwrap() {
                Kind::Pong(pong) if pong.number == 77 => break,
                Kind::Goodbye(goodbye) => panic!("{goodbye:?}"),
                _ => {}
            }
        }
        far.write_all(b"b").await.unwrap();
        far.flush().await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'b');
    }
    // A stream that was on its way over the first one is taken, and then that one may go.
    let late = first.session.handle.open().await.unwrap();
    let taken = streams.recv().await.unwrap();
    drop((late, taken));
    first.session.handle.close("its streams have ended");
    let mut near = second.session.handle.open().await.unwrap();
    let mut far = streams.recv().await.unwrap();
    near.write_all(b"c").await.unwrap();
    near.flush().await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'c');
    assert!(matches!(host.service.state(), LinkState::Up { .. }));
    host.end().await;
}

/// Gives a host an identity whose certificate is valid in these times.
fn give_identity(
    core: &FakeCore,
    data_dir: &Path,
    valid: (time::OffsetDateTime, time::OffsetDateTime),
) {
    let key = KeyPair::generate().unwrap();
    let leaf = core.authority.leaf(
        &key,
        &format!("spiffe://{DOMAIN}/tenant/acme/host/{HOST}"),
        ExtendedKeyUsagePurpose::ClientAuth,
        valid,
    );
    let given = Given {
        certificate_pem: leaf.pem(),
        authority_pem: core.authority.pem.clone(),
        host: HOST.into(),
        name: "pc".into(),
        tenant: "acme".into(),
        trust_domain: DOMAIN.into(),
        addresses: vec![core.address.to_string()],
        generation: 5,
    };
    let mut fingerprint = [0; 32];
    hex::decode_to_slice(core.authority.fingerprint(), &mut fingerprint).unwrap();
    let enrolled = Enrolled::new(given, Secret::new(key.serialize_pem()), fingerprint).unwrap();
    IdentityFolder::new(data_dir).save(&enrolled).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_ended_while_the_host_was_away_is_recovered() {
    let mut core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    give_identity(&core, folder.path(), (hours(-72), hours(-48)));
    let host = Host::start(folder.path(), TestClock::now());
    let _link = core.welcomed(PINGS).await;
    host.until_up().await;
    assert_eq!(core.generation(), 1);
    host.end().await;
}

/// A host whose clock is behind thinks that its certificate is still good; Core's refusal says
/// otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_behind_does_not_keep_a_host_out() {
    let mut core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    give_identity(&core, folder.path(), (hours(-72), hours(-48)));
    let clock = TestClock::now();
    *clock.0.lock() = Timestamp::from_unix_millis(hours(-60).unix_timestamp() * 1000);
    let host = Host::start(folder.path(), clock);
    let _link = core.welcomed(PINGS).await;
    host.until_up().await;
    assert_eq!(core.generation(), 1);
    host.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_a_fleet_waits_until_it_has_one_and_off_is_off() {
    let mut core = FakeCore::start().await;
    let folder = tempfile::tempdir().unwrap();
    let host = Host::start(folder.path(), TestClock::now());
    assert_eq!(host.service.identity(), None);
    enrol(&core.token("one"), joining(folder.path()))
        .await
        .unwrap();
    let link = core.welcomed(PINGS).await;
    host.until_up().await;
    host.handler
        .off
        .store(true, std::sync::atomic::Ordering::SeqCst);
    drop(link);
    host.handler
        .until(|_| host.service.state() == LinkState::Off)
        .await;
    host.end().await;
}

#[test]
fn a_half_written_identity_is_never_seen() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let core = runtime.block_on(FakeCore::start());
    let folder = tempfile::tempdir().unwrap();
    let identity = IdentityFolder::new(folder.path());
    assert!(identity.load().unwrap().is_none());
    // A crash before the rename: a folder without a link to it.
    std::fs::create_dir_all(folder.path().join("core/half-1")).unwrap();
    std::fs::write(folder.path().join("core/half-1/key.pem"), "half").unwrap();
    assert!(identity.load().unwrap().is_none());
    give_identity(&core, folder.path(), (hours(-1), hours(1)));
    assert_eq!(identity.load().unwrap().unwrap().identity.generation, 5);
    assert!(!folder.path().join("core/half-1").exists());
    // A key that is not that of the certificate is no identity.
    let key = folder.path().join("core/current/key.pem");
    std::fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert_eq!(identity.load().unwrap_err().code(), ErrorCode::IoFailed);
    // The key of a request that was not answered is asked with again.
    let first = identity.next_key().unwrap().serialize_pem();
    assert_eq!(identity.next_key().unwrap().serialize_pem(), first);
}
