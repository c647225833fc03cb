//! Puts the application together: loads the state, starts engine and supervision, hands out the
//! use cases, and drains at the end.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::CorePermissions;
use ghost_domain::guest::GuestInject;
use ghost_domain::ports::{
    AuditLog, CertificateAuthority, Clock, GuestLinks, HostProbe, Hypervisor, ImageCache,
    ImageCatalogue, NetworkProvider, StateStore, VmStorage,
};
use ghost_domain::{ByteSize, EventKind, OperationKind, Overcommit, Reserved, Result};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fleet::{self, Fleet, LinkPlace};
use crate::guest::{Door, GuestOptions};
use crate::operations::{Engine, Failpoints};
use crate::registry::{Model, Registry};
use crate::supervise::Supervisor;
use crate::{access, event, guest, host, image, network, operation, vm};

/// Everything outside that the application needs.
#[derive(Clone)]
pub struct Ports {
    /// Runs VMs.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Keeps VMs' files.
    pub storage: Arc<dyn VmStorage>,
    /// Keeps images.
    pub images: Arc<dyn ImageCache>,
    /// The most that the image cache may hold before the least recently used are evicted.
    pub image_cache_size: ByteSize,
    /// Knows official images.
    pub catalogue: Arc<dyn ImageCatalogue>,
    /// Makes networks.
    pub networks: Arc<dyn NetworkProvider>,
    /// Reads the host.
    pub host: Arc<dyn HostProbe>,
    /// Keeps state.
    pub store: Arc<dyn StateStore>,
    /// Signs certificates.
    pub authority: Arc<dyn CertificateAuthority>,
    /// Reaches the agents in VMs.
    pub guests: Arc<dyn GuestLinks>,
    /// Keeps what was done in guests.
    pub audit: Arc<dyn AuditLog>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
}

/// What the owner of the host decided.
#[derive(Clone, Default)]
pub struct Options {
    /// What stays the owner's.
    pub reserved: Reserved,
    /// How often a resource may be promised.
    pub overcommit: Overcommit,
    /// See [`GuestOptions`].
    pub guest: GuestOptions,
    /// What Ghost Core's principals may do.
    pub core_permissions: CorePermissions,
    /// Breaks operations on purpose, in tests.
    pub failpoints: Option<Failpoints>,
}

