//! Supervision: keeps what we show true to what libvirt says, and does what records ask for
//! without anybody asking now (autostart, restart after a crash).
//!
//! ```text
//! hypervisor events ─> power, drift, gone ─> registry ─> crash policy ─> engine
//! (re)connected ─────> full list ─────────> adopt, drift, absent       └ autostart (first time after a boot)
//! guest access ──────> the domains' metadata
//! every few seconds ─> liveness, leases of VMs that have none
//! ```

mod access;
mod autostart;
mod crash;
mod guest;
mod sync;
mod timers;

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::HypervisorEvent;
use ghost_domain::vm::{DesiredPower, Observation, ObservationSource, ObservedPower, Vm};
use ghost_domain::{EventKind, VmId, ports::Change};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::application::Ports;
use crate::guest::{Door, GuestOptions};
use crate::operations::Engine;
use crate::registry::{Decision, Model, Registry};

pub(crate) use sync::observe_one;

/// How long after a failed look at libvirt the next one comes.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What supervision works with.
#[derive(Clone)]
pub(crate) struct Supervisor {
    pub(crate) registry: Arc<Registry>,
    pub(crate) ports: Ports,
    pub(crate) engine: Arc<Engine>,
    pub(crate) door: Arc<Door>,
    pub(crate) guest: GuestOptions,
    /// Ends all supervision.
    pub(crate) stop: CancellationToken,
}

