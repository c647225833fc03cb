//! What a simulated host says of itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use ghost_domain::fleet::{
    CommandOutcome, CorePermissions, FleetCommand, FleetFacts, HeartbeatReport, LinkState,
    VmSummary,
};
use ghost_domain::ports::CoreLinkHandler;
use ghost_domain::vm::{DesiredPower, VmState};
use ghost_domain::{ByteSize, Demand, HostResources, Result, Timestamp, VmId};
use tokio::sync::Mutex;

/// What is counted over all hosts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) heartbeats: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) links: AtomicU64,
    pub(crate) refused: AtomicU64,
}

/// One host.
#[derive(Debug)]
pub(crate) struct Simulated {
    report: HeartbeatReport,
    counters: Arc<Counters>,
    up: AtomicBool,
    refused: AtomicBool,
    epoch: Mutex<u64>,
}

impl Simulated {
    pub(crate) fn new(number: usize, vms: u32, counters: Arc<Counters>) -> Self {
        Self {
            report: report(number, vms),
            counters,
            up: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            epoch: Mutex::new(0),
        }
    }

    /// Whether data goes both ways.
    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Whether Core said that it does not want this host.
    pub(crate) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

/// An ordinary machine with some ordinary VMs, which stay as they are.
fn report(number: usize, vms: u32) -> HeartbeatReport {
    let each = Demand {
        cpus: 2,
        memory: ByteSize::from_gib(2),
        disk: ByteSize::from_gib(20),
    };
    let mut vms: Vec<VmSummary> = (0..vms)
        .map(|vm| VmSummary {
            id: VmId::random(),
            name: format!("web-{vm}"),
            state: VmState::Running,
            state_reason: String::new(),
            desired: DesiredPower::Running,
            demand: each,
            image: "debian-12".into(),
            addresses: vec![format!("192.168.122.{}", vm % 250 + 2)],
            generation: 3,
            created_at: Timestamp::from_unix_millis(1_750_000_000_000),
            tags: BTreeMap::from([("purpose".into(), "benchmark".into())]),
            owner: None,
        })
        .collect();
    vms.sort_by_key(|vm| vm.id);
    let count = u32::try_from(vms.len()).unwrap_or(u32::MAX);
    HeartbeatReport {
        total: HostResources {
            cpus: 16,
            memory: ByteSize::from_gib(64),
            disk: ByteSize::from_gib(1000),
            disk_free: ByteSize::from_gib(700),
        },
        allocatable: Demand {
            cpus: 32,
            memory: ByteSize::from_gib(60),
            disk: ByteSize::from_gib(900),
        },
        committed: Demand {
            cpus: each.cpus * count,
            memory: ByteSize::from_gib(2 * u64::from(count)),
            disk: ByteSize::from_gib(20 * u64::from(count)),
        },
        vms,
        memory_available: ByteSize::from_gib(40),
        load_one_minute: 0.7,
        agent_state: "running".into(),
        hypervisor_connected: true,
        store_writable: true,
        warnings: Vec::new(),
        lockdown: false,
        facts: FleetFacts {
            hostname: format!("host-{number}"),
            operating_system: "Debian GNU/Linux 12 (bookworm)".into(),
            kernel: "6.1.0-28-amd64".into(),
            cpu_model: "AMD EPYC 7543P 32-Core Processor".into(),
            boot_id: uuid::Uuid::new_v4().to_string(),
            accelerator: "kvm".into(),
            hypervisor_version: "7.2.13".into(),
            libvirt_version: "9.0.0".into(),
        },
    }
}

#[async_trait]
impl CoreLinkHandler for Simulated {
    fn permissions(&self) -> CorePermissions {
        CorePermissions::default()
    }

    fn ledger(&self, _core_id: &str) -> (u64, u64) {
        (self.epoch.try_lock().map_or(0, |epoch| *epoch), 0)
    }

    async fn welcomed(&self, _core_id: &str, epoch: u64) -> Result<()> {
        *self.epoch.lock().await = epoch;
        self.counters.links.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn report(&self) -> Result<HeartbeatReport> {
        // What moves by itself on a machine.
        let load = rand::random_range(0.1..2.0);
        let used = ByteSize::from_mib(rand::random_range(0..4096));
        let available = self.report.memory_available.bytes() - used.bytes();
        Ok(HeartbeatReport {
            load_one_minute: load,
            memory_available: ByteSize::from_bytes(available),
            ..self.report.clone()
        })
    }

    async fn report_changed(&self) {
        std::future::pending().await
    }

    async fn command(&self, _command: FleetCommand) -> Option<CommandOutcome> {
        None
    }

    fn outcomes(&self) -> Vec<CommandOutcome> {
        Vec::new()
    }

    async fn outcomes_changed(&self) {
        std::future::pending().await
    }

    async fn outcome_kept(&self, _generation: u64) {}

    fn link_changed(&self, state: LinkState) {
        let up = matches!(state, LinkState::Up { .. });
        self.up.store(up, Ordering::Relaxed);
        let refused = matches!(state, LinkState::Refused { .. });
        if refused {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        self.refused.store(refused, Ordering::Relaxed);
    }

    fn heartbeat_ended(&self, answered: bool) {
        let counter = if answered {
            &self.counters.heartbeats
        } else {
            &self.counters.lost
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
