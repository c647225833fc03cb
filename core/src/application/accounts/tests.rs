use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::IssuedCertificate;
use ghost_domain::{CredentialId, ErrorCode, HostId, Result, Role, TenantName, Timestamp};
use ghost_infrastructure::clock::SystemClock;

use super::*;
use crate::application::callers::{Callers, Proof};
use crate::application::fleet::Fleet;
use crate::application::quota_check::Admission;
use crate::domain::ports::FleetAuthority;
use crate::domain::{
    CallerSource, Labels, PeerIdentity, Quota, Record, RecordKey, User, UserSource,
};
use crate::infrastructure::store::MemoryStore;

async fn fleet() -> Arc<Fleet> {
    let store = MemoryStore::new();
    Fleet::start(store, Arc::new(SystemClock::new()))
        .await
        .unwrap()
}

fn tenant(name: &str) -> TenantName {
    TenantName::new(name).unwrap()
}

fn caller(tenant: Option<&str>, role: Role) -> Caller {
    Caller {
        name: "alice".into(),
        user: None,
        tenant: tenant.map(|name| TenantName::new(name).unwrap()),
        role,
        hosts: None,
        source: CallerSource::Certificate,
    }
}

fn root() -> Caller {
    caller(None, Role::Admin)
}

#[tokio::test]
async fn a_tenant_is_made_changed_and_deleted_only_where_it_is_empty() {
    let fleet = fleet().await;
    let admission = Arc::new(Admission::new(Arc::clone(&fleet)));
    let tenants = Tenants {
        fleet: Arc::clone(&fleet),
        admission,
    };
    let quota = Quota {
        vms: Some(3),
        ..Quota::default()
    };
    let create = |who: Caller| {
        let tenants = &tenants;
        async move {
            tenants
                .create(&who, tenant("acme"), quota, Quota::default())
                .await
        }
    };
    let refused = create(caller(Some("default"), Role::Admin)).await;
    assert_eq!(refused.unwrap_err().code(), ErrorCode::PermissionDenied);
    assert_eq!(create(root()).await.unwrap().tenant.quota, quota);
    let twice = create(root()).await.unwrap_err();
    assert_eq!(twice.code(), ErrorCode::TenantExists);

    let names = |who: &Caller| -> Vec<String> {
        let listed = tenants.list(who).unwrap();
        listed
            .iter()
            .map(|one| one.tenant.name.to_string())
            .collect()
    };
    assert_eq!(names(&root()), ["acme", "default"]);
    assert_eq!(names(&caller(Some("acme"), Role::Viewer)), ["acme"]);

    let changed = tenants
        .update(&root(), &tenant("acme"), None, Some(quota))
        .await
        .unwrap();
    assert_eq!(
        (changed.tenant.quota, changed.tenant.user_quota),
        (quota, quota)
    );

    let user = user(&fleet, "acme").await;
    let in_use = tenants.delete(&root(), &tenant("acme")).await.unwrap_err();
    assert_eq!(in_use.code(), ErrorCode::TenantInUse);
    let users = Users {
        fleet: Arc::clone(&fleet),
        admission: Arc::clone(&tenants.admission),
    };
    users.revoke(&root(), &user.to_string()).await.unwrap();
    tenants.delete(&root(), &tenant("acme")).await.unwrap();
    assert!(fleet.read(|state| state.user(user).is_none()));
    let gone = tenants.delete(&root(), &tenant("acme")).await.unwrap_err();
    assert_eq!(gone.code(), ErrorCode::TenantNotFound);
    let kept = tenants.delete(&root(), &tenant("default")).await;
    assert_eq!(kept.unwrap_err().code(), ErrorCode::TenantInUse);
}

async fn user(fleet: &Fleet, of: &str) -> CredentialId {
    let now = fleet.clock().now();
    let user = User {
        id: CredentialId::random(),
        name: "bob".into(),
        tenant: Some(tenant(of)),
        role: Role::Operator,
        source: UserSource::Certificate { expires_at: now },
        quota: None,
        created_at: now,
        revoked_at: None,
    };
    fleet
        .transact(|state| {
            let mut draft = state.draft();
            draft.put(RecordKey::User(user.id), Record::User(user.clone()));
            Ok(draft.done(()))
        })
        .await
        .unwrap();
    user.id
}

#[tokio::test]
async fn people_of_others_do_not_exist() {
    let fleet = fleet().await;
    let users = Users {
        fleet: Arc::clone(&fleet),
        admission: Arc::new(Admission::new(Arc::clone(&fleet))),
    };
    let id = user(&fleet, "default").await;
    let stranger = caller(Some("other"), Role::Admin);
    assert!(users.list(&stranger, None).unwrap().is_empty());
    let error = users.revoke(&stranger, &id.to_string()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::UserNotFound);
    let own = caller(Some("default"), Role::Admin);
    let command = UpdateUserCommand {
        user: "bob".into(),
        role: Some(Role::Viewer),
        ..UpdateUserCommand::default()
    };
    let changed = users.update(&own, command).await.unwrap();
    assert_eq!(changed.user.role, Role::Viewer);
    let revoked = users.revoke(&own, "default/bob").await.unwrap();
    assert!(revoked.user.revoked_at.is_some());
    // Still found, to look at.
    let again = users.revoke(&own, "bob").await.unwrap();
    assert_eq!(again.user.revoked_at, revoked.user.revoked_at);
}

