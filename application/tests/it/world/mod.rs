//! The world outside: everything that survives when the agent dies.

mod fakes;
mod guests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ghost_application::vm::CreateVmCommand;
use ghost_application::{
    Application, FailAction, FailSite, OperationView, Options, Ports, UseCases, VmView,
};
use ghost_domain::fleet::CorePermissions;
use ghost_domain::ports::{CachedContent, StoreContents};
use ghost_domain::vm::{ObservedPower, Vm, VmState};
use ghost_domain::{
    ByteSize, HostResources, Image, ImageDigest, ImageFormat, ImageName, ImageOrigin, MacAddress,
    OperationStatus, Overcommit, Principal, Reserved, VmId,
};
use parking_lot::Mutex;
use tokio::sync::broadcast;

pub(crate) use fakes::FakeClock;
pub(crate) use guests::{Guests, exit, hello};

/// How a guest behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    /// Shuts down when asked.
    Obedient,
    /// Ignores ACPI.
    Deaf,
}

/// When the agent dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dies {
    Before,
    After,
}

/// A libvirt domain of the fake hypervisor.
#[derive(Clone, Debug)]
pub(crate) struct Domain {
    pub(crate) record: Vm,
    pub(crate) power: ObservedPower,
    pub(crate) reason: String,
    pub(crate) drift: Vec<String>,
}

/// What survives the agent.
pub(crate) struct Survivors {
    pub(crate) domains: BTreeMap<VmId, Domain>,
    pub(crate) folders: BTreeSet<VmId>,
    pub(crate) seeds: BTreeSet<VmId>,
    pub(crate) disks: BTreeSet<VmId>,
    pub(crate) store: StoreContents,
    /// The newest export.
    pub(crate) exported: Option<StoreContents>,
    /// The next export fails.
    pub(crate) export_fails: bool,
    pub(crate) content: BTreeMap<ImageDigest, CachedContent>,
    pub(crate) staged: BTreeMap<String, Vec<u8>>,
    pub(crate) leases: BTreeMap<MacAddress, IpAddr>,
    pub(crate) boot_id: String,
    pub(crate) host: HostResources,
    pub(crate) guest: Guest,
    pub(crate) reachable: bool,
    pub(crate) store_full: bool,
    pub(crate) disk_full: bool,
    pub(crate) commits: u64,
    /// The agent dies at the commit of this number, before or after it took effect.
    pub(crate) dies_at: Option<(u64, Dies)>,
    pub(crate) dead: bool,
    pub(crate) statistics: Vec<ghost_domain::ports::DomainStatistics>,
    pub(crate) pulls: u32,
}

/// The world. Cloning shares it.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) survivors: Arc<Mutex<Survivors>>,
    pub(crate) events: broadcast::Sender<ghost_domain::ports::HypervisorEvent>,
    pub(crate) clock: Arc<FakeClock>,
    pub(crate) hold_pull: Arc<AtomicBool>,
    pub(crate) guests: Guests,
    /// Pulls and imports wait between publishing their file and answering.
    pub(crate) hold_published: Arc<AtomicBool>,
    /// What the owner lets Core do; read at a start.
    pub(crate) permissions: Arc<Mutex<CorePermissions>>,
}

/// The application within the world.
pub(crate) struct Agent {
    pub(crate) world: World,
    pub(crate) application: Arc<Application>,
    pub(crate) use_cases: Arc<UseCases>,
}

pub(crate) type Failpoint = Arc<dyn Fn(&FailSite) -> FailAction + Send + Sync>;

pub(crate) fn image_name() -> ImageName {
    ImageName::new("tiny").unwrap()
}

