//! One scrape as metric families.

use std::time::Duration;

use ghost_application::host::{MetricsView, VmMetrics};
use ghost_domain::fleet::LinkState;
use ghost_domain::vm::VmState;
use prometheus::{Counter, CounterVec, Gauge, GaugeVec, Opts, Registry, Result};

use crate::convert::AgentInfo;

/// The labels of everything about one VM.
pub(super) const VM: [&str; 2] = ["vm", "name"];

/// Fills a fresh registry with what is now; `view` is `None` where it could not be read.
pub(super) fn fill(
    registry: &Registry,
    view: Option<&MetricsView>,
    agent: &AgentInfo,
    took: Duration,
    uptime: Duration,
) -> Result<()> {
    let to = Families(registry);
    let build = GaugeVec::new(
        Opts::new(
            "ghost_build_info",
            "The running program; the value is always 1.",
        ),
        &["version"],
    )?;
    build.with_label_values(&[agent.version.as_str()]).set(1.0);
    registry.register(Box::new(build))?;
    to.gauge(
        "ghost_agent_uptime_seconds",
        "Time since the agent started.",
        uptime.as_secs_f64(),
    )?;
    to.gauge(
        "ghost_collect_success",
        "Whether the host could be read for this scrape.",
        flag(view.is_some()),
    )?;
    to.gauge(
        "ghost_collect_duration_seconds",
        "Time that reading the host and libvirt took for this scrape.",
        took.as_secs_f64(),
    )?;
    let Some(view) = view else { return Ok(()) };
    host(&to, view)?;
    agent_parts(&to, view)?;
    core(registry, &to, view)?;
    vms(registry, &view.vms)?;
    super::guest::fill(registry, &view.vms)
}

struct Families<'a>(&'a Registry);

impl Families<'_> {
    fn gauge(&self, name: &str, help: &str, value: f64) -> Result<()> {
        let gauge = Gauge::new(name, help)?;
        gauge.set(value);
        self.0.register(Box::new(gauge))
    }

    /// A counter that somebody else counts; a negative or absurd value is left at zero.
    fn counter(&self, name: &str, help: &str, value: f64) -> Result<()> {
        let counter = Counter::new(name, help)?;
        if value.is_finite() && value > 0.0 {
            counter.inc_by(value);
        }
        self.0.register(Box::new(counter))
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus knows doubles only; 2^53 bytes are 8 PiB"
)]
pub(super) const fn number(value: u64) -> f64 {
    value as f64
}

pub(super) const fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

fn host(to: &Families<'_>, view: &MetricsView) -> Result<()> {
    let (has, busy, capacity) = (&view.resources, &view.usage, &view.capacity);
    to.gauge(
        "ghost_host_cpus",
        "Logical CPUs of the host.",
        f64::from(has.cpus),
    )?;
    to.counter(
        "ghost_host_cpu_busy_seconds_total",
        "CPU time that the host spent not idle since boot, over all CPUs.",
        busy.cpu_busy_seconds,
    )?;
    to.gauge(
        "ghost_host_load1",
        "Load average of the host over one minute.",
        busy.load_one_minute,
    )?;
    to.gauge(
        "ghost_host_uptime_seconds",
        "Time since the host booted.",
        number(busy.uptime_seconds),
    )?;
    to.gauge(
        "ghost_host_memory_bytes",
        "Physical memory of the host.",
        number(has.memory.bytes()),
    )?;
    to.gauge(
        "ghost_host_memory_available_bytes",
        "Memory of the host that could be given out without swapping.",
        number(busy.memory_available_bytes),
    )?;
    to.gauge(
        "ghost_host_disk_bytes",
        "Size of the file system with the VMs' disks.",
        number(has.disk.bytes()),
    )?;
    to.gauge(
        "ghost_host_disk_free_bytes",
        "Free space on the file system with the VMs' disks.",
        number(has.disk_free.bytes()),
    )?;
    for (kind, help, share) in [
        (
            "allocatable",
            "that VMs may have together",
            capacity.allocatable,
        ),
        ("committed", "that VMs hold", capacity.committed),
    ] {
        to.gauge(
            &format!("ghost_{kind}_cpus"),
            &format!("Virtual CPUs {help}."),
            f64::from(share.cpus),
        )?;
        to.gauge(
            &format!("ghost_{kind}_memory_bytes"),
            &format!("Memory {help}."),
            number(share.memory.bytes()),
        )?;
        to.gauge(
            &format!("ghost_{kind}_disk_bytes"),
            &format!("Disk space {help}."),
            number(share.disk.bytes()),
        )?;
    }
    Ok(())
}