impl Supervisor {
    /// Starts all supervising tasks; they end with `stop`.
    pub(crate) fn spawn(self, tasks: &TaskTracker, stop: &CancellationToken) {
        let tell = |name: &'static str, ended: bool| {
            tracing::debug!(task = name, ended, "supervision ended")
        };
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            tell(
                "events",
                token
                    .run_until_cancelled(this.follow_events())
                    .await
                    .is_some(),
            )
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            tell(
                "liveness",
                token
                    .run_until_cancelled(timers::liveness(this))
                    .await
                    .is_some(),
            )
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            tell(
                "leases",
                token
                    .run_until_cancelled(timers::leases(this))
                    .await
                    .is_some(),
            )
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            tell(
                "exports",
                token
                    .run_until_cancelled(timers::exports(this))
                    .await
                    .is_some(),
            )
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            tell(
                "unnamed images",
                token
                    .run_until_cancelled(timers::unnamed_images(this))
                    .await
                    .is_some(),
            )
        });
        // Before anything is attached, so that no greeting is missed.
        let heard = self.ports.guests.subscribe();
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            let following = guest::follow(this, heard);
            tell(
                "guests",
                token.run_until_cancelled(following).await.is_some(),
            )
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            let keeping = guest::keep_links(this);
            tell("links", token.run_until_cancelled(keeping).await.is_some())
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            let counting = guest::count(this);
            tell("count", token.run_until_cancelled(counting).await.is_some())
        });
        let (this, token) = (self.clone(), stop.clone());
        tasks.spawn(async move {
            let keeping = access::keep_access(this);
            tell("access", token.run_until_cancelled(keeping).await.is_some())
        });
        if self.guest.update {
            let (this, token) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                let updating = guest::keep_updated(this);
                tell(
                    "updates",
                    token.run_until_cancelled(updating).await.is_some(),
                )
            });
        }
        let (this, token) = (self, stop.clone());
        tasks.spawn(async move {
            tell(
                "upkeep",
                token
                    .run_until_cancelled(timers::upkeep(this))
                    .await
                    .is_some(),
            )
        });
    }

    async fn follow_events(self) {
        let mut events = self.ports.hypervisor.subscribe();
        let mut first = true;
        // The adapter may have connected before we subscribed: begin with a look of our own.
        self.connected(&mut first).await;
        loop {
            // A look that failed while the adapter stayed connected is followed by no event; nor is
            // a libvirt that was silent for a while and answers again.
            let look_again = async {
                let lost = |model: &Model| (!model.link.connected).then_some(());
                drop(self.registry.wait_for(lost).await);
                tokio::time::sleep(LOOK_AGAIN).await;
            };
            let event = tokio::select! {
                event = events.next() => event,
                () = look_again => {
                    self.connected(&mut first).await;
                    continue;
                }
            };
            let Some(event) = event else { return };
            match event {
                HypervisorEvent::Connected => self.connected(&mut first).await,
                HypervisorEvent::Disconnected { reason } => self.disconnected(reason),
                HypervisorEvent::Power {
                    id,
                    observation,
                    crashed,
                } => self.power(id, observation, crashed).await,
                HypervisorEvent::Defined { id } | HypervisorEvent::Undefined { id } => {
                    self.contact();
                    sync::look(&self, id).await;
                }
            }
        }
    }

    async fn power(&self, id: VmId, observation: Observation, crashed: bool) {
        self.contact();
        let (power, reason) = (observation.power, observation.reason.clone());
        let known = self.registry.observe(|model| match model.vms.get_mut(&id) {
            Some(entry) => {
                entry.observe(observation);
                true
            }
            None => false,
        });
        if !known {
            // A domain that we do not know came to life: perhaps one of ours from a lost store.
            sync::look(self, id).await;
            return;
        }
        let settled = self
            .registry
            .read(|model| model.vms.get(&id).is_some_and(Model::is_settled));
        if !settled {
            return;
        }
        // The event may be an old one of an operation that has just ended: what counts is what is.
        let current = sync::observe_one(&self.registry, &self.ports, id).await;
        if current != Some(power) {
            return;
        }
        if crashed {
            crash::handle(self, id, &reason).await;
        } else {
            self.power_changed_outside(id, power, &reason).await;
        }
    }

    async fn connected(&self, first: &mut bool) {
        match sync::full(self).await {
            Ok(()) => {
                if self.registry.read(|model| model.recovering) {
                    sync::recover_images(self).await;
                    if let Err(error) = self.ports.store.damage_resolved().await {
                        tracing::warn!(%error, "the store will report its damage again");
                    }
                }
                if *first {
                    sync::report_strays(self).await;
                }
                let back = self.registry.observe(|model| {
                    let now = self.registry.clock().monotonic();
                    let back = !model.link.connected;
                    if back {
                        model.link.up_since = now;
                    }
                    model.link.connected = true;
                    model.link.last_contact = now;
                    model.link.reason.clear();
                    model.recovering = false;
                    back
                });
                if back {
                    self.registry
                        .tell(EventKind::HypervisorConnected, None, "libvirt");
                }
                if std::mem::take(first) {
                    self.engine.resume_all();
                    autostart::run(self).await;
                }
            }
            Err(error) => self.disconnected(error.to_string()),
        }
    }

    fn disconnected(&self, reason: String) {
        let lost = self.registry.observe(|model| {
            let lost = model.link.connected;
            model.link.connected = false;
            model.link.reason = reason.clone();
            lost
        });
        if lost {
            self.registry
                .tell(EventKind::HypervisorLost { reason }, None, "libvirt");
        }
    }

    fn contact(&self) {
        let now = self.registry.clock().monotonic();
        self.registry.report(|model| model.link.last_contact = now);
    }

    /// Somebody (or the guest) changed a VM's power while no operation of ours holds it.
    async fn power_changed_outside(&self, id: VmId, power: ObservedPower, reason: &str) {
        let wanted = match power {
            ObservedPower::Running => DesiredPower::Running,
            ObservedPower::Paused => DesiredPower::Paused,
            ObservedPower::Off => DesiredPower::Stopped,
            ObservedPower::ShuttingDown | ObservedPower::Crashed | ObservedPower::Absent => return,
        };
        let name = self.registry.read(|model| {
            model
                .vms
                .get(&id)
                .filter(|entry| Model::is_settled(entry) && entry.vm.desired != wanted)
                .map(|entry| (entry.vm.name.to_string(), entry.vm.desired))
        });
        let Some((name, desired)) = name else { return };
        // A pause by an I/O error is no one's wish.
        if power == ObservedPower::Paused && reason == "io_error" {
            return;
        }
        let detail = format!(
            "power is {}, {} was wanted ({reason})",
            power.as_str(),
            desired.as_str()
        );
        // Whoever acted behind our back is believed: the wish follows, and the drift is told.
        let followed = self
            .registry
            .transact(move |model| {
                let mut vm = Vm::clone(&model.vm(id)?.vm);
                vm.desired = wanted;
                Ok(Decision::of((), vec![Change::PutVm(Box::new(vm))]))
            })
            .await;
        if let Err(error) = followed {
            tracing::warn!(%error, "cannot record a power change from outside");
        }
        // A guest that shuts itself down is everyday life; all else is somebody's hand.
        if reason != "shutdown" {
            self.registry
                .tell(EventKind::VmDrift { detail }, Some(id), name);
        }
    }
}

/// An observation that the domain does not exist.
pub(crate) fn absent(now: ghost_domain::Timestamp) -> Observation {
    Observation {
        power: ObservedPower::Absent,
        reason: "undefined".into(),
        source: ObservationSource::LibvirtSync,
        since: now,
    }
}
