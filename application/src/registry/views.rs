//! Read models: what a caller is shown, computed from the model at the time of the call.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::VmStorageUsage;
use ghost_domain::vm::{Lifecycle, ObservationSource, ObservedPower, ShownState, Vm};
use ghost_domain::{
    Image, MacAddress, Monotonic, Operation, OperationId, OperationKind, OperationStatus, Progress,
    Timestamp, VmName,
};

use super::model::{Model, OperationEntry, VmEntry};

/// How a shown state is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateSource {
    /// By observation.
    Observed(ObservationSource),
    /// By the operation that is under way.
    Operation,
}

impl StateSource {
    /// The source in snake case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Observed(source) => source.as_str(),
            Self::Operation => "operation",
        }
    }
}

/// How an address is known, from the best down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressSource {
    /// The guest's agent reports it of the card with this hardware address.
    Guest,
    /// DHCP gave it.
    Lease,
    /// Somebody registered it.
    Registered,
}

impl AddressSource {
    /// `guest`, `lease` or `registered`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Lease => "lease",
            Self::Registered => "registered",
        }
    }
}

/// An address that a VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressView {
    /// On which card.
    pub mac: MacAddress,
    /// The address.
    pub address: IpAddr,
    /// How it is known.
    pub source: AddressSource,
}

/// Something that is true of a VM or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConditionView {
    /// `address`, `agent`, `cloud-init`, `drift`, `storage`, `record`. Of `cloud-init` the reason
    /// begins with `done`, `absent` or `disabled` where it is true, and with `error` where it has
    /// failed for good.
    pub kind: &'static str,
    /// Whether it is true.
    pub status: bool,
    /// Why.
    pub reason: String,
    /// Since when, where that is known.
    pub since: Option<Timestamp>,
}

/// A VM as a caller sees it.
#[derive(Clone, Debug)]
pub struct VmView {
    /// The record.
    pub vm: Arc<Vm>,
    /// Its state.
    pub shown: ShownState,
    /// How it is known.
    pub source: StateSource,
    /// How long ago the source last vouched for it.
    pub age: Duration,
    /// Addresses by lease.
    pub addresses: Vec<AddressView>,
    /// How old the knowledge of the addresses is.
    pub addresses_age: Option<Duration>,
    /// What its files take, as last measured.
    pub usage: Option<VmStorageUsage>,
    /// What is true of it.
    pub conditions: Vec<ConditionView>,
    /// The operation that holds it.
    pub operation: Option<OperationId>,
}

/// An operation as a caller sees it.
#[derive(Clone, Debug)]
pub struct OperationView {
    /// The record.
    pub operation: Arc<Operation>,
    /// How far it is.
    pub progress: Progress,
}

/// An image as a caller sees it.
#[derive(Clone, Debug)]
pub struct ImageView {
    /// The record.
    pub image: Image,
    /// The VMs that stand on it.
    pub used_by: Vec<VmName>,
}

impl VmView {
    pub(crate) fn of(model: &Model, entry: &VmEntry, now: Monotonic) -> Self {
        let shown = model.shown(entry, now);
        let running = model.running(entry);
        let observed = entry.observation.as_ref();
        let source = if running.is_some() {
            StateSource::Operation
        } else {
            StateSource::Observed(observed.map_or(ObservationSource::None, |seen| seen.source))
        };
        // An operation in flight is known at first hand; all else is as old as libvirt's last word.
        let age = if running.is_some() && model.link.connected {
            Duration::ZERO
        } else {
            now.since(model.link.last_contact)
        };
        let addresses = entry.known_addresses();
        Self {
            vm: Arc::clone(&entry.vm),
            shown,
            source,
            age,
            addresses_age: addresses_age(entry, &addresses, now),
            addresses,
            usage: entry.usage,
            conditions: conditions(entry),
            operation: entry.operation,
        }
    }
}

