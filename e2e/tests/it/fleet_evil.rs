//! A Core that was taken over: it has the real one's key and name, and says what it likes to the
//! real agent. Whatever that is, the host stays its owner's.

use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder as AgentBuilder};
use ghost_e2e::core::Core;
use ghost_e2e::fleet::{JOIN, brisk, operations};
use ghost_e2e::guest::TINY;
use ghost_proto::agent::v1 as agent;
use ghost_proto::agent::v1::access_service_client::AccessServiceClient;
use ghost_proto::agent::v1::guest_service_client::GuestServiceClient;
use ghost_proto::agent::v1::host_service_client::HostServiceClient;
use ghost_proto::agent::v1::image_service_client::ImageServiceClient;
use ghost_proto::agent::v1::vm_service_client::VmServiceClient;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::CommandStatus;
use ghost_proto::core::v1::command::Action;
use ghost_proto::core::v1::link_message::Kind;
use serde_json::Value;
use tonic::{Response, Status};

use crate::taken_core::{PATIENCE, TakenCore, TakenLink, code, vouched};

/// More than a flood may cost the agent, in bytes.
const MOST_GROWTH: u64 = 64 << 20;

/// A host with VMs of its owner, and the Core that it joined, taken over.
async fn taken(vms: usize) -> (TakenCore, Core, Agent) {
    let (mut core, agent) = apart(move || {
        let core = brisk().start();
        let agent = AgentBuilder::simulated().start();
        let done = agent.enroll(&core.host_token("acme"), "pc");
        assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
        core.wait_host("pc", "online", JOIN);
        agent.import_tiny();
        for number in 0..vms {
            let name = agent.name(&format!("vm{number}"));
            let create = ["vm", "create", &name, "--image", "tiny"];
            agent.ctl().ok(&[&create[..], &TINY[..]].concat());
        }
        (core, agent)
    })
    .await;
    let taken = TakenCore::instead_of(&mut core, &agent).await;
    (taken, core, agent)
}

/// What waits must not hold up the Core that runs here too.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// `ghostctl` on the host.
async fn local(agent: &Agent, words: &[&str]) -> Value {
    let ctl = agent.ctl();
    let words: Vec<String> = words.iter().map(ToString::to_string).collect();
    apart(move || {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        ctl.json(&words)
    })
    .await
}

/// That all is well on the host, whatever its Core does.
async fn all_is_well(agent: Agent, vms: usize) {
    apart(move || {
        let list = agent.ctl().json(&["list"]);
        assert_eq!(list.as_array().unwrap().len(), vms, "{list}");
        let name = agent.name("local");
        let ctl = agent.ctl();
        ctl.ok(&[&["vm", "create", &name, "--image", "tiny"][..], &TINY[..]].concat());
        ctl.ok(&["vm", "delete", &name]);
        ctl.ok(&["audit", "verify"]);
        agent.audit();
    })
    .await;
}

fn refusal<T>(answer: Result<Response<T>, Status>) -> String {
    match answer {
        Ok(_) => "done".to_owned(),
        Err(status) => code(&status),
    }
}

fn delete(vm: &str) -> Action {
    Action::DeleteVm(agent::DeleteVmRequest {
        vm: vm.to_owned(),
        force: true,
        ..agent::DeleteVmRequest::default()
    })
}

fn start(vm: &str) -> Action {
    Action::StartVm(agent::StartVmRequest {
        vm: vm.to_owned(),
        ..agent::StartVmRequest::default()
    })
}

