//! The composition root: the only place that knows every layer. Turns the configuration into
//! adapters, adapters into ports, ports into the application.

use std::path::Path;
use std::sync::Arc;

use ghost_application::guest::GuestOptions;
use ghost_application::{Application, Options, Ports};
use ghost_domain::ports::{
    CertificateAuthority, Clock, GuestLinks, Hypervisor, ImageCatalogue, NetworkProvider,
    StateStore,
};
use ghost_domain::{Overcommit, Reserved, Result};
use ghost_infrastructure::audit::{AuditOptions, FileAuditLog};
use ghost_infrastructure::clock::SystemClock;
use ghost_infrastructure::guest_link::{
    GuestLinkOptions, GuestProgram, LinkLimits, VirtioGuestLinks,
};
use ghost_infrastructure::host::LinuxHost;
use ghost_infrastructure::identity::Authority;
use ghost_infrastructure::images::{DirectoryImageCache, FileImageCatalogue, ImageCacheOptions};
use ghost_infrastructure::libvirt::{LibvirtHypervisor, LibvirtOptions};
use ghost_infrastructure::process;
use ghost_infrastructure::simulated::{SimulatedHypervisor, SimulatedOptions};
use ghost_infrastructure::store::{self, Helper, StoreOptions};
use ghost_infrastructure::vm_storage::{DirectoryVmStorage, VmStorageOptions};

use crate::config::{Config, HypervisorUri};

/// The file in the data folder that a running agent holds locked.
pub(crate) const LOCK_FILE: &str = "agent.lock";

/// What the rest of the agent needs of the composition.
pub(crate) struct Composition {
    pub(crate) application: Application,
    pub(crate) authority: Arc<Authority>,
    pub(crate) clock: Arc<dyn Clock>,
    /// To be let go at the end.
    pub(crate) guests: Arc<VirtioGuestLinks>,
}

/// Reads and opens everything that blocks; call it outside async code. libvirt need not be there.
pub(crate) struct Adapters {
    ports: Ports,
    authority: Arc<Authority>,
    guests: Arc<VirtioGuestLinks>,
}

/// Opens the adapters; call it in the runtime on which links to guests shall run.
///
/// # Errors
/// What cannot be opened and why: the data folder, the store, the CA, the catalogue, the audit log.
/// Where the agent for guests lies.
pub(crate) fn guest_program(config: &Config) -> GuestProgram {
    match &config.guest.program {
        Some(path) => GuestProgram::at(path.path()),
        None => GuestProgram::standard(),
    }
}

pub(crate) fn adapters(config: &Config) -> Result<Adapters> {
    let data_dir = config.agent.data_dir.path();
    prepare_data_dir(data_dir)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let store = open_store(config)?;
    let authority = Arc::new(Authority::open(data_dir, Arc::clone(&clock))?);
    // One for seeds and updates: they share what was read of it.
    let program = guest_program(config);
    let storage = Arc::new(DirectoryVmStorage::open(VmStorageOptions {
        guest_program: program.clone(),
        ..VmStorageOptions::new(data_dir)
    })?);
    let images = Arc::new(DirectoryImageCache::open(ImageCacheOptions {
        max_virtual_size: config.images.max_virtual_size,
        max_upload: config.images.max_upload,
        max_download: config.images.max_download,
        ..ImageCacheOptions::new(data_dir)
    })?);
    let catalogue: Arc<dyn ImageCatalogue> = Arc::new(match &config.images.catalogue {
        Some(file) => FileImageCatalogue::with_file(file.path())?,
        None => FileImageCatalogue::built_in()?,
    });
    let host = Arc::new(LinuxHost::new(data_dir));
    let (hypervisor, networks) = hypervisor(config)?;
    let guests = Arc::new(VirtioGuestLinks::new(GuestLinkOptions {
        program,
        telemetry_interval: Some(config.guest.telemetry_interval),
        limits: LinkLimits {
            hold_off: (config.guest.hold_off, config.guest.hold_off_most),
            ..LinkLimits::default()
        },
        ..GuestLinkOptions::new(Arc::clone(&clock))
    }));
    let audit = FileAuditLog::open(AuditOptions::new(data_dir, Arc::clone(&clock)))?;
    let ports = Ports {
        hypervisor,
        storage,
        images,
        image_cache_size: config.images.cache_size,
        catalogue,
        networks,
        host,
        store,
        authority: Arc::clone(&authority) as Arc<dyn CertificateAuthority>,
        guests: Arc::clone(&guests) as Arc<dyn GuestLinks>,
        audit: Arc::new(audit),
        clock,
    };
    Ok(Adapters {
        ports,
        authority,
        guests,
    })
}

