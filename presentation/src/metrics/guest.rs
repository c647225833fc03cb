//! What guests say of themselves.
//!
//! A guest may say what it likes, now this and then that. None of its words becomes a label: every
//! label is one of a fixed set, so that a VM has the same few series all its life. Numbers are as
//! told, and `reported by the guest` stands in the help of each.

use ghost_application::host::{GuestMetrics, VmMetrics};
use ghost_domain::guest::{GuestCpuTimes, GuestFilesystem, GuestTelemetry};
use prometheus::{CounterVec, GaugeVec, Opts, Registry, Result};

use super::collect::{VM, flag, number};

type Told = fn(&GuestTelemetry) -> f64;
type CpuTime = fn(&GuestCpuTimes) -> f64;

const GAUGES: [(&str, &str, Told); 14] = [
    ("ghost_guest_cpus", "CPUs that the guest sees", |told| {
        f64::from(told.cpus)
    }),
    (
        "ghost_guest_memory_total_bytes",
        "Memory that the guest sees",
        |told| number(told.memory_total_bytes),
    ),
    (
        "ghost_guest_memory_available_bytes",
        "Memory that programs in the guest could still have",
        |told| number(told.memory_available_bytes),
    ),
    (
        "ghost_guest_swap_total_bytes",
        "Swap space of the guest",
        |told| number(told.swap_total_bytes),
    ),
    (
        "ghost_guest_swap_free_bytes",
        "Free swap space of the guest",
        |told| number(told.swap_free_bytes),
    ),
    (
        "ghost_guest_load1",
        "Load average of the guest over one minute",
        |told| told.load[0],
    ),
    (
        "ghost_guest_load5",
        "Load average of the guest over five minutes",
        |told| told.load[1],
    ),
    (
        "ghost_guest_load15",
        "Load average of the guest over fifteen minutes",
        |told| told.load[2],
    ),
    ("ghost_guest_processes", "Processes in the guest", |told| {
        f64::from(told.processes)
    }),
    (
        "ghost_guest_users",
        "Sessions of users who are logged on to the guest, 16 at most",
        |told| number(told.users.len() as u64),
    ),
    (
        "ghost_guest_uptime_seconds",
        "Time since the guest's kernel started",
        |told| told.uptime_seconds,
    ),
    (
        "ghost_guest_agent_resident_bytes",
        "Resident memory of the agent in the guest",
        |told| number(told.agent_resident_bytes),
    ),
    (
        "ghost_guest_cloud_init_finished",
        "Whether cloud-init has come to its end in the guest, well or not",
        |told| flag(told.cloud_init.is_finished()),
    ),
    (
        "ghost_guest_frozen",
        "Whether file systems of the guest are frozen",
        |told| flag(told.frozen),
    ),
];

/// The kinds of CPU time, as node_exporter names them.
const MODES: [(&str, CpuTime); 8] = [
    ("user", |cpu| cpu.user),
    ("nice", |cpu| cpu.nice),
    ("system", |cpu| cpu.system),
    ("idle", |cpu| cpu.idle),
    ("iowait", |cpu| cpu.iowait),
    ("irq", |cpu| cpu.irq),
    ("softirq", |cpu| cpu.softirq),
    ("steal", |cpu| cpu.steal),
];

/// The mount points that have a series of their own: those of the Filesystem Hierarchy Standard
/// that are their own file system somewhere. All others are one, `other`.
const MOUNT_POINTS: [&str; 12] = [
    "/",
    "/boot",
    "/boot/efi",
    "/data",
    "/home",
    "/mnt",
    "/opt",
    "/srv",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
];

/// A number that a guest gave; the adapter has made it finite, and here nothing breaks if not.
fn sane(value: f64) -> f64 {
    if value.is_finite() && value > 0.0 {
        value
    } else {
        0.0
    }
}

pub(super) fn fill(registry: &Registry, all: &[VmMetrics]) -> Result<()> {
    let running: Vec<(String, &VmMetrics, &GuestMetrics)> = all
        .iter()
        .filter_map(|vm| Some((vm.id.to_string(), vm, vm.guest.as_ref()?)))
        .collect();
    links(registry, &running)?;
    let telling: Vec<(&str, &str, &GuestTelemetry)> = running
        .iter()
        .filter_map(|(id, vm, guest)| {
            Some((id.as_str(), vm.name.as_str(), guest.report.as_deref()?))
        })
        .collect();
    for (name, help, read) in GAUGES {
        let help = format!("{help}, reported by the guest.");
        let family = GaugeVec::new(Opts::new(name, help), &VM)?;
        for (id, vm, told) in &telling {
            family.with_label_values(&[id, vm]).set(sane(read(told)));
        }
        registry.register(Box::new(family))?;
    }
    cpu(registry, &telling)?;
    network(registry, &telling)?;
    filesystems(registry, &telling)
}

