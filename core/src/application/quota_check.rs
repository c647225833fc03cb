//! Whether a tenant and a user may have one VM more, and the reservations that make two who ask at
//! once see each other.
//!
//! Use is computed from what hosts say they have, plus what is queued for them, plus what was
//! admitted a moment ago and no host has told of yet. A reservation goes when its call failed, when
//! its host tells of the VM, or when its time is over.
//!
//! Replicas see each other by the records: where a quota applies, [`Admission::hold`] writes the
//! reservation there too, decided on what is stored, and takes effect only where no other replica
//! came between. So the quota holds to the last VM, whichever replica is asked.
//!
//! Where a create goes is written there too, before it is sent ([`Admission::send`]): repeated with
//! the same request id it goes to the same host, whichever replica is asked, also after a restart.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::CommandAction;
use ghost_domain::{
    Demand, Error, ErrorCode, HostId, Monotonic, Result, Role, TenantName, Timestamp,
};
use parking_lot::{Mutex, MutexGuard};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::fleet::{Fleet, FleetState, HostView};
use super::placement::{Ask, Candidate, Placed, USUAL_DEMAND, place};
use crate::domain::{
    Caller, CallerSource, HeldRoom, HostRecord, Quota, Record, RecordKey, SentCreate, Tenant, Usage,
};

/// So long a VM that was asked for counts without a word of its host: a create that takes longer has
/// its record, and the host's next heartbeat, long before.
const RESERVED_FOR: Duration = Duration::from_secs(120);
/// So long a repeated request finds the host that it went to.
const REMEMBERED_FOR: Duration = Duration::from_secs(3600);
/// Most requests that are remembered; beyond it the oldest are forgotten.
const MOST_REMEMBERED: usize = 100_000;
/// So many that are over are forgotten with each new one.
const FORGOTTEN_AT_ONCE: usize = 8;

/// What a create without a host asks.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Whose hosts.
    pub tenant: TenantName,
    /// The VM's name; empty: one is made up.
    pub name: String,
    /// What it needs; zeroes: the usual.
    pub demand: Demand,
    /// Only hosts with all of these labels.
    pub labels: crate::domain::Labels,
    /// The caller's idempotency key.
    pub request_id: Option<String>,
}

/// With the usual sizes where none is given.
pub fn with_usual(demand: Demand) -> Demand {
    let usual =
        |given: ghost_domain::ByteSize, usual| if given.bytes() == 0 { usual } else { given };
    Demand {
        cpus: if demand.cpus == 0 {
            USUAL_DEMAND.cpus
        } else {
            demand.cpus
        },
        memory: usual(demand.memory, USUAL_DEMAND.memory),
        disk: usual(demand.disk, USUAL_DEMAND.disk),
    }
}

#[derive(Clone, Debug)]
struct Reservation {
    host: HostId,
    tenant: TenantName,
    owner: String,
    name: String,
    /// The VM's id, once the host gave it.
    vm: Option<String>,
    vms: u32,
    demand: Demand,
    until: Monotonic,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    reservations: HashMap<u64, Reservation>,
}

/// Admits VMs.
pub struct Admission {
    fleet: Arc<Fleet>,
    book: Arc<Mutex<Book>>,
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admission")
            .field("reservations", &self.book.lock().reservations.len())
            .finish_non_exhaustive()
    }
}

/// Room that is held. Dropped it is given back, unless it was kept.
#[derive(Debug)]
pub struct Reserved {
    book: Arc<Mutex<Book>>,
    number: u64,
    kept: bool,
    /// Where the other replicas see it.
    held: Option<Held>,
}

/// A reservation in the records.
#[derive(Debug)]
struct Held {
    fleet: Arc<Fleet>,
    tenant: TenantName,
    id: Uuid,
    named: bool,
}

impl Held {
    /// Changes it, or removes it, in a task of its own: whoever waits for an answer needs not wait
    /// for this. One that cannot be removed goes when its time is over.
    fn change(self, change: impl Fn(&mut Vec<HeldRoom>, Uuid) + Send + Sync + 'static) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        runtime.spawn(async move {
            let (tenant, id) = (&self.tenant, self.id);
            let changed = self.fleet.transact(|state| {
                let mut draft = state.draft();
                let mut held = state.room(tenant).to_vec();
                let before = held.clone();
                change(&mut held, id);
                if held != before {
                    draft.put(RecordKey::Room(tenant.clone()), Record::Room(held));
                }
                Ok(draft.done(()))
            });
            if let Err(error) = changed.await {
                tracing::warn!(%tenant, %error, "room that is held stays held until its time is over");
            }
        });
    }
}

