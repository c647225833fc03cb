//! Between the domain's words and the protocol's.
//!
//! What comes from Core is checked here once: a command is one of the closed set, its fields are of
//! bounded size, and parts of a request that no command of Core may carry (the guest's network
//! configuration, autostart, the guest agent's policy) are refused instead of dropped.

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_domain::fleet::{
    CommandAction, CommandOutcome, CommandStatus, CreateVmCommand, FleetCommand, FleetFacts,
    FleetPrincipal, HeartbeatReport, VmSummary,
};
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{
    ByteSize, CommandId, Demand, Error, ErrorCode, Result, Role, TenantName, Timestamp,
};
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1 as proto;
use ghost_proto::core::v1::command::Action;

/// Longest text of a name or an id.
const MOST_NAME: usize = 256;
/// Longest user-data, as in the agent's own API.
const MOST_USER_DATA: usize = 256 * 1024;
const MOST_ENTRIES: usize = 64;
/// What a heartbeat says of warnings.
const MOST_WARNINGS: usize = 16;
const MOST_WARNING_CHARACTERS: usize = 200;

pub(super) fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    let millis = at.unix_millis();
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

pub(super) fn from_timestamp(at: &prost_types::Timestamp) -> Timestamp {
    Timestamp::from_unix_millis(
        at.seconds
            .saturating_mul(1000)
            .saturating_add(i64::from(at.nanos) / 1_000_000),
    )
}

/// A duration that is none (negative, absent) is `None`.
pub(super) fn from_duration(duration: Option<prost_types::Duration>) -> Option<Duration> {
    let duration = duration?;
    // The conversion of prost-types negates what is negative, which overflows for the least number.
    let seconds = u64::try_from(duration.seconds).ok()?;
    let nanos = u32::try_from(duration.nanos).ok()?;
    (nanos < 1_000_000_000).then(|| Duration::new(seconds, nanos))
}

pub(super) fn facts(facts: &FleetFacts) -> proto::HostFacts {
    proto::HostFacts {
        hostname: facts.hostname.clone(),
        operating_system: facts.operating_system.clone(),
        kernel: facts.kernel.clone(),
        cpu_model: facts.cpu_model.clone(),
        boot_id: facts.boot_id.clone(),
        accelerator: facts.accelerator.clone(),
        hypervisor_version: facts.hypervisor_version.clone(),
        libvirt_version: facts.libvirt_version.clone(),
    }
}

/// A VM's summary on the wire.
pub fn vm_summary(vm: &VmSummary) -> proto::VmSummary {
    proto::VmSummary {
        id: vm.id.to_string(),
        name: vm.name.clone(),
        state: state(vm.state).into(),
        state_reason: vm.state_reason.clone(),
        desired_state: desired(vm.desired).into(),
        vcpus: vm.demand.cpus,
        memory_bytes: vm.demand.memory.bytes(),
        disk_bytes: vm.demand.disk.bytes(),
        image: vm.image.clone(),
        addresses: vm.addresses.clone(),
        generation: vm.generation,
        created_at: Some(timestamp(vm.created_at)),
        tags: vm.tags.clone(),
        owner: vm.owner.clone().unwrap_or_default(),
    }
}

const fn state(state: VmState) -> agent::VmState {
    match state {
        VmState::Creating => agent::VmState::Creating,
        VmState::Stopped => agent::VmState::Stopped,
        VmState::Starting => agent::VmState::Starting,
        VmState::Running => agent::VmState::Running,
        VmState::Pausing => agent::VmState::Pausing,
        VmState::Paused => agent::VmState::Paused,
        VmState::Stopping => agent::VmState::Stopping,
        VmState::Restarting => agent::VmState::Restarting,
        VmState::Deleting => agent::VmState::Deleting,
        VmState::Failed => agent::VmState::Failed,
        VmState::Unknown => agent::VmState::Unknown,
    }
}

const fn desired(power: DesiredPower) -> agent::DesiredState {
    match power {
        DesiredPower::Running => agent::DesiredState::Running,
        DesiredPower::Stopped => agent::DesiredState::Stopped,
        DesiredPower::Paused => agent::DesiredState::Paused,
    }
}

fn demand(demand: Demand) -> agent::Resources {
    agent::Resources {
        cpus: demand.cpus,
        memory_bytes: demand.memory.bytes(),
        disk_bytes: demand.disk.bytes(),
    }
}

