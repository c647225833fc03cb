//! The auditor on a real libvirt: what is planted is found, with an agent that knows of nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_e2e::auditor::{Finding, Hypervisor, Kind, Subject, audit, audit_settled};
use ghost_e2e::ctl::Ctl;
use ghost_e2e::libvirt::{SYSTEM, remove_domains_below, virsh};
use ghost_e2e::xml::METADATA_NAMESPACE;
use tempfile::TempDir;
use uuid::Uuid;

/// A data folder, and an agent whose records are empty.
struct Planted {
    folder: TempDir,
}

impl Planted {
    fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix(&format!("ghost-e2e-{}-", std::process::id()))
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in("/var/tmp")
            .unwrap();
        fs::create_dir_all(folder.path().join("data/vms")).unwrap();
        fs::create_dir_all(folder.path().join("data/images/staging")).unwrap();
        fs::write(folder.path().join("ghostctl"), "#!/bin/sh\necho '[]'\n").unwrap();
        fs::set_permissions(
            folder.path().join("ghostctl"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        Self { folder }
    }

    fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn subject(&self) -> Subject {
        Subject {
            data_dir: self.data_dir(),
            hypervisor: Hypervisor::Libvirt(SYSTEM.into()),
            ctl: Ctl::new(self.folder.path().join("ghostctl"), None),
            partial_downloads: false,
        }
    }

    fn kinds(&self) -> Vec<Kind> {
        audit(&self.subject())
            .unwrap()
            .into_iter()
            // Taps are the whole host's, and other tests start guests beside this one.
            .filter(|finding: &Finding| finding.kind != Kind::OrphanTap)
            .map(|finding| finding.kind)
            .collect()
    }

    /// Defines a domain with Ghost's metadata and a disk in this folder.
    fn domain(&self, id: &str) -> String {
        let name = format!("e{:x}-planted-{}", std::process::id(), &id[..8]);
        let disk = self.data_dir().join("vms").join(id).join("disk.qcow2");
        fs::create_dir_all(disk.parent().unwrap()).unwrap();
        fs::set_permissions(disk.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&disk)
            .arg("1M")
            .status()
            .unwrap();
        assert!(made.success());
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><metadata>\
             <g:vm xmlns:g='{METADATA_NAMESPACE}' id='{id}'/></metadata>\
             <memory unit='MiB'>32</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
            disk.display()
        );
        let file = self.folder.path().join("domain.xml");
        fs::write(&file, xml).unwrap();
        virsh(SYSTEM, &["define", path(&file)]).unwrap();
        name
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        drop(remove_domains_below(SYSTEM, self.folder.path()));
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_is_planted_on_a_real_host_is_found() {
    let planted = Planted::new();
    assert_eq!(planted.kinds(), [], "an empty host");

    // Files of every kind that nobody owns.
    let stray = planted.data_dir().join("images/staging/upload-1");
    fs::write(&stray, "x").unwrap();
    assert_eq!(planted.kinds(), [Kind::OrphanStaging]);
    fs::remove_file(stray).unwrap();
    let image = planted.data_dir().join("images/00aa.qcow2");
    fs::write(&image, "x").unwrap();
    assert_eq!(planted.kinds(), [Kind::OrphanImage]);
    fs::remove_file(image).unwrap();

    // A socket that somebody listens on, in a folder that no record has.
    let folder = planted.data_dir().join("vms/stray");
    fs::create_dir(&folder).unwrap();
    let listener = UnixListener::bind(folder.join("console.sock")).unwrap();
    assert_eq!(planted.kinds(), [Kind::OrphanFolder, Kind::OrphanSocket]);
    drop(listener);
    fs::remove_dir_all(folder).unwrap();

    // A lock held by somebody who is no part of Ghost.
    let lock = planted.data_dir().join("lock");
    let mut holder = std::process::Command::new("flock")
        .arg(&lock)
        .args(["sleep", "600"])
        .spawn()
        .unwrap();
    ghost_e2e::wait::until("the lock is seen", Duration::from_secs(10), || {
        (planted.kinds() == [Kind::OrphanLock]).then_some(())
    });
    // `flock` waits for its child, which goes on without it: both are ours.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", holder.id())).unwrap();
    holder.kill().unwrap();
    holder.wait().unwrap();
    for child in children.split_whitespace() {
        std::process::Command::new("kill")
            .arg(child)
            .status()
            .unwrap();
    }
    assert_eq!(
        audit_settled(&planted.subject(), Duration::from_secs(10))
            .unwrap()
            .into_iter()
            .filter(|finding| finding.kind != Kind::OrphanTap)
            .count(),
        0
    );
}

#[test]
fn domains_and_qemu_processes_of_nobody_are_found() {
    let planted = Planted::new();
    let id = Uuid::new_v4().to_string();
    let name = planted.domain(&id);
    assert_eq!(planted.kinds(), [Kind::OrphanDomain, Kind::OrphanFolder]);

    // Running: the process is libvirt's, so the domain alone is the orphan.
    virsh(SYSTEM, &["start", &name]).unwrap();
    assert_eq!(planted.kinds(), [Kind::OrphanDomain, Kind::OrphanFolder]);
    virsh(SYSTEM, &["destroy", &name]).unwrap();
    virsh(SYSTEM, &["undefine", &name]).unwrap();
    assert_eq!(planted.kinds(), [Kind::OrphanFolder]);

    // A QEMU that libvirt knows nothing of.
    let mut qemu = std::process::Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "none",
            "-nodefaults",
            "-display",
            "none",
            "-S",
            "-uuid",
            &id,
        ])
        .arg("-drive")
        .arg(format!(
            "if=none,format=qcow2,file={}",
            planted
                .data_dir()
                .join("vms")
                .join(&id)
                .join("disk.qcow2")
                .display()
        ))
        .spawn()
        .unwrap();
    let seen = ghost_e2e::wait::poll(Duration::from_secs(20), || {
        planted.kinds().contains(&Kind::OrphanProcess).then_some(())
    });
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    assert!(seen.is_some(), "a QEMU of nobody was not found");
    fs::remove_dir_all(planted.data_dir().join("vms").join(&id)).unwrap();
    assert_eq!(planted.kinds(), []);
}