impl Reserved {
    /// The host took the request: the room stays held until it tells of the VM.
    pub fn keep(mut self, vm: Option<String>) {
        self.kept = true;
        let Some(held) = self.held.take() else {
            if let Some(one) = self.book.lock().reservations.get_mut(&self.number) {
                one.vm = vm;
            }
            return;
        };
        // The records count it from now on, on this replica as on the others.
        self.book.lock().reservations.remove(&self.number);
        if let (Some(vm), false) = (vm, held.named) {
            held.change(move |all, id| {
                for one in all.iter_mut().filter(|one| one.id == id) {
                    one.vm = Some(vm.clone());
                }
            });
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.kept {
            self.book.lock().reservations.remove(&self.number);
            if let Some(held) = self.held.take() {
                held.change(|all, id| all.retain(|one| one.id != id));
            }
        }
    }
}

/// Where a VM may go.
#[derive(Debug)]
pub struct Admitted {
    /// The host.
    pub host: HostId,
    /// Why, for people.
    pub placed: Placed,
    /// The room; `None` for a repeated request, which took it the first time.
    pub reserved: Option<Reserved>,
}

impl Admitted {
    /// To where the request went before.
    fn again(host: &HostRecord) -> Self {
        Self {
            host: host.id,
            placed: Placed {
                host: host.id,
                name: host.name.as_str().to_owned(),
                reason: "the request went there before".to_owned(),
                rejected: Vec::new(),
            },
            reserved: None,
        }
    }
}

/// Under what it is written down where a request went: whoever calls has request ids of its own.
fn sent_as(caller: &Caller, request_id: &str) -> Uuid {
    let mut hash = Sha256::new_with_prefix(b"ghost-create-v1\0");
    hash.update(caller.full_name());
    hash.update(b"\0");
    hash.update(request_id);
    let [half @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _]: [u8; 32] =
        hash.finalize().into();
    Uuid::from_bytes(half)
}

/// Where a request went, while that is remembered and the host is there.
fn known(state: &FleetState, id: Uuid, now: Timestamp) -> Option<(&SentCreate, &Arc<HostRecord>)> {
    let sent = state.sent(id).filter(|sent| sent.until > now)?;
    Some((sent, state.host(sent.host)?))
}

/// What the records say of a tenant at one moment. Taken while the book is open, so that a VM is
/// seen in it or in the book, never in neither.
struct Snapshot {
    tenant: Option<Tenant>,
    /// Of the user who calls, where it has one of its own.
    user_quota: Option<Quota>,
    hosts: Vec<HostView>,
    /// Commands that make a VM and have not ended: who asked, and for how much.
    coming: Vec<(HostId, String, Demand)>,
}

impl Snapshot {
    fn take(fleet: &Fleet, caller: &Caller, tenant: &TenantName) -> Self {
        let hosts = fleet.host_views(|host| host.tenant == *tenant);
        fleet
            .read(|state| {
                let commands = hosts
                    .iter()
                    .filter(|view| view.open_commands > 0)
                    .flat_map(|view| state.open_commands(view.record.id));
                let coming = commands
                    .filter_map(|command| match &command.action {
                        CommandAction::CreateVm(create) => Some((
                            command.host,
                            command.issuer.name.clone(),
                            with_usual(Demand {
                                cpus: create.vcpus.unwrap_or_default(),
                                memory: create.memory.unwrap_or_default(),
                                disk: create.disk.unwrap_or_default(),
                            }),
                        )),
                        _ => None,
                    })
                    .collect();
                Self {
                    tenant: state.tenant(tenant).cloned(),
                    user_quota: caller
                        .user
                        .and_then(|user| state.user(user))
                        .and_then(|user| user.quota),
                    coming,
                    hosts: Vec::new(),
                }
            })
            .with(hosts)
    }

    fn with(mut self, hosts: Vec<HostView>) -> Self {
        self.hosts = hosts;
        self
    }

    /// What all VMs that were made through Core on the tenant's hosts use, or those of one owner.
    /// What the owner of a host made on it by himself is his own business.
    fn used(&self, owner: Option<&str>) -> Usage {
        let mut usage = Usage::default();
        let told = self.hosts.iter().filter_map(|view| view.inventory.as_ref());
        for vm in told.flat_map(|inventory| inventory.vms.values()) {
            let Some(made_by) = vm.owner.as_deref() else {
                continue;
            };
            if owner.is_none_or(|owner| made_by == owner) {
                usage = usage.with(vm.demand);
            }
        }
        for (_, issuer, demand) in &self.coming {
            if owner.is_none_or(|owner| issuer == owner) {
                usage = usage.with(*demand);
            }
        }
        usage
    }
}

impl Book {
    /// Forgets what is over: by time, or because the host tells of the VM.
    fn settle(&mut self, fleet: &Fleet) {
        let now = fleet.clock().monotonic();
        self.reservations.retain(|_, one| {
            if one.until <= now {
                return false;
            }
            let told = fleet.inventory(one.host).is_some_and(|inventory| {
                one.vms > 0
                    && inventory.vms.values().any(|vm| match &one.vm {
                        Some(id) => vm.id.to_string() == *id,
                        None => !one.name.is_empty() && vm.name == one.name,
                    })
            });
            !told
        });
    }

    fn held(&self, wanted: impl Fn(&Reservation) -> bool) -> Usage {
        let mut usage = Usage::default();
        for one in self.reservations.values().filter(|one| wanted(one)) {
            usage.vms = usage.vms.saturating_add(one.vms);
            usage.demand = usage.demand.plus(one.demand);
        }
        usage
    }
}

fn sum(a: Usage, b: Usage) -> Usage {
    Usage {
        vms: a.vms.saturating_add(b.vms),
        demand: a.demand.plus(b.demand),
    }
}

impl Admission {
    /// For one replica.
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self {
            fleet,
            book: Arc::default(),
        }
    }

