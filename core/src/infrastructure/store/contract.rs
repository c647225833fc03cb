//! What every [`FleetStore`] must do, on all of them.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use ghost_domain::{ErrorCode, TenantName, Timestamp};
use ghost_infrastructure::store::Engine;
use tempfile::TempDir;

use super::etcd::tests::Cluster;
use super::{EmbeddedStore, EtcdStore, MemoryStore, samples};
use crate::domain::ports::{Committed, Condition, FleetStore, RecordChange, Write};
use crate::domain::{Quota, Record, RecordKey, Replica, Tenant};

/// Where a store's records stay while nobody has it open.
enum Place {
    Memory(Arc<super::SharedMemory>),
    Files(TempDir, Engine),
    Etcd(Cluster),
}

impl Place {
    async fn open(&self) -> Arc<dyn FleetStore> {
        match self {
            Self::Memory(records) => MemoryStore::shared(records),
            Self::Files(directory, engine) => {
                let path = directory.path().join("store");
                EmbeddedStore::open(path, *engine).await.unwrap()
            }
            Self::Etcd(cluster) => EtcdStore::open(cluster.options()).await.unwrap(),
        }
    }
}

fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

async fn places() -> Vec<Place> {
    let mut places = vec![
        Place::Memory(Arc::default()),
        Place::Files(scratch(), Engine::Sled),
        Place::Files(scratch(), Engine::Redb),
    ];
    places.extend(Cluster::start(1).await.map(Place::Etcd));
    places
}

fn tenant(name: &str, vms: u32) -> (RecordKey, Record) {
    let name = TenantName::new(name).unwrap();
    let record = Tenant {
        name: name.clone(),
        quota: Quota {
            vms: Some(vms),
            ..Quota::default()
        },
        user_quota: Quota::default(),
        created_at: Timestamp::from_unix_millis(5),
    };
    (RecordKey::Tenant(name), Record::Tenant(record))
}

fn put((key, record): (RecordKey, Record)) -> Write {
    Write::Put(key, record)
}

async fn done(store: &dyn FleetStore, conditions: Vec<Condition>, writes: Vec<Write>) -> u64 {
    match store.commit(conditions, writes).await.unwrap() {
        Committed::Done(revision) => revision,
        Committed::Conflict => panic!("a conflict where none was expected"),
    }
}

#[tokio::test]
async fn all_kinds_of_records_survive_but_what_was_leased() {
    for place in places().await {
        let store = place.open().await;
        let writes = samples::all().into_iter().map(put).collect();
        let revision = done(&*store, vec![], writes).await;
        store.close().await.unwrap();
        drop(store);

        let store = place.open().await;
        let (later, stored) = store.load().await.unwrap();
        assert!(later >= revision);
        let mut stored: Vec<_> = stored
            .into_iter()
            .map(|one| {
                assert_eq!(one.version, revision);
                (one.key, one.record)
            })
            .collect();
        let mut expected = samples::all();
        expected.retain(|(key, _)| !key.is_leased());
        stored.sort_by(|(a, _), (b, _)| a.cmp(b));
        expected.sort_by(|(a, _), (b, _)| a.cmp(b));
        // The ids of VMs in the samples are random.
        let shape = |all: &[(RecordKey, Record)]| -> Vec<_> {
            all.iter()
                .map(|(key, record)| match record {
                    Record::Inventory(one) => (key.clone(), None, one.vms.len()),
                    other => (key.clone(), Some(other.clone()), 0),
                })
                .collect()
        };
        assert_eq!(shape(&stored), shape(&expected));
    }
}

