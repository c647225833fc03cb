//! Between the control stream's messages and the desk's words.
//!
//! A host may be hostile. What it says is made harmless here, once: bounded in number and length,
//! finite, and without characters that drive terminals. It does not become true by that.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, FleetCommand, FleetFacts, VmSummary,
};
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, Demand, Error, ErrorCode, HostResources, Result, Timestamp, VmId};
use ghost_infrastructure::core_link::convert::vm_summary;
use ghost_infrastructure::guest_link::clean_text;
use ghost_infrastructure::tunnel::messages::{MessageReader, MessageWriter};
use ghost_infrastructure::tunnel::vms_digest;
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::command::Action;
use ghost_proto::core::v1::link_message::Kind;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::application::desk::{
    ControlReader, ControlWriter, FromHost, Goodbye, HostHeartbeat, HostHello, HostLinkFacts,
    ToHost, Welcome,
};
use crate::domain::HostHealth;

const MOST_NAME: usize = 128;
const MOST_REASON: usize = 512;
const MOST_ADDRESSES: usize = 16;
const MOST_TAGS: usize = 64;
const MOST_TAG_VALUE: usize = 1024;
const MOST_WARNINGS: usize = 16;
const MOST_WARNING: usize = 800;
const MOST_DIRECT: usize = 16;
/// The largest number that all who read it as JSON or in a signed field can hold.
const MOST_COUNT: u64 = i64::MAX as u64;

/// The half of a control stream that is read.
#[derive(Debug)]
pub(super) struct WireReader<R>(pub(super) MessageReader<R>);

/// The half of a control stream that is written.
#[derive(Debug)]
pub(super) struct WireWriter<W>(pub(super) MessageWriter<W>);

impl<R: AsyncRead + Send + Unpin> ControlReader for WireReader<R> {
    async fn next(&mut self) -> Result<Option<FromHost>> {
        match self.0.next().await {
            Ok(Some(kind)) => from_host(kind).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(broken(&error)),
        }
    }
}

impl<W: AsyncWrite + Send + Unpin> ControlWriter for WireWriter<W> {
    fn queue(&mut self, message: ToHost) -> Result<()> {
        self.0
            .queue(to_host(message))
            .map_err(|error| broken(&error))
    }

    fn is_waiting(&self) -> bool {
        self.0.is_waiting()
    }

    async fn flush(&mut self) -> Result<()> {
        self.0.flush().await.map_err(|error| broken(&error))
    }
}

fn broken(error: &io::Error) -> Error {
    let code = match error.kind() {
        io::ErrorKind::InvalidData => ErrorCode::InvalidArgument,
        _ => ErrorCode::HostOffline,
    };
    Error::new(code, "the control stream broke").because(error)
}

/// The digest over a host's VMs, in the order of their ids.
pub fn digest(vms: &BTreeMap<VmId, VmSummary>) -> u64 {
    let messages: Vec<proto::VmSummary> = vms.values().map(vm_summary).collect();
    vms_digest(&messages)
}

/// Reads what a host says.
///
/// # Errors
/// `InvalidArgument` for what is not a host's to say, or has no meaning.
pub fn from_host(kind: Kind) -> Result<FromHost> {
    Ok(match kind {
        Kind::Hello(hello) => FromHost::Hello(Box::new(self::hello(hello))),
        Kind::Ping(ping) => FromHost::Ping(ping.number),
        Kind::Pong(pong) => FromHost::Pong(pong.number),
        Kind::Heartbeat(beat) => FromHost::Heartbeat(Box::new(heartbeat(beat))),
        Kind::CommandResult(result) => FromHost::Outcome(Box::new(outcome(&result)?)),
        Kind::Goodbye(goodbye) => FromHost::Goodbye {
            code: clean_text(&goodbye.code, MOST_NAME),
            message: clean_text(&goodbye.message, MOST_REASON),
        },
        Kind::Welcome(_) | Kind::HeartbeatReply(_) | Kind::Command(_) | Kind::CommandKept(_) => {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "this message is Core's to send",
            ));
        }
    })
}

