mod crashes;
mod leases;
mod queues;
mod support;

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::{ErrorCode, TenantName};

use super::*;
use crate::application::direct::{DirectDialer, DirectWay};
use crate::domain::DirectPolicy;
use crate::infrastructure::store::{MemoryStore, SharedMemory};
use support::*;

#[tokio::test(start_paused = true)]
async fn a_host_that_says_hello_is_online_and_its_vms_are_known() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    assert_eq!(core.state(host), "never_seen");
    let error = core.desk.open(host).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::HostOffline);
    let mut link = core.link(peer(host));
    link.hello("a");
    let Some(ToHost::Welcome(welcome)) = link.next().await else {
        panic!("no welcome");
    };
    let epoch = core.fleet.read(|state| state.link_epoch(host));
    assert_eq!((welcome.epoch, welcome.replica.as_str()), (epoch, "core-1"));
    assert_eq!(core.state(host), "online");
    assert!(core.desk.has(host) && core.desk.open(host).await.is_ok());
    link.say(beat(1, true, vec![vm(1, "web")], 103));
    assert!(matches!(
        link.next().await,
        Some(ToHost::HeartbeatReply {
            sequence: 1,
            want_full: false,
            ..
        })
    ));
    assert_eq!(core.fleet.inventory(host).unwrap().vms.len(), 1);
    let record = core.fleet.read(|state| state.host(host).cloned()).unwrap();
    assert_eq!(record.agent_version, "1.2.3");
    assert_eq!(
        record.previous_key_hash, None,
        "the newest certificate was used"
    );

    link.say(FromHost::Goodbye {
        code: "shutting_down".into(),
        message: String::new(),
    });
    link.served.await.unwrap();
    assert_eq!(core.state(host), "offline");
    assert_eq!(core.owner(host), None);
    // What it said is stored, though it said it a moment before it went.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let stored = core.fleet.read(|state| state.inventory(host).cloned());
    assert_eq!(stored.unwrap().vms.len(), 1);
}

/// Notes who is dialled, where nobody answers.
#[derive(Default)]
struct Nowhere(parking_lot::Mutex<Vec<std::net::SocketAddr>>);

