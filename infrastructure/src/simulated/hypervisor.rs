//! The simulated [`Hypervisor`] and its control.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ghost_domain::ports::{
    Accelerator, DomainDefinition, DomainSnapshot, DomainStatistics, Hypervisor, HypervisorEvent,
    HypervisorEvents, HypervisorInfo,
};
use ghost_domain::vm::ObservationSource;
use ghost_domain::{Error, ErrorCode, Result, VmId};
use tokio::sync::{broadcast, oneshot, watch};

use super::SimulatedOptions;
use super::command::{Call, Command};
use super::console::Consoles;
use super::networks::SimulatedNetworks;
use super::world::{Domain, Power, World, now};
use crate::libvirt::events::Subscriber;
use crate::libvirt::pool::{Job, Pool};
use crate::libvirt::xml::{DomainProfile, Element, Parsed, domain_xml};

/// Events that a slow subscriber may fall behind.
const EVENT_BACKLOG: usize = 4096;
/// How often time passes in the simulation.
const TICK: Duration = Duration::from_millis(10);
/// Threads that make calls, and those that may hang.
const WORKERS: usize = 4;
const MAX_ABANDONED: usize = 64;

pub(super) struct Inner {
    pub(super) options: SimulatedOptions,
    world: Mutex<World>,
    /// Wakes what hangs.
    released: Condvar,
    pool: Pool,
    events: broadcast::Sender<HypervisorEvent>,
    /// Why libvirt is out of reach, if it is.
    lost: watch::Sender<Option<String>>,
    consoles: Mutex<Consoles>,
}

/// The simulated hypervisor. Cheap to share through an [`Arc`]; its directory is free again once
/// it and its controls are dropped.
pub struct SimulatedHypervisor {
    inner: Arc<Inner>,
}

/// Tells the simulation what to do, from within its process.
#[derive(Clone)]
pub struct SimulationControl {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for SimulatedHypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SimulatedHypervisor")
            .field(&self.inner.options.directory)
            .finish()
    }
}

impl std::fmt::Debug for SimulationControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SimulationControl")
            .field(&self.inner.options.directory)
            .finish()
    }
}

impl SimulatedHypervisor {
    /// Opens the world in the options' directory, as the last process left it.
    ///
    /// # Errors
    /// `HypervisorUnavailable` when another process uses the directory; `IoFailed`.
    pub fn open(options: SimulatedOptions) -> Result<Self> {
        let no_thread =
            |error| Error::internal("cannot start a thread for the simulation").because(error);
        let mut world = World::open(&options.directory)?;
        world.obey();
        world.news.clear();
        let inner = Arc::new(Inner {
            lost: watch::Sender::new(world.settings.disconnected.clone()),
            pool: Pool::start("ghost-sim", WORKERS, options.call_deadline, MAX_ABANDONED)
                .map_err(no_thread)?,
            events: broadcast::Sender::new(EVENT_BACKLOG),
            released: Condvar::new(),
            consoles: Mutex::default(),
            world: Mutex::new(world),
            options,
        });
        inner.after(&mut inner.lock());
        let passing = Arc::downgrade(&inner);
        thread::Builder::new()
            .name("ghost-sim-time".into())
            .spawn(move || let_time_pass(&passing))
            .map_err(no_thread)?;
        Ok(Self { inner })
    }

    /// The control of this simulation.
    pub fn control(&self) -> SimulationControl {
        SimulationControl {
            inner: Arc::clone(&self.inner),
        }
    }

    /// The networks of this simulation.
    pub fn networks(&self) -> SimulatedNetworks {
        SimulatedNetworks::new(Arc::clone(&self.inner))
    }
}

impl SimulationControl {
    /// Carries out a command; its effect is there when this returns.
    ///
    /// # Errors
    /// `InvalidArgument` or `VmNotFound` when it makes no sense now; `IoFailed`.
    pub fn apply(&self, command: Command) -> Result<()> {
        let mut world = self.inner.lock();
        let outcome = world.apply(command);
        self.inner.after(&mut world);
        outcome
    }

    /// The directory of the simulation.
    pub fn directory(&self) -> &Path {
        &self.inner.options.directory
    }
}