fn agent_parts(to: &Families<'_>, view: &MetricsView) -> Result<()> {
    to.gauge(
        "ghost_hypervisor_up",
        "Whether libvirt can be reached.",
        flag(view.hypervisor_connected),
    )?;
    to.gauge(
        "ghost_hypervisor_contact_age_seconds",
        "Time since libvirt last answered.",
        view.hypervisor_age.as_secs_f64(),
    )?;
    to.gauge(
        "ghost_store_writable",
        "Whether the state store takes writes.",
        flag(view.store.writable),
    )?;
    to.gauge(
        "ghost_store_disk_bytes",
        "Space that the state store occupies.",
        number(view.store.disk_bytes),
    )?;
    to.counter(
        "ghost_store_commits_total",
        "Commits to the state store.",
        number(view.store.commits),
    )?;
    to.counter(
        "ghost_store_commit_seconds_total",
        "Time that commits to the state store took in all.",
        view.store.commit_seconds,
    )?;
    to.gauge(
        "ghost_image_cache_files",
        "Files in the image cache.",
        f64::from(view.images),
    )?;
    to.gauge(
        "ghost_image_cache_bytes",
        "Space that the image cache occupies.",
        number(view.image_bytes.bytes()),
    )?;
    to.gauge(
        "ghost_operations_open",
        "Operations that have not ended.",
        f64::from(view.open_operations),
    )
}

/// The link to Ghost Core. A host that is in no fleet has no series of it but the counters.
fn core(registry: &Registry, to: &Families<'_>, view: &MetricsView) -> Result<()> {
    let link = &view.core;
    let up = matches!(link.state, LinkState::Up { .. });
    if link.identity.is_some() {
        to.gauge(
            "ghost_core_link_up",
            "Whether data goes both ways between this host and Ghost Core.",
            flag(up),
        )?;
    }
    if let LinkState::Up { round_trip, .. } = &link.state {
        to.gauge(
            "ghost_core_link_round_trip_seconds",
            "Round trip of the last ping to Ghost Core.",
            round_trip.as_secs_f64(),
        )?;
    }
    if let Some(left) = view.core_certificate_left {
        to.gauge(
            "ghost_core_certificate_expiry_seconds",
            "Time until this host's certificate for Ghost Core ends; 0 once it has.",
            left.as_secs_f64(),
        )?;
    }
    let heartbeats = CounterVec::new(
        Opts::new(
            "ghost_core_heartbeats_total",
            "Heartbeats to Ghost Core by outcome.",
        ),
        &["outcome"],
    )?;
    for (outcome, count) in [
        ("answered", link.heartbeats_answered),
        ("lost", link.heartbeats_lost),
    ] {
        heartbeats
            .with_label_values(&[outcome])
            .inc_by(number(count));
    }
    registry.register(Box::new(heartbeats))?;
    let commands = CounterVec::new(
        Opts::new(
            "ghost_core_commands_total",
            "Commands of Ghost Core that reached a status.",
        ),
        &["status"],
    )?;
    for status in ["accepted", "succeeded", "failed", "refused", "expired"] {
        let count = link.commands.get(status).copied().unwrap_or_default();
        commands.with_label_values(&[status]).inc_by(number(count));
    }
    registry.register(Box::new(commands))
}