#[tokio::test]
async fn a_commit_takes_effect_wholly_or_not_at_all() {
    for place in places().await {
        let store = place.open().await;
        let (one, two) = (tenant("one", 1), tenant("two", 1));
        let first = done(
            &*store,
            vec![Condition::Absent(one.0.clone())],
            vec![put(one.clone())],
        )
        .await;
        let conflicts = [
            vec![Condition::Absent(one.0.clone())],
            vec![Condition::Unchanged(one.0.clone(), first + 1)],
            vec![Condition::Unchanged(two.0.clone(), first)],
            vec![
                Condition::Unchanged(one.0.clone(), first),
                Condition::Unchanged(two.0.clone(), 1),
            ],
        ];
        for conditions in conflicts {
            let committed = store.commit(
                conditions,
                vec![put(two.clone()), Write::Delete(one.0.clone())],
            );
            assert_eq!(committed.await.unwrap(), Committed::Conflict);
        }
        let (revision, stored) = store.load().await.unwrap();
        assert_eq!((revision, stored.len()), (first, 1));
        let conditions = vec![
            Condition::Unchanged(one.0.clone(), first),
            Condition::Absent(two.0.clone()),
        ];
        let second = done(
            &*store,
            conditions,
            vec![put(two.clone()), Write::Delete(one.0.clone())],
        )
        .await;
        assert!(second > first);
        let (_, stored) = store.load().await.unwrap();
        let found: Vec<_> = stored
            .into_iter()
            .map(|one| (one.key, one.version))
            .collect();
        assert_eq!(found, [(two.0, second)]);
    }
}

/// Reads changes until one is of `last`.
async fn until(
    stream: &mut (impl futures::Stream<Item = Vec<RecordChange>> + Unpin),
    last: u64,
) -> Vec<RecordChange> {
    let mut seen = Vec::new();
    while seen
        .last()
        .is_none_or(|one: &RecordChange| one.version < last)
    {
        let batch = stream.next().await.expect("the watch goes on");
        assert!(!batch.is_empty());
        seen.extend(batch);
    }
    seen
}

#[tokio::test]
async fn a_watch_tells_what_came_after_a_revision_in_order() {
    for place in places().await {
        let store = place.open().await;
        let before = done(&*store, vec![], vec![put(tenant("before", 1))]).await;
        let (revision, _) = store.load().await.unwrap();
        assert_eq!(revision, before);
        let mut expected = Vec::new();
        for vms in 0..3 {
            let (key, record) = tenant("one", vms);
            let version = done(&*store, vec![], vec![put((key.clone(), record.clone()))]).await;
            expected.push((key, Some(record), version));
        }
        // Begun only now.
        let mut stream = store.watch(revision).await.unwrap();
        let key = RecordKey::Tenant(TenantName::new("one").unwrap());
        let gone = done(&*store, vec![], vec![Write::Delete(key.clone())]).await;
        expected.push((key, None, gone));
        let seen: Vec<_> = until(&mut stream, gone)
            .await
            .into_iter()
            .map(|one| (one.key, one.record, one.version))
            .collect();
        assert_eq!(seen, expected);
        // Removing what is not there is no change.
        let nothing = RecordKey::Tenant(TenantName::new("none").unwrap());
        done(&*store, vec![], vec![Write::Delete(nothing)]).await;
        let next = done(
            &*store,
            vec![],
            vec![put(tenant("two", 1)), put(tenant("three", 1))],
        )
        .await;
        let seen = until(&mut stream, next).await;
        assert_eq!(seen.len(), 2, "{seen:?}");
        assert!(seen.iter().all(|one| one.version == next));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_racers_on_one_record_each_version_has_one_winner() {
    for place in places().await {
        let store = place.open().await;
        let racers = (0..8).map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut won = 0;
                while won < 5 {
                    let (_, stored) = store.load().await.unwrap();
                    let (key, counted) = stored.first().map_or_else(
                        || (Condition::Absent(tenant("hot", 0).0), 0),
                        |one| match &one.record {
                            Record::Tenant(tenant) => {
                                let condition = Condition::Unchanged(one.key.clone(), one.version);
                                (condition, tenant.quota.vms.unwrap())
                            }
                            other => panic!("{other:?}"),
                        },
                    );
                    let writes = vec![put(tenant("hot", counted + 1))];
                    if let Committed::Done(_) = store.commit(vec![key], writes).await.unwrap() {
                        won += 1;
                    }
                }
            })
        });
        for racer in futures::future::join_all(racers).await {
            racer.unwrap();
        }
        let (_, stored) = store.load().await.unwrap();
        assert_eq!(stored[0].record, tenant("hot", 40).1);
    }
}