fn hello(hello: proto::AgentHello) -> HostHello {
    HostHello {
        protocol_version: hello.protocol_version,
        agent_version: clean_text(&hello.agent_version, 64),
        instance: clean_text(&hello.instance_id, 64),
        command_generation: hello.command_generation,
        // Whoever says nothing that we know lets us do nothing that it might not want.
        permissions: hello
            .permissions
            .parse()
            .unwrap_or(ghost_domain::fleet::CorePermissions::Read),
        carrier: match hello.carrier.as_str() {
            carrier @ ("link" | "piko" | "direct") => carrier.to_owned(),
            _ => "link".to_owned(),
        },
        direct_addresses: direct_addresses(hello.direct_addresses),
        facts: facts(&hello.facts.unwrap_or_default()),
        machine: {
            let mut machine = [0; 32];
            hex::decode_to_slice(&hello.machine_hash, &mut machine)
                .ok()
                .map(|()| machine)
        },
        follows: hello.follows,
    }
}

fn direct_addresses(told: Vec<proto::DirectAddress>) -> Vec<(String, String)> {
    told.into_iter()
        .filter(|one| one.address.parse::<std::net::SocketAddr>().is_ok())
        .take(MOST_DIRECT)
        .map(|one| (clean_text(&one.provider, 32), one.address))
        .collect()
}

fn facts(facts: &proto::HostFacts) -> FleetFacts {
    FleetFacts {
        hostname: clean_text(&facts.hostname, 253),
        operating_system: clean_text(&facts.operating_system, MOST_NAME),
        kernel: clean_text(&facts.kernel, MOST_NAME),
        cpu_model: clean_text(&facts.cpu_model, MOST_NAME),
        boot_id: clean_text(&facts.boot_id, 64),
        accelerator: clean_text(&facts.accelerator, 32),
        hypervisor_version: clean_text(&facts.hypervisor_version, 64),
        libvirt_version: clean_text(&facts.libvirt_version, 64),
    }
}

fn heartbeat(beat: proto::Heartbeat) -> HostHeartbeat {
    let capacity = beat.capacity.unwrap_or_default();
    let health = beat.health.unwrap_or_default();
    let link = beat.link.unwrap_or_default();
    let total = capacity.total.unwrap_or_default();
    HostHeartbeat {
        sequence: beat.sequence,
        full: beat.full,
        vms: beat.vms.into_iter().filter_map(summary).collect(),
        removed: beat
            .removed_vms
            .iter()
            .filter_map(|id| id.parse().ok())
            .collect(),
        digest: beat.vms_digest,
        total: HostResources {
            cpus: total.cpus,
            memory: size(total.memory_bytes),
            disk: size(total.disk_bytes),
            disk_free: size(capacity.disk_free_bytes),
        },
        allocatable: demand(capacity.allocatable),
        committed: demand(capacity.committed),
        memory_available: size(capacity.memory_available_bytes),
        load_one_minute: number(capacity.load_one_minute, 1e6),
        health: HostHealth {
            agent_state: match health.agent_state.as_str() {
                state @ ("running" | "recovering" | "draining") => state.to_owned(),
                _ => "unknown".to_owned(),
            },
            hypervisor_connected: health.hypervisor_connected,
            store_writable: health.store_writable,
            warnings: health
                .warnings
                .iter()
                .take(MOST_WARNINGS)
                .map(|one| clean_text(one, MOST_WARNING))
                .collect(),
            lockdown: health.lockdown,
        },
        link: HostLinkFacts {
            round_trip: Duration::from_secs_f64(number(link.round_trip_seconds, 3600.0)),
            connects: link.connects.min(MOST_COUNT),
            last_loss: clean_text(&link.last_loss, MOST_REASON),
        },
        facts: beat.facts.as_ref().map(facts),
        direct_addresses: beat.direct.map(|direct| direct_addresses(direct.addresses)),
    }
}

