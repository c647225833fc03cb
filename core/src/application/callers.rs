//! Who calls: from a proof to somebody whom the records know.

use std::sync::Arc;

use super::accounts::secrets;
use super::fleet::{Fleet, FleetState};
use crate::domain::{Caller, CallerSource};
use async_trait::async_trait;
use ghost_domain::{CredentialId, Error, ErrorCode, Result, Role, Secret, TenantName, Timestamp};

/// What keys begin with.
pub const KEY_PREFIX: &str = "ghost_";

/// What somebody shows.
#[derive(Clone, Debug)]
pub enum Proof {
    /// A process of Core's own machine that may use the local socket.
    Local {
        /// Its user id.
        uid: u32,
        /// Its user's name.
        name: String,
    },
    /// A client certificate of ours.
    Certificate {
        /// The user that it names.
        user: CredentialId,
        /// When it ends.
        expires_at: Timestamp,
    },
    /// What stands in `Authorization: Bearer` or `X-API-Key`: a key of ours, or a token of the
    /// configured OpenID Connect issuer.
    Bearer(Secret),
    /// Another replica vouches for whom it let in.
    Vouched(Box<Caller>),
}

/// Checks tokens of an OpenID Connect issuer.
#[async_trait]
pub trait BearerVerifier: Send + Sync {
    /// Whom a token names, and when it ends: its signature, issuer, audience and times are checked,
    /// its role and tenant come from its claims.
    ///
    /// # Errors
    /// `Unauthenticated`.
    async fn verify(&self, token: &Secret) -> Result<(Caller, Timestamp)>;
}

/// Somebody who was let in, and how to see whether that is still right.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// Who.
    pub caller: Caller,
    proof: Proof,
    /// When the proof ends, where it does by itself.
    ends: Option<Timestamp>,
}

/// Finds out who calls.
pub struct Callers {
    fleet: Arc<Fleet>,
    bearers: Option<Arc<dyn BearerVerifier>>,
}

impl std::fmt::Debug for Callers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callers")
            .field("open_id_connect", &self.bearers.is_some())
            .finish_non_exhaustive()
    }
}

fn refused(message: &str) -> Error {
    Error::new(ErrorCode::Unauthenticated, message)
}

impl Callers {
    /// By the records of a fleet and, where one is configured, an issuer.
    pub fn new(fleet: Arc<Fleet>, bearers: Option<Arc<dyn BearerVerifier>>) -> Self {
        Self { fleet, bearers }
    }

    /// Lets somebody in.
    ///
    /// # Errors
    /// `Unauthenticated` for whom the records do not know, or not any more.
    pub async fn admit(&self, proof: Proof) -> Result<Admitted> {
        let now = self.fleet.clock().now();
        let (caller, ends) = match &proof {
            Proof::Bearer(secret) if !secret.expose().starts_with(KEY_PREFIX) => {
                let bearers = self.bearers.as_ref().ok_or_else(|| {
                    refused("the key is none of this Core")
                        .because(format!("keys begin with {KEY_PREFIX}"))
                        .hint("make one: ghostctl key create NAME --role ROLE")
                })?;
                let (caller, ends) = bearers.verify(secret).await?;
                if let Some(tenant) = &caller.tenant {
                    self.fleet.read(|state| known(state, tenant))?;
                }
                (caller, Some(ends))
            }
            known => self.fleet.read(|state| by_records(state, known, now))?,
        };
        Ok(Admitted {
            caller,
            proof,
            ends,
        })
    }

    /// Whether somebody who was let in would be again, with at least the same role. Costs nothing:
    /// long streams ask every few seconds.
    ///
    /// # Errors
    /// `Unauthenticated`, `PermissionDenied`.
    pub fn recheck(&self, admitted: &Admitted) -> Result<()> {
        let now = self.fleet.clock().now();
        match &admitted.proof {
            Proof::Bearer(secret) if !secret.expose().starts_with(KEY_PREFIX) => {
                if admitted.ends.is_some_and(|ends| ends <= now) {
                    return Err(refused("the token of this call has ended"));
                }
                Ok(())
            }
            // A stream that was begun goes on past the end of a certificate: it would be let in
            // again with the renewed one.
            Proof::Certificate { user, .. } => self.fleet.read(|state| {
                let caller = certified(state, *user)?;
                caller.require(admitted.caller.role)
            }),
            proof => self.fleet.read(|state| {
                let (caller, _) = by_records(state, proof, now)?;
                caller.require(admitted.caller.role)
            }),
        }
    }
}

