//! An application over fake ports: one stopped VM `web`, one image `tiny`, and a credential of each
//! role, plus a revoked one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use ghost_application::{Application, Options, Ports, UseCases};
use ghost_domain::fleet::CorePermissions;
use ghost_domain::ports::{
    Accelerator, Clock, ConsoleReader, ConsoleSession, ConsoleWriter, DomainDefinition,
    DomainSnapshot, DomainStatistics, HostFacts, HostProbe, HostUsage, Hypervisor, HypervisorEvent,
    HypervisorEvents, HypervisorInfo, IssuedCertificate, LogReader, MockCertificateAuthority,
    MockImageCache, MockImageCatalogue, MockNetworkProvider, MockStateStore, MockVmStorage,
    StoreContents, StoreHealth, VmStorageUsage,
};
use ghost_domain::vm::{
    CloudInit, DesiredPower, ImageReference, Lifecycle, Observation, ObservationSource,
    ObservedPower, RestartPolicy, Vm, VmSpec,
};
use ghost_domain::{
    ByteSize, CatalogueEntry, Certificate, ChecksumAlgorithm, ChecksumSource, CredentialId, Error,
    ErrorCode, HostResources, Image, ImageDigest, ImageFormat, ImageName, ImageOrigin, Monotonic,
    Network, NetworkName, Principal, Result, Role, Secret, Timestamp, VmId, VmName,
};

use crate::guests::{FakeAudit, FakeLinks, Guest};

/// How the fake host behaves.
pub(crate) const WELL: u8 = 0;
/// It fails.
pub(crate) const BROKEN: u8 = 1;
/// It never answers.
pub(crate) const HUNG: u8 = 2;
/// It panics.
pub(crate) const PANICS: u8 = 3;

/// What tests turn and look at.
#[derive(Default)]
pub(crate) struct Knobs {
    pub(crate) host: AtomicU8,
    pub(crate) hypervisor: AtomicU8,
    pub(crate) statistics_calls: AtomicUsize,
    pub(crate) uploaded: AtomicUsize,
    pub(crate) discarded: AtomicUsize,
    pub(crate) typed: Mutex<Vec<u8>>,
    pub(crate) guest: Arc<Guest>,
}

