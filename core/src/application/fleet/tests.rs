use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::{CorePermissions, FleetFacts};
use ghost_domain::ports::Clock;
use ghost_domain::{ErrorCode, HostId, HostName, Monotonic, Role, TenantName, Timestamp};
use parking_lot::Mutex;
use uuid::Uuid;

use super::{Fleet, HostChanges};
use crate::domain::ports::{FleetStore, Write};
use crate::domain::{
    Caller, CallerSource, HostLife, HostRecord, HostState, Inventory, Ownership, Quota, Record,
    RecordKey, Tenant,
};
use crate::infrastructure::store::{MemoryStore, SharedMemory};

struct TurnedClock(Mutex<Duration>);

impl TurnedClock {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Duration::from_secs(1_800_000_000))))
    }

    fn turn(&self, by: Duration) {
        *self.0.lock() += by;
    }
}

impl Clock for TurnedClock {
    fn now(&self) -> Timestamp {
        Timestamp::default().after(*self.0.lock())
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(*self.0.lock())
    }
}

fn tenant(name: &str) -> TenantName {
    TenantName::new(name).unwrap()
}

fn host(id: u128, of: &str, name: &str) -> HostRecord {
    HostRecord {
        id: HostId::from_uuid(Uuid::from_u128(id)),
        name: HostName::new(name).unwrap(),
        tenant: tenant(of),
        labels: BTreeMap::new(),
        cordoned: None,
        life: HostLife::Active,
        certificate_generation: 1,
        key_hash: [0; 32],
        previous_key_hash: None,
        machine: None,
        certificate_expires_at: Timestamp::default(),
        enrolled_at: Timestamp::default(),
        agent_version: String::new(),
        permissions: CorePermissions::default(),
        facts: FleetFacts::default(),
        last_heard_at: None,
        command_generation: 0,
    }
}

async fn add(fleet: &Fleet, host: HostRecord) -> HostId {
    let id = host.id;
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            let name = RecordKey::HostName(host.tenant.clone(), host.name.as_str().into());
            draft.put(name, Record::HostName(id));
            draft.put_host(host.clone());
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    id
}

fn caller(of: Option<&str>) -> Caller {
    Caller {
        name: "alice".into(),
        user: None,
        tenant: of.map(tenant),
        role: Role::Operator,
        hosts: None,
        source: CallerSource::Certificate,
    }
}

async fn start(store: &Arc<MemoryStore>) -> Arc<Fleet> {
    Fleet::start(Arc::clone(store) as _, TurnedClock::new())
        .await
        .unwrap()
}

#[tokio::test]
async fn the_first_start_founds_a_core_and_each_start_raises_the_epoch() {
    let store = MemoryStore::new();
    let first = start(&store).await;
    let id = first.read(|state| state.core_id().to_owned());
    let epoch = first.read(|state| state.epoch());
    assert!(first.read(|state| state.tenant(&tenant("default")).is_some()));
    let second = start(&store).await;
    // The clock stands still, and yet it rises.
    assert_eq!(second.read(|state| state.epoch()), epoch + 1);
    assert_eq!(second.read(|state| state.core_id().to_owned()), id);
    // A copy of the records from before is put back, a moment later.
    let clock = TurnedClock::new();
    clock.turn(Duration::from_secs(1));
    let copy = MemoryStore::new();
    let third = Fleet::start(copy as _, clock).await.unwrap();
    assert!(third.read(|state| state.epoch()) > epoch + 1);
}

