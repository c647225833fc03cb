//! Definitions, waiting for events, and an outsider who meddles through a libvirt connection of
//! his own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::{DomainDefinition, Hypervisor, HypervisorEvent, HypervisorEvents};
use ghost_domain::vm::{
    CloudInit, DesiredPower, ImageReference, Lifecycle, ObservedPower, RestartPolicy, Vm, VmSpec,
};
use ghost_domain::{
    ByteSize, ImageDigest, ImageFormat, ImageName, Result, Timestamp, VmId, VmName,
};

/// Upper bound for anything that comes by itself. Only a fault makes a test wait this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Something that somebody else does behind the adapter's back.
#[derive(Clone, Debug)]
pub(crate) enum Meddling {
    /// Cuts the power.
    Destroy(VmId),
    /// Removes the definition.
    Undefine(VmId),
    /// Changes the number of vCPUs in the definition.
    SetVcpus(VmId, u32),
    /// Defines a domain of his own with this name.
    DefineForeign(VmId, String),
    /// Kills the process that runs the VM.
    Crash(VmId),
}

/// An adapter under test, and the world around it.
#[async_trait]
pub(crate) trait Subject: Send + Sync {
    /// The adapter.
    fn hypervisor(&self) -> &dyn Hypervisor;
    /// A folder for the files of this test.
    fn folder(&self) -> &Path;
    /// Meddles.
    async fn meddle(&self, meddling: Meddling);
    /// Whether a crash can be provoked.
    fn can_crash(&self) -> bool {
        true
    }
    /// The libvirt networks to plug interfaces into.
    fn networks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A VM of this test with nothing in it: the firmware runs and finds nothing to boot.
pub(crate) fn definition(subject: &dyn Subject, prefix: &str) -> DomainDefinition {
    let id = VmId::random();
    let short = &id.to_string()[..8];
    let folder = subject.folder().join(short);
    std::fs::create_dir_all(&folder).unwrap();
    let file = |name: &str| -> PathBuf { folder.join(name) };
    // An empty qcow2 over an empty raw image, as an overlay over a base.
    std::fs::write(file("base.raw"), vec![0u8; 1 << 20]).unwrap();
    std::fs::write(file("seed.img"), vec![0u8; 1 << 16]).unwrap();
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(file("base.raw"))
        .arg(file("disk.qcow2"))
        .arg("4M")
        .status()
        .expect("qemu-img is installed");
    assert!(made.success());
    let networks = subject.networks();
    DomainDefinition {
        vm: Vm {
            id,
            name: VmName::new(format!("{prefix}-{short}")).unwrap(),
            generation: 1,
            spec: VmSpec {
                vcpus: 1,
                memory: ByteSize::from_mib(32),
                image: ImageReference {
                    name: ImageName::new("nothing").unwrap(),
                    content: Some((ImageDigest::from_bytes([1; 32]), ImageFormat::Raw)),
                },
                disk: ByteSize::from_mib(4),
                interfaces: networks
                    .iter()
                    .map(|_| ghost_domain::vm::NetworkInterface {
                        network: ghost_domain::NetworkName::new("default").unwrap(),
                        mac: ghost_domain::MacAddress::random(),
                    })
                    .collect(),
                autostart: None,
                restart_policy: RestartPolicy::Never,
                delete_protection: false,
                guest: Default::default(),
                tags: [("test".to_owned(), "<contract> & more".to_owned())].into(),
            },
            cloud_init: CloudInit::default(),
            desired: DesiredPower::Stopped,
            lifecycle: Lifecycle::Ready,
            created_at: Timestamp::from_unix_millis(1_700_000_000_000),
            registered_addresses: Vec::new(),
            crash_restarts: Vec::new(),
            owner: None,
        },
        disk: file("disk.qcow2"),
        seed: file("seed.img"),
        console_socket: file("console.sock"),
        guest_socket: file("guest.sock"),
        console_log: file("console.log"),
        libvirt_networks: networks,
        base_image: (file("base.raw"), ImageFormat::Raw),
    }
}

/// Events, and waiting for one.
pub(crate) struct Events(Box<dyn HypervisorEvents>);

impl Events {
    pub(crate) fn of(hypervisor: &dyn Hypervisor) -> Self {
        Self(hypervisor.subscribe())
    }

    /// The first event that `wanted` says yes to.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&HypervisorEvent) -> bool,
    ) -> HypervisorEvent {
        let mut seen = Vec::new();
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let event = self.0.next().await.expect("the adapter is there");
                if wanted(&event) {
                    return event;
                }
                seen.push(event);
            }
        })
        .await;
        found.unwrap_or_else(|_| panic!("{what} did not come; seen: {seen:#?}"))
    }

    /// The next change of this VM's power to `power`; returns its reason and whether it crashed.
    pub(crate) async fn power(&mut self, vm: VmId, power: ObservedPower) -> (String, bool) {
        let event = self
            .until(
                &format!("{power:?}"),
                |event| matches!(event, HypervisorEvent::Power { id, observation, .. } if *id == vm && observation.power == power),
            )
            .await;
        match event {
            HypervisorEvent::Power {
                observation,
                crashed,
                ..
            } => (observation.reason, crashed),
            other => panic!("{other:?}"),
        }
    }
}

/// What is seen of a VM's power now.
pub(crate) async fn power(hypervisor: &dyn Hypervisor, vm: VmId) -> Result<Option<ObservedPower>> {
    Ok(hypervisor
        .get(vm)
        .await?
        .map(|snapshot| snapshot.observation.power))
}

/// The record as a domain's metadata can hold it.
pub(crate) fn rebuilt(vm: &Vm) -> Vm {
    Vm {
        cloud_init: CloudInit::default(),
        lifecycle: Lifecycle::Ready,
        registered_addresses: Vec::new(),
        crash_restarts: Vec::new(),
        owner: None,
        ..vm.clone()
    }
}

/// Removes a libvirt domain at the end of a test, however it ends.
pub(crate) struct DomainGuard {
    connection: Arc<virt::connect::Connect>,
    id: VmId,
}

impl DomainGuard {
    pub(crate) const fn new(connection: Arc<virt::connect::Connect>, id: VmId) -> Self {
        Self { connection, id }
    }
}

impl Drop for DomainGuard {
    fn drop(&mut self) {
        if let Ok(domain) = self.connection.lookup_domain_by_uuid(self.id.uuid()) {
            let _ = domain.destroy();
            let _ = domain.undefine();
        }
    }
}
