//! Looking at libvirt: one domain, or all of them.

use std::collections::HashMap;

use ghost_domain::ports::{CachedContent, Change, DomainSnapshot};
use ghost_domain::vm::{DesiredPower, Lifecycle, ObservedPower, Vm};
use ghost_domain::{
    EventKind, Image, ImageName, ImageOrigin, OperationKind, OperationStatus, Result, Timestamp,
    VmId,
};

use super::{Supervisor, absent};
use crate::application::Ports;
use crate::registry::{Decision, Model, Registry};

/// Looks at one domain and records its power; told states follow. `None` where libvirt did not
/// answer.
pub(crate) async fn observe_one(
    registry: &Registry,
    ports: &Ports,
    id: VmId,
) -> Option<ObservedPower> {
    let seen = ports.hypervisor.get(id).await.ok()?;
    let now = registry.clock().now();
    let monotonic = registry.clock().monotonic();
    let observation = seen.map_or_else(|| absent(now), |snapshot| snapshot.observation);
    let power = observation.power;
    registry.observe(|model| {
        model.link.last_contact = monotonic;
        if let Some(entry) = model.vms.get_mut(&id) {
            entry.observe(observation);
        }
    });
    Some(power)
}

/// Looks at one domain after its definition changed.
pub(super) async fn look(supervisor: &Supervisor, id: VmId) {
    let Ok(seen) = supervisor.ports.hypervisor.get(id).await else {
        return;
    };
    let known = supervisor
        .registry
        .read(|model| model.vms.contains_key(&id));
    match (known, seen) {
        (true, Some(snapshot)) => apply(supervisor, id, Some(snapshot)),
        (true, None) => apply(supervisor, id, None),
        (false, Some(snapshot)) => adopt(supervisor, vec![snapshot]).await,
        (false, None) => {}
    }
}

/// Puts what was seen of a known VM into the registry and tells drift.
fn apply(supervisor: &Supervisor, id: VmId, snapshot: Option<DomainSnapshot>) {
    let registry = &supervisor.registry;
    let now = registry.clock().now();
    let told = registry.observe(|model| {
        let entry = model.vms.get_mut(&id)?;
        // While an operation of ours holds the VM, what differs is our own doing.
        let held = entry.operation.is_some();
        let drift = match &snapshot {
            Some(snapshot) => drift_of(&entry.vm, snapshot),
            None => vec!["the libvirt domain was undefined".to_owned()],
        };
        let record = snapshot
            .as_ref()
            .and_then(|snapshot| snapshot.record.as_ref());
        let access = record.map(|record| record.spec.guest.access);
        entry.observe(snapshot.map_or_else(|| absent(now), |snapshot| snapshot.observation));
        entry.access_in_domain = access;
        let news = !held && !drift.is_empty() && drift != entry.drift;
        if !held || drift.is_empty() {
            if entry.drift.is_empty() {
                entry.drift_since = now;
            }
            entry.drift.clone_from(&drift);
        }
        news.then(|| (drift.join("; "), entry.vm.name.to_string()))
    });
    if let Some((detail, name)) = told {
        registry.tell(EventKind::VmDrift { detail }, Some(id), name);
    }
}

/// How a domain differs from our record: by its own metadata (the adapter compared those), and
/// where the metadata itself is not what we wrote.
fn drift_of(vm: &Vm, snapshot: &DomainSnapshot) -> Vec<String> {
    let mut drift = snapshot.drift.clone();
    if snapshot.name != vm.name.as_str() {
        drift.push(format!("the domain is named {:?}", snapshot.name));
    }
    match &snapshot.record {
        None => drift.push("our metadata in the domain is damaged".into()),
        Some(record) if record.generation != vm.generation => {
            drift.push(format!(
                "the domain is of generation {}, the record of {}",
                record.generation, vm.generation
            ));
        }
        Some(_) => {}
    }
    drift
}

/// Looks at all domains: what is known is updated, what is ours and unknown is adopted, what is
/// gone is marked absent. Nothing is destroyed here, whatever is or is not seen.
pub(super) async fn full(supervisor: &Supervisor) -> Result<()> {
    let registry = &supervisor.registry;
    let snapshots = supervisor.ports.hypervisor.list().await?;
    let mut seen: HashMap<VmId, DomainSnapshot> = snapshots
        .into_iter()
        .map(|snapshot| (snapshot.id, snapshot))
        .collect();
    let known: Vec<VmId> = registry.read(|model| model.vms.keys().copied().collect());
    // The link is up from here on, so that states come out right as they are applied.
    let now = registry.clock().monotonic();
    registry.report(|model| model.link.last_contact = now);
    for id in known {
        let snapshot = seen.remove(&id);
        let (power, reason) =
            snapshot
                .as_ref()
                .map_or((ObservedPower::Absent, String::new()), |snapshot| {
                    (
                        snapshot.observation.power,
                        snapshot.observation.reason.clone(),
                    )
                });
        let crashed = power == ObservedPower::Crashed;
        apply(supervisor, id, snapshot);
        if crashed {
            super::crash::handle(supervisor, id, &reason).await;
        }
    }
    adopt(supervisor, seen.into_values().collect()).await;
    Ok(())
}

