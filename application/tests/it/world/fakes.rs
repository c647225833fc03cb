//! One fake of every port over the shared survivors. Each effect takes place at once and as a
//! whole, after a turn of the executor, so that operations can be cut off around it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ghost_domain::ports::{
    Accelerator, CachedContent, CertificateAuthority, Change, Clock, ConsoleReader, ConsoleSession,
    ConsoleWriter, DomainDefinition, DomainSnapshot, DomainStatistics, HostFacts, HostProbe,
    HostUsage, Hypervisor, HypervisorEvent, HypervisorEvents, HypervisorInfo, ImageCache,
    ImageCatalogue, ImageSource, IssuedCertificate, LogReader, NetworkProvider, ProgressSink, Seed,
    StateStore, StoreContents, StoreHealth, VmStorage, VmStorageUsage,
};
use ghost_domain::vm::{CloudInit, Observation, ObservationSource, ObservedPower};
use ghost_domain::{
    ByteSize, CatalogueEntry, ChecksumSource, CredentialId, Error, ErrorCode, HostResources,
    ImageDigest, ImageFormat, ImageName, Lease, Monotonic, Network, NetworkName, Progress, Result,
    Role, Timestamp, VmId,
};
use parking_lot::Mutex;

use super::{Dies, Domain, Guest, World};

pub(crate) struct Fake {
    pub(crate) world: World,
}

/// A clock that a test can put forward.
pub(crate) struct FakeClock {
    start: Instant,
    forward: Mutex<Duration>,
}

impl FakeClock {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            forward: Mutex::new(Duration::ZERO),
        }
    }

    pub(crate) fn forward(&self, by: Duration) {
        *self.forward.lock() += by;
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_unix_millis(1_700_000_000_000)
            .after(self.start.elapsed() + *self.forward.lock())
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(self.start.elapsed() + *self.forward.lock())
    }
}

fn unreachable_libvirt() -> Error {
    Error::new(
        ErrorCode::HypervisorUnavailable,
        "libvirt cannot be reached",
    )
}

fn gone(id: VmId) -> Error {
    Error::new(ErrorCode::VmNotFound, format!("no domain {id}"))
}

impl Fake {
    async fn domain<T>(&self, id: VmId, act: impl FnOnce(&mut Domain) -> Result<T>) -> Result<T> {
        tokio::task::yield_now().await;
        let mut world = self.world.survivors.lock();
        if !world.reachable {
            return Err(unreachable_libvirt());
        }
        act(world.domains.get_mut(&id).ok_or_else(|| gone(id))?)
    }

    fn tell(&self, id: VmId, power: ObservedPower, reason: &str, crashed: bool) {
        self.world.tell_power(id, power, reason, crashed);
    }

    fn set(&self, id: VmId, domain: &mut Domain, power: ObservedPower, reason: &str) {
        if domain.power != power {
            domain.power = power;
            domain.reason = reason.to_owned();
            self.tell(id, power, reason, false);
        }
    }
}

fn observation(power: ObservedPower, reason: &str, now: Timestamp) -> Observation {
    Observation {
        power,
        reason: reason.to_owned(),
        source: ObservationSource::LibvirtEvent,
        since: now,
    }
}

impl World {
    pub(crate) fn tell_power(&self, id: VmId, power: ObservedPower, reason: &str, crashed: bool) {
        let event = HypervisorEvent::Power {
            id,
            observation: observation(power, reason, self.clock.now()),
            crashed,
        };
        drop(self.events.send(event));
    }
}

struct Events(tokio::sync::broadcast::Receiver<HypervisorEvent>);

#[async_trait]
impl HypervisorEvents for Events {
    async fn next(&mut self) -> Option<HypervisorEvent> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {
                Some(HypervisorEvent::Connected)
            }
            Err(tokio::sync::broadcast::error::RecvError::Closed) => None,
        }
    }
}

fn snapshot(id: VmId, domain: &Domain, now: Timestamp) -> DomainSnapshot {
    let mut record = domain.record.clone();
    record.cloud_init = CloudInit::default();
    DomainSnapshot {
        id,
        name: record.name.to_string(),
        observation: Observation {
            source: ObservationSource::LibvirtSync,
            ..observation(domain.power, &domain.reason, now)
        },
        record: Some(record),
        drift: domain.drift.clone(),
    }
}

