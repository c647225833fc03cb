//! How guests fare: now, and over the last day.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::{GuestCloudInit, GuestHello, GuestTelemetry};
use ghost_domain::{Error, ErrorCode, Principal, Result, Role, VmId, VmName};
use tokio::sync::watch;

use crate::registry::{GuestSample, LONGEST_SPAN, Model, Registry, VmEntry};

/// How a VM fared.
#[derive(Clone, Debug)]
pub struct GuestHistoryView {
    /// The VM.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: VmName,
    /// Oldest first.
    pub samples: Vec<GuestSample>,
}

/// Shows how a VM fared.
pub struct GetGuestHistory {
    pub(crate) registry: Arc<Registry>,
}

impl GetGuestHistory {
    /// The last `span`, an hour where none is given: a point each five seconds within the hour,
    /// one a minute beyond.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmAmbiguous`, `InvalidArgument` beyond 24 hours.
    pub async fn execute(
        &self,
        principal: &Principal,
        vm: &str,
        span: Option<Duration>,
    ) -> Result<GuestHistoryView> {
        principal.require(Role::Viewer)?;
        let span = span.unwrap_or(Duration::from_secs(3600));
        if span.is_zero() || span > LONGEST_SPAN {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "there is no history of that length",
            )
            .because("24 hours are kept")
            .field("span", "more than nothing and at most 24h"));
        }
        let now = self.registry.clock().now();
        self.registry.read(|model| {
            let entry = model.find_vm(vm)?;
            Ok(GuestHistoryView {
                vm_id: entry.vm.id,
                vm_name: entry.vm.name.clone(),
                samples: entry.guest.history.points(now, span),
            })
        })
    }
}

/// The newest that is known of a running VM. Strings of the report are as the guest sent them:
/// whoever prints them escapes them.
#[derive(Clone, Debug)]
pub struct TelemetryView {
    /// The VM.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: VmName,
    /// CPU, memory and rates; `None` before the first one.
    pub sample: Option<GuestSample>,
    /// How old the sample is.
    pub age: Duration,
    /// The guest's own report; `None` while it is silent.
    pub report: Option<Arc<GuestTelemetry>>,
    /// How its agent greeted; `None` while it is not connected.
    pub hello: Option<Arc<GuestHello>>,
}

impl TelemetryView {
    /// cloud-init, as the guest reports it.
    pub fn cloud_init(&self) -> Option<&GuestCloudInit> {
        self.report.as_ref().map(|report| &report.cloud_init)
    }
}

/// Follows the telemetry of one or all VMs.
pub struct WatchTelemetry {
    pub(crate) registry: Arc<Registry>,
}

/// Telemetry as it comes.
pub struct TelemetryWatch {
    registry: Arc<Registry>,
    changed: watch::Receiver<u64>,
    vm: Option<VmId>,
    /// What was last told of each VM: the time of its sample.
    told: HashMap<VmId, Option<i64>>,
    due: std::collections::VecDeque<TelemetryView>,
}

impl WatchTelemetry {
    /// Begins with the newest of each, then each new one.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmAmbiguous`.
    pub async fn execute(&self, principal: &Principal, vm: Option<&str>) -> Result<TelemetryWatch> {
        principal.require(Role::Viewer)?;
        let vm = vm
            .map(|vm| {
                self.registry
                    .read(|model| model.find_vm(vm).map(|entry| entry.vm.id))
            })
            .transpose()?;
        Ok(TelemetryWatch {
            changed: self.registry.watch_telemetry(),
            registry: Arc::clone(&self.registry),
            vm,
            told: HashMap::new(),
            due: std::collections::VecDeque::new(),
        })
    }
}

impl TelemetryWatch {
    /// The next one. `None` once the VM that is followed is gone, or the agent ends.
    pub async fn next(&mut self) -> Option<TelemetryView> {
        loop {
            if let Some(view) = self.due.pop_front() {
                return Some(view);
            }
            self.changed.borrow_and_update();
            if !self.collect() {
                return None;
            }
            if self.due.is_empty() {
                self.changed.changed().await.ok()?;
            }
        }
    }

    fn collect(&mut self) -> bool {
        let registry = Arc::clone(&self.registry);
        registry.read(|model| {
            match self.vm {
                Some(id) => match model.vms.get(&id) {
                    Some(entry) => self.look(model, entry),
                    None => return false,
                },
                None => {
                    self.told.retain(|id, _| model.vms.contains_key(id));
                    for entry in model.vms.values() {
                        self.look(model, entry);
                    }
                }
            }
            true
        })
    }

    fn look(&mut self, _: &Model, entry: &VmEntry) {
        let active = entry
            .observation
            .as_ref()
            .is_some_and(|seen| seen.power.is_active());
        if !active {
            self.told.remove(&entry.vm.id);
            return;
        }
        let sample = entry.guest.history.newest();
        let stamp = sample.as_ref().map(|sample| sample.at.unix_millis());
        if self.told.insert(entry.vm.id, stamp) == Some(stamp) {
            return;
        }
        self.due.push_back(view_of(entry, self.registry.clock()));
    }
}

pub(crate) fn view_of(entry: &VmEntry, clock: &dyn ghost_domain::ports::Clock) -> TelemetryView {
    let (now, monotonic) = (clock.now(), clock.monotonic());
    let guest = &entry.guest;
    let sample = guest.history.newest();
    TelemetryView {
        vm_id: entry.vm.id,
        vm_name: entry.vm.name.clone(),
        age: sample
            .as_ref()
            .map(|sample| now.since(sample.at))
            .unwrap_or_default(),
        sample,
        report: guest
            .telemetry
            .as_ref()
            .filter(|_| guest.is_fresh(monotonic))
            .map(|(report, _)| Arc::clone(report)),
        hello: guest.hello.as_ref().filter(|_| guest.connected).cloned(),
    }
}
