//! Every RPC against everybody: whom the door lets in, and what those who are kept out learn.

use std::collections::BTreeSet;

use axum::http::Request;
use ghost_core::domain::{Record, RecordKey};
use ghost_core::presentation::Peer;
use ghost_core::presentation::grpc::methods::{CORE_METHODS, CoreAccess};
use ghost_domain::Role;
use ghost_presentation::grpc::access::METHODS;
use ghost_presentation::{Access, CoreReach};
use tonic::Status;
use tonic::body::Body;

use crate::world::{World, nobody, reason, request, root};

/// Somebody who calls.
struct Who {
    name: &'static str,
    peer: Peer,
    key: Option<String>,
    /// Of the tenant that has the host: its role. `None`: nobody at all.
    role: Option<Role>,
    /// Whether the host exists for them.
    sees_host: bool,
    /// Whether they administer the fleet.
    fleet: bool,
}

async fn everybody(world: &World) -> Vec<Who> {
    let other_host = world.add_host("acme", "other-pc").await;
    let mut all = Vec::new();
    let mut add = |name, key: Option<String>, role, sees_host| {
        all.push(Who {
            name,
            peer: nobody(),
            key,
            role,
            sees_host,
            fleet: false,
        });
    };
    add("no identity", None, None, false);
    for (name, role) in [
        ("viewer", Role::Viewer),
        ("operator", Role::Operator),
        ("admin", Role::Admin),
    ] {
        let key = world.new_key(Some("acme"), role).await;
        add(name, Some(key), Some(role), true);
    }
    let key = world.new_key(Some("other"), Role::Admin).await;
    add(
        "admin of another tenant",
        Some(key),
        Some(Role::Admin),
        false,
    );

    let (mut scoped, secret) = world.key(Some("acme"), Role::Admin);
    scoped.hosts = Some(BTreeSet::from([other_host]));
    world.add_key(scoped).await;
    add(
        "key for another host",
        Some(secret.expose().into()),
        Some(Role::Admin),
        false,
    );

    let (mut expired, secret) = world.key(Some("acme"), Role::Admin);
    expired.expires_at = world.now();
    world.add_key(expired).await;
    add("expired key", Some(secret.expose().into()), None, false);

    let (mut revoked, secret) = world.key(Some("acme"), Role::Admin);
    revoked.revoked_at = Some(world.now());
    world.add_key(revoked).await;
    add("revoked key", Some(secret.expose().into()), None, false);

    let (_, unknown) = world.key(Some("acme"), Role::Admin);
    add(
        "key that was never made",
        Some(unknown.expose().into()),
        None,
        false,
    );

    let user = world.add_user(Some("acme"), "alice", Role::Operator).await;
    let identity = ghost_core::domain::PeerIdentity::User(user.id);
    all.push(Who {
        name: "operator by certificate",
        peer: world.certified(identity.clone()),
        key: None,
        role: Some(Role::Operator),
        sees_host: true,
        fleet: false,
    });
    let mut ended = world.certified(identity);
    if let ghost_core::presentation::PeerKind::Certified { expires_at, .. } = &mut ended.kind {
        *expires_at = world.now();
    }
    all.push(Who {
        name: "certificate that ended",
        peer: ended,
        key: None,
        role: None,
        sees_host: false,
        fleet: false,
    });
    let mut gone = world.add_user(Some("acme"), "bob", Role::Admin).await;
    gone.revoked_at = Some(world.now());
    let peer = world.certified(ghost_core::domain::PeerIdentity::User(gone.id));
    world
        .put(RecordKey::User(gone.id), Record::User(gone))
        .await;
    all.push(Who {
        name: "revoked user",
        peer,
        key: None,
        role: None,
        sees_host: false,
        fleet: false,
    });
    all.push(Who {
        name: "a host",
        peer: world.certified(ghost_core::domain::PeerIdentity::Host {
            tenant: crate::world::tenant("acme"),
            host: world.host,
            generation: 1,
            key_hash: [0; 32],
        }),
        key: None,
        role: None,
        sees_host: false,
        fleet: false,
    });
    all.push(Who {
        name: "root on Core's machine",
        peer: root(),
        key: None,
        role: Some(Role::Admin),
        sees_host: true,
        fleet: true,
    });
    all
}

