//! What the hypervisor and the networks share: the link, the workers, the events, and what is
//! known of domains.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Instant, SystemTime};

use ghost_domain::ports::{Accelerator, HypervisorEvent, HypervisorEvents};
use ghost_domain::vm::{Observation, ObservationSource, ObservedPower};
use ghost_domain::{Error, ErrorCode, Result, Timestamp, VmId};
use tokio::sync::{broadcast, oneshot};
use tracing::Instrument as _;
use uuid::Uuid;

use super::events::Subscriber;
use super::ffi::RawEvent;
use super::link::{Link, LinkObserver, LinkState, unavailable};
use super::pool::{Job, Pool};
use super::session::Session;
use super::state::{self, Meaning};
use super::xml::{DomainProfile, Parsed};
use super::{AcceleratorChoice, LibvirtOptions, kvm};

/// Events that a slow subscriber may fall behind before it is told to list anew.
const EVENT_BACKLOG: usize = 4096;
/// Most threads that may hang in libvirt and be replaced.
const MAX_ABANDONED: usize = 8;

/// The heart of the adapter.
pub(super) struct Core {
    pub(super) options: LibvirtOptions,
    pub(super) link: Arc<Link>,
    pool: Pool,
    events: broadcast::Sender<HypervisorEvent>,
    known: Mutex<Known>,
    accelerator: OnceLock<(Accelerator, String)>,
    /// The profile of domains, found once for each connection.
    pub(super) profile: Mutex<Option<(u64, DomainProfile)>>,
}

/// What was learnt of domains, so that lists need no call for each.
#[derive(Default)]
struct Known {
    /// Rises whenever any definition may have changed: what was read before is not stored after.
    epoch: u64,
    parsed: HashMap<VmId, Arc<Parsed>>,
    seen: HashMap<VmId, (ObservedPower, Timestamp)>,
}

impl Core {
    /// Starts the threads. libvirt need not be there.
    pub(super) fn start(mut options: LibvirtOptions) -> Result<Arc<Self>> {
        // The paths in domains are absolute ones.
        if let Some(folder) = options.data_dir.take() {
            options.data_dir = Some(std::path::absolute(&folder).map_err(|error| {
                Error::new(
                    ErrorCode::InvalidArgument,
                    format!("the data folder {} cannot be used", folder.display()),
                )
                .because(error)
            })?);
        }
        if options.uri.contains('\0') {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "the libvirt URI holds a NUL byte",
            ));
        }
        let link = Link::new(options.uri.clone());
        let pool = Pool::start(
            "ghost-lv",
            options.workers,
            options.call_deadline,
            MAX_ABANDONED,
        )
        .map_err(|error| Error::internal("cannot start a thread for libvirt").because(error))?;
        let core = Arc::new(Self {
            options,
            link: Arc::clone(&link),
            pool,
            events: broadcast::Sender::new(EVENT_BACKLOG),
            known: Mutex::default(),
            accelerator: OnceLock::new(),
            profile: Mutex::default(),
        });
        let observer: Weak<dyn LinkObserver> = Arc::downgrade(&core) as Weak<dyn LinkObserver>;
        link.start(observer)?;
        Ok(core)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on a worker with the present connection.
    ///
    /// # Errors
    /// Those of `work`; `HypervisorUnavailable` when libvirt is out of reach, is lost on the way, or
    /// does not answer within the deadline.
    pub(super) async fn call<T, F>(
        self: &Arc<Self>,
        what: &'static str,
        vm: Option<VmId>,
        work: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Session<'_>) -> Result<T> + Send + 'static,
    {
        let span =
            tracing::debug_span!("libvirt", call = what, vm = vm.map(tracing::field::display));
        self.call_in(what, vm, work).instrument(span).await
    }

    async fn call_in<T, F>(
        self: &Arc<Self>,
        what: &'static str,
        vm: Option<VmId>,
        work: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Session<'_>) -> Result<T> + Send + 'static,
    {
        let mut state = self.link.watch();
        let connection = self.link.connection()?;
        let generation = connection.generation;
        if let Some(age) = vm.and_then(|vm| self.pool.stuck(vm)) {
            return Err(unavailable(&format!(
                "an earlier call for this VM has been hanging in libvirt for {} s",
                age.as_secs()
            )));
        }
        let deadline = self.options.call_deadline;
        let (reply, result) = oneshot::channel();
        let reply = Arc::new(Mutex::new(Some(reply)));
        let wanted = Arc::clone(&reply);
        let core = Arc::clone(self);
        let span = tracing::Span::current();
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
                let _entered = span.enter();
                let outcome = work(&Session {
                    core: &core,
                    connection: &connection,
                });
                // What is dropped here is the last use of the connection by this job; where it was
                // the last of all, it is closed here, on a worker.
                drop(connection);
                let reply = reply.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(reply) = reply {
                    // Nobody may wait any more; the effect stands all the same.
                    drop(reply.send(outcome));
                }
            }),
        });
        tokio::select! {
            biased;
            outcome = result => outcome.unwrap_or_else(|_| {
                Err(Error::internal(format!("the libvirt call {what} ended without a result")))
            }),
            _ = state.wait_for(|state| match state {
                LinkState::Down { .. } => true,
                LinkState::Up { generation: now } => *now != generation,
                LinkState::Starting => false,
            }) => Err(unavailable(&format!(
                "the connection was lost during {what}; it may have taken effect"
            ))),
            () = tokio::time::sleep(deadline) => Err(unavailable(&format!(
                "libvirt did not finish {what} within {} s; it may still take effect",
                deadline.as_secs()
            ))),
        }
    }

    /// Subscribes to events.
    pub(super) fn subscribe(self: &Arc<Self>) -> Box<dyn HypervisorEvents> {
        let link = Arc::clone(&self.link);
        Box::new(Subscriber::new(self.events.subscribe(), move || {
            let state = link.watch().borrow().clone();
            match state {
                LinkState::Down { reason } => HypervisorEvent::Disconnected { reason },
                LinkState::Up { .. } | LinkState::Starting => HypervisorEvent::Connected,
            }
        }))
    }

    /// How guests are executed, and why.
    pub(super) fn accelerator(&self) -> &(Accelerator, String) {
        self.accelerator
            .get_or_init(|| match self.options.accelerator {
                AcceleratorChoice::Kvm => (Accelerator::Kvm, "set in the configuration".into()),
                AcceleratorChoice::Tcg => (Accelerator::Tcg, "set in the configuration".into()),
                AcceleratorChoice::Auto => match kvm::prove_kvm() {
                    (true, why) => (Accelerator::Kvm, why),
                    (false, why) => (Accelerator::Tcg, why),
                },
            })
    }

    /// The state of the cache, for [`Self::remember`].
    pub(super) fn epoch(&self) -> u64 {
        self.known().epoch
    }

    /// What is known of a domain.
    pub(super) fn recall(&self, id: VmId) -> Option<Arc<Parsed>> {
        self.known().parsed.get(&id).cloned()
    }

    /// Keeps what was read, unless a definition may have changed since `epoch`.
    pub(super) fn remember(&self, epoch: u64, parsed: &Arc<Parsed>) {
        let mut known = self.known();
        if known.epoch == epoch {
            known.parsed.insert(parsed.id, Arc::clone(parsed));
        }
    }

    /// Forgets a domain's definition.
    pub(super) fn forget(&self, id: VmId) {
        let mut known = self.known();
        known.epoch += 1;
        known.parsed.remove(&id);
    }

    /// Forgets the domains that do not exist any more.
    pub(super) fn keep_only(&self, exists: impl Fn(VmId) -> bool) {
        let mut known = self.known();
        known.parsed.retain(|id, _| exists(*id));
        known.seen.retain(|id, _| exists(*id));
    }

    /// An observation, with the moment since which the power has been so, as far as we saw.
    pub(super) fn observe(
        &self,
        id: VmId,
        (power, reason): state::Power,
        source: ObservationSource,
    ) -> Observation {
        let now = Timestamp::from(SystemTime::now());
        let mut known = self.known();
        let since = match known.seen.get(&id) {
            Some((same, since)) if *same == power && source == ObservationSource::LibvirtSync => {
                *since
            }
            _ => now,
        };
        known.seen.insert(id, (power, since));
        Observation {
            power,
            reason: reason.to_owned(),
            source,
            since,
        }
    }

    fn tell(&self, event: HypervisorEvent) {
        // Nobody may listen; then nobody misses it.
        drop(self.events.send(event));
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.link.stop();
    }
}