/// Every use case, for the shells.
pub struct UseCases {
    /// See [`vm::CreateVm`].
    pub create_vm: vm::CreateVm,
    /// See [`vm::GetVm`].
    pub get_vm: vm::GetVm,
    /// See [`vm::ListVms`].
    pub list_vms: vm::ListVms,
    /// See [`vm::WatchVm`].
    pub watch_vm: vm::WatchVm,
    /// See [`vm::UpdateVm`].
    pub update_vm: vm::UpdateVm,
    /// See [`vm::DeleteVm`].
    pub delete_vm: vm::DeleteVm,
    /// See [`vm::StartVm`].
    pub start_vm: vm::StartVm,
    /// See [`vm::StopVm`].
    pub stop_vm: vm::StopVm,
    /// See [`vm::RestartVm`].
    pub restart_vm: vm::RestartVm,
    /// See [`vm::PauseVm`].
    pub pause_vm: vm::PauseVm,
    /// See [`vm::ResumeVm`].
    pub resume_vm: vm::ResumeVm,
    /// See [`vm::OpenConsole`].
    pub open_console: vm::OpenConsole,
    /// See [`vm::OpenLog`].
    pub open_log: vm::OpenLog,
    /// See [`image::ListImages`].
    pub list_images: image::ListImages,
    /// See [`image::GetImage`].
    pub get_image: image::GetImage,
    /// See [`image::ListCatalogue`].
    pub list_catalogue: image::ListCatalogue,
    /// See [`image::PullImage`].
    pub pull_image: image::PullImage,
    /// See [`image::ImportImage`].
    pub import_image: image::ImportImage,
    /// See [`image::DeleteImage`].
    pub delete_image: image::DeleteImage,
    /// See [`operation::GetOperation`].
    pub get_operation: operation::GetOperation,
    /// See [`operation::ListOperations`].
    pub list_operations: operation::ListOperations,
    /// See [`operation::WatchOperation`].
    pub watch_operation: operation::WatchOperation,
    /// See [`operation::CancelOperation`].
    pub cancel_operation: operation::CancelOperation,
    /// See [`network::ListNetworks`].
    pub list_networks: network::ListNetworks,
    /// See [`network::GetNetwork`].
    pub get_network: network::GetNetwork,
    /// See [`host::GetStatus`].
    pub get_status: host::GetStatus,
    /// See [`host::CheckHealth`].
    pub check_health: host::CheckHealth,
    /// See [`host::CollectMetrics`].
    pub collect_metrics: host::CollectMetrics,
    /// See [`event::WatchEvents`].
    pub watch_events: event::WatchEvents,
    /// See [`access::CreateToken`].
    pub create_token: access::CreateToken,
    /// See [`access::Enroll`].
    pub enroll: access::Enroll,
    /// See [`access::Renew`].
    pub renew: access::Renew,
    /// See [`access::ListCertificates`].
    pub list_certificates: access::ListCertificates,
    /// See [`access::RevokeCertificate`].
    pub revoke_certificate: access::RevokeCertificate,
    /// See [`access::AuthenticateCertificate`].
    pub authenticate_certificate: access::AuthenticateCertificate,
    /// See [`access::CreateKey`].
    pub create_key: access::CreateKey,
    /// See [`access::ListKeys`].
    pub list_keys: access::ListKeys,
    /// See [`access::RevokeKey`].
    pub revoke_key: access::RevokeKey,
    /// See [`access::AuthenticateKey`].
    pub authenticate_key: access::AuthenticateKey,
    /// See [`guest::GetGuestStatus`].
    pub get_guest_status: guest::GetGuestStatus,
    /// See [`guest::PingGuest`].
    pub ping_guest: guest::PingGuest,
    /// See [`guest::ExecInGuest`].
    pub exec_in_guest: guest::ExecInGuest,
    /// See [`guest::StatGuestFile`].
    pub stat_guest_file: guest::StatGuestFile,
    /// See [`guest::ListGuestFiles`].
    pub list_guest_files: guest::ListGuestFiles,
    /// See [`guest::MakeGuestDirectory`].
    pub make_guest_directory: guest::MakeGuestDirectory,
    /// See [`guest::MakeGuestLink`].
    pub make_guest_link: guest::MakeGuestLink,
    /// See [`guest::ReadGuestFile`].
    pub read_guest_file: guest::ReadGuestFile,
    /// See [`guest::WriteGuestFile`].
    pub write_guest_file: guest::WriteGuestFile,
    /// See [`guest::ShutdownGuest`].
    pub shutdown_guest: guest::ShutdownGuest,
    /// See [`guest::SetGuestPassword`].
    pub set_guest_password: guest::SetGuestPassword,
    /// See [`guest::UpdateGuestSshKeys`].
    pub update_guest_ssh_keys: guest::UpdateGuestSshKeys,
    /// See [`guest::SyncGuestClock`].
    pub sync_guest_clock: guest::SyncGuestClock,
    /// See [`guest::FreezeGuest`].
    pub freeze_guest: guest::FreezeGuest,
    /// See [`guest::ThawGuest`].
    pub thaw_guest: guest::ThawGuest,
    /// See [`guest::UpdateGuest`].
    pub update_guest: guest::UpdateGuest,
    /// See [`guest::GetGuestHistory`].
    pub get_guest_history: guest::GetGuestHistory,
    /// See [`guest::WatchTelemetry`].
    pub watch_telemetry: guest::WatchTelemetry,
    /// See [`guest::SetGuestAccess`].
    pub set_guest_access: guest::SetGuestAccess,
    /// See [`guest::RegisterGuestAddress`].
    pub register_guest_address: guest::RegisterGuestAddress,
    /// See [`guest::SetLockdown`].
    pub set_lockdown: guest::SetLockdown,
    /// See [`guest::GetLockdown`].
    pub get_lockdown: guest::GetLockdown,
    /// See [`guest::ListAudit`].
    pub list_audit: guest::ListAudit,
    /// See [`guest::VerifyAudit`].
    pub verify_audit: guest::VerifyAudit,
    /// See [`fleet::AdmitCore`].
    pub admit_core: fleet::AdmitCore,
    /// See [`fleet::GetCoreLink`].
    pub get_core_link: fleet::GetCoreLink,
    /// See [`fleet::ReconnectCore`].
    pub reconnect_core: fleet::ReconnectCore,
    /// See [`fleet::AllowCoreDeletes`].
    pub allow_core_deletes: fleet::AllowCoreDeletes,
}