    /// What a tenant uses.
    pub fn used_by_tenant(&self, tenant: &TenantName) -> Usage {
        self.used(tenant, None)
    }

    /// What a user uses on the hosts of a tenant: `owner` is `<tenant>/<name>`.
    pub fn used_by_user(&self, tenant: &TenantName, owner: &str) -> Usage {
        self.used(tenant, Some(owner))
    }

    fn used(&self, tenant: &TenantName, owner: Option<&str>) -> Usage {
        let book = self.settled();
        let nobody = Caller {
            name: String::new(),
            user: None,
            tenant: None,
            role: Role::Viewer,
            hosts: None,
            source: CallerSource::OpenIdConnect,
        };
        let snapshot = Snapshot::take(&self.fleet, &nobody, tenant);
        sum(
            snapshot.used(owner),
            book.held(|one| one.tenant == *tenant && owner.is_none_or(|owner| one.owner == owner)),
        )
    }

    fn tenant_of(&self, host: HostId) -> Result<TenantName> {
        self.fleet
            .read(|state| state.require_host(host).map(|host| host.tenant.clone()))
    }

    /// Admits a VM on a host that its caller chose.
    ///
    /// # Errors
    /// `QuotaExceeded`.
    pub fn on_host(
        &self,
        caller: &Caller,
        host: HostId,
        name: &str,
        demand: Demand,
    ) -> Result<Reserved> {
        let demand = with_usual(demand);
        let tenant = self.tenant_of(host)?;
        let mut book = self.settled();
        let snapshot = Snapshot::take(&self.fleet, caller, &tenant);
        check(&snapshot, &book, caller, &tenant, Usage { vms: 1, demand })?;
        Ok(self.reserve(&mut book, caller, tenant, host, name, 1, demand))
    }

    /// Admits more for a VM that there is.
    ///
    /// # Errors
    /// `QuotaExceeded`.
    pub fn growth(&self, caller: &Caller, host: HostId, more: Demand) -> Result<Option<Reserved>> {
        if more == Demand::default() {
            return Ok(None);
        }
        let tenant = self.tenant_of(host)?;
        let mut book = self.settled();
        let snapshot = Snapshot::take(&self.fleet, caller, &tenant);
        let usage = Usage {
            vms: 0,
            demand: more,
        };
        check(&snapshot, &book, caller, &tenant, usage)?;
        Ok(Some(
            self.reserve(&mut book, caller, tenant, host, "", 0, more),
        ))
    }

    /// Chooses a host for a VM and holds the room on it. The same request by the same caller goes
    /// to the same host again. [`Self::send`] is to follow.
    ///
    /// # Errors
    /// `NoHostFits`, `QuotaExceeded`, `TenantNotFound`.
    pub fn anywhere(&self, caller: &Caller, wanted: &Wanted) -> Result<Admitted> {
        let demand = with_usual(wanted.demand);
        let now = self.fleet.clock().now();
        let id = wanted.request_id.as_deref().map(|id| sent_as(caller, id));
        let known = self
            .fleet
            .read(|state| Some(known(state, id?, now)?.1.clone()));
        if let Some(host) = known {
            return Ok(Admitted::again(&host));
        }
        let mut book = self.settled();
        let placed = self.choose(&book, caller, wanted, true)?;
        let reserved = self.reserve(
            &mut book,
            caller,
            wanted.tenant.clone(),
            placed.host,
            &wanted.name,
            1,
            demand,
        );
        Ok(Admitted {
            host: placed.host,
            placed,
            reserved: Some(reserved),
        })
    }

    /// Writes down that a create is about to be sent to the host that was chosen, or learns where it
    /// went before: by a replica that was asked first, or by this one before it was started again.
    /// Costs nothing where the caller gave no request id.
    ///
    /// # Errors
    /// `StoreUnavailable`; those of [`Self::anywhere`].
    pub async fn send(
        &self,
        caller: &Caller,
        wanted: &Wanted,
        mut admitted: Admitted,
    ) -> Result<Admitted> {
        let Some(id) = wanted.request_id.as_deref().map(|id| sent_as(caller, id)) else {
            return Ok(admitted);
        };
        loop {
            let (host, fresh) = (admitted.host, admitted.reserved.is_some());
            let now = self.fleet.clock().now();
            let gone = self.fleet.transact(|state| {
                let mut draft = state.draft();
                let before = known(state, id, now);
                if before.is_none() && !fresh {
                    // It was sent there before, and meanwhile it is certain that it made nothing.
                    return Ok(draft.done(None));
                }
                let again = before.map(|(_, host)| Arc::clone(host));
                let sent = SentCreate {
                    host: before.map_or(host, |(sent, _)| sent.host),
                    attempts: before.map_or(0, |(sent, _)| sent.attempts) + 1,
                    until: now.after(REMEMBERED_FOR),
                };
                draft.put(RecordKey::Sent(id), Record::Sent(sent));
                let beyond = state.all_sent().len().saturating_sub(MOST_REMEMBERED - 1);
                let over = state.all_sent().enumerate().take(FORGOTTEN_AT_ONCE).filter(
                    |(place, (until, one))| *one != id && (*place < beyond || *until <= now),
                );
                for (_, (_, one)) in over {
                    draft.delete(RecordKey::Sent(one));
                }
                Ok(draft.done(Some(again)))
            });
            match gone.await? {
                Some(None) => return Ok(admitted),
                // The room is held by whoever was first.
                Some(Some(before)) => return Ok(Admitted::again(&before)),
                None => admitted = self.anywhere(caller, wanted)?,
            }
        }
    }