pub(crate) struct World {
    pub(crate) app: Application,
    pub(crate) knobs: Arc<Knobs>,
    pub(crate) vm: VmId,
    /// Client identities by role; their certificates are made by `grpc::tls`.
    pub(crate) viewer: CredentialId,
    pub(crate) operator: CredentialId,
    pub(crate) admin: CredentialId,
    pub(crate) revoked: CredentialId,
    /// An operator and an admin that may not enter guests.
    pub(crate) confined: [CredentialId; 2],
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(ObservedPower::Off, true).await
    }

    /// With `web` running, where the owner lets Core do so much.
    pub(crate) async fn letting(permissions: CorePermissions) -> Self {
        let options = Options {
            core_permissions: permissions,
            ..Options::default()
        };
        Self::of(ObservedPower::Running, true, options).await
    }

    /// With `web` running and its guest's agent connected.
    pub(crate) async fn running() -> Self {
        Self::with(ObservedPower::Running, true).await
    }

    /// As [`World::running`], with the guest access of `web` off.
    pub(crate) async fn closed() -> Self {
        Self::with(ObservedPower::Running, false).await
    }

    async fn with(power: ObservedPower, access: bool) -> Self {
        Self::of(power, access, Options::default()).await
    }

    async fn of(power: ObservedPower, access: bool, options: Options) -> Self {
        let knobs = Arc::new(Knobs::default());
        let ids: [CredentialId; 6] = std::array::from_fn(|_| CredentialId::random());
        let [viewer, operator, admin, revoked, first, second] = ids;
        let confined = |id, role| Certificate {
            guest_access: false,
            ..certificate(id, role, false)
        };
        let mut vm = vm();
        vm.spec.guest.access = access;
        let id = vm.id;
        let contents = StoreContents {
            vms: vec![vm.clone()],
            images: vec![image()],
            certificates: vec![
                certificate(viewer, Role::Viewer, false),
                certificate(operator, Role::Operator, false),
                certificate(admin, Role::Admin, false),
                certificate(revoked, Role::Admin, true),
                confined(first, Role::Operator),
                confined(second, Role::Admin),
            ],
            ..StoreContents::default()
        };
        let ports = ports(&knobs, contents, vm, power);
        let app = Application::start(ports, options).await.unwrap();
        let world = Self {
            app,
            knobs,
            vm: id,
            viewer,
            operator,
            admin,
            revoked,
            confined: [first, second],
        };
        world.until_ready().await;
        world
    }

    pub(crate) fn use_cases(&self) -> Arc<UseCases> {
        self.app.use_cases()
    }

    /// A new HTTP key.
    pub(crate) async fn key(&self, role: Role) -> String {
        self.key_with(role, true).await
    }

    /// A new HTTP key that may enter guests, or not.
    pub(crate) async fn key_with(&self, role: Role, guest_access: bool) -> String {
        let command = ghost_application::access::CreateKeyCommand {
            name: format!("{role}-key"),
            role,
            guest_access,
            lifetime: None,
        };
        let made = self
            .use_cases()
            .create_key
            .execute(&Principal::agent(), command)
            .await;
        made.unwrap().0.expose().to_owned()
    }

    /// Actions and outcomes of the audit log.
    pub(crate) fn audit_actions(&self) -> Vec<String> {
        let records = self.knobs.guest.audit.lock().unwrap();
        let told = |record: &ghost_domain::guest::AuditRecord| {
            format!("{} {}", record.action, record.outcome)
        };
        records.iter().map(told).collect()
    }

    /// Waits until the first look at the hypervisor is done.
    async fn until_ready(&self) {
        let use_cases = self.use_cases();
        while !use_cases.check_health.execute().await.ready {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn vm() -> Vm {
    Vm {
        id: VmId::random(),
        name: VmName::new("web").unwrap(),
        generation: 1,
        spec: VmSpec {
            vcpus: 1,
            memory: ByteSize::from_mib(256),
            image: ImageReference {
                name: ImageName::new("tiny").unwrap(),
                content: Some((ImageDigest::from_bytes([7; 32]), ImageFormat::Qcow2)),
            },
            disk: ByteSize::from_gib(1),
            interfaces: Vec::new(),
            autostart: None,
            restart_policy: RestartPolicy::Never,
            delete_protection: false,
            guest: Default::default(),
            tags: [("env".to_owned(), "test".to_owned())].into(),
        },
        cloud_init: CloudInit::default(),
        desired: DesiredPower::Stopped,
        lifecycle: Lifecycle::Ready,
        created_at: Timestamp::from(SystemTime::now()),
        registered_addresses: Vec::new(),
        crash_restarts: Vec::new(),
        owner: None,
    }
}

fn image() -> Image {
    Image {
        name: ImageName::new("tiny").unwrap(),
        digest: ImageDigest::from_bytes([7; 32]),
        format: ImageFormat::Qcow2,
        virtual_size: ByteSize::from_mib(64),
        file_size: ByteSize::from_mib(16),
        origin: ImageOrigin::Imported {
            file_name: "tiny.qcow2".into(),
        },
        created_at: Timestamp::default(),
        last_used_at: Timestamp::default(),
    }
}

fn certificate(id: CredentialId, role: Role, revoked: bool) -> Certificate {
    let now = Timestamp::from(SystemTime::now());
    Certificate {
        id,
        name: format!("{role}@test"),
        role,
        guest_access: true,
        created_at: now,
        expires_at: now.after(Duration::from_secs(86_400)),
        revoked_at: revoked.then_some(now),
    }
}

fn ports(knobs: &Arc<Knobs>, contents: StoreContents, vm: Vm, power: ObservedPower) -> Ports {
    Ports {
        hypervisor: Arc::new(FakeHypervisor {
            knobs: Arc::clone(knobs),
            vm,
            power: Mutex::new(power),
        }),
        storage: Arc::new(storage(knobs)),
        images: Arc::new(cache(knobs)),
        image_cache_size: ByteSize::from_gib(10),
        catalogue: Arc::new(catalogue()),
        networks: Arc::new(networks()),
        host: Arc::new(FakeHost(Arc::clone(knobs))),
        store: Arc::new(store(contents)),
        authority: Arc::new(authority()),
        guests: Arc::new(FakeLinks(Arc::clone(&knobs.guest))),
        audit: Arc::new(FakeAudit(Arc::clone(&knobs.guest))),
        clock: Arc::new(RealClock(Instant::now())),
    }
}

struct RealClock(Instant);

impl Clock for RealClock {
    fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(self.0.elapsed())
    }
}

fn store(contents: StoreContents) -> MockStateStore {
    let mut store = MockStateStore::new();
    store.expect_load().returning(move || Ok(contents.clone()));
    store.expect_commit().returning(|_| Ok(()));
    store.expect_health().returning(|| StoreHealth {
        engine: "mock".into(),
        writable: true,
        ..StoreHealth::default()
    });
    store.expect_damage_resolved().returning(|| Ok(()));
    store.expect_export().returning(|| Ok(()));
    store.expect_close().returning(|| Ok(()));
    store
}

fn authority() -> MockCertificateAuthority {
    let mut authority = MockCertificateAuthority::new();
    authority.expect_fingerprint().returning(|| "ab".repeat(32));
    authority
        .expect_sign_client()
        .returning(|request, _, _, _| {
            if request.is_empty() {
                return Err(Error::new(ErrorCode::InvalidArgument, "no request"));
            }
            Ok(IssuedCertificate {
                certificate_pem: "leaf".into(),
                authority_pem: "ca".into(),
                expires_at: Timestamp::from(SystemTime::now()).after(Duration::from_secs(86_400)),
            })
        });
    authority
}

fn networks() -> MockNetworkProvider {
    let network = || Network {
        name: NetworkName::new("default").unwrap(),
        libvirt_name: "ghost-default".into(),
        mode: "nat".into(),
        bridge: Some("ghostbr0".into()),
        subnet: Some("10.113.0.0/24".into()),
        dhcp_range: None,
        active: true,
    };
    let mut networks = MockNetworkProvider::new();
    networks
        .expect_list()
        .returning(move || Ok(vec![network()]));
    networks.expect_ensure().returning(move |_| Ok(network()));
    networks.expect_leases().returning(|_| Ok(Vec::new()));
    networks
}

fn catalogue() -> MockImageCatalogue {
    let entry = || CatalogueEntry {
        name: ImageName::new("debian-12").unwrap(),
        aliases: vec![ImageName::new("debian").unwrap()],
        description: "Debian 12".into(),
        url: "https://images.example/debian.qcow2".into(),
        checksum: ChecksumSource::Url {
            url: "https://images.example/SHA512SUMS".into(),
            algorithm: ChecksumAlgorithm::Sha512,
        },
    };
    let mut catalogue = MockImageCatalogue::new();
    catalogue.expect_entries().returning(move || vec![entry()]);
    catalogue
        .expect_find()
        .returning(move |name| (entry().name == *name).then(entry));
    catalogue
}

fn cache(knobs: &Arc<Knobs>) -> MockImageCache {
    let failed = || Error::new(ErrorCode::DownloadFailed, "there is no network here");
    let mut cache = MockImageCache::new();
    cache.expect_sweep().returning(|_| Ok(()));
    cache.expect_list().returning(|| Ok(Vec::new()));
    cache.expect_get().returning(|_| Ok(None));
    cache.expect_remove().returning(|_| Ok(()));
    cache.expect_pull().returning(move |_, _| Err(failed()));
    cache.expect_adopt().returning(move |_, _| Err(failed()));
    cache
        .expect_stage()
        .returning(|| Ok(PathBuf::from("staged")));
    let uploaded = Arc::clone(knobs);
    cache.expect_append().returning(move |_, data| {
        uploaded.uploaded.fetch_add(data.len(), Ordering::SeqCst);
        Ok(())
    });
    let discarded = Arc::clone(knobs);
    cache.expect_discard().returning(move |_| {
        discarded.discarded.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    cache
}

fn storage(knobs: &Arc<Knobs>) -> MockVmStorage {
    let mut storage = MockVmStorage::new();
    let path = |name: &'static str| move |_: VmId| Path::new("/nonexistent").join(name);
    storage.expect_disk_path().returning(path("disk"));
    storage.expect_seed_path().returning(path("seed"));
    storage
        .expect_console_socket_path()
        .returning(path("console"));
    storage.expect_guest_socket_path().returning(path("guest"));
    storage.expect_console_log_path().returning(path("log"));
    storage.expect_create_folder().returning(|_| Ok(()));
    storage.expect_create_disk().returning(|_, _, _, _| Ok(()));
    storage.expect_validate_seed().returning(|_| Ok(()));
    storage.expect_write_seed().returning(|_| Ok(()));
    storage.expect_remove().returning(|_| Ok(()));
    storage.expect_list().returning(|| Ok(Vec::new()));
    storage
        .expect_usage()
        .returning(|_| Ok(Some(VmStorageUsage::default())));
    let typed = Arc::clone(knobs);
    storage.expect_open_console().returning(move |_| {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        Ok(ConsoleSession {
            reader: Box::new(Echo(receiver)),
            writer: Box::new(Typed(Arc::clone(&typed), sender)),
        })
    });
    storage
        .expect_open_log()
        .returning(|_, _| Ok(Box::new(Log(vec![b"booted\n".to_vec()]))));
    storage
}

/// A console that prints what is typed; `q` ends it.
struct Echo(tokio::sync::mpsc::UnboundedReceiver<Vec<u8>>);
struct Typed(Arc<Knobs>, tokio::sync::mpsc::UnboundedSender<Vec<u8>>);

#[async_trait]
impl ConsoleReader for Echo {
    async fn read(&mut self) -> Result<Vec<u8>> {
        let data = self.0.recv().await.unwrap_or_default();
        Ok(if data == b"q" { Vec::new() } else { data })
    }
}

#[async_trait]
impl ConsoleWriter for Typed {
    async fn write(&mut self, data: &[u8]) -> Result<()> {
        self.0.typed.lock().unwrap().extend_from_slice(data);
        self.1
            .send(data.to_vec())
            .map_err(|_| Error::new(ErrorCode::IoFailed, "detached"))
    }
}

struct Log(Vec<Vec<u8>>);

#[async_trait]
impl LogReader for Log {
    async fn read(&mut self) -> Result<Vec<u8>> {
        Ok(self.0.pop().unwrap_or_default())
    }
}

struct FakeHost(Arc<Knobs>);

impl FakeHost {
    async fn behave(&self) -> Result<()> {
        match self.0.host.load(Ordering::SeqCst) {
            BROKEN => Err(Error::new(ErrorCode::IoFailed, "/proc is gone")),
            HUNG => std::future::pending().await,
            PANICS => panic!("a fault on purpose"),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl HostProbe for FakeHost {
    async fn facts(&self) -> Result<HostFacts> {
        self.behave().await?;
        Ok(HostFacts {
            hostname: "testhost".into(),
            boot_id: "1".into(),
            ..HostFacts::default()
        })
    }

    async fn resources(&self) -> Result<HostResources> {
        self.behave().await?;
        Ok(HostResources {
            cpus: 4,
            memory: ByteSize::from_gib(8),
            disk: ByteSize::from_gib(100),
            disk_free: ByteSize::from_gib(80),
        })
    }

    async fn usage(&self) -> Result<HostUsage> {
        self.behave().await?;
        Ok(HostUsage {
            cpu_busy_seconds: 12.5,
            ..HostUsage::default()
        })
    }
}

struct FakeHypervisor {
    knobs: Arc<Knobs>,
    vm: Vm,
    power: Mutex<ObservedPower>,
}

impl FakeHypervisor {
    async fn behave(&self) -> Result<()> {
        match self.knobs.hypervisor.load(Ordering::SeqCst) {
            BROKEN => Err(Error::new(
                ErrorCode::HypervisorUnavailable,
                "libvirt is away",
            )),
            HUNG => std::future::pending().await,
            _ => Ok(()),
        }
    }

    async fn become_now(&self, power: ObservedPower) -> Result<()> {
        self.behave().await?;
        *self.power.lock().unwrap() = power;
        Ok(())
    }

    fn snapshot(&self) -> DomainSnapshot {
        DomainSnapshot {
            id: self.vm.id,
            name: self.vm.name.to_string(),
            observation: Observation {
                power: *self.power.lock().unwrap(),
                reason: String::new(),
                source: ObservationSource::LibvirtSync,
                since: Timestamp::default(),
            },
            record: Some(self.vm.clone()),
            drift: Vec::new(),
        }
    }
}

struct NoEvents;

#[async_trait]
impl HypervisorEvents for NoEvents {
    async fn next(&mut self) -> Option<HypervisorEvent> {
        std::future::pending().await
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    async fn info(&self) -> Result<HypervisorInfo> {
        self.behave().await?;
        Ok(HypervisorInfo {
            uri: "test:///default".into(),
            libvirt_version: "11.3.0".into(),
            hypervisor_version: "10.0.2".into(),
            accelerator: Accelerator::Tcg,
            accelerator_reason: "a test".into(),
        })
    }

    fn subscribe(&self) -> Box<dyn HypervisorEvents> {
        Box::new(NoEvents)
    }

    async fn define(&self, _: &DomainDefinition) -> Result<()> {
        self.behave().await
    }

    async fn undefine(&self, _: VmId) -> Result<()> {
        self.behave().await
    }

    async fn set_guest_access(&self, _: VmId, _: bool) -> Result<()> {
        self.behave().await
    }

    async fn start(&self, _: VmId) -> Result<()> {
        self.become_now(ObservedPower::Running).await
    }

    async fn shut_down(&self, _: VmId) -> Result<()> {
        self.become_now(ObservedPower::Off).await
    }

    async fn power_off(&self, _: VmId) -> Result<()> {
        self.become_now(ObservedPower::Off).await
    }

    async fn pause(&self, _: VmId) -> Result<()> {
        self.become_now(ObservedPower::Paused).await
    }

    async fn resume(&self, _: VmId) -> Result<()> {
        self.become_now(ObservedPower::Running).await
    }

    async fn get(&self, vm: VmId) -> Result<Option<DomainSnapshot>> {
        self.behave().await?;
        Ok((vm == self.vm.id).then(|| self.snapshot()))
    }

    async fn list(&self) -> Result<Vec<DomainSnapshot>> {
        self.behave().await?;
        Ok(vec![self.snapshot()])
    }

    async fn statistics(&self) -> Result<Vec<DomainStatistics>> {
        self.knobs.statistics_calls.fetch_add(1, Ordering::SeqCst);
        self.behave().await?;
        Ok(vec![DomainStatistics {
            id: Some(self.vm.id),
            cpu_time_nanoseconds: 1_500_000_000,
            memory_bytes: 1,
            memory_resident_bytes: 2,
            block_read_bytes: 3,
            block_write_bytes: 4,
            network_receive_bytes: 5,
            network_transmit_bytes: 6,
        }])
    }
}

/// A key that was never made, in the right form.
pub(crate) fn unknown_key() -> Secret {
    Secret::new(format!(
        "ghost_{}_{}",
        CredentialId::random(),
        "0".repeat(64)
    ))
}
