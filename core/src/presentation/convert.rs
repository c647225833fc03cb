//! Between the fleet's types and the messages of `ghost.core.v1`.

use std::collections::BTreeMap;

use ghost_domain::fleet::{
    CommandAction, CommandStatus, CreateVmCommand, FleetFacts, FleetPrincipal, VmSummary,
};
use ghost_domain::{ByteSize, Demand, Error, ErrorCode, Result, TenantName, Timestamp, VmName};
use ghost_presentation::convert::{
    desired_state, duration, length_of, severity, timestamp, vm_state,
};
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::v1 as message;

use crate::application::accounts::{CreatedToken, TenantView, UserView};
use crate::application::audit::FleetAuditEntry;
use crate::application::desk::LinkInfo;
use crate::application::events::SeenEvent;
use crate::application::fleet::HostView;
use crate::application::placement::Placed;
use crate::application::vms::ListedHost;
use crate::domain::{
    Caller, FleetEventKind, FleetKey, Inventory, QueuedCommand, Quota, Usage, User, UserSource,
};

/// A tenant that a caller named; empty: none.
pub(super) fn tenant(text: &str) -> Result<Option<TenantName>> {
    match text {
        "" => Ok(None),
        text => TenantName::new(text).map(Some),
    }
}

/// A length of time that a caller gave; none and zero: nobody said.
pub(super) fn lifetime(
    given: Option<&prost_types::Duration>,
) -> Result<Option<std::time::Duration>> {
    let given = given
        .map(|given| length_of(given, "lifetime"))
        .transpose()?;
    Ok(given.filter(|given| !given.is_zero()))
}

pub(super) fn resources(demand: Demand) -> agent::Resources {
    agent::Resources {
        cpus: demand.cpus,
        memory_bytes: demand.memory.bytes(),
        disk_bytes: demand.disk.bytes(),
    }
}

pub(super) fn demand(given: Option<agent::Resources>) -> Demand {
    let given = given.unwrap_or_default();
    Demand {
        cpus: given.cpus,
        memory: ByteSize::from_bytes(given.memory_bytes),
        disk: ByteSize::from_bytes(given.disk_bytes),
    }
}

fn capacity(inventory: &Inventory) -> message::HostCapacity {
    message::HostCapacity {
        total: Some(agent::Resources {
            cpus: inventory.total.cpus,
            memory_bytes: inventory.total.memory.bytes(),
            disk_bytes: inventory.total.disk.bytes(),
        }),
        allocatable: Some(resources(inventory.allocatable)),
        committed: Some(resources(inventory.committed)),
        memory_available_bytes: inventory.memory_available.bytes(),
        disk_free_bytes: inventory.total.disk_free.bytes(),
        load_one_minute: inventory.load_one_minute,
    }
}