/// What the host knows of the way to each guest.
fn links(registry: &Registry, running: &[(String, &VmMetrics, &GuestMetrics)]) -> Result<()> {
    type Known = fn(&GuestMetrics) -> Option<f64>;
    let known: [(&str, &str, Known); 4] = [
        (
            "ghost_guest_connected",
            "Whether the agent in the VM is connected.",
            |guest| Some(flag(guest.connected)),
        ),
        (
            "ghost_guest_calls",
            "Calls into the guest that are under way.",
            |guest| Some(f64::from(guest.running_calls)),
        ),
        (
            "ghost_guest_violations",
            "Rules of the protocol that the guest broke since its agent connected.",
            |guest| Some(f64::from(guest.violations)),
        ),
        (
            "ghost_guest_report_age_seconds",
            "How old the guest's newest report is; absent while it is silent.",
            |guest| {
                guest
                    .report
                    .as_ref()
                    .map(|_| guest.report_age.as_secs_f64())
            },
        ),
    ];
    for (name, help, read) in known {
        let family = GaugeVec::new(Opts::new(name, help), &VM)?;
        for (id, vm, guest) in running {
            if let Some(value) = read(guest) {
                family
                    .with_label_values(&[id.as_str(), vm.name.as_str()])
                    .set(value);
            }
        }
        registry.register(Box::new(family))?;
    }
    Ok(())
}

fn cpu(registry: &Registry, telling: &[(&str, &str, &GuestTelemetry)]) -> Result<()> {
    let family = CounterVec::new(
        Opts::new(
            "ghost_guest_cpu_seconds_total",
            "CPU time of the guest by mode since it booted, reported by the guest.",
        ),
        &[VM[0], VM[1], "mode"],
    )?;
    for (id, vm, told) in telling {
        for (mode, read) in MODES {
            family
                .with_label_values(&[id, vm, mode])
                .inc_by(sane(read(&told.cpu)));
        }
    }
    registry.register(Box::new(family))
}

fn network(registry: &Registry, telling: &[(&str, &str, &GuestTelemetry)]) -> Result<()> {
    type Side = fn(&ghost_domain::guest::GuestInterface) -> u64;
    let sides: [(&str, &str, Side); 2] = [
        (
            "ghost_guest_network_receive_bytes_total",
            "Bytes that the guest received on all interfaces but lo, reported by the guest.",
            |card| card.receive_bytes,
        ),
        (
            "ghost_guest_network_transmit_bytes_total",
            "Bytes that the guest sent on all interfaces but lo, reported by the guest.",
            |card| card.transmit_bytes,
        ),
    ];
    for (name, help, read) in sides {
        let family = CounterVec::new(Opts::new(name, help), &VM)?;
        for (id, vm, told) in telling {
            let cards = told.interfaces.iter().filter(|card| card.name != "lo");
            let sum = cards.map(read).fold(0, u64::saturating_add);
            family.with_label_values(&[id, vm]).inc_by(number(sum));
        }
        registry.register(Box::new(family))?;
    }
    Ok(())
}

fn filesystems(registry: &Registry, telling: &[(&str, &str, &GuestTelemetry)]) -> Result<()> {
    type Size = fn(&GuestFilesystem) -> u64;
    let sizes: [(&str, &str, Size); 2] = [
        (
            "ghost_guest_filesystem_size_bytes",
            "Size of a file system of the guest; `other` stands for all unusual mount points, reported by the guest.",
            |one| one.total_bytes,
        ),
        (
            "ghost_guest_filesystem_available_bytes",
            "What is free on it for ordinary users, reported by the guest.",
            |one| one.available_bytes,
        ),
    ];
    for (name, help, read) in sizes {
        let family = GaugeVec::new(Opts::new(name, help), &[VM[0], VM[1], "mount_point"])?;
        for (id, vm, told) in telling {
            for one in &told.filesystems {
                let label = MOUNT_POINTS
                    .into_iter()
                    .find(|known| *known == one.mount_point)
                    .unwrap_or("other");
                family
                    .with_label_values(&[id, vm, label])
                    .add(number(read(one)));
            }
        }
        registry.register(Box::new(family))?;
    }
    Ok(())
}