#[async_trait]
impl Hypervisor for Fake {
    async fn info(&self) -> Result<HypervisorInfo> {
        if !self.world.survivors.lock().reachable {
            return Err(unreachable_libvirt());
        }
        Ok(HypervisorInfo {
            uri: "fake:".into(),
            libvirt_version: "1".into(),
            hypervisor_version: "1".into(),
            accelerator: Accelerator::Tcg,
            accelerator_reason: "fake".into(),
        })
    }

    fn subscribe(&self) -> Box<dyn HypervisorEvents> {
        Box::new(Events(self.world.events.subscribe()))
    }

    async fn define(&self, definition: &DomainDefinition) -> Result<()> {
        tokio::task::yield_now().await;
        let mut world = self.world.survivors.lock();
        if !world.reachable {
            return Err(unreachable_libvirt());
        }
        let id = definition.vm.id;
        match world.domains.get_mut(&id) {
            Some(domain) => {
                domain.record = definition.vm.clone();
                domain.drift.clear();
            }
            None => {
                let domain = Domain {
                    record: definition.vm.clone(),
                    power: ObservedPower::Off,
                    reason: String::new(),
                    drift: Vec::new(),
                };
                world.domains.insert(id, domain);
            }
        }
        drop(world);
        drop(self.world.events.send(HypervisorEvent::Defined { id }));
        Ok(())
    }

    async fn undefine(&self, id: VmId) -> Result<()> {
        tokio::task::yield_now().await;
        let mut world = self.world.survivors.lock();
        if !world.reachable {
            return Err(unreachable_libvirt());
        }
        world.domains.remove(&id);
        drop(world);
        drop(self.world.events.send(HypervisorEvent::Undefined { id }));
        Ok(())
    }

    async fn set_guest_access(&self, id: VmId, access: bool) -> Result<()> {
        self.domain(id, |domain| {
            domain.record.spec.guest.access = access;
            Ok(())
        })
        .await?;
        drop(self.world.events.send(HypervisorEvent::Defined { id }));
        Ok(())
    }

    async fn start(&self, id: VmId) -> Result<()> {
        self.domain(id, |domain| {
            self.set(id, domain, ObservedPower::Running, "booted");
            Ok(())
        })
        .await
    }

    async fn shut_down(&self, id: VmId) -> Result<()> {
        let guest = self.world.survivors.lock().guest;
        self.domain(id, |domain| {
            if !domain.power.is_active() {
                return Err(Error::new(ErrorCode::VmNotRunning, "not running"));
            }
            if guest == Guest::Obedient {
                self.set(id, domain, ObservedPower::Off, "shutdown");
            }
            Ok(())
        })
        .await
    }

    async fn power_off(&self, id: VmId) -> Result<()> {
        self.domain(id, |domain| {
            self.set(id, domain, ObservedPower::Off, "destroyed");
            Ok(())
        })
        .await
    }

    async fn pause(&self, id: VmId) -> Result<()> {
        self.domain(id, |domain| {
            self.set(id, domain, ObservedPower::Paused, "user");
            Ok(())
        })
        .await
    }

    async fn resume(&self, id: VmId) -> Result<()> {
        self.domain(id, |domain| {
            self.set(id, domain, ObservedPower::Running, "unpaused");
            Ok(())
        })
        .await
    }

    async fn get(&self, id: VmId) -> Result<Option<DomainSnapshot>> {
        tokio::task::yield_now().await;
        let world = self.world.survivors.lock();
        if !world.reachable {
            return Err(unreachable_libvirt());
        }
        Ok(world
            .domains
            .get(&id)
            .map(|domain| snapshot(id, domain, self.world.clock.now())))
    }

    async fn list(&self) -> Result<Vec<DomainSnapshot>> {
        tokio::task::yield_now().await;
        let world = self.world.survivors.lock();
        if !world.reachable {
            return Err(unreachable_libvirt());
        }
        Ok(world
            .domains
            .iter()
            .map(|(id, domain)| snapshot(*id, domain, self.world.clock.now()))
            .collect())
    }

    async fn statistics(&self) -> Result<Vec<DomainStatistics>> {
        Ok(self.world.survivors.lock().statistics.clone())
    }
}

#[async_trait]
impl VmStorage for Fake {
    fn disk_path(&self, vm: VmId) -> PathBuf {
        format!("/vms/{vm}/disk.qcow2").into()
    }

    fn seed_path(&self, vm: VmId) -> PathBuf {
        format!("/vms/{vm}/seed.img").into()
    }

    fn console_socket_path(&self, vm: VmId) -> PathBuf {
        format!("/vms/{vm}/console.sock").into()
    }

