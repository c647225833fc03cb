//! What happens in the fleet, told to whoever watches.
//!
//! Nothing writes events: they are the differences between what the records and links said before and
//! what they say now, so that no way of changing a host, a command or a VM can forget to tell. Every
//! replica finds them by itself, over the same records.
//!
//! The newest [`KEPT`] are remembered for each tenant, and as many over all of them. A tenant's events
//! are numbered by themselves: a gap would tell of others. Whoever reads more slowly than things happen
//! is told how many it missed, and holds nobody up.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Weak};

use ghost_domain::{CommandId, HostId, TenantName, Timestamp};
use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

use super::fleet::{Fleet, HostChanges, HostView, HostWatch};
use crate::domain::{FleetEvent, FleetEventKind, HostLife, HostState, Inventory, QueuedCommand};

/// So many events are remembered for a tenant, and over all of them.
pub const KEPT: usize = 1000;

/// The events of one tenant, or of all.
#[derive(Debug)]
struct Ring {
    /// The number of the next one.
    next: u64,
    kept: VecDeque<Arc<FleetEvent>>,
}

impl Default for Ring {
    fn default() -> Self {
        Self {
            next: 1,
            kept: VecDeque::new(),
        }
    }
}

impl Ring {
    fn push(&mut self, event: Arc<FleetEvent>) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event);
        self.next += 1;
    }

    /// The number of the oldest one that is kept.
    fn first(&self) -> u64 {
        self.next - self.kept.len() as u64
    }

    fn get(&self, number: u64) -> Option<&Arc<FleetEvent>> {
        let at = usize::try_from(number.checked_sub(self.first())?).ok()?;
        self.kept.get(at)
    }
}

#[derive(Debug, Default)]
struct Rings {
    all: Ring,
    tenants: HashMap<TenantName, Ring>,
}

impl Rings {
    fn of(&self, tenant: Option<&TenantName>) -> Option<&Ring> {
        match tenant {
            None => Some(&self.all),
            Some(tenant) => self.tenants.get(tenant),
        }
    }
}

/// The events of this replica's run.
#[derive(Debug)]
pub struct Chronicle {
    run: String,
    rings: Mutex<Rings>,
    grown: watch::Sender<u64>,
}

/// An event as a watcher gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenEvent {
    /// Rises by one among those that the watcher may see, tenant by tenant.
    pub sequence: u64,
    /// So many before it were not kept long enough.
    pub missed: u64,
    /// What happened.
    pub event: Arc<FleetEvent>,
}

/// Events from some point on.
#[derive(Debug)]
pub struct EventWatch {
    chronicle: Arc<Chronicle>,
    tenant: Option<TenantName>,
    next: u64,
    grown: watch::Receiver<u64>,
}

impl Chronicle {
    /// Begins to watch a fleet; ends with it. What is there now is no news.
    pub fn start(fleet: &Arc<Fleet>) -> Arc<Self> {
        let chronicle = Arc::new(Self {
            run: Uuid::new_v4().simple().to_string(),
            rings: Mutex::default(),
            grown: watch::Sender::new(0),
        });
        // Watched before the first look, so that nothing falls between.
        let changes = fleet.watch_hosts();
        let mut known = Known::default();
        known.look_at_all(fleet);
        tokio::spawn(follow(
            Arc::downgrade(fleet),
            Arc::clone(&chronicle),
            changes,
            known,
        ));
        chronicle
    }

    /// Tells the numbers of this run from those of another one.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The events of a tenant, or of all: from now on, or those `after` a number that are kept.
    pub fn watch(self: &Arc<Self>, tenant: Option<TenantName>, after: Option<u64>) -> EventWatch {
        // Before the look at the ring, so that none falls between.
        let grown = self.grown.subscribe();
        let rings = self.rings.lock();
        let next = match (rings.of(tenant.as_ref()), after) {
            (Some(ring), None) => ring.next,
            // Of what nobody saw nothing was missed; a number that is yet to come is another run's.
            (Some(ring), Some(after)) if after == 0 || after >= ring.next => ring.first(),
            (Some(_), Some(after)) => after + 1,
            (None, _) => 1,
        };
        drop(rings);
        EventWatch {
            chronicle: Arc::clone(self),
            tenant,
            next,
            grown,
        }
    }