pub(super) fn capacity(report: &HeartbeatReport) -> proto::HostCapacity {
    proto::HostCapacity {
        total: Some(agent::Resources {
            cpus: report.total.cpus,
            memory_bytes: report.total.memory.bytes(),
            disk_bytes: report.total.disk.bytes(),
        }),
        allocatable: Some(demand(report.allocatable)),
        committed: Some(demand(report.committed)),
        memory_available_bytes: report.memory_available.bytes(),
        disk_free_bytes: report.total.disk_free.bytes(),
        load_one_minute: report.load_one_minute,
    }
}

pub(super) fn health(report: &HeartbeatReport) -> proto::HostHealth {
    proto::HostHealth {
        agent_state: report.agent_state.clone(),
        hypervisor_connected: report.hypervisor_connected,
        store_writable: report.store_writable,
        warnings: report
            .warnings
            .iter()
            .take(MOST_WARNINGS)
            .map(|one| one.chars().take(MOST_WARNING_CHARACTERS).collect())
            .collect(),
        lockdown: report.lockdown,
    }
}

pub(super) fn outcome(outcome: &CommandOutcome) -> proto::CommandResult {
    let status = match outcome.status {
        CommandStatus::Queued => proto::CommandStatus::Queued,
        CommandStatus::Accepted => proto::CommandStatus::Accepted,
        CommandStatus::Succeeded => proto::CommandStatus::Succeeded,
        CommandStatus::Failed => proto::CommandStatus::Failed,
        CommandStatus::Refused => proto::CommandStatus::Refused,
        CommandStatus::Expired => proto::CommandStatus::Expired,
        CommandStatus::Cancelled => proto::CommandStatus::Cancelled,
    };
    proto::CommandResult {
        id: outcome.id.to_string(),
        generation: outcome.generation,
        status: status.into(),
        operation_id: outcome
            .operation
            .map(|id| id.to_string())
            .unwrap_or_default(),
        code: outcome
            .code
            .map(|code| code.as_str().to_owned())
            .unwrap_or_default(),
        message: outcome.message.clone(),
        at: Some(timestamp(outcome.at)),
    }
}

/// A command that has an id and a place in the order, and whether its contents are legal.
pub(super) struct ReadCommand {
    pub(super) id: CommandId,
    pub(super) epoch: u64,
    pub(super) generation: u64,
    pub(super) previous: u64,
    pub(super) command: Result<FleetCommand>,
}

/// Reads a command.
///
/// # Errors
/// `InvalidArgument` where it cannot even be answered, having no id.
pub(super) fn command(message: proto::Command) -> Result<ReadCommand> {
    let id: CommandId = message.id.parse()?;
    let (epoch, generation, previous) = (message.epoch, message.generation, message.previous);
    Ok(ReadCommand {
        id,
        epoch,
        generation,
        previous,
        command: contents(id, message),
    })
}

fn contents(id: CommandId, message: proto::Command) -> Result<FleetCommand> {
    let deadline = message
        .deadline
        .as_ref()
        .map(from_timestamp)
        .ok_or_else(|| illegal("deadline", "a command has one"))?;
    let issuer = message
        .issuer
        .ok_or_else(|| illegal("issuer", "a command has one"))?;
    if message.generation == 0 || message.previous >= message.generation {
        return Err(illegal("previous", "it is less than the generation"));
    }
    Ok(FleetCommand {
        id,
        epoch: message.epoch,
        generation: message.generation,
        previous: message.previous,
        deadline,
        issuer: principal(issuer)?,
        action: action(message.action.ok_or_else(|| {
            Error::new(
                ErrorCode::InvalidArgument,
                "this agent does not know the command; Core is newer",
            )
        })?)?,
    })
}

fn principal(issuer: proto::CommandIssuer) -> Result<FleetPrincipal> {
    Ok(FleetPrincipal {
        name: text("issuer.name", issuer.name)?,
        tenant: match issuer.tenant.as_str() {
            "" => None,
            tenant => Some(TenantName::new(tenant)?),
        },
        role: issuer.role.parse::<Role>()?,
    })
}