/// A VM; `None` for one without an id.
fn summary(vm: proto::VmSummary) -> Option<VmSummary> {
    let state = match vm.state() {
        agent::VmState::Creating => VmState::Creating,
        agent::VmState::Stopped => VmState::Stopped,
        agent::VmState::Starting => VmState::Starting,
        agent::VmState::Running => VmState::Running,
        agent::VmState::Pausing => VmState::Pausing,
        agent::VmState::Paused => VmState::Paused,
        agent::VmState::Stopping => VmState::Stopping,
        agent::VmState::Restarting => VmState::Restarting,
        agent::VmState::Deleting => VmState::Deleting,
        agent::VmState::Failed => VmState::Failed,
        _ => VmState::Unknown,
    };
    let desired = match vm.desired_state() {
        agent::DesiredState::Running => DesiredPower::Running,
        agent::DesiredState::Paused => DesiredPower::Paused,
        _ => DesiredPower::Stopped,
    };
    Some(VmSummary {
        id: vm.id.parse().ok()?,
        name: clean_text(&vm.name, MOST_NAME),
        state,
        state_reason: clean_text(&vm.state_reason, MOST_REASON),
        desired,
        demand: Demand {
            cpus: vm.vcpus,
            memory: size(vm.memory_bytes),
            disk: size(vm.disk_bytes),
        },
        image: clean_text(&vm.image, MOST_NAME),
        addresses: vm
            .addresses
            .iter()
            .take(MOST_ADDRESSES)
            .map(|address| clean_text(address, 64))
            .collect(),
        generation: vm.generation.min(MOST_COUNT),
        created_at: vm.created_at.as_ref().map(stamp).unwrap_or_default(),
        tags: vm
            .tags
            .iter()
            .take(MOST_TAGS)
            .map(|(key, value)| {
                (
                    clean_text(key, MOST_NAME),
                    clean_text(value, MOST_TAG_VALUE),
                )
            })
            .collect(),
        owner: Some(clean_text(&vm.owner, 2 * MOST_NAME)).filter(|owner| !owner.is_empty()),
    })
}

fn outcome(result: &proto::CommandResult) -> Result<CommandOutcome> {
    let malformed = |what: &str| Err(Error::new(ErrorCode::InvalidArgument, what));
    let status = match result.status() {
        proto::CommandStatus::Accepted => CommandStatus::Accepted,
        proto::CommandStatus::Succeeded => CommandStatus::Succeeded,
        proto::CommandStatus::Failed => CommandStatus::Failed,
        proto::CommandStatus::Refused => CommandStatus::Refused,
        proto::CommandStatus::Expired => CommandStatus::Expired,
        _ => return malformed("a result has no status that a host can tell"),
    };
    let Ok(id) = result.id.parse() else {
        return malformed("a result names no command");
    };
    Ok(CommandOutcome {
        id,
        generation: result.generation,
        status,
        operation: result.operation_id.parse().ok(),
        // A newer agent may know codes that we do not.
        code: match result.code.as_str() {
            "" => None,
            code => Some(ErrorCode::parse(code).unwrap_or(ErrorCode::Internal)),
        },
        message: clean_text(&result.message, MOST_WARNING),
        at: result.at.as_ref().map(stamp).unwrap_or_default(),
    })
}

fn size(bytes: u64) -> ByteSize {
    ByteSize::from_bytes(bytes.min(MOST_COUNT))
}

fn demand(given: Option<agent::Resources>) -> Demand {
    let given = given.unwrap_or_default();
    Demand {
        cpus: given.cpus,
        memory: size(given.memory_bytes),
        disk: size(given.disk_bytes),
    }
}

fn number(value: f64, most: f64) -> f64 {
    if value.is_finite() {
        value.clamp(0.0, most)
    } else {
        0.0
    }
}

fn stamp(at: &prost_types::Timestamp) -> Timestamp {
    Timestamp::from_unix_millis(
        at.seconds
            .saturating_mul(1000)
            .saturating_add(i64::from(at.nanos) / 1_000_000),
    )
}

fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    let millis = at.unix_millis();
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

fn duration(length: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(length.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(length.subsec_nanos()).unwrap_or(0),
    }
}

fn to_host(message: ToHost) -> Kind {
    match message {
        ToHost::Welcome(welcome) => Kind::Welcome(self::welcome(welcome)),
        ToHost::Ping(number) => Kind::Ping(proto::Ping { number }),
        ToHost::Pong(number) => Kind::Pong(proto::Pong { number }),
        ToHost::HeartbeatReply {
            sequence,
            want_full,
            received_at,
        } => Kind::HeartbeatReply(proto::HeartbeatReply {
            sequence,
            want_full,
            received_at: Some(timestamp(received_at)),
        }),
        ToHost::Command { command, issued_at } => Kind::Command(self::command(*command, issued_at)),
        ToHost::CommandKept(generation) => Kind::CommandKept(proto::CommandKept { generation }),
        ToHost::Goodbye(goodbye) => Kind::Goodbye(self::goodbye(goodbye)),
    }
}

