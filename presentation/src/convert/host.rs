//! The host, its networks and what happens on it.

use ghost_application::fleet::CoreLinkView;
use ghost_application::host::HostStatusView;
use ghost_application::network::NetworkView;
use ghost_domain::fleet::LinkState;
use ghost_domain::{ByteSize, Demand, Event, EventKind, Severity};
use ghost_proto::agent::v1 as message;

use super::{duration, timestamp};

/// What the composition root knows of the agent and the application does not.
#[derive(Clone, Debug, Default)]
pub struct AgentInfo {
    /// `agent.name` of the configuration.
    pub name: String,
    /// The program's version.
    pub version: String,
}

/// The host's status as a message.
pub fn status(view: &HostStatusView, agent: &AgentInfo) -> message::HostStatus {
    let hypervisor = view.hypervisor.as_ref();
    let text = |pick: fn(&ghost_domain::ports::HypervisorInfo) -> &str| {
        hypervisor.map(pick).unwrap_or_default().to_owned()
    };
    message::HostStatus {
        name: agent.name.clone(),
        agent_version: agent.version.clone(),
        agent_uptime: Some(duration(view.uptime)),
        agent_state: view.agent_state.to_owned(),
        hostname: view.facts.hostname.clone(),
        operating_system: view.facts.operating_system.clone(),
        kernel: view.facts.kernel.clone(),
        cpu_model: view.facts.cpu_model.clone(),
        total: Some(resources(
            view.resources.cpus,
            view.resources.memory,
            view.resources.disk,
        )),
        reserved: Some(resources(
            view.reserved.cpus,
            view.reserved.memory,
            view.reserved.disk,
        )),
        allocatable: Some(demand(view.capacity.allocatable)),
        committed: Some(demand(view.capacity.committed)),
        memory_available_bytes: view.usage.memory_available_bytes,
        disk_free_bytes: view.resources.disk_free.bytes(),
        load_one_minute: view.usage.load_one_minute,
        hypervisor_state: if view.link.connected {
            "connected"
        } else {
            "unreachable"
        }
        .to_owned(),
        hypervisor_state_age: Some(duration(view.link_age)),
        hypervisor_reason: if view.link.connected {
            String::new()
        } else {
            view.link.reason.clone()
        },
        hypervisor_uri: text(|info| &info.uri),
        libvirt_version: text(|info| &info.libvirt_version),
        hypervisor_version: text(|info| &info.hypervisor_version),
        accelerator: text(|info| info.accelerator.as_str()),
        accelerator_reason: text(|info| &info.accelerator_reason),
        vms: view
            .vms
            .iter()
            .map(|(state, count)| ((*state).to_owned(), *count))
            .collect(),
        open_operations: view.open_operations,
        store_engine: view.store.engine.clone(),
        store_writable: view.store.writable,
        store_problem: view.store.problem.clone().unwrap_or_default(),
        warnings: view.warnings.clone(),
        authority_fingerprint: view.authority_fingerprint.clone(),
        core: Some(core_link(&view.core)),
    }
}

/// How the link to Core fares as a message.
pub fn core_link(view: &CoreLinkView) -> message::CoreLink {
    let mut link = message::CoreLink {
        permissions: view.permissions.as_str().to_owned(),
        state: view.state.as_str().to_owned(),
        since: view.since.map(timestamp),
        last_failure: view.last_failure.clone(),
        deletes_allowed_until: view.deletes_allowed_until.map(timestamp),
        ..message::CoreLink::default()
    };
    if let Some(identity) = &view.identity {
        link.enrolled = true;
        link.host_id = identity.host.to_string();
        link.host_name = identity.name.to_string();
        link.tenant = identity.tenant.to_string();
        link.trust_domain.clone_from(&identity.trust_domain);
        link.addresses.clone_from(&identity.addresses);
        link.authority_fingerprint
            .clone_from(&identity.authority_fingerprint);
        link.certificate_expires_at = Some(timestamp(identity.expires_at));
        link.certificate_generation = identity.generation;
    }
    link.carriers = view
        .carriers
        .iter()
        .map(|carrier| message::CoreCarrier {
            name: carrier.name.to_owned(),
            state: carrier.state.to_owned(),
            reason: carrier.reason.clone(),
            peer: carrier.peer.clone(),
        })
        .collect();
    match &view.state {
        LinkState::Off | LinkState::Connecting => {}
        LinkState::Up {
            carrier,
            replica,
            round_trip,
        } => {
            link.carrier.clone_from(carrier);
            link.replica.clone_from(replica);
            link.round_trip = Some(duration(*round_trip));
        }
        LinkState::Silent { .. } | LinkState::Refused { .. } => link.reason = view.reason(),
        LinkState::Waiting { retry_in, .. } => {
            link.reason = view.reason();
            link.retry_in = Some(duration(*retry_in));
        }
    }
    link
}

fn resources(cpus: u32, memory: ByteSize, disk: ByteSize) -> message::Resources {
    message::Resources {
        cpus,
        memory_bytes: memory.bytes(),
        disk_bytes: disk.bytes(),
    }
}

fn demand(demand: Demand) -> message::Resources {
    resources(demand.cpus, demand.memory, demand.disk)
}

/// A network as a message.
pub fn network(view: &NetworkView) -> message::Network {
    let network = &view.network;
    let (first, last) = network
        .dhcp_range
        .map(|(first, last)| (first.to_string(), last.to_string()))
        .unwrap_or_default();
    message::Network {
        name: network.name.to_string(),
        libvirt_name: network.libvirt_name.clone(),
        mode: network.mode.clone(),
        bridge: network.bridge.clone().unwrap_or_default(),
        subnet: network.subnet.clone().unwrap_or_default(),
        dhcp_first: first,
        dhcp_last: last,
        active: network.active,
        leases: view
            .leases
            .iter()
            .map(|(lease, vm)| message::Lease {
                mac: lease.mac.to_string(),
                address: lease.address.to_string(),
                hostname: lease.hostname.clone().unwrap_or_default(),
                expires_at: lease.expires_at.map(timestamp),
                vm: vm.as_ref().map(ToString::to_string).unwrap_or_default(),
            })
            .collect(),
    }
}

/// How much an event matters, in a word.
pub const fn severity(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

/// An event as a message.
pub fn event(event: &Event) -> message::Event {
    let operation = match &event.kind {
        EventKind::Operation { operation, .. } => operation.to_string(),
        _ => String::new(),
    };
    message::Event {
        sequence: event.sequence,
        at: Some(timestamp(event.at)),
        kind: event.kind.name().to_owned(),
        severity: severity(event.kind.severity()).to_owned(),
        vm: event.vm.map(|vm| vm.to_string()).unwrap_or_default(),
        subject: event.subject.clone(),
        message: event.kind.describe(),
        operation_id: operation,
        // For Core to say.
        ..message::Event::default()
    }
}