    /// Where a VM would go. Holds nothing.
    ///
    /// # Errors
    /// `NoHostFits`, `TenantNotFound`.
    pub fn preview(&self, caller: &Caller, wanted: &Wanted) -> Result<Placed> {
        let book = self.settled();
        self.choose(&book, caller, wanted, false)
    }

    fn choose(
        &self,
        book: &Book,
        caller: &Caller,
        wanted: &Wanted,
        within_quota: bool,
    ) -> Result<Placed> {
        let demand = with_usual(wanted.demand);
        let tenant = &wanted.tenant;
        if !caller.sees_tenant(tenant) {
            // As if it were not there.
            return Err(Error::new(
                ErrorCode::TenantNotFound,
                format!("there is no tenant {tenant}"),
            ));
        }
        self.fleet
            .read(|state| state.require_tenant(tenant).map(drop))?;
        let snapshot = Snapshot::take(&self.fleet, caller, tenant);
        if within_quota {
            check(&snapshot, book, caller, tenant, Usage { vms: 1, demand })?;
        }
        let candidates: Vec<Candidate> = snapshot
            .hosts
            .iter()
            .filter(|view| caller.sees_host(view.record.id, &view.record.tenant))
            .map(|view| candidate(view, &snapshot, book))
            .collect();
        place(
            &Ask {
                tenant: tenant.clone(),
                demand,
                labels: wanted.labels.clone(),
                only: caller.hosts.clone(),
            },
            &candidates,
        )
    }

    /// Holds a reservation before all replicas, where there are several and a quota applies. To be
    /// called with each, before what it is for is begun. Costs nothing elsewhere.
    ///
    /// # Errors
    /// `QuotaExceeded`, `StoreUnavailable`.
    pub async fn hold(
        &self,
        caller: &Caller,
        reserved: Option<Reserved>,
    ) -> Result<Option<Reserved>> {
        let Some(mut reserved) = reserved else {
            return Ok(None);
        };
        if !self.fleet.store().is_shared() {
            return Ok(Some(reserved));
        }
        let one = self.book.lock().reservations.get(&reserved.number).cloned();
        let Some(one) = one else {
            return Ok(Some(reserved));
        };
        let (id, now) = (Uuid::new_v4(), self.fleet.clock().now());
        let held = HeldRoom {
            id,
            host: one.host,
            owner: one.owner,
            name: one.name,
            vm: None,
            vms: one.vms,
            demand: one.demand,
            until: now.after(RESERVED_FOR),
        };
        let tenant = one.tenant;
        let written = self
            .fleet
            .transact(|state| {
                let mut draft = state.draft();
                let Some(record) = state.tenant(&tenant) else {
                    return Ok(draft.done(false));
                };
                let user_quota = caller.tenant.as_ref().map_or_else(Quota::default, |_| {
                    let user = caller.user.and_then(|user| state.user(user));
                    user.and_then(|user| user.quota)
                        .unwrap_or(record.user_quota)
                });
                if record.quota == Quota::default() && user_quota == Quota::default() {
                    return Ok(draft.done(false));
                }
                let mut open: Vec<HeldRoom> = state
                    .room(&tenant)
                    .iter()
                    .filter(|one| one.until > now && !is_told(state, one))
                    .cloned()
                    .collect();
                open.push(held.clone());
                let whole = stored(state, &tenant, &open, None);
                within(&record.quota, &whole, tenant.as_str())?;
                let own = stored(state, &tenant, &open, Some(&held.owner));
                within(&user_quota, &own, &held.owner)?;
                // A quota that is made smaller in this moment counts.
                draft.unchanged(&RecordKey::Tenant(tenant.clone()));
                draft.put(RecordKey::Room(tenant.clone()), Record::Room(open));
                Ok(draft.done(true))
            })
            .await?;
        if written {
            reserved.held = Some(Held {
                fleet: Arc::clone(&self.fleet),
                tenant,
                id,
                named: !held.name.is_empty(),
            });
        }
        Ok(Some(reserved))
    }