fn facts(facts: &FleetFacts) -> message::HostFacts {
    message::HostFacts {
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

/// A host as it is shown at `now`, with what this replica knows of its link.
pub(super) fn host(view: &HostView, link: Option<&LinkInfo>, now: Timestamp) -> message::Host {
    let record = &view.record;
    let mut vms: BTreeMap<String, u32> = BTreeMap::new();
    let told = view.inventory.iter();
    for vm in told.flat_map(|inventory| inventory.vms.values()) {
        *vms.entry(vm.state.as_str().to_owned()).or_default() += 1;
    }
    message::Host {
        id: record.id.to_string(),
        name: record.name.to_string(),
        tenant: record.tenant.to_string(),
        state: view.state.as_str().to_owned(),
        state_reason: view.reason.clone(),
        state_since: view.since.map(timestamp),
        last_heard_age: view.last_heard_at.map(|at| duration(now.since(at))),
        last_heard_at: view.last_heard_at.map(timestamp),
        labels: record.labels.clone(),
        cordoned: record.cordoned.is_some(),
        cordon_reason: record.cordoned.clone().unwrap_or_default(),
        agent_version: record.agent_version.clone(),
        facts: Some(facts(&record.facts)).filter(|_| record.last_heard_at.is_some()),
        capacity: view.inventory.as_deref().map(capacity),
        health: view
            .inventory
            .as_deref()
            .map(|inventory| message::HostHealth {
                agent_state: inventory.health.agent_state.clone(),
                hypervisor_connected: inventory.health.hypervisor_connected,
                store_writable: inventory.health.store_writable,
                warnings: inventory.health.warnings.clone(),
                lockdown: inventory.health.lockdown,
            }),
        link: link.map(|link| message::LinkFacts {
            round_trip_seconds: view
                .round_trip
                .map(|taken| taken.as_secs_f64())
                .unwrap_or_default(),
            connects: link.facts.connects,
            last_loss: link.facts.last_loss.clone(),
        }),
        carrier: link.map_or_else(
            // At another replica.
            || {
                let owner = view.owner.as_ref();
                owner.map(|_| "link".to_owned()).unwrap_or_default()
            },
            |link| link.carrier.clone(),
        ),
        replica: view
            .owner
            .as_ref()
            .map(|owner| owner.replica.clone())
            .unwrap_or_default(),
        permissions: record.permissions.as_str().to_owned(),
        vms,
        queued_commands: u32::try_from(view.open_commands).unwrap_or(u32::MAX),
        enrolled_at: Some(timestamp(record.enrolled_at)),
        certificate_expires_at: Some(timestamp(record.certificate_expires_at)),
        certificate_generation: record.certificate_generation,
        way: link
            .map(|link| match &link.direct.used {
                Some(_) => "direct".to_owned(),
                None => "link".to_owned(),
            })
            .unwrap_or_default(),
        direct_address: link
            .and_then(|link| link.direct.used.clone())
            .unwrap_or_default(),
        direct_problem: link
            .map(|link| link.direct.problem.clone())
            .unwrap_or_default(),
        direct_addresses: link
            .iter()
            .flat_map(|link| &link.direct_addresses)
            .map(|(provider, address)| message::DirectAddress {
                provider: provider.clone(),
                address: address.clone(),
            })
            .collect(),
    }
}

/// What a list says of the host of a VM.
pub(super) fn listed_host(listed: &ListedHost, now: Timestamp) -> message::FleetVm {
    message::FleetVm {
        host: listed.record.name.to_string(),
        host_id: listed.record.id.to_string(),
        tenant: listed.record.tenant.to_string(),
        host_state: listed.state.as_str().to_owned(),
        age: listed.last_heard_at.map(|at| duration(now.since(at))),
        vm: None,
    }
}

/// A VM as its host last told of it.
pub(super) fn vm_summary(vm: &VmSummary) -> message::VmSummary {
    let VmSummary {
        id,
        name,
        state,
        state_reason,
        desired,
        demand,
        image,
        addresses,
        generation,
        created_at,
        tags,
        owner,
    } = vm.clone();
    message::VmSummary {
        id: id.to_string(),
        name,
        state: vm_state(state).into(),
        state_reason,
        desired_state: desired_state(desired).into(),
        vcpus: demand.cpus,
        memory_bytes: demand.memory.bytes(),
        disk_bytes: demand.disk.bytes(),
        image,
        addresses,
        generation,
        created_at: Some(timestamp(created_at)),
        tags,
        owner: owner.unwrap_or_default(),
    }
}

pub(super) fn placement(placed: Placed) -> message::Placement {
    message::Placement {
        host: placed.name,
        host_id: placed.host.to_string(),
        reason: placed.reason,
        rejected: placed
            .rejected
            .into_iter()
            .map(|one| message::RejectedHost {
                host: one.host,
                reason: one.reason,
            })
            .collect(),
    }
}

const fn status(status: CommandStatus) -> message::CommandStatus {
    match status {
        CommandStatus::Queued => message::CommandStatus::Queued,
        CommandStatus::Accepted => message::CommandStatus::Accepted,
        CommandStatus::Succeeded => message::CommandStatus::Succeeded,
        CommandStatus::Failed => message::CommandStatus::Failed,
        CommandStatus::Refused => message::CommandStatus::Refused,
        CommandStatus::Expired => message::CommandStatus::Expired,
        CommandStatus::Cancelled => message::CommandStatus::Cancelled,
    }
}

/// An event as a watcher sees it, who missed so many before it.
pub(super) fn event(seen: &SeenEvent, missed: u64) -> agent::Event {
    let event = &seen.event;
    let operation = match &event.kind {
        FleetEventKind::Command { operation, .. } => *operation,
        _ => None,
    };
    agent::Event {
        sequence: seen.sequence,
        at: Some(timestamp(event.at)),
        kind: event.kind.name().to_owned(),
        severity: severity(event.kind.severity()).to_owned(),
        vm: event.kind.vm().map(|vm| vm.to_string()).unwrap_or_default(),
        subject: event.kind.vm_name().unwrap_or(&event.host_name).to_owned(),
        message: event.kind.message(),
        operation_id: operation.map(|id| id.to_string()).unwrap_or_default(),
        host: event.host_name.clone(),
        host_id: event.host.to_string(),
        tenant: event.tenant.to_string(),
        missed,
    }
}

/// A command; `host` is the name of its host.
pub(super) fn command(command: &QueuedCommand, host: String) -> message::QueuedCommand {
    let outcome = command.outcome.as_ref();
    message::QueuedCommand {
        id: command.id.to_string(),
        host,
        host_id: command.host.to_string(),
        tenant: command.tenant.to_string(),
        kind: command.action.kind().to_owned(),
        subject: command.action.subject().to_owned(),
        status: status(command.status).into(),
        generation: command.generation,
        request_id: command.request_id.as_str().to_owned(),
        issued_by: command.issuer.name.clone(),
        issued_at: Some(timestamp(command.issued_at)),
        deadline: Some(timestamp(command.deadline)),
        finished_at: command.finished_at.map(timestamp),
        operation_id: outcome
            .and_then(|outcome| outcome.operation)
            .map(|id| id.to_string())
            .unwrap_or_default(),
        code: outcome
            .and_then(|outcome| outcome.code)
            .map(|code| code.as_str().to_owned())
            .unwrap_or_default(),
        message: outcome
            .map(|outcome| outcome.message.clone())
            .unwrap_or_default(),
    }
}

/// Whom a caller is to a host.
pub(super) fn issuer(caller: &Caller) -> FleetPrincipal {
    FleetPrincipal {
        name: caller.full_name(),
        tenant: caller.tenant.clone(),
        role: caller.role,
    }
}

/// What a command is to do.
///
/// # Errors
/// `InvalidArgument` where nothing is asked, or something that a queued command cannot say.
pub(super) fn action(
    given: Option<message::queue_command_request::Action>,
) -> Result<CommandAction> {
    use message::queue_command_request::Action;
    let patience = |given: Option<prost_types::Duration>| {
        given
            .as_ref()
            .map(|given| length_of(given, "timeout"))
            .transpose()
    };
    let given = given.ok_or_else(|| {
        Error::new(ErrorCode::InvalidArgument, "the command is empty")
            .field("action", "one of the actions on a VM")
    })?;
    let action = match given {
        Action::CreateVm(create) => CommandAction::CreateVm(Box::new(create_vm(create)?)),
        Action::StartVm(request) => CommandAction::StartVm { vm: request.vm },
        Action::StopVm(request) => CommandAction::StopVm {
            vm: request.vm,
            force: request.force,
            timeout: patience(request.timeout)?,
        },
        Action::RestartVm(request) => CommandAction::RestartVm {
            vm: request.vm,
            force: request.force,
            timeout: patience(request.timeout)?,
        },
        Action::PauseVm(request) => CommandAction::PauseVm { vm: request.vm },
        Action::ResumeVm(request) => CommandAction::ResumeVm { vm: request.vm },
        Action::DeleteVm(request) => CommandAction::DeleteVm {
            vm: request.vm,
            force: request.force,
        },
        Action::UpdateVm(request) => {
            let unsaid = request.autostart.is_some()
                || request.clear_autostart
                || request.restart_policy.is_some()
                || request.guest_access.is_some()
                || request.expected_generation > 0;
            if unsaid {
                return Err(unqueued(
                    "update_vm",
                    "autostart, the restart policy, guest access and an expected generation are for calls to a host that is online",
                ));
            }
            CommandAction::UpdateVm {
                vm: request.vm,
                vcpus: request.vcpus,
                memory: request.memory_bytes.map(ByteSize::from_bytes),
                delete_protection: request.delete_protection,
                set_tags: request.set_tags,
                remove_tags: request.remove_tags,
            }
        }
    };
    if action.subject().is_empty() && !matches!(action, CommandAction::CreateVm(_)) {
        return Err(Error::new(ErrorCode::InvalidArgument, "no VM was named")
            .field("vm", "a name, an id or a unique prefix of one"));
    }
    Ok(action)
}

fn unqueued(field: &str, why: &str) -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        "a queued command cannot say that",
    )
    .field(field, why)
}

