//! See the host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::GuestTelemetry;
use ghost_domain::ports::{
    DomainStatistics, GuestLinks, HostFacts, HostUsage, HypervisorInfo, StoreHealth,
};
use ghost_domain::vm::VmState;
use ghost_domain::{
    ByteSize, Capacity, HostResources, ImageDigest, Principal, Reserved, Result, Role, VmName,
};

use crate::application::Ports;
use crate::fleet::{CoreLinkView, LinkPlace, link};
use crate::registry::{HypervisorLink, Registry, VmEntry};

/// How the host and its agent stand.
#[derive(Clone, Debug)]
pub struct HostStatusView {
    /// What does not change.
    pub facts: HostFacts,
    /// How busy it is.
    pub usage: HostUsage,
    /// What it has.
    pub resources: HostResources,
    /// What stays the owner's.
    pub reserved: Reserved,
    /// What VMs may have and hold.
    pub capacity: Capacity,
    /// How the link to libvirt stands.
    pub link: HypervisorLink,
    /// How long that has been so: since libvirt came up or, where it is away, since it last answered.
    pub link_age: Duration,
    /// What libvirt and QEMU are, where they could be asked.
    pub hypervisor: Option<HypervisorInfo>,
    /// VMs by state.
    pub vms: BTreeMap<&'static str, u32>,
    /// Operations under way.
    pub open_operations: u32,
    /// How the store fares.
    pub store: StoreHealth,
    /// `running`, `recovering` or `draining`.
    pub agent_state: &'static str,
    /// How long the agent has been running.
    pub uptime: Duration,
    /// What does not work, with its remedy.
    pub warnings: Vec<String>,
    /// How the link to Ghost Core fares.
    pub core: CoreLinkView,
    /// SHA-256 of the agent's CA certificate.
    pub authority_fingerprint: String,
}

/// How long a look at libvirt may take before the status is told without it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Shows the host.
pub struct GetStatus {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
    pub(crate) started: ghost_domain::Monotonic,
    pub(crate) core: LinkPlace,
}

impl GetStatus {
    /// The status; never fails for libvirt being away.
    ///
    /// # Errors
    /// `IoFailed` where the host cannot be read.
    pub async fn execute(&self, principal: &Principal) -> Result<HostStatusView> {
        principal.require(Role::Viewer)?;
        let (facts, resources, usage, store) = (
            self.ports.host.facts().await?,
            self.ports.host.resources().await?,
            self.ports.host.usage().await?,
            self.ports.store.health().await,
        );
        let connected = self.registry.read(|model| model.link.connected);
        let hypervisor = if connected {
            tokio::time::timeout(PATIENCE, self.ports.hypervisor.info())
                .await
                .ok()
                .and_then(Result::ok)
        } else {
            None
        };
        let now = self.registry.clock().monotonic();
        let wall = self.registry.clock().now();
        self.registry.report(|model| model.host = resources);
        Ok(self.registry.read(|model| {
            let mut vms: BTreeMap<&'static str, u32> = BTreeMap::new();
            for entry in model.vms.values() {
                *vms.entry(model.shown(entry, now).state.as_str())
                    .or_default() += 1;
            }
            let mut warnings = model.warnings.clone();
            let core = link::view(model, &self.core, wall);
            warnings.extend(core.warnings(wall));
            if !model.link.connected {
                warnings.push(format!(
                    "libvirt cannot be reached ({}): ghost-agent doctor",
                    model.link.reason
                ));
            }
            if let Some(problem) = &store.problem {
                warnings.push(format!(
                    "the state store takes no writes ({problem}): make room on its file system"
                ));
            }
            HostStatusView {
                facts,
                usage,
                resources,
                reserved: model.reserved,
                capacity: model.capacity(None),
                link: model.link.clone(),
                link_age: now.since(if model.link.connected {
                    model.link.up_since
                } else {
                    model.link.last_contact
                }),
                hypervisor,
                vms,
                open_operations: u32::try_from(model.open_operations().count()).unwrap_or(u32::MAX),
                store,
                agent_state: model.agent_state(),
                uptime: now.since(self.started),
                warnings,
                core,
                authority_fingerprint: self.ports.authority.fingerprint(),
            }
        }))
    }
}

/// Whether the agent can do its work now, for readiness and the watchdog. Needs no role.
pub struct CheckHealth {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
}

/// See [`CheckHealth`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthView {
    /// The process serves.
    pub live: bool,
    /// It takes work: libvirt is there, the store takes writes, nothing drains or is rebuilt.
    pub ready: bool,
    /// Why it is not ready, one line each.
    pub problems: Vec<String>,
}

impl CheckHealth {
    /// The health.
    pub async fn execute(&self) -> HealthView {
        let store = self.ports.store.health().await;
        let mut problems = Vec::new();
        self.registry.read(|model| {
            if !model.link.connected {
                problems.push(format!("libvirt: {}", model.link.reason));
            }
            if model.recovering {
                problems.push("state is being rebuilt".into());
            }
            if model.draining {
                problems.push("shutting down".into());
            }
        });
        if !store.writable {
            problems.push(format!(
                "store: {}",
                store.problem.as_deref().unwrap_or("takes no writes")
            ));
        }
        HealthView {
            live: true,
            ready: problems.is_empty(),
            problems,
        }
    }
}