    /// A request that was sent certainly made nothing: where that holds for all attempts, the next
    /// one may go to another host.
    pub async fn forget(&self, caller: &Caller, request_id: &str) {
        let id = sent_as(caller, request_id);
        let forgotten = self.fleet.transact(|state| {
            let mut draft = state.draft();
            match state.sent(id) {
                Some(sent) if sent.attempts > 1 => {
                    let sent = SentCreate {
                        attempts: sent.attempts - 1,
                        ..sent.clone()
                    };
                    draft.put(RecordKey::Sent(id), Record::Sent(sent));
                }
                Some(_) => {
                    draft.delete(RecordKey::Sent(id));
                }
                None => {}
            }
            Ok(draft.done(()))
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "a create that made nothing goes to the same host when it is repeated");
        }
    }

    fn settled(&self) -> MutexGuard<'_, Book> {
        let mut book = self.book.lock();
        book.settle(&self.fleet);
        book
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one record")]
    fn reserve(
        &self,
        book: &mut Book,
        caller: &Caller,
        tenant: TenantName,
        host: HostId,
        name: &str,
        vms: u32,
        demand: Demand,
    ) -> Reserved {
        book.next += 1;
        let number = book.next;
        book.reservations.insert(
            number,
            Reservation {
                host,
                tenant,
                owner: caller.full_name(),
                name: name.to_owned(),
                vm: None,
                vms,
                demand,
                until: self.fleet.clock().monotonic().after(RESERVED_FOR),
            },
        );
        Reserved {
            book: Arc::clone(&self.book),
            number,
            kept: false,
            held: None,
        }
    }
}

/// A host as placement sees it, with what is on its way to it.
fn candidate(view: &HostView, snapshot: &Snapshot, book: &Book) -> Candidate {
    let inventory = view.inventory.as_deref();
    let mut coming = book.held(|one| one.host == view.record.id);
    let queued = snapshot.coming.iter();
    for (_, _, demand) in queued.filter(|(host, _, _)| *host == view.record.id) {
        coming = coming.with(*demand);
    }
    Candidate {
        id: view.record.id,
        name: view.record.name.as_str().to_owned(),
        tenant: view.record.tenant.clone(),
        state: view.state,
        state_reason: view.reason.clone(),
        cordoned: view.record.cordoned.clone(),
        labels: view.record.labels.clone(),
        permissions: view.record.permissions,
        agent_state: inventory
            .map(|one| one.health.agent_state.clone())
            .unwrap_or_default(),
        cpus: inventory.map_or(0, |one| one.total.cpus),
        allocatable: inventory.map(|one| one.allocatable),
        committed: inventory.map(|one| one.committed).unwrap_or_default(),
        reserved: coming.demand,
        vms: inventory.map_or(0, |one| one.vms.len()) + coming.vms as usize,
    }
}

/// Whether what its host said of itself, as it is stored, has the VM that room is held for.
fn is_told(state: &FleetState, held: &HeldRoom) -> bool {
    state
        .inventory(held.host)
        .is_some_and(|inventory| held.is_told(inventory))
}

/// What is used of a quota by the records alone, which all replicas see in the same order.
fn stored(
    state: &FleetState,
    tenant: &TenantName,
    held: &[HeldRoom],
    owner: Option<&str>,
) -> Usage {
    let counts = |made_by: &str| owner.is_none_or(|owner| owner == made_by);
    let mut usage = Usage::default();
    for host in state.hosts().filter(|host| host.tenant == *tenant) {
        let vms = state.inventory(host.id).into_iter();
        for vm in vms.flat_map(|inventory| inventory.vms.values()) {
            if vm.owner.as_deref().is_some_and(counts) {
                usage = usage.with(vm.demand);
            }
        }
        for command in state.open_commands(host.id) {
            if let CommandAction::CreateVm(create) = &command.action
                && counts(&command.issuer.name)
            {
                usage = usage.with(with_usual(Demand {
                    cpus: create.vcpus.unwrap_or_default(),
                    memory: create.memory.unwrap_or_default(),
                    disk: create.disk.unwrap_or_default(),
                }));
            }
        }
    }
    for one in held.iter().filter(|one| counts(&one.owner)) {
        usage.vms = usage.vms.saturating_add(one.vms);
        usage.demand = usage.demand.plus(one.demand);
    }
    usage
}

fn within(quota: &Quota, usage: &Usage, whose: &str) -> Result<()> {
    match quota.exceeded_by(usage) {
        None => Ok(()),
        Some(what) => Err(Error::new(
            ErrorCode::QuotaExceeded,
            format!("the quota of {whose} would be exceeded"),
        )
        .because(what)
        .hint("delete a VM that is not needed, or ask an administrator of the fleet for more")),
    }
}

