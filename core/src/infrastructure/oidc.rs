//! People who come with a token of an OpenID Connect issuer (OpenID Connect Core 1.0, section 2;
//! RFC 7519; RFC 9068 is accepted as far as it says the same).
//!
//! What is believed of a token:
//!
//! - its signature, by a key of the issuer's set that its discovery document names; asymmetric
//!   algorithms only, and only the one that the key is for. `none` and HMAC are refused, so that
//!   nobody signs with the public key;
//! - its issuer and audience, which must be the configured ones; its times, give or take a minute;
//! - its claims of role and tenant, from then on. A token without a role lets nobody in; one without
//!   a tenant is of `default`; the tenant `*` with the role admin is of none.
//!
//! Keys are fetched when they are needed and kept for an hour; a token with a key that is not among
//! them has them fetched anew, though not more often than every half a minute, whoever asks.
//!
//! The first token of a person makes a record of a user, whose id is a hash of issuer and subject:
//! it can be given a quota, and revoked, like any other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::{
    CredentialId, Error, ErrorCode, Monotonic, Result, Role, Secret, TenantName, Timestamp,
};
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use crate::application::callers::BearerVerifier;
use crate::application::fleet::Fleet;
use crate::domain::{Caller, CallerSource, Record, RecordKey, User, UserSource};

/// Clocks of issuers may differ from ours by so much.
const SKEW: Duration = Duration::from_secs(60);
/// Keys are fetched anew after this time, …
const FRESH: Duration = Duration::from_secs(3600);
/// … and used for so long where the issuer cannot be reached meanwhile.
const USABLE: Duration = Duration::from_secs(24 * 3600);
/// Not more often than this, whatever keys are asked for.
const BETWEEN_FETCHES: Duration = Duration::from_secs(30);
const ANSWER_TIME: Duration = Duration::from_secs(10);
const MOST_ANSWER: usize = 1 << 20;
const MOST_TOKEN: usize = 16 * 1024;
const MOST_KEYS: usize = 64;
/// All that an issuer may sign with.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// Whose tokens are taken, and how they are read.
#[derive(Clone, Debug)]
pub struct OidcOptions {
    /// The issuer's URL, as its tokens have it.
    pub issuer: String,
    /// Whom tokens must be made for.
    pub audience: String,
    /// The claim with the role or roles; dots lead into objects.
    pub roles_claim: String,
    /// The claim with the tenant.
    pub tenant_claim: String,
}

/// Verifies tokens of one issuer.
pub struct OidcVerifier {
    options: OidcOptions,
    fleet: Arc<Fleet>,
    http: reqwest::Client,
    keys: RwLock<Keys>,
    /// Held by whoever fetches keys. Who needs none that are not known does not wait for it.
    fetching: Mutex<()>,
}

impl std::fmt::Debug for OidcVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OidcVerifier")
            .field("issuer", &self.options.issuer)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Keys {
    by_id: HashMap<String, Arc<Key>>,
    fetched: Option<Monotonic>,
    tried: Option<Monotonic>,
}

struct Key {
    decoding: DecodingKey,
    /// Where the set says it.
    algorithm: Option<Algorithm>,
}

/// The parts of a discovery document that matter (OpenID Connect Discovery 1.0, section 3).
#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Which key, and what it says, of a token that was not believed yet.
struct Shown {
    id: Option<String>,
    algorithm: Algorithm,
}

fn refused(why: &str) -> Error {
    Error::new(ErrorCode::Unauthenticated, "the token is not accepted")
        .because(why)
        .hint("log in anew at the issuer")
}