/// What a VM used, for metrics.
#[derive(Clone, Debug)]
pub struct VmMetrics {
    /// Its name.
    pub name: VmName,
    /// Its id.
    pub id: ghost_domain::VmId,
    /// Its state.
    pub state: VmState,
    /// vCPUs by its record.
    pub vcpus: u32,
    /// Memory by its record.
    pub memory: ByteSize,
    /// Disk space that it occupies, as last measured.
    pub disk_allocated: ByteSize,
    /// Counters since its start, where it runs and libvirt answered.
    pub statistics: Option<DomainStatistics>,
    /// What its agent says; `None` where it does not run.
    pub guest: Option<GuestMetrics>,
}

/// What the agent in a VM says, for metrics. Labels made of it are the guest's words: bounded by
/// the adapter (at most 32 file systems), and still to be escaped.
#[derive(Clone, Debug)]
pub struct GuestMetrics {
    /// Its agent is connected.
    pub connected: bool,
    /// Its newest report; `None` while it is silent.
    pub report: Option<Arc<GuestTelemetry>>,
    /// How old the report is.
    pub report_age: Duration,
    /// Calls under way.
    pub running_calls: u32,
    /// Rules of the protocol that it broke in this session.
    pub violations: u32,
}

/// Everything that metrics are made of.
#[derive(Clone, Debug)]
pub struct MetricsView {
    /// How the host is used.
    pub usage: HostUsage,
    /// What it has.
    pub resources: HostResources,
    /// What VMs may have and hold.
    pub capacity: Capacity,
    /// Per VM.
    pub vms: Vec<VmMetrics>,
    /// Whether libvirt is there.
    pub hypervisor_connected: bool,
    /// How long ago it last answered.
    pub hypervisor_age: Duration,
    /// How the store fares.
    pub store: StoreHealth,
    /// Files in the image cache.
    pub images: u32,
    /// Their bytes.
    pub image_bytes: ByteSize,
    /// Operations under way.
    pub open_operations: u32,
    /// How the link to Ghost Core fares.
    pub core: CoreLinkView,
    /// Until when its certificate is good, from now; `None` where this host is in no fleet.
    pub core_certificate_left: Option<Duration>,
}

/// Collects what metrics are made of: one bulk call to libvirt, all else from memory.
pub struct CollectMetrics {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
    pub(crate) core: LinkPlace,
}

impl CollectMetrics {
    /// Collects; libvirt being away or slow leaves the counters out and fails nothing.
    ///
    /// # Errors
    /// `IoFailed` where the host cannot be read.
    pub async fn execute(&self) -> Result<MetricsView> {
        let (resources, usage, store) = (
            self.ports.host.resources().await?,
            self.ports.host.usage().await?,
            self.ports.store.health().await,
        );
        let connected = self.registry.read(|model| model.link.connected);
        let statistics = if connected {
            tokio::time::timeout(PATIENCE, self.ports.hypervisor.statistics())
                .await
                .ok()
                .and_then(Result::ok)
                .unwrap_or_default()
        } else {
            Vec::new()
        };
        let mut statistics: std::collections::HashMap<_, _> = statistics
            .into_iter()
            .filter_map(|one| one.id.map(|id| (id, one)))
            .collect();
        let now = self.registry.clock().monotonic();
        let wall = self.registry.clock().now();
        self.registry.report(|model| model.host = resources);
        Ok(self.registry.read(|model| {
            let core = link::view(model, &self.core, wall);
            let files: BTreeMap<ImageDigest, ByteSize> = model
                .images
                .values()
                .map(|image| (image.digest, image.file_size))
                .collect();
            MetricsView {
                usage,
                resources,
                capacity: model.capacity(None),
                vms: model
                    .vms
                    .values()
                    .map(|entry| VmMetrics {
                        name: entry.vm.name.clone(),
                        id: entry.vm.id,
                        state: model.shown(entry, now).state,
                        vcpus: entry.vm.spec.vcpus,
                        memory: entry.vm.spec.memory,
                        disk_allocated: entry.usage.unwrap_or_default().disk_allocated,
                        statistics: statistics.remove(&entry.vm.id),
                        guest: guest_metrics(entry, &*self.ports.guests, now),
                    })
                    .collect(),
                hypervisor_connected: model.link.connected,
                hypervisor_age: now.since(model.link.last_contact),
                store,
                images: u32::try_from(files.len()).unwrap_or(u32::MAX),
                image_bytes: files.into_values().sum(),
                open_operations: u32::try_from(model.open_operations().count()).unwrap_or(u32::MAX),
                core_certificate_left: core
                    .identity
                    .as_ref()
                    .map(|identity| identity.expires_at.since(wall)),
                core,
            }
        }))
    }
}

fn guest_metrics(
    entry: &VmEntry,
    links: &dyn GuestLinks,
    now: ghost_domain::Monotonic,
) -> Option<GuestMetrics> {
    let active = entry
        .observation
        .as_ref()
        .is_some_and(|seen| seen.power.is_active());
    if !active {
        return None;
    }
    let status = links.status(entry.vm.id);
    let fresh = entry.guest.is_fresh(now);
    let report = entry.guest.telemetry.as_ref().filter(|_| fresh);
    Some(GuestMetrics {
        connected: entry.guest.connected,
        report_age: report.map(|(_, at)| now.since(*at)).unwrap_or_default(),
        report: report.map(|(report, _)| Arc::clone(report)),
        running_calls: status.running_calls,
        violations: status.violations,
    })
}