fn create_vm(create: agent::CreateVmRequest) -> Result<CreateVmCommand> {
    let unsaid = !create.network_config.is_empty()
        || create.autostart.is_some()
        || create.restart_policy.is_some()
        || create.delete_protection
        || create.guest.is_some()
        || create.dry_run;
    if unsaid {
        return Err(unqueued(
            "create_vm",
            "a network config, autostart, the restart policy, protection, a guest policy and a dry run are for calls to a host that is online",
        ));
    }
    if !create.name.is_empty() {
        VmName::new(create.name.as_str())?;
    }
    Ok(CreateVmCommand {
        name: create.name,
        image: create.image,
        vcpus: Some(create.vcpus).filter(|given| *given > 0),
        memory: Some(ByteSize::from_bytes(create.memory_bytes)).filter(|given| given.bytes() > 0),
        disk: Some(ByteSize::from_bytes(create.disk_bytes)).filter(|given| given.bytes() > 0),
        networks: create.networks,
        user: create.user,
        ssh_authorized_keys: create.ssh_authorized_keys,
        user_data: create.user_data,
        tags: create.tags,
        start: create.start,
    })
}

/// A token: this is the one place where it leaves us.
pub(super) fn token(created: &CreatedToken) -> message::FleetToken {
    let role = created.token.kind.role();
    message::FleetToken {
        token: created.text.expose().to_owned(),
        expires_at: Some(timestamp(created.token.expires_at)),
        tenant: created
            .token
            .kind
            .tenant()
            .map(ToString::to_string)
            .unwrap_or_default(),
        role: role.map(|role| role.to_string()).unwrap_or_default(),
        hint: created.hint.clone(),
    }
}