    fn tell(&self, events: Vec<FleetEvent>) {
        if events.is_empty() {
            return;
        }
        {
            let mut rings = self.rings.lock();
            for event in events {
                let event = Arc::new(event);
                let tenant = rings.tenants.entry(event.tenant.clone()).or_default();
                tenant.push(Arc::clone(&event));
                rings.all.push(event);
            }
        }
        self.grown.send_modify(|count| *count += 1);
    }
}

impl EventWatch {
    /// The next event that has happened already; `None` where there is none.
    pub fn replayed(&mut self) -> Option<SeenEvent> {
        let rings = self.chronicle.rings.lock();
        let ring = rings.of(self.tenant.as_ref())?;
        let sequence = self.next.max(ring.first());
        let event = Arc::clone(ring.get(sequence)?);
        let missed = sequence - self.next;
        self.next = sequence + 1;
        Some(SeenEvent {
            sequence,
            missed,
            event,
        })
    }

    /// The next event, once it happens. May be given up and called again without a loss.
    pub async fn next(&mut self) -> Option<SeenEvent> {
        loop {
            self.grown.borrow_and_update();
            if let Some(event) = self.replayed() {
                return Some(event);
            }
            // Never closed: the chronicle that has the sender is held here.
            self.grown.changed().await.ok()?;
        }
    }
}

/// A host as it was told last.
#[derive(Debug)]
struct Told {
    name: String,
    tenant: TenantName,
    state: HostState,
    cordoned: Option<String>,
    inventory: Option<Arc<Inventory>>,
    /// The newest place in its queue that was looked at.
    generation: u64,
    open: BTreeSet<CommandId>,
}

/// What was told last of all hosts.
#[derive(Debug, Default)]
struct Known(HashMap<HostId, Told>);

impl Known {
    fn look_at_all(&mut self, fleet: &Fleet) -> Vec<FleetEvent> {
        let views = fleet.host_views(|_| true);
        let there: HashSet<HostId> = views.iter().map(|view| view.record.id).collect();
        let gone: Vec<HostId> = self
            .0
            .keys()
            .filter(|id| !there.contains(id))
            .copied()
            .collect();
        let now = fleet.clock().now();
        let mut events = Vec::new();
        for id in gone {
            self.look(fleet, id, None, now, &mut events);
        }
        for view in views {
            self.look(fleet, view.record.id, Some(view), now, &mut events);
        }
        events
    }

    /// Compares a host with what was told of it.
    fn look(
        &mut self,
        fleet: &Fleet,
        id: HostId,
        view: Option<HostView>,
        now: Timestamp,
        events: &mut Vec<FleetEvent>,
    ) {
        let view = view.filter(|view| !matches!(view.record.life, HostLife::Revoked { .. }));
        let Some(view) = view else {
            if let Some(told) = self.0.remove(&id) {
                events.push(told.event(id, now, FleetEventKind::HostRemoved));
            }
            return;
        };
        match self.0.entry(id) {
            std::collections::hash_map::Entry::Occupied(mut told) => {
                told.get_mut().compare(fleet, &view, now, events);
            }
            std::collections::hash_map::Entry::Vacant(place) => {
                let reason = view.reason.clone();
                let told = place.insert(Told::of(fleet, view));
                events.push(told.event(id, now, FleetEventKind::HostJoined));
                // It may have come before anybody looked.
                if matches!(told.state, HostState::Online | HostState::Degraded) {
                    let to = told.state;
                    events.push(told.event(id, now, FleetEventKind::HostState { to, reason }));
                }
            }
        }
    }
}

/// The commands of a host that are new since `generation`, oldest first.
fn newer(fleet: &Fleet, host: HostId, generation: u64) -> Vec<Arc<QueuedCommand>> {
    fleet.read(|state| {
        let mut found: Vec<_> = state
            .commands_of(host)
            .rev()
            .take_while(|command| command.generation > generation)
            .cloned()
            .collect();
        found.reverse();
        found
    })
}