/// Whether the tenant and the user may have that much more.
fn check(
    snapshot: &Snapshot,
    book: &Book,
    caller: &Caller,
    tenant: &TenantName,
    more: Usage,
) -> Result<()> {
    let Some(record) = &snapshot.tenant else {
        return Ok(());
    };
    let exceeded = |quota: &Quota, used: Usage, whose: &str| within(quota, &sum(used, more), whose);
    if record.quota != Quota::default() {
        let held = book.held(|one| one.tenant == *tenant);
        exceeded(
            &record.quota,
            sum(snapshot.used(None), held),
            tenant.as_str(),
        )?;
    }
    // People of no tenant are not bounded as users; what they make is the tenant's.
    if caller.tenant.is_none() {
        return Ok(());
    }
    let quota = snapshot.user_quota.unwrap_or(record.user_quota);
    if quota != Quota::default() {
        let owner = caller.full_name();
        let held = book.held(|one| one.tenant == *tenant && one.owner == owner);
        exceeded(&quota, sum(snapshot.used(Some(&owner)), held), &owner)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ghost_domain::fleet::{CorePermissions, FleetFacts, VmSummary};
    use ghost_domain::vm::{DesiredPower, VmState};
    use ghost_domain::{ByteSize, HostName, HostResources, Timestamp, VmId};
    use ghost_infrastructure::clock::SystemClock;

    use super::*;
    use crate::domain::{HostHealth, HostLife, HostRecord, Inventory, Labels, Ownership};
    use crate::infrastructure::store::{MemoryStore, SharedMemory};

    fn tenant() -> TenantName {
        TenantName::new("acme").unwrap()
    }

    fn caller(name: &str) -> Caller {
        Caller {
            name: name.into(),
            user: None,
            tenant: Some(tenant()),
            role: Role::Operator,
            hosts: None,
            source: CallerSource::Certificate,
        }
    }

    fn wanted(request: Option<&str>) -> Wanted {
        Wanted {
            tenant: tenant(),
            name: "web".into(),
            demand: Demand::default(),
            labels: Labels::new(),
            request_id: request.map(str::to_owned),
        }
    }

    fn inventory(vms: Vec<VmSummary>) -> Inventory {
        let room = |cpus, memory, disk| Demand {
            cpus,
            memory: ByteSize::from_gib(memory),
            disk: ByteSize::from_gib(disk),
        };
        Inventory {
            vms: vms.into_iter().map(|vm| (vm.id, vm)).collect(),
            total: HostResources {
                cpus: 8,
                ..HostResources::default()
            },
            allocatable: room(32, 16, 500),
            health: HostHealth {
                agent_state: "running".into(),
                hypervisor_connected: true,
                store_writable: true,
                ..HostHealth::default()
            },
            ..Inventory::default()
        }
    }

    fn vm(id: VmId, owner: &str) -> VmSummary {
        VmSummary {
            id,
            name: format!("vm-{id}"),
            state: VmState::Running,
            state_reason: String::new(),
            desired: DesiredPower::Running,
            demand: USUAL_DEMAND,
            image: "debian-12".into(),
            addresses: Vec::new(),
            generation: 1,
            created_at: Timestamp::default(),
            tags: Default::default(),
            owner: Some(owner.into()),
        }
    }

    /// A fleet with the tenant acme and hosts that are online, with their ids.
    async fn fleet(quota: Quota, user_quota: Quota, hosts: &[&str]) -> (Arc<Fleet>, Vec<HostId>) {
        fleet_on(MemoryStore::new(), quota, user_quota, hosts).await
    }

    async fn fleet_on(
        store: Arc<MemoryStore>,
        quota: Quota,
        user_quota: Quota,
        hosts: &[&str],
    ) -> (Arc<Fleet>, Vec<HostId>) {
        let fleet = Fleet::start(store, Arc::new(SystemClock::new()))
            .await
            .unwrap();
        let now = fleet.clock().now();
        let ids: Vec<HostId> = hosts.iter().map(|_| HostId::random()).collect();
        fleet
            .transact(|state| {
                let mut draft = state.draft();
                let record = Tenant {
                    name: tenant(),
                    quota,
                    user_quota,
                    created_at: now,
                };
                draft.put(RecordKey::Tenant(tenant()), Record::Tenant(record));
                for (name, id) in hosts.iter().zip(&ids) {
                    draft.put_host(HostRecord {
                        id: *id,
                        name: HostName::new(*name).unwrap(),
                        tenant: tenant(),
                        labels: Labels::new(),
                        cordoned: None,
                        life: HostLife::Active,
                        certificate_generation: 1,
                        key_hash: [0; 32],
                        previous_key_hash: None,
                        machine: None,
                        certificate_expires_at: now,
                        enrolled_at: now,
                        agent_version: "0.1.0".into(),
                        permissions: CorePermissions::Operate,
                        facts: FleetFacts::default(),
                        last_heard_at: Some(now),
                        command_generation: 0,
                    });
                    let owner = Ownership {
                        host: *id,
                        replica: "a".into(),
                        link: 1,
                        since: now,
                    };
                    draft.put(RecordKey::Owner(*id), Record::Owner(owner));
                    let told = Record::Inventory(Box::new(inventory(Vec::new())));
                    draft.put(RecordKey::Inventory(*id), told);
                }
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        (fleet, ids)
    }

    fn three() -> Quota {
        Quota {
            vms: Some(3),
            ..Quota::default()
        }
    }

    #[tokio::test]
    async fn what_is_on_its_way_counts_until_it_fails_or_is_told_of() {
        let (fleet, hosts) = fleet(three(), Quota::default(), &["a"]).await;
        let admission = Admission::new(Arc::clone(&fleet));
        let alice = caller("alice");
        let first = admission.anywhere(&alice, &wanted(None)).unwrap();
        let second = admission.anywhere(&alice, &wanted(None)).unwrap();
        let third = admission.on_host(&alice, hosts[0], "web", Demand::default());
        let third = third.unwrap();
        assert_eq!(admission.used_by_tenant(&tenant()).vms, 3);
        let error = admission.anywhere(&alice, &wanted(None)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::QuotaExceeded);
        assert_eq!(error.cause(), Some("4 of 3 VMs"));

        // One whose call failed gives its room back.
        drop(third);
        let third = admission.anywhere(&alice, &wanted(None)).unwrap();

        // Those that are told of are counted once.
        let (one, two) = (VmId::random(), VmId::random());
        first.reserved.unwrap().keep(Some(one.to_string()));
        second.reserved.unwrap().keep(Some(two.to_string()));
        let told = inventory(vec![vm(one, "acme/alice"), vm(two, "acme/alice")]);
        fleet.live(hosts[0]).set_linked(true);
        fleet.set_inventory(hosts[0], told);
        assert_eq!(admission.used_by_tenant(&tenant()).vms, 3);
        assert_eq!(admission.used_by_user(&tenant(), "acme/alice").vms, 3);
        assert_eq!(admission.used_by_user(&tenant(), "acme/bob").vms, 0);
        drop(third);
        assert_eq!(admission.used_by_tenant(&tenant()).vms, 2);
        assert_eq!(
            admission.used_by_tenant(&tenant()).demand.memory,
            ByteSize::from_gib(4)
        );
    }

    #[tokio::test]
    async fn many_at_once_never_get_more_than_the_quota() {
        let (fleet, _) = fleet(three(), Quota::default(), &["a", "b"]).await;
        let admission = Arc::new(Admission::new(fleet));
        let attempts = (0..32).map(|_| {
            let admission = Arc::clone(&admission);
            std::thread::spawn(move || admission.anywhere(&caller("alice"), &wanted(None)).ok())
        });
        let attempts: Vec<_> = attempts.collect();
        let admitted: Vec<_> = attempts
            .into_iter()
            .filter_map(|one| one.join().unwrap())
            .collect();
        assert_eq!(admitted.len(), 3);
    }

    /// Two replicas on the same records, each with an admission of its own.
    #[tokio::test]
    async fn two_replicas_at_once_never_admit_more_than_the_quota() {
        let shared = Arc::new(SharedMemory::default());
        let one = MemoryStore::shared(&shared);
        let (fleet, hosts) = fleet_on(one, three(), Quota::default(), &["a", "b"]).await;
        let other = Fleet::start(MemoryStore::shared(&shared), Arc::new(SystemClock::new()));
        let other = other.await.unwrap();
        let admissions = [Admission::new(Arc::clone(&fleet)), Admission::new(other)];
        let alice = caller("alice");
        let attempts = (0..24).map(|number| {
            let (admission, alice) = (&admissions[number % 2], &alice);
            async move {
                let wanted = Wanted {
                    name: format!("web-{number}"),
                    ..wanted(None)
                };
                let admitted = admission.anywhere(alice, &wanted)?;
                admission.hold(alice, admitted.reserved).await
            }
        });
        let (mut held, mut refused) = (Vec::new(), 0);
        for outcome in futures::future::join_all(attempts).await {
            match outcome {
                Ok(reserved) => held.push(reserved.unwrap()),
                Err(error) => {
                    assert_eq!(error.code(), ErrorCode::QuotaExceeded);
                    refused += 1;
                }
            }
        }
        assert_eq!((held.len(), refused), (3, 21));

        // What one replica gives back the other one may have.
        drop(held.pop());
        let again = async || {
            for admission in &admissions {
                if let Ok(admitted) = admission.anywhere(&alice, &wanted(None))
                    && let Ok(reserved) = admission.hold(&alice, admitted.reserved).await
                {
                    return reserved;
                }
            }
            None
        };
        let got = loop {
            if let Some(reserved) = again().await {
                break reserved;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        // What a host tells of is counted once, and its reservation goes with the next one.
        got.keep(None);
        let name = fleet.read(|state| state.room(&tenant())[2].clone());
        let mut told = inventory(vec![VmSummary {
            name: name.name.clone(),
            ..vm(VmId::random(), "acme/alice")
        }]);
        told.at = fleet.clock().now();
        fleet
            .transact(|state| {
                let mut draft = state.draft();
                let record = Record::Inventory(Box::new(told.clone()));
                draft.put(RecordKey::Inventory(name.host), record);
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        let usage = fleet.read(|state| {
            let open: Vec<HeldRoom> = state
                .room(&tenant())
                .iter()
                .filter(|one| !is_told(state, one))
                .cloned()
                .collect();
            stored(state, &tenant(), &open, None)
        });
        assert_eq!(usage.vms, 3);
        assert!(hosts.contains(&name.host));
    }

    #[tokio::test]
    async fn users_have_their_own_limit() {
        let (fleet, _) = fleet(Quota::default(), three(), &["a", "b"]).await;
        let admission = Admission::new(fleet);
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(admission.anywhere(&caller("alice"), &wanted(None)).unwrap());
        }
        let error = admission.anywhere(&caller("alice"), &wanted(None));
        let error = error.unwrap_err();
        assert!(error.message().contains("acme/alice"), "{error}");
        admission.anywhere(&caller("bob"), &wanted(None)).unwrap();
    }

    #[tokio::test]
    async fn reservations_spread_and_a_repeated_request_stays_where_it_went() {
        let (fleet, _) = fleet(Quota::default(), Quota::default(), &["a", "b"]).await;
        let admission = Admission::new(fleet);
        let alice = caller("alice");
        let send = async |caller: &Caller, id: &str| {
            let wanted = wanted(Some(id));
            let admitted = admission.anywhere(caller, &wanted).unwrap();
            admission.send(caller, &wanted, admitted).await.unwrap()
        };
        let first = send(&alice, "r-1").await;
        assert_eq!(first.placed.name, "a");
        let second = send(&alice, "r-2").await;
        assert_eq!(second.placed.name, "b");
        let again = send(&alice, "r-1").await;
        assert_eq!(again.host, first.host);
        assert!(again.reserved.is_none());
        // Another caller's key is another key.
        let other = send(&caller("bob"), "r-1").await;
        assert!(other.reserved.is_some());
        // One that never arrived may go elsewhere, once that is certain of every attempt.
        admission.forget(&alice, "r-1").await;
        assert!(send(&alice, "r-1").await.reserved.is_none());
        admission.forget(&alice, "r-1").await;
        admission.forget(&alice, "r-1").await;
        assert!(send(&alice, "r-1").await.reserved.is_some());
    }

    #[tokio::test]
    async fn a_repeated_request_goes_to_the_same_host_whichever_replica_is_asked() {
        let shared = Arc::new(SharedMemory::default());
        let store = MemoryStore::shared(&shared);
        let none = Quota::default();
        let (_owner, _) = fleet_on(store, none, none, &["a", "b"]).await;
        let alice = caller("alice");
        let replica = async || {
            let store = MemoryStore::shared(&shared);
            let clock = Arc::new(SystemClock::new());
            Admission::new(Fleet::start(store, clock).await.unwrap())
        };
        let (one, two) = (replica().await, replica().await);
        let wanted = wanted(Some("r-1"));
        // Both are asked before either knows of the other.
        let (here, there) = (
            one.anywhere(&alice, &wanted).unwrap(),
            // Something else that came first here makes this one choose another host.
            {
                let _taken = two.anywhere(
                    &caller("bob"),
                    &super::Wanted {
                        request_id: None,
                        ..wanted.clone()
                    },
                );
                two.anywhere(&alice, &wanted).unwrap()
            },
        );
        let (first, second) = tokio::join!(
            one.send(&alice, &wanted, here),
            two.send(&alice, &wanted, there)
        );
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!(first.host, second.host);
        let held = [&first, &second].map(|one| one.reserved.is_some());
        assert_eq!(
            held.iter().filter(|held| **held).count(),
            1,
            "the room is held once"
        );
        // And one that is started only now.
        let late = replica().await;
        let again = late.anywhere(&alice, &wanted).unwrap();
        let again = late.send(&alice, &wanted, again).await.unwrap();
        assert_eq!(again.host, first.host);
        assert!(again.reserved.is_none());
        // One attempt that failed for certain says nothing of the other two.
        two.forget(&alice, "r-1").await;
        two.forget(&alice, "r-1").await;
        let again = one.anywhere(&alice, &wanted).unwrap();
        assert!(
            one.send(&alice, &wanted, again)
                .await
                .unwrap()
                .reserved
                .is_none()
        );
    }

    #[tokio::test]
    async fn what_is_remembered_of_requests_ends_and_is_cleared_away() {
        let (fleet, _) = fleet(Quota::default(), Quota::default(), &["a"]).await;
        let admission = Admission::new(Arc::clone(&fleet));
        let alice = caller("alice");
        let host = admission.anywhere(&alice, &wanted(None)).unwrap().host;
        let old = |number: u128| {
            (
                Uuid::from_u128(number),
                SentCreate {
                    host,
                    attempts: 1,
                    until: Timestamp::from_unix_millis(1000),
                },
            )
        };
        fleet
            .transact(|state| {
                let mut draft = state.draft();
                for (id, sent) in (0..20).map(old) {
                    draft.put(RecordKey::Sent(id), Record::Sent(sent));
                }
                let over = SentCreate { ..old(0).1 };
                draft.put(RecordKey::Sent(sent_as(&alice, "r-1")), Record::Sent(over));
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        for number in 1..=4 {
            let wanted = wanted(Some(&format!("r-{number}")));
            let admitted = admission.anywhere(&alice, &wanted).unwrap();
            let sent = admission.send(&alice, &wanted, admitted).await.unwrap();
            assert!(sent.reserved.is_some(), "r-1 is over, the others are new");
        }
        fleet.read(|state| {
            assert_eq!(state.all_sent().len(), 4);
            assert!(state.sent(sent_as(&alice, "r-1")).is_some());
        });
    }
}