/// Makes records for domains that carry our metadata and have none: the store was lost or is
/// older than they are. Running VMs go on untouched.
async fn adopt(supervisor: &Supervisor, strangers: Vec<DomainSnapshot>) {
    let registry = &supervisor.registry;
    for snapshot in strangers {
        let Some(mut vm) = snapshot.record.clone() else {
            tracing::warn!(domain = %snapshot.id, name = %snapshot.name, "a domain of ours has damaged metadata and no record; it is left alone");
            continue;
        };
        let id = vm.id;
        vm.lifecycle = Lifecycle::Ready;
        vm.desired = match snapshot.observation.power {
            ObservedPower::Running | ObservedPower::ShuttingDown => DesiredPower::Running,
            ObservedPower::Paused => DesiredPower::Paused,
            ObservedPower::Off | ObservedPower::Crashed | ObservedPower::Absent => {
                DesiredPower::Stopped
            }
        };
        let content = match &vm.spec.image.content {
            Some((digest, _)) => supervisor.ports.images.get(digest).await.ok().flatten(),
            None => None,
        };
        let name = vm.name.to_string();
        let now = registry.clock().now();
        let adopted = registry
            .transact(move |model: &Model| {
                if model.vms.contains_key(&vm.id) {
                    return Ok(Decision::nothing(false));
                }
                if model.names.contains_key(&vm.name) {
                    tracing::warn!(vm = %vm.id, name = %vm.name, "a domain of ours has no record, and its name is taken; it is left alone");
                    return Ok(Decision::nothing(false));
                }
                if was_removed(model, vm.id) {
                    return Ok(Decision::nothing(false));
                }
                let mut changes = Vec::new();
                let image = vm.spec.image.name.clone();
                // The image's name is in the metadata: its record is rebuilt with it.
                if let Some(content) = content.filter(|_| !model.images.contains_key(&image)) {
                    changes.push(Change::PutImage(recovered_image(image, &content, now)));
                }
                changes.push(Change::PutVm(Box::new(vm)));
                Ok(Decision::of(true, changes).notice(EventKind::VmAdded { adopted: true }, Some(id), name))
            })
            .await;
        match adopted {
            Ok(true) => apply(supervisor, id, Some(snapshot)),
            Ok(false) => {}
            Err(error) => tracing::error!(vm = %id, %error, "cannot record an adopted VM"),
        }
    }
}

/// Gives files of the cache that no record names a name again, after records were lost. Those of
/// adopted VMs got theirs from the VMs' metadata.
pub(super) async fn recover_images(supervisor: &Supervisor) {
    let contents = match supervisor.ports.images.list().await {
        Ok(contents) => contents,
        Err(error) => {
            tracing::warn!(%error, "the image cache cannot be looked at");
            return;
        }
    };
    let now = supervisor.registry.clock().now();
    let recovered = supervisor
        .registry
        .transact(move |model: &Model| {
            let mut changes = Vec::new();
            for content in contents {
                let named = model
                    .images
                    .values()
                    .any(|image| image.digest == content.digest);
                let digest: String = content.digest.to_string().chars().take(12).collect();
                let name = ImageName::new(format!("recovered-{digest}"))?;
                if !named {
                    changes.push(Change::PutImage(recovered_image(name, &content, now)));
                }
            }
            Ok(Decision::of((), changes))
        })
        .await;
    if let Err(error) = recovered {
        tracing::warn!(%error, "images cannot be recorded anew");
    }
}

fn recovered_image(name: ImageName, content: &CachedContent, now: Timestamp) -> Image {
    Image {
        name,
        digest: content.digest,
        format: content.format,
        virtual_size: content.virtual_size,
        file_size: content.file_size,
        origin: ImageOrigin::Imported {
            file_name: "recovered from the cache".into(),
        },
        created_at: now,
        last_used_at: now,
    }
}

/// Tells of folders that belong to no record. They are left alone: a person decides.
pub(super) async fn report_strays(supervisor: &Supervisor) {
    let Ok(folders) = supervisor.ports.storage.list().await else {
        return;
    };
    supervisor.registry.observe(|model| {
        for folder in folders {
            if !model.vms.contains_key(&folder) {
                tracing::warn!(vm = %folder, "a VM's folder has neither record nor domain; it is left alone");
                model.warnings.push(format!(
                    "the folder vms/{folder} belongs to no VM: look at it, and remove it if nothing in it is needed"
                ));
            }
        }
    });
}

/// Whether an operation of ours removed the VM (or undid its making) after the look at libvirt was
/// taken: then the snapshot is old, and adopting it would bring back a record of nothing.
fn was_removed(model: &Model, id: VmId) -> bool {
    model.operations.values().any(|entry| {
        let operation = &entry.operation;
        let succeeded = operation.status == OperationStatus::Succeeded;
        operation.vm == Some(id)
            && operation.status.is_finished()
            && match operation.kind {
                OperationKind::DeleteVm { .. } => succeeded,
                OperationKind::CreateVm { .. } => !succeeded,
                _ => false,
            }
    })
}