fn action(action: Action) -> Result<CommandAction> {
    Ok(match action {
        Action::CreateVm(request) => CommandAction::CreateVm(Box::new(create(request)?)),
        Action::StartVm(request) => CommandAction::StartVm {
            vm: vm(request.vm)?,
        },
        Action::StopVm(request) => CommandAction::StopVm {
            vm: vm(request.vm)?,
            force: request.force,
            timeout: patience(request.timeout)?,
        },
        Action::RestartVm(request) => CommandAction::RestartVm {
            vm: vm(request.vm)?,
            force: request.force,
            timeout: patience(request.timeout)?,
        },
        Action::PauseVm(request) => CommandAction::PauseVm {
            vm: vm(request.vm)?,
        },
        Action::ResumeVm(request) => CommandAction::ResumeVm {
            vm: vm(request.vm)?,
        },
        Action::DeleteVm(request) => {
            absent("expected_generation", request.expected_generation == 0)?;
            CommandAction::DeleteVm {
                vm: vm(request.vm)?,
                force: request.force,
            }
        }
        Action::UpdateVm(request) => update(request)?,
    })
}

fn create(request: agent::CreateVmRequest) -> Result<CreateVmCommand> {
    absent("network_config", request.network_config.is_empty())?;
    absent("autostart", request.autostart.is_none())?;
    absent("restart_policy", request.restart_policy.is_none())?;
    absent("delete_protection", !request.delete_protection)?;
    absent("dry_run", !request.dry_run)?;
    absent("guest", request.guest.is_none())?;
    if request.user_data.len() > MOST_USER_DATA {
        return Err(illegal("user_data", "256 KiB at most"));
    }
    Ok(CreateVmCommand {
        name: text("name", request.name)?,
        image: given("image", request.image)?,
        vcpus: (request.vcpus != 0).then_some(request.vcpus),
        memory: size(request.memory_bytes),
        disk: size(request.disk_bytes),
        networks: texts("networks", request.networks, MOST_NAME)?,
        user: text("user", request.user)?,
        // RSA keys of 16,384 bits and their comment.
        ssh_authorized_keys: texts("ssh_authorized_keys", request.ssh_authorized_keys, 8192)?,
        user_data: request.user_data,
        tags: tags("tags", request.tags)?,
        start: request.start,
    })
}

fn update(request: agent::UpdateVmRequest) -> Result<CommandAction> {
    absent("expected_generation", request.expected_generation == 0)?;
    absent("autostart", request.autostart.is_none())?;
    absent("clear_autostart", !request.clear_autostart)?;
    absent("restart_policy", request.restart_policy.is_none())?;
    absent("guest_access", request.guest_access.is_none())?;
    Ok(CommandAction::UpdateVm {
        vm: vm(request.vm)?,
        vcpus: request.vcpus,
        memory: request.memory_bytes.map(ByteSize::from_bytes),
        delete_protection: request.delete_protection,
        set_tags: tags("set_tags", request.set_tags)?,
        remove_tags: texts("remove_tags", request.remove_tags, MOST_NAME)?,
    })
}

fn illegal(field: &str, rule: &str) -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        format!("the command's {field} is not legal"),
    )
    .because(rule)
    .field(field, rule)
}

fn absent(field: &str, is_absent: bool) -> Result<()> {
    if is_absent {
        return Ok(());
    }
    Err(illegal(field, "it cannot be set through Core's queue"))
}

fn bounded(field: &str, text: String, most: usize) -> Result<String> {
    if text.len() > most || text.contains('\0') {
        return Err(illegal(
            field,
            &format!("{most} bytes at most, without NUL"),
        ));
    }
    Ok(text)
}

fn text(field: &str, text: String) -> Result<String> {
    bounded(field, text, MOST_NAME)
}

fn given(field: &str, value: String) -> Result<String> {
    if value.is_empty() {
        return Err(illegal(field, "it is not empty"));
    }
    text(field, value)
}

fn vm(name: String) -> Result<String> {
    given("vm", name)
}

fn texts(field: &str, texts: Vec<String>, most: usize) -> Result<Vec<String>> {
    if texts.len() > MOST_ENTRIES {
        return Err(illegal(field, "64 entries at most"));
    }
    texts
        .into_iter()
        .map(|one| bounded(field, one, most))
        .collect()
}