fn welcome(welcome: Welcome) -> proto::CoreWelcome {
    proto::CoreWelcome {
        protocol_version: welcome.protocol_version,
        core_version: welcome.core_version,
        core_id: welcome.core_id,
        replica: welcome.replica,
        epoch: welcome.epoch,
        heartbeat_interval: Some(duration(welcome.heartbeat_interval)),
        ping_interval: Some(duration(welcome.ping_interval)),
        // Of what the host said on another link this one knows nothing.
        want_full: true,
    }
}

fn goodbye(goodbye: Goodbye) -> proto::Goodbye {
    proto::Goodbye {
        code: goodbye.code.to_owned(),
        message: goodbye.message,
        address: goodbye.address,
        retry_after: (!goodbye.retry_after.is_zero()).then(|| duration(goodbye.retry_after)),
    }
}

fn command(command: FleetCommand, issued_at: Timestamp) -> proto::Command {
    proto::Command {
        id: command.id.to_string(),
        epoch: command.epoch,
        generation: command.generation,
        issued_at: Some(timestamp(issued_at)),
        deadline: Some(timestamp(command.deadline)),
        issuer: Some(proto::CommandIssuer {
            name: command.issuer.name,
            tenant: command
                .issuer
                .tenant
                .map(|tenant| tenant.to_string())
                .unwrap_or_default(),
            role: command.issuer.role.to_string(),
        }),
        previous: command.previous,
        action: Some(action(command.action)),
    }
}

