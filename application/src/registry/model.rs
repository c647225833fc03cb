//! The model: all records and all that was observed, as plain data without locks or I/O.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::{CorePermissions, FleetLedger};
use ghost_domain::guest::Lockdown;
use ghost_domain::ports::{Change, StoreContents, VmStorageUsage};
use ghost_domain::vm::{Lifecycle, Observation, ShownState, Vm, VmState, show};
use ghost_domain::{
    ApiKey, ByteSize, Capacity, Certificate, CredentialId, Demand, Error, ErrorCode, EventKind,
    HostResources, Image, ImageDigest, ImageName, JoinToken, MacAddress, Monotonic, Operation,
    OperationId, OperationKind, Overcommit, Progress, RequestId, Reserved, Result, Timestamp, VmId,
    VmName,
};

use super::Notice;
use super::guest::GuestSeen;
use crate::fleet::{CoreSeen, Taking};

/// How the link to the hypervisor stands.
#[derive(Clone, Debug)]
pub struct HypervisorLink {
    /// Whether it is up.
    pub connected: bool,
    /// When it last answered.
    pub last_contact: Monotonic,
    /// When it last came up.
    pub up_since: Monotonic,
    /// Why it is down.
    pub reason: String,
}

/// A VM and what was seen of it.
pub(crate) struct VmEntry {
    pub(crate) vm: Arc<Vm>,
    pub(crate) observation: Option<Observation>,
    /// By lease.
    pub(crate) addresses: Vec<(MacAddress, IpAddr)>,
    /// As its agent reports them.
    pub(crate) reported: Vec<(MacAddress, IpAddr)>,
    pub(crate) addresses_at: Monotonic,
    pub(crate) usage: Option<VmStorageUsage>,
    pub(crate) drift: Vec<String>,
    pub(crate) drift_since: Timestamp,
    /// Whether its guest may be entered, as the domain's own metadata said when it was last read.
    pub(crate) access_in_domain: Option<bool>,
    pub(crate) operation: Option<OperationId>,
    /// What is known of its inside.
    pub(crate) guest: GuestSeen,
    /// The state last told in an event.
    told: Option<VmState>,
}

/// An operation and how far it is.
pub(crate) struct OperationEntry {
    pub(crate) operation: Arc<Operation>,
    pub(crate) progress: Progress,
}

/// Everything.
pub(crate) struct Model {
    pub(crate) vms: BTreeMap<VmId, VmEntry>,
    pub(crate) names: HashMap<VmName, VmId>,
    pub(crate) operations: BTreeMap<OperationId, OperationEntry>,
    pub(crate) requests: HashMap<RequestId, OperationId>,
    pub(crate) images: BTreeMap<ImageName, Image>,
    pub(crate) certificates: BTreeMap<CredentialId, Certificate>,
    pub(crate) api_keys: BTreeMap<CredentialId, ApiKey>,
    pub(crate) join_tokens: BTreeMap<CredentialId, JoinToken>,
    pub(crate) boot_id: Option<String>,
    /// All ways into guests are closed. In force from the moment it stands here, recorded or not.
    pub(crate) lockdown: Option<Lockdown>,
    /// What was taken of Core's commands.
    pub(crate) fleet_ledger: FleetLedger,
    /// Until when the owner lets Core delete more VMs than usual.
    pub(crate) delete_consent: Option<Timestamp>,
    /// What the owner lets Core's principals do.
    pub(crate) core_permissions: CorePermissions,
    /// The command of Core that is being taken now.
    pub(crate) taking: Option<Taking>,
    /// How the link to Core fares.
    pub(crate) core: CoreSeen,
    pub(crate) link: HypervisorLink,
    /// Records may be missing: nothing may be destroyed until libvirt was asked.
    pub(crate) recovering: bool,
    pub(crate) draining: bool,
    pub(crate) warnings: Vec<String>,
    pub(crate) host: HostResources,
    pub(crate) reserved: Reserved,
    pub(crate) overcommit: Overcommit,
}