#[async_trait]
impl DirectDialer for Arc<Nowhere> {
    async fn dial(
        &self,
        _: &TenantName,
        _: HostId,
        address: std::net::SocketAddr,
    ) -> ghost_domain::Result<Arc<dyn DirectWay>> {
        self.0.lock().push(address);
        Err(Error::new(ErrorCode::HostOffline, "nobody"))
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_a_heartbeat_tells_is_dialled_over_the_same_link() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let dialer = Arc::new(Nowhere::default());
    core.desk.use_directs(Directs::new(
        Arc::clone(&core.fleet),
        Arc::new(Arc::clone(&dialer)),
        DirectPolicy::default(),
        Duration::from_secs(5),
    ));
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    for (sequence, address) in [(1, "192.168.50.2:9090"), (2, "192.168.50.3:9090")] {
        let FromHost::Heartbeat(mut told) = beat(sequence, sequence == 1, Vec::new(), 0) else {
            panic!("no heartbeat");
        };
        told.direct_addresses = Some(vec![("lan".into(), address.into())]);
        link.say(FromHost::Heartbeat(told));
        link.next().await;
        let info = core.desk.link_info(host).unwrap();
        assert_eq!(info.direct_addresses, [("lan".into(), address.into())]);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let last = dialer.0.lock().last().copied();
        assert_eq!(last, Some(address.parse().unwrap()));
    }
    // What nobody speaks of stays.
    link.say(beat(3, false, Vec::new(), 0));
    link.next().await;
    assert!(core.desk.has(host));
    let info = core.desk.link_info(host).unwrap();
    assert_eq!(info.direct_addresses.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_newer_link_replaces_the_older() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut first = core.linked(host).await;
    let owner = core.owner(host);
    let mut second = core.linked(host).await;
    assert_eq!(first.goodbye().await, "replaced");
    first.served.await.unwrap();
    assert!(core.owner(host).is_some() && core.owner(host) != owner);
    second.say(beat(1, true, vec![], 0));
    assert!(matches!(
        second.next().await,
        Some(ToHost::HeartbeatReply { .. })
    ));
    assert_eq!(core.desk.link_count(), 1);
    assert_eq!(core.state(host), "online");
}

#[tokio::test(start_paused = true)]
async fn a_link_to_another_replica_takes_the_host_over() {
    let shared = Arc::new(SharedMemory::default());
    let one = core(MemoryStore::shared(&shared), "core-1").await.unwrap();
    let two = core(MemoryStore::shared(&shared), "core-2").await.unwrap();
    let host = one.add_host().await;
    let mut first = one.linked(host).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let _second = two.linked(host).await;
    assert_eq!(first.goodbye().await, "replaced");
    first.served.await.unwrap();
    let owner = two.fleet.read(|state| state.owner(host).cloned()).unwrap();
    assert_eq!(owner.replica, "core-2");
    assert!(!one.desk.has(host) && two.desk.has(host));
}

#[tokio::test(start_paused = true)]
async fn who_may_not_come_in_is_told_why() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let refused = async |peer: HostPeer| {
        let mut link = core.link(peer);
        link.hello("a");
        let code = link.goodbye().await;
        link.served.await.unwrap();
        code
    };
    let known = peer(host);
    let stranger = HostPeer {
        host: HostId::random(),
        ..known.clone()
    };
    assert_eq!(refused(stranger).await, "unknown_host");
    let other = HostPeer {
        tenant: TenantName::new("widgets").unwrap(),
        ..known.clone()
    };
    assert_eq!(refused(other).await, "unknown_host");
    // Another key of the same generation, and one whose successor is in use: somebody has a copy, and
    // from then on nobody gets in.
    let copied = HostPeer {
        key_hash: [9; 32],
        ..known.clone()
    };
    let before = HostPeer {
        generation: 2,
        key_hash: [2; 32],
        ..known.clone()
    };
    let unlock = async || {
        core.change_host(host, |record| record.life = HostLife::Active)
            .await;
    };
    assert_eq!(refused(copied).await, "cloned_identity");
    assert_eq!(core.state(host), "locked");
    assert_eq!(refused(known.clone()).await, "cloned_identity");
    unlock().await;
    let mut link = core.link(before.clone());
    link.hello("a");
    assert!(
        matches!(link.next().await, Some(ToHost::Welcome(_))),
        "its renewal was not answered"
    );
    let newest = core.linked(host).await;
    assert_eq!(refused(before).await, "cloned_identity");
    assert_eq!(core.state(host), "locked");
    drop(newest);
    unlock().await;
    // Records that were put back from a copy have forgotten a certificate.
    let newer = HostPeer {
        generation: 7,
        key_hash: [7; 32],
        ..known.clone()
    };
    let mut link = core.link(newer.clone());
    link.hello("a");
    assert!(matches!(link.next().await, Some(ToHost::Welcome(_))));
    let record = core.fleet.read(|state| state.host(host).cloned()).unwrap();
    assert_eq!(record.certificate_generation, 7);
    let known = newer;
    core.change_host(host, |record| {
        record.life = HostLife::Revoked {
            since: ghost_domain::Timestamp::default(),
        };
    })
    .await;
    assert_eq!(refused(known).await, "revoked");
    assert_eq!(core.desk.counters().refused(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_link_ends_when_its_host_is_revoked_or_removed() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    core.change_host(host, |record| {
        record.life = HostLife::Revoked {
            since: ghost_domain::Timestamp::default(),
        };
    })
    .await;
    assert_eq!(link.goodbye().await, "revoked");
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    core.fleet
        .transact(|state| {
            let mut draft = state.draft();
            draft.delete(RecordKey::Host(host));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    assert_eq!(link.goodbye().await, "revoked");
}

#[tokio::test(start_paused = true)]
async fn an_identity_on_two_machines_is_locked() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let enter = async |instance: &str| {
        let mut link = core.link(peer(host));
        link.hello(instance);
        match link.next().await {
            Some(ToHost::Welcome(_)) => "welcome",
            Some(ToHost::Goodbye(goodbye)) => goodbye.code,
            other => panic!("{other:?}"),
        }
    };
    // It loses its link again and again, it restarts: all of that is one machine.
    for instance in ["a", "a", "b", "b", "c", "c"] {
        assert_eq!(enter(instance).await, "welcome", "{instance}");
    }
    // The start before the last one is still alive.
    assert_eq!(enter("b").await, "cloned_identity");
    assert_eq!(enter("c").await, "cloned_identity");
    assert_eq!(core.state(host), "locked");
    core.change_host(host, |record| record.life = HostLife::Active)
        .await;
    assert_eq!(enter("c").await, "welcome");
}

#[tokio::test(start_paused = true)]
async fn a_link_ends_with_its_certificate() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let ends = core.fleet.clock().now().after(Duration::from_secs(3600));
    let mut link = core.link(HostPeer {
        expires_at: ends,
        ..peer(host)
    });
    link.hello("a");
    assert!(matches!(link.next().await, Some(ToHost::Welcome(_))));
    // Clocks may be a little apart.
    core.clock.turn(Duration::from_secs(3600 + 290));
    link.say(FromHost::Ping(1));
    assert_eq!(link.next().await, Some(ToHost::Pong(1)));
    tokio::time::sleep(Duration::from_secs(12)).await;
    link.say(FromHost::Ping(2));
    assert_eq!(link.next().await, Some(ToHost::Pong(2)));
    core.clock.turn(Duration::from_secs(10));
    assert_eq!(link.goodbye().await, "certificate_expired");
    link.served.await.unwrap();
    assert!(!core.desk.has(host));
}

#[tokio::test(start_paused = true)]
async fn a_link_that_is_followed_stays_for_what_it_carries() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let follow = async || {
        let mut link = core.link(peer(host));
        let mut hello = hello("a", 0);
        if let FromHost::Hello(hello) = &mut hello {
            hello.follows = true;
        }
        link.say(hello);
        assert!(matches!(link.next().await, Some(ToHost::Welcome(_))));
        link
    };
    let mut first = core.linked(host).await;
    let way = core.desk.way(host).await;
    first.streams.store(1, Ordering::SeqCst);
    let mut second = follow().await;
    assert_ne!(core.desk.way(host).await, way, "new calls go another way");
    assert_eq!(first.goodbye().await, "replaced");
    // A minute later its call still goes on; it answers pings, and nothing else is asked of it.
    for _ in 0..12 {
        match first.from_core.recv().await {
            Some(ToHost::Ping(number)) => first.say(FromHost::Pong(number)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            second.from_core.recv().await,
            Some(ToHost::Ping(_))
        ));
        second.say(FromHost::Ping(0));
        assert_eq!(second.next().await, Some(ToHost::Pong(0)));
    }
    assert!(!first.closed.is_cancelled());
    first.streams.store(0, Ordering::SeqCst);
    first.closed.cancelled().await;
    first.served.await.unwrap();
    assert!(core.desk.has(host), "the newer one is not touched by that");
    assert_eq!(core.desk.link_count(), 1);

    // One that says nothing is not waited for, and neither is one of a host that was revoked.
    second.streams.store(1, Ordering::SeqCst);
    let mut third = follow().await;
    second.closed.cancelled().await;
    third.streams.store(1, Ordering::SeqCst);
    let _fourth = follow().await;
    core.change_host(host, |record| {
        record.life = HostLife::Revoked {
            since: ghost_domain::Timestamp::default(),
        };
    })
    .await;
    let closed = third.closed.clone();
    let answering = async {
        loop {
            match third.from_core.recv().await {
                // The link may have ended since the ping was sent.
                Some(ToHost::Ping(number)) => drop(third.to_core.send(FromHost::Pong(number))),
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    };
    let began = tokio::time::Instant::now();
    tokio::select! {
        () = closed.cancelled() => {}
        () = answering => {}
    }
    assert!(began.elapsed() < Duration::from_secs(300));
}

#[tokio::test(start_paused = true)]
async fn files_that_are_copied_to_another_machine_lock_the_host() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let enter = async |machine: Option<[u8; 32]>| {
        let mut link = core.link(peer(host));
        let mut hello = hello("a", 0);
        if let FromHost::Hello(hello) = &mut hello {
            hello.machine = machine;
        }
        link.say(hello);
        match link.next().await {
            Some(ToHost::Welcome(_)) => "welcome",
            Some(ToHost::Goodbye(goodbye)) => goodbye.code,
            other => panic!("{other:?}"),
        }
    };
    let known = || core.fleet.read(|state| state.host(host).unwrap().machine);
    // An agent that is too old to say it, then the same machine again and again.
    for machine in [None, Some([1; 32]), Some([1; 32]), None] {
        assert_eq!(enter(machine).await, "welcome", "{machine:?}");
    }
    assert_eq!(known(), Some([1; 32]));
    assert_eq!(enter(Some([2; 32])).await, "cloned_identity");
    assert_eq!(core.state(host), "locked");
    assert_eq!(enter(Some([1; 32])).await, "cloned_identity");
    // Its owner decides, and the machine that comes then is the right one.
    core.change_host(host, |record| {
        record.life = HostLife::Active;
        record.machine = None;
    })
    .await;
    assert_eq!(enter(Some([2; 32])).await, "welcome");
    assert_eq!(known(), Some([2; 32]));
}

#[tokio::test(start_paused = true)]
async fn a_difference_in_what_is_known_asks_for_all_and_never_for_ever() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    let mut wants = async |message| {
        link.say(message);
        match link.next().await {
            Some(ToHost::HeartbeatReply { want_full, .. }) => want_full,
            other => panic!("{other:?}"),
        }
    };
    assert!(
        wants(beat(1, false, vec![vm(1, "a")], 101)).await,
        "a change of nothing"
    );
    assert!(!wants(beat(2, true, vec![vm(1, "a")], 101)).await);
    assert!(!wants(beat(3, false, vec![], 101)).await);
    assert!(!wants(beat(4, false, vec![vm(2, "bb")], 203)).await);
    assert!(
        wants(beat(5, false, vec![], 999)).await,
        "nothing changed, and yet"
    );
    assert!(
        wants(beat(6, false, vec![vm(3, "c")], 304)).await,
        "until a full one comes"
    );
    // A host whose words we clean has another digest whatever it says: it is asked no more.
    assert!(!wants(beat(7, true, vec![vm(1, "a")], 7)).await);
    assert!(!wants(beat(8, false, vec![vm(2, "b")], 8)).await);
    assert_eq!(core.fleet.inventory(host).unwrap().vms.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_host_has_nothing_to_say_of_other_tenants_people() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    let of = |number, owner: &str| ghost_domain::fleet::VmSummary {
        owner: Some(owner.into()),
        ..vm(number, "a")
    };
    link.say(beat(
        1,
        true,
        vec![of(1, "acme/alice"), of(2, "widgets/bob"), of(3, "root")],
        303,
    ));
    link.next().await;
    let inventory = core.fleet.inventory(host).unwrap();
    let owners: Vec<_> = inventory
        .vms
        .values()
        .map(|vm| vm.owner.as_deref())
        .collect();
    assert_eq!(owners, [Some("acme/alice"), None, Some("root")]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_link_is_given_up_and_a_live_one_is_not() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let (silent, alive) = (core.add_host().await, core.add_host().await);
    let mut gone = core.linked(silent).await;
    let mut link = core.linked(alive).await;
    let speaking = tokio::spawn(async move { while link.next().await.is_some() {} });
    let begun = tokio::time::Instant::now();
    // It reads, and answers nothing.
    while gone.from_core.recv().await.is_some() {}
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(15) && took <= Duration::from_secs(21),
        "{took:?}"
    );
    assert!(!core.desk.has(silent) && core.desk.has(alive));
    assert!(core.desk.round_trip(alive).is_some());
    drop(core);
    speaking.abort();
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_messages_is_read_at_our_pace() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    for number in 0..2_000 {
        link.say(FromHost::Ping(number));
    }
    let begun = tokio::time::Instant::now();
    let mut answered = 0;
    while answered < 2_000 {
        if let Some(ToHost::Pong(number)) = link.next().await {
            assert_eq!(number, answered);
            answered += 1;
        }
    }
    assert!(
        begun.elapsed() >= Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    assert!(core.desk.has(host));
}

#[tokio::test(start_paused = true)]
async fn what_breaks_the_protocol_ends_its_own_link() {
    let core = core(MemoryStore::new(), "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut first = core.link(peer(host));
    first.say(FromHost::Ping(1));
    assert_eq!(first.goodbye().await, "protocol_error");
    let mut silent = core.link(peer(host));
    assert_eq!(silent.goodbye().await, "protocol_error");
    let mut twice = core.linked(host).await;
    twice.hello("a");
    assert_eq!(twice.goodbye().await, "protocol_error");
    let old = core.link(peer(host));
    let FromHost::Hello(mut hello) = hello("a", 0) else {
        panic!()
    };
    hello.protocol_version = 0;
    old.say(FromHost::Hello(hello));
    let mut old = old;
    assert_eq!(old.goodbye().await, "unsupported_version");
}

/// After a restart of Core all hosts come in one moment: each needs two records written.
#[tokio::test]
async fn a_thousand_hosts_at_once_are_let_in_by_few_commits() {
    let store = Dying::at(MemoryStore::new(), usize::MAX, false);
    let core = core(Arc::clone(&store) as _, "core-1").await.unwrap();
    let mut hosts = Vec::new();
    for _ in 0..1_000 {
        hosts.push(core.add_host().await);
    }
    let before = store.commits.load(std::sync::atomic::Ordering::SeqCst);
    let linked = futures::future::join_all(hosts.iter().map(|host| core.linked(*host)));
    let links = linked.await;
    let commits = store.commits.load(std::sync::atomic::Ordering::SeqCst) - before;
    assert!(
        commits <= 100,
        "{commits} commits for {} hosts",
        links.len()
    );
    assert_eq!(core.desk.link_count(), 1_000);
    assert!(hosts.iter().all(|host| core.owner(*host).is_some()));

    core.desk
        .drain("shutting_down", "a test ends", Duration::from_secs(10))
        .await;
    for mut link in links {
        assert_eq!(link.goodbye().await, "shutting_down");
    }
    assert_eq!(core.desk.link_count(), 0);
    let mut late = core.link(peer(hosts[0]));
    late.hello("a");
    assert_eq!(late.goodbye().await, "shutting_down");
}

/// A store that takes no writes must not make links look dead, and hosts come in once it does again.
#[tokio::test(start_paused = true)]
async fn links_outlive_a_store_that_is_away() {
    let store = MemoryStore::new();
    let core = core(Arc::clone(&store) as _, "core-1").await.unwrap();
    let host = core.add_host().await;
    let mut link = core.linked(host).await;
    store.set_unreachable(true);
    link.say(beat(1, true, vec![vm(1, "a")], 101));
    assert!(matches!(
        link.next().await,
        Some(ToHost::HeartbeatReply { .. })
    ));
    let mut second = core.link(peer(host));
    second.hello("a");
    assert_eq!(second.goodbye().await, "shutting_down");
    store.set_unreachable(false);
    let _third = core.linked(host).await;
}