    fn guest_socket_path(&self, vm: VmId) -> PathBuf {
        format!("/vms/{vm}/guest.sock").into()
    }

    fn console_log_path(&self, vm: VmId) -> PathBuf {
        format!("/vms/{vm}/console.log").into()
    }

    async fn create_folder(&self, vm: VmId) -> Result<()> {
        tokio::task::yield_now().await;
        self.world.survivors.lock().folders.insert(vm);
        Ok(())
    }

    async fn create_disk(
        &self,
        vm: VmId,
        _base: &Path,
        _format: ImageFormat,
        _size: ByteSize,
    ) -> Result<()> {
        tokio::task::yield_now().await;
        let mut world = self.world.survivors.lock();
        if world.disk_full {
            return Err(Error::new(ErrorCode::DiskFull, "no space left on device"));
        }
        world.disks.insert(vm);
        Ok(())
    }

    fn validate_seed(&self, cloud_init: &CloudInit) -> Result<()> {
        match &cloud_init.user_data {
            Some(text) if !text.starts_with('#') => Err(Error::new(
                ErrorCode::InvalidUserData,
                "line 1: not user-data",
            )),
            _ => Ok(()),
        }
    }

    async fn write_seed(&self, seed: &Seed) -> Result<()> {
        tokio::task::yield_now().await;
        self.world.survivors.lock().seeds.insert(seed.vm);
        Ok(())
    }

    async fn remove(&self, vm: VmId) -> Result<()> {
        tokio::task::yield_now().await;
        let mut world = self.world.survivors.lock();
        world.folders.remove(&vm);
        world.disks.remove(&vm);
        world.seeds.remove(&vm);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<VmId>> {
        Ok(self
            .world
            .survivors
            .lock()
            .folders
            .iter()
            .copied()
            .collect())
    }

    async fn usage(&self, vm: VmId) -> Result<Option<VmStorageUsage>> {
        Ok(self
            .world
            .survivors
            .lock()
            .disks
            .contains(&vm)
            .then_some(VmStorageUsage {
                disk_virtual: ByteSize::from_mib(256),
                disk_allocated: ByteSize::from_mib(1),
            }))
    }

    async fn open_console(&self, vm: VmId) -> Result<ConsoleSession> {
        let world = self.world.survivors.lock();
        let on = |domain: &Domain| domain.power == ObservedPower::Running;
        if world.domains.get(&vm).is_some_and(on) {
            Ok(ConsoleSession {
                reader: Box::new(QuietConsole),
                writer: Box::new(QuietConsole),
            })
        } else {
            Err(Error::new(ErrorCode::VmNotRunning, "no console"))
        }
    }

    async fn open_log(&self, _vm: VmId, _tail: Option<u64>) -> Result<Box<dyn LogReader>> {
        Err(Error::new(ErrorCode::IoFailed, "no log"))
    }
}

/// Says nothing and takes everything.
struct QuietConsole;

#[async_trait]
impl ConsoleReader for QuietConsole {
    async fn read(&mut self) -> Result<Vec<u8>> {
        std::future::pending().await
    }
}

#[async_trait]
impl ConsoleWriter for QuietConsole {
    async fn write(&mut self, _: &[u8]) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl ImageCache for Fake {
    async fn pull(
        &self,
        source: &ImageSource,
        progress: Arc<dyn ProgressSink>,
    ) -> Result<CachedContent> {
        progress.report(Progress::phase("downloading"));
        self.world.survivors.lock().pulls += 1;
        while self.world.hold_pull.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if source.url.contains("broken") {
            return Err(Error::new(
                ErrorCode::DownloadFailed,
                "the connection broke",
            ));
        }
        let byte = source.url.bytes().fold(0u8, u8::wrapping_add);
        let content = CachedContent {
            digest: ImageDigest::from_bytes([byte; 32]),
            path: format!("/images/{byte}").into(),
            format: ImageFormat::Qcow2,
            virtual_size: ByteSize::from_gib(1),
            file_size: ByteSize::from_mib(60),
            checksum: match &source.checksum {
                ChecksumSource::Inline(checksum) => Some(checksum.clone()),
                ChecksumSource::Url { .. } => None,
            },
        };
        self.world
            .survivors
            .lock()
            .content
            .insert(content.digest, content.clone());
        while self.world.hold_published.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(content)
    }

    async fn stage(&self) -> Result<PathBuf> {
        let name = CredentialId::random().to_string();
        self.world
            .survivors
            .lock()
            .staged
            .insert(name.clone(), Vec::new());
        Ok(name.into())
    }

    async fn append(&self, staged: &Path, data: &[u8]) -> Result<()> {
        let mut world = self.world.survivors.lock();
        world
            .staged
            .get_mut(staged.to_str().unwrap())
            .unwrap()
            .extend_from_slice(data);
        Ok(())
    }

    async fn adopt(
        &self,
        staged: &Path,
        _progress: Arc<dyn ProgressSink>,
    ) -> Result<CachedContent> {
        tokio::task::yield_now().await;
        let data = self
            .world
            .survivors
            .lock()
            .staged
            .remove(staged.to_str().unwrap());
        let Some(data) = data else {
            return Err(Error::new(ErrorCode::IoFailed, "no such staged file"));
        };
        if data.starts_with(b"bad") {
            return Err(Error::new(ErrorCode::UnsafeImage, "it has a backing file"));
        }
        let digest = ImageDigest::from_bytes([data.len() as u8; 32]);
        let content = CachedContent {
            digest,
            path: "/images/imported".into(),
            format: ImageFormat::Raw,
            virtual_size: ByteSize::from_mib(1),
            file_size: ByteSize::from_mib(1),
            checksum: None,
        };
        self.world
            .survivors
            .lock()
            .content
            .insert(digest, content.clone());
        while self.world.hold_published.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(content)
    }

    async fn discard(&self, staged: &Path) -> Result<()> {
        self.world
            .survivors
            .lock()
            .staged
            .remove(staged.to_str().unwrap());
        Ok(())
    }

    async fn get(&self, digest: &ImageDigest) -> Result<Option<CachedContent>> {
        Ok(self.world.survivors.lock().content.get(digest).cloned())
    }

    async fn list(&self) -> Result<Vec<CachedContent>> {
        Ok(self
            .world
            .survivors
            .lock()
            .content
            .values()
            .cloned()
            .collect())
    }

    async fn remove(&self, digest: &ImageDigest) -> Result<()> {
        self.world.survivors.lock().content.remove(digest);
        Ok(())
    }

    async fn sweep(&self, keep: &[PathBuf]) -> Result<()> {
        let mut world = self.world.survivors.lock();
        world
            .staged
            .retain(|name, _| keep.iter().any(|kept| kept.to_str() == Some(name)));
        Ok(())
    }
}

impl ImageCatalogue for Fake {
    fn entries(&self) -> Vec<CatalogueEntry> {
        ["debian", "ubuntu", "broken"]
            .into_iter()
            .map(|name| CatalogueEntry {
                name: ImageName::new(name).unwrap(),
                aliases: Vec::new(),
                description: name.into(),
                url: format!("https://images.test/{name}"),
                checksum: ChecksumSource::Inline(
                    format!("sha256:{}", "ab".repeat(32)).parse().unwrap(),
                ),
            })
            .collect()
    }