impl Model {
    pub(crate) fn new(
        contents: StoreContents,
        now: Monotonic,
        reserved: Reserved,
        overcommit: Overcommit,
    ) -> Self {
        let mut model = Self {
            vms: BTreeMap::new(),
            names: HashMap::new(),
            operations: BTreeMap::new(),
            requests: HashMap::new(),
            images: BTreeMap::new(),
            certificates: BTreeMap::new(),
            api_keys: BTreeMap::new(),
            join_tokens: BTreeMap::new(),
            boot_id: contents.boot_id,
            lockdown: contents.lockdown,
            fleet_ledger: contents.fleet_ledger.unwrap_or_default(),
            delete_consent: contents.delete_consent,
            core_permissions: CorePermissions::default(),
            taking: None,
            core: CoreSeen::default(),
            link: HypervisorLink {
                connected: false,
                last_contact: now,
                up_since: now,
                reason: "not connected yet".into(),
            },
            recovering: contents.damage.is_some(),
            draining: false,
            warnings: Vec::new(),
            host: HostResources::default(),
            reserved,
            overcommit,
        };
        for vm in contents.vms {
            model.apply(Change::PutVm(Box::new(vm)));
        }
        for operation in contents.operations {
            model.apply(Change::PutOperation(Box::new(operation)));
        }
        for image in contents.images {
            model.apply(Change::PutImage(image));
        }
        for certificate in contents.certificates {
            model.apply(Change::PutCertificate(certificate));
        }
        for key in contents.api_keys {
            model.apply(Change::PutApiKey(key));
        }
        for token in contents.join_tokens {
            model.apply(Change::PutJoinToken(token));
        }
        model
    }

    /// Applies a committed change.
    pub(crate) fn apply(&mut self, change: Change) {
        match change {
            Change::PutVm(vm) => {
                let vm = Arc::new(*vm);
                if let Some(entry) = self.vms.get_mut(&vm.id) {
                    if entry.vm.name != vm.name {
                        self.names.remove(&entry.vm.name);
                    }
                    entry.vm = Arc::clone(&vm);
                } else {
                    let operation = self.operations.values().find_map(|entry| {
                        let operation = &entry.operation;
                        (operation.vm == Some(vm.id) && !operation.status.is_finished())
                            .then_some(operation.id)
                    });
                    self.vms.insert(
                        vm.id,
                        VmEntry {
                            vm: Arc::clone(&vm),
                            observation: None,
                            addresses: Vec::new(),
                            reported: Vec::new(),
                            addresses_at: Monotonic::default(),
                            usage: None,
                            drift: Vec::new(),
                            drift_since: Timestamp::default(),
                            access_in_domain: None,
                            operation,
                            guest: GuestSeen::default(),
                            told: None,
                        },
                    );
                }
                self.names.insert(vm.name.clone(), vm.id);
            }
            Change::DeleteVm(id) => {
                if let Some(entry) = self.vms.remove(&id) {
                    self.names.remove(&entry.vm.name);
                }
            }
            Change::PutOperation(operation) => {
                if let Some(key) = &operation.request_id {
                    self.requests.insert(key.clone(), operation.id);
                }
                let open = !operation.status.is_finished();
                if let Some(entry) = operation.vm.and_then(|vm| self.vms.get_mut(&vm)) {
                    if open {
                        entry.operation = Some(operation.id);
                    } else if entry.operation == Some(operation.id) {
                        entry.operation = None;
                    }
                }
                match self.operations.get_mut(&operation.id) {
                    Some(entry) => {
                        if !open {
                            entry.progress.waiting_for = None;
                        }
                        entry.operation = Arc::new(*operation);
                    }
                    None => {
                        self.operations.insert(
                            operation.id,
                            OperationEntry {
                                operation: Arc::new(*operation),
                                progress: Progress::default(),
                            },
                        );
                    }
                }
            }
            Change::DeleteOperation(id) => {
                if let Some(entry) = self.operations.remove(&id)
                    && let Some(key) = &entry.operation.request_id
                {
                    self.requests.remove(key);
                }
            }
            Change::PutImage(image) => {
                self.images.insert(image.name.clone(), image);
            }
            Change::DeleteImage(name) => {
                self.images.remove(&name);
            }
            Change::PutCertificate(certificate) => {
                self.certificates.insert(certificate.id, certificate);
            }
            Change::DeleteCertificate(id) => {
                self.certificates.remove(&id);
            }
            Change::PutApiKey(key) => {
                self.api_keys.insert(key.id, key);
            }
            Change::DeleteApiKey(id) => {
                self.api_keys.remove(&id);
            }
            Change::PutJoinToken(token) => {
                self.join_tokens.insert(token.id, token);
            }
            Change::DeleteJoinToken(id) => {
                self.join_tokens.remove(&id);
            }
            Change::PutBootId(boot_id) => self.boot_id = Some(boot_id),
            Change::PutLockdown(lockdown) => self.lockdown = Some(lockdown),
            Change::DeleteLockdown => self.lockdown = None,
            Change::PutFleetLedger(ledger) => {
                self.core.count(&self.fleet_ledger, &ledger);
                self.fleet_ledger = ledger;
            }
            Change::PutDeleteConsent(until) => self.delete_consent = Some(until),
        }
    }

