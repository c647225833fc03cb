//! What is wrong with the evidence.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Evidence, FileKind, Finding, Kind, OwnFile, Vm};

/// Names of files that a VM's folder may hold beside the console's socket.
fn belongs_to_a_vm(name: &str) -> bool {
    matches!(name, "disk.qcow2" | "seed.img" | "console.log")
        // virtlogd's rotated logs.
        || name
            .strip_prefix("console.log.")
            .is_some_and(|number| number.parse::<u8>().is_ok())
}

/// Names everything that is wrong; empty where nothing is.
pub fn judge(evidence: &Evidence) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut report = |kind, subject: &str, detail: String| {
        findings.push(Finding {
            kind,
            subject: subject.to_owned(),
            detail,
        });
    };
    domains(evidence, &mut report);
    folders(evidence, &mut report);
    images(evidence, &mut report);
    processes(evidence, &mut report);
    network(evidence, &mut report);
    for operation in &evidence.records.operations {
        if matches!(
            operation.status.as_str(),
            "pending" | "running" | "needs_attention"
        ) {
            report(
                Kind::OpenOperation,
                &operation.id,
                format!(
                    "{} of {} is {}",
                    operation.kind, operation.subject, operation.status
                ),
            );
        }
    }
    findings.sort();
    findings
}

type Report<'a> = &'a mut dyn FnMut(Kind, &str, String);

fn domains(evidence: &Evidence, report: Report<'_>) {
    let records: BTreeMap<&str, &Vm> = evidence
        .records
        .vms
        .iter()
        .map(|vm| (vm.id.as_str(), vm))
        .collect();
    for domain in &evidence.domains {
        let Some(vm) = records.get(domain.xml.id.as_str()) else {
            report(
                Kind::OrphanDomain,
                &domain.xml.name,
                format!(
                    "the domain {} ({}) has no record",
                    domain.xml.id, domain.state
                ),
            );
            continue;
        };
        let shown_active = match vm.state.as_str() {
            "running" | "paused" => true,
            "stopped" => false,
            "failed" => continue,
            // A state of transition or none at all: there is an operation, or libvirt is away,
            // and neither may be so when an audit is clean.
            other => {
                report(
                    Kind::Disagreement,
                    &vm.name,
                    format!("the record is {other}"),
                );
                continue;
            }
        };
        if shown_active != domain.active {
            report(
                Kind::Disagreement,
                &vm.name,
                format!(
                    "the record says {}, the domain is {}",
                    vm.state, domain.state
                ),
            );
        }
        if domain.xml.name != vm.name {
            report(
                Kind::Disagreement,
                &vm.name,
                format!("the domain is named {}", domain.xml.name),
            );
        }
        if !domain.persistent {
            report(
                Kind::MissingDomain,
                &vm.name,
                "the domain runs without a definition".to_owned(),
            );
        }
    }
    let present: BTreeSet<&str> = evidence
        .domains
        .iter()
        .map(|domain| domain.xml.id.as_str())
        .collect();
    for vm in &evidence.records.vms {
        if !present.contains(vm.id.as_str()) {
            report(
                Kind::MissingDomain,
                &vm.name,
                format!("the record {} ({}) has no domain", vm.id, vm.state),
            );
        }
        if let Some(operation) = &vm.operation_id {
            let open = evidence.records.operations.iter().any(|known| {
                known.id == *operation && matches!(known.status.as_str(), "pending" | "running")
            });
            if !open {
                report(
                    Kind::Disagreement,
                    &vm.name,
                    format!("it is held by the operation {operation}, which is not open"),
                );
            }
        }
    }
}