    fn find(&self, name: &ImageName) -> Option<CatalogueEntry> {
        self.entries().into_iter().find(|entry| entry.name == *name)
    }
}

#[async_trait]
impl NetworkProvider for Fake {
    async fn ensure(&self, name: &NetworkName) -> Result<Network> {
        if !self.world.survivors.lock().reachable {
            return Err(unreachable_libvirt());
        }
        if name.as_str() != "default" {
            return Err(Error::new(
                ErrorCode::NetworkNotFound,
                format!("no network {name}"),
            ));
        }
        Ok(Network {
            name: name.clone(),
            libvirt_name: "ghost-default".into(),
            mode: "nat".into(),
            bridge: None,
            subnet: Some("10.1.0.0/16".into()),
            dhcp_range: None,
            active: true,
        })
    }

    async fn list(&self) -> Result<Vec<Network>> {
        Ok(vec![self.ensure(&NetworkName::new("default")?).await?])
    }

    async fn leases(&self, _name: &NetworkName) -> Result<Vec<Lease>> {
        let world = self.world.survivors.lock();
        Ok(world
            .leases
            .iter()
            .map(|(mac, address)| Lease {
                mac: *mac,
                address: *address,
                hostname: None,
                expires_at: None,
            })
            .collect())
    }
}

#[async_trait]
impl HostProbe for Fake {
    async fn facts(&self) -> Result<HostFacts> {
        Ok(HostFacts {
            boot_id: self.world.survivors.lock().boot_id.clone(),
            ..HostFacts::default()
        })
    }