    /// For how long the hypervisor has been out of reach, if it is.
    pub(crate) fn hypervisor_lost(&self, now: Monotonic) -> Option<Duration> {
        (!self.link.connected).then(|| now.since(self.link.last_contact))
    }

    /// The operation that holds a VM.
    pub(crate) fn running(&self, entry: &VmEntry) -> Option<&Arc<Operation>> {
        let id = entry.operation.as_ref()?;
        self.operations.get(id).map(|entry| &entry.operation)
    }

    /// The state to show of a VM.
    pub(crate) fn shown(&self, entry: &VmEntry, now: Monotonic) -> ShownState {
        let kind = self.running(entry).map(|operation| &operation.kind);
        show(
            &entry.vm,
            entry.observation.as_ref(),
            self.hypervisor_lost(now),
            kind,
        )
    }

    /// The state of a VM without the operation that is about to hold it or holds it.
    pub(crate) fn shown_idle(&self, entry: &VmEntry, now: Monotonic) -> ShownState {
        show(
            &entry.vm,
            entry.observation.as_ref(),
            self.hypervisor_lost(now),
            None,
        )
    }

    /// Events for every VM whose shown state is not the one last told.
    pub(crate) fn take_state_changes(&mut self, now: Monotonic) -> Vec<Notice> {
        let changed: Vec<(VmId, ShownState)> = self
            .vms
            .values()
            .filter_map(|entry| {
                let shown = self.shown(entry, now);
                (entry.told != Some(shown.state)).then_some((entry.vm.id, shown))
            })
            .collect();
        let mut notices = Vec::new();
        for (id, shown) in changed {
            let Some(entry) = self.vms.get_mut(&id) else {
                continue;
            };
            let before = entry.told.replace(shown.state);
            if let Some(from) = before {
                notices.push(Notice {
                    kind: EventKind::VmState {
                        from,
                        to: shown.state,
                        reason: shown.reason,
                    },
                    vm: Some(id),
                    subject: entry.vm.name.to_string(),
                });
            }
        }
        notices
    }

    /// Finds a VM by name, full id or unique prefix of its id.
    pub(crate) fn find_vm(&self, selector: &str) -> Result<&VmEntry> {
        let by_name = VmName::new(selector)
            .ok()
            .and_then(|name| self.names.get(&name));
        if let Some(entry) = by_name.and_then(|id| self.vms.get(id)) {
            return Ok(entry);
        }
        let selector = selector.to_ascii_lowercase();
        let mut matches = self
            .vms
            .values()
            .filter(|entry| !selector.is_empty() && entry.vm.id.to_string().starts_with(&selector));
        match (matches.next(), matches.next()) {
            (Some(only), None) => Ok(only),
            (Some(_), Some(_)) => Err(Error::new(
                ErrorCode::VmAmbiguous,
                format!("{selector:?} matches more than one VM"),
            )
            .hint("give more of the id, or the name: ghostctl list")),
            (None, _) => Err(Error::new(
                ErrorCode::VmNotFound,
                format!("there is no VM {selector:?}"),
            )
            .hint("see which there are: ghostctl list")),
        }
    }

    pub(crate) fn vm(&self, id: VmId) -> Result<&VmEntry> {
        self.vms
            .get(&id)
            .ok_or_else(|| Error::new(ErrorCode::VmNotFound, format!("there is no VM {id}")))
    }

