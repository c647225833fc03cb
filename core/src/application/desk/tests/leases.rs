//! A replica that loses its lease: the store was away for longer than that lives.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ErrorCode;
use ghost_domain::fleet::CommandStatus;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use super::support::*;
use super::*;

/// What the other replicas say.
struct Say(Mutex<Result<bool>>);

#[async_trait]
impl OtherReplicas for Say {
    async fn may_have_hosts(&self, _: &Replica) -> Result<bool> {
        self.0.lock().clone()
    }
}

fn holds_beside(core: &Core, said: Result<bool>) -> (JoinHandle<()>, Arc<Say>) {
    let (desk, others) = (Arc::clone(&core.desk), Arc::new(Say(Mutex::new(said))));
    let asked = Arc::clone(&others);
    let holding = tokio::spawn(async move { desk.hold_lease(asked).await });
    (holding, others)
}

/// Beside others that may have hosts.
fn holds(core: &Core) -> JoinHandle<()> {
    holds_beside(core, Ok(true)).0
}

/// Ends the replica's way to the store so that it hears of nothing, its own loss included.
fn cut_off(store: &MemoryStore) {
    store.set_unreachable(true);
    store.compact();
    store.lose_lease();
}

async fn until(what: impl Fn() -> bool) {
    while !what() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_replica_without_its_lease_gives_its_hosts_up_and_acts_on_none() {
    let shared = Arc::new(SharedMemory::default());
    let store = MemoryStore::shared(&shared);
    let one = core(Arc::clone(&store) as _, "core-1").await.unwrap();
    let two = core(MemoryStore::shared(&shared), "core-2").await.unwrap();
    let holding = holds(&one);
    let host = one.add_host().await;
    until(|| two.fleet.read(|state| state.host(host).is_some())).await;
    let mut first = one.linked(host).await;
    assert!(one.desk.open(host).await.is_ok());

    cut_off(&store);
    assert_eq!(first.goodbye().await, "not_the_owner");
    first.served.await.unwrap();
    assert!(!one.desk.has(host));
    let error = one.desk.open(host).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::HostOffline);
    // Its memory is of before the loss, and still it lets nobody in.
    assert!(one.owner(host).is_some());
    let mut refused = one.link(peer(host));
    refused.hello("a");
    assert_eq!(refused.goodbye().await, "not_the_owner");
    // What it knows it tells, with its age; what it is to change it refuses.
    assert!(one.fleet.host_view(host).is_some());
    until(|| one.fleet.behind_for().is_some()).await;
    let queue = one.desk.commands().queue(request(host, "lost", "web"));
    assert_eq!(queue.await.unwrap_err().code(), ErrorCode::StoreUnavailable);

    // The other replica takes the host over, and its commands go out from there, once each.
    until(|| two.fleet.read(|state| state.owner(host).is_none())).await;
    let disk = Arc::new(Mutex::new(Disk::default()));
    let link = two.link(peer(host));
    let obeys = tokio::spawn(obey(link, Arc::clone(&disk), two.fleet.clock().now()));
    until(|| two.desk.has(host)).await;
    let queued = two.desk.commands().queue(request(host, "key", "web"));
    let queued = queued.await.unwrap().id;
    let ended = |core: &Core| {
        core.fleet.read(|state| {
            state.command(queued).map(|command| command.status) == Some(CommandStatus::Succeeded)
        })
    };
    until(|| ended(&two)).await;

    // With a lease again it is known again, and the host stays where it is.
    store.set_unreachable(false);
    store.gain_lease();
    until(|| two.fleet.read(|state| state.replica("core-1").is_some())).await;
    until(|| ended(&one) && one.fleet.behind_for().is_none()).await;
    let owner = one.fleet.read(|state| state.owner(host).cloned()).unwrap();
    assert_eq!(owner.replica, "core-2");
    assert!(!one.desk.has(host) && two.desk.has(host));
    assert_eq!(disk.lock().done, [queued]);

    // Hosts come in again.
    let other = one.add_host().await;
    let _link = one.linked(other).await;
    assert!(one.desk.has(other));
    obeys.abort();
    holding.abort();
}