#[tokio::test]
async fn replicas_found_one_core_and_each_owner_of_a_host_has_a_higher_epoch() {
    let shared = Arc::new(SharedMemory::default());
    let stores: Vec<_> = (0..4).map(|_| MemoryStore::shared(&shared)).collect();
    let fleets = futures::future::join_all(stores.iter().map(start)).await;
    let ids: HashSet<_> = fleets
        .iter()
        .map(|fleet| fleet.read(|state| state.core_id().to_owned()))
        .collect();
    assert_eq!(ids.len(), 1);
    let id = add(&fleets[0], host(1, "acme", "pc")).await;
    let mut epochs = Vec::new();
    for (fleet, link) in fleets.iter().zip(1..) {
        while fleet.read(|state| state.host(id).is_none()) {
            tokio::task::yield_now().await;
        }
        fleet
            .transact(|state| {
                state.require_host(id)?;
                let mut draft = state.draft();
                let owner = Ownership {
                    host: id,
                    replica: format!("core-{link}"),
                    link,
                    since: Timestamp::default(),
                };
                draft.put(RecordKey::Owner(id), Record::Owner(owner));
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        epochs.push(fleet.read(|state| state.link_epoch(id)));
    }
    assert!(
        epochs.windows(2).all(|pair| pair[0] < pair[1]),
        "{epochs:?}"
    );
}

#[tokio::test]
async fn a_host_is_found_by_name_id_and_prefix_within_the_callers_tenant() {
    let fleet = start(&MemoryStore::new()).await;
    let one = add(&fleet, host(0xab12 << 112, "acme", "pc")).await;
    let two = add(&fleet, host(0xab34 << 112, "acme", "nas")).await;
    let other = add(&fleet, host(0xcd << 120, "widgets", "pc")).await;
    let find = |of: Option<&str>, selector: &str| {
        fleet.read(|state| {
            state
                .find_host(&caller(of), selector)
                .map(|host| host.id)
                .map_err(|error| error.code())
        })
    };
    let acme = Some("acme");
    assert_eq!(find(acme, "pc"), Ok(one));
    assert_eq!(find(acme, "acme/pc"), Ok(one));
    assert_eq!(find(acme, "ab3"), Ok(two));
    assert_eq!(find(acme, "AB34"), Ok(two));
    assert_eq!(find(acme, &two.to_string()), Ok(two));
    assert_eq!(find(acme, "ab"), Err(ErrorCode::HostAmbiguous));
    // Another tenant's host is not there, by whatever it is called.
    for selector in ["cd", "widgets/pc", &other.to_string()] {
        assert_eq!(find(acme, selector), Err(ErrorCode::HostNotFound));
    }
    assert_eq!(find(None, "pc"), Err(ErrorCode::HostAmbiguous));
    assert_eq!(find(None, "widgets/pc"), Ok(other));
    assert_eq!(find(None, "nas"), Ok(two));
    for garbage in [
        "",
        "-",
        "é",
        "ab34-",
        "/",
        "acme/",
        "x/pc",
        &"a".repeat(500),
    ] {
        assert_eq!(
            find(None, garbage),
            Err(ErrorCode::HostNotFound),
            "{garbage}"
        );
    }
    // A key that is scoped to a host.
    let mut scoped = caller(acme);
    scoped.hosts = Some([two].into());
    let found = fleet.read(|state| state.find_host(&scoped, "pc").map(|host| host.id).ok());
    assert_eq!(found, None);
}

#[tokio::test]
async fn concurrent_transactions_on_two_replicas_lose_nothing() {
    let shared = Arc::new(SharedMemory::default());
    let (one, two) = (MemoryStore::shared(&shared), MemoryStore::shared(&shared));
    let fleets = [start(&one).await, start(&two).await];
    let id = add(&fleets[0], host(1, "acme", "pc")).await;
    let rounds = (0..40).map(|round| {
        let fleet = Arc::clone(&fleets[round % 2]);
        tokio::spawn(async move {
            fleet
                .transact(|state| {
                    let mut host = HostRecord::clone(state.require_host(id)?);
                    host.command_generation += 1;
                    let generation = host.command_generation;
                    let mut draft = state.draft();
                    draft.put_host(host);
                    Ok(draft.done(generation))
                })
                .await
                .inspect(|generation| {
                    // What was acknowledged is seen by whoever did it.
                    let seen = fleet.read(|state| state.host(id).unwrap().command_generation);
                    assert!(seen >= *generation);
                })
        })
    });
    let mut generations = Vec::new();
    for round in futures::future::join_all(rounds).await {
        generations.push(round.unwrap().unwrap());
    }
    generations.sort_unstable();
    assert_eq!(generations, (1..=40).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_lost_watch_is_made_good_by_loading_anew() {
    let shared = Arc::new(SharedMemory::default());
    let (one, two) = (MemoryStore::shared(&shared), MemoryStore::shared(&shared));
    let fleets = [start(&one).await, start(&two).await];
    let kept = add(&fleets[0], host(1, "acme", "kept")).await;
    let gone = add(&fleets[0], host(2, "acme", "gone")).await;
    two.set_unreachable(true);
    one.compact();
    let mut seen = fleets[1].watch_hosts();
    let came = add(&fleets[0], host(3, "acme", "came")).await;
    fleets[0]
        .transact(|state| {
            let mut draft = state.draft();
            draft.delete(RecordKey::Host(gone));
            draft.delete(RecordKey::HostName(tenant("acme"), "gone".into()));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    while fleets[1].behind_for().is_none() {
        tokio::task::yield_now().await;
    }
    assert!(fleets[1].read(|state| state.host(gone).is_some()));
    two.set_unreachable(false);
    let mut changed = HashSet::new();
    while !(changed.contains(&gone) && changed.contains(&came)) {
        match seen.next().await.unwrap() {
            HostChanges::Some(more) => changed.extend(more),
            HostChanges::All => break,
        }
    }
    fleets[1].read(|state| {
        assert!(state.host(gone).is_none());
        assert!(state.host_named(&tenant("acme"), "gone").is_none());
        assert!(state.host(kept).is_some() && state.host(came).is_some());
    });
    assert!(fleets[1].behind_for().is_none());
}

#[tokio::test]
async fn a_commit_that_fails_changes_nothing_and_the_next_one_works() {
    let store = MemoryStore::new();
    let fleet = start(&store).await;
    store.refuse(1);
    let make = |name: &str| Tenant {
        name: tenant(name),
        quota: Quota::default(),
        user_quota: Quota::default(),
        created_at: Timestamp::default(),
    };
    let put = || {
        fleet.transact(|state| {
            let mut draft = state.draft();
            let key = RecordKey::Tenant(tenant("acme"));
            draft.put(key, Record::Tenant(make("acme")));
            Ok(draft.done(()))
        })
    };
    assert_eq!(put().await.unwrap_err().code(), ErrorCode::StoreUnavailable);
    assert!(fleet.read(|state| state.tenant(&tenant("acme")).is_none()));
    put().await.unwrap();
    assert!(fleet.read(|state| state.tenant(&tenant("acme")).is_some()));
}

#[tokio::test]
async fn a_session_is_woken_by_what_concerns_its_host_and_by_nothing_else() {
    let fleet = start(&MemoryStore::new()).await;
    let mine = add(&fleet, host(1, "acme", "mine")).await;
    let live = fleet.live(mine);
    add(&fleet, host(2, "acme", "other")).await;
    assert!(futures::FutureExt::now_or_never(live.changed()).is_none());
    fleet
        .transact(|state| {
            let mut host = HostRecord::clone(state.require_host(mine)?);
            host.life = HostLife::Revoked {
                since: Timestamp::default(),
            };
            let mut draft = state.draft();
            draft.put_host(host);
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    // Also when it looks only afterwards.
    live.changed().await;
}

#[tokio::test]
async fn silence_shows_without_any_event() {
    let clock = TurnedClock::new();
    let store = MemoryStore::new();
    let fleet = Fleet::start(Arc::clone(&store) as _, Arc::clone(&clock) as _)
        .await
        .unwrap();
    let id = add(&fleet, host(1, "acme", "pc")).await;
    assert_eq!(fleet.host_view(id).unwrap().state, HostState::NeverSeen);
    let live = fleet.live(id);
    live.set_linked(true);
    live.heard(clock.monotonic(), clock.now());
    assert_eq!(fleet.host_view(id).unwrap().state, HostState::Online);
    let mut watch = fleet.watch_hosts();
    let expected = HostChanges::Some([id].into());
    fleet.look();
    assert_eq!(watch.next().await.unwrap(), expected);
    clock.turn(Duration::from_secs(13));
    fleet.look();
    assert_eq!(watch.next().await.unwrap(), expected);
    let view = fleet.host_view(id).unwrap();
    assert_eq!(view.state, HostState::Degraded);
    assert!(
        view.reason.contains("no answer for 13 s"),
        "{}",
        view.reason
    );
    assert_eq!(view.since, Some(clock.now()));
    live.set_linked(false);
    fleet.look();
    assert_eq!(watch.next().await.unwrap(), expected);
    assert_eq!(fleet.host_view(id).unwrap().state, HostState::Offline);
}

#[tokio::test]
async fn an_inventory_is_stored_where_it_matters_and_shown_at_once() {
    let store = MemoryStore::new();
    let fleet = start(&store).await;
    let id = add(&fleet, host(1, "acme", "pc")).await;
    fleet.live(id).set_linked(true);
    let mut inventory = Inventory {
        load_one_minute: 1.0,
        ..Inventory::default()
    };
    inventory.total.cpus = 4;
    fleet.set_inventory(id, inventory.clone());
    fleet.keep_inventory(id).await.unwrap();
    let stored = |fleet: &Fleet| fleet.read(|state| state.inventory(id).cloned());
    assert_eq!(stored(&fleet).unwrap().total.cpus, 4);
    let revision = fleet.read(|state| state.revision());
    inventory.load_one_minute = 7.0;
    fleet.set_inventory(id, inventory);
    fleet.keep_inventory(id).await.unwrap();
    assert_eq!(fleet.read(|state| state.revision()), revision);
    let shown = fleet.inventory(id).unwrap();
    assert!((shown.load_one_minute - 7.0).abs() < f64::EPSILON);
    // After a restart only what was stored is known.
    let again = start(&store).await;
    assert_eq!(again.inventory(id).unwrap().total.cpus, 4);
}

#[tokio::test]
async fn what_a_replica_leased_goes_with_it() {
    let shared = Arc::new(SharedMemory::default());
    let (one, two) = (MemoryStore::shared(&shared), MemoryStore::shared(&shared));
    let fleets = [start(&one).await, start(&two).await];
    let id = add(&fleets[0], host(1, "acme", "pc")).await;
    let owner = Ownership {
        host: id,
        replica: "one".into(),
        link: 1,
        since: Timestamp::default(),
    };
    fleets[0]
        .transact(|state| {
            let mut draft = state.draft();
            draft.put(RecordKey::Owner(id), Record::Owner(owner.clone()));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    let live = fleets[1].live(id);
    while fleets[1].read(|state| state.owner(id).is_none()) {
        live.changed().await;
    }
    one.lose_lease();
    while fleets[1].read(|state| state.owner(id).is_some()) {
        live.changed().await;
    }
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kibibytes = line
        .and_then(|line| line.split_whitespace().nth(1))
        .unwrap();
    kibibytes.parse::<u64>().unwrap() * 1024
}

/// Prints figures; run it by itself: `cargo test -p ghost-core --release measure_ -- --ignored
/// --nocapture`.
#[tokio::test]
#[ignore = "prints figures that depend on the machine"]
async fn measure_ten_thousand_hosts_with_two_vms_each() {
    const HOSTS: u128 = 10_000;
    let store = MemoryStore::new();
    for first in (0..HOSTS).step_by(100) {
        let mut writes = Vec::new();
        for number in first..first + 100 {
            let host = host(number << 64 | number, "acme", &format!("pc-{number}"));
            let inventory = crate::infrastructure::store::sample_inventory(2);
            let key = RecordKey::Inventory(host.id);
            writes.push(Write::Put(key, Record::Inventory(Box::new(inventory))));
            let name = RecordKey::HostName(host.tenant.clone(), host.name.to_string());
            writes.push(Write::Put(name, Record::HostName(host.id)));
            writes.push(Write::Put(
                RecordKey::Host(host.id),
                Record::Host(Box::new(host)),
            ));
        }
        store.commit(vec![], writes).await.unwrap();
    }
    let before = resident();
    let fleet = start(&store).await;
    for id in fleet.read(|state| state.hosts().map(|host| host.id).collect::<Vec<_>>()) {
        fleet.live(id).set_linked(true);
    }
    let after = resident();
    println!("memory: {} bytes a host", (after - before) / HOSTS as u64);
    let timed = |what: &str, work: &dyn Fn() -> usize| {
        let mut times: Vec<_> = (0..11)
            .map(|_| {
                let began = std::time::Instant::now();
                let count = work();
                (began.elapsed(), count)
            })
            .collect();
        times.sort_unstable();
        println!(
            "{what}: {:?} at the median ({} found)",
            times[5].0, times[5].1
        );
    };
    timed("all VMs of all hosts", &|| {
        let all = fleet.inventories();
        all.iter()
            .flat_map(|(_, inventory)| inventory.vms.values())
            .filter(|vm| !vm.name.is_empty())
            .count()
    });
    timed("all hosts as they are shown", &|| {
        fleet.host_views(|_| true).len()
    });
    timed("one look at all shown states", &|| {
        fleet.look();
        0
    });
    let caller = caller(Some("acme"));
    timed("a host by its name", &|| {
        fleet.read(|state| state.find_host(&caller, "pc-7777").map(|_| 1).unwrap_or(0))
    });
}