    /// Finds an operation by full id or unique prefix.
    pub(crate) fn find_operation(&self, selector: &str) -> Result<&OperationEntry> {
        let selector = selector.to_ascii_lowercase();
        let mut matches = self.operations.values().filter(|entry| {
            !selector.is_empty() && entry.operation.id.to_string().starts_with(&selector)
        });
        match (matches.next(), matches.next()) {
            (Some(only), None) => Ok(only),
            (Some(_), Some(_)) => Err(Error::new(
                ErrorCode::InvalidArgument,
                format!("{selector:?} matches more than one operation"),
            )
            .hint("give more of the id: ghostctl operation list")),
            (None, _) => Err(Error::new(
                ErrorCode::OperationNotFound,
                format!("there is no operation {selector:?}"),
            )
            .hint("see which there are: ghostctl operation list")),
        }
    }

    pub(crate) fn image(&self, name: &ImageName) -> Result<&Image> {
        self.images.get(name).ok_or_else(|| {
            Error::new(ErrorCode::ImageNotFound, format!("there is no image {name} in the cache"))
                .hint("see what there is: ghostctl image list; what can be pulled: ghostctl image catalogue")
        })
    }

    /// VMs whose disks stand on this content.
    pub(crate) fn users_of(&self, digest: ImageDigest) -> Vec<VmName> {
        self.vms
            .values()
            .filter(|entry| {
                entry
                    .vm
                    .spec
                    .image
                    .content
                    .is_some_and(|(content, _)| content == digest)
            })
            .map(|entry| entry.vm.name.clone())
            .collect()
    }

    /// Open operations.
    pub(crate) fn open_operations(&self) -> impl Iterator<Item = &Arc<Operation>> {
        self.operations
            .values()
            .map(|entry| &entry.operation)
            .filter(|operation| !operation.status.is_finished())
    }

    /// Whether a VM holds CPU and memory: a QEMU process exists, or soon will.
    fn holds_host(&self, entry: &VmEntry) -> bool {
        let starting = self.running(entry).is_some_and(|operation| {
            matches!(
                operation.kind,
                OperationKind::StartVm
                    | OperationKind::RestartVm { .. }
                    | OperationKind::CreateVm { start: true }
            )
        });
        starting
            || entry
                .observation
                .as_ref()
                .is_some_and(|seen| seen.power.is_active())
    }

    /// Capacity by the records of this moment. `except` is left out of what is committed, for a VM
    /// that is about to change.
    pub(crate) fn capacity(&self, except: Option<VmId>) -> Capacity {
        let mut committed = Demand::default();
        let mut held = ByteSize::ZERO;
        for entry in self.vms.values() {
            held = held.saturating_add(entry.usage.unwrap_or_default().disk_allocated);
            let mut demand = entry.vm.spec.demand();
            if !self.holds_host(entry) || except == Some(entry.vm.id) {
                demand.cpus = 0;
                demand.memory = ByteSize::ZERO;
            }
            if except == Some(entry.vm.id) {
                demand.disk = ByteSize::ZERO;
            }
            committed = committed.plus(demand);
        }
        Capacity::compute(self.host, self.reserved, self.overcommit, committed, held)
    }

    /// `running`, `recovering` or `draining`.
    pub(crate) const fn agent_state(&self) -> &'static str {
        match (self.draining, self.recovering) {
            (true, _) => "draining",
            (false, true) => "recovering",
            (false, false) => "running",
        }
    }

    /// Refuses mutations while the agent drains.
    pub(crate) fn check_accepting(&self) -> Result<()> {
        if self.draining {
            return Err(
                Error::new(ErrorCode::ShuttingDown, "the agent is shutting down")
                    .hint("try again once it is back")
                    .retry_after(Duration::from_secs(10)),
            );
        }
        Ok(())
    }

    /// Refuses what destroys while records may be missing.
    pub(crate) fn check_recovered(&self) -> Result<()> {
        if self.recovering {
            return Err(
                Error::new(ErrorCode::Recovering, "the agent is rebuilding its state")
                    .because("nothing is destroyed before libvirt was asked what is there")
                    .hint("try again in a moment; ghostctl status says how it stands")
                    .retry_after(Duration::from_secs(5)),
            );
        }
        Ok(())
    }

    /// Whether a VM's record is complete enough to be acted upon by itself.
    pub(crate) fn is_settled(entry: &VmEntry) -> bool {
        entry.operation.is_none() && matches!(entry.vm.lifecycle, Lifecycle::Ready)
    }
}