impl Adapters {
    /// Starts the application over the adapters.
    ///
    /// # Errors
    /// `StoreUnavailable` where the state cannot be read.
    pub(crate) async fn start(self, config: &Config) -> Result<Composition> {
        let options = Options {
            reserved: Reserved {
                cpus: config.resources.reserved.cpus,
                memory: config.resources.reserved.memory,
                disk: config.resources.reserved.disk,
            },
            overcommit: Overcommit {
                cpu_percent: config.resources.overcommit.cpus.percent(),
                memory_percent: config.resources.overcommit.memory.percent(),
                disk_percent: config.resources.overcommit.disk.percent(),
            },
            guest: GuestOptions {
                inject: config.guest.inject,
                access: config.guest.access,
                update: config.guest.update,
                telemetry_interval: config.guest.telemetry_interval,
                ..GuestOptions::default()
            },
            core_permissions: config.core.permissions.0,
            failpoints: crate::failpoints::from_environment()?,
        };
        let clock = Arc::clone(&self.ports.clock);
        let application = Application::start(self.ports, options).await?;
        Ok(Composition {
            application,
            authority: self.authority,
            clock,
            guests: self.guests,
        })
    }
}

/// libvirt, or the simulation.
fn hypervisor(config: &Config) -> Result<(Arc<dyn Hypervisor>, Arc<dyn NetworkProvider>)> {
    match &config.libvirt.uri {
        HypervisorUri::Simulated(directory) => {
            let simulated = SimulatedHypervisor::open(SimulatedOptions {
                check_files: true,
                console: true,
                call_deadline: config.libvirt.call_timeout,
                ..SimulatedOptions::new(directory)
            })?;
            let networks = simulated.networks();
            Ok((Arc::new(simulated), Arc::new(networks)))
        }
        HypervisorUri::Libvirt(uri) => {
            let libvirt = LibvirtHypervisor::start(libvirt_options(config, uri))?;
            let networks = libvirt.networks();
            Ok((Arc::new(libvirt), Arc::new(networks)))
        }
    }
}

/// How libvirt at `uri` is used.
pub(crate) fn libvirt_options(config: &Config, uri: &str) -> LibvirtOptions {
    LibvirtOptions {
        uri: uri.to_owned(),
        accelerator: config.libvirt.accelerator,
        call_deadline: config.libvirt.call_timeout,
        workers: usize::try_from(config.libvirt.workers).unwrap_or(usize::MAX),
        default_network: config.network.name.0.clone(),
        data_dir: Some(config.agent.data_dir.path().to_owned()),
    }
}

fn open_store(config: &Config) -> Result<Arc<dyn StateStore>> {
    // The helper is this program itself: it opens the files first, so that a panic, a hang or an
    // absurd allocation of the engine ends a process that nobody needs.
    let helper = std::env::current_exe().ok().map(Helper::agent);
    store::open(StoreOptions {
        engine: config.store.engine,
        helper,
        ballast_bytes: config.store.reserve.bytes(),
        ..StoreOptions::new(config.agent.data_dir.path().join("state"))
    })
}

/// The data folder must be traversable by QEMU's user, and writable by nobody but us.
pub(crate) fn prepare_data_dir(path: &Path) -> Result<()> {
    let hint = "make it, or set agent.data_dir; ghost-agent must run as root";
    process::data_folder(path, 0o711, hint)
}
