use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::Clock;
use ghost_domain::{
    CredentialId, ErrorCode, HostId, Monotonic, Result, Role, Secret, TenantName, Timestamp,
};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair, SigningKey};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::*;
use crate::application::accounts::{CreateTokenCommand, Tokens, WhoJoins};
use crate::application::fleet::Fleet;
use crate::domain::ports::FleetAuthority;
use crate::domain::{
    Caller, CallerSource, HostLife, HostRecord, PeerIdentity, Quota, Record, RecordKey, Tenant,
};
use crate::infrastructure::authority::CoreAuthority;
use crate::infrastructure::store::{MemoryStore, SharedMemory};

struct TurnedClock(Mutex<Timestamp>);

impl TurnedClock {
    fn turn(&self, by: Duration) {
        let mut now = self.0.lock();
        *now = now.after(by);
    }
}

impl Clock for TurnedClock {
    fn now(&self) -> Timestamp {
        *self.0.lock()
    }

    fn monotonic(&self) -> Monotonic {
        Monotonic::from_duration(self.now().since(Timestamp::default()))
    }
}

/// One replica.
struct Replica {
    fleet: Arc<Fleet>,
    tokens: Tokens,
    hosts: HostEnrolment,
    people: PersonEnrolment,
    store: Arc<MemoryStore>,
}

struct World {
    clock: Arc<TurnedClock>,
    authority: Arc<CoreAuthority>,
    replicas: Vec<Replica>,
    _root: tempfile::TempDir,
}

impl World {
    async fn new(replicas: usize) -> Self {
        let root = tempfile::tempdir().unwrap();
        let now = std::time::SystemTime::now().into();
        let clock = Arc::new(TurnedClock(Mutex::new(now)));
        let authority =
            CoreAuthority::open(root.path(), "ghost.example", Arc::clone(&clock) as _).unwrap();
        let shared = Arc::new(SharedMemory::default());
        let addresses = vec!["core.example:7443".to_owned(), "192.0.2.1:7443".to_owned()];
        let mut all = Vec::new();
        for _ in 0..replicas {
            let store = MemoryStore::shared(&shared);
            let fleet = Fleet::start(Arc::clone(&store) as _, Arc::clone(&clock) as _)
                .await
                .unwrap();
            let port = || Arc::clone(&authority) as Arc<dyn FleetAuthority>;
            all.push(Replica {
                tokens: Tokens {
                    fleet: Arc::clone(&fleet),
                    authority: port(),
                    addresses: addresses.clone(),
                },
                hosts: HostEnrolment::new(Arc::clone(&fleet), port(), addresses.clone()),
                people: PersonEnrolment::new(Arc::clone(&fleet), port()),
                fleet,
                store,
            });
        }
        let world = Self {
            clock,
            authority,
            replicas: all,
            _root: root,
        };
        world.tenant("acme").await;
        world
    }

    fn one(&self) -> &Replica {
        &self.replicas[0]
    }

    async fn tenant(&self, name: &str) {
        let tenant = Tenant {
            name: TenantName::new(name).unwrap(),
            quota: Quota::default(),
            user_quota: Quota::default(),
            created_at: Timestamp::default(),
        };
        self.one()
            .fleet
            .transact(|state| {
                let mut draft = state.draft();
                let key = RecordKey::Tenant(tenant.name.clone());
                draft.put(key, Record::Tenant(tenant.clone()));
                Ok(draft.done(()))
            })
            .await
            .unwrap();
        self.settle().await;
    }

    /// Waits until all replicas show the same.
    async fn settle(&self) {
        let newest = self
            .replicas
            .iter()
            .map(|one| one.fleet.read(|state| state.revision()))
            .max();
        for one in &self.replicas {
            while Some(one.fleet.read(|state| state.revision())) < newest {
                tokio::task::yield_now().await;
            }
        }
    }

    async fn token(&self, who: WhoJoins) -> Secret {
        let command = CreateTokenCommand {
            tenant: Some(TenantName::new("acme").unwrap()),
            who,
            lifetime: None,
        };
        let created = self.one().tokens.create(&root(), command).await.unwrap();
        self.settle().await;
        created.text
    }