fn folders(evidence: &Evidence, report: Report<'_>) {
    let records: BTreeMap<&str, &Vm> = evidence
        .records
        .vms
        .iter()
        .map(|vm| (vm.id.as_str(), vm))
        .collect();
    let active: BTreeSet<&str> = evidence
        .domains
        .iter()
        .filter(|domain| domain.active)
        .map(|domain| domain.xml.id.as_str())
        .collect();
    let mut present: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for file in &evidence.files {
        let mut parts = file
            .path
            .iter()
            .map(|part| part.to_str().unwrap_or("\u{fffd}"));
        if parts.next() != Some("vms") {
            continue;
        }
        let (Some(vm), name, deeper) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let shown = file.path.display().to_string();
        let Some(name) = name else {
            if file.kind != FileKind::Folder {
                report(Kind::OrphanFile, &shown, "not a VM's folder".to_owned());
            } else if !records.contains_key(vm) {
                report(
                    Kind::OrphanFolder,
                    &shown,
                    "no record has this folder".to_owned(),
                );
            } else {
                present.entry(vm).or_default();
            }
            continue;
        };
        let expected = deeper.is_none()
            && match file.kind {
                FileKind::Regular => belongs_to_a_vm(name),
                // QEMU's sockets stay where QEMU was killed; the next start replaces them.
                FileKind::Socket => matches!(name, "console.sock" | "guest.sock"),
                FileKind::Folder | FileKind::Other => false,
            };
        if !expected {
            report(Kind::OrphanFile, &shown, "no part of a VM".to_owned());
        }
        present.entry(vm).or_default().insert(name);
    }
    for vm in &evidence.records.vms {
        let files = present.get(vm.id.as_str());
        for part in ["disk.qcow2", "seed.img"] {
            if !files.is_some_and(|files| files.contains(part)) {
                report(
                    Kind::MissingFile,
                    &vm.name,
                    format!("vms/{}/{part} is not there", vm.id),
                );
            }
        }
        if let Some(base) = evidence.bases.get(&vm.id) {
            let there = base.strip_prefix(&evidence.data_dir).is_ok_and(|base| {
                evidence
                    .files
                    .iter()
                    .any(|OwnFile { path, .. }| path == base)
            });
            if !there {
                report(
                    Kind::MissingImage,
                    &vm.name,
                    format!(
                        "its disk stands on {}, which is not in the cache",
                        base.display()
                    ),
                );
            }
        } else if files.is_some_and(|files| files.contains("disk.qcow2")) {
            report(
                Kind::MissingImage,
                &vm.name,
                "its disk is no overlay over an image".to_owned(),
            );
        }
    }
    for socket in &evidence.sockets {
        let vm = socket
            .strip_prefix(evidence.data_dir.join("vms"))
            .ok()
            .and_then(|path| path.iter().next()?.to_str());
        if let Some(vm) = vm
            && !active.contains(vm)
        {
            report(
                Kind::OrphanSocket,
                &socket.display().to_string(),
                "somebody listens there, and no running domain has it".to_owned(),
            );
        }
    }
}

fn images(evidence: &Evidence, report: Report<'_>) {
    let busy = evidence.records.operations.iter().any(|operation| {
        matches!(
            operation.kind.as_str(),
            "pull_image" | "import_image" | "create_vm"
        ) && matches!(operation.status.as_str(), "pending" | "running")
    });
    let mut present = BTreeSet::new();
    for file in &evidence.files {
        let Ok(path) = file.path.strip_prefix("images") else {
            continue;
        };
        let shown = file.path.display().to_string();
        let parts: Vec<&str> = path
            .iter()
            .map(|part| part.to_str().unwrap_or("\u{fffd}"))
            .collect();
        match parts[..] {
            ["staging"] => {}
            ["staging", name] => {
                let partial = name.starts_with("pull-");
                if !(busy || partial && evidence.partial_downloads) {
                    report(
                        Kind::OrphanStaging,
                        &shown,
                        "no operation works on it".to_owned(),
                    );
                }
            }
            [name] if file.kind == FileKind::Regular => {
                let digest = Path::new(name)
                    .file_stem()
                    .and_then(|stem| stem.to_str())
                    .unwrap_or_default();
                let recorded = evidence
                    .records
                    .images
                    .iter()
                    .any(|image| image.digest == digest);
                if recorded {
                    present.insert(name);
                } else {
                    report(
                        Kind::OrphanImage,
                        &shown,
                        "no record has this image".to_owned(),
                    );
                }
            }
            _ => report(
                Kind::OrphanFile,
                &shown,
                "no part of the image cache".to_owned(),
            ),
        }
    }
    for image in &evidence.records.images {
        let file = format!("{}.{}", image.digest, image.format);
        if !present.contains(file.as_str()) {
            report(
                Kind::MissingImage,
                &image.name,
                format!("images/{file} is not there"),
            );
        }
    }
}

