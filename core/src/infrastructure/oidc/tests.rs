use std::sync::atomic::{AtomicU32, Ordering};

use axum::Json;
use axum::extract::State;
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ghost_domain::ports::Clock;
use jsonwebtoken::{EncodingKey, Header, encode};
use parking_lot::Mutex as Lock;
use rcgen::{KeyPair, PublicKeyData};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::*;
use crate::infrastructure::store::MemoryStore;

struct TurnedClock(Lock<Timestamp>);

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

/// What the issuer answers.
struct Answers {
    issuer: String,
    keys: Lock<Vec<Value>>,
    fetches: AtomicU32,
    away: Lock<bool>,
    /// Asked, it says nothing until it is told to.
    hangs: Lock<Option<Arc<tokio::sync::Notify>>>,
}

/// An issuer on this machine.
struct Issuer {
    answers: Arc<Answers>,
    task: JoinHandle<()>,
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Answer = std::result::Result<Json<Value>, axum::http::StatusCode>;

impl Issuer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let answers = Arc::new(Answers {
            issuer: format!("http://{}", listener.local_addr().unwrap()),
            keys: Lock::default(),
            fetches: AtomicU32::new(0),
            away: Lock::new(false),
            hangs: Lock::new(None),
        });
        async fn discovery(State(answers): State<Arc<Answers>>) -> Answer {
            if *answers.away.lock() {
                return Err(axum::http::StatusCode::SERVICE_UNAVAILABLE);
            }
            answers.fetches.fetch_add(1, Ordering::SeqCst);
            let hangs = answers.hangs.lock().clone();
            if let Some(told) = hangs {
                told.notified().await;
            }
            let issuer = &answers.issuer;
            Ok(Json(
                json!({"issuer": issuer, "jwks_uri": format!("{issuer}/keys")}),
            ))
        }
        async fn keys(State(answers): State<Arc<Answers>>) -> Answer {
            let keys = answers.keys.lock().clone();
            Ok(Json(json!({ "keys": keys })))
        }
        let router = axum::Router::new()
            .route("/.well-known/openid-configuration", get(discovery))
            .route("/keys", get(keys))
            .with_state(Arc::clone(&answers));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { answers, task }
    }

    fn add(&self, id: &str) -> Signer {
        let pair = KeyPair::generate().unwrap();
        let point = pair.der_bytes();
        let part = |from: usize| URL_SAFE_NO_PAD.encode(&point[from..from + 32]);
        self.answers.keys.lock().push(json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": id,
            "x": part(1), "y": part(33),
        }));
        Signer {
            key: EncodingKey::from_ec_der(&pair.serialize_der()),
            id: id.into(),
        }
    }

    fn fetches(&self) -> u32 {
        self.answers.fetches.load(Ordering::SeqCst)
    }
}

struct Signer {
    key: EncodingKey,
    id: String,
}

impl Signer {
    fn sign(&self, claims: &Value) -> Secret {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.id.clone());
        Secret::new(encode(&header, claims, &self.key).unwrap())
    }
}

struct World {
    issuer: Issuer,
    signer: Signer,
    clock: Arc<TurnedClock>,
    fleet: Arc<Fleet>,
    verifier: OidcVerifier,
}

impl World {
    async fn new() -> Self {
        let issuer = Issuer::start().await;
        let signer = issuer.add("one");
        let now = std::time::SystemTime::now().into();
        let clock = Arc::new(TurnedClock(Lock::new(now)));
        let fleet = Fleet::start(MemoryStore::new() as _, Arc::clone(&clock) as _)
            .await
            .unwrap();
        let options = OidcOptions {
            issuer: issuer.answers.issuer.clone(),
            audience: "ghost".into(),
            roles_claim: "realm_access.roles".into(),
            tenant_claim: "tenant".into(),
        };
        let verifier = OidcVerifier::new(options, Arc::clone(&fleet)).unwrap();
        Self {
            issuer,
            signer,
            clock,
            fleet,
            verifier,
        }
    }

    fn claims(&self) -> Value {
        let now = self.clock.now().unix_millis() / 1000;
        json!({
            "iss": self.issuer.answers.issuer, "aud": ["other", "ghost"], "sub": "42",
            "preferred_username": "alice", "iat": now, "exp": now + 300,
            "realm_access": {"roles": ["offline_access", "viewer", "operator"]},
        })
    }