/// Zero is no limit.
pub(super) fn quota_of(given: message::Quota) -> Quota {
    let size = |bytes: u64| Some(ByteSize::from_bytes(bytes)).filter(|size| size.bytes() > 0);
    Quota {
        vms: Some(given.vms).filter(|most| *most > 0),
        cpus: Some(given.cpus).filter(|most| *most > 0),
        memory: size(given.memory_bytes),
        disk: size(given.disk_bytes),
    }
}

fn quota(quota: &Quota) -> message::Quota {
    message::Quota {
        vms: quota.vms.unwrap_or_default(),
        cpus: quota.cpus.unwrap_or_default(),
        memory_bytes: quota.memory.unwrap_or_default().bytes(),
        disk_bytes: quota.disk.unwrap_or_default().bytes(),
    }
}

fn usage(usage: &Usage) -> message::Quota {
    message::Quota {
        vms: usage.vms,
        cpus: usage.demand.cpus,
        memory_bytes: usage.demand.memory.bytes(),
        disk_bytes: usage.demand.disk.bytes(),
    }
}

pub(super) fn tenant_view(view: &TenantView) -> message::Tenant {
    message::Tenant {
        name: view.tenant.name.to_string(),
        quota: Some(quota(&view.tenant.quota)),
        used: Some(usage(&view.used)),
        user_quota: Some(quota(&view.tenant.user_quota)),
        hosts: u32::try_from(view.hosts).unwrap_or(u32::MAX),
        created_at: Some(timestamp(view.tenant.created_at)),
    }
}