impl LinkObserver for Core {
    fn connecting(&self) {
        let mut known = self.known();
        known.epoch += 1;
        known.parsed.clear();
    }

    fn connected(&self) {
        self.tell(HypervisorEvent::Connected);
    }

    fn disconnected(&self, reason: &str) {
        self.tell(HypervisorEvent::Disconnected {
            reason: reason.to_owned(),
        });
    }

    fn domain_event(&self, domain: Uuid, event: RawEvent) {
        let id = VmId::from_uuid(domain);
        let power = |power, crashed| {
            // Of a domain that is known to be somebody else's nothing is told.
            if self.recall(id).is_some_and(|parsed| !parsed.ours) {
                return;
            }
            let observation = self.observe(id, power, ObservationSource::LibvirtEvent);
            self.tell(HypervisorEvent::Power {
                id,
                observation,
                crashed,
            });
        };
        match event {
            RawEvent::Lifecycle { event, detail } => match state::of_event(event, detail) {
                Meaning::Power {
                    power: now,
                    crashed,
                } => power(now, crashed),
                Meaning::Defined => {
                    self.forget(id);
                    self.tell(HypervisorEvent::Defined { id });
                }
                Meaning::Undefined => {
                    self.forget(id);
                    self.tell(HypervisorEvent::Undefined { id });
                }
                Meaning::Nothing => {}
            },
            RawEvent::Reboot => power((ObservedPower::Running, "rebooted"), false),
            RawEvent::IoError {
                device,
                reason,
                paused,
            } => {
                tracing::warn!(vm = %id, device, reason, paused, "a disk failed");
                if paused {
                    power((ObservedPower::Paused, "io_error"), false);
                }
            }
            RawEvent::MetadataChanged => {
                self.forget(id);
                self.tell(HypervisorEvent::Defined { id });
            }
        }
    }

    fn tick(&self) {
        self.pool.tend();
    }
}