impl OidcVerifier {
    /// Nothing is fetched yet.
    ///
    /// # Errors
    /// `InvalidArgument` for an issuer whose keys could be swapped on the way: without `https`,
    /// unless it is on this machine.
    pub fn new(options: OidcOptions, fleet: Arc<Fleet>) -> Result<Self> {
        if !is_safe(&options.issuer) {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "the issuer's address does not begin with https://",
            )
            .field("oidc.issuer", "https://…"));
        }
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(ANSWER_TIME)
            .build()
            .map_err(|cause| Error::internal("HTTP cannot be set up").because(cause))?;
        Ok(Self {
            options,
            fleet,
            http,
            keys: RwLock::default(),
            fetching: Mutex::default(),
        })
    }

    async fn get<T: for<'de> Deserialize<'de>>(&self, url: &str) -> Result<T> {
        let failed = |cause: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::Unauthenticated,
                "the keys of the OpenID Connect issuer cannot be fetched",
            )
            .because(format!("{url}: {cause}"))
            .retry_after(BETWEEN_FETCHES)
        };
        let mut answer = self
            .http
            .get(url)
            .header("accept", "application/json")
            .send()
            .await
            .and_then(reqwest::Response::error_for_status)
            .map_err(|error| failed(&error.without_url()))?;
        let mut body = Vec::new();
        while let Some(chunk) = answer
            .chunk()
            .await
            .map_err(|error| failed(&error.without_url()))?
        {
            body.extend_from_slice(&chunk);
            if body.len() > MOST_ANSWER {
                return Err(failed(&"the answer is longer than 1 MiB"));
            }
        }
        serde_json::from_slice(&body).map_err(|error| failed(&error))
    }

    async fn fetch(&self) -> Result<HashMap<String, Arc<Key>>> {
        let issuer = self.options.issuer.trim_end_matches('/');
        let url = format!("{issuer}/.well-known/openid-configuration");
        let found: Discovery = self.get(&url).await?;
        if found.issuer != self.options.issuer || !is_safe(&found.jwks_uri) {
            return Err(refused("the issuer's own document names another issuer"));
        }
        // Key by key: one that we do not understand must not cost us the others.
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set = self.get(&found.jwks_uri).await?;
        let known = set
            .keys
            .into_iter()
            .filter_map(|key| serde_json::from_value::<Jwk>(key).ok());
        let set = JwkSet {
            keys: known.collect(),
        };
        Ok(usable(&set))
    }

    /// What is known of a token's key, and whether it needs no second look.
    fn known(&self, shown: &Shown) -> (Option<Arc<Key>>, bool) {
        let now = self.fleet.clock().monotonic();
        let keys = self.keys.read();
        let age = keys.fetched.map(|at| now.since(at));
        let key = keys
            .find(shown)
            .filter(|_| age.is_some_and(|age| age < USABLE));
        let fresh = key.is_some() && age.is_some_and(|age| age < FRESH);
        (key, fresh)
    }

    /// The key of a token; fetches the set where that may help. One that is known keeps nobody
    /// waiting, also while an issuer is asked that does not answer.
    async fn key(&self, shown: &Shown) -> Result<Arc<Key>> {
        if let (Some(key), true) = self.known(shown) {
            return Ok(key);
        }
        // A hundred calls ask the issuer once.
        let _fetching = match self.fetching.try_lock() {
            Ok(first) => first,
            Err(_) => {
                if let (Some(key), _) = self.known(shown) {
                    return Ok(key);
                }
                self.fetching.lock().await
            }
        };
        let (known, fresh) = self.known(shown);
        if let (Some(key), true) = (&known, fresh) {
            return Ok(Arc::clone(key));
        }
        let now = self.fleet.clock().monotonic();
        let tried = self.keys.read().tried;
        if tried.is_none_or(|at| now.since(at) >= BETWEEN_FETCHES) {
            self.keys.write().tried = Some(now);
            match self.fetch().await {
                Ok(fetched) => {
                    let mut keys = self.keys.write();
                    keys.by_id = fetched;
                    keys.fetched = Some(now);
                    return keys.find(shown).ok_or_else(unknown_key);
                }
                Err(error) => {
                    tracing::warn!(%error, issuer = %self.options.issuer, "no keys of the issuer");
                    if known.is_none() {
                        return Err(error);
                    }
                }
            }
        }
        known.ok_or_else(unknown_key)
    }

    fn read(&self, claims: &Map<String, Value>) -> Result<Person> {
        let now = self.fleet.clock().now();
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let time = |name: &str| -> Result<Option<Timestamp>> {
            match claims.get(name) {
                None | Some(Value::Null) => Ok(None),
                // Fractions are allowed (RFC 7519, NumericDate).
                Some(value) => value
                    .as_f64()
                    .filter(|seconds| seconds.is_finite() && seconds.abs() < 1e12)
                    .map(|seconds| Some(Timestamp::from_unix_millis((seconds * 1000.0) as i64)))
                    .ok_or_else(|| refused("one of its times is none")),
            }
        };
        let expires_at = time("exp")?.ok_or_else(|| refused("it has no end"))?;
        if expires_at.after(SKEW) <= now {
            return Err(refused("its time is over"));
        }
        let begins = [time("nbf")?, time("iat")?];
        if begins
            .into_iter()
            .flatten()
            .any(|begin| begin > now.after(SKEW))
        {
            return Err(refused("it is of the future; a clock is wrong"));
        }
        let subject = text("sub")
            .filter(|subject| (1..=255).contains(&subject.len()))
            .ok_or_else(|| refused("it names nobody"))?;
        let role = roles(claims, &self.options.roles_claim).ok_or_else(|| {
            refused("it gives no role here").hint(format!(
                "the claim {} has to hold viewer, operator or admin",
                self.options.roles_claim
            ))
        })?;
        let tenant = match path(claims, &self.options.tenant_claim) {
            None | Some(Value::Null) => Some(TenantName::new(TenantName::DEFAULT)?),
            Some(Value::String(all)) if all == "*" && role == Role::Admin => None,
            Some(Value::String(name)) => Some(
                TenantName::new(name.as_str())
                    .map_err(|_| refused("the tenant that it names is none"))?,
            ),
            Some(_) => return Err(refused("the tenant that it names is none")),
        };
        let name = ["preferred_username", "email", "name", "sub"]
            .into_iter()
            .filter_map(text)
            .map(shown)
            .find(|name| !name.is_empty())
            .ok_or_else(|| refused("it names nobody"))?;
        Ok(Person {
            id: user_id(&self.options.issuer, subject),
            subject: subject.to_owned(),
            name,
            role,
            tenant,
            expires_at,
        })
    }

    /// Makes or updates the record of a person, and says by which name it goes.
    async fn admit(&self, person: &Person) -> Result<String> {
        let now = self.fleet.clock().now();
        let issuer = &self.options.issuer;
        self.fleet
            .transact(|state| {
                let mut draft = state.draft();
                if let Some(tenant) = &person.tenant {
                    state
                        .require_tenant(tenant)
                        .map_err(|_| refused("its tenant is not known here"))?;
                }
                let known = state.user(person.id);
                if known.is_some_and(|user| user.revoked_at.is_some()) {
                    return Err(refused("this person was revoked here"));
                }
                // Nobody goes by the name of somebody else, whose VMs would then be theirs.
                let taken = state.users().any(|other| {
                    other.id != person.id
                        && other.tenant == person.tenant
                        && other.name == person.name
                });
                let kept = known
                    .filter(|user| user.tenant == person.tenant)
                    .map(|user| &user.name);
                let name = match kept {
                    Some(kept) if kept.starts_with(&person.name) => kept.clone(),
                    _ if taken => {
                        let short: String = person.name.chars().take(55).collect();
                        let id = person.id.to_string();
                        format!("{short}-{}", id.get(..8).unwrap_or_default())
                    }
                    _ => person.name.clone(),
                };
                let user = User {
                    id: person.id,
                    name: name.clone(),
                    tenant: person.tenant.clone(),
                    role: person.role,
                    source: UserSource::OpenIdConnect {
                        issuer: issuer.clone(),
                        subject: person.subject.clone(),
                    },
                    quota: known.and_then(|user| user.quota),
                    created_at: known.map_or(now, |user| user.created_at),
                    revoked_at: None,
                };
                if known.map(AsRef::as_ref) != Some(&user) {
                    draft.put(RecordKey::User(user.id), Record::User(user));
                }
                Ok(draft.done(name))
            })
            .await
    }
}

