//! What must be looked at from time to time because nobody tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ghost_domain::vm::ObservedPower;
use ghost_domain::{MacAddress, NetworkName};

use super::Supervisor;
use crate::image::evict;
use crate::registry::Model;

/// How often libvirt is asked whether it still answers. Together with the adapter's own watch this
/// keeps the shown age of states honest.
const LIVENESS: Duration = Duration::from_secs(3);
/// So many questions in a row without an answer, and states are unknown.
const SILENT_AT_MOST: u32 = 2;
/// DHCP tells nobody of its leases: asked this often while a running VM has no address …
const LEASES_WAITING: Duration = Duration::from_secs(1);
/// … this often while one is without address for longer than a boot takes (it may never ask) …
const LEASES_LATE: Duration = Duration::from_secs(10);
const BOOT_TAKES: Duration = Duration::from_secs(180);
/// … and this often otherwise.
const LEASES_SETTLED: Duration = Duration::from_secs(30);
/// Disk usage and free space are measured this often.
const UPKEEP: Duration = Duration::from_secs(30);
/// Files of the image cache that nothing names are looked for this often.
const UNNAMED_IMAGES: Duration = Duration::from_secs(600);
/// The state is exported this often.
const EXPORT: Duration = Duration::from_secs(300);
/// An export that failed is tried again so much later, then twice that, and so on …
const EXPORT_RETRY: Duration = Duration::from_secs(1);
/// … but no later than this.
const EXPORT_RETRY_AT_MOST: Duration = Duration::from_secs(60);

/// Notes that libvirt answers, or that it no longer does.
pub(super) async fn liveness(supervisor: Supervisor) {
    let mut silent = 0;
    loop {
        tokio::time::sleep(LIVENESS).await;
        if !supervisor.registry.read(|model| model.link.connected) {
            silent = 0;
            continue;
        }
        let answer = tokio::time::timeout(LIVENESS, supervisor.ports.hypervisor.info()).await;
        match answer {
            Ok(Ok(_)) => {
                silent = 0;
                supervisor.contact();
            }
            Ok(Err(_)) | Err(_) => silent += 1,
        }
        if silent >= SILENT_AT_MOST {
            supervisor.disconnected("libvirt does not answer".into());
        }
    }
}

/// Learns addresses from leases.
pub(super) async fn leases(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    loop {
        look_at_leases(&supervisor).await;
        let pause = pause(&supervisor);
        let mut changed = registry.watch();
        changed.borrow_and_update();
        // A VM that comes up without an address ends a long pause.
        let woken = async {
            loop {
                if changed.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
                if self::pause(&supervisor) < pause {
                    return;
                }
            }
        };
        drop(tokio::time::timeout(pause, woken).await);
    }
}

/// How long until the leases are worth another look.
fn pause(supervisor: &Supervisor) -> Duration {
    let now = supervisor.registry.clock().now();
    supervisor.registry.read(|model| {
        if !model.link.connected {
            return LEASES_SETTLED;
        }
        model
            .vms
            .values()
            .filter(|entry| entry.addresses.is_empty() && !entry.vm.spec.interfaces.is_empty())
            .filter_map(|entry| entry.observation.as_ref())
            .filter(|seen| seen.power == ObservedPower::Running)
            .map(|seen| {
                if now.since(seen.since) < BOOT_TAKES {
                    LEASES_WAITING
                } else {
                    LEASES_LATE
                }
            })
            .min()
            .unwrap_or(LEASES_SETTLED)
    })
}

