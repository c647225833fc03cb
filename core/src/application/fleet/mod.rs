//! The fleet in memory: all records of all hosts, fed by what the store says has changed.
//!
//! ```text
//! use case ──transact──> decide on the state ──conditions, writes──> FleetStore
//!     ^                        ^                                         │
//!     └── returns once ────────┴── FleetState <──────── watch ───────────┘
//!         memory shows it              └──> HostWatch, LiveHost::changed
//! ```
//!
//! - Reads cost no input or output. Nobody holds the lock across an await: [`Fleet::read`] takes a
//!   closure, and large values are behind [`Arc`].
//! - A write is decided on the state as it is, and takes effect only where that still holds in the
//!   store, whichever replica came between; otherwise it is decided again.
//! - Memory follows the store alone, its own writes included, so that all replicas see the same
//!   changes in the same order.

mod changes;
mod live;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use ghost_domain::ports::Clock;
use ghost_domain::{Error, ErrorCode, HostId, Monotonic, Result, TenantName, Timestamp};
use parking_lot::RwLock;
use tokio::sync::{Notify, broadcast, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use changes::{HostChanges, HostWatch};
pub use live::LiveHost;
pub use state::{Decision, Draft, FleetState};

use crate::domain::ports::{Committed, Condition, FleetStore, RecordChange};
use crate::domain::{
    HeldRoom, HostHealth, HostRecord, HostState, Inventory, LinkTruth, Ownership, Quota, Record,
    RecordKey, Tenant, shown_state,
};
use state::Touched;

/// So often a change is decided anew where others came between.
const MOST_ATTEMPTS: u32 = 32;
/// How long memory may take to show what the store has acknowledged. Longer only while the watch is
/// lost; the change has taken effect either way.
const CATCH_UP: Duration = Duration::from_secs(10);
/// After a conflict that memory does not explain for so long, all is loaded anew.
const UNEXPLAINED: Duration = Duration::from_secs(2);
/// Changes of hosts that are kept for a slow watcher before it is told to look at all.
const KEPT_CHANGES: usize = 1024;
/// How often the shown states are looked at: silence is no event.
const LOOK: Duration = Duration::from_secs(1);
/// Waits between attempts to reach the store.
const RETRY: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// What is shown of a host.
#[derive(Clone, Debug)]
pub struct HostView {
    /// Its record.
    pub record: Arc<HostRecord>,
    /// What it last said of itself.
    pub inventory: Option<Arc<Inventory>>,
    /// Its state.
    pub state: HostState,
    /// Why it is not `online`.
    pub reason: String,
    /// Since when this process has shown this state.
    pub since: Option<Timestamp>,
    /// Who has its link.
    pub owner: Option<Ownership>,
    /// When it was last heard, as far as this replica knows.
    pub last_heard_at: Option<Timestamp>,
    /// The round trip of its last ping, where its link is here.
    pub round_trip: Option<Duration>,
    /// Commands that have not ended.
    pub open_commands: usize,
}

/// A host in a list of VMs: what is told of each of ten thousand, and no more.
#[derive(Clone, Debug)]
pub struct ToldHost {
    /// Its record.
    pub record: Arc<HostRecord>,
    /// What it last said of itself.
    pub inventory: Arc<Inventory>,
    /// Its state.
    pub state: HostState,
    /// When it was last heard, as far as this replica knows.
    pub last_heard_at: Option<Timestamp>,
}

/// What all links are held against at a moment: looked up once for all hosts of a list.
struct Moment {
    now: Monotonic,
    behind: Option<Duration>,
    intervals: Intervals,
}

/// The fleet.
pub struct Fleet {
    store: Arc<dyn FleetStore>,
    clock: Arc<dyn Clock>,
    state: RwLock<FleetState>,
    live: RwLock<HashMap<HostId, Arc<LiveHost>>>,
    revision: watch::Sender<u64>,
    hosts_changed: broadcast::Sender<Arc<HashSet<HostId>>>,
    intervals: RwLock<Intervals>,
    /// Since when memory may be behind the store.
    behind_since: RwLock<Option<Monotonic>>,
    reload: Arc<Notify>,
    stopped: CancellationToken,
}

/// How often hosts should be heard.
#[derive(Clone, Copy, Debug)]
struct Intervals {
    ping: Duration,
    heartbeat: Duration,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet")
            .field("revision", &self.state.read().revision())
            .finish_non_exhaustive()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stopped.cancel();
    }
}