/// A caller of a tenant that is gone is nobody.
fn known(state: &FleetState, tenant: &TenantName) -> Result<()> {
    match state.tenant(tenant) {
        Some(_) => Ok(()),
        None => Err(refused("the tenant of this identity is gone")),
    }
}

fn by_records(
    state: &FleetState,
    proof: &Proof,
    now: Timestamp,
) -> Result<(Caller, Option<Timestamp>)> {
    match proof {
        Proof::Local { uid, name } => Ok((
            Caller {
                name: name.clone(),
                user: None,
                tenant: None,
                role: Role::Admin,
                hosts: None,
                source: CallerSource::Socket { uid: *uid },
            },
            None,
        )),
        Proof::Certificate { user, expires_at } => {
            if *expires_at <= now {
                return Err(
                    refused("the client certificate of this connection has ended")
                        .hint("connect again with the renewed certificate"),
                );
            }
            Ok((certified(state, *user)?, Some(*expires_at)))
        }
        Proof::Bearer(secret) => keyed(state, secret, now),
        Proof::Vouched(caller) => Ok((Caller::clone(caller), None)),
    }
}

fn certified(state: &FleetState, user: CredentialId) -> Result<Caller> {
    let user = state
        .user(user)
        .ok_or_else(|| refused("this certificate's user is not known any more"))?;
    if user.revoked_at.is_some() {
        return Err(refused("this certificate was revoked")
            .hint("ask an administrator of the fleet for a new token"));
    }
    if let Some(tenant) = &user.tenant {
        known(state, tenant)?;
    }
    Ok(Caller {
        name: user.name.clone(),
        user: Some(user.id),
        tenant: user.tenant.clone(),
        role: user.role,
        hosts: None,
        source: CallerSource::Certificate,
    })
}

/// Which key it is and what its secret half hashes to.
fn parse(key: &str) -> Option<(CredentialId, [u8; 32])> {
    let (id, secret) = key.strip_prefix(KEY_PREFIX)?.split_once('_')?;
    let id = id.parse().ok()?;
    Some((id, secrets::hash(secret)))
}

