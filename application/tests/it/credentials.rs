//! Tokens, certificates and keys: good as long as they should be, and never again afterwards.

use std::time::Duration;

use ghost_application::access::{CreateKeyCommand, EnrollCommand};
use ghost_domain::{ErrorCode, Role, Secret};

use crate::world::{Agent, World};

#[tokio::test]
async fn a_token_is_good_once_and_for_ten_minutes() {
    let world = World::new();
    let agent = world.start().await;
    let use_cases = &agent.use_cases;
    let (token, _) = use_cases
        .create_token
        .execute(&Agent::me(), Role::Operator, true)
        .await
        .unwrap();
    let enroll = |token: &Secret, request: &str| EnrollCommand {
        token: token.clone(),
        request_pem: request.into(),
        name: "laptop".into(),
    };
    assert_eq!(
        use_cases
            .enroll
            .execute(enroll(&token, ""))
            .await
            .unwrap_err()
            .code(),
        ErrorCode::InvalidArgument
    );
    let (a, b) = tokio::join!(
        use_cases.enroll.execute(enroll(&token, "csr")),
        use_cases.enroll.execute(enroll(&token, "csr"))
    );
    assert_eq!(
        [a.is_ok(), b.is_ok()].iter().filter(|won| **won).count(),
        1,
        "exactly one wins"
    );
    let winner = a.or(b).unwrap();
    let principal = use_cases
        .authenticate_certificate
        .execute(winner.id)
        .await
        .unwrap();
    assert_eq!(
        (principal.name.as_str(), principal.role),
        ("laptop", Role::Operator)
    );
    use_cases.renew.execute(&principal, "csr").await.unwrap();
    use_cases
        .revoke_certificate
        .execute(&Agent::me(), &winner.id.to_string())
        .await
        .unwrap();
    assert_eq!(
        use_cases
            .authenticate_certificate
            .execute(winner.id)
            .await
            .unwrap_err()
            .code(),
        ErrorCode::Unauthenticated
    );
    assert_eq!(
        use_cases
            .renew
            .execute(&principal, "csr")
            .await
            .unwrap_err()
            .code(),
        ErrorCode::Unauthenticated
    );

    let (late, _) = use_cases
        .create_token
        .execute(&Agent::me(), Role::Viewer, true)
        .await
        .unwrap();
    world.clock.forward(Duration::from_secs(601));
    assert_eq!(
        use_cases
            .enroll
            .execute(enroll(&late, "csr"))
            .await
            .unwrap_err()
            .code(),
        ErrorCode::TokenInvalid
    );
    for bad in ["", "ghost-join-v1", "ghost-join-v1.x.y.z"] {
        assert_eq!(
            use_cases
                .enroll
                .execute(enroll(&Secret::new(bad), "csr"))
                .await
                .unwrap_err()
                .code(),
            ErrorCode::TokenInvalid
        );
    }
}

#[tokio::test]
async fn keys_are_hashed_expire_and_are_revoked() {
    let world = World::new();
    let agent = world.start().await;
    let use_cases = &agent.use_cases;
    let make = |lifetime| CreateKeyCommand {
        name: "ci".into(),
        role: Role::Viewer,
        guest_access: true,
        lifetime,
    };
    let (secret, key) = use_cases
        .create_key
        .execute(&Agent::me(), make(None))
        .await
        .unwrap();
    assert_eq!(
        use_cases
            .authenticate_key
            .execute(&secret)
            .await
            .unwrap()
            .role,
        Role::Viewer
    );
    let stored = format!("{:?}", world.survivors.lock().store.api_keys);
    assert!(!stored.contains(secret.expose().rsplit('_').next().unwrap()));
    for bad in ["", "ghost_", "ghost_x_y", &format!("ghost_{}_00", key.id)] {
        assert_eq!(
            use_cases
                .authenticate_key
                .execute(&Secret::new(bad))
                .await
                .unwrap_err()
                .code(),
            ErrorCode::Unauthenticated
        );
    }
    let (short, _) = use_cases
        .create_key
        .execute(&Agent::me(), make(Some(Duration::from_secs(60))))
        .await
        .unwrap();
    world.clock.forward(Duration::from_secs(61));
    assert!(use_cases.authenticate_key.execute(&short).await.is_err());
    use_cases
        .revoke_key
        .execute(&Agent::me(), &key.id.to_string()[..8])
        .await
        .unwrap();
    assert!(use_cases.authenticate_key.execute(&secret).await.is_err());
}