fn processes(evidence: &Evidence, report: Report<'_>) {
    let active: BTreeSet<&str> = evidence
        .domains
        .iter()
        .filter(|domain| domain.active)
        .map(|domain| domain.xml.id.as_str())
        .collect();
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    let busy = evidence
        .records
        .operations
        .iter()
        .any(|operation| matches!(operation.status.as_str(), "pending" | "running"));
    for process in &evidence.processes {
        let shown = format!("{} {}", process.program, process.pid);
        match &process.vm {
            Some(vm) if !active.contains(vm.as_str()) => {
                report(
                    Kind::OrphanProcess,
                    &shown,
                    format!("QEMU runs the VM {vm}, which libvirt does not have as running"),
                );
            }
            Some(vm) => {
                if let Some(first) = seen.insert(vm, process.pid) {
                    report(
                        Kind::OrphanProcess,
                        &shown,
                        format!("a second QEMU for the VM {vm}, beside {first}"),
                    );
                }
            }
            None if process.program.starts_with("qemu-") && !busy => {
                report(
                    Kind::OrphanProcess,
                    &shown,
                    "a tool works in the data folder and no operation is open".to_owned(),
                );
            }
            None => {}
        }
    }
    if evidence.real {
        for domain in evidence.domains.iter().filter(|domain| domain.active) {
            if !seen.contains_key(domain.xml.id.as_str()) {
                report(
                    Kind::Disagreement,
                    &domain.xml.name,
                    "libvirt has it as running and there is no QEMU".to_owned(),
                );
            }
        }
    }
    for (path, holder) in &evidence.locks {
        // QEMU locks the images it has open; the agent's threads carry names of their own.
        let allowed =
            holder.starts_with("ghost") || holder.starts_with("qemu") || holder == "virtlogd";
        if !allowed {
            report(
                Kind::OrphanLock,
                &path.display().to_string(),
                format!(
                    "locked by {}",
                    if holder.is_empty() {
                        "a process that is gone"
                    } else {
                        holder
                    }
                ),
            );
        }
    }
}

fn network(evidence: &Evidence, report: Report<'_>) {
    for tap in &evidence.taps {
        if !evidence.taps_in_use.contains(&tap.name) {
            report(
                Kind::OrphanTap,
                &tap.name,
                format!(
                    "no domain has this tap (bridge {})",
                    tap.bridge.as_deref().unwrap_or("none")
                ),
            );
        }
    }
    let mut macs: BTreeMap<&str, &str> = BTreeMap::new();
    for vm in &evidence.records.vms {
        for card in &vm.nics {
            if let Some(other) = macs.insert(&card.mac, &vm.name) {
                report(
                    Kind::Disagreement,
                    &vm.name,
                    format!("its address {} is also that of {other}", card.mac),
                );
            }
            for address in &card.addresses {
                let leased: Vec<&str> = evidence
                    .leases
                    .iter()
                    .filter(|lease| lease.address == *address)
                    .map(|lease| lease.mac.as_str())
                    .collect();
                if evidence.real && !leased.contains(&card.mac.as_str()) {
                    report(
                        Kind::WrongLease,
                        &vm.name,
                        format!(
                            "it is said to have {address}, whose lease is {}",
                            if leased.is_empty() {
                                "gone".to_owned()
                            } else {
                                leased.join(", ")
                            }
                        ),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
