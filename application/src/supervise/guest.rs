//! Keeps a link to the agent of every VM that runs, takes up what guests tell, and looks after
//! them: their clocks after a pause, their agents' version.
//!
//! ```text
//! records and power ─> attach, detach, cut (access switched off), clock (after a pause)
//! guests' events ────> connected, conditions, addresses, samples
//! every 5 to 10 s ───> the host's counters by one bulk call, while VMs run
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use ghost_domain::guest::{GuestHello, GuestInject, GuestTelemetry, SampleSource};
use ghost_domain::ports::{DomainStatistics, GuestEvent, GuestEvents};
use ghost_domain::vm::{Lifecycle, ObservedPower};
use ghost_domain::{ErrorCode, EventKind, Monotonic, Principal, VmId};

use super::Supervisor;
use crate::guest::{GuestTarget, SWITCHED_OFF, SyncGuestClock, UpdateGuest, escape};
use crate::registry::{GuestSample, HostRates, Model, VmEntry, reported_addresses};

/// How long libvirt may take over the counters of all VMs.
const PATIENCE: Duration = Duration::from_secs(4);
/// A clock is set once the guest answers again; one that does not by then sets it itself.
const CLOCK_WITHIN: Duration = Duration::from_secs(60);
const CLOCK_TRIES: u32 = 3;
/// Tries to bring one guest's agent to the program that the host has.
const UPDATE_TRIES: u32 = 3;
/// How long after a try the next one comes.
const UPDATE_AGAIN: Duration = Duration::from_secs(60);
/// A guest that is in use, or whose next try is to come, is looked at again this often …
const LOOK_AT_TRIES: Duration = Duration::from_secs(10);
/// … and the host's program, which a package may replace, this often while any guest runs.
const LOOK_FOR_PROGRAM: Duration = Duration::from_secs(300);

/// What was last done about a VM.
#[derive(Clone, Copy)]
struct Kept {
    paused: bool,
    access: bool,
}

