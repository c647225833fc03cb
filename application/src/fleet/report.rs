//! What this host tells Core of itself: from memory, and the few things that only the system knows.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use ghost_domain::fleet::{FleetFacts, HeartbeatReport, VmSummary};
use ghost_domain::ports::Accelerator;
use ghost_domain::{ByteSize, Monotonic, Result};

use crate::application::Ports;
use crate::guest::escape;
use crate::registry::{Model, Registry, VmEntry};

/// How long libvirt may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most warnings, and most characters of each.
const MOST_WARNINGS: usize = 16;
const MOST_WARNING_CHARACTERS: usize = 200;

/// Collects the report.
///
/// # Errors
/// `IoFailed` where the host cannot be read.
pub(super) async fn collect(registry: &Registry, ports: &Ports) -> Result<HeartbeatReport> {
    let (facts, resources, usage, store) = (
        ports.host.facts().await?,
        ports.host.resources().await?,
        ports.host.usage().await?,
        ports.store.health().await,
    );
    let connected = registry.read(|model| model.link.connected);
    let hypervisor = if connected {
        tokio::time::timeout(PATIENCE, ports.hypervisor.info())
            .await
            .ok()
            .and_then(Result::ok)
    } else {
        None
    };
    let now = registry.clock().monotonic();
    registry.quietly(|model| model.host = resources);
    let hypervisor = hypervisor.unwrap_or_else(|| ghost_domain::ports::HypervisorInfo {
        uri: String::new(),
        libvirt_version: String::new(),
        hypervisor_version: String::new(),
        accelerator: Accelerator::Tcg,
        accelerator_reason: String::new(),
    });
    let accelerator = if hypervisor.libvirt_version.is_empty() {
        String::new()
    } else {
        hypervisor.accelerator.as_str().to_owned()
    };
    Ok(registry.read(|model| {
        let capacity = model.capacity(None);
        HeartbeatReport {
            // The map is in the order of the ids.
            vms: model
                .vms
                .values()
                .map(|entry| summary(model, entry, now))
                .collect(),
            total: resources,
            allocatable: capacity.allocatable,
            committed: capacity.committed,
            memory_available: ByteSize::from_bytes(usage.memory_available_bytes),
            load_one_minute: usage.load_one_minute,
            agent_state: model.agent_state().to_owned(),
            hypervisor_connected: model.link.connected,
            store_writable: store.writable,
            warnings: warnings(model, store.problem.as_deref()),
            lockdown: model.lockdown.is_some(),
            facts: FleetFacts {
                hostname: facts.hostname,
                operating_system: facts.operating_system,
                kernel: facts.kernel,
                cpu_model: facts.cpu_model,
                boot_id: facts.boot_id,
                accelerator,
                hypervisor_version: hypervisor.hypervisor_version,
                libvirt_version: hypervisor.libvirt_version,
            },
        }
    }))
}

fn summary(model: &Model, entry: &VmEntry, now: Monotonic) -> VmSummary {
    let shown = model.shown(entry, now);
    let vm = &entry.vm;
    VmSummary {
        id: vm.id,
        name: vm.name.to_string(),
        state: shown.state,
        state_reason: shown.reason,
        desired: vm.desired,
        demand: vm.spec.demand(),
        image: vm.spec.image.name.to_string(),
        addresses: entry
            .known_addresses()
            .iter()
            .map(|one| one.address.to_string())
            .collect(),
        generation: vm.generation,
        created_at: vm.created_at,
        tags: vm.spec.tags.clone(),
        owner: vm.owner.clone(),
    }
}

fn warnings(model: &Model, store: Option<&str>) -> Vec<String> {
    let mut all = Vec::new();
    if !model.link.connected {
        all.push(format!("libvirt cannot be reached: {}", model.link.reason));
    }
    all.extend(store.map(|problem| format!("the state store takes no writes: {problem}")));
    all.extend(model.warnings.iter().cloned());
    all.truncate(MOST_WARNINGS);
    all.iter()
        .map(|one| {
            escape(one, 4 * MOST_WARNING_CHARACTERS)
                .chars()
                .take(MOST_WARNING_CHARACTERS)
                .collect()
        })
        .collect()
}

/// Changes with everything that Core should hear of at once: a VM that came, went, or changed its
/// state, its record or its addresses; a lockdown; libvirt lost or back. Reasons and measurements,
/// which change by themselves, are not in it.
pub(super) fn mark(model: &Model, now: Monotonic) -> u64 {
    let mut hasher = DefaultHasher::new();
    for entry in model.vms.values() {
        let vm = &entry.vm;
        (vm.id, vm.name.as_str(), vm.generation).hash(&mut hasher);
        model.shown(entry, now).state.as_str().hash(&mut hasher);
        vm.desired.as_str().hash(&mut hasher);
        for one in entry.known_addresses() {
            one.address.hash(&mut hasher);
        }
    }
    (model.link.connected, model.lockdown.is_some()).hash(&mut hasher);
    model.agent_state().hash(&mut hasher);
    hasher.finish()
}