fn create(change: impl FnOnce(&mut agent::CreateVmRequest)) -> Action {
    let mut request = agent::CreateVmRequest {
        name: "by-core".into(),
        image: "tiny".into(),
        vcpus: 1,
        memory_bytes: 128 << 20,
        disk_bytes: 128 << 20,
        ..agent::CreateVmRequest::default()
    };
    change(&mut request);
    Action::CreateVm(request)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_commands_of_the_closed_set_are_taken_once_in_order_and_few_deletes() {
    let (mut core, _real, host) = taken(10).await;
    let mut link = core.link(&host).await;
    let vm = |number: usize| host.name(&format!("vm{number}"));

    // What is no command, or carries what a command cannot.
    let none = link.command(None);
    let generation = none.generation;
    link.say(Kind::Command(none)).await;
    let result = link.end_of(generation).await;
    assert_eq!(result.status(), CommandStatus::Refused, "{result:?}");
    let evil = [
        create(|vm| vm.name = "../../../etc/cron.d/x".into()),
        create(|vm| vm.name = "<domain type='kvm'><name>x</name></domain>".into()),
        create(|vm| vm.image = "/etc/shadow".into()),
        create(|vm| vm.image = "../../identity/ca.key".into()),
        create(|vm| vm.image = "https://evil.example/root.qcow2".into()),
        create(|vm| vm.image = "<disk type='block'><source dev='/dev/sda'/></disk>".into()),
        create(|vm| vm.networks = vec!["<interface type='direct'/>".into()]),
        create(|vm| vm.networks = vec!["../../host".into()]),
        create(|vm| vm.user = "root:x:0:0\n".into()),
        create(|vm| vm.network_config = "version: 2".into()),
        create(|vm| vm.user_data = "x".repeat(300 * 1024)),
        create(|vm| vm.vcpus = u32::MAX),
        create(|vm| vm.memory_bytes = u64::MAX),
        start("../vm0"),
        start(&"x".repeat(100_000)),
        start("\0"),
        delete(""),
    ];
    for action in evil {
        let shown = format!("{action:?}").chars().take(300).collect::<String>();
        let result = link.order(action).await;
        assert_eq!(
            result.status(),
            CommandStatus::Refused,
            "{shown}: {result:?}"
        );
        assert!(
            !result.code.is_empty() && !result.message.is_empty(),
            "{result:?}"
        );
    }
    assert_eq!(
        operations(&host, "create").len(),
        10,
        "the owner's own alone"
    );

    // One that is good, and then again, under another id, of an older epoch, and before its time.
    let good = link.command(Some(start(&vm(0))));
    link.say(Kind::Command(good.clone())).await;
    let first = link.end_of(good.generation).await;
    assert_eq!(first.status(), CommandStatus::Succeeded, "{first:?}");
    let again = proto::Command {
        id: uuid::Uuid::new_v4().to_string(),
        action: Some(delete(&vm(1))),
        ..good.clone()
    };
    let old = proto::Command {
        epoch: link.epoch - 1,
        ..link.command(Some(delete(&vm(2))))
    };
    let early = proto::Command {
        generation: link.generation + 7,
        previous: link.generation + 6,
        ..link.command(Some(delete(&vm(3))))
    };
    let late = proto::Command {
        deadline: Some((std::time::SystemTime::now() - Duration::from_secs(5)).into()),
        generation: old.generation,
        previous: old.generation - 1,
        ..link.command(Some(delete(&vm(4))))
    };
    for one in [good.clone(), again, old.clone(), early] {
        link.say(Kind::Command(one)).await;
    }
    link.say(Kind::Command(late.clone())).await;
    // The others are answered before it, or held back.
    let last = loop {
        let result = link.result().await;
        if result.id == late.id {
            break result;
        }
        let done = result.status() == CommandStatus::Succeeded && result.id != good.id;
        assert!(!done, "{result:?}");
    };
    assert_eq!(last.status(), CommandStatus::Expired, "{last:?}");
    assert_eq!(operations(&host, "start").len(), 1);
    assert_eq!(operations(&host, "delete").len(), 0);
    link.generation = old.generation;

    // A fifth of ten, however it is asked for; then the owner is asked.
    for number in [5, 6] {
        let result = link.order(delete(&vm(number))).await;
        assert_eq!(result.status(), CommandStatus::Succeeded, "{result:?}");
    }
    let result = link.order(delete(&vm(7))).await;
    assert_eq!(result.status(), CommandStatus::Refused);
    assert_eq!(result.code, "confirmation_required", "{result:?}");
    let mut vms = VmServiceClient::new(link.channel().await);
    let call = agent::DeleteVmRequest {
        vm: vm(8),
        force: true,
        ..agent::DeleteVmRequest::default()
    };
    let answer = vms.delete(vouched(call, "acme/mallory", "admin")).await;
    assert_eq!(refusal(answer), "confirmation_required");
    let mut hosts = HostServiceClient::new(link.channel().await);
    let consent = agent::AllowCoreDeletesRequest {
        duration: Some(prost_duration(600)),
    };
    let answer = hosts
        .allow_core_deletes(vouched(consent, "root", "admin"))
        .await;
    assert_eq!(refusal(answer), "core_permission_denied");
    // A taken-over Core does not get around it by a new link either.
    link.raw(vec![0xff; 64]).await;
    link.ended().await;
    let mut link = core.link(&host).await;
    let result = link.order(delete(&vm(7))).await;
    assert_eq!(result.code, "confirmation_required", "{result:?}");
    let ctl = host.ctl();
    apart(move || ctl.ok(&["core", "allow-deletes", "--for", "10m"])).await;
    let result = link.order(delete(&vm(7))).await;
    assert_eq!(result.status(), CommandStatus::Succeeded, "{result:?}");

    // Whose doing it was stands in the host's own records.
    let deletes = operations(&host, "delete");
    assert_eq!(deletes.len(), 3);
    for one in &deletes {
        assert!(one.to_string().contains("acme/mallory"), "{one}");
    }
    all_is_well(host, 7).await;
}

fn prost_duration(seconds: u64) -> prost_types::Duration {
    Duration::from_secs(seconds).try_into().unwrap()
}

/// The codes of what a Core may never have, by a stream of its own; `done` where it got it.
async fn calls(link: &TakenLink, name: &str, role: &str) -> Vec<(&'static str, String)> {
    let channel = link.channel().await;
    let mut access = AccessServiceClient::new(channel.clone());
    let mut guests = GuestServiceClient::new(channel.clone());
    let mut images = ImageServiceClient::new(channel.clone());
    let mut hosts = HostServiceClient::new(channel);
    macro_rules! call {
        ($client:ident . $method:ident ( $request:expr )) => {{
            let answer = $client.$method(vouched($request, name, role));
            let answer = tokio::time::timeout(PATIENCE, answer).await;
            (stringify!($method), refusal(answer.unwrap()))
        }};
    }
    let import = tokio_stream::iter([agent::ImportImageRequest {
        part: Some(agent::import_image_request::Part::Header(
            agent::ImportImageHeader {
                name: "evil".into(),
                ..agent::ImportImageHeader::default()
            },
        )),
    }]);
    vec![
        call!(access.create_token(agent::CreateTokenRequest::default())),
        call!(access.create_key(agent::CreateKeyRequest::default())),
        call!(access.list_keys(agent::ListKeysRequest::default())),
        call!(access.list_certificates(agent::ListCertificatesRequest::default())),
        call!(access.revoke_certificate(agent::RevokeCertificateRequest::default())),
        call!(access.enroll(agent::EnrollRequest::default())),
        call!(guests.set_lockdown(agent::SetLockdownRequest {
            active: false,
            reason: "trust me".into(),
        })),
        call!(guests.list_audit(agent::ListAuditRequest::default())),
        call!(guests.verify_audit(agent::VerifyAuditRequest::default())),
        call!(images.pull(agent::PullImageRequest {
            name: "evil".into(),
            url: "http://evil.example/root.qcow2".into(),
            checksum: format!("sha256:{}", "0".repeat(64)),
            ..agent::PullImageRequest::default()
        })),
        call!(images.import(import)),
        call!(hosts.reconnect_core(agent::ReconnectCoreRequest {})),
        call!(hosts.allow_core_deletes(agent::AllowCoreDeletesRequest::default())),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_core_gets_nothing_of_the_owners_by_streams_and_names_it_makes_up() {
    let (mut core, _real, mut host) = taken(1).await;
    let vm = host.name("vm0");
    let ctl = host.ctl();
    apart(move || ctl.ok(&["lockdown", "--reason", "a test"])).await;
    let link = core.link(&host).await;
    for (name, role) in [
        ("acme/mallory", "admin"),
        ("root", "admin"),
        ("acme/mallory", "superuser"),
        ("", "admin"),
    ] {
        for (method, got) in calls(&link, name, role).await {
            assert!(
                [
                    "core_permission_denied",
                    "permission_denied",
                    "unauthenticated",
                    "invalid_argument"
                ]
                .contains(&got.as_str()),
                "{method} as {name:?}, {role}: {got}"
            );
            let never = role == "admin" && !name.is_empty();
            assert!(
                !never || got == "core_permission_denied",
                "{method} as {name:?}, {role}: {got}"
            );
        }
    }
    let lockdown = local(&host, &["lockdown", "status"]).await;
    assert_eq!(lockdown["active"], true, "{lockdown}");

    // Entering a guest meets the owner's lockdown, and both tries and tricks are in the owner's log.
    let mut guests = GuestServiceClient::new(link.channel().await);
    let exec = tokio_stream::iter([agent::ExecInput {
        input: Some(agent::exec_input::Input::Start(agent::ExecStart {
            vm: vm.clone(),
            program: "id".into(),
            ..agent::ExecStart::default()
        })),
    }]);
    let answer = guests.exec(vouched(exec, "acme/mallory", "admin")).await;
    let got = match answer {
        Ok(response) => match response.into_inner().message().await {
            Ok(_) => "done".to_owned(),
            Err(status) => code(&status),
        },
        Err(status) => code(&status),
    };
    assert_eq!(got, "lockdown");
    let audit = local(&host, &["audit", "list"]).await;
    let named = audit.as_array().unwrap().iter().any(|line| {
        line["principal"]
            .as_str()
            .is_some_and(|who| who.contains("acme/mallory"))
            && line["outcome"] == "denied: lockdown"
    });
    assert!(named, "{audit}");
    drop(link);

    // An owner who lets Core only look: the greatest role that it makes up is a viewer's.
    let restart = |permissions: &'static str, mut host: Agent| {
        apart(move || {
            host.stop();
            host.set("core.permissions", permissions);
            host.start();
            host
        })
    };
    host = restart("read", host).await;
    let mut link = core.link(&host).await;
    let mut vms = VmServiceClient::new(link.channel().await);
    let listed = vms
        .list(vouched(agent::ListVmsRequest::default(), "root", "admin"))
        .await;
    assert_eq!(listed.unwrap().into_inner().vms.len(), 1);
    let begun = agent::StartVmRequest {
        vm: vm.clone(),
        ..agent::StartVmRequest::default()
    };
    let answer = vms.start(vouched(begun, "root", "admin")).await;
    assert_eq!(refusal(answer), "core_permission_denied");
    let result = link.order(start(&vm)).await;
    assert_eq!(result.code, "core_permission_denied", "{result:?}");
    drop((vms, link));

    // And one who lets it do nothing: it is not even dialled, and all that is local goes on.
    host = restart("off", host).await;
    assert_eq!(local(&host, &["core", "status"]).await["state"], "off");
    assert!(!core.is_dialled(Duration::from_secs(5)).await);
    assert_eq!(operations(&host, "start").len(), 0);
    all_is_well(host, 1).await;
}

/// What the agent holds, in bytes.
fn memory(agent: &Agent) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kibibytes.unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_and_nonsense_of_a_taken_core_cost_a_link_and_nothing_else() {
    let (mut core, _real, host) = taken(1).await;
    let pid = host.pid();
    let before = memory(&host);

    // Frames that are too large, cut off, and no messages at all.
    for nonsense in [
        u32::MAX.to_be_bytes().to_vec(),
        (2_u32 << 20).to_be_bytes().to_vec(),
        [&8_u32.to_be_bytes()[..], &[0xff; 8]].concat(),
    ] {
        let link = core.link(&host).await;
        link.raw(nonsense).await;
        link.ended().await;
    }

    // Commands faster than anybody takes them, and pings without end. Who floods is hung up on.
    let mut link = core.link(&host).await;
    let vm = host.name("vm0");
    for number in 0..20_000_u64 {
        let kind = match number % 3 {
            0 => Kind::Ping(proto::Ping { number }),
            1 => Kind::Command(link.command(Some(create(|vm| {
                vm.name = "/".repeat(200);
                vm.user_data = "x".repeat(200 * 1024);
            })))),
            _ => Kind::Command(link.command(Some(start(&vm)))),
        };
        link.say(kind).await;
        if link.session.handle.ended().is_some() {
            break;
        }
    }
    link.ended().await;

    // More streams than a host takes, none of which says anything, and some that say nonsense.
    let link = core.link(&host).await;
    let mut held = Vec::new();
    for _ in 0..400 {
        let opened = tokio::time::timeout(Duration::from_secs(5), link.session.handle.open()).await;
        let Ok(Ok(mut stream)) = opened else {
            break;
        };
        use tokio::io::AsyncWriteExt as _;
        let noise = if held.len() % 2 == 0 {
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice()
        } else {
            b"\0\0\0"
        };
        drop(stream.write_all(&[noise, &[0x7f; 4096]].concat()).await);
        drop(stream.flush().await);
        held.push(stream);
    }
    assert!(held.len() > 100, "{}", held.len());
    assert_eq!(local(&host, &["list"]).await.as_array().unwrap().len(), 1);
    drop(held);
    drop(link);

    // It lives on, has not grown by much, and serves a Core that behaves.
    let link = core.link(&host).await;
    let mut vms = VmServiceClient::new(link.channel().await);
    let listed = vms
        .list(vouched(
            agent::ListVmsRequest::default(),
            "acme/alice",
            "viewer",
        ))
        .await;
    assert_eq!(listed.unwrap().into_inner().vms.len(), 1);
    let after = memory(&host);
    println!("{} MiB before, {} MiB after", before >> 20, after >> 20);
    assert!(after < before + MOST_GROWTH, "{before} -> {after}");
    assert_eq!(host.pid(), pid);
    all_is_well(host, 1).await;
}