#[async_trait]
impl BearerVerifier for OidcVerifier {
    async fn verify(&self, token: &Secret) -> Result<(Caller, Timestamp)> {
        let text = token.expose();
        if text.len() > MOST_TOKEN {
            return Err(refused("it is longer than 16 KiB"));
        }
        let header =
            decode_header(text).map_err(|_| refused("it is no signed token (RFC 7519)"))?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(refused(
                "its algorithm is not one that an issuer may sign with",
            ));
        }
        let shown = Shown {
            id: header.kid,
            algorithm: header.alg,
        };
        let key = self.key(&shown).await?;
        let mut validation = Validation::new(shown.algorithm);
        validation.set_issuer(&[&self.options.issuer]);
        validation.set_audience(&[&self.options.audience]);
        validation.set_required_spec_claims(&["iss", "aud"]);
        // Its times are looked at below, by our own clock.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        let claims = decode::<Map<String, Value>>(text, &key.decoding, &validation)
            .map_err(|error| refused(&error.to_string()))?
            .claims;
        let person = self.read(&claims)?;
        let name = self.admit(&person).await?;
        let caller = Caller {
            name,
            user: Some(person.id),
            tenant: person.tenant,
            role: person.role,
            hosts: None,
            source: CallerSource::OpenIdConnect,
        };
        Ok((caller, person.expires_at))
    }
}