type Reading = fn(&VmMetrics) -> Option<u64>;

/// What is known of each VM; the counters only while it runs and libvirt answers.
const GAUGES: [(&str, &str, Reading); 4] = [
    ("ghost_vm_vcpus", "Virtual CPUs of the VM.", |vm| {
        Some(u64::from(vm.vcpus))
    }),
    ("ghost_vm_memory_bytes", "Memory of the VM.", |vm| {
        Some(vm.memory.bytes())
    }),
    (
        "ghost_vm_memory_resident_bytes",
        "Resident memory of the VM's QEMU process.",
        |vm| Some(vm.statistics.as_ref()?.memory_resident_bytes),
    ),
    (
        "ghost_vm_disk_allocated_bytes",
        "Space that the VM's disk occupies, as last measured.",
        |vm| Some(vm.disk_allocated.bytes()),
    ),
];

const COUNTERS: [(&str, &str, Reading); 4] = [
    (
        "ghost_vm_block_read_bytes_total",
        "Bytes read from the VM's disks since it started.",
        |vm| Some(vm.statistics.as_ref()?.block_read_bytes),
    ),
    (
        "ghost_vm_block_write_bytes_total",
        "Bytes written to the VM's disks since it started.",
        |vm| Some(vm.statistics.as_ref()?.block_write_bytes),
    ),
    (
        "ghost_vm_network_receive_bytes_total",
        "Bytes that the VM received since it started.",
        |vm| Some(vm.statistics.as_ref()?.network_receive_bytes),
    ),
    (
        "ghost_vm_network_transmit_bytes_total",
        "Bytes that the VM sent since it started.",
        |vm| Some(vm.statistics.as_ref()?.network_transmit_bytes),
    ),
];

fn vms(registry: &Registry, all: &[VmMetrics]) -> Result<()> {
    let ids: Vec<String> = all.iter().map(|vm| vm.id.to_string()).collect();
    let each = || ids.iter().map(String::as_str).zip(all);

    let by_state = GaugeVec::new(Opts::new("ghost_vms", "VMs by state."), &["state"])?;
    for state in VmState::ALL {
        let count = all.iter().filter(|vm| vm.state == state).count();
        by_state
            .with_label_values(&[state.as_str()])
            .set(number(count as u64));
    }
    registry.register(Box::new(by_state))?;

    let state = GaugeVec::new(
        Opts::new("ghost_vm_state", "1 for the state that the VM is in."),
        &[VM[0], VM[1], "state"],
    )?;
    let cpu = CounterVec::new(
        Opts::new(
            "ghost_vm_cpu_seconds_total",
            "CPU time that the VM used since it started.",
        ),
        &VM,
    )?;
    for (id, vm) in each() {
        state
            .with_label_values(&[id, vm.name.as_str(), vm.state.as_str()])
            .set(1.0);
        if let Some(statistics) = &vm.statistics {
            cpu.with_label_values(&[id, vm.name.as_str()])
                .inc_by(Duration::from_nanos(statistics.cpu_time_nanoseconds).as_secs_f64());
        }
    }
    registry.register(Box::new(state))?;
    registry.register(Box::new(cpu))?;

    for (name, help, read) in GAUGES {
        let family = GaugeVec::new(Opts::new(name, help), &VM)?;
        for (id, vm) in each() {
            if let Some(value) = read(vm) {
                family
                    .with_label_values(&[id, vm.name.as_str()])
                    .set(number(value));
            }
        }
        registry.register(Box::new(family))?;
    }
    for (name, help, read) in COUNTERS {
        let family = CounterVec::new(Opts::new(name, help), &VM)?;
        for (id, vm) in each() {
            if let Some(value) = read(vm) {
                family
                    .with_label_values(&[id, vm.name.as_str()])
                    .inc_by(number(value));
            }
        }
        registry.register(Box::new(family))?;
    }
    Ok(())
}