fn keyed(
    state: &FleetState,
    secret: &Secret,
    now: Timestamp,
) -> Result<(Caller, Option<Timestamp>)> {
    let wrong =
        || refused("the key is wrong").hint("make one: ghostctl key create NAME --role ROLE");
    let (id, hash) = parse(secret.expose()).ok_or_else(wrong)?;
    let key = state
        .key(id)
        .filter(|key| secrets::equal(&key.secret_hash, &hash))
        .ok_or_else(wrong)?;
    // Only who has the secret learns what became of it.
    if key.revoked_at.is_some() {
        return Err(refused("the key was revoked"));
    }
    if key.expires_at <= now {
        return Err(refused("the key has ended").hint("make a new one: ghostctl key create"));
    }
    if let Some(tenant) = &key.tenant {
        known(state, tenant)?;
    }
    let caller = Caller {
        name: key.name.clone(),
        user: None,
        tenant: key.tenant.clone(),
        role: key.role,
        hosts: key.hosts.clone(),
        source: CallerSource::Key { id },
    };
    Ok((caller, Some(key.expires_at)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::application::fleet::Fleet;
    use crate::domain::{FleetKey, Record, RecordKey, User, UserSource};
    use crate::infrastructure::store::MemoryStore;
    use ghost_infrastructure::clock::SystemClock;

    async fn fleet() -> Arc<Fleet> {
        Fleet::start(MemoryStore::new(), Arc::new(SystemClock::new()))
            .await
            .unwrap()
    }

    async fn put(fleet: &Fleet, key: RecordKey, record: Record) {
        fleet
            .transact(|state| {
                let mut draft = state.draft();
                draft.put(key.clone(), record.clone());
                Ok(draft.done(()))
            })
            .await
            .unwrap();
    }

    fn key(now: Timestamp, tenant: &str) -> (FleetKey, Secret) {
        let id = CredentialId::random();
        let key = FleetKey {
            id,
            secret_hash: secrets::hash("hidden"),
            name: "ci".into(),
            tenant: Some(TenantName::new(tenant).unwrap()),
            role: Role::Operator,
            hosts: None,
            created_at: now,
            expires_at: now.after(Duration::from_secs(60)),
            revoked_at: None,
        };
        (key, Secret::new(format!("ghost_{id}_hidden")))
    }

    #[tokio::test]
    async fn a_key_lets_in_until_it_ends_is_revoked_or_its_tenant_is_gone() {
        let fleet = fleet().await;
        let callers = Callers::new(Arc::clone(&fleet), None);
        let now = fleet.clock().now();
        let (good, secret) = key(now, "default");
        put(&fleet, RecordKey::Key(good.id), Record::Key(good.clone())).await;
        let admitted = callers.admit(Proof::Bearer(secret.clone())).await.unwrap();
        assert_eq!(admitted.caller.full_name(), "default/ci");
        callers.recheck(&admitted).unwrap();

        let wrong = Secret::new(format!("ghost_{}_other", good.id));
        let error = callers.admit(Proof::Bearer(wrong)).await.unwrap_err();
        assert_eq!(error.message(), "the key is wrong");

        let mut ended = good.clone();
        ended.expires_at = now;
        put(&fleet, RecordKey::Key(good.id), Record::Key(ended)).await;
        let error = callers.recheck(&admitted).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unauthenticated);

        let mut weaker = good.clone();
        weaker.role = Role::Viewer;
        put(&fleet, RecordKey::Key(good.id), Record::Key(weaker)).await;
        let error = callers.recheck(&admitted).unwrap_err();
        assert_eq!(error.code(), ErrorCode::PermissionDenied);

        let mut revoked = good.clone();
        revoked.revoked_at = Some(now);
        put(&fleet, RecordKey::Key(good.id), Record::Key(revoked)).await;
        assert!(callers.recheck(&admitted).is_err());
        let error = callers.admit(Proof::Bearer(secret)).await.unwrap_err();
        assert_eq!(error.message(), "the key was revoked");

        let (orphan, secret) = key(now, "gone");
        put(&fleet, RecordKey::Key(orphan.id), Record::Key(orphan)).await;
        let error = callers.admit(Proof::Bearer(secret)).await.unwrap_err();
        assert_eq!(error.message(), "the tenant of this identity is gone");
    }

    #[tokio::test]
    async fn nothing_that_only_looks_like_a_key_is_one() {
        let callers = Callers::new(fleet().await, None);
        for text in [
            "ghost_",
            "ghost_a_b",
            "ghost__",
            "",
            "eyJhbGciOiJub25lIn0.e30.",
        ] {
            let error = callers
                .admit(Proof::Bearer(Secret::new(text)))
                .await
                .unwrap_err();
            assert_eq!(error.code(), ErrorCode::Unauthenticated, "{text:?}");
        }
    }

    #[tokio::test]
    async fn a_certificate_is_as_good_as_its_user() {
        let fleet = fleet().await;
        let callers = Callers::new(Arc::clone(&fleet), None);
        let now = fleet.clock().now();
        let mut user = User {
            id: CredentialId::random(),
            name: "alice".into(),
            tenant: None,
            role: Role::Admin,
            source: UserSource::Certificate { expires_at: now },
            quota: None,
            created_at: now,
            revoked_at: None,
        };
        let proof = |ends| Proof::Certificate {
            user: user.id,
            expires_at: ends,
        };
        let (soon, past) = (proof(now.after(Duration::from_secs(60))), proof(now));
        assert!(callers.admit(soon.clone()).await.is_err(), "not known");
        put(&fleet, RecordKey::User(user.id), Record::User(user.clone())).await;
        let admitted = callers.admit(soon.clone()).await.unwrap();
        assert!(callers.admit(past).await.is_err(), "it has ended");
        user.revoked_at = Some(now);
        put(&fleet, RecordKey::User(user.id), Record::User(user)).await;
        assert!(callers.recheck(&admitted).is_err());
        assert!(callers.admit(soon).await.is_err(), "revoked");
    }
}