    async fn host_token(&self) -> Secret {
        let labels = BTreeMap::from([("zone".to_owned(), "north".to_owned())]);
        self.token(WhoJoins::Host(labels)).await
    }

    async fn join(&self, name: &str) -> (HostIdentity, KeyPair) {
        let token = self.host_token().await;
        let key = KeyPair::generate().unwrap();
        let identity = self.one().hosts.enroll(enroll(&token, &key, name)).await;
        (identity.unwrap(), key)
    }

    fn peer(&self, identity: &HostIdentity) -> PeerIdentity {
        self.authority
            .peer(&der(&identity.issued.certificate_pem))
            .unwrap()
    }

    fn record(&self, host: HostId) -> HostRecord {
        let record = self.one().fleet.read(|state| state.host(host).cloned());
        HostRecord::clone(&record.unwrap())
    }

    async fn change(&self, host: HostId, change: impl Fn(&mut HostRecord)) {
        self.one()
            .fleet
            .transact(|state| {
                let mut record = HostRecord::clone(state.require_host(host)?);
                change(&mut record);
                let mut draft = state.draft();
                draft.put_host(record);
                Ok(draft.done(()))
            })
            .await
            .unwrap();
    }

    /// What a link does once the newest certificate came with its hello.
    async fn used_newest(&self, host: HostId) {
        self.change(host, |record| record.previous_key_hash = None)
            .await;
    }
}