impl Told {
    fn of(fleet: &Fleet, view: HostView) -> Self {
        let id = view.record.id;
        let (generation, open) = fleet.read(|state| {
            let newest = state.commands_of(id).next_back();
            let open = state.open_commands(id).map(|command| command.id).collect();
            (newest.map_or(0, |command| command.generation), open)
        });
        Self {
            name: view.record.name.to_string(),
            tenant: view.record.tenant.clone(),
            state: view.state,
            cordoned: view.record.cordoned.clone(),
            inventory: view.inventory,
            generation,
            open,
        }
    }

    fn event(&self, host: HostId, at: Timestamp, kind: FleetEventKind) -> FleetEvent {
        FleetEvent {
            at,
            host,
            host_name: self.name.clone(),
            tenant: self.tenant.clone(),
            kind,
        }
    }

    fn compare(
        &mut self,
        fleet: &Fleet,
        view: &HostView,
        now: Timestamp,
        events: &mut Vec<FleetEvent>,
    ) {
        let id = view.record.id;
        let mut kinds = Vec::new();
        let name = view.record.name.as_str();
        if self.name != name {
            let from = std::mem::replace(&mut self.name, name.to_owned());
            kinds.push(FleetEventKind::HostRenamed { from });
        }
        if self.state != view.state {
            self.state = view.state;
            kinds.push(FleetEventKind::HostState {
                to: view.state,
                reason: view.reason.clone(),
            });
        }
        if self.cordoned != view.record.cordoned {
            self.cordoned.clone_from(&view.record.cordoned);
            kinds.push(match &self.cordoned {
                Some(reason) => FleetEventKind::HostCordoned {
                    reason: reason.clone(),
                },
                None => FleetEventKind::HostUncordoned,
            });
        }
        self.compare_commands(fleet, id, &mut kinds);
        if let Some(inventory) = &view.inventory {
            self.compare_vms(inventory, &mut kinds);
        }
        events.extend(kinds.into_iter().map(|kind| self.event(id, now, kind)));
    }

    fn compare_commands(&mut self, fleet: &Fleet, host: HostId, kinds: &mut Vec<FleetEventKind>) {
        use ghost_domain::fleet::CommandStatus::Queued;
        for command in newer(fleet, host, self.generation) {
            self.generation = command.generation;
            let mut queued = QueuedCommand::clone(&command);
            queued.status = Queued;
            queued.outcome = None;
            kinds.push(told(&queued));
            self.open.insert(command.id);
        }
        let ended: Vec<_> = fleet.read(|state| {
            self.open
                .iter()
                .map(|id| (*id, state.command(*id).cloned()))
                .filter(|(_, command)| {
                    command
                        .as_ref()
                        .is_none_or(|command| command.status.is_finished())
                })
                .collect()
        });
        for (id, command) in ended {
            self.open.remove(&id);
            kinds.extend(command.as_deref().map(told));
        }
    }

    fn compare_vms(&mut self, newer: &Arc<Inventory>, kinds: &mut Vec<FleetEventKind>) {
        let older = match &self.inventory {
            // The first word of a host is no news of its VMs.
            None => {
                self.inventory = Some(Arc::clone(newer));
                return;
            }
            Some(older) if Arc::ptr_eq(older, newer) => return,
            // What is stored may be older than what a link said that is gone.
            Some(older) if newer.at < older.at => return,
            Some(older) => Arc::clone(older),
        };
        self.inventory = Some(Arc::clone(newer));
        for (id, vm) in &older.vms {
            if !newer.vms.contains_key(id) {
                kinds.push(FleetEventKind::VmRemoved {
                    id: *id,
                    name: vm.name.clone(),
                });
            }
        }
        for (id, vm) in &newer.vms {
            match older.vms.get(id) {
                None => kinds.push(FleetEventKind::VmAdded {
                    id: *id,
                    name: vm.name.clone(),
                }),
                Some(before) if before.state != vm.state => kinds.push(FleetEventKind::VmState {
                    id: *id,
                    name: vm.name.clone(),
                    from: before.state,
                    to: vm.state,
                    reason: vm.state_reason.clone(),
                }),
                Some(_) => {}
            }
        }
    }
}