#[tokio::test]
async fn a_key_is_told_once_and_reaches_no_further_than_its_maker() {
    let fleet = fleet().await;
    let keys = Keys {
        fleet: Arc::clone(&fleet),
    };
    let command = |of: Option<&str>, role| CreateKeyCommand {
        name: "ci".into(),
        tenant: of.map(tenant),
        role,
        lifetime: None,
        hosts: Vec::new(),
    };
    let own = caller(Some("default"), Role::Admin);
    let (secret, key) = keys
        .create(&own, command(Some("default"), Role::Operator))
        .await
        .unwrap();
    let callers = Callers::new(Arc::clone(&fleet), None);
    let admitted = callers.admit(Proof::Bearer(secret.clone())).await.unwrap();
    assert_eq!(admitted.caller.full_name(), "default/ci");
    let half = secret.expose().rsplit('_').next().unwrap();
    assert_eq!(half.len(), 64);
    assert_ne!(hex::encode(key.secret_hash), half);

    for (who, command, code) in [
        (
            &own,
            command(None, Role::Viewer),
            ErrorCode::PermissionDenied,
        ),
        (
            &own,
            command(Some("other"), Role::Viewer),
            ErrorCode::TenantNotFound,
        ),
        (
            &root(),
            command(Some("none"), Role::Viewer),
            ErrorCode::TenantNotFound,
        ),
        (
            &caller(Some("default"), Role::Operator),
            command(Some("default"), Role::Viewer),
            ErrorCode::PermissionDenied,
        ),
    ] {
        let error = keys.create(who, command).await.unwrap_err();
        assert_eq!(error.code(), code);
    }
    let stranger = caller(Some("other"), Role::Admin);
    assert!(keys.list(&stranger, None).unwrap().is_empty());
    let error = keys
        .revoke(&stranger, &key.id.to_string())
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::CredentialNotFound);
    keys.revoke(&own, &key.id.to_string()[..8]).await.unwrap();
    assert!(callers.admit(Proof::Bearer(secret)).await.is_err());
}

struct Seal;

#[async_trait]
impl FleetAuthority for Seal {
    async fn sign_host(
        &self,
        _: &str,
        _: &TenantName,
        _: HostId,
        _: u64,
    ) -> Result<(IssuedCertificate, [u8; 32])> {
        unreachable!("a token signs nothing")
    }

    async fn sign_user(&self, _: &str, _: CredentialId, _: &str) -> Result<IssuedCertificate> {
        unreachable!("a token signs nothing")
    }

    fn peer(&self, _: &[u8]) -> Result<PeerIdentity> {
        unreachable!("a token is no certificate")
    }

    fn former_peer(&self, _: &str, _: &str, _: &[u8]) -> Result<(PeerIdentity, Timestamp)> {
        unreachable!("a token is no certificate")
    }

    fn fingerprint(&self) -> String {
        "f".repeat(64)
    }

    fn trust_domain(&self) -> &str {
        "ghost.test"
    }
}

#[tokio::test]
async fn a_token_carries_where_to_go_and_only_its_hash_is_kept() {
    let fleet = fleet().await;
    let tokens = Tokens {
        fleet: Arc::clone(&fleet),
        authority: Arc::new(Seal),
        addresses: vec!["core.example:7443".into(), "10.0.0.1:7443".into()],
    };
    let command = |of: Option<&str>, who| CreateTokenCommand {
        tenant: of.map(tenant),
        who,
        lifetime: None,
    };
    let labels = Labels::from([("zone".to_owned(), "eu".to_owned())]);
    let made = tokens
        .create(&root(), command(Some("default"), WhoJoins::Host(labels)))
        .await
        .unwrap();
    let parts: Vec<&str> = made.text.expose().split('.').collect();
    let [form, addresses, id, secret, fingerprint] = parts.as_slice() else {
        panic!("{parts:?}");
    };
    assert_eq!(
        (*form, *fingerprint),
        ("ghost-host-v1", "f".repeat(64).as_str())
    );
    use base64::Engine;
    let read = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(addresses);
    assert_eq!(read.unwrap(), b"core.example:7443,10.0.0.1:7443");
    let kept = fleet
        .read(|state| state.token(id.parse().unwrap()).cloned())
        .unwrap();
    assert_eq!(kept.secret_hash, secrets::hash(secret));

    let person = tokens
        .create(&root(), command(None, WhoJoins::Person(Role::Admin)))
        .await
        .unwrap();
    assert!(person.text.expose().starts_with("ghost-join-v1."));
    assert_eq!(person.text.expose().split('.').count(), 4);

    let own = caller(Some("default"), Role::Admin);
    for (who, command, code) in [
        (
            &root(),
            command(None, WhoJoins::Host(Labels::new())),
            ErrorCode::InvalidArgument,
        ),
        (
            &root(),
            command(None, WhoJoins::Person(Role::Viewer)),
            ErrorCode::InvalidArgument,
        ),
        (
            &own,
            command(None, WhoJoins::Person(Role::Admin)),
            ErrorCode::PermissionDenied,
        ),
        (
            &own,
            command(Some("other"), WhoJoins::Host(Labels::new())),
            ErrorCode::TenantNotFound,
        ),
        (
            &caller(Some("default"), Role::Operator),
            command(Some("default"), WhoJoins::Host(Labels::new())),
            ErrorCode::PermissionDenied,
        ),
        (
            &own,
            CreateTokenCommand {
                lifetime: Some(Duration::from_secs(3601)),
                ..command(Some("default"), WhoJoins::Host(Labels::new()))
            },
            ErrorCode::InvalidArgument,
        ),
    ] {
        let error = tokens.create(who, command).await.unwrap_err();
        assert_eq!(error.code(), code);
    }
}