impl World {
    pub(crate) fn new() -> Self {
        let digest = ImageDigest::from_bytes([7; 32]);
        let content = CachedContent {
            digest,
            path: "/images/tiny".into(),
            format: ImageFormat::Qcow2,
            virtual_size: ByteSize::from_mib(128),
            file_size: ByteSize::from_mib(20),
            checksum: None,
        };
        let image = Image {
            name: image_name(),
            digest,
            format: ImageFormat::Qcow2,
            virtual_size: content.virtual_size,
            file_size: content.file_size,
            origin: ImageOrigin::Imported {
                file_name: "tiny.qcow2".into(),
            },
            created_at: Default::default(),
            last_used_at: Default::default(),
        };
        let clock = Arc::new(FakeClock::new());
        Self {
            survivors: Arc::new(Mutex::new(Survivors {
                domains: BTreeMap::new(),
                folders: BTreeSet::new(),
                seeds: BTreeSet::new(),
                disks: BTreeSet::new(),
                store: StoreContents {
                    images: vec![image],
                    boot_id: Some("boot-1".into()),
                    ..StoreContents::default()
                },
                exported: None,
                export_fails: false,
                content: BTreeMap::from([(digest, content)]),
                staged: BTreeMap::new(),
                leases: BTreeMap::new(),
                boot_id: "boot-1".into(),
                host: HostResources {
                    cpus: 8,
                    memory: ByteSize::from_gib(32),
                    disk: ByteSize::from_gib(1000),
                    disk_free: ByteSize::from_gib(900),
                },
                guest: Guest::Obedient,
                reachable: true,
                store_full: false,
                disk_full: false,
                commits: 0,
                dies_at: None,
                dead: false,
                statistics: Vec::new(),
                pulls: 0,
            })),
            events: broadcast::Sender::new(1024),
            clock,
            hold_pull: Arc::new(AtomicBool::new(false)),
            guests: Guests::new(),
            hold_published: Arc::new(AtomicBool::new(false)),
            permissions: Arc::default(),
        }
    }

    pub(crate) fn ports(&self) -> Ports {
        let fake = Arc::new(fakes::Fake {
            world: self.clone(),
        });
        Ports {
            hypervisor: fake.clone(),
            storage: fake.clone(),
            images: fake.clone(),
            image_cache_size: ByteSize::from_mib(100),
            catalogue: fake.clone(),
            networks: fake.clone(),
            host: fake.clone(),
            store: fake.clone(),
            authority: fake.clone(),
            guests: Arc::new(self.guests.clone()),
            audit: Arc::new(self.guests.clone()),
            clock: self.clock.clone(),
        }
    }

    pub(crate) async fn start(&self) -> Agent {
        self.start_with(None).await
    }

    pub(crate) async fn start_with(&self, failpoints: Option<Failpoint>) -> Agent {
        let options = Options {
            reserved: Reserved {
                cpus: 1,
                memory: ByteSize::from_gib(2),
                disk: ByteSize::from_gib(10),
            },
            overcommit: Overcommit::default(),
            guest: self.guests.options(),
            core_permissions: *self.permissions.lock(),
            failpoints,
        };
        let application = Arc::new(Application::start(self.ports(), options).await.unwrap());
        let agent = Agent {
            world: self.clone(),
            use_cases: application.use_cases(),
            application,
        };
        if self.survivors.lock().reachable {
            agent
                .until("libvirt connected", |agent| {
                    Box::pin(async { agent.use_cases.check_health.execute().await.ready })
                })
                .await;
        }
        agent
    }

