//! Every rule against a planted fault: an auditor that finds nothing is worthless.

use std::path::PathBuf;

use super::super::{Image, Interface, Operation, Process, Records, Tap};
use super::*;
use crate::libvirt::{Domain, Lease};
use crate::xml::DomainXml;

const VM: &str = "5b1a2f46-7c0e-4b52-9d57-3f2f6a1c0d11";
const MAC: &str = "52:54:00:00:00:01";

fn file(path: &str, kind: FileKind) -> OwnFile {
    OwnFile {
        path: PathBuf::from(path),
        kind,
    }
}

/// A host on which all is well: one running VM on one image.
fn sound() -> Evidence {
    let folder = format!("vms/{VM}");
    let data_dir = PathBuf::from("/data");
    Evidence {
        records: Records {
            vms: vec![Vm {
                id: VM.into(),
                name: "web".into(),
                state: "running".into(),
                operation_id: None,
                nics: vec![Interface {
                    mac: MAC.into(),
                    addresses: vec!["10.0.0.5".into()],
                }],
            }],
            images: vec![Image {
                name: "tiny".into(),
                digest: "aa".into(),
                format: "qcow2".into(),
            }],
            operations: vec![Operation {
                id: "op-1".into(),
                kind: "create_vm".into(),
                subject: "web".into(),
                status: "succeeded".into(),
            }],
        },
        partial_downloads: false,
        domains: vec![Domain {
            xml: DomainXml {
                id: VM.into(),
                name: "web".into(),
                ghost: true,
                taps: vec!["vnet0".into()],
                ..DomainXml::default()
            },
            active: true,
            persistent: true,
            state: "running".into(),
        }],
        real: true,
        taps_in_use: BTreeSet::from(["vnet0".into()]),
        taps: vec![Tap {
            name: "vnet0".into(),
            bridge: Some("ghost0".into()),
        }],
        leases: vec![Lease {
            network: "ghost-default".into(),
            mac: MAC.into(),
            address: "10.0.0.5".into(),
        }],
        files: vec![
            file(&folder, FileKind::Folder),
            file(&format!("{folder}/disk.qcow2"), FileKind::Regular),
            file(&format!("{folder}/seed.img"), FileKind::Regular),
            file(&format!("{folder}/console.log"), FileKind::Regular),
            file(&format!("{folder}/console.log.0"), FileKind::Regular),
            file(&format!("{folder}/console.sock"), FileKind::Socket),
            file(&format!("{folder}/guest.sock"), FileKind::Socket),
            file("images/aa.qcow2", FileKind::Regular),
            file("images/aa.json", FileKind::Regular),
            file("images/staging", FileKind::Folder),
        ],
        bases: BTreeMap::from([(VM.to_owned(), data_dir.join("images/aa.qcow2"))]),
        processes: vec![
            Process {
                pid: 10,
                program: "qemu-system-x86_64".into(),
                vm: Some(VM.into()),
            },
            Process {
                pid: 9,
                program: "ghost-agent".into(),
                vm: None,
            },
        ],
        sockets: vec![
            data_dir.join("agent.sock"),
            data_dir.join(format!("vms/{VM}/console.sock")),
            data_dir.join(format!("vms/{VM}/guest.sock")),
        ],
        locks: vec![
            (data_dir.join("state/lock"), "ghost-agent".into()),
            (
                data_dir.join(format!("vms/{VM}/disk.qcow2")),
                "qemu-system-x86".into(),
            ),
        ],
        data_dir,
    }
}

/// Plants a fault and expects exactly these kinds of findings.
#[track_caller]
fn finds(plant: impl FnOnce(&mut Evidence), kinds: &[Kind]) {
    let mut evidence = sound();
    plant(&mut evidence);
    let findings = judge(&evidence);
    let found: Vec<Kind> = findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(found, kinds, "{findings:#?}");
}

#[test]
fn a_sound_host_passes() {
    finds(|_| {}, &[]);
}

#[test]
fn domains_without_records_and_records_without_domains() {
    let stranger = "00000000-0000-4000-8000-000000000000";
    finds(
        |evidence| {
            let mut domain = evidence.domains[0].clone();
            domain.xml.id = stranger.into();
            domain.active = false;
            evidence.domains.push(domain);
        },
        &[Kind::OrphanDomain],
    );
    finds(
        |evidence| {
            evidence.domains.clear();
            evidence.processes.clear();
            evidence.taps.clear();
            evidence.sockets.clear();
        },
        &[Kind::MissingDomain],
    );
    finds(
        |evidence| evidence.domains[0].persistent = false,
        &[Kind::MissingDomain],
    );
}