    fn with(&self, name: &str, value: Value) -> Value {
        let mut claims = self.claims();
        claims[name] = value;
        claims
    }

    async fn verify(&self, claims: &Value) -> Result<Caller> {
        let token = self.signer.sign(claims);
        self.verifier.verify(&token).await.map(|(caller, _)| caller)
    }
}

#[tokio::test]
async fn a_good_token_names_a_person_with_the_highest_of_its_roles() {
    let world = World::new().await;
    let token = world.signer.sign(&world.claims());
    let (caller, ends) = world.verifier.verify(&token).await.unwrap();
    assert_eq!(caller.full_name(), "default/alice");
    assert_eq!(
        (caller.role, caller.hosts.is_none()),
        (Role::Operator, true)
    );
    assert_eq!(caller.source, CallerSource::OpenIdConnect);
    assert!(ends > world.clock.now());
    let id = caller.user.unwrap();
    let user = world.fleet.read(|state| state.user(id).cloned()).unwrap();
    assert_eq!((user.name.as_str(), user.role), ("alice", Role::Operator));
    // The same person again writes nothing; with another role it does.
    let revision = world.fleet.read(|state| state.revision());
    world.verify(&world.claims()).await.unwrap();
    assert_eq!(world.fleet.read(|state| state.revision()), revision);
    let admin = world.with("realm_access", json!({"roles": "viewer admin"}));
    assert_eq!(world.verify(&admin).await.unwrap().role, Role::Admin);
    assert_eq!(
        world.fleet.read(|state| state.user(id).unwrap().role),
        Role::Admin
    );
    let fetched_once = world.issuer.fetches();
    assert_eq!(fetched_once, 1);
}

#[tokio::test]
async fn what_is_wrong_with_a_token_lets_nobody_in() {
    let world = World::new().await;
    let now = world.clock.now().unix_millis() / 1000;
    let wrong = [
        world.with("iss", json!("https://evil.example")),
        world.with("aud", json!("other")),
        world.with("aud", Value::Null),
        world.with("exp", json!(now - 61)),
        world.with("exp", Value::Null),
        world.with("exp", json!("soon")),
        world.with("nbf", json!(now + 120)),
        world.with("sub", json!("")),
        world.with("sub", json!(7)),
        world.with("realm_access", json!({"roles": ["root"]})),
        world.with("realm_access", Value::Null),
        world.with("tenant", json!("../x")),
        world.with("tenant", json!("unknown")),
        // Of no tenant are administrators alone.
        world.with("tenant", json!("*")),
    ];
    for claims in wrong {
        let error = world.verify(&claims).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unauthenticated, "{claims} {error}");
    }
    assert_eq!(world.fleet.read(|state| state.users().len()), 0);
    // Clocks may differ a little.
    for claims in [
        world.with("exp", json!(now - 50)),
        world.with("nbf", json!(now + 50)),
    ] {
        world.verify(&claims).await.unwrap();
    }
    let mut admin = world.with("tenant", json!("*"));
    admin["realm_access"] = json!({"roles": ["admin"]});
    assert_eq!(world.verify(&admin).await.unwrap().tenant, None);
}