/// Reads the leases of all networks with running VMs.
async fn look_at_leases(supervisor: &Supervisor) {
    let registry = &supervisor.registry;
    let networks: BTreeSet<NetworkName> = registry.read(|model| {
        if !model.link.connected {
            return BTreeSet::new();
        }
        model
            .vms
            .values()
            .filter(|entry| {
                entry
                    .observation
                    .as_ref()
                    .is_some_and(|seen| seen.power.is_active())
            })
            .flat_map(|entry| {
                entry
                    .vm
                    .spec
                    .interfaces
                    .iter()
                    .map(|card| card.network.clone())
            })
            .collect()
    });
    let mut by_mac: BTreeMap<MacAddress, Vec<IpAddr>> = BTreeMap::new();
    for network in networks {
        match supervisor.ports.networks.leases(&network).await {
            Ok(leases) => {
                for lease in leases {
                    by_mac.entry(lease.mac).or_default().push(lease.address);
                }
            }
            Err(error) => tracing::debug!(%network, %error, "cannot read leases"),
        }
    }
    let now = registry.clock().monotonic();
    let changed = registry.read(|model| {
        model.vms.values().any(|entry| {
            entry
                .observation
                .as_ref()
                .is_some_and(|seen| seen.power.is_active())
                && addresses_of(
                    entry.vm.spec.interfaces.iter().map(|card| card.mac),
                    &by_mac,
                ) != entry.addresses
        })
    });
    let update = |model: &mut crate::registry::Model| {
        for entry in model.vms.values_mut() {
            if !entry
                .observation
                .as_ref()
                .is_some_and(|seen| seen.power.is_active())
            {
                continue;
            }
            let found = addresses_of(
                entry.vm.spec.interfaces.iter().map(|card| card.mac),
                &by_mac,
            );
            if !found.is_empty() {
                entry.addresses_at = now;
            }
            entry.addresses = found;
        }
    };
    if changed {
        registry.observe(update);
    } else if !by_mac.is_empty() {
        registry.quietly(update);
    }
}

fn addresses_of(
    macs: impl Iterator<Item = MacAddress>,
    by_mac: &BTreeMap<MacAddress, Vec<IpAddr>>,
) -> Vec<(MacAddress, IpAddr)> {
    macs.flat_map(|mac| {
        by_mac
            .get(&mac)
            .into_iter()
            .flatten()
            .map(move |address| (mac, *address))
    })
    .collect()
}

/// Exports the state: from time to time, and where an export is owed (see
/// [`crate::registry::Registry::export_withdrawal`]).
pub(super) async fn exports(supervisor: Supervisor) {
    loop {
        let owed = tokio::time::timeout(EXPORT, supervisor.registry.export_owed()).await;
        let mut pause = EXPORT_RETRY;
        if owed.is_ok() {
            tokio::time::sleep(pause).await;
        }
        while let Err(error) = supervisor.ports.store.export().await {
            tracing::warn!(%error, "cannot export the state");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(EXPORT_RETRY_AT_MOST);
        }
    }
}

/// Removes files of the image cache that were never named: once libvirt was looked at and what an
/// earlier run left open is done, and from time to time, because a publication that was already
/// under way when its operation was cancelled ends after the operation's undo.
pub(super) async fn unnamed_images(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    let settled = |model: &Model| {
        let settled = model.link.connected && !model.recovering && !evict::is_bringing(model, None);
        settled.then_some(())
    };
    while registry.wait_for(settled).await.is_ok() {
        if let Err(error) = evict::sweep_unnamed(registry, &supervisor.ports, None).await {
            tracing::warn!(%error, "the image cache could not be swept");
        }
        tokio::time::sleep(UNNAMED_IMAGES).await;
    }
}

/// Measures what disks take, reads the host.
pub(super) async fn upkeep(supervisor: Supervisor) {
    let registry = &supervisor.registry;
    loop {
        measure(&supervisor).await;
        // What was deleted or made since the last look is measured at the next one.
        tokio::time::sleep(UPKEEP).await;
        tracing::trace!(vms = registry.read(|model| model.vms.len()), "upkeep");
    }
}

/// Reads what changes without anybody telling: free space, and what the disks take.
pub(crate) async fn measure(supervisor: &Supervisor) {
    let registry = &supervisor.registry;
    if let Ok(host) = supervisor.ports.host.resources().await {
        registry.quietly(|model| model.host = host);
    }
    let ids: Vec<_> = registry.read(|model| model.vms.keys().copied().collect());
    for id in ids {
        if let Ok(usage) = supervisor.ports.storage.usage(id).await {
            registry.quietly(|model| {
                if let Some(entry) = model.vms.get_mut(&id) {
                    entry.usage = usage;
                }
            });
        }
    }
}