#[tokio::test]
async fn what_was_withdrawn_stays_so_in_a_store_rebuilt_from_its_export() {
    let world = World::new();
    let agent = world.start().await;
    let use_cases = &agent.use_cases;
    let (token, _) = use_cases
        .create_token
        .execute(&Agent::me(), Role::Operator, true)
        .await
        .unwrap();
    let enroll = || EnrollCommand {
        token: token.clone(),
        request_pem: "csr".into(),
        name: "laptop".into(),
    };
    let identity = use_cases.enroll.execute(enroll()).await.unwrap();
    // The token is used up in the export too: at the latest now there is one.
    let exported = world.survivors.lock().exported.clone().unwrap();
    assert!(exported.join_tokens.is_empty());
    assert_eq!(exported.certificates.len(), 1);

    let command = CreateKeyCommand {
        name: "ci".into(),
        role: Role::Viewer,
        guest_access: true,
        lifetime: None,
    };
    let (secret, key) = use_cases
        .create_key
        .execute(&Agent::me(), command)
        .await
        .unwrap();
    use_cases
        .revoke_certificate
        .execute(&Agent::me(), &identity.id.to_string())
        .await
        .unwrap();
    let exported = world.survivors.lock().exported.clone().unwrap();
    assert!(exported.certificates[0].revoked_at.is_some());
    assert!(exported.api_keys[0].revoked_at.is_none(), "not revoked yet");
    use_cases
        .revoke_key
        .execute(&Agent::me(), &key.id.to_string())
        .await
        .unwrap();
    drop(agent);

    // The store is lost, and its newest export takes its place.
    {
        let mut survivors = world.survivors.lock();
        survivors.store = survivors.exported.clone().unwrap();
        survivors.store.damage = Some("a test".into());
    }
    let agent = world.start().await;
    let use_cases = &agent.use_cases;
    let refused = [
        use_cases
            .authenticate_certificate
            .execute(identity.id)
            .await
            .unwrap_err()
            .code(),
        use_cases
            .authenticate_key
            .execute(&secret)
            .await
            .unwrap_err()
            .code(),
    ];
    assert_eq!(refused, [ErrorCode::Unauthenticated; 2]);
    assert_eq!(
        use_cases.enroll.execute(enroll()).await.unwrap_err().code(),
        ErrorCode::TokenInvalid
    );
}

#[tokio::test]
async fn an_export_that_failed_is_owed_and_does_not_fail_the_revocation() {
    let world = World::new();
    let agent = world.start().await;
    let command = CreateKeyCommand {
        name: "ci".into(),
        role: Role::Viewer,
        guest_access: true,
        lifetime: None,
    };
    let (secret, key) = agent
        .use_cases
        .create_key
        .execute(&Agent::me(), command)
        .await
        .unwrap();
    world.survivors.lock().export_fails = true;
    let revoked = agent
        .use_cases
        .revoke_key
        .execute(&Agent::me(), &key.id.to_string())
        .await
        .unwrap();
    assert!(revoked.revoked_at.is_some());
    assert!(
        agent
            .use_cases
            .authenticate_key
            .execute(&secret)
            .await
            .is_err()
    );
    assert_eq!(world.survivors.lock().exported, None, "it did fail");
    // It is made up for, minutes before the export that comes anyway.
    agent
        .until("the export that is owed", |agent| {
            Box::pin(async { agent.world.survivors.lock().exported.is_some() })
        })
        .await;
    let exported = world.survivors.lock().exported.clone().unwrap();
    assert!(exported.api_keys[0].revoked_at.is_some());
}

#[tokio::test]
async fn guest_access_goes_with_the_credential() {
    let world = World::new();
    let agent = world.start().await;
    let use_cases = &agent.use_cases;
    let me = Agent::me();
    let token = use_cases.create_token.execute(&me, Role::Admin, false);
    let (token, made) = token.await.unwrap();
    assert!(!made.guest_access);
    let command = EnrollCommand {
        token,
        request_pem: "csr".into(),
        name: "laptop".into(),
    };
    let issued = use_cases.enroll.execute(command).await.unwrap();
    let authenticate = &use_cases.authenticate_certificate;
    let holder = authenticate.execute(issued.id).await.unwrap();
    assert!(!holder.guest_access && holder.role == Role::Admin);
    // Renewal does not widen it, and nobody gives what they do not have.
    use_cases.renew.execute(&holder, "csr").await.unwrap();
    assert!(!authenticate.execute(issued.id).await.unwrap().guest_access);
    let key = |guest_access| CreateKeyCommand {
        name: "ci".into(),
        role: Role::Operator,
        guest_access,
        lifetime: None,
    };
    let denied = ErrorCode::PermissionDenied;
    let refused = use_cases.create_key.execute(&holder, key(true)).await;
    assert_eq!(refused.unwrap_err().code(), denied);
    let refused = use_cases.create_token.execute(&holder, Role::Viewer, true);
    assert_eq!(refused.await.unwrap_err().code(), denied);
    let (secret, _) = use_cases
        .create_key
        .execute(&holder, key(false))
        .await
        .unwrap();
    drop(agent);

    let agent = world.start().await;
    let use_cases = &agent.use_cases;
    let user = use_cases.authenticate_key.execute(&secret).await.unwrap();
    assert!(!user.guest_access && user.role == Role::Operator);
    let holder = use_cases.authenticate_certificate.execute(issued.id).await;
    assert!(!holder.unwrap().guest_access);
}
