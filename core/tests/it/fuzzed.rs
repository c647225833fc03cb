//! What is fuzzed of the words between hosts and Core, over their corpus and mutations of it: what
//! cargo-fuzz does, the same every time. `GHOST_FUZZ_WRITE=1` writes the corpus anew, from every message
//! there is.

#[path = "../../../fuzz/src/hosts.rs"]
#[expect(unreachable_pub, reason = "part of the fuzzing crate")]
mod hosts;
#[path = "../../../fuzz/src/link.rs"]
#[expect(unreachable_pub, reason = "part of the fuzzing crate")]
mod link;

use std::fs;
use std::path::Path;

use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1::command::Action;
use ghost_proto::core::v1::link_message::Kind;
use ghost_proto::core::v1::{
    AgentHello, Command, CommandIssuer, CommandKept, CommandResult, CommandStatus, CoreWelcome,
    DirectAddress, Goodbye, Heartbeat, HeartbeatReply, HostCapacity, HostFacts, HostHealth,
    LinkFacts, LinkMessage, Ping, Pong, VmSummary,
};
use prost::Message;

const ID: &str = "00000000-0000-4000-8000-00000000002a";

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

/// Runs a target over what lies in its folder, which is what `made` says, and mutations of that.
fn run(target: &str, made: Vec<(String, Vec<u8>)>, rounds: usize, fuzzed: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target);
    if std::env::var_os("GHOST_FUZZ_WRITE").is_some() {
        fs::create_dir_all(&folder).unwrap();
        for (name, bytes) in &made {
            fs::write(folder.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in made {
        let kept = fs::read(folder.join(&name)).unwrap();
        assert_eq!(kept, bytes, "{name}: make it with GHOST_FUZZ_WRITE=1");
    }
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    // Also what a crash once left there.
    let mut seeds: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    seeds.sort();
    for path in seeds {
        let seed = fs::read(&path).unwrap();
        fuzzed(&seed);
        for _ in 0..rounds {
            fuzzed(&mutate(&seed, &mut chance));
        }
    }
}

fn framed(kinds: Vec<Kind>) -> Vec<u8> {
    let mut bytes = vec![3];
    for kind in kinds {
        let message = LinkMessage { kind: Some(kind) }.encode_to_vec();
        bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(&message);
    }
    bytes
}

fn command(action: Action) -> Kind {
    Kind::Command(Command {
        id: ID.into(),
        epoch: 1,
        generation: 2,
        previous: 1,
        issued_at: Some(prost_types::Timestamp::default()),
        deadline: Some(prost_types::Timestamp {
            seconds: i64::MAX,
            nanos: i32::MAX,
        }),
        issuer: Some(CommandIssuer {
            name: "user:ann".into(),
            tenant: "acme".into(),
            role: "operator".into(),
        }),
        action: Some(action),
    })
}

fn actions() -> Vec<(&'static str, Action)> {
    let vm = || ID.to_owned();
    let timeout = Some(prost_types::Duration {
        seconds: -1,
        nanos: i32::MIN,
    });
    vec![
        (
            "create",
            Action::CreateVm(agent::CreateVmRequest {
                name: "web".into(),
                image: "debian-12".into(),
                vcpus: 2,
                memory_bytes: u64::MAX,
                networks: vec!["default".into()],
                user_data: "#cloud-config\n".into(),
                ssh_authorized_keys: vec!["ssh-ed25519 AAAA x".into()],
                tags: [("key".to_owned(), "value".to_owned())].into(),
                start: true,
                ..Default::default()
            }),
        ),
        (
            "start",
            Action::StartVm(agent::StartVmRequest {
                vm: vm(),
                ..Default::default()
            }),
        ),
        (
            "stop",
            Action::StopVm(agent::StopVmRequest {
                vm: vm(),
                force: true,
                timeout,
                ..Default::default()
            }),
        ),
        (
            "restart",
            Action::RestartVm(agent::RestartVmRequest {
                vm: vm(),
                timeout,
                ..Default::default()
            }),
        ),
        (
            "pause",
            Action::PauseVm(agent::PauseVmRequest {
                vm: vm(),
                ..Default::default()
            }),
        ),
        (
            "resume",
            Action::ResumeVm(agent::ResumeVmRequest {
                vm: vm(),
                ..Default::default()
            }),
        ),
        (
            "delete",
            Action::DeleteVm(agent::DeleteVmRequest {
                vm: vm(),
                force: true,
                ..Default::default()
            }),
        ),
        (
            "update",
            Action::UpdateVm(agent::UpdateVmRequest {
                vm: vm(),
                vcpus: Some(u32::MAX),
                ..Default::default()
            }),
        ),
    ]
}

fn facts() -> HostFacts {
    HostFacts {
        hostname: "\u{1b}[2J\u{202e}host".into(),
        cpu_model: "x".repeat(300),
        ..HostFacts::default()
    }
}

fn control_messages() -> Vec<(String, Vec<u8>)> {
    let at = Some(prost_types::Timestamp {
        seconds: i64::MIN,
        nanos: i32::MIN,
    });
    let kinds = [
        (
            "hello",
            Kind::Hello(AgentHello {
                protocol_version: 1,
                agent_version: "0.1.0".into(),
                instance_id: "i".into(),
                permissions: "operate".into(),
                carrier: "link".into(),
                direct_addresses: vec![DirectAddress {
                    provider: "tailscale".into(),
                    address: "[fd00::1]:9090".into(),
                }],
                facts: Some(facts()),
                machine_hash: "ab".repeat(32),
                ..AgentHello::default()
            }),
        ),
        (
            "welcome",
            Kind::Welcome(CoreWelcome {
                protocol_version: 1,
                core_id: "core".into(),
                replica: "a".into(),
                heartbeat_interval: Some(prost_types::Duration {
                    seconds: i64::MAX,
                    nanos: i32::MAX,
                }),
                ping_interval: Some(prost_types::Duration {
                    seconds: i64::MIN,
                    nanos: i32::MIN,
                }),
                ..CoreWelcome::default()
            }),
        ),
        ("ping", Kind::Ping(Ping { number: u64::MAX })),
        ("pong", Kind::Pong(Pong { number: 1 })),
        (
            "heartbeat",
            Kind::Heartbeat(Heartbeat {
                sequence: 1,
                sent_at: at,
                full: true,
                vms: vec![VmSummary {
                    id: ID.into(),
                    name: "web\u{9b}".into(),
                    state: 99,
                    memory_bytes: u64::MAX,
                    addresses: vec!["10.0.0.5".into()],
                    created_at: at,
                    tags: [("k".to_owned(), "v\u{7}".to_owned())].into(),
                    ..VmSummary::default()
                }],
                removed_vms: vec![ID.into(), "../x".into()],
                capacity: Some(HostCapacity {
                    total: Some(agent::Resources {
                        cpus: u32::MAX,
                        memory_bytes: u64::MAX,
                        disk_bytes: u64::MAX,
                    }),
                    load_one_minute: f64::NAN,
                    ..HostCapacity::default()
                }),
                health: Some(HostHealth {
                    agent_state: "running".into(),
                    warnings: vec!["\u{1b}]0;x\u{7}".into()],
                    ..HostHealth::default()
                }),
                link: Some(LinkFacts {
                    round_trip_seconds: f64::INFINITY,
                    connects: u64::MAX,
                    last_loss: "why\n".into(),
                }),
                facts: Some(facts()),
                ..Heartbeat::default()
            }),
        ),
        (
            "heartbeat-reply",
            Kind::HeartbeatReply(HeartbeatReply {
                sequence: 1,
                want_full: true,
                received_at: at,
            }),
        ),
        (
            "result",
            Kind::CommandResult(CommandResult {
                id: ID.into(),
                generation: 1,
                status: CommandStatus::Failed.into(),
                operation_id: ID.into(),
                code: "vm_busy".into(),
                message: "\u{1b}[2J".repeat(400),
                at,
            }),
        ),
        (
            "kept",
            Kind::CommandKept(CommandKept {
                generation: u64::MAX,
            }),
        ),
        (
            "goodbye",
            Kind::Goodbye(Goodbye {
                code: "moved".into(),
                message: "\u{202e}".into(),
                address: "[::1]:7443".into(),
                retry_after: Some(prost_types::Duration {
                    seconds: i64::MAX,
                    nanos: -1,
                }),
            }),
        ),
    ];
    let all: Vec<Kind> = kinds.iter().map(|(_, kind)| kind.clone()).collect();
    let mut made: Vec<(String, Vec<u8>)> = kinds
        .into_iter()
        .map(|(name, kind)| (name.to_owned(), framed(vec![kind])))
        .collect();
    for (name, action) in actions() {
        made.push((format!("command-{name}"), framed(vec![command(action)])));
    }
    made.push(("all".into(), framed(all)));
    made.push(("too-long".into(), vec![1, 0xff, 0xff, 0xff, 0xff, 0]));
    made.push(("half".into(), vec![1, 0, 0, 0, 9, 1]));
    made
}

#[test]
fn both_ends_take_anything_on_the_control_stream() {
    run("core_link", control_messages(), 300, |data| {
        link::core_link(data, hosts::take);
    });
}

/// A frame as a server sends it (RFC 6455, section 5.2), or with a mask, which it must not have.
fn frame(first: u8, mask: bool, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    let flag = if mask { 0x80 } else { 0 };
    match u8::try_from(payload.len()) {
        Ok(short @ 0..=125) => bytes.push(flag | short),
        _ => {
            bytes.push(flag | 126);
            bytes.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        }
    }
    if mask {
        bytes.extend_from_slice(&[0; 4]);
    }
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn a_web_socket_of_piko_may_hold_anything() {
    let cases = [
        ("binary", vec![frame(0x82, false, &[7; 300])]),
        ("empty", vec![frame(0x82, false, &[])]),
        (
            "pieces",
            vec![
                frame(0x02, false, b"one"),
                frame(0x89, false, b"between"),
                frame(0x80, false, b"two"),
            ],
        ),
        ("text", vec![frame(0x81, false, b"text")]),
        (
            "ping",
            vec![frame(0x89, false, b"ping"), frame(0x82, false, b"x")],
        ),
        ("pong", vec![frame(0x8a, false, &[])]),
        ("close", vec![frame(0x88, false, &[0x03, 0xe8, b'b'])]),
        ("masked", vec![frame(0x82, true, b"masked")]),
        ("reserved", vec![frame(0xf3, false, b"?")]),
        ("long-ping", vec![frame(0x89, false, &[0; 200])]),
        (
            "longest",
            vec![vec![
                0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            ]],
        ),
    ];
    let made = cases
        .into_iter()
        .map(|(name, frames)| {
            let mut bytes = vec![5];
            bytes.extend(frames.concat());
            (name.to_owned(), bytes)
        })
        .collect();
    run("piko_socket", made, 300, link::piko_socket);
}

#[test]
fn a_token_for_a_host_may_be_anything() {
    use base64::Engine as _;
    let token = |addresses: &str| {
        format!(
            "ghost-host-v1.{}.{ID}.{}.{}",
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(addresses),
            "s".repeat(43),
            "ab".repeat(32)
        )
    };
    let made = [
        ("one", token("core.example:7443")),
        ("many", token("core:7443,[::1]:1,10.0.0.1:65535")),
        ("port", token("core:0")),
        ("none", token("")),
        ("person", "ghost-join-v1.a.b.c".to_owned()),
        ("dots", ".....".to_owned()),
    ];
    let made = made
        .into_iter()
        .map(|(name, text)| (name.to_owned(), text.into_bytes()))
        .collect();
    run("host_token", made, 2000, link::host_token);
}