#[tokio::test]
async fn a_signature_that_is_not_the_issuers_is_worth_nothing() {
    let world = World::new().await;
    let claims = world.claims();
    let good = world.signer.sign(&claims);
    world.verifier.verify(&good).await.unwrap();
    let code = async |text: &str| {
        let outcome = world.verifier.verify(&Secret::new(text)).await;
        outcome.unwrap_err().code()
    };
    // Another key under the name of the good one.
    let elsewhere = Issuer::start().await;
    let stranger = elsewhere.add("one");
    let refused = ErrorCode::Unauthenticated;
    assert_eq!(code(stranger.sign(&claims).expose()).await, refused);
    let parts: Vec<_> = good.expose().split('.').collect();
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let mut richer = claims.clone();
    richer["realm_access"] = json!({"roles": ["admin"]});
    let (none, hmac) = (
        json!({"alg": "none"}),
        json!({"alg": "HS256", "kid": "one"}),
    );
    let forged = [
        format!("{}.{}.{}", parts[0], part(richer), parts[2]),
        format!("{}.{}.", parts[0], parts[1]),
        format!("{}.{}.", part(none.clone()), parts[1]),
        format!("{}.{}.{}", part(none), parts[1], parts[2]),
        format!("{}.{}.{}", part(hmac), parts[1], parts[2]),
        format!("{}.{}", parts[0], parts[1]),
        "x".repeat(20_000),
        String::new(),
        "a.b.c".into(),
    ];
    for text in forged {
        assert_eq!(code(&text).await, refused, "{text:.80}");
    }
    // With the public key as the secret of an HMAC: the oldest trick.
    let public = world.issuer.answers.keys.lock()[0]["x"]
        .as_str()
        .unwrap()
        .to_owned();
    // However it is written down: as in the set, as a point, as DER and PEM (RFC 8725, section 2.1).
    let jwk = world.issuer.answers.keys.lock()[0].clone();
    let part = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
    let point = [vec![4], part("x"), part("y")].concat();
    // SubjectPublicKeyInfo of a key on P-256 (RFC 5480): a head that is always the same, and the point.
    let mut der = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00".to_vec();
    der.extend_from_slice(&point);
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
        base64::engine::general_purpose::STANDARD.encode(&der)
    );
    let secrets = [
        public.into_bytes(),
        jwk.to_string().into_bytes(),
        point,
        der,
        pem.into_bytes(),
    ];
    for secret in secrets {
        for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
            for id in [Some("one".to_owned()), None] {
                let mut header = Header::new(algorithm);
                header.kid = id;
                let key = EncodingKey::from_secret(&secret);
                let tricked = encode(&header, &claims, &key).unwrap();
                assert_eq!(code(&tricked).await, refused, "{algorithm:?}");
            }
        }
    }
    // And the good key under the name of an algorithm that it is not for.
    let other = json!({"alg": "RS256", "kid": "one"});
    let renamed = format!(
        "{}.{}.{}",
        URL_SAFE_NO_PAD.encode(other.to_string()),
        parts[1],
        parts[2]
    );
    assert_eq!(code(&renamed).await, refused);
}

#[tokio::test]
async fn a_key_of_the_set_that_is_no_public_one_verifies_nothing() {
    let world = World::new().await;
    let secret = b"known to whoever reads the set, 32 octets and more";
    world.issuer.answers.keys.lock().push(json!({
        "kty": "oct", "kid": "shared", "alg": "HS256", "k": URL_SAFE_NO_PAD.encode(secret),
    }));
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some("shared".into());
    let signed = encode(&header, &world.claims(), &EncodingKey::from_secret(secret)).unwrap();
    let error = world
        .verifier
        .verify(&Secret::new(signed))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    // It costs nobody the others.
    world.verify(&world.claims()).await.unwrap();
}

#[tokio::test]
async fn new_keys_are_fetched_when_they_are_used_and_not_more_often() {
    let world = World::new().await;
    world.verify(&world.claims()).await.unwrap();
    let second = world.issuer.add("two");
    let token = second.sign(&world.claims());
    // Too soon after the last time.
    assert!(world.verifier.verify(&token).await.is_err());
    assert_eq!(world.issuer.fetches(), 1);
    world.clock.turn(Duration::from_secs(31));
    world.verifier.verify(&token).await.unwrap();
    assert_eq!(world.issuer.fetches(), 2);
    // Whoever makes keys up costs the issuer nothing.
    let strange = Signer {
        key: EncodingKey::from_ec_der(&KeyPair::generate().unwrap().serialize_der()),
        id: "none".into(),
    };
    for _ in 0..5 {
        let token = strange.sign(&world.claims());
        assert!(world.verifier.verify(&token).await.is_err());
    }
    assert_eq!(world.issuer.fetches(), 2);
    assert_eq!(world.issuer.fetches(), 2);
    world.clock.turn(Duration::from_secs(31));
    for _ in 0..5 {
        assert!(
            world
                .verifier
                .verify(&strange.sign(&world.claims()))
                .await
                .is_err()
        );
    }
    assert_eq!(world.issuer.fetches(), 3);
    // A key that the issuer took back is good for an hour at most.
    world.issuer.answers.keys.lock().remove(0);
    world.clock.turn(Duration::from_secs(3601));
    assert!(world.verify(&world.claims()).await.is_err());
}

