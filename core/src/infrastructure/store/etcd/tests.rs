//! Against real members of etcd, each test with its own.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use ghost_domain::{HostId, TenantName, Timestamp};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::application::fleet::Fleet;
use crate::domain::{Ownership, Quota, Record, Replica, Tenant};

const PROGRAM: &str = "/usr/bin/etcd";

/// One member; ends with this.
struct Member {
    process: Child,
    arguments: Vec<String>,
    client: String,
}

/// A cluster of etcd in a folder of its own.
pub(in super::super) struct Cluster {
    members: Vec<Member>,
    _root: TempDir,
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port that nobody has at this moment.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn spawn(arguments: &[String]) -> Child {
    Command::new(PROGRAM)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

impl Cluster {
    /// Starts members; `None` where this machine has no etcd, which is said.
    pub(in super::super) async fn start(size: usize) -> Option<Self> {
        if !Path::new(PROGRAM).exists() {
            println!("skipped: needs {PROGRAM} (apt-get install etcd-server)");
            return None;
        }
        // Another program may take a port between its choice and its use.
        for _ in 0..5 {
            let mut cluster = Self::try_start(size);
            if cluster.answers().await {
                return Some(cluster);
            }
        }
        panic!("etcd does not start");
    }

    fn try_start(size: usize) -> Self {
        let root =
            tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
        let url = || format!("http://127.0.0.1:{}", free_port());
        let addresses: Vec<(String, String)> = (0..size).map(|_| (url(), url())).collect();
        let all: Vec<_> = addresses
            .iter()
            .enumerate()
            .map(|(number, (peer, _))| format!("m{number}={peer}"))
            .collect();
        let members = addresses
            .iter()
            .enumerate()
            .map(|(number, (peer, client))| {
                let name = format!("m{number}");
                let data = root.path().join(&name);
                let pairs = [
                    ("--name", name.as_str()),
                    ("--data-dir", data.to_str().unwrap()),
                    ("--listen-peer-urls", peer),
                    ("--initial-advertise-peer-urls", peer),
                    ("--listen-client-urls", client),
                    ("--advertise-client-urls", client),
                    ("--initial-cluster", &all.join(",")),
                    // A lease lives for twice this at least.
                    ("--heartbeat-interval", "50"),
                    ("--election-timeout", "500"),
                ];
                let arguments: Vec<String> = pairs
                    .iter()
                    .flat_map(|(option, value)| [(*option).to_owned(), (*value).to_owned()])
                    .collect();
                Member {
                    process: spawn(&arguments),
                    arguments,
                    client: client.clone(),
                }
            })
            .collect();
        Self {
            members,
            _root: root,
        }
    }

    async fn answers(&mut self) -> bool {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(60) {
            if self
                .members
                .iter_mut()
                .any(|member| !matches!(member.process.try_wait(), Ok(None)))
            {
                return false;
            }
            let mut options = self.options();
            options.deadline = Duration::from_secs(2);
            if EtcdStore::open(options).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    pub(in super::super) fn options(&self) -> EtcdOptions {
        let endpoints = self.members.iter().map(|member| member.client.clone());
        let mut options = EtcdOptions::new(endpoints.collect(), "/ghost-test/");
        options.lease = Duration::from_secs(2);
        options
    }

    async fn open(&self) -> Arc<EtcdStore> {
        EtcdStore::open(self.options()).await.unwrap()
    }

    /// Halts a member, as one that hangs, or lets it go on.
    fn signal(&self, member: usize, signal: &str) {
        let id = self.members[member].process.id().to_string();
        let status = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(status.success());
    }

    fn kill(&mut self, member: usize) {
        self.members[member].process.kill().unwrap();
        self.members[member].process.wait().unwrap();
    }

    fn start_again(&mut self, member: usize) {
        let member = &mut self.members[member];
        member.process = spawn(&member.arguments);
    }
}

fn tenant(name: &str) -> (RecordKey, Record) {
    let name = TenantName::new(name).unwrap();
    let record = Tenant {
        name: name.clone(),
        quota: Quota::default(),
        user_quota: Quota::default(),
        created_at: Timestamp::default(),
    };
    (RecordKey::Tenant(name), Record::Tenant(record))
}

fn put(name: &str) -> Vec<Write> {
    let (key, record) = tenant(name);
    vec![Write::Put(key, record)]
}

fn owner(number: u128, replica: &str) -> (RecordKey, Vec<Write>) {
    let host = HostId::from_uuid(Uuid::from_u128(number));
    let record = Ownership {
        host,
        replica: replica.into(),
        link: 1,
        since: Timestamp::default(),
    };
    let key = RecordKey::Owner(host);
    (key.clone(), vec![Write::Put(key, Record::Owner(record))])
}

async fn keys(store: &EtcdStore) -> Vec<RecordKey> {
    let (_, stored) = store.load().await.unwrap();
    stored.into_iter().map(|one| one.key).collect()
}

/// A change that is tried until it is certain.
async fn surely(store: &EtcdStore, name: &str) {
    let began = Instant::now();
    while let Err(error) = store.commit(vec![], put(name)).await {
        assert_eq!(error.code(), ErrorCode::StoreUnavailable);
        assert!(began.elapsed() < Duration::from_secs(60), "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn many_records_come_in_pages_of_one_revision() {
    let Some(cluster) = Cluster::start(1).await else {
        return;
    };
    let store = cluster.open().await;
    let mut expected = Vec::new();
    for batch in 0..11 {
        let names: Vec<_> = (0..100).map(|one| format!("t{batch}x{one}")).collect();
        let writes = names.iter().flat_map(|name| put(name)).collect();
        store.commit(vec![], writes).await.unwrap();
        expected.extend(names.iter().map(|name| tenant(name).0));
    }
    let mut found = keys(&store).await;
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn what_was_leased_goes_when_its_process_is_silent_or_closes() {
    let Some(cluster) = Cluster::start(1).await else {
        return;
    };
    let (one, two) = (cluster.open().await, cluster.open().await);
    let watcher = cluster.open().await;
    let (first, writes) = owner(1, "one");
    one.commit(vec![], writes).await.unwrap();
    let (second, writes) = owner(2, "two");
    two.commit(vec![], writes).await.unwrap();
    assert_eq!(keys(&watcher).await, [first.clone(), second.clone()]);
    let mut stream = watcher
        .watch(watcher.load().await.unwrap().0)
        .await
        .unwrap();
    // Kept alive for longer than the lease's time.
    tokio::time::sleep(Duration::from_millis(4500)).await;
    assert_eq!(keys(&watcher).await.len(), 2);
    one.close().await.unwrap();
    let gone = stream.next().await.unwrap();
    assert_eq!((&gone[0].key, &gone[0].record), (&first, &None));
    // Like one that was killed: nobody says anything for it any more.
    two.stop.cancel();
    let gone = stream.next().await.unwrap();
    assert_eq!((&gone[0].key, &gone[0].record), (&second, &None));
}

#[tokio::test]
async fn a_lost_lease_is_told_once_and_another_one_taken() {
    let Some(cluster) = Cluster::start(1).await else {
        return;
    };
    let store = cluster.open().await;
    let (key, writes) = owner(1, "one");
    store.commit(vec![], writes.clone()).await.unwrap();
    let before = store.lease.id().unwrap();
    // As etcd sees it when the replica was away for too long.
    let revoke = api::LeaseRevokeRequest { id: before };
    let path = "/etcdserverpb.Lease/LeaseRevoke";
    let _: Empty = store
        .members
        .call(path, revoke, Again::Always)
        .await
        .unwrap();
    tokio::time::timeout(Duration::from_secs(10), store.lease_lost())
        .await
        .unwrap();
    assert!(!keys(&store).await.contains(&key));
    while store.lease.id().is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_ne!(store.lease.id(), Some(before));
    store.commit(vec![], writes).await.unwrap();
    let again = tokio::time::timeout(Duration::from_millis(50), store.lease_lost()).await;
    assert!(again.is_err());
    assert!(store.health().await.writable);
}

#[tokio::test]
async fn a_history_that_was_compacted_ends_the_watch_and_all_is_loaded_anew() {
    let Some(cluster) = Cluster::start(1).await else {
        return;
    };
    let store = cluster.open().await;
    store.commit(vec![], put("a")).await.unwrap();
    let (old, _) = store.load().await.unwrap();
    for name in ["b", "c", "d"] {
        store.commit(vec![], put(name)).await.unwrap();
    }
    let (now, _) = store.load().await.unwrap();

    #[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
    struct CompactionRequest {
        #[prost(int64, tag = "1")]
        revision: i64,
    }
    let revision = i64::try_from(now).unwrap();
    let path = "/etcdserverpb.KV/Compact";
    let compact = CompactionRequest { revision };
    let _: Empty = store
        .members
        .call(path, compact, Again::Always)
        .await
        .unwrap();
    if let Ok(mut stream) = store.watch(old).await {
        assert_eq!(stream.next().await, None);
    }
    let mut stream = store.watch(now).await.unwrap();
    store.commit(vec![], put("e")).await.unwrap();
    assert_eq!(stream.next().await.unwrap()[0].key, tenant("e").0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_killed_or_hangs_costs_no_acknowledged_write() {
    let Some(mut cluster) = Cluster::start(3).await else {
        return;
    };
    let mut options = cluster.options();
    options.deadline = Duration::from_secs(2);
    options.lease = Duration::from_secs(20);
    let store = EtcdStore::open(options).await.unwrap();
    let clock = Arc::new(ghost_infrastructure::clock::SystemClock::new());
    let fleet = Fleet::start(Arc::clone(&store) as _, clock).await.unwrap();
    for round in 0..3 {
        surely(&store, &format!("before{round}")).await;
        if round == 1 {
            cluster.signal(round, "-STOP");
        } else {
            cluster.kill(round);
        }
        surely(&store, &format!("during{round}")).await;
        if round == 1 {
            cluster.signal(round, "-CONT");
        } else {
            cluster.start_again(round);
        }
        surely(&store, &format!("after{round}")).await;
    }
    let names = ["before", "during", "after"];
    let expected: Vec<_> = (0..3)
        .flat_map(|round| names.map(|name| TenantName::new(format!("{name}{round}")).unwrap()))
        .collect();
    let found = keys(&store).await;
    for name in &expected {
        assert!(found.contains(&RecordKey::Tenant(name.clone())), "{name}");
    }
    // Memory follows, whichever member its watch was at.
    let began = Instant::now();
    while !fleet.read(|state| expected.iter().all(|name| state.tenant(name).is_some())) {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn without_etcd_every_call_ends_in_time_and_says_so() {
    let Some(mut cluster) = Cluster::start(1).await else {
        return;
    };
    let mut options = cluster.options();
    options.deadline = Duration::from_secs(1);
    let store = EtcdStore::open(options.clone()).await.unwrap();
    cluster.kill(0);
    let unavailable = ErrorCode::StoreUnavailable;
    assert_eq!(store.load().await.unwrap_err().code(), unavailable);
    let watch = store.watch(1).await.err().map(|error| error.code());
    assert_eq!(watch, Some(unavailable));
    let outcome = store.commit(vec![], put("a")).await;
    assert_eq!(outcome.unwrap_err().code(), unavailable);
    let health = store.health().await;
    assert!(!health.writable && health.problem.is_some());
    assert_eq!(
        EtcdStore::open(options).await.unwrap_err().code(),
        unavailable
    );
    store.lease_lost().await;
    let (_, writes) = owner(1, "one");
    assert_eq!(
        store.commit(vec![], writes).await.unwrap_err().code(),
        unavailable
    );
}

/// A cluster that comes back gives all leases their time anew, this replica's former one too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_leased_before_etcd_was_away_for_too_long_is_given_up() {
    let Some(mut cluster) = Cluster::start(1).await else {
        return;
    };
    let mut options = cluster.options();
    options.deadline = Duration::from_secs(1);
    // So long that nothing is gone by itself while this test looks.
    options.lease = Duration::from_secs(60);
    let other = EtcdStore::open(options.clone()).await.unwrap();
    options.lease = Duration::from_secs(2);
    let store = EtcdStore::open(options).await.unwrap();
    let (key, writes) = owner(1, "one");
    store.commit(vec![], writes.clone()).await.unwrap();
    let (others, theirs) = owner(2, "two");
    other.commit(vec![], theirs).await.unwrap();
    let before = store.lease.id();
    cluster.kill(0);
    tokio::time::timeout(Duration::from_secs(30), store.lease_lost())
        .await
        .unwrap();
    assert_eq!(store.lease.id(), None);
    let refused = store.commit(vec![], writes.clone()).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::StoreUnavailable);
    cluster.start_again(0);
    let began = Instant::now();
    while store.lease.id().is_none() {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_ne!(store.lease.id(), before);
    let left = keys(&store).await;
    assert!(!left.contains(&key) && left.contains(&others), "{left:?}");
    store.commit(vec![], writes).await.unwrap();
    assert!(keys(&store).await.contains(&key));
}

#[tokio::test]
async fn the_example_for_etcd_starts_a_member() {
    if !Path::new(PROGRAM).exists() {
        println!("skipped: needs {PROGRAM} (apt-get install etcd-server)");
        return;
    }
    let example = include_str!("../../../../../configs/etcd.yaml");
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("data");
    for attempt in 0.. {
        let (client, peer) = (free_port(), free_port());
        let text = example
            .replace("/var/lib/ghost-etcd", folder.to_str().unwrap())
            .replace(":2379", &format!(":{client}"))
            .replace(":2380", &format!(":{peer}"));
        let file = root.path().join(format!("etcd-{attempt}.yaml"));
        std::fs::write(&file, text).unwrap();
        let arguments = ["--config-file".to_owned(), file.display().to_string()];
        let mut member = Member {
            process: spawn(&arguments),
            arguments: arguments.to_vec(),
            client: format!("http://127.0.0.1:{client}"),
        };
        let mut options = EtcdOptions::new(vec![member.client.clone()], "/ghost/");
        options.deadline = Duration::from_secs(2);
        let began = Instant::now();
        while member.process.try_wait().unwrap().is_none() {
            if let Ok(store) = EtcdStore::open(options.clone()).await {
                store.commit(vec![], put("acme")).await.unwrap();
                return;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "it does not answer"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Another program may have taken a port.
        assert!(attempt < 3, "etcd does not take the example");
    }
}

#[tokio::test]
async fn a_replica_that_is_gone_is_seen_by_another_within_its_lease() {
    let Some(cluster) = Cluster::start(1).await else {
        return;
    };
    let clock = || Arc::new(ghost_infrastructure::clock::SystemClock::new());
    let (one, two) = (cluster.open().await, cluster.open().await);
    let first = Fleet::start(Arc::clone(&one) as _, clock()).await.unwrap();
    let second = Fleet::start(Arc::clone(&two) as _, clock()).await.unwrap();
    let core = |fleet: &Fleet| fleet.read(|state| state.core_id().to_owned());
    assert_eq!(core(&first), core(&second));
    let replica = Replica {
        name: "one".into(),
        address: "core:7443".into(),
        since: Timestamp::default(),
    };
    first
        .transact(|state| {
            let mut draft = state.draft();
            let key = RecordKey::Replica("one".into());
            draft.put(key, Record::Replica(replica.clone()));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    let seen = async |wanted: bool| {
        while second.read(|state| state.replica("one").is_some()) != wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    seen(true).await;
    one.stop.cancel();
    tokio::time::timeout(Duration::from_secs(30), seen(false))
        .await
        .unwrap();
}

#[test]
fn a_range_ends_behind_its_prefix() {
    assert_eq!(range_end(b"/ghost/"), b"/ghost0");
    assert_eq!(range_end(b"a\xff"), b"b");
    assert_eq!(range_end(b"\xff\xff"), b"\0");
}

#[tokio::test]
async fn options_that_cannot_be_used_are_refused() {
    let open = async |endpoints: &[&str], prefix: &str| {
        let endpoints = endpoints.iter().map(|one| (*one).to_owned()).collect();
        let opened = EtcdStore::open(EtcdOptions::new(endpoints, prefix)).await;
        opened.unwrap_err().code()
    };
    let invalid = ErrorCode::InvalidArgument;
    assert_eq!(open(&[], "/ghost/").await, invalid);
    assert_eq!(open(&["http://127.0.0.1:1"], "").await, invalid);
    assert_eq!(open(&["http://127.0.0.1:1"], "/ghost").await, invalid);
    assert_eq!(open(&["not an address"], "/ghost/").await, invalid);
}