impl Fleet {
    /// Loads all records, follows the store's changes from there, and makes what every Core has: an
    /// identity, an epoch and the tenant `default`. The epoch rises with each start, because the
    /// records may have been put back from a copy: to the time of the start in milliseconds, so that
    /// it is beyond whatever hosts saw before that copy was put back.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn start(store: Arc<dyn FleetStore>, clock: Arc<dyn Clock>) -> Result<Arc<Self>> {
        let (revision, records) = store.load().await?;
        let stream = store.watch(revision).await?;
        let mut state = FleetState::of(store.is_shared());
        state.replace(revision, records, &mut Touched::default());
        let fleet = Arc::new(Self {
            store,
            clock,
            state: RwLock::new(state),
            live: RwLock::default(),
            revision: watch::Sender::new(revision),
            hosts_changed: broadcast::Sender::new(KEPT_CHANGES),
            intervals: RwLock::new(Intervals {
                ping: Duration::from_secs(5),
                heartbeat: Duration::from_secs(30),
            }),
            behind_since: RwLock::new(None),
            reload: Arc::default(),
            stopped: CancellationToken::new(),
        });
        let stopped = fleet.stopped.clone();
        let reload = Arc::clone(&fleet.reload);
        tokio::spawn(follow(
            Arc::downgrade(&fleet),
            reload,
            stopped.clone(),
            stream,
        ));
        tokio::spawn(look(Arc::downgrade(&fleet), stopped));
        fleet.found().await?;
        Ok(fleet)
    }

    /// Makes what every Core has.
    async fn found(&self) -> Result<()> {
        let name = TenantName::new(TenantName::DEFAULT)?;
        let now = self.clock.now();
        self.transact(move |state| {
            let mut draft = state.draft();
            if state.core_id().is_empty() {
                let id = Record::CoreId(Uuid::new_v4().to_string());
                draft.put(RecordKey::CoreId, id);
            }
            let millis = u64::try_from(now.unix_millis()).unwrap_or_default();
            let next = state.epoch().saturating_add(1).max(millis);
            draft.put(RecordKey::Epoch, Record::Epoch(next));
            if state.tenants().len() == 0 {
                let tenant = Tenant {
                    name: name.clone(),
                    quota: Quota::default(),
                    user_quota: Quota::default(),
                    created_at: now,
                };
                draft.put(RecordKey::Tenant(name.clone()), Record::Tenant(tenant));
            }
            Ok(draft.done(()))
        })
        .await
    }

    /// Notes which CA signs for this Core. Once noted it stays: another one would shut out all hosts
    /// and people, and a replica with a CA of its own would hand out what the others refuse.
    ///
    /// # Errors
    /// `IoFailed` where the records know of another CA; `StoreUnavailable`.
    pub async fn hold_authority(&self, fingerprint: &str) -> Result<()> {
        self.transact(|state| {
            let mut draft = state.draft();
            match state.authority() {
                Some(known) if known == fingerprint => {}
                None => {
                    let record = Record::Authority(fingerprint.to_owned());
                    draft.put(RecordKey::Authority, record);
                }
                Some(known) => {
                    return Err(Error::new(
                        ErrorCode::IoFailed,
                        "the CA in the data directory is not the one of these records",
                    )
                    .because(format!(
                        "the records know {known}, and the directory holds {fingerprint}"
                    ))
                    .hint("copy the folder `identity` of the first replica, or of a backup, into this data directory"));
                }
            }
            Ok(draft.done(()))
        })
        .await
    }

    /// How often hosts should be heard, by the configuration; the shown states depend on it.
    pub fn set_intervals(&self, ping: Duration, heartbeat: Duration) {
        *self.intervals.write() = Intervals { ping, heartbeat };
    }

    /// The store behind.
    pub fn store(&self) -> &Arc<dyn FleetStore> {
        &self.store
    }

    /// The clock.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Ends the tasks that follow the store. Memory stays as it is.
    pub fn stop(&self) {
        self.stopped.cancel();
    }

    /// Looks at the records. Keep it short: writers wait.
    pub fn read<T>(&self, look: impl FnOnce(&FleetState) -> T) -> T {
        look(&self.state.read())
    }

    /// Changes records: `decide` says what must hold, what is written and what the caller gets
    /// ([`FleetState::draft`] writes the conditions by itself). It is called again where another
    /// change came between, and must have no effects of its own. When this returns, the change is
    /// durable and memory shows it.
    ///
    /// # Errors
    /// What `decide` says; `StoreUnavailable`; `TooManyRequests` where others change the same
    /// records so often that this one never comes in between.
    pub async fn transact<T>(
        &self,
        mut decide: impl FnMut(&FleetState) -> Result<Decision<T>>,
    ) -> Result<T> {
        for attempt in 0..MOST_ATTEMPTS {
            let (conditions, writes, value) = decide(&self.state.read())?;
            if writes.is_empty() {
                return Ok(value);
            }
            match self.store.commit(conditions.clone(), writes).await? {
                Committed::Done(revision) => {
                    self.shows(revision).await;
                    return Ok(value);
                }
                Committed::Conflict => self.explained(&conditions, attempt).await,
            }
        }
        Err(Error::new(
            ErrorCode::TooManyRequests,
            "others are changing the same records all the time",
        )
        .retry_after(Duration::from_secs(1)))
    }

    /// Waits until memory shows a revision.
    async fn shows(&self, revision: u64) {
        let mut seen = self.revision.subscribe();
        let shown = seen.wait_for(|seen| *seen >= revision);
        if !matches!(tokio::time::timeout(CATCH_UP, shown).await, Ok(Ok(_))) {
            tracing::warn!(revision, "memory does not show a change that the store has");
            self.reload.notify_one();
        }
    }

    /// Waits until memory shows why a commit met a conflict.
    async fn explained(&self, conditions: &[Condition], attempt: u32) {
        let mut seen = self.revision.subscribe();
        let explained = async {
            loop {
                seen.borrow_and_update();
                let holds = {
                    let state = self.state.read();
                    conditions.iter().all(|one| state.holds(one))
                };
                if !holds || seen.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(UNEXPLAINED, explained).await.is_err() {
            self.reload.notify_one();
        }
        if attempt >= 3 {
            // Whoever lost several times steps out of the others' pace.
            let most = 1u64 << attempt.min(8);
            let pause = rand::random_range(0..=most);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// For how long memory may have been behind the store; `None`: it follows.
    pub fn behind_for(&self) -> Option<Duration> {
        let since = (*self.behind_since.read())?;
        Some(self.clock.monotonic().since(since))
    }

    /// Changes of hosts and of their queues from now on.
    pub fn watch_hosts(&self) -> HostWatch {
        HostWatch {
            receiver: self.hosts_changed.subscribe(),
        }
    }

    /// What is known of a host at this moment; made at the first call.
    pub fn live(&self, host: HostId) -> Arc<LiveHost> {
        if let Some(live) = self.live.read().get(&host) {
            return Arc::clone(live);
        }
        let mut all = self.live.write();
        Arc::clone(
            all.entry(host)
                .or_insert_with(|| Arc::new(LiveHost::new(host))),
        )
    }

    fn known(&self, host: HostId) -> Option<Arc<LiveHost>> {
        self.live.read().get(&host).cloned()
    }

    /// What a host last said of itself: to this replica, or to whichever stored it.
    pub fn inventory(&self, host: HostId) -> Option<Arc<Inventory>> {
        self.known(host)
            .filter(|live| live.is_linked())
            .and_then(|live| live.inventory())
            .or_else(|| self.state.read().inventory(host).cloned())
    }

    /// What all hosts last said of themselves, with their tenants: only pointers are copied, so that
    /// a reader of all VMs of all hosts holds nobody up.
    pub fn inventories(&self) -> Vec<(TenantName, Arc<Inventory>)> {
        let live = self.live.read();
        let state = self.state.read();
        state
            .hosts()
            .filter_map(|host| {
                let here = live.get(&host.id).filter(|live| live.is_linked());
                let inventory = here
                    .and_then(|live| live.inventory())
                    .or_else(|| state.inventory(host.id).cloned())?;
                Some((host.tenant.clone(), inventory))
            })
            .collect()
    }

    /// A host that is linked here said this of itself. Memory shows it at once; it is stored only
    /// where [`Inventory`] differs in what matters after a restart: [`Self::keep_inventory`].
    pub fn set_inventory(&self, host: HostId, inventory: Inventory) {
        self.live(host).set_inventory(Some(Arc::new(inventory)));
        self.tell(HashSet::from([host]));
    }

    /// Stores what a host said of itself where it differs from what is stored in more than load and
    /// free memory. Only the newest counts, so that nothing is decided anew.
    ///
    /// # Errors
    /// `StoreUnavailable`.
    pub async fn keep_inventory(&self, host: HostId) -> Result<()> {
        let Some(newest) = self.known(host).and_then(|live| live.inventory()) else {
            return Ok(());
        };
        self.transact(|state| {
            let mut draft = state.draft();
            let stored = state.inventory(host);
            let same = stored.is_some_and(|stored| same_after_restart(stored, &newest));
            if !same && state.host(host).is_some() {
                let record = Record::Inventory(Box::new(Inventory::clone(&newest)));
                // Against a removal of the host in the same moment.
                draft.unchanged(&RecordKey::Host(host));
                draft.put(RecordKey::Inventory(host), record);
                // Once told of, a VM is counted by that alone, also when it is gone again.
                if let Some(owner) = state.host(host) {
                    let held = state.room(&owner.tenant);
                    let told = |one: &HeldRoom| one.host == host && one.is_told(&newest);
                    if held.iter().any(told) {
                        let left = held.iter().filter(|one| !told(one)).cloned().collect();
                        let key = RecordKey::Room(owner.tenant.clone());
                        draft.put(key, Record::Room(left));
                    }
                }
            }
            Ok(draft.done(()))
        })
        .await
    }

    /// A host as it is shown.
    pub fn host_view(&self, id: HostId) -> Option<HostView> {
        let live = self.known(id);
        let moment = self.moment();
        let state = self.state.read();
        let record = state.host(id)?;
        Some(view(&moment, &state, record, live.as_deref()))
    }

    /// The hosts that `wanted` picks as they are shown, in the order of their ids.
    pub fn host_views(&self, wanted: impl Fn(&HostRecord) -> bool) -> Vec<HostView> {
        let moment = self.moment();
        let live = self.live.read();
        let state = self.state.read();
        state
            .hosts()
            .filter(|record| wanted(record))
            .map(|record| {
                let live = live.get(&record.id).map(AsRef::as_ref);
                view(&moment, &state, record, live)
            })
            .collect()
    }

    /// The hosts that `wanted` picks and that ever told of VMs, by tenant and name; only pointers
    /// are copied.
    pub fn told_hosts(&self, wanted: impl Fn(&HostRecord) -> bool) -> Vec<ToldHost> {
        let moment = self.moment();
        let live = self.live.read();
        let state = self.state.read();
        let wanted = state.hosts_by_name().filter(|record| wanted(record));
        wanted
            .filter_map(|record| {
                let live = live.get(&record.id).map(AsRef::as_ref);
                told_host(&moment, &state, record, live)
            })
            .collect()
    }

    /// One host of such a list.
    pub fn told_host(&self, id: HostId) -> Option<ToldHost> {
        let live = self.known(id);
        let moment = self.moment();
        let state = self.state.read();
        let record = state.host(id)?;
        told_host(&moment, &state, record, live.as_deref())
    }

    fn moment(&self) -> Moment {
        Moment {
            now: self.clock.monotonic(),
            behind: self.behind_for(),
            intervals: *self.intervals.read(),
        }
    }

    fn tell(&self, hosts: HashSet<HostId>) {
        // Nobody may be watching.
        let _ = self.hosts_changed.send(Arc::new(hosts));
    }

    fn announce(&self, touched: Touched, revision: u64) {
        if !touched.is_empty() {
            let live = self.live.read();
            for host in touched.hosts.union(&touched.queues) {
                if let Some(live) = live.get(host) {
                    live.wake();
                }
            }
        }
        self.revision.send_replace(revision);
        if !touched.is_empty() {
            self.forget_removed(&touched.hosts);
            let mut changed = touched.hosts;
            changed.extend(touched.queues);
            self.tell(changed);
        }
    }

    /// A host that is gone needs no memory, once nobody holds its link.
    fn forget_removed(&self, hosts: &HashSet<HostId>) {
        let gone: Vec<HostId> = {
            let state = self.state.read();
            let gone = hosts.iter().filter(|id| state.host(**id).is_none());
            gone.copied().collect()
        };
        if !gone.is_empty() {
            let mut live = self.live.write();
            for id in gone {
                if live.get(&id).is_some_and(|live| !live.is_linked()) {
                    live.remove(&id);
                }
            }
        }
    }

    fn take_in(&self, changes: Vec<RecordChange>) {
        let mut touched = Touched::default();
        let revision = {
            let mut state = self.state.write();
            for change in changes {
                state.apply(change, &mut touched);
            }
            state.revision()
        };
        self.announce(touched, revision);
    }

    /// Loads all records anew and goes on from there.
    async fn resume(&self) -> Result<BoxStream<'static, Vec<RecordChange>>> {
        let (revision, records) = self.store.load().await?;
        let stream = self.store.watch(revision).await?;
        let mut touched = Touched::default();
        self.state.write().replace(revision, records, &mut touched);
        self.announce(touched, revision);
        *self.behind_since.write() = None;
        Ok(stream)
    }

    /// Looks at all shown states and tells of those that changed.
    fn look(&self) {
        let now = self.clock.now();
        let mut changed = HashSet::new();
        {
            let moment = self.moment();
            let live = self.live.read();
            let state = self.state.read();
            for (id, live) in live.iter() {
                let Some(record) = state.host(*id) else {
                    continue;
                };
                let truth = moment.truth(state.owner(*id).is_some(), Some(live));
                let inventory = live.inventory().filter(|_| live.is_linked());
                let health = inventory
                    .as_deref()
                    .or(state.inventory(*id).map(AsRef::as_ref))
                    .map(|inventory| &inventory.health);
                let (shown, _) = shown(record, &truth, health, Some(live));
                if live.show(shown, now) {
                    changed.insert(*id);
                }
            }
        }
        if !changed.is_empty() {
            self.tell(changed);
        }
    }
}

impl Moment {
    fn truth(&self, owned: bool, live: Option<&LiveHost>) -> LinkTruth {
        let here = live.filter(|live| live.is_linked());
        LinkTruth {
            linked: owned || here.is_some(),
            // Of a link at another replica only its owner knows more; it gives a silent one up. What
            // is told of that is as old as memory is.
            silent_for: match here {
                Some(live) => live.silent_for(self.now),
                None => self.behind,
            }
            .unwrap_or_default(),
            ping_interval: self.intervals.ping,
            heartbeat_interval: self.intervals.heartbeat,
        }
    }
}

fn view(
    moment: &Moment,
    state: &FleetState,
    record: &Arc<HostRecord>,
    live: Option<&LiveHost>,
) -> HostView {
    let owner = state.owner(record.id).cloned();
    let here = live.filter(|live| live.is_linked());
    let inventory = here
        .and_then(LiveHost::inventory)
        .or_else(|| state.inventory(record.id).cloned());
    let truth = moment.truth(owner.is_some(), live);
    let health = inventory.as_deref().map(|inventory| &inventory.health);
    let (shown, reason) = shown(record, &truth, health, live);
    HostView {
        record: Arc::clone(record),
        inventory,
        state: shown,
        reason,
        since: live.and_then(|live| live.shown_since(shown)),
        owner,
        last_heard_at: live.and_then(LiveHost::heard_at).max(record.last_heard_at),
        round_trip: here.and_then(LiveHost::round_trip),
        open_commands: state.open_commands(record.id).count(),
    }
}

fn told_host(
    moment: &Moment,
    state: &FleetState,
    record: &Arc<HostRecord>,
    live: Option<&LiveHost>,
) -> Option<ToldHost> {
    let inventory = live
        .filter(|live| live.is_linked())
        .and_then(LiveHost::inventory)
        .or_else(|| state.inventory(record.id).cloned())?;
    let truth = moment.truth(state.owner(record.id).is_some(), live);
    let (shown, _) = shown(record, &truth, Some(&inventory.health), live);
    Some(ToldHost {
        record: Arc::clone(record),
        state: shown,
        last_heard_at: live.and_then(LiveHost::heard_at).max(record.last_heard_at),
        inventory,
    })
}

/// The state to show: what the records and the link say, and whether this process heard the host
/// although no record tells of it yet.
fn shown(
    record: &HostRecord,
    truth: &LinkTruth,
    health: Option<&HostHealth>,
    live: Option<&LiveHost>,
) -> (HostState, String) {
    match shown_state(record, truth, health) {
        (HostState::NeverSeen, _) if live.is_some_and(|live| live.heard_at().is_some()) => {
            (HostState::Offline, "it has no link".into())
        }
        other => other,
    }
}

/// Whether a restart of Core would lose nothing of weight if `newer` were not stored.
fn same_after_restart(stored: &Inventory, newer: &Inventory) -> bool {
    let Inventory {
        vms,
        total,
        allocatable,
        committed,
        memory_available: _,
        load_one_minute: _,
        health,
        at: _,
    } = stored;
    // Free disk space moves by itself.
    let total_but_free =
        |total: &ghost_domain::HostResources| (total.cpus, total.memory, total.disk);
    *vms == newer.vms
        && total_but_free(total) == total_but_free(&newer.total)
        && allocatable.cpus == newer.allocatable.cpus
        && allocatable.memory == newer.allocatable.memory
        && *committed == newer.committed
        && *health == newer.health
}

/// Takes in the store's changes until the fleet ends; loads all anew where they cannot be had.
async fn follow(
    fleet: Weak<Fleet>,
    reload: Arc<Notify>,
    stopped: CancellationToken,
    mut stream: BoxStream<'static, Vec<RecordChange>>,
) {
    let mut wait = RETRY;
    loop {
        let changes = tokio::select! {
            () = stopped.cancelled() => return,
            changes = stream.next() => changes,
            () = reload.notified() => None,
        };
        let Some(fleet) = fleet.upgrade() else {
            return;
        };
        if let Some(changes) = changes {
            fleet.take_in(changes);
            wait = RETRY;
            continue;
        }
        fleet
            .behind_since
            .write()
            .get_or_insert(fleet.clock.monotonic());
        loop {
            let resumed = tokio::select! {
                () = stopped.cancelled() => return,
                resumed = fleet.resume() => resumed,
            };
            match resumed {
                Ok(fresh) => {
                    stream = fresh;
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "the fleet's records cannot be read; what is shown may be out of date");
                }
            }
            tokio::select! {
                () = stopped.cancelled() => return,
                () = tokio::time::sleep(wait) => wait = (wait * 2).min(LONGEST_RETRY),
            }
        }
    }
}

async fn look(fleet: Weak<Fleet>, stopped: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stopped.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let Some(fleet) = fleet.upgrade() else {
            return;
        };
        fleet.look();
    }
}