#[tokio::test]
async fn an_issuer_that_is_away_is_not_needed_for_a_day() {
    let world = World::new().await;
    world.verify(&world.claims()).await.unwrap();
    *world.issuer.answers.away.lock() = true;
    world.clock.turn(Duration::from_secs(2 * 3600));
    world.verify(&world.claims()).await.unwrap();
    world.clock.turn(Duration::from_secs(23 * 3600));
    let error = world.verify(&world.claims()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    *world.issuer.answers.away.lock() = false;
    world.clock.turn(Duration::from_secs(31));
    world.verify(&world.claims()).await.unwrap();
}

#[tokio::test]
async fn an_issuer_that_cannot_be_reached_lets_nobody_in_and_says_so() {
    let world = World::new().await;
    // A port that nobody listens at: bound, and given back.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let issuer = format!("http://{}", port.local_addr().unwrap());
    drop(port);
    let options = OidcOptions {
        issuer: issuer.clone(),
        ..world.verifier.options.clone()
    };
    let verifier = OidcVerifier::new(options, Arc::clone(&world.fleet)).unwrap();
    let token = world.signer.sign(&world.with("iss", json!(issuer)));
    let error = verifier.verify(&token).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    assert!(error.message().contains("cannot be fetched"), "{error}");
    assert!(error.retry_delay().is_some());
    // It is not asked again at once, whoever comes.
    let again = verifier.verify(&token).await.unwrap_err();
    assert!(again.cause().unwrap().contains("no such key"), "{again}");
}

#[tokio::test]
async fn an_issuer_that_does_not_answer_keeps_nobody_waiting_whose_key_is_known() {
    let world = Arc::new(World::new().await);
    world.verify(&world.claims()).await.unwrap();
    let told = Arc::new(tokio::sync::Notify::new());
    *world.issuer.answers.hangs.lock() = Some(Arc::clone(&told));
    world.clock.turn(Duration::from_secs(31));
    // Somebody with a key that nobody knows has the issuer asked.
    let late = json!(world.clock.now().unix_millis() / 1000 + 20_000);
    let second = world.issuer.add("two").sign(&world.with("exp", late));
    let asking = tokio::spawn({
        let world = Arc::clone(&world);
        async move { world.verifier.verify(&second).await.map(drop) }
    });
    while world.issuer.fetches() < 2 {
        tokio::task::yield_now().await;
    }
    for age in [0, 3600] {
        // Fresh, and due to be fetched anew.
        world.clock.turn(Duration::from_secs(age));
        world.verify(&world.claims()).await.unwrap();
    }
    assert!(!asking.is_finished());
    assert_eq!(world.issuer.fetches(), 2);
    told.notify_one();
    asking.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_person_can_be_revoked_and_takes_nobodys_name() {
    let world = World::new().await;
    let alice = world.verify(&world.claims()).await.unwrap();
    let other = world.with("sub", json!("43"));
    let second = world.verify(&other).await.unwrap();
    assert_ne!(alice.full_name(), second.full_name());
    assert!(second.name.starts_with("alice-"), "{}", second.name);
    assert_eq!(world.verify(&other).await.unwrap().name, second.name);
    let odd = world.with("preferred_username", json!("default/\u{1b}[31mroot\n"));
    let odd = world.verify(&odd).await.unwrap();
    assert_eq!(odd.name, "default[31mroot");
    let id = alice.user.unwrap();
    world
        .fleet
        .transact(|state| {
            let mut user = User::clone(state.user(id).unwrap());
            user.revoked_at = Some(Timestamp::default());
            let mut draft = state.draft();
            draft.put(RecordKey::User(id), Record::User(user));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    let error = world.verify(&world.claims()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
    world.verify(&other).await.unwrap();
}

#[tokio::test]
async fn an_issuer_must_be_reached_safely() {
    let world = World::new().await;
    for (issuer, safe) in [
        ("https://id.example", true),
        ("http://127.0.0.1:8080/realms/x", true),
        ("http://[::1]:8080", true),
        ("http://id.example", false),
        ("http://127.0.0.1.evil.example", false),
        ("ftp://id.example", false),
        ("id.example", false),
    ] {
        let options = OidcOptions {
            issuer: issuer.into(),
            ..world.verifier.options.clone()
        };
        let made = OidcVerifier::new(options, Arc::clone(&world.fleet));
        assert_eq!(made.is_ok(), safe, "{issuer}");
    }
}