/// How long the first look at libvirt is waited for.
const FIRST_LOOK: Duration = Duration::from_secs(2);

/// The running application.
pub struct Application {
    use_cases: Arc<UseCases>,
    fleet: Arc<Fleet>,
    engine: Arc<Engine>,
    door: Arc<Door>,
    store: Arc<dyn StateStore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Application {
    /// Loads the state and starts engine and supervision. libvirt need not be there: states are
    /// `unknown` until it is, and operations of an earlier run are taken up once it was looked at.
    ///
    /// # Errors
    /// `StoreUnavailable` where the state cannot be read at all.
    pub async fn start(ports: Ports, options: Options) -> Result<Self> {
        let started = ports.clock.monotonic();
        let contents = ports.store.load().await?;
        let damage = contents.damage.clone();
        let staged: Vec<_> = contents
            .operations
            .iter()
            .filter(|operation| !operation.status.is_finished())
            .filter_map(|operation| match &operation.kind {
                OperationKind::ImportImage { staged, .. } => Some(staged.clone()),
                _ => None,
            })
            .collect();
        let mut model = Model::new(contents, started, options.reserved, options.overcommit);
        model.core_permissions = options.core_permissions;
        let registry = Registry::new(model, Arc::clone(&ports.store), Arc::clone(&ports.clock));
        if let Some(detail) = damage {
            tracing::error!(detail, "the state store was damaged");
            registry.report(|model| {
                model
                    .warnings
                    .push(format!("the state store was damaged and rebuilt: {detail}"))
            });
            registry.tell(EventKind::StateRebuilt { detail }, None, "state");
        }
        if let Err(error) = ports.images.sweep(&staged).await {
            tracing::warn!(%error, "cannot sweep the staging folder");
        }
        let engine = Engine::new(Arc::clone(&registry), ports.clone(), options.failpoints);
        // Before anything is attached: a lockdown outlives the agent.
        let locked = registry.read(|model| model.lockdown.is_some());
        if locked {
            ports.guests.lock_down(true);
        }
        let door = Arc::new(Door {
            registry: Arc::clone(&registry),
            ports: ports.clone(),
            access: options.guest.access,
            tasks: TaskTracker::new(),
            denials: Default::default(),
            consoles: TaskTracker::new(),
        });
        let stop = CancellationToken::new();
        let supervisor = Supervisor {
            registry: Arc::clone(&registry),
            ports: ports.clone(),
            engine: Arc::clone(&engine),
            door: Arc::clone(&door),
            guest: options.guest.clone(),
            stop: stop.clone(),
        };
        let place = LinkPlace::default();
        let use_cases = Arc::new(use_cases(
            &registry,
            &engine,
            &door,
            &ports,
            (options.guest.inject, started),
            &place,
        ));
        let fleet = Fleet::new(
            Arc::clone(&registry),
            ports.clone(),
            Arc::clone(&use_cases),
            place,
        );
        fleet.reconcile().await;
        let tasks = TaskTracker::new();
        tasks.spawn({
            let (fleet, stop) = (Arc::clone(&fleet), stop.clone());
            async move { stop.run_until_cancelled(fleet.supervise()).await }
        });
        supervisor.spawn(&tasks, &stop);
        // Whoever calls at once should not meet states that are unknown for half a second more.
        // Where libvirt is away the agent serves without it.
        let looked = registry.wait_for(|model| model.link.connected.then_some(()));
        if tokio::time::timeout(FIRST_LOOK, looked).await.is_err() {
            tracing::warn!("libvirt does not answer yet; states are unknown until it does");
        }
        Ok(Self {
            use_cases,
            fleet,
            engine,
            door,
            store: Arc::clone(&ports.store),
            tasks,
            stop,
        })
    }

    /// The use cases, for the shells.
    pub fn use_cases(&self) -> Arc<UseCases> {
        Arc::clone(&self.use_cases)
    }

    /// This host's side of the link to Ghost Core.
    pub fn fleet(&self) -> Arc<Fleet> {
        Arc::clone(&self.fleet)
    }

    /// Refuses new work, lets short steps finish within `patience`, leaves long ones journalled,
    /// and closes the store. VMs are not touched.
    ///
    /// # Errors
    /// `StoreUnavailable` where the last state could not be flushed.
    pub async fn drain(&self, patience: Duration) -> Result<()> {
        self.engine.drain(patience).await;
        self.leave_guests().await;
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(Duration::from_secs(5), self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("supervision did not end in time");
        }
        self.store.close().await
    }

    /// Ends what still goes on in guests, so that the audit log has its end too.
    async fn leave_guests(&self) {
        let ids: Vec<_> = self
            .door
            .registry
            .read(|model| model.vms.keys().copied().collect());
        for id in ids {
            self.door
                .ports
                .guests
                .cut(id, "the agent on the host is shutting down");
        }
        self.stop.cancel();
        self.door.tasks.close();
        let written = tokio::time::timeout(Duration::from_secs(3), self.door.tasks.wait());
        if written.await.is_err() {
            tracing::warn!(
                "calls into guests did not end in time; their ends are not in the audit log"
            );
        }
    }
}

fn use_cases(
    registry: &Arc<Registry>,
    engine: &Arc<Engine>,
    door: &Arc<Door>,
    ports: &Ports,
    (inject, started): (GuestInject, ghost_domain::Monotonic),
    place: &LinkPlace,
) -> UseCases {
    let registry = || Arc::clone(registry);
    let engine = || Arc::clone(engine);
    let door = || Arc::clone(door);
    let ports = || ports.clone();
    UseCases {
        create_vm: vm::CreateVm {
            engine: engine(),
            registry: registry(),
            ports: ports(),
            inject,
        },
        get_vm: vm::GetVm {
            registry: registry(),
            ports: ports(),
        },
        list_vms: vm::ListVms {
            registry: registry(),
        },
        watch_vm: vm::WatchVm {
            registry: registry(),
        },
        update_vm: vm::UpdateVm {
            engine: engine(),
            registry: registry(),
            access: guest::SetGuestAccess { door: door() },
        },
        delete_vm: vm::DeleteVm {
            engine: engine(),
            registry: registry(),
        },
        start_vm: vm::StartVm {
            engine: engine(),
            registry: registry(),
            ports: ports(),
        },
        stop_vm: vm::StopVm {
            engine: engine(),
            registry: registry(),
        },
        restart_vm: vm::RestartVm {
            engine: engine(),
            registry: registry(),
        },
        pause_vm: vm::PauseVm {
            engine: engine(),
            registry: registry(),
        },
        resume_vm: vm::ResumeVm {
            engine: engine(),
            registry: registry(),
        },
        open_console: vm::OpenConsole { door: door() },
        open_log: vm::OpenLog {
            registry: registry(),
            ports: ports(),
        },
        list_images: image::ListImages {
            registry: registry(),
        },
        get_image: image::GetImage {
            registry: registry(),
        },
        list_catalogue: image::ListCatalogue {
            registry: registry(),
            ports: ports(),
        },
        pull_image: image::PullImage {
            engine: engine(),
            ports: ports(),
        },
        import_image: image::ImportImage {
            engine: engine(),
            registry: registry(),
            ports: ports(),
        },
        delete_image: image::DeleteImage { engine: engine() },
        get_operation: operation::GetOperation {
            registry: registry(),
        },
        list_operations: operation::ListOperations {
            registry: registry(),
        },
        watch_operation: operation::WatchOperation {
            registry: registry(),
        },
        cancel_operation: operation::CancelOperation {
            engine: engine(),
            registry: registry(),
        },
        list_networks: network::ListNetworks {
            registry: registry(),
            ports: ports(),
        },
        get_network: network::GetNetwork {
            list: network::ListNetworks {
                registry: registry(),
                ports: ports(),
            },
        },
        get_status: host::GetStatus {
            registry: registry(),
            ports: ports(),
            started,
            core: Arc::clone(place),
        },
        check_health: host::CheckHealth {
            registry: registry(),
            ports: ports(),
        },
        collect_metrics: host::CollectMetrics {
            registry: registry(),
            ports: ports(),
            core: Arc::clone(place),
        },
        watch_events: event::WatchEvents {
            registry: registry(),
        },
        create_token: access::CreateToken {
            registry: registry(),
            ports: ports(),
        },
        enroll: access::Enroll {
            registry: registry(),
            ports: ports(),
        },
        renew: access::Renew {
            registry: registry(),
            ports: ports(),
        },
        list_certificates: access::ListCertificates {
            registry: registry(),
        },
        revoke_certificate: access::RevokeCertificate {
            registry: registry(),
        },
        authenticate_certificate: access::AuthenticateCertificate {
            registry: registry(),
        },
        create_key: access::CreateKey {
            registry: registry(),
        },
        list_keys: access::ListKeys {
            registry: registry(),
        },
        revoke_key: access::RevokeKey {
            registry: registry(),
        },
        authenticate_key: access::AuthenticateKey {
            registry: registry(),
        },
        get_guest_status: guest::GetGuestStatus { door: door() },
        ping_guest: guest::PingGuest { door: door() },
        exec_in_guest: guest::ExecInGuest { door: door() },
        stat_guest_file: guest::StatGuestFile { door: door() },
        list_guest_files: guest::ListGuestFiles { door: door() },
        make_guest_directory: guest::MakeGuestDirectory { door: door() },
        make_guest_link: guest::MakeGuestLink { door: door() },
        read_guest_file: guest::ReadGuestFile { door: door() },
        write_guest_file: guest::WriteGuestFile { door: door() },
        shutdown_guest: guest::ShutdownGuest { door: door() },
        set_guest_password: guest::SetGuestPassword { door: door() },
        update_guest_ssh_keys: guest::UpdateGuestSshKeys { door: door() },
        sync_guest_clock: guest::SyncGuestClock { door: door() },
        freeze_guest: guest::FreezeGuest { door: door() },
        thaw_guest: guest::ThawGuest { door: door() },
        update_guest: guest::UpdateGuest { door: door() },
        get_guest_history: guest::GetGuestHistory {
            registry: registry(),
        },
        watch_telemetry: guest::WatchTelemetry {
            registry: registry(),
        },
        set_guest_access: guest::SetGuestAccess { door: door() },
        register_guest_address: guest::RegisterGuestAddress { door: door() },
        set_lockdown: guest::SetLockdown { door: door() },
        get_lockdown: guest::GetLockdown {
            registry: registry(),
        },
        list_audit: guest::ListAudit {
            registry: registry(),
            ports: ports(),
        },
        verify_audit: guest::VerifyAudit { ports: ports() },
        admit_core: fleet::AdmitCore {
            registry: registry(),
        },
        get_core_link: fleet::GetCoreLink {
            registry: registry(),
            place: Arc::clone(place),
        },
        reconnect_core: fleet::ReconnectCore {
            place: Arc::clone(place),
        },
        allow_core_deletes: fleet::AllowCoreDeletes {
            registry: registry(),
        },
    }
}