/// A command as an event.
fn told(command: &QueuedCommand) -> FleetEventKind {
    let outcome = command.outcome.as_ref();
    FleetEventKind::Command {
        id: command.id,
        status: command.status,
        action: command.action.kind(),
        subject: command.action.subject().to_owned(),
        message: outcome.map_or_else(String::new, |outcome| outcome.message.clone()),
        operation: outcome.and_then(|outcome| outcome.operation),
    }
}

async fn follow(
    fleet: Weak<Fleet>,
    chronicle: Arc<Chronicle>,
    mut changes: HostWatch,
    mut known: Known,
) {
    while let Some(changed) = changes.next().await {
        let Some(fleet) = fleet.upgrade() else {
            return;
        };
        let events = match changed {
            HostChanges::All => known.look_at_all(&fleet),
            HostChanges::Some(hosts) => {
                let now = fleet.clock().now();
                let mut events = Vec::new();
                for id in hosts {
                    known.look(&fleet, id, fleet.host_view(id), now, &mut events);
                }
                events
            }
        };
        chronicle.tell(events);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chronicle() -> Arc<Chronicle> {
        Arc::new(Chronicle {
            run: "run".into(),
            rings: Mutex::default(),
            grown: watch::Sender::new(0),
        })
    }

    fn event(tenant: &str, name: &str) -> FleetEvent {
        FleetEvent {
            at: Timestamp::default(),
            host: HostId::random(),
            host_name: name.into(),
            tenant: TenantName::new(tenant).unwrap(),
            kind: FleetEventKind::HostJoined,
        }
    }

    fn names(watch: &mut EventWatch) -> Vec<(u64, String)> {
        std::iter::from_fn(|| watch.replayed())
            .map(|seen| (seen.sequence, seen.event.host_name.clone()))
            .collect()
    }

    #[test]
    fn tenants_are_numbered_apart() {
        let chronicle = chronicle();
        let acme = TenantName::new("acme").unwrap();
        chronicle.tell(vec![event("acme", "a"), event("other", "b")]);
        let mut new = chronicle.watch(Some(acme.clone()), None);
        chronicle.tell(vec![event("other", "c"), event("acme", "d")]);
        let told = |name: &str, number| (number, name.to_owned());
        assert_eq!(names(&mut new), [told("d", 2)]);
        let mut all = chronicle.watch(Some(acme.clone()), Some(0));
        assert_eq!(names(&mut all), [told("a", 1), told("d", 2)]);
        let mut root = chronicle.watch(None, Some(2));
        assert_eq!(names(&mut root), [told("c", 3), told("d", 4)]);
        // A number that this run has not come to yet is another run's.
        let mut again = chronicle.watch(Some(acme), Some(3));
        assert_eq!(names(&mut again).len(), 2);
        let nobody = TenantName::new("nobody").unwrap();
        let mut first = chronicle.watch(Some(nobody), None);
        assert!(first.replayed().is_none());
        chronicle.tell(vec![event("nobody", "e")]);
        assert_eq!(names(&mut first), [told("e", 1)]);
    }

    #[tokio::test]
    async fn a_slow_watcher_is_told_how_many_it_missed_and_holds_nobody_up() {
        let chronicle = chronicle();
        let mut watch = chronicle.watch(None, None);
        for number in 0..KEPT + 7 {
            chronicle.tell(vec![event("acme", &format!("{number}"))]);
        }
        let first = watch.next().await.unwrap();
        assert_eq!((first.sequence, first.missed), (8, 7));
        assert_eq!(first.event.host_name, "7");
        let second = watch.next().await.unwrap();
        assert_eq!((second.sequence, second.missed), (9, 0));
        assert_eq!(names(&mut watch).len(), KEPT - 2);
        // It waits for what is to come, and loses nothing when it is given up meanwhile.
        assert!(futures::FutureExt::now_or_never(watch.next()).is_none());
        chronicle.tell(vec![event("acme", "new")]);
        assert_eq!(watch.next().await.unwrap().event.host_name, "new");
        // Whoever comes back after too long is told as well.
        let mut late = chronicle.watch(None, Some(2));
        let sequence = KEPT as u64 + 8 - KEPT as u64 + 1;
        let seen = late.replayed().unwrap();
        assert_eq!((seen.sequence, seen.missed), (sequence, sequence - 3));
    }
}