    async fn resources(&self) -> Result<HostResources> {
        Ok(self.world.survivors.lock().host)
    }

    async fn usage(&self) -> Result<HostUsage> {
        Ok(HostUsage::default())
    }
}

#[async_trait]
impl CertificateAuthority for Fake {
    async fn sign_client(
        &self,
        request: &str,
        _: CredentialId,
        name: &str,
        role: Role,
    ) -> Result<IssuedCertificate> {
        if request.is_empty() {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "not a certificate request",
            ));
        }
        Ok(IssuedCertificate {
            certificate_pem: format!("{name} {role}"),
            authority_pem: "ca".into(),
            expires_at: self.world.clock.now().after(Duration::from_secs(86_400)),
        })
    }

    fn fingerprint(&self) -> String {
        "f".repeat(64)
    }
}

fn put<T, K: PartialEq>(records: &mut Vec<T>, record: T, key: impl Fn(&T) -> K) {
    records.retain(|old| key(old) != key(&record));
    records.push(record);
}

impl Fake {
    fn apply(&self, changes: Vec<Change>) -> Result<()> {
        let mut world = self.world.survivors.lock();
        if world.store_full {
            return Err(Error::new(
                ErrorCode::StoreUnavailable,
                "no space left on device",
            ));
        }
        world.commits += 1;
        let store = &mut world.store;
        for change in changes {
            match change {
                Change::PutVm(vm) => put(&mut store.vms, *vm, |vm| vm.id),
                Change::DeleteVm(id) => store.vms.retain(|vm| vm.id != id),
                Change::PutOperation(operation) => {
                    put(&mut store.operations, *operation, |operation| operation.id)
                }
                Change::DeleteOperation(id) => {
                    store.operations.retain(|operation| operation.id != id)
                }
                Change::PutImage(image) => {
                    put(&mut store.images, image, |image| image.name.clone())
                }
                Change::DeleteImage(name) => store.images.retain(|image| image.name != name),
                Change::PutCertificate(one) => put(&mut store.certificates, one, |one| one.id),
                Change::DeleteCertificate(id) => store.certificates.retain(|one| one.id != id),
                Change::PutApiKey(one) => put(&mut store.api_keys, one, |one| one.id),
                Change::DeleteApiKey(id) => store.api_keys.retain(|one| one.id != id),
                Change::PutJoinToken(one) => put(&mut store.join_tokens, one, |one| one.id),
                Change::DeleteJoinToken(id) => store.join_tokens.retain(|one| one.id != id),
                Change::PutBootId(boot_id) => store.boot_id = Some(boot_id),
                Change::PutLockdown(lockdown) => store.lockdown = Some(lockdown),
                Change::DeleteLockdown => store.lockdown = None,
                Change::PutFleetLedger(ledger) => store.fleet_ledger = Some(ledger),
                Change::PutDeleteConsent(until) => store.delete_consent = Some(until),
            }
        }
        Ok(())
    }
}

#[async_trait]
impl StateStore for Fake {
    async fn load(&self) -> Result<StoreContents> {
        Ok(self.world.survivors.lock().store.clone())
    }

    async fn commit(&self, changes: Vec<Change>) -> Result<()> {
        tokio::task::yield_now().await;
        let dies = {
            let mut world = self.world.survivors.lock();
            let next = world.commits + 1;
            let dies = world.dies_at.filter(|(at, _)| *at == next);
            world.dead |= dies.is_some();
            dies.map(|(_, when)| when)
        };
        if dies == Some(Dies::Before) {
            std::future::pending::<()>().await;
        }
        self.apply(changes)?;
        if dies == Some(Dies::After) {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn health(&self) -> StoreHealth {
        let full = self.world.survivors.lock().store_full;
        StoreHealth {
            engine: "fake".into(),
            writable: !full,
            ..StoreHealth::default()
        }
    }

    async fn damage_resolved(&self) -> Result<()> {
        self.world.survivors.lock().store.damage = None;
        Ok(())
    }

    async fn export(&self) -> Result<()> {
        tokio::task::yield_now().await;
        let mut world = self.world.survivors.lock();
        if world.store_full {
            return Err(Error::new(
                ErrorCode::StoreUnavailable,
                "no space left on device",
            ));
        }
        if std::mem::take(&mut world.export_fails) {
            return Err(Error::new(ErrorCode::StoreUnavailable, "I/O error"));
        }
        world.exported = Some(world.store.clone());
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        Ok(())
    }
}