fn let_time_pass(inner: &Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        let mut world = inner.lock();
        world.obey();
        if let Err(error) = world.pass() {
            tracing::error!(%error, "the simulation cannot go on");
        }
        inner.after(&mut world);
        drop(world);
        inner.pool.tend();
        drop(inner);
        thread::sleep(TICK);
    }
}

impl Inner {
    pub(super) fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells what happened, in order, while the world cannot change.
    fn after(&self, world: &mut World) {
        if *self.lost.borrow() != world.settings.disconnected {
            self.lost.send_replace(world.settings.disconnected.clone());
        }
        if self.options.console {
            let mut consoles = self.consoles.lock().unwrap_or_else(PoisonError::into_inner);
            consoles.follow(&world.domains);
        }
        for event in world.news.drain(..) {
            // Nobody may listen; then nobody misses it.
            drop(self.events.send(event));
        }
        self.released.notify_all();
    }

    /// Runs `work` on the world, with whatever faults were scripted.
    pub(super) async fn call<T, F>(
        self: &Arc<Self>,
        call: Call,
        vm: Option<VmId>,
        work: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut World) -> Result<T> + Send + 'static,
    {
        let mut lost = self.lost.subscribe();
        let unavailable = |why: &str| {
            Error::new(
                ErrorCode::HypervisorUnavailable,
                "libvirt cannot be reached",
            )
            .because(why)
            .hint("look at libvirt on the host: ghost-agent doctor")
            .retry_after(Duration::from_secs(5))
        };
        if let Some(why) = lost.borrow_and_update().clone() {
            return Err(unavailable(&why));
        }
        if vm.is_some_and(|vm| self.pool.stuck(vm).is_some()) {
            return Err(unavailable("an earlier call for this VM hangs"));
        }
        let deadline = self.options.call_deadline;
        let (reply, result) = oneshot::channel();
        let reply = Arc::new(Mutex::new(Some(reply)));
        let wanted = Arc::clone(&reply);
        let inner = Arc::clone(self);
        self.pool.give(Job {
            key: vm,
            expires: Instant::now() + deadline,
            wanted: Box::new(move || {
                wanted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .as_ref()
                    .is_some_and(|reply: &oneshot::Sender<Result<T>>| !reply.is_closed())
            }),
            run: Box::new(move || {
                let outcome = inner.carry_out(call, vm, work);
                drop(inner);
                let reply = reply.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(reply) = reply {
                    drop(reply.send(outcome));
                }
            }),
        });
        tokio::select! {
            biased;
            outcome = result => outcome.unwrap_or_else(|_| Err(Error::internal("a simulated call ended without a result"))),
            Ok(why) = lost.wait_for(Option::is_some) => Err(unavailable(why.as_deref().unwrap_or_default())),
            () = tokio::time::sleep(deadline) => Err(unavailable("libvirt did not answer in time; the call may still take effect")),
        }
    }

    fn carry_out<T>(
        &self,
        call: Call,
        vm: Option<VmId>,
        work: impl FnOnce(&mut World) -> Result<T>,
    ) -> Result<T> {
        let mut world = self.lock();
        world.obey();
        let latency = world.settings.latency_milliseconds;
        if latency > 0 {
            drop(world);
            thread::sleep(Duration::from_millis(latency));
            world = self.lock();
        }
        let fault = world.fault(call, vm)?;
        let strike = |code: &str| {
            Err(Error::new(
                ErrorCode::parse(code).unwrap_or(ErrorCode::HypervisorFailed),
                format!("the simulated call {} failed", call.as_str()),
            )
            .because("a test asked for it"))
        };
        let Some(fault) = fault else {
            let outcome = work(&mut world);
            self.after(&mut world);
            return outcome;
        };
        match (&fault.code, fault.after_effect) {
            (Some(code), false) => strike(code),
            (Some(code), true) => {
                let outcome = work(&mut world);
                self.after(&mut world);
                outcome.and_then(|_| strike(code))
            }
            (None, false) => {
                let mut world = self.hang(world);
                let outcome = work(&mut world);
                self.after(&mut world);
                outcome
            }
            (None, true) => {
                let outcome = work(&mut world);
                self.after(&mut world);
                drop(self.hang(world));
                outcome
            }
        }
    }