#[tokio::test]
async fn what_a_process_leased_is_gone_when_it_comes_back() {
    for place in places().await {
        let store = place.open().await;
        let key = RecordKey::Replica("one".into());
        let replica = Replica {
            name: "one".into(),
            address: "core:7443".into(),
            since: Timestamp::default(),
        };
        done(
            &*store,
            vec![],
            vec![
                put((key.clone(), Record::Replica(replica))),
                put(tenant("a", 1)),
            ],
        )
        .await;
        assert_eq!(store.load().await.unwrap().1.len(), 2);
        store.close().await.unwrap();
        drop(store);
        let store = place.open().await;
        let keys: Vec<_> = store
            .load()
            .await
            .unwrap()
            .1
            .into_iter()
            .map(|one| one.key)
            .collect();
        assert_eq!(keys, [tenant("a", 1).0]);
    }
}

#[tokio::test]
async fn a_closed_store_says_so() {
    for engine in Engine::ALL {
        let place = Place::Files(scratch(), engine);
        let store = place.open().await;
        let mut stream = store.watch(store.load().await.unwrap().0).await.unwrap();
        store.close().await.unwrap();
        assert_eq!(stream.next().await, None);
        let error = store
            .commit(vec![], vec![put(tenant("a", 1))])
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::StoreUnavailable);
    }
}

const CHILD_DIRECTORY: &str = "GHOST_TEST_FLEET_DIRECTORY";
const CHILD_ENGINE: &str = "GHOST_TEST_FLEET_ENGINE";

/// The child of the next test: commits numbered records for ever and prints each that was
/// acknowledged.
#[tokio::test]
#[ignore = "started by another test"]
async fn writer() {
    let directory = std::env::var_os(CHILD_DIRECTORY).expect("started by a test");
    let engine: Engine = std::env::var(CHILD_ENGINE).unwrap().parse().unwrap();
    let store = EmbeddedStore::open(Path::new(&directory).to_owned(), engine)
        .await
        .unwrap();
    for number in 0u32.. {
        let pair = [format!("a{number}"), format!("b{number}")];
        let writes = pair.iter().map(|name| put(tenant(name, number))).collect();
        done(&*store, vec![], writes).await;
        println!("acknowledged {number}");
        std::io::stdout().flush().unwrap();
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    for engine in Engine::ALL {
        let root = scratch();
        let directory = root.path().join("store");
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg("infrastructure::store::contract::writer")
            .env(CHILD_DIRECTORY, &directory)
            .env(CHILD_ENGINE, engine.as_str())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut child = Killed(child);
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let mut acknowledged = None;
        for line in lines.map_while(Result::ok) {
            // The harness prints the test's name before its first line.
            if let Some((_, number)) = line.split_once("acknowledged ") {
                acknowledged = number.parse::<u32>().ok();
            }
            if acknowledged == Some(20) {
                child.0.kill().unwrap();
            }
        }
        drop(child);
        let acknowledged = acknowledged.unwrap();
        assert!(acknowledged >= 20);
        let store = EmbeddedStore::open(directory, engine).await.unwrap();
        let health = store.health().await;
        assert!(health.writable && health.problem.is_none(), "{health:?}");
        let names: BTreeSet<String> = store
            .load()
            .await
            .unwrap()
            .1
            .into_iter()
            .map(|one| match one.key {
                RecordKey::Tenant(name) => name.to_string(),
                other => panic!("{other:?}"),
            })
            .collect();
        for number in 0..=acknowledged {
            assert!(
                names.contains(&format!("a{number}")),
                "{engine}: {number} is lost"
            );
        }
        // Whatever was under way is there wholly or not at all.
        let halves = names.iter().filter(|name| name.starts_with('a')).count();
        assert_eq!(halves * 2, names.len());
        done(&*store, vec![], vec![put(tenant("after", 1))]).await;
    }
}

#[tokio::test]
async fn a_withdrawal_is_exported() {
    let root = scratch();
    let directory = root.path().join("store");
    let store = EmbeddedStore::open(directory.clone(), Engine::Sled)
        .await
        .unwrap();
    let host = samples::host(1);
    let key = RecordKey::Host(host.id);
    done(
        &*store,
        vec![],
        vec![put((key.clone(), Record::Host(Box::new(host))))],
    )
    .await;
    done(&*store, vec![], vec![Write::Delete(key)]).await;
    let exports = directory.join("exports");
    while std::fs::read_dir(&exports).unwrap().count() == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