/// Why the door keeps somebody out; `None`: it does not. A refusal is all of the answer, so that it
/// stands in its head.
async fn refusal(world: &World, who: &Who, path: &str, host: Option<&str>) -> Option<String> {
    let mut request: Request<Body> = request(path, &[], &());
    if let Some(key) = &who.key {
        request
            .headers_mut()
            .insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    if let Some(host) = host {
        request
            .headers_mut()
            .insert("ghost-host", host.parse().unwrap());
    }
    let response = world.front.call(&who.peer, request).await;
    let status = Status::from_header_map(response.headers())?;
    let reason = reason(&status);
    let refusals = [
        "unauthenticated",
        "permission_denied",
        "core_permission_denied",
        "host_not_found",
    ];
    refusals.contains(&reason.as_str()).then_some(reason)
}

#[tokio::test]
async fn every_call_to_a_host_against_everybody() {
    let world = World::start().await;
    let everybody = everybody(&world).await;
    let mut reached = 0;
    for method in METHODS {
        if !method.path.starts_with("/ghost.agent.v1.") || method.path.contains("AccessService") {
            continue;
        }
        for who in &everybody {
            let host = if who.fleet { "acme/pc" } else { "pc" };
            let expected = match (who.role, method.access) {
                (None, _) => Some("unauthenticated"),
                _ if !who.sees_host => Some("host_not_found"),
                (Some(role), Access::Role(needed)) if role < needed => Some("permission_denied"),
                (Some(Role::Viewer), Access::Guests) => Some("permission_denied"),
                _ if method.core == CoreReach::Never => Some("core_permission_denied"),
                _ => None,
            };
            let refused = refusal(&world, who, method.path, Some(host)).await;
            assert_eq!(
                refused.as_deref(),
                expected,
                "{} by {}",
                method.path,
                who.name
            );
            reached += usize::from(refused.is_none());
        }
    }
    assert!(reached > 100, "{reached}");
    assert!(!world.agent.seen.calls.lock().is_empty());
}

#[tokio::test]
async fn every_call_to_core_against_everybody() {
    let world = World::start().await;
    let everybody = everybody(&world).await;
    for method in CORE_METHODS {
        // Core needs no host, and a host changes nothing about who may.
        for who in &everybody {
            let expected = match (method.access, who.role) {
                (CoreAccess::Anyone, _) => None,
                (CoreAccess::Host, _) if who.name == "a host" => None,
                (CoreAccess::Host | CoreAccess::Replica, _) | (_, None) => Some("unauthenticated"),
                (CoreAccess::Role(needed), Some(role)) if role < needed => {
                    Some("permission_denied")
                }
                // Only a certificate is renewed.
                (_, Some(_)) if method.path.ends_with("AccessService/Renew") => {
                    (who.name != "operator by certificate").then_some("permission_denied")
                }
                (CoreAccess::FleetAdmin, Some(_)) if !who.fleet => Some("permission_denied"),
                // A key that is bound to hosts changes nothing that is about more than hosts.
                (_, Some(_)) if who.name == "key for another host" && method.audited => {
                    let about_hosts = ["UpdateHost", "RemoveHost", "QueueCommand", "CancelCommand"];
                    let verb = method.path.rsplit('/').next().unwrap();
                    (!about_hosts.contains(&verb)).then_some("permission_denied")
                }
                (_, Some(_)) => None,
            };
            let refused = refusal(&world, who, method.path, None).await;
            // Of hosts that are not named there is none, for whoever may ask.
            let refused = refused.filter(|reason| {
                reason != "host_not_found"
                    && !(method.path.ends_with("/Enroll") || method.path.ends_with("/Recover"))
            });
            assert_eq!(
                refused.as_deref(),
                expected,
                "{} by {}",
                method.path,
                who.name
            );
        }
    }
}

#[tokio::test]
async fn nobody_manages_the_credentials_of_a_host_through_core() {
    let world = World::start().await;
    let key = world.new_key(Some("acme"), Role::Admin).await;
    let who = Who {
        name: "admin",
        peer: nobody(),
        key: Some(key),
        role: Some(Role::Admin),
        sees_host: true,
        fleet: false,
    };
    for method in METHODS {
        let Some(verb) = method.path.strip_prefix("/ghost.agent.v1.AccessService/") else {
            continue;
        };
        let refused = refusal(&world, &who, method.path, Some("pc")).await;
        // A program renews its own certificate, and asks who it is, at Core, wherever it works.
        let ours = matches!(verb, "Enroll" | "Renew" | "WhoAmI");
        if !ours {
            assert_eq!(refused.as_deref(), Some("core_permission_denied"), "{verb}");
        }
    }
    assert!(world.agent.seen.calls.lock().is_empty());
}

#[tokio::test]
async fn calls_that_nobody_serves_tell_strangers_nothing() {
    let world = World::start().await;
    let paths = [
        "/ghost.core.v1.FleetService/Nothing",
        "/",
        "/ghost.agent.v1.VmService",
    ];
    for path in paths {
        let answer = world.call(&nobody(), path, &[], &()).await;
        assert_eq!(answer.reason(), "unauthenticated", "{path}");
        let answer = world.call(&root(), path, &[], &()).await;
        assert_eq!(answer.reason(), "not_found", "{path}");
    }
}