#[tokio::test(start_paused = true)]
async fn each_loss_is_answered_and_a_drain_is_not_undone_by_it() {
    let shared = Arc::new(SharedMemory::default());
    let store = MemoryStore::shared(&shared);
    let core = self::core(Arc::clone(&store) as _, "core-1").await.unwrap();
    let _other = self::core(MemoryStore::shared(&shared), "core-2").await;
    let holding = holds(&core);
    let host = core.add_host().await;
    for _ in 0..3 {
        let mut link = core.linked(host).await;
        cut_off(&store);
        assert_eq!(link.goodbye().await, "not_the_owner");
        link.served.await.unwrap();
        store.set_unreachable(false);
        store.gain_lease();
        // Until it is let in again.
        loop {
            let mut next = core.link(peer(host));
            next.hello("a");
            if matches!(next.next().await, Some(ToHost::Welcome(_))) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    core.desk
        .drain("shutting_down", "for a test", Duration::from_secs(1))
        .await;
    cut_off(&store);
    store.set_unreachable(false);
    store.gain_lease();
    tokio::time::sleep(Duration::from_secs(30)).await;
    let mut late = core.link(peer(host));
    late.hello("a");
    assert_eq!(late.goodbye().await, "shutting_down");
    holding.abort();
}

#[tokio::test(start_paused = true)]
async fn while_nobody_has_a_lease_hosts_are_kept_and_then_theirs_again() {
    let shared = Arc::new(SharedMemory::default());
    let store = MemoryStore::shared(&shared);
    let one = core(Arc::clone(&store) as _, "core-1").await.unwrap();
    let two = core(MemoryStore::shared(&shared), "core-2").await.unwrap();
    let (holding, others) = holds_beside(&one, Ok(false));
    let host = one.add_host().await;
    let disk = Arc::new(Mutex::new(Disk::default()));
    let link = one.link(peer(host));
    let obeys = tokio::spawn(obey(link, Arc::clone(&disk), one.fleet.clock().now()));
    until(|| one.desk.has(host)).await;
    let before = one.fleet.read(|state| state.owner(host).cloned()).unwrap();

    cut_off(&store);
    until(|| one.fleet.behind_for().is_some()).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    // It is reached by what needs no store, and that is all.
    assert!(one.desk.open(host).await.is_ok());
    assert!(!one.desk.may_have_hosts().await);
    let queue = one.desk.commands().queue(request(host, "lost", "web"));
    assert_eq!(queue.await.unwrap_err().code(), ErrorCode::StoreUnavailable);
    // Another host is not let in: that its link is here could not be written down.
    let mut refused = one.link(peer(host));
    refused.hello("a");
    assert_eq!(refused.goodbye().await, "not_the_owner");

    // Its record went with the lease, and is written anew for the link that there is.
    until(|| two.fleet.read(|state| state.owner(host).is_none())).await;
    store.set_unreachable(false);
    store.gain_lease();
    until(|| two.fleet.read(|state| state.owner(host).is_some())).await;
    until(|| one.fleet.behind_for().is_none()).await;
    let after = one.fleet.read(|state| state.owner(host).cloned()).unwrap();
    assert_eq!((after.link, &after.replica), (before.link, &before.replica));
    assert!(one.desk.has(host) && one.desk.may_have_hosts().await);
    let queued = one.desk.commands().queue(request(host, "key", "web"));
    let queued = queued.await.unwrap().id;
    until(|| {
        one.fleet.read(|state| {
            state.command(queued).map(|command| command.status) == Some(CommandStatus::Succeeded)
        })
    })
    .await;
    assert_eq!(disk.lock().done, [queued]);

    // Somebody who does not answer may have a lease.
    *others.0.lock() = Err(Error::new(ErrorCode::CoreUnreachable, "nothing is heard"));
    cut_off(&store);
    until(|| !one.desk.has(host)).await;
    obeys.abort();
    holding.abort();
}

#[tokio::test(start_paused = true)]
async fn a_host_that_another_replica_took_meanwhile_is_not_claimed_back() {
    let shared = Arc::new(SharedMemory::default());
    let store = MemoryStore::shared(&shared);
    let one = core(Arc::clone(&store) as _, "core-1").await.unwrap();
    let two = core(MemoryStore::shared(&shared), "core-2").await.unwrap();
    let (holding, _) = holds_beside(&one, Ok(false));
    let host = one.add_host().await;
    until(|| two.fleet.read(|state| state.host(host).is_some())).await;
    let mut kept = one.linked(host).await;
    cut_off(&store);
    until(|| two.fleet.read(|state| state.owner(host).is_none())).await;
    let _taken = two.linked(host).await;
    store.set_unreachable(false);
    store.gain_lease();
    assert_eq!(kept.goodbye().await, "replaced");
    let owner = two.fleet.read(|state| state.owner(host).cloned()).unwrap();
    assert_eq!(owner.replica, "core-2");
    holding.abort();
}