#[test]
fn records_that_contradict_libvirt() {
    for state in ["stopped", "starting", "unknown", "deleting"] {
        finds(
            |evidence| evidence.records.vms[0].state = state.into(),
            &[Kind::Disagreement],
        );
    }
    finds(
        |evidence| evidence.domains[0].xml.name = "other".into(),
        &[Kind::Disagreement],
    );
    finds(
        |evidence| evidence.records.vms[0].operation_id = Some("op-1".into()),
        &[Kind::Disagreement],
    );
    finds(
        |evidence| {
            let mut twin = evidence.records.vms[0].clone();
            twin.name = "twin".into();
            twin.nics[0].addresses.clear();
            evidence.records.vms.push(twin);
        },
        // The same id and address twice; the domain has the name of one only.
        &[Kind::Disagreement, Kind::Disagreement],
    );
}

#[test]
fn folders_and_files() {
    finds(
        |evidence| evidence.files.push(file("vms/0000", FileKind::Folder)),
        &[Kind::OrphanFolder],
    );
    finds(
        |evidence| evidence.files.push(file("vms/x.tmp", FileKind::Regular)),
        &[Kind::OrphanFile],
    );
    for name in ["disk.qcow2.new", "console.log.bak", "core", "sub/deep"] {
        finds(
            |evidence| {
                evidence
                    .files
                    .push(file(&format!("vms/{VM}/{name}"), FileKind::Regular));
            },
            &[Kind::OrphanFile],
        );
    }
    for part in ["disk.qcow2", "seed.img"] {
        finds(
            |evidence| evidence.files.retain(|file| !file.path.ends_with(part)),
            &[Kind::MissingFile],
        );
    }
    finds(
        |evidence| {
            evidence
                .bases
                .insert(VM.to_owned(), "/elsewhere/base.qcow2".into());
        },
        &[Kind::MissingImage],
    );
    finds(|evidence| evidence.bases.clear(), &[Kind::MissingImage]);
}

#[test]
fn images_and_staging() {
    finds(
        |evidence| {
            evidence
                .files
                .push(file("images/bb.raw", FileKind::Regular))
        },
        &[Kind::OrphanImage],
    );
    finds(
        |evidence| {
            evidence
                .files
                .push(file("images/odd/thing", FileKind::Regular))
        },
        &[Kind::OrphanFile],
    );
    for name in ["upload-1", "pull-2.partial"] {
        finds(
            |evidence| {
                evidence
                    .files
                    .push(file(&format!("images/staging/{name}"), FileKind::Regular));
            },
            &[Kind::OrphanStaging],
        );
    }
    finds(
        |evidence| {
            evidence.partial_downloads = true;
            evidence
                .files
                .push(file("images/staging/pull-2.partial", FileKind::Regular));
        },
        &[],
    );
    finds(
        |evidence| {
            evidence
                .files
                .retain(|file| !file.path.ends_with("aa.qcow2"))
        },
        // The image is gone, and the disk that stands on it hangs in the air.
        &[Kind::MissingImage, Kind::MissingImage],
    );
}

#[test]
fn processes_sockets_locks() {
    finds(
        |evidence| {
            evidence.processes.push(Process {
                pid: 11,
                program: "qemu-system-x86_64".into(),
                vm: Some("other".into()),
            });
        },
        &[Kind::OrphanProcess],
    );
    finds(
        |evidence| {
            let twin = evidence.processes[0].clone();
            evidence.processes.push(Process { pid: 12, ..twin });
        },
        &[Kind::OrphanProcess],
    );
    finds(
        |evidence| {
            evidence.processes.push(Process {
                pid: 13,
                program: "qemu-img".into(),
                vm: None,
            });
        },
        &[Kind::OrphanProcess],
    );
    finds(
        |evidence| {
            evidence.processes.remove(0);
        },
        &[Kind::Disagreement],
    );
    finds(
        |evidence| evidence.sockets.push("/data/vms/other/console.sock".into()),
        &[Kind::OrphanSocket],
    );
    for holder in ["", "sleep"] {
        finds(
            |evidence| {
                evidence
                    .locks
                    .push(("/data/state/lock".into(), holder.into()))
            },
            &[Kind::OrphanLock],
        );
    }
}

#[test]
fn taps_leases_operations() {
    finds(
        |evidence| {
            evidence.taps.push(Tap {
                name: "vnet9".into(),
                bridge: None,
            });
        },
        &[Kind::OrphanTap],
    );
    finds(|evidence| evidence.leases.clear(), &[Kind::WrongLease]);
    finds(
        |evidence| evidence.leases[0].mac = "52:54:00:00:00:99".into(),
        &[Kind::WrongLease],
    );
    for status in ["pending", "running", "needs_attention"] {
        finds(
            |evidence| evidence.records.operations[0].status = status.into(),
            &[Kind::OpenOperation],
        );
    }
}