pub(super) fn user(view: &UserView) -> message::User {
    let record = &view.user;
    let (source, ends) = match &record.source {
        UserSource::Certificate { expires_at } => ("certificate", Some(timestamp(*expires_at))),
        UserSource::OpenIdConnect { .. } => ("oidc", None),
    };
    message::User {
        id: record.id.to_string(),
        name: record.name.clone(),
        tenant: record
            .tenant
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        role: record.role.as_str().to_owned(),
        source: source.to_owned(),
        quota: record.quota.as_ref().map(quota),
        used: Some(usage(&view.used)),
        created_at: Some(timestamp(record.created_at)),
        certificate_expires_at: ends,
        revoked_at: record.revoked_at.map(timestamp),
    }
}

/// A user as ghostctl knows client identities from a host's own agent.
pub(super) fn certificate(user: &User) -> agent::Certificate {
    agent::Certificate {
        id: user.id.to_string(),
        name: user.tenant.as_ref().map_or_else(
            || user.name.clone(),
            |tenant| format!("{tenant}/{}", user.name),
        ),
        role: user.role.as_str().to_owned(),
        created_at: Some(timestamp(user.created_at)),
        expires_at: match &user.source {
            UserSource::Certificate { expires_at } => Some(timestamp(*expires_at)),
            UserSource::OpenIdConnect { .. } => None,
        },
        revoked_at: user.revoked_at.map(timestamp),
        ..agent::Certificate::default()
    }
}

pub(super) fn key(key: &FleetKey) -> message::FleetKey {
    message::FleetKey {
        id: key.id.to_string(),
        name: key.name.clone(),
        tenant: key
            .tenant
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        role: key.role.as_str().to_owned(),
        hosts: key
            .hosts
            .iter()
            .flatten()
            .map(ToString::to_string)
            .collect(),
        created_at: Some(timestamp(key.created_at)),
        expires_at: Some(timestamp(key.expires_at)),
        revoked_at: key.revoked_at.map(timestamp),
    }
}

/// A key as ghostctl knows them from a host's own agent.
pub(super) fn api_key(key: &FleetKey) -> agent::ApiKey {
    agent::ApiKey {
        id: key.id.to_string(),
        name: key.name.clone(),
        role: key.role.as_str().to_owned(),
        created_at: Some(timestamp(key.created_at)),
        expires_at: Some(timestamp(key.expires_at)),
        revoked_at: key.revoked_at.map(timestamp),
        ..agent::ApiKey::default()
    }
}

pub(super) fn audit(entry: FleetAuditEntry, replica: &str) -> message::FleetAuditEntry {
    let record = entry.record;
    message::FleetAuditEntry {
        sequence: entry.sequence,
        at: Some(timestamp(entry.at)),
        principal: record.principal,
        tenant: record
            .tenant
            .map(|tenant| tenant.to_string())
            .unwrap_or_default(),
        source: record.source,
        action: record.action,
        host: record.host.map(|host| host.to_string()).unwrap_or_default(),
        subject: record.subject,
        outcome: record.outcome,
        request_id: record.request_id,
        detail: record.detail,
        replica: replica.to_owned(),
    }
}