    /// Everything that exists belongs to a record and the other way round; records tell the truth.
    pub(crate) fn audit(&self) {
        let world = self.survivors.lock();
        let records: BTreeSet<VmId> = world.store.vms.iter().map(|vm| vm.id).collect();
        let domains: BTreeSet<VmId> = world.domains.keys().copied().collect();
        assert_eq!(domains, records, "domains and records differ");
        assert_eq!(world.folders, records, "folders and records differ");
        assert_eq!(world.disks, records, "disks and records differ");
        assert_eq!(world.seeds, records, "seeds and records differ");
        assert!(
            world.staged.is_empty(),
            "staging is not empty: {:?}",
            world.staged.keys()
        );
        for digest in world.content.keys() {
            let named = world
                .store
                .images
                .iter()
                .any(|image| image.digest == *digest);
            let used = world.store.vms.iter().any(|vm| {
                let content = vm.spec.image.content;
                content.is_some_and(|(content, _)| content == *digest)
            });
            assert!(
                named || used,
                "an image's file that nothing names: {digest}"
            );
        }
        for operation in &world.store.operations {
            assert!(
                operation.status.is_finished(),
                "{} is still {}",
                operation.kind.name(),
                operation.status
            );
            assert_ne!(
                operation.status,
                OperationStatus::NeedsAttention,
                "{:?}",
                operation.error
            );
        }
        for vm in &world.store.vms {
            assert_eq!(
                vm.lifecycle,
                ghost_domain::vm::Lifecycle::Ready,
                "{}",
                vm.name
            );
        }
    }

    pub(crate) fn power(&self, name: &str) -> Option<ObservedPower> {
        let world = self.survivors.lock();
        world
            .domains
            .values()
            .find(|domain| domain.record.name.as_str() == name)
            .map(|domain| domain.power)
    }

    /// What the clock shows.
    pub(crate) fn now(&self) -> ghost_domain::Timestamp {
        ghost_domain::ports::Clock::now(&*self.clock)
    }

    pub(crate) fn vm_id(&self, name: &str) -> VmId {
        let world = self.survivors.lock();
        world
            .store
            .vms
            .iter()
            .find(|vm| vm.name.as_str() == name)
            .unwrap()
            .id
    }
}

impl Agent {
    pub(crate) fn me() -> Principal {
        Principal::agent()
    }

    /// Waits for a condition; the test fails after ten seconds without it.
    pub(crate) async fn until<'a>(
        &'a self,
        what: &str,
        condition: impl Fn(&'a Self) -> std::pin::Pin<Box<dyn Future<Output = bool> + Send + 'a>>,
    ) {
        let waited = tokio::time::timeout(Duration::from_secs(10), async {
            while !condition(self).await {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
        assert!(waited.is_ok(), "waited in vain for: {what}");
    }

    pub(crate) async fn create(
        &self,
        name: &str,
        start: bool,
    ) -> ghost_domain::Result<OperationView> {
        self.use_cases
            .create_vm
            .execute(&Self::me(), command(name, start))
            .await
    }

    pub(crate) async fn created(&self, name: &str, start: bool) -> OperationView {
        let view = self.create(name, start).await.unwrap();
        self.finished(&view).await
    }

    pub(crate) async fn finished(&self, view: &OperationView) -> OperationView {
        let id = view.operation.id.to_string();
        let mut watch = self
            .use_cases
            .watch_operation
            .execute(&Self::me(), &id)
            .await
            .unwrap();
        let mut last = view.clone();
        let all = async {
            while let Some(view) = watch.next().await {
                last = view;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), all)
            .await
            .expect("the operation did not end");
        last
    }

    pub(crate) async fn vm(&self, name: &str) -> ghost_domain::Result<VmView> {
        self.use_cases.get_vm.execute(&Self::me(), name).await
    }

    pub(crate) async fn state(&self, name: &str) -> VmState {
        self.vm(name).await.unwrap().shown.state
    }

    pub(crate) async fn idle(&self) {
        self.until("all operations to end", |agent| {
            Box::pin(async move {
                agent
                    .use_cases
                    .list_operations
                    .execute(&Self::me(), &Default::default())
                    .await
                    .unwrap()
                    .is_empty()
            })
        })
        .await;
    }
}

pub(crate) fn command(name: &str, start: bool) -> CreateVmCommand {
    CreateVmCommand {
        name: Some(name.to_owned()),
        image: "tiny".into(),
        vcpus: Some(1),
        memory_bytes: Some(256 << 20),
        disk_bytes: Some(256 << 20),
        start,
        ..CreateVmCommand::default()
    }
}