fn conditions(entry: &VmEntry) -> Vec<ConditionView> {
    let mut conditions = Vec::new();
    let observed = entry.observation.as_ref();
    let active = observed.is_some_and(|seen| seen.power.is_active());
    let addresses = entry.known_addresses();
    conditions.push(ConditionView {
        kind: "address",
        status: !addresses.is_empty(),
        reason: match (addresses.first(), active) {
            (Some(first), _) => {
                let how = match first.source {
                    AddressSource::Guest => "reported",
                    AddressSource::Lease => "leased",
                    AddressSource::Registered => "registered",
                };
                format!("{how} {}", first.address)
            }
            (None, true) => "no DHCP lease and no report yet".into(),
            (None, false) => "not running".into(),
        },
        since: None,
    });
    conditions.push(agent_condition(entry));
    conditions.push(cloud_init_condition(entry));
    conditions.push(ConditionView {
        kind: "drift",
        status: !entry.drift.is_empty(),
        reason: entry.drift.join("; "),
        since: (!entry.drift.is_empty()).then_some(entry.drift_since),
    });
    if let Some(seen) = observed
        && seen.power == ObservedPower::Paused
        && seen.reason == "io_error"
    {
        conditions.push(ConditionView {
            kind: "storage",
            status: false,
            reason: "paused by a disk error of the host, most often a full disk: make room, then ghostctl vm resume".into(),
            since: Some(seen.since),
        });
    }
    if let Lifecycle::Failed { reason } = &entry.vm.lifecycle {
        conditions.push(ConditionView {
            kind: "record",
            status: false,
            reason: reason.clone(),
            since: None,
        });
    }
    conditions
}

fn addresses_age(entry: &VmEntry, addresses: &[AddressView], now: Monotonic) -> Option<Duration> {
    let first = addresses.first()?;
    match (first.source, &entry.guest.telemetry) {
        (AddressSource::Guest, Some((_, at))) => Some(now.since(*at)),
        (AddressSource::Lease, _) => Some(now.since(entry.addresses_at)),
        _ => None,
    }
}

/// Whether the agent in the guest is connected.
fn agent_condition(entry: &VmEntry) -> ConditionView {
    let guest = &entry.guest;
    let power = entry.observation.as_ref().map(|seen| seen.power);
    let paused = power == Some(ObservedPower::Paused);
    let running = power.is_some_and(ObservedPower::is_active);
    let reason = if !running {
        "not running".into()
    } else if paused {
        "the VM is paused".into()
    } else if guest.connected {
        let version = guest.hello.as_ref().map(|hello| &hello.agent_version);
        format!(
            "ghost-guest {}",
            crate::guest::escape(version.map_or("", |version| version), 64)
        )
    } else if let Some(detail) = &guest.misbehaved {
        format!("held off, it breaks the protocol: {detail}")
    } else if !guest.reason.is_empty() {
        guest.reason.clone()
    } else {
        "it has not greeted yet".into()
    };
    ConditionView {
        kind: "agent",
        status: running && !paused && guest.connected,
        reason,
        since: guest.since,
    }
}

/// Whether cloud-init has come to a good end. It is told apart by the reason's first word.
fn cloud_init_condition(entry: &VmEntry) -> ConditionView {
    let active = entry
        .observation
        .as_ref()
        .is_some_and(|seen| seen.power.is_active());
    let Some((told, since)) = entry.guest.cloud_init.as_ref().filter(|_| active) else {
        return ConditionView {
            kind: "cloud-init",
            status: false,
            reason: if active {
                "the guest has not reported it yet".into()
            } else {
                "not running".into()
            },
            since: None,
        };
    };
    let mut reason = told.status.clone();
    if !told.stage.is_empty() && !told.is_finished() {
        reason = format!("{reason} {}", told.stage);
    }
    if !told.errors.is_empty() {
        reason = format!("{reason}: {}", told.errors.join("; "));
    }
    ConditionView {
        kind: "cloud-init",
        status: told.is_finished() && told.status != "error",
        reason,
        since: Some(*since),
    }
}

impl OperationView {
    pub(crate) fn of(entry: &OperationEntry) -> Self {
        Self {
            operation: Arc::clone(&entry.operation),
            progress: entry.progress.clone(),
        }
    }

    /// The operation that would have been: its id is never seen again.
    pub(crate) fn dry_run(
        subject: &str,
        kind: OperationKind,
        requested_by: &str,
        now: Timestamp,
    ) -> Self {
        let operation = Operation {
            id: OperationId::random(),
            kind,
            vm: None,
            subject: subject.to_owned(),
            request_id: None,
            request_hash: 0,
            requested_by: requested_by.to_owned(),
            through_core: false,
            status: OperationStatus::Succeeded,
            error: None,
            created_at: now,
            finished_at: Some(now),
            deadline: now,
            cancel_requested: false,
            journal: Vec::new(),
        };
        Self {
            operation: Arc::new(operation),
            progress: Progress::phase("dry run: nothing was changed"),
        }
    }
}

impl ImageView {
    pub(crate) fn of(model: &Model, image: &Image) -> Self {
        Self {
            image: image.clone(),
            used_by: model.users_of(image.digest),
        }
    }
}