fn action(action: CommandAction) -> Action {
    let request_id = String::new();
    match action {
        CommandAction::CreateVm(create) => {
            let bytes = |size: Option<ByteSize>| size.map_or(0, |size| size.bytes());
            Action::CreateVm(agent::CreateVmRequest {
                vcpus: create.vcpus.unwrap_or_default(),
                memory_bytes: bytes(create.memory),
                disk_bytes: bytes(create.disk),
                name: create.name,
                image: create.image,
                networks: create.networks,
                user: create.user,
                ssh_authorized_keys: create.ssh_authorized_keys,
                user_data: create.user_data,
                tags: create.tags,
                start: create.start,
                ..agent::CreateVmRequest::default()
            })
        }
        CommandAction::StartVm { vm } => Action::StartVm(agent::StartVmRequest { vm, request_id }),
        CommandAction::StopVm { vm, force, timeout } => Action::StopVm(agent::StopVmRequest {
            vm,
            force,
            timeout: timeout.map(duration),
            request_id,
        }),
        CommandAction::RestartVm { vm, force, timeout } => {
            Action::RestartVm(agent::RestartVmRequest {
                vm,
                force,
                timeout: timeout.map(duration),
                request_id,
            })
        }
        CommandAction::PauseVm { vm } => Action::PauseVm(agent::PauseVmRequest { vm, request_id }),
        CommandAction::ResumeVm { vm } => {
            Action::ResumeVm(agent::ResumeVmRequest { vm, request_id })
        }
        CommandAction::DeleteVm { vm, force } => Action::DeleteVm(agent::DeleteVmRequest {
            vm,
            force,
            ..agent::DeleteVmRequest::default()
        }),
        CommandAction::UpdateVm {
            vm,
            vcpus,
            memory,
            delete_protection,
            set_tags,
            remove_tags,
        } => Action::UpdateVm(agent::UpdateVmRequest {
            vm,
            vcpus,
            memory_bytes: memory.map(ByteSize::bytes),
            delete_protection,
            set_tags,
            remove_tags,
            ..agent::UpdateVmRequest::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use ghost_domain::CommandId;
    use proptest::prelude::*;

    use super::*;

    fn vm() -> VmSummary {
        VmSummary {
            id: VmId::random(),
            name: "web".into(),
            state: VmState::Running,
            state_reason: "since a while".into(),
            desired: DesiredPower::Running,
            demand: Demand {
                cpus: 2,
                memory: ByteSize::from_gib(2),
                disk: ByteSize::from_gib(10),
            },
            image: "debian-12".into(),
            addresses: vec!["192.0.2.7".into()],
            generation: 3,
            created_at: Timestamp::from_unix_millis(1_700_000_000_123),
            tags: BTreeMap::from([("a".into(), "b".into())]),
            owner: Some("acme/alice".into()),
        }
    }

    /// Else every heartbeat of an honest host would be asked for anew.
    #[test]
    fn an_honest_summary_comes_through_unchanged() {
        let said = vm();
        assert_eq!(summary(vm_summary(&said)), Some(said.clone()));
        let all = BTreeMap::from([(said.id, said.clone())]);
        assert_eq!(digest(&all), vms_digest([&vm_summary(&said)]));
    }

    #[test]
    fn what_a_hostile_host_says_is_bounded_and_clean() {
        let beat = heartbeat(proto::Heartbeat {
            vms: vec![
                proto::VmSummary {
                    id: "../../etc".into(),
                    ..proto::VmSummary::default()
                },
                proto::VmSummary {
                    id: VmId::random().to_string(),
                    name: format!("\u{1b}[2J{}", "x".repeat(10_000)),
                    state: 99,
                    addresses: vec!["y".repeat(1000); 1000],
                    tags: (0..1000)
                        .map(|n| (n.to_string(), "z".repeat(5000)))
                        .collect(),
                    memory_bytes: u64::MAX,
                    ..proto::VmSummary::default()
                },
            ],
            removed_vms: vec!["nonsense".into()],
            capacity: Some(proto::HostCapacity {
                load_one_minute: f64::NAN,
                ..proto::HostCapacity::default()
            }),
            health: Some(proto::HostHealth {
                agent_state: "\u{202e}gninnur".into(),
                warnings: vec!["w".repeat(100_000); 100],
                ..proto::HostHealth::default()
            }),
            link: Some(proto::LinkFacts {
                round_trip_seconds: -1.0,
                ..proto::LinkFacts::default()
            }),
            ..proto::Heartbeat::default()
        });
        let [vm] = beat.vms.as_slice() else {
            panic!("{:?}", beat.vms);
        };
        assert!(vm.name.len() <= MOST_NAME && !vm.name.contains('\u{1b}'));
        assert_eq!(vm.state, VmState::Unknown);
        assert!(vm.addresses.len() <= MOST_ADDRESSES && vm.tags.len() <= MOST_TAGS);
        assert!(vm.tags.values().all(|value| value.len() <= MOST_TAG_VALUE));
        assert!(beat.removed.is_empty());
        assert_eq!(
            (beat.load_one_minute, beat.link.round_trip),
            (0.0, Duration::ZERO)
        );
        assert_eq!(beat.health.agent_state, "unknown");
        assert_eq!(beat.health.warnings.len(), MOST_WARNINGS);
        assert!(
            beat.health
                .warnings
                .iter()
                .all(|one| one.len() <= MOST_WARNING)
        );
    }

    #[test]
    fn a_host_does_not_speak_as_core() {
        for kind in [
            Kind::Welcome(proto::CoreWelcome::default()),
            Kind::CommandKept(proto::CommandKept { generation: 1 }),
            Kind::Command(proto::Command::default()),
        ] {
            assert_eq!(
                from_host(kind).unwrap_err().code(),
                ErrorCode::InvalidArgument
            );
        }
        for status in [
            proto::CommandStatus::Queued,
            proto::CommandStatus::Cancelled,
            proto::CommandStatus::Unspecified,
        ] {
            let result = proto::CommandResult {
                id: CommandId::random().to_string(),
                status: status.into(),
                ..proto::CommandResult::default()
            };
            assert!(outcome(&result).is_err(), "{status:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(
            name in ".{0,40}", seconds in any::<i64>(), nanos in any::<i32>(), number in any::<f64>(),
        ) {
            let at = prost_types::Timestamp { seconds, nanos };
            let _ = summary(proto::VmSummary {
                id: VmId::random().to_string(),
                name,
                created_at: Some(at),
                ..proto::VmSummary::default()
            });
            let _ = heartbeat(proto::Heartbeat {
                link: Some(proto::LinkFacts { round_trip_seconds: number, ..Default::default() }),
                ..Default::default()
            });
        }
    }
}