fn tags(field: &str, tags: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    if tags.len() > MOST_ENTRIES {
        return Err(illegal(field, "64 entries at most"));
    }
    tags.into_iter()
        .map(|(key, value)| Ok((given(field, key)?, bounded(field, value, 1024)?)))
        .collect()
}

fn size(bytes: u64) -> Option<ByteSize> {
    (bytes != 0).then(|| ByteSize::from_bytes(bytes))
}

/// How long a guest may take. An hour is more than any shutdown.
fn patience(duration: Option<prost_types::Duration>) -> Result<Option<Duration>> {
    match duration {
        None => Ok(None),
        Some(duration) => match from_duration(Some(duration)) {
            Some(duration) if duration <= Duration::from_secs(3600) => Ok(Some(duration)),
            _ => Err(illegal("timeout", "zero to one hour")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(action: Option<Action>) -> proto::Command {
        proto::Command {
            id: CommandId::random().to_string(),
            epoch: 1,
            generation: 2,
            previous: 1,
            issued_at: None,
            deadline: Some(timestamp(Timestamp::from_unix_millis(5_000))),
            issuer: Some(proto::CommandIssuer {
                name: "acme/alice".into(),
                tenant: "acme".into(),
                role: "operator".into(),
            }),
            action,
        }
    }

    fn read(message: proto::Command) -> Result<FleetCommand> {
        command(message).unwrap().command
    }

    fn create_request() -> agent::CreateVmRequest {
        agent::CreateVmRequest {
            name: "web".into(),
            image: "debian-12".into(),
            memory_bytes: 1 << 30,
            start: true,
            ..agent::CreateVmRequest::default()
        }
    }

    #[test]
    fn a_command_is_read_as_it_was_meant() {
        let read = read(message(Some(Action::CreateVm(create_request())))).unwrap();
        assert_eq!((read.epoch, read.generation, read.previous), (1, 2, 1));
        assert_eq!(read.deadline, Timestamp::from_unix_millis(5_000));
        assert_eq!(read.issuer.role, Role::Operator);
        let CommandAction::CreateVm(create) = read.action else {
            panic!("{:?}", read.action);
        };
        assert_eq!(create.memory, Some(ByteSize::from_gib(1)));
        assert_eq!(create.vcpus, None);
        assert!(create.start);
    }

    /// What an evil Core may try: everything beyond the closed set is refused, with its place in the
    /// order known.
    #[test]
    fn what_is_beyond_the_closed_set_is_refused() {
        let start = |vm: &str| {
            Some(Action::StartVm(agent::StartVmRequest {
                vm: vm.into(),
                request_id: String::new(),
            }))
        };
        let with = |change: fn(&mut agent::CreateVmRequest)| {
            let mut request = create_request();
            change(&mut request);
            message(Some(Action::CreateVm(request)))
        };
        let mut refused = vec![
            message(None),
            message(start("")),
            message(start(&"x".repeat(5000))),
            message(start("a\0b")),
            with(|request| request.image.clear()),
            with(|request| request.network_config = "version: 2".into()),
            with(|request| request.dry_run = true),
            with(|request| request.user_data = "x".repeat(300 * 1024)),
            with(|request| request.networks = vec!["n".into(); 100]),
            with(|request| request.guest = Some(agent::GuestPolicy::default())),
            message(Some(Action::StopVm(agent::StopVmRequest {
                vm: "web".into(),
                timeout: Some(prost_types::Duration {
                    seconds: -1,
                    nanos: 0,
                }),
                ..agent::StopVmRequest::default()
            }))),
            message(Some(Action::UpdateVm(agent::UpdateVmRequest {
                vm: "web".into(),
                guest_access: Some(true),
                ..agent::UpdateVmRequest::default()
            }))),
        ];
        let mut odd = message(start("web"));
        odd.previous = 2;
        refused.push(odd.clone());
        odd.previous = 0;
        odd.deadline = None;
        refused.push(odd);
        let mut odd = message(start("web"));
        odd.issuer = Some(proto::CommandIssuer {
            role: "root".into(),
            ..proto::CommandIssuer::default()
        });
        refused.push(odd);
        for message in refused {
            let read = command(message.clone()).unwrap();
            assert_eq!(read.generation, 2);
            assert!(read.command.is_err(), "{message:?}");
        }
        let mut nameless = message(start("web"));
        nameless.id = "7".into();
        assert!(command(nameless).is_err());
    }
}
