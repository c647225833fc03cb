//! The contract on libvirt: its test driver, and QEMU itself.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::VmId;
use ghost_domain::ports::Hypervisor;
use ghost_infrastructure::libvirt::{LibvirtHypervisor, LibvirtOptions};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use virt::connect::Connect;
use virt::sys;

use super::support::{DomainGuard, Meddling, PATIENCE, Subject};

/// libvirt with an outsider who has a connection of his own.
pub(crate) struct Libvirt {
    hypervisor: LibvirtHypervisor,
    outsider: Arc<Connect>,
    folder: TempDir,
    test_driver: bool,
    /// Foreign domains of this test.
    guests: Mutex<Vec<DomainGuard>>,
}

impl Libvirt {
    pub(crate) async fn connect(uri: &str) -> Self {
        let hypervisor = LibvirtHypervisor::start(LibvirtOptions {
            uri: uri.into(),
            ..LibvirtOptions::default()
        })
        .unwrap();
        hypervisor.connected(PATIENCE).await.unwrap();
        let outsider = Arc::new(Connect::open(Some(uri)).unwrap());
        Self {
            hypervisor,
            outsider,
            folder: folder(),
            test_driver: uri.starts_with("test:"),
            guests: Mutex::default(),
        }
    }

    /// The same with another deadline for calls.
    pub(crate) async fn with_deadline(mut self, deadline: Duration) -> Self {
        self.hypervisor = LibvirtHypervisor::start(LibvirtOptions {
            call_deadline: deadline,
            ..LibvirtOptions::default()
        })
        .unwrap();
        self.hypervisor.connected(PATIENCE).await.unwrap();
        self
    }

    /// Sends a signal to a VM's QEMU.
    pub(crate) fn signal(&self, id: VmId, signal: Signal) {
        let name = self
            .outsider
            .lookup_domain_by_uuid(id.uuid())
            .unwrap()
            .name()
            .unwrap();
        let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{name}.pid")).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }
}

/// A folder that QEMU's own user can reach.
pub(crate) fn folder() -> TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    tempfile::Builder::new()
        .prefix("ghost-it-")
        .permissions(std::fs::Permissions::from_mode(0o755))
        .tempdir_in("/var/tmp")
        .unwrap()
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // What a failed check left: every domain whose files lie in this test's folder.
        let folder = self.folder.path().to_string_lossy().into_owned();
        for domain in self.outsider.list_all_domains(0).unwrap_or_default() {
            if domain.xml_desc(0).is_ok_and(|xml| xml.contains(&folder)) {
                let _ = domain.destroy();
                let _ = domain.undefine();
            }
        }
    }
}

#[async_trait]
impl Subject for Libvirt {
    fn hypervisor(&self) -> &dyn Hypervisor {
        &self.hypervisor
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn can_crash(&self) -> bool {
        !self.test_driver
    }

    async fn meddle(&self, meddling: Meddling) {
        let find = |id: VmId| self.outsider.lookup_domain_by_uuid(id.uuid()).unwrap();
        match meddling {
            Meddling::Destroy(id) => find(id).destroy().unwrap(),
            Meddling::Undefine(id) => find(id).undefine().unwrap(),
            Meddling::SetVcpus(id, vcpus) => {
                let xml = find(id).xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).unwrap();
                let begin = xml.find("<vcpu").unwrap();
                let end = xml.find("</vcpu>").unwrap();
                let edited = format!("{}<vcpu>{vcpus}{}", &xml[..begin], &xml[end..]);
                self.outsider.define_domain_xml(&edited).unwrap();
            }
            Meddling::DefineForeign(id, name) => {
                let kind = if self.test_driver { "test" } else { "qemu" };
                let xml = format!(
                    "<domain type='{kind}'><name>{name}</name><uuid>{id}</uuid><memory>32768</memory>\
                     <os><type arch='x86_64'>hvm</type></os></domain>"
                );
                self.guests
                    .lock()
                    .unwrap()
                    .push(DomainGuard::new(Arc::clone(&self.outsider), id));
                self.outsider.define_domain_xml(&xml).unwrap();
            }
            Meddling::Crash(id) => self.signal(id, Signal::KILL),
        }
    }
}

mod test_driver {
    use super::Libvirt;
    use crate::hypervisor::contract::contract;

    async fn subject(_: &str) -> Option<Libvirt> {
        Some(Libvirt::connect("test:///default").await)
    }

    contract!(subject);
}

mod qemu {
    use virt::sys;

    use super::{Libvirt, Subject as _};
    use crate::hypervisor::contract::contract;
    use crate::hypervisor::support::definition;

    async fn subject(check: &str) -> Option<Libvirt> {
        if !std::path::Path::new("/run/libvirt/libvirt-sock").exists() {
            println!("skipped: {check} needs libvirtd (deploy/host-setup.sh starts it)");
            return None;
        }
        Some(Libvirt::connect("qemu:///system").await)
    }

    contract!(subject);

    /// libvirt keeps two copies of a running domain, and people look at either.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn guest_access_stands_in_what_runs_and_in_the_definition() {
        let Some(subject) = subject("guest access in both definitions").await else {
            return;
        };
        let hypervisor = subject.hypervisor();
        let definition = definition(&subject, "ct-access2");
        let id = definition.vm.id;
        hypervisor.define(&definition).await.unwrap();
        hypervisor.start(id).await.unwrap();
        for (access, said) in [(false, "no"), (true, "yes"), (false, "no")] {
            hypervisor.set_guest_access(id, access).await.unwrap();
            let domain = subject.outsider.lookup_domain_by_uuid(id.uuid()).unwrap();
            for flags in [0, sys::VIR_DOMAIN_XML_INACTIVE] {
                let xml = domain.xml_desc(flags).unwrap();
                let element = format!("guest_access=\"{said}\"");
                assert!(
                    xml.contains(&element) || xml.contains(&element.replace('"', "'")),
                    "{element} is not in {xml}"
                );
                assert_eq!(xml.matches("<ghost:vm ").count(), 1, "{xml}");
            }
        }
        hypervisor.power_off(id).await.unwrap();
        hypervisor.undefine(id).await.unwrap();
    }
}