fn root() -> Caller {
    Caller {
        name: "root".into(),
        user: None,
        tenant: None,
        role: Role::Admin,
        hosts: None,
        source: CallerSource::Socket { uid: 0 },
    }
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

fn request(key: &KeyPair) -> String {
    let request = CertificateParams::default().serialize_request(key).unwrap();
    request.pem().unwrap()
}

fn enroll(token: &Secret, key: &KeyPair, name: &str) -> EnrollHostCommand {
    EnrollHostCommand {
        token: token.clone(),
        request_pem: request(key),
        name: name.into(),
        agent_version: "0.1.0".into(),
    }
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> ErrorCode {
    result.unwrap_err().code()
}

#[tokio::test]
async fn a_host_joins_with_a_token_once_and_is_what_the_token_says() {
    let world = World::new(1).await;
    let token = world.host_token().await;
    let key = KeyPair::generate().unwrap();
    let identity = world
        .one()
        .hosts
        .enroll(enroll(&token, &key, "pc"))
        .await
        .unwrap();
    assert_eq!(identity.generation, 1);
    assert_eq!(identity.name.as_str(), "pc");
    assert_eq!(identity.tenant.as_str(), "acme");
    assert_eq!(identity.trust_domain, "ghost.example");
    assert_eq!(identity.addresses.len(), 2);
    let PeerIdentity::Host {
        tenant,
        host,
        generation,
        key_hash,
    } = world.peer(&identity)
    else {
        panic!("not a host");
    };
    let record = world.record(identity.host);
    assert_eq!((&tenant, host), (&record.tenant, record.id));
    assert_eq!((generation, key_hash), (1, record.key_hash));
    assert_eq!(record.labels.get("zone").map(String::as_str), Some("north"));
    assert_eq!(record.agent_version, "0.1.0");
    let again = world.one().hosts.enroll(enroll(&token, &key, "pc")).await;
    let error = again.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TokenInvalid);
    assert!(error.cause().unwrap().contains("has been used"), "{error}");
}

#[tokio::test]
async fn of_hosts_that_race_for_one_token_on_several_replicas_exactly_one_wins() {
    let world = World::new(3).await;
    for _ in 0..10 {
        let token = world.host_token().await;
        let keys: Vec<_> = (0..6).map(|_| KeyPair::generate().unwrap()).collect();
        let racing = keys.iter().enumerate().map(|(number, key)| {
            let replica = &world.replicas[number % 3];
            replica.hosts.enroll(enroll(&token, key, "racer"))
        });
        let outcomes = futures::future::join_all(racing).await;
        let won = outcomes.iter().filter(|one| one.is_ok()).count();
        assert_eq!(won, 1);
        for lost in outcomes.into_iter().filter(Result::is_err) {
            let error = lost.unwrap_err();
            assert_eq!(error.code(), ErrorCode::TokenInvalid, "{error}");
        }
    }
    world.settle().await;
    let names: Vec<_> = world.one().fleet.read(|state| {
        let mut names: Vec<_> = state.hosts().map(|host| host.name.to_string()).collect();
        names.sort_unstable();
        names
    });
    // Each of the ten has a name of its own.
    assert_eq!(names.len(), 10);
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    assert!(names.contains(&"racer".to_owned()) && names.contains(&"racer-10".to_owned()));
}

#[tokio::test]
async fn a_token_that_is_wrong_late_or_for_somebody_else_lets_nobody_in() {
    let world = World::new(1).await;
    let key = KeyPair::generate().unwrap();
    let hosts = &world.one().hosts;
    let good = world.host_token().await;
    let parts: Vec<_> = good.expose().split('.').collect();
    let forged = [
        String::new(),
        "ghost-host-v1".into(),
        "ghost-host-v1....".into(),
        good.expose().replace(parts[3], &"0".repeat(64)),
        good.expose()
            .replace(parts[2], &CredentialId::random().to_string()),
        world
            .token(WhoJoins::Person(Role::Admin))
            .await
            .expose()
            .to_owned(),
    ];
    for text in forged {
        let outcome = hosts.enroll(enroll(&Secret::new(&*text), &key, "pc")).await;
        assert_eq!(code(outcome), ErrorCode::TokenInvalid, "{text}");
    }
    // A malformed request or name leaves the token good.
    let mut odd = enroll(&good, &key, "pc");
    odd.request_pem = "nonsense".into();
    assert_eq!(code(hosts.enroll(odd).await), ErrorCode::InvalidArgument);
    let outcome = hosts.enroll(enroll(&good, &key, "../etc")).await;
    assert_eq!(code(outcome), ErrorCode::InvalidName);
    // So does a store that takes no writes.
    world.one().store.refuse(1);
    let outcome = hosts.enroll(enroll(&good, &key, "pc")).await;
    assert_eq!(code(outcome), ErrorCode::StoreUnavailable);
    hosts.enroll(enroll(&good, &key, "pc")).await.unwrap();

    let late = world.host_token().await;
    world.clock.turn(Duration::from_secs(601));
    let outcome = hosts.enroll(enroll(&late, &key, "pc")).await;
    assert_eq!(code(outcome), ErrorCode::TokenInvalid);
}

#[tokio::test]
async fn a_tenant_that_goes_takes_its_tokens_along() {
    let world = World::new(1).await;
    let token = world.host_token().await;
    let tenant = RecordKey::Tenant(TenantName::new("acme").unwrap());
    let fleet = &world.one().fleet;
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            draft.delete(tenant.clone());
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    let key = KeyPair::generate().unwrap();
    let outcome = world.one().hosts.enroll(enroll(&token, &key, "pc")).await;
    assert_eq!(code(outcome), ErrorCode::TenantNotFound);
    assert_eq!(fleet.read(|state| state.hosts().len()), 0);
}

#[tokio::test]
async fn renewals_follow_one_another_on_new_keys() {
    let world = World::new(1).await;
    let (mut identity, _) = world.join("pc").await;
    for generation in 2..6 {
        let key = KeyPair::generate().unwrap();
        let peer = world.peer(&identity);
        identity = world
            .one()
            .hosts
            .renew(&peer, &request(&key))
            .await
            .unwrap();
        assert_eq!(identity.generation, generation);
        let record = world.record(identity.host);
        assert_eq!(record.certificate_generation, generation);
        assert!(record.previous_key_hash.is_some());
    }
    let user = PeerIdentity::User(CredentialId::random());
    let outcome = world.one().hosts.renew(&user, "").await;
    assert_eq!(code(outcome), ErrorCode::PermissionDenied);
}

#[tokio::test]
async fn an_answer_that_was_lost_is_asked_for_again() {
    let world = World::new(1).await;
    let (first, _) = world.join("pc").await;
    let hosts = &world.one().hosts;
    let old = world.peer(&first);
    let lost = hosts
        .renew(&old, &request(&KeyPair::generate().unwrap()))
        .await
        .unwrap();
    // It shows its old certificate again, twice, and gets the same number each time.
    for _ in 0..2 {
        let key = KeyPair::generate().unwrap();
        let again = hosts.renew(&old, &request(&key)).await.unwrap();
        assert_eq!(again.generation, 2);
    }
    // The certificate that was lost on the way is good for nothing: whoever shows it has caught it.
    let caught = world.peer(&lost);
    let outcome = hosts
        .renew(&caught, &request(&KeyPair::generate().unwrap()))
        .await;
    assert_eq!(code(outcome), ErrorCode::HostLocked);
}

#[tokio::test]
async fn an_answer_that_the_store_lost_costs_nothing() {
    let world = World::new(1).await;
    let (first, _) = world.join("pc").await;
    let old = world.peer(&first);
    let key = KeyPair::generate().unwrap();
    world.one().store.lose_answers(1);
    let outcome = world.one().hosts.renew(&old, &request(&key)).await;
    assert_eq!(code(outcome), ErrorCode::StoreUnavailable);
    world.settle().await;
    let again = world.one().hosts.renew(&old, &request(&key)).await.unwrap();
    assert_eq!(again.generation, 2);
    world.used_newest(first.host).await;
    let peer = world.peer(&again);
    let next = world
        .one()
        .hosts
        .renew(&peer, &request(&key))
        .await
        .unwrap();
    assert_eq!(next.generation, 3);
}

#[tokio::test]
async fn a_cloned_identity_is_locked_until_its_owner_decides() {
    let world = World::new(2).await;
    let (first, key) = world.join("pc").await;
    let stolen = world.peer(&first);
    let hosts = &world.one().hosts;
    // The same key for each renewal, as a copy of the files would have it too.
    let second = hosts.renew(&stolen, &request(&key)).await.unwrap();
    world.used_newest(first.host).await;
    world.settle().await;
    let thief = &world.replicas[1].hosts;
    let outcome = thief.renew(&stolen, &request(&key)).await;
    assert_eq!(code(outcome), ErrorCode::HostLocked);
    world.settle().await;
    let record = world.record(first.host);
    let HostLife::Locked { reason, .. } = &record.life else {
        panic!("{record:?}");
    };
    assert!(
        reason.contains("certificate 1 was used after certificate 2"),
        "{reason}"
    );
    // Now the owner's machine does not get in either.
    let outcome = hosts.renew(&world.peer(&second), &request(&key)).await;
    assert_eq!(code(outcome), ErrorCode::HostLocked);
    // The owner unlocks; the one with the newest certificate goes on, the other locks it again.
    world
        .change(first.host, |record| record.life = HostLife::Active)
        .await;
    let third = hosts
        .renew(&world.peer(&second), &request(&key))
        .await
        .unwrap();
    assert_eq!(third.generation, 3);
    let outcome = hosts.renew(&stolen, &request(&key)).await;
    assert_eq!(code(outcome), ErrorCode::HostLocked);
}

#[tokio::test]
async fn a_host_is_believed_where_the_records_went_back() {
    let world = World::new(1).await;
    let (first, key) = world.join("pc").await;
    let hosts = &world.one().hosts;
    let before = world.record(first.host);
    let second = hosts
        .renew(&world.peer(&first), &request(&key))
        .await
        .unwrap();
    world.used_newest(first.host).await;
    let third = hosts
        .renew(&world.peer(&second), &request(&key))
        .await
        .unwrap();
    // A copy of the records is put back.
    world
        .change(first.host, |record| *record = before.clone())
        .await;
    let fourth = hosts
        .renew(&world.peer(&third), &request(&key))
        .await
        .unwrap();
    assert_eq!(fourth.generation, 4);
    assert_eq!(world.record(first.host).certificate_generation, 4);
}

#[tokio::test]
async fn whoever_was_removed_or_revoked_renews_nothing() {
    let world = World::new(1).await;
    let (identity, key) = world.join("pc").await;
    let hosts = &world.one().hosts;
    let peer = world.peer(&identity);
    world
        .change(identity.host, |record| {
            record.life = HostLife::Revoked {
                since: Timestamp::default(),
            };
        })
        .await;
    let outcome = hosts.renew(&peer, &request(&key)).await;
    assert_eq!(code(outcome), ErrorCode::Unauthenticated);
    let fleet = &world.one().fleet;
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            draft.delete(RecordKey::Host(identity.host));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    let outcome = hosts.renew(&peer, &request(&key)).await;
    assert_eq!(code(outcome), ErrorCode::HostNotFound);
}

#[tokio::test]
async fn a_host_whose_certificate_ended_comes_back_by_its_key_within_thirty_days() {
    let world = World::new(1).await;
    let hosts = &world.one().hosts;
    let (identity, old) = world.join("pc").await;
    let recover = |identity: &HostIdentity, by: &KeyPair, key: &KeyPair| {
        let request = CertificateParams::default().serialize_request(key).unwrap();
        let message = [b"ghost-recover-v1", &**request.der()].concat();
        RecoverHostCommand {
            certificate_pem: identity.issued.certificate_pem.clone(),
            request_pem: request.pem().unwrap(),
            proof: by.sign(&message).unwrap(),
        }
    };
    world.clock.turn(Duration::from_secs(29 * 24 * 3600));
    let new = KeyPair::generate().unwrap();
    let outcome = hosts.recover(recover(&identity, &new, &new)).await;
    assert_eq!(code(outcome), ErrorCode::Unauthenticated);
    let back = hosts.recover(recover(&identity, &old, &new)).await.unwrap();
    assert_eq!((back.host, back.generation), (identity.host, 2));
    // The answer may be lost here too.
    let again = hosts.recover(recover(&identity, &old, &new)).await.unwrap();
    assert_eq!(again.generation, 2);
    world.used_newest(identity.host).await;
    let cloned = hosts.recover(recover(&identity, &old, &new)).await;
    assert_eq!(code(cloned), ErrorCode::HostLocked);

    let (late, key) = world.join("late").await;
    world.clock.turn(Duration::from_secs(31 * 24 * 3600 + 3600));
    let outcome = hosts.recover(recover(&late, &key, &key)).await;
    let error = outcome.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    assert!(error.hint_text().unwrap().contains("enroll"), "{error}");
}

#[tokio::test]
async fn a_person_joins_renews_and_is_gone_when_revoked() {
    let world = World::new(2).await;
    let token = world.token(WhoJoins::Person(Role::Operator)).await;
    let key = KeyPair::generate().unwrap();
    let racing = world
        .replicas
        .iter()
        .map(|replica| async { replica.people.enroll(&token, &request(&key), "Alice").await });
    let outcomes = futures::future::join_all(racing).await;
    let mut won: Vec<_> = outcomes.into_iter().filter_map(Result::ok).collect();
    assert_eq!(won.len(), 1);
    let identity = won.remove(0);
    world.settle().await;
    assert_eq!(identity.user.role, Role::Operator);
    let peer = world
        .authority
        .peer(&der(&identity.issued.certificate_pem))
        .unwrap();
    assert_eq!(peer, PeerIdentity::User(identity.user.id));
    let caller = Caller {
        name: "Alice".into(),
        user: Some(identity.user.id),
        tenant: identity.user.tenant.clone(),
        role: Role::Operator,
        hosts: None,
        source: CallerSource::Certificate,
    };
    let people = &world.one().people;
    world.clock.turn(Duration::from_secs(3600));
    let renewed = people.renew(&caller, &request(&key)).await.unwrap();
    assert!(renewed.issued.expires_at > identity.issued.expires_at);
    assert_eq!(
        code(people.renew(&root(), &request(&key)).await),
        ErrorCode::PermissionDenied
    );
    world
        .one()
        .fleet
        .transact(|state| {
            let id = identity.user.id;
            let mut user = crate::domain::User::clone(state.user(id).unwrap());
            user.revoked_at = Some(Timestamp::default());
            let mut draft = state.draft();
            draft.put(RecordKey::User(id), Record::User(user));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    assert_eq!(
        code(people.renew(&caller, &request(&key)).await),
        ErrorCode::Unauthenticated
    );
    let token = world.token(WhoJoins::Person(Role::Viewer)).await;
    for name in ["", "a/b", "a\n", &"x".repeat(65)] {
        let outcome = people.enroll(&token, &request(&key), name).await;
        assert_eq!(code(outcome), ErrorCode::InvalidArgument, "{name:?}");
    }
    let host = world.host_token().await;
    let outcome = people.enroll(&host, &request(&key), "Bob").await;
    assert_eq!(code(outcome), ErrorCode::TokenInvalid);
}