/// What a token says of its bearer.
struct Person {
    id: CredentialId,
    subject: String,
    name: String,
    role: Role,
    tenant: Option<TenantName>,
    expires_at: Timestamp,
}

impl Keys {
    fn find(&self, shown: &Shown) -> Option<Arc<Key>> {
        let fits = |key: &&Arc<Key>| key.algorithm.is_none_or(|one| one == shown.algorithm);
        match &shown.id {
            Some(id) => self.by_id.get(id).filter(fits).cloned(),
            // Allowed where there is no choice (OpenID Connect Core 1.0, section 10.1).
            None => {
                let mut all = self.by_id.values();
                match (all.next(), all.next()) {
                    (Some(only), None) => Some(only).filter(fits).cloned(),
                    _ => None,
                }
            }
        }
    }
}

fn unknown_key() -> Error {
    refused("the issuer has no such key")
}

/// The keys of a set that can verify.
fn usable(set: &JwkSet) -> HashMap<String, Arc<Key>> {
    set.keys
        .iter()
        .filter(|jwk| {
            let purpose = jwk.common.public_key_use.as_ref();
            purpose.is_none_or(|purpose| *purpose == PublicKeyUse::Signature)
        })
        .take(MOST_KEYS)
        .filter_map(|jwk| {
            let algorithm = match jwk.common.key_algorithm {
                Some(named) => {
                    let named: Algorithm = named.to_string().parse().ok()?;
                    Some(named)
                        .filter(|one| ALGORITHMS.contains(one))
                        .map(Some)?
                }
                None => None,
            };
            if matches!(
                jwk.algorithm,
                jsonwebtoken::jwk::AlgorithmParameters::OctetKey(_)
            ) {
                return None;
            }
            let key = Key {
                decoding: DecodingKey::from_jwk(jwk).ok()?,
                algorithm,
            };
            let id = jwk.common.key_id.clone().unwrap_or_default();
            Some((id, Arc::new(key)))
        })
        .collect()
}

/// Whether keys from there are the issuer's: by TLS, or because nobody stands between.
fn is_safe(url: &str) -> bool {
    let Ok(url) = reqwest::Url::parse(url) else {
        return false;
    };
    match (url.scheme(), url.host_str()) {
        ("https", Some(_)) => true,
        ("http", Some(host)) => {
            let host = host.trim_matches(['[', ']']);
            host == "localhost"
                || host
                    .parse::<std::net::IpAddr>()
                    .is_ok_and(|address| address.is_loopback())
        }
        _ => false,
    }
}

/// A claim by its name, or by the way to it: `realm_access.roles`.
fn path<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    if let Some(value) = claims.get(name) {
        return Some(value);
    }
    let (first, rest) = name.split_once('.')?;
    path(claims.get(first)?.as_object()?, rest)
}

/// The highest of the roles that a claim gives: a text with one or several, or a list of them.
fn roles(claims: &Map<String, Value>, name: &str) -> Option<Role> {
    match path(claims, name)? {
        Value::String(text) => text
            .split([' ', ','])
            .filter_map(|one| one.parse().ok())
            .max(),
        Value::Array(all) => all
            .iter()
            .filter_map(Value::as_str)
            .filter_map(|one| one.parse().ok())
            .max(),
        _ => None,
    }
}

/// A name as it can be shown and stand behind a tenant.
fn shown(name: &str) -> String {
    name.chars()
        .filter(|c| !c.is_control() && *c != '/')
        .take(64)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// The user of an issuer's subject, the same on all replicas.
fn user_id(issuer: &str, subject: &str) -> CredentialId {
    let digest: [u8; 32] = Sha256::new_with_prefix(b"ghost-oidc-v1\0")
        .chain_update(issuer)
        .chain_update(b"\0")
        .chain_update(subject)
        .finalize()
        .into();
    let (first, _) = digest.split_at(16);
    let bytes: [u8; 16] = first.try_into().unwrap_or_default();
    CredentialId::from_uuid(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

#[cfg(test)]
mod tests;