/// What is to be done about a VM.
enum Act {
    Attach,
    Detach(&'static str),
    Cut,
    SetClock,
}

/// Attaches and detaches links as records and power change.
pub(super) async fn keep_links(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    let mut kept: BTreeMap<VmId, Kept> = BTreeMap::new();
    let mut changed = registry.watch();
    loop {
        changed.borrow_and_update();
        let acts = registry.read(|model| plan(model, &mut kept));
        for (id, act) in acts {
            perform(&supervisor, id, &act);
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

fn plan(model: &Model, kept: &mut BTreeMap<VmId, Kept>) -> Vec<(VmId, Act)> {
    let mut acts = Vec::new();
    kept.retain(|id, _| {
        let why = match model.vms.get(id) {
            None => "the VM is gone",
            Some(entry) if entry.vm.lifecycle == Lifecycle::Deleting => "the VM is being deleted",
            Some(entry) if !is_active(entry) => "the VM is not running",
            Some(_) => return true,
        };
        acts.push((*id, Act::Detach(why)));
        false
    });
    for (id, entry) in &model.vms {
        if !is_active(entry) || entry.vm.lifecycle == Lifecycle::Deleting {
            continue;
        }
        let now = Kept {
            paused: entry
                .observation
                .as_ref()
                .is_some_and(|seen| seen.power == ObservedPower::Paused),
            access: entry.vm.spec.guest.access,
        };
        match kept.insert(*id, now) {
            None => acts.push((*id, Act::Attach)),
            Some(before) => {
                if before.access && !now.access {
                    acts.push((*id, Act::Cut));
                }
                if before.paused && !now.paused {
                    acts.push((*id, Act::SetClock));
                }
            }
        }
    }
    acts
}

fn perform(supervisor: &Supervisor, id: VmId, act: &Act) {
    let guests = &supervisor.ports.guests;
    match act {
        Act::Attach => guests.attach(id, &supervisor.ports.storage.guest_socket_path(id)),
        Act::Detach(why) => guests.detach(id, why),
        Act::Cut => {
            let cut = guests.cut(id, SWITCHED_OFF);
            tracing::info!(vm = %id, cut, "guest access switched off");
        }
        Act::SetClock => {
            let supervisor = supervisor.clone();
            let tasks = supervisor.door.tasks.clone();
            let stop = supervisor.stop.clone();
            tasks.spawn(async move { stop.run_until_cancelled(set_clock(supervisor, id)).await });
        }
    }
}

fn is_active(entry: &VmEntry) -> bool {
    entry
        .observation
        .as_ref()
        .is_some_and(|seen| seen.power.is_active())
}

/// Sets a guest's clock after a pause, once its agent is there.
async fn set_clock(supervisor: Supervisor, id: VmId) {
    let able = supervisor.registry.wait_for(|model| {
        let Some(entry) = model.vms.get(&id) else {
            return Some(false);
        };
        let hello = entry.guest.hello.as_ref().filter(|_| entry.guest.connected);
        hello.map(|hello| can(hello, "clock"))
    });
    match tokio::time::timeout(CLOCK_WITHIN, able).await {
        Ok(Ok(true)) => {}
        Ok(_) | Err(_) => return,
    }
    let clock = SyncGuestClock {
        door: supervisor.door.clone(),
    };
    let target = GuestTarget {
        vm: id.to_string(),
        request_id: String::new(),
    };
    for attempt in 1..=CLOCK_TRIES {
        // A closed door is the owner's word, and no fault to be logged.
        if supervisor.door.check_policy(id).is_err() {
            return;
        }
        match clock.execute(&Principal::agent(), &target).await {
            Ok(()) => return,
            Err(error) if error.code() == ErrorCode::VmNotRunning => return,
            Err(error) => tracing::debug!(vm = %id, attempt, %error, "a clock was not set"),
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    tracing::warn!(vm = %id, "the guest's clock could not be set after the pause");
}

fn can(hello: &GuestHello, what: &str) -> bool {
    hello.capabilities.iter().any(|one| one == what)
}

/// Takes up what guests tell.
pub(super) async fn follow(supervisor: Supervisor, mut events: Box<dyn GuestEvents>) {
    while let Some(event) = events.next().await {
        match event {
            GuestEvent::Connected {
                vm,
                hello,
                rebooted,
            } => connected(&supervisor, vm, hello, rebooted),
            GuestEvent::Disconnected { vm, reason } => disconnected(&supervisor, vm, &reason),
            GuestEvent::Telemetry { vm, report } => reported(&supervisor, vm, *report),
            GuestEvent::Misbehaved { vm, detail } => misbehaved(&supervisor, vm, &detail),
        }
    }
}

fn connected(supervisor: &Supervisor, id: VmId, hello: GuestHello, rebooted: bool) {
    let registry = &supervisor.registry;
    let (now, monotonic) = (registry.clock().now(), registry.clock().monotonic());
    let version = escape(&hello.agent_version, 64);
    let told = registry.observe(|model| {
        let entry = model.vms.get_mut(&id)?;
        let guest = &mut entry.guest;
        if !guest.connected || guest.since.is_none() {
            guest.since = Some(now);
        }
        guest.connected = true;
        guest.reason.clear();
        guest.misbehaved = None;
        guest.hello = Some(std::sync::Arc::new(hello));
        if rebooted {
            // What the kernel before said is history.
            guest.telemetry = None;
            guest.cloud_init = None;
        }
        guest.may_tell(monotonic).then(|| entry.vm.name.to_string())
    });
    if let Some(name) = told {
        let kind = EventKind::GuestConnected { version, rebooted };
        registry.tell(kind, Some(id), name);
    }
}

fn disconnected(supervisor: &Supervisor, id: VmId, reason: &str) {
    let registry = &supervisor.registry;
    let (now, monotonic) = (registry.clock().now(), registry.clock().monotonic());
    let reason = escape(reason, 256);
    let told = registry.observe(|model| {
        let entry = model.vms.get_mut(&id)?;
        let active = is_active(entry);
        let guest = &mut entry.guest;
        let was = std::mem::replace(&mut guest.connected, false);
        if was {
            guest.since = Some(now);
        }
        // Of a VM that is off this says nothing new.
        if active {
            guest.reason.clone_from(&reason);
        }
        (was && guest.may_tell(monotonic)).then(|| entry.vm.name.to_string())
    });
    if let Some(name) = told {
        registry.tell(EventKind::GuestDisconnected { reason }, Some(id), name);
    }
}

fn misbehaved(supervisor: &Supervisor, id: VmId, detail: &str) {
    let registry = &supervisor.registry;
    let (now, monotonic) = (registry.clock().now(), registry.clock().monotonic());
    let detail = escape(detail, 256);
    let told = registry.observe(|model| {
        let entry = model.vms.get_mut(&id)?;
        let guest = &mut entry.guest;
        if std::mem::replace(&mut guest.connected, false) {
            guest.since = Some(now);
        }
        guest.misbehaved = Some(detail.clone());
        guest.may_tell(monotonic).then(|| entry.vm.name.to_string())
    });
    if let Some(name) = told {
        registry.tell(EventKind::GuestMisbehaved { detail }, Some(id), name);
    }
}

fn reported(supervisor: &Supervisor, id: VmId, report: GuestTelemetry) {
    let registry = &supervisor.registry;
    let (now, monotonic) = (registry.clock().now(), registry.clock().monotonic());
    let addresses = registry.read(|model| {
        let entry = model.vms.get(&id).filter(|entry| is_active(entry))?;
        let cards: Vec<_> = entry
            .vm
            .spec
            .interfaces
            .iter()
            .map(|card| card.mac)
            .collect();
        let owner = |address| {
            let mut leases = model.vms.values().flat_map(|entry| &entry.addresses);
            leases
                .find(|(_, leased)| *leased == address)
                .map(|(mac, _)| *mac)
        };
        Some(reported_addresses(&report, &cards, owner))
    });
    let Some(addresses) = addresses else { return };
    // Three reports that did not come, and some patience.
    let fresh = supervisor.guest.telemetry_interval * 3 + Duration::from_secs(1);
    // Only what watchers of the VM see wakes them; the rest comes every five seconds for ever.
    let news = registry.measure(|model| {
        let Some(entry) = model.vms.get_mut(&id) else {
            return false;
        };
        let moved = entry.reported != addresses;
        entry.reported = addresses;
        let told = entry.guest.report(report, (monotonic, fresh), now);
        let sample = guest_sample(entry, now);
        if let Some(sample) = sample {
            entry.guest.history.push(&sample);
        }
        moved || told
    });
    if news {
        registry.observe(|_| ());
    }
}

/// CPU and memory as the guest says, the rest as the host last counted.
fn guest_sample(entry: &VmEntry, now: ghost_domain::Timestamp) -> Option<GuestSample> {
    let (report, _) = entry.guest.telemetry.as_ref()?;
    let used = report
        .memory_total_bytes
        .saturating_sub(report.memory_available_bytes);
    let rates = entry.guest.host.map(|host| host.rates);
    Some(sample(
        (now, SampleSource::Guest),
        report.cpu_percent,
        (used, report.memory_total_bytes),
        rates,
    ))
}

fn sample(
    (at, source): (ghost_domain::Timestamp, SampleSource),
    cpu_percent: f64,
    (used, total): (u64, u64),
    rates: Option<[f64; 4]>,
) -> GuestSample {
    GuestSample {
        at,
        source,
        cpu_percent: Some(cpu_percent),
        memory_used_bytes: Some(used),
        memory_total_bytes: Some(total),
        disk_read_bytes_per_second: rates.map(|rates| rates[0]),
        disk_write_bytes_per_second: rates.map(|rates| rates[1]),
        network_receive_bytes_per_second: rates.map(|rates| rates[2]),
        network_transmit_bytes_per_second: rates.map(|rates| rates[3]),
    }
}

/// Reads the host's counters of all VMs from time to time, by one call, while any runs.
pub(super) async fn count(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    loop {
        let needed = registry.wait_for(|model| {
            let any = model.link.connected && model.vms.values().any(is_active);
            any.then_some(())
        });
        if needed.await.is_err() {
            return;
        }
        let statistics = supervisor.ports.hypervisor.statistics();
        match tokio::time::timeout(PATIENCE, statistics).await {
            Ok(Ok(statistics)) => take_counters(&supervisor, statistics),
            Ok(Err(error)) => tracing::debug!(%error, "no statistics of VMs"),
            Err(_) => tracing::debug!("libvirt is slow with the statistics of VMs"),
        }
        let now = registry.clock().monotonic();
        let silent = registry.read(|model| {
            model
                .vms
                .values()
                .any(|entry| is_active(entry) && !entry.guest.is_fresh(now))
        });
        // Where guests speak for themselves only the disks and the network are the host's to count.
        let every = supervisor.guest.counters_interval;
        tokio::time::sleep(if silent { every } else { every * 2 }).await;
    }
}

fn take_counters(supervisor: &Supervisor, statistics: Vec<DomainStatistics>) {
    let registry = &supervisor.registry;
    let (now, monotonic) = (registry.clock().now(), registry.clock().monotonic());
    registry.measure(|model| {
        for counters in statistics {
            let Some(entry) = counters.id.and_then(|id| model.vms.get_mut(&id)) else {
                continue;
            };
            let vcpus = entry.vm.spec.vcpus;
            let guest = &mut entry.guest;
            if let Some((before, at)) = &guest.counters {
                guest.host = rates(before, &counters, monotonic.since(*at), vcpus);
            }
            guest.counters = Some((counters, monotonic));
            // While the guest speaks for itself its own reports make the points.
            if guest.is_fresh(monotonic) {
                continue;
            }
            if let Some(host) = guest.host {
                let memory = (host.memory_used, host.memory_total);
                let sample = sample(
                    (now, SampleSource::Host),
                    host.cpu_percent,
                    memory,
                    Some(host.rates),
                );
                guest.history.push(&sample);
            }
        }
    });
}

/// What the counters of two looks say. `None` where they began anew in between.
#[expect(clippy::cast_precision_loss, reason = "rates are drawn, not booked")]
fn rates(
    before: &DomainStatistics,
    after: &DomainStatistics,
    elapsed: Duration,
    vcpus: u32,
) -> Option<HostRates> {
    let seconds = elapsed.as_secs_f64();
    if seconds < 0.5 {
        return None;
    }
    let per_second = |before: u64, after: u64| Some(after.checked_sub(before)? as f64 / seconds);
    let busy = per_second(before.cpu_time_nanoseconds, after.cpu_time_nanoseconds)? / 1e9;
    Some(HostRates {
        cpu_percent: (busy / f64::from(vcpus.max(1)) * 100.0).clamp(0.0, 100.0),
        memory_used: after.memory_resident_bytes,
        memory_total: after.memory_bytes,
        rates: [
            per_second(before.block_read_bytes, after.block_read_bytes)?,
            per_second(before.block_write_bytes, after.block_write_bytes)?,
            per_second(before.network_receive_bytes, after.network_receive_bytes)?,
            per_second(before.network_transmit_bytes, after.network_transmit_bytes)?,
        ],
    })
}

/// How often a guest was tried with a program, and when it may be again.
struct Tries {
    program: [u8; 32],
    count: u32,
    next: Monotonic,
}

/// Brings guests' agents to the program that the host has, one after the other.
pub(super) async fn keep_updated(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    let mut tries: BTreeMap<VmId, Tries> = BTreeMap::new();
    let mut changed = registry.watch();
    let mut known: Vec<(VmId, Vec<u8>)> = Vec::new();
    let mut look = tokio::time::Instant::now();
    loop {
        changed.borrow_and_update();
        let candidates: Vec<(VmId, Vec<u8>)> = registry.read(|model| {
            tries.retain(|id, _| model.vms.get(id).is_some_and(is_active));
            let entries = model.vms.values().filter(|_| model.lockdown.is_none());
            entries.filter_map(updatable).collect()
        });
        if candidates.is_empty() {
            known.clear();
            if changed.changed().await.is_err() {
                return;
            }
            continue;
        }
        // Most changes of the registry are none here.
        if candidates == known {
            match tokio::time::timeout_at(look, changed.changed()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
        known.clone_from(&candidates);
        look = tokio::time::Instant::now() + LOOK_FOR_PROGRAM;
        let Some(program) = supervisor.door.program().await else {
            continue;
        };
        for (id, sha256) in candidates {
            // One that has it keeps its count: else it could claim now this, now that, for ever.
            if sha256 == program.sha256 {
                continue;
            }
            let now = registry.clock().monotonic();
            let fresh = || Tries {
                program: program.sha256,
                count: 0,
                next: now,
            };
            let tried = tries.entry(id).or_insert_with(fresh);
            if tried.program != program.sha256 {
                *tried = fresh();
            }
            if tried.count >= UPDATE_TRIES {
                continue;
            }
            // Looked at again soon.
            known.clear();
            let used = supervisor.ports.guests.status(id).running_calls > 0;
            if tried.next > now || used {
                continue;
            }
            tried.count += 1;
            update(&supervisor, id, tried.count).await;
            tried.next = registry.clock().monotonic().after(UPDATE_AGAIN);
        }
        if known.is_empty() {
            drop(tokio::time::timeout(LOOK_AT_TRIES, changed.changed()).await);
        }
    }
}

/// A guest whose agent may be replaced, with the checksum of the one it has.
fn updatable(entry: &VmEntry) -> Option<(VmId, Vec<u8>)> {
    let hello = entry.guest.hello.as_ref()?;
    let running = entry
        .observation
        .as_ref()
        .is_some_and(|seen| seen.power == ObservedPower::Running);
    let may = entry.guest.connected
        && running
        && entry.vm.spec.guest.access
        && entry.vm.spec.guest.inject != GuestInject::Never
        && can(hello, "update")
        && !hello.program_sha256.is_empty();
    may.then(|| (entry.vm.id, hello.program_sha256.clone()))
}

async fn update(supervisor: &Supervisor, id: VmId, attempt: u32) {
    let update = UpdateGuest {
        door: supervisor.door.clone(),
    };
    let target = GuestTarget {
        vm: id.to_string(),
        request_id: String::new(),
    };
    let outcome = update.execute(&Principal::agent(), &target).await;
    let name = supervisor
        .registry
        .read(|model| model.vms.get(&id).map(|entry| entry.vm.name.to_string()));
    let Some(name) = name else { return };
    let kind = match outcome {
        Ok(_) => EventKind::GuestUpdated {
            updated: true,
            detail: "to the host's program".into(),
        },
        Err(error) if attempt < UPDATE_TRIES => {
            tracing::warn!(vm = %id, attempt, %error, "a guest's agent was not updated");
            return;
        }
        Err(error) => EventKind::GuestUpdated {
            updated: false,
            detail: format!(
                "given up after {attempt} tries: {}",
                escape(&error.to_string(), 256)
            ),
        },
    };
    supervisor.registry.tell(kind, Some(id), name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_all_cpus_and_never_of_counters_that_began_anew() {
        let before = DomainStatistics {
            cpu_time_nanoseconds: 1_000_000_000,
            block_read_bytes: 100,
            ..DomainStatistics::default()
        };
        let mut after = DomainStatistics {
            cpu_time_nanoseconds: 11_000_000_000,
            block_read_bytes: 1100,
            memory_resident_bytes: 5,
            ..DomainStatistics::default()
        };
        let ten = Duration::from_secs(10);
        let found = rates(&before, &after, ten, 2).unwrap();
        assert!((found.cpu_percent - 50.0).abs() < 1e-9);
        assert!((found.rates[0] - 100.0).abs() < 1e-9);
        assert_eq!(found.memory_used, 5);
        assert!(rates(&before, &after, Duration::ZERO, 2).is_none());
        after.block_read_bytes = 0;
        assert!(rates(&before, &after, ten, 2).is_none());
    }
}