    /// Waits for a release, as a call to a libvirtd that hangs.
    fn hang<'a>(&'a self, mut world: MutexGuard<'a, World>) -> MutexGuard<'a, World> {
        let before = world.releases;
        // A bound, so that a forgotten hang ends with its test.
        let until = Instant::now() + self.options.call_deadline * 10;
        while world.releases == before && Instant::now() < until {
            world = self
                .released
                .wait_timeout(world, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        world
    }
}

fn off(doing: &str) -> Error {
    Error::new(
        ErrorCode::VmNotRunning,
        format!("cannot {doing}: the VM is off"),
    )
    .hint("start it first: ghostctl vm start NAME")
}

fn taken(name: &str, holder: VmId) -> Error {
    Error::new(
        ErrorCode::NameTaken,
        format!("the name {name} is taken in libvirt"),
    )
    .because(format!("another domain, {holder}, has it"))
    .hint("choose another name; see what there is: virsh list --all")
}

fn snapshot(domain: &Domain, parsed: &Parsed) -> DomainSnapshot {
    DomainSnapshot {
        id: parsed.id,
        name: parsed.name.clone(),
        observation: domain.observation(ObservationSource::LibvirtSync),
        record: parsed.record.clone(),
        drift: parsed.drift.clone(),
    }
}

/// The figures of a domain that is active: they grow with its time.
fn statistics(id: VmId, domain: &Domain, parsed: &Parsed) -> DomainStatistics {
    let ran = u64::try_from(now() - domain.started_milliseconds).unwrap_or(0);
    let (vcpus, memory) = parsed.record.as_ref().map_or((1, 0), |vm| {
        (u64::from(vm.spec.vcpus), vm.spec.memory.bytes())
    });
    DomainStatistics {
        id: Some(id),
        cpu_time_nanoseconds: ran.saturating_mul(100_000).saturating_mul(vcpus),
        memory_bytes: memory,
        memory_resident_bytes: memory / 2,
        block_read_bytes: ran.saturating_mul(4096),
        block_write_bytes: ran.saturating_mul(1024),
        network_receive_bytes: ran.saturating_mul(64),
        network_transmit_bytes: ran.saturating_mul(32),
    }
}

/// The files that a domain's XML attaches.
fn files(domain: &Domain) -> Vec<String> {
    let Ok(root) = Element::parse(&domain.xml) else {
        return Vec::new();
    };
    root.find("devices").map_or_else(Vec::new, |devices| {
        devices
            .all("disk")
            .filter_map(|disk| disk.find("source")?.attribute("file").map(str::to_owned))
            .collect()
    })
}

#[async_trait]
impl Hypervisor for SimulatedHypervisor {
    async fn info(&self) -> Result<HypervisorInfo> {
        let uri = format!("simulated:{}", self.inner.options.directory.display());
        self.inner
            .call(Call::Info, None, move |_| {
                Ok(HypervisorInfo {
                    uri,
                    libvirt_version: "0.0.0".into(),
                    hypervisor_version: "0.0.0".into(),
                    accelerator: Accelerator::Tcg,
                    accelerator_reason: "the hypervisor is simulated, nothing runs".into(),
                })
            })
            .await
    }

    fn subscribe(&self) -> Box<dyn HypervisorEvents> {
        let lost = self.inner.lost.subscribe();
        Box::new(Subscriber::new(
            self.inner.events.subscribe(),
            move || match lost.borrow().clone() {
                Some(reason) => HypervisorEvent::Disconnected { reason },
                None => HypervisorEvent::Connected,
            },
        ))
    }

    async fn define(&self, definition: &DomainDefinition) -> Result<()> {
        let definition = definition.clone();
        let id = definition.vm.id;
        self.inner
            .call(Call::Define, Some(id), move |world| {
                let name = definition.vm.name.as_str();
                if let Some(holder) = world.named(name).filter(|holder| *holder != id) {
                    return Err(taken(name, holder));
                }
                if world.domains.contains_key(&id) && world.ours(id).is_err() {
                    return Err(Error::new(
                        ErrorCode::HypervisorFailed,
                        format!("cannot define {name}"),
                    )
                    .because(format!(
                        "libvirt has a domain with its id {id} that does not carry Ghost's metadata"
                    ))
                    .hint("look at it; Ghost does not touch what is not its own"));
                }
                let xml = domain_xml(&definition, &DomainProfile::test())?.to_xml()?;
                world.define(id, xml)
            })
            .await
    }

    async fn undefine(&self, vm: VmId) -> Result<()> {
        self.inner
            .call(Call::Undefine, Some(vm), move |world| {
                if !world.domains.contains_key(&vm) {
                    return Ok(());
                }
                world.ours(vm)?;
                world.undefine(vm)
            })
            .await
    }

    async fn set_guest_access(&self, vm: VmId, access: bool) -> Result<()> {
        self.inner
            .call(Call::SetGuestAccess, Some(vm), move |world| {
                world.ours(vm)?;
                world.set_guest_access(vm, access)
            })
            .await
    }

    async fn start(&self, vm: VmId) -> Result<()> {
        let check = self.inner.options.check_files;
        self.inner
            .call(Call::Start, Some(vm), move |world| {
                let (domain, _) = world.ours(vm)?;
                if domain.power.is_active() {
                    return Ok(());
                }
                if check
                    && let Some(missing) = files(&domain)
                        .into_iter()
                        .find(|file| !Path::new(file).exists())
                {
                    return Err(
                        Error::new(ErrorCode::HypervisorFailed, "cannot start the VM").because(
                            format!(
                                "Cannot access storage file '{missing}': No such file or directory"
                            ),
                        ),
                    );
                }
                world.power(vm, Power::Running, "booted", false)
            })
            .await
    }

    async fn shut_down(&self, vm: VmId) -> Result<()> {
        self.inner
            .call(Call::ShutDown, Some(vm), move |world| {
                let (domain, _) = world.ours(vm)?;
                if !domain.power.is_active() {
                    return Err(off("shut down"));
                }
                world.press(vm)
            })
            .await
    }

    async fn power_off(&self, vm: VmId) -> Result<()> {
        self.inner
            .call(Call::PowerOff, Some(vm), move |world| {
                let (domain, _) = world.ours(vm)?;
                if !domain.power.is_active() {
                    return Ok(());
                }
                world.power(vm, Power::Off, "destroyed", false)
            })
            .await
    }

    async fn pause(&self, vm: VmId) -> Result<()> {
        self.inner
            .call(Call::Pause, Some(vm), move |world| {
                let (domain, _) = world.ours(vm)?;
                match domain.power {
                    Power::Paused => Ok(()),
                    Power::Running | Power::ShuttingDown => {
                        world.power(vm, Power::Paused, "user", false)
                    }
                    Power::Off | Power::Crashed => Err(off("pause")),
                }
            })
            .await
    }

    async fn resume(&self, vm: VmId) -> Result<()> {
        self.inner
            .call(Call::Resume, Some(vm), move |world| {
                let (domain, _) = world.ours(vm)?;
                match domain.power {
                    Power::Running | Power::ShuttingDown => Ok(()),
                    Power::Paused => world.power(vm, Power::Running, "unpaused", false),
                    Power::Off | Power::Crashed => Err(off("resume")),
                }
            })
            .await
    }

    async fn get(&self, vm: VmId) -> Result<Option<DomainSnapshot>> {
        self.inner
            .call(Call::Get, Some(vm), move |world| {
                Ok(world
                    .ours(vm)
                    .ok()
                    .map(|(domain, parsed)| snapshot(&domain, &parsed)))
            })
            .await
    }

    async fn list(&self) -> Result<Vec<DomainSnapshot>> {
        self.inner
            .call(Call::List, None, |world| {
                Ok(world
                    .domains
                    .values()
                    .filter_map(|domain| Some((domain, domain.parsed.as_ref()?)))
                    .filter(|(_, parsed)| parsed.ours)
                    .map(|(domain, parsed)| snapshot(domain, parsed))
                    .collect())
            })
            .await
    }

    async fn statistics(&self) -> Result<Vec<DomainStatistics>> {
        self.inner
            .call(Call::Statistics, None, |world| {
                Ok(world
                    .domains
                    .iter()
                    .filter(|(_, domain)| domain.power.is_active())
                    .filter_map(|(id, domain)| Some((*id, domain, domain.parsed.as_ref()?)))
                    .filter(|(_, _, parsed)| parsed.ours)
                    .map(|(id, domain, parsed)| statistics(id, domain, parsed))
                    .collect())
            })
            .await
    }
}
